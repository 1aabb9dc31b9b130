"""A turn of the model in Aria's vocabulary, which writes notes with their lengths."""

import math
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import RELEASE_SECONDS, Limits
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.note_transcript import MAX_LENGTH, Item, LiveNote, PedalMove, TimeStep
from dsmr_mlx.live.reply import Reply
from dsmr_mlx.tokenizers.aria.vocabulary import DURATIONS, STEP_MS
from dsmr_mlx.tokenizers.keyboard import Keyboard

TOKENS_OF_A_NOTE = 3


class Planned(NamedTuple):
    """A note or another item whose end has not sounded yet.

    token: the index of its first token in the turn; end: milliseconds, inf if the stream cannot keep its tokens;
    messages: how many messages of the turn have been sent once it has begun
    """

    token: int
    item: Item
    end: float
    messages: int


class NoteReply(Reply):
    """A `Reply` of notes; arguments as there.

    When the turn begins, keys of the human that are down get the lengths that the model expects; that makes the pitches
    after them likelier than lengths cut there, see `docs/results.md`. A note stays in the plan until it ends: if
    the turn ends before, the player rewinds to the first one and reads all of them again with the lengths that sounded.
    If that would be more than the player can rewind, the oldest ones keep the lengths that the model gave them.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.deadline += MAX_LENGTH / 1000 - RELEASE_SECONDS  # the last notes ring as long as they are written
        self.vocabulary, self.max_planned = self.event_ids.vocabulary, max(self.max_planned, TOKENS_OF_A_NOTE)
        self.plan: deque[Planned] = deque()
        self._begun: int | None = None  # the first token of the event that is not complete
        self._pitch = self._velocity = 0  # of that event, a note
        self._down: bool | None = None  # whether it lets the pedal go down, None if it is a note
        self._pedal_down = False  # at the end of the plan
        self._messages = 0  # sent to the scheduler in this turn
        self._silent = 0  # ticks in which the model plays no note, from the end of what the player has read

    def begin(self) -> None:
        """See `Reply`."""
        self._started = now = self.clock.now()
        self._first_note_took = None
        if self._first_tick is None:
            self._read_cut(now)
        else:  # again within the turn
            self.transcript.release_voice(now, Voice.MODEL)
            self._read(self.transcript.flush_all())
        self._mark_the_turn()
        start = now + self._head_start + self.options.latency
        steps = self.transcript.steps_until(start)
        self._base, self._pedal_down, self.stream = self.transcript.tick, self.transcript.pedal_down, None
        self.keyboard = Keyboard(self.grammar, self.player.moments[0])
        for token in self._read(steps):
            self._add(token)
        played, self.tick = self._now, max(self._now, math.ceil(self.transcript.milliseconds(start) / STEP_MS))
        self._silent = self.tick - played
        self._first_tick = self.tick if self._first_tick is None else self._first_tick

    def _read_cut(self, now: float) -> None:
        """Read what waits when the turn begins. Keys that are down get the likeliest lengths, at least those so far."""
        held, ids = {id(note) for note in self.transcript.cut(now)}, []
        while self.transcript.waiting:
            is_held = id(self.transcript.waiting[0]) in held
            ids += self.transcript.flush_one()
            if is_held:
                length = ids.pop()
                self._read(ids)
                ids = [self._likeliest_length(length)]
        self._read(ids)

    def _likeliest_length(self, least: int) -> int:
        """Return the id of the likeliest length of the note that the player has read, `least` or longer."""
        end = self.vocabulary.durations + DURATIONS
        return least + int(np.argmax(np.array(self.player.logits[0, least:end].astype(mx.float32))))

    def _mark_the_turn(self) -> None:
        """Read the token that ends the prompt, once and only if there is music of the human, as in training."""
        if self.vocabulary.prompt_end is not None and not self.transcript.answered and self.transcript.written:
            self._read([self.vocabulary.prompt_end])
        self.transcript.answered = True

    def suspend(self, after: float) -> None:
        """See `Reply`."""
        after = max(after, self.transcript.time_of(self.transcript.tick))
        sounded = self.scheduler.cancel(after)
        self.scheduler.release(after)  # their note-offs may have been cancelled
        self._commit_until(after)
        if self.stream is not None:
            self.stream.close()
        if self._planned:
            self.statistics.rewound += self._planned
            self.player.rewind(self._planned)
        until = self.transcript.milliseconds(after)
        begun = [p.item for p in self.plan if p.item.time <= until and p.messages <= sounded]
        self.notes += sum(isinstance(item, LiveNote) for item in begun)
        self.transcript.take_back(begun, until)
        self._read(self.transcript.flush_all())
        self.plan.clear()
        self._begun = self._down = None
        self.complete = False

    def resume(self) -> None:
        """See `Reply`."""
        self.begin()

    def _limits(self) -> Limits:
        limits = super()._limits()
        if self.options.max_turn is not None:
            limits = replace(limits, ticks=limits.ticks + self._silent)
        return replace(limits, silent=self._silent)

    @property
    def _now(self) -> int:
        """The tick of the last token that has a time."""
        return self._base + self.keyboard.tick

    @property
    def _planned(self) -> int:
        first = self.plan[0].token if self.plan else self._begun
        return 0 if first is None else self._tokens - first

    def _add(self, token: int) -> None:
        for tick, pitch, velocity in self.keyboard.play(token):
            self._send(self._base + tick, pitch, velocity)
            self._messages += 1
        self._begun = self._tokens if self._begun is None else self._begun
        self._tokens += 1
        self.tick = max(self.tick, self._now)
        item = self._item(token)
        if item is not None:
            end = item.end if isinstance(item, LiveNote) else item.time
            end = math.inf if self.grammar.ends[token] else end
            self.plan.append(Planned(self._begun, item, end, self._messages))
            self._begun = self._down = None
        if self.grammar.ends[token]:
            self._finish()

    def _item(self, token: int) -> Item | None:
        """Return what a token completes, None if it is followed by a time or a length."""
        g, time = self.grammar, STEP_MS * self._now
        if g.press[token] >= 0:
            self._pitch, self._velocity = int(g.press[token]), int(g.velocities[g.velocity[token]])
        elif (place := int(self.vocabulary.index("pedal", token))) >= 0:
            self._down = place == 0
        elif g.duration[token] >= 0:
            return LiveNote(time, self._pitch, self._velocity, time + STEP_MS * int(g.duration[token]))
        elif g.position[token] >= 0:
            if self._down is not None:
                self._pedal_down = self._down
                return PedalMove(time, self._down)
        elif g.ends[token] and self._pedal_down:
            return PedalMove(time, False)  # it goes up with the end, which is not in the stream
        else:
            return TimeStep(math.inf if g.ends[token] else time)
        return None

    def _finish(self) -> None:
        super()._finish()
        for tick, pitch, _ in self.keyboard.release_all():
            self._send(self._base + tick, pitch, 0)

    def _commit_until(self, now: float) -> None:
        """See `Reply`. Commit items that have ended, and those that have begun if the plan would become too long."""
        until = self.transcript.milliseconds(now)
        while self.plan and (self.plan[0].end <= until or self._is_full(until)):
            item = self.plan.popleft().item
            self.transcript.follow(item)
            self.notes += isinstance(item, LiveNote)

    def _is_full(self, until: int) -> bool:
        return self._planned >= self.max_planned and self.plan[0].item.time < until
