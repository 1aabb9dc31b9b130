"""Endless streams: constant memory, and predictions that depend only on the audible tail.

What a token can have heard of is what a layer sees, and what the layers below saw there: in segments of S, a stack of
horizons M_l reaches Σ (⌈M_l / S⌉ · S) tokens before the current segment; Canon layers add to it. Fed with that many
last tokens, from the same place in a segment, a model that has heard nothing else must predict the same.
"""

import mlx.core as mx
import numpy as np
import pytest
from support.dense_reference import dense_logits
from support.recipe import RECIPE
from support.stand_ins import tiny_model

from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.model import state
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.tokenizers.performance import FILL, PerformanceTokenizer

TOKENIZER = PerformanceTokenizer()
S = 8


def reach(config) -> int:
    """Tokens before the current segment that can reach the top layer, in whole segments."""
    tokens = HorizonSchedule.custom(config.horizons).reach(config.segment_length, config.canon)[-1]
    return -(-tokens // config.segment_length) * config.segment_length


def audible(config, position: int) -> int:
    """How many of the last tokens of a stream decide the next: whole segments and the part of the current one."""
    within = (position - 1) % config.segment_length + 1
    return min(position, reach(config) + within)


def stream(model, tokens: int, check_every: int, **options):
    """Play without end; at some positions yield (position, logits, audible tokens)."""
    player = Player(model, TOKENIZER, sampling=Sampling(temperature=1.0), **options)
    heard: list[int] = []
    for count, step in enumerate(player.play(Limits()), start=1):
        heard.append(int(step[0]))
        if count % check_every == 0:
            n = audible(model.config, player.position)
            tail = heard[-n:] if n < player.position else [TOKENIZER.bos_id, *heard]
            yield player, np.array(player.logits)[0], np.array([tail])
        if count >= tokens:
            return


@pytest.mark.slow
@pytest.mark.parametrize(
    ("horizons", "tolerance", "options"),
    [
        ((24,), 2e-4, {}),
        ((0,), 2e-4, {}),
        ((21, 0), 2e-4, {}),
        ((24, 8, 3), 1e-3, {}),
        ((24, 3), 1e-3, RECIPE),
    ],
    ids=["one layer", "no memory", "memory below", "deep", "all settings"],
)
def test_logits_equal_those_of_the_audible_tail(monkeypatch, horizons, tolerance, options):
    """After several re-basings the logits are those of a dense pass over the audible tail alone, from position 0.

    Where only the lowest layer remembers, the tail is what that layer sees; in a deep stack it is as long as the stack
    reaches.
    """
    monkeypatch.setattr(state, "rebase_interval", lambda config: 64)
    model = tiny_model(horizons=horizons, segment_length=S, d_model=16, d_ff=24, head_dim=8, **options)
    rebased = 0
    for player, logits, tail in stream(model, 330, check_every=37):
        expected = np.array(dense_logits(model, tail))[0, -1]
        np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=tolerance)
        rebased = player.state.rebased[0]
        if player.position > 150:
            assert tail.shape[1] <= reach(model.config) + S < 100
    assert rebased >= 4 * 64


def test_inaudible_tokens_have_no_effect():
    """Streams with the same audible tail and different beginnings predict the same, and with a tail that is one
    segment shorter they do not: the reach is no larger and no smaller than said.
    """
    model = tiny_model(horizons=(16, 8), segment_length=S)
    rng = np.random.default_rng(0)
    T = reach(model.config) + S
    tail = rng.integers(3, FILL, T)

    def after(beginning: np.ndarray, tail: np.ndarray) -> np.ndarray:
        logits, _ = model(mx.array(np.concatenate([beginning, tail])[None]))
        return np.array(logits)[0, -1]

    beginnings = [rng.integers(3, FILL, 5 * S) for _ in range(2)]
    np.testing.assert_allclose(*(after(beginning, tail) for beginning in beginnings), atol=1e-5)
    one, other = (after(beginning, tail[S:]) for beginning in beginnings)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_memory_is_constant(monkeypatch):
    """No byte more after several re-basings."""
    monkeypatch.setattr(state, "rebase_interval", lambda config: 96)
    model = tiny_model(horizons=(64, 16), segment_length=S, n_heads=4, head_dim=32)
    player = Player(model, TOKENIZER)
    active, moves = [], player.play(Limits())
    for count in range(1, 500):
        next(moves)
        if count > 180 and count % S == 1:  # where the history is shortest
            mx.synchronize()
            active.append(mx.get_active_memory())
    assert player.state.rebased[0] >= 4 * 96
    slots = player.state.layers[0]["keys"].nbytes
    assert max(active) - min(active) < slots / 2, "not even half of one layer's keys more or less"
    assert len(player.history.tokens) <= 2 * S
    assert len(player.history.snapshots) == 2
