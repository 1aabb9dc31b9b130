"""Slots at a place that is an integer or, in compiled steps, an array."""

import mlx.core as mx
import numpy as np
import pytest
from support.stand_ins import tiny_model

from dsmr_mlx.model.slots import read, write


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_place_is_the_same_as_a_number_and_as_an_array(place, axis):
    rng = np.random.default_rng(place)
    slots, new = rng.standard_normal((2, 3, 7, 7)).astype(np.float32)
    entry = np.take(new, [place], axis=axis)
    expected = slots.copy()
    expected[(*[slice(None)] * axis, place)] = np.take(entry, 0, axis=axis)
    before = mx.array(slots)
    for at in (place, mx.array(place, mx.int32)):
        written = write(before, mx.array(entry), at, axis)
        np.testing.assert_array_equal(written, mx.array(expected))
        n = min(2, 7 - place)
        np.testing.assert_array_equal(read(written, n, at, axis), np.take(expected, range(place, place + n), axis=axis))
    np.testing.assert_array_equal(before, mx.array(slots))  # arrays of a state are values


@pytest.mark.parametrize("canon", [False, True])
def test_a_step_has_the_same_logits_at_a_number_and_at_an_array(canon):
    """Also in the first tokens of a piece, of which Canon layers see fewer than their width: equal bits."""
    model = tiny_model(20, canon=canon)
    state, other = model.new_state().opened(), model.new_state().opened()
    for slot, token in enumerate([3, 4, 3, 9, 11]):
        logits, layers = model.step(mx.array([token]), state.layers, slot, state.segment())
        state = state.advanced(layers, 1)
        expected, layers = model.step(mx.array([token]), other.layers, mx.array(slot, mx.int32), other.segment())
        other = other.advanced(layers, 1)
        np.testing.assert_array_equal(logits, expected)
