"""A client that never pauses, a recording without an end, and Ctrl-Z: memory is bounded and no key stays down."""

import os
import signal
import threading
import time

import pytest
from mido import Message
from support.live_stand_ins import RandomPlayer, control, off, on

from dsmr_mlx.live import clock as clocks
from dsmr_mlx.live import recorder as recorders
from dsmr_mlx.live.clock import RealClock
from dsmr_mlx.live.network import Server
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.session import MAX_READ, MAX_UNREAD, Session
from dsmr_mlx.live.transcript import MAX_AHEAD, EventIds, Transcript
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer


class Flood:
    """Sends notes as fast as it can until the session ends."""

    is_input = True

    def __init__(self, notes: bool):
        self.sent, self.notes = 0, notes

    def start(self, live: Session) -> None:
        """See `ports.Endpoint`."""
        threading.Thread(target=self._send, args=(live,), daemon=True).start()

    def _send(self, live: Session) -> None:
        while live._over is None:
            key = self.sent % 128
            for message in (on(key), off(key)) if self.notes else (control(7, key),):
                live.receive(message)
            self.sent += 1


@pytest.mark.parametrize("notes", [True, False])
def test_a_client_that_never_pauses(monkeypatch, notes):
    """Neither the queue nor the unread ids nor the events that wait grow with what is sent. Notes are left out, and
    who sends other messages waits.
    """
    monkeypatch.setattr(clocks, "MAX_EVENTS", 500)
    player, flood, longest = RandomPlayer(), Flood(notes), [0, 0, 0]
    live = Session(player, RealClock(), options=LiveOptions(pause=0.1))

    def slow_read(ids, original=player.read):
        time.sleep(0.005)
        unflushed = sum(map(len, live.transcript._unflushed.values())) if hasattr(live, "transcript") else 0
        for i, n in enumerate((live.clock._queue.qsize(), len(live._unread), unflushed)):
            longest[i] = max(longest[i], n)
        return original(ids)

    player.read = slow_read
    if not notes:
        monkeypatch.setattr(Session, "_handle_message", lambda self, time_, message: time.sleep(0.001))
    threading.Timer(1.5, live.stop, ["enough"]).start()
    began = time.monotonic()
    assert live.run([flood]) == "enough"
    assert time.monotonic() - began < 4
    assert flood.sent > 500
    assert longest[0] <= 2 * 500 + 2
    assert live.clock._queue.qsize() <= 2 * 500 + 2
    assert bool(live.statistics.unread) is notes
    assert longest[1] <= MAX_UNREAD + MAX_READ + 2 * 6 * 500
    assert longest[2] <= 2 * 128 * (MAX_AHEAD + 2)


def test_a_key_that_is_struck_without_end_does_not_run_ahead():
    transcript = Transcript(EventIds(PerformanceTokenizer()))
    for _ in range(20_000):
        transcript.press(0.5, 60, 64)
        transcript.release(0.5, 60)
    assert len(transcript._unflushed[60]) <= 2 * (MAX_AHEAD + 2)
    transcript.press(0.5 + 2 * MAX_AHEAD / 100, 60, 64)  # later it is heard again
    assert 60 in transcript.keys


def test_a_long_recording_goes_on_in_other_files(tmp_path, monkeypatch):
    """A large file is rewritten less often, and none grows without an end."""
    monkeypatch.setattr(recorders, "MAX_BYTES", 4000)
    monkeypatch.setattr(recorders, "BYTES_PER_SECOND", 500)
    (tmp_path / "a-2.mid").write_bytes(b"of somebody else")
    recorder, dues = Recorder(tmp_path / "a.mid"), []
    for i in range(3000):
        now = i / 100
        recorder.add(recorders.Voice.HUMAN, now, on(60 + i % 12) if i % 2 == 0 else off(60 + (i - 1) % 12))
        dues.append(recorder.due() - now)
        recorder.act(now)
    recorder.close()
    assert max(dues) > 3
    assert len(recorder.paths) > 2
    assert tmp_path / "a-2.mid" not in recorder.paths
    assert (tmp_path / "a-2.mid").read_bytes() == b"of somebody else"
    assert max(path.stat().st_size for path in recorder.paths) < 5000
    assert sum(len(read_notes(path, allow_empty=True)) for path in recorder.paths) == 1500


def test_suspending_releases_every_key(tmp_path, monkeypatch):
    """Ctrl-Z: before the program stops, the keys of both voices are up; afterwards it goes on."""
    sent, stopped = [], []

    class Output:
        name = "output"
        send = staticmethod(sent.append)

    live = Session(RandomPlayer(1, pauses=2), RealClock(), Output(), LiveOptions(pause=0.05, thru=True, channel=2))

    def down() -> set:
        keys = set()
        for message in sent:
            if message.type == "note_on" and message.velocity:
                keys.add((message.channel, message.note))
            elif message.type in ("note_on", "note_off"):
                keys.discard((message.channel, message.note))
        return keys

    def kill(process: int, number: int) -> None:
        assert (process, number) == (os.getpid(), signal.SIGSTOP)
        stopped.append(down())
        threading.Timer(0.1, live.stop, ["enough"]).start()

    class Player:
        is_input = True

        def start(self, live: Session) -> None:
            def play() -> None:
                live.receive(on(60))
                live.receive(off(60))
                deadline = time.monotonic() + 5
                while not any(channel == 1 for channel, _ in down()) and time.monotonic() < deadline:
                    time.sleep(0.005)
                live.receive(Message("control_change", control=64, value=127))
                os.kill(os.getpid(), signal.SIGTSTP)

            threading.Thread(target=play, daemon=True).start()

    real = os.kill
    monkeypatch.setattr("dsmr_mlx.live.session.os.kill", lambda p, n: (kill if n == signal.SIGSTOP else real)(p, n))
    assert live.run([Player()]) == "enough"
    assert stopped == [set()]
    assert any(message.type == "note_on" and message.channel == 1 for message in sent)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_listening_to_the_network_is_known(host, local):
    server = Server(f"{host}:0")
    server._socket.close() if server.is_local is local else pytest.fail(host)
