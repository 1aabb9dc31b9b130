"""Lanes: every piece is read whole and in order, and streams are resumed exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.lanes import Lanes, epoch_order

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=9)


def pieces_of(lengths: list[int]) -> list[np.ndarray]:
    """Pieces of unique tokens, so that a lost, repeated or misplaced token is detected."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]


def make(pieces, B, S, **options) -> Lanes:
    return Lanes(lambda epoch, i: pieces[i], len(pieces), B, S, **options)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(lengths=lengths, B=st.integers(1, 5), S=st.integers(1, 12), seed=st.none() | st.integers(0, 99))
def test_every_piece_is_read_in_order_once_per_epoch(lengths, B, S, seed):
    """The concatenated batches of a lane are whole pieces, each once per epoch."""
    pieces, epochs = pieces_of(lengths), 2
    reading: dict[int, list[int]] = {}  # lane → tokens of its current piece
    finished = []
    for batch in make(pieces, B, S, seed=seed, epochs=epochs):
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (B, S)
        for b in range(B):
            n = batch.counts[b]
            assert (batch.weights[b] == (np.arange(S) < n)).all()
            assert not batch.inputs[b, n:].any()
            if batch.pieces[b] < 0:
                assert n == 0
                continue
            assert (b in batch.fresh) == (batch.offsets[b] == 0)
            if b in batch.fresh:
                assert b not in reading
                reading[b] = [batch.inputs[b, 0]]
            assert reading[b][-1] == batch.inputs[b, 0]
            assert len(reading[b]) - 1 == batch.offsets[b]
            assert (batch.inputs[b, 1:n] == batch.targets[b, : n - 1]).all()
            reading[b].extend(batch.targets[b, :n])
            if len(reading[b]) == lengths[batch.pieces[b]]:
                finished.append((batch.pieces[b], reading.pop(b)))
    assert not reading
    assert sorted(piece for piece, _ in finished) == sorted([*range(len(pieces))] * epochs)
    for piece, tokens in finished:
        assert (np.array(tokens) == pieces[piece]).all()


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, B=st.integers(1, 4), S=st.integers(1, 9), steps=st.integers(0, 30))
def test_seeking_continues_exactly(lengths, B, S, steps):
    pieces = pieces_of(lengths)
    stream = make(pieces, B, S, seed=5)
    for _ in range(steps):
        next(stream)
    cursor = json.loads(json.dumps(stream.cursor()))
    resumed = make(pieces, B, S, seed=5).seek(cursor)
    for _ in range(10):
        a, b = next(stream), next(resumed)
        for name in ("inputs", "targets", "counts", "pieces", "offsets", "fresh"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_epoch_order_is_a_pure_function():
    orders = [epoch_order(1, e, 50).tolist() for e in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != epoch_order(2, 0, 50).tolist()
    assert sorted(orders[1]) == list(range(50))
    assert epoch_order(1, 0, 8).tolist() == [7, 2, 0, 5, 1, 6, 4, 3]  # with every version of NumPy


def test_no_lane_is_idle_with_fewer_pieces_than_lanes():
    stream = make(pieces_of([5, 9]), 4, 4, seed=0)
    assert all(next(stream).counts.all() for _ in range(20))


def test_invalid_arguments():
    with pytest.raises(UserError, match="no pieces"):
        make([], 1, 1)
    with pytest.raises(UserError, match="found 1 tokens"):
        next(make([np.array([1])], 1, 1))
    with pytest.raises(UserError, match="batch_size = 3: expected 2, as in the resumed stream"):
        make(pieces_of([5]), 3, 4).seek(make(pieces_of([5]), 2, 4).cursor())
