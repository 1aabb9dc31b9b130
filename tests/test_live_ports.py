"""Where music comes from and goes to: devices, the network, files, and the file that keeps it."""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_midi_backend
import mido
import mido.sockets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_stand_ins import check_keys, control, off, on
from midi_files import tune
from mido import Message
from test_imports import imported_by, named

from dsmr_mlx.errors import UserError
from dsmr_mlx.live.clock import RealClock, VirtualClock
from dsmr_mlx.live.network import NetworkPort, Server, connect
from dsmr_mlx.live.ports import DeviceInput, DeviceOutput, PortLost, find_port, port_names
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.sources import FilePlayer, call_on_enter, read_messages
from dsmr_mlx.live.voice import Voice
from dsmr_mlx.midi import Notes, read_notes, write_notes


class Ear:
    """What a source talks to."""

    def __init__(self, clock=None):
        self.clock = clock or SimpleNamespace(serve=lambda timed: None)
        self.heard: queue.SimpleQueue = queue.SimpleQueue()

    def receive(self, message: Message) -> None:
        self.heard.put(message)

    def finish(self) -> None:
        self.heard.put(None)

    def stop(self, reason: str) -> None:
        self.heard.put(reason)

    def next(self) -> Message | str | None:
        return self.heard.get(timeout=5)


@pytest.fixture
def set_backend() -> Iterator[Callable]:
    """Have mido use another backend."""
    before = mido.backend
    yield mido.set_backend
    mido.set_backend(before)


@pytest.fixture
def devices(set_backend) -> Iterator[dict[str, str]]:
    """Two keyboards and a synthesizer."""
    set_backend("fake_midi_backend")
    plugged = {"Grand Piano MIDI 1": "both", "Organ": "in", "Synth Piano": "out"}
    fake_midi_backend.DEVICES.update(plugged)
    yield fake_midi_backend.DEVICES
    fake_midi_backend.DEVICES.clear()
    assert not fake_midi_backend.OPEN


@pytest.mark.parametrize("name", ["clock", "instrument", "network", "ports", "recorder", "scheduler", "sources"])
def test_what_threads_run_does_not_know_mlx(name):
    """Nor whether there are MIDI devices, before it is asked."""
    assert not named(imported_by(f"import dsmr_mlx.live.{name}"), "mlx", "rtmidi", "dsmr_mlx.player")


def test_a_port_is_found_by_a_part_of_its_name(devices):
    assert port_names() == (["Grand Piano MIDI 1", "Organ"], ["Grand Piano MIDI 1", "Synth Piano"])
    assert find_port("--in", "organ", ["Organ", "Organ 2", "organ"]) == "organ"
    assert find_port("--in", "GRAND", port_names()[0]) == "Grand Piano MIDI 1"
    with pytest.raises(UserError, match=r"--out piano: several ports, expected one of 'Grand Piano MIDI 1', 'Synth"):
        DeviceOutput("piano")
    with pytest.raises(UserError, match=r"--in synth: no such port, expected one of 'Grand Piano MIDI 1', 'Organ'"):
        DeviceInput("synth")
    with pytest.raises(UserError, match="--in x: no such port, expected one of no ports"):
        find_port("--in", "x", [])


def test_a_device_plays_and_is_heard_and_ends_the_session_when_it_is_unplugged(devices):
    clock = VirtualClock()
    ear = Ear(clock)
    source, output = DeviceInput("organ"), DeviceOutput("synth")
    port, sink = fake_midi_backend.OPEN
    port.callback(on(50))  # nobody listens yet
    for each in (source, output):
        each.start(ear)
    port.callback(on(60))
    output.send(off(61))
    assert ear.next() == on(60)
    assert sink.sent == [off(61)]
    while clock.step(5.0):
        pass
    assert ear.heard.empty()
    devices.clear()
    while clock.step(9.0):
        pass
    assert {ear.next(), ear.next()} == {"Organ: is not there any more", "Synth Piano: is not there any more"}
    with pytest.raises(PortLost, match="Synth Piano: device is gone"):
        output.send(on(60))
    source.close()
    output.close()


def test_without_its_library_the_message_says_what_to_install(monkeypatch, set_backend):
    monkeypatch.setitem(sys.modules, "rtmidi", None)
    monkeypatch.delitem(sys.modules, "mido.backends.rtmidi", raising=False)
    set_backend("mido.backends.rtmidi")
    with pytest.raises(UserError, match=r"rtmidi cannot be imported, expected it after pip install 'dsmr-mlx\[live\]'"):
        port_names()
    with pytest.raises(UserError, match="--socket, --listen and --in-file do without"):
        DeviceInput("piano")


@contextlib.contextmanager
def joined() -> Iterator[tuple[NetworkPort, NetworkPort]]:
    """Both ends of a connection."""
    server = Server("--listen", ":0")
    near = connect("--socket", f"127.0.0.1:{server.port}")
    far = server.accept()
    try:
        yield near, far
    finally:
        near.close()
        far.close()


def test_messages_cross_the_network_both_ways_and_at_once():
    """Nothing is lost in a burst, and a message takes less than some milliseconds."""
    with joined() as (near, far):
        ears = Ear(), Ear()
        for port, ear in zip((near, far), ears, strict=True):
            port.start(ear)
        burst = [on(i % 128, 1 + i % 127) for i in range(2000)]
        for message in burst:
            near.send(message)
        assert [ears[1].next() for _ in burst] == burst
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            far.send(off(60))
            assert ears[0].next() == off(60)
            times.append(time.perf_counter() - begun)
        assert np.median(times) < 0.02
        near.close()
        assert "the connection was closed" in ears[1].next()
        with pytest.raises(PortLost, match=far.name):
            send_much(far, on(60), 0.001)


def test_a_peer_that_does_not_listen_is_lost_and_not_waited_for():
    with joined() as (near, far):
        near._socket.settimeout(0.05)
        with pytest.raises(PortLost, match="timed out"):
            send_much(near, Message("sysex", data=[0] * 10_000), 0)
        assert far


def send_much(port: NetworkPort, message: Message, wait: float) -> None:
    for _ in range(1000):
        port.send(message)
        time.sleep(wait)


def test_the_network_speaks_what_the_sockets_of_mido_speak():
    """As a server to a client of mido's, and as a client of a server of mido's."""
    server, ear = Server("--listen", "127.0.0.1:0"), Ear()
    client = mido.sockets.connect("127.0.0.1", server.port)
    port = server.accept()
    port.start(ear)
    client.send(on(64))
    port.send(control(64, 127))
    assert ear.next() == on(64)
    assert client.receive() == control(64, 127)
    port.close()
    client.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with mido.sockets.PortServer("127.0.0.1", number) as theirs:
        port, ear = connect("--socket", f"localhost:{number}"), Ear()
        port.start(ear)
        accepted = theirs.accept()
        port.send(on(66))
        accepted.send(off(66))
        assert accepted.receive() == on(66)
        assert ear.next() == off(66)
        port.close()


@pytest.mark.parametrize("text", ["9080", "host", "host:port", ":70000", "a:-1"])
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=rf"--listen {text}: expected HOST:PORT, such as 127.0.0.1:9080"):
        Server("--listen", text)


def test_addresses_that_cannot_be_used_are_named():
    server = Server("--listen", "[::1]:0") if socket.has_ipv6 else Server("--listen", ":0")
    with pytest.raises(UserError, match=r"--listen .*: cannot listen \("):
        Server("--listen", f"[{server.host}]:{server.port}")
    server._socket.close()
    with pytest.raises(UserError, match=r"--socket 127.0.0.1:1: cannot connect \("):
        connect("--socket", "127.0.0.1:1")


def test_a_file_is_played_as_a_person_would(tmp_path):
    """From its first note on, with its tempo and its pedal, drums and all; its end is told after the last message."""
    file = mido.MidiFile(ticks_per_beat=100)
    file.tracks.append(track := mido.MidiTrack())
    track.append(mido.MetaMessage("set_tempo", tempo=1_000_000))
    track += [control(64, 127).copy(time=50), on(60).copy(time=50), off(60).copy(time=100)]
    track.append(mido.MetaMessage("set_tempo", tempo=500_000))
    track += [control(64, 0).copy(time=100), on(36, channel=9), off(36, channel=9)]
    file.save(tmp_path / "file.mid")
    messages = read_messages(tmp_path / "file.mid")
    assert [time for time, _ in messages] == pytest.approx([0, 0, 1, 1.5, 1.5, 1.5])
    clock = VirtualClock()
    ear = Ear(clock)
    FilePlayer(messages).start(ear)
    while clock.step(99.0):
        pass
    heard = [ear.next() for _ in range(7)]
    assert heard == [control(64, 127), on(60), off(60), control(64, 0), on(36, channel=9), off(36, channel=9), None]
    assert clock.now() == pytest.approx(1.5)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.mid").write_bytes(b"MThd\0\0")
    with pytest.raises(UserError, match=r"bad.mid: not a readable MIDI file"):
        read_messages(tmp_path / "bad.mid")
    with pytest.raises(UserError, match=r"none.mid: cannot be read"):
        read_messages(tmp_path / "none.mid")


def test_a_file_plays_in_real_time(tmp_path):
    write_notes(Notes([0, 0.03], [0.02, 0.05], [60, 62], [64, 64]), tmp_path / "file.mid")
    clock = RealClock()
    ear = Ear(clock)
    begun = time.monotonic()
    FilePlayer(read_messages(tmp_path / "file.mid")).start(ear)
    while ear.next() is not None:
        pass
    assert 0.05 <= time.monotonic() - begun < 0.5
    clock.close()


def test_enter_calls_once_for_each_line():
    reading, writing = os.pipe()
    calls = queue.SimpleQueue()
    thread = call_on_enter(lambda: calls.put(1), reading)
    os.write(writing, b"\n\nword\n")
    assert [calls.get(timeout=5) for _ in range(3)] == [1, 1, 1]
    os.close(writing)
    thread.join(5)
    assert not thread.is_alive()
    os.close(reading)


def test_a_thread_of_the_clock_that_fails_is_reported():
    class Broken:
        changed = threading.Condition()

        def due(self) -> float:
            return 0.0

        def act(self, now: float) -> None:
            raise ZeroDivisionError

    clock = RealClock()
    clock.serve(Broken())
    assert isinstance(clock.wait(time.monotonic() + 5), ZeroDivisionError)
    assert clock.wait(0.0) is None
    clock.close()


def test_a_virtual_clock_does_not_wait_for_nothing():
    with pytest.raises(RuntimeError, match="wait for nothing"):
        VirtualClock().wait(float("inf"))


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
    read_notes(path, may_be_empty=True)


def test_what_sounded_is_kept_to_the_millisecond(tmp_path):
    recorder = Recorder(tmp_path / "session.mid")
    clock = VirtualClock()
    clock.serve(recorder)
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
