"""Adapters on a frozen base: what is trained, stored, resumed and played."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from support.adapters import adapter_config, save_base
from support.callbacks import StopAt
from support.kill_and_resume import differences
from support.ranks import finish, launch, train_alone
from support.ranks import losses as run_losses
from support.recipe import RECIPE
from support.tiny import TOKENIZER, write_corpus

from dsmr_mlx import DSMR, UserError, load
from dsmr_mlx.cli import make_parser
from dsmr_mlx.convert.fusing import FusedSource
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.evaluation.comparison import compare
from dsmr_mlx.model import bundled, checkpoint
from dsmr_mlx.model.base import BASE, Base, find_base
from dsmr_mlx.model.checkpoint import load_arrays, resolve
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.lora import is_adapter
from dsmr_mlx.training.config import LIMITS, TrainConfig
from dsmr_mlx.training.plan import make_plan
from dsmr_mlx.training.run import Callback, train
from dsmr_mlx.training.settings import build_config, train_arguments
from dsmr_mlx.training.trainer import Trainer

SHIPPED = bundled.FOLDER / bundled.DEFAULT


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus").path


@pytest.fixture(scope="module", params=[None, 4, 8], ids=["floats", "4 bits", "8 bits"])
def trained(request, tmp_path_factory, corpus):
    """A base, a run of 6 steps with adapters in its last layer and with gaps, and the run's folder."""
    folder = tmp_path_factory.mktemp("lora")
    init = save_base(folder / "base", request.param)
    before = {name: bytes(memoryview(np.array(a.view(mx.uint8)))) for name, a in weights_of(init).items()}
    config = adapter_config(init, lora_layers=1, max_steps=6, eval_every=3, ema_decay=0.5, fill=0.5)
    watch = Watch()
    train(config, corpus, folder / "run", callback=watch)
    return init, before, watch, folder / "run"


class Watch(Callback):
    """Record the losses and the frozen weights after the last step."""

    def __init__(self):
        self.losses = []

    def on_step(self, run, record):
        self.losses.append(record.loss)
        self.frozen = dict(tree_flatten(run.trainer.frozen))
        self.trainer = run.trainer


def weights_of(folder: str | Path) -> dict[str, mx.array]:
    return load_arrays(Path(folder) / "model.safetensors")


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


def test_only_adapters_are_trained_and_stored(trained):
    """Gradients, optimizer, average and checkpoint have nothing of the base, which stays bitwise what it was."""
    init, before, watch, run = trained
    stored = weights_of(run / "last")
    rows = {"q", "k", "v"}, {"out"}, {"gate", "up"}, {"down"}
    layers = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
    expected = {
        f"layers.1.{layer}.lora.{part}.{side}" for layer, parts in zip(layers, rows, strict=True)
        for part in parts for side in "ab"
    }  # fmt: skip
    assert stored.keys() == expected
    for name, array in stored.items():
        assert array.dtype == mx.float32
        assert mx.abs(array).max().item() > 0, name
    for tree in (watch.trainer.parameters, watch.trainer.average):
        assert {name for name, _ in tree_flatten(tree)} == expected
    state = load_arrays(run / "last" / "training.safetensors")
    moments = {name.split(".", 3)[-1].rsplit(".", 1)[0] for name in state if name.endswith((".m", ".v"))}
    assert moments == expected
    assert equal(watch.frozen, weights_of(init))
    after = {name: bytes(memoryview(np.array(a.view(mx.uint8)))) for name, a in weights_of(init).items()}
    assert before == after


def test_checkpoints_play_base_and_adapters(trained, corpus):
    init, _, _, run = trained
    model, tokenizer = load(run)
    assert equal(dict(tree_flatten(model.parameters())), weights_of(init) | weights_of(resolve(run)))
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (best,) = {line["nats_per_token"] for line in losses if line["kind"] == "validation" and line["step"] == 6}
    last, _ = load(run / "last")
    assert evaluate(last, Corpus.load(corpus), batch_size=3).nats_per_token == pytest.approx(best, rel=1e-6)


def test_a_new_model_equals_its_base(tmp_path, corpus):
    """Bitwise, whatever the adapters' A is: also with dropout, which only training has."""
    for bits in (None, 4):
        init = save_base(tmp_path / f"base{bits}", bits)
        config = adapter_config(init, lora_dropout=0.3, learning_rate=1e-30, min_learning_rate=0.0, max_steps=1)
        train(config, corpus, tmp_path / f"run{bits}")
        tokens = mx.array(np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (2, 30)))
        base, adapted = load(init)[0], load(tmp_path / f"run{bits}" / "last")[0]
        assert mx.abs(adapted.layers[0].attention.qkv.lora.q["a"]).max().item() > 0.1
        assert mx.array_equal(base(tokens)[0], adapted(tokens)[0])


def randomized(config: TrainConfig, corpus: Path, bits: int | None = None) -> Trainer:
    """A trainer with the weights of its base and random adapters."""
    quantization = bits and {"bits": bits, "group_size": 32}
    trainer = Trainer(config, Corpus.load(corpus), quantization=quantization)
    trainer.start_from(weights_of(config.init))
    mx.random.seed(1)
    trainer.parameters = tree_map(lambda p: 0.2 * mx.random.normal(p.shape), trainer.parameters)
    return trainer


ARCHITECTURES = {
    "plain": {},
    "recipe": RECIPE | {"optimizer": "adamw"},
    "4 bits": {"bits": 4},
    "recomputed": {"gradient_checkpointing": True},
    "4 bits, recomputed": {"bits": 4, "gradient_checkpointing": True},
    "like GPT-2": {
        "gated": False, "norm": "layer", "norm_bias": True, "activation": "gelu_tanh", "rope_dims": 0,
        "max_positions": 300, "attention_bias": True, "output_bias": True, "feed_forward_bias": True,
    },
    "like GPT-NeoX": {"parallel_residual": True, "gated": False, "rope_dims": 4, "tie_embeddings": False},
    "like Llama": {"n_kv_heads": 1, "tie_embeddings": False, "rope_interleaved": True},
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_those_of_the_merged_weights(tmp_path, corpus, architecture):
    """W' = W + s B A, so dB = s dW' Aᵀ and dA = s Bᵀ dW', with dW' from a plain model of the merged weights.

    q, k, v, gate and up are the rows of their fused weight.
    """
    options = dict(ARCHITECTURES[architecture])
    bits, folder = options.pop("bits", None), tmp_path / "adapters"
    init = save_base(tmp_path / "base", bits, **options)
    config = adapter_config(init, lora_alpha=6.0, **options)
    trainer = randomized(config, corpus, bits)
    checkpoint.save_model(folder, trainer.model_config, trainer.parameters, TOKENIZER)
    (folder / BASE).write_text(Base.of(Path(init)).to_json(folder))
    source = FusedSource(folder)
    plain = Trainer(replace(config, lora_rank=None, lora_alpha=None), Corpus.load(corpus))
    plain.start_from({name: source.read(name) for name in source.shapes})
    batch, other = next(trainer.lanes), next(plain.lanes)
    assert np.array_equal(batch.inputs, other.inputs)
    losses = trainer._add_gradients(batch), plain._add_gradients(other)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    dense, own = dict(tree_flatten(plain.gradients)), dict(tree_flatten(trainer.gradients))
    heads = config.n_kv_heads * config.head_dim
    adapters, starts = dict(tree_flatten(trainer.parameters)), {"k": 32, "v": 32 + heads, "up": 64}
    checked = 0
    for name, b in adapters.items():
        if not name.endswith(".b"):
            continue
        layer, part = name.split(".lora.")[0], name.split(".")[-2]
        first = starts.get(part, 0) if "qkv" in layer or "gate_up" in layer else 0
        dw, a = dense[f"{layer}.weight"][first : first + b.shape[0]], adapters[name[:-1] + "a"]
        scale = 6.0 / 4
        for found, expected in ((own[name], scale * dw @ a.T), (own[name[:-1] + "a"], scale * b.T @ dw)):
            assert mx.abs(found - expected).max().item() < 2e-4 * mx.abs(expected).max().item() + 1e-6, name
        checked += 1
    assert checked == (14 if config.gated else 12)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_resume_is_bitwise(tmp_path, corpus, bits):
    init = save_base(tmp_path / "base", bits)
    options = {"lora_dropout": 0.2, "dropout": 0.1, "ema_decay": 0.9, "accumulate": 2, "max_steps": 8, "eval_every": 4}
    config = adapter_config(init, **options)
    train(config, corpus, tmp_path / "whole")
    train(config, corpus, tmp_path / "halves", callback=StopAt(3))
    train(config, corpus, tmp_path / "halves", resume=True)
    assert not differences(tmp_path / "whole", tmp_path / "halves")


def test_a_moved_base_is_found(tmp_path, corpus):
    """Together with the run, by a link in the run, or by `init` when the run is resumed; not by another's weights."""
    (tmp_path / "old").mkdir()
    init = save_base(tmp_path / "old" / "base")
    train(adapter_config(init, max_steps=1), corpus, tmp_path / "old" / "run")
    shutil.move(tmp_path / "old", tmp_path / "new")
    run = tmp_path / "new" / "run"
    assert find_base(resolve(run)).folder == tmp_path / "new" / "base"
    shutil.move(tmp_path / "new" / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"its base .*old/base is missing, .*ln -s FOLDER {run}/base$"):
        load(run)
    (run / "base").symlink_to(tmp_path / "elsewhere")
    load(run)
    (run / "base").unlink()
    config = adapter_config(str(tmp_path / "elsewhere"), max_steps=2)
    train(config, corpus, run, resume=True)
    assert make_plan(adapter_config(init), Corpus.load(corpus), resolve(run)).trained
    assert TrainConfig.load(run / "config.json").init == str(tmp_path / "elsewhere")
    load(run)


def test_a_changed_base_is_refused(tmp_path, corpus):
    init = save_base(tmp_path / "base")
    config = adapter_config(init, max_steps=1)
    train(config, corpus, tmp_path / "run")
    save_base(tmp_path / "base", seed=4)
    for use in (lambda: load(tmp_path / "run"), lambda: train(config, corpus, tmp_path / "run", resume=True)):
        with pytest.raises(UserError, match=rf"run.*: its base {init} has weights of SHA-256 \w+, expected .* \w+$"):
            use()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora_rank=0"], "lora_rank = 0: expected from 1 to 32, the smallest side"),
        (["lora_rank=33"], "lora_rank = 33: expected from 1 to 32, the smallest side"),
        (["lora_rank=2.5"], "lora_rank = 2.5: expected int"),
        (["lora_rank=4", "lora_layers=0"], "lora_layers = 0: expected from 1 to n_layers = 2, or none"),
        (["lora_rank=4", "lora_layers=3"], "lora_layers = 3: expected from 1 to n_layers = 2, or none"),
        (["lora_rank=4", "lora_alpha=0"], "lora_alpha = 0.0: expected more than 0, or none"),
        (["lora_rank=4", "lora_dropout=1"], "lora_dropout = 1.0: expected at least 0 and below 1"),
        (["lora_rank=4", "optimizer=muon"], "optimizer = 'muon': expected adamw with lora_rank"),
        (["lora_rank=4", "d_model=64"], "d_model = 64: `init` .* has d_model = 32, which its weights fix"),
        (["lora_layers=1"], "lora_layers = 1: expected lora_rank with it"),
        (["lora_alpha=1"], "lora_alpha = 1.0: expected lora_rank with it"),
        (["lora_dropout=0.1"], "lora_dropout = 0.1: expected lora_rank with it"),
    ],
)
def test_invalid_settings(tmp_path, settings, message):
    init = save_base(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        build_config(settings=settings, init=init)


def test_what_adapters_need(tmp_path, corpus):
    with pytest.raises(UserError, match="lora_rank = 4: expected init with it"):
        build_config(settings=["lora_rank=4"])
    quantized = save_base(tmp_path / "quantized", 8)
    with pytest.raises(UserError, match=r"quantized to 8 bits, .*or train adapters with lora_rank"):
        build_config(init=quantized)
    train(adapter_config(quantized, max_steps=1), corpus, tmp_path / "run")
    for options in ({}, {"lora_rank": 2}):
        with pytest.raises(UserError, match="holds adapters only, expected all weights: dsmr-mlx convert --fuse"):
            build_config(init=str(tmp_path / "run"), **options)


@pytest.mark.parametrize("name", ["lora_rank", "lora_layers", "lora_alpha"])
def test_adapters_are_fixed_on_resume(tmp_path, corpus, name):
    config = adapter_config(save_base(tmp_path / "base"), max_steps=1)
    train(config, corpus, tmp_path / "run")
    with pytest.raises(UserError, match=f"{name} = .*: the run in .* has {name} = .*, which is fixed"):
        train(replace(config, **{name: 1}), corpus, tmp_path / "run", resume=True)
    if name == "lora_rank":
        with pytest.raises(UserError, match=r"lora_rank = None: the run in .* has lora_rank = 4, which is fixed"):
            train(replace(config, lora_rank=None), corpus, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank": 2, "alpha": 1.0, "layers": 3, "dropout": 0.0},
        {"rank": 0, "alpha": 1.0, "layers": 1, "dropout": 0.0},
        {"rank": 2, "alpha": "1", "layers": 1, "dropout": 0.0},
        {"rank": 2, "alpha": -1, "layers": 1, "dropout": 0.0},
        {"rank": 2, "alpha": 1, "layers": 1, "dropout": 1},
    ],
)
def test_invalid_adapters_in_a_model(lora):
    with pytest.raises(UserError, match=r"^lora = "):
        ModelConfig(vocab_size=10, n_layers=2, lora=lora)


def test_parameters_are_counted():
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48}
    config = ModelConfig(vocab_size=10, lora={"rank": 2, "alpha": 4, "layers": 2, "dropout": 0}, **sizes)
    added = DSMR(config).n_parameters - DSMR(replace(config, lora=None)).n_parameters
    sides = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert added == 2 * 2 * sum(rows + columns for rows, columns in sides)
    assert sum(is_adapter(name) for name, _ in tree_flatten(DSMR(config).parameters())) == 2 * 7 * 2


@pytest.mark.slow
@pytest.mark.usefixtures("compilation")
def test_compiled_steps_equal_eager_ones(tmp_path, corpus):
    """Also after a validation, which puts other arrays into the model."""
    init, losses = save_base(tmp_path / "base", 4), []
    for compiled in (False, True):
        config = adapter_config(init, lora_layers=1, compile=compiled, max_steps=3, eval_every=2)
        watch = Watch()
        train(config, corpus, tmp_path / f"{compiled}", callback=watch)
        losses.append(watch.losses)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(tmp_path, corpus):
    init = save_base(tmp_path / "base", 8)
    settings = (f"init={init}", "lora_rank=4", "d_model=32", "d_ff=64", "head_dim=16", "max_steps=4")
    train_alone(corpus, tmp_path / "one", *settings)
    finish(launch(corpus, tmp_path / "two", *settings))
    np.testing.assert_allclose(run_losses(tmp_path / "two"), run_losses(tmp_path / "one"), rtol=2e-5)
    assert all(map(is_adapter, weights_of(tmp_path / "two" / "last")))


@pytest.mark.parametrize("options", [{}, {"batch_size": 32, "learning_rate": 4e-3}, {"max_tokens": 10**6}])
def test_the_command_to_reproduce_gives_the_same_settings(tmp_path, options):
    """Also for settings that the recipe of adapters has replaced, and that are set to those of the preset again."""
    init = save_base(tmp_path / "base")
    config = build_config(init=init, lora_rank=4, lora_dropout=0.1, **options)
    assert (config.optimizer, config.batch_size) == ("adamw", options.get("batch_size", 1))
    words = train_arguments(config)
    given = make_parser("train").parse_args(["train", "--data", "x", "--out", "y", *words])
    limits = {name: getattr(given, name) for name in LIMITS if getattr(given, name) is not None}
    assert build_config(given.preset, settings=given.settings, init=given.init, **limits) == config


def test_settings_of_a_resumed_run_are_not_replaced_by_the_recipe(tmp_path, run, corpus):
    init = save_base(tmp_path / "base")
    command = ("train", "--data", corpus, "--out", "run", "--init", init, "--set", "lora_rank=4")
    began = run(*command, "--max-steps", 1, "--set", "batch_size=3", "--set", "sample_seconds=0")
    assert began.code == 0, began.err
    assert f"adapters: rank 4, {2 * 4 * 544:,} parameters" in " ".join(began.err.split())
    assert run("train", "--data", corpus, "--out", "run", "--resume", "--max-steps", 2).code == 0
    assert run(*command, "--resume", "--max-steps", 3).code == 0
    config = TrainConfig.load("run/config.json")
    assert (config.batch_size, config.max_steps, config.lora_rank, config.init) == (3, 3, 4, init)


@pytest.mark.parametrize("content", ["{", "[]", '{"path": "/x"}', '{"path": 1, "relative": "x", "sha256": "y"}'])
def test_a_damaged_record_of_the_base(tmp_path, content):
    (tmp_path / BASE).write_text(content)
    with pytest.raises(UserError, match=r"base\.json: (damaged|not valid JSON)"):
        find_base(tmp_path)


def test_a_comparison_needs_all_bases_before_it_begins(tmp_path, corpus):
    init = save_base(tmp_path / "base")
    train(adapter_config(init, max_steps=1), corpus, tmp_path / "run")
    other = save_base(tmp_path / "other")
    shutil.rmtree(init)
    begun = []
    with pytest.raises(UserError, match=r"its base .* is missing"):
        compare([other, tmp_path / "run"], [corpus], progress=lambda done, total: begun.append(done))
    assert not begun


def test_adapters_for_a_bundled_model(tmp_path, corpus, monkeypatch):
    """It is found in another installation, too, and its licence goes with the run."""
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "weights")
    save_base(tmp_path / "weights" / "big")
    shutil.copyfile(SHIPPED / "card.json", tmp_path / "weights" / "big" / "card.json")
    (tmp_path / "weights" / "big" / "LICENSE").write_text("share alike")
    train(adapter_config("big", max_steps=1), corpus, tmp_path / "run")
    shutil.move(tmp_path / "weights", tmp_path / "elsewhere")
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "elsewhere")
    load(tmp_path / "run")
    assert (tmp_path / "run" / "last" / "LICENSE").read_text() == "share alike"
