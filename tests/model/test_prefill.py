"""Reading only what the end depends on leaves the same state, bit by bit, as reading everything in every layer."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stand_ins import tiny_model

from dsmr_mlx.model import state as state_module
from dsmr_mlx.model.prefill import prefill, segments_needed

V = 40


def read_by_all(model, ids: np.ndarray, state):
    """The state and the last logits after every layer has read every token."""
    done = 0
    while done < len(ids):
        n = min(state.segment_room, len(ids) - done)
        chunk = mx.broadcast_to(mx.array(ids[None, done : done + n], mx.int32), (state.batch_size, n))
        hidden, state = model.advance(chunk, state)
        mx.eval(state.arrays)
        done += n
    return state, model.logits(hidden[:, -1])


def read(model, ids: np.ndarray, state):
    """The same with `prefill`, and the numbers of tokens after each chunk."""
    steps = []
    for after, last in prefill(model, ids, state):
        state, hidden = after, last
        mx.eval(state.arrays)
        steps.append(state.steps)
    return state, model.logits(hidden[:, -1]), steps


def assert_same(state, other) -> None:
    """All arrays and counts are equal, bitwise."""
    arrays, expected = state.to_arrays(), other.to_arrays()
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.array(array), np.array(expected[name]), err_msg=name)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    horizons=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    S=st.integers(1, 9),
    recipe=st.booleans(),
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    lanes=st.integers(1, 2),
    interval=st.sampled_from([32, 64, 8192]),
)
def test_the_state_is_that_of_reading_everything(horizons, S, recipe, lengths, lanes, interval):
    """With any horizons, segments, earlier music and re-basings; and so are the states that it can be rewound to."""
    options = {"canon": True, "value_residual": True, "embedding_skip": True, "n_kv_heads": 1} if recipe else {}
    model = tiny_model(V, horizons=tuple(horizons), segment_length=S, **options)
    rng = np.random.default_rng(len(horizons) + S)
    state, other = (model.new_state(lanes, rewindable=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state_module, "rebase_interval", lambda config: max(interval, 20 + 2 * S))
        for length in lengths:
            ids = rng.integers(0, V, length)
            state, logits, _ = read(model, ids, state)
            other, expected = read_by_all(model, ids, other)
            np.testing.assert_array_equal(np.array(logits), np.array(expected))
            assert_same(state, other)
            n = state.steps - other.earliest
            assert_same(state.rewound(n), other.rewound(n))


def test_the_time_to_read_has_a_bound():
    """However long the music, as many tokens are read; few of them by the upper layers."""
    model = tiny_model(V, horizons=(64, 32, 16, 16), segment_length=16)
    needed, ids = segments_needed(model.config), np.arange(10_000) % V
    assert needed == (8, 4, 2, 1)
    for length in (1_000, 5_000, 10_000):
        _, _, steps = read(model, ids[:length], model.new_state(1, rewindable=True))
        assert len(steps) <= needed[0] + 2
        assert steps[-1] == length


def test_a_long_memory_reads_everything():
    model = tiny_model(V, horizons=(600, 600), segment_length=16)
    chunks = list(prefill(model, np.arange(500) % V, model.new_state(1)))
    assert all(hidden is not None for _, hidden in chunks)
    assert len(chunks) == 32


@pytest.mark.parametrize("canon", [False, True])
def test_fewer_segments_would_change_something(canon, monkeypatch):
    """No layer reads more than it needs: its memory is right only with the oldest of the segments that it reads."""
    model = tiny_model(V, horizons=(32, 16, 16), segment_length=16, canon=canon)
    needed, ids = segments_needed(model.config), np.random.default_rng(0).integers(0, V, 400)
    expected, _ = read_by_all(model, ids, model.new_state(1, rewindable=True))
    for layer in range(3):
        fewer = tuple(n - (i == layer) for i, n in enumerate(needed))
        monkeypatch.setattr("dsmr_mlx.model.prefill.segments_needed", lambda config, fewer=fewer: fewer)
        state, _, _ = read(model, ids, model.new_state(1, rewindable=True))
        with pytest.raises(AssertionError):
            assert_same(state, expected)
