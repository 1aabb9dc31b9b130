"""Prefill with music of any length in bounded time, with the same result as reading all of it.

A memory holds M_l tokens, and its content depends only on a bounded stretch of the music before. So the upper layers,
with short memories, read only the end of the music; lower layers begin earlier, the lowest first; and no layer reads
the music before that. The final state, and every state that a player can rewind to, has the same values (bitwise on a
CPU) as if every layer had read everything.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.config import CANON_WIDTH, ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.state import RecurrentState


def prefill(model: DSMR, ids: np.ndarray, state: RecurrentState) -> Iterator[tuple[RecurrentState, mx.array | None]]:
    """Yield, after each chunk of `ids` `(T,)`, which all lanes read, the state and the chunk's hidden states.

    The hidden states are `(B, t, d_model)`. If layers skip tokens that the end does not depend on, they are None for
    all chunks but the last, and only the last state is exact, with the states that it can be rewound to. Nothing is
    evaluated. Raises `UserError` as `RecurrentState.window` does.
    """
    S, needed = model.config.segment_length, segments_needed(model.config)
    begin, end, all_read = state.steps, state.steps + len(ids), True
    exact = (end - 1) // S - 1  # the last segment but one: from here on, all layers read everything
    while state.steps < end:
        before = exact - state.steps // S  # segments
        n_layers = sum(before <= segments for segments in needed)
        all_read = all_read and n_layers == len(needed)
        if n_layers == 0:
            state = state.skipped((exact - needed[0]) * S - state.steps)
            continue
        n = min(state.segment_room, end - state.steps)
        chunk = mx.array(ids[None, state.steps - begin :][:, :n], mx.int32)  # int64 would need another kernel
        hidden, state = model.advance(mx.broadcast_to(chunk, (state.batch_size, n)), state, n_layers=n_layers)
        yield state, hidden if all_read or state.steps == end else None


def segments_needed(config: ModelConfig) -> tuple[int, ...]:
    """Return, per layer, how many segments before a segment boundary it must have read to be exact from there on.

    The highest layer needs what its memory holds; the layer below, what those tokens need and, before that, its own
    memory; and so on. So the counts decrease with the layers. What lower layers read before that does not
    influence anything still remembered.
    """
    canon, first, counts = (CANON_WIDTH - 1) * config.canon, 0, []
    for horizon in reversed(config.horizons):
        # The layer's output is needed from token `first` on, counted from the boundary. Canon layers need the tokens
        # before it, whose segment has its memory, and those before the oldest key.
        first = (first - canon) // config.segment_length * config.segment_length - horizon - canon
        counts.append(-(first // config.segment_length))
    return tuple(reversed(counts))
