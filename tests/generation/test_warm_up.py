"""Warming up leaves no trace in the music."""

import numpy as np
import pytest
from support.players import new_player, some_ids, take
from support.stand_ins import tiny_model

from dsmr_mlx.generation.warm_up import READ_AT_ONCE
from dsmr_mlx.model.dsmr import DSMR


@pytest.mark.parametrize("prompt", [0, 40])
@pytest.mark.parametrize("options", [{}, {"max_positions": 60, "rope_dims": 0}])
def test_the_music_is_the_same_after_warming_up(prompt, options, monkeypatch):
    model, lengths = tiny_model(**options), []
    original = DSMR.advance

    def advance(self, tokens, state, counts=None):
        lengths.append(tokens.shape[1])
        return original(self, tokens, state, counts)

    player = new_player(model, some_ids(prompt))
    expected = take(12, new_player(model, some_ids(prompt)))
    monkeypatch.setattr(DSMR, "advance", advance)
    player.warm_up()
    S = model.config.segment_length
    assert {*lengths} == {n for n in (*READ_AT_ONCE, S) if n <= S}
    assert player.position == prompt + 1
    np.testing.assert_array_equal(take(12, player), expected)
