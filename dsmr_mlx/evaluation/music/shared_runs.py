"""What music has in common with the pieces that a model was trained on: the longest run of events, and where it is.

Three readings of the same music:

    events       events with their timing and loudness, as they stand
    transposed   the same, all keys higher or lower by one interval
    notes        the keys struck, one after the other, in any transposition, whatever their timing and loudness

Runs are found by the hashes of all windows of one length (Karp & Rabin 1987), looked up in a search for the longest
length that still has a match. Equal windows have equal hashes, so no run is missed; and what is found is compared
event by event, so none is made up. Hashes are modulo a prime: modulo 2^64 there is music, that of the Thue-Morse
sequence, whose windows have equal hashes under every key, so that the search would never end. Scales, trills and
repeated notes are everybody's: a run means something beside that of music which the model has not heard.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.performance import NOTE_OFF, NOTE_ON, TIME_SHIFT, VOCAB_SIZE

READINGS = {"events": "events", "transposed": "events, transposed", "notes": "notes alone, transposed"}
FIRST_LENGTH = 8  # the length that is tried first: most music shares shorter runs with other music
NO_PITCH = -1
PRIME_BITS = 61
PRIME = np.uint64(2**PRIME_BITS - 1)
HALF, LOW = np.uint64(31), np.uint64(2**31 - 1)  # where numbers below the prime are halved, and their lower half
BLOCK = 1 << 20  # windows that are hashed together, for what is computed on the way takes several times their memory
BUCKET_BITS = 22  # of the table that tells most windows apart before they are looked up


class Strings(NamedTuple):
    """Several strings of symbols, end to end.

    symbols `[N]` int16: what has to be equal; pitch `[N]` int16: what has to be higher by the same interval everywhere,
    `NO_PITCH` where a symbol has none; place `[N]` int32: the index of a symbol in its own music; starts `[n + 1]`.
    """

    symbols: np.ndarray
    pitch: np.ndarray
    place: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def owner(self, index: np.ndarray) -> np.ndarray:
        """The numbers of the strings that these symbols are in."""
        return np.searchsorted(self.starts, index, side="right") - 1


def strings_of(reading: str, pieces: Iterable[np.ndarray]) -> Strings:
    """Pieces of canonical performance events `[T]`, without specials, as one of `READINGS`."""
    symbol, pitch = np.arange(VOCAB_SIZE, dtype=np.int16), np.full(VOCAB_SIZE, NO_PITCH, np.int16)
    if reading != "events":
        keys = np.arange(NOTE_ON, TIME_SHIFT)
        symbol[keys], pitch[keys] = np.where(keys < NOTE_OFF, NOTE_ON, NOTE_OFF), (keys - NOTE_ON) % PITCHES
    parts, places, starts = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [0]
    for ids in pieces:
        place = np.arange(len(ids), dtype=np.int32)
        if reading == "notes":
            place = place[(ids >= NOTE_ON) & (ids < NOTE_OFF)]
        parts.append(ids[place])
        places.append(place)
        starts.append(starts[-1] + len(place))
    ids = np.concatenate(parts).astype(np.int64)
    return Strings(symbol[ids], pitch[ids], np.concatenate(places), np.array(starts))


class Key(NamedTuple):
    """What windows are hashed with: a value for each symbol `[V]`, one for a semitone, and a base; uint64 below
    `PRIME`."""

    values: np.ndarray
    semitone: np.uint64
    base: np.uint64

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Key":
        numbers = rng.integers(1, PRIME, VOCAB_SIZE + 2, np.uint64)
        return cls(numbers[:-2], numbers[-2], numbers[-1])


class Windows:
    """The hashes of all windows of some strings.

    A window of L symbols from i on has Σ base^k · (value of its symbol k + semitone · pitch of its symbol k), modulo
    `PRIME`, with pitches counted from its first one: from prefix sums, at no cost that depends on L.
    """

    def __init__(self, strings: Strings, key: Key):
        n = len(strings.symbols)
        has_pitch = strings.pitch != NO_PITCH
        self.intervals = _times(key.semitone, np.arange(PITCHES, dtype=np.uint64))
        # By symbol and pitch, of which there are few: the last row is for symbols without one.
        values = (key.values + np.append(self.intervals, np.uint64(0))[:, None]) % PRIME
        powers = _powers(key.base, n)
        self.sums = _sums(powers, values[strings.pitch, strings.symbols])
        self.pitched = _sums(powers, has_pitch.astype(np.uint64)) if has_pitch.any() else None
        self.unshift = _powers(np.uint64(pow(int(key.base), -1, int(PRIME))), n)
        self.first_pitch = _next_pitch(strings.pitch) if has_pitch.any() else None
        lengths = np.diff(strings.starts)
        self.room = np.repeat(strings.starts[1:], lengths) - np.arange(n)  # how many symbols are left in its string

    def starts(self, length: int, among: np.ndarray | None = None) -> np.ndarray:
        """Where windows of so many symbols begin, among some positions or all."""
        if among is None:
            return np.flatnonzero(self.room >= length)
        return among[self.room[among] >= length]

    def hashes(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint64 `[len(starts)]`, below `PRIME`."""
        found = np.empty(len(starts), np.uint64)
        for i in range(0, len(starts), BLOCK):
            found[i : i + BLOCK] = self._hashes(starts[i : i + BLOCK], length)
        return found

    def _hashes(self, starts: np.ndarray, length: int) -> np.ndarray:
        found = _minus(self.sums[starts + length], self.sums[starts])
        if self.pitched is not None:
            pitched = _minus(self.pitched[starts + length], self.pitched[starts])
            found = _minus(found, _times(self.intervals[self.first_pitch[starts]], pitched))
        return _times(found, self.unshift[starts])


def _times(a: np.ndarray | np.uint64, b: np.ndarray | np.uint64) -> np.ndarray:
    """a · b modulo `PRIME`, of numbers below it: from products of their halves, which 64 bits hold."""
    a_low, a_high, b_low, b_high = a & LOW, a >> HALF, b & LOW, b >> HALF
    middle = a_low * b_high + a_high * b_low
    carried, kept = middle >> np.uint64(30), (middle & np.uint64(2**30 - 1)) << HALF  # for 2^61 is 1
    return (a_low * b_low + kept + carried + np.uint64(2) * a_high * b_high) % PRIME


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a − b modulo `PRIME`, of numbers below it."""
    return (a + (PRIME - b)) % PRIME


def _powers(base: np.uint64, n: int) -> np.ndarray:
    """base^0 … base^(n − 1), modulo `PRIME`."""
    powers = np.ones(n, np.uint64)
    factor, known = base, 1
    while known < n:
        for i in range(known, min(2 * known, n), BLOCK):
            j = min(i + BLOCK, 2 * known, n)
            powers[i:j] = _times(powers[i - known : j - known], factor)
        factor, known = _times(factor, factor), 2 * known
    return powers


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[n + 1]`: the sums of the first 0 … n products a · b, modulo `PRIME`."""
    sums = np.zeros(len(a) + 1, np.uint64)
    for i in range(0, len(a), BLOCK):
        products = _times(a[i : i + BLOCK], b[i : i + BLOCK])
        high, low = (np.cumsum(half) % PRIME for half in (products >> HALF, products & LOW))
        sums[i + 1 : i + 1 + len(products)] = (sums[i] + _times(high, LOW + np.uint64(1)) + low) % PRIME
    return sums


def _next_pitch(pitch: np.ndarray) -> np.ndarray:
    """At each position the first pitch from there on; 0 behind the last."""
    places = np.flatnonzero(pitch != NO_PITCH)
    after = np.searchsorted(places, np.arange(len(pitch)))
    return np.append(pitch[places], np.int16(0))[after]


class Run(NamedTuple):
    """A run of `length` symbols in two sets of strings; it begins at `at` in the first and `there` in the second."""

    length: int
    at: int
    there: int


def longest_runs(mine: Strings, theirs: Strings, seed: int = 0) -> list[Run]:
    """For each string of `mine` the longest run that is in a string of `theirs`, too; exact.

    Of several the first of theirs, and of its places in mine the first; (0, start, 0) where not one symbol is shared.
    """
    rng = np.random.default_rng(seed)
    while True:
        runs = _hashed_runs(mine, theirs, Key.draw(rng))
        if all(_equal(mine, theirs, run) for run in runs):
            return runs


def _hashed_runs(mine: Strings, theirs: Strings, key: Key) -> list[Run]:
    """The longest runs whose hashes are equal, by doubling and then halving the length, all strings at once."""
    own, other = Windows(mine, key), Windows(theirs, key)
    runs = [Run(0, int(start), 0) for start in mine.starts[:-1]]
    shortest_absent = np.diff(mine.starts) + 1
    possible = {0: None}  # by length, where theirs has a window that is in one of mine; all of them for length 0
    while open_ := [i for i, run in enumerate(runs) if shortest_absent[i] - run.length > 1]:
        length = min(_next_length(runs[i].length, int(shortest_absent[i])) for i in open_)
        nearest = max(known for known in possible if known <= length)
        found, possible[length] = _matches(own, other, length, possible[nearest])
        strings, first = np.unique(mine.owner(found[:, 0]), return_index=True)
        places = dict(zip(strings.tolist(), found[first].tolist(), strict=True))
        for i, run in enumerate(runs):
            if i not in places:
                shortest_absent[i] = min(shortest_absent[i], length)
            elif length > run.length:
                runs[i] = Run(length, *places[i])
    return runs


def _next_length(present: int, absent: int) -> int:
    """Between a length that is there and one that is not."""
    doubled = max(2 * present, FIRST_LENGTH)
    return doubled if doubled < absent else (present + absent) // 2


def _matches(own: Windows, other: Windows, length: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The windows of `own` `[m]` that are in `other` too, each with the first place there, `[m, 2]`, ordered by that
    and by the first; and where `other` has them `[n]`.
    """
    mine, theirs = own.starts(length), other.starts(length, among)
    hashes, wanted = own.hashes(mine, length), other.hashes(theirs, length)
    table = np.zeros(1 << BUCKET_BITS, bool)
    table[hashes >> np.uint64(PRIME_BITS - BUCKET_BITS)] = True
    likely = table[wanted >> np.uint64(PRIME_BITS - BUCKET_BITS)]
    theirs, wanted = theirs[likely], wanted[likely]
    shared = np.isin(wanted, hashes)
    theirs, wanted = theirs[shared], wanted[shared]
    different, first = np.unique(wanted, return_index=True)
    place = np.minimum(np.searchsorted(different, hashes), max(len(different) - 1, 0))
    present = different[place] == hashes if len(different) else np.zeros(len(hashes), bool)
    found = np.stack([mine[present], theirs[first[place[present]]]], axis=1)
    return found[np.lexsort((found[:, 0], found[:, 1]))], theirs


def _equal(mine: Strings, theirs: Strings, run: Run) -> bool:
    """Whether a run is what it is said to be."""
    here, there = slice(run.at, run.at + run.length), slice(run.there, run.there + run.length)
    known = mine.pitch[here] != NO_PITCH
    apart = mine.pitch[here][known] - theirs.pitch[there][known]
    return bool((mine.symbols[here] == theirs.symbols[there]).all() and (apart == apart[:1]).all())
