"""Rewinding a recurrent state: the logits after it are bitwise those of a state that never went further."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.music import V, random_tokens
from support.recipe import RECIPE
from support.stand_ins import tiny_model

from dsmr_mlx import UserError
from dsmr_mlx.model import state
from dsmr_mlx.model.state import RecurrentState


def make_model(horizons, S, **options):
    return tiny_model(
        V, horizons=tuple(horizons), segment_length=S, d_model=16, d_ff=24, n_heads=2, head_dim=8, **options
    )


def feed(model, tokens: np.ndarray, memory: RecurrentState, chunk: int = 1) -> tuple[np.ndarray, RecurrentState]:
    """Logits `(B, T, V)` of tokens fed in chunks, which do not cross segments."""
    logits, done = [np.zeros((len(tokens), 0, V), np.float32)], 0
    while done < tokens.shape[1]:
        n = min(chunk, memory.segment_room, tokens.shape[1] - done)
        out, memory = model(mx.array(tokens[:, done : done + n]), memory)
        logits.append(np.array(out))
        done += n
    return np.concatenate(logits, axis=1), memory


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@example(S=2, horizons=[0], T=2, chunk=2, back=0.5, options={})  # chunks of one and of two tokens
@given(
    S=st.integers(1, 7),
    horizons=st.lists(st.one_of(st.sampled_from([0, 1, 7, 14]), st.integers(0, 24)), min_size=1, max_size=2),
    T=st.integers(1, 36),
    chunk=st.integers(1, 7),
    back=st.floats(0, 1),
    options=st.sampled_from([{}, RECIPE]),
)
def test_rewind_is_bitwise(S, horizons, T, chunk, back, options):
    """For any horizons, position and chunks, logits equal those of a state that never went further.

    Bitwise if that state read the same chunks; products of fewer rows may round differently.
    """
    model, tokens = make_model(horizons, S, **options), random_tokens(T, 2, T)
    _, there = feed(model, tokens[:, :T], model.new_state(2, rewindable=True), chunk)
    n = round(back * (T - there.earliest))
    assert T - there.earliest >= min(T, S)
    rewound = there.rewound(n)
    assert rewound.steps == T - n
    assert rewound.position.tolist() == [T - n] * 2
    _, then = feed(model, tokens[:, : T - n], model.new_state(2), chunk)
    future = random_tokens(T + 1, 2, 16)
    found, expected = (feed(model, future, memory)[0] for memory in (rewound, then))
    same_chunks = (T - n) % S % chunk == 0 or n == 0
    np.testing.assert_allclose(found, expected, *((0, 0) if same_chunks else (1e-5, 1e-5)))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    S=st.integers(1, 6),
    moves=st.lists(st.integers(-12, 15), min_size=1, max_size=12),
    options=st.sampled_from([{}, RECIPE]),
)
def test_repeated_rewinds(S, moves, options):
    """After any sequence of rewinds and other tokens, only the tokens that were kept count."""
    model = make_model([13, 4], S, **options)
    kept, seed = np.zeros((1, 0), np.int64), 0
    memory = model.new_state(1, rewindable=True)
    for move in moves:
        if move < 0:
            n = min(-move, memory.steps - memory.earliest)
            memory, kept = memory.rewound(n), kept[:, : kept.shape[1] - n]
        else:
            seed += 1
            new = random_tokens(seed, 1, move)
            _, memory = feed(model, new, memory)
            kept = np.concatenate([kept, new], axis=1)
    future = random_tokens(99, 1, 20)
    expected = feed(model, np.concatenate([kept, future], axis=1), model.new_state(1))[0][:, kept.shape[1] :]
    np.testing.assert_array_equal(feed(model, future, memory)[0], expected)


def test_invalid_rewinds():
    model = make_model([9], 4)
    _, memory = feed(model, random_tokens(0, 1, 11), model.new_state(1, rewindable=True))
    assert memory.earliest == 4
    for n in (8, -1):
        with pytest.raises(ValueError, match=rf"`n` {n}: expected 0 to 7 tokens"):
            memory.rewound(n)
    assert memory.rewound(7).earliest == 4, "the last evicted entries are back, those before are lost"
    _, plain = feed(model, random_tokens(0, 1, 11), model.new_state(1))
    assert plain.earliest == 8


def test_a_rewind_ends_where_a_piece_begins():
    model = make_model([9], 4)
    _, memory = feed(model, random_tokens(0, 1, 8), model.new_state(1, rewindable=True))
    _, memory = feed(model, random_tokens(1, 1, 3), memory.reset())
    assert memory.steps - memory.earliest == 3
    assert memory.rewound(3).position.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4, 9, 11])
def test_rewind_past_a_rebasing(monkeypatch, n):
    """The keys stay re-based, and the inputs of convolutions as they were; logits are equal up to rounding."""
    monkeypatch.setattr(state, "rebase_interval", lambda config: 48)
    model, tokens = make_model([13, 4], 8, **RECIPE), random_tokens(3, 2, 51)
    _, there = feed(model, tokens, model.new_state(2, rewindable=True))
    assert there.rebased.tolist() == [48, 48]
    rewound = there.rewound(n)
    future = random_tokens(4, 2, 30)
    _, then = feed(model, tokens[:, : 51 - n], model.new_state(2))
    np.testing.assert_allclose(feed(model, future, rewound)[0], feed(model, future, then)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "back"), [(0, 0), (3, 0), (8, 0), (19, 2), (19, 3), (19, 6)])
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_saved_and_loaded_state_can_be_rewound(T, back, options):
    model, tokens = make_model([13, 4, 0], 8, **options), random_tokens(5, 2, T)
    _, memory = feed(model, tokens, model.new_state(2, rewindable=True))
    memory = memory.rewound(back)
    loaded = RecurrentState.from_arrays(model.config, memory.to_arrays())
    assert (loaded.steps, loaded.filled, loaded.earliest) == (memory.steps, memory.filled, memory.earliest)
    future = random_tokens(6, 2, 20)
    for n in {0, memory.steps - memory.earliest}:
        expected = feed(model, future, memory.rewound(n))[0]
        np.testing.assert_array_equal(feed(model, future, loaded.rewound(n))[0], expected)


def test_stored_evicted_entries_are_checked():
    model = make_model([13, 4], 8)
    arrays = model.new_state(2, rewindable=True).to_arrays()
    arrays["evicted.1.keys"] = arrays["evicted.1.keys"][:, :, 1:]
    with pytest.raises(UserError, match=r"state: evicted\.1 has shape \(2, 2, 7, 8\), expected \(2, 2, 8, 8\)"):
        RecurrentState.from_arrays(model.config, arrays)
    del arrays["filled"]
    arrays["evicted.1.keys"] = arrays["evicted.1.values"]
    with pytest.raises(UserError, match="recurrent state: 'filled' is missing"):
        RecurrentState.from_arrays(model.config, arrays)


def test_lanes_rewind_together_and_alone():
    model, tokens = make_model([13, 4], 8), random_tokens(7, 3, 21)
    _, memory = feed(model, tokens, model.new_state(3, rewindable=True))
    future = random_tokens(8, 1, 12)
    alone = memory.take([2]).rewound(7)
    expected = feed(model, np.repeat(future, 3, axis=0), memory.rewound(7))[0][2:]
    np.testing.assert_allclose(feed(model, future, alone)[0], expected, atol=2e-5, rtol=2e-5)


def test_rewindable_state_takes_one_more_segment():
    model = make_model([13, 4], 8)
    plain, rewindable = model.new_state(2), model.new_state(2, rewindable=True)
    per_token = 2 * 2 * 8 * 4 * 2  # keys and values, heads, head dimension, bytes, lanes
    assert rewindable.nbytes - plain.nbytes == 2 * 8 * per_token
    _, later = feed(model, random_tokens(9, 2, 60), rewindable, 8)
    assert later.nbytes == rewindable.nbytes


def test_reset_prevents_rewinding_past_it():
    model = make_model([13, 4], 8)
    _, memory = feed(model, random_tokens(10, 2, 20), model.new_state(2, rewindable=True))
    assert memory.earliest == 8
    memory.reset()
    assert memory.earliest == memory.steps == 0
