"""Mean losses with their standard errors over works, and results as JSON values."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token or note, and its standard error over works, NaN for fewer than two."""

    nats: float
    error: float

    def __str__(self) -> str:
        """Format as `0.0123 ± 0.0004`, without the error for a single work."""
        return f"{self.nats:z.4f}" + (f" ± {self.error:.4f}" if math.isfinite(self.error) else "")


class Result:
    """Base class of dataclasses of results."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, and NaN for the error over fewer than two works."""
        return asdict(self)


def sums_within(losses: Sequence[np.ndarray], start: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums `(P,)` float64 and counts `(P,)` int64 of the losses [start, end) of P pieces."""
    parts = [nats[start:end] for nats in losses]
    return np.array([part.sum(dtype=np.float64) for part in parts]), np.array([len(part) for part in parts])


def estimate(sums: np.ndarray, counts: np.ndarray, works: Sequence[Hashable]) -> Estimate:
    """Return the mean over all tokens, or notes, of P pieces, of loss sums `sums` `(P,)` and counts `counts` `(P,)`.

    works: of the pieces. Works are independent; performances of a work and tokens of a piece are not. So the error is
    that of a ratio of sums over clusters (Cochran 1977, Sampling Techniques, section 6.4). Works without losses are
    ignored; those of a passage without notes count. NaN if no piece has tokens.
    """
    number = {work: i for i, work in enumerate(dict.fromkeys(works))}
    of_piece = np.array([number[work] for work in works], int)
    sums, counts = (np.bincount(of_piece, values, len(number)) for values in (sums, counts))
    some = (counts > 0) | (sums != 0)
    sums, counts = sums[some], counts[some]
    n, total = len(sums), counts.sum()
    if not total:
        return Estimate(float("nan"), float("nan"))
    mean = sums.sum() / total
    if n == 1:
        return Estimate(float(mean), float("nan"))
    variance = n / (n - 1) * np.square(sums - mean * counts).sum() / total**2
    return Estimate(float(mean), float(np.sqrt(variance)))
