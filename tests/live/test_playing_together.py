"""`dsmr-mlx live` with a real model: over the network in real time, stopped by signals, and from files."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mido
import numpy as np
import pytest
from mido import Message
from support.live_stand_ins import PHRASE, TABLES, check_keys, off, on, sounding, subwords
from support.stand_ins import tiny_model

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.live.clock import RealClock, VirtualClock
from dsmr_mlx.live.network import Server, connect
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.session import Session
from dsmr_mlx.live.sources import FilePlayer, TimedMessage
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer


class LoggingPlayer(Player):
    """A player that logs all ids that it has read and played."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.log: list[int] = []

    def read(self, ids, progress=None) -> None:
        """See `Player.read`."""
        before = self.position
        super().read(ids, progress)
        self.log += np.asarray(ids).tolist()[-(self.position - before) :] if before else [1, *np.asarray(ids).tolist()]

    def play(self, limits=None) -> Iterator[np.ndarray]:
        """See `Player.play`."""
        for tokens in super().play(limits):
            self.log.append(int(tokens[0]))
            yield tokens

    def rewind(self, k: int) -> None:
        """See `Player.rewind`."""
        super().rewind(k)
        self.log = self.log[: len(self.log) - k]
        assert len(self.log) == self.position


def make_player(seed: int = 0, tokenizer: Tokenizer | None = None) -> LoggingPlayer:
    """Return a player with a random model of 16 tokens per segment, which presses many keys."""
    tokenizer = tokenizer or PerformanceTokenizer()
    model = tiny_model(tokenizer.vocab_size, seed)
    return LoggingPlayer(model, tokenizer, sampling=Sampling(top_k=40), seed=seed)


class Peer(threading.Thread):
    """A client that plays a script of (seconds to wait, message or condition to wait for)."""

    def __init__(self, port: int, script: list):
        super().__init__(daemon=True)
        self.number, self.script = port, script
        self.received: list[tuple[float, Message]] = []
        self.sent: list[float] = []

    def run(self) -> None:
        """Play the script."""
        port = connect(f"127.0.0.1:{self.number}")
        port.start(self)
        for wait, message in self.script:
            if isinstance(message, Message):
                port.send(message)
                self.sent.append(time.monotonic())
            else:
                until = time.monotonic() + 5
                while not message(self) and time.monotonic() < until:
                    time.sleep(0.002)
            time.sleep(wait)
        port.close()

    def receive(self, message: Message) -> None:
        """See `ports.Listener`."""
        self.received.append((time.monotonic(), message))

    def stop(self, reason: str) -> None:
        """See `ports.Listener`."""

    def notes(self, since: float = 0.0) -> list[Message]:
        """Return the note-ons received since a time."""
        return [m for time, m in self.received if time >= since and sounding(m)]


@pytest.mark.slow
def test_call_and_response_over_the_network_in_real_time(tmp_path):
    """The model answers, stops when the peer plays again and answers again; then the peer disconnects."""
    server, path = Server(":0"), tmp_path / "session.mid"
    answered = lambda peer: len(peer.notes()) >= 5  # noqa: E731
    interrupted = lambda peer: len(peer.notes(peer.sent[2] + 0.15)) >= 5  # noqa: E731
    script = [(0.02, on(60)), (0, off(60)), (0.05, answered), (0.02, on(64)), (0, off(64)), (0, interrupted)]
    peer = Peer(server.port, script)
    peer.start()
    network, turns = server.accept(), []
    options = LiveOptions(pause=0.3, channel=2)
    session = Session(make_player(1), RealClock(), network, options, Recorder(path), turns.append)
    reason = session.run([network])
    network.close()
    peer.join()
    assert "the connection was closed" in reason
    assert [turn.reason for turn in turns] == [
        *("the model took over", "interrupted", "the model took over", "the session ended")
    ]
    again = peer.sent[2]
    stopped = [(t, m) for t, m in peer.received if t < again + 0.3]
    check_keys([m for _, m in stopped])
    assert not [m for t, m in peer.received if again + 0.15 < t < again + 0.3]
    assert {m.channel for m in peer.notes()} == {1}
    assert session.statistics.first_sent.spread.median < 0.5
    model = [m for m in mido.MidiFile(path).tracks[2] if not m.is_meta]
    check_keys(model)
    assert [m.note for m in model if sounding(m)][: len(peer.notes())] == [m.note for m in peer.notes()]


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [PerformanceTokenizer, lambda: subwords()[0]], ids=["events", "subwords"])
def test_the_state_equals_that_of_the_whole_stream_read_at_once(tokenizer):
    """After many interruptions and rewinds, the next prediction equals that of a player that reads the stream."""
    player = make_player(2, tokenizer())
    script = [TimedMessage(i * 0.6 + time, message) for i in range(10) for time, message in PHRASE[:2]]
    turns = []
    session = Session(player, VirtualClock(), None, LiveOptions(pause=0.1, max_turn=0.5), on_turn=turns.append)
    session.run([FilePlayer(script)])
    session.settle()
    assert sum(turn.reason == "interrupted" for turn in turns) >= 5
    assert session.statistics.rewound > 30
    fresh = Player(player.model, player.tokenizer)
    fresh.read(np.array(player.log[1:]))
    assert fresh.position == player.position
    np.testing.assert_allclose(np.array(player.logits), np.array(fresh.logits), atol=2e-4)
    assert player.held == [[]]


def test_running_out_of_positions_leaves_no_key_down():
    """Learned positions run out while the model plays; the session ends with an error."""
    model = tiny_model(seed=3, max_positions=80)
    sent = []

    class Wire:
        name = "wire"
        send = staticmethod(sent.append)

    session = Session(Player(model, PerformanceTokenizer()), VirtualClock(), Wire(), LiveOptions(max_turn=9.0))
    with pytest.raises(UserError, match="80 learned positions"):
        session.run([FilePlayer([TimedMessage(i * 5.0 + t, m) for i in range(4) for t, m in PHRASE])])
    check_keys(sent)
    assert any(sounding(m) for m in sent)


@pytest.mark.slow
def test_a_file_is_answered_offline_and_a_saved_state_continues(run, trained, phrase):
    """The same seed gives the same file, and a saved state another answer."""
    arguments = ["live", trained.run, "--in-file", phrase, "--offline", "--pause", 0.5, "--max-turn", 1]
    results = [
        run(*arguments, "--seed", seed, "--out-file", name, "--save-state", f"{name}.safetensors")
        for name, seed in (("one.mid", 4), ("two.mid", 4), ("three.mid", 5))
    ]
    assert [result.code for result in results] == [0, 0, 0], results[0].err
    assert "take-over to first note, computing" in results[0].out
    assert "notes too late to be played" in results[0].out
    assert re.search(r"you +3 notes +0.7 s  the model took over\nmodel +\d+ notes +\d+.\d s  done", results[0].err)
    one, two, three = (Path(name).read_bytes() for name in ("one.mid", "two.mid", "three.mid"))
    assert one == two != three
    human, model = (mido.MidiFile("one.mid").tracks[i] for i in (1, 2))
    assert [m.note for m in human if not m.is_meta and sounding(m)] == [60, 64, 67]
    check_keys([m for m in model if not m.is_meta])
    assert any(sounding(m) for m in model if not m.is_meta)
    again = run(*arguments, "--from-state", "one.mid.safetensors", "--out-file", "four.mid")
    assert again.code == 0, again.err
    assert Path("four.mid").read_bytes() != one
    refused = run(*arguments, "--from-state", "one.mid.safetensors", "--out-file", "5.mid", "--top-k", 3)
    assert refused.code == 2
    assert "--top-k: not with --from-state, which keeps the options of the state" in refused.err


@pytest.mark.slow
def test_a_new_recording_in_real_time_is_saved_while_it_grows_and_at_the_end(run, trained, phrase):
    result = run("live", trained.run, "--in-file", phrase, "--out-file", "new.mid", "--pause", 0.3, "--max-turn", 0.5)
    assert result.code == 0, result.err
    human, model = (mido.MidiFile("new.mid").tracks[i] for i in (1, 2))
    assert [m.note for m in human if not m.is_meta and sounding(m)] == [60, 64, 67]
    assert any(sounding(m) for m in model if not m.is_meta)


def test_the_answer_is_steered(run, trained, phrase):
    options = ["--pitch-range", "50-60", "--max-turn", 1, "--pause", 0.2]
    result = run("live", trained.run, "--in-file", phrase, "--offline", "--out-file", "x.mid", *options)
    assert result.code == 0, result.err
    pitches = {m.note for m in mido.MidiFile("x.mid").tracks[2] if not m.is_meta and sounding(m)}
    assert pitches <= set(range(50, 61))
    assert pitches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input given: expected --in, --in-file, --virtual, --socket or --listen"),
        (["--in-file", "phrase.mid"], "no output given: expected --out, --out-file, --virtual, --socket or --listen"),
        (["--in-file", "phrase.mid", "--offline"], "no output given"),
        (["--socket", "h:1", "--offline"], "--offline: expected --in-file and --out-file with it, and no ports"),
        (["--in-file", "x.mid", "--out-file", "y.mid", "--offline", "--take-over", "enter"], "not with --offline"),
        (["--socket", "h:1", "--pause", "0"], "--pause 0.0: expected more than 0 seconds"),
        (["--socket", "h:1", "--take-over", "controller:x"], "expected pause, pedal, controller:N or enter"),
        (
            ["--socket", "h:1", "--take-over", f"controller:{'1' * 5000}"],
            "expected pause, pedal, controller:N or enter",
        ),
        (["--socket", "h:1", "--channel", "17"], "--channel 17: expected 1 to 16"),
        (["--socket", "h:1", "--latency", "-5"], "--latency -5.0: expected 0 to 2 seconds"),
        (["--socket", "h:1", "--out-file", "y.txt"], "--out-file y.txt: expected a name that ends in .mid or .midi"),
        (["--socket", "h:1", "--save-state", "y"], "--save-state y: expected a name that ends in .safetensors"),
        (["--socket", "h:1", "--out-file", "none/y.mid"], "--out-file none/y.mid: no such folder none"),
        (["--socket", "127.0.0.1:1"], "--socket 127.0.0.1:1: cannot connect"),
        (["--in-file", "none.mid", "--out-file", "y.mid"], "none.mid: cannot be read"),
    ],
)
def test_invalid_options_are_refused(run, trained, arguments, message):
    result = run("live", trained.run, *arguments)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.fixture
def fake_ports() -> Iterator[dict[str, str]]:
    """The devices of a computer without any: name → "in", "out" or "both"."""
    from support import fake_midi_backend

    before = mido.backend
    mido.set_backend("support.fake_midi_backend")
    yield fake_midi_backend.DEVICES
    mido.set_backend(before)


def test_the_ports_of_a_session_are_shown(run, trained, phrase, fake_ports, monkeypatch):
    """The output is also an endpoint, which can be unplugged, but no input."""
    monkeypatch.setitem(fake_ports, "Synth Piano", "out")
    result = run("live", trained.run, "--in-file", phrase, "--out", "Synth", "--pause", 0.2, "--max-turn", 0.3)
    assert result.code == 0, result.err
    assert f"from {phrase} to Synth Piano; the model takes over 0.2 s after your last key" in result.err


def test_ports_are_listed(run, fake_ports, monkeypatch):
    monkeypatch.setitem(fake_ports, "[b] Organ", "in")
    assert run("live", "--list").out == "input   [b] Organ\noutput  none\n"


def test_without_the_midi_backend_the_error_names_the_extra(run, fake_ports, monkeypatch):
    monkeypatch.setitem(sys.modules, "rtmidi", None)
    monkeypatch.delitem(sys.modules, "mido.backends.rtmidi", raising=False)
    mido.set_backend("mido.backends.rtmidi")
    result = run("live", "--list")
    assert result.code == 2
    assert "pip install 'dsmr-mlx[live]'" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "in_turn", "take_over"),
    [("SIGTERM", True, "pause"), ("SIGINT", False, "pause"), ("SIGHUP", True, "enter")],
)
def test_a_signal_releases_every_key_and_leaves_a_valid_file(trained, tmp_path, name, in_turn, take_over):
    """While the model plays, or while the human holds a key that is sent on. However often the signal comes, the exit
    code is 0 and the state is saved. With SIGHUP standard error is closed.
    """
    path, state = tmp_path / "session.mid", tmp_path / "state.safetensors"
    command = [sys.executable, "-m", "dsmr_mlx", "live", str(trained.run), "--listen", ":0", "--thru"]
    command += [
        "--out-file",
        str(path),
        "--save-state",
        str(state),
        "--pause",
        "0.05" if in_turn else "60",
        "--take-over",
        take_over,
    ]
    environment = os.environ | {"MLX_DISABLE_COMPILE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    default_hangup = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731, nohup ignores it
    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=default_hangup) as process:
        port = int(re.search(r"127.0.0.1:(\d+)", process.stderr.readline())[1])
        playing = lambda peer: len(peer.notes()) >= (5 if in_turn else 1)  # noqa: E731
        ended = lambda peer: process.poll() is not None  # noqa: E731

        def stop(peer: Peer) -> bool:
            if name == "SIGHUP":
                process.stderr.close()
            for _ in range(6):
                process.send_signal(getattr(signal, name))
            return True

        enter = lambda peer: os.write(process.stdin.fileno(), b"\n")  # noqa: E731
        listening = lambda peer: len(peer.received) >= (2 if in_turn else 1)  # noqa: E731
        keys = [(0.0, on(61)), (0.0, off(61))] if in_turn else [(0.0, on(61))]
        peer = Peer(port, [*keys, (0, listening), (0, enter), (0, playing), (0, stop), (0, ended)])
        peer.start()
        peer.join()
        shown = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    assert shown.startswith(f"stopped by {name}\nmilliseconds")
    assert shown.endswith(f"{path}\n{state}\n")
    assert state.is_file()
    messages = [m for _, m in peer.received]
    check_keys(messages)
    assert len(peer.notes()) >= (5 if in_turn else 1)
    assert Message("control_change", control=123, value=0) in messages
    assert len(read_notes(path)) >= len(peer.notes())


def test_the_stand_ins_use_the_grammar_of_the_tokenizer():
    assert np.array_equal(PerformanceTokenizer().event_grammar().allowed, TABLES.allowed)
