"""Aria's weights beyond their context, with fewer key/value heads, and quantized, from the import on."""

import mlx.core as mx
import numpy as np
import pytest

from dsmr_mlx.convert.families import aria
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_notes

torch = pytest.importorskip("torch")
from support.foreign_models import Aria, random_tokens, write_aria  # noqa: E402

ROWS, CONTEXT = 2675, 64


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A stand-in with a short context and two heads."""
    monkeypatch.setattr(aria, "CONTEXT", CONTEXT)
    return write_aria(tmp_path / "model.safetensors", ROWS, d=128)


def original(ids: np.ndarray) -> np.ndarray:
    """Logits `(T, V)` of the stand-in."""
    torch.manual_seed(0)
    with torch.no_grad():
        return Aria(ROWS, d=128, n_heads=2, n_layers=2)(torch.from_numpy(ids))[0].numpy()


def difference(folder, ids: np.ndarray) -> np.ndarray:
    """The largest difference of the logits after each of ids `(1, T)`, relative to the largest logit: `(T,)`."""
    model, _ = checkpoint.load(folder)
    expected = original(ids)
    return np.abs(np.array(model(mx.array(ids))[0][0]) - expected).max(axis=1) / np.abs(expected).max()


@pytest.mark.slow
def test_beyond_its_context_it_goes_on_in_constant_memory(source, run):
    """Exact in the context, and the command says so; a shorter memory is a warm start, exact as far as it says."""
    made = run("convert", source, "exact")
    assert f"exact up to {CONTEXT} tokens; beyond that its memory is limited by the horizons" in made.out
    short = run("convert", source, "short", "--horizons", "uniform:16")
    assert f"a warm start: exact up to 32 tokens only, the original has a context of {CONTEXT}" in short.out
    ids = random_tokens(ROWS, 1, 2 * CONTEXT)
    whole, shorter = difference("exact", ids), difference("short", ids)
    assert whole[:CONTEXT].max() < 1e-5
    assert shorter[:32].max() < 1e-5
    assert whole[CONTEXT + 16 :].max() > 1e-4
    assert shorter[48:].max() > 1e-4
    for folder in ("exact", "short"):
        model, tokenizer = checkpoint.load(folder)
        player, sizes, played = Player(model, tokenizer), set(), []
        for ids in player.play(Limits(tokens=3 * CONTEXT)):
            sizes.add(player.nbytes)
            played.append(int(ids[0]))
        assert len(sizes) == 1
        assert len(played) > 3 * CONTEXT
        assert syntax_errors(np.array([6, 0, *played[:-1]]), tokenizer)[1] in ("", "at the end")
        assert run("generate", folder, "--tokens", CONTEXT + 16, "--out", f"{folder}.mid").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--kv-heads", 1], ["--quantize", 4], ["--quantize", 8], ["--quantize", 4, "--kv-heads", 1]], ids=str
)
def test_it_is_made_smaller_in_one_go(options, source, run):
    """The state shrinks with the heads, the file with the bits, and it plays."""
    made = run("convert", source, "plain")
    assert made.code == 0, made.err
    made = run("convert", source, "small", *options)
    assert made.code == 0, made.err
    assert ("a warm start: key/value heads are averaged" in made.out) == ("--kv-heads" in options)
    plain, small = (Player(*checkpoint.load(folder)) for folder in ("plain", "small"))
    assert small.nbytes * (1 + ("--kv-heads" in options)) == plain.nbytes
    smaller = checkpoint.weight_bytes("small") / checkpoint.weight_bytes("plain")
    assert smaller < {4: 0.2, 8: 0.35}[options[1]] if "--quantize" in options else smaller < 1
    played = run("generate", "small", "--seconds", 2, "--max-silence-seconds", 1, "--out", "a.mid")
    assert played.code == 0, played.err
    assert len(read_notes("a.mid"))
