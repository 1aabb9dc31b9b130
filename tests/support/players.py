"""Players of a tiny model, and a check of their state."""

import itertools

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from support.dense_reference import dense_logits
from support.music import random_notes

from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.steering import Density, LoopPenalty, MaxNoteSeconds, MaxSilenceSeconds, PitchChoice
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, encode_notes

TOKENIZER = PerformanceTokenizer()
S = 16  # tokens in a segment of `stand_ins.tiny_model`
FOREVER = Limits()
# The processors whose state depends on the music.
REMEMBERING = [
    *(MaxNoteSeconds(1.0), MaxSilenceSeconds(0.5), PitchChoice(1.0, 0.5, 30.0)),
    *(Density(6.0), LoopPenalty(1.0, max_cycle=8)),
]


def some_ids(n: int, seed: int = 0) -> np.ndarray:
    """n ids of random music, int64."""
    return encode_notes(random_notes(seed, n))[:n].astype(np.int64)


class LastIds:
    """A processor that records the last ids and their number, and slightly prefers some ids after them.

    Its state after any music must be that of `begin` with this music.
    """

    def begin(self, tables, ids):
        """See `Processor.begin`."""
        last = np.full(6, -1)
        last[: len(ids[-6:])] = np.flip(ids[-6:])
        count = np.array([[len(ids)]])
        return {"last": mx.array(last[None], mx.int32), "count": mx.array(count, mx.int32)}

    def __call__(self, logits, music, state):
        likes = mx.arange(logits.shape[-1]) % 7 == (state["last"].sum(axis=-1) % 7)[:, None]
        return logits + 2.0 * likes * (state["count"] > 3)

    def advance(self, state, token, music):
        """See `Processor.advance`."""
        last = mx.concatenate([token[:, None].astype(mx.int32), state["last"][:, :-1]], axis=1)
        return {"last": last, "count": state["count"] + 1}


def take(n: int, player: Player, limits: Limits = FOREVER) -> np.ndarray:
    """The next n tokens of each lane, `(n, lanes)`."""
    steps = list(itertools.islice(player.play(limits), n))
    return np.array(steps) if steps else np.zeros((0, player.lanes), np.int64)


def new_player(model, ids=(), **options) -> Player:
    """A player that has read a prompt."""
    player = Player(model, TOKENIZER, **{"processors": [LastIds()], "seed": 3} | options)
    player.read(np.array(ids, np.int64))
    return player


def assert_knows(player: Player, lanes: np.ndarray) -> None:
    """Assert that the player is as if it had read exactly these ids `(lanes, T)`: logits, keys, clock, processors."""
    expected = np.array(dense_logits(player.model, lanes))[:, -1]
    logits = np.broadcast_to(np.array(player.logits), expected.shape)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)
    for i, ids in enumerate(lanes):
        begun, lane = player.next_token.begin(ids), i if player.decode_state.lanes > 1 else 0
        for name in ("state", "sounding", "velocity", "ticks"):
            actual, wanted = (np.array(getattr(state.music, name)) for state in (player.decode_state, begun))
            assert np.array_equal(actual[lane], wanted[0]), name
        leaves = (tree_flatten(state.processors) for state in (player.decode_state, begun))
        for (place, actual), (_, wanted) in zip(*leaves, strict=True):
            np.testing.assert_allclose(np.array(actual)[lane], np.array(wanted)[0], 1e-4, 1e-4, err_msg=place)
        assert player.held[i] == np.flatnonzero(np.array(begun.music.sounding)[0]).tolist()
    assert player.position == lanes.shape[1]
