"""What imports what: a fast start, training without MIDI libraries, and parts that do not know each other."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import dsmr_mlx

PACKAGE = Path(dsmr_mlx.__file__).parent
SOURCES = sorted(PACKAGE.glob("*.py"))
HEAVY = ("mlx", "numpy", "rich", "symusic", "miditok", "sentencepiece")
MIDI = ("symusic", "mido", "miditok", "sentencepiece")


def python(code: str, *arguments: object) -> str:
    """Run a script in another process, in a folder where nothing can be imported from: its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statement: str) -> set[str]:
    """The modules that are there after a statement, those of a package by their full names."""
    report = "import json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(python(f"{statement}\n{report}").splitlines()[-1]))


def named(modules: set[str], *packages: str) -> set[str]:
    return {name for name in modules if name in packages or name.startswith(tuple(f"{p}." for p in packages))}


SHOW_HELP = """
from dsmr_mlx.cli import main
try:
    main(['--help'])
except SystemExit:
    pass
"""


def test_help_imports_nothing_heavy():
    assert not named(imported_by(SHOW_HELP), *HEAVY)


def test_help_answers_at_once():
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = cpu_seconds()
        python(SHOW_HELP)
        times.append(cpu_seconds() - before)
    assert min(times) < 0.5


def test_the_package_is_light_and_has_its_names():
    modules = imported_by("import dsmr_mlx")
    assert not named(modules, *HEAVY)
    assert named(modules, "dsmr_mlx") == {"dsmr_mlx", "dsmr_mlx.lazy"}
    assert set(dsmr_mlx.__all__) <= set(dir(dsmr_mlx))
    for name in dsmr_mlx.__all__:
        assert getattr(dsmr_mlx, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'dsmr_mlx' has no attribute 'nothing'"):
        dsmr_mlx.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        ("horizons", {"mlx", "numpy", "symusic", "rich"}),
        ("config", {"mlx", "symusic"}),
        ("model", {*MIDI, *(f"dsmr_mlx.{name}" for name in ("midi", "tokenizer", "performance", "corpus", "prepare"))}),
        ("state", {*MIDI, "dsmr_mlx.midi", "dsmr_mlx.tokenizer", "dsmr_mlx.performance"}),
        ("sampling", {*MIDI, "dsmr_mlx.tokenizer", "dsmr_mlx.model"}),
        ("midi", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("performance", {"mlx", *MIDI}),
        ("event_grammar", {"mlx", *MIDI}),
        ("pieces", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("tokenizer", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("miditok_tokenizer", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("subwords", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("corpus", {"mlx", *MIDI, "dsmr_mlx.model"}),
        ("prepare", {"mlx", *MIDI, "dsmr_mlx.model", "dsmr_mlx.train"}),
        ("streaming", {"mlx", *MIDI}),
        ("train", {*MIDI, "rich"}),
        ("generation", {*MIDI, "rich", "dsmr_mlx.trainer"}),
        ("evaluation", {*MIDI, "rich", "dsmr_mlx.trainer"}),
        ("cli", set(HEAVY)),
    ],
)
def test_a_module_does_not_know(module, unknown):
    modules = imported_by(f"import dsmr_mlx.{module}")
    assert not named(modules, *unknown)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_the_trainer_knows_optimizers():
    knowing = {path.name for path in SOURCES if named(imports_of(path), "mlx.optimizers")}
    assert knowing <= {"trainer.py", "optim.py"}
    assert knowing


def test_only_the_command_line_prints():
    printing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print":
                printing.add(path.name)
            if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"):
                printing.add(path.name)
    assert printing == {"cli.py"}


TRAIN = """
import sys
from pathlib import Path
for name in ('symusic', 'mido', 'miditok', 'miditoolkit', 'pretty_midi'):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from tiny import tiny_config
from dsmr_mlx.train import train
train(tiny_config(max_steps=2, eval_every=2, sample_seconds=0.5), sys.argv[2], sys.argv[3])
"""


def test_training_needs_no_midi_library(trained, tmp_path):
    python(TRAIN, Path(__file__).parent, trained.corpus, tmp_path / "run")
    (sample,) = (tmp_path / "run" / "samples").iterdir()
    assert sample.name == "step-00000002.npy"
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_convert_belongs_to_the_package():
    code = "import importlib.util as u, dsmr_mlx.convert as c; print(c.__name__, u.find_spec('convert'))"
    assert python(code).split() == ["dsmr_mlx.convert", "None"]
