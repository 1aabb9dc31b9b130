"""Adapters for Aria's weights, as a small stand-in, from the file to music by the commands."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from support.midi_files import tune, write_midi_files

from dsmr_mlx import Corpus, evaluate, load
from dsmr_mlx.cli import main
from dsmr_mlx.common.files import sha256
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.tokenizers.aria.vocabulary import SIZES

pytest.importorskip("torch")
from support.foreign_models import write_aria

PIECES, NOTES = 10, 8


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Ten pieces, learned by heart by adapters on weights that know nothing: the folder of run, base and corpus."""
    folder = tmp_path_factory.mktemp("adapters")
    source = write_aria(folder / "model.safetensors", SIZES[2])
    weights = mx.load(str(source))
    mx.eval(weights)
    (head,) = (name for name in weights if "lm_head" in name)
    weights[head] = 8 * weights[head]  # a frozen head as confident as a trained one
    mx.save_safetensors(str(source), weights)
    horizons = ["--horizons", "uniform:32", "--segment", "32"]
    assert main(["convert", str(source), str(folder / "base"), *horizons]) == 0
    midi = write_midi_files(folder / "midi", {f"{i}.mid": tune(i, NOTES) for i in range(PIECES)})
    corpus, base = str(folder / "corpus"), str(folder / "base")
    assert main(["prepare", str(midi), "--tokenizer", base, "--validation-fraction", "0", "--out", corpus]) == 0
    settings = ("lora_rank=16", "learning_rate=0.01", "batch_size=10", "accumulate=1", "warmup_steps=5")
    options = [word for setting in settings for word in ("--set", setting)]
    run = ["train", "--data", corpus, "--out", str(folder / "run"), "--init", base, "--max-steps", "45"]
    assert main([*run, *options]) == 0
    return folder


@pytest.mark.slow
def test_adapters_learn_ten_pieces_by_heart(adapted):
    """Nothing can tell which of the pieces comes: ln(10) nats each. All else is certain."""
    corpus = Corpus.load(adapted / "corpus")
    before, after = (evaluate(load(adapted / name)[0], corpus, "train") for name in ("base", "run"))
    least = math.log(PIECES) * PIECES / after.tokens
    assert before.nats_per_token > 10
    assert least < after.nats_per_token < least + 0.1
    assert (adapted / "run" / "last" / "model.safetensors").stat().st_size < 250_000


@pytest.mark.slow
def test_the_commands_play_and_describe_base_and_adapters(adapted, run):
    base, trained = adapted / "base", adapted / "run"
    assert run("convert", trained, "fused", "--fuse", "--dtype", "float32").code == 0
    for model, out in ((trained, "a"), ("fused", "b")):
        made = run("generate", model, "--tokens", 60, "--seed", 3, "-n", 3, "--out", f"{out}.mid")
        assert made.code == 0, made.err
    for i in range(1, 4):
        first, second = (read_notes(f"{name}-{i}.mid") for name in "ab")
        assert first.rows == second.rows
    stored = json.loads(read_text("a-1.mid"))
    assert stored["base"] == sha256(base / "model.safetensors")
    assert stored["weights"] == sha256(trained / "last" / "model.safetensors")
    evaluated = run("evaluate", trained, "--data", adapted / "corpus", "--split", "train")
    assert "adapters of rank 16" in " ".join(evaluated.out.split())
    compared = run("compare", base, trained, "fused", "--data", adapted / "corpus", "--split", "train", "--json")
    assert compared.code == 0, compared.err
    rows = json.loads(compared.out)["checkpoints"]
    assert [row["weights"]["adapters"] for row in rows] == [None, 16, None]
    assert rows[1]["nats_per_token"] == pytest.approx(rows[2]["nats_per_token"], abs=1e-4)
    paused = run("generate", trained, "--tokens", 9, "--save-state", "s.safetensors", "--out", "c.mid")
    assert paused.code == 0, paused.err
    assert run("generate", trained, "--from-state", "s.safetensors", "--tokens", 9, "--out", "d.mid").code == 0
    assert run("generate", base, "--from-state", "s.safetensors", "--tokens", 9, "--out", "e.mid").code == 2


@pytest.mark.slow
def test_the_report_names_the_adapters(adapted, run):
    pytest.importorskip("matplotlib")
    assert run("report", adapted / "run", "--out", "report.html").code == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert "Adapters of rank 16 in 2 of 2 layers, " in page
    assert f"(47,104), on {adapted / 'base'}, which is frozen" in page
    assert f"--init {adapted / 'base'}" in page
    assert "lora_rank=16" in page


@pytest.mark.slow
def test_the_plan_shows_what_is_frozen(adapted, run):
    planned = ("train", "--data", adapted / "corpus", "--out", "x", "--init", adapted / "base", "--plan")
    made = run(*planned, "--set", "lora_rank=2")
    assert made.code == 0, made.err
    for words in ("5,888 of them trained", "frozen weights", "adapters", "fits into a Mac with 8 GB"):
        assert words in " ".join(made.out.split())
