"""While a gap is filled, held keys keep their ends and no key moves before it begins, in every vocabulary with keys."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import random_notes
from support.stand_ins import tiny_model
from support.vocabularies import music_for, vocabulary

from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.tokenizers.performance import (
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    PerformanceTokenizer,
    encode_notes,
)

TOKENIZER = PerformanceTokenizer()
HELD = ("performance", "performance bpe", "MIDILike unigram")


def key_moves(player: Player, ids: list[int], before) -> list[tuple[int, int, bool]]:
    """The (tick, pitch, pressed) of all key events of `ids`, counted from the moment `before`."""
    g = player.walk.grammar
    events = player.walk.tables.flat(np.array(ids, np.int64))
    ticks = g.elapsed(events, before.phase)
    moves = [(t, max(g.press[e], g.release[e]), g.press[e] >= 0) for t, e in zip(ticks, events, strict=True)]
    return [(int(t), int(pitch), bool(down)) for t, pitch, down in moves if pitch >= 0]


@pytest.mark.parametrize("name", HELD)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), silent=st.integers(0, 150), data=st.data())
def test_held_keys_are_released_on_time_and_nothing_moves_before_the_gap(name, seed, silent, data):
    tokenizer = vocabulary(name)
    model = MODELS.setdefault(name, tiny_model(tokenizer.vocab_size))
    events = tokenizer.to_events(tokenizer.encode_notes(music_for(name, seed, 12)))
    g = tokenizer.event_grammar()
    acts = np.flatnonzero((g.press[events] >= 0) | (g.release[events] >= 0))
    after_note = np.flatnonzero(g.begins[events] | (g.release[events] >= 0))
    place = data.draw(st.sampled_from(after_note.tolist() or acts.tolist())) + 1
    player = Player(model, tokenizer, n=2, seed=seed)
    player.read(tokenizer.from_events(events[:place]))
    before = player.moments[0]
    down = np.flatnonzero(before.sounding).tolist()
    held = tuple((pitch, silent + data.draw(st.integers(1, 200))) for pitch in down)
    lanes = [[], []]
    for step in player.play(Limits(ticks=300, silent=silent, held=held)):
        for lane, token in zip(lanes, step.tolist(), strict=True):
            lane.append(token)
        if min(player.ticks) - before.ticks > 250:
            break
    for lane in lanes:
        moves = key_moves(player, lane, before)
        assert all(tick >= silent for tick, _, _ in moves)
        last = int(g.elapsed(player.walk.tables.flat(np.array(lane)), before.phase)[-1])
        for pitch, end in held:
            own = [(tick, pressed) for tick, key, pressed in moves if key == pitch]
            if last > end:
                assert own[:1] == [(end, False)]
            assert all(tick > end for tick, _ in own[1:])


MODELS: dict = {}


def test_waiting_for_a_release_has_the_probability_of_waiting_longer():
    walk = GrammarWalk(TOKENIZER)
    ids = encode_notes(random_notes(0, 9, lengths=(80, 90)))[:2]  # a velocity and a key that is down
    music = walk.begin(ids)
    pitch = int(ids[1]) - NOTE_ON
    logits = mx.array(np.random.default_rng(0).normal(size=(1, TOKENIZER.vocab_size)).astype(np.float32))
    free = np.array(walk.possible(logits, music, walk.bounds(Limits(), music)))[0]
    bound = np.array(walk.possible(logits, music, walk.bounds(Limits(held=((pitch, 30),)), music)))[0]
    shifts = np.arange(TIME_SHIFT, VELOCITY)
    expected = np.exp(free)
    expected[TIME_SHIFT + 29] = expected[shifts[29:]].sum()
    expected[shifts[30:]] = 0
    expected[NOTE_OFF + pitch] = 0
    np.testing.assert_allclose(np.exp(bound), expected, rtol=1e-5)


def test_a_key_that_is_due_is_released_first_and_not_pressed_again_at_once():
    walk = GrammarWalk(TOKENIZER)
    prefix = [VELOCITY + 9, NOTE_ON + 60, NOTE_ON + 64, TIME_SHIFT + 9]
    begun = walk.begin(np.array(prefix[:3]))
    bounds = walk.bounds(Limits(held=((60, 10),)), begun)

    def allowed(ids: list[int]) -> set[int]:
        music = walk.read(begun, np.array(ids, np.int64))
        logits = np.array(walk.possible(mx.zeros((1, TOKENIZER.vocab_size)), music, bounds))[0]
        return set(np.flatnonzero(logits > -np.inf).tolist())

    assert allowed(prefix[3:]) == {NOTE_OFF + 60, NOTE_OFF + 64}
    after = allowed([TIME_SHIFT + 9, NOTE_OFF + 60])
    assert NOTE_ON + 60 not in after
    assert NOTE_ON + 61 in after
    assert NOTE_ON + 60 in allowed([TIME_SHIFT + 9, NOTE_OFF + 60, TIME_SHIFT])
    assert NOTE_OFF + 60 in allowed([TIME_SHIFT + 9, NOTE_OFF + 60, TIME_SHIFT, NOTE_ON + 60, TIME_SHIFT + 3])


def test_a_gap_that_begins_later_has_one_pause_before_it():
    """A rest may not follow a rest: a pause that ends too early would leave nothing to play."""
    walk = GrammarWalk(TOKENIZER)
    music = walk.begin(np.array([VELOCITY + 9, NOTE_ON + 60]))
    for silent, expected in ((30, range(30, 101)), (130, [100])):
        bounds = walk.bounds(Limits(silent=silent), music)
        logits = np.array(walk.possible(mx.zeros((1, TOKENIZER.vocab_size)), music, bounds))[0]
        assert np.flatnonzero(logits > -np.inf).tolist() == [TIME_SHIFT + ticks - 1 for ticks in expected]
