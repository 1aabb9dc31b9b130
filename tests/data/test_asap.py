"""All of ASAP: prepared once, exact in events and in subwords."""

from pathlib import Path

import numpy as np
import pytest
from support.performance_reference import first_violation
from support.processes import cpu_seconds

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.prepare import PrepareReport, prepare
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, decode_ids
from dsmr_mlx.tokenizers.subwords import learn_subwords

pytestmark = [pytest.mark.slow, pytest.mark.asap]


@pytest.fixture(scope="module")
def prepared(asap_dir, tmp_path_factory) -> tuple[Path, PrepareReport]:
    """The folder of the corpus of all of ASAP, and the report."""
    folder, before = tmp_path_factory.mktemp("asap") / "corpus", cpu_seconds()
    report = prepare(asap_dir, folder)
    assert cpu_seconds() - before < 20
    return folder, report


@pytest.fixture(scope="module")
def corpus(prepared) -> Corpus:
    return Corpus.load(prepared[0])


def test_all_files_are_prepared(asap_dir, prepared, corpus):
    folder, report = prepared
    assert report.pieces == {"train": 885, "validation": 91}
    same = "same music as Beethoven/Piano_Sonatas/18-2/Schmitt01.mid"
    assert [entry.reason for entry in report.skipped] == [same]
    assert report.notes == 3_331_559
    assert report.tokens / report.notes == pytest.approx(4.04, abs=0.01)
    corpus.verify()
    assert prepare(asap_dir, folder).up_to_date


def test_all_pieces_are_grammatical_and_round_trip_exactly(asap_dir, corpus):
    for piece in corpus.pieces():
        notes, ids = read_notes(asap_dir / piece.source), corpus.tokens(piece)
        assert first_violation(ids) is None, piece
        decoded = decode_ids(ids)
        assert len(decoded) == len(notes), piece
        assert np.abs(np.sort(decoded.onset) - notes.onset).max() <= 0.005 + 1e-9, piece
        assert np.array_equal(PerformanceTokenizer().encode_notes(decoded), ids), piece


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_all_pieces_are_encoded_in_subwords_without_loss(corpus, kind):
    """Every event of 976 performances, with a model learned from 16 of them."""
    pieces = corpus.pieces()
    subwords = learn_subwords(PerformanceTokenizer(), [corpus.tokens(piece) for piece in pieces[::64]], kind, 1000)
    lengths = np.zeros(2)
    for piece in pieces:
        ids = subwords.from_events(corpus.tokens(piece))
        assert np.array_equal(subwords.to_events(ids), corpus.tokens(piece))
        lengths += len(ids), piece.length
    assert lengths[1] > 1.15 * lengths[0]
