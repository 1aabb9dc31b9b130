import gc
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from support.adapters import adapter_config, save_base
from support.memory import active_memory
from support.recipe import RECIPE
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx.cli import main
from dsmr_mlx.cli.train import show_plan
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training import memory
from dsmr_mlx.training import plan as plan_module
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.memory import activation_bytes, too_large
from dsmr_mlx.training.plan import make_plan
from dsmr_mlx.training.run import train
from dsmr_mlx.training.saved_run import resume_point, saved_progress
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer


def test_a_plan_counts_parameters_bytes_and_steps(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_config(max_steps=30, ema_decay=0.9)
    plan = make_plan(config, corpus)
    trainer = Trainer(config, corpus)
    assert plan.parameters == trainer.model.n_parameters
    assert plan.needed.weights == 2 * 4 * plan.parameters
    assert plan.needed.gradients == 4 * plan.parameters
    assert plan.needed.optimizer == pytest.approx(8 * plan.parameters, rel=0.01)
    assert plan.needed.state == trainer.state.nbytes
    assert plan.steps == 30
    assert plan.tokens_per_step <= config.tokens_per_step
    assert plan.seconds == pytest.approx(30 * plan.seconds_per_step)


def test_muon_needs_one_moment_for_matrices_of_the_blocks(tmp_path):
    config = tiny_config(optimizer="muon")
    plan = make_plan(config, write_corpus(tmp_path / "corpus"))
    block = 4 * config.n_heads * config.head_dim * config.d_model + 3 * config.d_ff * config.d_model
    expected = 4 * (2 * plan.parameters - config.n_layers * block)
    assert plan.needed.optimizer == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_the_estimated_peak_is_near_the_measured_one(tmp_path, recompute, options):
    """Shapes are large, so that constants do not matter; the measured peak includes MLX's own overhead."""
    corpus = write_corpus(tmp_path / "corpus", train=4, notes=300)
    config = tiny_config(
        d_model=64, d_ff=128, n_layers=4, n_heads=2, head_dim=32, batch_size=4, segment_length=128,
        horizons="two-scale:long=1x512,short=64", gradient_checkpointing=recompute, **options,
    )  # fmt: skip
    gc.collect()  # trainers of earlier tests, whose memory would be freed while this one is measured
    plan = make_plan(config, corpus)
    assert plan.needed.total == pytest.approx(plan.peak_measured, rel=0.4)


def test_activations_grow_with_the_horizons_and_shrink_with_checkpointing():
    short, long = (tiny_config(horizons=f"uniform:{m}", segment_length=64).model_config(TOKENIZER) for m in (64, 1024))
    assert activation_bytes(long, 4, 4) > 3 * activation_bytes(short, 4, 4)
    assert activation_bytes(long, 8, 4) == 2 * activation_bytes(long, 4, 4)
    deep = tiny_config(n_layers=12, horizons="uniform:64", segment_length=64).model_config(TOKENIZER)
    assert activation_bytes(deep, 4, 4, recompute=True) < 0.7 * activation_bytes(deep, 4, 4)
    # A copy of the memory outweighs the rest.
    far = tiny_config(n_layers=4, horizons="uniform:4096").model_config(TOKENIZER)
    assert activation_bytes(far, 4, 4, recompute=True) > activation_bytes(far, 4, 4)


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    settings = ["d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "horizons=uniform:8"]
    out = tmp_path / "run"
    arguments = ["train", "--data", str(corpus.path), "--out", str(out), "--plan", "--max-tokens", "5000"]
    assert main([*arguments, *(f"--set={s}" for s in settings)]) == 0
    shown = capsys.readouterr().out
    for word in ("parameters", "optimizer", "recurrent state", "peak, measured", "an epoch:", "the run:"):
        assert word in shown
    assert not out.exists()


def test_a_plan_advises_lanes_for_whole_pieces(tmp_path, monkeypatch):
    """Half the bytes with bfloat16, so almost twice as many lanes; nothing is allocated for a run that does not fit."""
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_config(horizons="whole:longest=100000", batch_size=64)
    monkeypatch.setattr(plan_module, "machine_memory", lambda: 1 << 30)
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 30)
    before = active_memory()
    mx.reset_peak_memory()
    plan = make_plan(config, corpus)
    assert mx.get_peak_memory() - before < 16 << 20
    assert plan.peak_measured is None
    wide, narrow = plan.advice
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert wide.state_bytes == 2 * narrow.state_bytes == plan.needed.state // 64
    assert 1.7 < narrow.lanes / wide.lanes < 2.3
    assert 0.6 * 2**30 < wide.lanes * wide.state_bytes < 0.8 * 2**30


def test_activations_of_long_memories_do_not_grow_with_them():
    short, long = (tiny_config(horizons=f"full:{m}").model_config(TOKENIZER) for m in (10_000, 100_000))
    assert activation_bytes(long, 4, 4) == activation_bytes(short, 4, 4)


def test_the_state_of_a_validation_is_counted(tmp_path):
    """It is float32 and made beside that of training; then there are no activations."""
    corpus = write_corpus(tmp_path / "corpus")
    for dtype, times in (("float32", 1), ("bfloat16", 2)):
        trainer = Trainer(tiny_config(horizons="uniform:100000", batch_size=1, dtype=dtype), corpus)
        needed = memory.estimate_memory(trainer)
        assert needed.validation == pytest.approx(times * needed.state, rel=0.01)
        assert needed.total == needed.fixed + needed.state + needed.validation
    assert memory.advise(trainer.config, trainer.model_config, needed.fixed + 4 * needed.state, needed)[1].lanes == 1


def test_the_state_that_a_checkpoint_gathers_is_counted(tmp_path):
    """Each of two processes holds the memory of all lanes beside that of its own; a single one gathers nothing."""
    config, corpus = tiny_config(horizons="uniform:100000", batch_size=4, eval_tokens=1), write_corpus(tmp_path / "c")
    alone, ranks = memory.estimate_memory(Trainer(config, corpus)), Ranks()
    assert alone.gathered == 0
    ranks.size = 2
    needed = memory.estimate_memory(Trainer(config, corpus, ranks))
    assert needed.gathered == 2 * needed.state == alone.state
    assert needed.total == needed.fixed + needed.state + needed.gathered


def test_the_command_shows_the_advice(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    settings = ["d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "batch_size=2", "segment_length=8"]
    arguments = ["train", "--data", str(corpus.path), "--out", str(tmp_path / "run"), "--plan"]
    for horizons, shown in (("whole:longest=4096", True), ("uniform:8", False)):
        assert main([*arguments, *(f"--set={s}" for s in (*settings, f"horizons={horizons}"))]) == 0
        found = capsys.readouterr().out
        assert ("lanes that fit" in found) == shown
        assert ("times are those of the first steps" in found) == shown


@pytest.mark.parametrize("bits", [None, 4])
def test_a_plan_for_adapters(tmp_path, bits):
    """The base is counted once, as it is kept; gradients and optimizer are the adapters' alone."""
    init = save_base(tmp_path / "base", bits)
    config = adapter_config(init, lora_layers=1)
    gc.collect()
    plan = make_plan(config, write_corpus(tmp_path / "corpus"))
    base = load_arrays(tmp_path / "base" / "model.safetensors")
    assert plan.needed.frozen == sum(array.nbytes for array in base.values())
    assert plan.needed.weights == plan.needed.gradients == 4 * plan.trained
    assert plan.needed.optimizer == pytest.approx(8 * plan.trained, rel=0.01)
    assert plan.trained < plan.parameters / 4
    assert plan.peak_measured > plan.needed.frozen
    whole = make_plan(replace(config, lora_layers=None), write_corpus(tmp_path / "corpus"))
    assert whole.trained == 2 * plan.trained
    assert whole.needed.activations > plan.needed.activations


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "layers", "recompute"), [(None, None, False), (8, 2, False), (None, None, True)])
def test_the_estimated_peak_of_adapters_is_near_the_measured_one(tmp_path, bits, layers, recompute):
    sizes = {"d_model": 128, "d_ff": 256, "n_layers": 4, "n_heads": 2, "head_dim": 64, "segment_length": 128}
    sizes["horizons"] = "two-scale:long=1x512,short=64"
    init = save_base(tmp_path / "base", bits, **sizes)
    config = adapter_config(init, **sizes, batch_size=4, lora_layers=layers, gradient_checkpointing=recompute)
    gc.collect()
    plan = make_plan(config, write_corpus(tmp_path / "corpus", train=4, notes=300))
    assert plan.needed.total == pytest.approx(plan.peak_measured, rel=0.4)


def test_the_smallest_mac(tmp_path):
    """Its GPU may use about two thirds of 16 GB, three quarters of 64 GB; a fifth of that stays free."""
    plan = make_plan(tiny_config(), write_corpus(tmp_path / "corpus"))
    assert plan.smallest_mac == (8, 2**33 * 2 // 3)
    for gigabytes, expected in ((4.2, 8), (4.3, 16), (8.5, 16), (8.6, 24), (38.3, 64), (400.0, None)):
        mac = replace(plan, needed=replace(plan.needed, frozen=int(gigabytes * 2**30))).smallest_mac
        assert (mac and mac[0]) == expected


def test_base_fits_into_16_gb(tmp_path, monkeypatch):
    """Not in float32, which macOS does not let a GPU of 16 GB hold; the warning names settings with which it does."""
    corpus = write_corpus(tmp_path / "corpus", train=20)
    monkeypatch.setattr(memory, "machine_memory", lambda: int(10.7 * 2**30))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))

    def warning(*settings: str, resumed: bool = False) -> str | None:
        trainer = Trainer(build_config("base", settings=["compile=false", *settings]).for_corpus(corpus), corpus)
        return too_large(trainer, resumed)

    found = warning()
    assert re.match(
        r"this run needs about 1\d\.\d+ GiB, the machine has 10.70 GiB, of which it may use 80 %; with dtype=bfloat16",
        found,
    )
    settings = found.partition("; with ")[2].partition(" it needs")[0].split(", ")
    assert warning(*settings) is None
    monkeypatch.setattr(memory, "machine_memory", lambda: 3 << 29)
    settings = warning().partition("; with ")[2].partition(" it needs")[0].split(", ")
    assert [setting.partition("=")[0] for setting in settings] == [
        "dtype",
        "gradient_checkpointing",
        "batch_size",
        "accumulate",
    ]
    assert warning(*settings) is None
    assert warning(resumed=True).endswith("; use more processes")  # all else that helps is fixed
    assert warning("gradient_checkpointing=true", resumed=True).endswith("; use more processes")
    monkeypatch.setattr(memory, "machine_memory", lambda: 9 << 30)
    assert "; with gradient_checkpointing=true it needs" in warning(resumed=True)
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 20)
    assert warning().endswith("choose a smaller model or shorter memories")


def test_a_run_that_is_too_large_says_so(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    settings = ("d_model=16", "n_heads=1", "n_layers=2", "d_ff=16", "horizons=uniform:4", "segment_length=8")
    words = ["train", "--data", str(corpus.path), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    assert main([*words, *(f"--set={setting}" for setting in settings)]) == 0
    assert "this run needs about" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "runs"), [(0.99, False), (0.79, True)])
def test_a_fifth_of_the_memory_stays_free(tmp_path, monkeypatch, share, runs):
    corpus = write_corpus(tmp_path / "corpus")
    needed = memory.estimate_memory(Trainer(tiny_config(), corpus)).total
    monkeypatch.setattr(plan_module, "machine_memory", lambda: int(needed / share))
    monkeypatch.setattr(memory, "machine_memory", lambda: int(needed / share))
    plan = make_plan(tiny_config(), corpus)
    assert (plan.peak_measured is not None) is runs
    assert (plan.warning is None) is runs


def test_a_plan_of_a_resumed_run_counts_what_is_left(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    run, config = tmp_path / "run", tiny_config(max_steps=4)
    train(config, corpus.path, run)
    (latest,) = CheckpointStore(run, keep_last=1).complete()
    more = replace(config, max_steps=10)
    plan = make_plan(more, corpus, latest)
    progress = saved_progress(resume_point(latest, more))
    assert plan.tokens_done == progress.tokens > 0
    assert plan.steps == 10 - progress.step
    assert make_plan(config, corpus, latest).steps == 0
    assert make_plan(config, corpus).steps == 4
    show_plan(plan)
    assert f"what is left after {plan.tokens_done:,} tokens: {plan.steps:,.0f} steps of" in capsys.readouterr().out
