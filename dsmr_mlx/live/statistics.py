"""What a session took, in numbers; in constant memory, for it may go on for days."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KEPT = 10_000


class Spread(NamedTuple):
    """Of n measurements the median, the value that 95 % do not exceed, and the largest; NaN where n is 0."""

    n: int
    median: float
    p95: float
    largest: float


class Measurements:
    """n measurements of one thing, of which the last `KEPT` are kept, and the largest of all."""

    def __init__(self) -> None:
        self.n, self.largest = 0, float("nan")
        self.last: deque[float] = deque(maxlen=KEPT)

    def add(self, value: float) -> None:
        """One more."""
        self.n += 1
        self.largest = max(value, self.largest)  # in this order: NaN is not larger
        self.last.append(value)

    @property
    def spread(self) -> Spread:
        """Median and 95 % are those of the measurements that are kept."""
        if not self.n:
            return Spread(0, *[float("nan")] * 3)
        median, p95 = np.percentile(self.last, [50, 95], method="inverted_cdf")
        return Spread(self.n, float(median), float(p95), self.largest)


@dataclass
class Statistics:
    """All times in seconds.

    first_computed: from each take-over until the model had its first note ready; first_sent: until it was sent, the
    head start included; lateness: of each note that was struck, against its time; reading: computing for each token
    that was read; playing, played: computing for all tokens played, and how many they were
    dropped: notes that came too late to be struck; rewound: tokens that were taken back; behind: how often the model
    fell so far behind that it went on from then
    """

    first_computed: Measurements = field(default_factory=Measurements)
    first_sent: Measurements = field(default_factory=Measurements)
    lateness: Measurements = field(default_factory=Measurements)
    reading: Measurements = field(default_factory=Measurements)
    played: int = 0
    playing: float = 0.0
    dropped: int = 0
    rewound: int = 0
    behind: int = 0

    @property
    def tokens_per_second(self) -> float:
        """How fast tokens were played, while the model was computing."""
        return self.played / max(self.playing, 1e-9)
