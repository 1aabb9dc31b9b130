"""`dsmr-mlx convert`: converted checkpoints evaluate, generate and convert back."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.recipe import RECIPE, randomized
from support.tiny import write_corpus

import dsmr_mlx
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

torch = pytest.importorskip("torch")

from support.foreign_models import Aria  # noqa: E402

from dsmr_mlx.common.files import sha256  # noqa: E402
from dsmr_mlx.convert import reference, tokenizer_files  # noqa: E402
from dsmr_mlx.convert.exactness import default_segment, exact_horizons, exact_tokens  # noqa: E402
from dsmr_mlx.convert.exporting import export  # noqa: E402
from dsmr_mlx.convert.importing import plan_conversion, write_conversion  # noqa: E402
from dsmr_mlx.convert.weights_source import open_source  # noqa: E402
from dsmr_mlx.tokenizers.registry import load_tokenizer  # noqa: E402

VOCABULARY = PerformanceTokenizer().vocab_size


def config(**options) -> ModelConfig:
    """Return the configuration of a small model."""
    values = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2, "head_dim": 16, "d_ff": 64}
    return ModelConfig(**(values | {"segment_length": 8, "horizons": [12, 4]} | options))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """A small corpus."""
    return write_corpus(tmp_path_factory.mktemp("convert") / "corpus", train=2, validation=2, notes=30)


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """A checkpoint of the PyTorch reference, with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    reference.save(path, reference.DSMR(config()), tokenizer_files.pack(corpus.path / "tokenizer"))
    return path


@pytest.fixture
def llama(tmp_path):
    """A folder written by transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = transformers.LlamaConfig(vocab_size=50, max_position_embeddings=64, bos_token_id=1, **sizes)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def torch_nats(path, corpus: Corpus) -> float:
    """Return the nats per token of the reference on the validation pieces, one piece at a time."""
    model, _ = reference.load(path)
    total = tokens = 0
    for piece in corpus.pieces("validation"):
        ids = torch.tensor(corpus.tokens(piece).astype(np.int64))[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1])
        total += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


@pytest.mark.slow
def test_a_reference_checkpoint_evaluates_equally_in_pytorch_and_mlx(run, saved, corpus):
    """The command verifies it, writes the record and keeps the tokenizer; the checkpoint then generates."""
    ended = run("convert", saved, "model", "--verify")
    assert ended.code == 0, ended.err
    assert "equal to dsmr_mlx.convert.reference" in ended.out
    assert "compared: the weights as written" in " ".join(ended.out.split())
    model, tokenizer = dsmr_mlx.load("model")
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert evaluate(model, corpus).nats_per_token == pytest.approx(torch_nats(saved, corpus), rel=1e-5)
    record = json.loads(Path("model/conversion.json").read_text())
    assert record["verification"]["passed"]
    assert record["verification"]["compared"] == "the weights as written"
    assert record["sha256"] == {"model.pt": sha256(saved)}
    assert (record["family"], record["exact_tokens"]) == ("dsmr", None)
    assert run("generate", "model", "--seconds", 2, "--out", "new.mid").code == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_and_import_are_bitwise(run, trained, suffix):
    assert run("convert", "--to-pytorch", trained.run, f"out{suffix}").code == 0
    assert run("convert", f"out{suffix}", "back").code == 0
    assert run("convert", trained.run, "copy").code == 0
    before, after = (
        checkpoint.load_arrays(f / "model.safetensors") for f in (trained.checkpoint, checkpoint.resolve("back"))
    )
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    for name in ("config.json", "tokenizer/tokenizer.json"):
        assert (checkpoint.resolve("back") / name).read_bytes() == (trained.checkpoint / name).read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("text", ["CC BY-NC-SA\n", "Lizenz für Gewichte\r\n\r\n", "\ufeffa", ""])
def test_the_licence_of_the_weights_is_exported_and_imported(run, trained, suffix, text):
    """In the same bytes, and again from a copy."""
    assert run("convert", trained.run, "model").code == 0
    assert run("convert", "--to-pytorch", "model", f"without{suffix}").code == 0
    assert open_source(f"without{suffix}").licence is None
    Path("model/LICENSE").write_bytes(text.encode())
    for source, exported, target in (("model", f"a{suffix}", "back"), ("back", f"b{suffix}", "again")):
        assert run("convert", "--to-pytorch", source, exported).code == 0
        assert run("convert", exported, target).code == 0
        assert Path(target, "LICENSE").read_bytes() == text.encode()
        if suffix == ".pt":
            assert reference.load(exported)[1]["licence"] == text


def test_a_licence_that_is_not_text_is_refused_by_name(run, trained):
    assert run("convert", trained.run, "model").code == 0
    Path("model/LICENSE").write_bytes(b"\xff\xfe")
    ended = run("convert", "--to-pytorch", "model", "out.safetensors")
    assert (ended.code, "model/LICENSE: cannot be read" in ended.err) == (2, True)
    assert not Path("out.safetensors").exists()


def test_entries_of_other_programs_are_no_licence(tmp_path):
    for licence in (3, ["MIT"], torch.ones(1), None):
        reference.save(tmp_path / "model.pt", reference.DSMR(config()), licence=licence)
        assert open_source(tmp_path / "model.pt").licence is None


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_all_architecture_settings_convert_both_ways(run, corpus, tmp_path, suffix):
    """Verified against the reference; without a stored configuration, the names of the weights show the settings."""
    model = randomized(DSMR(config(**RECIPE)))
    checkpoint.save_model(tmp_path / "model", model.config, model.parameters(), corpus.tokenizer)
    assert run("convert", "--to-pytorch", tmp_path / "model", f"out{suffix}").code == 0
    ended = run("convert", f"out{suffix}", "back", "--verify")
    assert ended.code == 0, ended.err
    back, _ = dsmr_mlx.load("back")
    assert back.config == model.config
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, back))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    mx.save_safetensors("bare.safetensors", before)
    bare = plan_conversion("bare.safetensors", settings={"n_heads": 2, "logit_softcap": 4.0, "zero_init": True})
    found = replace(bare.config, segment_length=8, horizons=[12, 4])
    assert found == model.config


def test_other_families_refuse_settings_that_they_do_not_have(llama):
    with pytest.raises(UserError, match=r"parameters without a tensor: layers\.0\.attention_canon\.weight"):
        plan_conversion(llama, settings={"canon": True})


def test_the_reference_loads_an_export_in_its_dtype(trained, tmp_path):
    conversion = plan_conversion(trained.run, dtype="bfloat16")
    folder = write_conversion(conversion, tmp_path / "half")
    model, _ = reference.load(export(folder, tmp_path / "half.pt"))
    expected = checkpoint.load_arrays(folder / "model.safetensors")
    found = torch.load(tmp_path / "half.pt", weights_only=True)["state_dict"]
    for name, array in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert np.array_equal(found[name].float().numpy(), np.array(array.astype(mx.float32)))
    assert model.config == ModelConfig.load(folder / "config.json")


def test_without_torch_only_safetensors_convert(run, trained, monkeypatch):
    assert run("convert", "--to-pytorch", trained.run, "out.safetensors").code == 0
    assert run("convert", "--to-pytorch", trained.run, "out.pt").code == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "dsmr_mlx.convert.reference")
    monkeypatch.delattr(dsmr_mlx.convert, "reference")
    assert run("convert", "out.safetensors", "model").code == 0
    for arguments in (("out.pt", "other"), ("--to-pytorch", trained.run, "again.pt")):
        ended = run("convert", *arguments)
        assert ended.code == 2
        assert "pip install 'dsmr-mlx[convert]'" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantized_checkpoints_are_smaller_evaluate_and_generate(run, trained, tmp_path, bits):
    source = tmp_path / "model.pt"
    reference.save(source, reference.DSMR(config()), tokenizer_files.pack(trained.corpus / "tokenizer"))
    assert run("convert", source, "whole").code == 0
    ended = run("convert", "whole", "small", "--quantize", bits, "--group-size", 32, "--dtype", "bfloat16")
    assert ended.code == 0, ended.err
    assert checkpoint.weight_bytes("small") < checkpoint.weight_bytes("whole") / 2
    model, _ = dsmr_mlx.load("small")
    assert model.config.quantization == {"bits": bits, "group_size": 32}
    ended = run("compare", "whole", "small", "--data", trained.corpus, "--json")
    change = json.loads(ended.out)["checkpoints"][1]["change"]
    assert change["bytes_percent"] < -50
    assert abs(change["perplexity_percent"]) < {4: 10, 6: 3, 8: 1}[bits]
    assert run("generate", "small", "--seconds", 2, "--out", "new.mid").code == 0
    ended = run("convert", "small", "again", "--quantize", 4)
    assert ended.code == 2
    assert "quantized, expected the weights it was made from" in ended.err
    assert "group_size" in run("convert", "whole", "no", "--quantize", bits, "--group-size", 128).err


@pytest.mark.slow
def test_default_horizons_of_llama_are_exact_over_its_context(run, llama):
    ended = run("convert", llama, "exact", "--segment", 16, "--verify")
    assert ended.code == 0, ended.err
    assert "exact up to 64 tokens" in ended.out
    assert "the vocabulary of llama is not part of this program" in ended.out
    converted = ModelConfig.load("exact/config.json")
    assert (converted.horizons, converted.segment_length) == ([48, 48], 16)
    ended = run("convert", llama, "short", "--segment", 8, "--horizons", "two-scale:long=1x32,short=16", "--verify")
    assert ended.code == 0, ended.err
    assert "a warm start: exact up to 24 tokens only, the original has a context of 64" in ended.out
    _, tokenizer = dsmr_mlx.load("short")
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 50)
    assert run("convert", llama, "wrong", "--tokenizer", "performance").code == 2


def test_a_failed_verification_writes_nothing(run, saved, tmp_path):
    model, _ = reference.load(saved)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        logits = model(torch.tensor(tokens))[0].numpy()
    np.savez(tmp_path / "right.npz", tokens=tokens, logits=logits)
    np.savez(tmp_path / "wrong.npz", tokens=tokens, logits=logits + 0.1)
    ended = run("convert", saved, "model", "--verify", tmp_path / "wrong.npz")
    assert ended.code == 2
    assert "computes different outputs; nothing was written" in ended.err
    assert not list(Path().iterdir())
    assert run("convert", saved, "model", "--verify", tmp_path / "right.npz").code == 0


def test_only_force_replaces_and_only_checkpoints(run, saved, tmp_path):
    assert run("convert", saved, "model").code == 0
    assert "already exists, --force replaces it" in run("convert", saved, "model").err
    assert "nowhere: no such" in run("convert", "nowhere", "model").err  # before what the name of the result lacks
    assert run("convert", saved, "model", "--force").code == 0
    Path("other").mkdir()
    assert "is not a checkpoint" in run("convert", saved, "other", "--force").err
    assert sorted(map(str, Path().iterdir())) == ["model", "other"]
    ended = run("convert", "--to-pytorch", "model", "m.pt", "--quantize", 4)
    assert (ended.code, "--quantize: not with --to-pytorch" in ended.err) == (2, True)
    ended = run("convert", "--to-pytorch", "model", "m.pt", "--segment", 0)
    assert (ended.code, "--segment: not with --to-pytorch" in ended.err) == (2, True)
    assert "ends in .pt or .safetensors" in run("convert", "--to-pytorch", "model", "m.bin").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "gpt5"), "expected one of dsmr"),
        (("--family", "dsmr", "--map", "x.toml"), "--family and --map: expected only one"),
        (("--set", "horizons=[1]"), "expected --horizons instead"),
        (("--set", "hats=1"), "unknown key hats"),
        (("--dtype", "int8"), "expected one of float32"),
        (("--group-size", 32), "expected --quantize with it"),
        (("--group-size", 0), "expected --quantize with it"),
        (("--quantize", 4, "--group-size", 0), "group_size to be one of 32, 64, 128"),
        (("--segment", 0), "--segment 0: expected at least 1"),
        (("--segment", -8), "--segment -8: expected at least 1"),
        (("--verify", "logits.npy"), "expected a .npz file"),
        (("--tokenizer", "nowhere"), "nowhere"),
    ],
)
def test_invalid_arguments_are_named(run, saved, arguments, message):
    ended = run("convert", saved, "model", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not list(Path().iterdir())


def test_a_damaged_stored_tokenizer_is_refused(tmp_path):
    wrong = [({"tokenizer.json": text}, "not base64") for text in ("%", "é")]
    wrong += [({name: "e30="}, "expected file names") for name in ("../x", "..", "", "a\0b")]
    for files, message in wrong:
        reference.save(tmp_path / "model.pt", reference.DSMR(config()), files)
        with pytest.raises(UserError, match=message):
            plan_conversion(tmp_path / "model.pt")


def seen(horizon: int, S: int, length: int) -> list[int]:
    """Return for each token of a piece how many tokens it sees, itself included."""
    return [t - max(0, t - t % S - horizon) + 1 for t in range(length)]


def test_exactness_ends_at_the_first_token_that_misses_one():
    """Compared with a count of the tokens that every token sees."""
    S = 8
    for horizon in range(40):
        c = config(horizons=[40, horizon], segment_length=S)
        covered = next(t for t, n in enumerate(seen(horizon, S, 200)) if n < t + 1)
        assert exact_tokens(c) == covered
    c = config(horizons=[40, 40], segment_length=S)
    assert exact_tokens(c, [None, 10]) == 11
    assert exact_tokens(replace(c, max_positions=7)) == 7


def test_exactness_to_a_dsmr_ends_at_the_first_difference():
    """Compared with a count of the tokens that every token sees in both models."""
    for S, theirs in ((8, 8), (8, 4), (4, 8)):
        converted = [config(horizons=[12, horizon], segment_length=S) for horizon in range(20)]
        originals = [config(horizons=[12, own], segment_length=theirs) for own in range(20)]
        for horizon, ours in enumerate(converted):
            for own, original in enumerate(originals):
                pairs = [(12, 12), (horizon, own)]
                differ = [
                    t
                    for mine, other in pairs
                    for t, (a, b) in enumerate(zip(seen(mine, S, 99), seen(other, theirs, 99), strict=True))
                    if a != b
                ]
                found = exact_tokens(ours, original=original)
                assert found is None if not differ else found <= min(differ), (S, theirs, horizon, own)
                if theirs == S and differ:
                    assert found == min(differ)


@pytest.mark.parametrize("context", [1, 2, 7, 16, 17, 33, 63, 64, 100, 300, 512, 1000, 2048, 5000, 131072])
def test_default_horizons_are_exact_over_the_context(context):
    """For any segment; with the default segment, no token of a longer stream sees much less than in the original."""
    for S in (1, 5, 16, 100, 512):
        horizons = exact_horizons([context, context], S)
        assert exact_tokens(config(horizons=horizons, segment_length=S)) >= context
        assert all(horizon < context for horizon in horizons)
    S = default_segment([context, context])
    (horizon,) = exact_horizons([context], S)
    assert S & (S - 1) == 0
    assert S <= 512
    assert context <= 2 or horizon + 1 >= min(3 * context / 4, context - 16)
    # The smallest window decides.
    assert default_segment([context, max(1, context // 3)]) == default_segment([max(1, context // 3)])


@pytest.mark.slow
def test_horizons_are_exact_over_a_context_that_is_not_a_multiple_of_the_segment(run, llama):
    """Verified with the weights, over all 50 tokens and not only over whole segments."""
    settings = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 50}))
    ended = run("convert", llama, "model", "--segment", 7, "--verify")
    assert ended.code == 0, ended.err
    assert "exact up to 56 tokens" in ended.out
    assert ModelConfig.load("model/config.json").horizons == [49, 49]
    assert run("convert", llama, "usual").code == 0
    usual = ModelConfig.load("usual/config.json")
    assert (usual.segment_length, usual.horizons) == (16, [48, 48])


@pytest.mark.slow
def test_a_warm_start_is_reported(run, saved, llama):
    """The context of a DSMR is unlimited; an unknown context may be longer than any horizons."""

    def shown(*arguments) -> str:
        ended = run("convert", *arguments)
        assert ended.code == 0, ended.err
        return " ".join((ended.err + ended.out).split())

    assert "exact: the horizons are those of the original" in shown(saved, "same")
    text = shown(saved, "other", "--horizons", "uniform:4")
    assert "a warm start: exact up to 8 tokens only, the original has no limit, with its own horizons" in text
    settings = json.loads((llama / "config.json").read_text())
    del settings["max_position_embeddings"]
    (llama / "config.json").write_text(json.dumps(settings))
    text = shown(llama, "assumed")
    assert "note: context of the original not stated: 2,048 tokens assumed; --horizons overrides it" in text
    assert "exact up to 2,048 tokens" in text
    text = shown(llama, "given", "--horizons", "uniform:32", "--segment", 16)
    assert "a warm start: exact up to 48 tokens only, the context of the original is unknown" in text
    assert "assumed" not in text
    records = {
        name: json.loads(Path(name, "conversion.json").read_text()) for name in ("same", "other", "assumed", "given")
    }
    assert {name: record["warm_start"] for name, record in records.items()} == {
        "same": False, "other": True, "assumed": False, "given": True,
    }  # fmt: skip


def test_the_number_of_learned_positions_is_reported_for_copies_too(run, tmp_path):
    path = tmp_path / "learned.pt"
    reference.save(path, reference.DSMR(config(max_positions=20, rope_dims=0)))
    for source, out in ((path, "once"), ("once", "twice")):
        ended = run("convert", source, out)
        assert ended.code == 0, ended.err
        text = " ".join(ended.out.split())
        assert "exact: the horizons are those of the original; a stream ends after 20 tokens" in text
    text = " ".join(run("convert", "once", "longer", "--horizons", "uniform:24").out.split())
    assert "a warm start: exact up to 8 tokens only, the original has a context of 20" in text


def test_horizons_in_configurations_of_other_families_are_ignored(run, llama):
    settings = json.loads((llama / "config.json").read_text())
    for horizons in ([1, 2], "all", 7):
        (llama / "config.json").write_text(json.dumps(settings | {"horizons": horizons, "segment_length": 0}))
        ended = run("convert", llama, "model", "--force")
        assert ended.code == 0, ended.err
        assert "exact up to 64 tokens" in ended.out


@pytest.mark.slow
def test_a_verification_states_later_losses(run, saved):
    """Weights are cast and quantized after the comparison."""
    losses = {
        ("--dtype", "bfloat16"): "cast to bfloat16",
        ("--quantize", 8, "--group-size", 32): "quantized to 8 bits",
        ("--quantize", 4, "--group-size", 32, "--dtype", "float16"): "cast to float16 and quantized to 4 bits",
    }
    for options, loss in losses.items():
        ended = run("convert", saved, "model", "--verify", "--force", *options)
        assert ended.code == 0, ended.err
        expected = f"the weights before they are {loss}"
        assert f"compared: {expected}" in " ".join(ended.out.split())
        assert json.loads(Path("model/conversion.json").read_text())["verification"]["compared"] == expected
    assert run("convert", saved, "half", "--dtype", "bfloat16").code == 0
    text = " ".join(run("convert", "half", "again", "--verify").out.split())
    assert "compared: the weights as written" in text


def test_verify_before_the_source_is_refused(run, saved):
    ended = run("convert", "--verify", saved, "model")
    assert ended.code == 2
    assert "model.pt': expected a .npz file, or --verify after SRC and DST" in ended.err


def test_evaluate_suggests_a_tokenizer_for_plain_ids(run, saved, trained):
    """The suggested command works."""
    torch_model, _ = reference.load(saved)
    reference.save("bare.pt", torch_model)
    assert run("convert", "bare.pt", "bare").code == 0
    ended = run("evaluate", "bare", "--data", trained.corpus)
    assert ended.code == 2
    advice = f"dsmr-mlx convert bare NEW --tokenizer {trained.corpus}"
    assert advice in ended.err
    assert run("convert", "bare", "NEW", "--tokenizer", trained.corpus).code == 0
    assert run("evaluate", "NEW", "--data", trained.corpus, "--json").code == 0
    named = run("convert", "bare", "named", "--tokenizer", "aria")
    assert named.code == 2
    assert "--tokenizer: aria has 17727 ids, expected" in named.err


def test_initial_positions_of_the_reference_are_half_as_large_as_embeddings():
    """As in the MLX model, within the accuracy of 6,400 samples."""
    torch.manual_seed(0)
    model = reference.DSMR(config(vocab_size=200, max_positions=200))
    ratio = (model.positions.weight.std() / model.embed.weight.std()).item()
    assert ratio == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("size", [17_727, 17_729, 2_675])
def test_aria_gets_its_tokenizer_and_context(tmp_path, size):
    """By the rows of its embedding; other sizes get plain ids."""
    source = tmp_path / "model.pt"
    for rows, kind, context in ((31, "ids", None), (size, "aria", 8192)):
        torch.save(Aria(rows, d=64, n_heads=1, n_layers=1).state_dict(), source)
        conversion = plan_conversion(source)
        assert (conversion.tokenizer.kind, conversion.exactness.context) == (kind, context)
    folder = write_conversion(conversion, tmp_path / "converted")
    assert load_tokenizer(folder / "tokenizer").vocab_size == size
    with pytest.raises(UserError, match=f"`tokenizer`: performance has 393 ids, expected {size} as in the model"):
        plan_conversion(source, tokenizer="performance")
