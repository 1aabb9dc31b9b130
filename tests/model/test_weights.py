"""Weights of other types, names and shapes are refused before anything computes with them, and so are pipes."""

import os
import struct

import mlx.core as mx
import pytest
from support.stand_ins import tiny_model

from dsmr_mlx import PerformanceTokenizer, UserError, load
from dsmr_mlx.model import checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without checksums."""
    model = tiny_model()
    checkpoint.save_model(tmp_path, model.config, model.parameters(), PerformanceTokenizer())
    return tmp_path


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.int64, mx.bool_, mx.complex64])
def test_weights_that_are_no_floats(folder, dtype):
    path = folder / "model.safetensors"
    arrays = checkpoint.load_arrays(path)
    name = str(dtype).removeprefix("mlx.core.")
    for changed in (arrays, {"norm.weight": arrays["norm.weight"]}):
        mixed = arrays | {key: array.astype(dtype) for key, array in changed.items()}
        mx.save_safetensors(str(path), mixed)
        with pytest.raises(UserError, match=rf"model\.safetensors: .*weight is {name}, expected floats$"):
            load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"\xff\xfe": 1}',
        b"[" * 5000,
        b"7",
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296], "data_offsets": [0, 17179869184]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_damaged_headers(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors: ") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_a_pipe_for_a_part_does_not_block(folder):
    for name in ("model.safetensors", "config.json", "tokenizer/tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError):
            load(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    load(folder)


def test_checksums_name_only_files_of_the_folder(folder):
    (folder / "checksums.json").write_text(
        '{"config.json": {}, "model.safetensors": {}, "tokenizer/tokenizer.json": {}}'.replace(
            "{}", '{"bytes": 1, "sha256": "0"}'
        )
    )
    for outside in ("../secret", str(folder.parent / "secret")):
        (folder.parent / "secret").write_text("x")
        content = (folder / "checksums.json").read_text()
        (folder / "checksums.json").write_text(f'{{"{outside}": {{"bytes": 1, "sha256": "0"}}, {content[1:]}')
        with pytest.raises(UserError, match="is not in the folder"):
            load(folder)
        (folder / "checksums.json").write_text(content)
