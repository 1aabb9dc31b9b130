"""Music for several instruments and drums."""

import numpy as np
from support.midi_files import midi, note, pedal, track

from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps

BASS, STRINGS = 33, 48


def band() -> bytes:
    """Return a MIDI file of a piano whose pedal holds its first note, a bass in two tracks, and drums, on one pitch."""
    piano = track(note(0, 100, 60, 80), [(50, pedal(127)), (900, pedal(0))])
    bass = track(program(BASS, 1), note(0, 400, 60, 90, 1))
    more_bass = track(program(BASS, 2), note(200, 400, 60, 91, 2))
    drums = track(note(100, 20, 60, 100, 9), note(300, 20, 42, 101, 9))
    return midi(piano, bass, more_bass, drums)


def random_band(seed: int, n: int = 60) -> Notes:
    """Return n random notes of piano, bass, strings and drums."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(0, 40, n)) / 100
    programs = rng.choice([0, BASS, STRINGS, DRUMS], n)
    programs[0] = 0
    return without_overlaps(
        onset - onset[0], onset - onset[0] + rng.integers(1, 90, n) / 100,
        rng.integers(36, 84, n), rng.integers(1, 128, n), programs,
    )  # fmt: skip


def program(number: int, channel: int) -> tuple[int, bytes]:
    """Return a program change at tick 0."""
    return 0, bytes([0xC0 | channel, number])
