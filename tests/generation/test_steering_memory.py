"""Processors' states: the same for a prompt, for music read at once, and token by token."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.random_lanes import TOKENIZER, side_by_side
from support.vocabularies import figures, music_for, vocabulary

from dsmr_mlx.generation.grammar import GrammarState, GrammarWalk
from dsmr_mlx.generation.next_token import NextToken, TokenOrigin
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.generation.steering import (
    Density,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    MaxSilenceSeconds,
    PitchChoice,
)
from dsmr_mlx.generation.steering.constraints import HeldSince
from dsmr_mlx.generation.steering.spans import note_ends
from dsmr_mlx.tokenizers.event_grammar import beginning
from dsmr_mlx.tokenizers.performance import BOS, NOTE_OFF, NOTE_ON, TIME_SHIFT, VELOCITY
from dsmr_mlx.tokenizers.token_tables import TokenTables, compose

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

PROCESSORS = [
    *(MaxNoteSeconds(0.7), MaxSilenceSeconds(0.6), PitchChoice(0.9, 0.4, 20.0)),
    *(Density(5.0, 1.5), LoopPenalty(1.0, max_cycle=7)),
]
VOCABULARIES = ["performance", "performance bpe", "MIDILike unigram", "REMI", "REMI bpe", "aria"]


def assert_same(state: object, expected: object) -> None:
    for (place, array), (_, wanted) in zip(tree_flatten(state), tree_flatten(expected), strict=True):
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype), place
        np.testing.assert_allclose(np.array(array), np.array(wanted), 1e-5, 1e-5, err_msg=place)


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda p: type(p).__name__)
def test_begin_read_and_advance_give_the_same_state(processor, name):
    tokenizer = vocabulary(name)
    walk = GrammarWalk(tokenizer)
    ids = tokenizer.prompt(tokenizer.encode_notes(music_for(name, 1, 25))).astype(np.int64)
    new = np.concatenate([ids[20:50], ids[30:50]])  # a loop, and keys that are pressed while they are down
    prompts = [ids[:1], ids[:20]]
    begun = [processor.begin(walk.tables, np.append(prompt, new)) for prompt in prompts]
    states = side_by_side([processor.begin(walk.tables, prompt) for prompt in prompts])
    lanes = side_by_side([walk.begin(prompt) for prompt in prompts])
    assert_same(processor.read(walk.tables, states, new, lanes.moments()), side_by_side(begun))
    assert_same(processor.read(walk.tables, states, new[:0], lanes.moments()), states)
    for i in new.tolist():
        token = mx.array([i, i])
        lanes = walk.advance(lanes, token)
        states = processor.advance(states, token, lanes)
    assert_same(states, side_by_side(begun))


@pytest.mark.parametrize("name", ["REMI", "TSD", "aria"])
def test_polyphony_by_lengths_is_remembered(name):
    test_begin_read_and_advance_give_the_same_state(MaxPolyphony(3), name)


def test_bars_restart_after_an_end():
    """The first bar after it is written as at the beginning, and its notes end where they should."""
    tokenizer = vocabulary("REMI bpe")
    next_token = NextToken(walk := GrammarWalk(tokenizer), Sampling(), [MaxSilenceSeconds(0.6)], compiled=False)
    (eos,), g = walk.ending, walk.grammar
    prompt = tokenizer.prompt(tokenizer.encode_notes(figures(3, 4)))
    ended = next_token.follow(next_token.begin(prompt), mx.array([int(eos)]), TokenOrigin.DRAWN)
    assert 0 < ended.music.phase.item() < g.bar_ticks
    bars = np.flatnonzero((note_ends(walk.tables)[1] >= 0) & walk.tables.allowed[g.start])
    assert len(bars)
    for i in bars.tolist():
        assert_same(next_token.follow(ended, mx.array([i]), TokenOrigin.READ), next_token.read(ended, np.array([i])))


COMPOUND_IDS = [
    (NOTE_OFF + 60, VELOCITY + 3, NOTE_ON + 60, TIME_SHIFT + 9),  # presses a key again, and waits 10 ticks
    (TIME_SHIFT + 19, VELOCITY + 5, NOTE_ON + 62, TIME_SHIFT + 4, NOTE_ON + 64),  # waits 20 ticks before it presses
]


def held_since(tables: TokenTables, ids: list[int]) -> tuple[HeldSince, HeldSince]:
    """The states after some ids as a prompt and token by token."""
    processor, ids = MaxNoteSeconds(1.0), np.array(ids)
    moments = tables.moments(beginning(tables.grammar), ids)
    lanes = GrammarState.of(moments, np.arange(len(ids) + 1), np.zeros(len(ids) + 1))
    state = processor.begin(tables, ids[:0])
    for i, token in enumerate(ids.tolist()):
        state = processor.advance(state, mx.array([token]), lanes.take([i + 1]))
    return processor.begin(tables, ids), state


def test_a_key_is_held_since_its_last_press_even_within_an_id():
    grammar = TOKENIZER.event_grammar()
    tables = compose(grammar, [*((i,) for i in range(TOKENIZER.vocab_size)), *COMPOUND_IDS])
    again, late = TOKENIZER.vocab_size, TOKENIZER.vocab_size + 1
    for state in held_since(tables, [BOS, VELOCITY + 9, NOTE_ON + 60, TIME_SHIFT + 49, again, late]):
        since = np.array(state.since)[0]
        assert since[60] == 50, "pressed again at 50, not held since 0"
        assert since[62] == 60 + 20
        assert since[64] == 60 + 25
