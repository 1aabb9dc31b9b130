"""Data-parallel training over loopback, with MLX's ring backend."""

import json
import shutil
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.ranks import finish, launch, losses, train_alone
from support.tiny import write_corpus

from dsmr_mlx import UserError, load
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training import distributed
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.run_record import read_metrics

SAME_RATE = ("learning_rate=1e-3", "min_learning_rate=1e-3")  # a longer run has the same steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", train=7).path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    """Runs of one process, in folders named by their steps."""
    folder = tmp_path_factory.mktemp("alone")
    for steps in (8, 14):
        train_alone(corpus, folder / f"{steps}", f"max_steps={steps}", *SAME_RATE)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, corpus):
    """A run of 8 steps of two processes."""
    run = tmp_path_factory.mktemp("together") / "run"
    shown = finish(launch(corpus, run, "max_steps=8", *SAME_RATE))
    assert shown[1] == ""  # only rank 0 logs
    return run


def assert_same_run(run: Path, alone: Path) -> None:
    """Check that losses, validation, memory and position in the data agree to float tolerance."""
    np.testing.assert_allclose(losses(run), losses(alone), rtol=2e-5)
    np.testing.assert_allclose(losses(run, "validation")[-1], losses(alone, "validation")[-1], rtol=2e-5)
    a, b = (json.loads((r / "last" / "training.json").read_text()) for r in (run, alone))
    assert a["lanes"] == b["lanes"]
    assert a["progress"]["tokens"] == b["progress"]["tokens"]
    a, b = (load_arrays(r / "last" / "memory.safetensors") for r in (run, alone))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    for name in a:
        if name.startswith("layers"):
            np.testing.assert_allclose(np.array(a[name]), np.array(b[name]), atol=2e-3, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one(alone, together):
    """The same global batch in two halves."""
    assert_same_run(together, alone / "8")
    assert [line["step"] for line in read_metrics(together)] == [line["step"] for line in read_metrics(alone / "8")]


@pytest.mark.slow
def test_accumulated_steps_of_two_processes_equal_those_of_one(tmp_path, corpus):
    settings = ("max_steps=4", "accumulate=3", "dropout=0.2", "fill=0.7")
    train_alone(corpus, tmp_path / "one", *settings)
    finish(launch(corpus, tmp_path / "two", *settings))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_one(tmp_path, corpus, alone, together):
    run = shutil.copytree(together, tmp_path / "run", symlinks=True)
    train_alone(corpus, run, "max_steps=14", *SAME_RATE, resume=True)
    assert_same_run(run, alone / "14")


@pytest.mark.slow
def test_a_run_of_one_process_resumes_in_two(tmp_path, corpus, alone):
    run = shutil.copytree(alone / "8", tmp_path / "run", symlinks=True)
    finish(launch(corpus, run, "max_steps=14", *SAME_RATE, resume=True))
    assert_same_run(run, alone / "14")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus):
    """A run of two processes whose second got a signal within a step."""
    for _ in range(5):  # one stop in 16 meets the end of a step
        run = tmp_path_factory.mktemp("stopped") / "run"
        ranks = launch(corpus, run, "max_steps=100000", "accumulate=16")
        wait_for_steps(run, 1)
        ranks[1].process.terminate()
        finish(ranks)
        if progress(run)["segments"]:
            return run
    raise AssertionError("no run was stopped within a step")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(stopped):
    load(stopped / "last")
    assert progress(stopped)["step"] == read_metrics(stopped)[-1]["step"]


@pytest.mark.slow
def test_two_ranks_resume_within_a_step_of_a_finished_run(tmp_path, corpus, stopped):
    """On resume, rank 0 takes the pending gradients and the other rank has none."""
    run = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    finish(launch(corpus, run, "max_steps=1", "accumulate=16", resume=True))
    assert progress(run)["segments"] == progress(stopped)["segments"]


ONE_LANE_EACH = (
    *SAME_RATE,
    *("batch_size=2", "dropout=0.2", "eval_every=20"),
    *("canon=true", "qk_norm=true", "value_residual=true", "embedding_skip=true"),
)


@pytest.mark.slow
def test_two_processes_resume_exactly_with_one_lane_each(tmp_path, corpus):
    """Pieces start in all lanes of a rank at once, but at different times on each rank: the clock must stay shared.

    The second rank may be a machine without the files of the run.
    """
    straight, run, nothing = (tmp_path / name for name in ("straight", "run", "nothing"))
    finish(launch(corpus, straight, "max_steps=20", *ONE_LANE_EACH))
    finish(launch(corpus, run, "max_steps=15", *ONE_LANE_EACH))
    shared = shutil.copytree(run, tmp_path / "shared", symlinks=True)
    for first, second in ((shared, shared), (run, nothing)):
        finish(launch(corpus, first, "max_steps=20", *ONE_LANE_EACH, resume=True, outs=[first, second]))
        assert losses(first) == losses(straight)
    assert not nothing.exists()


@pytest.mark.slow
def test_processes_with_different_corpora_are_an_error_on_all_ranks(tmp_path, corpus):
    other = write_corpus(tmp_path / "other", seed=3).path
    ranks = launch(corpus, tmp_path / "run", "max_steps=5", corpora=[corpus, other])
    codes, shown = zip(*(rank.wait() for rank in ranks), strict=True)
    assert codes == (2, 2)
    assert "corpus: process 1 has" in shown[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_an_error_on_rank_0_ends_all_ranks(corpus, together):
    codes, shown = zip(*(rank.wait() for rank in launch(corpus, together, "max_steps=5")), strict=True)
    assert codes == (2, 2)
    assert "already exists; --resume" in shown[0]
    assert "another process of this run failed; see its message" in shown[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_run_with_a_checkpoint_to_resume(tmp_path, corpus, victim):
    run, settings = tmp_path / "run", ("checkpoint_every=2", "rank_timeout=4")
    ranks = launch(corpus, run, "max_steps=100000", *settings)
    wait_for_steps(run, 3)
    ranks[victim].process.kill()
    code, shown = ranks[1 - victim].wait()
    assert code == 1
    assert "lost a process" in shown
    assert "Traceback" not in shown
    assert CheckpointStore(run, 1).latest() is not None
    ranks[victim].process.join()
    train_alone(corpus, run, "max_steps=20", *settings, resume=True)
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"][-1] >= 3


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


@pytest.mark.parametrize("data", [b"", b"0123", b"0123456789"])
def test_bytes_are_sent_in_parts(monkeypatch, data):
    """A dimension of an array of MLX has at most 31 bits, and a file may be larger."""
    sizes, received = [], Ranks._received

    def watched(self, array, patient=False):
        sizes.append(array.size)
        return received(self, array, patient)

    ranks = Ranks()
    ranks.size = 2  # sums are then taken over the one rank that there is
    monkeypatch.setattr(distributed, "PART", 4)
    monkeypatch.setattr(Ranks, "total", lambda self, values: values)
    monkeypatch.setattr(Ranks, "_received", watched)
    assert ranks.from_main(data) == data
    assert sizes == {0: [], 4: [4], 10: [4, 4, 2]}[len(data)]
