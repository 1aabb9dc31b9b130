"""Use a player once in every way in which a session uses it, so that no kernel is compiled in the middle of music."""

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from dsmr_mlx.generation.player import Player

READ_AT_ONCE = (1, 4, 16, 64)  # tokens, besides a whole segment; MLX has other kernels for few tokens than for many


def warm_up(player: "Player", tokens: int = 4) -> None:
    """Read, play `tokens` and rewind. The player then is where it was, or after BOS if it had read nothing."""
    if player.position == 0:
        player.read(np.empty(0, np.int64))
    model, lanes = player.model, player.state.batch_size
    S, table = model.config.segment_length, model.config.max_positions
    for n in sorted({*READ_AT_ONCE, S}):
        if n <= min(S, table or S):
            hidden, state = model.advance(mx.zeros((lanes, n), mx.int32), model.new_state(lanes, player.state.dtype))
            mx.eval(model.logits(hidden[:, -1]), state.arrays)
    steps = player.play()
    n = sum(1 for _ in zip(range(tokens), steps, strict=False))
    steps.close()
    player.rewind(n)
