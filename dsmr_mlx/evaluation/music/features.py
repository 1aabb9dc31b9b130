"""Features of a piece: histograms and figures, as NumPy functions of `Notes`.

Most are those of Yang & Lerch 2020, "On the evaluation of generative models in music" (Neural Computing and
Applications 32), adapted to performances: seconds instead of beats, with chords, velocities and polyphony. The bins are
fixed, so that different sets can be compared. Edges of time bins lie between the multiples of 10 ms of the performance
events, and velocity bins are those of the events, so that rounding by the tokenizer changes no histogram.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.music.loops import LOOPING_COPIES, MAX_CYCLE, repeats
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import sounding, summarize
from dsmr_mlx.tokenizers.performance import TICKS_PER_SECOND

CHORD_SECONDS = 0.035  # between successive onsets of one chord, at most
MAX_INTERVAL = 24  # semitones
DENSITY_WINDOW, DENSITY_HOP, MAX_DENSITY = 2.0, 0.5, 30  # seconds, seconds, notes per second
MAX_POLYPHONY = 24
BINS_PER_OCTAVE = 4  # of times
MAX_IOI, MAX_DURATION = 4.0, 16.0  # seconds; longer ones are in the last bin
SIMILARITY_WINDOW, SIMILARITY_LAGS = 2.0, 30  # seconds, and the largest lag in windows
NEAR, FAR = slice(0, 4), slice(14, 30)  # lags of 2 to 8 s, and of 30 to 60 s
# Key profiles of Krumhansl & Kessler 1982: how well each degree fits a major and a minor key
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

Weighted = tuple[np.ndarray, np.ndarray]  # values (N,) and weights (N,)


def melody(notes: Notes) -> np.ndarray:
    """Return the skyline, the highest pitch of each chord, int64 `(M,)` (Uitdenbogerd & Zobel 1999).

    An onset within `CHORD_SECONDS` of the onset before belongs to the same chord.
    """
    if not len(notes):
        return np.empty(0, np.int64)
    begins = np.flatnonzero(np.append(True, np.diff(notes.onset) > CHORD_SECONDS))
    return np.maximum.reduceat(notes.pitch.astype(np.int64), begins)


def densities(notes: Notes) -> np.ndarray:
    """Return the onsets per second, float64 `(W,)`, in windows of `DENSITY_WINDOW` in the piece, every `DENSITY_HOP`.

    A piece shorter than a window is one window.
    """
    if not len(notes):
        return np.empty(0)
    if notes.duration <= DENSITY_WINDOW:
        return np.array([len(notes) / max(notes.duration, 1 / TICKS_PER_SECOND)])
    start = np.arange(0.0, notes.duration - DENSITY_WINDOW + 1e-9, DENSITY_HOP)
    first, end = np.searchsorted(notes.onset, np.stack([start, start + DENSITY_WINDOW]))
    return (end - first) / DENSITY_WINDOW


def self_similarity(notes: Notes) -> np.ndarray:
    """Return the similarity of the music to itself 2, 4, … 60 s later: float64 `(SIMILARITY_LAGS,)`.

    Each window of 2 s has a histogram of the pitch classes of its onsets; the correlations of these are a
    self-similarity matrix (Foote 1999). Entry k − 1 is the mean of its k-th diagonal, without windows whose histogram
    is flat; NaN if none remain. Random notes give about 0, music in one key more, a loop 1 at its period.
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
    """Return the best correlation of the durations of the pitch classes with the profiles of the 24 keys.

    1 for a perfect match with a profile, about 0.5 for random notes; NaN if all durations are equal.
    """
    classes = np.bincount(notes.pitch % 12, notes.offset - notes.onset, minlength=12)
    profiles = np.array([np.roll(profile, tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])
    profiles -= profiles.mean(axis=1, keepdims=True)
    classes -= classes.mean()
    scale = np.linalg.norm(classes) * np.linalg.norm(profiles, axis=1)
    return float((profiles @ classes / scale).max()) if np.linalg.norm(classes) > 1e-12 else np.nan


def entropy(masses: np.ndarray) -> float:
    """Return the entropy of a histogram `(K,)` in bits; NaN if it is empty."""
    if not masses.sum():
        return np.nan
    share = masses[masses > 0] / masses.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def loop_ratio(notes: Notes, max_cycle: int = MAX_CYCLE, copies: int = LOOPING_COPIES) -> float:
    """Return the share of the notes, 0 to 1, in a cycle of at most `max_cycle` pitches repeated `copies` times or more.

    NaN without notes. Unlike `loops.worst_loop` it ignores timing and velocity: a loop with expression counts, and so
    do trills, tremolos and repeated notes, which real music has too.
    """
    if not len(notes):
        return np.nan
    edges = np.zeros(len(notes) + 1, np.int64)  # +1 where a loop begins, −1 where it ends
    for cycle in range(1, min(max_cycle, len(notes) - 1) + 1):
        starts, lengths = repeats(notes.pitch, cycle)
        long = lengths >= (copies - 1) * cycle
        np.add.at(edges, starts[long], 1)
        np.add.at(edges, (starts + lengths + cycle)[long], -1)
    return float((np.cumsum(edges)[:-1] > 0).mean())


def unweighted(values: np.ndarray) -> Weighted:
    """Give each value the weight 1."""
    return values, np.ones(len(values))


def transitions(notes: Notes) -> Weighted:
    """Return the transitions of the melody between pitch classes, as 12 · from + to (Yang & Lerch)."""
    classes = melody(notes) % 12
    return unweighted(12 * classes[:-1] + classes[1:])


def whole_edges(low: int, high: int) -> np.ndarray:
    """Return edges with a bin for each whole number from `low` to `high`."""
    return np.arange(low, high + 2) - 0.5


def time_edges(max_seconds: float) -> np.ndarray:
    """Return edges between multiples of 10 ms, `BINS_PER_OCTAVE` from 10 ms to `max_seconds`; the first is 0."""
    octaves = np.log2(max_seconds * TICKS_PER_SECOND)
    ticks = np.unique(np.rint(2 ** np.arange(0, octaves + 1e-9, 1 / BINS_PER_OCTAVE)))
    return np.append(0.0, (ticks + 0.5) / TICKS_PER_SECOND)


@dataclass(frozen=True, eq=False)
class Distribution:
    """A histogram of a piece.

    values: function that returns the values of notes or moments and their weights; edges: `(K + 1,)`, values beyond
    them are in the first or last bin; ordered: whether the values have a mean.
    """

    key: str
    title: str
    unit: str
    edges: np.ndarray
    values: Callable[[Notes], Weighted]
    ordered: bool = True

    def histogram(self, notes: Notes) -> tuple[np.ndarray, float]:
        """Return the masses `(K,)` in notes, windows or seconds, and the weighted mean of the values, NaN if none."""
        values, weights = self.values(notes)
        total = weights.sum()
        mean = float((values * weights).sum() / total) if self.ordered and total else np.nan
        return np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges, weights=weights)[0], mean


DISTRIBUTIONS = (
    Distribution("pitch", "pitch", "MIDI number", whole_edges(0, 127), lambda n: unweighted(n.pitch.astype(int))),
    Distribution(
        "pitch_class", "pitch class", "", whole_edges(0, 11), lambda n: unweighted(n.pitch % 12), ordered=False
    ),
    Distribution(
        "interval", "melodic interval", "semitones", whole_edges(-MAX_INTERVAL, MAX_INTERVAL),
        lambda n: unweighted(np.diff(melody(n))),
    ),
    Distribution("transition", "pitch-class transition", "", whole_edges(0, 143), transitions, ordered=False),
    Distribution("ioi", "inter-onset time", "s", time_edges(MAX_IOI), lambda n: unweighted(np.diff(n.onset))),
    Distribution("duration", "duration", "s", time_edges(MAX_DURATION), lambda n: unweighted(n.offset - n.onset)),
    Distribution("velocity", "velocity", "", np.arange(0.5, 129, 4), lambda n: unweighted(n.velocity.astype(int))),
    Distribution("polyphony", "polyphony", "notes", whole_edges(0, MAX_POLYPHONY), sounding),
    Distribution("density", "density", "notes/s", np.arange(MAX_DENSITY + 2.0), lambda n: unweighted(densities(n))),
)  # fmt: skip

BY_KEY = {distribution.key: distribution for distribution in DISTRIBUTIONS}

FIGURES = {
    "pitches": "different pitches",
    "pitch_range": "pitch range, semitones",
    "notes_per_second": "notes per second",
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
    """The features of one piece.

    masses: the histogram `(K,)` float64 of each of `DISTRIBUTIONS`, by key; means: of the values of each, NaN if none;
    figures: a number for each of `FIGURES`, NaN if undefined; similarity: see `self_similarity`.
    """

    masses: dict[str, np.ndarray]
    means: dict[str, float]
    figures: dict[str, float]
    similarity: np.ndarray


def features_of(notes: Notes) -> Features:
    """Return all features of a piece whose first onset is at 0 s."""
    found = {d.key: d.histogram(notes) for d in DISTRIBUTIONS}
    masses = {key: mass for key, (mass, _) in found.items()}
    means = {key: mean for key, (_, mean) in found.items()}
    similarity = self_similarity(notes)
    return Features(masses, means, figures_of(notes, masses, similarity), similarity)


def figures_of(notes: Notes, masses: dict[str, np.ndarray], similarity: np.ndarray) -> dict[str, float]:
    """Return the `FIGURES` of a piece, given its other features."""
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
        "similarity_near": median_and_mean(similarity[NEAR])[1],
        "similarity_far": median_and_mean(similarity[FAR])[1],
        "loop_ratio": loop_ratio(notes),
        "longest_silence": summary.longest_silence,
        "longest_note": float((notes.offset - notes.onset).max()),
    }


def median_and_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and mean of the values that are not NaN; NaN if there are none."""
    known = np.array(values)[~np.isnan(values)]
    return (float(np.median(known)), float(known.mean())) if len(known) else (np.nan, np.nan)
