"""The recurrent state: the memory of every layer and the current segment.

One allocation per layer for keys and one for values, `(B, H_kv, M_l + S, D)`:

    | memory: a ring of M_l slots     | working segment: S slots          |
      slot = step mod M_l               slot = M_l + (step mod S)

With Canon layers also one for the inputs of each, `(B, W − 1 + S, d_model)`:

    | the W − 1 tokens before         | working segment: S slots          |
      the segment                       slot = W − 1 + (step mod S)

All lanes step together: step p is the p-th token of the batch, from 0. The step at which a lane's piece started
determines which slots hold tokens of that piece. When the next segment is opened, the newest entries of the full
working segment are copied into the memory. This commit evicts S entries of each array; a rewindable state keeps them
until the next commit. The module `slots` has the arithmetic.

The arrays of a state are values: a model call returns a new state and leaves the old one usable. MLX writes in place
as soon as nothing refers to the old arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.config import CANON_WIDTH, ModelConfig
from dsmr_mlx.model.long_attention import View
from dsmr_mlx.model.memory_blocks import filled_prefix, is_long
from dsmr_mlx.model.rotary import Angles, rotate
from dsmr_mlx.model.slots import Ring, Tail, layer_slots

MAX_STEPS = 2**53  # of a stream
FLOATS = (mx.float32, mx.float16, mx.bfloat16)  # types that models compute in, and store weights and states in
# keys (rotated) and values; with Canon layers also attention_canon and feed_forward_canon, the inputs of these modules
LayerState = dict[str, mx.array]


@dataclass(frozen=True)
class Window:
    """The place of a chunk of T tokens in the state: everything that attention needs besides the arrays.

    slot:   offset of the chunk in the working segment, an int32 scalar array in compiled steps
    offset: `(B,)` int32, rotary position of the chunk's first token in each lane: its position less `rebased`
    masks:  per horizon a bool array `(B, 1, T, M + S)`, True = attend; or "causal", lower-right aligned, of the slots
            up to the chunk's end, if the whole memory is visible and the chunk is a whole segment or one token. For one
            token and a long memory `(B, 1, 1, V + S)`: of the first V slots and the segment, see `Segment`
    known:  `(B, W − 1 + T, 1)` bool, which of the chunk's tokens and the W − 1 before it belong to the lane's piece;
            None if all do, or without Canon layers
    biases: the masks as additive biases, see `attention.as_bias`, if a gradient is taken over a whole segment
    views:  per long horizon, a view instead of a mask
    angles: of the rotary positions, on a CPU
    """

    slot: int | mx.array
    offset: mx.array
    masks: dict[int, mx.array | str]
    known: mx.array | None = None
    biases: dict[int, mx.array] | None = None
    views: dict[int, View] = field(default_factory=dict)
    angles: Angles | None = None


class Segment(NamedTuple):
    """The data that all tokens of the working segment share.

    base:       `(B,)` int32, rotary position of the segment's first token in each lane
    first_seen: per horizon M + S entries, side by side in `(B, 1, 1, …)` int32, compared by one kernel: the first
                slot of the segment that sees an entry; S: none does. Of a long memory only the first V slots, which
                contain all that any lane remembers: V + S
    places:     per horizon, the begin and end of its entries; None if every token sees the whole memory and each slot
                of the segment up to its own
    known_from: `(B, W, 1)` int32, the first slot at which each of the W − 1 tokens before a token, and the token
                itself, belong to the lane's piece; None without Canon layers
    """

    base: mx.array
    first_seen: mx.array
    places: dict[int, tuple[int, int] | None]
    known_from: mx.array | None

    def window(self, slot: int | mx.array) -> Window:
        """Return the window of one token; slot: an int32 scalar array if one compiled graph is to serve all slots."""
        seen = self.first_seen <= slot
        masks = {horizon: seen[..., slice(*at)] if at else "causal" for horizon, at in self.places.items()}
        known = None if self.known_from is None else self.known_from <= slot
        return Window(slot, self.base + slot, masks, known)


@dataclass
class RecurrentState:
    """The memory of B lanes of music, each at its own position in its own piece.

    layers:     the arrays of each layer
    steps:      tokens that each lane has read since the state was new, over all pieces; the same for all lanes
    starts:     `(B,)` int64, the steps at which each lane's piece started
    rebased:    `(B,)` int64, how far each lane's rotary positions have been shifted back (endless streams); with
                learned positions −p, where p is the position at which the lane started
    filled:     tokens in the working segment, 0 … S; None: computed from the steps. A full segment is not committed yet
    evicted:    the S entries of each array that the last commit evicted; None if not rewindable
    evicted_at: the steps at that commit; −1 if nothing is stored
    """

    config: ModelConfig
    layers: list[LayerState]
    steps: int
    starts: np.ndarray
    rebased: np.ndarray
    filled: int | None = None
    evicted: list[LayerState] | None = None
    evicted_at: int = -1

    def __post_init__(self) -> None:
        if self.filled is None:
            self.filled = (self.steps - 1) % self.config.segment_length + 1 if self.steps else 0

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, dtype: mx.Dtype = mx.float32, rewindable: bool = False
    ) -> Self:
        """Return B empty lanes, with all memory allocated. Only a `rewindable` state can go back past its segment."""

        def zeros_of(rule: Ring | Tail, slots: int) -> mx.array:
            return mx.zeros(rule.shape(batch_size, slots), dtype)

        S = config.segment_length
        layers = for_each_array(config, lambda rule: zeros_of(rule, rule.memory + S))
        evicted = for_each_array(config, lambda rule: zeros_of(rule, S)) if rewindable else None
        zeros = np.zeros(batch_size, np.int64)
        return cls(config, layers, 0, zeros, zeros.copy(), evicted=evicted)

    @property
    def batch_size(self) -> int:
        """Number of lanes B."""
        return len(self.starts)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of all arrays."""
        return self.layers[0]["keys"].dtype

    @property
    def position(self) -> np.ndarray:
        """`(B,)` int64: how many tokens of its piece each lane has read."""
        return self.steps - self.starts

    @property
    def next_position(self) -> np.ndarray:
        """`(B,)` int64: the rotary or learned position of each lane's next token."""
        return self.position - self.rebased

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; constant over time."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array of the state, for `mx.eval`."""
        return [array for layer in [*self.layers, *(self.evicted or [])] for array in layer.values()]

    @property
    def segment_room(self) -> int:
        """Tokens that still fit into the current segment (S at a segment boundary)."""
        return self.config.segment_length - self.filled % self.config.segment_length

    @property
    def is_full(self) -> bool:
        """Whether the working segment is full: the next token opens another."""
        return self.filled == self.config.segment_length

    @property
    def earliest(self) -> int:
        """The fewest steps that `rewound` can return to."""
        start = self.steps - self.filled
        segment = start - self.config.segment_length if self.evicted_at == start else start
        return max(segment, int(self.starts.max()))

    @property
    def has_room(self) -> bool:
        """Whether every lane can read another token; false only at the end of a table of learned positions."""
        return self.config.max_positions is None or bool(self.next_position.max() < self.config.max_positions)

    def copy(self) -> Self:
        """Return a state that can be advanced or reset independently. Arrays are shared until they are written."""
        layers, evicted = list(self.layers), None if self.evicted is None else list(self.evicted)
        return dataclasses.replace(
            self, layers=layers, evicted=evicted, starts=self.starts.copy(), rebased=self.rebased.copy()
        )

    def take(self, lanes: Sequence[int]) -> Self:
        """Return the state of these lanes, in this order. A lane may occur several times: one prefill, n variations."""
        index = mx.array(list(lanes), mx.int32)
        layers, evicted = (
            group and tree_map(lambda array: mx.take(array, index, axis=0), group)
            for group in (self.layers, self.evicted)
        )
        return dataclasses.replace(
            self, layers=layers, evicted=evicted, starts=self.starts[list(lanes)], rebased=self.rebased[list(lanes)]
        )

    def reset(self, lanes: Sequence[int] | None = None, first_position: int = 0) -> Self:
        """Empty the memory of some lanes, or of all: their next token is the first of a new piece.

        first_position: the learned position of that token; rotary positions start at 0, as only distances count.

        Changes this state and returns it. No array is touched: stale slots become invisible, not zero. Raises
        `ValueError` for a lane out of range, and if only some lanes are reset within a segment.
        """
        if lanes is None:
            lanes = range(self.batch_size)
        lanes = list(lanes)
        if any(not 0 <= lane < self.batch_size for lane in lanes):
            raise ValueError(f"`lanes` {lanes}: expected lanes from 0 to {self.batch_size - 1}")
        within_segment = self.filled % self.config.segment_length
        if within_segment and set(lanes) == set(range(self.batch_size)):
            self.steps = self.filled = 0
        elif within_segment and lanes:
            raise ValueError(
                f"`lanes` {lanes} of {self.batch_size} at {within_segment} tokens into a "
                f"segment of {self.config.segment_length}: single lanes can be reset at a segment boundary only"
            )
        self.starts[lanes] = self.steps
        self.rebased[lanes] = 0 if self.config.max_positions is None else -first_position
        if lanes:
            self.evicted_at = -1
        return self

    def to_arrays(self) -> dict[str, mx.array]:
        """Return the whole state as named arrays for a safetensors file, see `from_arrays`."""
        named = {
            f"{group}.{i}.{name}": array
            for group, layers in (("layers", self.layers), ("evicted", self.evicted or []))
            for i, layer in enumerate(layers)
            for name, array in layer.items()
        }
        counts = {"clock": self.steps, "starts": self.starts, "rebased": self.rebased}
        if self.evicted is not None:
            counts |= {"filled": self.filled, "evicted_at": self.evicted_at}
        return named | {name: mx.array(np.asarray(value, np.int64)) for name, value in counts.items()}

    @classmethod
    def from_arrays(cls, config: ModelConfig, arrays: dict[str, mx.array]) -> Self:
        """Return the state that `to_arrays` stored.

        Raises `UserError` if it does not fit the model's configuration, or a count is out of range: MLX would then
        write outside its arrays.
        """
        S = config.segment_length

        def read(group: str, slots_of: Callable[[Ring | Tail], int]) -> list[LayerState]:
            return [
                {
                    name: _shaped(arrays, f"{group}.{i}.{name}", rule.shape(len(starts), slots_of(rule)))
                    for name, rule in layer_slots(config, i).items()
                }
                for i in range(config.n_layers)
            ]

        try:
            for name in ("clock", "starts", "rebased", "filled", "evicted_at"):
                if name in arrays:
                    _check_integers(name, arrays[name], n_axes=int(name in ("starts", "rebased")))
            starts, rebased = np.array(arrays["starts"]), np.array(arrays["rebased"])
            layers = read("layers", lambda rule: rule.memory + S)
            steps = arrays["clock"].item()
            state = cls(config, layers, steps, starts, rebased)
            if "evicted_at" in arrays:
                state.evicted = read("evicted", lambda rule: S)
                state.filled, state.evicted_at = arrays["filled"].item(), arrays["evicted_at"].item()
        except KeyError as error:
            raise UserError(f"recurrent state: {error} is missing") from None
        state._check_counts()
        return state

    def _check_counts(self) -> None:
        """Raise `UserError` unless the counts are those of a state that a model has advanced."""
        S, begin = self.config.segment_length, self.steps - self.filled
        valid = {
            "clock": 0 <= self.steps <= MAX_STEPS,
            "filled": 0 <= self.filled <= S and begin >= 0 and begin % S == 0,
            "starts": len(self.starts) and (self.starts >= 0).all() and (self.starts <= self.steps).all(),
            "rebased": len(self.rebased) == len(self.starts),
            "evicted_at": self.evicted_at in (-1, begin),
        }
        if wrong := [name for name, right in valid.items() if not right]:
            raise UserError(f"recurrent state: {wrong[0]} is out of range")
        table, farthest = self.config.max_positions, rebase_interval(self.config) + S
        # All lanes are re-based together, so rotary positions of lanes that began later may be below 0.
        first, last = (-farthest, farthest) if table is None else (0, table)
        if not ((self.next_position >= first).all() and (self.next_position <= last).all()):
            raise UserError(f"recurrent state: rebased is out of range, expected positions from {first} to {last}")

    def _each(self, function: Callable[..., mx.array], *groups: list[LayerState]) -> list[LayerState]:
        """Call function(slots rule, array, …) for every array."""
        return for_each_array(self.config, function, *groups)

    def opened(self) -> Self:
        """Return the state ready for the next chunk: a full working segment is committed and an empty one begins."""
        if not self.is_full:
            return self
        state = self._committed()
        # Learned positions must not be re-based; their table ends the stream anyway.
        endless = self.config.max_positions is None
        far = self.next_position.max() >= rebase_interval(self.config)
        return state._rebased() if endless and far else state

    def _committed(self) -> Self:
        """Copy the newest entries of the working segment to the memory."""
        # Copied, because the slots are overwritten below.
        newest = self._each(lambda rule, slots: mx.array(rule.newest(slots)), self.layers)
        evicted = self.evicted and self._each(
            lambda rule, slots: mx.array(rule.evicted(slots, self.steps)), self.layers
        )
        # Once evaluated, these copies no longer refer to the slots, so that MLX can write the slots in place.
        mx.eval(newest, evicted or [])
        layers = self._each(lambda rule, slots, new: rule.commit(slots, new, self.steps), self.layers, newest)
        evicted_at = self.steps if evicted else -1
        return dataclasses.replace(self, layers=layers, filled=0, evicted=evicted, evicted_at=evicted_at)

    def skipped(self, n: int) -> Self:
        """Return the state n tokens later, at a segment boundary, without storing these tokens.

        For tokens that no layer needs, see `prefill.segments_needed`. Their slots keep older tokens or zeros. Raises
        `ValueError` within a segment.
        """
        if n < 0 or (self.steps + n) % self.config.segment_length:
            raise ValueError(f"`n` {n}: expected a segment boundary, {self.segment_room} tokens from here or later")
        steps, interval = self.steps + n, rebase_interval(self.config)
        rebasings = 0 if self.config.max_positions else max(0, (self.next_position.max() + n) // interval)
        return dataclasses.replace(
            self, steps=steps, filled=0, evicted_at=-1, rebased=self.rebased + rebasings * interval
        )

    def rewound(self, n: int) -> Self:
        """Return the state n tokens ago, down to `earliest` steps, with bitwise the same entries.

        If rotary positions were re-based since, keys are equal up to rounding. Raises `ValueError` for a larger n.
        """
        steps, start, S = self.steps - n, self.steps - self.filled, self.config.segment_length
        if not (n >= 0 and steps >= self.earliest):
            raise ValueError(f"`n` {n}: expected 0 to {self.steps - self.earliest} tokens")
        if steps >= start:
            return dataclasses.replace(self, steps=steps, filled=steps - start)
        layers = self._each(lambda rule, slots, lost: rule.undo(slots, lost, start), self.layers, self.evicted)
        return dataclasses.replace(self, layers=layers, steps=steps, filled=S - (start - steps), evicted_at=-1)

    def _rebased(self) -> Self:
        """Shift all rotary positions back by one common offset, so that an endless stream keeps its precision.

        Scores depend only on distances, so nothing else changes. The interval exceeds the age of the oldest slot:
        no key is rotated twice, and rounding does not add up.
        """
        interval = rebase_interval(self.config)

        def rebased(layer: LayerState) -> LayerState:
            keys = layer["keys"]
            rotated = rotate(keys.reshape(-1, 1, keys.shape[-1]), self.config, -interval).reshape(keys.shape)
            return layer | {"keys": rotated}

        layers, evicted = (group and list(map(rebased, group)) for group in (self.layers, self.evicted))
        return dataclasses.replace(self, layers=layers, evicted=evicted, rebased=self.rebased + interval)

    def advanced(self, layers: list[LayerState], n: int) -> Self:
        """Return the state after n more tokens, which `layers` already contains."""
        counts = {"steps": self.steps + n, "filled": self.filled + n}
        return dataclasses.replace(
            self, layers=layers, starts=self.starts.copy(), rebased=self.rebased.copy(), **counts
        )

    def segment(self, compiled: bool = True) -> Segment:
        """Return the shared data of the working segment's tokens. The state must be `opened`.

        compiled: one graph is to serve all slots. Else attention leaves out slots that are still empty.
        """
        base = (self.next_position - self.filled).astype(np.int32)
        first_seen, places = [np.empty((self.batch_size, 0), np.int32)], {}
        for horizon in sorted(set(self.config.horizons)):
            places[horizon] = None
            if compiled or not self._remembered(horizon).all():
                begin = sum(entries.shape[1] for entries in first_seen)
                first_seen.append(self._first_seen(horizon))
                places[horizon] = begin, begin + first_seen[-1].shape[1]
        side_by_side = mx.array(np.concatenate(first_seen, axis=1)[:, None, None])
        known_from = self._missing()[:, None, None] - np.arange(CANON_WIDTH, dtype=np.int32)[:, None]
        return Segment(mx.array(base), side_by_side, places, mx.array(known_from) if self.config.canon else None)

    def window(self, n: int, counts: np.ndarray | None = None) -> Window:
        """Return the window of the next n tokens, which must fit into the segment. The state must be `opened`.

        counts: `(B,)`, how many of the n tokens belong to the lane's piece, before padding; None: all. Raises
        `UserError` if a piece goes past the model's learned positions.
        """
        self._check_positions(np.full(self.batch_size, n) if counts is None else counts)
        offset = mx.array(self.next_position.astype(np.int32))
        horizons = set(self.config.horizons)
        masks = {horizon: self._mask(horizon, self.filled, n) for horizon in horizons if not is_long(horizon)}
        S = self.config.segment_length
        views = {
            horizon: View.of(self._remembered(horizon), self.filled, n, S, self.dtype)
            for horizon in horizons
            if is_long(horizon)
        }
        known = self._known(n) if self.config.canon else None
        return Window(self.filled, offset, masks, known, views=views)

    def _known(self, n: int) -> mx.array | None:
        missing, rows = self._missing(), np.arange(self.filled, self.filled + n + CANON_WIDTH - 1)
        return mx.array(rows[:, None] >= missing[:, None, None]) if missing.any() else None

    def _missing(self) -> np.ndarray:
        """`(B,)` int32, see `Segment`."""
        before_segment = self.position - self.filled
        return np.maximum(CANON_WIDTH - 1 - before_segment, 0).astype(np.int32)

    def _check_positions(self, counts: np.ndarray) -> None:
        table = self.config.max_positions
        longest = np.where(counts > 0, self.next_position + counts, 0).max()
        if table is not None and longest > table:
            raise UserError(
                f"max_positions = {table}: the model has no position {longest - 1}, counted from 0; expected streams "
                f"of at most {table} tokens, or a model with rotary positions alone"
            )

    def _mask(self, horizon: int, slot: int, n: int) -> mx.array | str:
        if n == self.config.segment_length and self._remembered(horizon).all():
            return "causal"
        return mx.array(self._first_seen(horizon)[:, None, None]) <= mx.arange(slot, slot + n)[:, None]

    def _first_seen(self, horizon: int) -> np.ndarray:
        """`(B, M + S)` or `(B, V + S)` int32, see `Segment`."""
        S, remembered = self.config.segment_length, self._remembered(horizon)
        if is_long(horizon):
            remembered = remembered[:, : filled_prefix(remembered)]
        ring = np.where(remembered, 0, S)
        return np.concatenate([ring, np.broadcast_to(np.arange(S), (self.batch_size, S))], axis=1).astype(np.int32)

    def _remembered(self, horizon: int) -> np.ndarray:
        """`(B, M)` bool: which ring slots hold a token of each lane's current piece.

        Slot j holds the newest step p < start with p = j (mod M), where start is the first step of the segment.
        """
        start = self.steps - self.filled
        slots = np.arange(horizon)
        written = start - 1 - (start - 1 - slots) % max(horizon, 1)
        return (written >= 0) & (written >= self.starts[:, None])


def for_each_array(
    config: ModelConfig, function: Callable[..., mx.array], *groups: list[LayerState]
) -> list[LayerState]:
    """Call `function` with each array's rule (see `slots`) and that array of each group. Return layers of results."""
    return [
        {name: function(rule, *(layer[name] for layer in layers)) for name, rule in layer_slots(config, i).items()}
        for i, layers in enumerate(zip(*groups, strict=True) if groups else [()] * config.n_layers)
    ]


def rebase_interval(config: ModelConfig) -> int:
    """Return the tokens between two re-basings: far above the oldest slot's age, far below float32's limit."""
    oldest = max(config.horizons) + config.segment_length
    return max(8192, 1 << (2 * oldest - 1).bit_length())


def _check_integers(name: str, array: mx.array, n_axes: int) -> None:
    """Raise `UserError` for a count of another type or number of axes."""
    if array.dtype != mx.int64 or array.ndim != n_axes:
        expected = "(lanes,)" if n_axes else "()"
        raise UserError(f"recurrent state: {name} is {array.dtype} {array.shape}, expected int64 {expected}")


def _shaped(arrays: dict[str, mx.array], name: str, shape: tuple[int, ...]) -> mx.array:
    """Return the array of this name. Raises `UserError` if it has another shape."""
    group, layer, _ = name.split(".")
    if arrays[name].dtype not in FLOATS:
        raise UserError(f"recurrent state: {name} is {arrays[name].dtype}, expected floats")
    if (found := arrays[name].shape) != shape:
        what = f"layer {layer}" if group == "layers" else f"{group}.{layer}"
        raise UserError(f"recurrent state: {what} has shape {found}, expected {shape}")
    return arrays[name]
