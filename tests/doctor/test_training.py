"""Checks of training find nothing here, and each the fault that it is there for."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from support.findings import wrong

from dsmr_mlx.doctor import training
from dsmr_mlx.doctor.finding import Status
from dsmr_mlx.training.trainer import Trainer


@pytest.mark.parametrize("broken", [False, True])
def test_training(monkeypatch, broken):
    if broken:
        monkeypatch.setattr(training, "losses", lambda trainer, steps: [float("nan")] * steps)
    assert wrong(training.check_training(full=False)) is broken


def test_training_that_takes_other_memory_than_planned_is_wrong(monkeypatch):
    """Each size is measured without the trainers before it, which live until garbage is collected."""
    planned = []

    def estimate(trainer):
        before = mx.get_active_memory()
        mx.eval(trainer.parameters, trainer.optimizer_state, trainer.state.arrays)
        planned.append(mx.get_active_memory() - before)
        return SimpleNamespace(total=planned[-1] * factor)

    def held(trainer, steps):
        return [2.0, 1.0]

    monkeypatch.setattr(training, "estimate_memory", estimate)
    monkeypatch.setattr(training, "losses", held)
    factor = 1
    found = training.check_training(full=True)
    assert list(found.values) == ["tiny in float32", "small in float32", "small in bfloat16"]
    assert not wrong(found)
    factor = 2
    assert "small in bfloat16 takes" in training.check_training(full=True).text


def test_a_size_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(training, "machine_memory", lambda: sizes.pop(0))
    sizes = [1 << 40, 1, 1]
    found = training.check_training(full=True)
    assert not wrong(found)
    assert found.text.count("too much for this machine") == 2


def forgetful(state_dict):
    """A `Trainer.state_dict` without the optimizer's state."""

    def forget(self):
        arrays, memory, values = state_dict(self)
        zero = {name: mx.zeros_like(array) for name, array in arrays.items() if name.startswith("optimizer.")}
        return arrays | zero, memory, values

    return forget


def test_resuming(monkeypatch):
    assert not wrong(training.check_resuming())
    monkeypatch.setattr(Trainer, "state_dict", forgetful(Trainer.state_dict))
    assert "a resumed run has other weights" in training.check_resuming().text
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert wrong(training.check_resuming())


@pytest.mark.parametrize("forgets", [False, True])
def test_resuming_on_a_gpu_that_adds_in_another_order_each_time(monkeypatch, forgets):
    """Two identical runs differ a little; a restart must not add to that."""
    update, rng = Trainer._update_weights, np.random.default_rng(0)

    def noisy(self, parameters, *rest):
        shaken = tree_map(lambda p: p * (1 + 1e-6 * float(rng.normal())), parameters)
        return update(self, shaken, *rest)

    monkeypatch.setattr(Trainer, "_update_weights", noisy)
    assert wrong(training.check_resuming())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    if forgets:
        monkeypatch.setattr(Trainer, "state_dict", forgetful(Trainer.state_dict))
    assert training.check_resuming().status == (Status.WRONG if forgets else Status.NOTE)


def test_weights_that_are_not_numbers_are_never_the_same():
    run = SimpleNamespace(parameters={"a": mx.array([1.0, float("nan"), 2.0])})
    assert math.isnan(training.distance(run, run))
