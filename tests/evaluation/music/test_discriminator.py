"""The classifier finds sets that differ, and answers at random about sets that do not."""

import numpy as np
import pytest

from dsmr_mlx.evaluation.music import discriminator as D
from dsmr_mlx.evaluation.music.distances import FeatureSet
from dsmr_mlx.evaluation.music.features import DISTRIBUTIONS, FIGURES, Features


def a_set(rng: np.random.Generator, n: int, works: int | None = None, **shift: float) -> FeatureSet:
    """Pieces with normal features; some are shifted. works: of which there are several excerpts each."""
    features = []
    for _ in range(n):
        figures = {key: rng.normal() + shift.get(key, 0.0) for key in FIGURES}
        means = {d.key: rng.normal() if d.ordered else np.nan for d in DISTRIBUTIONS}
        features.append(Features({}, means, figures, np.empty(0)))
    return FeatureSet(features, [str(i % (works or n)) for i in range(n)])


def test_equal_sets_cannot_be_told_apart(monkeypatch):
    monkeypatch.setattr(D, "SHUFFLES", 1)  # they have no effect on the share of right answers
    found = [
        D.tell_apart(a_set(rng, 60), a_set(rng, 100), seed=seed).right
        for seed in range(20)
        for rng in [np.random.default_rng(seed)]
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.03)


def test_excerpts_of_one_work_do_not_help_to_recognize_it():
    """Copies of ten real works: with a copy among the pieces that it is fitted on, a classifier would know them all."""
    rng = np.random.default_rng(0)
    works = a_set(rng, 10)
    copies = FeatureSet(works.features * 10, works.origins * 10)
    assert D.tell_apart(a_set(rng, 100), copies).right < 0.65


def test_a_difference_is_found_and_named():
    rng = np.random.default_rng(1)
    found = D.tell_apart(a_set(rng, 60, key_clarity=-3.0), a_set(rng, 60))
    assert found.right > 0.85
    assert 0.01 < found.chance < 0.12
    title, weight = found.by[0]
    assert (title, weight < 0) == (FIGURES["key_clarity"], True)
    assert found.to_dict()["by"][0] == {"feature": title, "weight": weight}


def test_what_is_wrong_only_together_is_found():
    """In both sets two figures go together; in one, half a deviation apart, which neither shows by itself."""
    rng = np.random.default_rng(2)

    def paired(apart: float) -> FeatureSet:
        pieces = a_set(rng, 80)
        for f in pieces.features:
            f.figures["voices"] = f.figures["leap"] + apart + 0.1 * rng.normal()
        return pieces

    assert D.tell_apart(paired(0.0), paired(0.0)).right < 0.65
    assert D.tell_apart(paired(0.5), paired(0.0)).right > 0.75


def test_missing_and_constant_features_are_harmless():
    rng = np.random.default_rng(3)
    one, other = a_set(rng, 20), a_set(rng, 20)
    for pieces in (one, other):
        for f in pieces.features:
            f.figures["similarity_far"], f.figures["loop_ratio"] = np.nan, 1.0
    assert 0 <= D.tell_apart(one, other).right <= 1


@pytest.mark.parametrize("works", [100, 15])
def test_chance_is_what_luck_does(monkeypatch, works):
    """The deviation of the answers over many equal sets is the one that is reported, within a third."""
    rng = np.random.default_rng(8)
    found = [D.tell_apart(a_set(rng, 60), a_set(rng, 100, works)) for _ in range(4)]
    reported = np.mean([each.chance for each in found])
    monkeypatch.setattr(D, "SHUFFLES", 1)  # of the others only the answers are needed
    found += [D.tell_apart(a_set(rng, 60), a_set(rng, 100, works)) for _ in range(36)]
    assert reported == pytest.approx(np.std([each.right for each in found]), rel=0.35)


def test_copies_of_generated_music_do_not_help():
    rng = np.random.default_rng(7)
    works = a_set(rng, 10)
    copies = FeatureSet(works.features * 10, works.origins * 10)
    assert D.tell_apart(copies, a_set(rng, 100)).right < 0.68


def test_few_pieces_have_no_answer():
    rng = np.random.default_rng(4)
    assert D.tell_apart(a_set(rng, 9), a_set(rng, 100)) is None
    assert D.tell_apart(a_set(rng, 100), a_set(rng, 100, works=5)) is None


def test_the_weights_minimize_the_loss():
    rng = np.random.default_rng(5)
    values, new = rng.normal(size=(50, 3)), rng.random(50) < 0.3
    weights, bias = D.fit(values, new)

    def loss(weights: np.ndarray, bias: float) -> float:
        scores = np.where(new, 1, -1) * (values @ weights + bias)
        share = np.where(new, 0.5 / new.mean(), 0.5 / (1 - new.mean()))
        return float((share * np.log1p(np.exp(-scores))).sum() + D.RIDGE / 2 * (weights**2).sum())

    best = loss(weights, bias)
    for _ in range(50):
        assert loss(weights + 0.01 * rng.normal(size=3), bias + 0.01 * rng.normal()) > best
