"""Long memories in PyTorch: arrays that grow with the music, and attention over them in blocks.

`dsmr_mlx.model.memory_blocks` defines when a memory is long. `torch.compile` does not trace the two operators, so one
graph serves memories of any length. Each lane attends separately, over its own music only.
"""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from dsmr_mlx.model import memory_blocks


class Memory:
    """Keys or values `(B, H_kv, n, D)` of a long memory, oldest first, without gradient.

    It is immutable: `appended` returns a new memory, and this one stays usable. New slots are written after the old
    ones while the array has room, so appending seldom copies. Appending to the same memory again makes a new array.
    """

    def __init__(self, slots: Tensor):
        self.array, self.start, self.end = slots, 0, slots.shape[2]
        self.written = [self.end]  # used slots of the array, shared by all its memories

    @property
    def slots(self) -> Tensor:
        """All slots, a view `(B, H_kv, n, D)`."""
        return self.array[:, :, self.start : self.end]

    def appended(self, new: Tensor, keep: int) -> Self:
        """Return the newest `keep` slots of this memory followed by `new` `(B, H_kv, T, D)`."""
        n, other = new.shape[2], object.__new__(type(self))
        if self.written[0] == self.end and self.end + n <= self.array.shape[2]:
            other.array, other.start, other.written = self.array, self.start, self.written
        else:
            B, heads, _, D = new.shape
            kept = self.slots[:, :, max(self.end - self.start + n - keep, 0) :]
            other.start, other.end = 0, kept.shape[2]
            other.array = new.new_empty(B, heads, other.end + n + max(n, keep // 8), D)
            other.array[:, :, : other.end] = kept
            other.written = [other.end]
        first = other.written[0]
        # Through `data`: slots that an autograd graph refers to are never written again.
        other.array.data[:, :, first : first + n] = new
        other.end = other.written[0] = first + n
        other.start = max(other.start, other.end - keep)
        return other


def attend_long(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention `(B, H, T, D)` of T queries over memory and themselves; memory is a constant.

    q: `(B, H, T, D)`; k, v: `(B, H_kv, T, D)`, the keys and values of the same tokens, seen causally
    keys, values: `(B, H_kv, n, D)`, the memory, oldest first; lengths: `(B,)`, how many of the newest each lane sees
    """
    (B, H, T, D), heads = q.shape, k.shape[1]
    # The queries of a group of heads become the rows of one matrix.
    grouped = (q * D**-0.5).reshape(B, heads, H // heads * T, D)
    y, _ = memory_attention(grouped, k, v, keys, values, lengths)
    return y.reshape(B, H, T, D)


@torch.library.custom_op("dsmr::memory_attention", mutates_args=())
def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the attention `(B, H_kv, R, D)` of scaled queries, and the logarithms of the sums of exp(scores).

    q: `(B, H_kv, R, D)`, R = groups · T; the logarithms are `(B, H_kv, R, 1)`, float32. See `attend_long`.
    """
    y, logsums = torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)
    for b, n in enumerate(lengths.tolist()):
        scores = _causal_scores(q[b], k[b])
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total, mean = weights.sum(-1, keepdim=True), (weights.to(v) @ v[b]).float()
        for block in _blocks(n, keys.shape[2]):
            scores = (q[b] @ keys[b, :, block].mT).float()  # (H_kv, R, C)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, rescale = scores.sub_(higher).exp_(), (top - higher).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            mean = mean.mul_(rescale).add_(weights.to(v) @ values[b, :, block])
            top = higher
        y[b], logsums[b] = mean / total, top + total.log()
    return y, logsums


@torch.library.custom_op("dsmr::memory_attention_gradient", mutates_args=())
def memory_attention_gradient(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    y: Tensor,
    logsums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. The weights are computed again, block by block."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    total = (dy.float() * y.float()).sum(-1, keepdim=True)
    for b, n in enumerate(lengths.tolist()):
        weights = _causal_scores(q[b], k[b]).sub_(logsums[b]).exp_()
        dv[b] = weights.to(dy).mT @ dy[b]
        dscores = weights.mul_((dy[b] @ v[b].mT).float().sub_(total[b])).to(q)
        dk[b] = dscores.mT @ q[b]
        sums = (dscores @ k[b]).float()
        for block in _blocks(n, keys.shape[2]):
            weights = (q[b] @ keys[b, :, block].mT).float().sub_(logsums[b]).exp_()
            dscores = weights.mul_((dy[b] @ values[b, :, block].mT).float().sub_(total[b])).to(q)
            sums += dscores @ keys[b, :, block]
        dq[b] = sums
    return dq, dk, dv


def _causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the scores `(H_kv, R, T)`, float32, of the rows of each head, in the order of the tokens, over k."""
    T = k.shape[1]
    unseen = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1).repeat(q.shape[1] // T, 1)
    return (q @ k.mT).float().masked_fill_(unseen, -torch.inf)


def _blocks(n: int, slots: int) -> Iterator[slice]:
    """Yield blocks of the newest n slots."""
    for start in range(slots - n, slots, memory_blocks.BLOCK):
        yield slice(start, min(start + memory_blocks.BLOCK, slots))


@memory_attention.register_fake
def _(q, k, v, keys, values, lengths):
    return torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


@memory_attention_gradient.register_fake
def _(dy, q, k, v, keys, values, lengths, y, logsums):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, dy, _) -> tuple[Tensor | None, ...]:
    return *memory_attention_gradient(dy.contiguous(), *ctx.saved_tensors), None, None, None


memory_attention.register_autograd(_gradient, setup_context=_save)
