"""Whole-piece memory: the horizon `whole` in runs and on the command line."""

import json

import numpy as np
import pytest
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError
from dsmr_mlx.cli import main
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.run import train
from dsmr_mlx.training.trainer import Trainer


def longest_in_segments(corpus, segment: int = 8) -> int:
    """Tokens of the longest piece, rounded up to whole segments."""
    return -(-max(piece.length for piece in corpus.pieces()) // segment) * segment


def test_a_run_records_the_text_and_the_numbers(tmp_path):
    """And continues with both; a longer corpus is another run."""
    corpus = write_corpus(tmp_path / "corpus")
    longest = longest_in_segments(corpus)
    train(tiny_config(horizons="whole", max_steps=2), corpus.path, tmp_path / "run")
    saved = TrainConfig.load(tmp_path / "run" / "config.json")
    assert saved.horizons == f"whole:longest={longest}"
    assert ModelConfig.load(tmp_path / "run" / "last" / "config.json").horizons == [longest] * 2
    for text in ("whole", saved.horizons):
        run = train(tiny_config(horizons=text, max_steps=3), corpus.path, tmp_path / "run", resume=True)
    assert run.trainer.progress.step == 3
    with pytest.raises(UserError, match="horizons"):
        train(tiny_config(horizons="whole:16", max_steps=4), corpus.path, tmp_path / "run", resume=True)


def test_whole_equals_any_horizon_as_long_as_the_longest_piece(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    losses = [
        [Trainer(tiny_config(horizons=text), corpus).train_segment().loss for _ in range(12)]
        for text in ("whole", f"full:{longest_in_segments(corpus)}")
    ]
    np.testing.assert_array_equal(*losses)


def test_without_a_corpus_the_error_says_what_is_needed():
    with pytest.raises(UserError, match="'whole:4096': the longest piece of a corpus is unknown, expected `data`"):
        tiny_config(horizons="whole:4096").schedule  # noqa: B018
    with pytest.raises(UserError, match="horizons 'whole:many': cap is 'many', expected an integer"):
        tiny_config(horizons="whole:many")


def test_the_command_shows_the_longest_piece_of_a_corpus(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    longest = longest_in_segments(corpus)
    assert main(["horizons", "whole", "--layers", "2", "--segment", "8", "--data", str(corpus.path)]) == 0
    assert f"whole: 2 × {longest}, budget {2 * longest} tokens" in capsys.readouterr().out
    assert main(["horizons", "whole", "--layers", "2"]) == 2
    shown = capsys.readouterr().err
    assert (
        "horizons 'whole': the longest piece of a corpus is unknown, expected --data, the corpus, or longest=TOKENS"
        in shown
    )
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_pytorch_program_records_them_too(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend("examples")
    import train_pytorch

    corpus = write_corpus(tmp_path / "corpus")
    training = train_pytorch.Training(tiny_config(horizons="whole:24"), corpus, "cpu")
    training.train_step()
    training.save(tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["settings"]["horizons"] == f"whole:24,longest={longest_in_segments(corpus)}"
    assert saved["config"]["horizons"] == [24, 24]
    assert json.dumps(saved["settings"])
