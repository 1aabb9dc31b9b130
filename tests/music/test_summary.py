"""The figures of a piece, excerpts, names of pitches and times."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import notes_of, random_piece

from dsmr_mlx import UserError
from dsmr_mlx.common.formatting import ROUND_SECONDS, format_time, round_times
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import excerpt, pitch_name, summarize, text_fields

milliseconds = st.tuples(st.integers(0, 400), st.integers(1, 300), st.integers(0, 127), st.integers(1, 127))


@settings(max_examples=60, deadline=None)
@given(st.lists(milliseconds, min_size=1, max_size=12))
def test_figures_equal_a_count_of_every_millisecond(rows):
    notes = notes_of(*((on / 1000, (on + length) / 1000, pitch, v) for on, length, pitch, v in rows))
    sounding = np.zeros(max(on + length for on, length, _, _ in rows), int)
    for on, length, _, _ in rows:
        sounding[on : on + length] += 1
    silences = re.findall("0+", "".join("0" if n == 0 else "1" for n in sounding))
    found = summarize(notes)
    assert found.notes == len(rows)
    assert found.seconds == pytest.approx(len(sounding) / 1000)
    assert found.notes_per_second == pytest.approx(1000 * len(rows) / len(sounding))
    assert (found.lowest, found.highest) == (min(r[2] for r in rows), max(r[2] for r in rows))
    assert found.mean_polyphony == pytest.approx(sounding[sounding > 0].mean())
    assert found.max_polyphony == sounding.max()
    assert found.longest_silence == pytest.approx(max(map(len, silences), default=0) / 1000)


def test_figures_as_text():
    assert str(summarize(Notes.empty())) == "no notes"
    one = str(summarize(notes_of((0, 0.5, 60, 9))))
    assert one == "1 note in 0.5 s, 2.0 a second, C4, 1.0 at once, 1 at most, longest silence 0.0 s"
    two = str(summarize(notes_of((0, 1, 21, 9), (3, 4, 108, 9))))
    assert two == "2 notes in 4.0 s, 0.5 a second, A0 to C8, 1.0 at once, 1 at most, longest silence 2.0 s"


def test_pitch_names():
    assert [pitch_name(p) for p in (0, 21, 60, 61, 69, 108, 127)] == ["C-1", "A0", "C4", "C#4", "A4", "C8", "G9"]


def test_times_as_minutes_and_seconds():
    assert [format_time(s) for s in (0, 59.4, 59.6, 3599.9, 3661)] == ["0:00", "0:59", "1:00", "1:00:00", "1:01:01"]
    assert [format_time(s, 1) for s in (0.04, 0.96, 61.25, 59.99)] == ["0:00.0", "0:01.0", "1:01.2", "1:00.0"]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 14000), st.floats(0.3, 14400), st.integers(2, 30))
def test_ticks_are_round_and_not_too_many(low, seconds, max_times):
    ticks = [value for value, _ in round_times(low, low + seconds, max_times)]
    assert len(ticks) <= max_times + 1
    assert all(low - 1e-6 <= tick <= low + seconds + 1e-6 for tick in ticks)
    steps = {round(b - a, 6) for a, b in pairwise(ticks)}
    assert len(steps) <= 1
    assert steps <= set(ROUND_SECONDS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_two_excerpts_have_each_note_once(seed, place):
    notes = random_piece(seed, 20, 8.0)
    border = place * notes.duration
    first, second = excerpt(notes, 0.0, border), excerpt(notes, border)
    np.testing.assert_allclose(np.concatenate([first.onset, second.onset + border]), notes.onset, atol=1e-9)
    np.testing.assert_array_equal(np.concatenate([first.pitch, second.pitch]), notes.pitch)
    assert first.duration <= border
    np.testing.assert_allclose(second.offset + border, notes.offset[len(first) :], atol=1e-9)


@pytest.mark.parametrize(
    ("start", "seconds", "message"),
    [
        (-1.0, None, "`start` -1: expected 0 or more"),
        (float("nan"), None, "`start` nan: expected 0 or more"),
        (9.0, None, r"`start` 9: the music lasts 2.00 s, expected less"),
        (0.0, 0.0, "`seconds` 0: expected more than 0"),
        (0.0, float("nan"), "`seconds` nan: expected more than 0"),
    ],
)
def test_an_invalid_excerpt_is_an_error(start, seconds, message):
    with pytest.raises(UserError, match=message):
        excerpt(notes_of((0, 2, 60, 60)), start, seconds)


def test_text_fields_of_a_file():
    assert text_fields(None) == text_fields("") == []
    assert text_fields("Intro") == [("text", "Intro")]
    assert text_fields("[" * 100_000) == [("text", "[" * 100_000)]
    for depth in (100, 900, 5_000):
        nested = f'{{"a": {"[" * depth}{"]" * depth}}}'
        assert text_fields(nested) in ([("a", "")], [("text", nested)])
    assert text_fields('{"program": "x", "seed": 0, "top": null}') == [("program", "x"), ("seed", "0")]
    steering = '[{"kind": "Tempo", "bias": 0.08}, {"kind": "Legato"}, {"low": 1.0, "high": [2, true]}]'
    assert text_fields(f'{{"may_end": false, "steering": {steering}}}') == [
        ("may_end", "no"),
        ("steering", "Tempo (bias 0.08), Legato, low 1, high 2, yes"),
    ]
