"""Find the longest run of events that music shares with other music, and where it is.

Three readings of the same music:

    events       events with their timing and velocity
    transposed   the same, up to transposition by one interval
    notes        the sequence of pressed keys up to transposition, without timing and velocity

Runs are found by hashing all windows of one length (Karp & Rabin 1987), in a search for the longest length that still
has a match. Equal windows have equal hashes, so no run is missed; matches are compared event by event, so none is
false. Hashes are modulo a prime: modulo 2^64, windows of the Thue-Morse sequence have equal hashes under every key, and
the search would not end.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.performance import NOTE_OFF, NOTE_ON, TIME_SHIFT, VOCAB_SIZE

READINGS = {"events": "events", "transposed": "events, transposed", "notes": "notes alone, transposed"}
FIRST_LENGTH = 8  # tried first: most music shares shorter runs with other music
NO_PITCH = -1
PRIME_BITS = 61
PRIME = np.uint64(2**PRIME_BITS - 1)
HALF, LOW = np.uint64(31), np.uint64(2**31 - 1)  # bits of the lower half of a number below the prime, and their mask
BLOCK = 1 << 20  # windows hashed at a time: temporaries take several times their memory
BUCKET_BITS = 22  # of the table that rejects most windows before the lookup


class Strings(NamedTuple):
    """n strings of symbols, concatenated.

    symbols `(N,)` int16: equal in a match; pitch `(N,)` int16: differs by one constant interval in a match, `NO_PITCH`
    if a symbol has none; place `(N,)` int32: index of a symbol in the ids of its piece; starts `(n + 1,)`: of the
    strings.
    """

    symbols: np.ndarray
    pitch: np.ndarray
    place: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def owner(self, index: np.ndarray) -> np.ndarray:
        """Return the numbers of the strings that the symbols at `index` `(m,)` belong to."""
        return np.searchsorted(self.starts, index, side="right") - 1


def strings_of(reading: str, pieces: Iterable[np.ndarray]) -> Strings:
    """Convert pieces, ids `(T,)` of canonical performance events without specials, to one of the `READINGS`."""
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


class HashKey(NamedTuple):
    """Random numbers of a hash, uint64 below `PRIME`: one for each symbol `(V,)`, one for a semitone, and a base."""

    values: np.ndarray
    semitone: np.uint64
    base: np.uint64

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "HashKey":
        """Draw a key."""
        numbers = rng.integers(1, PRIME, VOCAB_SIZE + 2, np.uint64)
        return cls(numbers[:-2], numbers[-2], numbers[-1])


class Windows:
    """The hashes of all windows of strings, computed from prefix sums at a cost independent of the window's length.

    The hash of a window is Σ base^k · (value of its symbol k + semitone · pitch of its symbol k) modulo `PRIME`, with
    pitches relative to its first one.
    """

    def __init__(self, strings: Strings, key: HashKey):
        n = len(strings.symbols)
        has_pitch = strings.pitch != NO_PITCH
        self.intervals = _times(key.semitone, np.arange(PITCHES, dtype=np.uint64))
        # A value for each pair of pitch and symbol; the last row, index −1, is for symbols without a pitch.
        values = (key.values + np.append(self.intervals, np.uint64(0))[:, None]) % PRIME
        powers = _powers(key.base, n)
        self.sums = _sums(powers, values[strings.pitch, strings.symbols])
        self.pitched = _sums(powers, has_pitch.astype(np.uint64)) if has_pitch.any() else None
        self.unshift = _powers(np.uint64(pow(int(key.base), -1, int(PRIME))), n)
        self.first_pitch = _next_pitch(strings.pitch) if has_pitch.any() else None
        lengths = np.diff(strings.starts)
        self.room = np.repeat(strings.starts[1:], lengths) - np.arange(n)  # symbols left in the string of each symbol

    def starts(self, length: int, among: np.ndarray | None = None) -> np.ndarray:
        """Return the positions, of all or of `among` `(m,)`, at which a window of `length` fits into its string."""
        if among is None:
            return np.flatnonzero(self.room >= length)
        return among[self.room[among] >= length]

    def hashes(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the hashes `(m,)` uint64, below `PRIME`, of the windows at `starts` `(m,)`."""
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
    """Return a · b modulo `PRIME` for numbers below it, from products of their halves, which fit into 64 bits."""
    a_low, a_high, b_low, b_high = a & LOW, a >> HALF, b & LOW, b >> HALF
    middle = a_low * b_high + a_high * b_low  # counts 2^31; its bits from 30 on count 2^61, which is 1 modulo the prime
    carried, kept = middle >> np.uint64(30), (middle & np.uint64(2**30 - 1)) << HALF
    return (a_low * b_low + kept + carried + np.uint64(2) * a_high * b_high) % PRIME


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a − b modulo `PRIME` for numbers below it."""
    return (a + (PRIME - b)) % PRIME


def _powers(base: np.uint64, n: int) -> np.ndarray:
    """Return base^0 … base^(n − 1) modulo `PRIME`."""
    powers = np.ones(n, np.uint64)
    factor, known = base, 1
    while known < n:
        for i in range(known, min(2 * known, n), BLOCK):
            j = min(i + BLOCK, 2 * known, n)
            powers[i:j] = _times(powers[i - known : j - known], factor)
        factor, known = _times(factor, factor), 2 * known
    return powers


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sums `(n + 1,)` of the first 0 … n products of a `(n,)` and b `(n,)`, modulo `PRIME`."""
    sums = np.zeros(len(a) + 1, np.uint64)
    for i in range(0, len(a), BLOCK):
        products = _times(a[i : i + BLOCK], b[i : i + BLOCK])
        high, low = (np.cumsum(half) % PRIME for half in (products >> HALF, products & LOW))
        sums[i + 1 : i + 1 + len(products)] = (sums[i] + _times(high, LOW + np.uint64(1)) + low) % PRIME
    return sums


def _next_pitch(pitch: np.ndarray) -> np.ndarray:
    """Return at each position the first pitch at or after it; 0 after the last pitch."""
    places = np.flatnonzero(pitch != NO_PITCH)
    after = np.searchsorted(places, np.arange(len(pitch)))
    return np.append(pitch[places], np.int16(0))[after]


class SharedWindow(NamedTuple):
    """A run of `length` symbols that begins at `at` in one set of strings and at `there` in another."""

    length: int
    at: int
    there: int


def longest_runs(mine: Strings, theirs: Strings) -> list[SharedWindow]:
    """Return for each string of `mine` the longest run that also is in a string of `theirs`; exact.

    Among equally long runs, the first in `theirs`, then the first in `mine`; (0, start, 0) if no symbol is shared.
    """
    rng = np.random.default_rng(0)
    while True:
        runs = _hashed_runs(mine, theirs, HashKey.draw(rng))
        if all(_equal(mine, theirs, run) for run in runs):
            return runs


def _hashed_runs(mine: Strings, theirs: Strings, key: HashKey) -> list[SharedWindow]:
    """Find the longest runs with equal hashes by doubling and then bisecting the length, all strings at once."""
    own, other = Windows(mine, key), Windows(theirs, key)
    runs = [SharedWindow(0, int(start), 0) for start in mine.starts[:-1]]
    absent = np.diff(mine.starts) + 1  # of each string of mine: the smallest length known to have no match
    possible = {0: None}  # by length: the starts in theirs whose window is in mine, None for all of them
    while unfinished := [i for i, run in enumerate(runs) if absent[i] - run.length > 1]:
        length = min(_next_length(runs[i].length, int(absent[i])) for i in unfinished)
        nearest = max(known for known in possible if known <= length)
        found, possible[length] = _matches(own, other, length, possible[nearest])
        strings, first = np.unique(mine.owner(found[:, 0]), return_index=True)
        places = dict(zip(strings.tolist(), found[first].tolist(), strict=True))
        for i, run in enumerate(runs):
            if i not in places:
                absent[i] = min(absent[i], length)
            elif length > run.length:
                runs[i] = SharedWindow(length, *places[i])
    return runs


def _next_length(present: int, absent: int) -> int:
    """Return the length to try between one with a match and one without."""
    doubled = max(2 * present, FIRST_LENGTH)
    return doubled if doubled < absent else (present + absent) // 2


def _matches(own: Windows, other: Windows, length: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows of `own` that are also in `other` `(m, 2)`, and the starts in `other` that match any `(n,)`.

    Each row is a start in `own` and the first matching start in `other`, sorted by the second, then the first.
    """
    mine, theirs = own.starts(length), other.starts(length, among)
    hashes, wanted = own.hashes(mine, length), other.hashes(theirs, length)
    table = np.zeros(1 << BUCKET_BITS, bool)  # which hashes of mine exist, by their highest bits
    table[hashes >> np.uint64(PRIME_BITS - BUCKET_BITS)] = True
    likely = table[wanted >> np.uint64(PRIME_BITS - BUCKET_BITS)]
    theirs, wanted = theirs[likely], wanted[likely]
    shared = np.isin(wanted, hashes)
    theirs, wanted = theirs[shared], wanted[shared]
    different, first = np.unique(wanted, return_index=True)  # first: index in theirs of the first window of each hash
    # place: index in `different` of the hash of each window of mine, or of the next larger one; checked by `present`.
    place = np.minimum(np.searchsorted(different, hashes), max(len(different) - 1, 0))
    present = different[place] == hashes if len(different) else np.zeros(len(hashes), bool)
    found = np.stack([mine[present], theirs[first[place[present]]]], axis=1)
    return found[np.lexsort((found[:, 0], found[:, 1]))], theirs


def _equal(mine: Strings, theirs: Strings, run: SharedWindow) -> bool:
    """Return whether the symbols of a run are equal in both strings, and its pitches up to one interval."""
    here, there = slice(run.at, run.at + run.length), slice(run.there, run.there + run.length)
    known = mine.pitch[here] != NO_PITCH
    apart = mine.pitch[here][known] - theirs.pitch[there][known]
    return bool((mine.symbols[here] == theirs.symbols[there]).all() and (apart == apart[:1]).all())
