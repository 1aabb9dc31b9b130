"""Originals are rebuilt from weights and configuration, for any version, or refused with the reason."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from support.foreign_models import MemorySource, PianoNet, randomise  # noqa: E402
from support.original_cases import CASES, DSMR_CONFIG, SMALL, T, llama, transformers_model, x_transformer  # noqa: E402

from dsmr_mlx import UserError  # noqa: E402
from dsmr_mlx.convert import originals, reference  # noqa: E402
from dsmr_mlx.convert.families import FAMILIES, family_named  # noqa: E402
from dsmr_mlx.convert.importing import plan_conversion  # noqa: E402
from dsmr_mlx.convert.mapping import load_map  # noqa: E402
from dsmr_mlx.convert.originals import original_of, within  # noqa: E402
from dsmr_mlx.convert.verification import random_tokens, verify  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_map.toml"


@pytest.mark.parametrize(
    ("package", "case", "advice"),
    [
        ("torch", "dsmr", r"pip install 'dsmr-mlx\[convert\]'"),
        ("transformers", "llama", "pip install transformers"),
        ("x_transformers", "x-transformers", "pip install x-transformers"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, case, advice):
    program, stated = CASES[case][0]()
    source = MemorySource(program.state_dict(), stated)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{advice}, or `logits_file` reference.npz with stored logits"):
        original_of(family_named(case), source, "", DSMR_CONFIG)


def test_every_family_has_an_original():
    assert {family.original for family in FAMILIES} == originals.ORIGINALS.keys()


def test_unknown_originals_are_refused():
    model, stated = llama()
    weights = model.state_dict()
    for family, config, message in (
        ("llama", {}, "weights.pt: cannot verify: no config.json; expected it beside the weights"),
        ("llama", stated | {"model_type": "mamba"}, "model_type = 'mamba'; expected one of llama, mistral"),
        ("llama", stated | {"rms_norm_eps": "small"}, "transformers refuses its config.json .*rms_norm_eps"),
        (
            "llama",
            stated | {"hidden_size": 64},
            r"embed_tokens.weight is \(41, 32\), in LlamaForCausalLM it is \(41, 64\)",
        ),
        (
            "llama",
            stated | {"num_hidden_layers": 3},
            r"transformers refuses its config.json \(3 layers, the weights have 2\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            original_of(family_named(family), MemorySource(weights, config), "", DSMR_CONFIG)


def test_wrong_sizes_in_a_configuration_allocate_no_memory(tmp_path):
    """A missing size would default to that of a 7B model; the wrong one would make a matrix of 128 TiB."""
    model, stated = llama()
    torch.save({"state_dict": model.state_dict(), "config": {"lr": 1e-3}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: cannot verify: no config\.json"):
        verify(plan_conversion(tmp_path / "model.pt", settings={"n_heads": 4}))
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        partial = {key: value for key, value in stated.items() if key != name}
        with pytest.raises(UserError, match=f"its config.json lacks {name}; expected these entries, or `logits_file`"):
            original_of(family_named("llama"), MemorySource(model.state_dict(), partial), "", DSMR_CONFIG)
    wrong = stated | {"intermediate_size": 1 << 40}
    with pytest.raises(UserError, match=r"proj.weight is \(64, 32\), in LlamaForCausalLM it is \(1099511627776, 32\)"):
        original_of(family_named("llama"), MemorySource(model.state_dict(), wrong), "", DSMR_CONFIG)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    segment=st.integers(1, 20), horizons=st.lists(st.integers(0, 60), min_size=2, max_size=2), length=st.integers(1, 45)
)
def test_horizons_and_segments_longer_than_the_stream_change_nothing(segment, horizons, length):
    """The reference, which does not reduce them, equals the reduced configuration."""
    config = replace(DSMR_CONFIG, segment_length=segment, horizons=horizons)
    whole, cut = reference.DSMR(config), reference.DSMR(within(config, length))
    cut.load_state_dict(randomise(whole).state_dict())
    tokens = torch.from_numpy(random_tokens(config, length))
    with torch.no_grad():
        torch.testing.assert_close(cut.eval()(tokens)[0], whole(tokens)[0], rtol=0, atol=1e-5)


def test_a_map_has_no_original_even_if_named_like_a_family(tmp_path):
    path = tmp_path / "llama-2.toml"
    path.write_text(EXAMPLE.read_text())
    source = MemorySource(PianoNet().state_dict())
    with pytest.raises(UserError, match=r"original of llama-2\.toml is unknown, expected `logits_file` reference\.npz"):
        original_of(load_map(path), source, "", DSMR_CONFIG)


def test_tensors_that_the_original_lacks_are_refused_if_the_conversion_uses_them():
    """The MLX model would use a bias that config.json excludes; a value head belongs to another program."""
    model, stated = llama()
    weights = model.state_dict() | {"value_head.weight": torch.zeros(1, 32), "step": torch.ones(1)}
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    original_of(family_named("llama"), MemorySource(weights, stated), "", DSMR_CONFIG)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    with pytest.raises(UserError, match=r"has model.layers.0.self_attn.q_proj.bias, which LlamaForCausalLM lacks"):
        original_of(family_named("llama"), MemorySource(weights, stated), "", DSMR_CONFIG)


def test_names_of_other_versions_and_wrappers():
    """Prefixes, wrappers, the body alone, and the name of the GPT-NeoX head in transformers 4."""
    model, stated = transformers_model("GPTNeoX", **SMALL)
    tokens = random_tokens(DSMR_CONFIG, T)
    with torch.no_grad():
        expected = randomise(model)(torch.tensor(tokens)).logits.numpy()
    weights = model.state_dict()
    weights["embed_out.weight"] = weights.pop("lm_head.weight")
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    wrapped = {f"_orig_mod.policy.{name}": tensor for name, tensor in weights.items()}
    bare = {name.removeprefix("gpt_neox."): tensor for name, tensor in weights.items()}
    for state, prefix in ((wrapped, "policy."), (bare, "")):
        original = original_of(family_named("gpt-neox"), MemorySource(state, stated), prefix, DSMR_CONFIG)
        np.testing.assert_allclose(original(tokens).logits, expected, atol=1e-5)


def test_an_unsuitable_version_of_x_transformers_is_refused(monkeypatch):
    """If the installed version computes something else than the family."""
    program, _ = x_transformer(rotary_pos_emb=True, tie=True)
    source = MemorySource(program.state_dict())
    config = replace(DSMR_CONFIG, n_kv_heads=4, head_dim=16, rope_dims=8, rope_interleaved=True)
    assert "x-transformers-1.31" in original_of(family_named("x-transformers-1.31"), source, "", config).name
    halves = replace(config, rope_interleaved=False)
    with pytest.raises(UserError, match=r"rotates other pairs than x-transformers-1\.20; expected the version that"):
        original_of(family_named("x-transformers-1.20"), source, "", halves)
    for option, problem in (
        ("norm_add_unit_offset", "does not store gains of norms minus 1"),
        ("tie_embedding_scale", "does not scale the logits of a tied head"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(originals, "_takes", lambda module_class, name, lacks=option: name != lacks)
            with pytest.raises(UserError, match=f"{problem}; expected the version that trained it"):
                original_of(family_named("x-transformers"), source, "", config)
