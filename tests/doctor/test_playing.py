"""Checks of playing find nothing here, and each the fault that it is there for."""

import gc
import json
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from support.findings import wrong

from dsmr_mlx.doctor import cold, playing, training
from dsmr_mlx.doctor.finding import Status
from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.session import Session


def test_rewinding(monkeypatch):
    assert not wrong(playing.check_rewind())
    monkeypatch.setattr(Player, "rewind", lambda self, k: None)
    assert wrong(playing.check_rewind())
    monkeypatch.undo()


@pytest.fixture
def young_heap():
    """Let collections of garbage, of which a check does many, skip the objects of earlier tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("young_heap")
@pytest.mark.parametrize("leaks", [False, True])
def test_memory(monkeypatch, leaks):
    feed, kept = Player._feed, []

    def leaking(self, *arguments):
        feed(self, *arguments)
        kept.append(mx.zeros(1 << 14) + len(kept))
        mx.eval(kept[-1])

    if leaks:
        monkeypatch.setattr(Player, "_feed", leaking)
    found = playing.check_memory(50)
    assert wrong(found) is leaks
    assert "% from the second to the last tenth" in found.text
    if not leaks:  # the state is counted once, the weights are not
        assert all(v["state"] <= v["peak"] < 2 * v["state"] for v in found.values.values())


def test_speeds_are_positive():
    for finding in (playing.measure_playing(False), playing.measure_reading(), training.measure_training(False)):
        assert finding.status in (Status.OK, Status.NOTE)
        assert "tokens a second" in finding.text


@pytest.mark.parametrize(("seconds", "status"), [(0.0, Status.NOTE), (1e9, Status.OK)])
def test_answer_in_live(monkeypatch, seconds, status):
    """A session with five phrases; of a model that is too slow only a smaller one helps."""
    monkeypatch.setattr(playing, "ANSWER_SECONDS", seconds)
    monkeypatch.setattr(playing, "TURN_SECONDS", 1.0)
    found = playing.check_answer()
    assert found.status == status
    assert found.values["answers"] == 5
    assert found.values["notes"] >= 5
    assert ("smaller model" in found.advice) == (status == Status.NOTE)


def test_a_model_that_does_not_answer_is_wrong(monkeypatch):
    monkeypatch.setattr(Session, "run", lambda self, sources: "over")
    assert wrong(playing.check_answer())


def test_first_token(monkeypatch):
    """The process measures both players; the parent compares, on a GPU with longer command buffers, too."""
    monkeypatch.setattr(cold, "load", playing.load)
    monkeypatch.setattr(cold, "TIMED", 2)
    assert set(cold.measure(compiled=False)) == {"cold", "warm", "tokens_per_second"}
    speeds = {"1000": 110.0, None: 100.0}

    def measured(compiled, MLX_MAX_OPS_PER_BUFFER=None):
        return {"cold": 2.0, "warm": 1.0, "tokens_per_second": speeds[MLX_MAX_OPS_PER_BUFFER]}

    monkeypatch.setattr(cold, "in_a_new_process", measured)
    assert set(cold.measure_first_token().values) == {"eager", "compiled"}
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    found = cold.measure_first_token()
    assert found.status == Status.NOTE
    assert "MLX_MAX_OPS_PER_BUFFER=1000" in found.advice
    speeds["1000"] = 104.0
    assert cold.measure_first_token().status == Status.OK


def test_a_new_process_gets_its_environment_and_tells_why_it_failed(monkeypatch):
    def run(command, env, **options):
        if env["CODE"] != "0":
            raise subprocess.CalledProcessError(1, command, "a\nno memory\n")
        Path(command[3]).write_text(json.dumps(command[4:]))

    monkeypatch.setattr(cold.subprocess, "check_output", run)
    assert cold.in_a_new_process(compiled=True, CODE="0") == ["compiled"]
    with pytest.raises(RuntimeError, match=r"doctor\.cold: no memory"):
        cold.in_a_new_process(compiled=False, CODE="1")


@pytest.mark.parametrize(("best", "status"), [(104.0, Status.OK), (106.0, Status.NOTE)])
def test_defaults_are_within_five_per_cent_of_the_best(monkeypatch, best, status):
    def speed(player, n):
        return best if player.compiled and player.ahead else 100.0

    monkeypatch.setattr(playing, "played", lambda player, n: [])
    monkeypatch.setattr(playing, "tokens_per_second", speed)
    found = playing.compare_options()
    assert found.status == status
    assert ("compiled, ahead" in found.advice) == (status == Status.NOTE)
