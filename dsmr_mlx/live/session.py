"""A live session: human and model take turns, and no key stays down at the end."""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.signals import handled
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.hands import Change, Hands, is_music
from dsmr_mlx.live.instrument import Instrument, Voice, is_note_off, is_note_on
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.ports import Endpoint, PortLost
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.reply import Reply
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.vocabularies import live_ids, reply_of, transcript_of

MAX_UNREAD = 4096  # tokens that wait to be read; until some are, the session handles no new events
LOOK_SECONDS = 2.0  # between two checks that the devices are plugged in
MAX_READ = 256  # tokens read before the session handles new events


class Output(Protocol):
    """Where the music goes: `ports.DeviceOutput`, `network.NetworkPort`."""

    name: str

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`."""
        ...


class Received(NamedTuple):
    """Event: a message of the human and when it came in."""

    time: float
    message: Message


class TurnPassed(NamedTuple):
    """Event: the human passes the turn."""

    time: float


class InputFinished(NamedTuple):
    """Event: one of the inputs has ended."""


class Suspended(NamedTuple):
    """Event: the user has suspended the program (Ctrl-Z)."""


class Wake(NamedTuple):
    """Event: the session should check whether it is over."""


@dataclass(frozen=True)
class Turn:
    """A finished turn: who played, for how long, how many notes, why it ended, how often the model fell behind."""

    voice: Voice
    seconds: float
    notes: int
    reason: str
    behind: int = 0


class Session:
    """Human and model take turns until a port is lost, a signal comes or all inputs have finished.

    player: one lane, used only by the thread that calls `run`. output: None if only the recorder gets the music.
    on_turn(turn): called at the end of each turn. `receive`, `pass_turn`, `finish` and `stop` are thread-safe. Raises
    `UserError` if the player's tokens cannot be played live.
    """

    def __init__(
        self,
        player: Player,
        clock: Clock,
        output: Output | None = None,
        options: LiveOptions | None = None,
        recorder: Recorder | None = None,
        on_turn: Callable[[Turn], None] = lambda turn: None,
    ):
        self.player, self.clock, self.output, self.recorder = player, clock, output, recorder
        self.options, self.on_turn = options or LiveOptions(), on_turn
        self.statistics = Statistics()
        self.instrument = Instrument(self._send)
        self.scheduler = Scheduler(self.instrument, self.options, self.statistics, self._record)
        self.hands = Hands(self.options.controller)
        self.event_ids = live_ids(player.tokenizer)
        self.reply: Reply | None = None  # during the model's turn
        self.ready = False  # the player is warmed up and may have played
        self._over: str | None = None  # the reason; any thread may set it
        self._inputs, self._finished = 0, 0  # numbers of inputs
        self._devices: list[Any] = []  # endpoints that can be unplugged
        self._looked = -math.inf  # when they were last checked
        self._events: deque = deque()  # from the clock's queue, not handled yet
        self._unread: list[int] = []  # ids of the human's music that the player has not read
        self._notes, self._turn_start, self._last_key = 0, 0.0, 0.0  # of the human's turn

    def receive(self, message: Message, time: float | None = None) -> None:
        """Handle a message of the human: the urgent part at once, in the caller's thread, the rest in `run`.

        time: when it came, if that was before the session began, see `begin`; it is not sent on then.
        """
        now = self.clock.now() if time is None else time
        if is_music(message) and is_note_on(message):
            self.scheduler.stop(now)
        passes_turn = self.hands.is_turn_controller(message)
        if self.options.thru and not passes_turn and time is None:
            self.instrument.play(Voice.HUMAN, message)
        if is_music(message):
            if not passes_turn:
                self._record(Voice.HUMAN, now, message)
            if self.clock.is_crowded and is_note_on(message):
                self.statistics.unread += 1
            else:
                self.clock.post_input(Received(now, message))

    def pass_turn(self) -> None:
        """Pass the turn: the model begins, or ends."""
        self.clock.post(TurnPassed(self.clock.now()))

    def finish(self) -> None:
        """Note that an input has ended; the model may still answer."""
        self.clock.post(InputFinished())

    def stop(self, reason: str) -> None:
        """End the session, whatever is still in the event queue."""
        self._over = self._over or reason
        self.clock.post(Wake())

    def handling_signals(self) -> AbstractContextManager[None]:
        """Stop the session at Ctrl-C and other `STOP_SIGNALS`, suspend it at Ctrl-Z. They do not interrupt code,
        however many come.
        """
        signals = ExitStack()
        signals.enter_context(handled(lambda number, frame: self.stop(f"stopped by {signal.Signals(number).name}")))
        signals.enter_context(handled(lambda number, frame: self.clock.post(Suspended()), ("SIGTSTP",)))
        return signals

    def _suspend(self) -> None:
        """Release all keys, save the recording, and stop until the user continues the program."""
        now = self.clock.now()
        if self.reply:
            self._end_reply(now, "suspended")
        self.scheduler.stop(now)
        self.instrument.silence()
        if self.recorder:
            with suppress(UserError):
                self.recorder.save()
        os.kill(os.getpid(), signal.SIGSTOP)

    def run(self, endpoints: Sequence[Endpoint] = ()) -> str:
        """Take turns until the session is over. Return the reason; all keys are up then and the recording is saved.

        endpoints: started once the model is ready. Raises any exception of the player or of another thread.
        """
        with self.handling_signals():  # until all keys are up
            try:
                self._warm_up()
                self._start(endpoints)
                return self._take_turns()
            finally:
                self._close()

    def _warm_up(self) -> None:
        """Let the player compile what it needs, and begin the transcript."""
        self.player.warm_up()
        self.begin(self.clock.now())
        self.ready = True

    def begin(self, time: float) -> None:
        """Let the music begin at a time of the clock.

        It begins when the player is ready; an endpoint that has earlier messages calls this in `start`, before them.
        """
        self.transcript = transcript_of(self.event_ids, self.player, time)
        self.transcript.release_voice(time, Voice.MODEL)

    def _start(self, endpoints: Sequence[Endpoint]) -> None:
        self._devices = [endpoint for endpoint in endpoints if hasattr(endpoint, "lost")]
        self._inputs = sum(endpoint.is_input for endpoint in endpoints)
        self.clock.schedule(self.scheduler)
        if self.recorder:
            self.clock.schedule(self.recorder)
        for endpoint in endpoints:
            endpoint.start(self)

    def _take_turns(self) -> str:
        while self._over is None:
            if len(self._unread) < MAX_UNREAD:  # else the model reads first, and the inputs wait
                self._events.extend(self.clock.wait(min(self._next_time(), self._next_look())))
            while self._events and self._over is None:
                self._handle(self._events.popleft())
            if self._over is None:
                self._look_at_devices(self.clock.now())
            if self._over is None:
                self._advance(self.clock.now())
        if self.reply:
            self._end_reply(self.clock.now(), "the session ended")
        self._end_human_turn("the session ended")
        return self._over

    def _next_look(self) -> float:
        """Return when the devices are checked next."""
        return self._looked + LOOK_SECONDS if self._devices else math.inf

    def _look_at_devices(self, now: float) -> None:
        """Stop if a device was unplugged."""
        if now < self._next_look():
            return
        self._looked = now
        for device in self._devices:
            if reason := device.lost():
                self.stop(reason)

    def _handle(self, event: Any) -> None:
        match event:
            case Received():
                self._handle_message(*event)
            case TurnPassed():
                self._switch_turn(event.time)
            case Suspended():
                self._suspend()
            case InputFinished():
                self._finished += 1
            case Exception():
                raise event

    def _advance(self, now: float) -> None:
        """Do what is due now."""
        if self.reply:
            self._advance_reply(now)
        else:
            self._follow_human(now)
        all_finished = self._finished >= max(self._inputs, 1)
        if all_finished and self.reply is None and self._pause_ends() == math.inf:
            self.stop("the music is over")

    def _next_time(self) -> float:
        """Return when `_advance` has something to do if no event comes first."""
        if self.reply:
            return self.reply.next_time()
        if self._unread:
            return -math.inf
        return min(self.transcript.next_time(), self._pause_ends())

    def _pause_ends(self) -> float:
        """Return when the model takes over after a pause if no key is pressed first, or inf."""
        if self.options.take_over != "pause" or not self._notes or self.hands.down:
            return math.inf
        return self._last_key + self.options.pause

    def _handle_message(self, time: float, message: Message) -> None:
        changes = self.hands.update(message)
        if is_note_on(message):
            if self.reply:
                self._end_reply(time, "interrupted")
            self._turn_start = self._turn_start if self._notes else time
            self._notes += 1
        if is_note_on(message) or is_note_off(message) or changes:
            self._last_key = time
        self._apply(time, changes)
        if self.hands.passes_turn(message):
            self._switch_turn(time)

    def _apply(self, time: float, changes: Sequence[Change]) -> None:
        """Add changes to the transcript. During the model's turn its plan begins again from there."""
        changes = [c for c in changes if c.velocity or self.transcript.holds(Voice.HUMAN, c.pitch)]
        if self.reply and changes:
            self.reply.suspend(self.clock.now() + self.options.head_start + self.options.latency)
        for pitch, velocity in changes:
            if velocity:
                self.transcript.press(time, pitch, velocity)
            else:
                self.transcript.release(time, pitch)
        if self.reply and changes:
            self.reply.resume()
        if not self.reply:
            self.transcript.move_pedal(time, *self.hands.pedal)

    def _follow_human(self, now: float) -> None:
        """Read the human's music, and take over when it is time."""
        self._queue_events(self.transcript.flush(now))
        self._read()
        if not self._unread and now >= self._pause_ends():
            self._take_over(now)

    def _queue_events(self, events: list[int]) -> None:
        if events:
            self._unread += self.event_ids.to_ids(events)

    def _read(self) -> None:
        """Let the player read the next `MAX_READ` unread tokens."""
        ids, self._unread = self._unread[:MAX_READ], self._unread[MAX_READ:]
        if ids:
            started = time.perf_counter()
            self.player.read(np.array(ids))
            self.statistics.reading.add((time.perf_counter() - started) / len(ids))

    def _switch_turn(self, time: float) -> None:
        if self.reply:
            self._end_reply(time, "handed back")
        else:
            self._take_over(time)

    def _take_over(self, time: float) -> None:
        self._end_human_turn("the model took over")
        self._queue_events(self.transcript.flush(self.clock.now()))
        while self._unread:
            self._read()
            if self._over is not None:
                return
        shared = (self.player, self.transcript, self.scheduler, self.options, self.statistics, self.clock)
        self.reply = reply_of(self.transcript)(*shared, time)
        self.reply.begin()

    def _end_human_turn(self, reason: str) -> None:
        if self._notes:
            self.on_turn(Turn(Voice.HUMAN, self._last_key - self._turn_start, self._notes, reason))
        self._notes = 0

    def _advance_reply(self, now: float) -> None:
        if self.reply.is_over():
            self._end_reply(now, "done")
        elif now >= self.reply.deadline:
            self._end_reply(now, "out of time")
        else:
            self.reply.step()

    def _end_reply(self, time: float, reason: str) -> None:
        """Release the model's keys and take back what has not sounded."""
        reply, self.reply = self.reply, None
        self.scheduler.stop(time)
        reply.suspend(time)
        self.transcript.release_voice(time, Voice.MODEL)
        if self.scheduler.first is not None:
            self.statistics.first_sent.add(self.scheduler.first - reply.take_over_time)
        notes = reply.notes - self.scheduler.dropped
        self.on_turn(Turn(Voice.MODEL, time - reply.take_over_time, notes, reason, reply.behind))

    def settle(self) -> None:
        """After `run`: let the player read all that was played, with every key up, so that it can be saved."""
        if self.reply:  # `run` has failed
            self._end_reply(self.clock.now(), "the session ended")
        for event in (*self._events, *self.clock.wait(-math.inf)):
            if isinstance(event, Received):
                self._apply(event.time, self.hands.update(event.message))
        self._events.clear()
        self.transcript.release_voice(self.clock.now(), Voice.HUMAN)
        self._queue_events(self.transcript.flush_all())
        while self._unread:
            self._read()

    def _record(self, voice: Voice, time: float, message: Message) -> None:
        if self.recorder:
            self.recorder.add(voice, time, message)

    def _send(self, message: Message) -> bool:
        """Send a message. Return whether that worked; if not, the session ends, and later messages are still tried."""
        if self.output is None:
            return True
        try:
            self.output.send(message)
        except PortLost as error:
            self.stop(str(error))
            return False
        return True

    def _close(self) -> None:
        """Release all keys and save the recording, whatever has happened."""
        with ExitStack() as closing:  # called from the last to the first, even if one raises
            if self.recorder:
                closing.callback(self.recorder.close, self.clock.now())
            closing.callback(self.clock.close)
            closing.callback(self.instrument.close)
            closing.callback(self.scheduler.stop, self.clock.now())
