"""A piece of piano music in a few words, as a listener would put them: pace, loudness, key, register, course."""

from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.evaluation.music.features import MAJOR, MINOR, key_clarity
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import pitch_name

TONICS = {
    "major": ("C", "D♭", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"),
    "minor": ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "G♯", "A", "B♭", "B"),
}
# Below each limit the word before it; they part the validation excerpts of ASAP into thirds, about.
PACES = ((7.5, "calm"), (12.5, "flowing"), (np.inf, "dense"))  # notes a second
LOUDNESSES = ((58, "soft"), (70, "medium"), (np.inf, "loud"))  # mean velocity
REGISTERS = ((60, "low"), (66, "middle"), (np.inf, "high"))  # mean MIDI pitch
CLEAR, HAZY = 0.8, 0.65  # key clarity
CHANGE = 1.25  # how much more the last third has of something than the first, for it to be said


def word(value: float, words: tuple[tuple[float, str], ...]) -> str:
    return next(name for limit, name in words if value < limit)


def key_name(notes: Notes) -> str:
    """The key whose profile (Krumhansl & Kessler 1982) the sounding time of the pitch classes fits best."""
    classes = np.bincount(notes.pitch % 12, notes.offset - notes.onset, minlength=12)
    fits = {
        f"{TONICS[mode][tonic]} {mode}": np.corrcoef(classes, np.roll(profile, tonic))[0, 1]
        for mode, profile in (("major", MAJOR), ("minor", MINOR))
        for tonic in range(12)
    }
    return max(fits, key=fits.get)


def course(notes: Notes) -> list[str]:
    """What changes between the first and the last third of the time."""
    third = notes.duration / 3
    first, last = (notes.take((notes.onset >= a) & (notes.onset < b)) for a, b in ((0, third), (2 * third, np.inf)))
    if not len(first) or not len(last):
        return []
    louder = (last.velocity.mean() + 1) / (first.velocity.mean() + 1)
    denser = len(last) / len(first)
    changes = ((denser, "denser", "sparser"), (louder, "louder", "softer"))
    return [more if ratio > 1 else less for ratio, more, less in changes if not 1 / CHANGE < ratio < CHANGE]


def described(path: Path) -> dict[str, Any]:
    """The figures that `dsmr-mlx assess` does not give, and the words."""
    notes = read_notes(path)
    clarity, changes = key_clarity(notes), course(notes)
    key = "no clear key" if clarity < HAZY else f"{key_name(notes)}{'' if clarity >= CLEAR else ', loosely'}"
    pace, velocity = len(notes) / notes.duration, float(notes.velocity.mean())
    words = [word(pace, PACES), word(velocity, LOUDNESSES), f"{word(notes.pitch.mean(), REGISTERS)} register", key]
    words += [f"grows {' and '.join(changes)}"] if changes else []
    return {
        "mean_velocity": velocity,
        "velocity_spread": float(notes.velocity.std()),
        "key_clarity": clarity,
        "range": f"{pitch_name(int(notes.pitch.min()))}–{pitch_name(int(notes.pitch.max()))}",
        "words": "; ".join(words),
    }
