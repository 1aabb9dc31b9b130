"""Whatever ends a run, at any moment, it loses no more than the work after its last checkpoint."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from support.callbacks import Watch
from support.kill_and_resume import checkpoint_step, differences, killed_run, train_process, wait_for_steps
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError, load
from dsmr_mlx.cli import main
from dsmr_mlx.common.files import sha256
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import checkpoint_name
from dsmr_mlx.training.lock import RunLock
from dsmr_mlx.training.run import Callback, train
from dsmr_mlx.training.run_record import read_metrics
from dsmr_mlx.training.trainer import NotFinite, Trainer

TESTS = Path(__file__).parents[1]
TINY = (
    "d_model=16 n_layers=2 n_heads=2 head_dim=8 d_ff=24 segment_length=8 batch_size=3 warmup_steps=3 sample_seconds=0"
)
ACCUMULATE = tiny_config(max_steps=6, accumulate=3, dropout=0.1, augment_transpose=3, augment_stretch=0.05, fill=0.7)
SHORT = {
    "max_steps": 29,
    "eval_every": 20,
    "dropout": 0.2,
    "ema_decay": 0.9,
    "augment_transpose": 5,
    "augment_velocity": 9,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", train=3, notes=4).path


@pytest.fixture(scope="module")
def begun(tmp_path_factory, corpus):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("begun") / "run"
    train(tiny_config(max_steps=2), corpus, run)
    return run


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    settings = [f"--set={s}" for s in [*TINY.split(), "horizons=two-scale:long=1x12,short=4", *more]]
    return ["train", "--data", str(corpus), "--out", str(out), "--resume", *settings]


def assert_same_run(a: Path, b: Path) -> None:
    assert differences(a, b) == []


@pytest.mark.slow
def test_a_kill_at_any_write_point_leaves_a_complete_checkpoint(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "support.crash_worker", tmp_path], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50


@pytest.mark.slow
def test_resume_after_random_kills_is_bitwise(tmp_path, corpus):
    settings = ("max_steps=50", "checkpoint_every=7", "eval_every=20", "dropout=0.1")
    assert main(command(corpus, tmp_path / "straight", *settings)) == 0
    assert killed_run(corpus, tmp_path / "killed", command(corpus, tmp_path, *settings)[6:], waits=[9, 12]) == 2
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, corpus, number):
    out = tmp_path / "run"
    process = train_process(corpus, out, command(corpus, out, "max_steps=100000")[6:])
    wait_for_steps(out, process, more=5)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 0, shown
    assert "--resume" in shown
    last = read_metrics(out)[-1]["step"]
    assert checkpoint_step(out / "last") == last


def test_a_second_signal_ends_the_process_at_once(tmp_path, corpus):
    class Twice(Callback):
        def on_step(self, run, record):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), corpus, tmp_path / "run", callback=Twice())
    assert not (tmp_path / "run" / "last").exists()


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    """A corpus, and an uninterrupted run on it of steps of three segments."""
    folder = tmp_path_factory.mktemp("accumulated")
    write_corpus(folder / "corpus")
    train(ACCUMULATE, folder / "corpus", folder / "straight")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 7, 8, 15])
def test_resume_inside_an_accumulation_is_bitwise(tmp_path, accumulated, stop, monkeypatch):
    """The signal comes after `stop` segments; a step has three."""
    corpus, out = accumulated / "corpus", tmp_path / "stopped"
    train_segment, done = Trainer.train_segment, 0

    def interrupted(self):
        nonlocal done
        done += 1
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return train_segment(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_segment", interrupted)
        train(ACCUMULATE, corpus, out)
    assert (out / "last").resolve().name == checkpoint_name(stop // 3, stop % 3)
    train(ACCUMULATE, corpus, out, resume=True)
    assert_same_run(accumulated / "straight", out)


@pytest.fixture(scope="module")
def short_pieces(tmp_path_factory):
    """A corpus of short pieces, and an uninterrupted run on it."""
    folder = tmp_path_factory.mktemp("short")
    write_corpus(folder / "corpus", train=4, notes=4)
    train(tiny_config(**SHORT), folder / "corpus", folder / "straight")
    assert read_metrics(folder / "straight")[-2]["epoch"] > 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 5, 9, 13, 17, 21])
def test_resume_is_bitwise_at_the_ends_of_pieces_and_epochs(tmp_path, short_pieces, stop):
    """Pieces are short, so that stops come within, between and at the ends of pieces and epochs."""

    class Crash(Callback):
        def on_step(self, run, record):
            if record.step == stop + 1:
                raise RuntimeError

    config = tiny_config(checkpoint_every=stop, **SHORT)
    with pytest.raises(RuntimeError):
        train(config, short_pieces / "corpus", tmp_path / "crashed", callback=Crash())
    train(tiny_config(**SHORT), short_pieces / "corpus", tmp_path / "crashed", resume=True)
    assert_same_run(short_pieces / "straight", tmp_path / "crashed")


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_keeps_the_old_checkpoint(tmp_path, corpus, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main(command(corpus, out, "max_steps=4", "lr_schedule=cosine")) == 0
    before = load_arrays(out / "last" / "model.safetensors")

    def full(file, arrays):
        file.write(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    capsys.readouterr()
    assert main(command(corpus, out, "max_steps=8", "lr_schedule=cosine")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step-00000008: No space left on device; no checkpoint was written, earlier ones are intact" in error
    monkeypatch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    after = load_arrays(out / "last" / "model.safetensors")
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    load(out)


def test_a_full_disk_while_a_cooled_checkpoint_is_kept(tmp_path, corpus, monkeypatch, capsys):
    """Resumed with a later cool-down, a run first copies its newest checkpoint. If that fails, nothing has changed."""
    out = tmp_path / "run"
    schedule = ("lr_schedule=wsd", "cooldown=0.5", "warmup_steps=0")
    assert main(command(corpus, out, "max_steps=4", *schedule)) == 0
    before = sorted(path.name for path in (out / "checkpoints").iterdir())

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsmr_mlx.model.checkpoint_folder._copy", full)
    capsys.readouterr()
    assert main(command(corpus, out, "max_steps=12", *schedule)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"cooled-\d+: .*No space left on device.*; no checkpoint was written, earlier ones are", error)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
    monkeypatch.undo()
    assert main(command(corpus, out, "max_steps=12", *schedule)) == 0


needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="macOS has no /dev/full")


@needs_full_device
def test_a_full_disk_while_metrics_are_written_names_them(tmp_path, corpus, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main(command(corpus, out, "max_steps=2")) == 0
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("dsmr_mlx.training.run.Run._truncate_metrics", lambda run: None)
    capsys.readouterr()
    assert main(command(corpus, out, "max_steps=4")) == 1
    assert "metrics.jsonl: No space left on device" in capsys.readouterr().err


def test_a_sample_that_a_kill_prevented_is_written_on_resume(tmp_path, corpus, monkeypatch):
    config = tiny_config(max_steps=4, eval_every=4, sample_seconds=1.0)
    with monkeypatch.context() as patch:
        patch.setattr("dsmr_mlx.training.run.write_sample", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, corpus, tmp_path / "run")
    sample = tmp_path / "run" / "samples" / "step-00000004.mid"
    assert not sample.exists()
    train(config, corpus, tmp_path / "run", resume=True)
    train(config, corpus, tmp_path / "whole")
    whole = tmp_path / "whole" / "samples" / sample.name
    assert sample.read_bytes().replace(b"dsmr-mlx run", b"dsmr-mlx whole")[60:] == whole.read_bytes()[60:]


@pytest.mark.parametrize(
    "change",
    [
        {"best": "../../elsewhere"},
        {"best": 7},
        {"before_cooldown": ".."},
        {"lines": -1},
        {"best_loss": float("inf")},
        {"validated_tokens": 10**300},
        {"progress": None},
        {"progress": {"step": 1}},
        {"lanes": {"drawn": 1, "lanes": [[1, 0], None]}},
        {"lanes": {"drawn": -1, "lanes": []}},
        {"lanes": {"drawn": 9, "lanes": [[0, -4]]}},
        {"corpus": ["x"]},
        {"more": 1},
    ],
)
def test_an_invalid_state_of_a_run_is_one_line(tmp_path, corpus, begun, change):
    run = shutil.copytree(begun, tmp_path / "run", symlinks=True)
    folder = (run / "last").resolve()
    path = folder / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    recorded = json.loads((folder / "checksums.json").read_text())
    recorded["training.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "checksums.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"training\.json: "):
        train(tiny_config(max_steps=4), corpus, run, resume=True)


@needs_full_device
def test_mlx_reports_a_full_device(tmp_path):
    """Writes to /dev/full fail, and MLX's writer must not ignore that."""
    (tmp_path / "x.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_arrays(tmp_path / "x.safetensors", {"a": mx.zeros((1 << 20,))})


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path, corpus, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(corpus, tmp_path / "file" / "run")) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.slow
def test_a_read_only_file_system_is_an_error_and_keeps_the_old_checkpoint(tmp_path, corpus, monkeypatch, capsys):
    """The error is simulated, because root may write anywhere."""
    out = tmp_path / "run"
    assert main(command(corpus, out, "max_steps=4", "lr_schedule=cosine")) == 0
    mkdir = Path.mkdir

    def refused(self, *args, **kwargs):
        if self.is_relative_to(out / "checkpoints"):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return mkdir(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        assert main(command(corpus, out, "max_steps=8", "lr_schedule=cosine")) == 1
    assert "step-00000008: Read-only file system; no checkpoint was written" in capsys.readouterr().err
    assert checkpoint_step(out / "last") == 4
    assert main(command(corpus, out, "max_steps=8", "lr_schedule=cosine")) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "memory.safetensors", "training.json"])
def test_resuming_from_a_damaged_checkpoint_names_the_file(tmp_path, corpus, begun, name):
    run = shutil.copytree(begun, tmp_path / "run", symlinks=True)
    path = (run / "last").resolve() / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        train(tiny_config(max_steps=9), corpus, run, resume=True)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_only_checkpoints_that_a_run_continues_from_keep_the_memory(tmp_path, corpus, schedule):
    """A run continued from an older one begins with empty memories, and says so."""
    out, watch = tmp_path / "run", Watch()
    config = tiny_config(max_steps=20, checkpoint_every=3, keep_last=3, lr_schedule=schedule, cooldown=0.5)
    train(config, corpus, out)
    links = {"cosine": ["last"], "wsd": ["last", "before-cooldown"]}[schedule]
    with_memory = {path.parent.name for path in out.glob("checkpoints/*/memory.safetensors")}
    assert with_memory == {(out / link).resolve().name for link in links}
    checkpoints = sorted((out / "checkpoints").glob("step-*"))
    assert len(checkpoints) >= 3 + len(links) - 1
    shutil.rmtree(checkpoints[-1])
    train(config, corpus, out, resume=True, callback=watch)
    assert f"{checkpoints[-2].name}: no memory.safetensors, so the memory of all lanes begins empty" in str(
        watch.events
    )


@pytest.mark.slow
def test_two_runs_cannot_share_a_folder(tmp_path, corpus):
    out = tmp_path / "run"

    class Second(Callback):
        def on_step(self, run, record):
            for options in ({"resume": True}, {"force": True}):
                with pytest.raises(UserError, match=f"the folder is locked by process {os.getpid()}"):
                    train(tiny_config(max_steps=1), corpus, out, **options)

    train(tiny_config(max_steps=2), corpus, out, callback=Second())
    with RunLock(out), pytest.raises(UserError, match="the folder is locked by process"):
        train(tiny_config(max_steps=3), corpus, out, resume=True)
    train(tiny_config(max_steps=3), corpus, out, resume=True)


def poison(step: int):
    """Return a callback that makes the weights NaN after a step."""

    class Poison(Watch):
        def on_step(self, run, record):
            super().on_step(run, record)
            if record.step == step:
                gain = run.trainer.parameters["norm"]["weight"]
                run.trainer.parameters["norm"]["weight"] = gain * mx.nan

    return Poison()


def test_a_loss_that_is_not_finite_stops_the_run_with_a_diagnosis(tmp_path, corpus):
    with pytest.raises(NotFinite, match=r"step 5: loss nan.*not-finite-00000005\.json"):
        train(tiny_config(checkpoint_every=3), corpus, tmp_path / "run", callback=poison(4))
    diagnosis = json.loads((tmp_path / "run" / "not-finite-00000005.json").read_text())
    assert diagnosis["weights_not_finite"] == ["norm.weight"]
    assert diagnosis["lanes"][0]["source"].endswith(".mid")
    assert checkpoint_step(tmp_path / "run" / "last") == 3
    train(tiny_config(max_steps=6), corpus, tmp_path / "run", resume=True)


def test_skipping_stops_after_max_skips_in_a_row(tmp_path, corpus):
    config = tiny_config(not_finite="skip", max_skips=3)
    with pytest.raises(NotFinite, match="4 in a row"):
        train(config, corpus, tmp_path / "run", callback=poison(4))
    assert [line["kind"] for line in read_metrics(tmp_path / "run")[4:]] == ["skip"] * 3


def test_training_continues_after_a_skipped_step(tmp_path, corpus):
    """With NaN in a lane's memory, every later loss would be NaN if a skip did not empty the memory."""

    class PoisonMemory(Watch):
        def on_step(self, run, record):
            super().on_step(run, record)
            if record.step == 4:
                layer = run.trainer.state.layers[0]
                run.trainer.state.layers[0] = layer | {"keys": layer["keys"] * mx.nan}

    watch = PoisonMemory()
    run = train(tiny_config(max_steps=10, not_finite="skip"), corpus, tmp_path / "run", callback=watch)
    kinds = [line["kind"] for line in read_metrics(tmp_path / "run")]
    assert kinds.count("skip") == 1
    assert run.trainer.progress.skipped == 1
    assert run.trainer.progress.step == 10
    assert any(event[0] == "message" and "skipped: step 5" in event[1] for event in watch.events)


@pytest.mark.slow
def test_partial_files_of_a_killed_run_are_removed(tmp_path, corpus):
    out = tmp_path / "run"
    train(tiny_config(max_steps=3), corpus, out)
    (out / ".last.incomplete").symlink_to("nowhere")
    (out / "checkpoints" / "step-00000009.incomplete").mkdir()
    train(tiny_config(max_steps=5), corpus, out, resume=True)
    assert not list(out.rglob("*.incomplete"))
    shutil.rmtree(out)
