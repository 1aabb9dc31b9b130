"""Rules for filling a gap: held keys keep their release times, and no key event comes before the gap begins."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.pauses import only_waits
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables


class GapBounds(NamedTuple):
    """The rules of a gap on the lanes' own clocks, int32.

    begin: `(B,)`, the tick before which no key is pressed or released
    ends:  `(B, 128)`, the tick at which each key that was down at first is released; `NEVER` for all other keys
    """

    begin: mx.array
    ends: mx.array

    @classmethod
    def of(cls, ticks: np.ndarray, silent: int, held: tuple[tuple[int, int], ...]) -> "GapBounds":
        """See `silent` and `held` of `grammar.Limits`; ticks: `(B,)`, the clock from which they count."""
        ends = np.full((len(ticks), 128), NEVER, np.int64)
        for pitch, after in held:
            ends[:, pitch] = ticks + after
        return cls(*(mx.array(np.minimum(a, NEVER).astype(np.int32)) for a in (ticks + silent, ends)))


class Kept(NamedTuple):
    """Restrictions of a gap that processors must take into account.

    keys:  `(B, 128)` bool, keys that are down and cannot be released yet
    short: `(B, V)` bool, pauses after which another key must be pressed or released: no pause may follow, the gap does
        not end there, and none of these keys is released
    """

    keys: mx.array
    short: mx.array


class GapRules:
    """The rules of a vocabulary. `(B, V)` below is bool; taken `(B, V)` or `(1, V)`: the ticks that each id would take.

    No pause passes the release of a held key. At that tick the key is released before any other event; it is pressed
    again one tick later at the earliest.
    """

    def __init__(self, tables: TokenTables):
        g, last = tables.grammar, (tables.events >= 0).sum(axis=1) - 1
        last_event = np.take_along_axis(tables.events, np.maximum(last, 0)[:, None], axis=1)[:, 0]
        waits = (g.ticks > 0) | g.bar | (g.position >= 0)
        pause = only_waits(tables)
        self.held, self.timed_later = g.held, bool(g.timed_later.any())
        moves = tables.contains(g.position >= 0)
        self.bars, self.moves = np.flatnonzero(tables.contains(g.bar)), mx.array(moves)
        self.awaits_time = mx.array(tables.after_any(tables.allowed[:, moves].any(axis=1)))
        self.needs_down, self.needs_up = (mx.array(t.astype(np.float32).T) for t in (tables.sounding, tables.silent))
        self.pause = mx.array(pause)
        self.ends_in_pause = mx.array(waits[last_event])
        self.releases = mx.array(tables.fades & tables.released.any(axis=1) & ~tables.takes_time)
        self.goes_on = mx.array(tables.after_any(tables.allowed[:, pause].any(axis=1)))  # a pause may follow

    def fits(self, taken: mx.array, now: mx.array, sounding: mx.array, bounds: GapBounds) -> tuple[mx.array, mx.array]:
        """The ids that keep the rules, and those that pass the release of a held key, both `(B, V)`.

        now: `(B,)`, the clock; sounding: `(B, 128)`, keys that are down.
        """
        now, begin = now[:, None], bounds.begin[:, None]
        if self.timed_later:
            return self._fits_timed_later(taken, now, begin), mx.zeros(taken.shape, mx.bool_)
        reaches = self.pause & ((now + taken >= begin) | self.goes_on)
        if not self.held:
            return mx.where(now < begin, reaches, True), mx.zeros(taken.shape, mx.bool_)
        due, later = sounding & (bounds.ends == now), self._later(now, sounding, bounds)
        room = self._room(later, now, bounds)
        any_due = due.any(axis=-1, keepdims=True)
        too_long = (taken > room) & ~any_due
        keeps = self._none(later, self.needs_down) & ~too_long
        again = ~sounding & (bounds.ends == now)
        free = keeps & self._none(again, self.needs_up) & ((taken < room) | self.ends_in_pause)
        fits = mx.where(now < begin, keeps & reaches, free)
        return mx.where(any_due, keeps & self.releases, fits), too_long

    def _fits_timed_later(self, taken: mx.array, now: mx.array, begin: mx.array) -> mx.array:
        """The ids `(B, V)` that fit if notes are written before their onsets. If the gap begins in a later bar, only
        bars are allowed; no position is before the gap. now, begin: `(B, 1)`.
        """
        in_this_bar = now + taken[:, self.bars[0] : self.bars[0] + 1] > begin
        before = mx.where(self.awaits_time, in_this_bar, True) & mx.where(self.moves, now + taken >= begin, True)
        return mx.where(now < begin, before, True)

    def kept(self, taken: mx.array, now: mx.array, sounding: mx.array, bounds: GapBounds, end: mx.array) -> Kept:
        """See `Kept`; end: `(B,)`, the clock at which the gap ends, the rest as in `fits`."""
        now = now[:, None]
        later = self._later(now, sounding, bounds)
        arrives = (taken == self._room(later, now, bounds)) | (now + taken >= end[:, None])
        return Kept(later, self.pause & ~self.goes_on & ~arrives)

    @staticmethod
    def _later(now: mx.array, sounding: mx.array, bounds: GapBounds) -> mx.array:
        """Keys that are released later, `(B, 128)`; now: `(B, 1)`."""
        return sounding & (bounds.ends > now) & (bounds.ends < NEVER)

    @staticmethod
    def _room(later: mx.array, now: mx.array, bounds: GapBounds) -> mx.array:
        """The ticks until the first of the keys that are released `later`, `(B, 1)`."""
        return mx.where(later, bounds.ends - now, NEVER).min(axis=-1, keepdims=True)

    @staticmethod
    def _none(keys: mx.array, needed: mx.array) -> mx.array:
        """The ids that need none of the keys `(B, 128)`; needed: `(128, V)`."""
        return keys.astype(mx.float32) @ needed == 0
