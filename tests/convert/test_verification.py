"""Verification: originals are rebuilt; correct weights pass, wrong weights and settings fail."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")

from support.foreign_models import MemorySource, randomise  # noqa: E402
from support.original_cases import (  # noqa: E402
    CASES,
    DSMR_CONFIG,
    T,
    V,
    llama_folder,
    prepared,
    tokens_for,
    x_transformer,
)

from dsmr_mlx import DSMR, UserError  # noqa: E402
from dsmr_mlx.common.limits import MAX_SIZES, MAX_TOKENS  # noqa: E402
from dsmr_mlx.convert import reference  # noqa: E402
from dsmr_mlx.convert.families import family_named  # noqa: E402
from dsmr_mlx.convert.importing import plan_conversion  # noqa: E402
from dsmr_mlx.convert.originals import original_of  # noqa: E402
from dsmr_mlx.convert.verification import (  # noqa: E402
    TOLERANCE,
    activations,
    compare_with_file,
    compare_with_original,
    default_length,
    random_tokens,
    verify,
)

ROUNDING = 1e-5


def perturb(model: DSMR, name: str) -> None:
    """Change one entry of one weight."""
    weight = dict(tree_flatten(model.parameters()))[name]
    weight[3, 5] += 0.5
    model.load_weights([(name, weight)], strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_original_is_rebuilt_and_its_conversion_passes(case):
    """The rebuilt original and the streamed MLX model compute the logits of the source program."""
    program, model, original = prepared(case)
    tokens = tokens_for(model)
    with torch.no_grad():
        logits = program(torch.tensor(tokens))
    logits = logits[0] if isinstance(logits, tuple) else getattr(logits, "logits", logits)
    np.testing.assert_allclose(original(tokens).logits, logits.numpy(), rtol=0, atol=1e-5)
    verification = compare_with_original(model, original, tokens)
    norm = [] if case == "x-transformers, tied" else ["final norm"]
    assert [row.what for row in verification.rows] == ["layer 0", "layer 1", *norm, "logits"]
    assert max(row.max_relative for row in verification.rows) < ROUNDING
    assert verification.passed
    assert verification.agreement == 1
    assert verification.tokens == tokens.shape


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_changed_weight_fails_and_shows_its_layer(case):
    _, model, original = prepared(case)
    tokens = tokens_for(model)
    perturb(model, "layers.1.attention.out.weight")
    verification = compare_with_original(model, original, tokens)
    assert not verification.passed
    first, second, *others = (row.max_relative for row in verification.rows)
    assert first < ROUNDING
    assert min(second, *others) > TOLERANCE
    perturb(model, "layers.0.attention.qkv.weight")
    assert compare_with_original(model, original, tokens).rows[0].max_relative > TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("llama", {"rope_theta": 20_000.0}),
        ("llama", {"norm_eps": 1e-5}),
        ("llama", {"rope_interleaved": True}),
        ("gpt-neox", {"activation": "gelu_tanh"}),
        ("gpt-neox", {"parallel_residual": False}),
        ("gpt2", {"activation": "gelu"}),
        ("aria", {"rope_theta": 10_000.0}),
        ("x-transformers", {"rope_dims": 16}),
        ("mistral, windows", {"horizons": [9, 9]}),
    ],
)
def test_a_wrong_setting_fails(case, wrong):
    _, model, original = prepared(case)
    other = DSMR(replace(model.config, **wrong))
    other.load_weights(tree_flatten(model.parameters()))
    verification = compare_with_original(other, original, tokens_for(model))
    assert not verification.passed
    assert verification.rows[0].max_relative > TOLERANCE
    assert verification.rows[-1].max_relative > TOLERANCE


@pytest.mark.slow
def test_a_dsmr_is_equal_beyond_its_horizons():
    """The original keeps its stored horizons; with other horizons the models are equal up to these."""
    model = randomise(reference.DSMR(DSMR_CONFIG))
    source = MemorySource(model.state_dict(), asdict(DSMR_CONFIG))

    def verified(length: int, **horizons):
        config = replace(DSMR_CONFIG, **horizons)
        mlx = DSMR(config)
        mlx.load_weights([(name, source.read(name)) for name in source.shapes])
        return compare_with_original(
            mlx, original_of(family_named("dsmr"), source, "", config), random_tokens(config, length)
        )

    assert verified(60).passed
    assert verified(8, horizons=[2, 0]).passed
    assert not verified(9, horizons=[2, 0]).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_verified_before_it_is_cast_or_quantized(tmp_path, dtype):
    """Both sides compute in float32 with the stored weights, so no extra tolerance is needed."""
    folder, _ = llama_folder(tmp_path / "llama", dtype)
    quantization = {"bits": 4, "group_size": 32} if dtype == torch.float32 else None
    conversion = plan_conversion(folder, dtype="bfloat16", quantization=quantization, segment_length=16)
    verification = verify(conversion, tolerance=ROUNDING)
    assert verification.passed
    assert verification.against.endswith("LlamaForCausalLM")
    assert verification.tokens == (2, 64)  # max_position_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"rotary_pos_emb": True},
        {"rotary_pos_emb": True, "rotary_base_rescale_factor": 7.0},
        {"tie": True},
    ],
)
def test_x_transformers_in_half_precision_are_verified_as_converted(tmp_path, dtype, options):
    """Gains and positions are computed in float32, and frequencies in 16 bits are those of their base."""
    torch.manual_seed(0)
    program = randomise(x_transformer(heads=2, attn_dim_head=64, **options)[0]).to(dtype)
    torch.save(program.state_dict(), tmp_path / "model.pt")
    settings = {"family": "x-transformers", "settings": {"n_heads": 2}, "segment_length": 16}
    conversion = plan_conversion(tmp_path / "model.pt", dtype="float32", **settings)
    verification = verify(conversion, tolerance=ROUNDING)
    assert verification.passed, verification
    assert conversion.compared == "the weights as written"
    written, verified = (dict(weights) for weights in (conversion.final_weights(), conversion.float32_weights()))
    assert written.keys() == verified.keys()
    assert all(mx.array_equal(written[name], verified[name]) for name in written)
    if dtype != torch.float32:
        compared = plan_conversion(tmp_path / "model.pt", **settings).compared
        assert compared == f"the weights before they are cast to {str(dtype).removeprefix('torch.')}"


def test_wrong_settings_of_rope_fail_although_frequencies_are_rounded(tmp_path):
    program = randomise(x_transformer(heads=2, attn_dim_head=64, rotary_pos_emb=True)[0]).bfloat16()
    torch.save(program.state_dict(), tmp_path / "model.pt")
    for wrong in ({"rope_theta": 20_000.0}, {"rope_dims": 16}):
        settings = {"n_heads": 2} | wrong
        assert not verify(plan_conversion(tmp_path / "model.pt", settings=settings, segment_length=16)).passed


def test_stored_logits_pass_and_fail(tmp_path):
    """Written as in the module docstring; tokens beyond the exact ones are not compared."""
    folder, model = llama_folder(tmp_path / "llama")
    tokens = np.random.default_rng(0).integers(0, V, (2, 50))
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), output_hidden_states=True)
    logits, path = output.logits.numpy(), tmp_path / "reference.npz"
    np.savez(path, tokens=tokens, logits=logits)
    verification = verify(plan_conversion(folder), path)
    assert verification.passed
    assert ([row.what for row in verification.rows], verification.against) == (["logits"], "reference.npz")
    assert (verification.tokens, verification.agreement) == ((2, 50), 1)

    short = plan_conversion(folder, horizons="uniform:8", segment_length=8)
    assert (verify(short, path).tokens, verify(short, path).passed) == ((2, 16), True)
    model = DSMR(short.config)
    model.load_weights(list(short.float32_weights()))
    assert not compare_with_file(model, path).passed

    np.savez(path, tokens=tokens[0].astype(np.int32), logits=logits[0].astype(np.float64))
    assert verify(plan_conversion(folder), path).passed
    hidden = np.stack([output.hidden_states[1].numpy()] * 2)
    np.savez(path, tokens=tokens, logits=logits, hidden=hidden)
    rows = verify(plan_conversion(folder), path).rows
    assert [row.max_relative < ROUNDING for row in rows] == [True, False, True]
    logits[1, 30, 7] += 0.01
    np.savez(path, tokens=tokens, logits=logits)
    wrong = verify(plan_conversion(folder), path)
    assert not wrong.passed
    assert wrong.rows[0].max_absolute == pytest.approx(0.01, rel=1e-3)


TOKENS, LOGITS = np.zeros((2, 5), np.int64), np.zeros((2, 5, V), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": TOKENS}, "has no logits, expected float32"),
        ({"logits": LOGITS}, "has no tokens, expected integers"),
        ({"tokens": TOKENS, "logits": LOGITS, "mask": TOKENS}, "unknown array mask; known are tokens, logits, hidden"),
        ({"tokens": TOKENS.astype(np.float32), "logits": LOGITS}, r"tokens: found float32 \(2, 5\), expected integers"),
        ({"tokens": TOKENS[None], "logits": LOGITS}, r"tokens: found int64 \(1, 2, 5\)"),
        ({"tokens": TOKENS[:, :0], "logits": LOGITS[:, :0]}, r"tokens: found int64 \(2, 0\)"),
        ({"tokens": TOKENS + V, "logits": LOGITS}, "tokens: found ids from 41 to 41, expected 0 to 40"),
        ({"tokens": TOKENS - 1, "logits": LOGITS}, "tokens: found ids from -1 to -1, expected 0 to 40"),
        ({"tokens": TOKENS, "logits": LOGITS[:, :4]}, r"logits: found float32 \(2, 4, 41\), .* here \(2, 5, 41\)"),
        ({"tokens": TOKENS, "logits": LOGITS[..., :40]}, r"logits: found float32 \(2, 5, 40\)"),
        ({"tokens": TOKENS, "logits": LOGITS.astype(np.float16)}, "logits: found float16"),
        ({"tokens": TOKENS, "logits": LOGITS[0]}, r"logits: found float32 \(5, 41\)"),
        ({"tokens": TOKENS, "logits": LOGITS, "hidden": LOGITS}, r"hidden: .* here \(2, 2, 5, 32\)"),
        ({"tokens": np.array(["a"]), "logits": LOGITS}, "tokens: found <U1"),
        ({"tokens": np.array([{}]), "logits": LOGITS}, "not a .npz file of arrays"),
    ],
)  # fmt: skip
def test_invalid_stored_logits_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UserError, match=f"reference.npz: {message}"):
        compare_with_file(DSMR(DSMR_CONFIG), tmp_path / "reference.npz")


def test_files_without_stored_logits_are_refused(tmp_path):
    np.save(tmp_path / "array.npy", LOGITS)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "cut.npz", tokens=TOKENS, logits=LOGITS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:400])
    with pytest.raises(UserError, match=r"missing\.npz: cannot be read \(No such file or directory\), expected"):
        compare_with_file(DSMR(DSMR_CONFIG), tmp_path / "missing.npz")
    for name in ("array.npy", "text.npz", "cut.npz"):
        with pytest.raises(UserError, match=f"{name}: not a .npz file of arrays .*, expected tokens and logits"):
            compare_with_file(DSMR(DSMR_CONFIG), tmp_path / name)


@pytest.mark.parametrize("name", ["embed.weight", "layers.1.feed_forward.down.weight"])
def test_nan_on_either_side_fails(name):
    """A difference of NaN is never within the tolerance; the record stays valid JSON."""
    program = randomise(reference.DSMR(DSMR_CONFIG))
    right = program.state_dict()
    wrong = {key: tensor.clone() for key, tensor in right.items()}
    wrong[name][:] = torch.nan
    tokens = random_tokens(DSMR_CONFIG, 20)
    for ours, theirs in ((right, wrong), (wrong, right), (wrong, wrong)):
        model = DSMR(DSMR_CONFIG)
        model.load_weights([(key, mx.array(tensor.numpy())) for key, tensor in ours.items()])
        source = MemorySource(theirs, asdict(DSMR_CONFIG))
        verification = compare_with_original(model, original_of(family_named("dsmr"), source, "", DSMR_CONFIG), tokens)
        assert not verification.passed
        record = json.loads(json.dumps(verification.to_dict(), allow_nan=False))
        assert (record["passed"], record["differences"][-1]["max_relative"]) == (False, None)


def test_verification_to_dict():
    _, model, original = prepared("dsmr")
    verification = compare_with_original(model, original, tokens_for(model, 8))
    record = verification.to_dict()
    assert record["tokens"] == [2, 8]
    assert (record["passed"], record["tolerance"], record["argmax_agreement"]) == (True, TOLERANCE, 1.0)
    assert [row["what"] for row in record["differences"]] == ["layer 0", "layer 1", "final norm", "logits"]
    row = record["differences"][0]
    assert row["max_relative"] == row["max_absolute"] / np.abs(original(tokens_for(model, 8)).hidden[0]).max()


def test_default_length():
    """Several segments unless they are too long, and at most the exact tokens."""
    config = replace(DSMR_CONFIG, segment_length=16)
    assert default_length(config) == 256
    assert default_length(config, 100) == 100
    assert default_length(replace(config, segment_length=512)) == 1280
    assert default_length(replace(config, segment_length=4096)) == 2048
    assert default_length(replace(config, max_positions=T)) == T


def test_random_tokens_are_reproducible_and_use_the_whole_vocabulary():
    tokens, again, others = (random_tokens(DSMR_CONFIG, 500, lanes=3, seed=seed) for seed in (0, 0, 1))
    assert tokens.shape == (3, 500)
    assert set(tokens.ravel()) == set(range(V))
    assert np.array_equal(tokens, again)
    assert not np.array_equal(tokens, others)


def test_activations_change_nothing(monkeypatch):
    """A bfloat16 model is run in float32 and stays unchanged; compiling is disabled meanwhile and then restored."""
    model = DSMR(DSMR_CONFIG)
    model.set_dtype(mx.bfloat16)
    before = {name: mx.array(array) for name, array in tree_flatten(model.parameters())}
    calls = []
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: calls.append("on"))
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    tokens, device = tokens_for(model), mx.default_device()
    found = activations(model, tokens)
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    activations(model, tokens)
    assert calls == ["off", "on", "off"]
    assert mx.default_device() == device
    wide = DSMR(DSMR_CONFIG)
    wide.load_weights([(name, array.astype(mx.float32)) for name, array in before.items()])
    np.testing.assert_allclose(found.logits, np.array(wide(mx.array(tokens))[0]), atol=1e-5)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], array) and array.dtype == mx.bfloat16 for name, array in before.items())


def test_tokens_beyond_learned_positions_are_refused():
    _, model, original = prepared("nanogpt")
    with pytest.raises(UserError, match=f"max_positions = {T}"):
        activations(model, tokens_for(model, T + 1))
    assert original(tokens_for(model)).logits.shape == (2, T, V)


@pytest.mark.slow
def test_another_architecture_is_refused():
    _, _, original = prepared("dsmr")
    model = DSMR(replace(DSMR_CONFIG, n_layers=3, horizons=[4, 4, 4]))
    with pytest.raises(UserError, match=r"states \(2, 2, 37, 32\), logits \(2, 37, 41\); expected \(3, 2, 37, 32\)"):
        compare_with_original(model, original, tokens_for(model))


@pytest.mark.slow
def test_memory_of_a_comparison_is_independent_of_the_horizons(tmp_path):
    """Horizons of 2^24 tokens in both models, and a folder with a context of 131,072."""
    config = replace(DSMR_CONFIG, horizons=[MAX_TOKENS, 4])
    program = randomise(reference.DSMR(DSMR_CONFIG))
    source = MemorySource(program.state_dict(), asdict(config))
    model = DSMR(config)
    model.load_weights([(name, source.read(name)) for name in source.shapes])
    original = original_of(family_named("dsmr"), source, "", config)
    assert compare_with_original(model, original, random_tokens(config, 60)).passed
    long = replace(config, segment_length=MAX_SIZES["segment_length"])
    model = DSMR(long)
    model.load_weights([(name, source.read(name)) for name in source.shapes])
    assert not compare_with_original(model, original, random_tokens(config, 60)).passed

    folder, _ = llama_folder(tmp_path / "llama")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | {"max_position_embeddings": 131_072}))
    conversion = plan_conversion(folder, segment_length=16)
    assert min(conversion.config.horizons) > 100_000
    assert verify(conversion).passed
