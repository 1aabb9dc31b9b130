"""Canon layers (Allen-Zhu 2025): short, causal, depthwise convolutions, added to their input.

The inputs of the W − 1 tokens before the segment come from the recurrent state. They have no gradient, and are zero
before the start of a piece. The custom gradient makes about half the passes over `(B, T, d_model)` that automatic
differentiation makes.
"""

import mlx.core as mx
import mlx.nn as nn

from dsmr_mlx.model.config import CANON_WIDTH
from dsmr_mlx.model.slots import read, write


class Canon(nn.Module):
    """x_t + Σ_j w_j ⊙ x_{t − W + 1 + j}, with weight `(d_model, W)`; initially the weights are 0, so it is x_t."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = mx.zeros((width, CANON_WIDTH))

    def __call__(
        self, x: mx.array, inputs: mx.array, slot: int | mx.array, known: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Return the output `(B, T, d_model)` for x of that shape, and the inputs with x, without gradient.

        inputs: `(B, W − 1 + S, d_model)`, see `slots.Tail`
        slot, known: of the chunk, see `state.Window`
        """
        T = x.shape[1]
        inputs = mx.stop_gradient(write(inputs, x.astype(inputs.dtype), slot + (CANON_WIDTH - 1), axis=1))
        # From the new inputs, so that the old ones have no other use and can be written in place.
        seen = read(inputs, T + CANON_WIDTH - 1, slot, axis=1).astype(x.dtype)
        if T > 1:
            return _convolution(x, self.weight, seen if known is None else mx.where(known, seen, 0)), inputs
        # One token: tap by tap, so that this is one kernel; the last tap is x itself, which has a gradient.
        taps = _windows(seen)[:-1]
        if known is not None:
            taps = [mx.where(k, tap, 0) for k, tap in zip(_windows(known)[:-1], taps, strict=True)]
        return _mixed(x, self.weight, [*taps, x]), inputs


@mx.custom_function
def _convolution(x, weight, seen):
    """Return the output for x; seen: `(B, W − 1 + T, d_model)`, a constant: the inputs before x, and those of x."""
    return _mixed(x, weight, _windows(seen))


def _mixed(x: mx.array, weight: mx.array, taps: list[mx.array]) -> mx.array:
    """Return x plus W weighted taps, each `(B, T, d_model)`."""
    return sum((w * tap for w, tap in zip(_rows(weight), taps, strict=True)), x)


@_convolution.vjp
def _gradient(primals, dy, _):
    _, weight, seen = primals
    # x_t also contributes to the W − 1 outputs after it; those after the chunk have no gradient.
    later = _windows(mx.pad(dy, [(0, 0), (0, CANON_WIDTH - 1), (0, 0)]))
    dx = sum((w * d for w, d in zip(_rows(weight), reversed(later), strict=True)), dy)
    # In float32: in 16 bits a sum over all tokens would lose small terms.
    dweight = [(dy.astype(mx.float32) * tap).sum(axis=(0, 1)) for tap in _windows(seen)]
    return dx, mx.stack(dweight, axis=-1).astype(weight.dtype), mx.zeros_like(seen)


def _windows(rows: mx.array) -> list[mx.array]:
    """Return the W windows of T successive rows of `(B, W − 1 + T, d_model)`, from the first on."""
    T = rows.shape[1] - (CANON_WIDTH - 1)
    return [rows[:, j : j + T] for j in range(CANON_WIDTH)]


def _rows(weight: mx.array) -> list[mx.array]:
    """Return the weights `(1, d_model)` of each place, the oldest token first."""
    return mx.split(weight.T, CANON_WIDTH, axis=0)
