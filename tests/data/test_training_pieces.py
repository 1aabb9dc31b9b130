"""What training reads of a piece, in MLX and in PyTorch."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_config, write_corpus
from support.vocabularies import vocabulary

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import Augmentation
from dsmr_mlx.data.training_pieces import check_training
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import ENDING
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.trainer import Trainer

CHANGES = {"augment_transpose": 3, "augment_stretch": 0.05, "augment_velocity": 8}


@pytest.fixture
def trainers(monkeypatch):
    """The classes that train in MLX and, if it is installed, in PyTorch."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from train_pytorch import Training

    yield Trainer, lambda config, corpus: Training(config, corpus, "cpu")
    for name in ("train_pytorch", "pytorch_muon"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("tokenizer", [AriaTokenizer(), PerformanceTokenizer()], ids=lambda t: t.kind)
def test_both_trainers_read_the_same_ids(tmp_path, trainers, tokenizer):
    corpus = write_corpus(tmp_path / "corpus", train=3, notes=120, tokenizer=tokenizer)
    fill = 0.0 if tokenizer.fill_id is None else 1.0
    ours, theirs = (trainer(tiny_config(**CHANGES, fill=fill), corpus).lanes for trainer in trainers)
    read = []
    for _ in range(100):
        batch, other = next(ours), next(theirs)
        for name in ("inputs", "targets", "weights", "fresh"):
            assert np.array_equal(getattr(batch, name), getattr(other, name)), name
        read.append(batch.inputs)
    assert (np.concatenate(read) == ENDING).any() or fill


def test_both_trainers_refuse_pieces_longer_than_the_learned_positions(tmp_path, trainers):
    """An announced end is one more id."""
    corpus = write_corpus(tmp_path / "corpus", train=2, validation=1, notes=120, tokenizer=AriaTokenizer())
    train, other = (max(piece.length for piece in corpus.pieces(split)) for split in ("train", "validation"))
    assert other > train + 1
    for positions, length in ((train - 1, train + 1), (train, other)):
        message = rf"has {length:,} tokens, expected at most {positions + 1:,}.*max_positions"
        for trainer in trainers:
            with pytest.raises(UserError, match=message):
                trainer(tiny_config(max_positions=positions), corpus)
    with pytest.raises(UserError, match=r"augment_stretch.*0 with max_positions"):
        tiny_config(max_positions=100, augment_stretch=0.05)


@pytest.mark.parametrize("change", CHANGES)
def test_augmented_subwords_do_not_fit_learned_positions(tmp_path, change):
    """A piece may need more subwords when its events are others."""
    name = change.removeprefix("augment_")
    augmentation = Augmentation(**{name: CHANGES[change]})
    corpus = write_corpus(tmp_path / "corpus", train=1, validation=0, tokenizer=vocabulary("performance bpe"))
    check_training(corpus, augmentation, 0.0, None)
    check_training(corpus, Augmentation(), 0.0, 10_000)
    with pytest.raises(UserError, match=rf"{change} = {CHANGES[change]}: expected 0 with max_positions: .*subwords"):
        check_training(corpus, augmentation, 0.0, 10_000)
