"""The recording: a valid MIDI file at any time, with exactly what sounded."""

from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mido import Message
from support.live_stand_ins import check_keys, control, off, on
from support.midi_files import tune

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.clock import VirtualClock
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.sources import read_messages
from dsmr_mlx.music.midi import CORPUS_LIMITS, read_notes
from dsmr_mlx.music.notes import Notes

MESSAGE = st.one_of(
    st.builds(on, st.integers(58, 62), st.integers(0, 127)),
    st.builds(off, st.integers(58, 62)),
    st.builds(control, st.just(64), st.sampled_from([0, 127])),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Voice)), st.integers(0, 20), MESSAGE), max_size=40), st.data())
def test_the_file_is_valid_after_any_message(tmp_path_factory, events, data):
    """Each voice has its own track and channel, in which every key and the pedal are up at the end."""
    path = tmp_path_factory.mktemp("live") / "session.mid"
    recorder = Recorder(path)
    assert len(mido.MidiFile(path).tracks) == 3
    saved_after = data.draw(st.integers(0, len(events)))
    now = 5.0
    for i, (voice, wait, message) in enumerate(events):
        now += wait / 10
        recorder.add(voice, now, message)
        if i + 1 == saved_after:
            recorder.save()
            break
    else:
        recorder.close()
    file = mido.MidiFile(path)
    assert [track.name for track in file.tracks[1:]] == ["human", "model"]
    for channel, track in enumerate(file.tracks[1:]):
        check_keys([m for m in track if not m.is_meta])
        assert {m.channel for m in track if not m.is_meta} <= {channel}
        pedal = [m.value for m in track if m.type == "control_change"]
        assert not pedal or pedal[-1] == 0
    read_notes(path, allow_empty=True)


def test_what_is_held_at_the_end_sounds_until_then(tmp_path):
    recorder = Recorder(tmp_path / "session.mid")
    recorder.add(Voice.HUMAN, 1.0, on(48))
    recorder.close(9.5)
    assert read_notes(tmp_path / "session.mid").offset.tolist() == [8.5]


def test_times_are_exact_to_the_millisecond(tmp_path):
    recorder = Recorder(tmp_path / "session.mid")
    clock = VirtualClock()
    clock.schedule(recorder)
    for voice, time_, message in [
        (Voice.HUMAN, 100.0, on(60, 80)),
        (Voice.HUMAN, 100.5, off(60)),
        (Voice.MODEL, 101.0, on(64, 70)),
        (Voice.MODEL, 101.0, Message("pitchwheel")),
    ]:
        recorder.add(voice, time_, message)
    while clock.step(150.0):
        pass
    saved = read_notes(tmp_path / "session.mid")  # saved by the clock a second later
    assert saved.onset.tolist() == [0.0, 1.0]
    recorder.add(Voice.MODEL, 102.25, off(64))
    recorder.close()
    assert read_notes(tmp_path / "session.mid") == Notes([0, 1.0], [0.5, 2.25], [60, 64], [80, 70])


def test_a_file_that_cannot_be_written_is_an_error_at_the_start_and_at_the_end(tmp_path):
    with pytest.raises(UserError, match=r"none/session.mid: cannot be written \(No such file or directory\)"):
        Recorder(tmp_path / "none" / "session.mid")
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = Recorder(folder / "session.mid")
    recorder.add(Voice.HUMAN, 1.0, on(60))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    recorder.act(99.0)  # no error: the music goes on
    with pytest.raises(UserError, match=r"session.mid: cannot be written"):
        recorder.close()


def test_a_file_played_into_the_recorder_is_the_same_music(tmp_path):
    path = Path(tmp_path / "tune.mid")
    path.write_bytes(tune(3, 40))
    recorder = Recorder(tmp_path / "again.mid")
    for time_, message in read_messages(path):
        recorder.add(Voice.HUMAN, time_, message)
    recorder.close()
    notes, again = read_notes(path), read_notes(tmp_path / "again.mid")
    assert again.pitch.tolist() == notes.pitch.tolist()
    assert np.abs(again.onset - notes.onset).max() < 0.001


def recorded(path: Path, *events: tuple[Voice, float, Message]) -> Notes:
    """Record messages and return the notes of the file."""
    recorder = Recorder(path)
    for event in events:
        recorder.add(*event)
    recorder.close()
    return read_notes(path)


def test_the_channels_of_the_human_stay_separate(tmp_path):
    """A key down on two channels sounds until both release it; a pedal holds only keys of its channel."""
    second = Message("note_on", note=60, velocity=70, channel=1)
    notes = recorded(
        tmp_path / "two.mid",
        (Voice.HUMAN, 0.0, on(60)),
        (Voice.HUMAN, 0.0, control(64, 127)),
        (Voice.HUMAN, 0.1, second),
        (Voice.HUMAN, 0.2, off(60)),
        (Voice.HUMAN, 0.3, on(62, channel=1)),
        (Voice.HUMAN, 0.4, off(62, channel=1)),
        (Voice.HUMAN, 1.0, off(60, channel=1)),
        (Voice.HUMAN, 2.0, control(64, 0)),
    )
    assert notes == Notes.sorted([0, 0.1, 0.3], [0.1, 1.0, 0.4], [60, 60, 62], [64, 70, 64])
    many = [(Voice.HUMAN, i / 10, on(40 + i, channel=i)) for i in range(16) if i != 9]
    assert recorded(tmp_path / "many.mid", *many).pitch.tolist() == [40 + i for i in range(16) if i != 9]
    tracks = mido.MidiFile(tmp_path / "many.mid").tracks
    assert not {m.channel for m in tracks[1] if not m.is_meta} & {1, 9}


def test_the_pedal_of_the_human_does_not_hold_the_notes_of_the_model(tmp_path):
    """Even though readers apply the pedal of one track to a track without pedal events."""
    notes = recorded(
        tmp_path / "pedal.mid",
        (Voice.HUMAN, 0.0, on(60)),
        (Voice.HUMAN, 0.1, control(64, 127)),
        (Voice.HUMAN, 0.2, off(60)),
        (Voice.MODEL, 1.0, on(70)),
        (Voice.MODEL, 1.5, off(70)),
        (Voice.HUMAN, 3.0, control(64, 0)),
    )
    assert notes == Notes([0, 1.0], [3.0, 1.5], [60, 70], [64, 64])


@pytest.mark.parametrize(("number", "end"), [(123, 2.0), (120, 0.5)])
def test_all_notes_off_and_all_sound_off_end_the_notes(tmp_path, number, end):
    """All notes off leaves notes to the pedal; all sound off ends them too."""
    events = [(0.0, on(60)), (0.1, control(64, 127)), (0.5, control(number, 0)), (2.0, control(64, 0)), (9.0, on(62))]
    path = tmp_path / "end.mid"
    notes = recorded(path, *((Voice.HUMAN, time, message) for time, message in events), (Voice.HUMAN, 9.5, off(62)))
    assert notes == Notes([0, 9.0], [end, 9.5], [60, 62], [64, 64])
    plain = [e for e in events if e[1].type != "control_change" or e[1].control != 64]
    notes = recorded(path, *((Voice.HUMAN, time, message) for time, message in plain))
    assert notes.offset[0] == 0.5
    check_keys([m for m in mido.MidiFile(path).tracks[1] if not m.is_meta])


def test_reset_all_controllers_releases_the_pedal(tmp_path):
    events = [(0.0, on(60)), (0.1, control(64, 127)), (0.5, off(60)), (1.0, control(121, 0)), (9.0, on(62))]
    notes = recorded(tmp_path / "reset.mid", *((Voice.HUMAN, time, message) for time, message in events))
    assert notes.offset[0] == 1.0


def test_a_key_pressed_by_the_model_ends_the_note_of_the_human(tmp_path):
    """The human's note-off for that key is then ignored."""
    path = tmp_path / "shared.mid"
    notes = recorded(
        path,
        (Voice.HUMAN, 0.0, on(60)),
        (Voice.MODEL, 1.0, on(60, 80)),
        (Voice.MODEL, 1.5, off(60)),
        (Voice.HUMAN, 6.0, off(60)),
    )
    assert notes == Notes([0, 1.0], [1.0, 1.5], [60, 60], [64, 80])
    for track in mido.MidiFile(path).tracks[1:]:
        check_keys([m for m in track if not m.is_meta])


def test_a_long_recording_continues_in_a_new_file(tmp_path):
    """Existing files are skipped, each file is valid, and time starts at 0 again."""
    path = tmp_path / "session.mid"
    (tmp_path / "session-2.mid").write_bytes(b"other")
    clock, recorder = VirtualClock(), Recorder(path)
    clock.schedule(recorder)
    for i in range(40):
        time_ = 600.0 * i
        while clock.step(time_):
            pass
        recorder.add(Voice.HUMAN, time_, on(60))
        recorder.add(Voice.MODEL, time_ + 1, on(72))
        recorder.add(Voice.MODEL, time_ + 2, off(72))
    recorder.close()
    assert recorder.paths == [path, tmp_path / "session-3.mid"]
    assert (tmp_path / "session-2.mid").read_bytes() == b"other"
    first, second = (read_notes(path) for path in recorder.paths)
    assert len(first) + len(second) == 80
    assert first.duration < CORPUS_LIMITS.seconds
    assert second.onset[0] == 0.0
    assert len(recorder._unsaved) == 1


def test_nothing_is_lost_if_the_disk_fails_for_a_while(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = Recorder(folder / "session.mid")
    (folder / "session.mid").unlink()
    folder.rmdir()
    for i in range(3):
        recorder.add(Voice.HUMAN, 10_000.0 * i, on(60))
        recorder.act(10_000.0 * i + 5)
    folder.mkdir()
    recorder.close()
    assert [len(read_notes(path)) for path in recorder.paths] == [2, 1]
