"""A turn of the model: the base class of replies, for vocabularies of key events and of notes."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from mido import Message

from dsmr_mlx.generation.grammar import RELEASE_SECONDS, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.clock import Clock
from dsmr_mlx.live.note_transcript import NoteTranscript
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.scheduler import Scheduler
from dsmr_mlx.live.statistics import Statistics
from dsmr_mlx.live.transcript import Transcript
from dsmr_mlx.tokenizers.token_tables import NEVER

POLL_SECONDS = 0.01  # between two checks of the scheduler's progress
GRACE_SECONDS = RELEASE_SECONDS + 1.0  # beyond the maximum turn: for the last notes to ring and a model that is late


class Reply(ABC):
    """Plans one turn of the model ahead of time, from the end of a transcript. Call `step` whenever `next_time` comes.

    The plan never holds more tokens than the player can rewind. complete: the model has ended its turn, though the last
    notes may not have sounded; deadline: time at which a model too slow to end its turn is stopped; notes: how many
    have sounded or came too late; behind: how often the model fell behind.
    """

    def __init__(
        self,
        player: Player,
        transcript: Transcript | NoteTranscript,
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
        self.notes = self.behind = 0
        self.complete = False
        self.tick = 0  # from which the next event may sound
        self.stream: Iterator[np.ndarray] | None = None  # of the player, from the end of the plan
        self._tokens = 0  # planned since the turn began, rewound ones included
        self.take_over_time, self._computing_since = take_over_time, time.perf_counter()
        self._head_start, self._started = options.head_start, clock.now()
        self._first_note_took: float | None = None  # seconds from `_started` until the first note was planned
        max_turn = math.inf if options.max_turn is None else options.max_turn
        self.deadline = self._started + options.head_start + options.latency + max_turn + GRACE_SECONDS
        self._first_tick: int | None = None
        self._has_note = False
        scheduler.begin()

    @abstractmethod
    def begin(self) -> None:
        """Begin to play a head start from now."""

    @abstractmethod
    def suspend(self, after: float) -> None:
        """Take back what sounds later than `after`: player and transcript then end where the sound ends."""

    @abstractmethod
    def resume(self) -> None:
        """Continue after `suspend` from the end of the transcript."""

    @property
    @abstractmethod
    def _planned(self) -> int:
        """The number of tokens that the player would have to rewind to take back the plan."""

    @abstractmethod
    def _commit_until(self, now: float) -> None:
        """Move what has sounded by now from the plan to the transcript."""

    @abstractmethod
    def _add(self, token: int) -> None:
        """Add a token of the player to the plan, and what it plays to the scheduler."""

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
        self._commit_until(now)
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
            self._finish()
            return
        self.statistics.played += 1
        self._add(int(tokens[0]))

    def _finish(self) -> None:
        """Note that the model has ended its turn."""
        self.complete = True

    def _limits(self) -> Limits:
        """Return the limits of the stream, from the end of what the player has read."""
        if self.options.max_turn is None:
            return Limits()
        left = round(self.options.max_turn / self.grammar.seconds_per_tick) - (self.tick - self._first_tick)
        return Limits(ticks=min(max(left, 1), NEVER))

    def _read(self, events: list[int]) -> list[int]:
        """Let the player read events. Return their ids."""
        ids = self.event_ids.to_ids(events) if events else []
        if ids:
            self.player.read(np.array(ids))
        return ids

    def _send(self, tick: int, pitch: int, velocity: int) -> None:
        """Let a key go down at a tick with a MIDI velocity, or up with velocity 0."""
        due, channel = self.transcript.time_of(tick), self.options.channel - 1
        if not velocity:
            self.scheduler.add(due, Message("note_off", channel=channel, note=pitch, velocity=0))
            return
        if self._first_note_took is None:
            self._first_note_took = self.clock.now() - self._started
        self.scheduler.add(due, Message("note_on", channel=channel, note=pitch, velocity=velocity))
        if not self._has_note:
            self._has_note = True
            self.statistics.first_computed.add(time.perf_counter() - self._computing_since)
