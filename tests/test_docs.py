"""Every command, Python example and link in README.md and docs/ works; runs are only made smaller."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from support.checkpoints import save
from support.midi_files import tune, write_midi_files
from support.processes import kept_signal_handlers
from support.studio import running_studio

from dsmr_mlx import doctor
from dsmr_mlx.cli import COMMANDS, main, make_parser
from dsmr_mlx.doctor import machine, parts
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint_folder import GENERATION
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TINY = "--set d_model=64 --set n_heads=1 --set n_layers=2 --set d_ff=64 --set head_dim=64"
SMALLER = {
    "train": "--max-tokens 500 --set eval_every=5 --set sample_seconds=1 --set horizons=two-scale:long=1x32,short=4 "
    "--set segment_length=16",
    "generate": "--seconds 1",
    "evaluate": "--max-tokens 100",
    "compare": "--max-tokens 100",
    "live": "--max-turn 1",
    "examples/train_pytorch.py": "--device cpu --set max_minutes=none --set max_steps=4 --set eval_every=4 "
    f"--set compile=false --set horizons=uniform:16 --set batch_size=2 --set segment_length=16 {TINY}",
}
FEW_CHECKS = [("machine", machine.check_machine), *parts.CHECKS.items()]  # tests/doctor has the others
SMALLER_OPTIONS = {"--reset-at": "16"}  # if a command has the option


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def command_lines(block: str) -> list[list[str]]:
    """The `dsmr-mlx` commands and example programs in a block, as argument lists; `python -m dsmr_mlx.train` too."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.removeprefix("$ ").split("&&"):
            words = shlex.split(part, comments=True)
            if "dsmr_mlx.train" in words:
                found.append(["train", *words[words.index("dsmr_mlx.train") + 1 :]])
            elif words[:1] == ["dsmr-mlx"] or (words[:1] == ["python"] and words[1].startswith("examples/")):
                found.append(words[1:])
    return found


def commands(page: str) -> list[list[str]]:
    """The commands that a page shows with their output, in order."""
    shown = (
        "\n".join(line for line in block.splitlines() if line.startswith("$ ")) for block in blocks(page, "console")
    )
    return [words for block in shown for words in command_lines(block)]


def run_command(words: list[str], monkeypatch) -> int:
    """Run a command or an example in this process, made smaller. Returns the exit code."""
    given = [word for option in SMALLER_OPTIONS.items() if option[0] in words for word in option]
    smaller = "" if "--replace" in words else SMALLER.get(words[0], "")
    sizes = ""
    if words[0] == "train":  # MLX emulates 16 bits on a CPU
        sizes = "--set dtype=float32 --set accumulate=1 --set eval_every=30" if "--init" in words else TINY
    arguments = [*words, *shlex.split(f"{smaller} {sizes}"), *given]
    if words[0] == "doctor":
        monkeypatch.setattr(doctor, "checks", lambda full: FEW_CHECKS)
    if words[0] == "studio":
        with running_studio("--port", "0", "--folder", "sessions", *words[1:]) as studio:
            assert studio.get("/").status == 200
        return studio.process.returncode
    if not words[0].endswith(".py"):
        return main(arguments)
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(ROOT / "examples")
    with kept_signal_handlers():
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return 0


@pytest.fixture
def workspace(page, tmp_path, monkeypatch) -> Path:
    """The working folder of a page. All pages except the README use a tiny model as the
    bundled one.
    """
    monkeypatch.chdir(tmp_path)
    if page != "README.md":
        shipped, small = bundled.FOLDER / bundled.DEFAULT, tmp_path / "weights" / bundled.DEFAULT
        save(small, PerformanceTokenizer())
        for name in (bundled.CARD, GENERATION):
            shutil.copyfile(shipped / name, small / name)
        monkeypatch.setattr(bundled, "FOLDER", small.parent)
    if page == "docs/aria.md":
        pytest.importorskip("torch")
        from support.foreign_models import write_aria

        write_aria(tmp_path / "aria" / "model.safetensors", 17_727)
        write_aria(tmp_path / "demo" / "model-demo.safetensors", 2_675, **{"embedding_adapter.weight": (64, 512)})
    return write_midi_files(
        tmp_path / "midi", {f"{name}.mid": tune(i, 200) for i, name in enumerate(["song", *"abcdefg"])}
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run_in_order(page, workspace, monkeypatch, capsys):
    for words in commands(page):
        assert run_command(words, monkeypatch) == 0, f"{words}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_are_valid(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for block in blocks(page, "sh"):
        for words in command_lines(block):
            if not words[0].endswith(".py"):
                assert make_parser(words[0]).parse_args(words).run


def test_every_command_is_shown():
    assert set(COMMANDS) == {words[0] for page in PAGES for words in commands(page) if not words[0].endswith(".py")}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_run(page, workspace):
    names = {"__name__": "__main__"}
    for example in blocks(page, "python"):
        exec(compile(re.sub(r"seconds=\d+", "seconds=1", example), page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 200
