"""Runs with the schedule "wsd": cooled down, looked at and continued."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.callbacks import StopAt, Watch
from support.kill_and_resume import checkpoint_step, differences
from support.ranks import finish, launch
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError, load
from dsmr_mlx.model.checkpoint_folder import CHECKSUMS, CheckpointStore
from dsmr_mlx.training import report, trainer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.run import Callback, saved_config, train
from dsmr_mlx.training.run_record import RunRecord, find_samples, read_metrics
from dsmr_mlx.training.trainer import Trainer

BEFORE = "before-cooldown"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", train=3, notes=4).path


def wsd(**options) -> TrainConfig:
    """Return the configuration of a run of 10 steps, the last 5 with a falling rate."""
    defaults = {"lr_schedule": "wsd", "cooldown": 0.5, "max_steps": 10, "optimizer": "muon", "min_learning_rate": 0.0}
    return tiny_config(
        **(defaults | {"eval_every": 4, "eval_tokens": 1, "checkpoint_every": 7, "keep_last": 1} | options)
    )


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in read_metrics(run) if line["kind"] == "train"]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def messages(watch: Watch) -> list[str]:
    return [event[1] for event in watch.events if event[0] == "message"]


def scripted_validation(monkeypatch, losses: list[float]) -> None:
    """Replace the losses of validations, in order."""
    validate, rest = Trainer.validate, iter(losses)

    def scripted(self, on_progress=None):
        return dataclasses.replace(validate(self, on_progress), nats_per_token=next(rest))

    monkeypatch.setattr(Trainer, "validate", scripted)


def test_the_checkpoint_before_the_cooldown_is_kept(tmp_path, corpus):
    """Although it is older than `keep_last` and no other checkpoint is due at its step."""
    out = tmp_path / "run"
    train(wsd(warmup_steps=0), corpus, out)
    np.testing.assert_allclose(rates(out), [0.01] * 6 + [0.008, 0.006, 0.004, 0.002])
    assert checkpoint_step(out / BEFORE) == 5
    assert checkpoint_step(out / "last") == 10
    assert len(checkpoints(out)) <= 3
    load(out / BEFORE)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 8])
def test_resume_with_the_same_limits_is_bitwise(tmp_path, corpus, stop):
    """Stopped at the beginning of and in the cool-down; also with an average and accumulated gradients."""
    config = wsd(dropout=0.1, accumulate=2, ema_decay=0.8)
    train(config, corpus, tmp_path / "straight")
    train(config, corpus, tmp_path / "stopped", callback=StopAt(stop))
    train(config, corpus, tmp_path / "stopped", resume=True)
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []
    assert checkpoint_step(tmp_path / "stopped" / BEFORE) == 5


@pytest.mark.slow
def test_a_cooled_run_continues_as_if_it_had_not_cooled(tmp_path, corpus):
    """The longer run is bitwise the one in one go, twice: after the first cool-down and after the second."""
    options = {"dropout": 0.1, "ema_decay": 0.5, "warmup_steps": 1, "checkpoint_every": 3}
    out = tmp_path / "run"
    train(wsd(**options, max_steps=4), corpus, out)
    for steps in (10, 22):
        train(wsd(**options, max_steps=steps), corpus, tmp_path / f"straight-{steps}")
        watch = Watch()
        train(wsd(**options, max_steps=steps), corpus, out, resume=True, callback=watch)
        found = [name for name in differences(tmp_path / f"straight-{steps}", out) if name != "best"]
        assert found == []
        (message,) = messages(watch)
        assert "the cool-down now begins later: the run continues from step-000000" in message
    assert {"cooled-00000004", "cooled-00000010"} <= set(checkpoints(out))
    cooled = out / "checkpoints" / "cooled-00000004"
    load(cooled)
    steps = [json.loads(line)["step"] for line in (cooled / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
    assert checkpoint_step(out / BEFORE) == 11


@pytest.mark.slow
def test_a_continued_run_may_be_killed(tmp_path, corpus):
    """Before its first checkpoint, whose place an old one has, and later; settings need not be given again."""

    class Crash(Callback):
        def __init__(self, step):
            self.step = step

        def on_step(self, run, record):
            if record.step == self.step:
                raise RuntimeError

    out = tmp_path / "run"
    train(wsd(), corpus, out)
    train(wsd(max_steps=24), corpus, tmp_path / "straight")
    for step in (6, 9, 15):
        with pytest.raises(RuntimeError):
            train(TrainConfig(**saved_config(out) | {"max_steps": 24}), corpus, out, resume=True, callback=Crash(step))
        assert saved_config(out)["max_steps"] == 24
    train(TrainConfig(**saved_config(out)), corpus, out, resume=True)
    assert [name for name in differences(tmp_path / "straight", out) if name != "best"] == []


def test_an_end_that_is_little_later_prolongs_the_cooldown(tmp_path, corpus):
    """If the newest checkpoint lies in the new cool-down too, nothing is trained again."""
    out = tmp_path / "run"
    train(wsd(), corpus, out)
    watch = Watch()
    train(wsd(max_steps=16), corpus, out, resume=True, callback=watch)
    assert watch.events[0] == ("start", out / "checkpoints" / "step-00000010")
    assert rates(out)[10:] == pytest.approx([0.01 * left / 8 for left in (6, 5, 4, 3, 2, 1)])
    assert checkpoint_step(out / BEFORE) == 5


def test_a_stopped_run_can_be_cooled_down_at_any_time_and_continued(tmp_path, corpus):
    """An earlier end begins the cool-down at once, and the checkpoint at which it does so is kept."""
    out = tmp_path / "run"
    train(wsd(max_steps=40), corpus, out, callback=StopAt(9))
    train(wsd(max_steps=12), corpus, out, resume=True)
    assert checkpoint_step(out / BEFORE) == 9
    assert rates(out)[8:] == pytest.approx([0.01, *(0.01 * left / 6 for left in (3, 2, 1))])
    train(wsd(max_steps=40), corpus, out, resume=True, callback=StopAt(13))
    assert rates(out) == pytest.approx([*rates(out)[:3], *[0.01] * 10])
    assert "cooled-00000012" in checkpoints(out)


def test_a_whole_run_can_be_one_cooldown(tmp_path, corpus):
    out = tmp_path / "run"
    train(wsd(cooldown=1.0, max_steps=3), corpus, out)
    assert checkpoint_step(out / BEFORE) == 0


def test_without_the_checkpoint_before_the_cooldown_the_newest_is_resumed(tmp_path, corpus):
    out = tmp_path / "run"
    train(wsd(), corpus, out)
    shutil.rmtree((out / BEFORE).resolve())
    watch = Watch()
    train(wsd(max_steps=24), corpus, out, resume=True, callback=watch)
    assert messages(watch)[0].endswith("step-00000005: missing, so the run continues from step-00000010")
    assert checkpoint_step(out / BEFORE) == 12


def test_best_stays_with_cooled_weights_until_others_are_better(tmp_path, corpus, monkeypatch):
    """And they do not count for the patience, because the loss at the full rate is higher."""
    out = tmp_path / "run"
    scripted_validation(monkeypatch, [5.0, 3.0, 3.1, 4.5, 4.4, 4.3, 2.9, 3.0])  # steps 4, 8, 10; again 8, 12 …
    options = {"patience": 2, "warmup_steps": 0}
    train(wsd(**options), corpus, out)
    assert checkpoint_step(out / "best") == 8
    watch = Watch()
    watch.on_step = StopAt(17).on_step
    train(wsd(**options, max_steps=24), corpus, out, resume=True, callback=watch)
    assert [event[2] for event in watch.events if event[0] == "validation"] == [False] * 3, "of other weights"
    assert (out / "best").resolve().name == "cooled-00000008"
    assert RunRecord.read(out).best["nats_per_token"] == 3.0
    assert {"cooled-00000008", "cooled-00000010"} <= set(checkpoints(out))
    run = train(wsd(**options, max_steps=24), corpus, out, resume=True)
    assert run.best_loss == 2.9
    assert (out / "best").resolve().name == "step-00000020"


def test_samples_of_cooled_weights_stay_with_their_checkpoint(tmp_path, corpus, monkeypatch):
    """The report shows those of the continued run, and that of the best weights, which may have the same step."""
    out = tmp_path / "run"
    scripted_validation(monkeypatch, [5.0, 3.0, 3.1, 4.5])  # steps 4, 8, 10; again 8
    config = wsd(sample_seconds=0.1)
    train(config, corpus, out)
    train(dataclasses.replace(config, max_steps=24), corpus, out, resume=True, callback=StopAt(9))
    cooled = out / "checkpoints" / "cooled-00000010"
    assert list(find_samples(out)) == [4, 8]
    assert list(find_samples(cooled)) == [8, 10]
    record = RunRecord.read(out)
    assert record.best_sample == find_samples(cooled)[8]
    monkeypatch.setattr(report, "sample_figure", lambda title, *_: title)
    assert report.samples(record) == ["Step 8, the best weights", "Step 8", "Step 4"]


def test_settings_that_are_refused_leave_the_cooled_run_as_it_is(tmp_path, corpus):
    out = tmp_path / "run"
    train(wsd(), corpus, out)
    before = checkpoints(out), (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"optimizer = 'adamw': the run in .* has optimizer = 'muon', which is fixed"):
        train(wsd(max_steps=40, optimizer="adamw"), corpus, out, resume=True)
    assert before == (checkpoints(out), (out / "metrics.jsonl").read_text())
    assert checkpoint_step(out / "best") <= 10


@pytest.mark.slow
def test_a_cooldown_by_minutes(tmp_path, corpus, monkeypatch):
    """The clock shows 3 ms more each time that it is read, so that no busy machine changes the steps."""
    out, clock = tmp_path / "run", itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: 0.003 * next(clock)))
    run = train(wsd(max_steps=None, max_minutes=0.003), corpus, out)
    assert 0 < checkpoint_step(out / BEFORE) < run.trainer.progress.step
    assert rates(out)[-1] < 0.005


@pytest.mark.parametrize("best", [4, 8])
def test_checkpoints_can_be_set_aside_again_after_a_kill_at_any_moment(tmp_path, monkeypatch, best):
    """Each call of the system is interrupted in turn."""

    class Killed(Exception):
        pass

    def store(folder: Path) -> CheckpointStore:
        store = CheckpointStore(folder, keep_last=1)
        for step in (2, 4, 6, 8):
            path = store.folder / f"step-{step:08d}"
            path.mkdir(parents=True)
            (path / CHECKSUMS).write_text(str(step))
        store.point("best", store.folder / f"step-{best:08d}")
        return store

    point, done = 0, False
    while not done:
        point, passed, kept = point + 1, 0, store(tmp_path / f"{point}")

        def watched(function, point=point):
            def call(*arguments, **options):
                nonlocal passed
                passed += 1
                if passed == point:
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "fsync"), (shutil, "copyfile"), (os, "rmdir"), (os, "unlink")):
                patch.setattr(module, name, watched(getattr(module, name)))
            try:
                kept.set_aside(kept.folder / "step-00000002")
                done = True
            except Killed:
                pass
        kept.remove_leftovers()
        assert kept.target("best").name in (f"step-{best:08d}", f"cooled-{best:08d}")
        assert (kept.target("best") / CHECKSUMS).read_text() == str(best)
        if kept.latest().name != "step-00000002":
            assert kept.latest().name == "step-00000008"
            kept.set_aside(kept.folder / "step-00000002")
        names = {path.name for path in kept.folder.iterdir()}
        assert names == {"step-00000002", "cooled-00000008", f"cooled-{best:08d}"}
        assert kept.target("best").name == f"cooled-{best:08d}"
    assert point > 10


@pytest.mark.slow
def test_two_processes_cool_down_and_continue(tmp_path, corpus):
    """They agree on when, and the second process may lack the files of the run."""
    settings = ("lr_schedule=wsd", "cooldown=0.5", "optimizer=muon", "batch_size=2", "warmup_steps=1")
    out, nothing = tmp_path / "run", tmp_path / "nothing"
    finish(launch(corpus, out, *settings, "max_steps=4"))
    assert checkpoint_step(out / BEFORE) == 2
    finish(launch(corpus, out, *settings, "max_steps=10", resume=True, outs=[out, nothing]))
    np.testing.assert_allclose(rates(out)[2:5], rates(out)[2])
    assert len(rates(out)) == 10
    assert "cooled-00000004" in checkpoints(out)
