"""Features of a piece against slow and simple definitions, and their response to changes of the music."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import notes_of, on_grid
from support.performance_reference import first_violation

from dsmr_mlx.evaluation.music import features as F
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    PerformanceTokenizer,
    encode_notes,
)

TOKENIZER = PerformanceTokenizer()


def uniform_notes(seed: int, n: int = 300, seconds: float = 60.0) -> Notes:
    """Return n random notes whose onsets are uniform in `seconds`."""
    rng = np.random.default_rng(seed)
    onset = np.sort(rng.uniform(0, seconds, n))
    onset -= onset[0]
    drawn = rng.uniform(0.05, 1, n), rng.integers(21, 109, n), rng.integers(1, 128, n)
    return on_grid(Notes.sorted(onset, onset + drawn[0], *drawn[1:]))


@st.composite
def pieces(draw) -> Notes:
    """Small pieces with at most 40 notes on the 10 ms grid."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 900), st.integers(1, 300), st.integers(50, 70), st.integers(1, 127)),
            min_size=1,
            max_size=40,
        )
    )
    return on_grid(notes_of(*((on / 100, (on + n) / 100, pitch, v) for on, n, pitch, v in rows)))


def test_histograms_of_a_piece_by_hand():
    """A third, a pause, and a lower note."""
    notes = notes_of((0.0, 1.0, 60, 10), (0.0, 0.5, 64, 13), (2.0, 2.5, 57, 127))
    found = F.features_of(notes)
    filled = {
        d.key: {tuple(d.edges[i : i + 2].round(3)): m for i, m in enumerate(found.masses[d.key]) if m}
        for d in F.DISTRIBUTIONS
    }
    assert filled["pitch"] == {(56.5, 57.5): 1, (59.5, 60.5): 1, (63.5, 64.5): 1}
    assert filled["pitch_class"] == {(-0.5, 0.5): 1, (3.5, 4.5): 1, (8.5, 9.5): 1}
    assert filled["interval"] == {(-7.5, -6.5): 1}
    assert filled["transition"] == {(4 * 12 + 9 - 0.5, 4 * 12 + 9 + 0.5): 1}
    assert filled["velocity"] == {(8.5, 12.5): 1, (12.5, 16.5): 1, (124.5, 128.5): 1}
    assert filled["polyphony"] == pytest.approx({(-0.5, 0.5): 1.0, (0.5, 1.5): 1.0, (1.5, 2.5): 0.5})
    assert filled["density"] == {(0.0, 1.0): 1, (1.0, 2.0): 1}  # windows 0 – 2 and 0.5 – 2.5 s: 2 and 1 notes
    assert sum(filled["ioi"].values()) == 2
    together, apart = filled["ioi"]
    assert together[0] == 0.0
    assert apart[0] < 2.0 < apart[1]
    assert found.means["duration"] == pytest.approx(2 / 3)
    assert found.means["polyphony"] == pytest.approx((0.5 * 2 + 1) / 2.5)
    assert found.figures["pitches"] == 3
    assert found.figures["pitch_range"] == 7
    assert found.figures["voices"] == pytest.approx(2 / 1.5)
    assert found.figures["pitch_class_entropy"] == pytest.approx(math.log2(3))
    assert found.figures["longest_silence"] == 1.0
    assert found.figures["longest_note"] == 1.0


@settings(max_examples=60, deadline=None)
@given(pieces())
def test_masses_add_up(notes):
    """Each note counts once, the masses of polyphony add up to the duration, and no floating-point error is raised."""
    with np.errstate(all="raise"):
        found = F.features_of(notes)
    for key in ("pitch", "pitch_class", "duration", "velocity"):
        assert found.masses[key].sum() == len(notes)
    assert found.masses["ioi"].sum() == len(notes) - 1
    assert found.masses["polyphony"].sum() == pytest.approx(notes.duration)
    assert found.masses["interval"].sum() == len(F.melody(notes)) - 1
    assert found.masses["density"].sum() > 0
    assert found.figures.keys() == F.FIGURES.keys()


@settings(max_examples=60, deadline=None)
@given(pieces())
def test_densities_and_melody_follow_their_definitions(notes):
    expected = []
    if notes.duration > 2:
        start = 0.0
        while start + 2 <= notes.duration + 1e-9:
            expected.append(sum(1 for on in notes.onset if start <= on < start + 2) / 2)
            start += 0.5
        np.testing.assert_allclose(F.densities(notes), expected)
    chords = [[notes.pitch[0]]]
    for before, on, pitch in zip(notes.onset, notes.onset[1:], notes.pitch[1:], strict=False):
        if on - before > F.CHORD_SECONDS:
            chords.append([])
        chords[-1].append(pitch)
    assert F.melody(notes).tolist() == [max(chord) for chord in chords]


def test_rounding_to_ticks_and_velocity_bins_changes_no_histogram():
    for d in F.DISTRIBUTIONS:
        if d.unit == "s":
            ticks = np.arange(1, 2000) / 100
            assert np.abs(d.edges[1:, None] - ticks).min() > 0.004
    velocity = F.BY_KEY["velocity"]
    same = velocity.histogram(notes_of(*((i, i + 1, 60, v) for i, v in enumerate(range(1, 128)))))[0]
    tokens = on_grid(notes_of(*((i, i + 1, 60, v) for i, v in enumerate(range(1, 128)))))
    assert np.array_equal(same, velocity.histogram(tokens)[0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(60, 62), min_size=1, max_size=60), st.integers(1, 8), st.integers(2, 4))
def test_the_loop_ratio_equals_a_brute_force_search(pitches, max_cycle, copies):
    covered = set()
    for cycle in range(1, max_cycle + 1):
        for start in range(len(pitches) - copies * cycle + 1):
            if pitches[start : start + copies * cycle] == copies * pitches[start : start + cycle]:
                covered |= set(range(start, start + copies * cycle))
    notes = notes_of(*((i, i + 1, pitch, 64) for i, pitch in enumerate(pitches)))
    assert F.loop_ratio(notes, max_cycle, copies) == pytest.approx(len(covered) / len(pitches))


@settings(max_examples=60, deadline=None)
@given(pieces())
def test_self_similarity_is_the_mean_of_a_diagonal(notes):
    n = int(notes.onset[-1] // 2) + 1
    windows = [[0] * 12 for _ in range(n)]
    for on, pitch in zip(notes.onset, notes.pitch, strict=True):
        windows[int(on // 2)][pitch % 12] += 1
    matrix = [[np.nan if np.std(a) * np.std(b) == 0 else np.corrcoef(a, b)[0, 1] for b in windows] for a in windows]
    found = F.self_similarity(notes)
    for lag in range(1, F.SIMILARITY_LAGS + 1):
        diagonal = [matrix[i][i + lag] for i in range(n - lag) if not np.isnan(matrix[i][i + lag])]
        expected = np.mean(diagonal) if diagonal else np.nan
        np.testing.assert_allclose(found[lag - 1], expected, atol=1e-9)


def test_key_clarity_is_high_for_a_scale_and_low_for_noise():
    profile = [(0.0, weight, 60 + i, 64) for i, weight in enumerate(np.roll(F.MINOR, 4))]
    assert F.key_clarity(notes_of(*profile)) == pytest.approx(1.0)
    scale = [(i / 4, (i + 1) / 4, 60 + (0, 2, 4, 5, 7, 9, 11, 12)[i % 8], 64) for i in range(240)]
    assert F.key_clarity(notes_of(*scale)) > 0.85
    assert F.key_clarity(uniform_notes(0, 3000)) < 0.6
    assert np.isnan(F.key_clarity(notes_of(*((i, i + 1, 60 + i, 64) for i in range(12)))))


def test_transposition_changes_pitches_only():
    """Intervals, times, velocities, key clarity and self-similarity stay the same."""
    original = uniform_notes(1)
    original = Notes(original.onset, original.offset, 40 + original.pitch % 40, original.velocity)
    moved = Notes(original.onset, original.offset, original.pitch + 5, original.velocity)
    a, b = F.features_of(original), F.features_of(moved)
    assert np.array_equal(np.roll(a.masses["pitch"], 5), b.masses["pitch"])
    assert np.array_equal(np.roll(a.masses["pitch_class"], 5), b.masses["pitch_class"])
    assert not np.array_equal(a.masses["pitch_class"], b.masses["pitch_class"])
    for key in ("interval", "ioi", "duration", "velocity", "polyphony", "density"):
        assert np.array_equal(a.masses[key], b.masses[key])
    assert a.figures == pytest.approx(b.figures)


def test_a_loop_has_full_loop_ratio_and_self_similarity():
    """A loop of four seconds; the self-similarity is high at long lags too."""
    part = uniform_notes(2, 40, 3.5)
    repeats = 20
    onset, offset = ((column + 4 * np.arange(repeats)[:, None]).ravel() for column in (part.onset, part.offset))
    looped = Notes.sorted(onset, offset, np.tile(part.pitch, repeats), np.tile(part.velocity, repeats))
    a, b = F.features_of(uniform_notes(2)).figures, F.features_of(looped).figures
    assert (a["loop_ratio"], b["loop_ratio"]) == (0.0, 1.0)
    assert F.self_similarity(looped)[1::2] == pytest.approx(1.0)
    assert abs(a["similarity_far"]) < 0.15 < b["similarity_far"]


def test_tiny_pieces_have_all_figures_or_nan():
    for notes in (Notes.empty(), notes_of((0, 1, 60, 64)), notes_of((0, 0.01, 60, 64), (0, 0.01, 61, 64))):
        with np.errstate(all="raise"):
            found = F.features_of(notes)
        assert found.masses["pitch"].sum() == len(notes)
        assert found.figures.keys() == F.FIGURES.keys()
    assert np.isnan(F.features_of(Notes.empty()).figures["loop_ratio"])


def test_a_long_piece_takes_less_than_a_second():
    notes = uniform_notes(0, 60_000, 3600)
    began = time.process_time()
    F.features_of(notes)
    assert time.process_time() - began < 1.0


def corrupted(ids: list[int], rng: np.random.Generator) -> np.ndarray:
    """Drop, double or replace some ids."""
    result = []
    for i in ids:
        kind = rng.choice(4, p=[0.9, 0.04, 0.03, 0.03])
        result += [[i], [], [i, i], [int(rng.integers(-1, VOCAB_SIZE + 2))]][kind]
    return np.array(result, np.int64)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(pieces(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.booleans())
def test_syntax_errors_agree_with_the_reference_grammar(notes, seed, corrupt, begun, ended):
    """The same verdict and the same first index; a canonical stream has no error."""
    ids = [*[BOS] * begun, *encode_notes(notes).tolist(), *[EOS] * ended]
    ids = corrupted(ids, np.random.default_rng(seed)) if corrupt else np.array(ids)
    count, first = syntax_errors(ids, TOKENIZER)
    expected = first_violation(ids)
    assert (count == 0) == (expected is None) == (first == "")
    if expected is None:
        return
    inside = expected[0] < len(ids) and not (expected[0] == len(ids) - 1 and ids[-1] == EOS)
    if inside:
        assert first.endswith(f" at index {expected[0]}")


def test_every_syntax_error_counts():
    on, off, shift, velocity = NOTE_ON + 60, NOTE_OFF + 60, TIME_SHIFT + 9, VELOCITY + 15
    good = [velocity, on, shift, off]
    assert syntax_errors(np.array(good), TOKENIZER) == (0, "")
    for ids, count, first in [
        ([velocity, on, shift, on, shift, off], 1, "NOTE_ON_60 at index 3"),
        ([velocity, on, shift, off, off, off], 2, "NOTE_OFF_60 at index 4"),
        ([velocity, on, shift, off, velocity, on, shift, off], 1, "VELOCITY_15 at index 4"),
        ([velocity, on, shift, shift, off], 1, "TIME_SHIFT_10 at index 3"),
        ([velocity, on, on + 1, shift], 3, "at the end"),  # two keys sound, and a pause may not be last
        ([*good, 9999, -1], 2, "id 9999 at index 4"),
    ]:
        assert syntax_errors(np.array(ids), TOKENIZER) == (count, first)
    assert syntax_errors(np.array([], np.int64), TOKENIZER) == (0, "")
