"""Names of pitches and keys, as musicians write them."""

import re

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.parsing import is_whole_number

LETTERS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
ACCIDENTALS = {"#": 1, "♯": 1, "b": -1, "♭": -1}
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "harmonic minor": (0, 2, 3, 5, 7, 8, 11),
    "melodic minor": (0, 2, 3, 5, 7, 9, 11),
    "ionian": (0, 2, 4, 5, 7, 9, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "aeolian": (0, 2, 3, 5, 7, 8, 10),
    "locrian": (0, 1, 3, 5, 6, 8, 10),
    "major pentatonic": (0, 2, 4, 7, 9),
    "minor pentatonic": (0, 3, 5, 7, 10),
    "blues": (0, 3, 5, 6, 7, 10),
    "whole tone": (0, 2, 4, 6, 8, 10),
}
NAME = r"([A-Ga-g])([#b♯♭]*)"
PITCH = rf"(?:{NAME}(-?[0-9]{{1,9}})|([0-9]{{1,9}}))"


def pitch_class(name: str) -> int:
    """The pitch class 0 to 11 of a number or of a name such as C, F# or Bb. Raises `UserError` for anything else."""
    name = name.strip()
    if is_whole_number(name) and int(name) < 12:
        return int(name)
    if match := re.fullmatch(NAME, name):
        return _letter(*match.groups()) % 12
    raise UserError(f"{name!r}: expected a pitch class, 0 to 11 or a name such as C, F# or Bb")


def pitch_classes(text: str) -> list[int]:
    """Parse `0,4,7` or `C,E,G` → [0, 4, 7]. Raises `UserError` for anything else."""
    return [pitch_class(name) for name in text.split(",")]


def pitch_classes_of_key(name: str) -> list[int]:
    """The pitch classes of `C major` or `C`, `f# minor` (natural) or `F#m`, `Bb dorian` … Raises `UserError`."""
    words = name.replace("-", " ").split()
    if len(words) == 1:
        words = [words[0].removesuffix("m"), "minor" if words[0].endswith("m") else "major"]
    tonic = re.fullmatch(NAME, words[0]) if words else None
    mode = " ".join(words[1:]).lower()
    if tonic is None or mode not in MODES:
        modes = f"{', '.join(MODES)}, such as C major or F# minor"
        raise UserError(f"{name!r}: expected a tonic from A to G and one of {modes}")
    return sorted((_letter(*tonic.groups()) + step) % 12 for step in MODES[mode])


def pitch_range(text: str) -> tuple[int, int]:
    """Parse `48-84` or `C3-C6` → MIDI pitches (48, 84); C4 is 60. Raises `UserError` for anything else."""
    match = re.fullmatch(rf"\s*{PITCH}\s*-\s*{PITCH}\s*", text)
    if match is None:
        raise UserError("expected two pitches such as 48-84 or C3-C6")
    low, high = (_pitch(*match.groups()[i : i + 4]) for i in (0, 4))
    return low, high


def _pitch(letter: str | None, accidentals: str | None, octave: str | None, number: str | None) -> int:
    return int(number) if letter is None else _letter(letter, accidentals) + 12 * (int(octave) + 1)


def _letter(letter: str, accidentals: str) -> int:
    return LETTERS[letter.lower()] + sum(ACCIDENTALS[sign] for sign in accidentals)
