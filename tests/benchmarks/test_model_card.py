"""From a training run to the folder that is shipped: benchmarks/model_card.py."""

import json
import re
import sys
from pathlib import Path

import pytest
from support.midi_files import tune, write_folder
from support.tiny import tiny_config

from dsmr_mlx import UserError
from dsmr_mlx.cli import main
from dsmr_mlx.common.config import setting_text
from dsmr_mlx.common.files import sha256
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint_folder import verify
from dsmr_mlx.training.run import train

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model_card  # noqa: E402
import model_card_text  # noqa: E402

OPTIONS = {"top_p": 0.9, "max_note_seconds": 1}
ABOUT = {
    "data": {"name": "Tunes", "url": "https://example.org", "about": "songs", "citations": ["A. Nobody: Tunes."]},
    "licence": {
        **{"id": "CC0-1.0", "name": "Public domain", "url": "https://example.org"},
        **{"terms": "anything goes", "because": "for nobody owns them"},
    },
    "limits": ["Two voices at most."],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, a run whose matrices can be quantized, its recipe, and a folder with what stays as it is."""
    folder = tmp_path_factory.mktemp("card")
    write_folder(folder / "midi", {f"{i}.mid": tune(i, 120) for i in range(8)})
    prepare(folder / "midi", folder / "corpus", validation_fraction=0.4)
    config = tiny_config(d_model=64, head_dim=64, n_heads=1, d_ff=64, max_steps=3, eval_every=3)
    train(config, folder / "corpus", folder / "run")
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.to_dict().items() if value is not None]
    (folder / "small.toml").write_text("\n".join(lines))
    (folder / "about.json").write_text(json.dumps(ABOUT))
    (folder / "small").mkdir()
    (folder / "small" / "LICENSE").write_text("whose it is")
    (folder / "small" / "generation.json").write_text(json.dumps(OPTIONS))
    return folder


def arguments(world: Path, *more: str) -> list[str]:
    files = {"--run": "run/last", "--data": "corpus", "--out": "small", "--recipe": "small.toml", "--work": "work"}
    files["--about"] = "about.json"
    given = [word for option, name in files.items() for word in (option, str(world / name))]
    small = "--samples 2 --seconds 8 --curve-tokens 800 --precision-tokens 400"
    return [str(world / "run"), *given, *small.split(), *more]


def shipped_arguments(world: Path, *more: str) -> list[str]:
    """For the weights that are shipped, elsewhere."""
    words = arguments(world, "--work", str(world / "again"), *more)
    run = words.index("--run")
    return [*words[1:run], *words[run + 2 :]]


@pytest.fixture
def make(world, monkeypatch, capsys):
    """Run the program with some more arguments; gives the commands that it ran, which run in this process."""

    def make(*more: str, words=arguments) -> list[str]:
        ran = []

        def run(self, words: list[str]) -> str:
            ran.append(words[0])
            with monkeypatch.context() as patched:
                patched.chdir(self.folder)
                capsys.readouterr()
                assert main(words) == 0, capsys.readouterr().err
            return capsys.readouterr().out

        monkeypatch.setattr(model_card.Work, "run", run)
        monkeypatch.setattr(sys, "argv", ["model_card.py", *words(world, *more)])
        model_card.main()
        return ran

    return make


@pytest.fixture
def made(world, make):
    ran = make()
    return ran, json.loads((world / "small" / "card.json").read_text())


def test_all_is_measured_once_and_written(world, made, make, monkeypatch, capsys):
    """A whole checkpoint in half precision with its card; the licence and the options are those that were there."""
    ran, card = made
    assert ran in (["convert"] * 3 + ["evaluate", "evaluate", "compare", "generate", "assess"], [])
    small = world / "small"
    verify(small)
    assert (small / "LICENSE").read_text() == "whose it is"
    assert bundled.generation_options(small) == OPTIONS
    assert card["sha256"] == sha256(small / "model.safetensors")
    assert card["evaluation"]["weights"]["dtype"] == "bfloat16"
    assert card["verification"]["passed"]
    assert (
        card["training"]["tokens"] == json.loads((world / "run/last/training.json").read_text())["progress"]["tokens"]
    )
    assert [row["checkpoint"] for row in card["precision"]] == ["small-float32", "small", "small-8bit"]
    assert len(card["music"]["shown"]) == card["music"]["samples"] == 2
    assert (small / "README.md").read_text() == model_card_text.readme(card)
    assert make() == [], "nothing is measured twice"
    monkeypatch.setattr(bundled, "FOLDER", world)
    assert bundled.describe("small").perplexity == card["evaluation"]["perplexity"]


def test_the_figures_are_those_of_the_commands(world, made, monkeypatch, capsys):
    """What the card shows as commands runs as it stands there, and prints the same figures."""
    _, card = made
    monkeypatch.chdir(world / "work")
    capsys.readouterr()
    for part, expected in (
        ("evaluation", f"perplexity {card['evaluation']['perplexity']:.4f} on"),
        ("music", "events"),
    ):
        words = card["commands"][part]["command"].split()
        assert main(words[1:]) == 0
        assert expected in capsys.readouterr().out
    text = model_card_text.readme(card)
    assert f"**Perplexity {card['evaluation']['perplexity']:.4f}**" in text
    for part in ("conversion", "evaluation", "context", "precision", "samples", "music"):
        assert card["commands"][part]["command"] in text
    assert str(world) not in text + json.dumps(card), "nothing of this machine's folders"


def test_what_a_card_says_beside_its_figures_follows_from_what_was_done(world, made):
    """Names, options, data and licence of this model, and not of the one that is shipped."""
    _, card = made
    text = model_card_text.readme(card)
    again = text.partition("## Measured again")[2]
    assert "model_card.py run --run run/last --data corpus --out small --recipe small.toml --about about.json" in again
    assert "--samples 2 --seconds 8.0 --curve-tokens 800 --precision-tokens 400" in again
    assert "dsmr-mlx train --data corpus --out run --config small.toml" in text
    assert "under [Public domain](https://example.org), for nobody owns them: anything goes." in text
    assert "## Limits\n\n- Two voices at most.\n" in text
    assert not re.search("ASAP|MAESTRO|classical|CPU|NonCommercial", text)
    assert card["data"]["works_in_two_splits"] == 0


@pytest.mark.parametrize(
    ("part", "change", "said", "unsaid"),
    [
        (["data"], {"works_in_two_splits": 2}, "2 works are in two splits", "whose works the model has not heard"),
        (["generation"], {"max_note_seconds": None}, "## Limits", "options above release it"),
        (
            ["music", "training", "readings", 0, "reference_summary"],
            {"files": 1},
            "figure of 1 excerpts of",
            "of 2 exc",
        ),
    ],
)
def test_a_card_says_nothing_that_is_not_so(made, part, change, said, unsaid):
    card = json.loads(json.dumps(made[1]))
    values = card
    for name in part:
        values = values[name]
    assert unsaid in model_card_text.readme(card)
    values |= change
    text = model_card_text.readme(card)
    assert said in text
    assert unsaid not in text


def test_the_shipped_card_is_what_is_written_of_its_figures():
    folder = bundled.FOLDER / bundled.DEFAULT
    card = json.loads((folder / bundled.CARD).read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card_text.readme(card)


def test_sections_without_figures_are_left_out(made):
    _, card = made
    partial = {name: value for name, value in card.items() if name not in ("context", "precision", "music")}
    headings = re.findall(r"^## (.*)$", model_card_text.readme(partial), re.MULTILINE)
    assert headings == ["Data", "Licence", "Model", "Training", "How well it predicts", "Limits", "Measured again"]


def test_other_options_make_other_samples(world, make, made):
    """After a change of how it is played only that is measured again."""
    kept = world / "small" / "generation.json"
    kept.write_text(json.dumps(OPTIONS | {"top_p": 0.8}))
    try:
        assert make("--parts", "samples,music") == ["generate", "assess"]
        with pytest.raises(UserError, match="--parts music,colour: unknown part colour"):
            make("--parts", "music,colour")
        with pytest.raises(UserError, match="--parts context: the evaluation is not known yet"):
            make("--parts", "context", "--max-tokens", "300")
    finally:
        kept.write_text(json.dumps(OPTIONS))


def test_what_is_shipped_is_measured_again_without_the_run(world, make, made):
    """What is not measured stays in the card, with its machine; the weights stay as they are."""
    _, card = made
    before = (world / "small" / "model.safetensors").read_bytes()
    ran = make("--parts", "evaluation,samples,music", words=shipped_arguments)
    assert ran == ["evaluate", "generate", "assess"]
    again = json.loads((world / "small" / "card.json").read_text())
    assert again.keys() == card.keys()
    for name in ("sha256", "training", "context", "precision", "verification", "data"):
        assert again[name] == card[name]
    assert again["evaluation"]["perplexity"] == card["evaluation"]["perplexity"]
    assert [file["notes"] for file in again["music"]["shown"]] == [file["notes"] for file in card["music"]["shown"]]
    assert (world / "small" / "model.safetensors").read_bytes() == before
    assert (world / "small" / "README.md").read_text() == model_card_text.readme(again)
    verify(world / "small")


def test_the_music_of_a_card_is_that_of_its_options(world, make, made):
    """What is said of samples is not said of others, made otherwise."""
    make(words=shipped_arguments)
    kept, before = world / "small" / "generation.json", (world / "small" / "card.json").read_bytes()
    kept.write_text(json.dumps(OPTIONS | {"top_p": 0.7}))
    try:
        for part in ("samples", "music"):
            with pytest.raises(UserError, match=f"--parts {part}: expected samples and music together"):
                make("--parts", part, words=shipped_arguments)
        with pytest.raises(UserError, match=r"generation\.json: .* expected samples,music among --parts"):
            make("--parts", "evaluation", words=shipped_arguments)
        assert (world / "small" / "card.json").read_bytes() == before
    finally:
        kept.write_text(json.dumps(OPTIONS))


def test_what_cannot_be_measured_of_what_is_shipped_is_refused(world, make, made, tmp_path, trained):
    with pytest.raises(UserError, match="unknown part precision without MODEL"):
        make("--parts", "precision", words=shipped_arguments)
    with pytest.raises(UserError, match=r"--data .*: fingerprint .*card\.json is about"):
        make("--data", str(trained.corpus), words=shipped_arguments)
    with pytest.raises(UserError, match=r"card\.json"):
        make("--out", str(tmp_path / "none"), words=shipped_arguments)
    with pytest.raises(UserError, match=r"--run MODEL\.pt\.last is missing"):
        make(words=lambda world, *more: [str(world / "run"), *shipped_arguments(world, *more)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rate = 0.5\n", "small.toml: learning_rate = 0.5, the run in"),
        ("compile = true\n", None),
    ],
)
def test_a_run_of_another_recipe_is_refused(world, tmp_path, change, message):
    recipe = tmp_path / "small.toml"
    name = change.split()[0]
    kept = [line for line in (world / "small.toml").read_text().splitlines() if not line.startswith(f"{name} =")]
    recipe.write_text(change + "\n".join(kept))
    if message is None:
        assert model_card.training_facts(world / "run/last", recipe, world / "corpus")["step"] == 3
        return
    with pytest.raises(UserError, match=re.escape(message)):
        model_card.training_facts(world / "run/last", recipe, world / "corpus")


def test_a_run_on_another_corpus_is_refused(world, trained):
    with pytest.raises(UserError, match=r"--data .*: fingerprint .* was trained on"):
        model_card.training_facts(world / "run/last", world / "small.toml", trained.corpus)


def test_the_recipe_of_the_shipped_model_is_that_of_its_run():
    """Every setting of the recipe is what the card says of the run."""
    from dsmr_mlx.training.settings import build_config

    card = json.loads((bundled.FOLDER / bundled.DEFAULT / bundled.CARD).read_text(encoding="utf-8"))
    recipe = build_config(toml=ROOT / card["training"]["recipe"])
    for name, value in card["training"]["settings"].items():
        if name not in model_card.INCIDENTAL:
            assert setting_text(getattr(recipe, name)) == setting_text(value), name
