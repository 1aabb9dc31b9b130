"""Public-domain melodies, entered by hand, and an expressive way to perform them: the music of the examples.

    python examples/melodies.py     # writes them as MIDI files into example-output/melodies

A voice is a text: pitches such as `F#4`, joined by `+` in a chord, `-` for a rest. A length in beats follows `:` and
holds until the next one. Bar lines are ignored.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.music.notes import Notes, without_overlaps
from dsmr_mlx.music.summary import summarize

Event = tuple[float, float, int]  # beat, length in beats, MIDI pitch
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


@dataclass(frozen=True)
class Melody:
    """A melody. tempo: beats per minute; bar, phrase, upbeat: lengths in beats; voices: the leading one first."""

    title: str
    tempo: float
    bar: float
    phrase: float
    voices: list[list[Event]]
    upbeat: float = 0.0


def pitch(name: str) -> int:
    """The MIDI pitch of a name; C4 is 60."""
    return STEPS[name[0]] + name.count("#") - name.count("b") + 12 * (int(name[-1]) + 1)


def voice(text: str) -> list[Event]:
    """Parse a voice."""
    events, beat, length = [], 0.0, 1.0
    for word in text.replace("|", " ").split():
        names, _, given = word.partition(":")
        length = float(given or length)
        events += [(beat, length, pitch(name)) for name in names.split("+") if name != "-"]
        beat += length
    return events


def voices(*texts: str) -> list[list[Event]]:
    """Parse several voices."""
    return [voice(text) for text in texts]


def broken(bars: str, ending: str) -> list[Event]:
    """The bars of Bach's prelude, five notes each, each as 1 2 3 4 5 3 4 5 twice with 1 and 2 held; then the ending."""
    events, beat = [], 0.0
    for bar in bars.split("|"):
        one, two, *others = map(pitch, bar.split())
        for _ in range(2):
            events += [(beat, 2.0, one), (beat + 0.25, 1.75, two)]
            events += [(beat + 0.5 + 0.25 * i, 0.25, key) for i, key in enumerate(others * 2)]
            beat += 2
    return events + [(beat + later, length, key) for later, length, key in voice(ending)]


def perform(melody: Melody, take: int = 0) -> Notes:
    """Perform a melody with rubato, dynamics, accents and small random deviations.

    Every take after the first also has another key and tempo.
    """
    rng = np.random.default_rng([take, *melody.title.encode()])
    key, haste = (int(rng.integers(-4, 5)), rng.uniform(0.9, 1.12)) if take else (0, 1.0)
    end = max(beat + length for events in melody.voices for beat, length, _ in events)
    grid = np.arange(0, end + 1, 1 / 16)
    place = ((grid - melody.upbeat) / melody.phrase) % 1  # position in the phrase, 0 to 1
    slower = 1 + 0.12 * (2 * place - 1) ** 2 + 0.2 * np.clip(place - 0.88, 0, 1) / 0.12
    slower += 0.6 * np.clip((grid - end + 3) / 3, 0, 1)  # at the end of the piece
    seconds = np.cumsum(slower) * 60 / (16 * melody.tempo * haste)
    rows = []
    for number, events in enumerate(melody.voices):
        middle = np.mean([note for _, _, note in events])
        for beat, length, note in events:
            at = (beat - melody.upbeat) % melody.bar
            accent = 7 if at == 0 else 3 if at % 1 == 0 else 0
            swell = 14 * np.sin(np.pi * np.interp(beat, grid, place))
            velocity = 54 - 12 * (number > 0) + accent + swell + 0.4 * (note - middle) + rng.normal(0, 2.5)
            late = 0.012 * (number > 0) + rng.normal(0, 0.006)
            onset, offset = np.interp([beat, beat + length * rng.uniform(0.9, 1.0)], grid, seconds) + late
            rows.append((onset, max(offset, onset + 0.06), note + key, np.clip(velocity, 20, 110)))
    onset, offset, pitches, velocity = np.array(rows).T
    return without_overlaps(onset, offset, pitches.astype(int), velocity.astype(int)).from_first_onset()


def write_melodies(folder: str | Path, takes: int = 1) -> Path:
    """Write `takes` performances of every melody as MIDI files. Return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, melody in MELODIES.items():
        for take in range(takes):
            write_notes(perform(melody, take), folder / f"{name}-{take + 1}.mid", text=melody.title)
    return folder


BACH = """
C4 E4 G4 C5 E5  | C4 D4 A4 D5 F5  | B3 D4 G4 D5 F5  | C4 E4 G4 C5 E5   | C4 E4 A4 E5 A5 | C4 D4 F#4 A4 D5 |
B3 D4 G4 D5 G5  | B3 C4 E4 G4 C5  | A3 C4 E4 G4 C5  | D3 A3 D4 F#4 C5  | G3 B3 D4 G4 B4 | G3 Bb3 E4 G4 C#5 |
F3 A3 D4 A4 D5  | F3 Ab3 D4 F4 B4 | E3 G3 C4 G4 C5  | E3 F3 A3 C4 F4   | D3 F3 A3 C4 F4 | G2 D3 G3 B3 F4 |
C3 E3 G3 C4 E4  | C3 G3 Bb3 C4 E4 | F2 F3 A3 C4 E4  | F#2 C3 A3 C4 Eb4 | Ab2 F3 B3 C4 D4 | G2 F3 G3 B3 D4 |
G2 E3 G3 C4 E4  | G2 D3 G3 C4 F4  | G2 D3 G3 B3 F4  | G2 Eb3 A3 C4 F#4 | G2 E3 G3 C4 G4 | G2 D3 G3 C4 F4 |
G2 D3 G3 B3 F4  | C2 C3 G3 Bb3 E4
"""
BACH_ENDING = """
C2:.25 C3 F3 A3 C4 F4 C4 A3 C4 A3 F3 A3 F3 D3 F3 D3 |
C2 B2 G3 B3 D4 F4 D4 B3 D4 B3 G3 B3 D3 F3 E3 D3 | C2+C3+E4+G4+C5:4
"""
MINUET = """
D5:1 G4:.5 A4 B4 C5 | D5:1 G4 G4 | E5 C5:.5 D5 E5 F#5 | G5:1 G4 G4 | C5 D5:.5 C5 B4 A4 | B4:1 C5:.5 B4 A4 G4 |
F#4:1 G4:.5 A4 B4 G4 | A4:3 | D5:1 G4:.5 A4 B4 C5 | D5:1 G4 G4 | E5 C5:.5 D5 E5 F#5 | G5:1 G4 G4 |
C5 D5:.5 C5 B4 A4 | B4:1 C5:.5 B4 A4 G4 | A4:1 B4:.5 A4 G4 F#4 | G4:3 |
"""
MINUET_BASS = """
G3+B3+D4:2 A3:1 | B3:3 | C4 | B3 | A3 | G3 | D4:1 B3 G3 | D4 D3:.5 C4 B3 A3 | B3:2 A3:1 | G3 B3 G3 | C4:3 |
B3:1 C4:.5 B3 A3 G3 | A3:2 F#3:1 | G3:2 B3:1 | C4 D4 D3 | G3:2 G2:1 |
"""
ODE = """
F#4:1 F#4 G4 A4 | A4 G4 F#4 E4 | D4 D4 E4 F#4 | F#4:1.5 E4:.5 E4:2 |
F#4:1 F#4 G4 A4 | A4 G4 F#4 E4 | D4 D4 E4 F#4 | E4:1.5 D4:.5 D4:2 |
E4:1 E4 F#4 D4 | E4 F#4:.5 G4 F#4:1 D4 | E4 F#4:.5 G4 F#4:1 E4 | D4 E4 A3:2 |
F#4:1 F#4 G4 A4 | A4 G4 F#4 E4 | D4 D4 E4 F#4 | E4:1.5 D4:.5 D4:2 |
"""
ODE_BASS = """
D3+A3:2 D3+A3 | D3+A3 A2+G3 | D3+F#3 D3+A3 | D3+A3 A2+G3 | D3+A3 D3+A3 | D3+A3 A2+G3 | B2+F#3 D3+A3 | A2+G3 D3+F#3 |
A2+G3 D3+F#3 | A2+G3 D3+F#3 | C#3+G3 D3+A3 | B2+F#3:1 E3+G#3 A2:2 | D3+A3 D3+A3 | D3+A3 A2+G3 | B2+F#3 D3+A3 |
A2+G3 D3+F#3 |
"""
ELISE = """
E5:.25 D#5 | E5 D#5 E5 B4 D5 C5 | A4:.5 -:.25 C4 E4 A4 | B4:.5 -:.25 E4 G#4 B4 | C5:.5 -:.25 E4 E5 D#5 |
E5 D#5 E5 B4 D5 C5 | A4:.5 -:.25 C4 E4 A4 | B4:.5 -:.25 E4 C5 B4 | A4:.5 -:.25 B4 C5 D5 |
E5:.75 G4:.25 F5 E5 | D5:.75 F4:.25 E5 D5 | C5:.75 E4:.25 D5 C5 | B4:.5 -:.25 E4 E5 D#5 |
E5 D#5 E5 B4 D5 C5 | A4:.5 -:.25 C4 E4 A4 | B4:.5 -:.25 E4 G#4 B4 | C5:.5 -:.25 E4 E5 D#5 |
E5 D#5 E5 B4 D5 C5 | A4:.5 -:.25 C4 E4 A4 | B4:.5 -:.25 E4 C5 B4 | A4:1.5 |
"""
ELISE_BASS = """
-:.5 | -:1.5 | A2:.25 E3 A3 -:.75 | E2:.25 E3 G#3 -:.75 | A2:.25 E3 A3 -:.75 | -:1.5 | A2:.25 E3 A3 -:.75 |
E2:.25 E3 G#3 -:.75 | A2:.25 E3 A3 -:.75 | C3:.25 G3 C4 -:.75 | G2:.25 G3 B3 -:.75 | A2:.25 E3 A3 -:.75 |
E2:.25 E3 -:1 | -:1.5 | A2:.25 E3 A3 -:.75 | E2:.25 E3 G#3 -:.75 | A2:.25 E3 A3 -:.75 | -:1.5 |
A2:.25 E3 A3 -:.75 | E2:.25 E3 G#3 -:.75 | A2:.25 E3 A3:1 |
"""
GYMNOPEDIE = """
-:12 | -:1 F#5 A5 | G5 F#5 C#5 | B4 C#5 D5 | A4:3 | F#4:12 | -:1 F#5 A5 | G5 F#5 C#5 | B4 C#5 D5 | A4:3 | F#4:6
"""
BASS, CHORDS = "G2:3 | D2 |", "-:1 B3+D4+F#4:2 | -:1 A3+C#4+F#4:2 |"
LULLABY = """
E4:.5 E4 | G4:1.5 E4:.5 E4:1 | G4:2 E4:.5 G4 | C5:1 B4:1.5 A4:.5 | A4:1 G4 D4:.5 E4 | F4:1 D4 D4:.5 E4 |
F4:2 D4:.5 F4 | B4 A4 G4:1 B4 | C5:2 C4:.5 C4 | C5:2 A4:.5 F4 | G4:2 E4:.5 C4 | F4:1 G4 A4 | G4:2 C4:.5 C4 |
C5:2 A4:.5 F4 | G4:2 E4:.5 C4 | F4:1 E4 D4 | C4:2
"""
SONATA = """
C5:2 E5:1 G5 | B4:1.5 C5:.25 D5 C5:1 -:1 | A5:2 G5:1 C6 | G5 F5:.75 E5:.125 F5 E5:1 -:1 |
"""
SONATA_BASS = """
C4:.5 G4 E4 G4 C4 G4 E4 G4 | D4 G4 F4 G4 C4 G4 E4 G4 | C4 A4 F4 A4 C4 G4 E4 G4 | B3 G4 D4 G4 C4 G4 E4 G4 |
"""

C_WALTZ, G_WALTZ, F_WALTZ = "C3:1 E3+G3 E3+G3 |", "G2:1 F3+B3 F3+B3 |", "F2:1 F3+A3 F3+A3 |"
LULLABY_BASS = f"""
-:1 | {C_WALTZ * 4} {G_WALTZ * 3} {C_WALTZ} {F_WALTZ} {C_WALTZ} {F_WALTZ} {C_WALTZ} {F_WALTZ} {C_WALTZ} {G_WALTZ}
C3+E3+G3:2
"""

MELODIES = {
    "bach": Melody("J. S. Bach, Prelude in C major, BWV 846", 66, 4, 16, [broken(BACH, BACH_ENDING)]),
    "petzold": Melody("C. Petzold, Minuet in G major, BWV Anh. 114", 120, 3, 24, voices(MINUET * 2, MINUET_BASS * 2)),
    "ode": Melody("L. van Beethoven, Ode to Joy", 112, 4, 16, voices(ODE, ODE_BASS)),
    "elise": Melody("L. van Beethoven, Für Elise (shortened)", 66, 1.5, 12, voices(ELISE, ELISE_BASS), upbeat=0.5),
    "satie": Melody("E. Satie, Gymnopédie No. 1 (opening)", 76, 3, 12, voices(GYMNOPEDIE, BASS * 9, CHORDS * 9)),
    "brahms": Melody("J. Brahms, Lullaby (simplified)", 80, 3, 12, voices(LULLABY, LULLABY_BASS), upbeat=1),
    "mozart": Melody("W. A. Mozart, Sonata K. 545 (opening)", 126, 4, 8, voices(SONATA * 2, SONATA_BASS * 2)),
}

if __name__ == "__main__":
    folder = write_melodies("example-output/melodies")
    for name, melody in MELODIES.items():
        print(f"{folder / name}-1.mid: {melody.title}\n    {summarize(perform(melody))}")
