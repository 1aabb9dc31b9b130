"""Sources in any format have the same tensors, bit for bit, read one at a time."""

import hashlib
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from dsmr_mlx import UserError
from dsmr_mlx.convert.weights_source import open_source

torch = pytest.importorskip("torch")
save_safetensors = pytest.importorskip("safetensors.torch").save_file

from support.torch_states import MODEL, assert_holds, state_dict  # noqa: E402


def write_shards(folder, shards: list[dict], suffix: str = ".safetensors", config: dict | None = None):
    """Write a Hugging Face folder. Its index lists the tensors alphabetically."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}"
        (save_safetensors if suffix == ".safetensors" else torch.save)(shard, folder / name)
        index |= dict.fromkeys(shard, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": dict(sorted(index.items()))}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_index(folder, change) -> None:
    """Change the entries of the index in a folder."""
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text())["weight_map"]
    change(index)
    path.write_text(json.dumps({"weight_map": index}))


def test_a_safetensors_file_is_read_bitwise_as_by_mlx(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_safetensors(state_dict(), path)
    source = open_source(str(path))
    assert_holds(source, state_dict())
    for name, array in mx.load(str(path)).items():
        found = source.read(name)
        assert found.dtype == array.dtype
        assert bytes(found.reshape(-1).view(mx.uint8)) == bytes(array.reshape(-1).view(mx.uint8))


def test_float64_is_rounded_to_float32_in_every_format(tmp_path):
    state = {"wide": torch.randn(5, 3, dtype=torch.float64), "narrow": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "a.pt")
    save_safetensors(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert_holds(open_source(tmp_path / name), state)
    torch.save({"huge": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"b\.pt: huge is float64 and has values out of the range of float32"):
        open_source(tmp_path / "b.pt").read("huge")


def test_arrays_do_not_change_with_the_file(tmp_path):
    for name, save in (("a.pt", torch.save), ("a.safetensors", save_safetensors)):
        save({"a": torch.ones(1000)}, tmp_path / name)
        array = open_source(tmp_path / name).read("a")
        data = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("r+b") as file:
            file.write(bytes(len(data)))
        assert mx.all(array == 1).item()


def touch(path) -> None:
    """Write the same bytes again, a second later."""
    later = path.stat().st_mtime_ns + 10**9
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(later, later))


def replaced(path) -> None:
    """Replace a file by a copy of the same time."""
    written = path.stat().st_mtime_ns
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)
    os.utime(path, ns=(written, written))


def zeros(path) -> None:
    """Write other tensors of the same size to a file."""
    save = save_safetensors if path.suffix == ".safetensors" else torch.save
    size, later = path.stat().st_size, path.stat().st_mtime_ns + 10**9
    save({"a": torch.zeros(9), "b": torch.zeros(2)}, path)
    assert path.stat().st_size == size
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", [zeros, touch, replaced, lambda path: os.truncate(path, 90), os.unlink])
def test_files_that_change_while_in_use_are_refused_by_name(tmp_path, name, first, change):
    """Before or after a tensor was read; the weights would be a mixture."""
    path = tmp_path / name
    (save_safetensors if name == "a.safetensors" else torch.save)({"a": torch.ones(9), "b": torch.ones(2)}, path)
    source = open_source(path)
    if first:
        source.read("a")
    change(path)
    for read in (lambda: source.read("b"), source.sha256):
        with pytest.raises(UserError, match=rf"{path}: (changed while in use, expected|cannot be read|b has 0 of)"):
            read()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_that_change_while_in_use_are_refused(tmp_path, suffix):
    """Also those that are opened again because another one was read in between."""
    folder = write_shards(tmp_path / "hf", [{"a": torch.ones(9)}, {"b": torch.ones(9)}], suffix)
    source = open_source(folder)
    source.read("b")
    touch(source.files[0])
    with pytest.raises(UserError, match=r"00001-of-00002\..*: changed while in use, expected"):
        source.read("a")
    assert source.read("b").sum().item() == 9


def test_the_configuration_is_stored_in_the_file_or_beside_it(tmp_path):
    described = {"config": {"d_model": 8}, "tokenizer": {"kind": "x"}}
    (tmp_path / "config.json").write_text('{"beside": 1}')
    torch.save({"state_dict": MODEL} | described, tmp_path / "ours.pt")
    torch.save({"model": MODEL, "config": {"out_dir": "out"}, "model_args": {"n_layer": 2}}, tmp_path / "nanogpt.pt")
    torch.save({"state_dict": MODEL, "config": "large"}, tmp_path / "other.pt")
    texts = {key: json.dumps(value) for key, value in described.items()}
    save_safetensors(MODEL, tmp_path / "ours.safetensors", texts)
    save_safetensors(MODEL, tmp_path / "other.safetensors", {"format": "pt", "config": "large", "tokenizer": "[1]"})
    found = {path.name: open_source(path) for path in tmp_path.iterdir() if path.suffix != ".json"}
    for name in ("ours.pt", "ours.safetensors"):
        assert {"config": found[name].config, "tokenizer": found[name].tokenizer} == described
    assert found["nanogpt.pt"].config == {"n_layer": 2}
    for name in ("other.pt", "other.safetensors"):
        assert (found[name].config, found[name].tokenizer) == ({"beside": 1}, None)


def test_settings_of_a_training_script_do_not_hide_the_configuration(tmp_path):
    """A stored `config` is used if it describes a model, and at least as fully as config.json."""
    stated = {"model_type": "llama", "vocab_size": 6, "rope_theta": 5e5}
    training = {"lr": 1e-3, "betas": [0.9, 0.95], 3: 4}
    ours = {"horizons": [4], "vocab_size": 6}
    nanogpt = {"n_layer": 2, "n_head": 2, "n_embd": 8}
    for name, config in {"training": training, "part": training | {"vocab_size": 6}, "ours": ours}.items():
        torch.save({"model": MODEL, "config": config}, tmp_path / f"{name}.pt")
    torch.save({"model": MODEL, "config": training, "model_args": nanogpt}, tmp_path / "nanogpt.pt")
    torch.save({"model": MODEL, "config": nanogpt, "model_args": training}, tmp_path / "swapped.pt")
    save_safetensors(MODEL, tmp_path / "training.safetensors", {"config": '{"lr": 0.1}'})

    def described(name: str) -> tuple:
        source = open_source(tmp_path / name)
        return source.config, source.config_name

    for name in ("training.pt", "training.safetensors"):
        assert described(name) == ({}, "config.json")
    assert described("part.pt") == (training | {"vocab_size": 6}, "configuration")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    for name in ("training.pt", "training.safetensors", "part.pt"):
        assert described(name) == (stated, "config.json")
    for name, config in (("ours.pt", ours), ("nanogpt.pt", nanogpt), ("swapped.pt", nanogpt)):
        assert described(name) == (config, "configuration")


def test_tensors_missing_from_the_index_belong_to_the_checkpoint(tmp_path):
    folder = write_shards(tmp_path / "hf", [{"a": torch.ones(5)}, {"b": torch.ones(2), "c": torch.ones(1)}])
    edit_index(folder, lambda index: index.pop("c"))
    assert_holds(open_source(folder), {"a": torch.ones(5), "b": torch.ones(2), "c": torch.ones(1)})
    write_shards(folder, [{"a": torch.ones(5), "c": torch.zeros(1)}, {"b": torch.ones(2), "c": torch.ones(1)}])
    assert open_source(folder).read("c").item() == 1
    edit_index(folder, lambda index: index.pop("c"))
    with pytest.raises(UserError, match=r"00002\.safetensors: c is also in another shard, expected the index to name"):
        open_source(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_checkpoint(tmp_path, suffix):
    """All tensors, in the order of the shards, and readable in any order."""
    whole = state_dict()
    names = [*whole]
    shards = [{name: whole[name] for name in names[i::3]} for i in range(3)]
    folder = write_shards(tmp_path / "hf", shards, suffix, config={"model_type": "llama"})
    source = open_source(folder)
    assert_holds(source, whole)
    order = [next(i for i, shard in enumerate(shards) if name in shard) for name in source.shapes]
    assert order == sorted(order)
    assert source.config == {"model_type": "llama"}
    assert len(source.files) == 3
    (index,) = folder.glob("*.index.json")
    assert open_source(index).shapes == source.shapes
    assert source.sha256() == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(f"*{suffix}")}


def test_safetensors_are_preferred_and_other_files_ignored(tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        torch.save({"no": torch.ones(1)}, tmp_path / name)
    torch.save({"a": torch.zeros(1)}, tmp_path / "consolidated.00.pth")
    assert open_source(tmp_path).files == [tmp_path / "consolidated.00.pth"]
    torch.save({"b": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert [*open_source(tmp_path).shapes] == ["b"]
    save_safetensors({"c": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [*open_source(tmp_path).shapes] == ["c"]


def test_an_index_of_any_name_is_followed(tmp_path):
    folder = write_shards(tmp_path / "hf", [{"a": torch.ones(1)}, {"b": torch.ones(2)}])
    (folder / "model.safetensors.index.json").rename(folder / "model.fp16.safetensors.index.json")
    assert open_source(folder).shapes == {"a": (1,), "b": (2,)}


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / SECOND).unlink(), rf"index\.json: {SECOND} missing, expected 2 shards"),
        (
            lambda f: edit_index(f, lambda index: index.update({"d": index["b"]})),
            f"{SECOND}: lacks d, which the index lists for this shard",
        ),
        (
            lambda f: edit_index(f, lambda index: index.update({"b": "../secret.safetensors"})),
            r"index\.json: lists '\.\./secret\.safetensors' for b, expected a file of weights in the same folder",
        ),
        (lambda f: (f / INDEX).write_text("{}"), r"index\.json: has no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map"'), r"index\.json: not valid JSON"),
        (
            lambda f: (f / INDEX).unlink(),
            r"has 2 files of weights \(model-.*\), expected their index \(\.index\.json\) too",
        ),
        (lambda f: [(f / name).unlink() for name in (INDEX, SECOND)], f"{FIRST} is one of several shards"),
        (lambda f: os.truncate(f / FIRST, (f / FIRST).stat().st_size - 1), f"{FIRST}: truncated"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: contains a list, expected a JSON object"),
    ],
    ids=[
        "missing shard", "missing tensor", "path outside", "empty index", "cut index", "no index", "one shard",
        "cut shard", "list for configuration",
    ],
)  # fmt: skip
def test_an_incomplete_folder_is_refused(tmp_path, spoil, message):
    folder = write_shards(tmp_path / "hf", [{"a": torch.ones(5)}, {"b": torch.ones(2), "c": torch.ones(1)}])
    spoil(folder)
    with pytest.raises(UserError, match=message):
        open_source(folder)


def test_missing_and_ambiguous_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no weights, expected a file of weights"):
        open_source(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: is a \.gguf, expected a file of weights"):
        open_source(tmp_path / "model.gguf")
    for name in ("a.pt", "b.pt"):
        torch.save(MODEL, tmp_path / name)
    with pytest.raises(UserError, match=r"has 2 files of weights \(a\.pt, b\.pt\), expected one"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_git_lfs_pointers_are_recognized(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer; git lfs pull"):
        open_source(tmp_path / name)


def python(code: str, *arguments: object) -> str:
    """Run code in a new process and return its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # A fixed threshold: otherwise glibc keeps freed blocks of up to 32 MB, which would distort the measurement.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from dsmr_mlx import UserError
from dsmr_mlx.convert.weights_source import open_source
source = open_source(sys.argv[1])
print(source.read("a").dtype, source.read("wide").dtype)
try:
    open_source(sys.argv[2])
except UserError as error:
    print(error)
"""


def test_only_torch_files_need_torch(tmp_path):
    state = {"a": torch.ones(2, dtype=torch.bfloat16), "wide": torch.ones(2, dtype=torch.float64)}
    save_safetensors(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    types, error = python(WITHOUT_TORCH, tmp_path / "a.safetensors", tmp_path / "a.pt").splitlines()
    assert types == "mlx.core.bfloat16 mlx.core.float32"
    assert error == f"{tmp_path / 'a.pt'}: reading it needs PyTorch: pip install 'dsmr-mlx[convert]'"


# ru_maxrss of a child starts at that of its parent, so on Linux VmHWM is reset and read instead.
COPY = """
import resource, sys
from pathlib import Path

import mlx.core as mx

from dsmr_mlx.convert.weights_source import open_source
from dsmr_mlx.convert.safetensors_file import write_safetensors

def peak():
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

if sys.argv[3] == "torch":
    import torch
warm = mx.zeros((4, 4), mx.float16).view(mx.uint8)
mx.eval(warm)
if sys.platform == "linux":
    Path("/proc/self/clear_refs").write_text("5")
start = peak()
source = open_source(sys.argv[1])
layout = {name: (mx.float16, shape) for name, shape in source.shapes.items()}
write_safetensors(sys.argv[2], ((name, source.read(name)) for name in source.shapes), layout)
print(peak() - start)
kept = [source.read(name) for name in source.shapes]
print(peak() - start)
"""
MB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".legacy.bin"])
def test_copying_a_checkpoint_needs_the_memory_of_one_shard(tmp_path, suffix):
    """64 MB in 4 shards are copied; keeping all tensors shows that the measurement works."""
    random = torch.Generator().manual_seed(0)
    draws = (torch.randint(0, 256, (MB,), dtype=torch.uint8, generator=random).view(torch.float16) for _ in range(64))
    state = {f"layers.{i}": tensor.reshape(512, -1) for i, tensor in enumerate(draws)}
    shards = [{name: state[name] for name in [*state][16 * i : 16 * i + 16]} for i in range(4)]
    folder = write_shards(tmp_path / "hf", shards, suffix.removeprefix(".legacy"))
    if suffix == ".legacy.bin":
        for i, path in enumerate(sorted(folder.glob("*.bin"))):
            torch.save(shards[i], path, _use_new_zipfile_serialization=False)
    kind = "safetensors" if suffix == ".safetensors" else "torch"
    copying, keeping = map(int, python(COPY, folder, tmp_path / "copy.safetensors", kind).split())
    assert keeping > 60 * MB
    assert copying < (4 * MB if suffix == ".safetensors" else 1.5 * 16 * MB + MB)
    assert_holds(open_source(tmp_path / "copy.safetensors"), state)
