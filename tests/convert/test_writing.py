"""Refused conversions, files that must stay, and the memory of a conversion."""

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.memory import active_memory

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import sha256
from dsmr_mlx.convert.importing import plan_conversion, write_conversion
from dsmr_mlx.convert.safetensors_file import write_safetensors
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

MiB = 1 << 20
SMALL = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 2, "head_dim": 16, "d_ff": 64}


def write_source(path: Path, changed: dict[str, mx.array] | None = None, **options) -> Path:
    """Write the weights of a DSMR, some of them `changed`, as safetensors with the configuration."""
    values = SMALL | {"segment_length": 8, "horizons": [12, 4], "tie_embeddings": False} | options
    config = ModelConfig(**values)
    weights = dict(tree_flatten(DSMR(config).parameters())) | (changed or {})
    layout = {name: (array.dtype, array.shape) for name, array in weights.items()}
    write_safetensors(path, weights.items(), layout, {"config": config.to_json()})
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """A file with the weights of a small DSMR."""
    return write_source(tmp_path / "source.safetensors")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return path → content of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.complex64, mx.bool_])
@pytest.mark.parametrize("name", ["embed.weight", "layers.1.feed_forward.down.weight"])
def test_weights_other_than_floats_are_refused_by_name(run, tmp_path, dtype, name):
    shape = {"embed.weight": (50, 32)}.get(name, (32, 64))
    path = write_source(tmp_path / "odd.safetensors", {name: mx.ones(shape).astype(dtype)})
    ended = run("convert", path, "model")
    assert ended.code == 2
    assert f"{name} is {str(dtype).removeprefix('mlx.core.')}" in ended.err
    assert "expected float weights" in ended.err
    assert not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [(), ("--quantize", 4, "--group-size", 32), ("--dtype", "bfloat16")])
def test_weights_that_are_not_finite_are_refused_by_name(run, tmp_path, value, options):
    """One value at the far end of one tensor."""
    embed = np.zeros((70_000, 32), np.float32)
    embed[-1, -1] = value
    path = write_source(tmp_path / "odd.safetensors", {"embed.weight": mx.array(embed)}, vocab_size=70_000)
    ended = run("convert", path, "model", *options)
    assert ended.code == 2
    assert "embed.weight: has values that are not finite" in ended.err
    assert not list(Path().iterdir())


def test_values_out_of_the_range_of_float16_are_refused_by_name(run, tmp_path):
    name = "layers.0.attention.out.weight"
    path = write_source(tmp_path / "large.safetensors", {name: mx.full((32, 32), 1e5)})
    ended = run("convert", path, "model", "--dtype", "float16")
    assert ended.code == 2
    assert f"{name}: has values out of the range of float16, expected --dtype bfloat16 or float32" in ended.err
    assert not list(Path().iterdir())
    assert run("convert", path, "model", "--dtype", "bfloat16").code == 0


@pytest.mark.slow
def test_only_one_large_tensor_is_in_memory(tmp_path):
    """Embedding and positions of 16 MiB each; the minimum is the size of one."""
    sizes = {"vocab_size": 64 * 1024, "d_model": 64, "n_layers": 1, "horizons": [4], "max_positions": 64 * 1024}
    path = write_source(tmp_path / "large.safetensors", **sizes)
    conversion = plan_conversion(path)
    before = active_memory()
    mx.reset_peak_memory()
    write_conversion(conversion, tmp_path / "model")
    assert 16 * MiB <= mx.get_peak_memory() - before < 24 * MiB


def test_planning_reads_the_embedding_and_the_head_at_most_once(source, monkeypatch):
    """They are compared to detect a tied head."""
    from dsmr_mlx.convert.weights_source import WeightsSource

    reads, read = [], WeightsSource.read

    def counted(self, name):
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(WeightsSource, "read", counted)
    plan_conversion(source)
    assert all(reads.count(name) <= 1 for name in ("embed.weight", "head.weight")), reads


def test_other_folders_of_the_user_stay(run, source):
    for name in ("model.replaced", "model.incomplete", ".model.incomplete", ".model.replaced"):
        Path(name).mkdir()
        Path(name, "precious").write_text("x")
    before = snapshot(Path())
    assert run("convert", source, "model").code == 0
    assert run("convert", source, "model", "--force").code == 0
    after = snapshot(Path())
    assert {name: data for name, data in after.items() if not name.startswith("model/")} == before


def test_force_replaces_the_target_of_a_link(run, source):
    assert run("convert", source, "folder").code == 0
    Path("link").symlink_to("folder")
    for bits in (4, 8):
        options = ("--quantize", bits, "--group-size", 32, "--force")
        assert run("convert", source, "link", *options).code == 0
        assert sorted(path.name for path in Path().iterdir()) == ["folder", "link"]
        assert Path("link").readlink() == Path("folder")
        assert ModelConfig.load("folder/config.json").quantization["bits"] == bits


def test_force_replaces_the_current_folder(run, source, monkeypatch):
    assert run("convert", source, "model").code == 0
    work = Path.cwd()
    monkeypatch.chdir("model")
    ended = run("convert", source, ".", "--force", "--dtype", "bfloat16")
    assert ended.code == 0, ended.err
    monkeypatch.chdir(work)
    assert [path.name for path in Path().iterdir()] == ["model"]
    checkpoint.load("model")


def test_a_failed_replacement_keeps_the_old_checkpoint(run, source, monkeypatch):
    assert run("convert", source, "model").code == 0
    before = snapshot(Path())
    replace = os.replace

    def failing(old, new):
        if str(old).endswith(".incomplete"):
            raise OSError(errno.EIO, "Input/output error", str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    assert run("convert", source, "model", "--force", "--dtype", "bfloat16").code == 1
    assert snapshot(Path()) == before
    assert [path.name for path in Path().iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ("model", "model"),
        ("model", "link"),
        ("link", "model"),
        ("model", "model/../model/"),
        ("model", "model/small"),
        ("model/model.safetensors", "model"),
    ],
)
def test_the_source_is_never_replaced(run, source, given, out):
    """Nor a folder that contains it or lies in it: its weights may be the only ones in full precision."""
    assert run("convert", source, "model").code == 0
    Path("link").symlink_to("model")
    before = snapshot(Path())
    ended = run("convert", given, out, "--force", "--quantize", 4, "--group-size", 32)
    assert ended.code == 2
    assert "is, contains or lies in the source, expected another folder" in ended.err
    assert snapshot(Path()) == before
    with pytest.raises(UserError, match="is, contains or lies in the source"):
        write_conversion(plan_conversion(given), out, force=True)


@pytest.mark.parametrize("out", ["model/model.safetensors", "model/new.safetensors", "link/model.safetensors"])
def test_export_refuses_files_in_its_checkpoint(run, source, out):
    assert run("convert", source, "model").code == 0
    Path("link").symlink_to("model")
    before = snapshot(Path())
    ended = run("convert", "--to-pytorch", "model", out, "--force")
    assert ended.code == 2
    assert "is inside model, expected a file elsewhere" in ended.err
    assert snapshot(Path()) == before


def test_export_refuses_files_in_its_run_and_folders(run, trained):
    before = snapshot(trained.run)
    ended = run("convert", "--to-pytorch", trained.run, trained.run / "model.safetensors")
    assert (ended.code, "expected a file elsewhere" in ended.err) == (2, True)
    assert snapshot(trained.run) == before
    for suffix in (".pt", ".safetensors"):
        Path(f"folder{suffix}").mkdir()
        ended = run("convert", "--to-pytorch", trained.run, f"folder{suffix}", "--force")
        assert (ended.code, "is a folder, expected a file" in ended.err) == (2, True)
    assert not any(list(path.iterdir()) for path in Path().iterdir())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(run, source, suffix):
    """A limit on the file size simulates the full disk."""
    pytest.importorskip("torch")
    resource = pytest.importorskip("resource")
    assert run("convert", source, "model").code == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        ended = run("convert", "--to-pytorch", "model", f"out{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 1
    assert ended.err.splitlines() == [f"dsmr-mlx: error: out{suffix}: File too large; nothing was written"]
    assert [path.name for path in Path().iterdir()] == ["model"]


@pytest.mark.slow
def test_an_export_to_safetensors_needs_the_memory_of_one_tensor(tmp_path):
    from dsmr_mlx.convert.exporting import export

    sizes = {"vocab_size": 64 * 1024, "d_model": 64, "n_layers": 1, "n_heads": 1, "horizons": [4]}
    folder = write_conversion(plan_conversion(write_source(tmp_path / "s.safetensors", **sizes)), tmp_path / "model")
    before = active_memory()
    mx.reset_peak_memory()
    path = export(folder, tmp_path / "out.safetensors")
    assert mx.get_peak_memory() - before < 17 * MiB
    stored, exported = (checkpoint.load_arrays(p) for p in (folder / "model.safetensors", path))
    assert stored.keys() == exported.keys()
    assert all(mx.array_equal(stored[name], exported[name]) for name in stored)


@pytest.mark.parametrize("inner", ["checkpoints", "last", "best"])
def test_a_folder_of_another_program_with_our_file_names_is_a_source(run, source, inner):
    """It has another `tokenizer/tokenizer.json`, and folders named like those of a run."""
    folder = Path("theirs")
    (folder / inner / "step-1").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    source.rename(folder / "model.safetensors")
    ended = run("convert", folder, "model")
    assert ended.code == 0, ended.err
    checkpoint.load("model")


def test_force_does_not_replace_a_folder_of_another_program(run, source):
    """Even if its files have our names."""
    theirs = Path("theirs")
    (theirs / "tokenizer").mkdir(parents=True)
    (theirs / "tokenizer" / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    (theirs / "model.safetensors").write_bytes(source.read_bytes())
    (theirs / "config.json").write_text(json.dumps({"model_type": "llama"}))
    before = snapshot(Path())
    ended = run("convert", source, theirs, "--force")
    assert (ended.code, "is not a checkpoint that --force may replace" in ended.err) == (2, True)
    assert snapshot(Path()) == before


def test_a_damaged_checkpoint_is_refused(run, source):
    assert run("convert", source, "model").code == 0
    Path("model/config.json").write_text("{")
    ended = run("convert", "model", "new")
    assert (ended.code, "config.json: damaged" in ended.err) == (2, True)


def test_the_record_has_the_options(run, tmp_path):
    path = write_source(tmp_path / "odd.safetensors", {"ema.weight": mx.zeros((3,))}, norm_eps=1e-5)
    options = ("--set", "norm_eps=1e-6", "--allow-unused", "ema.*")
    assert run("convert", path, "model", *options).code == 0
    record = json.loads(Path("model/conversion.json").read_text())
    assert (record["settings"], record["allow_unused"]) == ({"norm_eps": 1e-6}, ["ema.*"])
    assert (record["map_file"], record["entry"], record["verification"]) == (None, "", None)
    names = Path("map.toml")
    targets = [name for name, _ in tree_flatten(DSMR(ModelConfig(**SMALL, tie_embeddings=False)).parameters())]
    lines = [
        f'[[rule]]\nfrom = "{name}"\nto = "{name}"' for name in {t.replace("layers.0", "layers.{i}") for t in targets}
    ]
    names.write_text("\n".join(line for line in lines if "layers.1" not in line))
    ended = run("convert", path, "mapped", "--map", names, "--set", "n_heads=2", *options)
    assert ended.code == 0, ended.err
    record = json.loads(Path("mapped/conversion.json").read_text())
    assert record["map_file"] == {"path": "map.toml", "sha256": sha256(names)}
