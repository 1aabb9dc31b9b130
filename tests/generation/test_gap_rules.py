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
from dsmr_mlx.generation.steering import MaxNoteSeconds, MaxPolyphony
from dsmr_mlx.music.notes import Notes
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
@given(seed=st.integers(0, 1000), silent=st.integers(0, 60), data=st.data())
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
    held = tuple((pitch, silent + data.draw(st.integers(1, 90))) for pitch in down)
    lanes = [[], []]
    for step in player.play(Limits(ticks=200, silent=silent, held=held)):
        for lane, token in zip(lanes, step.tolist(), strict=True):
            lane.append(token)
        if min(player.ticks) - before.ticks > 150:
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


def played_under_a_pedal(name: str, processors: list, seed: int) -> list[tuple[int, int, bool]]:
    """The key events of three seconds in which two keys, down for longer than any limit, are kept down."""
    tokenizer = vocabulary(name)
    model = MODELS.setdefault(name, tiny_model(tokenizer.vocab_size))
    notes = Notes([0.0, 0.0, 8.0], [30.0, 30.0, 8.1], [36, 43, 60], [70, 70, 70])
    events = tokenizer.to_events(tokenizer.encode_notes(notes))
    g = tokenizer.event_grammar()
    player = Player(model, tokenizer, seed=seed, processors=processors)
    player.read(tokenizer.from_events(events[: np.flatnonzero(g.release[events] == 60)[0] + 1]))
    before, lane = player.moments[0], []
    assert sorted(np.flatnonzero(before.sounding)) == [36, 43]
    ticks = round(3 / g.seconds_per_tick)
    for step in player.play(Limits(ticks=ticks, held=((36, 2 * ticks), (43, 2 * ticks)))):
        lane.append(int(step[0]))
        if player.ticks[0] - before.ticks >= ticks or len(lane) > 2000:
            break
    return [move for move in key_moves(player, lane, before) if move[0] < ticks]


@pytest.mark.parametrize("name", HELD)
def test_keys_that_are_kept_down_are_no_overdue_notes(name):
    """A limit on the length of notes is about the passage: it does not hurry because of the bass below it."""
    for seed in range(3):
        moves = played_under_a_pedal(name, [MaxNoteSeconds(0.5)], seed)
        tick, down, lengths = vocabulary(name).event_grammar().seconds_per_tick, {}, []
        for time, pitch, pressed in moves:
            if pressed:
                down[pitch] = time
            else:
                lengths.append((time - down.pop(pitch)) * tick)
        assert max(lengths) <= 0.5 + 1e-6
        assert np.median(lengths) > 2 * tick


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_a_limit_on_keys_holds_above_keys_that_are_kept_down(name, keys):
    """If they are as many as the limit allows, nothing is played: no pause ends where only a key could follow."""
    for seed in range(3):
        moves = played_under_a_pedal(name, [MaxPolyphony(keys)], seed)
        down = np.cumsum([1 if pressed else -1 for _, _, pressed in moves])
        assert down.max(initial=0) == (1 if keys == 3 else 0)


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
