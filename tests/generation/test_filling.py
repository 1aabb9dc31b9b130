"""Filled gaps: everything outside is there to the tick, passages end with their gaps, candidates are ranked."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.midi_files import tune
from support.music import piece, random_notes
from support.stand_ins import PlainTokenizer, tiny_model
from support.vocabularies import music_for, vocabulary

import dsmr_mlx
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.gaps import LEAD
from dsmr_mlx.generation import filling, gap_player
from dsmr_mlx.generation.filling import FillReport, fill_gaps
from dsmr_mlx.generation.gap_player import Watch, before_gap, events_of
from dsmr_mlx.generation.generate import generate_variations
from dsmr_mlx.generation.joins import score_passage
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.generation.steering import PitchRange
from dsmr_mlx.music.gapped import GappedMusic, inserted, joined, led, replaced
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps
from dsmr_mlx.tokenizers.performance import (
    FILL,
    PLAY,
    TIME_SHIFT,
    VELOCITY,
    PerformanceTokenizer,
)

TOKENIZER = PerformanceTokenizer()
SPECIALS = [FILL, PLAY]


def rows_outside(notes: Notes, gaps) -> list[tuple]:
    return [row for row in notes.rows if not any(start <= row[0] < end for start, end in gaps)]


def assert_filled(filled, given: Notes, gaps) -> None:
    """Assert that all given notes are there unchanged, and that all others begin and end in a gap."""
    left = filled.notes.rows
    for row in given.rows:
        left.remove(row)
    new = [row for passage in filled.passages for row in passage.notes.rows]
    assert sorted(left) == sorted(new)
    for onset, offset, _, velocity in left:
        assert any(start <= onset < offset <= end for start, end in gaps)
        assert 1 <= velocity <= 127
    n = filled.notes
    assert without_overlaps(n.onset, n.offset, n.pitch, n.velocity) == n, "no two notes of a pitch overlap"
    back = read_notes(midi_bytes(n))
    order = np.lexsort((n.pitch, np.rint(n.onset * 1000)))
    assert np.array_equal(back.pitch, n.pitch[order])
    first = np.rint(n.onset.min() * 1000) / 1000
    np.testing.assert_allclose(back.onset, n.onset[order] - first, atol=6e-4)
    np.testing.assert_allclose(back.offset, n.offset[order] - first, atol=1.001e-3)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), where=st.floats(0, 0.95), length=st.floats(0.1, 2), cut=st.booleans())
def test_everything_outside_a_gap_is_unchanged(knowing, seed, where, length, cut):
    notes = piece(seed, 60)
    start = round(where * notes.duration, 3)
    gap = (start, start + length)
    filled = dsmr_mlx.fill(knowing, TOKENIZER, notes, *gap, n=2, seed=seed, cut_into_gap=cut)
    given = Notes.of(rows_outside(notes, [gap]))
    if cut:
        shorter = np.where(given.onset < start, np.minimum(given.offset, np.maximum(start, given.onset + 1e-3)), np.inf)
        given = Notes(given.onset, np.minimum(given.offset, shorter), given.pitch, given.velocity)
    for version in filled:
        assert_filled(version, given, [gap])


@pytest.mark.parametrize("known", [True, False])
def test_several_gaps_are_filled_from_the_left(knowing, known):
    """Each version goes its own way, and each passage is played after the passages before it."""
    notes, model = piece(1, 50), knowing if known else tiny_model()
    gaps = [(4.0, 4.8), (2.0, 3.0)]
    music = replaced(notes, gaps)
    options = {"n": 2, "seed": 5, "sampling": Sampling(temperature=2.0)}
    filled = fill_gaps(model, TOKENIZER, music, best_of=3, **options)
    assert len(filled) == 2
    assert len({tuple(version.passages[0].notes.onset) for version in filled}) == 2
    for version in filled:
        assert_filled(version, Notes.of(rows_outside(notes, gaps)), gaps)
        assert [(p.start, p.end) for p in version.passages] == sorted(gaps)
        assert len(version.scores) == 2
    again = fill_gaps(model, TOKENIZER, music, best_of=3, **options)
    assert [version.notes for version in again] == [version.notes for version in filled]
    if not known:  # a model that is not shown the second gap plays the first one as if it were alone
        alone = fill_gaps(model, TOKENIZER, replaced(notes, gaps[1:]), **options)
        for version in filled:
            if version.candidate < 2:
                assert alone[version.candidate].passages[0].notes == version.passages[0].notes


def test_music_is_opened_and_pieces_are_put_together(knowing):
    notes, other = piece(1, 30), piece(2, 20)
    music = inserted(notes, 2.0, 1.5)
    expected = joined(notes.take(notes.onset < 2), notes.take(notes.onset >= 2).shifted(1.5))
    assert_filled(fill_gaps(knowing, TOKENIZER, music)[0], expected, [(2.0, 3.5)])
    music = led(notes, other, 2.0)
    end = notes.duration
    assert_filled(fill_gaps(knowing, TOKENIZER, music)[0], joined(notes, other.shifted(end + 2)), [(end, end + 2)])
    music = led(notes, other, 1.0, until=3.0)
    first = notes.take(notes.onset < 3)
    first = Notes(first.onset, np.minimum(first.offset, 4), first.pitch, first.velocity)
    assert_filled(fill_gaps(knowing, TOKENIZER, music)[0], joined(first, other.shifted(4)), [(3.0, 4.0)])


def test_openings_and_endings(knowing):
    """Nothing before the gap, or nothing after it."""
    notes = piece(3, 40)
    opening = dsmr_mlx.fill(knowing, TOKENIZER, notes, 0, 2)[0]
    assert opening.passages[0].notes.onset[0] == 0
    assert_filled(opening, Notes.of(rows_outside(notes, [(0, 2)])), [(0, 2)])
    last = float(notes.onset[-5])
    ending = dsmr_mlx.fill(knowing, TOKENIZER, notes, last, notes.duration + 3, best_of=2)[0]
    assert_filled(ending, Notes.of(rows_outside(notes, [(last, 99)])), [(last, notes.duration + 3)])
    assert ending.scores[0].following is None
    assert np.isfinite(ending.scores[0].nats_per_note)


def test_with_nothing_shown_a_passage_is_an_ordinary_continuation():
    """Token for token: a model that knows no gaps plays what `generate_variations` plays after the same prompt.

    A gap begins after a complete moment, so only continuations that begin with a pause are compared.
    """
    model, compared = tiny_model(), 0
    for seed in range(8):
        notes = random_notes(seed, 40, waits=(30, 60), lengths=(5, 20)).from_first_onset()
        start = float(notes.offset[20]) + 0.001  # all keys are up
        music = replaced(notes, [(start, start + 3)])
        before = before_gap(TOKENIZER, music)
        assert before.held == ()
        drawn = []

        class Spy(Watch):
            def step(self, player, lanes, seconds, drawn=drawn):
                drawn.append(np.array(player.recent)[:, -1])
                super().step(player, lanes, seconds)

        fill_gaps(model, TOKENIZER, music, n=2, seed=seed, watch=Spy())
        expected = generate_variations(model, TOKENIZER, 2, prompt=before.events, seconds=3, seed=seed)
        for lane, variation in zip(np.stack(drawn, axis=1), expected.variations, strict=True):
            n = min(len(lane), len(variation.ids) - 1)
            n = int(np.searchsorted(TOKENIZER.event_grammar().elapsed(lane[:n]), 290))  # then the gap ends
            if TIME_SHIFT <= variation.ids[0] < VELOCITY:
                assert n > 10
                assert lane[:n].tolist() == variation.ids[:n].tolist()
                compared += 1
    assert compared >= 3


def in_haste(logits: mx.array, music) -> mx.array:
    """A processor: no pauses of more than 0.6 s, so that a passage has many tokens."""
    ids = mx.arange(logits.shape[-1])
    return mx.where((ids >= TIME_SHIFT + 60) & (ids < VELOCITY), -mx.inf, logits)


def with_rests(logits: mx.array, music) -> mx.array:
    """A processor: often several pauses in a row."""
    ids = mx.arange(logits.shape[-1])
    return mx.where((ids >= TIME_SHIFT + 80) & (ids < VELOCITY), logits + 4, logits)


def test_the_model_is_shown_what_follows_and_again_before_it_is_forgotten(knowing, monkeypatch):
    shown, foresee = [], Player.foresee

    def spy(player, notes, gap, *more):
        count = foresee(player, notes, gap, *more)
        shown.append((player.ticks[0], player.position, gap, notes.rows[:3], count))
        return count

    monkeypatch.setattr(Player, "foresee", spy)
    notes = piece(0, 400, lengths=(5, 30))
    music = replaced(notes, [(10.0, 42.0)])
    filled = fill_gaps(knowing, TOKENIZER, music, seed=1, processors=[in_haste])[0]
    assert_filled(filled, Notes.of(rows_outside(notes, [(10, 42)])), [(10.0, 42.0)])
    assert len(shown) > 2
    for ticks, _, gap, rows, _ in shown:
        assert gap * 100 + ticks == pytest.approx(4200)
        np.testing.assert_allclose(rows, music.after.shifted(-42).rows[:3])
    assert shown[0][2] <= 30, "the longest gap of training"
    assert shown[0][2] > 29
    assert shown[-1][2] >= 2, "not for the last moments"
    for (_, begin, *_), (_, end, *_, count) in pairwise(shown):
        assert count <= end - begin <= 2 * count + 32 + 40, "soon after it has left the longest horizon"

    shown.clear()
    remembering = tiny_model(fill=0.5, never_predicted=SPECIALS, horizons=(1024, 8))
    fill_gaps(remembering, TOKENIZER, music, n=2, seed=1, processors=[with_rests])
    assert len(shown) == 2, "once for each version, if the memory is long enough"
    shown.clear()
    fill_gaps(knowing, TOKENIZER, replaced(notes, [(10.0, 14.0)]), n=3, seed=1)
    assert shown[0][0] <= 1000
    assert shown[0][2] > 4.0 - 1e-9


@pytest.mark.parametrize("horizons", [(32, 8), (64, 8)])
def test_what_follows_is_not_shown_in_the_middle_of_a_rest(horizons):
    """A rest of several pauses may begin when what follows cannot be shown yet, and go on when it should be."""
    model = tiny_model(fill=0.5, never_predicted=SPECIALS, horizons=horizons)
    for seed in (0, 2):
        notes = piece(seed, 200, lengths=(5, 30))
        music = replaced(notes, [(5.0, 45.0)])
        for version in fill_gaps(model, TOKENIZER, music, seed=seed, processors=[with_rests]):
            assert_filled(version, Notes.of(rows_outside(notes, [(5, 45)])), [(5.0, 45.0)])


def test_a_gap_too_short_for_the_vocabulary_is_refused_before_anything_is_played(knowing, monkeypatch):
    """Later gaps too. A gap that the music before it leaves without a tick stays empty."""
    notes = Notes.of([(0, 0.5, 60, 80), (4, 5, 62, 80)])
    monkeypatch.setattr(Player, "play", lambda *more: pytest.fail("something was played"))
    with pytest.raises(UserError, match=r"a gap from 2\.001 to 2\.002 s: too short for the vocabulary performance"):
        fill_gaps(knowing, TOKENIZER, replaced(notes, [(1.0, 1.5), (2.001, 2.002)]))
    music = replaced(notes, [(2.001, 2.002)])
    gap = gap_player.GapPlayer(TOKENIZER, music, before_gap(TOKENIZER, music))
    player = Player(knowing, TOKENIZER, n=2)
    player.read(gap.before.events)
    gap.play(gap_player.Reader(player, gap.before.events))
    assert gap.lanes == [[], []]
    assert len(gap.notes(0)) == 0


@pytest.mark.parametrize("seconds", [1.0, 28.0, 29.9])
def test_what_follows_is_shown_some_events_before_the_gap(knowing, monkeypatch, seconds):
    """So that upper layers know the last music before the gap, unless the gap would then be too long for the model."""
    notes, shown, read = piece(3, 200, lengths=(5, 30)), [], []
    music = replaced(notes, [(12.0, 12.0 + seconds)])
    foresee, original = Player.foresee, Player.read

    def spy(player, notes, gap, *more):
        shown.append((player.position - 1, player.ticks[0], gap))
        return foresee(player, notes, gap, *more)

    monkeypatch.setattr(Player, "foresee", spy)

    def reading(player, ids, *more, **options):
        read.append(np.asarray(ids))
        original(player, ids, *more, **options)

    monkeypatch.setattr(Player, "read", reading)
    reader = gap_player.Reader(Player(knowing, TOKENIZER))
    before = reader.read_to(music)
    gap = gap_player.GapPlayer(TOKENIZER, music, before)
    gap.play(reader)
    (place, tick, length), end = shown[0], gap.end
    assert tick * 0.01 + length == pytest.approx(end * 0.01)
    assert length <= 30
    lead = len(before.events) - place
    assert LEAD <= lead < LEAD + 20 if seconds == 1 else lead < LEAD
    assert lead == 0 or any(np.array_equal(ids, before.events[place:]) for ids in read)
    assert reader.player.position == 1 + len(before.events)  # it has been shown nothing
    played, _ = reader.shown(gap._show)
    for player in reader.player, played:  # times of steering and temperature count from the gap
        assert player.decode_state.music.new_ticks.tolist() == [0]
    assert played.ticks == reader.player.ticks


def test_what_was_shown_is_not_in_the_music_of_the_next_gap(knowing):
    """The player that reads on knows the passage as it is in the result, and no excerpt."""
    notes, read = piece(4, 60), []

    class Spy(Watch):
        def step(self, player, lanes, seconds):
            read.append(player.position)
            super().step(player, lanes, seconds)

    music = replaced(notes, [(2.0, 3.0), (5.0, 6.0)])
    filled = fill_gaps(knowing, TOKENIZER, music, watch=Spy())[0]
    before = GappedMusic(joined(music.notes, filled.passages[0].notes), music.gaps[1:])
    prompt = before_gap(TOKENIZER, before).events
    second = read[filled.passages[0].tokens :]
    drawn = len(second)
    player = Player(knowing, TOKENIZER)
    player.read(prompt)
    count = player.foresee(before.after.shifted(-6), 1.0, 64)
    assert 1 + len(prompt) + count + 1 in range(second[0] - 4, second[0] + 5)
    assert drawn == filled.passages[1].tokens


def test_learned_positions_end_a_passage_and_its_score():
    """A candidate after which nothing more can be read ranks behind those that can be heard to join."""
    notes, gap = piece(3, 60), (3.0, 5.0)
    prompt = 1 + len(before_gap(TOKENIZER, replaced(notes, [gap])).events)
    followed = []
    for table in (prompt, prompt + 1, prompt + 8, prompt + 40, prompt + 60, prompt + 300):
        model = tiny_model(max_positions=table, rope_dims=0)
        for version in dsmr_mlx.fill(model, TOKENIZER, notes, *gap, n=2, best_of=2, processors=[in_haste]):
            assert_filled(version, Notes.of(rows_outside(notes, [gap])), [gap])
            score = version.scores[0]
            followed.append(score.following.notes)
            assert np.isfinite(score.nats_per_note) == (score.following.notes > 0 < score.passage.notes)
    assert followed[0] == 0 < followed[-1]


def test_steering_and_sampling_work_as_ever(knowing):
    filled = dsmr_mlx.fill(knowing, TOKENIZER, piece(0, 40), 2, 5, processors=[PitchRange(90, 100)])[0]
    assert set(filled.passages[0].notes.pitch.tolist()) <= set(range(90, 101))
    assert len(filled.passages[0].notes)


@pytest.mark.parametrize("name", ["performance", "MIDILike", "TSD", "REMI", "aria"])
@pytest.mark.parametrize("onsets", [[3.0, 3.5, 4.0], [7.9], []], ids=str)
def test_an_opening_may_begin_late_or_be_empty(name, onsets):
    """Its notes are scored as the passage, those of the first four seconds after it as what follows."""
    tokenizer = vocabulary(name)
    model, every = tiny_model(tokenizer.vocab_size), np.arange(0, 20, 0.5)
    notes = Notes(every, every + 0.3, 60 + np.arange(len(every)) % 12, np.full(len(every), 64))
    music = replaced(notes, [(0.0, 8.0)])
    opening = Notes(np.array(onsets), np.array(onsets) + 0.1, np.full(len(onsets), 50), np.full(len(onsets), 64))
    score = score_passage(Player(model, tokenizer), music, before_gap(tokenizer, music), opening)
    assert (score.passage.notes, score.following.notes) == (len(onsets), 9)
    assert np.isinf(score.nats_per_note) == (not onsets)


def test_drums_that_the_vocabulary_leaves_out_are_refused():
    """They would move the beginning of the music that the model reads."""
    times = np.arange(0, 8, 0.5)
    notes = Notes(times, times + 0.3, np.full(16, 60), np.full(16, 64), np.where(times < 2, DRUMS, 0))
    with pytest.raises(UserError, match=r"`notes`: has drums, which performance leaves out; expected"):
        dsmr_mlx.fill(tiny_model(TOKENIZER.vocab_size), TOKENIZER, notes, 5.0, 7.0)


def test_stopping_early_leaves_a_complete_piece(knowing):
    notes = piece(0, 60)
    gaps = [(2.0, 4.0), (6.0, 7.0)]
    calls = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 20

    watch = Watch(stop=stop)
    for version in fill_gaps(knowing, TOKENIZER, replaced(notes, gaps), n=2, watch=watch):
        assert_filled(version, Notes.of(rows_outside(notes, gaps)), gaps)
        assert len(version.passages) == 2
    assert watch.tokens < 80


def test_after_stopping_later_gaps_stay_empty_and_nothing_more_is_read(knowing):
    notes, gaps = piece(0, 60), [(2.0, 4.0), (6.0, 7.0), (8.0, 8.5)]
    watch = Watch(stop=lambda: True)
    (version,) = fill_gaps(knowing, TOKENIZER, replaced(notes, gaps), watch=watch)
    assert_filled(version, Notes.of(rows_outside(notes, gaps)), gaps)
    assert [len(passage.notes) for passage in version.passages[1:]] == [0, 0]
    assert watch.tokens == 1


def test_after_stopping_no_more_candidates_are_put_together(knowing, monkeypatch):
    begun, fill_lane = [], filling._fill_lane
    monkeypatch.setattr(filling, "_fill_lane", lambda *arguments: begun.append(1) or fill_lane(*arguments))
    music = replaced(piece(0, 60), [(2.0, 4.0), (6.0, 7.0)])
    assert len(fill_gaps(knowing, TOKENIZER, music, n=2, best_of=6, watch=Watch(stop=lambda: True))) == 2
    assert len(begun) == 2


def test_stopping_while_candidates_are_scored_keeps_the_first(knowing, monkeypatch):
    scored = []

    def score(*arguments):
        scored.append(score_passage(*arguments))
        return scored[-1]

    monkeypatch.setattr(filling, "score_passage", score)
    gap, report = replaced(piece(0, 30), [(2.0, 2.3)]), FillReport()
    watch = Watch(stop=lambda: len(scored) >= 2)
    stopped = fill_gaps(knowing, TOKENIZER, gap, n=2, best_of=4, watch=watch, report=report)
    assert len(scored) == 2
    assert [version.candidate for version in stopped] == [0, 1]
    assert report.scores == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["performance bpe", "REMI", "Structured", "BEAT", "MIDILike unigram", "REMI programs", "aria"]
)
def test_every_vocabulary_with_a_clock_can_fill(name, monkeypatch):
    """By ranking alone, if it has no FILL: the notes outside keep their times, which the vocabulary could not tell."""
    monkeypatch.setattr(gap_player, "MAX_TOKENS_AT_ONCE", 40)  # random models have notes begin together without end
    monkeypatch.setattr(gap_player, "MAX_TOKENS_PER_SECOND", 20)
    tokenizer = vocabulary(name)
    known = tokenizer.fill_id is not None
    options = {"fill": 0.5, "never_predicted": [tokenizer.fill_id, tokenizer.play_id]} if known else {}
    model = tiny_model(tokenizer.vocab_size, **options)
    notes = music_for(name, 1, 40).from_first_onset()
    gaps = [(1.0, 2.0), (2.5, 3.0)]
    music = replaced(notes, gaps)
    for version in fill_gaps(model, tokenizer, music, n=1, best_of=2, seed=3):
        left = list(zip(version.notes.rows, version.notes.voices.tolist(), strict=True))
        for row in zip(music.notes.rows, music.notes.voices.tolist(), strict=True):
            left.remove(row)
        for (onset, offset, *_), _ in left:
            assert any(start <= onset < offset <= end for start, end in gaps)
        assert sum(len(p.notes) for p in version.passages) == len(left)


def test_the_memory_holds_the_whole_music_before_the_gap(knowing, monkeypatch):
    """The prompt is read as ever, segment by segment: no excerpt of it."""
    notes = piece(0, 800)
    filled = fill_gaps(knowing, TOKENIZER, replaced(notes, [(90.0, 91.0)]), report=(report := FillReport()))
    assert report.prompt_tokens == 1 + len(before_gap(TOKENIZER, replaced(notes, [(90.0, 91.0)])).events) > 2000
    assert len(filled) == 1
    assert report.state_bytes == Player(knowing, TOKENIZER).nbytes


NOTES = piece(0, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replaced(NOTES, [(3, 3)]), "`replace` 3-3: expected an end after the start"),
        (lambda: replaced(NOTES, [(5, 3)]), "`replace` 5-3: expected an end after the start"),
        (lambda: replaced(NOTES, [(-1, 3)]), "`replace` -1-3: expected START-END in seconds, such as 12.5-20"),
        (lambda: replaced(NOTES, [(0, float("inf"))]), "`replace` 0-inf: expected START-END in seconds"),
        (lambda: replaced(NOTES, [(1, 3602)]), "`replace` 1-3602: 3,601 s long, expected at most 3,600"),
        (lambda: replaced(NOTES, [(99, 100)]), "`replace` 99-100: the piece lasts"),
        (lambda: replaced(NOTES, [(1, 3), (2, 4)]), "`replace` 2-4: overlaps 1-3; expected passages apart"),
        (lambda: replaced(NOTES, [(0, 99)]), "`replace` 0-99: no note of the piece is left"),
        (lambda: inserted(NOTES, 99, 2), "`insert` 99: expected 0 to"),
        (lambda: inserted(NOTES, -1, 2), "`insert` -1: expected 0 to"),
        (lambda: inserted(NOTES, 1, 0), "`seconds` 0: expected more than 0 and at most 3,600"),
        (lambda: led(NOTES, NOTES, 4000), "`seconds` 4000: expected more than 0 and at most 3,600"),
    ],
)
def test_gaps_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_wrong_arguments(knowing):
    with pytest.raises(UserError, match="`n` 0: expected at least 1"):
        dsmr_mlx.fill(knowing, TOKENIZER, NOTES, 1, 2, n=0)
    with pytest.raises(UserError, match="`best_of` 2: expected at least 3"):
        dsmr_mlx.fill(knowing, TOKENIZER, NOTES, 1, 2, n=3, best_of=2)
    with pytest.raises(UserError, match="too short for the vocabulary performance, whose ticks last 10 ms"):
        dsmr_mlx.fill(knowing, TOKENIZER, NOTES, 1.001, 1.002)
    with pytest.raises(UserError, match="tokenizer plain: its tokens have no known duration, so it cannot fill gaps"):
        dsmr_mlx.fill(tiny_model(10), PlainTokenizer(), NOTES, 1, 2)
    rests = vocabulary("TSD rests")
    with pytest.raises(UserError, match="its tokens have no known duration"):
        dsmr_mlx.fill(tiny_model(rests.vocab_size), rests, NOTES, 1, 2)


def test_a_single_instrument_other_than_the_piano_is_kept(knowing):
    notes = read_notes(tune(1, 40), programs=True)
    assert notes.programs == [0]
    violin = Notes(notes.onset, notes.offset, notes.pitch, notes.velocity, np.full(len(notes), 40))
    filled = dsmr_mlx.fill(knowing, TOKENIZER, violin, 2, 4)[0]
    assert filled.notes.programs == [40]
    assert len(filled.passages[0].notes)


def test_events_have_no_special_ids():
    assert events_of(TOKENIZER, Notes.empty()).tolist() == []
    assert (events_of(TOKENIZER, NOTES) > 2).all()
    assert events_of(TOKENIZER, NOTES)[0] >= VELOCITY


def test_music_is_read_once(knowing, monkeypatch):
    """What is before a gap stays as it was read when the gap is filled, so that a long piece is not read again."""
    monkeypatch.setattr(Player, "restarted", lambda player: pytest.fail("read again from the beginning"))
    rng = np.random.default_rng(0)
    for seed in range(6):
        notes = piece(seed, 40)
        first, second = np.sort(rng.uniform(0.5, notes.duration - 1, 2))
        gaps = [(first, first + 0.3 * (second - first)), (second, second + 0.8)]
        for version in fill_gaps(knowing, TOKENIZER, replaced(notes, gaps), best_of=1, seed=seed):
            assert_filled(version, Notes.of(rows_outside(notes, gaps)), gaps)
