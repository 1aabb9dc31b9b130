"""Adapters added to the weights of their base: plain checkpoints that play the same."""

import json
from pathlib import Path

import mido
import mlx.core as mx
import numpy as np
import pytest
from support.adapters import adapter_config, save_base
from support.tiny import write_corpus

from dsmr_mlx import load
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.training.run import train


@pytest.fixture(scope="module", params=[None, 4], ids=["floats", "4 bits"])
def adapted(request, tmp_path_factory):
    """A run with adapters that change its base much."""
    folder = tmp_path_factory.mktemp("fusing")
    init = save_base(folder / "base", request.param)
    corpus = write_corpus(folder / "corpus").path
    config = adapter_config(init, learning_rate=0.05, min_learning_rate=0.0, max_steps=10, lora_alpha=4.0)
    train(config, corpus, folder / "run")
    return folder


def test_fused_and_unfused_play_the_same_bytes(adapted, run):
    assert run("convert", adapted / "run", "fused", "--fuse").code == 0
    config = ModelConfig.load(Path("fused") / "config.json")
    assert (config.lora, config.quantization) == (None, None)
    names = load_arrays(adapted / "base" / "model.safetensors")
    plain = {name for name in names if not name.endswith((".scales", ".biases"))}
    assert load_arrays(Path("fused") / "model.safetensors").keys() == plain
    models = [load(path)[0] for path in (adapted / "run", "fused", adapted / "base")]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40))
    unfused, fused, base = (np.array(model(tokens)[0][..., :-2]) for model in models)
    assert np.abs(fused - unfused).max() < 1e-5 * np.abs(unfused).max()
    assert np.abs(base - unfused).max() > 0.05 * np.abs(unfused).max()
    for model, name in ((adapted / "run", "a"), ("fused", "b")):
        made = run("generate", model, "--seconds", 3, "--seed", 5, "-n", 3, "--out", f"{name}.mid")
        assert made.code == 0, made.err
    played = [[messages(path) for path in sorted(Path().glob(f"{name}-*.mid"))] for name in "ab"]
    assert len(played[0]) == 3
    assert played[0] == played[1]
    record = json.loads((Path("fused") / "conversion.json").read_text())
    assert record["sha256"].keys() == {"adapters", "base"}


def messages(path) -> list[list[tuple[int, bytes]]]:
    """Return the bytes and times of all messages of each track but the marker, which names the weights."""
    tracks = mido.MidiFile(path).tracks
    return [[(m.time, bytes(m.bin())) for m in track if m.type != "marker"] for track in tracks]


def test_live_plays_base_and_adapters(adapted, run):
    """The same answers as the fused weights, and not those of the base."""
    assert run("convert", adapted / "run", "fused", "--fuse").code == 0
    write_notes(Notes.of([(0.4 * i, 0.4 * i + 0.3, 60 + i, 80) for i in range(4)]), "call.mid")
    answers = []
    for i, model in enumerate((adapted / "run", "fused", adapted / "base")):
        heard = ("--in-file", "call.mid", "--offline", "--max-turn", 2, "--seed", 3)
        made = run("live", model, *heard, "--out-file", f"{i}.mid")
        assert made.code == 0, made.err
        answers.append(messages(f"{i}.mid"))
    assert len(read_notes("0.mid")) > 4
    assert answers[0] == answers[1] != answers[2]


def test_fused_weights_can_be_quantized_and_verified(adapted, run):
    made = run("convert", adapted / "run", "small", "--fuse", "--quantize", 8, "--group-size", 32)
    assert made.code == 0, made.err
    assert ModelConfig.load(Path("small") / "config.json").quantization == {"bits": 8, "group_size": 32}
    load("small")
    pytest.importorskip("torch")
    verified = run("convert", adapted / "run", "verified", "--fuse", "--verify")
    assert verified.code == 0, verified.err
    assert "equal to" in verified.out
    back = run("convert", "--to-pytorch", "verified", "back.pt")
    assert back.code == 0, back.err


def test_refusals(adapted, run):
    base, run_folder = adapted / "base", adapted / "run"
    for arguments, message in (
        ((run_folder, "x"), f"{run_folder}: holds adapters only; --fuse adds them to the weights of their base"),
        ((base, "x", "--fuse"), f"--fuse {base}: holds no adapters, expected a run with lora_rank or its checkpoint"),
        (("--to-pytorch", run_folder, "x.pt"), "holds adapters only; export plain weights"),
        (("--to-pytorch", run_folder, "x.pt", "--fuse"), "--fuse: not with --to-pytorch"),
        ((run_folder, base, "--fuse", "--force"), f"{base}: "),
    ):
        made = run("convert", *arguments)
        assert made.code == 2
        assert message in made.err
    assert (base / "model.safetensors").is_file()


@pytest.mark.parametrize("bits", [None, 8])
def test_a_base_in_half_precision(tmp_path, run, bits):
    """float32 weights are exactly those that base and adapters play; by default they have the type of the base."""
    init = save_base(tmp_path / "base", bits, dtype=mx.bfloat16)
    config = adapter_config(init, learning_rate=0.05, max_steps=3)
    train(config, write_corpus(tmp_path / "corpus").path, tmp_path / "run")
    for options, dtype in (((), mx.bfloat16), (("--dtype", "float32"), mx.float32)):
        assert run("convert", tmp_path / "run", "fused", "--fuse", "--force", *options).code == 0
        assert {array.dtype for array in load_arrays(Path("fused") / "model.safetensors").values()} == {dtype}
    (unfused, _), (fused, _) = load(tmp_path / "run"), load("fused")
    tokens = np.random.default_rng(0).integers(0, unfused.config.vocab_size, (1, 40))
    expected, found = (np.array(model(tokens)[0][..., :-2]) for model in (unfused, fused))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
