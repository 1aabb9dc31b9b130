"""Losses of whole pieces against one dense pass, and figures computed from them."""

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_reference import dense_logits
from support.stand_ins import tiny_model
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx import DSMR, UserError
from dsmr_mlx.cli import main
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation.losses import (
    evaluate,
    last_losses,
    loss_by_position,
    piece_losses,
    sample_pieces,
    weight_info,
)
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.subwords import learn_subwords


def make_model(tokenizer: Tokenizer = TOKENIZER) -> DSMR:
    """A random model of the tiny configuration."""
    mx.random.seed(1)
    model = DSMR(tiny_config().model_config(tokenizer))
    model.embed.weight = mx.random.normal(model.embed.weight.shape, scale=0.5)
    return model


def dense_losses(model: DSMR, ids: np.ndarray) -> np.ndarray:
    """Return the losses `(n,)` of n + 1 ids from one dense pass, in float64."""
    logits = np.array(dense_logits(model, ids[None, :-1].astype(np.int32))[0], np.float64)
    peak = logits.max(-1)
    log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
    return log_sum - logits[np.arange(len(ids) - 1), ids[1:].astype(int)]


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 2, 3, 16])
def test_streamed_losses_equal_one_dense_pass_for_any_number_of_lanes(tmp_path, lanes):
    corpus = write_corpus(tmp_path / "corpus")
    model = make_model()
    pieces = [corpus.tokens(piece) for piece in corpus.pieces()]
    for streamed, ids in zip(piece_losses(model, pieces, lanes), pieces, strict=True):
        np.testing.assert_allclose(streamed, dense_losses(model, ids), atol=2e-4, rtol=2e-5)


def test_no_more_lanes_than_stay_busy_while_the_longest_piece_is_read(monkeypatch):
    """Pieces of 80, 20, 20, 20 and 20 predictions need two lanes, not five; equal pieces one lane each."""
    model, seen = make_model(), []
    monkeypatch.setattr(DSMR, "new_state", lambda self, n: seen.append(n) or RecurrentState.empty(self.config, n))
    rng = np.random.default_rng(0)
    for lengths in ([80, 20, 20, 20, 20], [20, 20, 20]):
        piece_losses(model, [rng.integers(0, TOKENIZER.fill_id, n + 1) for n in lengths], 8)
    assert seen == [2, 3]


def test_figures_follow_from_the_losses(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    model = make_model()
    pieces = corpus.pieces("validation")
    losses = [dense_losses(model, corpus.tokens(piece)) for piece in pieces]
    total, tokens = sum(map(np.sum, losses)), sum(map(len, losses))
    seen = []
    evaluation = evaluate(model, corpus, "validation", progress=lambda done, total: seen.append((done, total)))
    assert evaluation.tokens == tokens == sum(piece.length - 1 for piece in pieces)
    assert evaluation.perplexity == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert evaluation.nats_per_token == pytest.approx(total / tokens, rel=1e-5)
    assert evaluation.nats_per_note == pytest.approx(total / sum(p.notes for p in pieces), rel=1e-5)
    assert evaluation.nats_per_second == pytest.approx(total / sum(p.duration for p in pieces), rel=1e-5)
    by_piece = sorted(losses, key=np.mean)
    assert [p.nats_per_token for p in evaluation.by_piece] == pytest.approx([x.mean() for x in by_piece], rel=1e-5)
    assert seen[-1] == (tokens, tokens)
    assert evaluation.to_dict()["by_position"][0]["tokens"] == min(512, tokens)


def test_without_subwords_every_token_is_an_event(tmp_path):
    evaluation = evaluate(make_model(), write_corpus(tmp_path / "corpus"))
    assert evaluation.events == evaluation.tokens
    assert evaluation.nats_per_event == evaluation.nats_per_token


def test_the_first_id_counts_only_if_it_is_an_event(tmp_path):
    """In Aria's vocabulary prefixes and BOS are no events."""
    corpus = write_corpus(tmp_path / "corpus", tokenizer=AriaTokenizer())
    evaluation = evaluate(tiny_model(corpus.tokenizer.vocab_size), corpus)
    predicted = [corpus.tokenizer.to_events(corpus.tokens(piece)[1:]) for piece in corpus.pieces("validation")]
    assert evaluation.events == sum(map(len, predicted))


def test_the_loss_per_event_of_subwords_counts_base_events(tmp_path):
    """Those of the same pieces in the base vocabulary, without BOS."""
    pytest.importorskip("sentencepiece")
    base = write_corpus(tmp_path / "base")
    subwords = learn_subwords(TOKENIZER, [base.tokens(piece) for piece in base.pieces()], "bpe", 420)
    with CorpusWriter(tmp_path / "subwords", subwords) as writer:
        for piece in base.pieces():
            about = {"source": piece.source, "split": piece.split, "duration": piece.duration, "notes": piece.notes}
            writer.add(subwords.from_events(base.tokens(piece)), **about)
        writer.commit({})
    corpus = Corpus.load(tmp_path / "subwords")
    model = make_model(subwords)
    evaluation = evaluate(model, corpus)
    assert evaluation.events == sum(piece.length - 1 for piece in base.pieces("validation"))
    assert evaluation.events > 1.05 * evaluation.tokens
    total = sum(dense_losses(model, corpus.tokens(piece)).sum() for piece in corpus.pieces("validation"))
    assert evaluation.nats_per_event == pytest.approx(total / evaluation.events, rel=1e-5)
    for count, nats in (("tokens", "token"), ("notes", "note"), ("seconds", "second")):
        assert getattr(evaluation, count) * getattr(evaluation, f"nats_per_{nats}") == pytest.approx(total, rel=1e-5)


def test_loss_by_position_splits_at_the_stated_edges():
    losses = [np.arange(600.0), np.arange(10_000.0)]
    rows = loss_by_position(losses)
    starts = [0, 512, 1024, 2048, 4096, 8192]
    assert [(r.start, r.end) for r in rows] == list(zip(starts, [*starts[1:], None], strict=True))
    assert [r.tokens for r in rows] == [1024, 88 + 512, 1024, 2048, 4096, 10_000 - 8192]
    assert rows[-1].nats_per_token == pytest.approx(np.arange(8192, 10_000).mean())
    assert len(loss_by_position([np.ones(5)])) == 1


def test_a_sample_is_fixed_and_has_whole_pieces_of_about_the_limit(tmp_path):
    pieces = write_corpus(tmp_path / "corpus", train=20).pieces("train")
    sample = sample_pieces(pieces, 2000)
    assert sample == sample_pieces(pieces, 2000)
    assert sum(piece.length for piece in sample) == pytest.approx(2000, rel=0.25)
    assert len(sample_pieces(pieces, 1)) == 1
    assert sample_pieces(pieces, None) == pieces
    everything = sample_pieces(pieces, 10**9)
    assert sorted(piece.source for piece in everything) == sorted(piece.source for piece in pieces)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 50_000), min_size=1, max_size=12), st.integers(1, 400_000))
def test_a_sample_prefers_neither_short_nor_long_pieces(lengths, limit):
    """Over all random starts, each piece is in equally many samples; each has the limit over the mean length."""
    pieces = [SimpleNamespace(length=length, number=i) for i, length in enumerate(lengths)]
    starts, expected = len(pieces), min(max(round(limit / np.mean(lengths)), 1), len(pieces))
    times = np.zeros(len(pieces), int)
    for i in range(starts):
        with pytest.MonkeyPatch.context() as patched:
            start = SimpleNamespace(random=lambda i=i: (i + 0.5) / starts)
            patched.setattr(np.random, "default_rng", lambda seed, start=start: start)
            numbers = [piece.number for piece in sample_pieces(pieces, limit)]
        assert len(numbers) == len(set(numbers)) == expected
        times[numbers] += 1
    assert set(times) == {expected}


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantization_does_not_change_the_number_of_parameters(tmp_path, bits):
    config = tiny_config(d_model=64, d_ff=64, n_heads=4, head_dim=16, tie_embeddings=False).model_config(TOKENIZER)
    quantization = {"bits": bits, "group_size": 32}
    models = {"plain": DSMR(config), "quantized": DSMR(dataclasses.replace(config, quantization=quantization))}
    found = {}
    for name, model in models.items():
        checkpoint.save_model(tmp_path / name, model.config, model.parameters(), TOKENIZER)
        found[name] = weight_info(model, tmp_path / name)
    plain, quantized = found["plain"], found["quantized"]
    assert quantized.parameters == plain.parameters == models["plain"].n_parameters
    assert (plain.dtype, plain.bits, plain.group_size) == ("float32", None, None)
    assert (quantized.dtype, quantized.bits, quantized.group_size) == ("float32", bits, 32)
    for name, weights in found.items():
        assert weights.bytes == (tmp_path / name / "model.safetensors").stat().st_size
    per_weight = bits / 32 + 2 / 32  # plus a scale and a bias of 32 bits for each group of 32
    assert quantized.bytes / plain.bytes == pytest.approx(per_weight, rel=0.1)


def test_all_dtypes_of_the_weights_are_named(tmp_path):
    model = make_model()
    model.norm.weight = model.norm.weight.astype(mx.bfloat16)
    checkpoint.save_model(tmp_path, model.config, model.parameters(), TOKENIZER)
    assert weight_info(model, tmp_path).dtype == "bfloat16 and float32"


def test_another_vocabulary_and_a_missing_split_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    with pytest.raises(UserError, match="vocabulary of 393 tokens, the model has 50"):
        evaluate(make_model(IdTokenizer(50, "other")), corpus)
    with pytest.raises(UserError, match=r"no test pieces, expected `split` train or validation"):
        evaluate(make_model(), corpus, "test")


def test_a_corpus_without_a_validation_part_names_the_others(trained, tmp_path, capsys):
    prepare(trained.midi, tmp_path / "c", validation_fraction=0)
    capsys.readouterr()
    for command, checkpoints in (("evaluate", [trained.run]), ("compare", [trained.run, trained.checkpoint])):
        assert main([command, *map(str, checkpoints), "--data", str(tmp_path / "c")]) == 2
        assert "c: no validation pieces, expected --split train" in capsys.readouterr().err


@pytest.mark.parametrize("length", [2, 9, 40, 300])
@pytest.mark.parametrize("n", [1, 8])
def test_the_last_losses_are_those_of_the_whole_piece(length, n):
    model, ids = tiny_model(horizons=(32, 8)), np.random.default_rng(0).integers(0, TOKENIZER.fill_id, length)
    n = min(n, length - 1)
    (whole,) = piece_losses(model, [ids])
    np.testing.assert_allclose(last_losses(model, ids, n), whole[-n:], rtol=1e-5, atol=1e-5)
