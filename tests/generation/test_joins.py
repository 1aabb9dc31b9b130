"""How well passages join: their likelihood and that of what follows, and the ranking by it."""

import mlx.core as mx
import numpy as np
import pytest
from support.music import piece

import dsmr_mlx
from dsmr_mlx.generation.gap_player import before_gap
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.joins import JoinScore, rank
from dsmr_mlx.generation.ranking import Score
from dsmr_mlx.music.gapped import joined, replaced
from dsmr_mlx.music.loops import Loop
from dsmr_mlx.tokenizers.performance import BOS, PerformanceTokenizer, encode_notes

TOKENIZER = PerformanceTokenizer()


def slow_nats(model, ids: np.ndarray, first: int) -> list[float]:
    """The nats of `ids[first:]` among the ids that the grammar allows, from one reading of everything."""
    walk = GrammarWalk(TOKENIZER)
    logits, _ = model(mx.array([[BOS, *ids.tolist()]]))
    nats = []
    for i in range(first, len(ids)):
        music = walk.begin(ids[:i])
        row = np.array(logits[0, i], np.float64)[np.array(walk.allowed(music, walk.bounds(Limits(), music)))[0]]
        nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - float(logits[0, i, int(ids[i])].item()))
    return nats


def test_the_score_is_the_likelihood_without_what_was_shown(knowing):
    notes = piece(7, 40)
    gap = (3.0, 4.5)
    version = dsmr_mlx.fill(knowing, TOKENIZER, notes, *gap, best_of=3)[0]
    score = version.scores[0]
    music = replaced(notes, [gap])
    following = music.after.take(music.after.onset <= 8.5)
    ids = encode_notes(joined(music.before, version.passages[0].notes, following)).astype(np.int64)
    first = len(before_gap(TOKENIZER, music).events)
    n, m = score.passage.tokens, score.following.tokens
    nats = slow_nats(knowing, ids[: first + n + m], first)
    assert score.passage.nats == pytest.approx(sum(nats[:n]), rel=1e-4)
    assert score.following.nats == pytest.approx(sum(nats[n:]), rel=1e-4)
    assert score.passage.notes == len(version.passages[0].notes)
    assert score.following.notes == len(following)
    both = score.passage.nats / score.passage.notes + score.following.nats / score.following.notes
    assert score.nats_per_note == pytest.approx(both)
    ticks = TOKENIZER.event_grammar().elapsed(ids)
    assert ticks[first + n - 1] < 450 <= ticks[first + n]


def test_the_passages_that_join_best_are_kept(knowing):
    notes = piece(7, 40)
    every = dsmr_mlx.fill(knowing, TOKENIZER, notes, 3, 4.5, n=5, best_of=5, seed=2)
    totals = [version.scores[0].nats_per_note for version in every]
    assert totals == sorted(totals)
    two = dsmr_mlx.fill(knowing, TOKENIZER, notes, 3, 4.5, n=2, best_of=5, seed=2)
    assert [version.candidate for version in two] == [version.candidate for version in every[:2]]

    def join(nats: float, loop: Loop | None = None, notes: int = 1) -> JoinScore:
        return JoinScore(Score(nats, 9, notes, loop), Score(1.0, 9, 1, None))

    looping = Loop(4, 4, 0)
    candidates = [[join(3)], [join(1, looping)], [join(2)], [join(1, notes=0)], [join(1, Loop(60, 3, 0))]]
    assert rank(candidates, 5) == [4, 2, 0, 3, 1]
    assert rank([[join(1), join(5)], [join(2), join(3)]], 1) == [1], "the mean over the gaps"
