"""A turn of the model: what it plans to play, and how much of that has sounded."""

import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np
from mido import Message

from dsmr_mlx.generation.grammar import RELEASE_SECONDS, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript
from dsmr_mlx.tokenizers.token_tables import NEVER

POLL_SECONDS = 0.01  # between two looks at the scheduler's progress
GRACE_SECONDS = RELEASE_SECONDS + 1.0  # beyond the maximum turn: for the last notes to ring and a model that is late


class Planned(NamedTuple):
    """An event that the player has but that has not sounded yet.

    tick: the tick after it; token: the index of its token in the turn.
    """

    event: int
    tick: int
    token: int


class Reply:
    """Plans one turn of the model ahead of time, from the end of a transcript. Call `step` whenever `next_time` comes.

    The plan never holds more tokens than the player can rewind. complete: the model has ended its turn, though the last
    notes may not have sounded; deadline: time at which a model too slow to end its turn is stopped; notes: how many
    have sounded; behind: how often the model fell behind.
    """

    def __init__(
        self,
        player: Player,
        transcript: Transcript,
        scheduler: Scheduler,
        options: LiveOptions,
        statistics: Statistics,
        clock: Clock,
        take_over_time: float,
    ):
        self.player, self.transcript, self.scheduler = player, transcript, scheduler
        self.options, self.statistics, self.clock = options, statistics, clock
        self.grammar, self.event_ids = transcript.grammar, transcript.event_ids
        self.max_planned = max(player.model.config.segment_length - 2, 1)  # tokens; always rewindable
        self.plan: deque[Planned] = deque()
        self.notes = self.behind = 0
        self.complete = False
        self._tokens = 0  # planned since the turn began, rewound ones included
        self._partial: list[int] = []  # committed events of the token whose other events are still planned
        self._committed = 0  # messages of the scheduler whose events have been committed
        self.take_over_time, self._computing_since = take_over_time, time.perf_counter()
        self._head_start, self._started = options.head_start, clock.now()
        self._first_note_took: float | None = None  # seconds from `_started` until the first note was planned
        max_turn = math.inf if options.max_turn is None else options.max_turn
        self.deadline = self._started + options.head_start + options.latency + max_turn + GRACE_SECONDS
        self._first_tick: int | None = None
        self._has_note = False
        scheduler.begin()

    def begin(self) -> None:
        """Begin to play a head start from now."""
        self._started = now = self.clock.now()
        self._first_note_took = None
        self._read(self.transcript.flush_all() + self.transcript.flush(now))
        waits = self.transcript.waits_until(now + self._head_start + self.options.latency)
        self._continue_transcript()
        for token in self._read(waits):
            self._add(token)
        self._first_tick = self.tick if self._first_tick is None else self._first_tick

    def suspend(self, after: float) -> None:
        """Take back what sounds later than `after`: player and transcript then end where the sound ends."""
        after = max(after, self.transcript.time_of(self.transcript.tick))  # committed events stay
        self._commit(self.scheduler.cancel(after), after)
        if self.stream is not None:
            self.stream.close()
        if self.plan:
            first = self.plan[0].token
            self.statistics.rewound += self._tokens - first
            self.player.rewind(self._tokens - first)
            self._read(self._partial)
        self.plan.clear()
        self._partial = []  # read again as tokens that are complete
        self.complete = False

    def resume(self) -> None:
        """Continue after `suspend` from the end of the transcript; begin again if nothing has sounded yet."""
        if not self._committed:
            self.begin()
            return
        self._read(self.transcript.flush_all())
        self._continue_transcript()

    def _continue_transcript(self) -> None:
        self.tick, self.velocity, self.stream = self.transcript.tick, self.transcript.velocity, None

    def _read(self, events: list[int]) -> list[int]:
        """Let the player read events. Return their ids."""
        ids = self.event_ids.to_ids(events) if events else []
        if ids:
            self.player.read(np.array(ids))
        return ids

    def next_time(self) -> float:
        """Return the time of the next `step`."""
        due = self.transcript.time_of(self.tick) - self.options.latency
        if self.complete:
            due = max(due, self.clock.now() + POLL_SECONDS)
        elif self._planned >= self.max_planned:
            due = self.clock.now() + POLL_SECONDS
        else:
            due -= self.options.lookahead
        return min(due, self.deadline)

    def is_over(self) -> bool:
        """Whether the model has ended its turn and all of it has sounded."""
        now = self.clock.now()
        return self.complete and self.scheduler.due() == math.inf and self.transcript.time_of(self.tick) <= now

    def step(self) -> None:
        """Commit what has sounded by now, and play a token if it is time."""
        now = self.clock.now()
        self._commit(self.scheduler.done, now)
        if self.complete or self._planned >= self.max_planned or now < self.next_time():
            return
        if self.transcript.time_of(self.tick) < now - self.options.max_behind:
            self._skip_to(now)
        self._play()

    def _skip_to(self, now: float) -> None:
        """Continue from now, with a head start as long as the first note took before, so that it is on time."""
        self.behind += 1
        self.statistics.behind += 1
        took = now - self._started if self._first_note_took is None else self._first_note_took
        self._head_start = max(self._head_start, took)
        self.suspend(now)
        self.begin()

    def _play(self) -> None:
        started = time.perf_counter()
        if self.stream is None:
            self.stream = self.player.play(self._limits())
        tokens = next(self.stream, None)
        self.statistics.playing += time.perf_counter() - started
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
        """The number of tokens in the plan, including one whose events are committed in part."""
        return self._tokens - self.plan[0].token if self.plan else 0

    def _add(self, token: int) -> None:
        for event in self.event_ids.to_events(token):
            self._plan(event)
        self._tokens += 1

    def _plan(self, event: int) -> None:
        """Add an event to the plan and its key press or release to the scheduler."""
        g, channel = self.grammar, self.options.channel - 1
        self.tick += int(g.ticks[event])
        self.velocity = int(g.velocity[event]) if g.velocity[event] >= 0 else self.velocity
        self.plan.append(Planned(event, self.tick, self._tokens))
        self.complete = bool(g.ends[event])
        due = self.transcript.time_of(self.tick)
        if (pitch := int(g.press[event])) >= 0:
            if self._first_note_took is None:
                self._first_note_took = self.clock.now() - self._started
            velocity = int(g.velocities[self.velocity])
            self.scheduler.add(due, Message("note_on", channel=channel, note=pitch, velocity=velocity))
            if not self._has_note:
                self._has_note = True
                self.statistics.first_computed.add(time.perf_counter() - self._computing_since)
        elif (pitch := int(g.release[event])) >= 0:
            self.scheduler.add(due, Message("note_off", channel=channel, note=pitch, velocity=0))

    def _commit(self, messages: int, now: float) -> None:
        """Move events that have sounded from the plan to the transcript: those of the turn's first `messages` messages,
        and full waits that are over.

        A shorter wait or a velocity moves only with the key event that follows: after them time could not go on.
        """
        n, left = 0, max(messages - self._committed, 0)  # events to move, messages not yet found in the plan
        for i, planned in enumerate(self.plan, start=1):
            if self._moves_key(planned.event):
                if not left:
                    break
                n, left = i, left - 1
            elif self._is_full_wait(planned.event) and self.transcript.time_of(planned.tick) <= now:
                n = i
        moved = [self.plan.popleft() for _ in range(n)]
        for event, _, _ in moved:
            self.transcript.add_model_event(event)
            self.notes += int(self.grammar.press[event] >= 0)
            self._committed += int(self._moves_key(event))
        if moved:
            token = self.plan[0].token if self.plan else -1
            before = self._partial if moved[0].token == token else []
            self._partial = before + [planned.event for planned in moved if planned.token == token]

    def _moves_key(self, event: int) -> bool:
        return bool(self.grammar.press[event] >= 0 or self.grammar.release[event] >= 0)

    def _is_full_wait(self, event: int) -> bool:
        return bool(self.grammar.ticks[event] and self.event_ids.may_wait[self.grammar.next_state[:, event]].all())
