"""The benchmarks of DSMR alone, against peers and by size run and measure what they claim."""

import ast
import errno
import importlib
import json
import os
import re
import sys
from argparse import Namespace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest
from support.workers import InProcess

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.performance import VOCAB_SIZE, PerformanceTokenizer
from dsmr_mlx.training.settings import build_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = (
    *("d_model=16", "n_layers=2", "n_heads=2", "n_kv_heads=1", "head_dim=8", "d_ff=24"),
    *("segment_length=8", "batch_size=4"),
)
SETTINGS = [word for setting in (*TINY, "horizons=custom:16,8") for word in ("--set", setting)]


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmarks, by its name; they find one another in their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(load, monkeypatch, tmp_path):
    """Run a benchmark by its name with workers in this process: what it writes as JSON, and where it draws."""

    def run(name: str, *arguments: object) -> Namespace:
        module = load(name)
        if hasattr(module, "Worker"):
            monkeypatch.setattr(module, "Worker", InProcess)
        result, drawn = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
        words = [f"benchmarks/{name}.py", *map(str, arguments), "--json", str(result), "--plot", str(drawn)]
        monkeypatch.setattr(sys, "argv", words)
        module.main()
        return Namespace(**json.loads(result.read_text()), picture=drawn)

    return run


def remember(value: int):
    """A side whose turns give the process and how often it had a turn, and which then fails."""
    turns = iter([(os.getpid(), value), (os.getpid(), value + 1)])

    def turn():
        try:
            return next(turns)
        except StopIteration:
            raise ValueError("no more turns") from None

    return turn


def allocate(megabytes: int):
    """A side that needs so much memory for a moment, and keeps half of it."""
    kept = []

    def turn():
        array = mx.ones((megabytes << 18,))
        mx.eval(array)
        kept[:] = [mx.ones((megabytes << 17,))]
        mx.eval(kept)

    return turn


@pytest.mark.slow
def test_a_worker_has_its_own_process_and_memory(load):
    """Two at a time: their turns go on where they were, and each knows what it has needed, and nothing of the other."""
    measuring = load("measuring")
    small, large = (measuring.Worker(allocate, megabytes) for megabytes in (4, 64))
    for worker in (small, large):
        worker()
    small_memory, large_memory = small.memory(), large.memory()
    assert 6 << 20 <= small_memory["peak"] < 7 << 20
    assert 2 << 20 <= small_memory["held"] < 3 << 20
    assert 96 << 20 <= large_memory["peak"] < 97 << 20
    assert large_memory["resident"] > 90 << 20
    small.close()
    large.close()


def test_a_worker_reports_errors_of_its_process(load):
    measuring = load("measuring")
    worker = measuring.Worker(remember, 7)
    first, second = worker(), worker()
    assert first[0] == second[0] != os.getpid()
    assert (first[1], second[1]) == (7, 8)
    with pytest.raises(RuntimeError, match="no more turns"):
        worker()
    worker.close()
    with pytest.raises(RuntimeError, match="exit code 3"):
        measuring.Worker(os._exit, 3)


def test_sides_take_turns_until_the_limit(load):
    measuring, order = load("measuring"), []
    sides = [partial(order.append, name) for name in "ab"]
    times = measuring.in_turn(sides, rounds=3, warmup=1)
    assert "".join(order) == "ab" * 4
    assert [len(side) for side in times] == [3, 3]
    assert len(measuring.in_turn(sides, rounds=5, warmup=0, limit=0)[0]) == 1


def test_ratios_are_taken_round_by_round(load):
    found = load("measuring").ratios([2, 40, 6], [1, 10, 2])
    assert found == {"median": 3, "low": 2.5, "high": 3.5}


@pytest.mark.parametrize("schedule", [{"n_kv_heads": 1}, {"rope_interleaved": True, "tie_embeddings": False}])
def test_full_attention_equals_a_model_whose_memory_holds_everything(load, schedule):
    """At once and in steps with caches, against DSMR with horizons as long as the music: 1e-5."""
    plain, measuring = load("plain"), load("measuring")
    shape = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8, "d_ff": 24}
    model = DSMR(ModelConfig(**shape, segment_length=8, horizons=[30, 30], **schedule)).eval()
    ids = measuring.music(30)
    expected, _ = model(mx.array(ids[None]))
    for found in (plain.logits_at_once(model, ids), plain.logits_in_steps(model, ids, 3)):
        np.testing.assert_allclose(found, np.array(expected[0]), atol=1e-5)


def test_training_on_excerpts_equals_the_trainer_without_memory(load, tmp_path):
    """Excerpts as long as a segment and horizons of 0 are the same thing: two steps with equal losses, to 1e-5."""
    ours, plain = load("ours"), load("plain")
    config = build_config("tiny", settings=(*TINY, "horizons=none", "warmup_steps=0"), **plain.PLAIN)
    corpus = ours.write_corpus(tmp_path / "corpus", 4, 16)
    step = ours.training(config, corpus)
    mx.random.seed(config.seed)
    plainly = plain.ExcerptTraining(config, DSMR(config.model_config(PerformanceTokenizer())))
    pieces = [np.array(piece) for piece in lanes_in_order(config, corpus)]
    for segment in range(2):
        excerpts = np.stack([piece[8 * segment : 8 * segment + 9] for piece in pieces]).astype(np.int32)
        assert plainly.step(excerpts) == pytest.approx(step(), rel=1e-5)


def lanes_in_order(config, path) -> list[np.ndarray]:
    from dsmr_mlx.data.corpus import Corpus
    from dsmr_mlx.data.lanes import epoch_order

    corpus = Corpus.load(path)
    pieces = corpus.pieces("train")
    return [corpus.tokens(pieces[i]) for i in epoch_order(config.seed, 0, len(pieces))]


def test_decode(run):
    options = ("--rounds", 2, "--tokens", 3, "--near", 20, "--far", 60)
    found = run("decode", "--preset", "tiny", *SETTINGS, *options)
    assert [row["against"] for row in found.rows] == ["at 20", "the whole step", "1"]
    for row in found.rows:
        assert all(side["low"] <= side["median"] <= side["high"] for side in (*row["ms"], row["ratio"]))
    assert found.memory["state_bytes"] > 0
    assert found.machine["mlx"]
    assert found.command.startswith("python benchmarks/decode.py --preset tiny")
    assert found.picture.stat().st_size > 5000


def test_the_overhead_is_measured_without_a_token_ahead(load, monkeypatch):
    """On a GPU, waiting for a token that is played ahead would count as Python."""
    decode, given = load("decode"), []
    player = Namespace(play=lambda limits: count())
    monkeypatch.setattr(decode, "playing", lambda *_, **options: given.append(options) or player)
    decode.compare_overhead(None, None, Namespace(near=9, compile=None, tokens=1, rounds=1))
    assert given == [{"ahead": False}]


@pytest.mark.parametrize("name", ["ours", "scaling", "schedule_cost", "whole_piece", "input_pipeline"])
def test_a_training_turn_ends_when_the_device_is_done(load, monkeypatch, name):
    """The update of the weights runs after the loss is known."""
    module, order, trainer = load(name), [], MagicMock(tokens_per_epoch=8)
    trainer.train_segment.side_effect = lambda: order.append("step") or Namespace(loss=1.0)
    monkeypatch.setattr(module, "Trainer", lambda *_: trainer, raising=False)
    monkeypatch.setattr("dsmr_mlx.training.trainer.Trainer", lambda *_: trainer)
    monkeypatch.setattr(Corpus, "load", lambda _: None)
    monkeypatch.setattr(mx, "synchronize", lambda: order.append("done"))
    config = build_config("tiny", settings=(*TINY, "horizons=none"))
    if name == "input_pipeline":
        module.step_seconds(config, None, 0, 1)
    else:
        build = module.training_at if name == "whole_piece" else module.training
        build(config, "corpus", *([8] if name == "whole_piece" else [1] if name == "scaling" else []))()
    assert order == ["step", "done"]


@pytest.fixture
def measuring(load, monkeypatch, tmp_path):
    """The module, in a program that was started inside benchmarks/."""
    monkeypatch.chdir(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--rounds", "2"])
    module = load("measuring")
    monkeypatch.setattr(module, "machine", dict)
    return module


def test_results_name_a_command_that_can_be_copied(measuring, tmp_path):
    measuring.save(tmp_path / "deep" / "a.json", {"rows": []})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {
        **{"command": "python benchmarks/decode.py --rounds 2", "machine": {}, "rows": []}
    }


def test_results_are_written_completely_or_not_at_all(measuring, monkeypatch, tmp_path):
    measuring.save(tmp_path / "a.json", {"rows": [1]})
    before = (tmp_path / "a.json").read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*a\.json"):
        measuring.save(tmp_path / "a.json", {"rows": [2]})
    assert (tmp_path / "a.json").read_text() == before


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_documented_options_exist(path):
    source, shared = path.read_text(), (BENCHMARKS / "outputs.py").read_text()
    text = ast.get_docstring(ast.parse(source))
    commands = "\n".join(re.findall(rf"^ *python benchmarks/{path.name}(.*(?:\n +\[.*)*)", text, re.MULTILINE))
    for option in re.findall(r"--([a-z-]+)", commands) + re.findall(r"`--([a-z-]+)", text):
        added = f'"--{option}"' in source + shared * ("add_outputs(parser" in source)
        assert added or ('"--{name}"' in source and f'("{option}", "' in source), option


@pytest.mark.slow
def test_an_endless_stream_has_constant_memory_and_exact_logits(run, load, monkeypatch):
    monkeypatch.setattr(load("decode"), "MAX_PLAYED", 25)
    found = run("decode", "--endless", 1500)
    assert len(found.rows) == 10
    assert len({row["state_bytes"] for row in found.rows}) == 1
    assert all(row["logit_error"] < 1e-4 for row in found.rows)
    assert found.picture.stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "prefill", "train"])
def test_peers(run, part):
    """Each part has a row for each peer that is installed, whose logits and losses have agreed with DSMR's."""
    options = ("--rounds", 1, "--tokens", 2, "--positions", 20, "--prompts", 40, "--excerpts", "16,32")
    found = run("peers", part, "--preset", "tiny", *SETTINGS, *options)
    installed = {name for name in ("torch", "mlx_lm") if importlib.util.find_spec(name)}
    peers = [row["sides"][1] for row in found.rows]
    assert ("PyTorch reference" in peers) == ("torch" in installed)
    assert ("mlx-lm, KVCache" in peers) == ("mlx_lm" in installed and part != "train")
    assert sum("skipped" in note for note in found.notes) == 2 - len(installed)
    assert max(found.agreement.values()) < 1e-5
    if part == "train":
        assert peers[:2] == ["full attention, excerpts of 16", "full attention, excerpts of 32"]
        assert all(row["loss_difference"] < 1e-4 for row in found.rows if row["loss_difference"] is not None)
    assert all(row["ratio"]["median"] > 0 for row in found.rows)
    assert found.picture.stat().st_size > 5000


def test_peers_with_other_logits_are_refused_and_missing_peers_named(load, monkeypatch):
    peers, plain = load("peers"), load("plain")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    a = Namespace(preset="tiny", settings=[*TINY, "horizons=custom:16,8"], torch_device="cpu")
    setting = peers.Setting.of(a)
    assert [note.partition(" is")[0] for note in setting.notes] == ["mlx-lm", "PyTorch"]
    assert not setting.llama
    assert not setting.torch
    at_once = plain.logits_at_once
    monkeypatch.setattr(plain, "logits_at_once", lambda model, ids: at_once(model, ids) * 1.01)
    with pytest.raises(
        SystemExit, match=r"^full attention: its logits differ from DSMR's by 1\.0e-02, must be at most 1e-04$"
    ):
        peers.agreement(setting)


@pytest.mark.slow
def test_scaling(run):
    settings = [word.replace("segment_length=8", "segment_length=128") for word in SETTINGS]  # fewer steps for a piece
    found = run("scaling", "--quick", *settings)
    names = ["reading", "training", "reading_at_once", "training_at_once", "horizon", "lanes", "layers", "segment"]
    assert [row["family"] for row in found.rows] == names
    for row in found.rows:
        assert len(row["x"]) == len(row["seconds"]) == len(row["peak_bytes"])
        assert (row["met"] is None) == (not row["linear"])
    assert found.picture.stat().st_size > 5000


def test_slopes_are_exponents_with_standard_errors(load):
    """Of exact powers, without error; of points around one, within three standard errors of it."""
    scaling = load("scaling")
    x = [2.0**n for n in range(12)]
    exact = scaling.slope(x, [3 * v**1.5 for v in x])
    assert exact["slope"] == pytest.approx(1.5)
    assert exact["error"] == pytest.approx(0, abs=1e-9)
    assert exact["at_one"] == pytest.approx(3)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, len(x)))
    noisy = scaling.slope(x, noise * x)
    assert 0 < abs(noisy["slope"] - 1) < 3 * noisy["error"] < 0.1


@pytest.mark.parametrize(("time", "peak", "met"), [(1.04, 0.01, True), (1.06, 0.0, False), (1.0, 0.03, False)])
def test_linear_within_tolerances(load, time, peak, met):
    slopes = {"time": time, "held": 0.0, "peak": peak}
    assert load("scaling").is_linear({name: {"slope": value} for name, value in slopes.items()}) == met


def test_an_invalid_picture_path_is_refused_before_the_work(load, monkeypatch, capsys):
    decode = load("decode")
    monkeypatch.setattr(sys, "argv", ["decode.py", "--plot", "picture.gif"])
    with pytest.raises(SystemExit):
        decode.main()
    assert "argument --plot: picture.gif: expected a name that ends in .png or .svg" in capsys.readouterr().err
