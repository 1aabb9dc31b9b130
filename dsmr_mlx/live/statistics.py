"""Measurements of a session, in constant memory."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MAX_VALUES = 10_000  # kept of each quantity


class Spread(NamedTuple):
    """Median, 95th percentile and largest of n values; NaN if n is 0."""

    n: int
    median: float
    p95: float
    largest: float


class Measurements:
    """n values of one quantity: the last `MAX_VALUES` of them and the largest of all."""

    def __init__(self) -> None:
        self.n, self.largest = 0, float("nan")
        self.last: deque[float] = deque(maxlen=MAX_VALUES)

    def add(self, value: float) -> None:
        """Add a value."""
        self.n += 1
        self.largest = max(value, self.largest)  # in this order: a comparison with NaN is false
        self.last.append(value)

    @property
    def spread(self) -> Spread:
        """The spread, with median and percentile over the values kept."""
        if not self.n:
            return Spread(0, *[float("nan")] * 3)
        median, p95 = np.percentile(self.last, [50, 95], method="inverted_cdf")
        return Spread(self.n, float(median), float(p95), self.largest)


@dataclass
class Statistics:
    """Times in seconds, and counts.

    first_computed: from each take-over until the first note was computed; first_sent: until it was sent, the head start
    included; lateness: of each note sent; reading: computing time of each token read; playing: computing time of all
    tokens played; played: their number
    unread: notes of the human that the model did not read, because too many waited
    dropped: notes too late to be sent; rewound: tokens taken back; behind: how often the model fell so far behind that
    it skipped to the present
    """

    first_computed: Measurements = field(default_factory=Measurements)
    first_sent: Measurements = field(default_factory=Measurements)
    lateness: Measurements = field(default_factory=Measurements)
    reading: Measurements = field(default_factory=Measurements)
    played: int = 0
    playing: float = 0.0
    unread: int = 0
    dropped: int = 0
    rewound: int = 0
    behind: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens played per second of computing."""
        return self.played / max(self.playing, 1e-9)
