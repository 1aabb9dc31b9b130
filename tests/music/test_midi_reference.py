"""The MIDI reader against independent ones: event by event in exact arithmetic, mido, symusic."""

import io
import re
import warnings

import mido
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import reference_midi
from support.random_midi import random_file
from symusic import Score

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import READ_LIMITS, read_midi
from dsmr_mlx.music.midi_file import MidiFile, read_midi_file
from dsmr_mlx.music.midi_notes import keys_of, songs_of
from dsmr_mlx.music.midi_track import MAX_TICK
from dsmr_mlx.music.repairs import Repair

MISREAD = ("sysex", "unknown_meta")
seeds = st.integers(0, 1 << 32)


def assert_equal_tracks(found: MidiFile, expected: MidiFile) -> None:
    assert len(found.tracks) == len(expected.tracks)
    for a, b in zip(found.tracks, expected.tracks, strict=True):
        for name in ("tick", "kind", "channel", "first", "second"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert (a.tempos, a.markers, a.end) == (b.tempos, b.markers, b.end)
    assert found.repairs == expected.repairs


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans(), st.sampled_from([10, 40, 400, 1500]))
def test_blocks_decode_like_single_bytes(seed, plain, size):
    data = random_file(seed, plain=plain, size=size)
    assert_equal_tracks(read_midi_file(data), read_midi_file(data, blocks=False))


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_tracks_of_length_0_are_read_to_their_end(seed):
    """A recorder that is switched off leaves the length at 0."""
    data = random_file(seed, plain=True, kind=1, size=10)
    expected = read_midi_file(data)
    unset, n = re.subn(rb"MTrk....", b"MTrk\0\0\0\0", data, flags=re.DOTALL)
    expected.repairs[Repair.TRACK_LENGTH] += n
    assert_equal_tracks(read_midi_file(unset), expected)


@settings(max_examples=150, deadline=None)
@given(seeds, st.booleans(), st.sampled_from([3, 12, 40]))
def test_notes_equal_those_of_an_independent_reader(seed, faults, size):
    data = random_file(seed, faults=faults, size=size)
    expected = reference_midi.read(data)
    if not expected:
        assert not len(read_midi(data, allow_empty=True).notes)
        return
    if max(end for _, end, _, _ in expected) > READ_LIMITS.seconds:
        with pytest.raises(UserError, match="s long"):
            read_midi(data)
        return
    found = read_midi(data).notes
    assert list(zip(found.pitch.tolist(), found.velocity.tolist(), strict=True)) == [row[2:] for row in expected]
    np.testing.assert_allclose(found.onset, [row[0] for row in expected], rtol=1e-12, atol=1e-6)
    np.testing.assert_allclose(found.offset, [row[1] for row in expected], rtol=1e-12, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([20, 300]))
def test_channel_messages_equal_those_of_mido(seed, size):
    data = random_file(seed, plain=True, size=size)
    assert_equals_mido(data)


def assert_equals_mido(data: bytes) -> None:
    """Assert that the channel messages of all tracks that mido reads are the same."""
    tracks = mido.MidiFile(file=io.BytesIO(data), clip=True).tracks
    found = read_midi_file(data).tracks
    for ours, theirs in zip(found, tracks, strict=False):
        tick, expected = 0, []
        for message in theirs:
            tick += message.time
            if not message.is_meta and message.type != "sysex":
                expected.append((tick, *message.bytes()))
        rows = zip(ours.tick, ours.kind * 16 + ours.channel % 16, ours.first, ours.second, strict=True)
        assert [tuple(map(int, row))[: len(e)] for row, e in zip(rows, expected, strict=True)] == expected


@settings(max_examples=200, deadline=None)
@given(seeds, st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3))
@example(19, [(0.5, 0)])  # a time of six bytes
@example(450, [(0.3125, 0)])  # a track of length 0
def test_what_mido_reads_of_damaged_files_is_read(seed, changes):
    """Except after SysEx and system messages, which mido takes for running status, and unknown meta events, whose
    times it loses; and tracks of length 0, which it takes for empty."""
    data = bytearray(random_file(seed, plain=True, size=8, kind=1))
    for place, value in changes:
        data[14 + int(place * (len(data) - 14))] = value
    if b"MTrk\0\0\0\0" in data:
        return
    try:
        file = mido.MidiFile(file=io.BytesIO(data), clip=True)
    except Exception:  # mido raises many kinds of exceptions for invalid bytes
        return
    if any(sum(message.time for message in track) > MAX_TICK for track in file.tracks):
        with pytest.raises(UserError, match=r"time stamp of .* ticks, expected at most"):
            read_midi_file(bytes(data))
        return
    messages = [message for track in file.tracks for message in track]
    if all(message.type not in MISREAD and (message.is_meta or message.bytes()[0] < 0xF0) for message in messages):
        assert_equals_mido(bytes(data))


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([20, 300]))
def test_keys_equal_those_of_symusic(seed, size):
    """Of files in which every key is released before it is struck again."""
    data = random_file(seed, plain=True, size=size, kind=1)
    expected = sorted(
        (note.time, note.time + note.duration, note.pitch, note.velocity)
        for track in Score.from_midi(data).tracks
        for note in track.notes
    )
    found = []
    for song in songs_of(file := read_midi_file(data)):
        keys = keys_of(song.messages, file.repairs)
        columns = (keys.struck, keys.released, keys.pitch, keys.velocity)
        found += zip(*(column.tolist() for column in columns), strict=True)
    assert sorted(found) == expected


@settings(max_examples=150, deadline=None)
@given(seeds, st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=12), st.floats(0, 1))
def test_damaged_files_are_read_or_refused(seed, changes, end):
    data = bytearray(random_file(seed, size=10))
    for place, value in changes:
        data[int(place * len(data))] = value
    data = bytes(data[: max(int(end * 1.2 * len(data)), 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found, reason = read_midi(data), ""
        except UserError as error:
            found, reason = None, str(error)
    if found is None:
        assert reason
        assert "\n" not in reason
        return
    assert (found.notes.offset > found.notes.onset).all()
    assert all(count > 0 for count in found.repairs.values())
    assert_equal_tracks(read_midi_file(data), read_midi_file(data, blocks=False))


@pytest.mark.slow
@pytest.mark.asap
def test_keys_of_asap_equal_those_of_symusic(asap_dir):
    files = sorted(asap_dir.rglob("*.mid"))
    assert len(files) > 900
    for path in files:
        data = path.read_bytes()
        (track,) = (track for track in Score.from_midi(data).tracks if len(track.notes))
        columns = track.notes.numpy()
        ends = columns["time"] + columns["duration"]
        expected = np.stack([columns["time"], ends, columns["pitch"], columns["velocity"]])
        file = read_midi_file(data)
        (song,) = songs_of(file)
        keys = keys_of(song.messages, file.repairs)
        found = np.stack([keys.struck, keys.released, keys.pitch, keys.velocity])
        assert not +file.repairs
        assert np.array_equal(found[:, np.lexsort(found)], expected[:, np.lexsort(expected)]), path
