"""Repeated motifs: the structure of the probes, and gains exactly within the reach of the memory."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.induction_model import induction_model
from support.music import random_notes
from support.performance_reference import first_violation
from support.stand_ins import tiny_model
from support.tiny import TOKENIZER, write_corpus

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.evaluation import motif
from dsmr_mlx.evaluation.motif import (
    Motif,
    NoProbe,
    Probe,
    check_distances,
    default_distances,
    distance_result,
    make_probes,
    motif_probe,
)
from dsmr_mlx.evaluation.passages import DecodedPiece, without_specials
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.horizons import model_reach
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.performance import decode_ids, encode_notes
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.subwords import learn_subwords

KINDS = ["performance", "REMI", "bpe"]


@pytest.fixture(scope="module")
def tokenizers():
    """Tokenizers by kind."""
    pytest.importorskip("miditok")
    pytest.importorskip("sentencepiece")
    base = make_tokenizer("performance")
    learned = learn_subwords(base, [base.encode_notes(random_notes(i, 100)) for i in range(8)], "bpe", 420)
    return {"performance": base, "bpe": learned, "REMI": make_tokenizer("miditok:REMI")}


def corpus_of(folder, tokenizer, notes: list[Notes], titles: list[str] | None = None) -> Corpus:
    """A corpus with a validation split of these pieces."""
    with CorpusWriter(folder, tokenizer) as writer:
        for i, piece in enumerate(notes):
            title = titles[i] if titles else ""
            ids = tokenizer.encode_notes(piece)
            composer = "somebody" if title else ""
            about = {"composer": composer, "title": title, "duration": piece.duration, "notes": len(piece)}
            writer.add(ids, source=f"{i}.mid", split="validation", **about)
        writer.commit({})
    return Corpus.load(folder)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_concatenated_passages_decode_as_each_one_alone(tokenizers, kind, seed, data):
    """For any cuts, also through chords and sustained notes: no note sounds across the end of a passage."""
    tokenizer = tokenizers[kind]
    music = DecodedPiece(tokenizer, tokenizer.event_grammar(), tokenizer.encode_notes(random_notes(seed, 60)))
    rows = []
    for _ in range(3):
        first = data.draw(st.integers(0, music.n_starts - 1))
        rows.append(music.between(first, data.draw(st.integers(first + 1, music.n_starts))))
    together = tokenizer.decode(np.concatenate(rows))
    assert sum(len(tokenizer.decode(ids)) for ids in rows) == len(together)
    place = 0
    for ids in rows:
        alone = tokenizer.decode(ids)
        part = together.take(slice(place, place + len(alone)))
        place += len(alone)
        np.testing.assert_allclose(part.onset - part.onset[0], alone.onset - alone.onset[0], atol=1e-9)
        np.testing.assert_allclose(part.offset - part.onset[0], alone.offset - alone.onset[0], atol=1e-9)
        assert np.array_equal(part.pitch, alone.pitch)
        assert np.array_equal(part.velocity, alone.velocity)
        if place < len(together):
            assert part.offset.max() <= together.onset[place] + 1e-9


def test_a_passage_is_the_music_between_two_onsets():
    """Chords stay whole, earlier notes are left out, notes that still sound are cut, and the grammar holds."""
    notes = Notes([0, 0, 1, 1, 1, 2, 3], [9, 1, 2, 2, 9, 2.5, 4], [60, 64, 50, 55, 59, 72, 74], [50] * 7)
    music = DecodedPiece(TOKENIZER, TOKENIZER.event_grammar(), TOKENIZER.encode_notes(notes))
    assert music.n_starts == 4
    ids = music.between(1, 3)
    assert first_violation(ids) is None
    found = decode_ids(ids)
    assert found.onset.tolist() == [0, 0, 0, 1]
    assert found.pitch.tolist() == [50, 55, 59, 72]
    assert found.offset.tolist() == [1, 1, 2, 1.5]
    assert np.array_equal(music.between(0, 4), encode_notes(notes))


@pytest.mark.parametrize("tokens", [1, 17, 60, 150, 10_000])
def test_a_passage_has_the_requested_length_up_to_a_chord(tokens):
    music = DecodedPiece(TOKENIZER, None, TOKENIZER.encode_notes(random_notes(3, 100)))
    for first in (0, 40, music.n_starts - 1):
        ids, end = music.passage(first, tokens)
        lengths = [len(music.between(first, other)) for other in range(first + 1, music.n_starts + 1)]
        assert len(ids) == lengths[end - first - 1]
        assert abs(len(ids) - tokens) <= min(abs(np.array(lengths) - tokens)) + 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_structure_of_probes(tokenizers, kind, tmp_path):
    """BOS, the motif, music of another work, the same ids again; the control differs only in its first motif."""
    tokenizer = tokenizers[kind]
    titles = ["a", "a", "b", "c", "c"]
    corpus = corpus_of(tmp_path / "c", tokenizer, [random_notes(i, 130) for i in range(5)], titles)
    near, far = make_probes(corpus, "validation", [48, 400], probes=12, motif_tokens=48)
    for a, b in zip(near, far, strict=True):
        assert np.array_equal(a.motif.ids, b.motif.ids)
    for probe in far:
        m = len(probe.motif.ids)
        assert abs(m - 48) <= 2
        assert abs(probe.tokens - 400) <= 8
        assert probe.repeat[0] == probe.control[0] == tokenizer.bos_id
        assert np.array_equal(probe.repeat[1 : 1 + m], probe.motif.ids)
        assert np.array_equal(probe.repeat[-m:], probe.motif.ids)
        assert np.array_equal(probe.control[-m:], probe.motif.ids)
        assert len(probe.repeat) == 1 + probe.tokens + m
        if len(probe.control) == len(probe.repeat):
            differ = np.flatnonzero(probe.control != probe.repeat)
            assert len(differ) > 0
            assert differ.max() <= m
        assert tokenizer.bos_id not in probe.repeat[1:]
        assert tokenizer.eos_id not in probe.repeat
        filler = tokenizer.decode(probe.repeat[1 + m : -m])
        own = {p.source for p in corpus.pieces() if p.work != probe.motif.piece.work}
        pitches = [set(tokenizer.decode(corpus.tokens(p)).pitch) for p in corpus.pieces() if p.source in own]
        assert set(filler.pitch) <= set().union(*pitches)
    assert sum(len(p.control) == len(p.repeat) for p in far) >= 10
    assert {p.motif.piece.work for p in far} == {("somebody", "a"), ("somebody", "b"), ("somebody", "c")}
    assert max(p.tokens for p in near) <= 50


def test_the_filler_is_music_of_other_works(tmp_path):
    """Each work has its own pitch: the filler has neither that of the motif nor that of the control's first motif."""
    pitches = [40, 40, 50, 60, 60, 70]
    melodies = [random_notes(i, 200) for i in range(6)]
    pieces = [
        Notes(n.onset, n.onset + 0.01, np.full(200, p), n.velocity) for n, p in zip(melodies, pitches, strict=True)
    ]
    corpus = corpus_of(tmp_path / "c", TOKENIZER, pieces, [str(p) for p in pitches])
    ((*probes,),) = make_probes(corpus, "validation", [300], probes=16, motif_tokens=64)
    for probe in probes:
        m = len(probe.motif.ids)
        (own,) = set(decode_ids(probe.motif.ids).pitch)
        (other,) = set(decode_ids(probe.control[1 : len(probe.control) - len(probe.repeat) + m + 1]).pitch)
        filler = set(decode_ids(probe.repeat[1 + m : -m]).pitch)
        assert other != own
        assert filler
        assert not filler & {own, other}


def test_probes_are_a_function_of_corpus_split_and_seed(tmp_path):
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 100) for i in range(4)])

    def sequences(seed: int) -> list[bytes]:
        return [p.repeat.tobytes() for p in make_probes(corpus, "validation", [200], 8, 40, seed)[0]]

    assert sequences(0) == sequences(0)
    assert not set(sequences(0)) & set(sequences(1))


SEGMENT = 32


@pytest.mark.slow
def test_an_induction_model_gains_within_its_memory_only(tmp_path):
    """An induction head with a horizon of 256 tokens has a large gain within it and none beyond."""
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 150) for i in range(6)])
    model = induction_model(TOKENIZER.vocab_size, horizons=(8, 256), segment_length=SEGMENT)
    found = motif_probe(model, corpus, distances=[64, 128, 256, 512], probes=12, motif_tokens=64)
    assert found.reach == 8 + 256
    gains = {row.wanted: row.gain for row in found.distances}
    for wanted in (64, 128, 256):
        assert gains[wanted].nats > 1
        assert gains[wanted].nats > 10 * gains[wanted].error
    assert abs(gains[512].nats) < 1e-5
    model = induction_model(TOKENIZER.vocab_size, (8, 96), SEGMENT)
    short = motif_probe(model, corpus, distances=[64, 256], probes=12, motif_tokens=64)
    assert [row.gain.nats > 1 for row in short.distances] == [True, False]
    assert abs(short.distances[1].gain.nats) < 1e-5
    # The first repeats follow the motif at once, so that its end is in every memory.
    assert [row.layers for row in found.distances] == [[0, 1], [1], [1], []]
    assert [row.within_reach for row in found.distances] == [True, True, True, False]


@pytest.mark.parametrize(
    ("horizons", "canon"), [((32, 8), False), ((0, 0), False), ((16, 48, 0), False), ((16, 0), True)]
)
def test_beyond_the_reach_the_gain_is_zero_for_any_weights(tmp_path, horizons, canon):
    """And within the reach it is not."""
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 150) for i in range(4)])
    model = tiny_model(horizons=horizons, segment_length=16, canon=canon)
    beyond = model_reach(model.config) + 16 + 48 + 8
    near, far = motif_probe(model, corpus, distances=[48, beyond], probes=6, motif_tokens=48).distances
    assert abs(far.gain.nats) < 1e-6
    assert far.gain.error < 1e-6
    assert not far.within_reach
    assert near.gain.error > 1e-4
    assert near.first.nats == pytest.approx(far.first.nats, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    horizons=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    segment=st.integers(1, 64),
    places=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), min_size=1, max_size=3),
    begin=st.integers(0, 1),
)
def test_layers_with_a_part_of_the_motif_in_their_memory(horizons, segment, places, begin):
    """Against the positions that each layer attends to where the repeat begins, if any probe's motif is among them."""
    config = ModelConfig(vocab_size=9, n_layers=len(horizons), horizons=horizons, segment_length=segment)
    probes, seen = [], set()
    for length, filler in places:
        first = Motif(SimpleNamespace(work="a"), np.zeros(length))
        probes.append(Probe(first, np.zeros(begin + 2 * length + filler), np.zeros(0), length + filler))
        last = begin + length + filler - 1  # the position from which the repeat is first predicted
        positions = [set(range(last // segment * segment - horizon, last + 1)) for horizon in horizons]
        seen |= {i for i, of in enumerate(positions) if of & set(range(begin, begin + length))}
    found = distance_result(config, 1, probes, *[[np.zeros(1)] * len(probes)] * 3)
    assert found.layers == sorted(seen)
    assert found.within_reach >= bool(seen)


def test_losses_are_taken_at_the_places_of_the_motif(tmp_path, monkeypatch):
    """With losses that encode the position of a token and its sequence."""
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 150) for i in range(4)])
    model, read = tiny_model(), []

    def losses(model, sequences, batch_size):
        return [np.arange(1, len(ids), dtype=np.float32) + 1000 * i for i, ids in enumerate(sequences)]

    def last(model, ids, n):
        read.append(ids)
        return np.arange(1, len(ids), dtype=np.float32)[-n:] + 1000 * (len(read) - 1)

    monkeypatch.setattr(motif, "piece_losses", losses)
    monkeypatch.setattr(motif, "last_losses", last)
    seen, options = [], {"distances": [200], "probes": 4, "motif_tokens": 40}
    found = motif_probe(model, corpus, **options, progress=lambda done, total: seen.append((done, total)))
    ((*probes,),) = make_probes(corpus, "validation", [200], 4, 40)
    (row,) = found.distances
    lengths = np.array([len(p.motif.ids) for p in probes])
    first = [1000 * i + (1 + m) / 2 for i, m in enumerate(lengths)]
    repeat = [value + p.tokens for value, p in zip(first, probes, strict=True)]
    control = [1000 * (4 + i) + len(p.control) - (1 + len(p.motif.ids)) / 2 for i, p in enumerate(probes)]
    for name, expected in (("first", first), ("repeat", repeat), ("control", control)):
        assert getattr(row, name).nats == pytest.approx(np.average(expected, weights=lengths), rel=1e-6)
    assert row.gain.nats == pytest.approx(row.control.nats - row.repeat.nats, rel=1e-6)
    assert row.tokens == pytest.approx(np.mean([p.tokens for p in probes]))
    assert found.works == 4
    assert found.motif_tokens == lengths.mean()
    assert seen == [(8, 8)]


def test_errors_are_over_compositions(tmp_path, monkeypatch):
    """Probes of one composition are pooled: the gains of one are 1 and 3, those of the other 5 and 5."""
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 150) for i in range(2)])
    ((*probes,),) = make_probes(corpus, "validation", [200], 4, 40)
    first = probes[0].motif.piece.work
    gains = iter([1.0, 3.0])
    gain = [next(gains) if p.motif.piece.work == first else 5.0 for p in probes]

    losses = iter([0.0] * 4 + gain)  # of repeats and controls
    monkeypatch.setattr(motif, "last_losses", lambda model, ids, n: np.full(n, next(losses), np.float32))
    (row,) = motif_probe(tiny_model(), corpus, distances=[200], probes=4, motif_tokens=40).distances
    assert row.gain.nats == pytest.approx(3.5, abs=0.1)
    assert row.gain.error == pytest.approx(1.5, abs=0.1)  # means 2 and 5: their standard deviation over √2


def test_default_distances_follow_from_the_memory():
    """Doubles of the motif to twice the reach, at most 8,192 or twice the longest horizon, within learned positions."""

    def distances(*horizons: int, **options) -> list[int]:
        settings = {"vocab_size": 9, "n_layers": len(horizons), "horizons": list(horizons), "segment_length": 128}
        return default_distances(ModelConfig(**(settings | options)))

    assert distances(1024, 1024, 128, 128, 128, 128) == [128, 256, 512, 1024, 2048, 4096]
    assert distances(*[2048] * 8)[-1] == 8192
    assert distances(*[8192] * 4)[-1] == 16384
    assert distances(0, 0) == [128, 256, 512]
    assert distances(*[1024] * 4, max_positions=1024) == [128, 256, 512]
    config = ModelConfig(vocab_size=9, n_layers=1, horizons=[64])
    assert check_distances(config, [512, 128, 512]) == [128, 512]
    with pytest.raises(UserError, match="`distances` 99,999,999,999: expected at most 1,000,000"):
        check_distances(config, [99_999_999_999])


def test_distances_stay_within_learned_positions(tmp_path):
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 150) for i in range(4)])
    model = tiny_model(horizons=(200, 8), max_positions=300, rope_dims=0)
    found = motif_probe(model, corpus, probes=4, motif_tokens=50)
    assert [row.wanted for row in found.distances] == [50, 100, 200]
    assert all(math.isfinite(row.repeat.nats) for row in found.distances)
    with pytest.raises(NoProbe, match="distance 201: expected at most 200, the model has 300 learned positions"):
        motif_probe(model, corpus, distances=[201], motif_tokens=50)
    with pytest.raises(NoProbe, match="128: expected at most 44"):
        motif_probe(model, corpus)


def test_a_small_corpus_is_repeated_as_filler(tmp_path):
    """Two pieces of 200 tokens fill 2,000 tokens between a motif and its repeat."""
    corpus = corpus_of(tmp_path / "c", TOKENIZER, [random_notes(i, 50) for i in range(2)])
    ((*probes,),) = make_probes(corpus, "validation", [2000], 4, 64)
    assert all(abs(probe.tokens - 2000) < 10 for probe in probes)


def test_invalid_probes_are_refused(tmp_path):
    """Ids without notes, a single composition, motifs longer than the pieces, distances shorter than the motif."""
    ids = IdTokenizer(vocab_size=50, name="foreign", bos_id=1)
    with CorpusWriter(tmp_path / "ids", ids) as writer:
        for i in range(3):
            writer.add(np.arange(1, 40), source=str(i), split="validation", duration=1.0, notes=9)
        writer.commit({})
    with pytest.raises(NoProbe, match="motifs need notes, and tokenizer 'ids' cannot decode any"):
        motif_probe(tiny_model(50), Corpus.load(tmp_path / "ids"))
    notes = [random_notes(i, 60) for i in range(2)]
    same = corpus_of(tmp_path / "same", TOKENIZER, notes, ["a", "a"])
    with pytest.raises(NoProbe, match="more than 128 tokens in split 'validation': 1, expected at least 2"):
        motif_probe(tiny_model(), same)
    corpus = write_corpus(tmp_path / "corpus", train=1)
    with pytest.raises(NoProbe, match="more than 500 tokens in split 'validation': 0,"):
        motif_probe(tiny_model(), corpus, motif_tokens=500)
    with pytest.raises(UserError, match="`distances` 100: expected at least 128"):
        motif_probe(tiny_model(), corpus, distances=[100])
    with pytest.raises(UserError, match="`distances` none: expected at least 128"):
        motif_probe(tiny_model(), corpus, distances=[])
    with pytest.raises(UserError, match="`probes` 1: expected at least 2"):
        motif_probe(tiny_model(), corpus, probes=1)
    with pytest.raises(UserError, match="`motif_tokens` 0: expected at least 1"):
        motif_probe(tiny_model(), corpus, motif_tokens=0)
    with pytest.raises(UserError, match="the model has 50"):
        motif_probe(tiny_model(50), corpus)


def test_specials_are_removed_only_at_the_ends():
    assert without_specials(TOKENIZER, np.array([1, 9, 1, 2, 9, 2])).tolist() == [9, 1, 2, 9]
    assert without_specials(TOKENIZER, np.array([9])).tolist() == [9]
    assert without_specials(TOKENIZER, np.array([1, 2])).tolist() == []
    assert without_specials(TOKENIZER, np.array([1])).tolist() == []
