"""Two sets of music, feature by feature: by what is in them, and by how far their pieces are from each other.

*Overlap* is the plain reading: all notes (or moments) of a set in one histogram, and the mass that two histograms
share. It asks whether the sets have the same notes on the whole, and not whether each piece does.

*OA* and *KL of distances* are the relative measures of Yang & Lerch 2020 ("On the evaluation of generative
models in music"): the Euclidean distances of pieces within the reference, and those between generated
and reference pieces, each smoothed to a density; how much area the two share, and the divergence of the second from
the first. They ask whether a generated piece is as far from the real ones as those are from each other.

Their densities are Gaussian with Scott's bandwidth, σ n^(−1/5), which is the default of the SciPy function that their
program calls. Unlike there both are taken on one grid over all that they cover, no piece is compared with itself, and
the divergence is kept finite by a thousandth of an even distribution.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dsmr_mlx.evaluation.music.features import DISTRIBUTIONS, FIGURES, Features

STEPS_PER_BANDWIDTH = 8  # of the grid of a density
REACH = 6  # bandwidths, over which a kernel is drawn
NARROWEST = 1 / 200  # of the range of all samples: a bandwidth for samples that are all the same
BLUR = 1e-3  # of the even distribution that is mixed in for a divergence: an empty bin is no proof, and it stays finite
SETS = ("generated", "reference")
FEWEST_DISTANCES = 3  # of which a density is made


def overlap(p: np.ndarray, q: np.ndarray) -> float:
    """The mass that two histograms of the same bins share, each normalized: 0 to 1; NaN if one is empty."""
    if not p.sum() or not q.sum():
        return np.nan
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The Kullback-Leibler divergence of q from p, Σ p ln(p / q) in nats, for histograms of the same bins, each
    normalized and mixed with `BLUR` of the even distribution; NaN if one is empty."""
    if not p.sum() or not q.sum():
        return np.nan
    p, q = ((1 - BLUR) * h / h.sum() + BLUR / len(h) for h in (p, q))
    return float((p * np.log(p / q)).sum())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, of all rows of a `[n, K]` from all rows of b `[m, K]`: `[n, m]`."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0.0))


def scott(samples: np.ndarray) -> float:
    """Scott's bandwidth for n samples in one dimension: their standard deviation times n^(−1/5)."""
    return float(samples.std(ddof=1) * len(samples) ** -0.2) if len(samples) > 1 else 0.0


def kernel_density(samples: np.ndarray, bandwidth: float, low: float, step: float, n: int) -> np.ndarray:
    """The Gaussian kernel density of samples at low, low + step, … `[n]`.

    Each sample is divided between the two nearest points of the grid before the kernel is drawn around them: for
    steps of an eighth of the bandwidth within 0.2 % of the largest value of the exact sum.
    """
    at = (samples - low) / step
    left = np.clip(np.floor(at).astype(np.int64), 0, n - 2)
    right = at - left
    mass = np.bincount(left, 1 - right, minlength=n) + np.bincount(left + 1, right, minlength=n)
    reach = int(np.ceil(REACH * bandwidth / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / bandwidth) ** 2)
    return np.convolve(mass / len(samples), kernel / (kernel.sum() * step))[reach : reach + n]


def density_overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of the kernel densities of samples a `[n]` and b `[m]`: the area that they share, 0 to 1, and the divergence
    of b from a, see `divergence`. NaN for fewer than `FEWEST_DISTANCES` of either."""
    if min(len(a), len(b)) < FEWEST_DISTANCES:
        return np.nan, np.nan
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    span = high - low
    if span <= 1e-9 * max(abs(high), 1.0):
        return 1.0, 0.0
    wide = [max(scott(samples), NARROWEST * span) for samples in (a, b)]
    step, margin = min(wide) / STEPS_PER_BANDWIDTH, REACH * max(wide)
    n = int(np.ceil((span + 2 * margin) / step)) + 1
    p, q = (kernel_density(s, w, low - margin, step, n) * step for s, w in zip((a, b), wide, strict=True))
    return float(np.minimum(p, q).sum()), divergence(p, q)


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of several pieces. origins: what each comes from, equal for excerpts of one work."""

    features: list[Features]
    origins: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def masses(self, key: str) -> np.ndarray:
        """`[n, K]`, a row for each piece."""
        return np.stack([f.masses[key] for f in self.features])

    def vectors(self, key: str) -> np.ndarray:
        """`[n, K]` or `[n, 1]`: of each piece its normalized histogram or its figure, NaN where there is none."""
        if key in FIGURES:
            return self.numbers(key)[:, None]
        masses = self.masses(key)
        total = masses.sum(axis=1, keepdims=True)
        return np.where(total > 0, masses / np.where(total > 0, total, 1.0), np.nan)

    def numbers(self, key: str) -> np.ndarray:
        """A number for each piece, `[n]`: its figure, or the mean of its distribution; NaN where it has none."""
        return np.array([(f.figures if key in FIGURES else f.means)[key] for f in self.features])


@dataclass(frozen=True)
class Compared:
    """A feature of a generated and of a reference set.

    generated, reference: (median, mean) over the pieces of a figure, or of the mean of a distribution. overlap, kl:
    of the pooled histograms, kl being the divergence of the generated from the reference. oa, distance_kl: of Yang &
    Lerch. real_overlap, real_oa: the same for real music in the place of the generated, see `compare`. NaN where a
    figure does not exist.
    """

    key: str
    title: str
    generated: tuple[float, float]
    reference: tuple[float, float]
    overlap: float
    real_overlap: float
    kl: float
    oa: float
    real_oa: float
    distance_kl: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values but for NaN."""
        pairs = {name: dict(zip(("median", "mean"), getattr(self, name), strict=True)) for name in SETS}
        return asdict(self) | pairs


def held_out(origins: list[str], n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of at most n excerpts, and of those that have no origin in common with them; both may be empty."""
    order = {origin: i for i, origin in enumerate(rng.permutation(sorted(set(origins))))}
    ranks = np.array([order[origin] for origin in origins])
    chosen = np.argsort(ranks, kind="stable")[: min(n, len(origins) // 2)]
    return chosen, np.flatnonzero(~np.isin(ranks, ranks[chosen]))


def compare(generated: FeatureSet, reference: FeatureSet, *, draws: int = 20, seed: int = 0) -> list[Compared]:
    """Every feature of two sets.

    The real_… figures show what could be expected of the best of models: `draws` times as many pieces as are
    generated (at most half) are drawn from the reference and compared with its other works; the median of that.
    """
    rng = np.random.default_rng(seed)
    parts = [held_out(reference.origins, len(generated), rng) for _ in range(draws)]
    parts = [(out, rest) for out, rest in parts if len(out) and len(rest)]
    distributions = [compare_distribution(d.key, d.title, generated, reference, parts) for d in DISTRIBUTIONS]
    return distributions + [compare_feature(key, title, generated, reference, parts) for key, title in FIGURES.items()]


Parts = list[tuple[np.ndarray, np.ndarray]]


def compare_distribution(key: str, title: str, generated: FeatureSet, reference: FeatureSet, parts: Parts) -> Compared:
    new, real = generated.masses(key), reference.masses(key)
    pooled = new.sum(axis=0), real.sum(axis=0)
    return compare_feature(
        key,
        title,
        generated,
        reference,
        parts,
        overlap=overlap(*pooled),
        real_overlap=median([overlap(real[out].sum(axis=0), real[rest].sum(axis=0)) for out, rest in parts]),
        kl=divergence(pooled[1], pooled[0]),
    )


def compare_feature(
    key: str,
    title: str,
    generated: FeatureSet,
    reference: FeatureSet,
    parts: Parts,
    *,
    overlap: float = np.nan,
    real_overlap: float = np.nan,
    kl: float = np.nan,
) -> Compared:
    """The distances of a feature, beside what is known of its histograms."""
    new, real = generated.vectors(key), reference.vectors(key)
    new = new[~np.isnan(new).any(axis=1)]
    known = ~np.isnan(real).any(axis=1)
    between, within = distances(real[known], new), distances(real[known], real[known])
    oa, distance_kl = density_overlap(upper(within), between.ravel())
    place = np.cumsum(known) - 1  # of a piece among the known
    halves = [(place[out[known[out]]], place[rest[known[rest]]]) for out, rest in parts]
    return Compared(
        key=key,
        title=title,
        generated=centre(generated.numbers(key)),
        reference=centre(reference.numbers(key)),
        overlap=overlap,
        real_overlap=real_overlap,
        kl=kl,
        oa=oa,
        real_oa=median(
            [density_overlap(upper(within[np.ix_(r, r)]), within[np.ix_(r, o)].ravel())[0] for o, r in halves]
        ),
        distance_kl=distance_kl,
    )


def upper(square: np.ndarray) -> np.ndarray:
    """What is above the diagonal: each pair once, and nothing with itself."""
    return square[np.triu_indices(len(square), 1)]


def centre(values: np.ndarray) -> tuple[float, float]:
    """Median and mean of what is known."""
    known = values[~np.isnan(values)]
    return (float(np.median(known)), float(known.mean())) if len(known) else (np.nan, np.nan)


def median(values: list[float]) -> float:
    return centre(np.array(values))[0]
