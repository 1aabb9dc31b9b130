"""Mean losses over pieces with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token or note, and its standard error over independent pieces, NaN for fewer than two."""

    nats: float
    error: float

    def __str__(self) -> str:
        """Format as `0.0123 ± 0.0004`, without the error for a single piece."""
        return f"{self.nats:z.4f}" + (f" ± {self.error:.4f}" if math.isfinite(self.error) else "")


def sums_within(losses: Sequence[np.ndarray], start: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums `(P,)` float64 and counts `(P,)` int64 of the losses [start, end) of P pieces."""
    parts = [nats[start:end] for nats in losses]
    return np.array([part.sum(dtype=np.float64) for part in parts]), np.array([len(part) for part in parts])


def estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the mean over all tokens, or notes, of P pieces, of loss sums `sums` `(P,)` and counts `counts` `(P,)`.

    Pieces are independent, tokens of one piece are not: the error is that of a ratio of sums over clusters (Cochran
    1977, Sampling Techniques, section 6.4). Pieces without tokens are ignored; NaN if no piece has tokens.
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
