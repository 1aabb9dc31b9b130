"""The longest runs that music shares with other music, against a brute-force search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.evaluation.music import shared_runs
from dsmr_mlx.evaluation.music.shared_runs import READINGS, HashKey, SharedWindow, longest_runs, strings_of
from dsmr_mlx.tokenizers.performance import NOTE_OFF, NOTE_ON, TIME_SHIFT, VELOCITY, VOCAB_SIZE

PITCHES = (50, 52, 55)


def random_stream(rng: np.random.Generator, n: int) -> np.ndarray:
    """n events of few kinds, so that much is shared by chance."""
    keys = [first + pitch for first in (NOTE_ON, NOTE_OFF) for pitch in PITCHES]
    return rng.choice([*keys, TIME_SHIFT + 3, VELOCITY + 9], n).astype(np.uint16)


def transposed(ids: np.ndarray, semitones: int) -> np.ndarray:
    """Transpose the keys of events."""
    return np.where((ids >= NOTE_ON) & (ids < TIME_SHIFT), ids.astype(int) + semitones, ids)


def symbols(reading: str, ids: np.ndarray) -> list[tuple]:
    """The value that must be equal, and the pitch or None, of each event of a reading."""
    found = []
    for i in ids.tolist():
        is_on, is_key = i < NOTE_OFF, i < TIME_SHIFT
        if reading == "notes" and not is_on:
            continue
        pitch = (i - NOTE_ON) % 128 if is_key else None
        found.append((i, None) if reading == "events" or not is_key else (is_on, pitch))
    return found


def matches(a: list[tuple], b: list[tuple]) -> bool:
    """Whether two runs are equal up to one interval."""
    same = all(x[0] == y[0] for x, y in zip(a, b, strict=True))
    return same and len({x[1] - y[1] for x, y in zip(a, b, strict=True) if x[1] is not None}) <= 1


def brute_force_longest(mine: list[tuple], theirs: list[list[tuple]]) -> int:
    """Return the length of the longest run that `mine` shares with any of `theirs`."""
    best = 0
    for other in theirs:
        for i in range(len(mine)):
            for j in range(len(other)):
                while i + best < len(mine) and j + best < len(other):
                    if not matches(mine[i : i + best + 1], other[j : j + best + 1]):
                        break
                    best += 1
    return best


def lengths(reading: str, mine: list[np.ndarray], theirs: list[np.ndarray]) -> list[int]:
    """Return the lengths of the longest runs."""
    return [run.length for run in longest_runs(strings_of(reading, mine), strings_of(reading, theirs))]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("seed", range(4))
def test_lengths_equal_those_of_a_brute_force_search(reading, seed):
    """Random music, including a copy, a transposed copy and an empty piece."""
    rng = np.random.default_rng(seed)
    theirs = [random_stream(rng, n) for n in (70, 0, 1, 90)]
    mine = [random_stream(rng, n) for n in (60, 2, 0)]
    mine.append(np.concatenate([random_stream(rng, 20), theirs[3][10:40], random_stream(rng, 20)]))
    mine.append(np.concatenate([random_stream(rng, 20), transposed(theirs[0][30:65], -7)]))
    expected = [
        brute_force_longest(symbols(reading, ids), [symbols(reading, other) for other in theirs]) for ids in mine
    ]
    assert lengths(reading, mine, theirs) == expected
    assert expected[3] >= len(symbols(reading, theirs[3][10:40]))
    if reading != "events":
        assert expected[4] >= len(symbols(reading, theirs[0][30:65]))


@pytest.mark.parametrize("reading", READINGS)
def test_a_run_is_at_the_reported_places(reading):
    """At the first of several places, by index in the ids."""
    rng = np.random.default_rng(1)
    theirs = [random_stream(rng, 300) for _ in range(5)]
    mine = [random_stream(rng, 200) for _ in range(5)]
    a, b = strings_of(reading, mine), strings_of(reading, theirs)
    for i, run in enumerate(longest_runs(a, b)):
        piece = int(b.owner(np.array([run.there]))[0])
        assert a.owner(np.array([run.at])).tolist() == [i]
        at, there = (s.place[k : k + run.length] for s, k in ((a, run.at), (b, run.there)))
        assert matches(symbols(reading, mine[i][at]), symbols(reading, theirs[piece][there]))
        earlier = symbols(reading, theirs[0]) if piece else []
        windows = (earlier[j : j + run.length] for j in range(len(earlier) - run.length + 1))
        own = symbols(reading, mine[i])
        starts = range(len(own) - run.length + 1)
        assert not any(matches(own[k : k + run.length], window) for window in windows for k in starts)


def test_no_run_crosses_from_one_piece_into_the_next():
    rng = np.random.default_rng(0)
    music = random_stream(rng, 400)
    assert lengths("events", [music], [music]) == [400]
    assert lengths("events", [music], [music[:150], music[150:]]) == [250]
    assert lengths("events", [music[:100], music[100:]], [music]) == [100, 300]
    assert lengths("events", [music], []) == [0]
    assert lengths("events", [], [music]) == []


def test_transposition_keeps_a_whole_run():
    """Including the events before its first key."""
    rng = np.random.default_rng(0)
    music = np.concatenate([[VELOCITY + 3, TIME_SHIFT + 5, TIME_SHIFT + 7], random_stream(rng, 300)])
    for semitones in (-20, 1, 40):
        moved = transposed(music, semitones)
        assert lengths("transposed", [moved], [music]) == [303]
        assert lengths("events", [moved], [music])[0] < 20
        (run,) = longest_runs(strings_of("notes", [moved]), strings_of("notes", [music]))
        assert run == SharedWindow(len(symbols("notes", music)), 0, 0)


def test_the_reading_notes_ignores_velocity_and_timing():
    rng = np.random.default_rng(2)
    music = random_stream(rng, 300)
    keys = music[music < NOTE_OFF]
    assert lengths("notes", [keys], [music]) == [len(keys)]


def test_a_hash_collision_draws_a_new_key(monkeypatch):
    """With the first two keys all windows of one length have equal hashes."""
    bad = HashKey(np.zeros(VOCAB_SIZE, np.uint64), np.uint64(0), np.uint64(1))
    draws, draw = [], HashKey.draw

    def bad_at_first(cls, rng):
        draws.append(1)
        return bad if len(draws) < 3 else draw(rng)

    monkeypatch.setattr(HashKey, "draw", classmethod(bad_at_first))
    rng = np.random.default_rng(3)
    mine, theirs = random_stream(rng, 80), random_stream(rng, 80)
    expected = brute_force_longest(symbols("events", mine), [symbols("events", theirs)])
    assert lengths("events", [mine], [theirs]) == [expected]
    assert len(draws) == 3


def test_repetition_takes_time_linear_in_its_length():
    """All windows are equal, but the cost does not grow with the number of pairs."""
    silence = np.full(200_000, TIME_SHIFT + 99, np.uint16)
    assert lengths("events", [silence[:5000]], [silence]) == [5000]


# Few keys at both ends of the keyboard: much is shared, and transpositions cross the edge.
EVENTS = st.sampled_from([NOTE_ON, NOTE_ON + 1, NOTE_ON + 127, NOTE_OFF, NOTE_OFF + 127, TIME_SHIFT, VELOCITY])
PIECES = st.lists(st.lists(EVENTS, max_size=14).map(lambda ids: np.array(ids, np.uint16)), max_size=4)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(mine=PIECES, theirs=PIECES, reading=st.sampled_from(list(READINGS)))
def test_any_pieces_give_the_lengths_of_a_brute_force_search(mine, theirs, reading):
    others = [symbols(reading, other) for other in theirs]
    assert lengths(reading, mine, theirs) == [brute_force_longest(symbols(reading, ids), others) for ids in mine]


def test_thue_morse_music_does_not_collide():
    """Half of the Thue-Morse sequence and its complement have equal hashes modulo 2^64 under every key."""
    bits = np.array([number.bit_count() & 1 for number in range(1 << 11)])
    mine, theirs = (np.where(bits == side, NOTE_ON + 60, NOTE_ON + 62) for side in (0, 1))
    for reading in READINGS:
        assert lengths(reading, [mine], [theirs]) == [1 << 10]


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 2**61 - 2), min_size=1, max_size=9), base=st.integers(1, 2**61 - 2))
def test_arithmetic_modulo_the_prime(numbers, base):
    """Against Python integers."""
    prime, n = int(shared_runs.PRIME), len(numbers)
    powers = [pow(base, k, prime) for k in range(n)]
    found = shared_runs._powers(np.uint64(base), n)
    assert found.tolist() == powers
    products = [a * b for a, b in zip(numbers, powers, strict=True)]
    array = np.array(numbers, np.uint64)
    assert shared_runs._times(array, found).tolist() == [product % prime for product in products]
    assert shared_runs._sums(array, found).tolist() == [sum(products[:k]) % prime for k in range(n + 1)]
    assert shared_runs._minus(array, found).tolist() == [(a - b) % prime for a, b in zip(numbers, powers, strict=True)]
