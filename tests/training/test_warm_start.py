"""A run that starts from the weights of a checkpoint: what it takes over, what may differ, what is an error."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from support.callbacks import StopAt, Watch
from support.kill_and_resume import differences
from support.ranks import finish, launch, losses, train_alone
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx import DSMR, UserError, load
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.training.config import PRESETS, TrainConfig
from dsmr_mlx.training.plan import make_plan
from dsmr_mlx.training.run import Callback, train
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

STILL = {
    "learning_rate": 1e-12,
    "adamw_learning_rate": 1e-12,
    "min_learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_steps": 1,
}
VOCAB = TOKENIZER.vocab_size


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus").path


def save(folder: Path, dtype: mx.Dtype = mx.float32, tokenizer=TOKENIZER, seed: int = 3, **options) -> str:
    """Save a checkpoint of random weights whose predictions differ from token to token."""
    mx.random.seed(seed)
    config = tiny_config(**options).model_config(tokenizer)
    model = DSMR(config)
    model.embed.weight = model.embed.weight * 4
    weights = tree_map(lambda p: p.astype(dtype), model.parameters())
    checkpoint.save_model(folder, config, weights, tokenizer)
    return str(folder)


def weights_of(folder: str | Path) -> dict[str, mx.array]:
    return load_arrays(Path(folder) / "model.safetensors")


class InitialState(Callback):
    """Record the state of a run before its first step."""

    def on_start(self, run, resumed_from):
        self.weights = dict(tree_flatten(run.trainer.parameters))
        self.average = run.trainer.average and dict(tree_flatten(run.trainer.average))
        self.optimizer = dict(tree_flatten(run.trainer.optimizer_state))
        self.step = run.trainer.progress.step


def assert_equal(weights: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, expected[name].astype(mx.float32)), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_initial_weights_are_float32_and_the_optimizer_is_new(tmp_path, corpus, dtype, ema_decay):
    init = save(tmp_path / "c", dtype)
    begin = InitialState()
    run = train(tiny_config(init=init, ema_decay=ema_decay, **STILL), corpus, tmp_path / "run", callback=begin)
    assert_equal(begin.weights, weights_of(init))
    if ema_decay:
        assert_equal(begin.average, weights_of(init))
    fresh = Trainer(tiny_config(), Corpus.load(corpus)).optimizer_state
    moments = {name: array for name, array in tree_flatten(fresh) if array.ndim}
    assert moments
    assert all(mx.array_equal(begin.optimizer[name], array) for name, array in moments.items())
    assert (begin.step, run.trainer.progress.step) == (0, 1)
    assert TrainConfig.load(tmp_path / "run" / "config.json").init == init
    assert {array.dtype for array in weights_of(tmp_path / "run" / "last").values()} == {mx.float32}


def test_a_licence_is_copied_with_the_weights(tmp_path, corpus):
    """Also if the run resumes without the initial checkpoint; a run that starts from random weights has none."""
    init, licence = save(tmp_path / "c"), "share alike"
    (tmp_path / "c" / "LICENSE").write_text(licence)
    run = tmp_path / "run"
    train(tiny_config(init=init, max_steps=2), corpus, run)
    assert (run / "last" / "LICENSE").read_text() == licence
    shutil.rmtree(init)
    train(tiny_config(init=init, max_steps=4), corpus, run, resume=True)
    assert (run / "last" / "LICENSE").read_text() == (run / "best" / "LICENSE").read_text() == licence
    train(tiny_config(init=str(run), **STILL), corpus, tmp_path / "next")
    assert (tmp_path / "next" / "last" / "LICENSE").read_text() == licence
    train(tiny_config(max_steps=1), corpus, run, force=True)
    assert not list(run.rglob("LICENSE"))


def test_a_run_interrupted_before_its_weights_are_loaded_can_be_resumed(tmp_path, corpus, monkeypatch):
    """The licence must not be written first: a folder with only a licence is not a run."""
    init = save(tmp_path / "c")
    (tmp_path / "c" / "LICENSE").write_text("share alike")

    def interrupted(self, weights):
        raise KeyboardInterrupt

    config, run, whole = tiny_config(init=init, **STILL), tmp_path / "run", Trainer.start_from
    monkeypatch.setattr(Trainer, "start_from", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, corpus, run)
    monkeypatch.setattr(Trainer, "start_from", whole)
    train(config, corpus, run, resume=True)
    assert (run / "last" / "LICENSE").read_text() == "share alike"


def test_resume_restores_the_licence_from_the_checkpoint(tmp_path, corpus):
    init, run = save(tmp_path / "c"), tmp_path / "run"
    (tmp_path / "c" / "LICENSE").write_text("share alike")
    config = tiny_config(init=init, **STILL)
    train(config, corpus, run)
    (run / "LICENSE").unlink()  # only the checkpoints were brought to another machine
    train(replace(config, max_steps=2), corpus, run, resume=True)
    assert (run / "last" / "LICENSE").read_text() == "share alike"


def test_a_step_with_a_learning_rate_near_zero_keeps_the_losses(tmp_path, corpus):
    init = save(tmp_path / "c")
    train(tiny_config(init=init, **STILL), corpus, tmp_path / "run")
    pieces = Corpus.load(corpus)
    before, after = (evaluate(load(folder)[0], pieces) for folder in (init, tmp_path / "run"))
    assert after.nats_per_token == pytest.approx(before.nats_per_token, rel=1e-6)
    assert [piece.source for piece in after.by_piece] == [piece.source for piece in before.by_piece]
    random = train(tiny_config(**STILL), corpus, tmp_path / "random").best_loss
    assert abs(random - before.nats_per_token) > 0.01  # a chance agreement would need the same weights


def test_init_from_a_run_uses_its_best_checkpoint(tmp_path, corpus):
    train(tiny_config(max_steps=20), corpus, tmp_path / "first")
    begin = InitialState()
    train(tiny_config(init=str(tmp_path / "first"), **STILL), corpus, tmp_path / "second", callback=begin)
    assert_equal(begin.weights, weights_of(tmp_path / "first" / "best"))


def test_full_attention_becomes_a_dsmr(tmp_path, corpus):
    """With other horizons, segments and dropout, the losses are those of such a model with the same weights."""
    init = save(tmp_path / "c", horizons="full:100", segment_length=16)
    assert build_config("tiny", init=init).horizons == "custom:100,100"
    settings = ["horizons=two-scale:long=1x10,short=3", "segment_length=5", "dropout=0.1", "sample_seconds=0"]
    config = build_config("tiny", settings=settings, init=init, **STILL)
    train(config, corpus, tmp_path / "run")
    model, _ = load(tmp_path / "run")
    assert (model.config.horizons, model.config.segment_length, model.config.dropout) == ([10, 3], 5, 0.1)
    expected = DSMR(model.config)
    expected.update(load(init)[0].parameters())
    pieces = Corpus.load(corpus)
    assert evaluate(model, pieces).nats_per_token == pytest.approx(evaluate(expected, pieces).nats_per_token, rel=1e-6)


def test_init_fixes_the_architecture_and_a_preset_sets_the_rest(tmp_path):
    unusual = {"norm": "layer", "gated": False, "rope_theta": 500.0, "n_kv_heads": 1, "dropout": 0.25}
    unusual |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "parallel_residual": True, "tie_embeddings": False}
    init = save(tmp_path / "c", **unusual)
    model_config = ModelConfig.load(tmp_path / "c" / "config.json")
    for preset in (None, *PRESETS):
        config = build_config(preset, init=init)
        assert config.model_config(TOKENIZER) == model_config
        plain = build_config(preset)
        for name in ("batch_size", "learning_rate", "warmup_steps", "max_steps", "eval_every"):
            assert getattr(config, name) == getattr(plain, name)
    toml = tmp_path / "run.toml"
    toml.write_text(f'init = "{init}"\nsegment_length = 4\n')
    config = build_config("base", toml, ["horizons=none", f"d_ff={model_config.d_ff}", "rope_theta=500"])
    assert config == build_config("base", init=init, segment_length=4, horizons="none")
    assert config.schedule.horizons == (0, 0)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"d_model": 32}, "16"),
        ({"n_layers": 3, "horizons": "uniform:4"}, "2"),
        ({"norm": "layer"}, "'rms'"),
        ({"tie_embeddings": False}, "True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "None"),
    ],
)
def test_another_architecture_is_an_error_with_both_values(tmp_path, corpus, changes, found):
    init, name = save(tmp_path / "c"), next(iter(changes))
    message = f"{name} = {changes[name]!r}: `init` {init} has {name} = {found}, which its weights fix; only horizons, "
    with pytest.raises(UserError, match=re.escape(message)):
        build_config(init=init, **changes)
    config = TrainConfig.from_dict(tiny_config().to_dict() | {"init": init} | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        train(config, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_derived_setting_is_compared_by_its_value(tmp_path, corpus):
    """n_kv_heads = none means n_heads, which fits one checkpoint and not the other."""
    grouped, plain = save(tmp_path / "grouped", n_kv_heads=1), save(tmp_path / "plain")
    options = {"n_kv_heads": None, "batch_size": 2, "max_steps": 1, "sample_seconds": 0}
    train(build_config("tiny", init=plain, **options), corpus, tmp_path / "run")
    with pytest.raises(UserError, match=r"n_kv_heads = 2: `init` .*grouped has n_kv_heads = 1, which its weights fix"):
        train(build_config("tiny", init=grouped, **options), corpus, tmp_path / "other")


def change(folder: str, **arrays: mx.array | None) -> None:
    """Replace weights of a checkpoint; None removes one."""
    weights = weights_of(folder) | arrays
    checkpoint.save_arrays(Path(folder) / "model.safetensors", {k: v for k, v in weights.items() if v is not None})


def quantize(folder: str) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": {"bits": 4, "group_size": 32}}))


NORM = "norm.weight"
REFUSED = {
    "missing": (lambda folder: change(folder, **{NORM: None}), rf"model\.safetensors: {NORM} is missing, expected"),
    "missing two": (
        lambda folder: change(folder, **{NORM: None, "layers.0.attention.out.weight": None}),
        r"model\.safetensors: layers\.0\.attention\.out\.weight is missing \(and 1 more\), expected",
    ),
    "unknown": (lambda folder: change(folder, extra=mx.zeros(3)), r"model\.safetensors: extra is unknown, expected"),
    "shape": (lambda folder: change(folder, **{NORM: mx.zeros(3)}), rf"{NORM} has shape \(3,\), expected \(16,\)"),
    "type": (lambda folder: change(folder, **{NORM: mx.zeros(16, mx.int32)}), rf"{NORM} is .*int32, expected floats"),
    "quantized": (quantize, r"`init` .*: its weights are quantized to 4 bits, expected floats: start from the check"),
    "damaged": (
        lambda folder: (Path(folder) / "model.safetensors").write_bytes(b"no"),
        r"model\.safetensors: cannot be read",
    ),
    "nothing": (shutil.rmtree, r"`init` .*: no such folder, expected a checkpoint or a run"),
    "incomplete": (
        lambda folder: (Path(folder) / "config.json").unlink(),
        r"`init` .*: not a checkpoint, config\.json missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsuitable_checkpoint_is_an_error_before_anything_is_written(tmp_path, corpus, case):
    options = {"d_model": 32, "n_heads": 1, "head_dim": 32, "d_ff": 32} if case == "quantized" else {}
    init = save(tmp_path / "c", **options)
    damage, message = REFUSED[case]
    damage(init)
    with pytest.raises(UserError, match=message):
        train(tiny_config(init=init, **options), corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if case in ("quantized", "nothing", "incomplete"):
        with pytest.raises(UserError, match=message):
            build_config("tiny", init=init)


def test_a_changed_checkpoint_is_an_error(tmp_path, corpus):
    first = train(tiny_config(max_steps=2), corpus, tmp_path / "first")
    change(str(first.store.latest()), **{NORM: mx.zeros(16)})
    with pytest.raises(UserError, match=r"model\.safetensors: damaged, (bytes|sha256) is"):
        train(tiny_config(init=str(tmp_path / "first")), corpus, tmp_path / "run")


def test_another_vocabulary_is_an_error_with_both_fingerprints(tmp_path, corpus):
    ids = IdTokenizer(VOCAB, "other")
    own = write_ids(tmp_path / "ids", ids)
    with pytest.raises(
        UserError, match=rf"vocabulary {TOKENIZER.fingerprint[:12]}, .* has {ids.fingerprint[:12]}: not"
    ):
        train(tiny_config(init=save(tmp_path / "c")), own, tmp_path / "run")
    with pytest.raises(UserError, match=f"vocabulary {TOKENIZER.fingerprint[:12]}"):
        make_plan(tiny_config(init=str(tmp_path / "c")), Corpus.load(own))
    smaller = save(tmp_path / "d", tokenizer=IdTokenizer(392, "aria"))
    with pytest.raises(UserError, match=r"`init` .*d: vocabulary of 392 tokens, the corpus .* has 393"):
        train(tiny_config(init=smaller), corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_ids(folder: Path, tokenizer: IdTokenizer) -> Path:
    """Write a corpus of token ids that do not decode to notes."""
    rng = np.random.default_rng(0)
    with CorpusWriter(folder, tokenizer) as writer:
        for i, split in enumerate(["train", "train", "train", "validation"]):
            ids = rng.integers(0, tokenizer.vocab_size, 40 + 5 * i).astype(tokenizer.dtype)
            writer.add(ids, source=f"{i}", split=split, duration=1.0, notes=0)
        writer.commit({})
    return folder


def test_a_vocabulary_of_ids_only_needs_the_same_size(tmp_path, corpus):
    """The run's checkpoints have the vocabulary of the corpus."""
    init = save(tmp_path / "c", tokenizer=IdTokenizer(VOCAB, "aria", eos_id=3))
    begin = InitialState()
    train(tiny_config(init=init, **STILL), corpus, tmp_path / "run", callback=begin)
    assert_equal(begin.weights, weights_of(init))
    assert load(tmp_path / "run")[1].fingerprint == TOKENIZER.fingerprint


def test_a_corpus_of_ids_only_trains_without_samples(tmp_path):
    tokenizer = IdTokenizer(50, "aria", bos_id=1)
    corpus, watch = write_ids(tmp_path / "ids", tokenizer), Watch()
    init = save(tmp_path / "c", tokenizer=tokenizer)
    config = tiny_config(init=init, max_steps=10, sample_seconds=1.0)
    train(config, corpus, tmp_path / "run", callback=watch)
    assert ("message", "the corpus's ids do not decode to notes: no samples") in watch.events
    assert not (tmp_path / "run" / "samples").exists()
    assert load(tmp_path / "run")[1].fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match=r"augment_transpose = 2: the ids of .*ids do not decode to notes, expected 0"):
        train(tiny_config(augment_transpose=2), corpus, tmp_path / "other")


def test_a_piece_longer_than_the_learned_positions_is_an_error_at_the_start(tmp_path, corpus):
    longest = max(Corpus.load(corpus).pieces(), key=lambda piece: piece.length)
    fits = tiny_config(max_positions=longest.length - 1, max_steps=12)
    train(fits, corpus, tmp_path / "run")
    config = tiny_config(init=str(tmp_path / "run"), max_positions=longest.length - 1)
    longer = write_corpus(tmp_path / "longer", notes=30).path
    with pytest.raises(UserError, match=r"longer: \d\.mid has \d+ tokens, expected at most .* \(max_positions\)"):
        train(config, longer, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 10, 13])
def test_resume_of_a_warm_start_is_bitwise_without_the_initial_checkpoint(tmp_path, corpus, stop):
    init = save(tmp_path / "c")
    config = tiny_config(init=init, max_steps=20, dropout=0.1, ema_decay=0.5)
    train(config, corpus, tmp_path / "straight")
    train(config, corpus, tmp_path / "stopped", callback=StopAt(stop))
    shutil.rmtree(init)
    train(config, corpus, tmp_path / "stopped", resume=True)
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


@pytest.mark.slow
def test_resume_keeps_the_record_of_the_initial_checkpoint(tmp_path, corpus):
    init, watch = save(tmp_path / "c"), Watch()
    train(tiny_config(init=init, max_steps=2), corpus, tmp_path / "run")
    train(tiny_config(init="nowhere", max_steps=4), corpus, tmp_path / "run", resume=True, callback=watch)
    assert ("message", f"init = nowhere: ignored, the run started from {init}") in watch.events
    silent = Watch()
    train(tiny_config(max_steps=6), corpus, tmp_path / "run", resume=True, callback=silent)
    assert not [event for event in silent.events if event[0] == "message"]
    for path in ("config.json", "last/training_config.json"):
        assert TrainConfig.load(tmp_path / "run" / path).init == init
    train(tiny_config(max_steps=2), corpus, tmp_path / "cold")
    train(tiny_config(init=init, max_steps=4), corpus, tmp_path / "cold", resume=True, callback=watch)
    assert ("message", f"init = {init}: ignored, the run started from random weights") in watch.events
    assert TrainConfig.load(tmp_path / "cold" / "config.json").init is None


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_from_the_same_weights(tmp_path, corpus):
    class Crash(Callback):
        def on_step(self, run, record):
            raise RuntimeError("power failure")

    config = tiny_config(init=save(tmp_path / "c"), max_steps=10)
    train(config, corpus, tmp_path / "straight")
    with pytest.raises(RuntimeError):
        train(config, corpus, tmp_path / "killed", callback=Crash())
    train(config, corpus, tmp_path / "killed", resume=True)
    assert differences(tmp_path / "straight", tmp_path / "killed") == []


def test_force_does_not_delete_the_initial_checkpoint(tmp_path, corpus):
    run = tmp_path / "run"
    train(tiny_config(max_steps=4), corpus, run)
    for init in (run, run / "best", run / "checkpoints" / "step-00000004"):
        with pytest.raises(UserError, match=rf"`init` {init}: is in {run}, which `force` would delete"):
            train(tiny_config(init=str(init)), corpus, run, force=True)
    assert CheckpointStore(run, 1).latest() is not None
    load(run)
    train(tiny_config(init=save(tmp_path / "c"), **STILL), corpus, run, force=True)


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(tmp_path, corpus):
    init = save(tmp_path / "c", seed=9)
    settings = ("max_steps=4", f"init={init}")
    train_alone(corpus, tmp_path / "one", *settings)
    finish(launch(corpus, tmp_path / "two", *settings))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)
    refused = launch(corpus, tmp_path / "refused", "max_steps=4", f"init={tmp_path}/nowhere")
    codes, messages = zip(*(rank.wait() for rank in refused), strict=True)
    assert codes == (2, 2)
    assert "nowhere: no such folder" in messages[0]


def test_the_command_starts_from_the_weights_of_another_run(run, trained):
    common = ["train", "--data", trained.corpus, "--out", "new", "--init", trained.run, "--preset", "tiny"]
    options = ["--set", "horizons=uniform:6", "--set", "sample_seconds=0", "--set", "batch_size=2"]
    began = run(*common, *options, "--max-steps", 2)
    assert began.code == 0
    assert f"weights: from {trained.run}\n" in began.err
    assert "memory: uniform: 2 × 6" in began.err
    config = json.loads(Path("new/config.json").read_text())
    assert (config["d_model"], config["segment_length"], config["init"]) == (16, 8, str(trained.run))
    model, _ = checkpoint.load("new")
    start, _ = checkpoint.load(trained.run)
    assert not mx.array_equal(model.embed.weight, start.embed.weight)  # two steps at the preset's rate
    assert mx.abs(model.embed.weight - start.embed.weight).max() < 0.1 * mx.abs(start.embed.weight).max()


@pytest.mark.slow
def test_the_first_command_resumes_when_the_initial_checkpoint_is_gone(run, trained, tmp_path):
    start = shutil.copytree(trained.checkpoint, tmp_path / "start")
    common = ["train", "--data", trained.corpus, "--out", "new", "--init", start, "--resume"]
    options = ["--set", "horizons=uniform:6", "--set", "sample_seconds=0", "--set", "batch_size=2"]
    assert run(*common, "--preset", "tiny", *options, "--max-steps", 2).code == 0
    shutil.rmtree(start)
    for steps, more in ((3, ["--preset", "tiny", *options]), (4, [])):
        shown = run(*common, *more, "--max-steps", steps)
        assert shown.code == 0, shown.err
        assert f"resumed from new/checkpoints/step-0000000{steps - 1}" in shown.err
        assert "ignored" not in shown.err
    assert json.loads(Path("new/config.json").read_text())["init"] == str(start)


def test_a_plan_describes_the_model_of_the_initial_checkpoint(run, trained):
    model, _ = checkpoint.load(trained.run)
    planned = run("train", "--data", trained.corpus, "--out", "new", "--init", trained.run, "--plan")
    assert planned.out.startswith(f"{model.n_parameters:,} parameters\n")
    assert not Path("new").exists()


def test_a_plan_refuses_what_the_resumed_run_would_refuse(run, trained):
    common = ("train", "--data", trained.corpus, "--out", trained.run, "--resume", "--plan")
    assert run(*common).code == 0
    refused = run(*common, "--set", "batch_size=1")
    assert (refused.code, refused.out) == (2, "")
    assert "batch_size = 1: the run in" in refused.err
    assert "which is fixed" in refused.err
