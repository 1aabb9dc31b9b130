"""Rooms import in one direction; help is fast; training needs no MIDI library."""

import ast
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support.processes import imported_by, named, python

import dsmr_mlx
import dsmr_mlx.convert

PACKAGE, CONVERT = Path(dsmr_mlx.__file__).parent, Path(dsmr_mlx.convert.__file__).parent
SOURCES = sorted(path for folder in (PACKAGE, CONVERT) for path in folder.rglob("*.py"))
HEAVY = ("mlx", "numpy", "rich", "symusic", "miditok", "sentencepiece")
MIDI = ("symusic", "mido", "miditok", "sentencepiece")


SHOW_HELP = """
from dsmr_mlx.cli import main
try:
    main(['--help'])
except SystemExit:
    pass
"""


def test_help_imports_nothing_heavy():
    assert not named(imported_by(SHOW_HELP), *HEAVY)


def test_help_is_fast():
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = cpu_seconds()
        python(SHOW_HELP)
        times.append(cpu_seconds() - before)
    assert min(times) < 0.5


def test_the_package_is_light_and_has_its_public_names():
    modules = imported_by("import dsmr_mlx")
    assert not named(modules, *HEAVY)
    assert named(modules, "dsmr_mlx") == {"dsmr_mlx", "dsmr_mlx.common", "dsmr_mlx.common.lazy"}
    assert set(dsmr_mlx.__all__) <= set(dir(dsmr_mlx))
    for name in dsmr_mlx.__all__:
        assert getattr(dsmr_mlx, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'dsmr_mlx' has no attribute 'nothing'"):
        dsmr_mlx.nothing  # noqa: B018


# Each room and the rooms it may import from, in the order of the data: left to right, never back.
ROOMS = {
    "common": set(),
    "music": {"common"},
    "tokenizers": {"common", "music"},
    "model": {"common", "music", "tokenizers"},
    "data": {"common", "music", "tokenizers"},
    "generation": {"common", "music", "tokenizers", "model", "data"},
    "convert": {"common", "music", "tokenizers", "model", "data"},
    "evaluation": {"common", "music", "tokenizers", "model", "data", "generation"},
    "training": {"common", "music", "tokenizers", "model", "data", "generation", "evaluation", "convert"},
    "live": {"common", "music", "tokenizers", "model", "data", "generation", "evaluation", "convert"},
}
ROOMS["studio"] = ROOMS["live"] | {"live"}
ROOMS["doctor"] = set(ROOMS)
ROOMS["cli"] = set(ROOMS)
ENTRIES = {"__init__": {"common"}, "__main__": {"cli"}, "train": {"cli"}}  # the modules above all rooms


def module_of(path: Path) -> str:
    """The full name of the module in a file of the package or of `convert/`."""
    root = CONVERT.parent if path.is_relative_to(CONVERT) else PACKAGE
    return ".".join(["dsmr_mlx", *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """The modules that a file imports anywhere in it: at the top, in functions, for typing."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {name if name in MODULES else node.module for name in found}
    return frozenset(names)


def room_of(module: str) -> str | None:
    """The room of a module, None for the modules above all rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_every_module_is_in_a_room():
    above = {path.stem for path in SOURCES if room_of(module_of(path)) is None}
    assert above == set(ENTRIES)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_in_one_direction(module):
    room = room_of(module)
    allowed = ROOMS[room] | {room} if room else ENTRIES[MODULES[module].stem]
    rooms = {room_of(name) for name in imports_of(MODULES[module]) if named({name}, "dsmr_mlx")} - {None}
    assert rooms <= allowed


def test_modules_do_not_import_in_circles():
    graph = {module: imports_of(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    while True:  # remove what imports nothing that is left, and what nothing left imports: circles remain
        imported = {target for targets in graph.values() for target in targets}
        ends = {module for module, targets in graph.items() if not targets & graph.keys() or module not in imported}
        if not ends:
            break
        graph = {module: targets for module, targets in graph.items() if module not in ends}
    assert graph == {}


def test_only_checkpoints_bring_tokenizers_into_the_model():
    users = {module for module, path in MODULES.items() if named(imports_of(path), "dsmr_mlx.tokenizers")}
    assert {module for module in users if room_of(module) == "model"} == {"dsmr_mlx.model.checkpoint"}


NO_MLX = ("common", "music", "tokenizers", "data")
NO_MIDI = ("model", "data", "generation", "evaluation", "training")  # libraries for MIDI; `data.prepare` reads it


@pytest.mark.parametrize("room", NO_MLX)
def test_a_room_runs_without_mlx(room):
    modules = [module for module in MODULES if room_of(module) == room]
    assert not named(imported_by("\n".join(f"import {module}" for module in modules)), "mlx")


@pytest.mark.parametrize("room", NO_MIDI)
def test_a_room_runs_without_midi_libraries(room):
    modules = [module for module in MODULES if room_of(module) == room]
    assert not named(imported_by("\n".join(f"import {module}" for module in modules)), *MIDI, "rich")


def test_horizon_arithmetic_is_pure():
    assert not named(imported_by("import dsmr_mlx.model.horizons"), "mlx", "numpy", "symusic", "rich")


def test_only_training_knows_optimizers():
    users = {room_of(module) for module, path in MODULES.items() if named(imports_of(path), "mlx.optimizers")}
    assert users == {"training"}


def test_only_convert_knows_torch():
    users = {room_of(module) for module, path in MODULES.items() if named(imports_of(path), "torch", "transformers")}
    assert users == {"convert"}


def test_only_the_command_line_prints():
    printing = set()
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            called = node.func if isinstance(node, ast.Call) else None
            prints = isinstance(called, ast.Name) and called.id == "print"
            if prints or (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")):
                printing.add(room_of(module))
    assert printing <= {"cli"}


TRAIN = """
import sys
from pathlib import Path
for name in ('symusic', 'mido', 'miditok', 'miditoolkit', 'pretty_midi'):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from support.tiny import tiny_config
from dsmr_mlx.training.run import train
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


def test_conversion_can_be_imported_in_a_clone():
    """Where Python finds the package of the clone before an installed one."""
    root = Path(__file__).parents[1]
    script = "import dsmr_mlx.convert.families as found; print(found.__file__)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert ended.stdout.strip() == str(root / "convert" / "families" / "__init__.py"), ended.stderr
