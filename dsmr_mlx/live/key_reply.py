"""A turn of the model in vocabularies of key presses and releases."""

from collections import deque
from typing import NamedTuple

from dsmr_mlx.live.reply import Reply


class Planned(NamedTuple):
    """An event that the player has played but that has not sounded yet.

    tick: the tick after it; token: the index of its token in the turn.
    """

    event: int
    tick: int
    token: int


class KeyReply(Reply):
    """A `Reply` of events that press and release keys or let time pass; arguments as there."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.plan: deque[Planned] = deque()
        self._partial: list[int] = []  # committed events of the token whose other events are still planned
        self._committed = 0  # messages of the scheduler whose events have been committed
        self.velocity = -1  # index of the last one

    def begin(self) -> None:
        """See `Reply`."""
        self._started = now = self.clock.now()
        self._first_note_took = None
        self._read(self.transcript.flush_all() + self.transcript.flush(now))
        waits = self.transcript.waits_until(now + self._head_start + self.options.latency)
        self._continue_transcript()
        for token in self._read(waits):
            self._add(token)
        self._first_tick = self.tick if self._first_tick is None else self._first_tick

    def suspend(self, after: float) -> None:
        """See `Reply`."""
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
        """See `Reply`; begin again if nothing has sounded yet."""
        if not self._committed:
            self.begin()
            return
        self._read(self.transcript.flush_all())
        self._continue_transcript()

    def _continue_transcript(self) -> None:
        self.tick, self.velocity, self.stream = self.transcript.tick, self.transcript.velocity, None

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
        g = self.grammar
        self.tick += int(g.ticks[event])
        self.velocity = int(g.velocity[event]) if g.velocity[event] >= 0 else self.velocity
        self.plan.append(Planned(event, self.tick, self._tokens))
        self.complete = bool(g.ends[event])
        if (pitch := int(g.press[event])) >= 0:
            self._send(self.tick, pitch, int(g.velocities[self.velocity]))
        elif (pitch := int(g.release[event])) >= 0:
            self._send(self.tick, pitch, 0)

    def _commit_until(self, now: float) -> None:
        self._commit(self.scheduler.done, now)

    def _commit(self, messages: int, now: float) -> None:
        """Move events that have sounded from the plan to the transcript: those of the turn's first `messages` messages,
        and full waits that are over.

        A shorter wait or a velocity moves only with the key event that follows, because no wait may come in between.
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
