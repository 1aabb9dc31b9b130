"""Random music, tonal or not."""

import numpy as np

from dsmr_mlx.evaluation.music.sets import Music
from dsmr_mlx.music.notes import Notes


def music(seed: int, tonal: bool = True, seconds: float = 40.0) -> Notes:
    """Return a random walk in a random key, or noise, of about `seconds`."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rng.uniform(3, 5))
    onset = np.cumsum(rng.choice([0.1, 0.2, 0.2, 0.4], n)) if tonal else np.sort(rng.uniform(0, seconds, n))
    degrees = np.cumsum(rng.integers(-2, 3, n)) % 14
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    pitch = 54 + rng.integers(12) + scale[degrees % 7] + 12 * (degrees // 7)
    velocity = np.clip(rng.normal(60, 8, n), 1, 127)
    if not tonal:
        pitch, velocity = rng.integers(21, 109, n), rng.integers(1, 128, n)
    length = rng.choice([0.2, 0.4], n) if tonal else rng.uniform(0.05, 3, n)
    return Music.of("", Notes.sorted(onset, onset + length, pitch, velocity)).notes


def notes_of(*rows: tuple[float, float, int, int]) -> Notes:
    """Return notes from rows of onset, offset, pitch, velocity."""
    return Notes.sorted(*np.array(rows, float).reshape(-1, 4).T)
