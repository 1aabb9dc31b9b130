"""The doctor finds nothing here, and each of its checks finds the fault that it is there for."""

import json
import platform
import shutil

import mlx.core as mx
import numpy as np
import pytest

from dsmr_mlx import doctor
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.doctor import machine, numbers, parts, playing, training
from dsmr_mlx.doctor.finding import Finding, Status
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import dsmr
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.trainer import Trainer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Checks at the smallest sizes at which they can fail."""
    made = numbers.new_model
    short = {"segment_length": 16, "horizons": "uniform:32", "d_model": 64, "n_layers": 2}
    monkeypatch.setattr(numbers, "new_model", lambda *_: made("tiny"))
    monkeypatch.setattr(playing, "new_model", lambda *_: made("tiny", **short))
    monkeypatch.setattr(playing, "load", lambda _: (made("tiny", **short), PerformanceTokenizer()))
    monkeypatch.setattr(playing, "BEFORE", 40)
    monkeypatch.setattr(playing, "REWOUND", 12)
    monkeypatch.setattr(playing, "READ_LENGTH", 64)
    monkeypatch.setattr(playing, "TIMED", 10)
    monkeypatch.setattr(numbers, "LENGTH", 140)
    monkeypatch.setattr(numbers, "CHUNKS", (33, 128))
    original = training.config_of
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "head_dim": 16, "d_ff": 64, "segment_length": 32}
    settings = shape | {"horizons": "uniform:32", "learning_rate": 0.01}
    monkeypatch.setattr(training, "config_of", lambda preset, **own: original("tiny", **settings | own))


def wrong(finding: Finding) -> bool:
    """Whether a finding says that something is wrong, and what to do."""
    assert (finding.status == Status.WRONG) == bool(finding.advice)
    return finding.status == Status.WRONG


def test_logits(monkeypatch):
    assert not wrong(numbers.check_logits(full=False))
    rotate = dsmr.rotate
    monkeypatch.setattr(dsmr, "rotate", lambda x, config, offset: rotate(x, config, offset * (x.shape[2] > 40)))
    assert wrong(numbers.check_logits(full=False))


def test_half_precision(monkeypatch):
    assert not wrong(numbers.check_half_precision())
    logits = DSMR.logits
    coarse = lambda self, x: mx.round(logits(self, x)) if x.dtype == mx.bfloat16 else logits(self, x)  # noqa: E731
    monkeypatch.setattr(DSMR, "logits", coarse)
    assert wrong(numbers.check_half_precision())


def test_quantized_weights(monkeypatch):
    assert not wrong(numbers.check_quantized())
    product = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **b: product(*a, **b) * 1.01)
    assert wrong(numbers.check_quantized())


def test_gradients(monkeypatch):
    assert not wrong(numbers.check_gradients())
    monkeypatch.setattr(numbers, "segment_attention", lambda q, *rest: numbers.plain_attention(1.001 * q, *rest))
    assert wrong(numbers.check_gradients())


@pytest.mark.parametrize("reached", [True, False])
def test_fused_attention(monkeypatch, reached):
    def attention(q, *_, **options):
        if options["force_fused"] and not reached:
            raise ValueError("no kernel")
        return q

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    assert wrong(numbers.check_fused_attention()) is not reached


def test_rewinding(monkeypatch):
    assert not wrong(playing.check_rewind())
    monkeypatch.setattr(Player, "rewind", lambda self, k: None)
    assert wrong(playing.check_rewind())
    monkeypatch.undo()


@pytest.mark.parametrize("leaks", [False, True])
def test_memory(monkeypatch, leaks):
    feed, kept = Player._feed, []

    def leaking(self, *arguments):
        feed(self, *arguments)
        kept.append(mx.zeros(1 << 18) + len(kept))
        mx.eval(kept[-1])

    if leaks:
        monkeypatch.setattr(Player, "_feed", leaking)
    assert wrong(playing.check_memory(100)) is leaks


@pytest.mark.parametrize("broken", [False, True])
def test_training(monkeypatch, broken):
    if broken:
        monkeypatch.setattr(training, "losses", lambda trainer, steps: [float("nan")] * steps)
    assert wrong(training.check_training(full=False)) is broken


def test_resuming(monkeypatch):
    assert not wrong(training.check_resuming())
    state_dict = Trainer.state_dict

    def forgetful(self):
        arrays, values = state_dict(self)
        zero = {name: mx.zeros_like(array) for name, array in arrays.items() if name.startswith("optimizer.")}
        return arrays | zero, values

    monkeypatch.setattr(Trainer, "state_dict", forgetful)
    assert wrong(training.check_resuming())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))  # where it is known not to hold
    assert training.check_resuming().status == Status.NOTE


def test_machine(monkeypatch):
    assert not wrong(machine.check_machine())
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "power_source", lambda: "mains")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert wrong(machine.check_machine())


def test_versions(monkeypatch):
    assert not wrong(machine.check_versions())
    monkeypatch.setattr(machine, "version", lambda name: "0.32.1")
    assert "before 0.32.2" in machine.check_versions().advice


def test_blas(monkeypatch):
    monkeypatch.setattr(machine, "blas_is_slow", lambda: True)
    assert "OpenBLAS" in machine.check_blas().advice


def test_optional_parts_are_absent_not_wrong(monkeypatch):
    def none(*_):
        raise UserError("MIDI ports: there is no system")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(parts, "find_soundfont", none)
    monkeypatch.setattr("dsmr_mlx.live.ports.port_names", none)
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    found = [check() for check in parts.CHECKS.values()]
    assert {finding.status for finding in found} == {Status.ABSENT}
    assert found[0].text == "there is no system"


@pytest.mark.parametrize(("code", "status"), [(0, Status.OK), (1, Status.WRONG)])
def test_a_program_that_does_not_run_is_wrong(monkeypatch, tmp_path, code, status):
    program = tmp_path / "fluidsynth"
    program.write_text(f"#!/bin/sh\necho FluidSynth runtime version 2.3.1\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    found = parts.check_fluidsynth()
    assert found.status == status
    assert wrong(found) or found.text == "FluidSynth runtime version 2.3.1"


def test_speeds_are_positive():
    for finding in (playing.measure_playing(False), playing.measure_reading(), training.measure_training(False)):
        assert finding.status in (Status.OK, Status.NOTE)
        assert "tokens a second" in finding.text
    answer = playing.check_answer()
    assert answer.values["seconds"] > 0


def test_a_check_that_breaks_is_wrong_and_the_others_run():
    def broken() -> Finding:
        raise ZeroDivisionError("in a test")

    findings = list(doctor.examine(names=[("first", broken), ("second", lambda: Finding("", Status.OK, "fine"))]))
    assert [(each.name, each.status) for each in findings] == [("first", Status.WRONG), ("second", Status.OK)]
    assert findings[0].text == "ZeroDivisionError: in a test"


def few(status: Status):
    """Instead of all checks, one."""
    return lambda full: [("alone", lambda: Finding("", status, "found", {"full": full}, "mend it"))]


@pytest.mark.parametrize(("status", "code"), [(Status.OK, 0), (Status.NOTE, 0), (Status.ABSENT, 0), (Status.WRONG, 2)])
def test_the_command(run, monkeypatch, status, code):
    monkeypatch.setattr(doctor, "checks", few(status))
    shown = run("doctor")
    assert shown.code == code
    assert shown.out == f"{status.value:<7}alone: found\n       → mend it\n"
    assert ("something is wrong: alone" in shown.err) == (code == 2)
    pasted = json.loads(run("doctor", "--json", "--full").out)
    expected = {"name": "alone", "status": status.value, "text": "found", "values": {"full": True}, "advice": "mend it"}
    assert pasted == {"alone": expected}


def test_every_check_is_listed_once():
    names = [name for name, _ in doctor.checks(full=True)]
    assert len(set(names)) == len(names)
    assert {name for name, _ in doctor.checks(full=False)} < set(names)


def test_log_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 7))
    assert np.allclose(np.exp(numbers.log_softmax(logits)).sum(axis=-1), 1)
