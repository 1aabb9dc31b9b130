"""The PyTorch reference and the MLX model have equal logits, losses, gradients and states."""

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.processes import imported_by, named

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

torch = pytest.importorskip("torch")

from dsmr_mlx.convert import reference  # noqa: E402

TOLERANCE = 1e-5  # relative to the largest absolute value
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 16}


def config(**options) -> ModelConfig:
    """Return the configuration of a small model."""
    values = {"vocab_size": 19, "d_model": 16, "n_layers": 3, "n_heads": 4, "head_dim": 8, "d_ff": 24}
    return ModelConfig(**(values | {"segment_length": 4, "horizons": [9, 4, 0]} | options))


CONFIGS = {
    "plain": config(),
    "grouped heads, wide head": config(n_kv_heads=2, head_dim=12, tie_embeddings=False),
    "all biases": config(
        norm="layer", norm_bias=True, activation="gelu_tanh", gated=False, attention_bias=True, output_bias=True,
        feed_forward_bias=True, tie_embeddings=False, head_bias=True,
    ),
    "NeoX": config(norm="layer", norm_bias=True, activation="gelu", gated=False, rope_dims=4, parallel_residual=True),
    "interleaved, partial": config(rope_dims=4, rope_interleaved=True, rope_theta=500.0, n_kv_heads=1),
    "llama3 scaling": config(rope_scaling=LLAMA3),
    "linear scaling": config(rope_scaling={"type": "linear", "factor": 4.0}),
    "learned positions": config(rope_dims=0, max_positions=64, activation="relu", horizons=[64, 7, 3]),
    "all of the recipe": config(
        n_kv_heads=2, qk_norm=True, value_residual=True, embedding_skip=True, canon=True, logit_softcap=2.0,
        zero_init=True,
    ),
    "parallel Canon layers": config(canon=True, parallel_residual=True, norm="layer", norm_bias=True),
}  # fmt: skip


def randomized(c: ModelConfig, seed: int = 0) -> tuple[DSMR, reference.DSMR]:
    """Return both models with the same random weights, including biases and gains."""
    mlx, rng = DSMR(c), np.random.default_rng(seed)
    weights = {k: rng.normal(1 if "norm" in k else 0, 0.3, p.shape) for k, p in tree_flatten(mlx.parameters())}
    mlx.load_weights([(k, mx.array(w.astype(np.float32))) for k, w in weights.items()])
    torch_model = reference.DSMR(c)
    torch_model.load_state_dict({k: torch.tensor(w, dtype=torch.float32) for k, w in weights.items()})
    return mlx, torch_model


def assert_close(found, expected, what: str = "") -> None:
    """Compare arrays, relative to the largest absolute value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    assert np.abs(found - expected).max(initial=0) / scale < TOLERANCE, what


def tokens_of(c: ModelConfig, lanes: int, length: int, seed: int = 1) -> np.ndarray:
    """Return random ids `(lanes, length)`."""
    return np.random.default_rng(seed).integers(0, c.vocab_size, (lanes, length))


def in_order(name: str, memory, state, layer: int, c: ModelConfig) -> np.ndarray:
    """Return what a layer of the MLX state carries to the next segment, oldest first."""
    horizon, S = c.horizons[layer], c.segment_length
    memory = np.array(memory)
    if name.endswith("_canon"):
        return memory[:, S:]
    if horizon == 0:
        return memory[:, :, :0]
    steps = range(state.steps - horizon, state.steps)
    committed = state.steps - S  # the last segment is copied into the ring when the next one is opened
    slots = [horizon + step % S if step >= committed else step % horizon for step in steps]
    return memory[:, :, slots]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_state_after_every_segment_are_equal(name):
    c = CONFIGS[name]
    mlx, torch_model = randomized(c)
    tokens, S = tokens_of(c, 2, 40), c.segment_length
    state, torch_state = mlx.new_state(2), torch_model.new_state(2)
    with torch.no_grad():
        whole, _ = torch_model(torch.tensor(tokens))
        for s in range(0, tokens.shape[1], S):
            logits, state = mlx(mx.array(tokens[:, s : s + S]), state)
            torch_logits, torch_state = torch_model(torch.tensor(tokens[:, s : s + S]), torch_state)
            assert_close(logits, torch_logits, f"segment at {s}")
            assert_close(logits, whole[:, s : s + S], f"segment at {s} of the whole")
            for layer, horizon in enumerate(c.horizons):
                seen = min(horizon, s + S)
                for (name, ours), theirs in zip(state.layers[layer].items(), torch_state.layers[layer], strict=True):
                    ours, known = in_order(name, ours, state, layer, c), np.s_[:, :, horizon - seen :]
                    known = np.s_[:] if name.endswith("_canon") else known
                    assert_close(ours[known], theirs[known], f"{name} of layer {layer}, {s}")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_a_later_segment_are_equal(name):
    """With memory, through which no gradient flows."""
    c = CONFIGS[name]
    mlx, torch_model = randomized(c)
    tokens, S = tokens_of(c, 3, 3 * c.segment_length + 1), c.segment_length
    _, state = mlx(mx.array(tokens[:, : 2 * S]))
    with torch.no_grad():
        _, torch_state = torch_model(torch.tensor(tokens[:, : 2 * S]))
    inputs, targets = tokens[:, 2 * S : 3 * S], tokens[:, 2 * S + 1 :]

    def loss_of(model):
        logits, _ = model(mx.array(inputs), state)
        return nn.losses.cross_entropy(logits, mx.array(targets), reduction="mean")

    loss, gradients = nn.value_and_grad(mlx, loss_of)(mlx)
    logits, new_state = torch_model(torch.tensor(inputs), torch_state)
    torch_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    torch_loss.backward()
    assert abs(loss.item() - torch_loss.item()) < TOLERANCE * torch_loss.item()
    theirs = dict(torch_model.named_parameters())
    ours = dict(tree_flatten(gradients))
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(np.array(g)).max() for g in ours.values())
    for key, gradient in ours.items():
        assert np.abs(np.array(gradient) - theirs[key].grad.numpy()).max() < TOLERANCE * largest, key
    assert not any(slots.requires_grad for layer in new_state.layers for slots in layer)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_chunks_of_any_length_and_lane_resets(data):
    """Any chunking gives the same logits; a lane that is reset at the start of a segment sees only its new piece."""
    c = data.draw(st.sampled_from(list(CONFIGS.values())))
    torch_model = randomized(c)[1]
    tokens = torch.tensor(tokens_of(c, 2, 6 * c.segment_length))
    reset_at = c.segment_length * data.draw(st.integers(1, 5))
    with torch.no_grad():
        first, _ = torch_model(tokens)
        second, _ = torch_model(tokens[1:, reset_at:])
        state, done, found = torch_model.new_state(2), 0, []
        while done < tokens.shape[1]:
            if done == reset_at:
                state.reset([1])
            end = reset_at if done < reset_at else tokens.shape[1]
            n = min(data.draw(st.integers(1, 9)), end - done)
            logits, state = torch_model(tokens[:, done : done + n], state)
            found.append(logits)
            done += n
    found = torch.cat(found, dim=1)
    assert_close(found[0], first[0])
    assert_close(found[1, :reset_at], first[1, :reset_at])
    assert_close(found[1, reset_at:], second[0])


def test_the_fused_kernel_is_equal():
    """The code path of accelerators, run on the CPU."""
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((4, 3), (2, 7), (2, 7)))
    mask = torch.rand(2, 1, 3, 7) < 0.5
    mask[..., -1] = True
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_close(reference.attend(q, k, v, mask), fused)


def test_reset_within_a_segment_and_too_many_tokens_are_refused():
    model = reference.DSMR(CONFIGS["learned positions"])
    with torch.no_grad():
        _, state = model(torch.zeros(1, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="3 tokens into a segment"):
            state.reset([0])
        with pytest.raises(ValueError, match="expected at most 64, the number of learned positions"):
            model(torch.zeros(1, 65, dtype=torch.long))


def test_other_types_and_devices_keep_the_rotary_frequencies():
    """No tensor has float64, which Metal lacks, and positions far from the start stay exact in half precision."""
    model = reference.DSMR(config())
    assert not any(tensor.dtype == torch.float64 for tensor in (*model.parameters(), *model.buffers()))
    before = model.frequencies.clone()
    assert torch.equal(model.to(torch.bfloat16).frequencies, before)
    assert before.dtype == torch.float64


def test_quantized_configurations_are_refused():
    with pytest.raises(UserError, match="plain weights only"):
        reference.DSMR(config(d_model=64, d_ff=64, head_dim=16, quantization={"bits": 8, "group_size": 64}))


def test_save_and_load(tmp_path):
    model = randomized(CONFIGS["all biases"])[1].eval()
    reference.save(tmp_path / "model.pt", model, {"tokenizer.json": "e30="}, step=3)
    loaded, content = reference.load(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert (content["tokenizer"], content["step"]) == ({"tokenizer.json": "e30="}, 3)
    tokens = torch.tensor(tokens_of(model.config, 1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert not list(tmp_path.glob("*.partial"))


def other_files() -> dict:
    """Return contents of files that are no DSMR checkpoints, and the messages."""
    model = reference.DSMR(config())
    stated, weights = dataclasses.asdict(model.config), model.state_dict()
    name, shape = "layers.0.attention.out.weight", r"dense floats \(16, 32\)"
    less, wrong = weights.copy(), torch.zeros(2, 3)
    del less[name]
    return {
        "no entries": ({"weights": {}}, "not a DSMR checkpoint, expected config and state_dict"),
        "a list": ([weights], "not a DSMR checkpoint"),
        "text": ({"config": "small", "state_dict": weights}, "expected a table of settings, found str"),
        "numbers": ({"config": {1: 2, "b": 3}, "state_dict": weights}, "unknown key 1, b; known are"),
        "vocabulary": ({"config": stated | {"vocab_size": -1}, "state_dict": weights}, "vocab_size"),
        "no tensors": ({"config": stated, "state_dict": None}, "state_dict is a NoneType, expected tensors by name"),
        "lacking": ({"config": stated, "state_dict": less}, f"state_dict lacks {name}"),
        "more": ({"config": stated, "state_dict": weights | {7: wrong}}, "state_dict has 7, expected only the weights"),
        "shape": ({"config": stated, "state_dict": weights | {name: wrong}}, rf"is dense floats \(2, 3\), .* {shape}"),
        "number": ({"config": stated, "state_dict": weights | {name: 3}}, f"{name} is a int, expected {shape}"),
        "integers": (
            {"config": stated, "state_dict": weights | {name: torch.ones(16, 32, dtype=torch.int64)}},
            rf"{name} is torch\.int64 .*, expected {shape}",
        ),
        "sparse": (
            {"config": stated, "state_dict": weights | {name: torch.ones(16, 32).to_sparse()}},
            rf"{name} is torch\.float32 \(torch\.sparse_coo, .*, expected {shape}",
        ),
        "large": (
            {"config": stated | {"d_model": 1 << 14, "d_ff": 1 << 16}, "state_dict": weights},
            r"embed\.weight is dense floats \(19, 16\), expected dense floats \(19, 16384\) as in its config",
        ),
        "code": ({"config": stated, "state_dict": weights, "x": Path("y")}, "refused: it contains pathlib"),
    }


@pytest.mark.parametrize("name", other_files())
def test_other_files_are_refused_by_name(tmp_path, name):
    """In one line."""
    content, message = other_files()[name]
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message) as caught:
        reference.load(tmp_path / "other.pt")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'other.pt'}: ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files_are_refused_by_name(tmp_path, data):
    path = tmp_path / "damaged.pt"
    reference.save(path, reference.DSMR(config()))
    whole = path.read_bytes()
    truncated = st.integers(0, len(whole) - 1).map(lambda length: whole[:length])
    path.write_bytes(data.draw(truncated | st.binary(max_size=40)))
    with pytest.raises(UserError) as caught:
        reference.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_text_file_is_refused_in_words(tmp_path):
    (tmp_path / "notes.pt").write_text("hello world\n")
    with pytest.raises(UserError, match=r"notes\.pt: cannot be read \([A-Za-z]"):
        reference.load(tmp_path / "notes.pt")


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            reference.load(path)


def test_the_reference_needs_no_mlx():
    assert not named(imported_by("import dsmr_mlx.convert.reference"), "mlx")
