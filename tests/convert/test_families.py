"""For every family, the converted model computes the logits of the PyTorch original, also when streamed."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.foreign_models import (  # noqa: E402
    Aria,
    MemorySource,
    NanoGPT,
    PianoNet,
    assert_same_logits,
    converted,
    random_tokens,
    randomise,
)

from dsmr_mlx import UserError  # noqa: E402
from dsmr_mlx.convert.families import FAMILIES, family_named  # noqa: E402
from dsmr_mlx.convert.mapping import load_map  # noqa: E402

V, TOLERANCE = 41, 1e-5
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_map.toml"


@pytest.fixture(scope="module")
def transformers():
    """The package transformers."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def x_transformers():
    """The package x_transformers."""
    return pytest.importorskip("x_transformers")


def logits_of(model, tokens):
    """Return the logits of a PyTorch model."""
    with torch.no_grad():
        logits = model(torch.tensor(tokens))
    return getattr(logits, "logits", logits)


def check(original, config: dict | None = None, **options):
    """Convert an original with random weights and compare logits. Return model and configuration."""
    return check_stored(randomise(original), original.state_dict(), config, **options)


def check_stored(original, stored: dict, config: dict | None = None, families=FAMILIES, **options):
    """Convert stored weights and compare logits with the original. Return model and configuration."""
    model, known = converted(MemorySource(stored, config), families, **options)
    tokens = random_tokens(V)
    assert_same_logits(model, tokens, logits_of(original, tokens), TOLERANCE)
    return model, known


def hugging_face(original, config_class, **options):
    """Return a model of transformers and its config.json."""
    config = config_class(attn_implementation="eager", **options)
    return original(config), {**config.to_dict(), "model_type": config.model_type}


SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 1, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["plain", "tied-grouped", "biases-head-dim", "gelu-theta", "linear", "llama3"],
)
def test_llama(transformers, options):
    original, config = hugging_face(transformers.LlamaForCausalLM, transformers.LlamaConfig, **SMALL, **options)
    check(original, config)


def test_rope_parameters_outweigh_a_stale_value_at_the_top_level(transformers):
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    original, config = hugging_face(transformers.LlamaForCausalLM, transformers.LlamaConfig, **SMALL, **options)
    check(original, config | {"rope_theta": 10_000.0})


def test_llama_of_transformers_4(transformers):
    """`rope_theta` and `rope_scaling` are separate, and the RoPE frequencies are stored with the weights."""
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
    original, config = hugging_face(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, **SMALL, rope_parameters=scaling
    )
    del config["rope_parameters"]
    config |= {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    randomise(original)
    stored = original.state_dict() | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": original.model.rotary_emb.inv_freq for i in range(2)
    }
    check_stored(original, stored, config)
    del config["rope_scaling"]
    head_dim = converted(MemorySource(stored))[0].config.head_dim
    assert head_dim == 8


def test_mistral_has_a_sliding_window(transformers):
    """A window of W is the token and W - 1 before it, like a horizon of W - 1 with segments of one token."""
    original, config = hugging_face(
        transformers.MistralForCausalLM, transformers.MistralConfig, **SMALL, num_key_value_heads=2, sliding_window=9
    )
    _, known = check(original, config, horizon=8, segment_length=1)
    assert known.windows == [8, 8]


def test_qwen2_has_biases_and_windows_in_upper_layers(transformers):
    """Only q, k, v have biases; only the layers from `max_window_layers` on have windows."""
    options = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 60, "max_window_layers": 1}
    original, config = hugging_face(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, **SMALL, **options)
    model, known = check(original, config)
    assert (model.config.attention_bias, model.config.output_bias) == (True, False)
    assert known.windows == [None, 59]


def test_qwen3_normalizes_queries_and_keys(transformers):
    options = {"num_key_value_heads": 2, "head_dim": 12, "use_sliding_window": True, "sliding_window": 60}
    original, config = hugging_face(
        transformers.Qwen3ForCausalLM, transformers.Qwen3Config, **SMALL, **options, max_window_layers=1
    )
    model, known = check(original, config)
    assert (model.config.qk_norm, known.windows) == (True, [None, 59])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_parallel_residual": False, "hidden_act": "gelu_new", "tie_word_embeddings": True},
        {
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 70.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ],
    ids=["plain", "sequential-tied", "no-attention-bias"],
)
def test_gpt_neox(transformers, options):
    original, config = hugging_face(
        transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, **(SMALL | {"num_attention_heads": 2}), **options
    )
    check(original, config)


def test_gpt_neox_of_transformers_4(transformers):
    """The head has another name, masks are stored, and RoPE is configured by `rotary_pct` and `rotary_emb_base`."""
    rope = {"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.5}
    original, config = hugging_face(
        transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, **SMALL, rope_parameters=rope
    )
    del config["rope_parameters"]
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 70}
    randomise(original)
    stored = original.state_dict()
    stored["embed_out.weight"] = stored.pop("lm_head.weight")
    for i in range(2):
        stored[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 8, 8)
        stored[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        stored[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    check_stored(original, stored, config)


GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 37}


@pytest.mark.parametrize(
    "options",
    [{}, {"n_inner": 32, "tie_word_embeddings": False, "activation_function": "relu"}],
    ids=["tied", "untied"],
)
def test_gpt2(transformers, options):
    """Tokens up to the last learned position; a tied head is stored as a copy of the embedding."""
    original, config = hugging_face(transformers.GPT2LMHeadModel, transformers.GPT2Config, **GPT2, **options)
    model, _ = check(original, config)
    assert "lm_head.weight" in original.state_dict()
    assert model.config.tie_embeddings == (not options)
    assert model.config.max_positions == 37


def test_gpt2_as_published_by_openai(transformers):
    """Names lack `transformer.`, there is no head, and causal masks are stored."""
    original, config = hugging_face(transformers.GPT2LMHeadModel, transformers.GPT2Config, **GPT2)
    randomise(original)
    stored = original.transformer.state_dict() | {f"h.{i}.attn.bias": torch.ones(1, 1, 37, 37) for i in range(2)}
    check_stored(original, stored, config)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias):
    """Wrapped by torch.compile; every matrix of the attention is square or transposed compared to GPT-2."""
    original = randomise(NanoGPT(V, d=32, n_heads=4, n_layers=2, block_size=37, bias=bias))
    stored = {f"_orig_mod.{name}": tensor for name, tensor in original.state_dict().items()}
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 37, "bias": bias, "vocab_size": V, "dropout": 0.0}
    model, _ = check_stored(original, stored, args)
    assert model.config.norm_bias == model.config.attention_bias == bias


@pytest.mark.slow
def test_aria():
    """All published models have heads of 64."""
    original = Aria(V, d=128, n_heads=2, n_layers=2)
    model, known = check(original)
    assert (model.config.n_heads, model.config.tie_embeddings) == (2, False)
    assert "n_heads" in known.notes[0]
    smaller = Aria(V, d=32, n_heads=4, n_layers=1)
    check(smaller, {"n_heads": 4})
    check(smaller, n_heads=4)


def x_transformer(x_transformers, *, tie=False, max_seq_len=37, **options):
    """Return a small model of x-transformers."""
    layers = x_transformers.Decoder(dim=32, depth=2, verbose=False, **({"heads": 4, "attn_dim_head": 16} | options))
    return x_transformers.TransformerWrapper(
        num_tokens=V, max_seq_len=max_seq_len, attn_layers=layers, tie_embedding=tie
    )


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"rotary_pos_emb": True, "attn_kv_heads": 2}, {}),
        ({"rotary_pos_emb": True, "rotary_emb_dim": 16, "use_rmsnorm": True, "heads": 3}, {"n_heads": 3}),
        ({"rotary_pos_emb": True, "rotary_base_rescale_factor": 5.0, "ff_glu": True, "ff_no_bias": True}, {}),
        ({"ff_glu": True, "ff_swish": True, "attn_kv_heads": 2}, {"activation": "silu", "head_dim": 16}),
        ({"rotary_pos_emb": True, "attn_dim_head": 64, "attn_one_kv_head": True, "ff_no_bias": True}, {}),
        ({"rotary_pos_emb": True, "norm_add_unit_offset": False}, {}),
    ],
    ids=["grouped", "rms", "glu-rescaled", "learned-positions", "multi-query", "plain-gains"],
)
def test_x_transformers(x_transformers, options, settings):
    original = x_transformer(x_transformers, **options)
    model, _ = check(original, **settings)
    assert (model.config.max_positions is None) == ("rotary_pos_emb" in options)


def test_x_transformers_in_its_wrapper(x_transformers):
    """AutoregressiveWrapper, used for training, prefixes every name with `net.`."""
    original = randomise(x_transformer(x_transformers, rotary_pos_emb=True, attn_dim_head=64, heads=2, max_seq_len=0))
    wrapped = x_transformers.AutoregressiveWrapper(original)
    model, known = check_stored(original, wrapped.state_dict())
    assert model.config.head_dim == 64
    assert ["n_heads" in note or "activation" in note for note in known.notes] == [True, True]


def test_x_transformers_with_a_tied_head(x_transformers):
    """The weights do not show whether logits are scaled, so the version must be given; then the result is exact."""
    original = randomise(x_transformer(x_transformers, rotary_pos_emb=True, tie=True))
    source, tokens = MemorySource(original.state_dict()), random_tokens(V)
    with pytest.raises(UserError, match=r"fit x-transformers \(.* x-transformers-1\.31 \(.* choose one with `family`"):
        converted(source)
    expected = logits_of(original, tokens)
    model, _ = converted(source, [family_named("x-transformers")])
    assert_same_logits(model, tokens, expected, TOLERANCE)
    assert model.config.tie_embeddings
    model, _ = converted(source, [family_named("x-transformers-1.31")])
    assert_same_logits(model, tokens, expected * 32**0.5, TOLERANCE)


def test_the_example_map():
    """examples/custom_map.toml converts the model that it describes, with any prefix."""
    original = randomise(PianoNet(V))
    stored = {f"module.net.{name}": tensor for name, tensor in original.state_dict().items()}
    model, _ = check_stored(original, stored, families=[load_map(EXAMPLE)])
    c = model.config
    assert (c.n_kv_heads, c.attention_bias, c.output_bias, c.head_bias, c.tie_embeddings) == (
        2,
        True,
        False,
        True,
        False,
    )
