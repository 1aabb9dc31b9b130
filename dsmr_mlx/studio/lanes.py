"""One lane of a player as a take that grows: tokens become notes, keys that are down have provisional ends."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dsmr_mlx.generation.player import Player
from dsmr_mlx.studio.prompt import Prompt
from dsmr_mlx.studio.takes import Row, ms
from dsmr_mlx.tokenizers.keyboard import Keyboard, KeyEvent


@dataclass
class Update:
    """Own notes of a take from index `first` on, and its end; see `Session.extend`."""

    first: int
    rows: list[Row]
    end: float


@dataclass
class Lane:
    """A lane that has just read a prompt, and the take that it continues.

    rows: the own notes of the take so far, which begin before the prompt's point. Those whose keys are down are held:
    they end when the lane releases them. ids: all that the lane has read and played.
    """

    take: int
    player: Player
    prompt: Prompt
    rows: list[Row] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.ids = self.prompt.ids.tolist()
        self.tables, grammar = self.player.walk.tables, self.player.walk.grammar
        (moment,) = self.player.moments[:1]
        self.tick = grammar.seconds_per_tick
        self.start = self.prompt.start + self.prompt.ticks * self.tick
        self.keyboard = Keyboard(grammar, moment)
        self.point = self.prompt.start + self.prompt.begin * self.tick
        down = np.flatnonzero(moment.sounding).tolist() if grammar.held else []
        self.keyboard.down |= dict.fromkeys(down, -1)  # pressed before
        last = {row[2]: i for i, row in enumerate(self.rows)}
        self.held = {pitch: last[pitch] for pitch in down if pitch in last}  # pitch → index of its note
        self._changed = len(self.rows)

    @property
    def now(self) -> float:
        """The time of the lane's clock, at least that of the prompt's point."""
        return max(self.start + self.keyboard.tick * self.tick, self.point)

    def play(self, token: int) -> None:
        """Add a token that the player has drawn."""
        self.ids.append(token)
        if not self.finished:
            for event in self.tables.flat([token]).tolist():
                self._add(self.keyboard.play(event))

    def finish(self) -> None:
        """Release all keys: the take is complete."""
        if not self.finished:
            begun = max(self.keyboard.down.values(), default=-1)  # no key goes up in the tick in which one goes down
            self.keyboard.tick = max(self.keyboard.tick, self.prompt.silent, begun + 1)
            self._add(self.keyboard.release_all())
        self.finished = True

    def repeat(self) -> None:
        """Let the next update have all notes."""
        self._changed = 0

    def _add(self, events: Iterable[KeyEvent]) -> None:
        for tick, pitch, velocity in events:
            time = ms(self.start + tick * self.tick)
            if velocity:
                self.held[pitch] = len(self.rows)
                self.rows.append((time, time, pitch, velocity))
            elif (i := self.held.pop(pitch, None)) is not None:
                if time > self.rows[i][0]:
                    self._end(i, time)
                else:
                    self._drop(i)  # another note replaces it at once

    def _end(self, i: int, time: float) -> None:
        onset, _, pitch, velocity = self.rows[i]
        self.rows[i] = (onset, max(time, ms(onset + 0.001)), pitch, velocity)
        self._changed = min(self._changed, i)

    def _drop(self, i: int) -> None:
        del self.rows[i]
        self.held = {pitch: j - (j > i) for pitch, j in self.held.items()}
        self._changed = min(self._changed, i)

    def update(self) -> Update:
        """Return what has changed since the last update. Held notes end now until they are released."""
        now = ms(self.now)
        for i in self.held.values():
            self._end(i, now)
        first, self._changed = self._changed, len(self.rows)
        ends = [row[1] for row in (self.rows if self.finished else self.rows[first:])]
        return Update(first, self.rows[first:], max(ends, default=0.0) if self.finished else max([now, *ends]))
