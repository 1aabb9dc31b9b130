"""Inputs and outputs: devices, the network, files, the Enter key; and the clocks."""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import mido
import mido.sockets
import numpy as np
import pytest
from mido import Message
from support import fake_midi_backend
from support.live_stand_ins import control, off, on
from support.processes import imported_by, named

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live import ports
from dsmr_mlx.live.clock import RealClock, VirtualClock
from dsmr_mlx.live.network import NetworkPort, Server, connect
from dsmr_mlx.live.ports import DeviceInput, DeviceOutput, PortLost, VirtualInput, VirtualOutput, find_port, port_names
from dsmr_mlx.live.sources import EnterKey, FilePlayer, read_messages
from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.music.notes import Notes


class QueueListener:
    """A `Listener` that queues all calls."""

    def __init__(self, clock=None):
        self.clock = clock or SimpleNamespace(schedule=lambda task: None)
        self.calls: queue.SimpleQueue = queue.SimpleQueue()

    def receive(self, message: Message) -> None:
        """See `ports.Listener`."""
        self.calls.put(message)

    def pass_turn(self) -> None:
        """See `ports.Listener`."""
        self.calls.put("turn")

    def finish(self) -> None:
        """See `ports.Listener`."""
        self.calls.put(None)

    def stop(self, reason: str) -> None:
        """See `ports.Listener`."""
        self.calls.put(reason)

    def next(self) -> Message | str | None:
        """Return the next call: a message, "turn", None for `finish`, or the reason of `stop`."""
        return self.calls.get(timeout=5)


@pytest.fixture
def set_backend() -> Iterator[Callable]:
    """Return a function that makes mido use another backend."""
    before = mido.backend
    yield mido.set_backend
    mido.set_backend(before)


@pytest.fixture
def devices(set_backend) -> Iterator[dict[str, str]]:
    """Two keyboards and a synthesizer."""
    set_backend("support.fake_midi_backend")
    plugged = {"Grand Piano MIDI 1": "both", "Organ": "in", "Synth Piano": "out"}
    fake_midi_backend.DEVICES.update(plugged)
    yield fake_midi_backend.DEVICES
    fake_midi_backend.DEVICES.clear()
    assert not fake_midi_backend.OPEN


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clock", "instrument", "network", "ports", "recorder", "scheduler", "sources"])
def test_modules_run_by_threads_do_not_import_mlx(name):
    """Nor the MIDI backend before it is needed."""
    assert not named(imported_by(f"import dsmr_mlx.live.{name}"), "mlx", "rtmidi", "dsmr_mlx.generation.player")


def test_a_port_is_found_by_part_of_its_name(devices):
    assert port_names() == (["Grand Piano MIDI 1", "Organ"], ["Grand Piano MIDI 1", "Synth Piano"])
    assert find_port("in_port", "organ", ["Organ", "Organ 2", "organ"]) == "organ"
    assert find_port("in_port", "GRAND", port_names()[0]) == "Grand Piano MIDI 1"
    with pytest.raises(
        UserError, match=r"`out_port` piano: several ports match, expected one of 'Grand Piano MIDI 1', 'S"
    ):
        DeviceOutput("piano")
    with pytest.raises(UserError, match=r"`in_port` synth: no such port, expected one of 'Grand Piano MIDI 1', 'Organ"):
        DeviceInput("synth")
    with pytest.raises(UserError, match="`in_port` x: no such port, this computer has none"):
        find_port("in_port", "x", [])


def test_devices_send_and_receive_and_tell_when_they_are_unplugged(devices):
    listener = QueueListener(VirtualClock())
    source, output = DeviceInput("organ"), DeviceOutput("synth")
    port, sink = fake_midi_backend.OPEN
    port.callback(on(50))  # before the start: ignored
    for each in (source, output):
        each.start(listener)
    port.callback(on(60))
    output.send(off(61))
    assert listener.next() == on(60)
    assert sink.sent == [off(61)]
    assert (source.lost(), output.lost()) == (None, None)
    devices.clear()
    assert (source.lost(), output.lost()) == (
        "Organ: the device was unplugged",
        "Synth Piano: the device was unplugged",
    )
    with pytest.raises(PortLost, match="Synth Piano: device is gone"):
        output.send(on(60))
    source.close()
    output.close()


def failing():
    """List the names of ports while the system is busy."""
    raise OSError("busy")


def test_a_listing_that_fails_says_nothing_about_a_device(devices, monkeypatch):
    source = DeviceInput("organ")
    monkeypatch.setattr(mido, "get_input_names", failing)
    assert source.lost() is None
    source.close()


def test_virtual_ports_are_there_for_other_programs(devices, monkeypatch):
    listener = QueueListener(VirtualClock())
    source, output = VirtualInput("dsmr-mlx"), VirtualOutput("dsmr-mlx")
    source.start(listener)
    port, sink = fake_midi_backend.OPEN
    assert [(each.name, each.virtual) for each in (port, sink)] == [("dsmr-mlx", True)] * 2
    port.callback(on(60))
    assert listener.next() == on(60)
    output.send(off(61))
    assert sink.sent == [off(61)]
    assert (source.lost(), output.lost()) == (None, None)
    source.close()
    output.close()
    monkeypatch.setattr(ports, "HAS_VIRTUAL", False)
    with pytest.raises(UserError, match="Windows has no virtual MIDI ports"):
        VirtualInput("dsmr-mlx")


def test_without_the_midi_backend_the_error_names_the_extra(monkeypatch, set_backend):
    monkeypatch.setitem(sys.modules, "rtmidi", None)
    monkeypatch.delitem(sys.modules, "mido.backends.rtmidi", raising=False)
    set_backend("mido.backends.rtmidi")
    with pytest.raises(UserError, match=r"rtmidi cannot be imported, install it with pip install 'dsmr-mlx\[live\]'"):
        port_names()
    with pytest.raises(UserError, match="`socket`, `listen` and `in_file` work without it"):
        DeviceInput("piano")


def test_a_midi_backend_that_is_broken_tells_the_reason(monkeypatch, devices):
    def broken():
        raise ImportError("dlopen: incompatible\narchitecture", name="rtmidi._rtmidi")

    monkeypatch.setattr(mido, "get_input_names", broken)
    with pytest.raises(UserError, match=r"cannot be imported \(dlopen: incompatible architecture\), install it again"):
        port_names()


@contextlib.contextmanager
def joined() -> Iterator[tuple[NetworkPort, NetworkPort]]:
    """Both ends of a connection."""
    server = Server(":0")
    near = connect(f"127.0.0.1:{server.port}")
    far = server.accept()
    try:
        yield near, far
    finally:
        near.close()
        far.close()


def test_messages_cross_the_network_both_ways_without_delay():
    """A burst arrives complete, and a single message takes a few milliseconds."""
    with joined() as (near, far):
        listeners = QueueListener(), QueueListener()
        for port, listener in zip((near, far), listeners, strict=True):
            port.start(listener)
        burst = [on(i % 128, 1 + i % 127) for i in range(2000)]
        for message in burst:
            near.send(message)
        assert [listeners[1].next() for _ in burst] == burst
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            far.send(off(60))
            assert listeners[0].next() == off(60)
            times.append(time.perf_counter() - begun)
        assert np.median(times) < 0.02
        near.close()
        assert "the connection was closed" in listeners[1].next()
        with pytest.raises(PortLost, match=far.name):
            send_much(far, on(60), 0.001)


def test_a_peer_that_does_not_read_is_lost_after_the_timeout():
    with joined() as (near, far):
        near._socket.settimeout(0.05)
        with pytest.raises(PortLost, match="timed out"):
            send_much(near, Message("sysex", data=[0] * 10_000), 0)
        assert far


def send_much(port: NetworkPort, message: Message, wait: float) -> None:
    """Send a message 1000 times."""
    for _ in range(1000):
        port.send(message)
        time.sleep(wait)


def test_the_network_is_compatible_with_the_sockets_of_mido():
    """As a server of a mido client, and as a client of a mido server."""
    server, listener = Server("127.0.0.1:0"), QueueListener()
    client = mido.sockets.connect("127.0.0.1", server.port)
    port = server.accept()
    port.start(listener)
    client.send(on(64))
    port.send(control(64, 127))
    assert listener.next() == on(64)
    assert client.receive() == control(64, 127)
    port.close()
    client.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with mido.sockets.PortServer("127.0.0.1", number) as theirs:
        port, listener = connect(f"localhost:{number}"), QueueListener()
        port.start(listener)
        accepted = theirs.accept()
        port.send(on(66))
        accepted.send(off(66))
        assert accepted.receive() == on(66)
        assert listener.next() == off(66)
        port.close()


@pytest.mark.parametrize("text", ["9080", "host", "host:port", ":70000", "a:-1", "a:" + "1" * 5000, "a:²"])
def test_an_invalid_address_is_refused(text):
    with pytest.raises(UserError, match=rf"`listen` {text}: expected HOST:PORT, such as 127.0.0.1:9080"):
        Server(text)


def test_errors_name_an_address_that_cannot_be_used():
    server = Server("[::1]:0") if socket.has_ipv6 else Server(":0")
    with pytest.raises(UserError, match=r"`listen` .*: cannot listen \("):
        Server(f"[{server.host}]:{server.port}")
    server._socket.close()
    with pytest.raises(UserError, match=r"`socket` 127.0.0.1:1: cannot connect \("):
        connect("127.0.0.1:1")


def test_a_file_is_played_from_its_first_note_with_tempo_and_pedal(tmp_path):
    """Drums are played too; `finish` is called after the last message."""
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
    listener = QueueListener(clock)
    FilePlayer(messages).start(listener)
    while clock.step(99.0):
        pass
    received = [listener.next() for _ in range(7)]
    assert received == [control(64, 127), on(60), off(60), control(64, 0), on(36, channel=9), off(36, channel=9), None]
    assert clock.now() == pytest.approx(1.5)


def test_an_invalid_file_is_refused(tmp_path):
    (tmp_path / "bad.mid").write_bytes(b"MThd\0\0")
    with pytest.raises(UserError, match=r"bad.mid: not a readable MIDI file"):
        read_messages(tmp_path / "bad.mid")
    with pytest.raises(UserError, match=r"none.mid: cannot be read"):
        read_messages(tmp_path / "none.mid")


def test_a_file_plays_in_real_time(tmp_path):
    write_notes(Notes([0, 0.03], [0.02, 0.05], [60, 62], [64, 64]), tmp_path / "file.mid")
    clock = RealClock()
    listener = QueueListener(clock)
    begun = time.monotonic()
    FilePlayer(read_messages(tmp_path / "file.mid")).start(listener)
    while listener.next() is not None:
        pass
    assert 0.05 <= time.monotonic() - begun < 0.5
    clock.close()


def test_enter_passes_the_turn_once_per_line_and_finishes_at_the_end():
    reading, writing = os.pipe()
    listener = QueueListener()
    EnterKey(reading).start(listener)
    os.write(writing, b"\n\nword\n")
    assert [listener.next() for _ in range(3)] == ["turn"] * 3
    assert listener.calls.empty()
    os.close(writing)
    assert listener.next() is None
    os.close(reading)
    EnterKey(reading).start(listener)  # the terminal is gone
    assert listener.next() is None


def test_an_exception_in_a_clock_thread_is_posted():
    class Broken:
        changed = threading.Condition()

        def due(self) -> float:
            return 0.0

        def act(self, now: float) -> None:
            raise ZeroDivisionError

    clock = RealClock()
    clock.schedule(Broken())
    assert [type(item) for item in clock.wait(time.monotonic() + 5)] == [ZeroDivisionError]
    assert clock.wait(0.0) == []
    clock.close()


def test_a_virtual_clock_refuses_to_wait_for_nothing():
    with pytest.raises(RuntimeError, match="virtual clock: nothing to wait for"):
        VirtualClock().wait(float("inf"))
