"""A MIDI file that is played into a session sounds like the notes that all other commands read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mido import Message
from support.midi_files import midi, note, pedal, track
from support.random_midi import random_file

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.hands import Hands
from dsmr_mlx.live.sources import read_messages
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes, without_overlaps

pytestmark = pytest.mark.filterwarnings("ignore::dsmr_mlx.music.repairs.RepairWarning")


def heard(messages) -> Notes:
    """Return what the hands make of messages."""
    hands, sounding, rows = Hands(), {}, []
    last = messages[-1].time
    for time, message in [*messages, *((last, message) for message in released(messages))]:
        for change in hands.update(message):
            if change.pitch in sounding:
                onset, velocity = sounding.pop(change.pitch)
                rows.append((onset, time, change.pitch, velocity))
            if change.velocity:
                sounding[change.pitch] = time, change.velocity
    assert not sounding
    return without_overlaps(*np.array(rows).T)


def released(messages):
    """Return the messages that release what is down at the end."""
    hands = Hands()
    for _, message in messages:
        hands.update(message)
    return hands.release_messages()


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([5, 30]))
def test_what_is_heard_equals_the_notes(tmp_path_factory, seed, size):
    """In formats 0 and 1: in format 2 the patterns share channels."""
    path = tmp_path_factory.mktemp("file") / "a.mid"
    path.write_bytes(random_file(seed, size=size, kind=seed % 2))
    try:
        expected = read_notes(path)
    except UserError:
        expected = None
    if expected is None:
        with pytest.raises(UserError, match=r"no pitched note|s long"):
            read_messages(path)
        return
    found = heard(read_messages(path))
    assert found.pitch.tolist() == expected.pitch.tolist()
    assert found.velocity.tolist() == expected.velocity.tolist()
    np.testing.assert_allclose(found.onset, expected.onset, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(found.offset, expected.offset, rtol=1e-9, atol=1.1e-3)


def test_tracks_that_keep_their_pedal_get_a_channel_of_their_own(tmp_path):
    """As in POP909: three tracks share channel 1, two have a pedal of their own."""
    path = tmp_path / "a.mid"
    tracks = [
        track(note(0, 100, 72)),
        track(note(0, 100, 60), (50, pedal(127)), (400, pedal(0))),
        track(note(0, 100, 48), (50, pedal(127)), (900, pedal(0))),
    ]
    path.write_bytes(midi(*tracks))
    found = heard(read_messages(path))
    assert found == read_notes(path)
    assert found.offset.tolist() == [0.9, 0.4, 0.4], "the third hears the last message of the channel"
    assert {message.channel for _, message in read_messages(path)} == {0, 1, 2}


def test_release_and_pressed_pedal_at_one_time(tmp_path):
    path = tmp_path / "a.mid"
    path.write_bytes(midi(track(note(0, 100, 60), (100, pedal(127)), note(300, 0, 62), (500, pedal(0)))))
    assert heard(read_messages(path)) == read_notes(path)


def test_drums_before_the_first_pitched_note_are_left_out(tmp_path):
    """They would all sound at once at 0 s; their controllers are kept."""
    path, drums = tmp_path / "a.mid", [note(tick, 200, 36 + tick // 300, 64, 9) for tick in (0, 300, 900, 1200)]
    path.write_bytes(midi(track((0, b"\xc9\x08"), *drums, note(1000, 500, 60))))
    found = read_messages(path)
    assert found[0] == (0.0, Message("program_change", channel=9, program=8))
    assert [(round(1000 * time), message.type, message.note) for time, message in found[1:]] == [
        *((0, "note_on", 60), (200, "note_on", 40), (400, "note_off", 40), (500, "note_off", 60))
    ]


def test_too_long_a_file_is_refused(tmp_path):
    path = tmp_path / "a.mid"
    path.write_bytes(midi(track(note(0, 100, 60), note(2_000_000_001, 100, 62))))
    for read in (read_notes, read_messages):
        with pytest.raises(UserError, match=r"a\.mid: 2000000 s long, expected at most 2000000 s"):
            read(path)
