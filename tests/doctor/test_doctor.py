"""The doctor's command, and its checks of the machine and its software, each with the fault that it is there for."""

import importlib
import json
import platform
import re
import shutil
import sys
import tomllib
from pathlib import Path

import mido
import mlx.core as mx
import pytest
from support.findings import wrong

from dsmr_mlx import doctor
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.doctor import machine, parts
from dsmr_mlx.doctor.finding import MIDI_PACKAGES, Finding, Status
from dsmr_mlx.music import audio
from dsmr_mlx.training.memory import machine_memory


def test_machine(monkeypatch):
    assert not wrong(machine.check_machine())
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "power_source", lambda: "mains")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert wrong(machine.check_machine())


VERSIONS = {"mlx": "0.32.4", "numpy": "2.4.6", "rich": "15.0.0", "mido": "1.3.3", "miditok": "3.1.0"}


VERSIONS |= {"sentencepiece": "0.2.3", "symusic": "0.6.0"}


def check_versions(monkeypatch, **changes: str | None) -> Finding:
    """Check versions that are right except for some; None: not installed."""
    monkeypatch.setattr(machine, "installed", (VERSIONS | changes).get)
    return machine.check_versions()


@pytest.mark.parametrize("number", ["0.32.1", "0.32.2rc1", "0.32.2.dev1", "0.33.0", "0.33.0rc1", "1.0", "x"])
def test_other_versions_of_mlx_are_wrong(monkeypatch, number):
    found = check_versions(monkeypatch, mlx=number)
    assert wrong(found)
    build = "[cpu]" if sys.platform == "linux" else ""
    assert found.advice.endswith(f"pip install 'mlx{build}<0.33,>=0.32.2'")


def test_mlx_for_cuda_stays_mlx_for_cuda(monkeypatch):
    """The CPU build beside it would replace its library."""
    monkeypatch.setattr(machine, "requirements", lambda: {"mlx": "[cpu]<0.33,>=0.32.2"})
    found = check_versions(monkeypatch, mlx="0.31.0", **{"mlx-cuda-13": "0.31.0"})
    assert found.advice.endswith("pip install 'mlx[cuda13]<0.33,>=0.32.2'")


@pytest.mark.parametrize("number", ["0.32.2", "0.32.10", "0.32.4.dev20260901+abc", "0.32.2.post1"])
def test_versions_within_the_bounds(monkeypatch, number):
    assert not wrong(check_versions(monkeypatch, mlx=number))
    assert not wrong(machine.check_versions())


def test_every_required_package_is_listed(monkeypatch):
    dependencies = Path("pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    required = set(re.findall(r'^    "([a-z]+)', dependencies, re.MULTILINE))
    assert required == set(machine.requirements()) == set(VERSIONS)
    found = check_versions(monkeypatch, rich=None)
    assert wrong(found)
    assert "'rich>=13'" in found.advice


def test_packages_for_midi_may_be_absent(monkeypatch):
    """On a GPU server that only trains, as the README installs the program there."""
    missing = dict.fromkeys(MIDI_PACKAGES)
    found = check_versions(monkeypatch, **missing)
    assert found.status == Status.ABSENT
    assert all(name in found.advice for name in missing)
    for name in ("mido", "somewhat"):
        monkeypatch.setitem(sys.modules, name, None)

    def importing(name):
        return lambda: importlib.import_module(name)

    findings = list(doctor.examine(names=[("a", importing("mido")), ("b", importing("somewhat"))]))
    assert [finding.status for finding in findings] == [Status.ABSENT, Status.WRONG]
    assert findings[0].text == "needs mido"


@pytest.mark.parametrize(
    ("info", "memory"),
    [
        ({"max_recommended_working_set_size": 11 << 30, "memory_size": 16 << 30}, 11 << 30),
        ({"total_memory": 80 << 30}, 80 << 30),
    ],
)
def test_the_memory_of_a_gpu(monkeypatch, info, memory):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    found = machine.check_machine()
    assert found.values["working_set"] == memory
    assert found.values["environment"]["MLX_ENABLE_TF32"] == "0"
    assert machine_memory() == memory


def test_blas(monkeypatch):
    monkeypatch.setattr(machine, "blas_is_slow", lambda: True)
    assert "OpenBLAS" in machine.check_blas().advice


def test_optional_parts_are_absent_not_wrong(monkeypatch):
    def none(*_):
        raise UserError("MIDI ports: there is no system")

    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(audio, "FOLDERS", ())
    monkeypatch.delenv("SOUNDFONT", raising=False)
    monkeypatch.setattr("dsmr_mlx.live.ports.port_names", none)
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    found = [check() for check in parts.CHECKS.values()]
    assert {finding.status for finding in found} == {Status.ABSENT}
    assert found[0].text == "there is no system"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo FluidSynth runtime version 2.3.1", Status.OK),
        ("echo FluidSynth; exit 1", Status.WRONG),
        ("exit 0", Status.WRONG),
        ("exec sleep 60", Status.WRONG),
    ],
)
def test_a_fluidsynth_that_does_not_run_is_wrong(monkeypatch, tmp_path, script, status):
    program = tmp_path / "fluidsynth"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    monkeypatch.setattr(parts, "MAX_SECONDS", 0.5 if "sleep" in script else 20)
    found = parts.check_fluidsynth()
    assert found.status == status
    assert wrong(found) or found.text == "FluidSynth runtime version 2.3.1"


def test_soundfonts_that_are_none(monkeypatch, tmp_path):
    """A web page under the name of a SoundFont, and a path that does not exist; a file of the Finder does not count."""
    monkeypatch.delenv("SOUNDFONT", raising=False)
    monkeypatch.setattr(audio, "FOLDERS", (str(tmp_path),))
    (tmp_path / "._Grand.sf2").write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert parts.check_soundfont().status == Status.ABSENT
    (tmp_path / "Grand.sf2").write_text("<html>404 Not Found</html>")
    found = parts.check_soundfont()
    assert wrong(found)
    assert f"{tmp_path}/Grand.sf2: not a SoundFont" in found.text
    (tmp_path / "b.sf2").write_bytes(b"RIFF\x04\0\0\0sfbk")
    assert parts.check_soundfont().text == f"{tmp_path}/b.sf2"
    monkeypatch.setenv("SOUNDFONT", str(tmp_path / "none.sf2"))
    found = parts.check_soundfont()
    assert wrong(found)
    assert f"{tmp_path}/none.sf2: cannot be read" in found.text


def test_every_optional_package_is_in_its_extra():
    """Of pyproject.toml, by the name under which it is installed."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in parts.EXTRAS.items():
        name = parts.PACKAGES.get(module, module)
        assert any(re.match(rf"{name}\b", requirement) for requirement in extras[extra]), module


def test_a_package_that_is_installed_but_broken_is_wrong(monkeypatch, tmp_path):
    """As python-rtmidi for another processor: the reason is shown, and how to install it again."""
    (tmp_path / "rtmidi").mkdir()
    code = "raise ImportError(\"dlopen: incompatible architecture (have 'x86_64')\", name='rtmidi._rtmidi')"
    (tmp_path / "rtmidi" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rtmidi", raising=False)
    monkeypatch.setattr(mido, "get_input_names", lambda: importlib.import_module("rtmidi"))
    monkeypatch.setattr(parts, "EXTRAS", {"rtmidi": "live"})
    monkeypatch.setattr(parts, "version", lambda name: "1.5.8")
    for found in (parts.check_midi_ports(), parts.check_extras()):
        assert wrong(found)
        assert "incompatible architecture" in found.text
        assert "--force-reinstall" in found.advice


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


def test_the_documentation_has_a_row_for_each_line():
    """Each row names lines that exist, and says which need --full."""
    table = Path("docs/mac.md").read_text().partition("| only a Mac can tell |")[2].partition("## Good to know")[0]
    lines = [row.split("|")[2].strip() for row in table.splitlines() if row.startswith("|")][1:]
    usual, full = ({name for name, _ in doctor.checks(full)} for full in (False, True))
    named = set()
    for line in lines:
        names = [name.strip() for name in re.sub(r"\(.*\)", "", line).replace(", of ", ", speed of ").split(",")]
        assert full.issuperset(names)
        assert "`--full`" in line or usual.issuperset(names)
        named |= set(names)
    assert full - named == {"BLAS", "browser", "extras"}
