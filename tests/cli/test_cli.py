"""Every command, in this process, on little data."""

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.midi_files import tune, write_midi_files

from dsmr_mlx.cli import console, train
from dsmr_mlx.common.files import sha256
from dsmr_mlx.generation import generate as generation
from dsmr_mlx.generation.prompts import prompt_ids
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, encode_notes, performance_grammar

TOKENIZER = PerformanceTokenizer()
TINY = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "head_dim": 8,
    "d_ff": 24,
    "segment_length": 8,
    "horizons": "two-scale:long=1x12,short=4",
    "batch_size": 2,
    "eval_every": 2,
    "sample_seconds": 0.5,
}
TINY_ARGS = [argument for key, value in TINY.items() for argument in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_from_midi_to_music(run, trained):
    prepared = run("prepare", trained.midi, "--out", "corpus", "--validation-fraction", "0.3")
    assert prepared.code == 0
    assert re.search(
        r"^corpus: 4 train, 2 validation\n[\d,]+ tokens, 180 notes, [\d.]+ minutes of music; 0 files skipped",
        prepared.out,
    )
    assert run("prepare", trained.midi, "--out", "corpus", "--validation-fraction", 0.3).out.startswith(
        "corpus is up to date: 4 train, 2 validation, "
    )

    began = run("train", "--data", "corpus", "--out", "runs/a", "--preset", "tiny", *TINY_ARGS, "--max-steps", 2)
    assert began.code == 0
    assert began.out == ""
    assert "memory: two-scale: 1 × 12 + 1 × 4, budget 16 tokens" in began.err
    assert re.search(r"validation after step 2, .* perplexity [\d.]+ on .* 2 pieces, the best so far", began.err)
    assert "done: runs/a" in began.err
    resumed = run("train", "--data", "corpus", "--out", "runs/a", "--resume", "--max-steps", 4)
    assert resumed.code == 0
    assert "resumed from runs/a/checkpoints/step-00000002\n" in resumed.err
    assert "note: it ended within its warm-up of 100 steps" in resumed.err
    again = run("train", "--data", "corpus", "--out", "runs/a", "--resume", "--max-steps", 3)
    assert "step-00000004; it has reached its limit, a higher --max-tokens" in again.err
    steps = [json.loads(line)["step"] for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    assert sorted(path.name for path in Path("runs/a/samples").iterdir()) == ["step-00000002.mid", "step-00000004.mid"]

    shown = run("evaluate", "runs/a", "--data", "corpus", "--batch-size", 2)
    assert shown.code == 0
    assert re.match(r"perplexity [\d.]+ on [\d,]+ tokens of 2 validation pieces\nnats: ", shown.out)
    assert re.search(r"^weights: [\d,]+ parameters, float32, [\d.]+ KiB$", shown.out, re.MULTILINE)
    assert "0 – 512" in shown.out

    made = run("generate", "runs/a", "--seconds", 2)
    assert made.code == 0
    assert read_notes("a-1.mid").duration <= 2 + 3
    assert re.search(r"^a-1\.mid +\d+ ", made.out, re.MULTILINE)


def test_evaluation_as_json(run, trained):
    common = ["evaluate", trained.run, "--data", trained.corpus]
    shown = run(*common, "--json")
    assert shown.code == 0
    assert shown.err == ""
    values = json.loads(shown.out)
    assert values["split"] == "validation"
    assert values["pieces"] == len(values["by_piece"]) == 2
    assert values["tokens"] == sum(piece["tokens"] for piece in values["by_piece"])
    assert values["perplexity"] == pytest.approx(np.exp(values["nats_per_token"]))
    train = json.loads(run(*common, "--json", "--split", "train", "--batch-size", 3).out)
    assert train["pieces"] == 4
    assert json.loads(run(*common, "--json", "--split", "train", "--max-tokens", 1).out)["pieces"] == 1


def test_a_run_stands_for_its_best_checkpoint(run, trained):
    assert run("generate", trained.run, "--tokens", 20, "--out", "a.mid").code == 0
    assert run("generate", trained.checkpoint, "--tokens", 20, "--out", "b.mid").code == 0
    assert Path("a.mid").read_bytes() == Path("b.mid").read_bytes()


@pytest.mark.slow
def test_the_file_stores_the_options_that_reproduce_its_bytes(generate, trained):
    options = ["--tokens", 60, "--seed", 3, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01]
    for name in ("a.mid", "b.mid"):
        assert generate(*options, "--out", name).code == 0
    assert Path("a.mid").read_bytes() == Path("b.mid").read_bytes()
    assert generate(*options, "--seed", 4, "--out", "c.mid").code == 0
    assert Path("a.mid").read_bytes() != Path("c.mid").read_bytes()
    written = json.loads(read_text("a.mid"))
    assert written == {
        "program": "dsmr-mlx 0.1.0",
        "weights": sha256(trained.checkpoint / "model.safetensors"),
        "prompt": None,
        "prompt_seconds": None,
        "continuation_only": False,
        "seconds": None,
        "tokens": 60,
        "may_end": False,
        "n": 1,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "seed": 3,
        "variation": 1,
    }
    model, tokenizer = checkpoint.load(trained.run)
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)
    ids = list(generation.generate(model, tokenizer, tokens=60, seed=3, sampling=sampling))
    in_file = read_notes("a.mid")
    assert np.array_equal(encode_notes(in_file), encode_notes(tokenizer.decode(ids)))


@pytest.mark.slow
def test_variations(generate):
    shown = generate("--tokens", 40, "-n", 3, "--out", "a.mid")
    assert shown.code == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a-1.mid", "a-2.mid", "a-3.mid"]
    assert [json.loads(read_text(f"a-{i}.mid"))["variation"] for i in (1, 2, 3)] == [1, 2, 3]
    assert len({encode_notes(read_notes(f"a-{i}.mid")).tobytes() for i in (1, 2, 3)}) == 3
    assert re.findall(r"a-\d\.mid", shown.out) == ["a-1.mid", "a-2.mid", "a-3.mid"]
    assert generate("--tokens", 40, "--out", "folder").code == 0
    assert read_notes("folder/1.mid") == read_notes("a-1.mid")


def test_a_prompt_is_continued(generate, trained):
    prompt = trained.midi / "0.mid"
    options = ["--prompt", prompt, "--prompt-seconds", 3, "--seconds", 2]
    shown = generate(*options, "--out", "whole.mid")
    assert shown.code == 0
    assert "prompt of " in shown.out
    written = json.loads(read_text("whole.mid"))
    assert (written["prompt"], written["prompt_sha256"]) == ("0.mid", sha256(prompt))
    whole, original = read_notes("whole.mid"), TOKENIZER.decode(TOKENIZER.encode(prompt))
    prompt_notes = original.onset <= 3
    assert np.array_equal(whole.pitch[: prompt_notes.sum()], original.pitch[prompt_notes])
    np.testing.assert_allclose(whole.onset[: prompt_notes.sum()], original.onset[prompt_notes], atol=1e-9)
    assert whole.duration <= 3 + 2 + 3

    assert generate(*options, "--continuation-only", "--out", "new.mid").code == 0
    ids = TOKENIZER.encode(prompt)
    ids = prompt_ids(TOKENIZER, ids[np.cumsum(performance_grammar().ticks[ids]) <= 300])
    begin = performance_grammar().ticks[ids].sum() / 100
    new = read_notes("new.mid")
    rest = whole.onset >= begin
    assert new.pitch.tolist() == whole.pitch[rest].tolist()
    assert new.velocity.tolist() == whole.velocity[rest].tolist()
    assert json.loads(read_text("new.mid"))["continuation_only"] is True


@pytest.mark.slow
def test_sampling_options(generate):
    assert generate("--tokens", 30, "--temperature", 0, "--seed", 1, "--out", "a.mid").code == 0
    assert generate("--tokens", 30, "--top-k", 1, "--seed", 2, "--out", "b.mid").code == 0
    assert read_notes("a.mid") == read_notes("b.mid")
    assert generate("--tokens", 30, "--seed", 2, "--out", "c.mid").code == 0
    assert read_notes("a.mid") != read_notes("c.mid")
    assert generate("--seconds", 1, "--may-end", "--out", "d.mid").code == 0


def test_the_default_length_is_a_minute(generate, monkeypatch):
    requested = []
    original = generation.make_limits

    def shorter(tokenizer, seconds, *arguments):
        requested.append(seconds)
        return original(tokenizer, 1.0, *arguments)

    monkeypatch.setattr(generation, "make_limits", shorter)
    assert generate().code == 0
    assert requested == [60.0]
    assert json.loads(read_text("run-1.mid"))["seconds"] == 60.0


def test_existing_files_need_force(generate):
    Path("a.mid").write_bytes(b"mine")
    refused = generate("--tokens", 5, "--out", "a.mid")
    assert refused.code == 2
    assert refused.err == "dsmr-mlx: error: --out a.mid: already exists, --force overwrites it\n"
    assert Path("a.mid").read_bytes() == b"mine"
    assert generate("--tokens", 5, "--out", "a.mid", "--force").code == 0
    assert read_text("a.mid")


def test_names_with_markup_are_shown_unchanged(run, trained):
    strange = write_midi_files(
        Path("midi"), {"[red] :smile: " + 40 * "long " + ".mid": tune(1), "[b].mid": b"no", "2.mid": tune(2)}
    )
    shown = run("prepare", strange, "--out", "[bold]corpus")
    assert shown.out.startswith("[bold]corpus: 1 train, 1 validation\n")
    assert "; 1 file skipped; " in shown.out
    assert "skipped [b].mid: not a readable MIDI file" in shown.err
    for split in ("train", "validation"):
        shown = run("evaluate", trained.run, "--data", "[bold]corpus", "--split", split)
        if "2.mid" not in shown.out:
            assert "[red] :smile: " + 40 * "long " + ".mid" in shown.out


def test_progress_bars_on_a_terminal(run, trained, monkeypatch):
    shown = StringIO()
    for part in (console, train):
        monkeypatch.setattr(part, "err", Console(file=shown, force_terminal=True, width=120, highlight=False))
    assert run("prepare", trained.midi, "--out", "c").out.startswith("c: ")
    assert run("train", "--data", "c", "--out", "r", *TINY_ARGS, "--max-steps", 2).out == ""
    made = run("generate", "r", "--tokens", 5)
    assert (made.code, made.err) == (0, "")
    for text in ("reading MIDI", "6 of 6 files", "step 2", "validation after step 2", "done: r", "5 of 5 tokens"):
        assert text in shown.getvalue()


def test_horizons(run):
    shown = run("horizons", "two-scale:long=2x1024,short=128", "--layers", 6, "--segment", 256)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0] == "two-scale: 2 × 1024 + 4 × 128, budget 2560 tokens, 2.5 MiB at bf16, 58 % below full"
    assert [line.split()[:4] for line in lines[2:8]] == [
        [str(layer), "1,024" if layer < 2 else "128", f"{1024 * (1024 if layer < 2 else 128):,}", reach]
        for layer, reach in [(5, "3,072"), (4, "2,816"), (3, "2,560"), (2, "2,304"), (1, "2,048"), (0, "1,024")]
    ]
    assert run("horizons", "none", "--layers", 2, "--bytes", 4).code == 0
    shown = run("horizons", "none", "--layers", 2, "--bytes", 4, "--segment", 8, "--canon", 16).out
    # 2 layers of 2 Canon layers, 3 tokens, width 16, 4 bytes
    assert "768 B at float32, only the memory of the Canon layers" in " ".join(shown.split())
    assert run("horizons", "none", "--layers", 2, "--canon", 0).code == 2


def test_version_and_help(run):
    assert run("--version").out == "dsmr-mlx 0.1.0\n"
    for command in ("prepare", "train", "evaluate", "generate", "horizons"):
        assert command in run("--help").out
        shown = run(command, "--help")
        assert shown.code == 0
        assert re.search(rf"^examples?:\n  dsmr-mlx {command}\b", shown.out, re.MULTILINE)
