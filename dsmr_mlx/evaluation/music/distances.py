"""Compare two sets of music feature by feature: pooled histograms, and distances between pieces.

*Overlap* pools all notes (or moments) of a set in one histogram and returns the mass that two histograms share. It
tests whether the sets have the same notes on the whole, not whether each piece does.

*OA* and *KL of distances* are the relative measures of Yang & Lerch 2020 ("On the evaluation of generative models in
music"): the Euclidean distances between pieces of the reference, and those between generated and reference pieces, are
each smoothed to a density; OA is the area that the two densities share, KL the divergence of the second from the first.
They test whether a generated piece is as far from the real ones as those are from each other.

The densities are Gaussian with Scott's bandwidth, σ n^(−1/5), the default of the SciPy function that the authors call.
Unlike theirs, both are computed on one grid over their whole range, no piece is compared with itself, and a uniform
distribution with weight 1/1000 keeps the divergence finite.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.evaluation.music.features import DISTRIBUTIONS, FIGURES, Features, median_and_mean

STEPS_PER_BANDWIDTH = 8  # of the grid of a density
KERNEL_REACH = 6  # bandwidths on each side of a kernel
MIN_BANDWIDTH = 1 / 200  # of the range of all samples, for samples that are all equal
UNIFORM_WEIGHT = 1e-3  # of the uniform distribution mixed in, so that an empty bin keeps a divergence finite
SETS = ("generated", "reference")
MIN_DISTANCES = 3  # for a density
DRAWS = 20  # random parts of the reference that are compared with the rest


def overlap(p: np.ndarray, q: np.ndarray) -> float:
    """Return the mass, 0 to 1, that two normalized histograms `(K,)` of the same bins share; NaN if one is empty."""
    if not p.sum() or not q.sum():
        return np.nan
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of q from p, Σ p ln(p / q) in nats, of histograms `(K,)` of the same bins.

    Each is normalized and mixed with a uniform distribution of `UNIFORM_WEIGHT`. NaN if one is empty.
    """
    if not p.sum() or not q.sum():
        return np.nan
    p, q = ((1 - UNIFORM_WEIGHT) * h / h.sum() + UNIFORM_WEIGHT / len(h) for h in (p, q))
    return float((p * np.log(p / q)).sum())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances `(n, m)` between the rows of a `(n, K)` and those of b `(m, K)`."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0.0))


def scott(samples: np.ndarray) -> float:
    """Return Scott's bandwidth of samples `(n,)`: their standard deviation times n^(−1/5)."""
    return float(samples.std(ddof=1) * len(samples) ** -0.2) if len(samples) > 1 else 0.0


def kernel_density(samples: np.ndarray, bandwidth: float, low: float, step: float, n: int) -> np.ndarray:
    """Return the Gaussian kernel density `(n,)` of samples at low, low + step, ….

    Each sample is split between the two nearest grid points before the convolution with the kernel: for steps of an
    eighth of the bandwidth the error is below 0.2 % of the largest value of the exact sum.
    """
    at = (samples - low) / step
    left = np.clip(np.floor(at).astype(np.int64), 0, n - 2)
    right = at - left
    mass = np.bincount(left, 1 - right, minlength=n) + np.bincount(left + 1, right, minlength=n)
    reach = int(np.ceil(KERNEL_REACH * bandwidth / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / bandwidth) ** 2)
    # Entry i of the full convolution is the density at grid point i − reach.
    return np.convolve(mass / len(samples), kernel / (kernel.sum() * step))[reach : reach + n]


def density_overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the area, 0 to 1, shared by the kernel densities of samples a `(n,)` and b `(m,)`, and their `divergence`.

    NaN for fewer than `MIN_DISTANCES` of either.
    """
    if min(len(a), len(b)) < MIN_DISTANCES:
        return np.nan, np.nan
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    span = high - low
    if span <= 1e-9 * max(abs(high), 1.0):
        return 1.0, 0.0
    wide = [max(scott(samples), MIN_BANDWIDTH * span) for samples in (a, b)]
    step, margin = min(wide) / STEPS_PER_BANDWIDTH, KERNEL_REACH * max(wide)
    n = int(np.ceil((span + 2 * margin) / step)) + 1
    p, q = (kernel_density(s, w, low - margin, step, n) * step for s, w in zip((a, b), wide, strict=True))
    return float(np.minimum(p, q).sum()), divergence(p, q)


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of n pieces. origins: the work that each is from, equal for excerpts of one work."""

    features: list[Features]
    origins: list[str]

    def __len__(self) -> int:
        return len(self.features)

    def masses(self, key: str) -> np.ndarray:
        """Return the histograms `(n, K)` of a distribution."""
        return np.stack([f.masses[key] for f in self.features])

    def vectors(self, key: str) -> np.ndarray:
        """Return normalized histograms `(n, K)` of a distribution or values `(n, 1)` of a figure; NaN if missing."""
        if key in FIGURES:
            return self.numbers(key)[:, None]
        masses = self.masses(key)
        total = masses.sum(axis=1, keepdims=True)
        return np.where(total > 0, masses / np.where(total > 0, total, 1.0), np.nan)

    def numbers(self, key: str) -> np.ndarray:
        """Return the values `(n,)` of a figure, or the means `(n,)` of a distribution; NaN if missing."""
        return np.array([(f.figures if key in FIGURES else f.means)[key] for f in self.features])


@dataclass(frozen=True)
class FeatureComparison:
    """A feature of a generated and of a reference set.

    generated, reference: (median, mean) over the pieces of a figure, or of the mean of a distribution. overlap, kl:
    of the pooled histograms, kl being the divergence of the generated from the reference. oa, distance_kl: of Yang &
    Lerch. real_overlap, real_oa: the same with real music in place of the generated, see `compare_sets`. NaN if a
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
        """Return JSON values, and NaN for figures that do not exist."""
        pairs = {name: dict(zip(("median", "mean"), getattr(self, name), strict=True)) for name in SETS}
        return asdict(self) | pairs


def hold_out(origins: list[str], n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of at most n random excerpts, and of all excerpts of other works; may be empty.

    The former are of as many works as possible, at most half of them: one of each, then another of each, and so on.
    """
    names, of = np.unique(origins, return_inverse=True)
    held = np.isin(of, rng.permutation(len(names))[: min(n, len(names) // 2)])
    out = rng.permutation(np.flatnonzero(held))
    turns = np.tril(of[out, None] == of[out]).sum(axis=1)  # of each excerpt among those of its work
    return out[np.argsort(turns, kind="stable")][:n], np.flatnonzero(~held)


def compare_sets(generated: FeatureSet, reference: FeatureSet, *, seed: int = 0) -> list[FeatureComparison]:
    """Compare every feature of two sets.

    The real_… figures are what an ideal model could reach: `DRAWS` times, as many pieces as are generated are drawn
    from at most half of the works of the reference and compared with its other works; the figure is the median.
    """
    rng = np.random.default_rng(seed)
    parts = [hold_out(reference.origins, len(generated), rng) for _ in range(DRAWS)]
    parts = [(out, rest) for out, rest in parts if len(out) and len(rest)]
    titles = {d.key: d.title for d in DISTRIBUTIONS} | FIGURES
    return [compare_feature(key, title, generated, reference, parts) for key, title in titles.items()]


Parts = list[tuple[np.ndarray, np.ndarray]]  # indices of pieces of the reference, held out and rest


def compare_feature(
    key: str, title: str, generated: FeatureSet, reference: FeatureSet, parts: Parts
) -> FeatureComparison:
    """Compare a feature by distances of pieces, and a distribution also by its pooled histograms."""
    new, real = generated.vectors(key), reference.vectors(key)
    new = new[~np.isnan(new).any(axis=1)]
    known = ~np.isnan(real).any(axis=1)
    between, within = distances(real[known], new), distances(real[known], real[known])
    oa, distance_kl = density_overlap(upper_triangle(within), between.ravel())
    place = np.cumsum(known) - 1  # from an index among all pieces to one among the known pieces
    halves = [(place[out[known[out]]], place[rest[known[rest]]]) for out, rest in parts]
    real_oas = [
        density_overlap(upper_triangle(within[np.ix_(r, r)]), within[np.ix_(r, o)].ravel())[0] for o, r in halves
    ]
    return FeatureComparison(
        key=key,
        title=title,
        generated=median_and_mean(generated.numbers(key)),
        reference=median_and_mean(reference.numbers(key)),
        **pooled_figures(key, generated, reference, parts),
        oa=oa,
        real_oa=median_and_mean(real_oas)[0],
        distance_kl=distance_kl,
    )


def pooled_figures(key: str, generated: FeatureSet, reference: FeatureSet, parts: Parts) -> dict[str, float]:
    """Return overlap, real_overlap and kl of the pooled histograms of a distribution; NaN for a figure."""
    if key in FIGURES:
        return dict.fromkeys(("overlap", "real_overlap", "kl"), np.nan)
    new, real = generated.masses(key).sum(axis=0), reference.masses(key)
    real_overlaps = [overlap(real[out].sum(axis=0), real[rest].sum(axis=0)) for out, rest in parts]
    pooled, real_overlap = real.sum(axis=0), median_and_mean(real_overlaps)[0]
    return {"overlap": overlap(new, pooled), "real_overlap": real_overlap, "kl": divergence(pooled, new)}


def upper_triangle(square: np.ndarray) -> np.ndarray:
    """Return the values above the diagonal: each pair once, and no element with itself."""
    return square[np.triu_indices(len(square), 1)]
