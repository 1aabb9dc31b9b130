"""Hints of the kind "did you mean"."""

import pytest

from dsmr_mlx.common.errors import did_you_mean

NAMES = ("asap-small", "maestro-base", "learning_rate")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("asap_small", "asap-small"),
        ("ASAP-small", "asap-small"),
        ("asap-samll", "asap-small"),
        ("maestro", "maestro-base"),
        ("learning-rate", "learning_rate"),
    ],
)
def test_nearest_name(name, near):
    assert did_you_mean(name, NAMES) == f", did you mean {near}?"


@pytest.mark.parametrize("name", ["", "lr", "song.mid", "runs/first"])
def test_no_hint_if_no_name_is_near(name):
    assert did_you_mean(name, NAMES) == ""
    assert did_you_mean(name, ()) == ""
