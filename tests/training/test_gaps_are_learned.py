"""The toy proof: where the future decides a passage, a model trained with gaps plays it if it is shown the future."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_config

import dsmr_mlx
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.trainer import Trainer

TOKENIZER = PerformanceTokenizer()
SLOTS, CHOICES, NEUTRAL, REPEATS, BEAT = 4, 4, 4, 2, 0.5


def toy(seed: int) -> Notes:
    """Four equal notes, a random melody of four notes with four choices each, and the melody twice more."""
    melody = 40 + CHOICES * np.arange(SLOTS) + np.random.default_rng(seed).integers(0, CHOICES, SLOTS)
    pitch = np.concatenate([[30] * NEUTRAL, melody, np.tile(melody, REPEATS)])
    onset = np.arange(len(pitch)) * BEAT
    return Notes(onset, onset + BEAT, pitch, np.full(len(pitch), 64))


def trained_on_toys(folder: Path) -> DSMR:
    """Train a tiny model on toy pieces, each with a gap."""
    with CorpusWriter(folder, TOKENIZER) as writer:
        for i in range(1000):
            piece = toy(i)
            ids, split = TOKENIZER.encode_notes(piece), "train" if i else "validation"
            writer.add(ids, source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece))
        writer.commit({})
    sizes = {"d_model": 48, "n_layers": 2, "n_heads": 2, "head_dim": 24, "d_ff": 96, "canon": True}
    streams = {"segment_length": 64, "horizons": "uniform:64", "batch_size": 12, "fill": 1.0}
    rates = {"learning_rate": 6e-3, "min_learning_rate": 1e-4, "warmup_steps": 10, "max_steps": 120}
    trainer = Trainer(tiny_config(**sizes, **streams, **rates), Corpus.load(folder))
    while trainer.progress.step < trainer.config.max_steps:
        trainer.train_segment()
    trainer.model.update(trainer.parameters)
    return trainer.model.eval()


def share_of_right_notes(model: DSMR, pieces: int = 20) -> float:
    """Replace the first melody of unseen pieces; count the notes that the repeats demand."""
    right, start = 0, NEUTRAL * BEAT - 0.3  # in the middle of the last neutral note
    end = (NEUTRAL + SLOTS) * BEAT - 0.1
    greedy = dsmr_mlx.Sampling(temperature=0)
    for i in range(pieces):
        piece = toy(10_000 + i)
        passage = dsmr_mlx.fill(model, TOKENIZER, piece, start, end, sampling=greedy)[0].passages[0]
        wanted = piece.take((piece.onset >= start) & (piece.onset < end))
        found = set(zip(passage.notes.onset.tolist(), passage.notes.pitch.tolist(), strict=True))
        right += len(found & set(zip(wanted.onset.tolist(), wanted.pitch.tolist(), strict=True)))
    return right / (pieces * SLOTS)


@pytest.mark.slow
def test_a_model_learns_to_lead_into_what_it_is_shown(tmp_path):
    """Of 80 notes with 4 choices each, 20 ± 4 are right by chance: the limits are 5 and 11 standard deviations away."""
    model = trained_on_toys(tmp_path / "corpus")
    blind = DSMR(replace(model.config, fill=0.0))  # the same weights, shown nothing
    blind.update(model.parameters())
    assert share_of_right_notes(model) >= 0.8
    assert share_of_right_notes(blind.eval()) <= 0.5
