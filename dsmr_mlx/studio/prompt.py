"""What a model reads of some music to go on from a point in it."""

from dataclasses import dataclass

import numpy as np

from dsmr_mlx.generation.gap_player import ROUNDING, complete, events_of, ids_of
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar


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


def prompt_at(tokenizer: Tokenizer, notes: Notes, at: float, ids: np.ndarray | None = None) -> Prompt:
    """Return what a model reads before it goes on `at` some seconds; only the notes that begin before count.

    ids: `(T,)`, those that have made these notes; None: the notes are encoded. A model may play the keys of a moment in
    another order than an encoder writes them, and it should read what it has played. Times are rounded to ticks that
    count from the first note.
    """
    grammar = tokenizer.event_grammar()
    before = notes.take(notes.onset < at)
    start = float(before.onset[0]) if len(before) else float(at)
    tick = grammar.seconds_per_tick
    events = events_of(tokenizer, before) if ids is None else tokenizer.to_events(tokenizer.without_special(ids))
    elapsed = grammar.elapsed(events)
    begin = int(np.ceil((at - start) / tick - ROUNDING))
    if len(before):  # an onset may be rounded to the point
        begin = max(begin, int(np.rint((before.onset[-1] - start) / tick)) + 1)
    n = int(np.searchsorted(elapsed, begin))  # of the events before the point, and then of the releases at it
    later = np.flatnonzero((grammar.press[events[n:]] >= 0) | (grammar.velocity[events[n:]] >= 0))
    until = min(int(np.searchsorted(elapsed, begin, side="right")), n + int(later[0]) if len(later) else len(events))
    events = events[: complete(grammar, events[:until])]
    ticks = int(elapsed[len(events) - 1]) if len(events) else 0
    return Prompt(tokenizer.prompt(ids_of(tokenizer, events)), start, ticks, begin)


def with_final_releases(tokenizer: Tokenizer, notes: Notes, ids: np.ndarray) -> np.ndarray | None:
    """Return the ids `(T,)`, BOS included, of music that was ended: keys that are still down go up as in `notes`.

    ids: what was read and played, which may end in the middle of a note. None if the notes do not follow from them.
    """
    g = tokenizer.event_grammar()
    events = tokenizer.to_events(tokenizer.without_special(ids))
    events = events[: complete(g, events)]
    if not len(events):
        return None
    now = int(g.elapsed(events)[-1])
    down = keys_down(g, events) if g.held else set()
    if down:
        written = events_of(tokenizer, notes)
        elapsed, released = g.elapsed(written), g.release[written]
        last = (elapsed == now) & np.isin(released, list(down))
        tail = written[last | (elapsed > now)]
        if sorted(g.release[tail][g.release[tail] >= 0].tolist()) != sorted(down) or (g.press[tail] >= 0).any():
            return None
        events = np.concatenate([events, tail])
    return tokenizer.prompt(ids_of(tokenizer, events))


def keys_down(grammar: EventGrammar, events: np.ndarray) -> set[int]:
    """Return the pitches that are down after some events `(T,)`."""
    down: set[int] = set()
    for press, release in zip(grammar.press[events].tolist(), grammar.release[events].tolist(), strict=True):
        down.discard(release)
        if press >= 0:
            down.add(press)
    return down
