"""The transforms that turn stored tensors into a parameter, by name.

Shapes: d model width, H query heads, H_kv key/value heads, D head dimension. Transforms that compute values do so in
float32, and return it; the others keep the bits of their inputs. All state the shape of their result, so that a
checkpoint is checked before any tensor is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from dsmr_mlx.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A named function of stored arrays.

    shape     shapes of the inputs → shape of the result; raises `ValueError` for invalid inputs
    apply     inputs, configuration of the model → result
    joins     whether it takes several tensors
    shows     whether its inputs prove that the original has this parameter
    computes  whether it computes values, in float32
    """

    shape: Callable[[Sequence[Shape]], Shape]
    apply: Callable[[Sequence[mx.array], ModelConfig], mx.array]
    joins: bool = False
    shows: bool = True
    computes: bool = False


TRANSFORMS: dict[str, Transform] = {}


def transform(shape: Callable[[Sequence[Shape]], Shape], **properties: bool) -> Callable:
    """Register a function under its name, with properties of `Transform`."""

    def register(apply: Callable) -> Callable:
        TRANSFORMS[apply.__name__] = Transform(shape, apply, **properties)
        return apply

    return register


def _same(shapes: Sequence[Shape]) -> Shape:
    return shapes[0]


def _transposed(shapes: Sequence[Shape]) -> Shape:
    return _matrix(shapes[0])[::-1]


def _row(shapes: Sequence[Shape]) -> Shape:
    return _matrix(shapes[0])[:1]


def _stacked(shapes: Sequence[Shape]) -> Shape:
    if any(len(shape) == 0 or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError("their shapes differ in more than the first dimension")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _stacked_transposed(shapes: Sequence[Shape]) -> Shape:
    return _stacked([_matrix(shape)[::-1] for shape in shapes])


def _matrix(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise ValueError("not a matrix")
    return shape


@transform(_same)
def identity(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Return the stored tensor unchanged."""
    return arrays[0]


@transform(_stacked, joins=True)
def concatenate(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Stack rows, for separate q, k, v or gate, up."""
    return mx.concatenate(arrays, axis=0)


@transform(_transposed)
def transpose(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Transpose a weight stored as `(in, out)`, as by Conv1D of GPT-2."""
    return arrays[0].T


@transform(_stacked_transposed, joins=True)
def concatenate_transposed(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Join several weights stored as `(in, out)`."""
    return mx.concatenate([array.T for array in arrays], axis=0)


@transform(_same, computes=True)
def add_one(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Restore the gain of a norm that is stored minus 1."""
    return arrays[0].astype(mx.float32) + 1


@transform(_same, computes=True)
def add_one_scale_if_tied(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Restore the gain of the last norm, stored minus 1, if the original scales the logits of a tied head by d^-0.5."""
    gain = add_one(arrays, config)
    return scale_by_width([gain], config) if config.tie_embeddings else gain


@transform(_same, computes=True)
def scale_by_width(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Multiply by d^-0.5."""
    return arrays[0].astype(mx.float32) * config.d_model**-0.5


@transform(_same)
def swap_halves(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Put the second half of the rows first, for [up, gate]."""
    return mx.concatenate(mx.split(arrays[0], 2, axis=0)[::-1], axis=0)


@transform(_same)
def split_groups(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Reorder a joint weight or bias with, for each key/value head, its query heads, its key and its value.

    Returns all q, then all k, then all v. With H = H_kv the input is [q, k, v] for every head, as in GPT-NeoX.
    """
    (joint,), per_group = arrays, config.n_heads // config.n_kv_heads
    groups = joint.reshape(config.n_kv_heads, per_group + 2, config.head_dim, *joint.shape[1:])
    parts = (groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1])
    return mx.concatenate([part.reshape(-1, *joint.shape[1:]) for part in parts], axis=0)


@transform(_stacked, joins=True)
def concatenate_untiled(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Join q, k, v if query head h of the original uses key/value head h mod H_kv; here it uses h // (H / H_kv)."""
    q, *others = arrays
    heads = q.reshape(-1, config.n_kv_heads, config.head_dim, *q.shape[1:])  # (H / H_kv, H_kv, D, d)
    return mx.concatenate([heads.swapaxes(0, 1).reshape(q.shape), *others], axis=0)


@transform(_same)
def untile_columns(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Reorder the output weight `(d, H D)` to match `concatenate_untiled`."""
    (out,) = arrays
    heads = out.reshape(out.shape[0], -1, config.n_kv_heads, config.head_dim)  # (d, H / H_kv, H_kv, D)
    return heads.swapaxes(1, 2).reshape(out.shape)


@transform(_row, shows=False)
def zero_bias(arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
    """Return zeros for the bias of a weight `(out, in)`, if the original has a bias only in the neighbouring layer."""
    return mx.zeros(arrays[0].shape[:1], arrays[0].dtype)
