"""Data-parallel training over loopback, with MLX's ring backend."""

import json
import shutil
import signal
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.processes import finish, launch, losses
from support.tiny import write_corpus

from dsmr_mlx import UserError, load
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.run_record import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", train=7).path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(launch(corpus, run, 1, "max_steps=20"))
    return run


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, corpus, alone):
    """The same global batch: losses, gradient norms, validation and weights agree to float tolerance."""
    run = tmp_path / "run"
    shown = finish(launch(corpus, run, 2, "max_steps=20"))
    assert shown[1] == ""  # only rank 0 logs
    np.testing.assert_allclose(losses(run), losses(alone), rtol=2e-5)
    np.testing.assert_allclose(losses(run, "validation"), losses(alone, "validation"), rtol=2e-5)
    assert [line["step"] for line in read_metrics(run)] == [line["step"] for line in read_metrics(alone)]
    a, b = (load_arrays(r / "last" / "memory.safetensors") for r in (run, alone))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    for name in a:
        if name.startswith("layers"):
            np.testing.assert_allclose(np.array(a[name]), np.array(b[name]), atol=2e-3, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_accumulated_steps_of_two_processes_equal_those_of_one(tmp_path, corpus):
    runs = [tmp_path / "one", tmp_path / "two"]
    for ranks, run in enumerate(runs, start=1):
        finish(launch(corpus, run, ranks, "max_steps=6", "accumulate=3", "dropout=0.2", "fill=0.7"))
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, corpus, alone, before, after):
    run = tmp_path / "run"
    finish(launch(corpus, run, before, "max_steps=10"))
    finish(launch(corpus, run, after, "max_steps=20", resume=True))
    assert len(losses(run)) == 20
    # The learning rate of the first half was for 10 steps, so that only the data can be compared, not the losses.
    a, b = ((r / "last" / "training.json").read_text() for r in (run, alone))
    assert json.loads(a)["lanes"] == json.loads(b)["lanes"]
    assert json.loads(a)["progress"]["tokens"] == json.loads(b)["progress"]["tokens"]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path, corpus):
    run = tmp_path / "run"
    stop_second_rank(corpus, run, "accumulate=2", steps=4)
    load(run / "last")
    saved = progress(run)
    assert saved["step"] == read_metrics(run)[-1]["step"]


@pytest.mark.slow
def test_two_ranks_resume_within_a_step_of_a_finished_run(tmp_path, corpus):
    """On resume, rank 0 takes the pending gradients and the other rank has none."""
    for attempt in range(5):  # one stop in 64 meets the end of a step
        run = tmp_path / f"run-{attempt}"
        stop_second_rank(corpus, run, "accumulate=64", steps=1)
        saved = progress(run)
        if saved["segments"]:
            break
    assert saved["segments"]
    finish(launch(corpus, run, 2, "max_steps=1", "accumulate=64", resume=True))
    assert progress(run)["segments"] == saved["segments"]


ONE_LANE_EACH = (
    *("batch_size=2", "dropout=0.2", "learning_rate=1e-3", "min_learning_rate=1e-3", "eval_every=20"),
    *("canon=true", "qk_norm=true", "value_residual=true", "embedding_skip=true"),
)


@pytest.fixture(scope="module")
def one_lane_each(tmp_path_factory, corpus):
    """A run of 20 steps by two processes, and one of 15 steps."""
    folder = tmp_path_factory.mktemp("one-lane-each")
    for steps in (20, 15):
        finish(launch(corpus, folder / f"{steps}", 2, f"max_steps={steps}", *ONE_LANE_EACH))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("without_the_folder", [False, True])
def test_two_processes_resume_exactly_with_one_lane_each(tmp_path, corpus, one_lane_each, without_the_folder):
    """Pieces start in all lanes of a rank at once, but at different times on each rank: the clock must stay shared.

    The second rank may be a machine without the files of the run.
    """
    run, nothing = tmp_path / "run", tmp_path / "nothing"
    shutil.copytree(one_lane_each / "15", run, symlinks=True)
    out = [run, nothing if without_the_folder else run]
    finish(launch(corpus, run, 2, "max_steps=20", *ONE_LANE_EACH, resume=True, outs=out))
    assert losses(run) == losses(one_lane_each / "20")
    assert not nothing.exists()


@pytest.mark.slow
def test_processes_with_different_corpora_are_an_error_on_all_ranks(tmp_path, corpus):
    other = write_corpus(tmp_path / "other", seed=3).path
    processes = launch(corpus, tmp_path / "run", 2, "max_steps=5", corpora=[corpus, other])
    shown = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "corpus: process 1 has" in shown[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_an_error_on_rank_0_ends_all_ranks(tmp_path, corpus, alone):
    processes = launch(corpus, alone, 2, "max_steps=5")
    shown = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "already exists; --resume" in shown[0]
    assert "another process of this run failed; see its message" in shown[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_run_with_a_checkpoint_to_resume(tmp_path, corpus, victim):
    run = tmp_path / "run"
    processes = launch(corpus, run, 2, "max_steps=100000", "rank_timeout=4")
    wait_for_steps(run, 6)
    processes[victim].kill()
    survivor = processes[1 - victim]
    _, shown = survivor.communicate(timeout=60)
    assert survivor.returncode == 1
    assert "lost a process" in shown
    assert "Traceback" not in shown
    assert CheckpointStore(run, 1).latest() is not None
    processes[victim].communicate()
    finish(launch(corpus, run, 1, "max_steps=20", resume=True))
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"][-1] >= 6


def stop_second_rank(corpus: Path, run: Path, setting: str, steps: int) -> None:
    """Train with two processes and stop the second when there are `steps` lines of metrics."""
    processes = launch(corpus, run, 2, "max_steps=100000", setting)
    wait_for_steps(run, steps)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes)


def progress(run: Path) -> dict:
    return json.loads((run / "last" / "training.json").read_text())["progress"]


def wait_for_steps(run: Path, steps: int) -> None:
    path, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= steps):
        time.sleep(0.02)


def test_lanes_must_divide_evenly():
    ranks = Ranks()
    assert (ranks.size, ranks.share(3)) == (1, slice(0, 3))
    ranks.size = 2
    with pytest.raises(UserError, match="batch_size = 3: expected a multiple of the 2 processes"):
        ranks.share(3)


def test_a_single_rank_sends_nothing():
    ranks = Ranks()
    array = mx.ones((2, 3))
    assert ranks.sum({"a": array})["a"] is array
    assert ranks.gather(array) is array
    assert ranks.total([1.5, 2]) == [1.5, 2]
    assert ranks.any(True)
    assert not ranks.any(False)
