"""Configurations of other programs: entries are used, noted if missing, or refused by name."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.array_sources import CONFIG, D_MODEL, Arrays, V, gpt2_shapes, llama_shapes, planned, x_transformers

from dsmr_mlx import DSMR, ModelConfig, UserError
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.mapping import configure, find_family


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma' in its config.json: expected one of llama, mistral, qwen2, qw"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' in its config.json: expected one of silu, "),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type = 'yarn' .* one of default"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "RoPE parameters per type of layer, expected",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor in its configuration: expected 1 for llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"num_attention_heads": 2, "head_dim": 2}, "n_heads = 2, head_dim = 2: expected a product of 8"),
        ({"vocab_size": 12}, r"embed\.weight from model\.embed_tokens\.weight \(11, 8\), expected \(12, 8\)"),
        ({"num_hidden_layers": 3}, "n_layers = 3 for llama: no tensors of layer 2, expected layers.2.input"),
    ],
)
def test_unsupported_configurations_are_refused(stated, message):
    with pytest.raises(UserError, match=message):
        planned(Arrays(llama_shapes(), CONFIG | stated))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2' in its config.json: expected an integer from 1 to"),
        ({"num_hidden_layers": 1 << 60}, "num_hidden_layers = 1152921504606846976 in its config.json: expected"),
        (
            {"model_type": "mistral", "sliding_window": 4, "num_hidden_layers": 1 << 28},
            "num_hidden_layers = 268435456 .*: expected an integer from 1 to 16777216",
        ),
        ({"vocab_size": True}, "vocab_size = True in its config.json: expected an integer"),
        ({"num_attention_heads": [4]}, r"num_attention_heads = \[4\] in its config.json: expected an integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6' in its config.json: expected a finite number"),
        ({"rope_theta": "abc"}, "rope_theta = 'abc' in its config.json: expected a finite number"),
        ({"rope_theta": float("nan")}, "rope_theta = nan in its config.json: expected a finite number"),
        ({"rope_theta": 10**400}, "rope_theta = 1000.*… in its config.json: expected a finite number"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor = 'half' in its config.json: expected a finite"),
        ({"rope_parameters": ["linear"]}, r"rope_parameters = \['linear'\] in its config.json: expected a table"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' in its config.json: expected a table"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor = '2' in its config.json"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None .*: expected a number above 0"),
        (
            {"rope_scaling": {"type": ["linear"]}},
            r"rope_scaling.type = \['linear'\] in its config.json: expected one of",
        ),
        ({"hidden_act": ["silu"]}, r"hidden_act = \['silu'\] in its config.json: expected one of silu"),
        ({"quantization_config": "fp8"}, r"quantized \(fp8\), expected float weights"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' in its config.json: expected true or false"),
        ({"model_type": 4}, "model_type = 4 in its config.json: expected one of llama"),
        *(
            (
                {"model_type": "mistral", "sliding_window": window},
                f"sliding_window = {window!r} .*: expected an integer",
            )
            for window in ("48", -3, 0, True, 4.5)
        ),
        ({"model_type": "qwen2", "max_window_layers": "1"}, "max_window_layers = '1' .*: expected an integer from 0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            r"layer_types = \['full_attention'\] in its config.json: expected 2 of them, one for each layer",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked"] * 2},
            "layer_types = .*: expected a list of full_attention, sliding_attention",
        ),
    ],
)
def test_invalid_values_in_a_configuration_are_named(stated, message):
    with pytest.raises(UserError, match=f"^weights.pt: {message}"):
        planned(Arrays(llama_shapes(), CONFIG | stated))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([1, 2, 4, 8, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), inner)
    ),
    max_leaves=4,
)

ENTRIES = {
    "llama": (
        *CONFIG,
        *("head_dim", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
        *("partial_rotary_factor", "tie_word_embeddings", "quantization_config", "max_position_embeddings"),
        *("sliding_window", "use_sliding_window", "max_window_layers"),
    ),
    "gpt2": (
        *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon", "activation_function"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "block_size", "model_type"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ENTRIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows_first=st.booleans())
def test_any_configuration_is_used_or_refused(family, data, rows_first):
    """No error other than `UserError`, and no model of a problematic size is made."""
    stated = data.draw(st.dictionaries(st.sampled_from(ENTRIES[family]), JSON, min_size=1, max_size=3))
    qkv = (3 * D_MODEL, D_MODEL) if rows_first else (D_MODEL, 3 * D_MODEL)
    known = CONFIG if family == "llama" else {"n_head": 2}
    kinds = ["llama", "mistral", "qwen2", "qwen3"] if family == "llama" else ["gpt2", "nanogpt"]
    kind = data.draw(st.sampled_from(kinds))
    source = Arrays(llama_shapes() if family == "llama" else gpt2_shapes(qkv), known | {"model_type": kind} | stated)
    with suppress(UserError):
        config, _ = planned(source)
        assert (config.n_layers, config.vocab_size) == (2 if family == "llama" else 1, V)


def test_missing_entries_are_noted():
    """Each missing entry is noted, whether or not others are present, but not those that the user has set."""
    full = CONFIG | {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu"}
    source = Arrays(llama_shapes(), full)
    known = configure(*find_family(source, FAMILIES), source)
    assert (known.notes, known.fields["rope_theta"], known.fields["norm_eps"]) == ([], 5e5, 1e-5)
    for missing, note, value in (
        (
            "rope_theta",
            "not stated in its config.json: RoPE with theta 10000 assumed; `rope_theta`=… overrides it",
            9,
        ),
        ("rms_norm_eps", "not stated in its config.json: norms with eps 1e-6 assumed; `norm_eps`=… overrides it", 9),
    ):
        source = Arrays(llama_shapes(), {name: full[name] for name in full if name != missing})
        assert configure(*find_family(source, FAMILIES), source).notes == [note]
        field = {"rms_norm_eps": "norm_eps"}.get(missing, missing)
        assert configure(*find_family(source, FAMILIES), source, {field: value}).notes == []
    source = Arrays(llama_shapes())
    (note,) = configure(*find_family(source, FAMILIES), source, {"n_heads": 4}).notes
    assert note.startswith("no config.json: RoPE with theta 10000, norms with eps 1e-6, SiLU assumed")


def test_what_the_weights_of_gpt2_do_not_tell_is_noted():
    """The activation and eps of a state dict; a config.json usually states them."""
    shapes = gpt2_shapes((D_MODEL, 3 * D_MODEL))
    source = Arrays(shapes)
    (note,) = configure(*find_family(source, FAMILIES), source, {"n_heads": 2}).notes
    assert note.startswith("no config.json: norms with eps 1e-5, GELU in its tanh form assumed; `norm_eps`=…")
    source = Arrays(shapes, {"n_head": 2, "activation_function": "relu", "layer_norm_epsilon": 1e-3})
    assert configure(*find_family(source, FAMILIES), source).notes == []


def test_a_forgotten_configuration_is_named():
    """Where the number of heads is unknown, as in most state dicts."""
    source = Arrays(llama_shapes())
    with pytest.raises(UserError, match=r"expected `n_heads`=…, or its config\.json in the same folder"):
        configure(*find_family(source, FAMILIES), source)


@pytest.mark.parametrize("setting", ["scale_attn_by_inverse_layer_idx", "scale_attn_weights"])
def test_unsupported_score_scales_of_gpt2_are_refused(setting):
    source = Arrays(gpt2_shapes((D_MODEL, 3 * D_MODEL)), {"n_head": 2, setting: setting.endswith("idx")})
    with pytest.raises(UserError, match=f"{setting} = .* in its config.json: expected"):
        planned(source)


SHAPES = {
    "llama": llama_shapes,
    "gpt2": lambda: gpt2_shapes((D_MODEL, 3 * D_MODEL)),
    "nanogpt": lambda: gpt2_shapes((3 * D_MODEL, D_MODEL)),
    "x-transformers": lambda: x_transformers("gamma", 0.0).shapes,
    "x-transformers-1.20": lambda: x_transformers("g", 1.0, head=False).shapes,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tensors_of_any_shape_are_used_or_refused(family, data):
    """One or two tensors have other shapes, as in another architecture; the family is detected or given."""
    shapes = SHAPES[family]()
    for name in data.draw(st.lists(st.sampled_from([*shapes]), min_size=1, max_size=2)):
        shapes[name] = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 11]), max_size=3)))
    for families in (FAMILIES, [family_named(family)]):
        with suppress(UserError):
            planned(Arrays(shapes), families=families, n_heads=data.draw(st.sampled_from([1, 4])))


def test_invalid_frequencies_are_refused():
    source = x_transformers("gamma", 0.0)
    for wrong in (np.zeros(16), -np.ones(16), np.full(16, np.nan)):
        source.values["attn_layers.rotary_pos_emb.inv_freq"] = wrong.astype(np.float32)
        with pytest.raises(UserError, match="inv_freq: expected powers of one base"):
            planned(source)
    source.shapes["attn_layers.rotary_pos_emb.inv_freq"] = (4, 4)
    with pytest.raises(UserError, match=r"inv_freq is \(4, 4\): expected a list of frequencies"):
        planned(source)


def test_rope_theta_follows_from_the_stored_frequencies():
    source = x_transformers("gamma", 0.0)
    assert planned(source)[0].rope_theta == 10_000.0
    frequencies = 321.0 ** (-np.arange(16, dtype=np.float32) / 16)
    source.values["attn_layers.rotary_pos_emb.inv_freq"] = frequencies
    assert planned(source)[0].rope_theta == pytest.approx(321, rel=1e-5)
    source.values["attn_layers.rotary_pos_emb.inv_freq"] = frequencies / 2
    with pytest.raises(UserError, match="inv_freq: expected powers of one base"):
        planned(source)


def test_an_unknown_number_of_heads_must_be_given():
    source = Arrays(llama_shapes())
    with pytest.raises(UserError, match=r"weights\.pt: the number of heads is unknown \(8 rows .*expected `n_heads`="):
        planned(source)
    with pytest.raises(UserError, match="n_heads = 3: expected a divisor of 8"):
        planned(source, n_heads=3)
    for setting in ({"n_heads": 4}, {"head_dim": 2}):
        config, _ = planned(source, **setting)
        assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 2)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@settings(max_examples=40, deadline=None)
@given(n_layers=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
@example(n_layers="two")
@example(n_layers=-(2**63) - 1)
@example(n_layers=None)
def test_an_invalid_number_of_layers_is_refused(kind, n_layers):
    """Only 1 and 2 of the 2 stored layers are valid."""
    windows = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    source = Arrays(llama_shapes(), CONFIG | {"model_type": kind} | windows)
    if n_layers in (1, 2) and isinstance(n_layers, int):
        n_layers = 3
    with pytest.raises(UserError, match="n_layers"):
        planned(source, n_layers=n_layers)


def test_a_model_may_use_some_of_the_stored_layers():
    """Windows and horizons are those of these layers; unused tensors are listed."""
    stated = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    source = Arrays(llama_shapes(), CONFIG | stated)
    family, prefix = find_family(source, FAMILIES)
    assert configure(family, prefix, source, {"n_layers": 1}).windows == [None]
    _, steps = planned(source, ["model.layers.1.*"], n_layers=1)
    assert {step.target.split(".")[1] for step in steps if step.target.startswith("layers.")} == {"0"}
    with pytest.raises(UserError, match=r"9 unused tensors: .* \(n_layers = 1, 2 layers are stored\)"):
        planned(source, n_layers=1)
    with pytest.raises(UserError, match=r"`n_layers` = 3 for llama: no tensors of layer 2, expected layers\.2\.input"):
        planned(source, n_layers=3)
    config = ModelConfig(
        vocab_size=V, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6, horizons=[1, 2, 3]
    )
    shapes = {name: p.shape for name, p in tree_flatten(DSMR(config).parameters())}
    ours = Arrays(shapes, config.to_dict())
    found, _ = planned(ours, ["layers.2.*"], n_layers=2)
    assert found.horizons == [1, 2]
