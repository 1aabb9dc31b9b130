"""What a model reads of some music to go on from a point in it."""

from dataclasses import dataclass

import numpy as np

from dsmr_mlx.generation.gap_player import ROUNDING, complete, events_of, ids_of
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """The music before a point.

    ids: `(T,)` int64 with BOS: what happens before the point, and the releases at it. Keys of notes that sound on stay
        down; the model decides when to release them, unless its vocabulary gives notes a length
    start: the time of tick 0 in seconds, where the first note begins
    ticks: the clock after the ids, at the last event; begin: the tick of the point, from which keys may move
    """

    ids: np.ndarray
    start: float
    ticks: int
    begin: int

    @property
    def silent(self) -> int:
        """Ticks from the last event to the point."""
        return max(self.begin - self.ticks, 0)


def prompt_at(tokenizer: Tokenizer, notes: Notes, at: float) -> Prompt:
    """Return what a model reads before it goes on `at` some seconds; only the notes that begin before count.

    The music is encoded from its first note on, so times are rounded to ticks that count from there.
    """
    grammar = tokenizer.event_grammar()
    before = notes.take(notes.onset < at)
    start = float(before.onset[0]) if len(before) else float(at)
    events = events_of(tokenizer, before)
    elapsed = grammar.elapsed(events)
    presses = elapsed[grammar.press[events] >= 0]
    begin = int(np.ceil((at - start) / grammar.seconds_per_tick - ROUNDING))
    begin = max(begin, int(presses.max(initial=-1)) + bool(len(presses)))  # an onset may be rounded to the point
    events = events[: complete(grammar, events[elapsed <= begin])]
    ticks = int(elapsed[len(events) - 1]) if len(events) else 0
    return Prompt(tokenizer.prompt(ids_of(tokenizer, events)), start, ticks, begin)
