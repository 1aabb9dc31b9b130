"""Random walks through the grammar: any choice of allowed ids is valid music and reaches an end."""

import time
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.performance_reference import first_violation
from support.random_lanes import side_by_side
from support.stand_ins import PlainTokenizer

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import finish
from dsmr_mlx.generation.grammar import RELEASE_TOKENS, GrammarState, GrammarWalk, Limits
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    FILL,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    PerformanceTokenizer,
    decode_ids,
    encode_notes,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()
G = performance_grammar()
LANES = 32


def random_weights(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """How likely each lane takes each id, `(B, V)`: uniformly, or with random preferences."""
    kinds = np.searchsorted([NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY], np.arange(VOCAB_SIZE), side="right")
    weights = 10.0 ** rng.uniform(-6, 0, (lanes, 5))[:, kinds]
    weights[: lanes // 4] = 1.0
    weights[-lanes // 4 :, TIME_SHIFT + 5 : VELOCITY] *= 1e-4  # little time passes, so many keys are down
    return weights


class Walkers:
    """Lanes that take random allowed ids and check invariants at each step."""

    def __init__(self, walk: GrammarWalk, limits: Limits, music: GrammarState, seed: int):
        walk.check(limits)
        self.walk, self.bounds, self.music = walk, walk.bounds(limits, music), music
        self.rng = np.random.default_rng(seed)
        self.weights = random_weights(self.rng, len(music.state.tolist()))
        if limits.tokens > 10_000:  # otherwise a lane that avoids pauses would take long
            self.weights[:, TIME_SHIFT + 5 : VELOCITY] = self.weights.max(axis=1, keepdims=True)
        self.ids: list[np.ndarray] = []
        self.ended = np.zeros(len(self.weights), bool)

    def step(self) -> np.ndarray:
        allowed = np.array(self.walk.allowed(self.music, self.bounds))
        assert allowed.any(axis=1).all(), "no id is allowed"
        sounds = np.array(self.music.sounding).any(axis=1)
        ended = self.ended
        assert not (allowed[:, EOS] & sounds).any(), "the end while a key sounds"
        assert np.array_equal(allowed[:, PAD], ended), "padding before the end, or none after it"
        assert (allowed[ended].sum(axis=1) == 1).all()
        assert not allowed[:, BOS].any()
        chance = np.where(allowed, self.weights, 0).cumsum(axis=1)
        drawn = (chance <= self.rng.random((len(chance), 1)) * chance[:, -1:]).sum(axis=1)
        self.music = self.walk.advance(self.music, mx.array(drawn))
        self.ids.append(drawn)
        self.ended = ended | (drawn == EOS)
        return drawn

    def until_all_ended(self, most: int) -> np.ndarray:
        """The lanes' ids `(B, T)`."""
        while not self.ended.all():
            assert len(self.ids) < most, f"{(~self.ended).sum()} lanes go on after {most} tokens"
            self.step()
        self.step()
        return np.stack(self.ids, axis=1)


def walkers(limits: Limits, seed: int = 0, prefixes: list[list[int]] | None = None) -> Walkers:
    walk = GrammarWalk(TOKENIZER)
    return Walkers(walk, limits, side_by_side([walk.begin(ids) for ids in prefixes or [[BOS]] * LANES]), seed)


def possible(
    walk: GrammarWalk, music: GrammarState, limits: Limits | None = None, since: GrammarState | None = None
) -> list[int]:
    """The ids that may come next in the first lane; the limits count from `since`, None: from now."""
    bounds = walk.bounds(limits or Limits(), since or music)
    return np.flatnonzero(np.array(walk.allowed(music, bounds))[0]).tolist()


def some_prefixes(seed: int) -> list[list[int]]:
    """Prefixes of random walks, cut anywhere."""
    w = walkers(Limits(), seed)
    for _ in range(120):
        w.step()
    lengths = np.random.default_rng(seed).integers(0, 121, LANES)
    return [[BOS, *lane[:n]] for lane, n in zip(np.stack(w.ids, axis=1).tolist(), lengths, strict=True)]


def check_music(prefix: list[int], lane: np.ndarray, walk: GrammarWalk) -> None:
    ids = np.array([*prefix, *finish(walk, lane)])
    # Only the end may follow a prefix that was cut in a pause.
    assert first_violation(ids[:-1], complete=False) is None
    pressed, released = (np.bincount(table[ids] + 1, minlength=129)[1:] for table in (G.press, G.release))
    assert np.array_equal(pressed, released), "a key is held at the end"
    if len(finish(walk, lane)) > 1:
        assert first_violation(ids) is None
    notes = decode_ids(ids)
    assert len(notes) == pressed.sum(), "every NOTE_ON is a note"
    assert decode_ids(encode_notes(notes)) == notes
    # `finish` may remove only a pause or a velocity, and only at the end.
    until_end = lane[: list(lane).index(EOS)]
    lost = until_end[len(finish(walk, lane)) - 1 :]
    assert (lost >= TIME_SHIFT).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limits", [Limits(ticks=150), Limits(tokens=90), Limits(ticks=200, tokens=120)])
def test_any_choice_is_valid_music(limits, seed):
    prefixes = some_prefixes(seed) if seed else [[BOS]] * LANES
    w = walkers(limits, seed, prefixes)
    lanes = w.until_all_ended(4000)
    for prefix, lane in zip(prefixes, lanes, strict=True):
        check_music(prefix, lane, w.walk)


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_limit_on_ticks_is_kept(prefixed):
    limit = 230
    w = walkers(Limits(ticks=limit), 5, some_prefixes(5) if prefixed else None)
    for lane in w.until_all_ended(4000):
        ticks = G.ticks[lane].sum()
        assert limit <= ticks <= limit + w.walk.release_ticks
        before = np.cumsum(G.ticks[lane]) < limit
        assert (lane[before] != EOS).all(), "it does not end by itself"
        # At most one key is pressed late: the one whose velocity was set before.
        assert (G.press[lane[~before]] >= 0).sum() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_limit_on_tokens_is_kept(prefixed):
    limit = 200
    w = walkers(Limits(tokens=limit), 6, some_prefixes(6) if prefixed else None)
    for lane in w.until_all_ended(4000):
        end = list(lane).index(EOS)
        assert limit <= end <= limit + RELEASE_TOKENS + 128
        assert (G.press[lane[limit:]] >= 0).sum() <= 1


@pytest.mark.slow
def test_with_may_end_the_model_may_end_in_silence():
    w = walkers(Limits(tokens=600, may_end=True), 7)
    w.weights[:, EOS] = 50.0
    w.weights[:, NOTE_OFF:TIME_SHIFT] = 50.0
    lanes = w.until_all_ended(4000)
    lengths = np.array([list(lane).index(EOS) for lane in lanes])
    assert (lengths < 600).sum() > LANES / 2
    for lane in lanes:
        check_music([BOS], lane, w.walk)
        assert first_violation(lane[: list(lane).index(EOS) + 1]) is None or list(lane).index(EOS) >= 600


@pytest.mark.slow
def test_without_may_end_only_a_limit_ends_the_piece():
    w = walkers(Limits(tokens=200), 8)
    w.weights[:, EOS] = 1e6
    lanes = w.until_all_ended(2000)
    assert (np.argmax(lanes == EOS, axis=1) >= 200).all()


def test_no_velocity_is_allowed_if_all_keys_are_down():
    # VELOCITY needs a NOTE_ON, and none is left: a walk once had no allowed id here
    walk = GrammarWalk(TOKENIZER)
    ids = [VELOCITY + 3, *range(NOTE_ON, NOTE_ON + 128)]
    assert possible(walk, walk.begin(ids)) == list(range(TIME_SHIFT, VELOCITY))
    assert possible(walk, walk.begin([*ids, TIME_SHIFT + 4])) == list(range(NOTE_OFF, TIME_SHIFT))
    stuck = np.array([*ids, VELOCITY + 1])
    with pytest.raises(UserError, match="`prompt`: nothing may follow its last id, 360; expected music that can go on"):
        walk.check_open(walk.begin(stuck), stuck)


def advanced_from_the_start(walk: GrammarWalk, ids: list[int]) -> GrammarState:
    music = walk.begin([])
    for i in ids:
        music = walk.advance(music, mx.array([i]))
    return music


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(NOTE_ON, FILL - 1), max_size=30))
def test_begin_equals_advancing_through_the_prompt(ids):
    walk = GrammarWalk(TOKENIZER)
    walked = advanced_from_the_start(walk, ids)
    begun = walk.begin([BOS, *ids, EOS, PAD])
    for name in ("state", "sounding", "velocity"):
        assert np.array_equal(np.array(getattr(begun, name)), np.array(getattr(walked, name))), name
    assert begun.ticks.tolist() == begun.prompt_ticks.tolist() == walked.ticks.tolist() == [G.ticks[ids].sum()]
    assert begun.tokens.tolist() == walked.tokens.tolist() == [len(ids)]
    assert (begun.new_ticks.tolist(), walked.prompt_ticks.tolist()) == ([0], [0])
    assert [array.dtype for array in begun] == [array.dtype for array in walked]


def test_before_each_equals_advancing():
    walk, music = GrammarWalk(TOKENIZER), lanes_in_the_middle().take([3])
    rng, ids, expected = np.random.default_rng(4), [], [music]
    for _ in range(200):
        ids.append(int(rng.choice(possible(walk, expected[-1]))))
        expected.append(walk.advance(expected[-1], mx.array(ids[-1:])))
    for name, array in walk.before_each(music, np.array(ids))._asdict().items():
        together = np.concatenate([np.array(getattr(p, name)) for p in expected])
        assert np.array_equal(np.array(array), together), name
        assert array.dtype == getattr(music, name).dtype


@cache
def lanes_in_the_middle() -> GrammarState:
    """Six lanes in the middle of music; two have ended."""
    walk = GrammarWalk(TOKENIZER)
    lanes = side_by_side([walk.begin(prefix) for prefix in some_prefixes(2)[:6]])
    return lanes._replace(state=mx.where(mx.arange(6) < 2, int(G.next_state[0, EOS]), lanes.state))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, FILL - 1), max_size=30))
def test_read_equals_advancing_token_by_token(ids):
    walk, walked = GrammarWalk(TOKENIZER), lanes_in_the_middle()
    for i in ids:
        if i not in walk.specials:
            walked = walk.advance(walk.reopened(walked), mx.full((6,), i, mx.int32))
    for name, array in walk.read(lanes_in_the_middle(), np.array(ids))._asdict().items():
        assert np.array_equal(np.array(array), np.array(getattr(walked, name))), name
        assert array.dtype == getattr(walked, name).dtype


def test_begin_in_the_middle_of_music():
    walk = GrammarWalk(TOKENIZER)
    for prefix in some_prefixes(9):
        begun, walked = walk.begin(prefix), advanced_from_the_start(walk, prefix[1:])
        for name in ("state", "sounding", "velocity"):
            assert np.array_equal(np.array(getattr(begun, name)), np.array(getattr(walked, name))), name


@pytest.mark.slow
def test_invalid_prompts_lead_to_an_end():
    rng = np.random.default_rng(10)
    nonsense = [rng.integers(NOTE_ON, VOCAB_SIZE, rng.integers(0, 400)).tolist() for _ in range(LANES)]
    w = walkers(Limits(ticks=100, tokens=300), 10, nonsense)
    for prefix, lane in zip(nonsense, w.until_all_ended(2000), strict=True):
        held = np.array(w.walk.begin(prefix).sounding)[0].astype(int)
        np.add.at(held, G.press[lane[G.press[lane] >= 0]], 1)
        np.add.at(held, G.release[lane[G.release[lane] >= 0]], -1)
        assert not held.any()


def test_a_long_prompt_is_read_quickly():
    ids = np.random.default_rng(0).integers(NOTE_ON, NOTE_OFF, 60_000)
    walk = GrammarWalk(TOKENIZER)
    walk.begin(ids)
    began = time.process_time()
    walk.begin(ids)
    assert time.process_time() - began < 0.05  # 3 ms; id by id it takes 60 ms


@pytest.mark.slow
@pytest.mark.parametrize("limits", [Limits(ticks=150), Limits(tokens=60), Limits(ticks=90, tokens=200, may_end=True)])
def test_limits_count_from_the_current_counters(limits):
    """A lane with large counters is allowed the same as a fresh one: limits count from now."""
    walk, rng = GrammarWalk(TOKENIZER), np.random.default_rng(1)
    fresh = walk.begin([])
    later = fresh._replace(ticks=mx.array([123_456], mx.int32), tokens=mx.array([2**31 - 700], mx.int32))
    bounds = [walk.bounds(limits, music) for music in (fresh, later)]
    lanes = [fresh, later]
    for _ in range(400):
        one, other = (np.array(walk.allowed(music, b))[0] for music, b in zip(lanes, bounds, strict=True))
        assert np.array_equal(one, other)
        token = mx.array([int(rng.choice(np.flatnonzero(one)))])
        lanes = [walk.advance(music, token) for music in lanes]


def test_without_a_grammar_only_tokens_can_be_limited():
    tokenizer = PlainTokenizer()
    walk = GrammarWalk(tokenizer)
    with pytest.raises(UserError, match="tokenizer plain: its tokens have no known duration, expected `tokens`"):
        walk.check(Limits(ticks=100))
    limits, begun = Limits(tokens=12), walk.begin([8, 1, 2])
    music = begun
    for n in range(12):
        assert possible(walk, music, limits, begun) == list(range(1, 8)), n
        music = walk.advance(music, mx.array([1 + n % 7]))
    assert possible(walk, music, limits, begun) == [tokenizer.eos_id]
    music = walk.advance(music, mx.array([tokenizer.eos_id]))
    for _ in range(2):
        assert possible(walk, music, limits, begun) == [tokenizer.pad_id]
        music = walk.advance(music, mx.array([tokenizer.pad_id]))
    assert possible(walk, walk.reopened(music), limits) == list(range(1, 8)), "reading reopens an ended lane"
    assert possible(walk, walk.begin([]), Limits(tokens=12, may_end=True)) == list(range(8))
    assert finish(walk, np.array([1, 2, 3, 0, 9, 9])).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("lane", "tidy"),
    [
        ([], [EOS]),
        ([EOS, PAD], [EOS]),
        ([VELOCITY, NOTE_ON, TIME_SHIFT, NOTE_OFF, EOS], [VELOCITY, NOTE_ON, TIME_SHIFT, NOTE_OFF, EOS]),
        ([NOTE_OFF, VELOCITY - 1, TIME_SHIFT, VELOCITY, EOS, PAD], [NOTE_OFF, EOS]),
        ([TIME_SHIFT, VELOCITY, EOS], [EOS]),
    ],
)
def test_a_finished_lane_ends_with_its_last_key(lane, tidy):
    walk = GrammarWalk(TOKENIZER)
    assert finish(walk, np.array(lane, np.int64)).tolist() == tidy


@pytest.mark.parametrize("many", [2**31, 2**63 - 1, 10**20])
def test_limits_may_exceed_any_counter(many):
    """They are never reached."""
    walk = GrammarWalk(PerformanceTokenizer())
    music = walk.begin(np.array([BOS, VELOCITY, NOTE_ON + 60, TIME_SHIFT + 9]))
    bounds, free = (walk.bounds(limits, music) for limits in (Limits(many, many, many), Limits()))
    for each in (bounds, free):
        assert each.ends is each.gap is None
        assert not each.may_end
