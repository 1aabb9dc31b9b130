"""Aria's generation, rebuilt from its documented behaviour, as sides of a comparison: in MLX and in PyTorch.

Each variation has buffers for the keys and values of all 8,192 positions. A step writes one position of each layer and
attends to the positions up to it. Tokens are drawn by PyTorch: temperature, then min-p. There is no grammar, and
generation stops at the end of the buffers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np
from measuring import blas_threads, take

CONTEXT, HEAD_DIM, THETA, EPS = 8192, 64, 500_000.0, 1e-5
TEMPERATURE, MIN_P = 0.98, 0.035
CHUNK = 512  # tokens of a prompt that are read at once


def write_random(path: Path, rows: int, d_model: int, layers: int) -> Path:
    """Write random weights under Aria's names: heads of 64, feed-forward of 4 times the width, float32."""
    mx.random.seed(0)
    shapes = {"model.tok_embeddings.weight": (rows, d_model), "lm_head.weight": (rows, d_model)}
    wide = {"ff_gate_proj": (4 * d_model, d_model), "ff_up_proj": (4 * d_model, d_model)}
    square = {"mixed_qkv": (3 * d_model, d_model), "att_proj_linear": (d_model, d_model)}
    for i in range(layers):
        matrices = wide | square | {"ff_down_proj": (d_model, 4 * d_model)}
        shapes |= {f"model.encode_layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
    weights = {name: mx.random.normal(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = [f"encode_layers.{i}.norm{n}" for i in range(layers) for n in (1, 2)]
    for norm in (*norms, "out_layer_norm"):
        weights[f"model.{norm}.weight"] = 1 + 0.1 * mx.random.normal((d_model,))
        weights[f"model.{norm}.bias"] = 0.1 * mx.random.normal((d_model,))
    mx.save_safetensors(str(path), weights)
    return path


class Loop:
    """The network with its buffers. A subclass provides the framework: weights, buffers, norm, SiLU, attention."""

    def logits(self, ids, position: int):
        """Logits `(B, T, V)` of ids `(B, T)` that follow `position` tokens. Raises `ValueError` beyond the buffers."""
        if position + ids.shape[1] > CONTEXT:
            raise ValueError(f"{position + ids.shape[1]} tokens: Aria's buffers have {CONTEXT} positions")
        x = self.weights["tok_embeddings.weight"][ids]
        for i, buffers in enumerate(self.buffers):
            name = f"encode_layers.{i}"
            x = x + self._attention(self._norm(x, f"{name}.norm1"), name, buffers, position)
            y = self._norm(x, f"{name}.norm2")
            gate, up = self._linear(y, f"{name}.ff_gate_proj"), self._linear(y, f"{name}.ff_up_proj")
            x = x + self._linear(self._silu(gate) * up, f"{name}.ff_down_proj")
        return self._linear(self._norm(x, "out_layer_norm"), "lm_head")

    def _linear(self, x, name: str):
        return x @ self.weights[f"{name}.weight"].T


class MlxLoop(Loop):
    """The network in MLX, for some lanes."""

    def __init__(self, path: Path, lanes: int, dtype: str = "float32") -> None:
        self.dtype = getattr(mx, dtype)
        self.weights = {
            name.removeprefix("model."): array.astype(self.dtype) for name, array in mx.load(str(path)).items()
        }
        self.layers = sum(name.endswith("mixed_qkv.weight") for name in self.weights)
        d_model = self.weights["tok_embeddings.weight"].shape[1]
        shape = (lanes, d_model // HEAD_DIM, CONTEXT, HEAD_DIM)
        self.buffers = [[mx.zeros(shape, self.dtype) for _ in "kv"] for _ in range(self.layers)]
        mx.eval(self.weights, self.buffers)

    def _silu(self, x: mx.array) -> mx.array:
        return x * mx.sigmoid(x)

    def _norm(self, x: mx.array, name: str) -> mx.array:
        return mx.fast.layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)

    def _attention(self, x: mx.array, name: str, buffers: list[mx.array], position: int) -> mx.array:
        B, T, d_model = x.shape
        end = position + T
        qkv = self._linear(x, f"{name}.mixed_qkv").reshape(B, T, 3, -1, HEAD_DIM)
        q, k, v = (qkv[:, :, j].swapaxes(1, 2) for j in range(3))  # (B, H, T, D) each
        q, k = (mx.fast.rope(a, HEAD_DIM, traditional=False, base=THETA, scale=1.0, offset=position) for a in (q, k))
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, position:end] = new
        keys, values = (buffer[:, :, :end] for buffer in buffers)
        y = mx.fast.scaled_dot_product_attention(q, keys, values, scale=HEAD_DIM**-0.5, mask="causal")
        return self._linear(y.swapaxes(1, 2).reshape(B, T, d_model), f"{name}.att_proj_linear")

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits `(B, V)` after a prompt `(T,)`, read in chunks by all lanes."""
        lanes = self.buffers[0][0].shape[0]
        for begin in range(0, len(ids), CHUNK):
            chunk = mx.broadcast_to(
                mx.array(ids[None, begin : begin + CHUNK]), (lanes, len(ids[begin : begin + CHUNK]))
            )
            logits = self.logits(chunk, begin)[:, -1]
            mx.eval(logits, self.buffers)
        return self._host(logits)

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Logits `(B, V)` after one more token `(B,)` in each lane."""
        return self._host(self.logits(mx.array(tokens[:, None]), position)[:, 0])

    def _host(self, logits: mx.array) -> np.ndarray:
        return np.array(logits.astype(mx.float32))


class TorchLoop(Loop):
    """The network in PyTorch; methods as in `MlxLoop`."""

    def __init__(self, path: Path, lanes: int, dtype: str = "float32") -> None:
        import torch
        from safetensors.torch import load_file

        self.torch, self.dtype = torch, getattr(torch, dtype)
        torch.set_num_threads(blas_threads() or torch.get_num_threads())
        self.weights = {name.removeprefix("model."): tensor.to(self.dtype) for name, tensor in load_file(path).items()}
        self.layers = sum(name.endswith("mixed_qkv.weight") for name in self.weights)
        self.lanes, d_model = lanes, self.weights["tok_embeddings.weight"].shape[1]
        shape = (lanes, d_model // HEAD_DIM, CONTEXT, HEAD_DIM)
        self.buffers = [[torch.zeros(shape, dtype=self.dtype) for _ in "kv"] for _ in range(self.layers)]
        angle = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.cos, self.sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)  # (T, D / 2)

    def _silu(self, x):
        return self.torch.nn.functional.silu(x)

    def _norm(self, x, name: str):
        norm, shape = self.torch.nn.functional.layer_norm, x.shape[-1:]
        return norm(x, shape, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)

    def _rotated(self, x, position: int):
        cos, sin = (table[position : position + x.shape[2]] for table in (self.cos, self.sin))
        a, b = x.chunk(2, -1)
        return self.torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def _attention(self, x, name: str, buffers: list, position: int):
        B, T, d_model = x.shape
        end = position + T
        qkv = self._linear(x, f"{name}.mixed_qkv").reshape(B, T, 3, -1, HEAD_DIM)
        q, k, v = (qkv[:, :, j].transpose(1, 2) for j in range(3))
        for buffer, new in zip(buffers, (self._rotated(k, position), v), strict=True):
            buffer[:, :, position:end] = new
        keys, values = (buffer[:, :, :end] for buffer in buffers)
        visible = self.torch.ones(T, end, dtype=self.torch.bool).tril(position)
        attend = self.torch.nn.functional.scaled_dot_product_attention
        y = attend(self._rotated(q, position), keys, values, attn_mask=visible)
        return self._linear(y.transpose(1, 2).reshape(B, T, d_model), f"{name}.att_proj_linear")

    def read(self, ids: np.ndarray) -> np.ndarray:
        """See `MlxLoop.read`."""
        with self.torch.inference_mode():
            for begin in range(0, len(ids), CHUNK):
                chunk = self.torch.from_numpy(ids[None, begin : begin + CHUNK]).expand(self.lanes, -1)
                logits = self.logits(chunk, begin)[:, -1]
            return logits.float().numpy()

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """See `MlxLoop.step`."""
        with self.torch.inference_mode():
            return self.logits(self.torch.from_numpy(tokens[:, None]), position)[:, 0].float().numpy()


def draw(logits: np.ndarray) -> np.ndarray:
    """Draw a token of each lane `(B,)` from logits `(B, V)`, in PyTorch."""
    import torch

    probabilities = torch.softmax(torch.from_numpy(logits) / TEMPERATURE, dim=-1)
    kept = probabilities >= MIN_P * probabilities.max(dim=-1, keepdim=True).values
    return torch.multinomial(probabilities * kept, 1)[:, 0].numpy()


def logits_of(loop: type, path: Path, dtype: str, ids: np.ndarray, last: int) -> np.ndarray:
    """Logits `(1 + last, V)` after each of the last ids of `(T,)`: the others are read at once, these one by one."""
    network = loop(path, 1, dtype)
    rows = [network.read(ids[: len(ids) - last])]
    rows += [network.step(ids[i : i + 1], i) for i in range(len(ids) - last, len(ids))]
    return np.concatenate(rows)


def playing(loop: type, path: Path, dtype: str, lanes: int, position: int, tokens: int) -> Callable[[], None]:
    """A turn draws some tokens in each lane after `position` tokens. The buffers' content costs no time."""
    network = loop(path, lanes, dtype)

    def steps() -> Iterator[np.ndarray]:
        logits = np.zeros((lanes, network.weights["lm_head.weight"].shape[0]), np.float32)
        for at in count(position):
            drawn = draw(logits)
            yield drawn
            logits = network.step(drawn, at)

    return partial(take, steps(), tokens)
