"""benchmarks/model_card.py: figures come from the commands that the card names, and are measured once."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
from support.checkpoints import save
from support.midi_files import tune, write_midi_files
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx import UserError
from dsmr_mlx.cli import main
from dsmr_mlx.common.config import setting_text
from dsmr_mlx.common.files import sha256
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation import motif
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint_folder import generation_options
from dsmr_mlx.training.run import train
from dsmr_mlx.training.settings import build_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model_card  # noqa: E402

OPTIONS = {"top_p": 0.9, "max_note_seconds": 1}
ABOUT = {
    "recipe": "examples/maestro-small.toml",
    "data": {"name": "Tunes", "url": "https://example.org", "about": "songs", "citations": ["A. Nobody: Tunes."]},
    "licence": {"id": "CC0-1.0", "name": "Public domain", "url": "https://a.org", "terms": "none", "of": "Tunes"},
    "limits": ["Two voices at most."],
}
few_probes = partial(motif.motif_probe, probes=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a corpus, a run on it, facts about the data, and a checkpoint `small` to be described."""
    folder = tmp_path_factory.mktemp("card")
    write_midi_files(folder / "midi", {f"{i}.mid": tune(i, 120) for i in range(8)})
    prepare(folder / "midi", folder / "corpus", validation_fraction=0.4)
    train(tiny_config(max_steps=3, eval_every=3), folder / "corpus", folder / "run")
    (folder / "about.json").write_text(json.dumps(ABOUT))
    main(["convert", str(folder / "run"), str(folder / "small"), "--dtype", "bfloat16"])
    (folder / "small" / "generation.json").write_text(json.dumps(OPTIONS))
    return folder


@pytest.fixture
def make(world, monkeypatch, capsys):
    """Write the card of `small`, with more options; returns the commands that were run, in this process."""

    def make(*more: str) -> list[str]:
        ran = []

        def run(words: list[str], folder: Path) -> str:
            ran.append(words[0])
            if model_card.is_script(words):
                return json.dumps([{"name": "continue", "median": 0.25, "most": 0.5}])
            with monkeypatch.context() as patched:
                patched.chdir(folder)
                capsys.readouterr()
                assert main(words) == 0, capsys.readouterr().err
            return capsys.readouterr().out

        files = {"--data": "corpus", "--work": "work", "--about": "about.json"}
        paths = [word for option, name in files.items() for word in (option, str(world / name))]
        small = ["--samples", "2", "--seconds", "4", "--curve-tokens", "800"]
        monkeypatch.setattr(model_card, "run", run)
        monkeypatch.setattr(motif, "motif_probe", few_probes)
        monkeypatch.setattr(sys, "argv", ["model_card.py", str(world / "small"), *paths, *small, *more])
        model_card.main()
        return ran

    return make


@pytest.fixture
def card(world, make):
    make("--run", str(world / "run/last"))
    return json.loads((world / "small" / "card.json").read_text())


@pytest.mark.slow
def test_everything_is_measured_once(world, make, card, monkeypatch):
    assert card["sha256"] == sha256(world / "small" / "model.safetensors")
    progress = json.loads((world / "run/last/training.json").read_text())["progress"]
    assert {name: card["training"][name] for name in ("step", "tokens")} == {
        name: progress[name] for name in ("step", "tokens")
    }
    assert card["generation"] == OPTIONS
    assert len(card["music"]["shown"]) == card["music"]["samples"] == 2
    assert make() == [], "the training facts come from the card, everything else is stored"
    monkeypatch.setattr(bundled, "FOLDER", world)
    assert bundled.load_card("small").perplexity == card["evaluation"]["perplexity"]


@pytest.mark.slow
def test_the_text_shows_the_figures_and_commands(world, card, monkeypatch, capsys):
    text = (world / "small" / "README.md").read_text()
    assert text == model_card.readme(card)
    assert f"**Perplexity {card['evaluation']['perplexity']:.4f}**" in text
    assert all(result["command"] in text for result in card["commands"].values())
    assert "[Public domain](https://a.org): none. That is the licence of Tunes." in text
    assert "| continue | 0.250 | 0.500 |" in text
    assert "## Limits\n\n- Two voices at most.\n" in text
    assert "Default options: `--top-p 0.9 --max-note-seconds 1`." in text
    assert str(world) not in text + json.dumps(card), "no paths of this machine"
    monkeypatch.chdir(world / "work")
    assert main(card["commands"]["evaluation"]["command"].split()[1:]) == 0
    assert f"perplexity {card['evaluation']['perplexity']:.4f} on" in capsys.readouterr().out


def test_a_run_that_started_from_other_weights_counts_theirs(tmp_path):
    """And those of all runs before, each of which keeps its own figures and settings."""
    assert model_card.earlier_text([]) == ""
    training = {"step": 2, "tokens": 30, "seconds": 4.0}
    for i, tokens in enumerate((50, 20)):
        save(tmp_path / f"{i}", TOKENIZER)
        facts = {"sha256": f"weights {i}", "training": training | {"settings": {"seed": i}}}
        (tmp_path / f"{i}" / "card.json").write_text(json.dumps(facts))
        training = model_card.with_earlier_runs({"step": 1, "tokens": tokens, "seconds": 1.0}, str(tmp_path / f"{i}"))
    assert (training["step"], training["tokens"], training["seconds"]) == (4, 100, 6.0)
    earlier = [(run["tokens"], run["step"], run["sha256"], run["settings"]["seed"]) for run in training["earlier"]]
    assert earlier == [(30, 2, "weights 0", 0), (50, 1, "weights 1", 1)]
    assert model_card.earlier_text(training["earlier"]).startswith(";\n30 and 50 of them in earlier runs")


def test_a_command_is_run_again_on_other_inputs_without_files_of_the_last_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(model_card, "run", lambda words, folder: ran.append(words) or "{}")
    for inputs in ({"samples": 3}, {"samples": 3}, {"samples": 2}):
        model_card.measure(tmp_path, "samples", ["generate"], inputs)
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "samples" / f"{len(ran)}.mid").touch()
    assert len(ran) == 2
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["2.mid"]


def test_results_depend_on_all_that_they_are_made_of(tmp_path, monkeypatch):
    """On the configuration, and those of generated music on how the samples were made."""
    corpus = write_corpus(tmp_path / "corpus")
    parser = argparse.Namespace(
        checkpoint=tmp_path / "small", data=corpus.path, work=tmp_path / "work", run=None,
        max_tokens=None, curve_tokens=100, samples=3, seconds=4.0, about=None,
    )  # fmt: skip

    def inputs(horizons: str = "none", **options) -> dict[str, dict]:
        save(tmp_path / "small", TOKENIZER, horizons=horizons)
        facts = {"sha256": sha256(tmp_path / "small/model.safetensors"), "data": {"fingerprint": corpus.fingerprint}}
        (tmp_path / "small" / "card.json").write_text(json.dumps(facts | {"training": {}}))
        found = {}

        def measure(folder: Path, part: str, words: list[str], inputs: dict) -> dict:
            found[part] = {"command": words, **inputs}
            if part == "music":
                raise StopIteration
            return {}

        monkeypatch.setattr(model_card, "measure", measure)
        with pytest.raises(StopIteration):
            model_card.make_card(argparse.Namespace(**vars(parser) | options))
        return found

    first = inputs()
    for changed, parts in (
        (inputs(), set()),
        (inputs(samples=2), {"samples", "music"}),
        (inputs(seconds=5.0), {"samples", "music"}),
        (inputs(horizons="uniform:8"), {"evaluation", "context", "samples", "music"}),
    ):
        assert {part for part in first if first[part] != changed[part]} == parts


def test_gaps_and_the_classifier_are_described_if_there_are_any():
    nats = {"nats": 2.5, "error": 0.25}
    row = {"start": 2.0, "end": 4.0, "gaps": 1234, "shown": nats, "nothing": nats, "gain": nats | {"nats": 0.125}}
    join = {"kind": "true", "passage": nats, "following": nats}
    gaps = {"everything": row, "by_length": [row], "joins": [join], "joined": 16, "seconds": 8.0}
    text = model_card.gap_text({"gaps": gaps, "commands": {"gaps": {"command": "dsmr-mlx evaluate x --gaps"}}})
    assert "| 2 – 4 s | 1,234 | 2.5000 ± 0.2500 | 2.5000 ± 0.2500 | 0.1250 ± 0.2500 |" in text
    assert "| the true one | 2.5000 ± 0.2500 | 2.5000 ± 0.2500 |" in text
    assert "put into 16 gaps of 8 s" in text
    assert model_card.gap_text({"gaps": None}) == model_card.told_apart(None) == ""
    told = {"right": 0.812, "chance": 0.043, "by": [{"feature": "key clarity", "weight": -1.0}]}
    found = "A classifier tells generated from real music in 81 % of the cases (50 ± 4 % by luck), most by key clarity."
    assert model_card.told_apart(told) == f"{found}\n"


@pytest.mark.slow
def test_facts_about_other_weights_or_data_are_refused(world, make, card, trained):
    path = world / "small" / "card.json"
    path.write_text(json.dumps(card | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"card.json: weights 000000000000, found"):
        make()
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"card.json: corpus .*, found"):
        make("--data", str(trained.corpus))
    with pytest.raises(UserError, match="was trained on"):
        make("--data", str(trained.corpus), "--run", str(world / "run/last"))
    path.unlink()
    with pytest.raises(UserError, match="or --run with the run that made the weights"):
        make()


@pytest.mark.slow
def test_changed_options_are_measured_again(world, make, card):
    options = world / "small" / "generation.json"
    options.write_text(json.dumps(OPTIONS | {"top_p": 0.8}))
    try:
        assert make() == ["generate", "assess", "benchmarks/studio.py"]
        assert json.loads((world / "small" / "card.json").read_text())["generation"]["top_p"] == 0.8
    finally:
        options.write_text(json.dumps(OPTIONS))


def test_the_shipped_card_is_up_to_date():
    folder = bundled.FOLDER / bundled.DEFAULT
    card = json.loads((folder / bundled.CARD).read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card.readme(card)
    assert card["sha256"] == sha256(folder / "model.safetensors")
    assert card["generation"] == generation_options(folder)


def test_the_shipped_recipe_is_that_of_the_shipped_run():
    """Every setting that decides what is learned is the same in the recipe and in the card."""
    card = json.loads((bundled.FOLDER / bundled.DEFAULT / bundled.CARD).read_text(encoding="utf-8"))
    recipe = build_config(config=ROOT / card["training"]["recipe"])
    incidental = {"compile", "eval_every", "eval_tokens", "checkpoint_every", "keep_last", "sample_seconds"}
    for name, value in card["training"]["settings"].items():
        if name not in incidental:
            assert setting_text(getattr(recipe, name)) == setting_text(value), name
