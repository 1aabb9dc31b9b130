"""The longest runs that music shares with other music: against a search that compares everything with everything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.evaluation.music import shared_runs
from dsmr_mlx.evaluation.music.shared_runs import READINGS, Key, Run, longest_runs, strings_of
from dsmr_mlx.tokenizers.performance import NOTE_OFF, NOTE_ON, TIME_SHIFT, VELOCITY

PITCHES = (50, 52, 55)


def random_music(rng: np.random.Generator, n: int) -> np.ndarray:
    """n events, few kinds of them: much is shared by chance."""
    keys = [first + pitch for first in (NOTE_ON, NOTE_OFF) for pitch in PITCHES]
    return rng.choice([*keys, TIME_SHIFT + 3, VELOCITY + 9], n).astype(np.uint16)


def transposed(ids: np.ndarray, semitones: int) -> np.ndarray:
    return np.where((ids >= NOTE_ON) & (ids < TIME_SHIFT), ids.astype(int) + semitones, ids)


def symbols(reading: str, ids: np.ndarray) -> list[tuple]:
    """What has to be equal, and the pitch or None, of each event that is read."""
    found = []
    for i in ids.tolist():
        is_on, is_key = i < NOTE_OFF, i < TIME_SHIFT
        if reading == "notes" and not is_on:
            continue
        pitch = (i - NOTE_ON) % 128 if is_key else None
        found.append((i, None) if reading == "events" or not is_key else (is_on, pitch))
    return found


def matches(a: list[tuple], b: list[tuple]) -> bool:
    """Whether two runs are equal but for one interval."""
    same = all(x[0] == y[0] for x, y in zip(a, b, strict=True))
    return same and len({x[1] - y[1] for x, y in zip(a, b, strict=True) if x[1] is not None}) <= 1


def longest_by_comparing_all(mine: list[tuple], theirs: list[list[tuple]]) -> int:
    best = 0
    for other in theirs:
        for i in range(len(mine)):
            for j in range(len(other)):
                while i + best < len(mine) and j + best < len(other):
                    if not matches(mine[i : i + best + 1], other[j : j + best + 1]):
                        break
                    best += 1
    return best


def lengths(reading: str, mine: list[np.ndarray], theirs: list[np.ndarray], seed: int = 0) -> list[int]:
    return [run.length for run in longest_runs(strings_of(reading, mine), strings_of(reading, theirs), seed)]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("seed", range(4))
def test_as_long_as_by_comparing_everything(reading, seed):
    """Random music, with a copy, a transposed copy and nothing at all among it."""
    rng = np.random.default_rng(seed)
    theirs = [random_music(rng, n) for n in (70, 0, 1, 90)]
    mine = [random_music(rng, n) for n in (60, 2, 0)]
    mine.append(np.concatenate([random_music(rng, 20), theirs[3][10:40], random_music(rng, 20)]))
    mine.append(np.concatenate([random_music(rng, 20), transposed(theirs[0][30:65], -7)]))
    expected = [
        longest_by_comparing_all(symbols(reading, ids), [symbols(reading, other) for other in theirs]) for ids in mine
    ]
    assert lengths(reading, mine, theirs) == expected
    assert expected[3] >= len(symbols(reading, theirs[3][10:40]))
    if reading != "events":
        assert expected[4] >= len(symbols(reading, theirs[0][30:65]))


@pytest.mark.parametrize("reading", READINGS)
def test_a_run_is_where_it_is_said_to_be(reading):
    """Of several places the first, in the music itself."""
    rng = np.random.default_rng(1)
    theirs = [random_music(rng, 300) for _ in range(5)]
    mine = [random_music(rng, 200) for _ in range(5)]
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


def test_no_run_goes_from_one_piece_into_the_next():
    rng = np.random.default_rng(0)
    music = random_music(rng, 400)
    assert lengths("events", [music], [music]) == [400]
    assert lengths("events", [music], [music[:150], music[150:]]) == [250]
    assert lengths("events", [music[:100], music[100:]], [music]) == [100, 300]
    assert lengths("events", [music], []) == [0]
    assert lengths("events", [], [music]) == []


def test_transposition_keeps_all_of_a_run():
    """The events before its first key belong to it as well."""
    rng = np.random.default_rng(0)
    music = np.concatenate([[VELOCITY + 3, TIME_SHIFT + 5, TIME_SHIFT + 7], random_music(rng, 300)])
    for semitones in (-20, 1, 40):
        moved = transposed(music, semitones)
        assert lengths("transposed", [moved], [music]) == [303]
        assert lengths("events", [moved], [music])[0] < 20
        (run,) = longest_runs(strings_of("notes", [moved]), strings_of("notes", [music]))
        assert run == Run(len(symbols("notes", music)), 0, 0)


def test_loudness_and_timing_do_not_count_for_notes_alone():
    rng = np.random.default_rng(2)
    music = random_music(rng, 300)
    keys = music[music < NOTE_OFF]
    assert lengths("notes", [keys], [music]) == [len(keys)]


def test_windows_with_equal_hashes_are_told_apart(monkeypatch):
    """The first numbers to hash with are such that all windows of one length look the same."""
    bad = Key(np.zeros(391, np.uint64), np.uint64(0), np.uint64(1))
    draws, draw = [], Key.draw
    monkeypatch.setattr(
        shared_runs.Key, "draw", classmethod(lambda cls, rng: draws.append(1) or (bad if len(draws) < 3 else draw(rng)))
    )
    rng = np.random.default_rng(3)
    mine, theirs = random_music(rng, 80), random_music(rng, 80)
    expected = longest_by_comparing_all(symbols("events", mine), [symbols("events", theirs)])
    assert lengths("events", [mine], [theirs]) == [expected]
    assert len(draws) == 3


def test_endless_repetition_takes_no_more_than_its_length():
    """Where every window is like every other, nothing grows with the number of pairs."""
    silence = np.full(200_000, TIME_SHIFT + 99, np.uint16)
    assert lengths("events", [silence[:5000]], [silence]) == [5000]


# Both ends of the keyboard, few keys: much is shared, and transpositions go over the edge.
EVENTS = st.sampled_from([NOTE_ON, NOTE_ON + 1, NOTE_ON + 127, NOTE_OFF, NOTE_OFF + 127, TIME_SHIFT, VELOCITY])
PIECES = st.lists(st.lists(EVENTS, max_size=14).map(lambda ids: np.array(ids, np.uint16)), max_size=4)


@settings(max_examples=150, deadline=None)
@given(mine=PIECES, theirs=PIECES, reading=st.sampled_from(list(READINGS)))
def test_any_pieces_share_what_comparing_everything_finds(mine, theirs, reading):
    others = [symbols(reading, other) for other in theirs]
    assert lengths(reading, mine, theirs) == [longest_by_comparing_all(symbols(reading, ids), others) for ids in mine]


def test_music_that_deceives_hashes_modulo_a_power_of_two():
    """Half of the Thue-Morse sequence and its opposite have equal hashes modulo 2^64, whatever the key."""
    bits = np.array([number.bit_count() & 1 for number in range(1 << 11)])
    mine, theirs = (np.where(bits == side, NOTE_ON + 60, NOTE_ON + 62) for side in (0, 1))
    for reading in READINGS:
        assert lengths(reading, [mine], [theirs]) == [1 << 10]


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 2**61 - 2), min_size=1, max_size=9), base=st.integers(1, 2**61 - 2))
def test_arithmetic_modulo_the_prime(numbers, base):
    """As integers of any size have it."""
    prime, n = int(shared_runs.PRIME), len(numbers)
    powers = [pow(base, k, prime) for k in range(n)]
    found = shared_runs._powers(np.uint64(base), n)
    assert found.tolist() == powers
    products = [a * b for a, b in zip(numbers, powers, strict=True)]
    array = np.array(numbers, np.uint64)
    assert shared_runs._times(array, found).tolist() == [product % prime for product in products]
    assert shared_runs._sums(array, found).tolist() == [sum(products[:k]) % prime for k in range(n + 1)]
    assert shared_runs._minus(array, found).tolist() == [(a - b) % prime for a, b in zip(numbers, powers, strict=True)]
