"""Long memories, attended to in blocks, equal those that are attended to at once, and the dense reference."""

import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.dense_reference import dense_logits
from support.music import V, random_tokens
from support.players import new_player, some_ids, take
from support.recipe import RECIPE, randomized
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import DSMR, ModelConfig
from dsmr_mlx.model import memory_blocks
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.long_attention import View, view_attention
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.trainer import Trainer

S, D = 5, 8


def make_model(**options) -> DSMR:
    defaults = {
        "vocab_size": V, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48,
        "segment_length": 4, "horizons": [27, 13, 2],
    }  # fmt: skip
    mx.random.seed(0)
    model = randomized(DSMR(ModelConfig(**(defaults | options))), 0)
    model.embed.weight = mx.random.normal(model.embed.weight.shape)
    return model.eval()


def loss_and_gradients(model: DSMR, tokens: np.ndarray, state) -> tuple[list[np.ndarray], object]:
    """Logits and all gradients of a segment `(B, S)`, and the state after it."""
    after = []

    def loss_of(model):
        logits, new = model(mx.array(tokens), state)
        after[:] = [logits, new]
        return (logits * logits).mean()

    _, gradients = nn.value_and_grad(model, loss_of)(model)
    logits, new = after
    mx.eval(gradients, logits, new.arrays)
    return [np.array(logits), *(np.array(g) for _, g in tree_flatten(gradients))], new


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_logits_and_gradients_equal_those_at_once(data):
    """Lanes at different positions, wraps of the ring, resets, grouped heads, all settings of the recipe."""
    horizons = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=2))
    options = {"horizons": horizons, "n_layers": len(horizons), "n_kv_heads": data.draw(st.sampled_from([1, 2, 4]))}
    options |= RECIPE if data.draw(st.booleans()) else {}
    model = make_model(**options)
    tokens = random_tokens(1, 3, 36)
    resets = [data.draw(st.lists(st.integers(0, 2), max_size=2, unique=True)) for _ in range(9)]
    sizes = (10**9, 3), (data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9)))
    results = []
    for at_once, block in sizes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory_blocks, "AT_ONCE", at_once)
            patch.setattr(memory_blocks, "BLOCK", block)
            state, found = model.new_state(3), []
            for i in range(9):
                state.reset(resets[i])
                result, state = loss_and_gradients(model, tokens[:, 4 * i : 4 * i + 4], state)
                found.append(result)
        results.append(found)
    for expected, found in zip(*results, strict=True):
        largest = max(np.abs(g).max() for g in expected[1:])
        np.testing.assert_allclose(found[0], expected[0], atol=2e-5, rtol=2e-5)
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert np.abs(a - b).max() < 1e-5 * max(largest, 1e-3)


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
@pytest.mark.parametrize("block", [3, 8])
def test_ragged_chunks_equal_one_dense_masked_pass(long_from, options, block):
    """Past the longest horizon, so that the ring wraps."""
    long_from(2, block)
    model, tokens = make_model(**options), random_tokens(2, 2, 61)
    state, logits = None, []
    for chunk in np.split(tokens, [1, 2, 9, 13, 17, 20, 33, 40, 41, 57], axis=1):
        found, state = model(mx.array(chunk), state)
        logits.append(found)
    expected = np.array(dense_logits(model, tokens))
    np.testing.assert_allclose(np.array(mx.concatenate(logits, axis=1)), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
def test_decoding_steps_equal_one_dense_masked_pass(long_from, options):
    """The step that is compiled for decoding, from an empty memory to one that wraps."""
    long_from(2, 3)
    model, tokens = make_model(**options), random_tokens(3, 2, 60)
    state, logits, widths = model.new_state(2), [], []
    for i in range(60):
        state = state.opened()
        segment = state.segment()
        found, layers = model.step(mx.array(tokens[:, i]), state.layers, mx.array(state.filled, mx.int32), segment)
        state = state.advanced(layers, 1)
        logits.append(found)
        begin, end = segment.places[27]
        widths.append(end - begin - 4)
    expected = np.array(dense_logits(model, tokens))
    np.testing.assert_allclose(np.array(mx.stack(logits, axis=1)), expected, atol=2e-5, rtol=2e-5)
    assert sorted(set(widths)) == [0, 6, 9, 12, 18, 24, 27] == [*dict.fromkeys(widths)]


@pytest.mark.parametrize("at_once", [2, 10_000])
@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
def test_steps_that_leave_out_empty_slots_equal_one_dense_masked_pass(long_from, options, at_once):
    """The step that is not compiled, with long memories and others; of a full memory no mask is left."""
    long_from(at_once)
    model, tokens = make_model(**options), random_tokens(3, 2, 60)
    state, logits, masked = model.new_state(2), [], []
    for i in range(60):
        state = state.opened()
        segment = state.segment(compiled=False)
        found, layers = model.step(mx.array(tokens[:, i]), state.layers, state.filled, segment)
        state = state.advanced(layers, 1)
        logits.append(found)
        masked.append({horizon for horizon, place in segment.places.items() if place is not None})
    expected = np.array(dense_logits(model, tokens))
    np.testing.assert_allclose(np.array(mx.stack(logits, axis=1)), expected, atol=2e-5, rtol=2e-5)
    assert [bool(horizons) for horizons in (masked[0], masked[-1])] == [True, False]


@pytest.mark.parametrize("groups", [1, 3])
def test_bfloat16_is_close_to_float32(long_from, groups):
    long_from(0, 7)
    rng = np.random.default_rng(0)
    shapes = [(2 * groups, S), (2, S), (2, S), (2, 40), (2, 40), (2 * groups, S)]
    arrays = [mx.array(rng.normal(size=(2, heads, n, D)).astype(np.float32)) for heads, n in shapes]
    remembered = rng.random((2, 40)) < 0.5
    results = []
    for dtype in (mx.float32, mx.bfloat16):
        q, k, v, old_keys, old_values, direction = (a.astype(dtype) for a in arrays)
        view = View.of(remembered, 0, S, S, dtype)

        def attend(q, k, v, old=(old_keys, old_values), view=view):
            keys, values = (mx.concatenate(pair, axis=2) for pair in zip(old, (k, v), strict=True))
            return view_attention(q, k, v, keys, values, view)

        def along(q, k, v, attend=attend, direction=direction):
            return (attend(q, k, v) * direction).astype(mx.float32).sum()

        found = [attend(q, k, v), *mx.grad(along, argnums=(0, 1, 2))(q, k, v)]
        assert all(a.dtype == dtype for a in found)
        results.append([np.array(a.astype(mx.float32)) for a in found])
    for exact, rounded in zip(*results, strict=True):
        np.testing.assert_allclose(rounded, exact, atol=0.08, rtol=0.05)


@pytest.mark.parametrize("options", [{}, RECIPE | {"dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=str)
def test_training_with_blocks_gives_the_same_losses(tmp_path, long_from, options):
    corpus = write_corpus(tmp_path / "corpus", notes=60)
    losses = []
    for at_once in (10**9, 4):
        long_from(at_once, 16)
        trainer = Trainer(tiny_config(horizons="custom:100,4", n_heads=4, n_kv_heads=2, **options), corpus)
        losses.append([trainer.train_segment().loss for _ in range(15)])
    np.testing.assert_allclose(*losses, rtol=2e-2 if "dtype" in options else 1e-4)


def test_no_mask_has_a_row_per_query(long_from):
    long_from(20)
    state = make_model(horizons=[64, 64, 20]).new_state(2)
    window = state.window(4)
    assert window.masks.keys() == {20}
    assert window.views.keys() == {64}
    assert window.views[64].memory.shape[1:3] == (1, 1)


@settings(max_examples=100, deadline=None)
@given(
    M=st.integers(1, 60), block=st.integers(1, 70), lanes=st.integers(1, 3), seed=st.integers(0, 99),
    density=st.sampled_from([0, 0.02, 0.5, 1]),
)  # fmt: skip
def test_blocks_contain_each_remembered_slot_once(M, block, lanes, seed, density):
    remembered = np.random.default_rng(seed).random((lanes, M)) < density
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_blocks, "BLOCK", block)
        starts, seen = memory_blocks.filled_blocks(remembered)
        prefix = memory_blocks.filled_prefix(remembered)
    C = min(block, M)
    count = np.zeros((lanes, M), int)
    for i, start in enumerate(starts):
        assert 0 <= start <= M - C
        count[:, start : start + C] += seen[:, i * C : (i + 1) * C]
    np.testing.assert_array_equal(count, remembered)
    assert not remembered[:, prefix:].any()
    assert prefix <= M


def test_views_have_few_sizes():
    """At most a half more than needed, and about two for every doubling."""
    sizes = [memory_blocks.view_size(n, 102) for n in range(103)]
    assert sorted(set(sizes)) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 102]
    assert all(n <= size <= max(1.5 * n, 1) for n, size in enumerate(sizes) if n)


@pytest.fixture
def compilation():
    """Enable compilation for one test, also if MLX_DISABLE_COMPILE disables it for the others."""
    mx.enable_compile()
    yield
    if os.environ.get("MLX_DISABLE_COMPILE"):
        mx.disable_compile()


@pytest.mark.slow
@pytest.mark.usefixtures("compilation")
def test_compiled_training_equals_eager_with_few_graphs(tmp_path, long_from):
    """A graph for each size of the view, and for what is known of Canon layers and the short memory."""
    long_from(8, 16)
    corpus, losses, traced = write_corpus(tmp_path / "corpus", notes=60), [], []
    for compiled in (True, False):
        trainer = Trainer(tiny_config(horizons="custom:200,4", batch_size=2, compile=compiled), corpus)
        function = trainer._accumulate.function

        def counted(*arguments, function=function):
            traced.append(1)
            return function(*arguments)

        if compiled:
            trainer._accumulate = Compiled(counted, compiled=True, lazy=True)
        losses.append([trainer.train_segment().loss for _ in range(60)])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert len(traced) <= 16


def test_a_player_plays_the_same_music(long_from):
    """Reading, decoding over several sizes of the view, rewinding, branching."""
    played = []
    for at_once in (10**9, 8):
        long_from(at_once, 8)
        mx.random.seed(0)
        c = tiny_config(horizons="custom:120,4", n_heads=4, n_kv_heads=2).model_config(PerformanceTokenizer())
        player = new_player(DSMR(c), some_ids(37))
        ids = [take(50, player)]
        player.rewind(11)
        ids.append(take(30, player))
        child = player.branch(2)
        ids.append(take(20, child))
        played.append(ids)
    for ours, theirs in zip(*played, strict=True):
        np.testing.assert_array_equal(ours, theirs)
