"""What the docstring of `DSMR` states, on random weights and configurations, against `dense_reference`."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.dense_reference import dense_logits
from support.memory import active_memory
from support.music import V, random_tokens
from support.recipe import RECIPE, randomized

from dsmr_mlx import DSMR, ModelConfig, UserError
from dsmr_mlx.model import state as state_module
from dsmr_mlx.model.state import RecurrentState, rebase_interval

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LINEAR = {"type": "linear", "factor": 4.0}
# Of the four frequencies of head_dim 8, the first is unscaled, the second interpolated, the others scaled.
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 100}


def make_model(seed: int = 0, **options) -> DSMR:
    defaults = {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 48,
        "segment_length": 8,
        "horizons": [19, 8, 3],
    }
    mx.random.seed(seed)
    model = randomized(DSMR(ModelConfig(**(defaults | options))), seed)
    # Scales of a trained model instead of a new one, so that every term matters.
    for name, module in model.named_modules():
        if name.endswith((".out", ".down")):
            module.weight = module.weight * 2 * model.config.n_layers
        if "bias" in module:
            module.bias = mx.random.normal(module.bias.shape, scale=0.3)
    for name in ("embed", "positions"):
        if name in model:
            model[name].weight = mx.random.normal(model[name].weight.shape)
    return model.eval()


def assert_close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.array(actual), np.array(expected), **(tolerance or TOLERANCE))


def stream(model: DSMR, tokens: np.ndarray, cuts: list[int]) -> mx.array:
    """Logits of a piece fed in chunks that end at `cuts`."""
    state, logits = None, []
    for chunk in np.split(tokens, sorted(set(cuts)), axis=1):
        chunk_logits, state = model(mx.array(chunk), state)
        logits.append(chunk_logits)
    return mx.concatenate(logits, axis=1)


@st.composite
def configurations(draw):
    segment = draw(st.integers(1, 9))
    horizon = st.one_of(st.sampled_from([0, 1, segment, 2 * segment]), st.integers(0, 30))
    kv_heads = draw(st.sampled_from([1, 2]))
    norm = draw(st.sampled_from(["rms", "layer"]))
    head_dim = draw(st.sampled_from([4, 6, 8]))
    rope_dims = draw(st.sampled_from([0, 2, head_dim]))
    return {
        "segment_length": segment,
        "horizons": draw(st.lists(horizon, min_size=1, max_size=3)),
        "n_kv_heads": kv_heads,
        "n_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": head_dim,
        "norm": norm,
        "norm_bias": norm == "layer" and draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "gated": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "output_bias": draw(st.booleans()),
        "feed_forward_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "rope_dims": rope_dims,
        "rope_interleaved": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, LINEAR, LLAMA3])) if rope_dims else None,
        "max_positions": draw(st.sampled_from([None, None, 60, 75])),
        "parallel_residual": draw(st.booleans()),
    } | {name: value for name, value in RECIPE.items() if draw(st.booleans())}


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(options=configurations(), T=st.integers(1, 60), cuts=st.lists(st.integers(1, 59), max_size=12))
def test_chunks_of_any_size_equal_one_dense_masked_pass(options, T, cuts):
    model = make_model(n_layers=len(options["horizons"]), **options)
    tokens = random_tokens(T, 2, T)
    assert_close(stream(model, tokens, [c for c in cuts if c < T]), dense_logits(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("horizons", [[0, 0, 0], [1, 1, 1], [7, 0, 1], [8, 8, 8], [16, 24, 8], [19, 40, 100]])
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_token_by_token_equals_dense(horizons, options):
    model = make_model(horizons=horizons, **options)
    tokens = random_tokens(1, 1, 50)
    assert_close(stream(model, tokens, list(range(1, 50))), dense_logits(model, tokens))


def test_gelu_tanh_equals_reference():
    # nn.gelu_approx keeps fewer digits of sqrt(2/pi), hence the wider tolerance.
    model = make_model(activation="gelu_tanh")
    tokens = random_tokens(2, 1, 20)
    assert_close(model(mx.array(tokens))[0], dense_logits(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"parallel_residual": True},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"max_positions": 40},
        *({name: value} for name, value in RECIPE.items() if name != "zero_init"),
    ],
    ids=str,
)
def test_every_option_changes_the_logits(options):
    """So that comparisons with the reference detect an option that is ignored."""
    tokens = mx.array(random_tokens(25, 1, 40))
    weights = tree_flatten(make_model(max_positions=40, **RECIPE).parameters())
    logits = []
    for chosen in ({}, options):
        model = make_model(**chosen)
        names = {name for name, _ in tree_flatten(model.parameters())}
        logits.append(model.load_weights([(name, a) for name, a in weights if name in names])(tokens)[0])
    assert mx.abs(logits[0] - logits[1])[:, 8:].max() > 0.05


def test_horizons_change_the_logits():
    """Without memory and with full memory the logits differ, so that comparisons with the reference test the mask."""
    tokens = random_tokens(3, 1, 40)
    without, full = (make_model(horizons=[h] * 3)(mx.array(tokens))[0] for h in (0, 64))
    assert_close(without[:, :8], full[:, :8])
    assert mx.abs(without - full)[:, 8:].max() > 0.05


@pytest.mark.parametrize(
    ("segment", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (4, {}),
        (2, {"rope_scaling": LLAMA3, "max_positions": 40, "parallel_residual": True}),
        (3, {"rope_scaling": LINEAR, "rope_dims": 4, "rope_interleaved": True}),
        *((2, {name: value}) for name, value in RECIPE.items()),
        (3, RECIPE),
        (4, RECIPE | {"segment_length": 2, "parallel_residual": True}),
    ],
    ids=str,
)
def test_memory_is_constant_in_the_gradient_of_a_segment(segment, options):
    model = make_model(**options)
    S = model.config.segment_length
    tokens = random_tokens(4, 2, 5 * S)
    targets = mx.array(random_tokens(5, 2, S))
    start, end = segment * S, (segment + 1) * S
    _, state = model(mx.array(tokens[:, :start])) if start else (None, None)

    def streamed(model):
        logits, _ = model(mx.array(tokens[:, start:end]), state)
        return nn.losses.cross_entropy(logits, targets, reduction="sum")

    def reference(model):
        logits = dense_logits(model, tokens[:, :end], constant_before=start)[:, start:]
        return nn.losses.cross_entropy(logits, targets, reduction="sum")

    loss, grads = nn.value_and_grad(model, streamed)(model)
    expected_loss, expected = nn.value_and_grad(model, reference)(model)
    assert_close(loss, expected_loss)
    for (name, g), (_, e) in zip(tree_flatten(grads), tree_flatten(expected), strict=True):
        assert_close(g, e, atol=1e-4, rtol=1e-4), name


def test_gradient_stops_at_segment_boundaries_within_one_call():
    """Two segments in one call and in two calls give the same gradient: memory is detached."""
    model = make_model()
    S = model.config.segment_length
    tokens, targets = mx.array(random_tokens(6, 2, 2 * S)), mx.array(random_tokens(7, 2, S))

    def one_call(model):
        logits, _ = model(tokens)
        return nn.losses.cross_entropy(logits[:, S:], targets, reduction="sum")

    def two_calls(model, state):
        logits, _ = model(tokens[:, S:], state)
        return nn.losses.cross_entropy(logits, targets, reduction="sum")

    _, state = model(tokens[:, :S])
    grads = tree_flatten(nn.value_and_grad(model, one_call)(model)[1])
    expected = tree_flatten(nn.value_and_grad(model, two_calls)(model, state)[1])
    for (_, g), (_, e) in zip(grads, expected, strict=True):
        assert_close(g, e)


@pytest.mark.parametrize("options", [{}, RECIPE, {"canon": True, "segment_length": 2}], ids=str)
def test_lanes_see_only_their_own_piece(options):
    model = make_model(**options)
    S = model.config.segment_length
    first, second, other = random_tokens(8, 1, 3 * S), random_tokens(9, 1, 6 * S), random_tokens(10, 1, 9 * S)
    lane = np.concatenate([first, second], axis=1)  # two consecutive pieces in lane 0
    state, logits = model.new_state(2), []
    for i in range(9):
        if i == 3:
            state.reset([0])
        chunk = np.concatenate([lane, other])[:, i * S : (i + 1) * S]
        out, state = model(mx.array(chunk), state)
        logits.append(out)
    logits = mx.concatenate(logits, axis=1)
    assert state.position.tolist() == [6 * S, 9 * S]
    assert_close(logits[:1, : 3 * S], dense_logits(model, first))
    assert_close(logits[:1, 3 * S :], dense_logits(model, second))
    assert_close(logits[1:], dense_logits(model, other))


@pytest.mark.parametrize("options", [{}, RECIPE])
def test_pieces_are_independent(options):
    """Bitwise: a changed piece affects neither the other lane nor the next piece in its lane."""
    model = make_model(horizons=[40, 8, 3], **options)
    S = model.config.segment_length
    piece = random_tokens(11, 2, 2 * S)
    following = mx.array(random_tokens(12, 2, 3 * S))

    def run(before: np.ndarray):
        lanes, state = model(mx.array(before))
        state.reset([0])
        after, _ = model(following, state)
        return np.array(lanes), np.array(after)

    changed = piece.copy()
    changed[0] = (changed[0] + 1) % V
    lanes_a, after_a = run(piece)
    lanes_b, after_b = run(changed)
    assert (lanes_a[0] != lanes_b[0]).any()
    np.testing.assert_array_equal(lanes_a[1], lanes_b[1])
    np.testing.assert_array_equal(after_a, after_b)


@pytest.mark.parametrize("options", [{}, RECIPE])
def test_single_lanes_can_be_reset_only_at_a_segment_boundary(options):
    model = make_model(**options)
    _, state = model(mx.array(random_tokens(13, 2, 5)))
    with pytest.raises(ValueError, match="segment boundary"):
        state.reset([1])
    with pytest.raises(ValueError, match="lanes"):
        state.reset([2])
    assert state.reset().position.tolist() == [0, 0]
    tokens = random_tokens(14, 2, 20)
    assert_close(model(mx.array(tokens), state)[0], dense_logits(model, tokens))


def test_old_state_stays_usable():
    model = make_model()
    _, state = model(mx.array(random_tokens(15, 1, 13)))
    futures = [mx.array(random_tokens(seed, 1, 20)) for seed in (16, 17)]
    first, _ = model(futures[0], state)
    mx.eval(first)
    second, _ = model(futures[1], state)
    again, _ = model(futures[0], state)
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, second)


@pytest.mark.parametrize("options", [{}, RECIPE])
def test_take_copies_one_prefill_to_several_lanes(options):
    model = make_model(**options)
    prompt, rest = random_tokens(18, 1, 21), random_tokens(19, 3, 20)
    _, state = model(mx.array(prompt))
    logits, _ = model(mx.array(rest), state.take([0, 0, 0]))
    whole = np.concatenate([np.repeat(prompt, 3, axis=0), rest], axis=1)
    assert_close(logits, dense_logits(model, whole)[:, 21:])


@pytest.mark.parametrize("saved_at", [0, 5, 8, 24, 37])
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_saved_and_loaded_state_continues_as_dense(tmp_path, saved_at, options):
    model = make_model(**options)
    tokens = random_tokens(24, 2, 50)
    state = model.new_state(2)
    if saved_at:
        _, state = model(mx.array(tokens[:, :saved_at]), state)
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, state.to_arrays())
    loaded = RecurrentState.from_arrays(model.config, mx.load(path))
    assert (loaded.steps, loaded.position.tolist()) == (state.steps, state.position.tolist())
    assert_close(model(mx.array(tokens[:, saved_at:]), loaded)[0], dense_logits(model, tokens)[:, saved_at:])


def test_state_of_another_model_is_refused(tmp_path):
    arrays = make_model().new_state(2).to_arrays()
    with pytest.raises(UserError, match="layer 0 has shape"):
        RecurrentState.from_arrays(make_model(horizons=[18, 8, 3]).config, arrays)
    with pytest.raises(UserError, match=r"layers\.0\.attention_canon"):
        RecurrentState.from_arrays(make_model(canon=True).config, arrays)
    del arrays["layers.1.values"]
    with pytest.raises(UserError, match=r"layers\.1\.values"):
        RecurrentState.from_arrays(make_model().config, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_memory_is_allocated_once(options):
    model = make_model(horizons=[1024, 8, 3], **options)
    c = model.config
    state = model.new_state(2)
    expected = 2 * (sum(c.horizons) + 3 * c.segment_length) * c.n_kv_heads * c.head_dim * 4 * 2
    if c.canon:
        expected += 3 * 2 * (3 + c.segment_length) * c.d_model * 4 * 2
    assert state.nbytes == expected
    token = mx.zeros((2, 1), mx.int32)
    hidden, state = model.advance(token, state)
    mx.eval(hidden, state.arrays)
    active = active_memory()
    mx.reset_peak_memory()
    for _ in range(100):
        hidden, state = model.advance(token, state)
        mx.eval(hidden, state.arrays)
    assert state.nbytes == expected
    assert active_memory() - active < 4096
    # Written in place: the peak holds activations of one token, not a second copy of a layer's slots.
    assert mx.get_peak_memory() - active < state.layers[0]["keys"].nbytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_scaling": LINEAR, "parallel_residual": True},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "rope_dims": 6, "rope_interleaved": True},
        RECIPE,
    ],
    ids=str,
)
def test_endless_streams_keep_precision(options):
    """Before, at and after a re-basing, logits equal those of a model that reads only the visible tokens."""
    model = make_model(n_layers=1, horizons=[24], segment_length=8, **options)
    interval = rebase_interval(model.config)
    before, after = random_tokens(21, 1, 48), random_tokens(20, 1, 64)
    state = model.new_state(1)
    state.steps = 5 * interval
    state.starts[:] = interval + 48  # the re-basing falls between `before`, which fills the ring, and `after`
    state.rebased[:] = 3 * interval
    _, state = model(mx.array(before), state)
    assert state.rebased[0] == 3 * interval
    logits, state = model(mx.array(after), state)
    assert state.rebased[0] == 4 * interval
    expected = dense_logits(model, np.concatenate([before, after], axis=1))[:, 48:]
    assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@settings(max_examples=10, deadline=None)
@given(resets=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), max_size=12), S=st.sampled_from([6, 8]))
def test_lanes_of_any_age_can_be_saved_after_a_rebasing(resets, S):
    """Lanes begin pieces at any time, and all are re-based together. resets: segments until a lane begins again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state_module, "rebase_interval", lambda config: 48)
        model = make_model(n_layers=1, horizons=[16], segment_length=S)
        state = model.new_state(3)
        for segments, lane in [*resets, (7, 0)]:
            for i in range(segments):
                _, state = model.advance(mx.array(random_tokens(i, 3, S)), state)
            state = state.reset([lane])
        loaded = RecurrentState.from_arrays(model.config, state.to_arrays())
        future = mx.array(random_tokens(99, 3, S))
        np.testing.assert_array_equal(np.array(model(future, state)[0]), np.array(model(future, loaded)[0]))


@pytest.mark.parametrize("ids", [[[V]], [[-1]], [[0, 1], [2, 10**6]]])
def test_ids_outside_the_vocabulary_raise(ids):
    with pytest.raises(ValueError, match=rf"expected ids from 0 to {V - 1}"):
        make_model()(mx.array(ids))


def test_invalid_arguments_raise():
    model = make_model()
    with pytest.raises(ValueError, match="expected integers"):
        model(mx.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected integers"):
        model(mx.zeros((3,), mx.int32))
    with pytest.raises(ValueError, match="expected 2 lanes"):
        model(mx.zeros((3, 1), mx.int32), model.new_state(2))
    with pytest.raises(ValueError, match="another configuration"):
        model(mx.zeros((1, 1), mx.int32), make_model(horizons=[1, 1, 1]).new_state(1))


def test_empty_chunk_changes_nothing():
    model = make_model()
    logits, state = model(mx.zeros((1, 0), mx.int32))
    assert logits.shape == (1, 0, V)
    assert state.position.tolist() == [0]


def test_state_is_not_a_parameter_and_bf16_state_stays_close():
    model = make_model()
    names = {name for name, _ in tree_flatten(model.parameters())}
    tokens = mx.array(random_tokens(22, 1, 40))
    logits, state = model(tokens, model.new_state(1, dtype=mx.bfloat16))
    assert names == {name for name, _ in tree_flatten(model.parameters())}
    assert (state.dtype, logits.dtype) == (mx.bfloat16, mx.float32)
    assert_close(logits, dense_logits(model, np.array(tokens)), atol=0.15, rtol=0.1)
