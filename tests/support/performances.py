"""Performances that are watched while they are made, and what they should be."""

from collections.abc import Callable

import numpy as np

from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.notes import Notes


def watched(monkeypatch, at_step: Callable[[Player, int], object]) -> None:
    """Let `at_step(player, count)` look on before each step of a player is given."""
    original = Player.play

    def play(self, *limits):
        for count, step in enumerate(original(self, *limits)):
            at_step(self, count)
            yield step

    monkeypatch.setattr(Player, "play", play)


def assert_same_notes(actual: Notes, expected: Notes) -> None:
    """The same, but for when the first one begins."""
    assert np.array_equal(actual.pitch, expected.pitch)
    assert np.array_equal(actual.velocity, expected.velocity)
    np.testing.assert_allclose(actual.onset, expected.onset - expected.onset[0], atol=1e-6)
    np.testing.assert_allclose(actual.offset, expected.offset - expected.onset[0], atol=1e-6)
