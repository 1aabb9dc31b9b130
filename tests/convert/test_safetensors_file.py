"""Safetensors files are read and written bit for bit as by MLX and the safetensors package."""

import json
import math
import resource

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import active_memory

from dsmr_mlx import UserError
from dsmr_mlx.convert.safetensors_file import NAMES, SafetensorsFile, write_safetensors

SHAPES = ((3, 5), (7,), (0, 4), ())


def random_arrays(seed: int = 0) -> dict[str, mx.array]:
    """Return arrays of every type of the format and several shapes, with random bits (including NaNs)."""
    random = np.random.default_rng(seed)
    arrays = {}
    for dtype, name in NAMES.items():
        for shape in SHAPES:
            data = random.integers(0, 256, math.prod(shape) * dtype.size, dtype=np.uint8)
            values = mx.array(data % 2 == 1) if dtype == mx.bool_ else mx.array(data).view(dtype)
            arrays[f"{name}.{len(shape)}.{math.prod(shape)}"] = values.reshape(shape)
    return arrays


def layout_of(arrays: dict[str, mx.array]) -> dict:
    """Return the layout for `write_safetensors`."""
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def bits(array: mx.array) -> bytes:
    """Return the bytes of an array."""
    return bytes(mx.contiguous(array).reshape(-1).view(mx.uint8))


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Compare names, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert bits(found[name]) == bits(array), name


def read_all(path) -> dict[str, mx.array]:
    """Read all tensors of a file."""
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.shapes}


def header_of(path) -> tuple[int, dict]:
    """Return the length of the header and the header of a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def test_mlx_reads_written_files_bitwise(tmp_path):
    arrays = random_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, reversed(arrays.items()), layout_of(arrays), {"who": "été"})
    found, metadata = mx.load(str(path), return_metadata=True)
    assert_same(found, arrays)
    assert metadata == {"who": "été"}
    assert_same(read_all(path), arrays)
    assert SafetensorsFile(path).metadata == {"who": "été"}


def test_torch_reads_written_files_bitwise(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = random_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays.items(), layout_of(arrays))
    found = safetensors_torch.load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert str(found[name].dtype).removeprefix("torch.") == str(array.dtype).removeprefix("mlx.core.").rstrip("_")
        assert tuple(found[name].shape) == array.shape
        assert found[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == bits(array), name


def test_files_of_mlx_and_torch_are_read_bitwise(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = random_arrays(1)
    mx.save_safetensors(str(tmp_path / "mlx.safetensors"), arrays, {"format": "mlx"})
    assert_same(read_all(tmp_path / "mlx.safetensors"), arrays)
    safetensors_torch.save_file(safetensors_torch.load_file(tmp_path / "mlx.safetensors"), tmp_path / "t.safetensors")
    assert_same(read_all(tmp_path / "t.safetensors"), arrays)


def test_header_and_tensors_are_aligned_and_without_gaps(tmp_path):
    arrays = {"odd": mx.zeros((3,), mx.uint8), "wide": mx.zeros((2,), mx.int64), "half": mx.zeros((3,), mx.float16)}
    write_safetensors(tmp_path / "a.safetensors", arrays.items(), layout_of(arrays))
    length, header = header_of(tmp_path / "a.safetensors")
    assert length % 8 == 0
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin = entry["data_offsets"][0]
        assert begin == end
        assert begin % arrays[name].dtype.size == 0
        end = entry["data_offsets"][1]
    assert (tmp_path / "a.safetensors").stat().st_size == 8 + length + end


def test_views_are_written_in_row_order(tmp_path):
    base = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    arrays = {"transposed": base.T, "strided": base[::2, 1::2], "broadcast": mx.broadcast_to(base[0], (3, 6))}
    write_safetensors(tmp_path / "a.safetensors", arrays.items(), layout_of(arrays))
    assert_same(mx.load(str(tmp_path / "a.safetensors")), arrays)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": mx.zeros(2)}, "b: missing, expected 2 tensors"),
        ({"a": mx.zeros(2), "c": mx.zeros(2)}, "c: not in the layout"),
        ({"a": mx.zeros(3)}, r"a: is mlx.core.float32 \(3,\), expected mlx.core.float32 \(2,\)"),
        ({"a": mx.zeros(2, mx.int32)}, r"a: is mlx.core.int32 \(2,\)"),
        ([("a", mx.zeros(2)), ("a", mx.zeros(2))], "a: given twice"),
    ],
)
def test_tensors_other_than_in_the_layout_leave_the_old_file(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    layout = {"a": (mx.float32, (2,)), "b": (mx.float32, (2,))}
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, tensors.items() if isinstance(tensors, dict) else tensors, layout)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("layout", "metadata", "message"),
    [
        ({"a": (mx.float64, (1,))}, None, "a: is mlx.core.float64"),
        ({"__metadata__": (mx.float32, (1,))}, None, "__metadata__: invalid name"),
        ({}, {"step": 1}, "metadata 'step'"),
    ],
)
def test_invalid_layouts_are_refused_before_writing(tmp_path, layout, metadata, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a.safetensors", [], layout, metadata)
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_raises_oserror_and_leaves_no_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arrays = {"a": mx.zeros((1 << 16,)), "b": mx.zeros((1 << 16,))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(OSError, match=r"nothing was written: '.*a\.safetensors'"):
            write_safetensors(tmp_path / "a.safetensors", arrays.items(), layout_of(arrays))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


def test_an_error_in_the_iterator_leaves_no_file(tmp_path):
    def tensors():
        yield "a", mx.zeros(2)
        raise UserError("broken source")

    with pytest.raises(UserError, match="broken source"):
        write_safetensors(tmp_path / "a.safetensors", tensors(), {"a": (mx.float32, (2,)), "b": (mx.float32, (2,))})
    assert not [*tmp_path.iterdir()]


def test_neither_reading_nor_writing_keeps_tensors(tmp_path):
    """16 tensors of 1 MB are written and read; MLX never has more than one in memory."""
    layout = {f"t{i}": (mx.float32, (1 << 18,)) for i in range(16)}
    path = tmp_path / "a.safetensors"

    def tensors():
        for i, name in enumerate(layout):
            array = mx.full((1 << 18,), float(i))
            mx.eval(array)
            yield name, array
            del array

    start = active_memory()
    mx.reset_peak_memory()
    write_safetensors(path, tensors(), layout)
    file = SafetensorsFile(path)
    for i, name in enumerate(file.shapes):
        assert file.read(name)[-1].item() == i
    assert active_memory() == start
    assert mx.get_peak_memory() - start < 1.5 * (1 << 20)


def test_only_float64_is_converted(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    wide = np.random.default_rng(0).normal(size=(4, 3)) * 10.0 ** np.arange(-40, -28).reshape(4, 3)
    values = {"wide": wide, "special": np.array([np.inf, -np.inf, np.nan]), "half": np.ones(3, np.float16)}
    safetensors_numpy.save_file(values, tmp_path / "a.safetensors")
    found = read_all(tmp_path / "a.safetensors")
    assert found["half"].dtype == mx.float16
    for name in ("wide", "special"):
        assert found[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(found[name]), values[name].astype(np.float32))
    safetensors_numpy.save_file({"huge": np.array([1e39])}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: huge is float64 and has values out of the range of float32"):
        SafetensorsFile(tmp_path / "b.safetensors").read("huge")


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    safetensors_torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: w is F8_E4M3, expected one of"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    arrays = {"a": mx.arange(5), "b": mx.ones((2, 2), mx.float16)}
    write_safetensors(tmp_path / "whole.safetensors", arrays.items(), layout_of(arrays))
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(len(data)):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.safetensors: "):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_a_file_truncated_after_opening_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [("a", mx.arange(5))], {"a": (mx.int32, (5,))})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.safetensors: a has 16 of 20 bytes"):
        file.read("a")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read \(No such file"):
        file.read("a")


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F8_E5M2", "X", None, 3]),
        "shape": st.lists(st.integers(-2, 5), max_size=3) | st.none() | st.text(max_size=2),
        "data_offsets": st.lists(st.integers(-40, 80), max_size=3) | st.none() | st.just([0, 1.5]),
    },
)
JUNK = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=3)


@settings(deadline=None)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JUNK, max_size=3) | JUNK)
def test_any_header_is_read_or_refused_by_name(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    try:
        file = SafetensorsFile(path)
    except UserError as error:
        refused = str(error)
    else:
        refused = None
        for name, shape in file.shapes.items():
            assert file.read(name).shape == shape
    assert refused is None or (refused.startswith(f"{path}: ") and "\n" not in refused)
