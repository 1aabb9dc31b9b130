"""Random walks through the grammar of every vocabulary: something may always come, an end is reached, and what the
walk in MLX says of pieces is what plain walks through their events say.
"""

import mlx.core as mx
import numpy as np
import pytest
from support.random_lanes import side_by_side
from support.reference_grammar import all_after, all_may_follow, first_violation, may_follow, tokens_that_may_follow
from support.vocabularies import NAMES, figures, music_for, vocabulary

from dsmr_mlx.generation.generate import finish
from dsmr_mlx.generation.grammar import RELEASE_TOKENS, GrammarWalk, Limits
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

LANES = 6
MIDDLE = Limits(may_end=True)
CLOCKS = [name for name in NAMES if name != "TSD rests"]
WALKS: dict[str, GrammarWalk] = {}


@pytest.fixture(params=NAMES)
def walk(request) -> GrammarWalk:
    return walk_of(request.param)


def walk_of(name: str) -> GrammarWalk:
    return WALKS.setdefault(name, GrammarWalk(vocabulary(name)))


def random_preferences(walk: GrammarWalk, rng: np.random.Generator) -> np.ndarray:
    """How likely each lane takes each id, `(B, V)`: by what it does; some prefer ids of many events, or no pauses."""
    t = walk.tables
    waits, length = (t.ticks > 0) | (t.phase >= 0), (t.events >= 0).sum(axis=1)
    kind = np.select([t.ends, t.notes > 0, t.released.any(axis=1), waits], [0, 1, 2, 3], 4)
    weights = 10.0 ** rng.uniform(-3, 0, (LANES, 5))[:, kind]
    weights[0] = 1.0
    weights[1:4] *= np.where(length > 1, 100.0, 1.0)
    weights[-1] *= np.where(waits & ((t.ticks > 12) | (t.phase > 0)), 1e-4, 1.0)
    return weights


class Walkers:
    """Lanes that take random allowed ids."""

    def __init__(self, walk: GrammarWalk, limits: Limits, prefixes: list[np.ndarray], seed: int):
        walk.check(limits)
        self.walk, self.prefixes = walk, prefixes
        self.music = side_by_side([walk.begin(ids) for ids in prefixes])
        self.bounds = walk.bounds(limits, self.music)
        self.rng = np.random.default_rng(seed)
        self.weights = random_preferences(walk, self.rng)
        self.ids: list[np.ndarray] = []
        self.ended = np.zeros(LANES, bool)

    def step(self) -> np.ndarray:
        """Take a step. Return what was allowed before it, `(B, V)` bool."""
        allowed = np.array(self.walk.allowed(self.music, self.bounds))
        assert allowed.any(axis=1).all(), "no id is allowed"
        sounds = np.array(self.music.sounding).any(axis=1)
        assert not (allowed[:, self.walk.ending] & sounds[:, None]).any(), "the end while a key sounds"
        assert np.array_equal(allowed[:, self.walk.pad_id], self.ended), "padding before the end, or none after it"
        chance = np.where(allowed, self.weights, 0).cumsum(axis=1)
        drawn = (chance <= self.rng.random((LANES, 1)) * chance[:, -1:]).sum(axis=1)
        self.music = self.walk.advance(self.music, mx.array(drawn))
        self.ids.append(drawn)
        self.ended = self.ended | np.isin(drawn, self.walk.ending)
        return allowed

    def until_all_ended(self, most: int) -> list[np.ndarray]:
        """The lanes' ids `(T,)`, EOS last."""
        while not self.ended.all():
            assert len(self.ids) < most, f"{(~self.ended).sum()} lanes go on after {most} tokens"
            self.step()
        self.step()
        lanes = np.stack(self.ids, axis=1)
        return [lane[: np.flatnonzero(lane == self.walk.ending[0])[0] + 1] for lane in lanes]


def prefixes_of(walk: GrammarWalk, seed: int) -> list[np.ndarray]:
    """BOS alone, and prefixes of random walks and of music, cut anywhere."""
    bos, rng = [walk.tokenizer.bos_id], np.random.default_rng(seed)
    w = Walkers(walk, Limits(), [np.array(bos)] * LANES, seed)
    for _ in range(18):
        w.step()
    lanes = np.stack(w.ids, axis=1)
    known = walk.tokenizer.prompt(walk.tokenizer.encode_notes(figures(seed, 4)))
    cuts = [np.append(bos, lane[: rng.integers(19)]) for lane in lanes[: LANES - 2]]
    return [np.array(bos), known[: rng.integers(len(known))], *cuts]


def events_of(walk: GrammarWalk, ids: np.ndarray) -> np.ndarray:
    """The events of ids, without specials except EOS."""
    ids = np.asarray(ids, np.int64)
    return walk.tables.flat(ids[~np.isin(ids, [walk.tokenizer.bos_id, walk.pad_id])])


def equal(a: Moment, b: Moment) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_allowed_ids_are_those_that_the_event_grammar_allows(walk, seed):
    """For all ids at once and for some of them event by event; so is the moment after each step."""
    w = Walkers(walk, MIDDLE, prefixes_of(walk, seed), seed)
    w.weights[:, walk.ending] = 0
    grammar, tables = walk.grammar, walk.tables
    for _ in range(20):
        before = w.music.moments()
        allowed = w.step()
        for lane, moment in enumerate(before):
            assert np.array_equal(allowed[lane], tokens_that_may_follow(tables, moment))
            some = w.rng.choice(tokens := len(tables.events), 8)
            for i in [*some, *w.rng.choice(np.flatnonzero(allowed[lane]), 3)]:
                assert allowed[lane, i] == all_may_follow(grammar, moment, tables.flat([i])), (i, tokens)
            drawn = tables.flat([w.ids[-1][lane]])
            assert equal(w.music.moments()[lane], all_after(grammar, moment, drawn))


@pytest.mark.parametrize("seed", [7])
def test_without_may_end_everything_but_the_end_is_allowed(walk, seed):
    w = Walkers(walk, Limits(), prefixes_of(walk, seed), seed)
    for _ in range(10):
        before = w.music.moments()
        may = np.stack([tokens_that_may_follow(walk.tables, moment) for moment in before])
        may[:, walk.ending] = False
        assert np.array_equal(w.step(), may)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [Limits(tokens=20), Limits(tokens=40, may_end=True), Limits(room=50)])
def test_finished_lanes_are_complete_pieces(walk, limits):
    """A limit on tokens is kept, and the result of `finish` obeys the grammar from the first event to the end."""
    prefixes = prefixes_of(walk, 2)
    w = Walkers(walk, limits, prefixes, 3)
    lanes = w.until_all_ended(600)
    for prefix, lane in zip(prefixes, lanes, strict=True):
        if limits.room < 100:
            assert len(lane) <= 50
        elif not limits.may_end:
            assert limits.tokens + 1 <= len(lane) <= limits.tokens + RELEASE_TOKENS + 128 + 1
        check_finished(walk, prefix, lane)


@pytest.mark.parametrize("seed", [1502, 2102])
def test_ids_that_press_many_keys_leave_room_to_release_them(seed):
    """Also near the end of the room, and if an id ends with a velocity, which needs one more key."""
    walk = walk_of("performance bpe")
    for lane in Walkers(walk, Limits(room=50), prefixes_of(walk, seed), 3).until_all_ended(200):
        assert len(lane) <= 50


@pytest.mark.parametrize("name", CLOCKS)
def test_a_limit_on_seconds_is_kept(name):
    """Keys are released soon after it; if notes have lengths, no event comes after it."""
    walk, seconds = walk_of(name), 0.6
    grammar = walk.grammar
    limit = round(seconds / grammar.seconds_per_tick)
    prefixes = prefixes_of(walk, 4)
    w = Walkers(walk, Limits(ticks=limit), prefixes, 5)
    long = (walk.tables.ticks > limit / 8) | (walk.tables.phase == 0)
    w.weights[:, long] = w.weights.sum(axis=1, keepdims=True) / long.sum()
    for prefix, lane in zip(prefixes, w.until_all_ended(3000), strict=True):
        moments = [walk.begin(prefix).moments()[0]]
        for piece in lane:
            moments.append(all_after(grammar, moments[-1], walk.tables.flat([piece])))
        passed = np.array([moment.ticks - moments[0].ticks for moment in moments])
        longest = max(walk.tables.ticks[lane].max(), 2 * grammar.bar_ticks)
        assert limit <= passed[-1] <= limit + max(walk.release_ticks if grammar.held else 0, longest)
        assert not moments[-1].sounding.any()
        events = walk.tables.flat(lane)
        begins = grammar.elapsed(events, moments[0].phase)[grammar.begins[events]]
        assert (begins > limit).sum() <= grammar.held  # the key whose velocity was set before
        late = lane[passed[:-1] >= limit]
        if not grammar.held:
            assert late.tolist() == walk.ending.tolist()
        check_finished(walk, prefix, lane)


def check_finished(walk: GrammarWalk, prefix: np.ndarray, lane: np.ndarray) -> None:
    """Only what is incomplete is removed, and the result obeys the grammar if the prefix was not cut badly."""
    grammar, tidy = walk.grammar, finish(walk, lane)
    before, drawn, kept = (events_of(walk, ids) for ids in (prefix, lane, tidy))
    assert kept[-1] == drawn[-1]
    same = kept[:-1]
    assert np.array_equal(drawn[: len(same)], same)
    lost = drawn[len(same) : -1]
    assert not grammar.begins[lost].any(), "a note is lost"
    assert not (grammar.release[lost] >= 0).any()
    whole = np.concatenate([before, kept])
    violation = first_violation(grammar, whole)
    if len(kept) > 1:
        assert violation is None, (violation, len(whole))
    else:  # the prefix itself may be cut where no end is allowed
        assert violation in (None, len(whole) - 1)


@pytest.mark.slow
def test_read_equals_advancing_token_by_token(walk):
    """For any music and any ids, with `begin`, `read` and `before_each`."""
    rng = np.random.default_rng(0)
    tokenizer = walk.tokenizer
    streams = [tokenizer.encode_notes(music_of(tokenizer, 1))[1:60], *prefixes_of(walk, 6)[1:4]]
    streams += [rng.integers(0, tokenizer.vocab_size, 15) for _ in range(2)]
    for ids in streams:
        ids = np.asarray(ids, np.int64)
        ids = ids[~np.isin(ids, walk.specials)]
        lanes = side_by_side([walk.begin(prefix) for prefix in prefixes_of(walk, 7)])
        walked = lanes
        for i in ids:
            walked = walk.advance(walk.reopened(walked), mx.full((LANES,), int(i), mx.int32))
        for name, array in walk.read(lanes, ids)._asdict().items():
            assert np.array_equal(np.array(array), np.array(getattr(walked, name))), name
            assert array.dtype == getattr(walked, name).dtype
        begun = walk.begin(np.append(tokenizer.bos_id, ids)).moments()[0]
        one = beginning(walk.grammar)
        for i in ids:
            one = one if walk.grammar.allowed[one.state].any() else one._replace(state=walk.grammar.start)
            one = all_after(walk.grammar, one, walk.tables.flat([i]))
        assert equal(begun._replace(ticks=one.ticks), one)


def music_of(tokenizer, seed: int):
    return music_for(next(name for name in NAMES if vocabulary(name) is tokenizer), seed)


@pytest.mark.slow
def test_before_each_equals_advancing(walk):
    for prefix in prefixes_of(walk, 8)[:3]:
        state, rng = walk.begin(prefix), np.random.default_rng(9)
        ids, expected = [], [state]
        for _ in range(15):
            allowed = np.array(walk.allowed(expected[-1], walk.bounds(Limits(), expected[-1])))[0]
            ids.append(int(rng.choice(np.flatnonzero(allowed))))
            expected.append(walk.advance(expected[-1], mx.array(ids[-1:])))
        for name, array in walk.before_each(state, np.array(ids))._asdict().items():
            together = np.concatenate([np.array(getattr(p, name)) for p in expected])
            assert np.array_equal(np.array(array), together), name


def test_encoded_music_obeys_the_grammar(walk):
    """All checks accept what the tokenizer makes."""
    tokenizer = walk.tokenizer
    for seed in range(2):
        ids = tokenizer.encode_notes(music_of(tokenizer, seed))
        assert first_violation(walk.grammar, events_of(walk, ids)) is None
        begin = len(tokenizer.prompt(np.empty(0, np.int64)))
        lead, ids = ids[:begin], ids[begin:].astype(np.int64)
        state = walk.before_each(walk.begin(lead), ids).take(range(len(ids)))
        allowed = walk.allowed(state, walk.bounds(MIDDLE, walk.begin(lead)))
        assert np.take_along_axis(np.array(allowed), ids[:, None], axis=1).all()
    assert may_follow(walk.grammar, beginning(walk.grammar), int(events_of(walk, ids[:1])[0]))
