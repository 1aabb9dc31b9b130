"""Failures in a session leave no key down and lose nothing: signals, bursts of notes, lost outputs, slow models, closed
terminals.
"""

import errno
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mido import Message
from rich.console import Console
from support.live_stand_ins import (
    PHRASE,
    FailingWire,
    Log,
    Performance,
    RandomPlayer,
    Wire,
    check_keys,
    control,
    off,
    on,
    sounding,
)

from dsmr_mlx.cli import live as live_command
from dsmr_mlx.cli import main
from dsmr_mlx.common import signals
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live import instrument, scheduler, session
from dsmr_mlx.live.clock import VirtualClock
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.network import Server
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.session import MAX_READ, Session, Turn
from dsmr_mlx.live.sources import FilePlayer, TimedMessage
from dsmr_mlx.live.statistics import MAX_VALUES, Measurements
from dsmr_mlx.live.transcript import EventIds, Transcript
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

HELD = [*PHRASE, (1.9, on(40))]  # a key is down at the end
PANIC = {(64, 0), (66, 0), (69, 0), (120, 0), (121, 0), (123, 0)}


def panics(messages: list[Message], channel: int = 0) -> bool:
    """Whether all controllers of a channel that could hold a note are reset after the last note-off."""
    of_channel = [m for m in messages if getattr(m, "channel", None) == channel]
    last = max(i for i, m in enumerate(of_channel) if m.type == "note_off")
    controls = {(m.control, m.value) for m in of_channel[last:] if m.type == "control_change"}
    return controls >= PANIC and Message("pitchwheel", channel=channel, pitch=0) in of_channel[last:]


@contextmanager
def interrupted_everywhere(modules: tuple, since: float, clock: VirtualClock) -> Iterator[list[str]]:
    """Send Ctrl-C before each line of these modules from a time on. Yield the names of the functions."""
    files, places = {module.__file__ for module in modules}, []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and clock.now() >= since and threading.current_thread() is threading.main_thread():
            places.append(frame.f_code.co_name)
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(None)


def test_a_signal_at_any_line_leaves_no_key_down(tmp_path):
    """Hundreds of Ctrl-C, also while the session closes, interrupt nothing."""
    sent, clock, path = [], VirtualClock(), tmp_path / "session.mid"

    class Output:
        name = "output"
        send = staticmethod(sent.append)

    options = LiveOptions(pause=0.05, thru=True, max_turn=30.0)
    live = Session(RandomPlayer(1, pauses=6), clock, Output(), options, Recorder(path))
    source = FilePlayer([TimedMessage(*event) for event in HELD])
    before = signal.getsignal(signal.SIGINT)
    ignored = signal.signal(signal.SIGINT, lambda number, frame: None)  # for those after the session
    try:
        with interrupted_everywhere((session, instrument, scheduler, signals), 1.9, clock) as places:
            reason = live.run([source])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ignored is before
    assert reason == "stopped by SIGINT"
    assert {"_take_turns", "_close", "close", "release", "_send", "stop", "handled"} <= set(places)
    check_keys(sent)
    assert panics(sent)
    assert len(read_notes(path)) == sum(sounding(m) > 0 for m in sent)


def test_signals_are_handled_until_the_state_is_saved_and_reported(run, trained, phrase, monkeypatch):
    """Ctrl-C while the state is saved and while the report is printed leaves both complete."""
    from dsmr_mlx.generation.player import Player

    for owner, name in ((Player, "save"), (live_command, "show_live_report"), (Recorder, "close")):
        original = getattr(owner, name)

        def interrupted(*arguments, original=original):
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            original(*arguments)

        monkeypatch.setattr(owner, name, interrupted)
    result = run(*answered(trained, phrase), "--save-state", "x.safetensors")
    assert result.code == 0, result.err
    assert result.out.endswith("x.mid\nx.safetensors\n")
    assert Path("x.safetensors").is_file()


def test_a_burst_of_notes_takes_linear_time():
    """A press looks only at the events of its pitch."""
    transcript = Transcript(EventIds(PerformanceTokenizer()))
    begun = time.process_time()
    for i in range(6000):
        transcript.press(i / 1000, i * 7 % 128, 64)
        transcript.release(i / 1000 + 0.0005, i * 7 % 128)
    transcript.next_time()
    transcript.flush_all()
    assert time.process_time() - begun < 2.0


class Flood:
    """Sends many notes and then ends the session, before it handles the first note."""

    is_input = True

    def __init__(self, notes: int):
        self.notes = notes

    def start(self, live: Session) -> None:
        """See `ports.Endpoint`."""
        for i in range(self.notes):
            live.receive(on(i % 128))
            live.receive(off(i % 128))
        live.stop("enough")


def test_the_end_does_not_wait_for_queued_notes():
    """`settle` reads them."""
    player, turns = RandomPlayer(), []
    live = Session(player, VirtualClock(), on_turn=turns.append)
    assert live.run([Flood(500)]) == "enough"
    assert player.position <= 1
    assert not turns
    live.settle()
    assert len(player.ids) > 128
    assert not player.lane.keys


def test_a_burst_is_read_in_chunks():
    """If notes come faster than they can be read, the session checks for its end after each chunk."""
    player = RandomPlayer()
    script = [(i / 1000, message) for i in range(3000) for message in (on(i % 128), off(i % 128))]
    wire, sizes, original = Wire(), [], player.read

    def read(ids):
        sizes.append((wire.clock.now(), len(ids)))
        wire.clock.compute(len(ids) / 500)
        original(ids)

    player.read = lambda ids: read(ids) if len(ids) else None
    p = Performance(script, player, wire=wire, calls=[(4.0, "stop", "enough")], thru=True, take_over="enter")
    assert p.reason == "enough"
    assert max(n for _, n in sizes) == MAX_READ
    assert max(time for time, _ in sizes) <= 4.0
    assert p.clock.now() <= 4.0 + MAX_READ / 500
    p.stream()


def test_the_model_takes_over_only_after_reading_all_and_not_after_the_end():
    """The turn is passed right after a burst, and the session ends while the burst is read."""
    player = RandomPlayer()
    live = Session(player, VirtualClock(), options=LiveOptions(take_over="enter", max_turn=1.0))

    class PassingTurn(Flood):
        def start(self, live: Session) -> None:
            for i in range(self.notes):
                live.receive(on(i % 128))
                live.clock._now += 0.02
                live.receive(off(i % 128))
            live.pass_turn()

    def read(ids, original=player.read):
        original(ids)
        if len(ids):
            live.stop("enough")

    player.read = read
    assert live.run([PassingTurn(1000)]) == "enough"
    assert player.position == 1 + MAX_READ
    assert live.reply is None


@pytest.mark.parametrize("pauses", [2, 12, 40])
@pytest.mark.parametrize("seconds", [0.06, 0.2, 0.5])
def test_a_model_slower_than_real_time_plays_within_its_turn(seconds, pauses):
    """It is stopped by the clock after the maximum turn, and the turn counts how often it fell behind."""
    p = Performance(PHRASE, RandomPlayer(2, pauses=pauses), seconds=seconds, pause=0.5, max_turn=5.0)
    turn = p.turns[-1]
    assert turn.voice is Voice.MODEL
    assert turn.reason in ("done", "out of time")
    assert turn.seconds <= 5.0 + 4.1 + 2 * seconds  # the maximum turn and the grace time
    assert turn.behind == p.statistics.behind > 0
    assert p.statistics.lateness.n >= 1
    assert p.statistics.lateness.largest <= LiveOptions().max_late
    p.stream()


def test_a_model_that_does_not_end_is_stopped():
    """It does not release its keys when its time is up."""
    player = RandomPlayer(3, pitches=range(50, 60))
    player.ending = player.draw
    p = Performance([*PHRASE, (20.0, on(60)), (20.1, off(60))], player, pause=0.5, max_turn=2.0, thru=True)
    assert p.how[:2] == ["the model took over", "out of time"]
    assert 2.0 <= p.turns[1].seconds <= 6.2


@pytest.mark.parametrize("fails", [range(9, 10), range(9, 14), range(1)], ids=["once", "some", "the first"])
def test_note_offs_that_failed_are_sent_again_at_the_end(fails):
    """The session ends at the first failure, and every key is released once the output works again."""
    p = Performance(HELD, RandomPlayer(1), wire=FailingWire(fails), thru=True, pause=0.3, channel=2)
    assert p.reason == "wire: broken"
    sent = [m for _, m in p.wire.sent]
    last = {(m.channel, m.note): m.type for m in sent if m.type.startswith("note")}
    assert set(last.values()) <= {"note_off"}
    assert panics(sent, 0)


def test_a_failing_recorder_leaves_no_key_down():
    sent = []

    class Output:
        name = "output"
        send = staticmethod(sent.append)

    class Broken(Log):
        def add(self, voice: Voice, time: float, message: Message) -> None:
            if sounding(message) == 0 and voice is Voice.MODEL:
                raise ZeroDivisionError

    live = Session(RandomPlayer(1), VirtualClock(), Output(), LiveOptions(pause=0.2, thru=True), Broken())
    with pytest.raises(ZeroDivisionError):
        live.run([FilePlayer([TimedMessage(*event) for event in HELD])])
    check_keys(sent)
    assert panics(sent)


def test_closing_resets_everything_that_could_hold_a_note():
    """Sostenuto, hold 2 and pitch bend are reset on each channel used, and on no other."""
    bent = Message("pitchwheel", pitch=99, channel=3)
    held = [(0.95, message) for message in (control(66, 127, 3), control(69, 127, 3), bent)]
    p = Performance([*PHRASE, *held, (0.96, on(50, channel=3))], thru=True, pause=0.2)
    sent = [m for _, m in p.wire.sent]
    assert panics(sent, 0)
    assert panics(sent, 3)
    assert not [m for m in sent if getattr(m, "channel", 0) not in (0, 3)]


def test_keys_and_pedal_go_up_when_a_file_ends():
    """In the output, in the recording and in the state."""
    script = [(0.0, control(64, 127)), (0.1, on(60)), (0.5, off(60)), (0.8, on(62))]
    p = Performance(script, thru=True, pause=0.5, channel=5)
    assert p.how == ["the model took over", "done"]
    at_the_end = [m for time, m in p.wire.sent if time == 0.8 and not sounding(m)]
    assert at_the_end == [off(62).copy(velocity=0), control(64, 0)]
    recorded = [m for voice, time, m in p.log.kept if voice is Voice.HUMAN and time == 0.8]
    assert recorded == [on(62), *at_the_end]
    human = [(time, pitch) for time, pitch, velocity in p.stream() if pitch in (60, 62) and not velocity][:2]
    assert human == [(pytest.approx(0.7, abs=0.02), 60), (pytest.approx(0.7, abs=0.02), 62)]


def test_the_session_ends_when_all_inputs_have_finished():
    """One file ends while another still plays; an input that never finishes keeps the session going."""
    second = [TimedMessage(5.0 + time, message) for time, message in PHRASE]
    turns = []
    live = Session(RandomPlayer(), VirtualClock(), options=LiveOptions(max_turn=0.5), on_turn=turns.append)
    sources = [FilePlayer([TimedMessage(*event) for event in PHRASE]), FilePlayer(second)]
    assert live.run(sources) == "the music is over"
    assert [turn.notes for turn in turns if turn.voice is Voice.HUMAN] == [2, 2]
    p = Performance(PHRASE, calls=[(40.0, "stop", "hung up")])
    assert p.reason == "hung up"


class Gone:
    """A terminal that was closed."""

    encoding = "utf-8"

    def __init__(self, number: int):
        self.number = number

    def write(self, text: str) -> int:
        """Fail."""
        raise OSError(self.number, "gone")

    def flush(self) -> None:
        """Do nothing."""

    def isatty(self) -> bool:
        """Return False."""
        return False


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_closed_terminal_does_not_end_the_session(run, trained, phrase, monkeypatch, number):
    """The music goes on without output, and the state is saved."""
    monkeypatch.setattr(live_command, "err", Console(file=Gone(number)))
    live_command.show_turn(Turn(Voice.MODEL, 1.0, 2, "done"))
    result = run(*answered(trained, phrase), "--save-state", "x.safetensors")
    assert result.code == 0
    assert result.out.startswith("the music is over")
    assert Path("x.safetensors").is_file()


def test_the_state_is_saved_even_if_the_recording_cannot_be(run, trained, phrase, monkeypatch):
    def close(recorder, now):
        raise UserError(f"{recorder.paths[0]}: cannot be written (gone)")

    monkeypatch.setattr(Recorder, "close", close)
    result = run(*answered(trained, phrase), "--save-state", "x.safetensors")
    assert result.code == 2
    assert "x.mid: cannot be written (gone)" in result.err
    assert Path("x.safetensors").is_file()


def test_the_state_is_saved_even_if_the_model_fails(run, trained, phrase, monkeypatch):
    """Also if `settle` fails; but not if the model failed before it was ready."""
    from dsmr_mlx.generation.player import Player

    originals = Player.play, Player.read

    def play(player, limits=None):
        for i, tokens in enumerate(originals[0](player, limits)):
            if limits is not None and i == 3:
                monkeypatch.setattr(Player, "read", play)
                raise UserError("model: broken")
            yield tokens

    monkeypatch.setattr(Player, "play", play)
    result = run(*answered(trained, phrase), "--save-state", "x.safetensors")
    assert result.code == 2
    assert Path("x.safetensors").is_file()
    monkeypatch.setattr(Player, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*answered(trained, phrase, "y.mid"), "--save-state", "y.safetensors")
    assert not Path("y.safetensors").exists()


@pytest.mark.slow
def test_with_enter_the_session_ends_at_the_end_of_standard_input(run, trained, phrase):
    """Standard input is empty here, as in a script; no turn is passed."""
    result = run("live", trained.run, "--in-file", phrase, "--out-file", "x.mid", "--take-over", "enter")
    assert result.code == 0, result.err
    assert result.out.startswith("the music is over")
    assert len(read_notes("x.mid")) == 3


def answered(trained, phrase: Path, out: str = "x.mid") -> list:
    """Return the arguments of a short session in virtual time."""
    return ["live", trained.run, "--in-file", phrase, "--offline", "--pause", 0.2, "--max-turn", 0.3, "--out-file", out]


def test_measurements_need_constant_memory():
    """Number and largest are over all values, median and percentile over the last ones."""
    measured = Measurements()
    assert measured.spread.n == 0
    measured.add(99.0)
    for i in range(3 * MAX_VALUES):
        measured.add(float(i % 100))
    assert len(measured.last) == MAX_VALUES
    assert measured.spread == (3 * MAX_VALUES + 1, 49.0, 94.0, 99.0)


def test_a_slow_turn_shows_how_often_it_fell_behind(capsys, monkeypatch):
    monkeypatch.setattr(live_command, "err", Console(stderr=True))
    live_command.show_turn(Turn(Voice.MODEL, 5.0, 3, "done", 7))
    live_command.show_turn(Turn(Voice.MODEL, 5.0, 9, "done", 1))
    live_command.show_turn(Turn(Voice.MODEL, 5.0, 30, "done"))
    assert capsys.readouterr().err.splitlines() == [
        "model     3 notes    5.0 s  done; too slow, fell behind 7 times",
        "model     9 notes    5.0 s  done; too slow, fell behind once",
        "model    30 notes    5.0 s  done",
    ]


def test_the_model_is_warm_before_a_client_is_waited_for(trained, monkeypatch):
    order = []
    monkeypatch.setattr(Player, "warm_up", lambda player: order.append("warm"))
    monkeypatch.setattr(Server, "accept", lambda server: order.append("waiting") or sys.exit())
    with pytest.raises(SystemExit):
        main(["live", str(trained.run), "--listen", ":0"])
    assert order == ["warm", "waiting"]
