"""Read chunks of all sizes once before a session, so that no kernel is compiled in the middle of music."""

import mlx.core as mx

from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.state import RecurrentState

READ_AT_ONCE = (1, 4, 16, 64)  # tokens, besides a whole segment; MLX uses different kernels for few and many tokens


def warm_up_reading(model: DSMR, state: RecurrentState) -> None:
    """Read chunks of several lengths with states of the same lanes and dtype."""
    S, table = model.config.segment_length, model.config.max_positions
    for n in sorted({*READ_AT_ONCE, S}):
        if n <= min(S, table or S):
            empty = model.new_state(state.batch_size, state.dtype)
            hidden, read = model.advance(mx.zeros((state.batch_size, n), mx.int32), empty)
            mx.eval(model.logits(hidden[:, -1]), read.arrays)
