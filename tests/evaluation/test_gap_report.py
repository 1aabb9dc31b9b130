"""What it is worth to be shown what follows a gap: against losses counted by hand, and the command that shows it."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.checkpoints import save
from support.music import random_notes
from support.stand_ins import tiny_model
from support.vocabularies import vocabulary

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.gaps import draw_gaps, show_gaps, with_lead
from dsmr_mlx.evaluation import gaps as measuring
from dsmr_mlx.evaluation.gaps import losses_in_gaps, measure_gaps, summarize_gaps
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, performance_grammar

TOKENIZER = PerformanceTokenizer()


def knowing(tokenizer=TOKENIZER):
    """A tiny model of random weights that counts as trained with gaps."""
    return tiny_model(tokenizer.vocab_size, fill=0.5, never_predicted=[tokenizer.fill_id, tokenizer.play_id])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Four pieces of some eight seconds."""
    folder = tmp_path_factory.mktemp("gaps") / "corpus"
    with CorpusWriter(folder, TOKENIZER) as writer:
        for i in range(5):
            piece, split = random_notes(i, 70), "validation" if i else "train"
            writer.add(
                TOKENIZER.encode_notes(piece), source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece)
            )
        writer.commit({})
    return Corpus.load(folder)


@pytest.fixture(autouse=True)
def short_passages(monkeypatch):
    monkeypatch.setattr(measuring, "JOIN_SECONDS", 2.0)


def slow_losses(model, ids: np.ndarray) -> np.ndarray:
    """The loss of every id after the first, from one reading."""
    logits = np.array(model(mx.array(ids[None].astype(np.int64)))[0][0], np.float64)[:-1]
    logits -= logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("name", ["performance", "performance bpe"])
def test_losses_of_passages_equal_those_counted_by_hand(name, monkeypatch):
    tokenizer = vocabulary(name)
    model = knowing(tokenizer)
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    pieces = [tokenizer.encode_notes(random_notes(i, 150)) for i in range(3)]
    found = losses_in_gaps(model, tokenizer, pieces)
    expected = []
    for i, ids in enumerate(pieces):
        events = tokenizer.to_events(ids)
        for gap in draw_gaps(tokenizer, ids, 1.0, 0, 0, i):
            ticks = performance_grammar().elapsed(events)
            inside = (ticks - ticks[gap.place - 1] < gap.ticks) & (np.arange(len(events)) >= gap.place)
            led = with_lead(events, [gap])
            shown = show_gaps(tokenizer, ids, led)
            play = int(np.flatnonzero(shown == tokenizer.play_id)[0])
            lead = gap.place - led[0].place  # events before the passage
            taken = tokenizer.to_events(shown[play + 1 :])
            assert taken[lead : lead + np.count_nonzero(inside)].tolist() == events[inside].tolist()
            ends = np.cumsum([len(tokenizer.to_events(shown[i : i + 1])) for i in range(play + 1, len(shown))])
            begins = np.append(0, ends[:-1])  # an id may straddle the beginning or the end
            whole = play + np.flatnonzero((begins >= lead) & (ends <= lead + np.count_nonzero(inside)))
            nats = slow_losses(model, shown)[whole].sum()
            expected.append((i, gap.ticks / 100, nats))
    assert [(gap.piece, gap.seconds) for gap in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([gap.shown for gap in found], [row[2] for row in expected], rtol=2e-4)
    if name == "performance":
        for gap in found:
            place = draw_gaps(tokenizer, pieces[gap.piece], 1.0, 0, 0, gap.piece)[0].place
            plain = slow_losses(model, pieces[gap.piece])
            ticks = performance_grammar().elapsed(pieces[gap.piece])
            end = int(np.searchsorted(ticks, ticks[place - 1] + round(gap.seconds * 100)))
            assert gap.nothing == pytest.approx(plain[place - 1 : end - 1].sum(), rel=2e-4)
            presses = performance_grammar().press[pieces[gap.piece][place:end]] >= 0
            assert gap.notes == presses.sum()


def test_the_report(corpus):
    report = measure_gaps(knowing(), corpus, joins=2)
    assert report.everything.pieces == 4
    assert report.everything.gaps == sum(row.gaps for row in report.by_length)
    assert sum(row.notes for row in report.by_length) == report.everything.notes
    gain = report.everything.nothing.nats - report.everything.shown.nats
    assert report.everything.gain.nats == pytest.approx(gain)
    assert [kind.kind for kind in report.joins] == ["true", "shown", "continued", "foreign"]
    assert report.joined == 2
    true, *others = report.joins
    assert true.cost.nats == 0
    for kind in others:
        assert kind.cost.nats == pytest.approx(kind.following.nats - true.following.nats)
        assert math.isfinite(kind.cost.error)
    again = measure_gaps(knowing(), corpus, joins=2)
    assert repr(again) == repr(report)
    assert summarize_gaps([], [], 2, 4).gaps == 0


def test_models_that_know_no_gaps_and_short_pieces_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="`gaps`: not with this model: it does not read what follows a gap"):
        measure_gaps(tiny_model(), corpus)
    with CorpusWriter(tmp_path / "short", TOKENIZER) as writer:
        for split in ("train", "validation"):
            piece = random_notes(1, 3)
            ids = TOKENIZER.encode_notes(piece)
            writer.add(ids, source=f"{split}.mid", split=split, duration=piece.duration, notes=3)
        writer.commit({})
    with pytest.raises(UserError, match="no validation piece is long enough for a gap of 2 seconds"):
        measure_gaps(knowing(), Corpus.load(tmp_path / "short"))


@pytest.mark.slow
def test_the_command_shows_draws_and_prints_it(run, corpus, tmp_path, trained):
    folder = tmp_path / "model"
    save(folder, TOKENIZER, fill=0.5)
    ended = run("evaluate", folder, "--data", corpus.path, "--gaps", "--max-tokens", 600, "--plot", "a.svg")
    assert ended.code == 0, ended.err
    assert "being shown what follows is worth" in ended.out
    assert "played, what follows shown" in ended.out
    picture = Path("a.svg").read_text()
    assert "true passages in gaps" in picture
    assert "what follows passages of 2 s" in picture
    printed = run("evaluate", folder, "--data", corpus.path, "--gaps", "--max-tokens", 600, "--json")
    found = json.loads(printed.out)["gaps"]
    assert found["everything"]["gaps"] == sum(row["gaps"] for row in found["by_length"])
    assert found["joined"] >= 2
    refused = run("evaluate", trained.run, "--data", corpus.path, "--gaps")
    assert refused.code == 2
    assert refused.err.endswith(
        "error: --gaps: not with this model: it does not read what follows a gap (fill is 0 in its config.json)\n"
    )
