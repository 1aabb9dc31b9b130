"""Reading and writing MIDI: tempo maps, the pedal, invalid files."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.midi_files import midi, note, pedal, tempo, track, tune, variable_length

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import MAX_SECONDS
from dsmr_mlx.music.midi import CORPUS_LIMITS, READ_LIMITS, FileLimits, midi_bytes, read_notes, read_text, write_notes
from dsmr_mlx.music.notes import MIN_SECONDS, Notes


def rows(notes: Notes) -> list[tuple[float, float, int]]:
    """Return (onset, offset, pitch) of each note, rounded to the microsecond."""
    return [
        (round(float(on), 6), round(float(off), 6), int(pitch))
        for on, off, pitch in zip(notes.onset, notes.offset, notes.pitch, strict=True)
    ]


def test_a_file_is_read_from_its_path_or_its_bytes(tmp_path):
    data = midi(track(note(0, 500, 60, 80), note(250, 1000, 64, 3)))
    path = tmp_path / "a.MID"
    path.write_bytes(data)
    notes = read_notes(path)
    assert notes == read_notes(data) == read_notes(str(path))
    assert rows(notes) == [(0, 0.5, 60), (0.25, 1.25, 64)]
    assert notes.velocity.tolist() == [80, 3]
    assert notes.duration == 1.25
    assert [column.dtype for column in (notes.onset, notes.offset)] == [np.float64] * 2
    assert [column.dtype for column in (notes.pitch, notes.velocity)] == [np.uint8] * 2


def test_empty_notes():
    assert len(Notes.empty()) == 0
    assert Notes.empty().duration == 0.0
    with pytest.raises(ValueError, match="expected one length"):
        Notes([0.0], [1.0], [60], [])


def test_rows_round_trip():
    """Rows in any order, or none."""
    ordered = [(0.0, 1.5, 60, 64), (0.5, 1.0, 48, 100), (0.5, 0.75, 72, 1)]
    assert Notes.of(reversed(ordered)).rows == ordered
    assert Notes.of(iter([])) == Notes.empty()
    assert Notes.of([]).rows == []


# Time


def seconds_by_steps(tick: int, tempi: list[tuple[int, int]], tpq: int) -> float:
    """Return the time of a tick, computed one tick at a time."""
    now, us = 0.0, 500_000
    for t in range(tick):
        for at, value in tempi:
            if at == t:
                us = value
        now += us / 1e6 / tpq
    return now


@settings(max_examples=50, deadline=None)
@given(
    tpq=st.integers(1, 960),
    tempi=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 2**24 - 1)), max_size=6),
    starts=st.lists(st.integers(0, 300), min_size=1, max_size=6, unique=True),
)
def test_tempo_map_equals_a_walk_over_all_ticks(tpq, tempi, starts):
    tempi = sorted(tempi, key=lambda event: event[0])
    notes = [note(tick, 40, 30 + i) for i, tick in enumerate(starts)]
    data = midi(track([(tick, tempo(us)) for tick, us in tempi]), track(*notes), tpq=tpq)
    first = seconds_by_steps(min(starts), tempi, tpq)
    expected = sorted(
        (seconds_by_steps(tick, tempi, tpq) - first, seconds_by_steps(tick + 40, tempi, tpq) - first) for tick in starts
    )
    if max(off for _, off in expected) > READ_LIMITS.seconds:
        with pytest.raises(UserError, match="s long"):
            read_notes(data)
        return
    found = read_notes(data)
    ends = [max(off, on + MIN_SECONDS) for on, off in expected]
    np.testing.assert_allclose(found.onset, [on for on, _ in expected], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.offset, ends, rtol=0, atol=1e-9)


def test_a_tempo_change_in_the_middle_of_a_note():
    tempi = track((0, tempo(500_000)), (250, tempo(1_000_000)))
    assert rows(read_notes(midi(tempi, track(note(0, 500, 60))))) == [(0, 0.75, 60)]


def test_leading_silence_is_trimmed():
    assert rows(read_notes(midi(track(note(268_600, 100, 60), note(268_700, 100, 62))))) == [
        (0, 0.1, 60),
        (0.1, 0.2, 62),
    ]


# The pedal


def test_the_pedal_holds_notes_released_under_it():
    events = [
        *note(0, 100, 60),  # released before the pedal: not held
        *note(0, 300, 62),  # pressed before, released under the pedal: held
        *note(250, 50, 64),  # pressed and released under it: held
        *note(250, 950, 65),  # released after it: not held
        (200, pedal(127)),
        (1000, pedal(0)),
    ]
    assert rows(read_notes(midi(track(events)))) == [(0, 0.1, 60), (0, 1, 62), (0.25, 1, 64), (0.25, 1.2, 65)]


def test_the_pedal_is_down_from_64_on():
    values = [(50, 63), (150, 64), (400, 90), (500, 64), (600, 63), (700, 1)]
    events = note(0, 100, 60) + note(0, 200, 62) + [(tick, pedal(value)) for tick, value in values]
    assert rows(read_notes(midi(track(events)))) == [(0, 0.1, 60), (0, 0.6, 62)]


def test_a_pedal_that_never_goes_up_lasts_to_the_end_of_the_track():
    # symusic's own pedal list drops this interval, and with it the final chord of every eleventh ASAP file.
    by_note = note(0, 100, 60) + note(500, 400, 62) + [(50, pedal(127))]
    assert rows(read_notes(midi(track(by_note)))) == [(0, 0.9, 60), (0.5, 0.9, 62)]
    by_pedal = [*note(0, 100, 60), (50, pedal(127)), (1200, pedal(70))]
    assert rows(read_notes(midi(track(by_pedal)))) == [(0, 1.2, 60)]


def test_a_held_note_ends_when_its_pitch_is_played_again():
    events = [*note(0, 100, 60), *note(400, 100, 60), (50, pedal(127)), (1000, pedal(0))]
    assert rows(read_notes(midi(track(events)))) == [(0, 0.4, 60), (0.4, 1, 60)]


def test_a_track_without_pedal_events_gets_the_pedal_of_the_others():
    right = track(note(0, 100, 60), (50, pedal(127)), (800, pedal(0)))
    assert rows(read_notes(midi(right, track(note(0, 100, 40))))) == [(0, 0.8, 40), (0, 0.8, 60)]


def test_a_pedal_belongs_to_its_channel():
    left, right = note(0, 100, 60), note(0, 100, 72, channel=1)
    both = track(left, right, (50, pedal(127)), (800, pedal(0)), (800, pedal(0, channel=1)))
    assert rows(read_notes(midi(both, kind=0))) == [(0, 0.8, 60), (0, 0.1, 72)]


# What is merged and dropped


def test_overlaps_across_tracks_are_cut_and_duplicates_dropped():
    first = note(0, 1000, 60, 50) + note(2000, 100, 64, 50)
    second = note(500, 1000, 60, 70) + note(2000, 300, 64, 40)
    notes = read_notes(midi(track(first), track(second)))
    assert rows(notes) == [(0, 0.5, 60), (0.5, 1.5, 60), (2, 2.3, 64)]
    assert notes.velocity.tolist() == [50, 70, 40]


def test_a_note_of_no_length_is_kept():
    notes = read_notes(midi(track(note(0, 0, 60), note(100, 100, 62))))
    assert rows(notes) == [(0, 0.001, 60), (0.1, 0.2, 62)]


def test_drums_are_ignored():
    notes = read_notes(midi(track(note(0, 100, 36, channel=9), note(300, 100, 60))))
    assert rows(notes) == [(0, 0.1, 60)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(60, 63)), min_size=1, max_size=30))
def test_no_two_notes_of_a_pitch_overlap(events):
    tracks = [track(note(on, length, pitch)) for on, length, pitch in events]
    notes = read_notes(midi(*tracks))
    assert notes == Notes.sorted(notes.onset, notes.offset, notes.pitch, notes.velocity)
    assert notes.onset[0] == 0
    for pitch in range(60, 64):
        mine = notes.pitch == pitch
        on, off = notes.onset[mine], notes.offset[mine]
        assert (off > on).all()
        assert (off[:-1] <= on[1:]).all()
    first = min(on for on, _, _ in events)
    assert {(round(on * 1000), p) for on, _, p in rows(notes)} == {(on - first, p) for on, _, p in events}


# Bad files


def test_riff_files_are_unwrapped():
    data = midi(track(note(0, 100, 60)))
    riff = b"RIFF" + (len(data) + 12).to_bytes(4, "little") + b"RMIDdata" + len(data).to_bytes(4, "little") + data
    assert read_notes(riff) == read_notes(data)


def test_type_2_tracks_are_overlaid():
    assert len(read_notes(midi(track(note(0, 9, 60)), track(note(0, 9, 62)), kind=2))) == 2


GOOD = note(0, 100, 60)
BAD = {
    "empty": (b"", r"not a readable MIDI file \(it is empty\)$"),
    "text": (b"hello", r"not a readable MIDI file \(it does not begin with MThd; audio is not MIDI\)$"),
    "riff of something else": (b"RIFF\x04\x00\x00\x00WAVE", "not a readable MIDI file"),
    "truncated": (midi(track(GOOD))[:-9], "not a readable MIDI file"),
    "no track": (midi(), "no pitched note"),
    "no note": (midi(track((0, tempo(500_000)))), "no pitched note"),
    "drums only": (midi(track(note(0, 100, 36, channel=9))), "no pitched note, only drums, expected"),
    "resolution 0": (midi(track(GOOD), tpq=0), "resolution of 0 ticks per quarter, expected at least 1"),
    "SMPTE": (midi(track(GOOD), tpq=0xE928), "SMPTE time of 23 frames of 40 ticks, expected 24, 25, 29, 30 frames and"),
    "SMPTE without ticks": (midi(track(GOOD), tpq=0xE700), "SMPTE time of 25 frames of 0 ticks, expected"),
    "a month long": (
        midi(track((0, tempo(2**24 - 1)), GOOD, note(86_400_000, 9, 60))),
        r"28\d{5} s long, expected at most 2000000 s",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(name, tmp_path):
    data, reason = BAD[name]
    path = tmp_path / "bad.mid"
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        read_notes(data)
    assert "bad.mid" not in str(caught.value)
    with pytest.raises(UserError, match=reason) as caught:
        read_notes(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_overflowing_ticks_are_refused():
    wait = variable_length(2**28 - 1)
    body = b"".join(wait + message for _, message in GOOD * 5) + b"\x00\xff\x2f\x00"
    with pytest.raises(UserError, match=r"expected 0 or more|s long"):
        read_notes(midi(b"MTrk" + len(body).to_bytes(4, "big") + body))


def test_files_beyond_the_limits_are_refused(tmp_path):
    path = tmp_path / "large.mid"
    path.write_bytes(midi(track(*(note(100 * i, 90, 60) for i in range(20)))))
    assert read_notes(path, limits=FileLimits(1000, 20, 2.0)) == read_notes(path)
    for limits, message in (
        (FileLimits(99, 20, 2.0), "large.mid: larger than 0 MiB, which is too large for a piece of music"),
        (FileLimits(1000, 19, 2.0), "large.mid: 20 notes, expected at most 19"),
        (FileLimits(1000, 20, 1.9), "large.mid: 2 s long, expected at most 2 s"),
    ):
        with pytest.raises(UserError, match=message):
            read_notes(path, limits=limits)


def test_the_longest_generation_can_be_read(tmp_path):
    """A corpus takes pieces of up to 4 hours."""
    seconds = np.linspace(0, MAX_SECONDS, 11)
    notes = Notes(seconds, seconds + 3, np.arange(60, 71), np.full(11, 64))
    write_notes(notes, tmp_path / "long.mid")
    assert read_notes(tmp_path / "long.mid") == notes
    with pytest.raises(UserError, match="1000003 s long, expected at most 14400 s"):
        read_notes(tmp_path / "long.mid", limits=CORPUS_LIMITS)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_notes(tmp_path / "missing.mid")
    with pytest.raises(UserError, match="Is a directory"):
        read_notes(tmp_path)


def read_or_refuse(data: bytes) -> None:
    """Assert that bytes are read as valid notes or refused with a `UserError`."""
    try:
        notes = read_notes(data)
    except UserError:
        return
    assert len(notes) > 0
    assert np.isfinite(notes.onset).all()
    assert (notes.offset > notes.onset).all()
    assert notes.velocity.min() > 0
    assert max(notes.pitch.max(), notes.velocity.max()) < 128


SEED_FILE = midi(
    track((0, tempo(400_000)), (300, tempo(600_000))),
    track(*(note(90 * i, 100, 40 + i) for i in range(30)), (20, pedal(90)), (900, pedal(10))),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SEED_FILE) - 1), st.integers(0, 255)), max_size=8),
    end=st.one_of(st.just(len(SEED_FILE)), st.integers(0, len(SEED_FILE))),
)
def test_damaged_files_give_notes_or_a_user_error(flips, end):
    data = bytearray(SEED_FILE)
    for place, value in flips:
        data[place] = value
    read_or_refuse(bytes(data[:end]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_notes_or_a_user_error(data):
    read_or_refuse(data)
    read_or_refuse(midi(b"MTrk" + len(data).to_bytes(4, "big") + data))


# Writing

milliseconds = st.builds(
    lambda rows: Notes.sorted(
        *zip(*[(a / 1000, (a + n) / 1000, p, v) for (a, p), (n, v) in rows.items()], strict=True)
    ),
    st.dictionaries(
        st.tuples(st.sampled_from(range(0, 100_000, 200)), st.integers(0, 127)),
        st.tuples(st.integers(1, 200), st.integers(1, 127)),
        min_size=1,
        max_size=30,
    ),
)


@settings(max_examples=50, deadline=None)
@given(milliseconds)
def test_written_notes_are_read_back_to_the_millisecond(notes):
    found = read_notes(midi_bytes(notes))
    start = notes.onset[0]
    np.testing.assert_allclose(found.onset, notes.onset - start, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.offset, notes.offset - start, rtol=0, atol=1e-9)
    assert found.pitch.tolist() == notes.pitch.tolist()
    assert found.velocity.tolist() == notes.velocity.tolist()
    assert midi_bytes(notes) == midi_bytes(notes)


def test_pauses_longer_than_a_delta_time_are_written(tmp_path):
    """A delta time has 28 bits: 74.6 hours of milliseconds."""
    notes = Notes([0, 300_000, 300_002], [1, 300_001, 900_000], [60, 62, 64], [64] * 3, [0, 40, 0])
    assert read_notes(midi_bytes(notes, "text"), programs=True) == notes
    write_notes(notes, tmp_path / "long.mid", text="text")
    assert read_text(tmp_path / "long.mid") == "text"


def test_text_is_read_back(tmp_path):
    notes = read_notes(tune())
    path = tmp_path / "out.mid"
    text = 'dsmr-mlx {"seed": 7}\nGrüße ' + "x" * 1000
    write_notes(notes, path, text=text)
    assert read_text(path) == text
    assert len(read_notes(path)) == len(notes)
    write_notes(notes, path)
    assert read_text(path) is None


def test_a_file_without_notes_can_be_written(tmp_path):
    write_notes(Notes.empty(), tmp_path / "empty.mid", text="silence")
    assert read_text(tmp_path / "empty.mid") == "silence"
    with pytest.raises(UserError, match="no pitched note"):
        read_notes(tmp_path / "empty.mid")


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.mid"
    write_notes(read_notes(tune(1)), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out\.mid: cannot be written \(No space left on device\)"):
        write_notes(read_notes(tune(2)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mid"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be written"):
        write_notes(read_notes(tune(2)), tmp_path / "missing" / "out.mid")
