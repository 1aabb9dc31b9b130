"""Loops against brute force; likelihoods against generation one token at a time."""

import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.music import random_notes
from support.stand_ins import PlainTokenizer, tiny_model

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation import grammar
from dsmr_mlx.generation.generate import finish, generate_variations, make_limits
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.ranking import Score, best, score, token_nats
from dsmr_mlx.generation.steering import MaxPolyphony
from dsmr_mlx.music.loops import Loop, repeats, worst_loop
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_ON,
    TIME_SHIFT,
    VOCAB_SIZE,
    PerformanceTokenizer,
    encode_notes,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()
G = performance_grammar()
NOTES = (G.press >= 0).astype(int)
NOTHING_KNOWN = np.zeros(8, int)


def slow_worst_loop(ids: list[int], notes: np.ndarray, longest: int) -> Loop | None:
    """Try every cycle at every place."""
    known = notes.any()
    found = []
    for start in range(len(ids)):
        for cycle in range(1, min(longest, len(ids) - start) + 1):
            copies = 1
            while ids[start + copies * cycle : start + (copies + 1) * cycle] == ids[start : start + cycle]:
                copies += 1
            if copies > 1 and (not known or notes[ids[start : start + cycle]].any()):
                found.append((-copies, -cycle, start))
    if not found:
        return None
    copies, cycle, start = min(found)
    return Loop(-cycle, -copies, start)


pressing = np.array([1, 2, 0, 0, 0, 0, 0, 0])
few_ids = st.lists(st.integers(0, 3), max_size=30) | st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5).map(
    lambda cycles: [i for cycle in cycles for i in 3 * cycle]
)


@given(few_ids, st.integers(1, 9), st.sampled_from([NOTHING_KNOWN, pressing]))
def test_the_worst_loop_equals_brute_force(ids, longest, notes):
    found = worst_loop(np.array(ids, np.int64), notes, longest)
    expected = slow_worst_loop(ids, notes, longest)
    if found is None or expected is None:
        assert found == expected
        return
    assert (found.length, found.copies) == (expected.length, expected.copies)
    cycle = ids[found.start : found.start + found.length]
    assert ids[found.start : found.start + found.length * found.copies] == cycle * found.copies


@given(few_ids, st.integers(1, 40))
def test_repeats_are_complete_and_maximal(ids, cycle):
    starts, lengths = repeats(np.array(ids, np.int64), cycle)
    covered = [i for s, n in zip(starts, lengths, strict=True) for i in range(s, s + n)]
    assert covered == [i for i in range(len(ids) - cycle) if ids[i] == ids[i + cycle]]
    assert all(b > a + n for a, n, b in zip(starts, lengths, starts[1:], strict=False)), "runs do not touch"


def test_a_pattern_is_a_loop_and_a_long_pause_is_not():
    second = TIME_SHIFT + 99
    assert worst_loop(np.array([NOTE_ON + 60, *[second] * 50]), NOTES) is None
    pattern = [NOTE_ON + 60, TIME_SHIFT + 20, NOTE_ON + 188, TIME_SHIFT + 3]
    assert worst_loop(np.array([second, *pattern * 5]), NOTES) == Loop(4, 5, 1)
    assert worst_loop(np.array(pattern), NOTES) is None
    assert worst_loop(np.array([], np.int64), NOTES) is None


def test_loops_of_sixty_thousand_ids_are_found_quickly():
    ids = np.random.default_rng(0).integers(NOTE_ON, VOCAB_SIZE, 60_000)
    ids[30_000:30_640] = np.tile(ids[30_000:30_064], 10)
    began = time.perf_counter()
    found = worst_loop(ids, NOTES)
    assert time.perf_counter() - began < 1
    assert (found.length, found.copies) == (64, 10)


def reader(model, prompt: np.ndarray, tokenizer=TOKENIZER) -> Player:
    player = Player(model, tokenizer)
    player.read(prompt)
    return player


def slow_nats(model, limits: Limits, prompt: np.ndarray, ids: np.ndarray) -> list[float]:
    """One token at a time, in float64."""
    walk, state, nats = GrammarWalk(TOKENIZER), model.new_state(1), []
    music = walk.begin(prompt)
    bounds = walk.bounds(limits, music)
    logits, state = model(mx.array([[BOS, *prompt.tolist()]]), state)
    for i in ids.tolist():
        allowed = np.array(walk.allowed(music, bounds))[0]
        row = np.array(logits[0, -1], np.float64)[allowed]
        nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - float(logits[0, -1, i].item()))
        logits, state = model(mx.array([[i]]), state)
        music = walk.advance(music, mx.array([i]))
    return nats


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"tokens": 40}, {"seconds": 2.0}, {"tokens": 50, "may_end": True}])
@pytest.mark.parametrize("steered", [(), (MaxPolyphony(2),)], ids=["free", "steered"])
def test_nats_equal_those_of_single_steps(model, asked, steered, monkeypatch):
    monkeypatch.setattr(grammar, "RELEASE_TOKENS", 4)  # keys that are down are released soon
    prompt = encode_notes(random_notes(0, 40))[:61]
    report = generate_variations(model, TOKENIZER, 2, prompt=prompt, seed=1, processors=steered, **asked)
    limits = make_limits(TOKENIZER, asked.get("seconds"), asked.get("tokens"), asked.get("may_end", False))
    player = reader(model, prompt)
    before = [np.array(array) for array in player.state.arrays]
    for variation in report.variations:
        scored = score(player, variation.ids, limits)
        assert variation.ids[-1] == EOS
        assert scored.tokens in (len(variation.ids), len(variation.ids) - 1)
        kept = variation.ids[: scored.tokens]
        expected = slow_nats(model, limits, prompt, kept)
        np.testing.assert_allclose(token_nats(player, kept, limits), expected, rtol=1e-4, atol=1e-4)
        assert scored.nats == pytest.approx(sum(expected), rel=1e-4)
        assert scored.notes == (G.press[variation.ids] >= 0).sum() > 0
        assert scored.nats_per_note == scored.nats / scored.notes
        assert scored.loop == worst_loop(kept, NOTES)
    assert player.position == 62
    assert all(np.array_equal(old, np.array(new)) for old, new in zip(before, player.state.arrays, strict=True))


def test_a_player_that_has_played_scores_from_its_position(model):
    player = reader(model, encode_notes(random_notes(0, 40))[:30])
    played = [int(token[0]) for _, token in zip(range(25), player.play(Limits(tokens=900)), strict=False)]
    ids = [int(token[0]) for _, token in zip(range(20), player.branch(1).play(Limits(tokens=900)), strict=False)]
    expected = slow_nats(
        model, Limits(tokens=900), np.array([*encode_notes(random_notes(0, 40))[:30], *played]), np.array(ids)
    )
    np.testing.assert_allclose(token_nats(player, ids, Limits(tokens=900)), expected, rtol=1e-4, atol=1e-4)


def test_an_eos_after_a_removed_pause_is_not_scored(model):
    """The limit may end the piece after a pause; if `finish` removes it, the EOS is not allowed there."""
    player, limits = Player(model, TOKENIZER), Limits(ticks=100)
    note = encode_notes(Notes.sorted([0.0], [0.5], [60], [64])).astype(np.int64)
    whole = np.array([*note, TIME_SHIFT + 49, EOS])
    cut = finish(player.walk, whole)
    assert cut.tolist() == [*note, EOS]
    scored = score(player, cut, limits)
    assert scored.tokens == len(note)
    assert np.isfinite(scored.nats)
    assert score(player, whole, limits).tokens == len(whole)


def test_an_id_that_is_not_allowed_is_named(model):
    with pytest.raises(UserError, match="`ids`: NOTE_ON_60 is not allowed at index 2"):
        token_nats(Player(model, TOKENIZER), [360, NOTE_ON + 60, NOTE_ON + 60])


def test_scoring_after_the_last_learned_position_is_refused():
    class WithoutEnd(PlainTokenizer):
        eos_id = None

    player = Player(tiny_model(vocab_size=10, max_positions=20, rope_dims=0, horizons=(16, 8)), WithoutEnd())
    assert len(list(player.play(Limits(tokens=1000)))) == 20
    message = "`player`: nothing can follow its 21 tokens, the learned positions are used up"
    with pytest.raises(UserError, match=message):
        token_nats(player, [3])


def test_scores_without_a_grammar():
    tokenizer, model = PlainTokenizer(), tiny_model(vocab_size=10)
    report = generate_variations(model, tokenizer, 2, prompt=[3, 4], tokens=30)
    for variation in report.variations:
        scored = score(reader(model, np.array([3, 4]), tokenizer), variation.ids, Limits(tokens=30))
        assert 0 <= scored.nats < np.inf
        assert (scored.tokens, scored.notes, scored.nats_per_note) == (31, 0, np.inf)
        assert scored.to_dict()["nats_per_note"] is None


def test_the_best_are_the_most_likely_without_loops():
    loop, twice = Loop(4, 4, 0), Loop(60, 3, 0)
    scores = [Score(10, 9, 10, loop), Score(30, 9, 10, None), Score(20, 9, 10, twice), Score(5, 9, 0, None)]
    assert [s.loops for s in scores] == [True, False, False, False]
    assert best(scores, 4) == [2, 1, 3, 0]
    assert best(scores, 1) == [2]
    assert scores[2].to_dict() == {
        "nats": 20, "tokens": 9, "notes": 10, "loop": {"length": 60, "copies": 3, "start": 0},
        "nats_per_note": 2.0, "loops": False,
    }  # fmt: skip
    assert BOS not in best(scores, 0)
