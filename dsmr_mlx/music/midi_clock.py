"""Convert the ticks of MIDI files to seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.common.errors import UserError

DEFAULT_TEMPO = 500_000  # microseconds per quarter before the first tempo event: 120 BPM
SMPTE = 0x8000  # set in divisions of frames and ticks; otherwise they are ticks per quarter
FRAME_RATES = {24: (24, 1), 25: (25, 1), 29: (30_000, 1001), 30: (30, 1)}  # 29 stands for 29.97, "30 drop"


@dataclass(frozen=True)
class Clock:
    """Conversion of ticks to seconds in float64, piecewise linear between tempo events.

    tick: `(K,)` int64, start of each tempo, the first at 0; tempo: `(K,)` float64, microseconds per quarter; elapsed:
    `(K,)` float64, microseconds × tpq at these ticks; tpq: ticks per quarter.
    """

    tick: np.ndarray
    tempo: np.ndarray
    elapsed: np.ndarray
    tpq: int

    @classmethod
    def of(cls, division: int, tempos: Sequence[tuple[int, int]]) -> Clock:
        """Return the clock of a division, the last field of a MIDI header, and of tempo events (tick, µs per quarter).

        Tempo events may be in any order. They are ignored if the division is in SMPTE frames. Raises `UserError` for
        an invalid division.
        """
        if division & SMPTE:
            frames, ticks = 256 - (division >> 8), division & 0xFF
            if frames not in FRAME_RATES or not ticks:
                expected = f"{', '.join(map(str, FRAME_RATES))} frames and at least 1 tick"
                raise UserError(f"SMPTE time of {frames} frames of {ticks} ticks, expected {expected}")
            per_second, scale = FRAME_RATES[frames]  # a quarter of scale seconds has per_second · ticks ticks
            return cls(np.zeros(1, np.int64), np.array([1e6 * scale]), np.zeros(1), per_second * ticks)
        if not division:
            raise UserError("resolution of 0 ticks per quarter, expected at least 1")
        events = sorted(tempos, key=lambda event: event[0])
        if not events or events[0][0] > 0:
            events = [(0, DEFAULT_TEMPO), *events]
        tick, tempo = np.array(events, np.int64).T
        tempo = tempo.astype(np.float64)
        return cls(tick, tempo, np.append(0.0, np.cumsum(np.diff(tick) * tempo[:-1])), division)

    def seconds(self, ticks: np.ndarray) -> np.ndarray:
        """Convert ticks `(N,)` to seconds `(N,)` float64. Of several tempi at one tick, the last applies."""
        return self.units(ticks) / (1e6 * self.tpq)

    def units(self, ticks: np.ndarray) -> np.ndarray:
        """Convert ticks `(N,)` to microseconds × tpq, `(N,)` float64 without a fraction."""
        i = np.searchsorted(self.tick, ticks, side="right") - 1  # the tempo at each tick
        return self.elapsed[i] + (ticks - self.tick[i]) * self.tempo[i]
