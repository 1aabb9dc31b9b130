"""Reading music of any length in a bounded time, with the result of reading all of it.

A memory holds M_l tokens, and what is in it depends only on a bounded stretch of the music before. So the upper
layers, with short memories, read only the end of the music; the lower layers begin earlier, the lowest first; and what
comes before that no layer reads. All that remains, and all that a player can rewind to, has the same values, bitwise on
a CPU, as if every layer had read everything.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import segments_needed
from dsmr_mlx.model.state import RecurrentState


def prefill(model: DSMR, ids: np.ndarray, state: RecurrentState) -> Iterator[tuple[RecurrentState, mx.array | None]]:
    """Yield, after each chunk of `ids` `(T,)`, which all lanes read, the state and the chunk's hidden states.

    The hidden states `(B, t, d_model)` are None, and the state is not that of the music read so far, while some layer
    has passed over tokens that the end does not depend on: the last state is right, for itself and for a rewinding of
    at least a segment. Nothing is evaluated. Raises `UserError` as `RecurrentState.window` does.
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
