"""Canon layers: what a token sees through them, their gradient, and their part of the recurrent state."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.dense_reference import canon, visibility
from support.music import V, random_tokens
from support.recipe import RECIPE, randomized
from support.stand_ins import tiny_model

from dsmr_mlx import DSMR, ModelConfig
from dsmr_mlx.model.canon import Canon
from dsmr_mlx.model.horizons import HorizonSchedule, table


def sees(S: int, horizons: list[int], parallel: bool) -> np.ndarray:
    """`(T, T)` bool: which tokens may influence the logits after a token.

    Attention sees what the masks say. Each convolution extends that by 3: it reads what stands at its own position and
    the three before.
    """
    T = 2 * S + sum(HorizonSchedule.custom(horizons).reach(S, canon=True)[-1:])
    t = np.arange(T)
    near = (t[None] <= t[:, None]) & (t[:, None] - t[None] <= 3)
    seen = np.eye(T, dtype=bool)
    for horizon in horizons:
        attended = visibility(T, S, horizon) @ near @ seen
        seen = attended | near @ seen if parallel else near @ attended
    return seen


@pytest.mark.parametrize(
    ("S", "horizons", "parallel"),
    [(8, [5], False), (8, [5], True), (4, [0, 0], False), (2, [3], False), (1, [2, 1], False), (4, [6, 3], True)],
)
def test_a_token_sees_what_horizons_and_convolutions_reach(S, horizons, parallel):
    """Changing a token changes the logits after exactly these tokens."""
    expected = sees(S, horizons, parallel)
    T = len(expected)
    model = tiny_model(
        V, horizons=tuple(horizons), segment_length=S, canon=True, parallel_residual=parallel, head_dim=8, n_kv_heads=1
    )
    tokens = np.repeat(random_tokens(0, 1, T), T + 1, axis=0)
    tokens[np.arange(T), np.arange(T)] = (tokens[np.arange(T), np.arange(T)] + 1) % V  # lane p has another token p
    # One by one: the rows of one matrix product may round differently.
    logits = np.concatenate([np.array(model(mx.array(row[None]))[0]) for row in tokens])
    changed = (logits[:T] != logits[T:]).any(axis=-1)  # (token, position)
    np.testing.assert_array_equal(changed.T, expected)


@pytest.mark.parametrize("S", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("horizons", [[0], [5], [7, 3], [4, 0, 9]])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_reach_of_a_schedule_counts_convolutions(S, horizons, parallel):
    """Exact for one layer, else a limit: not all tokens of a segment reach as far as its first."""
    seen = sees(S, horizons, parallel)
    start = len(seen) // S * S - S
    exact = start - np.flatnonzero(seen[start : start + S].any(axis=0))[0]
    reach = HorizonSchedule.custom(horizons).reach(S, canon=True)[-1]
    assert exact <= reach
    if not parallel:
        assert reach <= exact + S * (len(horizons) - 1)


def test_the_gradient_equals_that_of_a_plain_convolution():
    """A chunk in the middle of a segment; in two lanes, one of which began two tokens before it."""
    layer, rng = Canon(6), np.random.default_rng(0)
    layer.weight = mx.array(rng.normal(size=(6, 4)).astype(np.float32))
    before, x, dy = (mx.array(rng.normal(size=(2, n, 6)).astype(np.float32)) for n in (5, 7, 7))
    inputs = mx.concatenate([before, mx.zeros((2, 9, 6))], axis=1)
    known = mx.array(np.arange(10)[:, None] >= np.array([0, 1])[:, None, None])

    def ours(x, weight):
        layer.weight = weight
        y, _ = layer(x, inputs, 2, known)
        return (y * dy).sum()

    def plain(x, weight):
        layer.weight = weight
        whole = [mx.concatenate([before[i, start:], x[i]])[None] for i, start in ((0, 2), (1, 3))]
        return sum((canon(w, layer, w.shape[1] - 7)[0, -7:] * dy[i]).sum() for i, w in enumerate(whole))

    for found, expected in zip(*(mx.grad(f, argnums=(0, 1))(x, layer.weight) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5, rtol=1e-5)


def test_new_models_with_and_without_the_settings_are_equal():
    """Convolutions, skips and zero outputs change nothing until they are trained."""
    shape = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8, "d_ff": 24}
    tokens = mx.array(random_tokens(1, 1, 30))
    mx.random.seed(0)
    plain = DSMR(ModelConfig(**shape, segment_length=8))
    other = DSMR(ModelConfig(**shape, segment_length=8, canon=True, embedding_skip=True))
    other.load_weights(tree_flatten(plain.parameters()), strict=False)
    assert mx.array_equal(plain(tokens)[0], other(tokens)[0])
    empty = DSMR(ModelConfig(**shape, segment_length=8, **RECIPE))
    embedded = empty.embed(tokens)
    np.testing.assert_allclose(empty(tokens)[0], empty.logits(empty.norm(embedded)), atol=1e-6)


def test_the_state_holds_the_inputs():
    plain, model = (tiny_model(V, horizons=(13, 4), segment_length=8, canon=c) for c in (False, True))
    inputs = 2 * 2 * 32 * 4 * 3  # Canon layers, layers, width, bytes, lanes
    for rewindable, slots in ((False, 3 + 8), (True, 3 + 8 + 8)):
        sizes = [m.new_state(3, rewindable=rewindable).nbytes for m in (model, plain)]
        assert sizes[0] - sizes[1] == inputs * slots
    c, schedule = model.config, HorizonSchedule.custom(model.config.horizons)
    heads = {"n_kv_heads": c.n_kv_heads, "head_dim": c.head_dim}
    size = schedule.state_bytes(**heads, segment_length=8, batch_size=3, itemsize=4, canon_size=c.canon_size)
    assert size == model.new_state(3).nbytes
    rows = table(schedule, **heads, segment_length=8, itemsize=4, canon_size=c.canon_size)
    assert sum(row.bytes for row in rows) == schedule.state_bytes(**heads, itemsize=4, canon_size=c.canon_size)
    assert tuple(row.reach for row in rows) == schedule.reach(8, canon=True)


def test_a_step_of_decoding_equals_a_chunk_of_one_token():
    """The pure function that decoding compiles, in a lane that has just begun and in one in the middle of a piece."""
    model = randomized(tiny_model(V, horizons=(13, 4), segment_length=8, **RECIPE))
    _, state = model(mx.array(random_tokens(2, 2, 16)))
    state = state.reset([0]).opened()
    segment, layers = state.segment(), state.layers
    for i, tokens in enumerate(random_tokens(3, 8, 2)):
        hidden, state = model.advance(mx.array(tokens[:, None]), state)
        logits, layers = model.step(mx.array(tokens), layers, mx.array(i, mx.int32), segment)
        assert mx.array_equal(logits, model.logits(hidden[:, -1]))
    for ours, theirs in zip(layers, state.layers, strict=True):
        assert ours.keys() == theirs.keys() == {"keys", "values", "attention_canon", "feed_forward_canon"}
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
