"""Learned positions: exact up to the end of the table, with padding past it; longer pieces are refused."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_reference import dense_logits
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import DSMR, ModelConfig, UserError
from dsmr_mlx.evaluation import piece_losses
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.training.trainer import Trainer

S = 8


def make_model(max_positions: int, **options) -> DSMR:
    defaults = {"vocab_size": 29, "d_model": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8, "d_ff": 24}
    defaults |= {"segment_length": S, "horizons": [11, 4], "rope_dims": 0}
    mx.random.seed(0)
    model = DSMR(ModelConfig(max_positions=max_positions, **(defaults | options)))
    for module in (model.embed, model.positions):
        module.weight = mx.random.normal(module.weight.shape)
    return model.eval()


def random_ids(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 29, n)


def dense_losses(model: DSMR, ids: np.ndarray) -> np.ndarray:
    logits = np.array(dense_logits(model, ids[None, :-1])[0], np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


def test_initial_positions_are_small_compared_with_embeddings():
    mx.random.seed(0)
    model = DSMR(ModelConfig(vocab_size=500, max_positions=700))
    assert model.positions.weight.shape == (700, 256)
    assert mx.std(model.positions.weight).item() == pytest.approx(0.5 / 16, rel=0.02)
    assert mx.std(model.embed.weight).item() == pytest.approx(1 / 16, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    table=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    lanes=st.integers(1, 3),
)
def test_pieces_as_long_as_the_table_are_evaluated_exactly(table, lengths, lanes):
    """With any padding of last segments and of idle lanes; the last id needs no position."""
    model = make_model(table)
    pieces = [random_ids(i, min(n, table) + 1) for i, n in enumerate(lengths)]
    for streamed, ids in zip(piece_losses(model, pieces, lanes), pieces, strict=True):
        np.testing.assert_allclose(streamed, dense_losses(model, ids), atol=2e-4, rtol=2e-5)


@settings(max_examples=15, deadline=None)
@given(table=st.integers(1, 30), excess=st.integers(1, 12), lanes=st.integers(1, 2))
def test_longer_piece_is_refused(table, excess, lanes):
    model = make_model(table)
    pieces = [random_ids(0, table + 1 + excess), random_ids(1, 2)]
    with pytest.raises(UserError, match=rf"max_positions = {table}: .*expected streams of at most {table} tokens"):
        piece_losses(model, pieces, lanes)


@settings(max_examples=15, deadline=None)
@given(table=st.integers(1, 30), chunk=st.integers(1, 12))
def test_stream_ends_with_the_table_for_any_chunk_size(table, chunk):
    model = make_model(table)
    tokens = mx.array(random_ids(2, table + 1)[None])
    state, logits = model.new_state(1), []
    for start in range(0, table, chunk):
        assert state.has_room
        chunk_logits, state = model(tokens[:, start : min(start + chunk, table)], state)
        logits.append(chunk_logits)
    expected = dense_logits(model, np.array(tokens[:, :table]))
    np.testing.assert_allclose(mx.concatenate(logits, axis=1), expected, atol=2e-5, rtol=2e-5)
    assert not state.has_room
    with pytest.raises(UserError, match=f"max_positions = {table}: the model has no position {table}, counted from 0"):
        model(tokens[:, table:], state)


def test_lanes_have_separate_positions():
    """A reset lane starts at position 0, and its table ends counted from there."""
    model = make_model(3 * S)
    first, second, other = random_ids(3, S), random_ids(4, 2 * S), random_ids(5, 3 * S)
    state, logits = model.new_state(2), []
    lanes = np.stack([np.concatenate([first, second]), other])
    for i in range(3):
        if i == 1:
            state.reset([0])
        out, state = model(mx.array(lanes[:, i * S : (i + 1) * S]), state)
        logits.append(out)
    logits = mx.concatenate(logits, axis=1)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(logits[0, S:], dense_logits(model, second[None])[0], **tolerance)
    np.testing.assert_allclose(logits[1], dense_logits(model, other[None])[0], **tolerance)
    _, goes_on = model(mx.array(lanes[:1, :S]), state.take([0]))
    assert goes_on.position.tolist() == [3 * S]
    with pytest.raises(UserError, match="no position 24"):
        model(mx.array(lanes[:, :1]), state)


def test_a_lane_can_start_at_any_learned_position():
    """Alone or beside others, and its table ends at the same position."""
    model = make_model(4 * S)
    tokens, other = random_ids(8, 2 * S), random_ids(9, 3 * S)
    _, state = model(mx.array(np.stack([random_ids(7, S), other[:S]])), model.new_state(2))
    state.reset([0], first_position=2 * S)
    assert state.next_position.tolist() == [2 * S, S]
    logits, state = model(mx.array(np.stack([tokens, other[S:]])), state)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(logits[0], dense_shifted(model, tokens, 2 * S), **tolerance)
    np.testing.assert_allclose(logits[1], dense_logits(model, other[None])[0, S:], **tolerance)
    assert not state.has_room
    with pytest.raises(UserError, match="no position 32"):
        model(mx.array(tokens[None, :1]), state.take([0]))


def test_learned_positions_are_never_rebased():
    """A table longer than the re-basing interval is read to its end, with and without rotary positions."""
    model = make_model(20_000, n_layers=1, horizons=[4], rope_dims=8)
    tokens = random_ids(6, 3 * S)
    state = RecurrentState.empty(model.config, 1)
    state.steps = 10 * 1000 * S
    state.starts[:] = state.steps - 17_000 // S * S
    shifted = dense_shifted(model, tokens, int(state.position[0]))
    logits, state = model(mx.array(tokens[None]), state)
    assert state.rebased.tolist() == [0]
    np.testing.assert_allclose(logits[0, S:], shifted[S:], atol=5e-3, rtol=1e-3)


def dense_shifted(model: DSMR, tokens: np.ndarray, start: int) -> mx.array:
    """Logits `(T, V)` of tokens shifted by `start` positions in the table."""
    table = model.positions.weight
    model.positions.weight = table[start:]
    logits = dense_logits(model, tokens[None])[0]
    model.positions.weight = table
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_learned_positions(tmp_path, compiled):
    corpus = write_corpus(tmp_path / "corpus")
    longest = max(piece.length for piece in corpus.pieces()) - 1
    config = tiny_config(max_positions=longest, rope_dims=0, compile=compiled, max_steps=30)
    trainer = Trainer(config, corpus)
    table = np.array(trainer.parameters["positions"]["weight"])
    losses = []
    while len(losses) < 30:
        if record := trainer.train_segment():
            losses.append(record.loss)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not np.array_equal(np.array(trainer.parameters["positions"]["weight"]), table)
    assert math.isfinite(trainer.validate().perplexity)


def test_training_on_a_longer_piece_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    longest = max(piece.length for piece in corpus.pieces("train")) - 1
    with pytest.raises(UserError, match=r"has 156 tokens, expected at most 155: .* \(max_positions\)"):
        Trainer(tiny_config(max_positions=longest - 1), corpus)
