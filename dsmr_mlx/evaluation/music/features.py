"""What can be counted in a piece: histograms, and figures made of them. NumPy functions of `midi.Notes`.

Most are those of Yang & Lerch 2020, "On the evaluation of generative models in music" (Neural Computing and
Applications 32), for performances: in seconds instead of beats, with chords, and with velocities and polyphony. The
bins are fixed, so that figures of different sets compare. Bins of times lie between the multiples of 10 ms that the
tokens know, and bins of velocities are the tokens' own: what a tokenizer rounds moves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.music.loops import LONGEST_CYCLE, LOOPING_COPIES, repeats
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import sounding, summarize
from dsmr_mlx.tokenizers.performance import TICKS_PER_SECOND

CHORD_SECONDS = 0.035  # onsets that follow each other faster are one chord: hands are not exact
WIDEST_INTERVAL = 24  # semitones
DENSITY_WINDOW, DENSITY_HOP, DENSEST = 2.0, 0.5, 30  # seconds, seconds, notes a second
MOST_VOICES = 24
BINS_PER_OCTAVE = 4  # of times
LONGEST_WAIT, LONGEST_NOTE = 4.0, 16.0  # seconds; what is longer is in the last bin
SIMILARITY_WINDOW, SIMILARITY_LAGS = 2.0, 30  # seconds, and how many of them apart windows are compared
NEAR, FAR = slice(0, 4), slice(14, 30)  # lags of 2 to 8 s, and of 30 to 60 s
# Krumhansl & Kessler 1982: how well each degree fits a major and a minor key
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

Weighted = tuple[np.ndarray, np.ndarray]  # values (N,), and what each weighs (N,)


def melody(notes: Notes) -> np.ndarray:
    """The skyline: the highest pitch of each chord, int64 `[M]`; a chord is what is struck within `CHORD_SECONDS` of
    the note before (Uitdenbogerd & Zobel 1999)."""
    if not len(notes):
        return np.empty(0, np.int64)
    begins = np.flatnonzero(np.append(True, np.diff(notes.onset) > CHORD_SECONDS))
    return np.maximum.reduceat(notes.pitch.astype(np.int64), begins)


def densities(notes: Notes) -> np.ndarray:
    """Notes struck per second in windows of `DENSITY_WINDOW` that lie wholly in the piece, one every `DENSITY_HOP`;
    float64 `[W]`. A shorter piece is one window."""
    if not len(notes):
        return np.empty(0)
    if notes.duration <= DENSITY_WINDOW:
        return np.array([len(notes) / max(notes.duration, 1 / TICKS_PER_SECOND)])
    start = np.arange(0.0, notes.duration - DENSITY_WINDOW + 1e-9, DENSITY_HOP)
    struck = np.searchsorted(notes.onset, np.stack([start, start + DENSITY_WINDOW]))
    return (struck[1] - struck[0]) / DENSITY_WINDOW


def self_similarity(notes: Notes) -> np.ndarray:
    """How alike the music is to itself some time later: float64 `[SIMILARITY_LAGS]`, for 2, 4, … 60 s.

    The piece is cut into windows of 2 s; a window is the histogram of the pitch classes struck in it, and two windows
    are as alike as theirs correlate: a self-similarity matrix (Foote 1999). Entry k − 1 is the mean of that matrix
    over its k-th diagonal, without windows in which no pitch class stands out; NaN where nothing is left. Random
    notes are about 0, what stays in a key is above that, and a loop comes back to 1.
    """
    result = np.full(SIMILARITY_LAGS, np.nan)
    if not len(notes):
        return result
    window = (notes.onset / SIMILARITY_WINDOW).astype(np.int64)
    n = int(window[-1]) + 1
    classes = np.bincount(window * 12 + notes.pitch % 12, minlength=12 * n).reshape(n, 12).astype(float)
    classes -= classes.mean(axis=1, keepdims=True)
    length = np.linalg.norm(classes, axis=1)
    clear = length > 1e-9
    classes[clear] /= length[clear, None]
    for lag in range(1, min(SIMILARITY_LAGS, n - 1) + 1):
        both = clear[lag:] & clear[:-lag]
        if both.any():
            result[lag - 1] = np.einsum("wp,wp->w", classes[lag:], classes[:-lag])[both].mean()
    return result


def key_clarity(notes: Notes) -> float:
    """The best correlation of the time that the pitch classes sound with the profiles of the 24 keys of Krumhansl &
    Kessler: 1 for a piece like a textbook, about 0.5 for random notes. NaN where no class stands out."""
    classes = np.bincount(notes.pitch % 12, notes.offset - notes.onset, minlength=12)
    profiles = np.array([np.roll(profile, tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])
    profiles -= profiles.mean(axis=1, keepdims=True)
    classes -= classes.mean()
    scale = np.linalg.norm(classes) * np.linalg.norm(profiles, axis=1)
    return float((profiles @ classes / scale).max()) if np.linalg.norm(classes) > 1e-12 else np.nan


def entropy(masses: np.ndarray) -> float:
    """Of a histogram, in bits; NaN if it is empty."""
    if not masses.sum():
        return np.nan
    share = masses[masses > 0] / masses.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def loop_ratio(notes: Notes, longest: int = LONGEST_CYCLE, copies: int = LOOPING_COPIES) -> float:
    """The share of the notes, 0 to 1, that are in a loop of pitches: a cycle of at most `longest` notes that comes
    `copies` times in a row or more. NaN without notes.

    Unlike `scoring.worst_loop` it hears no timing and no velocity: a loop played expressively counts, and so do
    trills, tremolos and repeated notes, of which real music has some.
    """
    if not len(notes):
        return np.nan
    edges = np.zeros(len(notes) + 1, np.int64)
    for cycle in range(1, min(longest, len(notes) - 1) + 1):
        starts, lengths = repeats(notes.pitch, cycle)
        long = lengths >= (copies - 1) * cycle
        np.add.at(edges, starts[long], 1)
        np.add.at(edges, (starts + lengths + cycle)[long], -1)
    return float((np.cumsum(edges)[:-1] > 0).mean())


def evenly(values: np.ndarray) -> Weighted:
    return values, np.ones(len(values))


def transitions(notes: Notes) -> Weighted:
    """From which pitch class the melody goes to which, as 12 · from + to (Yang & Lerch's transition matrix)."""
    classes = melody(notes) % 12
    return evenly(12 * classes[:-1] + classes[1:])


def whole_edges(low: int, high: int) -> np.ndarray:
    """A bin for each whole number."""
    return np.arange(low, high + 2) - 0.5


def time_edges(longest: float) -> np.ndarray:
    """Bins of equal ratio, `BINS_PER_OCTAVE`, from 10 ms on, between multiples of 10 ms; the first begins at 0."""
    octaves = np.log2(longest * TICKS_PER_SECOND)
    ticks = np.unique(np.rint(2 ** np.arange(0, octaves + 1e-9, 1 / BINS_PER_OCTAVE)))
    return np.append(0.0, (ticks + 0.5) / TICKS_PER_SECOND)


@dataclass(frozen=True, eq=False)
class Distribution:
    """A histogram that every piece has. values: of notes or moments, and what each weighs; edges `[K + 1]`: values
    beyond them are in the first or last bin; ordered: whether a mean means anything."""

    key: str
    title: str
    unit: str
    edges: np.ndarray
    values: Callable[[Notes], Weighted]
    ordered: bool = True

    def of(self, notes: Notes) -> tuple[np.ndarray, float]:
        """Masses `[K]` (notes, windows or seconds), and the weighted mean of the values, NaN where there is none."""
        values, weights = self.values(notes)
        total = weights.sum()
        mean = float((values * weights).sum() / total) if self.ordered and total else np.nan
        return np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges, weights=weights)[0], mean


DISTRIBUTIONS = (
    Distribution("pitch", "pitch", "MIDI number", whole_edges(0, 127), lambda n: evenly(n.pitch.astype(int))),
    Distribution("pitch_class", "pitch class", "", whole_edges(0, 11), lambda n: evenly(n.pitch % 12), ordered=False),
    Distribution(
        "interval", "melodic interval", "semitones", whole_edges(-WIDEST_INTERVAL, WIDEST_INTERVAL),
        lambda n: evenly(np.diff(melody(n))),
    ),
    Distribution("transition", "pitch-class transition", "", whole_edges(0, 143), transitions, ordered=False),
    Distribution("ioi", "inter-onset time", "s", time_edges(LONGEST_WAIT), lambda n: evenly(np.diff(n.onset))),
    Distribution("duration", "duration", "s", time_edges(LONGEST_NOTE), lambda n: evenly(n.offset - n.onset)),
    Distribution("velocity", "velocity", "", np.arange(0.5, 129, 4), lambda n: evenly(n.velocity.astype(int))),
    Distribution("polyphony", "polyphony", "notes", whole_edges(0, MOST_VOICES), sounding),
    Distribution("density", "density", "notes/s", np.arange(DENSEST + 2.0), lambda n: evenly(densities(n))),
)  # fmt: skip

BY_KEY = {distribution.key: distribution for distribution in DISTRIBUTIONS}

FIGURES = {
    "pitches": "different pitches",
    "pitch_range": "pitch range, semitones",
    "notes_per_second": "notes a second",
    "voices": "polyphony while it sounds",
    "leap": "melodic interval, absolute",
    "loudness_spread": "velocity, standard deviation",
    "pitch_class_entropy": "pitch-class entropy, bits",
    "key_clarity": "key clarity",
    "similarity_near": "self-similarity, 2 – 8 s",
    "similarity_far": "self-similarity, 30 – 60 s",
    "loop_ratio": "loop ratio",
    "longest_silence": "longest silence, s",
    "longest_note": "longest note, s",
}


@dataclass(frozen=True, eq=False)
class Features:
    """What is known of one piece.

    masses: for each of `DISTRIBUTIONS`, by key, float64 `[K]`; means: of its values, NaN where there is none;
    figures: a number for each of `FIGURES`, NaN where it has none; similarity: see `self_similarity`.
    """

    masses: dict[str, np.ndarray]
    means: dict[str, float]
    figures: dict[str, float]
    similarity: np.ndarray


def features_of(notes: Notes) -> Features:
    """All features of a piece; its first note should begin at 0 s."""
    found = {d.key: d.of(notes) for d in DISTRIBUTIONS}
    masses = {key: mass for key, (mass, _) in found.items()}
    means = {key: mean for key, (_, mean) in found.items()}
    similarity = self_similarity(notes)
    return Features(masses, means, figures_of(notes, masses, similarity), similarity)


def figures_of(notes: Notes, masses: dict[str, np.ndarray], similarity: np.ndarray) -> dict[str, float]:
    """The `FIGURES` of a piece, given the rest of its features."""
    if not len(notes):
        return dict.fromkeys(FIGURES, np.nan)
    summary = summarize(notes)
    leaps = np.abs(np.diff(melody(notes)))
    return {
        "pitches": float(len(np.unique(notes.pitch))),
        "pitch_range": float(notes.pitch.max()) - float(notes.pitch.min()),
        "notes_per_second": summary.notes_per_second,
        "voices": summary.mean_polyphony,
        "leap": float(leaps.mean()) if len(leaps) else np.nan,
        "loudness_spread": float(notes.velocity.std()),
        "pitch_class_entropy": entropy(masses["pitch_class"]),
        "key_clarity": key_clarity(notes),
        "similarity_near": mean_of(similarity[NEAR]),
        "similarity_far": mean_of(similarity[FAR]),
        "loop_ratio": loop_ratio(notes),
        "longest_silence": summary.longest_silence,
        "longest_note": float((notes.offset - notes.onset).max()),
    }


def mean_of(values: np.ndarray) -> float:
    """Without what is NaN; NaN if that is all."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
