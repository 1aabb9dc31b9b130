"""A turn of the model: what it is about to play, and how much of it has been heard."""

import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np
from mido import Message

from dsmr_mlx.grammar import NEVER, Limits
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript
from dsmr_mlx.performance import bin_velocities
from dsmr_mlx.player import Player

GLANCE = 0.01  # seconds between two looks at what another thread has sent


class Planned(NamedTuple):
    """A token that the model has read or played, but nobody has heard yet, and the tick after it."""

    token: int
    tick: int


class Reply:
    """The model plays on from a transcript, ahead of time; call `step` whenever `next_time` has come.

    The plan is kept shorter than what the player can take back. `complete`: the model has ended its turn by itself,
    though it may not all be heard yet. `began`: when the human asked for it; `notes`: how many have been heard.
    """

    def __init__(
        self,
        player: Player,
        transcript: Transcript,
        scheduler: Scheduler,
        options: LiveOptions,
        statistics: Statistics,
        time_of_signal: float,
    ):
        self.player, self.transcript, self.scheduler = player, transcript, scheduler
        self.options, self.statistics = options, statistics
        self.tables = transcript.tables
        self.most = max(player.model.config.segment_length - 2, 1)  # so much can always be taken back
        self.plan: deque[Planned] = deque()
        self.notes = 0
        self.complete = False
        self._past = 0  # messages of the scheduler whose tokens have been told to the transcript
        self.began, self._counting = time_of_signal, time.perf_counter()
        self._first_tick: int | None = None
        self._has_note = False
        scheduler.begin()

    def begin(self, now: float) -> None:
        """Play on from a little later than now."""
        self._read(self.transcript.tell_all() + self.transcript.tell(now))
        waiting = self.transcript.waiting(now + self.options.head_start + self.options.latency)
        self._go_on()
        self._read(waiting)
        for token in waiting:
            self._add(token)
        self._first_tick = self.tick if self._first_tick is None else self._first_tick

    def resume(self, now: float) -> None:
        """Play on from where the transcript is, after `suspend`; if nothing has been heard yet, begin again."""
        if not self._past:
            self.begin(now)
            return
        self._read(self.transcript.tell_all())
        self._go_on()

    def _go_on(self) -> None:
        self.tick, self.velocity, self.stream = self.transcript.tick, self.transcript.velocity, None

    def _read(self, ids: list[int]) -> None:
        if ids:
            self.player.read(ids)

    def suspend(self, after: float) -> None:
        """Take back what is to sound later than `after`: player and transcript are where all has been heard."""
        after = max(after, self.transcript.time_of(self.transcript.tick))  # what the transcript was told stays
        past = self.scheduler.withdraw(after)
        self._tell_heard(past, after)
        if self.stream is not None:
            self.stream.close()
        self.statistics.rewound += len(self.plan)
        self.player.rewind(len(self.plan))
        self.plan.clear()
        self.complete = False

    def next_time(self, now: float) -> float:
        """When `step` should be called next."""
        due = self.transcript.time_of(self.tick) - self.options.latency
        if self.complete:
            return max(due, now + GLANCE)
        if len(self.plan) >= self.most:
            return now + GLANCE
        return due - self.options.lookahead

    def is_over(self, now: float) -> bool:
        """Whether all has been heard of a turn that the model has ended."""
        return self.complete and self.scheduler.due() == math.inf and self.transcript.time_of(self.tick) <= now

    def step(self, now: float) -> None:
        """Note what has been heard by now, and play a token if it is time."""
        self._tell_heard(self.scheduler.done, now)
        if self.complete or len(self.plan) >= self.most or now < self.next_time(now):
            return
        if self.transcript.time_of(self.tick) < now - self.options.patience:
            self.statistics.behind += 1
            self.suspend(now)
            self.begin(now)
        self._play()

    def _play(self) -> None:
        begun = time.perf_counter()
        if self.stream is None:
            self.stream = self.player.play(self._limits())
        tokens = next(self.stream, None)
        self.statistics.playing += time.perf_counter() - begun
        if tokens is None:
            self.complete = True
            return
        self.statistics.played += 1
        self._add(int(tokens[0]))

    def _limits(self) -> Limits:
        if self.options.max_turn is None:
            return Limits()
        left = round(self.options.max_turn / self.tables.seconds_per_tick) - (self.tick - self._first_tick)
        return Limits(ticks=min(max(left, 1), NEVER))

    def _add(self, token: int) -> None:
        """Plan a token: what it presses or releases goes to the scheduler."""
        t, channel = self.tables, self.options.channel - 1
        self.tick += int(t.ticks[token])
        self.velocity = int(t.velocity[token]) if t.velocity[token] >= 0 else self.velocity
        self.plan.append(Planned(token, self.tick))
        self.complete = not t.allowed[t.next_state[token]].any()
        due = self.transcript.time_of(self.tick)
        if (pitch := int(t.press[token])) >= 0:
            velocity = int(bin_velocities(np.array(self.velocity)))
            self.scheduler.add(due, Message("note_on", channel=channel, note=pitch, velocity=velocity))
            if not self._has_note:
                self._has_note = True
                self.statistics.first_computed.append(time.perf_counter() - self._counting)
        elif (pitch := int(t.release[token])) >= 0:
            self.scheduler.add(due, Message("note_off", channel=channel, note=pitch, velocity=0))

    def _tell_heard(self, past: int, now: float) -> None:
        """The tokens of the first so many messages are plans no more, nor are full pauses that are over.

        A rest of a pause is none without what follows, and neither is a velocity: time could not go on after them.
        """
        heard, left = 0, max(past - self._past, 0)
        for i, (token, tick) in enumerate(self.plan, start=1):
            if self.tables.press[token] >= 0 or self.tables.release[token] >= 0:
                if not left:
                    break
                heard, left = i, left - 1
            elif self.tables.ticks[token] and self._is_open(token) and self.transcript.time_of(tick) <= now:
                heard = i
        for _ in range(heard):
            token = self.plan.popleft().token
            self.transcript.heard(token)
            self.notes += int(self.tables.press[token] >= 0)
            self._past += int(self.tables.press[token] >= 0 or self.tables.release[token] >= 0)

    def _is_open(self, token: int) -> bool:
        return bool(self.transcript.vocabulary.open[self.tables.next_state[token]])
