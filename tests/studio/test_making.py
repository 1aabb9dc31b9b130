"""Takes that are made: what they hold, how they go on from held notes, how they are stopped and steered."""

import gc
import math
import time
import weakref
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from support.music import on_grid, random_notes
from support.studio import Recorder
from support.studio_models import make_work

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio import making
from dsmr_mlx.studio.making import Continue, Prepare
from dsmr_mlx.studio.models import KEPT
from dsmr_mlx.studio.prompt import prompt_at
from dsmr_mlx.studio.states import Interrupted
from dsmr_mlx.studio.takes import rows_of, sounding_across
from dsmr_mlx.studio.work import Stop, Work
from dsmr_mlx.tokenizers.performance import decode_ids


def add_tune(work: Work) -> None:
    """Add a file of some 10 s, whose notes are long."""
    rows = rows_of(on_grid(random_notes(1, 60, lengths=(20, 150))))
    work.session.add("file", name="tune", rows=rows, end=max(row[1] for row in rows))


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """Work on a session with a file of 12 s, and what is published at every token."""
    monkeypatch.setattr(making, "UPDATE_SECONDS", 0.0)
    work, published = make_work(tmp_path)
    add_tune(work)
    yield work, published
    work.session.close()


def make(work: Work, take=1, at=5.0, seconds=1.5, count=1, seed=1) -> Continue:
    """Run a job."""
    job = Continue(take, at, seconds, count, seed)
    job.take_made = job.run(work)
    return job


def stop_after(published: Recorder, job: Continue, n: int, action=None) -> None:
    """Stop a job, or do something else, at its n-th message with notes."""
    seen = []

    def then(message: dict) -> None:
        if message["type"] == "notes":
            seen.append(message)
            if len(seen) == n:
                (action or job.stop.set)()

    published.then = then


def check_take(work: Work, take: int, at: float) -> None:
    """Assert that a take is a proper continuation of its parent."""
    made, parent = work.session.get(take), work.session.music(1)
    music = work.session.music(take)
    assert not made.growing
    held = sounding_across(parent, at)
    assert made.begin == at
    own = made.own
    before = own.take(own.onset < at)
    # Notes that sound across the point begin as in the parent; they may end at another time.
    assert [row[0::2] for row in before.rows] == [row[0::2] for row in held.rows]
    assert (before.offset >= at).all()
    earlier = parent.take(parent.onset < at)
    assert [row[0::2] for row in music.take(music.onset < at).rows] == [row[0::2] for row in earlier.rows]
    for pitch in range(128):  # one key for each pitch
        same = music.take(music.pitch == pitch)
        assert (same.onset[1:] >= same.offset[:-1] - 0.006).all()
    assert made.end == max([at, *(row[1] for row in made.rows)])


def test_models_that_are_not_kept_are_released(tmp_path):
    """Also by the states that they have made."""
    work, _ = make_work(tmp_path, "tiny", "other", "performance")
    models = []
    for name in work.models.names[:3] * 2:
        work.session.set({"model": name})
        Prepare(None).run(work)
        models.append(weakref.ref(work.models._loaded[name].model))
    gc.collect()
    assert len({id(model()) for model in models if model()}) == KEPT


@pytest.mark.parametrize("at", [0.0, 2.37, 5.0, 7.5, 1000.0])
def test_a_take_goes_on_from_any_point(studio, at):
    work, published = studio
    job = make(work, at=at, count=2)
    at = min(at, work.session.music(1).duration)
    assert job.take_made == 2
    for take in (2, 3):
        check_take(work, take, at)
        made = work.session.get(take)
        assert at + 1.5 <= made.end <= at + 4.6  # the last notes may ring on
        assert (made.model, made.seed, made.group) == (work.models.default, 1, 1)
        assert min((row[0] for row in made.rows if row[0] >= at), default=at) >= at
    assert work.session.get(2).rows != work.session.get(3).rows
    assert work.session.tree.selected == 2
    follow(published, work)


def follow(published: Recorder, work: Work) -> None:
    """Assert that who follows the messages has the takes of the session."""
    rows: dict[int, list] = {}
    for message in published.of("notes"):
        own = rows.setdefault(message["take"], [])
        assert message["from"] <= len(own)
        own[message["from"] :] = message["notes"]
        assert all(on < off for on, off, _, _ in own)
    assert rows == {n: [list(row) for row in take.rows] for n, take in work.session.tree.takes.items()}
    stored, _ = work.session.store.load()
    assert {n: take.rows for n, take in stored.takes.items()} == {
        n: take.rows for n, take in work.session.tree.takes.items()
    }


def test_the_notes_are_those_of_the_tokens(studio):
    work, _ = studio
    job = make(work, at=5.0, count=2)
    start = float(work.session.music(1).onset[0])
    for strand in job.strands:
        for lane in strand.lanes:
            decoded = decode_ids(np.array(lane.ids)).shifted(start)
            music = work.session.music(lane.take)
            assert len(decoded) == len(music)
            assert np.array_equal(decoded.pitch, music.pitch)
            assert np.abs(decoded.onset - music.onset).max() <= 0.0051  # the parent's are not on the grid of 10 ms
            new = music.onset >= 5.0
            assert np.abs(decoded.offset - music.offset)[new].max(initial=0) < 1e-6


def test_the_same_seed_gives_the_same_take(studio):
    work, _ = studio
    first, again, other = (make(work, count=2, seed=seed).take_made for seed in (7, 7, 8))
    for i in range(2):
        assert work.session.get(first + i).rows == work.session.get(again + i).rows
        assert work.session.get(first + i).rows != work.session.get(other + i).rows


def test_a_piece_begins_from_nothing(studio):
    work, _ = studio
    take = make(work, take=None, at=None).take_made
    root = work.session.get(work.session.get(take).parent)
    assert (root.kind, root.rows, work.session.get(take).begin) == ("empty", [], 0.0)
    again = make(work, take=None, at=None).take_made
    assert work.session.get(again).parent == root.id
    for _ in range(2):
        work.session.undo()
    assert work.session.tree.hidden == {root.id, take, again}
    assert work.session.tree.selected == 1
    work.session.redo()
    assert work.session.tree.selected == take


def test_stopping_keeps_what_is_there(studio):
    work, published = studio
    job = Continue(1, 5.0, None, 1, 3)
    stop_after(published, job, 25)
    take = job.run(work)
    check_take(work, take, 5.0)
    follow(published, work)
    made = work.session.get(take)
    assert len(made.rows) > 3
    # Going on from there reads nothing that has been read.
    published.messages.clear()
    next_take = make(work, take=take, at=None).take_made
    read = [m for m in published.of("status") if m["activity"] == "reading"]
    assert len(read) <= 1
    before = work.session.music(take)
    music = work.session.music(next_take)
    assert music.take(music.onset < made.end).rows == before.rows


def test_takes_that_cannot_be_written_are_all_complete(studio, monkeypatch):
    work, _ = studio
    extend, told = work.session.extend, []

    def failing(*arguments, **options):
        extend(*arguments, **options)
        told.append(arguments)
        if len(told) > 20:
            raise UserError("disk full")

    monkeypatch.setattr(work.session, "extend", failing)
    with pytest.raises(UserError, match="disk full"):
        make(work, count=3)
    assert [work.session.get(take).growing for take in (2, 3, 4)] == [False] * 3


def test_a_stopped_job_that_has_not_begun_makes_nothing(studio):
    work, _ = studio
    job = Continue(1, 12.0, 3.0, 1, 0)
    job.stop.set()
    with pytest.raises(Interrupted):
        job.run(work)
    assert len(work.session.tree.takes) == 1


def test_without_a_length_it_stays_near_the_clock(studio, monkeypatch):
    work, _ = studio
    monkeypatch.setattr(making, "LEAD_SECONDS", 1.0)
    job = Continue(1, 5.0, None, 1, 3)
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) > 3:
            job.stop.set()

    monkeypatch.setattr(making.time, "sleep", sleep)
    take = job.run(work)
    assert naps
    assert 6.0 <= work.session.get(take).end < 20


@pytest.mark.parametrize(("slowest", "waits"), [(12.0, False), (40.0, True), (math.inf, False)])
def test_the_slowest_take_sets_the_pace(monkeypatch, slowest, waits):
    """A take of few notes is far ahead in seconds of one of many, because both play token by token."""
    job, naps = Continue(1, 5.0, None, 2, 3), []
    job.begin, job.strands = 5.0, [SimpleNamespace(now=slowest), SimpleNamespace(now=max(slowest, 60.0))]
    monkeypatch.setattr(making.time, "sleep", lambda seconds: naps.append(seconds) or job.stop.set())
    job._keep_pace(time.monotonic())
    assert bool(naps) is waits


def steered(studio, settings: dict, at: float | None, count: int = 1, n: int = 12, seconds: float = 4.0):
    """A job that gets other settings at its n-th message."""
    work, published = studio
    job = Continue(1, 5.0, seconds, count, 3)
    now = {}

    def steer() -> None:
        now.update({take: list(work.session.get(take).rows) for take in job.growing})
        now["end"] = max(work.session.get(take).end for take in job.growing)
        work.session.set(settings)
        job.steer(at)

    stop_after(published, job, n * count, steer)
    job.take_made = job.run(work)
    published.then = lambda message: None
    follow(published, work)
    return job, now


@pytest.mark.parametrize("count", [1, 3])
def test_new_settings_apply_to_what_comes(studio, count):
    work, _ = studio
    job, now = steered(studio, {"pitch_range": [60, 64]}, None, count)
    for take in range(job.take_made, job.take_made + count):
        check_take(work, take, 5.0)
        later = [row for row in work.session.get(take).rows if row[0] > now["end"] + 0.02]
        assert later
        assert all(60 <= row[2] <= 64 for row in later)
        kept = [row[::2] for row in now[take] if row[0] < now["end"] - 0.5]
        assert [row[::2] for row in work.session.get(take).rows][: len(kept)] == kept
        assert work.session.get(take).settings == {"pitch_range": [60, 64]}
        assert 8.9 <= work.session.get(take).end <= 12.2


@pytest.mark.parametrize("count", [1, 2])
def test_new_settings_apply_from_where_one_listens(studio, count):
    work, _ = studio
    job, now = steered(studio, {"pitch_range": [60, 64]}, 5.5, count, n=30)
    assert now["end"] > 5.5
    for take in range(job.take_made, job.take_made + count):
        check_take(work, take, 5.0)
        rows = work.session.get(take).rows
        assert [row[::2] for row in rows if row[0] < 5.5] == [row[::2] for row in now[take] if row[0] < 5.5]
        later = [row for row in rows if row[0] >= 5.5]
        assert later
        assert all(60 <= row[2] <= 64 for row in later)


def test_steering_from_a_point_equals_continuing_there(studio):
    """What is made anew is what a new take from this point with these settings would be."""
    work, _ = studio
    job, _ = steered(studio, {"pitch_range": [60, 64]}, 5.5, n=30)
    music = work.session.music(job.take_made)
    again = make(work, take=job.take_made, at=5.5, seconds=3.5, seed=3).take_made
    assert work.session.music(again).rows == music.rows


@pytest.mark.parametrize("other", ["other", pytest.param("aria", marks=pytest.mark.slow)])
def test_another_model_goes_on(tmp_path, monkeypatch, other):
    monkeypatch.setattr(making, "UPDATE_SECONDS", 0.0)
    work, published = make_work(tmp_path, "tiny", other)
    add_tune(work)
    job, now = steered((work, published), {"model": work.models.names[1]}, None)
    made = work.session.get(job.take_made)
    assert made.model == work.models.names[1]
    assert made.end > now["end"]
    check_take(work, job.take_made, 5.0)
    work.session.close()


@pytest.mark.parametrize("at", [None, 5.5])
@pytest.mark.parametrize("other", ["other", pytest.param("aria", marks=pytest.mark.slow)])
def test_stopping_while_another_model_reads_keeps_the_first(tmp_path, monkeypatch, other, at):
    """The states and tokens of the take are those of the model that has played it."""
    monkeypatch.setattr(making, "UPDATE_SECONDS", 0.0)
    work, published = make_work(tmp_path, "tiny", other)
    add_tune(work)
    first, second = (work.load(name) for name in work.models.names[:2])
    job = Continue(1, 5.0, 3.0, 2, 3)

    def switch() -> None:
        work.session.set({"model": second.name})
        job.steer(at)

        def stop(message: dict) -> None:
            if message["type"] == "status" and message["activity"] == "reading":
                job.stop.set()

        published.then = stop

    stop_after(published, job, 40, switch)
    assert job.run(work) == 2
    published.then = lambda message: None
    assert job.stop.is_set()
    follow(published, work)
    models = {loaded.key: loaded.model for loaded in (first, second)}
    assert all(player.model is models[key] for (key, _), player in work.states._players.items())
    stored = {key: {n for n, _ in work.session.store.states(key)} for key in models}
    for take in (2, 3):
        check_take(work, take, 5.0)
        made, music = work.session.get(take), work.session.music(take)
        assert (made.model, made.settings) == (first.name, {})
        ids = work.session.tokens(take, first.tokenizer)
        assert np.array_equal(decode_ids(ids).pitch, music.pitch)
        assert len(ids) in stored[first.key]
        assert len(ids) not in stored[second.key]
        assert (work.session.tokens(take, second.tokenizer) is None) == (other == "aria")
    work.session.close()


def test_settings_that_fail_change_nothing(studio):
    work, published = studio
    job, _ = steered(studio, {"pitch_range": [60, 60], "key": "B major"}, None)  # together they forbid every key
    (error,) = published.of("error")
    assert "forbid every key" in error["message"]
    assert work.session.get(job.take_made).end > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aria", "REMI"])
def test_other_vocabularies_play(tmp_path, name):
    work, published = make_work(tmp_path, name)
    add_tune(work)
    take = make(work, at=4.0, seconds=0.6).take_made
    check_take(work, take, 4.0)
    follow(published, work)
    work.session.close()


@pytest.mark.slow
def test_a_model_that_cannot_says_so(tmp_path):
    work, _ = make_work(tmp_path, "miditok:BEAT")
    with pytest.raises(UserError, match=r"^model .*miditok-BEAT: tokenizer .*"):
        make(work, take=None, at=None)
    assert not work.session.tree.takes
    work.session.close()


def test_reading_ahead_leaves_nothing_to_read(studio, monkeypatch):
    work, published = studio
    Prepare(1).run(work)
    published.messages.clear()
    make(work, at=None)
    assert not [m for m in published.of("status") if m["activity"] == "reading"]
    Prepare(None).run(work)


def test_reading_ahead_that_is_done_again_keeps_what_was_read_since(studio):
    work, published = studio
    rows = rows_of(on_grid(random_notes(2, 1500, lengths=(20, 120))))
    work.session.add("file", name="long", rows=rows, end=max(row[1] for row in rows))
    work.states.memory = 1
    long = Prepare(2)
    published.then = lambda message: long.stop.set()
    with pytest.raises(Interrupted):
        long.run(work)
    published.then = lambda message: None
    Prepare(1).run(work)
    long.stop = Stop()
    long.run(work)
    published.messages.clear()
    make(work, at=None)
    assert not [m for m in published.of("status") if m["activity"] == "reading"]


@pytest.mark.parametrize("seconds", [None, 1.0])
@pytest.mark.parametrize("name", ["tiny", pytest.param("REMI", marks=pytest.mark.slow)])
def test_a_take_goes_on_from_the_state_in_which_it_ended(tmp_path, seconds, name):
    """The model goes on from what it has played, in the order in which it has played it."""
    work, published = make_work(tmp_path, name)
    add_tune(work)
    job = Continue(1, 5.0, seconds, 1, 11)
    if seconds is None:
        stop_after(published, job, 15)
    take = job.run(work)
    published.then = lambda message: None
    music, tokenizer = work.session.music(take), job.loaded.tokenizer
    ids = work.session.tokens(take, tokenizer)
    decoded = tokenizer.decode(ids).shifted(float(music.onset[0]))
    assert np.array_equal(decoded.pitch, music.pitch)
    assert np.abs(decoded.onset - music.onset).max() <= 0.0051
    if name == "tiny":
        assert np.abs(decoded.offset - music.offset).max() <= 0.0051
    prompt = prompt_at(tokenizer, music, music.duration, ids)
    assert np.array_equal(prompt.ids, ids)
    read = []
    work.states.player_at(job.loaded, ids, None, lambda done, total: read.append(total))
    assert not read
    stored, _ = work.session.store.load()
    assert np.array_equal(stored.takes[take].tokens[1], ids)
    work.session.close()


def test_a_point_within_a_take_is_cut_from_what_was_played(studio):
    work, _ = studio
    job = make(work, at=5.0, seconds=4.0)
    music, tokenizer = work.session.music(job.take_made), job.loaded.tokenizer
    ids = work.session.tokens(job.take_made, tokenizer)
    for at in np.linspace(0, music.duration, 23).round(3):
        prompt = prompt_at(tokenizer, music, at, ids)
        assert np.array_equal(prompt.ids, ids[: len(prompt.ids)])
        written = prompt_at(tokenizer, music, at)
        assert sorted(prompt.ids.tolist()) == sorted(written.ids.tolist()) or len(prompt.ids) != len(written.ids)
        assert (prompt.start, prompt.ticks, prompt.begin) == (written.start, written.ticks, written.begin)
        assert sorted(decode_ids(prompt.ids).rows) == sorted(decode_ids(written.ids).rows)


def test_a_piece_that_has_ended_goes_on(studio, monkeypatch):
    """A model that would always end at once plays on for a while first."""
    work, _ = studio
    monkeypatch.setattr(making, "MIN_SECONDS", 2.0)
    work.session.set({"max_polyphony": 1, "max_note_seconds": 0.2})  # so that there are silences
    at = work.session.music(1).duration
    loaded = work.load(None)
    original = type(loaded.model).logits

    def ending(model, hidden):
        logits = original(model, hidden)
        return logits + 50.0 * (mx.arange(logits.shape[-1]) == loaded.tokenizer.eos_id)

    monkeypatch.setattr(type(loaded.model), "logits", ending)
    take = Continue(1, None, None, 1, 3).run(work)
    assert at + 1.0 <= work.session.get(take).end < at + 10.0
    assert work.session.get(take).rows
