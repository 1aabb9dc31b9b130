"""The slots of tokens in a layer's arrays, and how a full segment is committed to memory and the commit undone.

Tokens are counted in steps, see `RecurrentState`. In each array a working segment of S slots follows the memory. A
commit copies the newest entries of the full segment to the memory, which evicts S entries.
"""

from copy import copy
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from dsmr_mlx.model.config import CANON_WIDTH, ModelConfig


def write(slots: mx.array, new: mx.array, place: int | mx.array, axis: int) -> mx.array:
    """Return the slots with `new` entries from `place` on along an axis, in place if nothing else refers to the slots.

    place: an int; for one entry also an int32 scalar array, so that a compiled step serves all places. (On Metal, an
        MLX slice at such a place takes two kernels, this one.)
    """
    if isinstance(place, int):
        written = copy(slots)
        written[(*[slice(None)] * axis, slice(place, place + new.shape[axis]))] = new
        return written
    return mx.put_along_axis(slots, mx.broadcast_to(place, new.shape), new, axis=axis)


def read(slots: mx.array, n: int, place: int | mx.array, axis: int) -> mx.array:
    """Return the n slots from `place` on along an axis; place: an int or an int32 scalar array, see `write`."""
    if isinstance(place, int):
        return slots[(*[slice(None)] * axis, slice(place, place + n))]
    return mx.take(slots, place + _offsets(n), axis=axis)


@cache
def _offsets(n: int) -> mx.array:
    """Return 0 … n − 1, int32; always the same array, so that a compiled step adds it only once."""
    return mx.array(list(range(n)), mx.int32)


class Ring(NamedTuple):
    """Keys or values, `(B, H_kv, M + S, D)`. The memory is a ring of M slots: step p is in slot p mod M."""

    heads: int
    head_dim: int
    memory: int
    segment: int

    def shape(self, batch_size: int, slots: int) -> tuple[int, ...]:
        """Return the shape of an array of `slots` slots."""
        return batch_size, self.heads, slots, self.head_dim

    def newest(self, slots: mx.array) -> mx.array:
        """Return the entries of a full segment that a commit keeps, the last min(S, M)."""
        return slots[:, :, max(self.memory, self.segment) :]

    def evicted(self, slots: mx.array, step: int) -> mx.array:
        """Return the S entries that a commit before `step` removes: from the ring or, if M < S, from the segment."""
        n = min(self.segment, self.memory)
        from_segment = slots[:, :, self.memory : self.memory + self.segment - n]
        return mx.concatenate([self._read(slots, n, step), from_segment], axis=2)

    def commit(self, slots: mx.array, newest: mx.array, step: int) -> mx.array:
        """Return the slots with the `newest` entries, of the tokens before `step`, in memory."""
        n = newest.shape[2]
        if n == 0:
            return slots
        first, before_wrap = self._span(n, step)
        slots = mx.slice_update(slots, newest[:, :, :before_wrap], mx.array([first]), axes=(2,))
        if before_wrap < n:
            slots = mx.slice_update(slots, newest[:, :, before_wrap:], mx.array([0]), axes=(2,))
        return slots

    def undo(self, slots: mx.array, evicted: mx.array, step: int) -> mx.array:
        """Return the slots with the commit before `step` undone, given the entries that `evicted` returned then."""
        n = min(self.segment, self.memory)
        # The last n entries of the segment are in the ring; the others, which came before them, were evicted at once.
        segment = mx.concatenate([evicted[:, :, n:], self._read(slots, n, step)], axis=2)
        slots = self.commit(slots, evicted[:, :, :n], step)
        return mx.slice_update(slots, segment, mx.array([self.memory]), axes=(2,))

    def _read(self, slots: mx.array, n: int, step: int) -> mx.array:
        """Return `(B, H_kv, n, D)`, n ≤ M: the ring's entries that `commit` would overwrite."""
        if n == 0:
            return slots[:, :, :0]
        first, before_wrap = self._span(n, step)
        return mx.concatenate([slots[:, :, first : first + before_wrap], slots[:, :, : n - before_wrap]], axis=2)

    def _span(self, n: int, step: int) -> tuple[int, int]:
        """Return the first slot of the n tokens before `step`, and how many of them come before the ring wraps."""
        first = (step - n) % self.memory
        return first, min(n, self.memory - first)


class Tail(NamedTuple):
    """Inputs of a Canon layer, `(B, W − 1 + S, d_model)`. The memory holds the W − 1 tokens before the segment.

    They are in order, so that every token follows the W − 1 before it.
    """

    width: int
    memory: int
    segment: int

    def shape(self, batch_size: int, slots: int) -> tuple[int, ...]:
        """Return the shape of an array of `slots` slots."""
        return batch_size, slots, self.width

    def newest(self, slots: mx.array) -> mx.array:
        """Return the entries that a commit keeps, the last W − 1."""
        return slots[:, self.segment :]

    def evicted(self, slots: mx.array, step: int) -> mx.array:
        """Return the S entries that a commit removes, the oldest."""
        return slots[:, : self.segment]

    def commit(self, slots: mx.array, newest: mx.array, step: int) -> mx.array:
        """Return the slots with the `newest` entries in memory."""
        return mx.slice_update(slots, newest, mx.array([0]), axes=(1,))

    def undo(self, slots: mx.array, evicted: mx.array, step: int) -> mx.array:
        """Return the slots with the last commit undone, given the entries that `evicted` returned then."""
        return mx.concatenate([evicted, slots[:, : self.memory]], axis=1)


def layer_slots(config: ModelConfig, layer: int) -> dict[str, Ring | Tail]:
    """Return the slots of each array of a layer's state by name."""
    S = config.segment_length
    ring = Ring(config.n_kv_heads, config.head_dim, config.horizons[layer], S)
    tail = Tail(config.d_model, CANON_WIDTH - 1, S)
    slots: dict[str, Ring | Tail] = {"keys": ring, "values": ring}
    return slots | ({"attention_canon": tail, "feed_forward_canon": tail} if config.canon else {})
