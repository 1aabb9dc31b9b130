"""The file that keeps what sounded: whole at any time, and what was heard."""

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
def test_the_file_is_whole_whenever_it_is_looked_at(tmp_path_factory, events, data):
    """Saved after any of the messages: every key is up in the end, and a track for each of the two has its own."""
    path = tmp_path_factory.mktemp("live") / "session.mid"
    recorder = Recorder(path)
    assert len(mido.MidiFile(path).tracks) == 3
    looked = data.draw(st.integers(0, len(events)))
    now = 5.0
    for i, (voice, wait, message) in enumerate(events):
        now += wait / 10
        recorder.add(voice, now, message)
        if i + 1 == looked:
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


def test_what_sounded_is_kept_to_the_millisecond(tmp_path):
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
    saved = read_notes(tmp_path / "session.mid")  # by itself, a second later
    assert saved.onset.tolist() == [0.0, 1.0]
    recorder.add(Voice.MODEL, 102.25, off(64))
    recorder.close()
    assert read_notes(tmp_path / "session.mid") == Notes([0, 1.0], [0.5, 2.25], [60, 64], [80, 70])


def test_a_file_that_cannot_be_written_is_refused_at_once_and_later_reported(tmp_path):
    with pytest.raises(UserError, match=r"none/session.mid: cannot be written \(No such file or directory\)"):
        Recorder(tmp_path / "none" / "session.mid")
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = Recorder(folder / "session.mid")
    recorder.add(Voice.HUMAN, 1.0, on(60))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    recorder.act(99.0)  # the music goes on
    with pytest.raises(UserError, match=r"session.mid: cannot be written"):
        recorder.close()


def test_a_tune_comes_back_from_its_messages(tmp_path):
    """What is read from a file and recorded again is the same music."""
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
    """What a file tells of some messages."""
    recorder = Recorder(path)
    for event in events:
        recorder.add(*event)
    recorder.close()
    return read_notes(path)


def test_the_channels_of_the_human_stay_apart_in_the_file(tmp_path):
    """A key that is down on two channels sounds until both let go; the pedal of one channel holds no key of another."""
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


def test_the_pedal_of_the_human_holds_no_note_of_the_models(tmp_path):
    """Though a reader gives one hand's pedal to a track that has none."""
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
def test_what_ends_all_notes_ends_them_in_the_file(tmp_path, number, end):
    """All notes off lifts the keys, not the pedal; all sound off lifts both."""
    events = [(0.0, on(60)), (0.1, control(64, 127)), (0.5, control(number, 0)), (2.0, control(64, 0)), (9.0, on(62))]
    path = tmp_path / "end.mid"
    notes = recorded(path, *((Voice.HUMAN, time, message) for time, message in events), (Voice.HUMAN, 9.5, off(62)))
    assert notes == Notes([0, 9.0], [end, 9.5], [60, 62], [64, 64])
    plain = [e for e in events if e[1].type != "control_change" or e[1].control != 64]
    notes = recorded(path, *((Voice.HUMAN, time, message) for time, message in plain))
    assert notes.offset[0] == 0.5
    check_keys([m for m in mido.MidiFile(path).tracks[1] if not m.is_meta])


def test_reset_of_all_controllers_lifts_the_pedal_in_the_file(tmp_path):
    events = [(0.0, on(60)), (0.1, control(64, 127)), (0.5, off(60)), (1.0, control(121, 0)), (9.0, on(62))]
    notes = recorded(tmp_path / "reset.mid", *((Voice.HUMAN, time, message) for time, message in events))
    assert notes.offset[0] == 1.0


def test_a_key_that_the_model_strikes_is_no_longer_the_humans_in_the_file(tmp_path):
    """As on the keyboard that they share: the human's note ends there, and their release comes to nothing."""
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


def test_a_long_recording_goes_on_in_a_new_file(tmp_path):
    """In none that is there already; each is whole, and time begins anew."""
    path = tmp_path / "session.mid"
    (tmp_path / "session-2.mid").write_bytes(b"mine")
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
    assert (tmp_path / "session-2.mid").read_bytes() == b"mine"
    first, second = (read_notes(path) for path in recorder.paths)
    assert len(first) + len(second) == 80
    assert first.duration < CORPUS_LIMITS.seconds
    assert second.onset[0] == 0.0
    assert len(recorder._unsaved) == 1


def test_a_long_recording_that_cannot_be_written_for_a_while_loses_nothing(tmp_path):
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
