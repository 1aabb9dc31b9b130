"""Observe a player step by step, and compare notes."""

from collections.abc import Callable

import numpy as np

from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.notes import Notes


def observe_steps(monkeypatch, at_step: Callable[[Player, int], object]) -> None:
    """Call `at_step(player, count)` before each step of any player is yielded."""
    original = Player.play

    def play(self, *limits):
        for count, step in enumerate(original(self, *limits)):
            at_step(self, count)
            yield step

    monkeypatch.setattr(Player, "play", play)


def assert_same_notes(actual: Notes, expected: Notes) -> None:
    """Assert that notes are equal, `actual` shifted to begin at 0 s."""
    assert np.array_equal(actual.pitch, expected.pitch)
    assert np.array_equal(actual.velocity, expected.velocity)
    np.testing.assert_allclose(actual.onset, expected.onset - expected.onset[0], atol=1e-6)
    np.testing.assert_allclose(actual.offset, expected.offset - expected.onset[0], atol=1e-6)
