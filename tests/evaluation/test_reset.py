"""The loss after a boundary at which all memory is emptied: against a plain double reading, and where it must be 0."""

import dataclasses
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.induction_model import induction_model
from support.stand_ins import tiny_model
from support.tiny import TOKENIZER, write_corpus

from dsmr_mlx import DSMR, UserError
from dsmr_mlx.evaluation import measure_reset, piece_losses, reset_curve, with_horizons
from dsmr_mlx.evaluation import reset as reset_module
from dsmr_mlx.evaluation.memory_plot import memory_picture
from dsmr_mlx.evaluation.reset import check_reset_at, distance_ranges
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.horizons import model_reach

V = 50
ROUNDING = 1e-5  # nats, of losses up to 100: rotary positions of the second reading start at 0


def random_model(horizons: tuple[int, ...], **options) -> DSMR:
    """A model with random weights, those of Canon layers included."""
    model = tiny_model(V, horizons=horizons, **options)
    for block in model.layers:
        for canon in (block[name] for name in ("attention_canon", "feed_forward_canon") if name in block):
            canon.weight = 0.3 * mx.random.normal(canon.weight.shape)
    return model


def random_pieces(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n) for n in lengths]


def read_twice(model: DSMR, ids: np.ndarray, reset_at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses `(n,)` after the boundary, float64, of two states that part there; one of them is emptied."""
    nats = []
    _, state = model(ids[None, :reset_at])
    for continued in (state.copy(), state.copy().reset(first_position=reset_at)):
        logits = np.array(model(ids[None, reset_at:-1], continued)[0][0], np.float64)
        nats.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[reset_at + 1 :]])
    return nats[0], nats[1]


def measure(model: DSMR, pieces: list[np.ndarray], reset_at: int):
    return measure_reset(model, pieces, piece_losses(model, pieces), reset_at, range(len(pieces)))


@pytest.mark.parametrize(
    "options", [{}, {"canon": True}, {"max_positions": 160}, {"max_positions": 160, "rope_dims": 0}]
)
def test_both_readings_equal_states_that_part_at_the_boundary(options):
    """Means and errors, on average and by distance, of pieces that end at different distances or before."""
    model = random_model((40, 24), **options)
    pieces, N = random_pieces(150, 50, 49, 48, 82, 161, 20), 48
    curve = measure(model, pieces, N)
    pairs = [read_twice(model, ids, N) for ids in pieces if len(ids) > N + 1]
    assert (curve.pieces, curve.left_out, curve.reset_at) == (4, 3, N)
    assert [(row.start, row.end) for row in curve.by_distance] == [(0, 16), (16, 32), (32, 64), (64, 128)]
    for row in (curve, *curve.by_distance):
        start, end = (row.start, row.end) if row is not curve else (0, 8192)
        parts = [[nats[start:end] for nats in pair if len(nats) > start] for pair in pairs]
        kept, emptied = ([part[i] for part in parts if part] for i in (0, 1))
        assert row.pieces == len(kept)
        assert row.tokens == sum(map(len, kept))
        assert row.kept == pytest.approx(np.concatenate(kept).mean(), abs=1e-5)
        assert row.emptied == pytest.approx(np.concatenate(emptied).mean(), abs=1e-5)
        gain = np.concatenate(emptied).mean() - np.concatenate(kept).mean()
        assert row.gain.nats == pytest.approx(gain, abs=1e-5)
        residuals = np.array([(b - a - gain).sum() for a, b in zip(kept, emptied, strict=True)])
        n = len(residuals)
        error = math.sqrt((residuals**2).sum() * n / (n - 1)) / row.tokens if n > 1 else math.nan
        assert row.gain.error == pytest.approx(error, abs=1e-5, nan_ok=True)
    assert curve.by_distance[0].gain.error > 1e-3


@pytest.mark.parametrize("options", [{}, {"max_positions": 200}, {"max_positions": 200, "rope_dims": 0}])
def test_without_memory_there_is_nothing_to_empty(options):
    """Also with learned positions: those of the second reading are the same."""
    model = tiny_model(V, horizons=(0, 0), **options)
    curve = measure(model, random_pieces(150, 90, 201), 32)
    assert curve.reach == 0
    for row in (curve, *curve.by_distance):
        assert abs(row.gain.nats) < ROUNDING
        assert not row.gain.error > ROUNDING


@settings(max_examples=15, deadline=None)
@given(
    horizons=st.lists(st.integers(0, 15), min_size=1, max_size=3),
    S=st.sampled_from([4, 16]),
    segments=st.integers(1, 3),
    canon=st.booleans(),
)
def test_beyond_the_reach_the_gain_is_zero(horizons, S, segments, canon):
    """Directly after the boundary it is not, if there is any memory."""
    model = random_model(tuple(horizons), segment_length=S, d_model=16, d_ff=16, canon=canon)
    N = segments * S
    curve = measure(model, random_pieces(N + 70, N + 100), N)
    beyond = -(-model_reach(model.config) // S) * S  # the first segment that sees nothing from before the boundary
    assert curve.reach == model_reach(model.config)
    for row in curve.by_distance:
        if row.start >= beyond:
            assert abs(row.gain.nats) < ROUNDING
        elif row.start == 0:
            assert row.gain.error > ROUNDING


def test_standard_errors_are_over_pieces(monkeypatch):
    """Three pieces of 2, 3 and 5 tokens after the boundary, by hand; a window of 4 leaves out the last token."""
    emptied = [[1, 2], [3, 3, 3], [0, 1, 0, 1, 9]]
    monkeypatch.setattr(reset_module, "WINDOW", 4)
    monkeypatch.setattr(reset_module, "FIRST_RANGE", 4)
    monkeypatch.setattr(
        reset_module, "piece_losses", lambda *args, **options: [np.array(nats, np.float32) for nats in emptied]
    )
    pieces = [np.zeros(16 + n + 1, int) for n in (2, 3, 5)]
    kept = [np.ones(len(ids) - 1, np.float32) for ids in pieces]
    curve = measure_reset(tiny_model(V), pieces, kept, 16, "abc")
    # Gains 0, 1 | 2, 2, 2 | −1, 0, −1, 0: 5 nats on 9 tokens. Sums less 5/9 for each token: −1/9, 39/9, −38/9.
    assert (curve.pieces, curve.tokens) == (3, 9)
    assert curve.gain.nats == pytest.approx(5 / 9)
    assert curve.gain.error == pytest.approx(math.sqrt(3 / 2 * (1 + 39**2 + 38**2) / 81) / 9)
    assert (curve.kept, curve.emptied) == (1, pytest.approx(14 / 9))
    assert curve.by_distance[0].gain == curve.gain
    last = curve.by_distance[1]
    assert (last.start, last.end, last.pieces, last.tokens, last.gain.nats) == (4, 8, 1, 1, 8)
    assert math.isnan(last.gain.error)


def test_an_induction_model_needs_its_memory_until_the_phrase_has_returned():
    """A phrase of 64 tokens repeats: known from before the boundary, or again once it was read after it."""
    rng = np.random.default_rng(1)
    pieces = [np.tile(rng.permutation(200)[:64], 6) for _ in range(4)]
    by_start = {}
    for horizon in (256, 16):
        curve = measure(induction_model(200, horizons=(8, horizon), segment_length=32), pieces, 128)
        by_start[horizon] = {row.start: row.gain for row in curve.by_distance}
    gains = by_start[256]
    assert gains[0].nats > 1
    assert gains[0].nats > 10 * gains[0].error
    assert gains[32].nats > 1
    assert abs(gains[64].nats) < 0.1
    assert by_start[16][32].nats < 0.1


def test_the_boundary_is_a_multiple_of_the_segment_length_within_a_piece(tmp_path):
    pieces = write_corpus(tmp_path / "corpus").pieces("validation")
    longest = max(piece.length for piece in pieces)
    config = tiny_model(segment_length=16).config
    assert check_reset_at(config, pieces, 32) == 32
    for found, near in ((100, "96 or 112"), (5, "16"), (0, "16"), (-20, "16"), (17, "16 or 32")):
        with pytest.raises(
            UserError, match=f"`reset_at` {found}: expected a multiple of the segment length 16, such as {near}$"
        ):
            check_reset_at(config, pieces, found)
    with pytest.raises(
        UserError, match=f"`reset_at` 8,192: expected less, the longest of 2 pieces has {longest} tokens"
    ):
        check_reset_at(config, pieces)
    exact = tiny_model(segment_length=longest - 2).config
    assert check_reset_at(exact, pieces, longest - 2) == longest - 2
    with pytest.raises(UserError, match="expected less"):
        check_reset_at(tiny_model(segment_length=longest - 1).config, pieces, longest - 1)


@pytest.mark.parametrize(("S", "default"), [(128, 8192), (100, 8200), (3000, 9000), (20_000, 20_000)])
def test_the_default_boundary_is_close_to_8192(tmp_path, S, default):
    config = tiny_model(segment_length=S).config
    (piece, *_) = write_corpus(tmp_path / "corpus").pieces("validation")
    long = [dataclasses.replace(piece, length=50_000)]
    assert check_reset_at(config, long) == default


def test_distances_are_divided_at_powers_of_two():
    assert distance_ranges(1) == distance_ranges(16) == [(0, 16)]
    assert distance_ranges(17) == [(0, 16), (16, 32)]
    assert distance_ranges(9000)[-2:] == [(4096, 8192), (8192, 16384)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A corpus with pieces of about 60 and 100 tokens, and the checkpoint of a random model."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder / "corpus", train=1, validation=3, notes=20)
    model = tiny_model(TOKENIZER.vocab_size, horizons=(24, 8), d_model=16, d_ff=16)
    checkpoint.save_model(folder / "model", model.config, model.parameters(), TOKENIZER)
    return folder


def test_the_curve_of_a_corpus_reads_what_is_before_the_boundary_once(world):
    """Losses with the memory kept are those of the evaluation; a sample has fewer pieces."""
    model, _ = checkpoint.load(world / "model")
    corpus = write_corpus(world / "again", train=1, validation=3, notes=20)
    lengths = sorted(piece.length for piece in corpus.pieces("validation"))
    N = (lengths[1] - 2) // 16 * 16
    seen = []
    curve = reset_curve(model, corpus, reset_at=N, progress=lambda done, total: seen.append((done, total)))
    long = [length - 1 for length in lengths if length > N + 1]
    assert (curve.pieces, curve.left_out) == (len(long), 3 - len(long))
    assert seen[-1] == (2 * sum(long) - N * len(long),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    ids = [corpus.tokens(piece) for piece in corpus.pieces("validation")]
    direct = measure_reset(model, ids, piece_losses(model, ids), N, range(len(ids)))
    assert curve.gain.nats == pytest.approx(direct.gain.nats, abs=1e-6)
    assert curve.left_out == direct.left_out
    assert reset_curve(model, corpus, reset_at=16, max_tokens=1).pieces == 1
    with pytest.raises(UserError, match="the model has 50"):
        reset_curve(tiny_model(V), corpus, reset_at=16)


@pytest.mark.slow
def test_the_command_shows_the_curve(run, world):
    """JSON and table have the same figures, the picture is written, and plain figures are as without the option."""
    common = ["evaluate", world / "model", "--data", world / "corpus"]
    values = json.loads(run(*common, "--reset-at", 64, "--json").out)
    plain = json.loads(run(*common, "--json").out)
    assert values.keys() - plain.keys() == {"reset"}
    assert {key: values[key] for key in plain} == plain
    found = values["reset"]
    assert found["reset_at"] == 64
    assert found["pieces"] + found["left_out"] == 3
    shown = run("evaluate", "--reset-at", "64", world / "model", "--data", world / "corpus", "--plot", "reset.png")
    assert (shown.code, shown.err) == (0, "")
    assert Path("reset.png").read_bytes().startswith(b"\x89PNG")
    gain = found["gain"]
    assert f"all memory emptied after 64 tokens: {gain['nats']:.4f} ± {gain['error']:.4f} nats per token" in shown.out
    assert f"on {found['tokens']:,} tokens of {found['pieces']} pieces" in shown.out
    for row in found["by_distance"]:
        assert f"{row['start']:,} – {row['end']:,}" in shown.out
        assert f"{row['kept']:.4f}" in shown.out
    longest = (max(piece["tokens"] for piece in plain["by_piece"]) - 1) // 16 * 16
    alone = run(*common, "--reset-at", longest)
    assert f"pieces left out because they are shorter: {2}" in alone.out
    both = run(*common, "--reset-at", 64, "--context-curve", "--distances", 128, "--plot", "both.svg")
    assert (both.code, Path("both.svg").read_text().count("gain over ")) == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reset-at"], "--reset-at 8,192: expected less, the longest of 3 pieces has "),
        (["--reset-at", "30"], "--reset-at 30: expected a multiple of the segment length 16, such as 16 or 32"),
        (["--reset-at", "x"], "--reset-at: found 'x', expected a whole number"),
        (["--reset-at", "16", "--plot", "x.pdf"], "--plot x.pdf: expected a name that ends in .png or .svg"),
    ],
)
def test_invalid_options_are_refused_before_the_evaluation(run, world, monkeypatch, options, message):
    monkeypatch.setattr("dsmr_mlx.evaluation.losses.piece_losses", None)
    done = run("evaluate", world / "model", "--data", world / "corpus", *options)
    assert done.code == 2
    assert message in done.err


def test_a_picture_of_one_piece_and_a_model_without_memory(world):
    corpus = write_corpus(world / "other", train=1, validation=3, notes=20)
    model, _ = checkpoint.load(world / "model")
    curve = reset_curve(with_horizons(model, (0, 0)), corpus, reset_at=32, max_tokens=1)
    assert memory_picture("svg", reset=curve).startswith(b"<svg")
    assert memory_picture("png", reset=curve) == memory_picture("png", reset=curve)
    assert curve.kept == pytest.approx(curve.emptied, abs=1e-6)
