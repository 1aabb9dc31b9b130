"""What a session took, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Of n measurements the median, the value that 95 % do not exceed, and the largest; NaN where n is 0."""

    n: int
    median: float
    p95: float
    largest: float


@dataclass
class Statistics:
    """All times in seconds.

    first_computed: from each take-over until the model had its first note ready; first_sent: until it was sent, the
    head start included; lateness: of each note that was struck, against its time; reading: computing for each token
    that was read; playing, played: computing for all tokens played, and how many they were
    dropped: notes that came too late to be struck; rewound: tokens that were taken back; behind: how often the model
    fell so far behind that it went on from then
    """

    first_computed: list[float] = field(default_factory=list)
    first_sent: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    played: int = 0
    playing: float = 0.0
    dropped: int = 0
    rewound: int = 0
    behind: int = 0

    @property
    def tokens_per_second(self) -> float:
        """How fast tokens were played, while the model was computing."""
        return self.played / max(self.playing, 1e-9)


def spread(values: Sequence[float]) -> Spread:
    """See `Spread`."""
    if not len(values):
        return Spread(0, *[float("nan")] * 3)
    median, p95, largest = np.percentile(values, [50, 95, 100], method="inverted_cdf")
    return Spread(len(values), float(median), float(p95), float(largest))
