"""Use a model in every way in which a session uses it, so that no kernel is compiled in the middle of music."""

import mlx.core as mx

from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.state import RecurrentState

READ_AT_ONCE = (1, 4, 16, 64)  # tokens, besides a whole segment; MLX has other kernels for few tokens than for many


def warm_up_reading(model: DSMR, state: RecurrentState) -> None:
    """Read chunks of several lengths with states of the same lanes and dtype."""
    S, table = model.config.segment_length, model.config.max_positions
    for n in sorted({*READ_AT_ONCE, S}):
        if n <= min(S, table or S):
            empty = model.new_state(state.batch_size, state.dtype)
            hidden, read = model.advance(mx.zeros((state.batch_size, n), mx.int32), empty)
            mx.eval(model.logits(hidden[:, -1]), read.arrays)
