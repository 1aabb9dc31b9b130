"""Mapping of tensors: detection of family and prefix, the plan, and its errors."""

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.array_sources import CONFIG, D_FF, D_MODEL, Arrays, V, gpt2_shapes, llama_shapes, planned, x_transformers
from support.memory import active_memory

from dsmr_mlx import DSMR, ModelConfig, UserError
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.mapping import configure, find_family, load_map, parameter_shapes, plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_map.toml"


@settings(max_examples=25, deadline=None)
@given(
    leading=st.sampled_from(["", "module.", "module.module."]),
    prefix=st.lists(st.sampled_from(["net.", "model.", "state_dict.", "my_model.", "a-b.0."]), max_size=3).map("".join),
    wrapper=st.sampled_from(["", "_orig_mod.", "_fsdp_wrapped_module."]),
    inside=st.booleans(),
)
def test_any_prefix_is_found(leading, prefix, wrapper, inside):
    """With wrappers before and inside names; steps have the stored names."""
    plain = llama_shapes()
    stored = {
        f"{leading}{wrapper}{prefix}{n.replace('layers.0.', f'layers.0.{wrapper}') if inside else n}": shape
        for n, shape in plain.items()
    }
    source = Arrays(stored, CONFIG)
    family, found = find_family(source, FAMILIES)
    assert (family.name, found) == ("llama", prefix)
    config, steps = planned(source)
    assert {name for step in steps for name in step.sources} == set(stored)
    assert {step.target for step in steps} == set(parameter_shapes(config))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_body_alone_is_enough(family):
    """Weights without the head and without the name of the module around the others."""
    body = {"llama": "model.", "gpt2": "transformer."}[family]
    shapes = llama_shapes() if family == "llama" else gpt2_shapes((D_MODEL, 3 * D_MODEL))
    del shapes["lm_head.weight"]
    source = Arrays({name.removeprefix(body): shape for name, shape in shapes.items()})
    assert find_family(source, FAMILIES)[0].name == family
    config, _ = planned(source, n_heads=4)
    assert config.tie_embeddings


def test_steps_are_in_file_order_and_planning_reads_nothing():
    names = list(llama_shapes().items())
    shuffled = dict(names[::-1])
    source = Arrays(shuffled, CONFIG | {"tie_word_embeddings": False})
    _, steps = planned(source)
    places = [min(list(shuffled).index(name) for name in step.sources) for step in steps]
    assert places == sorted(places)
    assert source.names_read == []


def test_the_plan_lists_all_problems():
    """Unused, missing and misshapen tensors in one message; long lists are shortened."""
    shapes = llama_shapes()
    del shapes["model.layers.1.input_layernorm.weight"], shapes["model.layers.0.self_attn.k_proj.weight"]
    shapes["model.layers.1.mlp.down_proj.weight"] = (D_FF, D_MODEL)
    shapes |= {f"critic.{i}.weight": (2, 2) for i in range(10)}
    source = Arrays(shapes, CONFIG)
    family = family_named("llama")
    known = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 2, "d_model": D_MODEL, "d_ff": D_FF, "n_layers": 2}
    config = ModelConfig(vocab_size=V, tie_embeddings=False, **known)
    with pytest.raises(UserError) as raised:
        plan(family, "", source, config)
    text = str(raised.value)
    assert text.startswith("weights.pt, as llama: 2 parameters without a tensor: ")
    assert "layers.0.attention.qkv.weight (from layers.0.self_attn.k_proj.weight)" in text
    assert "layers.1.attention_norm.weight (from layers.1.input_layernorm.weight)" in text
    assert "10 unused tensors: critic.0.weight, " in text
    assert "critic.7.weight and 2 more; 1 tensors of the wrong shape: layers.1.feed_forward.down.weight" in text
    assert "model.layers.1.mlp.down_proj.weight (12, 8), expected (8, 12)" in text
    assert text.endswith("`allow_unused` PATTERN leaves tensors out")
    assert "\n" not in text


def test_unused_tensors_are_refused_unless_allowed():
    source = Arrays(llama_shapes() | {"value_head.weight": (1, D_MODEL)}, CONFIG)
    with pytest.raises(UserError, match=r"1 unused tensors: value_head\.weight"):
        planned(source)
    _, steps = planned(source, ["value_*"])
    assert all("value_head.weight" not in step.sources for step in steps)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_joined_tensors_are_checked_one_by_one(name):
    """Queries and keys of swapped sizes have the right number of rows together."""
    swapped = {"q_proj": name, name: "q_proj"}
    shapes = llama_shapes()
    pair = [f"model.layers.1.self_attn.{n}.weight" for n in swapped]
    shapes[pair[0]], shapes[pair[1]] = shapes[pair[1]], shapes[pair[0]]
    with pytest.raises(UserError, match=r"1 tensors of the wrong shape: .* expected 8, 4, 4 rows"):
        planned(Arrays(shapes, CONFIG))


def test_two_models_in_a_file_require_a_choice():
    source = Arrays(llama_shapes() | llama_shapes("ema."), CONFIG)
    with pytest.raises(UserError, match=r"prefixes '', 'ema\.', .* `allow_unused` 'ema\.\*' leaves out the last"):
        find_family(source, FAMILIES)
    _, steps = planned(source, ["ema.*"])
    assert not any(name.startswith("ema.") for step in steps for name in step.sources)


def test_what_is_missing_is_named_with_the_prefix_that_all_names_share():
    """A map without the `model.` of a state dict of Hugging Face finds the layers, but not a head beside them."""
    family = family_named("llama")
    rules = tuple(replace(rule, required=rule.required or rule.target == "head.weight") for rule in family.rules)
    with pytest.raises(UserError, match=r"head\.weight \(from model\.lm_head\.weight\); 1 unused tensors: lm_head"):
        planned(Arrays(llama_shapes(), CONFIG), families=[replace(family, body="", rules=rules)])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "a mixture of experts"),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "a mixture of experts"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "attention to an encoder"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", "attention to an encoder"),
        ("backbone.layers.0.mixer.A_log", "state-space layers"),
    ],
)
def test_what_no_map_can_convert_is_named(name, what):
    shapes = {n: shape for n, shape in llama_shapes().items() if "mlp" not in n} | {name: (2, 2)}
    with pytest.raises(UserError, match=rf"has {what} \({re.escape(name)}\) .*, which DSMR lacks"):
        find_family(Arrays(shapes, CONFIG | {"model_type": "other"}), FAMILIES)


def test_unknown_families_are_refused():
    source = Arrays({f"blocks.{i}.w": (2, 2) for i in range(9)})
    with pytest.raises(UserError, match=r"unknown family, .*\.3\.w and 5 more; known are dsmr, aria, .*`map_file`"):
        find_family(source, FAMILIES)
    with pytest.raises(UserError, match=r"unknown family \(model_type t5 in its config\.json\), found"):
        find_family(Arrays(source.shapes, {"model_type": "t5"}), FAMILIES)
    shapes = {name: shape for name, shape in llama_shapes().items() if "self_attn" not in name}
    with pytest.raises(UserError, match="`family` llama lists what is missing"):
        find_family(Arrays(shapes, CONFIG), FAMILIES)
    with pytest.raises(UserError, match=r"layer 0 has no attention of llama, expected layers\.0\.self_attn\.q_proj"):
        planned(Arrays(shapes, CONFIG), families=[family_named("llama")])
    foreign = Arrays({"blocks.0.w": (2, 2)})
    lacking = r"no embedding of dsmr \(embed\.weight\), found blocks\.0\.w; expected another family, or a map"
    with pytest.raises(UserError, match=lacking):
        find_family(foreign, [family_named("dsmr")])
    lacking = r"no embedding of custom_map\.toml \(decoder\.token_table\.weight\), .* expected another map"
    with pytest.raises(UserError, match=lacking):
        find_family(foreign, [load_map(EXAMPLE)])
    with pytest.raises(UserError, match=r"`allow_unused` \* leaves out all 1 tensors, expected those of a model"):
        find_family(foreign, FAMILIES, ["*"])
    with pytest.raises(UserError, match=r"weights\.pt: has no tensors, expected those of a model"):
        find_family(Arrays({}), FAMILIES)
    with pytest.raises(UserError, match="`family` lama: expected one of dsmr, aria, llama"):
        family_named("lama")


def test_names_that_are_equal_without_wrappers_are_refused():
    shapes = llama_shapes() | {"_orig_mod.lm_head.weight": (V, D_MODEL)}
    with pytest.raises(UserError, match=r"lm_head\.weight and _orig_mod\.lm_head\.weight both mean lm_head\.weight"):
        find_family(Arrays(shapes), FAMILIES)


@pytest.mark.parametrize("stated", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_the_weights_decide_whether_the_head_is_tied(stated):
    """A copy of the embedding is tied unless the configuration says false; any other head is not tied."""
    source = Arrays(llama_shapes(), CONFIG | stated)
    assert not planned(source)[0].tie_embeddings
    source.values["lm_head.weight"] = source.values["model.embed_tokens.weight"]
    config, steps = planned(source)
    assert config.tie_embeddings == (stated != {"tie_word_embeddings": False})
    assert ("head.weight" in {step.target for step in steps}) != config.tie_embeddings


def test_a_tied_embedding_may_have_the_name_of_the_head():
    shapes = llama_shapes()
    del shapes["model.embed_tokens.weight"]
    config, steps = planned(Arrays(shapes, CONFIG))
    assert config.tie_embeddings
    assert {step.target: step.sources for step in steps}["embed.weight"] == ("lm_head.weight",)


def test_an_untied_model_without_a_head_is_refused():
    shapes = llama_shapes()
    del shapes["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 parameters without a tensor: head\.weight \(from lm_head\.weight\)"):
        planned(Arrays(shapes, CONFIG | {"tie_word_embeddings": False}))


@pytest.mark.parametrize("number", ["99999999", "9" * 5000, "007"])
def test_a_huge_layer_number_is_refused_at_once(number):
    shapes = llama_shapes() | {f"model.layers.{number}.input_layernorm.weight": (D_MODEL,)}
    for stated in (CONFIG, {"num_attention_heads": 4}):
        with pytest.raises(
            UserError, match=r"no tensors of layer 2, expected|1 unused tensors: model\.layers\.|expected at most 1,024"
        ):
            planned(Arrays(shapes, stated))
    planned(Arrays(shapes, CONFIG), [f"model.layers.{number}.*"])


def test_tie_embeddings_does_not_drop_a_separate_head():
    """`tie_embeddings` requires a head that is a copy of the embedding or may be left out."""
    source = Arrays(llama_shapes(), CONFIG)
    with pytest.raises(UserError, match=r"1 unused tensors: lm_head\.weight"):
        planned(source, tie_embeddings=True)
    assert planned(source, ["lm_head.weight"], tie_embeddings=True)[0].tie_embeddings
    source.values["lm_head.weight"] = source.values["model.embed_tokens.weight"]
    assert planned(source, tie_embeddings=True)[0].tie_embeddings


def test_gpt2_and_nanogpt_are_distinguished_by_shape():
    """Even if all other matrices are square."""
    for qkv, name in (((D_MODEL, 3 * D_MODEL), "gpt2"), ((3 * D_MODEL, D_MODEL), "nanogpt")):
        source = Arrays(gpt2_shapes(qkv))
        assert find_family(source, FAMILIES)[0].name == name
        _, steps = planned(source, n_heads=2)
        transforms = {step.target: step.transform for step in steps}
        assert transforms["layers.0.attention.out.weight"] == ("transpose" if name == "gpt2" else "identity")


BETA = {f"{n}_x_beta": (D_MODEL,) for n in ("layers_x_0_x_0_x_0", "layers_x_1_x_0_x_0", "final_norm")}


@pytest.mark.parametrize(
    ("source", "possible"),
    [
        (x_transformers("gamma", 0.0), [""]),
        (x_transformers("g", -0.2), [""]),
        (x_transformers("gamma", 0.0, head=False), ["", "-1.31"]),
        (x_transformers("gamma", 1.0), ["-1.30"]),
        (x_transformers("gamma", 0.5), ["", "-1.30"]),
        (x_transformers("g", 1.0), ["-1.30", "-1.20"]),
        (x_transformers("g", 1.0, rotary=False), ["-1.30"]),
        (x_transformers("gamma", 1.0, **BETA), ["-1.30", "-1.20"]),
        (x_transformers("weight", 1.0), ["-1.30", "-1.20"]),
        (x_transformers("weight", 1.0, final_norm_x_bias=(D_MODEL,)), ["-1.20"]),
    ],
)
def test_x_transformers_versions_are_distinguished_by_their_norms(source, possible):
    """By names and by gains near 0 or 1; if two versions fit, the error names both."""
    names = [f"x-transformers{end}" for end in possible]
    if len(names) == 1:
        assert find_family(source, FAMILIES)[0].name == names[0]
        return
    with pytest.raises(UserError, match=r"the weights fit (.*); choose one with `family`") as raised:
        find_family(source, FAMILIES)
    assert all(f"{name} (" in str(raised.value) for name in names)
    assert str(raised.value).count("x-transformers") == len(names)


@pytest.mark.parametrize("described", [True, False])
def test_our_own_checkpoints_convert_bitwise(described):
    """With their configuration, or with settings instead of it."""
    options = {"n_heads": 2, "head_dim": 4, "rope_theta": 77.0, "activation": "relu", "norm": "layer"}
    sizes = {"vocab_size": V, "d_model": 8, "n_layers": 3, "n_kv_heads": 1, "d_ff": 6, "max_positions": 9}
    biases = ("norm_bias", "attention_bias", "output_bias", "feed_forward_bias", "head_bias")
    switches = {"tie_embeddings": False, "gated": False} | dict.fromkeys(biases, True)
    config = ModelConfig(**options, **sizes, **switches)
    parameters = dict(tree_flatten(DSMR(config).parameters()))
    source = Arrays({name: p.shape for name, p in parameters.items()}, config.to_dict() if described else {})
    found, steps = planned(source, **({} if described else options))
    assert found == config
    for step in steps:
        made = step.apply([source.read(name) for name in step.sources], found)
        np.testing.assert_array_equal(made, source.values[step.target])


def test_missing_entries_of_our_own_configuration_have_their_defaults():
    """Without horizons the memory is one segment, not full attention."""
    config = ModelConfig(vocab_size=V, d_model=8, n_layers=2, n_heads=2, head_dim=4, d_ff=6)
    shapes = {name: p.shape for name, p in tree_flatten(DSMR(config).parameters())}
    stated = {name: value for name, value in config.to_dict().items() if name not in ("horizons", "segment_length")}
    source = Arrays(shapes, stated)
    fields = configure(*find_family(source, FAMILIES), source).fields
    assert (fields["horizons"], fields["segment_length"]) == (config.horizons, config.segment_length)
    assert planned(source)[0] == config


def test_planning_a_huge_model_allocates_nothing():
    config = ModelConfig(vocab_size=128_256, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128)
    before = active_memory()
    mx.reset_peak_memory()
    shapes = parameter_shapes(config)
    assert shapes["layers.79.attention.qkv.weight"] == (80 * 128, 8192)
    assert mx.get_peak_memory() - before < 1 << 20


RULE = '[[rule]]\nfrom = "tokens.weight"\nto = "embed.weight"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[config", r"Expected '\]'"),
        ("rules = []\n" + RULE, "unknown key rules; known are config, rule, ignored"),
        ("ignored = [1]\n" + RULE, r"ignored = \[1\]: expected a list of names"),
        ("[config]\nheads = 4\n" + RULE, "config: unknown key heads; known are d_model, "),
        ("", r'expected a \[\[rule\]\] with to = "embed.weight"'),
        (RULE + "name = 1\n", "rule 1: unknown key name; known are from, to, transform, required"),
        (RULE + '[[rule]]\nfrom = "x"\n', "rule 2: missing key to"),
        (RULE + '[[rule]]\nfrom = [1]\nto = "norm.weight"\n', r"rule 2: from = \[1\]: expected a name or a list"),
        (
            RULE + '[[rule]]\nfrom = "x"\nto = "nrom.weight"\n',
            "rule 2: to = 'nrom.weight': expected one of embed",
        ),
        (RULE + 'transform = "turn"\n', "rule 1: transform = 'turn': expected one of identity, "),
        (RULE + 'transform = "concatenate"\n', "expected several names for transform = 'concatenate'"),
        (RULE + '[[rule]]\nfrom = ["a", "b"]\nto = "norm.weight"\n', "expected one name for transform = 'identity'"),
        (RULE + '[[rule]]\nfrom = "x"\nto = "layers.{i}.attention.out.weight"\n', r"from = 'x': expected \{i\} once"),
        (RULE + '[[rule]]\nfrom = "x.{i}"\nto = "norm.weight"\n', r"from = 'x.\{i\}': expected \{i\} not at all"),
        ("rule = [1]", r"rule 1: expected a table \[\[rule\]\]"),
    ],
)
def test_invalid_maps_are_refused(tmp_path, text, message):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"map.toml: .*{message}"):
        load_map(path)


def test_a_missing_map_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: cannot be read \(No such file or directory\), expected a map"):
        load_map(tmp_path / "none.toml")


def piano_shapes(d: int = 16) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model in examples/custom_map.toml, without biases."""
    layer = {"attn.wq": (d, d), "attn.wk": (4, d), "attn.wv": (4, d), "attn.wo": (d, d), "ln_attn": (d,)}
    layer |= {"mlp.w1": (D_FF, d), "mlp.w3": (D_FF, d), "mlp.w2": (d, D_FF), "ln_mlp": (d,)}
    shapes = {"decoder.token_table.weight": (V, d), "decoder.ln_out.weight": (d,), "to_vocab.weight": (V, d)}
    return shapes | {f"decoder.blocks.0.{name}.weight": shape for name, shape in layer.items()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('norm = "rms"', 'norm = "batch"', "norm = 'batch': expected one of rms, layer"),
        ("norm_eps = 1e-6", 'norm_eps = "small"', "norm_eps = 'small': expected float"),
        ("norm_eps = 1e-6", "horizons = [1, 2]", r"horizons = \[1, 2\]: expected n_layers = 1 integers"),
        ("norm_eps = 1e-6", "n_layers = 1000000000000", None),
        ("norm_eps = 1e-6", "vocab_size = 1000000000000", "vocab_size = 1000000000000: expected at most 4,194,304"),
        ("norm_eps = 1e-6", "rope_dims = 3", "rope_dims = 3: expected an even number from 0 to head_dim = 2"),
    ],
)
def test_invalid_values_in_a_map_name_the_map(tmp_path, old, new, message):
    path = tmp_path / "map.toml"
    path.write_text(EXAMPLE.read_text().replace(old, new))
    message = r" = 1000000000000 for map\.toml: expected at most" if message is None else rf"map\.toml: {message}"
    with pytest.raises(UserError, match=message):
        planned(Arrays(piano_shapes()), families=[load_map(path)])


def test_invalid_settings_do_not_name_the_map():
    with pytest.raises(UserError, match=r"^config: norm = 'batch'"):
        planned(Arrays(piano_shapes()), families=[load_map(EXAMPLE)], norm="batch")


def test_a_required_rule_without_tensors_is_refused(tmp_path):
    """Even if the model could do without that parameter."""
    path = tmp_path / "map.toml"
    path.write_text(EXAMPLE.read_text())
    config, _ = planned(Arrays(piano_shapes()), families=[load_map(path)])
    assert not config.attention_bias
    path.write_text(EXAMPLE.read_text().replace("required = false", ""))
    with pytest.raises(UserError, match=r"2 parameters .*: layers\.0\.attention\.qkv\.bias \(from .*, head\.bias"):
        planned(Arrays(piano_shapes()), families=[load_map(path)])


def test_a_map_without_a_rule_for_attention_is_refused(tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(EXAMPLE.read_text().replace(".wo.weight", ".wo.wieght"))
    with pytest.raises(UserError, match=r"layer 0 has no attention of map\.toml, expected .*wo\.wieght"):
        planned(Arrays(piano_shapes()), families=[load_map(path)])
