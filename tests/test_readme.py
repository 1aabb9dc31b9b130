"""Every command in the README runs, in order, as it stands there; only made smaller."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.midi_files import tune, write_folder

from dsmr_mlx.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALLER = {
    "train": "--max-tokens 500 --set d_model=16 --set n_heads=1 --set n_layers=6 --set d_ff=16 --set head_dim=16 "
    "--set segment_length=16 --set horizons=two-scale:long=2x32,short=4 --set eval_every=5 --set sample_seconds=1",
    "generate": "--seconds 1",
    "live": "--max-turn 1",
    "examples/train_pytorch.py": "--device cpu --set max_minutes=none --set max_steps=4 --set eval_every=4 "
    "--set d_model=64 --set n_heads=1 --set n_layers=2 --set d_ff=64 --set head_dim=64 --set segment_length=16 "
    "--set horizons=uniform:16 --set batch_size=2 --set compile=false",
}


def commands() -> list[list[str]]:
    """The arguments of each dsmr-mlx command in the console blocks; `python -m dsmr_mlx.train` is one of them."""
    lines = []
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        block = block.replace("\\\n", " ")
        lines += [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    found = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part)
            if words[:3] == ["python", "-m", "dsmr_mlx.train"]:
                found.append(["train", *words[3:]])
            elif words[0] == "dsmr-mlx" or (words[0] == "python" and words[1].startswith("examples/")):
                found.append(words[1:])
    return found


def run_program(words: list[str]) -> int:
    """Run one of the examples as a user would."""
    return subprocess.run([sys.executable, ROOT / words[0], *words[1:]], capture_output=True, check=False).returncode


def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "midi", {f"{name}.mid": tune(i, 200) for i, name in enumerate("abcdefghij")})
    monkeypatch.chdir(tmp_path)
    ran = set()
    for words in commands():
        if words == ["--help"]:
            continue
        ran.add(words[0])
        arguments = [
            str(tmp_path / "midi" / "a.mid") if w.endswith(".mid") and w.startswith("midi/") else w for w in words
        ]
        arguments += shlex.split(SMALLER.get(words[0], ""))
        if words[0].endswith(".py"):
            pytest.importorskip("torch")
        assert (run_program if words[0].endswith(".py") else main)(arguments) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert ran >= {"prepare", "horizons", "train", "report", "evaluate", "generate", "convert"}


def test_every_command_of_the_program_is_in_the_readme():
    assert set(COMMANDS) <= {words[0] for words in commands()}


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    write_folder(tmp_path / "midi", {f"{i}.mid": tune(i, 60) for i in range(4)})
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "midi", "--out", "corpus"]) == 0
    assert main(["train", "--data", "corpus", "--out", "run", *shlex.split(SMALLER["train"])]) == 0
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(re.sub(r"seconds=\d+", "seconds=1", example), "README.md", "exec"), {})


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
