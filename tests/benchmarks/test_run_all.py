"""All benchmarks of docs/results.md and docs/speed.md can be run from one program, and what they print is kept."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_all(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run_all

    return run_all


def test_the_documented_commands_are_those_that_are_run(run_all):
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "speed.md"))
    documented = re.findall(r"^python (benchmarks/.*)$", pages, re.MULTILINE)
    known = {run_all.command_of(name).removeprefix("python ") for name in run_all.RUNS}
    separate = {line for line in documented if line.split()[0] == "benchmarks/take_over.py" or "--minutes" in line}
    assert set(documented) - separate - {"benchmarks/run_all.py --data maestro --midi midi"} == known


def test_scripts_exist(run_all):
    for words in run_all.RUNS.values():
        assert (ROOT / "benchmarks" / words.split()[0]).is_file()


def test_results_are_kept_and_not_made_again(run_all, monkeypatch, tmp_path, capsys):
    calls = []

    def fake(words, **options):
        calls.append(words[1:])
        return SimpleNamespace(returncode="scaling.py" in words[1], stdout="a table\n")

    monkeypatch.setattr(run_all, "machine", dict)
    monkeypatch.setattr(subprocess, "run", fake)
    argv = ["run_all.py", "--out", str(tmp_path / "out"), "--data", "my corpus", "recipe", "scaling"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="failed: scaling"):
        run_all.main()
    kept = (tmp_path / "out" / "recipe.txt").read_text()
    assert kept.startswith("$ python benchmarks/recipe.py --data 'my corpus'")
    assert kept.endswith("\n\na table\n")
    assert calls[0][:3] == ["benchmarks/recipe.py", "--data", "my corpus"]
    with pytest.raises(SystemExit, match="failed: scaling"):
        run_all.main()
    assert [words[0] for words in calls] == [f"benchmarks/{name}.py" for name in ("recipe", "scaling", "scaling")]


def test_finished_parts_are_continued_and_removed_only_with_again(run_all, monkeypatch, tmp_path):
    """A file or a folder, whether or not the benchmark has finished."""
    out, kept = tmp_path / "out", []
    parts = out / "recipe.jsonl", out / "paper-table" / "table.md"
    parts[1].parent.mkdir(parents=True)

    def fake(words, **options):
        kept.append([part.exists() for part in parts])
        return SimpleNamespace(returncode=1, stdout="")

    monkeypatch.setattr(subprocess, "run", fake)
    for again in ([], [], ["--again"]):
        for part in parts if not again else ():
            part.write_text("of last year")
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(out), *again, "recipe", "paper-table"])
        with pytest.raises(SystemExit, match="failed: recipe, paper-table"):
            run_all.main()
    assert kept == [[True, True]] * 4 + [[False, True], [False, False]]
    assert out.exists()
