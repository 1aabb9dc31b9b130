"""State dicts with all types of tensors, and their comparison with a source."""

import mlx.core as mx
import torch

from dsmr_mlx.convert.weights_source import WeightsSource

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *WIDE_UNSIGNED)
MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.arange(2.0)}


def state_dict(seed: int = 0) -> dict:
    """Return tensors of every type and shape in checkpoints; floats have random bits, including NaNs and subnormals."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for dtype in FLOATS:
        data = torch.randint(0, 256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=random)
        state[f"layers.{dtype}"] = data.view(dtype).reshape(4, 6)
    for dtype in INTEGERS:
        state[f"buffers.{dtype}"] = torch.randint(0, 100, (3, 2), generator=random).to(dtype)
    state["mask"] = torch.ones(1, 1, 3, 3).tril().bool()
    state["freqs_cis"] = torch.polar(torch.ones(2), torch.ones(2))
    state["step"] = torch.tensor(7)
    state["scale"] = torch.tensor(1.5, dtype=torch.bfloat16)
    state["empty"] = torch.zeros(0, 3)
    return state


def assert_holds(source: WeightsSource, state: dict) -> None:
    """Assert that a source has exactly these tensors, bit for bit (float64 rounded to float32)."""
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = dict(source.dtypes)
    assert [*dtypes] == [*source.shapes]
    for name, tensor in state.items():
        found = source.read(name)
        expected = tensor.detach().float() if tensor.dtype == torch.float64 else tensor.detach()
        assert str(found.dtype).removeprefix("mlx.core.").rstrip("_") == str(expected.dtype).removeprefix("torch.")
        assert found.dtype == dtypes[name]
        assert found.shape == tuple(expected.shape)
        raw = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(found.reshape(-1).view(mx.uint8)) == raw, name
