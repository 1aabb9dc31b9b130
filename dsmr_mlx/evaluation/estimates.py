"""Means of losses over pieces, and how far they can be trusted."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean in nats a token and its standard error over independent pieces, NaN for fewer than two."""

    nats: float
    error: float


def estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """The mean over all tokens of pieces with `counts` `[P]` tokens, of which each has the sum `sums` `[P]`.

    Tokens of one piece are not independent, pieces are: the error is that of a ratio of sums over clusters (Cochran
    1977, Sampling Techniques, section 6.4). Pieces without tokens count for nothing; NaN if there are no others.
    """
    some = counts > 0
    sums, counts = sums[some].astype(np.float64), counts[some].astype(np.float64)
    n, total = len(sums), counts.sum()
    if not n:
        return Estimate(float("nan"), float("nan"))
    mean = sums.sum() / total
    if n == 1:
        return Estimate(float(mean), float("nan"))
    variance = n / (n - 1) * np.square(sums - mean * counts).sum() / total**2
    return Estimate(float(mean), float(np.sqrt(variance)))
