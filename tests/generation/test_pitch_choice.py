"""Biases on the choice of keys, against references in plain Python."""

import math

import numpy as np
import pytest
from support.random_lanes import PRESSES, Lanes, some_prefixes
from support.vocabularies import music_for, vocabulary

from dsmr_mlx.generation.grammar import GrammarWalk
from dsmr_mlx.generation.steering import PitchChoice, PitchClasses
from dsmr_mlx.tokenizers.performance import NOTE_ON, VOCAB_SIZE

PRESS = np.array([i in PRESSES for i in range(VOCAB_SIZE)])
CLASS = (np.arange(VOCAB_SIZE) - NOTE_ON) % 12


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def renormalized(p: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """`p` `(V,)` with the shares of `changed` among the ids that press a key, which keep their probability together."""
    total = changed[PRESS].sum()
    return np.where(PRESS, changed * (p[PRESS].sum() / total if total else 0), p)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_pitch_temperature_changes_only_the_choice_of_keys(temperature):
    lanes = Lanes([PitchChoice(temperature)], seed=1, prefixes=some_prefixes(2))
    for _ in range(40):
        for row, after in zip(*lanes.look(), strict=True):
            p = probabilities(row)
            np.testing.assert_allclose(probabilities(after), renormalized(p, p ** (1 / temperature)), atol=1e-5)
            assert np.array_equal(after[~PRESS], row[~PRESS])
        lanes.step(lanes.look()[1])


def share(pitches: list[int], notes: float) -> np.ndarray:
    """The share of each pitch class in the music so far, `(12,)`; 4 notes of every class on average are added."""
    heard = np.full(12, 4 / 12)
    for age, pitch in enumerate(reversed(pitches)):
        heard[pitch % 12] += math.exp(-age / notes)
    return heard / heard.sum()


@pytest.mark.parametrize(("strength", "notes"), [(0.5, 20.0), (-1.0, 3.0), (0.0, 300.0)])
def test_tonality_weighs_the_pitch_classes_of_the_music_so_far(strength, notes):
    prefixes = some_prefixes(5)
    lanes = Lanes([PitchChoice(tonality=strength, notes=notes)], seed=3, prefixes=prefixes)
    for _ in range(60):
        for row, after, reference in zip(*lanes.look(), lanes.references, strict=True):
            shares = share([i - NOTE_ON for i in reference.ids if i in PRESSES], notes)
            p = probabilities(row)
            np.testing.assert_allclose(probabilities(after), renormalized(p, p * shares[CLASS] ** strength), atol=2e-5)
        lanes.step(lanes.look()[1])


@pytest.mark.parametrize("name", ["REMI bpe", "aria"])
def test_an_id_that_presses_several_keys_weighs_all_of_them(name):
    tokenizer = vocabulary(name)
    walk, processor = GrammarWalk(tokenizer), PitchChoice(tonality=0.7, notes=15.0)
    ids = tokenizer.prompt(tokenizer.encode_notes(music_for(name, 2, 25))).astype(np.int64)
    logits = np.zeros((1, len(walk.tables.notes)), np.float32)
    found = np.array(processor(logits, walk.begin(ids), processor.begin(walk.tables, ids)))[0]
    heard = np.zeros(12)
    for i in ids:
        new = np.bincount(np.flatnonzero(walk.tables.presses[i]) % 12, minlength=12)
        heard = heard * math.exp(-new.sum() / 15) + new
    heard += 4 / 12
    shares = [np.log(heard / heard.sum())[np.flatnonzero(row) % 12] for row in walk.tables.presses]
    scores = np.array([share.mean() if len(share) else 0 for share in shares])
    expected = np.where(walk.tables.notes > 0, np.exp(0.7 * scores), 0)
    expected *= (walk.tables.notes > 0).sum() / expected.sum()
    np.testing.assert_allclose(np.exp(found[walk.tables.notes > 0]), expected[walk.tables.notes > 0], 1e-4)
    assert not found[walk.tables.notes == 0].any()


def test_they_keep_to_what_constraints_allow():
    """Also if no key of the music so far may be pressed."""
    allowed = [1, 6]
    lanes = Lanes([PitchClasses(allowed), PitchChoice(0.01, 50.0)], seed=8, prefixes=some_prefixes(9))
    for _ in range(40):
        _, left = lanes.look()
        assert not np.isnan(left).any()
        assert not (left[:, PRESS & ~np.isin(CLASS, allowed)] > -np.inf).any()
        lanes.step(left)
