"""The recurrent state: what every layer remembers of the music before the current segment.

One allocation per layer for keys and one for values, `[B, H_kv, M_l + S, D]`:

    | memory: a ring of M_l slots     | working segment: S slots          |
      slot = clock mod M_l              slot = M_l + (clock mod S)

All lanes share one clock, the number of tokens that the batch has stepped; a lane's own start on that clock
says which slots hold its piece. A full working segment is copied into the ring when the next one is opened.

The arrays of a state are values: a model call returns a new state and leaves the old one usable, and MLX
writes in place as soon as nobody holds the old one.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.config import ModelConfig
from dsmr_mlx.errors import UserError
from dsmr_mlx.rotary import rotate

LayerState = tuple[mx.array, mx.array]  # keys (rotated) and values, each [B, H_kv, M_l + S, D]


@dataclass(frozen=True)
class Window:
    """Where a chunk of T tokens stands in the state: all that attention needs besides the arrays.

    slot:   offset of the chunk in the working segment
    offset: `[B]` int32, position of the chunk's first token in each lane, less what was re-based
    masks:  per horizon a bool array `[B, 1, T, M + S]` (True = attend), or "causal" where the whole memory
            is visible and the chunk is a whole segment (lower-right aligned)
    """

    slot: int
    offset: mx.array
    masks: dict[int, mx.array | str]


@dataclass
class RecurrentState:
    """The memory of B lanes of music, each at its own position in its own piece.

    layers:  per layer (keys, values), each `[B, H_kv, M_l + S, D]`
    clock:   tokens that all lanes have stepped together
    starts:  `[B]` int64, the clock at which each lane's piece began
    rebased: `[B]` int64, how far each lane's rotary positions have been shifted back (endless streams)
    """

    config: ModelConfig
    layers: list[LayerState]
    clock: int
    starts: np.ndarray
    rebased: np.ndarray

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, dtype: mx.Dtype = mx.float32) -> Self:
        """B lanes that have heard nothing; all memory is allocated here."""

        def slots(horizon: int) -> mx.array:
            return mx.zeros((batch_size, config.n_kv_heads, horizon + config.segment_length, config.head_dim), dtype)

        layers = [(slots(horizon), slots(horizon)) for horizon in config.horizons]
        zeros = np.zeros(batch_size, np.int64)
        return cls(config, layers, 0, zeros, zeros.copy())

    @property
    def batch_size(self) -> int:
        return len(self.starts)

    @property
    def dtype(self) -> mx.Dtype:
        """Of the keys and values."""
        return self.layers[0][0].dtype

    @property
    def position(self) -> np.ndarray:
        """`[B]` int64: how many tokens of its piece each lane has read."""
        return self.clock - self.starts

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values: constant from the first token to the last."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array of the state, for `mx.eval`."""
        return [array for layer in self.layers for array in layer]

    @property
    def segment_room(self) -> int:
        """Tokens that still fit into the current segment (S at a segment boundary)."""
        return self.config.segment_length - self.clock % self.config.segment_length

    @property
    def has_room(self) -> bool:
        """Whether every lane can go on: false only at the end of a table of learned positions."""
        return self.config.max_positions is None or bool(self.position.max() < self.config.max_positions)

    def copy(self) -> Self:
        """A state that can be advanced or reset on its own; shares arrays until they are written."""
        return dataclasses.replace(
            self, layers=list(self.layers), starts=self.starts.copy(), rebased=self.rebased.copy()
        )

    def take(self, lanes: Sequence[int]) -> Self:
        """The state with these lanes, in this order; a lane may be taken several times (one prefill, n variations)."""
        index = mx.array(list(lanes), mx.int32)
        layers = [(mx.take(k, index, axis=0), mx.take(v, index, axis=0)) for k, v in self.layers]
        return dataclasses.replace(
            self, layers=layers, starts=self.starts[list(lanes)], rebased=self.rebased[list(lanes)]
        )

    def reset(self, lanes: Sequence[int] | None = None) -> Self:
        """Empty the memory of some lanes, or of all: their next token is position 0 of a new piece.

        Changes this state and returns it. Costs nothing: stale slots become invisible, not zero.
        Raises `ValueError` if only some lanes are named away from a segment boundary, or for a lane that is
        not there.
        """
        if lanes is None:
            lanes = range(self.batch_size)
        lanes = list(lanes)
        if any(not 0 <= lane < self.batch_size for lane in lanes):
            raise ValueError(f"lanes = {lanes}: expected lanes from 0 to {self.batch_size - 1}")
        within_segment = self.clock % self.config.segment_length
        if within_segment and set(lanes) == set(range(self.batch_size)):
            self.clock = 0
        elif within_segment and lanes:
            raise ValueError(
                f"lanes {lanes} of {self.batch_size} at {within_segment} tokens into a "
                f"segment of {self.config.segment_length}: single lanes can be reset at a segment boundary only"
            )
        self.starts[lanes] = self.clock
        self.rebased[lanes] = 0
        return self

    def to_arrays(self) -> dict[str, mx.array]:
        """Everything that defines the state, as named arrays for a safetensors file; `from_arrays` takes them back."""
        named = {
            f"layers.{i}.{name}": array
            for i, layer in enumerate(self.layers)
            for name, array in zip(("keys", "values"), layer, strict=True)
        }
        clocks = {"clock": self.clock, "starts": self.starts, "rebased": self.rebased}
        return named | {name: mx.array(np.asarray(value, np.int64)) for name, value in clocks.items()}

    @classmethod
    def from_arrays(cls, config: ModelConfig, arrays: dict[str, mx.array]) -> Self:
        """The state that `to_arrays` described. Raises `UserError` if it does not fit the model's configuration."""
        try:
            starts, rebased = np.array(arrays["starts"]), np.array(arrays["rebased"])
            layers = [(arrays[f"layers.{i}.keys"], arrays[f"layers.{i}.values"]) for i in range(config.n_layers)]
            clock = arrays["clock"].item()
        except KeyError as error:
            raise UserError(f"recurrent state: {error} is missing") from None
        for i, (layer, horizon) in enumerate(zip(layers, config.horizons, strict=True)):
            expected = (len(starts), config.n_kv_heads, horizon + config.segment_length, config.head_dim)
            for array in layer:
                if array.shape != expected:
                    raise UserError(f"recurrent state: layer {i} has shape {array.shape}, expected {expected}")
        return cls(config, layers, clock, starts, rebased)

    def opened(self) -> Self:
        """The state ready for the next chunk: at a segment boundary the full segment moves into the rings."""
        at_boundary = self.clock > 0 and self.clock % self.config.segment_length == 0
        if not at_boundary:
            return self
        state = dataclasses.replace(self, layers=self._committed())
        # Learned positions are looked up where they are, and their table ends the stream.
        endless = self.config.max_positions is None
        far = (self.position - self.rebased).max() >= rebase_interval(self.config)
        return state._rebased() if endless and far else state

    def _committed(self) -> list[LayerState]:
        """The layers with the last min(S, M) entries of the working segment copied to their slots in the ring."""
        segment = self.config.segment_length
        recent = [
            tuple(mx.contiguous(slots[:, :, max(horizon, segment) :]) for slots in layer)
            for layer, horizon in zip(self.layers, self.config.horizons, strict=True)
        ]
        # Evaluated, these copies let go of the slots, which are then written in place instead of copied whole.
        mx.eval(recent)
        return [
            tuple(write_ring(slots, new, self.clock, horizon) for slots, new in zip(layer, news, strict=True))
            for layer, news, horizon in zip(self.layers, recent, self.config.horizons, strict=True)
        ]

    def _rebased(self) -> Self:
        """Shift all rotary positions back by one common offset, so that an endless stream keeps its precision.

        Scores depend on distances only, hence nothing else changes. The interval exceeds the age of the oldest
        slot, so no key is rotated twice and rounding does not add up.
        """
        interval = rebase_interval(self.config)
        layers = [
            (rotate(k.reshape(-1, 1, k.shape[-1]), self.config, -interval).reshape(k.shape), v) for k, v in self.layers
        ]
        return dataclasses.replace(self, layers=layers, rebased=self.rebased + interval)

    def advanced(self, layers: list[LayerState], n: int) -> Self:
        """The state after n more tokens, whose keys and values are already in `layers`."""
        return dataclasses.replace(
            self, layers=layers, clock=self.clock + n, starts=self.starts.copy(), rebased=self.rebased.copy()
        )

    def window(self, n: int, counts: np.ndarray | None = None) -> Window:
        """Where the next n tokens stand; they must fit into the current segment, which must be opened.

        counts `[B]`: how many of the n belong to the lane's piece, the others being padding; None: all. Raises
        `UserError` if a piece goes past the model's learned positions.
        """
        self._check_positions(np.full(self.batch_size, n) if counts is None else counts)
        slot = self.clock % self.config.segment_length
        offset = mx.array((self.position - self.rebased).astype(np.int32))
        masks = {horizon: self._mask(horizon, slot, n) for horizon in set(self.config.horizons)}
        return Window(slot, offset, masks)

    def _check_positions(self, counts: np.ndarray) -> None:
        table = self.config.max_positions
        longest = np.where(counts > 0, self.position + counts, 0).max()
        if table is not None and longest > table:
            raise UserError(
                f"max_positions = {table}: the model has no position {longest - 1}, counted from 0; expected streams "
                f"of at most {table} tokens, or a model with rotary positions alone"
            )

    def _mask(self, horizon: int, slot: int, n: int) -> mx.array | str:
        segment = self.config.segment_length
        remembered = self._remembered(horizon)  # [B, M]
        if n == segment and remembered.all():
            return "causal"
        causal = mx.arange(segment) <= mx.arange(slot, slot + n)[:, None]  # [T, S]
        return mx.concatenate(
            [
                mx.broadcast_to(mx.array(remembered)[:, None, None], (self.batch_size, 1, n, horizon)),
                mx.broadcast_to(causal, (self.batch_size, 1, n, segment)),
            ],
            axis=-1,
        )

    def _remembered(self, horizon: int) -> np.ndarray:
        """`[B, M]` bool: which ring slots hold a token of each lane's current piece.

        With s the clock at the segment's start, slot j holds the newest clock p < s with p = j (mod M).
        """
        start = self.clock - self.clock % self.config.segment_length
        slots = np.arange(horizon)
        written = start - 1 - (start - 1 - slots) % max(horizon, 1)
        return (written >= 0) & (written >= self.starts[:, None])


def write_ring(slots: mx.array, recent: mx.array, clock: int, horizon: int) -> mx.array:
    """Write `[B, H_kv, n, D]`, n ≤ M, the entries of the n clocks before `clock`, into the ring that opens `slots`."""
    n = recent.shape[2]
    if n == 0:
        return slots
    first = (clock - n) % horizon
    before_wrap = min(n, horizon - first)
    slots = mx.slice_update(slots, recent[:, :, :before_wrap], mx.array([first]), axes=(2,))
    if before_wrap < n:
        slots = mx.slice_update(slots, recent[:, :, before_wrap:], mx.array([0]), axes=(2,))
    return slots


def rebase_interval(config: ModelConfig) -> int:
    """Tokens between two re-basings: far above the oldest slot's age, far below float32's loss of precision."""
    oldest = max(config.horizons) + config.segment_length
    return max(8192, 1 << (2 * oldest - 1).bit_length())
