"""A turn of the model: what it is about to play, and how much of it has been heard."""

import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np
from mido import Message

from dsmr_mlx.generation.grammar import NEVER, RELEASE_SECONDS, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript

GLANCE = 0.01  # seconds between two looks at what another thread has sent
SECONDS_TO_END = RELEASE_SECONDS + 1.0  # after a turn's longest time, for the last notes to ring and a model to be late


class Planned(NamedTuple):
    """An event that the model has read or played, but nobody has heard yet: the tick after it, and which of the turn's
    tokens it is of.
    """

    event: int
    tick: int
    token: int


class Reply:
    """The model plays on from a transcript, ahead of time; call `step` whenever `next_time` has come.

    The plan is kept shorter than what the player can take back. `complete`: the model has ended its turn by itself,
    though it may not all be heard yet. `began`: when the human asked for it; `deadline`: when it has to be over, for a
    model that is too slow to end it; `notes`: how many have been heard; `behind`: how often the model fell behind.
    """

    def __init__(
        self,
        player: Player,
        transcript: Transcript,
        scheduler: Scheduler,
        options: LiveOptions,
        statistics: Statistics,
        clock: Clock,
        time_of_signal: float,
    ):
        self.player, self.transcript, self.scheduler = player, transcript, scheduler
        self.options, self.statistics, self.clock = options, statistics, clock
        self.grammar, self.vocabulary = transcript.grammar, transcript.vocabulary
        self.most = max(player.model.config.segment_length - 2, 1)  # so much can always be taken back
        self.plan: deque[Planned] = deque()
        self.notes = self.behind = 0
        self.complete = False
        self._tokens = 0  # that were ever planned
        self._partly: list[int] = []  # what has been heard of the token whose other events are still planned
        self._past = 0  # messages of the scheduler whose events have been told to the transcript
        self.began, self._counting = time_of_signal, time.perf_counter()
        self._head_start, self._begun = options.head_start, clock.now()
        self._took: float | None = None  # seconds to compute the first note since then
        longest = math.inf if options.max_turn is None else options.max_turn
        self.deadline = self._begun + options.head_start + options.latency + longest + SECONDS_TO_END
        self._first_tick: int | None = None
        self._has_note = False
        scheduler.begin()

    def begin(self) -> None:
        """Play on from a little later than now."""
        self._begun = now = self.clock.now()
        self._took = None
        self._read(self.transcript.tell_all() + self.transcript.tell(now))
        waiting = self.transcript.waiting(now + self._head_start + self.options.latency)
        self._go_on()
        for token in self._read(waiting):
            self._add(token)
        self._first_tick = self.tick if self._first_tick is None else self._first_tick

    def resume(self) -> None:
        """Play on from where the transcript is, after `suspend`; if nothing has been heard yet, begin again."""
        if not self._past:
            self.begin()
            return
        self._read(self.transcript.tell_all())
        self._go_on()

    def _go_on(self) -> None:
        self.tick, self.velocity, self.stream = self.transcript.tick, self.transcript.velocity, None

    def _read(self, events: list[int]) -> list[int]:
        """Let the player read some events; the ids that stand for them."""
        ids = self.vocabulary.ids(events) if events else []
        if ids:
            self.player.read(np.array(ids))
        return ids

    def suspend(self, after: float) -> None:
        """Take back what is to sound later than `after`: player and transcript are where all has been heard."""
        after = max(after, self.transcript.time_of(self.transcript.tick))  # what the transcript was told stays
        past = self.scheduler.withdraw(after)
        self._tell_heard(past, after)
        if self.stream is not None:
            self.stream.close()
        if self.plan:
            first = self.plan[0].token
            self.statistics.rewound += self._tokens - first
            self.player.rewind(self._tokens - first)
            self._read(self._partly)
        self.plan.clear()
        self._partly = []  # they are tokens of their own now
        self.complete = False

    def next_time(self) -> float:
        """When `step` should be called next."""
        due = self.transcript.time_of(self.tick) - self.options.latency
        if self.complete:
            due = max(due, self.clock.now() + GLANCE)
        elif self._planned >= self.most:
            due = self.clock.now() + GLANCE
        else:
            due -= self.options.lookahead
        return min(due, self.deadline)

    def is_over(self) -> bool:
        """Whether all has been heard of a turn that the model has ended."""
        now = self.clock.now()
        return self.complete and self.scheduler.due() == math.inf and self.transcript.time_of(self.tick) <= now

    def step(self) -> None:
        """Note what has been heard by now, and play a token if it is time."""
        now = self.clock.now()
        self._tell_heard(self.scheduler.done, now)
        if self.complete or self._planned >= self.most or now < self.next_time():
            return
        if self.transcript.time_of(self.tick) < now - self.options.patience:
            self._catch_up(now)
        self._play()

    def _catch_up(self, now: float) -> None:
        """Go on from now, so late that the first note will be there in time: it takes what it took before."""
        self.behind += 1
        self.statistics.behind += 1
        took = now - self._begun if self._took is None else self._took
        self._head_start = max(self._head_start, took)
        self.suspend(now)
        self.begin()

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
        left = round(self.options.max_turn / self.grammar.seconds_per_tick) - (self.tick - self._first_tick)
        return Limits(ticks=min(max(left, 1), NEVER))

    @property
    def _planned(self) -> int:
        """How many tokens are planned, the one whose events have been heard in part among them."""
        return self._tokens - self.plan[0].token if self.plan else 0

    def _add(self, token: int) -> None:
        """Plan a token: what its events press or release goes to the scheduler."""
        for event in self.vocabulary.events(token):
            self._plan(event)
        self._tokens += 1

    def _plan(self, event: int) -> None:
        g, channel = self.grammar, self.options.channel - 1
        self.tick += int(g.ticks[event])
        self.velocity = int(g.velocity[event]) if g.velocity[event] >= 0 else self.velocity
        self.plan.append(Planned(event, self.tick, self._tokens))
        self.complete = bool(g.ends[event])
        due = self.transcript.time_of(self.tick)
        if (pitch := int(g.press[event])) >= 0:
            if self._took is None:
                self._took = self.clock.now() - self._begun
            velocity = int(g.velocities[self.velocity])
            self.scheduler.add(due, Message("note_on", channel=channel, note=pitch, velocity=velocity))
            if not self._has_note:
                self._has_note = True
                self.statistics.first_computed.add(time.perf_counter() - self._counting)
        elif (pitch := int(g.release[event])) >= 0:
            self.scheduler.add(due, Message("note_off", channel=channel, note=pitch, velocity=0))

    def _tell_heard(self, past: int, now: float) -> None:
        """The events of the first so many messages are plans no more, nor are full pauses that are over.

        A rest of a pause is none without what follows, and neither is a velocity: time could not go on after them.
        """
        heard, left = 0, max(past - self._past, 0)
        for i, planned in enumerate(self.plan, start=1):
            if self._moves_key(planned.event):
                if not left:
                    break
                heard, left = i, left - 1
            elif self._is_open_pause(planned.event) and self.transcript.time_of(planned.tick) <= now:
                heard = i
        told = [self.plan.popleft() for _ in range(heard)]
        for event, _, _ in told:
            self.transcript.heard(event)
            self.notes += int(self.grammar.press[event] >= 0)
            self._past += int(self._moves_key(event))
        if told:
            token = self.plan[0].token if self.plan else -1
            before = self._partly if told[0].token == token else []
            self._partly = before + [planned.event for planned in told if planned.token == token]

    def _moves_key(self, event: int) -> bool:
        return bool(self.grammar.press[event] >= 0 or self.grammar.release[event] >= 0)

    def _is_open_pause(self, event: int) -> bool:
        return bool(self.grammar.ticks[event] and self.vocabulary.open[self.grammar.next_state[event]])
