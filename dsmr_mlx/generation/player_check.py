"""Check the arrays of a saved player before anything computes with them.

MLX does not check indices: a count or an id out of range would read and write outside its buffers. Names, types, shapes
and ranges must be those of a player of this model, with this vocabulary and these processors.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dsmr_mlx.common.limits import MAX_SIZES
from dsmr_mlx.generation.next_token import DecodeState, NextToken, TokenOrigin
from dsmr_mlx.generation.steering import KINDS
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.state import FLOATS
from dsmr_mlx.tokenizers.token_tables import NEVER

NO_PAUSE = -1  # in a saved player
MAX_LANES = MAX_SIZES["n"]
MAX_POSITION = 2**53  # tokens of a stream
MAX_PHASE = 2**30


def check_arrays(arrays: Mapping[str, mx.array], blank: Mapping[str, mx.array]) -> None:
    """Raise `ValueError` unless the arrays have the names, types and shapes of `blank`, those of an empty player.

    The number of lanes may differ: n in arrays of each lane, and 1 or n in arrays that lanes may share.
    """
    if different := arrays.keys() ^ blank.keys():
        raise ValueError(f"{min(different)} is {'unknown' if min(different) in arrays else 'missing'}")
    # Each lane has a key and a pause of its own; the rest may be one lane until the lanes play.
    own = len(arrays["keys"]) if arrays["keys"].ndim else 0
    if not 1 <= own <= MAX_LANES:
        raise ValueError(f"{own} lanes, expected 1 to {MAX_LANES}")
    shared = len(arrays["logits"]) if arrays["logits"].ndim else 0
    if shared not in (1, own):
        raise ValueError(f"logits of {shared} lanes, expected 1 or {own}")
    for name, array in arrays.items():
        expected = _with_lanes(name, blank[name].shape, own if name in ("keys", "pause_ticks") else shared)
        floats = name == "logits" or name.startswith(("state.layers.", "state.evicted."))
        right = array.dtype in FLOATS if floats else array.dtype == blank[name].dtype
        if array.shape != expected or not right:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {blank[name].dtype} {expected}")


def _with_lanes(name: str, shape: tuple[int, ...], lanes: int) -> tuple[int, ...]:
    """Return the shape of an array of one lane with other lanes."""
    if name == "tokens":
        return (shape[0], lanes)
    if not shape or name in ("origins", "positions"):
        return shape
    return (lanes, *shape[1:])


def check_counts(arrays: Mapping[str, mx.array], config: ModelConfig, steps: int, earliest: int) -> None:
    """Raise `ValueError` for positions or tokens out of range.

    steps, earliest: those of the recurrent state, which has been checked.
    """
    position, first, last = arrays["positions"].tolist()
    in_order = 0 <= first <= last <= position <= MAX_POSITION and position - first <= len(arrays["tokens"])
    unread = position - steps  # the token after the last learned position is not read
    if not in_order or first > earliest or unread not in (0, int(config.max_positions is not None)):
        raise ValueError(f"positions are {[position, first, last]}, the model has read {steps} tokens")
    kept = position - first
    _within("tokens", arrays["tokens"][:kept], 0, config.vocab_size - 1)
    _within("origins", arrays["origins"], 0, max(origin.value for origin in TokenOrigin))


def check_pauses(pause_ticks: mx.array, ticks: mx.array) -> None:
    """Raise `ValueError` for pauses `(n,)` that no clock `(B,)` has reached: a player is saved after its pause."""
    _within("pause_ticks", pause_ticks, NO_PAUSE, max(ticks.max().item(), 0))


def check_decode_state(state: DecodeState, blank: DecodeState, next_token: NextToken, vocab_size: int) -> None:
    """Raise `ValueError` for a decoding state with values out of range; blank: that of an empty player."""
    grammar, music = next_token.walk.grammar, state.music
    limits = {
        "state": (0, len(grammar.allowed) - 1),
        "velocity": (-1, int(grammar.velocity.max(initial=-1))),
        "pending_pitch": (-1, music.sounding.shape[-1] - 1),
        "phase": (-MAX_PHASE, MAX_PHASE),
    }
    for name, array in music._asdict().items():
        if array.dtype != mx.bool_:
            _within(name, array, *limits.get(name, (0, NEVER)))
    for processor, own, empty in zip(next_token.sampler.processors, state.processors, blank.processors, strict=True):
        if type(processor) in KINDS.values():
            _check_processor(processor, own, empty, vocab_size)


def _check_processor(processor: Any, state: Any, blank: Any, vocab_size: int) -> None:
    """Check the state of a built-in processor; its tables must be those of the vocabulary."""
    name = type(processor).__name__
    for (field, array), (_, expected) in zip(_fields(state), _fields(blank), strict=True):
        if field not in processor.remembers:
            if not mx.allclose(array, expected).item():
                raise ValueError(f"{name}: {field} is not that of this vocabulary")
            continue
        low, high = processor.remembers[field]
        _within(f"{name}: {field}", array, low, vocab_size - 1 if high is None else high)


def _fields(state: Any) -> Iterator[tuple[str, mx.array]]:
    """Yield the arrays of a processor's state, each with the name of the field that holds it."""
    named: Sequence[tuple[str, Any]] = state._asdict().items() if hasattr(state, "_asdict") else [("state", state)]
    for field, value in named:
        yield from ((field, leaf) for _, leaf in tree_flatten(value))


def _within(name: str, array: mx.array, low: float, high: float) -> None:
    values = np.array(array)
    if values.size and not (values.min() >= low and values.max() <= high):  # false for NaN too
        raise ValueError(f"{name} is {values.min()} to {values.max()}, expected {low} to {high}")
