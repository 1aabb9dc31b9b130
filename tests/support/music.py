"""Random music and ids, and music given by its notes."""

import numpy as np

from dsmr_mlx.music.notes import Notes, without_overlaps
from dsmr_mlx.tokenizers.performance import decode_ids, encode_notes

V = 23  # ids of `random_tokens`


def random_tokens(seed: int, B: int, T: int) -> np.ndarray:
    """Return random ids `(B, T)` below `V`."""
    return np.random.default_rng(seed).integers(0, V, (B, T))


def notes_of(*rows: tuple[float, float, int, int]) -> Notes:
    """Return notes from rows of onset, offset, pitch, velocity."""
    return Notes.of(rows)


def on_grid(notes: Notes) -> Notes:
    """Return the notes on the grid of 10 ms, from 0 s, without overlaps of a pitch."""
    return decode_ids(encode_notes(notes))


def random_notes(
    seed: int,
    n: int,
    waits: tuple[int, int] = (1, 25),
    lengths: tuple[int, int] = (5, 60),
    pitches: tuple[int, int] = (40, 80),
    velocities: tuple[int, int] = (30, 100),
) -> Notes:
    """Return n random notes from these ranges; times in units of 10 ms, by default about 8 notes a second."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(*waits, n)) / 100
    duration = rng.integers(*lengths, n) / 100
    return Notes.sorted(onset, onset + duration, rng.integers(*pitches, n), rng.integers(*velocities, n))


def random_music(seed: int, tonal: bool = True, seconds: float = 40.0) -> Notes:
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
    return on_grid(Notes.sorted(onset, onset + length, pitch, velocity))


def piece(seed: int, n: int = 60, lengths: tuple[int, int] = (5, 300), milliseconds: bool = True) -> Notes:
    """Random notes without overlaps of a pitch, off the grid of 10 ms."""
    notes, rng = random_notes(seed, n, lengths=lengths), np.random.default_rng(seed)
    off = rng.integers(0, 10, (2, n)) / 1000 * milliseconds
    columns = notes.onset + off[0], notes.offset + off[1], notes.pitch, notes.velocity
    return without_overlaps(*columns).from_first_onset()


def random_piece(seed: int, n: int, seconds: float) -> Notes:
    """A piece of n notes over some seconds, with times that are on no grid."""
    rng = np.random.default_rng(seed)
    onset = np.sort(rng.uniform(0, seconds, n))
    lengths, pitches, velocities = rng.exponential(0.4, n) + 0.02, rng.integers(21, 109, n), rng.integers(1, 128, n)
    return Notes.sorted(onset - onset[0], onset - onset[0] + lengths, pitches, velocities)
