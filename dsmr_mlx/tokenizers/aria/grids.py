"""Rounding to grids of 0, 10, 20, … as Aria's tokenizer rounds.

The nearest step is taken. A tie goes to the step that a binary search meets first, so it may be rounded up or down.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from dsmr_mlx.tokenizers.aria.vocabulary import DURATIONS, ONSETS, STEP_MS, VELOCITIES


@cache
def ties_up(n: int) -> np.ndarray:
    """Return whether the middle between steps i and i + 1 of a grid of n steps is rounded up: bool `(n − 1,)`."""
    low, high = np.zeros(n - 1, np.int64), np.full(n - 1, n - 1)
    at, found = np.arange(n - 1), np.full(n - 1, -1)
    while (found < 0).any():
        middle = (low + high) // 2
        met = (found < 0) & ((middle == at) | (middle == at + 1))
        found = np.where(met, middle, found)
        low, high = np.where(middle <= at, middle + 1, low), np.where(middle > at, middle - 1, high)
    return found > at


def nearest_step(values: np.ndarray, n: int) -> np.ndarray:
    """Return the index of the nearest of n steps to each of the integers `(N,)`: int64, clamped to the grid."""
    values = np.clip(np.asarray(values, np.int64), 0, STEP_MS * (n - 1))
    step, rest = np.divmod(values, STEP_MS)
    up = np.append(ties_up(n), False)[step]
    return step + ((rest > STEP_MS // 2) | ((rest == STEP_MS // 2) & up))


def velocity_steps(velocity: np.ndarray) -> np.ndarray:
    """Return the steps 1..12 of MIDI velocities 1..127, of ten each."""
    return np.maximum(nearest_step(velocity, VELOCITIES), 1)


def duration_steps(ms: np.ndarray) -> np.ndarray:
    """Return the steps 1..500 of durations in milliseconds."""
    return np.maximum(nearest_step(ms, DURATIONS), 1)


def onset_steps(ms: np.ndarray) -> np.ndarray:
    """Return the steps 0..499 of milliseconds 0..4999 in a segment; the last five belong to the last step."""
    return nearest_step(ms, ONSETS)
