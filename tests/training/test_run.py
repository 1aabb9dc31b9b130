"""The run around the trainer: folders, metrics, resuming."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.callbacks import StopAt, Watch
from support.kill_and_resume import differences, figures
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError, load
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.run import Callback, Run, saved_config, train
from dsmr_mlx.training.run_folder import empty
from dsmr_mlx.training.run_record import METRICS_FILE, read_metrics
from dsmr_mlx.training.trainer import Trainer

RESUMED = {accumulate: tiny_config(max_steps=20, dropout=0.1, accumulate=accumulate) for accumulate in (1, 2)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", train=3, notes=6).path


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """Uninterrupted runs with the configurations in RESUMED."""
    folder = tmp_path_factory.mktemp("straight")
    for accumulate, config in RESUMED.items():
        train(config, corpus, folder / f"{accumulate}")
    return folder


@pytest.mark.slow
def test_files_and_events_of_a_run(tmp_path, corpus):
    watch = Watch()
    train(tiny_config(max_steps=25, sample_seconds=1.0), corpus, tmp_path / "run", callback=watch)
    run = tmp_path / "run"
    assert TrainConfig.load(run / "config.json") == tiny_config(max_steps=25, sample_seconds=1.0)
    lines = read_metrics(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 26))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 20, 25]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-000000{n}.mid" for n in (10, 20, 25)]
    for name in ("last", "best"):
        model, _ = load(run / name)
        assert model.config.horizons == [12, 4]
    assert len(list((run / "checkpoints").iterdir())) <= 3
    assert watch.events[0] == ("start", None)
    assert watch.events[-1] == ("end", "done")
    assert [event[1] for event in watch.events if event[0] == "validation"] == [10, 20, 25]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "value"), [("max_tokens", 300), ("max_minutes", 0.002)])
def test_other_limits_end_a_run(tmp_path, corpus, limit, value):
    run = train(tiny_config(**{"max_steps": None, limit: value}), corpus, tmp_path / "run")
    progress = run.trainer.progress
    reached = {"max_tokens": progress.tokens, "max_minutes": progress.seconds / 60}[limit]
    assert reached >= value
    assert limit == "max_minutes" or reached < value + 24


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "accumulate"), [(3, 1), (10, 1), (17, 1), (10, 2)])
def test_resume_after_ctrl_c_is_bitwise(tmp_path, corpus, straight, stop, accumulate):
    train(RESUMED[accumulate], corpus, tmp_path / "stopped", callback=StopAt(stop))
    assert read_metrics(tmp_path / "stopped")[-1]["step"] == stop
    train(RESUMED[accumulate], corpus, tmp_path / "stopped", resume=True)
    assert differences(straight / f"{accumulate}", tmp_path / "stopped") == []


@pytest.mark.slow
def test_metrics_after_the_checkpoint_are_not_duplicated_on_resume(tmp_path, corpus, straight):
    """After a crash between checkpoints, the metrics are ahead of the checkpoint and the last line is cut off."""
    out = tmp_path / "crashed"

    class Crash(Callback):
        def on_step(self, run, record):
            if record.step == 15:
                raise RuntimeError("power failure")

    with pytest.raises(RuntimeError):
        train(RESUMED[1], corpus, out, callback=Crash())
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    train(RESUMED[1], corpus, out, resume=True)
    assert figures(out) == figures(straight / "1")


def test_resume_without_a_checkpoint_starts_a_run(tmp_path, corpus):
    watch = Watch()
    train(tiny_config(max_steps=2), corpus, tmp_path / "run", resume=True, callback=watch)
    assert watch.events[0] == ("start", None)


def test_a_finished_run_can_be_extended(tmp_path, corpus):
    out = tmp_path / "run"
    train(tiny_config(max_steps=5), corpus, out)
    assert saved_config(out)["max_steps"] == 5
    before = (out / "metrics.jsonl").read_text()
    train(tiny_config(max_steps=5), corpus, out, resume=True)
    assert (out / "metrics.jsonl").read_text() == before
    longer = tiny_config(max_steps=8, learning_rate=2e-3, eval_every=4)
    run = train(longer, corpus, out, resume=True)
    assert run.trainer.progress.step == 8


def test_a_resumed_run_holds_its_memory_only_once(tmp_path, corpus, monkeypatch):
    """A single process reads arrays from their files, not from copies of these in memory."""
    train(tiny_config(max_steps=1), corpus, tmp_path / "run")
    read, load_arrays = {}, checkpoint.load_arrays
    monkeypatch.setattr(
        checkpoint, "load_arrays", lambda path, *more: read.update({path.name: more}) or load_arrays(path, *more)
    )
    train(tiny_config(max_steps=2), corpus, tmp_path / "run", resume=True)
    assert read == {f"{name}.safetensors": () for name in ("model", "training", "memory")}


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 4), ("segment_length", 16), ("d_model", 32), ("seed", 1), ("horizons", "none")]
)
def test_a_changed_fixed_setting_is_an_error_with_both_values(tmp_path, corpus, option, value):
    out = tmp_path / "run"
    train(tiny_config(max_steps=2), corpus, out)
    before = getattr(tiny_config(), option)
    with pytest.raises(UserError, match=f"{option} = {value!r}.*{option} = {before!r}"):
        train(tiny_config(max_steps=4, **{option: value}), corpus, out, resume=True)


def test_another_corpus_is_an_error_with_its_fingerprint(tmp_path, corpus):
    out = tmp_path / "run"
    train(tiny_config(max_steps=2), corpus, out)
    other = write_corpus(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match=f"{other.fingerprint[:12]}.*not the same corpus"):
        train(tiny_config(max_steps=4), other.path, out, resume=True)


def test_an_existing_folder_is_not_overwritten(tmp_path, corpus):
    out = tmp_path / "run"
    train(tiny_config(max_steps=2), corpus, out)
    with pytest.raises(UserError, match="already exists; `resume` continues it, `force` starts anew"):
        train(tiny_config(max_steps=2), corpus, out)
    train(tiny_config(max_steps=3, seed=4), corpus, out, force=True)
    assert len(read_metrics(out)) == 4
    music = tmp_path / "music"
    music.mkdir()
    (music / "song.mid").write_bytes(b"")
    for options in ({"force": True}, {"resume": True}):
        with pytest.raises(UserError, match="not empty and not a training run"):
            train(tiny_config(max_steps=2), corpus, music, **options)
    assert [path.name for path in music.iterdir()] == ["song.mid"]
    with pytest.raises(UserError, match="is a file"):
        train(tiny_config(max_steps=2), corpus, music / "song.mid", resume=True)


def test_a_forced_start_that_is_refused_leaves_the_old_run(tmp_path, corpus):
    out = tmp_path / "run"
    train(tiny_config(max_steps=1), corpus, out)
    own = write_corpus(out / "corpus").path
    before = sorted(out.rglob("*"))
    for data, options, message in (
        (corpus, {"max_positions": 8}, "no more learned positions"),
        (own, {}, "`data` .*corpus: is in .*run, which `force` would delete; expected another `out`"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny_config(**options), data, out, force=True)
    assert sorted(out.rglob("*")) == before


def test_a_folder_of_another_program_is_not_a_run(tmp_path, corpus):
    """Other programs write a folder `checkpoints` too."""
    other = tmp_path / "other"
    (other / "checkpoints" / "step-9.incomplete").mkdir(parents=True)
    (other / "thesis.tex").write_text("")
    before = sorted(other.rglob("*"))
    for options in ({"force": True}, {"resume": True}):
        with pytest.raises(UserError, match="not empty and not a training run"):
            train(tiny_config(max_steps=1), corpus, other, **options)
    assert sorted(other.rglob("*")) == before


def test_a_forced_start_deletes_the_mark_of_a_run_last(tmp_path, monkeypatch):
    """So that one which was interrupted can be repeated."""
    for name in ("a", METRICS_FILE, "z"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints").mkdir()
    left, unlink = [], Path.unlink

    def watched(path):
        left.append(sorted(path.name for path in tmp_path.iterdir()))
        unlink(path)

    monkeypatch.setattr(Path, "unlink", watched)
    empty(tmp_path)
    assert left[-1] == [METRICS_FILE]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_during_a_validation_ends_it_and_the_resumed_run_repeats_it(tmp_path, corpus):
    """A validation in the middle and the one at the end: the metrics and weights are those of a run without stops."""

    class StopIn(Watch):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def on_validation_progress(self, run, done, total):
            if run.trainer.progress.step == self.step:
                self.events.append(("progress", done))
                os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(max_steps=4, eval_every=2)
    train(config, corpus, tmp_path / "straight")
    for step in (2, 4):
        watch = StopIn(step)
        train(config, corpus, tmp_path / "run", resume=True, callback=watch)
        assert [event[0] for event in watch.events].count("progress") == 1
        assert watch.events[-1] == ("end", "stopped")
        last = read_metrics(tmp_path / "run")[-1]
        assert (last["kind"], last["step"]) == ("train", step)
    train(config, corpus, tmp_path / "run", resume=True)
    assert figures(tmp_path / "run") == figures(tmp_path / "straight")
    weights = [checkpoint.load_arrays(tmp_path / name / "last/model.safetensors") for name in ("run", "straight")]
    assert all(mx.array_equal(array, weights[1][name]) for name, array in weights[0].items())


def test_the_other_ranks_wait_for_a_checkpoint_without_a_timeout(tmp_path, corpus, monkeypatch):
    """However long rank 0 writes it, and for its errors."""
    happened, total, save = [], Ranks.total, CheckpointStore.save

    def watched(self, values, patient=False):
        happened.append("wait" if patient else "hurry")
        return total(self, values, patient)

    monkeypatch.setattr(Ranks, "total", watched)
    monkeypatch.setattr(CheckpointStore, "save", lambda *given: happened.append("save") or save(*given))
    train(tiny_config(max_steps=1), corpus, tmp_path / "run")
    after = [happened[i + 1] for i, event in enumerate(happened) if event == "save"]
    assert after
    assert set(after) == {"wait"}


def test_the_other_ranks_wait_for_a_sample_without_a_timeout(tmp_path, corpus, monkeypatch):
    """In a validation and at a start that writes the sample of the last one."""
    happened, total = [], Ranks.total

    def watched(self, values, patient=False):
        happened.append("wait" if patient else "hurry")
        return total(self, values, patient)

    monkeypatch.setattr(Ranks, "total", watched)
    monkeypatch.setattr("dsmr_mlx.training.run.write_sample", lambda *_: happened.append("sample"))
    for resume in (False, True):
        train(tiny_config(max_steps=1, sample_seconds=0.1), corpus, tmp_path / "run", resume=resume)
    after = [happened[i + 1] for i, event in enumerate(happened) if event == "sample"]
    assert after == ["wait", "wait"]


def test_a_corpus_without_validation_pieces_trains_with_a_message(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", validation=0)
    watch = Watch()
    train(tiny_config(max_steps=12), corpus.path, tmp_path / "run", callback=watch)
    assert any(event[0] == "message" and "no validation" in event[1] for event in watch.events)
    load(tmp_path / "run")


def test_defaults_work_on_a_folder_of_ten_files(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", train=9, validation=1)
    defaults = TrainConfig()
    config = tiny_config(batch_size=defaults.batch_size, segment_length=defaults.segment_length, max_steps=2)
    run = train(config, corpus.path, tmp_path / "run")
    assert run.trainer.progress.step == 2
    assert run.best_loss is not None


@pytest.mark.slow
def test_validation_does_not_change_training(tmp_path, corpus):
    """Steps with frequent validation and samples equal those without."""
    options = {"max_steps": 8, "dropout": 0.1}
    often = train(tiny_config(eval_every=2, sample_seconds=0.5, **options), corpus, tmp_path / "often")
    never = train(tiny_config(eval_every=10**6, **options), corpus, tmp_path / "never")
    losses = [[m["loss"] for m in read_metrics(run.out) if m["kind"] == "train"] for run in (often, never)]
    assert losses[0] == losses[1]


def test_the_configuration_is_readable_json(tmp_path, corpus):
    train(tiny_config(max_steps=1), corpus, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["horizons"] == "two-scale:long=1x12,short=4"


def test_run_is_usable_as_a_library(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    run = Run(tiny_config(max_steps=3), Corpus.load(corpus), tmp_path / "run", Callback(), Ranks())
    run.start(resume=False)
    run.loop()
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


def scripted_validation(monkeypatch, losses: list[float]) -> None:
    """Replace the losses of validations, in order."""
    validate, rest = Trainer.validate, iter(losses)

    def scripted(self, on_progress=None):
        return dataclasses.replace(validate(self, on_progress), nats_per_token=next(rest))

    monkeypatch.setattr(Trainer, "validate", scripted)


@pytest.mark.slow
def test_patience_ends_a_run_without_a_new_best(tmp_path, corpus, monkeypatch):
    config = tiny_config(max_steps=200, eval_every=2, patience=3)
    scripted_validation(monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.1])
    watch = Watch()
    run = train(config, corpus, tmp_path / "run", callback=watch)
    assert run.trainer.progress.step == 14
    assert (tmp_path / "run" / "best").resolve().name == "step-00000008"
    assert watch.events[-1] == ("end", "no new best in 3 validations")
    again = train(config, corpus, tmp_path / "run", resume=True)
    assert again.trainer.progress.step == 14


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, corpus, monkeypatch):
    scripted_validation(monkeypatch, [float("nan"), 4.0, float("inf"), 3.0])
    train(tiny_config(max_steps=8, eval_every=2), corpus, tmp_path / "run")
    assert (tmp_path / "run" / "best").resolve().name == "step-00000008"


def test_losses_on_different_validation_sets_are_not_compared(tmp_path, corpus):
    watch = Watch()
    train(tiny_config(max_steps=4, eval_every=2), corpus, tmp_path / "run")
    train(tiny_config(max_steps=8, eval_every=2, eval_tokens=1), corpus, tmp_path / "run", resume=True, callback=watch)
    assert ("message", "validation set changed; best loss reset") in watch.events


def test_a_finished_run_is_not_validated_again_on_resume(tmp_path, corpus):
    """The last checkpoint is written before the final validation and again after it."""
    config = tiny_config(max_steps=20, checkpoint_every=10, eval_every=15)
    train(config, corpus, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(config, corpus, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_restores_links_lost_to_a_kill(tmp_path, corpus, monkeypatch):
    def killed(self, link, checkpoint):
        raise RuntimeError("killed")

    train(tiny_config(max_steps=10), corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "point", killed)
        with pytest.raises(RuntimeError):
            train(tiny_config(max_steps=20), corpus, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "best").resolve().name == "step-00000010"
    train(tiny_config(max_steps=20), corpus, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "best").resolve().name == "step-00000020"
    assert (tmp_path / "run" / "last").resolve().name == "step-00000020"


def test_a_run_killed_before_its_first_checkpoint_keeps_its_settings(tmp_path, corpus):
    class Crash(Callback):
        def on_step(self, run, record):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(tiny_config(), corpus, tmp_path / "run", callback=Crash())
    assert saved_config(tmp_path / "run") == tiny_config().to_dict()
    assert saved_config(tmp_path / "nothing") is None


def test_a_skipped_step_is_saved_and_not_duplicated(tmp_path, corpus):
    """A skip right after a checkpoint, then Ctrl-C: the checkpoint has another name, the metrics have one line."""

    class Poison(Callback):
        def on_step(self, run, record):
            if record.step == 10:
                layer = run.trainer.state.layers[0]
                run.trainer.state.layers[0] = layer | {"keys": layer["keys"] * mx.nan}

        def on_message(self, run, message):
            if message.startswith("skipped"):
                os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(max_steps=14, checkpoint_every=10, not_finite="skip")
    train(config, corpus, tmp_path / "run", callback=Poison())
    assert (tmp_path / "run" / "last").resolve().name == "step-00000010+2"
    train(config, corpus, tmp_path / "run", resume=True)
    kinds = [line["kind"] for line in read_metrics(tmp_path / "run")]
    assert kinds.count("skip") == 1
    assert kinds.count("train") == 14


def test_a_run_stopped_in_a_step_that_will_be_skipped_can_be_resumed(tmp_path, corpus):
    """A loss is not finite in the first of several segments of a step, and then comes Ctrl-C."""

    class Poison(Callback):
        def on_step(self, run, record):
            if record.step == 3:
                train_segment = run.trainer.train_segment

                def poisoned():
                    found = train_segment()
                    run.trainer.progress.pending_loss = math.nan
                    os.kill(os.getpid(), signal.SIGINT)
                    return found

                run.trainer.train_segment = poisoned

    config = tiny_config(max_steps=6, accumulate=4, not_finite="skip")
    train(config, corpus, tmp_path / "run", callback=Poison())
    train(config, corpus, tmp_path / "run", resume=True)
    kinds = [line["kind"] for line in read_metrics(tmp_path / "run")]
    assert (kinds.count("skip"), kinds.count("train")) == (1, 6)


def test_a_sample_that_cannot_be_written_does_not_end_the_run(tmp_path, corpus, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmr_mlx.training.samples.write_notes", full)
    watch = Watch()
    train(tiny_config(max_steps=10, sample_seconds=1.0), corpus, tmp_path / "run", callback=watch)
    assert any(event[0] == "message" and "no sample written" in event[1] for event in watch.events)
    load(tmp_path / "run" / "best")


def test_lost_lines_of_the_metrics_are_reported(tmp_path, corpus):
    train(tiny_config(max_steps=10), corpus, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    watch = Watch()
    train(tiny_config(max_steps=12), corpus, tmp_path / "run", resume=True, callback=watch)
    assert any(event[0] == "message" and "only 6 of 11 lines are intact" in event[1] for event in watch.events)


def test_a_damaged_corpus_is_an_error_before_training(tmp_path, corpus):
    damaged = shutil.copytree(corpus, tmp_path / "damaged")
    path = damaged / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tokens\.npy"):
        train(tiny_config(max_steps=2), damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_average_is_saved_as_the_model_and_resumes_bitwise(tmp_path, corpus):
    config = tiny_config(max_steps=12, ema_decay=0.8)
    run = train(config, corpus, tmp_path / "run")
    model, _ = load(tmp_path / "run" / "last")
    average = run.trainer.average["embed"]["weight"]
    assert np.array_equal(np.array(model.embed.weight), np.array(average))
    assert not np.array_equal(np.array(average), np.array(run.trainer.parameters["embed"]["weight"]))
    train(config, corpus, tmp_path / "other", callback=StopAt(5))
    train(config, corpus, tmp_path / "other", resume=True)
    assert differences(tmp_path / "run", tmp_path / "other") == []


def test_validation_lines_have_the_loss_by_position(tmp_path, corpus):
    train(tiny_config(max_steps=2), corpus, tmp_path / "run")
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "validation"]
    assert line["by_position"][0].keys() == {"start", "end", "tokens", "nats_per_token"}
    assert "by_piece" not in line
