"""A session: who plays when, and that nothing is left sounding."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from mido import Message

from dsmr_mlx.common.signals import ENDS, handled
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.hands import Change, Hands, is_music
from dsmr_mlx.live.instrument import Instrument, Voice, releases, strikes
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.ports import PortLost, Source
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.reply import Reply
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript, Vocabulary

WARM_UP = 4  # tokens
MOST_AT_ONCE = 256  # tokens that are read before the session looks again at what has happened
SIGNALS = (*ENDS, "SIGHUP")


class Output(Protocol):
    """Where music goes to: `ports.DeviceOutput`, `network.NetworkPort`."""

    name: str

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`."""
        ...


class Heard(NamedTuple):
    """A message of the human's, and when it came in."""

    time: float
    message: Message


class Signal(NamedTuple):
    """The human wants the other one to play."""

    time: float


class Finished(NamedTuple):
    """Nothing more will come from one of the sources."""


class Wake(NamedTuple):
    """The session is to look whether it is over."""


@dataclass(frozen=True)
class Turn:
    """Who played, for how many seconds, how many notes, and why it ended; how often the model fell behind."""

    voice: Voice
    seconds: float
    notes: int
    reason: str
    behind: int = 0


class Session:
    """Human and model take turns until one of the ports is gone, a signal comes, or all sources have finished.

    player: one lane, used by the thread that calls `run`, and by no other. output: None to be heard by the recorder
    alone. observe(turn) is told of each turn that ends. `receive`, `finish`, `stop` and `pass_turn` may be called from
    any thread. Raises `UserError` for a player whose tokens cannot be played live.
    """

    def __init__(
        self,
        player: Player,
        clock: Clock,
        output: Output | None = None,
        options: LiveOptions | None = None,
        recorder: Recorder | None = None,
        observe: Callable[[Turn], None] = lambda turn: None,
    ):
        self.player, self.clock, self.output, self.recorder = player, clock, output, recorder
        self.options, self.observe = options or LiveOptions(), observe
        self.statistics = Statistics()
        self.instrument = Instrument(self._send)
        self.scheduler = Scheduler(self.instrument, self.options, self.statistics, self._record)
        self.hands = Hands(self.options.controller)
        self.vocabulary = Vocabulary(player.tokenizer)
        self.reply: Reply | None = None
        self.ready = False  # the player has been prepared, and may have played since
        self._over: str | None = None  # why; any thread may say so, and all else is left
        self._players, self._finished = 0, 0  # sources
        self._waiting: deque = deque()  # what has happened, and not been looked at
        self._unread: list[int] = []  # tokens of what the human has played
        self._strikes, self._began, self._last = 0, 0.0, 0.0  # of the human's turn

    def receive(self, message: Message) -> None:
        """The human plays: what must not wait happens here, the rest in `run`."""
        now = self.clock.now()
        if is_music(message) and strikes(message):
            self.scheduler.stop(now)
        is_signal = self.hands.is_signal(message)
        if self.options.thru and not is_signal:
            self.instrument.play(Voice.HUMAN, message)
        if is_music(message):
            if not is_signal:
                self._record(Voice.HUMAN, now, message)
            self.clock.post(Heard(now, message))

    def pass_turn(self) -> None:
        """The human wants the other one to play: the model to begin, or to end."""
        self.clock.post(Signal(self.clock.now()))

    def finish(self) -> None:
        """A source will not send any more; the model may still answer."""
        self.clock.post(Finished())

    def stop(self, reason: str) -> None:
        """The session is over, whatever else has happened that it has not looked at yet."""
        self._over = self._over or reason
        self.clock.post(Wake())

    def heeding_signals(self) -> AbstractContextManager[None]:
        """Ctrl-C, SIGTERM and SIGHUP say that the session is over; they interrupt nothing, however many come."""
        return handled(lambda number, frame: self.stop(f"stopped by {signal.Signals(number).name}"), SIGNALS)

    def run(self, sources: Sequence[Source] = ()) -> str:
        """Take turns until the session is over, and return why; no key is down then, and the recording is saved.

        sources: what is started once the model is ready. Raises what the player raises, and what a thread has raised.
        """
        with self.heeding_signals():  # until all keys are up
            try:
                self._warm_up()
                self._start(sources)
                return self._take_turns()
            finally:
                self._close()

    def _warm_up(self) -> None:
        """Compute once what will be computed live, which may have to be compiled; then begin where the player is."""
        if self.player.position == 0:
            self.player.read(np.empty(0, np.int64))
        steps = self.player.play()
        n = sum(1 for _, _ in zip(range(WARM_UP), steps, strict=False))
        steps.close()
        self.player.rewind(n)
        (moment,), now = self.player.moments, self.clock.now()
        self.transcript = Transcript(self.vocabulary, moment.state, moment.velocity, self.player.held[0], now)
        self.transcript.release_voice(now, Voice.MODEL)
        self.ready = True

    def _start(self, sources: Sequence[Source]) -> None:
        self._players = sum(source.plays for source in sources)
        self.clock.serve(self.scheduler)
        if self.recorder:
            self.clock.serve(self.recorder)
        for source in sources:
            source.start(self)

    def _take_turns(self) -> str:
        while self._over is None:
            self._waiting.extend(self.clock.wait(self._next_time()))
            while self._waiting and self._over is None:
                self._take(self._waiting.popleft())
            if self._over is None:
                self._go_on(self.clock.now())
        if self.reply:
            self._end_reply(self.clock.now(), "the session ended")
        self._end_human_turn("the session ended")
        return self._over

    def _take(self, item: Any) -> None:
        """Note what has happened."""
        match item:
            case Heard():
                self._hear(*item)
            case Signal():
                self._signal(item.time)
            case Finished():
                self._finished += 1
            case Exception():
                raise item

    def _go_on(self, now: float) -> None:
        """Do what it is time for."""
        if self.reply:
            self._play_on(now)
        else:
            self._listen(now)
        all_finished = self._finished >= max(self._players, 1)
        if all_finished and self.reply is None and self._pause_ends() == math.inf:
            self.stop("the music is over")

    def _next_time(self) -> float:
        """When there will be something to do, if nothing happens until then."""
        if self.reply:
            return self.reply.next_time()
        if self._unread:
            return -math.inf
        return min(self.transcript.next_time(), self._pause_ends())

    def _pause_ends(self) -> float:
        """When the model takes over, if nothing happens until then; inf: it does not."""
        if self.options.take_over != "pause" or not self._strikes or self.hands.down:
            return math.inf
        return self._last + self.options.pause

    def _hear(self, time: float, message: Message) -> None:
        changes = self.hands.take(message)
        if strikes(message):
            if self.reply:
                self._end_reply(time, "interrupted")
            self._began = self._began if self._strikes else time
            self._strikes += 1
        if strikes(message) or releases(message) or changes:
            self._last = time
        self._apply(time, changes)
        if self.hands.signals(message):
            self._signal(time)

    def _apply(self, time: float, changes: Sequence[Change]) -> None:
        """Tell the transcript; while the model plays, what it has planned begins anew from there."""
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

    def _listen(self, now: float) -> None:
        """While the human plays: read what they have played, and take over when it is time."""
        self._tell(self.transcript.tell(now))
        self._read()
        if not self._unread and now >= self._pause_ends():
            self._take_over(now)

    def _tell(self, events: list[int]) -> None:
        """Have the player read some events later."""
        if events:
            self._unread += self.vocabulary.ids(events)

    def _read(self) -> None:
        """Let the player read the next tokens of those that it has not read yet."""
        ids, self._unread = self._unread[:MOST_AT_ONCE], self._unread[MOST_AT_ONCE:]
        if ids:
            begun = time.perf_counter()
            self.player.read(np.array(ids))
            self.statistics.reading.add((time.perf_counter() - begun) / len(ids))

    def _signal(self, time: float) -> None:
        if self.reply:
            self._end_reply(time, "handed back")
        else:
            self._take_over(time)

    def _take_over(self, time: float) -> None:
        self._end_human_turn("the model took over")
        self._tell(self.transcript.tell(self.clock.now()))
        while self._unread:
            self._read()
            if self._over is not None:
                return
        shared = (self.player, self.transcript, self.scheduler, self.options, self.statistics, self.clock)
        self.reply = Reply(*shared, time)
        self.reply.begin()

    def _end_human_turn(self, reason: str) -> None:
        if self._strikes:
            self.observe(Turn(Voice.HUMAN, self._last - self._began, self._strikes, reason))
        self._strikes = 0

    def _play_on(self, now: float) -> None:
        """While the model plays."""
        if self.reply.is_over():
            self._end_reply(now, "done")
        elif now >= self.reply.deadline:
            self._end_reply(now, "out of time")
        else:
            self.reply.step()

    def _end_reply(self, time: float, reason: str) -> None:
        """All of the model's keys go up; what was not heard has never been played."""
        reply, self.reply = self.reply, None
        self.scheduler.stop(time)
        reply.suspend(time)
        self.transcript.release_voice(time, Voice.MODEL)
        if self.scheduler.first is not None:
            self.statistics.first_sent.add(self.scheduler.first - reply.began)
        self.observe(Turn(Voice.MODEL, time - reply.began, reply.notes, reason, reply.behind))

    def settle(self) -> None:
        """After `run`: have the player hear all that was played, with every key up, so that it can be saved."""
        if self.reply:  # `run` has failed
            self._end_reply(self.clock.now(), "the session ended")
        for item in (*self._waiting, *self.clock.wait(-math.inf)):
            if isinstance(item, Heard):
                self._apply(item.time, self.hands.take(item.message))
        self._waiting.clear()
        self.transcript.release_voice(self.clock.now(), Voice.HUMAN)
        self._tell(self.transcript.tell_all())
        while self._unread:
            self._read()

    def _record(self, voice: Voice, time: float, message: Message) -> None:
        if self.recorder:
            self.recorder.add(voice, time, message)

    def _send(self, message: Message) -> bool:
        """Whether a message was sent. An output that has failed ends the session; until then it is tried again."""
        if self.output is None:
            return True
        try:
            self.output.send(message)
        except PortLost as error:
            self.stop(str(error))
            return False
        return True

    def _close(self) -> None:
        """Whatever has happened: no key is left down, and what was played is saved."""
        with ExitStack() as closing:  # from the last to the first, each whatever another has raised
            if self.recorder:
                closing.callback(self.recorder.close)
            closing.callback(self.clock.close)
            closing.callback(self.instrument.close)
            closing.callback(self.scheduler.stop, self.clock.now())
