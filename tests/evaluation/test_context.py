"""Loss against visible history: the same weights with less memory, paired differences, tables and pictures."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from support.dense_reference import dense_logits
from support.stand_ins import tiny_model
from support.tiny import TOKENIZER, write_corpus

from dsmr_mlx import DSMR, UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.context import (
    context_curves,
    distinct_horizons,
    history_caps,
    layer_groups,
    layer_names,
    plan_curves,
    with_horizons,
)
from dsmr_mlx.evaluation.estimates import estimate
from dsmr_mlx.evaluation.losses import POSITION_RANGES, evaluate, piece_losses
from dsmr_mlx.evaluation.memory_plot import memory_picture
from dsmr_mlx.evaluation.motif import motif_probe
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig

KINDS = {
    "rotary": {},
    "learned positions": {"max_positions": 128, "rope_dims": 0},
    "quantized": {"quantization": {"bits": 8, "group_size": 32}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizons", [(24, 0, 5), (7, 8, 9), (0, 0, 0)])
def test_shorter_horizons_equal_a_dense_pass_with_a_shorter_mask(kind, horizons):
    """And the given model does not change."""
    model = tiny_model(50, horizons=(40, 24, 16), **KINDS[kind])
    tokens = np.random.default_rng(0).integers(0, 50, (2, 90))
    before = np.array(model(tokens)[0])
    other = with_horizons(model, horizons)
    assert other.config.horizons == list(horizons)
    np.testing.assert_allclose(np.array(other(tokens)[0]), np.array(dense_logits(other, tokens)), atol=3e-5, rtol=1e-4)
    assert model.config.horizons == [40, 24, 16]
    assert np.array_equal(np.array(model(tokens)[0]), before)


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_with_horizons_shares_weights_and_is_bitwise_a_model_built_that_way(kind):
    """No array is copied, and no random number is drawn."""
    model = tiny_model(50, horizons=(40, 16), **KINDS.get(kind, {}))
    if kind == "bfloat16":
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    random_state = np.array(mx.random.state[0])
    other = with_horizons(model, (9, 3))
    assert np.array_equal(np.array(mx.random.state[0]), random_state)
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (model, other))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    built = DSMR(dataclasses.replace(model.config, horizons=[9, 3]))
    built.update(model.parameters())
    tokens = np.random.default_rng(0).integers(0, 50, (2, 70))
    assert np.array_equal(np.array(other(tokens)[0]), np.array(built(tokens)[0]))
    assert other.new_state().dtype == model.new_state().dtype


def test_horizons_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="expected n_layers = 2 integers"):
        with_horizons(tiny_model(50), (4,))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model with horizons 300, 300 and 80, a corpus with pieces of up to 600 tokens, and their curves."""
    corpus = write_corpus(tmp_path_factory.mktemp("curve") / "corpus", train=1, validation=3, notes=115)
    model = tiny_model(horizons=(300, 300, 80), d_model=16, d_ff=16)
    return model, corpus, context_curves(model, corpus, max_tokens=None)


@pytest.mark.slow
def test_the_ends_of_the_curve_are_the_model_and_the_model_without_memory(measured):
    """The last point is the plain evaluation, the first that of the schedule `none`."""
    model, corpus, curves = measured
    plain = evaluate(model, corpus)
    without_memory = evaluate(with_horizons(model, (0, 0, 0)), corpus)
    first, last = curves.curves[0].points[0], curves.curves[0].points[-1]
    assert (first.visible, last.visible) == (0, 300)
    assert last.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-14)
    assert first.nats_per_token == pytest.approx(without_memory.nats_per_token, rel=1e-14)
    assert (curves.pieces, curves.tokens) == (plain.pieces, plain.tokens)
    for row, position in zip(last.by_position, plain.by_position, strict=True):
        assert (row.start, row.end, row.tokens) == (position.start, position.end, position.tokens)
        assert row.nats_per_token == pytest.approx(position.nats_per_token, rel=1e-12)
    for curve in curves.curves:
        assert curve.points[-1].nats_per_token == last.nats_per_token
        assert curve.points[-1].cost.nats == 0


@pytest.mark.slow
def test_groups_are_capped_alone(measured):
    """In the curve of a group the other layers keep their horizons."""
    model, corpus, curves = measured
    labels = ["all layers", "layers 0–1 (300)", "layer 2 (80)"]
    assert [(c.label, c.layers) for c in curves.curves] == list(zip(labels, [[0, 1, 2], [0, 1], [2]], strict=True))
    assert [[p.visible for p in c.points] for c in curves.curves] == [[0, 64, 256, 300], [0, 64, 256, 300], [0, 64, 80]]
    upper = evaluate(with_horizons(model, (300, 300, 64)), corpus)
    assert curves.curves[2].points[1].nats_per_token == pytest.approx(upper.nats_per_token, rel=1e-14)
    lower = evaluate(with_horizons(model, (0, 0, 80)), corpus)
    assert curves.curves[1].points[0].nats_per_token == pytest.approx(lower.nats_per_token, rel=1e-14)


@pytest.mark.slow
def test_gains_steps_and_costs_are_paired_differences_of_the_losses(measured):
    """Against the losses of each piece, as a whole and for each range of positions."""
    model, corpus, curves = measured
    ids = [corpus.tokens(piece) for piece in corpus.pieces("validation")]
    capped = ([min(horizon, cap) for horizon in (300, 300, 80)] for cap in (0, 64, 256, 300))
    nats = [piece_losses(with_horizons(model, horizons), ids) for horizons in capped]
    for start, end in ((0, None), (0, 512), (512, 1024)):
        parts = [[losses[start:end].astype(np.float64) for losses in at] for at in nats]
        for i, point in enumerate(curves.curves[0].points):
            found = point
            if end is not None:
                (found,) = (row for row in point.by_position if (row.start, row.end) == (start, end))
                assert found.tokens == sum(map(len, parts[0]))
            for other, difference in ((0, found.gain), (i - 1, found.step)):
                if difference is None:
                    continue
                per_piece = [before - now for before, now in zip(parts[other], parts[i], strict=True)]
                per_piece = [tokens for tokens in per_piece if len(tokens)]
                mean = np.concatenate(per_piece).mean()
                assert difference.nats == pytest.approx(mean, abs=1e-9)
                residuals = np.array([(tokens - mean).sum() for tokens in per_piece])
                n, total = len(residuals), sum(map(len, per_piece))
                error = math.sqrt((residuals**2).sum() * n / (n - 1)) / total
                assert difference.error == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert curves.curves[0].points[0].step is None
    for point in curves.curves[0].points:
        cost = point.nats_per_token - curves.curves[0].points[-1].nats_per_token
        assert point.cost.nats == pytest.approx(cost, abs=1e-9)


@pytest.mark.slow
def test_a_step_is_none_if_the_whole_past_was_already_visible(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", train=1, validation=2, notes=170)
    model = tiny_model(horizons=(2048,), d_model=16, d_ff=16, segment_length=64)
    (curve,) = context_curves(model, corpus).curves
    assert [point.visible for point in curve.points] == [0, 64, 256, 1024, 2048]
    steps = {point.visible: [(row.start, row.step is None) for row in point.by_position] for point in curve.points}
    assert steps[1024] == [(0, False), (512, False)]
    assert steps[2048] == [(0, True), (512, True)]
    for before, now in zip(curve.points[3].by_position, curve.points[4].by_position, strict=True):
        assert now.nats_per_token == pytest.approx(before.nats_per_token, abs=1e-6)
    assert len(curve.points[0].by_position) == 2 < len(POSITION_RANGES)


@pytest.mark.parametrize(
    ("horizons", "groups"),
    [
        ((1024, 1024, 128, 128), [[0, 1], [2, 3]]),
        ((128, 1024, 128, 1024), [[1, 3], [0, 2]]),
        ((512,) * 5, [[0, 1, 2], [3, 4]]),
        ((1024, 1024, 0, 0), [[0], [1]]),
        ((1024, 0, 0), []),
        ((0, 0), []),
        ((800, 700, 600, 500, 400, 300), [[0, 1], [2, 3], [4], [5]]),
    ],
)
def test_layers_are_grouped_by_horizon(horizons, groups):
    assert layer_groups(horizons) == groups
    config = ModelConfig(vocab_size=9, n_layers=len(horizons), horizons=list(horizons))
    for plan in plan_curves(config)[1:]:
        for capped in plan.horizons:
            assert all(capped[i] == horizons[i] for i in range(len(horizons)) if i not in plan.layers)
        assert plan.horizons[-1] == horizons


def test_the_number_of_evaluations_is_bounded():
    """No horizons twice, those of the model first; 24 different horizons of up to 65,536 tokens need 31 evaluations."""
    config = ModelConfig(vocab_size=9, n_layers=24, horizons=[65536 - 1000 * i for i in range(24)])
    evaluations = distinct_horizons(plan_curves(config))
    assert evaluations[0] == tuple(config.horizons)
    assert len(evaluations) == len(set(evaluations)) <= 1 + 6 * 5 + 5
    assert distinct_horizons(plan_curves(ModelConfig(vocab_size=9, n_layers=2, horizons=[0, 0]))) == [(0, 0)]


def test_caps_and_layer_names():
    assert history_caps(0) == [0]
    assert history_caps(12) == [0, 12]
    assert history_caps(64) == [0, 64]
    assert history_caps(5000) == [0, 64, 256, 1024, 4096, 5000]
    assert layer_names([3]) == "layer 3"
    assert layer_names([0, 1, 2, 5, 7, 8]) == "layers 0–2, 5, 7–8"


def test_standard_errors_are_over_works():
    """Works of equal length: the standard error of the mean of their means; others: the spread of repeated samples."""
    rng = np.random.default_rng(0)
    sums = rng.normal(5, 2, 20)
    found = estimate(sums, np.full(20, 4), range(20))
    assert found.nats == pytest.approx(sums.mean() / 4)
    assert found.error == pytest.approx(sums.std(ddof=1) / math.sqrt(20) / 4)
    assert estimate(np.append(sums, 0.0), np.append(np.full(20, 4), 0), range(21)) == found
    assert math.isnan(estimate(np.array([3.0]), np.array([2]), "a").error)
    assert math.isnan(estimate(np.array([3.0, 2.0]), np.array([2, 2]), "aa").error)
    assert math.isnan(estimate(np.array([]), np.array([]), []).nats)
    assert math.isnan(estimate(np.array([3.0]), np.array([0]), "a").nats)
    assert estimate(np.array([3.0, 1.0]), np.array([2, 0]), "ab").nats == 2, "a passage without notes costs nats, too"
    performances = estimate(np.tile(sums, 3), np.full(60, 4), [*range(20)] * 3)  # three equal ones of each work
    assert (performances.nats, performances.error) == pytest.approx((found.nats, found.error))

    def sample() -> tuple[np.ndarray, np.ndarray]:
        counts = rng.integers(50, 500, 40)
        return counts * rng.normal(1, 0.3, 40) + rng.normal(0, 1, 40), counts

    estimates = [estimate(*sample(), range(40)) for _ in range(2000)]
    assert np.std([e.nats for e in estimates]) == pytest.approx(np.mean([e.error for e in estimates]), rel=0.05)


def test_a_model_without_memory_has_a_curve_of_one_point(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    curves = context_curves(tiny_model(horizons=(0, 0)), corpus)
    assert [[point.visible for point in curve.points] for curve in curves.curves] == [[0]]


def test_progress_counts_all_evaluations_and_another_vocabulary_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    seen = []
    model = tiny_model(horizons=(12, 4))
    curves = context_curves(model, corpus, progress=lambda done, total: seen.append((done, total)))
    n = len(distinct_horizons(plan_curves(model.config)))
    assert n == 4
    assert seen[-1] == (n * curves.tokens, n * curves.tokens)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with pytest.raises(UserError, match="vocabulary of 393 tokens, the model has 50"):
        context_curves(tiny_model(50), corpus)


@pytest.mark.slow
def test_the_same_curves_give_the_same_picture(measured, tmp_path):
    """With motifs; and a picture without motifs, of a single piece and a model without memory."""
    model, corpus, curves = measured
    probe = motif_probe(model, corpus, distances=[20, 40], probes=3, motif_tokens=20)
    assert memory_picture("png", curves, probe) == memory_picture("png", curves, probe)
    without = context_curves(with_horizons(model, (0, 0, 0)), corpus, max_tokens=1)
    assert memory_picture("svg", without).startswith(b"<svg")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A corpus with pieces longer than a motif, and the checkpoint of a random model."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder / "corpus", train=1, validation=3, notes=60)
    write_corpus(folder / "short", train=1, validation=2)
    model = tiny_model(horizons=(70, 16), d_model=16, d_ff=16, segment_length=64)
    checkpoint.save_model(folder / "model", model.config, model.parameters(), TOKENIZER)
    return folder


@pytest.mark.slow
def test_the_command_shows_curves_and_motifs(run, world):
    """JSON and tables have the same figures, the picture is written, and plain figures are as without the option."""
    common = ["evaluate", world / "model", "--data", world / "corpus"]
    context = ["--context-curve", "--distances", "136,128"]
    values = json.loads(run(*common, *context, "--json").out)
    plain = json.loads(run(*common, "--json").out)
    assert values.keys() - plain.keys() == {"context", "motifs", "no_motifs"}
    assert {key: values[key] for key in plain} == plain
    assert values["no_motifs"] is None
    assert [row["wanted"] for row in values["motifs"]["distances"]] == [128, 136]
    shown = run(*common, *context, "--plot", "context.png")
    assert (shown.code, shown.err) == (0, "")
    assert Path("context.png").read_bytes().startswith(b"\x89PNG")
    assert shown.out.splitlines()[-1].startswith("context.png: ")
    for curve in values["context"]["curves"]:
        assert curve["label"] in shown.out
        for point in curve["points"]:
            assert f"{point['nats_per_token']:.4f}" in shown.out
    for row in values["motifs"]["distances"]:
        assert f"{row['gain']['nats']:.4f} ± {row['gain']['error']:.4f}" in shown.out
    assert run(*common, *context, "--plot", "context.png").err.startswith(
        "dsmr-mlx: error: --plot context.png: already"
    )


def test_music_too_short_for_motifs_still_has_curves(run, world):
    """The reason is on standard error and in JSON; the picture has two panels."""
    common = ["evaluate", world / "model", "--data", world / "short", "--context-curve"]
    shown = run(*common, "--plot", "context.svg")
    assert "<svg" in Path("context.svg").read_text()
    assert shown.code == 0
    assert "note: no motif probe: " in shown.err
    assert "compositions of more than 128 tokens in split 'validation': 0, expected at least 2" in shown.err
    values = json.loads(run(*common, "--json").out)
    assert values["motifs"] is None
    assert "of more than 128 tokens" in values["no_motifs"]
    assert values["context"]["curves"][0]["points"][0]["step"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.png"], "--plot x.png: expected --context-curve, --reset-at or --gaps w"),
        (["--distances", "128"], "--distances 128: expected --context-curve with it"),
        (["--context-curve", "--distances", "12x"], "--distances 12x: expected numbers of tokens, such as"),
        (["--context-curve", "--distances", "128,"], "--distances 128,: expected numbers of tokens, such as"),
        (["--context-curve", "--distances", "1" * 5000], "expected numbers of tokens, such as"),
        (["--context-curve", "--distances", "127"], "--distances 127: expected at least 128"),
        (["--context-curve", "--plot", "x.pdf"], "--plot x.pdf: expected a name that ends in .png or .svg"),
    ],
)
def test_invalid_options_are_refused_before_the_evaluation(run, world, monkeypatch, options, message):
    monkeypatch.setattr("dsmr_mlx.evaluation.losses.piece_losses", None)
    done = run("evaluate", world / "model", "--data", world / "corpus", *options)
    assert done.code == 2
    assert message in done.err


def test_a_picture_without_matplotlib_says_what_to_install(run, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("evaluate", world / "model", "--data", world / "corpus", "--context-curve", "--plot", "x.png")
    assert done.code == 2
    assert "--plot: matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`" in done.err


@pytest.mark.slow
def test_a_sample_of_pieces_is_measured(run, world):
    pieces = Corpus.load(world / "corpus").pieces("validation")
    values = json.loads(
        run("evaluate", world / "model", "--data", world / "corpus", "--context-curve", "--max-tokens", 1,
            "--distances", "128", "--json").out
    )  # fmt: skip
    assert values["context"]["pieces"] == values["pieces"] == 1 < len(pieces)
    assert values["context"]["curves"][0]["points"][1]["gain"]["error"] is None
    assert values["context"]["tokens"] == values["tokens"]
