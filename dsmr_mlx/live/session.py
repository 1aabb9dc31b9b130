"""A session: who plays when, and that nothing is left sounding."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from mido import Message

from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.hands import Change, Hands, is_music
from dsmr_mlx.live.instrument import Instrument, releases, strikes
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.ports import PortLost
from dsmr_mlx.live.recorder import Recorder
from dsmr_mlx.live.reply import Reply
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript, Vocabulary
from dsmr_mlx.live.voice import Voice
from dsmr_mlx.player import Player
from dsmr_mlx.signals import ENDS, handled, stop_requests

WARM_UP = 4  # tokens
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
    """The human will not play any more."""


class Ended(NamedTuple):
    """The session is over."""

    reason: str


@dataclass(frozen=True)
class Turn:
    """Who played, for how many seconds, how many notes, and why it ended."""

    voice: Voice
    seconds: float
    notes: int
    reason: str


class Session:
    """Human and model take turns until one of the ports is gone, a signal comes, or a file has been played.

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
        self._over: Ended | None = None
        self._finished = False  # the human will not play any more
        self._lost = False
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
        """The human will not play any more; the model may still answer."""
        self.clock.post(Finished())

    def stop(self, reason: str) -> None:
        """The session is over."""
        self.clock.post(Ended(reason))

    def run(self, sources: Sequence = ()) -> str:
        """Take turns until the session is over, and return why; no key is down then, and the recording is saved.

        sources: what is started once the model is ready, each with `start(session)`. Raises what the player raises,
        and what a thread has raised.
        """
        try:
            with stop_requests(lambda name: self.stop(f"stopped by {name}"), SIGNALS):
                self._warm_up()
                self.clock.serve(self.scheduler)
                if self.recorder:
                    self.clock.serve(self.recorder)
                for source in sources:
                    source.start(self)
                return self._take_turns()
        finally:
            with handled(signal.SIG_IGN, SIGNALS):
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

    def _take_turns(self) -> str:
        while self._over is None:
            item = self.clock.wait(self._next_time())
            now = self.clock.now()
            match item:
                case Heard():
                    self._hear(*item)
                case Signal():
                    self._signal(item.time)
                case Finished():
                    self._finished, self._last = True, now
                    self._apply(now, self.hands.let_go())
                case Ended():
                    self._over = item
                case Exception():
                    raise item
                case None if self.reply:
                    self._go_on(now)
                case None:
                    self._listen(now)
            if self._finished and self.reply is None and not self._may_answer():
                self._over = self._over or Ended("the music is over")
        if self.reply:
            self._end_reply(self.clock.now(), "the session ended")
        self._end_human_turn("the session ended")
        return self._over.reason

    def _next_time(self) -> float:
        """When there will be something to do, if nothing happens until then."""
        if self.reply:
            return self.reply.next_time(self.clock.now())
        return min(self.transcript.next_time(), self._pause_ends())

    def _pause_ends(self) -> float:
        """When the model takes over, if nothing happens until then; inf: it does not."""
        if self.options.take_over != "pause" or not self._strikes or self.hands.down:
            return math.inf
        return self._last + self.options.pause

    def _may_answer(self) -> bool:
        """Whether a turn of the model can still come, after the human's last note."""
        return self.options.take_over == "enter" or self._pause_ends() < math.inf

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
            self.reply.resume(self.clock.now())

    def _listen(self, now: float) -> None:
        """While the human plays: read what they have played, and take over when it is time."""
        self._read(self.transcript.tell(now))
        if now >= self._pause_ends():
            self._take_over(now)

    def _read(self, events: list[int]) -> None:
        if events:
            ids, begun = self.vocabulary.ids(events), time.perf_counter()
            self.player.read(np.array(ids))
            self.statistics.reading += [(time.perf_counter() - begun) / len(events)] * len(events)

    def _signal(self, time: float) -> None:
        if self.reply:
            self._end_reply(time, "handed back")
        else:
            self._take_over(time)

    def _take_over(self, time: float) -> None:
        self._end_human_turn("the model took over")
        self.reply = Reply(self.player, self.transcript, self.scheduler, self.options, self.statistics, time)
        self.reply.begin(self.clock.now())

    def _end_human_turn(self, reason: str) -> None:
        if self._strikes:
            self.observe(Turn(Voice.HUMAN, self._last - self._began, self._strikes, reason))
        self._strikes = 0

    def _go_on(self, now: float) -> None:
        """While the model plays."""
        if self.reply.is_over(now):
            self._end_reply(now, "done")
        else:
            self.reply.step(now)

    def _end_reply(self, time: float, reason: str) -> None:
        """All of the model's keys go up; what was not heard has never been played."""
        reply, self.reply = self.reply, None
        self.scheduler.stop(time)
        reply.suspend(time)
        self.transcript.release_voice(time, Voice.MODEL)
        if self.scheduler.first is not None:
            self.statistics.first_sent.append(self.scheduler.first - reply.began)
        self.observe(Turn(Voice.MODEL, time - reply.began, reply.notes, reason))

    def settle(self) -> None:
        """After `run`: have the player hear all that was played, with every key up, so that it can be saved."""
        now = self.clock.now()
        self.transcript.release_voice(now, Voice.HUMAN)
        self._read(self.transcript.tell_all())

    def _record(self, voice: Voice, time: float, message: Message) -> None:
        if self.recorder:
            self.recorder.add(voice, time, message)

    def _send(self, message: Message) -> None:
        if self.output is None or self._lost:
            return
        try:
            self.output.send(message)
        except PortLost as error:
            self._lost = True
            self.stop(str(error))

    def _close(self) -> None:
        """Whatever has happened: no key is left down, and what was played is saved."""
        try:
            self.scheduler.stop(self.clock.now())
            self.instrument.close()
        finally:
            self.clock.close()
            if self.recorder:
                self.recorder.close()
