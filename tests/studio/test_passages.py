"""Takes with new music in a gap: what is outside stays, what is inside is the library's."""

import pytest
from support.music import on_grid, random_notes
from support.studio_models import make_work

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.filling import fill_gaps
from dsmr_mlx.music.gapped import inserted, led, replaced
from dsmr_mlx.studio import passages
from dsmr_mlx.studio.passages import Fill, candidates
from dsmr_mlx.studio.settings import playing_options
from dsmr_mlx.studio.states import Interrupted
from dsmr_mlx.studio.takes import on_milliseconds, rows_of


@pytest.fixture
def work(tmp_path):
    """Work on a session with two files."""
    work, work_published = make_work(tmp_path)
    work.published = work_published
    for seed in (1, 2):
        rows = rows_of(on_grid(random_notes(seed, 40, lengths=(20, 120))))
        work.session.add("file", name=f"tune {seed}", rows=rows, end=max(row[1] for row in rows), pedal=[(0.5, 100)])
    yield work
    work.session.close()


GAPS = [
    ("replace", {"start": 1.5, "end": 2.5}),
    ("replace", {"start": 0.0, "end": 1.0}),
    ("replace", {"start": 4.5, "end": 6.5}),
    ("insert", {"at": 2.0, "seconds": 1.0}),
    ("insert", {"at": 0.0, "seconds": 1.0}),
    ("lead", {"at": 2.0, "to": 2, "seconds": 1.0}),
    ("lead", {"at": None, "to": 2, "seconds": 1.0}),
    ("lead", {"at": 2.0, "to": 1, "seconds": 1.0}),
]


def gapped(work, kind: str, fields: dict):
    """The music with its gap, made by the library."""
    music = work.session.music(1)
    if kind == "replace":
        return replaced(music, [(fields["start"], fields["end"])])
    if kind == "insert":
        return inserted(music, fields["at"], fields["seconds"])
    return led(music, work.session.music(fields["to"]), fields["seconds"], fields["at"])


@pytest.mark.parametrize(("kind", "fields"), GAPS, ids=str)
def test_everything_outside_stays(work, kind, fields):
    work.session.set({"best_of": 2})
    take = Fill(kind, 1, 2, 5, fields).run(work)
    music = gapped(work, kind, fields)
    start, end = music.gaps[0]
    for number in (take, take + 1):
        made = work.session.music(number)
        outside = made.take((made.onset < start) | (made.onset >= end))
        assert sorted(outside.rows) == sorted(on_milliseconds(music.notes).rows)
        inside = made.take((made.onset >= start) & (made.onset < end))
        assert (inside.offset <= end + 1e-9).all()
        fields_of = work.session.get(number)
        assert (fields_of.kind, fields_of.group, fields_of.parent) == (kind, 1, 1)
        assert fields_of.begin == start
        pedal = work.session.pedal(number)
        assert pedal == sorted(pedal)
    assert work.session.tree.selected == take


def test_a_transition_knows_who_played_what(work):
    """The other piece keeps its voices: people's, and the model's of a passage that was replaced in it."""
    work.session.set({"best_of": 1})
    other = Fill("replace", 2, 1, 5, {"start": 1.5, "end": 2.5}).run(work)
    voices = work.session.voices(other)
    notes = work.session.music(other).onset
    assert voices == [int(1.5 <= onset < 2.5) for onset in notes]
    take = Fill("lead", 1, 1, 5, {"at": 2.0, "to": other, "seconds": 1.0}).run(work)
    onset, led_to = work.session.music(take).onset, work.session.voices(take)
    assert led_to == [*[0] * (onset < 2.0).sum(), *[1] * ((onset >= 2.0) & (onset < 3.0)).sum(), *voices]
    moved = Fill("insert", take, 1, 5, {"at": 1.0, "seconds": 1.5}).run(work)
    at = work.session.music(moved).onset
    assert [v for v, t in zip(work.session.voices(moved), at, strict=True) if t >= 2.5] == [
        v for v, t in zip(led_to, onset, strict=True) if t >= 1.0
    ]


def test_the_passage_is_that_of_the_library(work):
    """Reading from a state gives what reading from the beginning gives, with the same random keys."""
    work.session.set({"best_of": 3})
    take = Fill("replace", 1, 1, 5, {"start": 1.5, "end": 2.5}).run(work)
    loaded = work.load(None)
    job = Fill("replace", 1, 1, 5, {"start": 1.5, "end": 2.5})
    job.work = work
    music = replaced(work.session.music(1), [(1.5, 2.5)])
    work.states._players.clear()
    options = playing_options(work.session.settings, loaded.recommended)
    reader = job._reader(loaded, music, 3, options)
    (filled,) = fill_gaps(loaded.model, loaded.tokenizer, music, n=1, best_of=3, reader=reader)
    assert sorted(on_milliseconds(filled.notes).rows) == sorted(work.session.music(take).rows)


def test_the_same_seed_gives_the_same_passage(work):
    work.session.set({"best_of": 2})
    takes = [Fill("replace", 1, 1, seed, {"start": 1.5, "end": 3.5}).run(work) for seed in (1, 1, 2)]
    one, same, other = (work.session.get(take).rows for take in takes)
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("replace", {"start": 3.0, "end": 2.0}, "expected an end after the start"),
        ("replace", {"start": 100.0, "end": 102.0}, "expected a passage that begins before"),
        ("replace", {"start": 0.0, "end": 100.0}, "no note of the piece is left"),
        ("insert", {"at": 100.0, "seconds": 1.0}, "expected 0 to"),
        ("lead", {"at": 0.0, "to": 2, "seconds": 1.0}, "no note of the piece begins before"),
    ],
)
def test_invalid_gaps_are_named(work, kind, fields, reason):
    with pytest.raises(UserError, match=reason):
        Fill(kind, 1, 1, 0, fields).run(work)
    assert len(work.session.tree.takes) == 2


def test_it_can_be_stopped(work):
    job = Fill("replace", 1, 1, 0, {"start": 1.5, "end": 2.5})
    job.stop.set()
    with pytest.raises(Interrupted):
        job.run(work)
    job = Fill("replace", 1, 1, 0, {"start": 0.5, "end": 60.0})
    work.session.set({"best_of": 0})
    seen = []

    def then(message: dict) -> None:
        seen.append(message)
        if len([m for m in seen if m["type"] == "status" and m["activity"] == "making"]) > 0:
            job.stop.set()

    work.published.then = then
    take = job.run(work)
    work.published.then = lambda message: None
    assert take is not None  # what is there stays
    assert work.session.music(take).duration <= work.session.music(1).duration


@pytest.mark.parametrize(("kind", "fields"), [GAPS[0], GAPS[3], GAPS[5]], ids=str)
def test_takes_grow_while_nothing_is_ranked(work, kind, fields, monkeypatch):
    """Each update has the notes of what follows, and more of the passage; all together are the take."""
    monkeypatch.setattr(passages, "UPDATE_SECONDS", 0.0)
    work.session.set({"best_of": 0})
    take = Fill(kind, 1, 2, 5, fields).run(work)
    start, end = gapped(work, kind, fields).gaps[0]
    for number in (take, take + 1):
        rows, ends, onsets = [], [], []
        for message in work.published.of("notes"):
            if message["take"] == number:
                rows[message["from"] :] = message["notes"]
                new = [onset for onset, *_ in rows if start <= onset < end]
                known = ends[-1] if ends else start
                assert [onset for onset in onsets if onset < known] == [onset for onset in new if onset < known]
                ends, onsets = [*ends, message["end"]], new
                assert all(onset <= ends[-1] for onset in onsets)
        assert len(ends) > 5
        assert ends == sorted(ends)
        assert start <= ends[0] < end <= ends[-1]
        assert len(set(ends)) > len({onset for onset in onsets if onset > start}) + 1, "also while a chord is held"
        assert [tuple(row) for row in rows] == work.session.get(number).rows
        assert not work.session.get(number).growing
    assert len(work.session.tree.actions) == 3, "one for each file, one for the takes"


def test_takes_that_a_fault_interrupts_keep_what_there_is(work, monkeypatch):
    monkeypatch.setattr(passages, "UPDATE_SECONDS", 0.0)
    work.session.set({"best_of": 0})
    step = passages.Watching.step

    def fail(self, player, lanes, seconds):
        step(self, player, lanes, seconds)
        if self.tokens > 5:
            raise UserError("no more")

    monkeypatch.setattr(passages.Watching, "step", fail)
    with pytest.raises(UserError, match="no more"):
        Fill("replace", 1, 1, 5, {"start": 1.5, "end": 2.5}).run(work)
    take = work.session.get(3)
    assert (take.growing, take.end) == (False, 2.5)
    assert work.session.music(3).duration == work.session.music(1).duration


def test_candidates(work):
    loaded = work.load(None)
    assert loaded.why_no_gaps
    assert [candidates(loaded, best_of, 2) for best_of in (None, 0, 1, 5)] == [8, None, 2, 5]
