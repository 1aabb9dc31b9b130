"""Bundled models: their names in place of checkpoint paths, their recommended options, and the one that is shipped."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.tiny import TOKENIZER, tiny_config, write_corpus

import dsmr_mlx
from dsmr_mlx import DSMR, UserError
from dsmr_mlx.cli.generate import DEFAULT_SECONDS
from dsmr_mlx.common.files import sha256
from dsmr_mlx.generation.options import RANKED_SECONDS, SAMPLING_OPTIONS, recommended_options
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.generation.steering import MaxNoteSeconds
from dsmr_mlx.model import bundled, checkpoint
from dsmr_mlx.model.checkpoint_folder import generation_options, verify_checkpoint
from dsmr_mlx.music.midi import read_notes, read_text

CARD = {
    "parameters": 1234,
    "data": {"name": "Tunes"},
    "training": {"tokens": 5_000_000},
    "evaluation": {"perplexity": 12.3456, "split": "validation"},
    "licence": {"id": "CC-BY-NC-SA-4.0", "terms": "share alike"},
}
OPTIONS = {"temperature": 0.9, "top_p": 0.95, "max_note_seconds": 2, "end_within": 1}
MAX_BYTES = 25 * 10**6


def make_model(folder: Path, seed: int, dtype: mx.Dtype = mx.bfloat16) -> None:
    mx.random.seed(seed)
    model = DSMR(tiny_config().model_config(TOKENIZER))
    model.set_dtype(dtype)
    checkpoint.save_model(folder, model.config, model.parameters(), TOKENIZER)


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """Two bundled models, `big` and the default `tiny`, which recommends `OPTIONS`."""
    folder = tmp_path / "models"
    for seed, name in enumerate(("big", "tiny")):
        make_model(folder / name, seed)
        (folder / name / "card.json").write_text(json.dumps(CARD))
    (folder / "tiny" / "generation.json").write_text(json.dumps(OPTIONS))
    monkeypatch.setattr(bundled, "FOLDER", folder)
    monkeypatch.setattr(bundled, "DEFAULT", "tiny")
    monkeypatch.setattr("dsmr_mlx.cli.common.DEFAULT", "tiny")
    monkeypatch.setattr("dsmr_mlx.cli.generate.DEFAULT_SECONDS", 1.0)
    monkeypatch.setattr("dsmr_mlx.generation.grammar.RELEASE_TOKENS", 4)  # pieces end soon
    return folder


def parameters(model: DSMR) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_names_stand_for_folders(models, monkeypatch, tmp_path):
    """The default comes first; folders without a card are ignored; an existing path takes precedence over a name."""
    (models / "draft").mkdir()
    assert bundled.names() == ["tiny", "big"]
    assert bundled.locate(None) == models / "tiny"
    assert checkpoint.resolve("big") == models / "big"
    assert checkpoint.resolve(models / "big") == models / "big"
    assert checkpoint.resolve("big/") == models / "big"
    assert bundled.find_by_folder(models / "big").name == "big"
    assert bundled.find_by_folder(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    make_model(Path("big"), seed=9)
    assert checkpoint.resolve("big") == Path("big")
    assert bundled.find_by_folder(Path("big")) is None
    expected = "odd: no such folder, expected a checkpoint or a run, or a bundled model: tiny, big"
    with pytest.raises(UserError, match=re.escape(expected)):
        checkpoint.resolve("odd")
    with pytest.raises(UserError, match="draft: not a bundled model, expected one of tiny, big"):
        bundled.load_card("draft")


def test_linked_model_is_bundled(models, tmp_path, run):
    """Its licence is printed although its weights are elsewhere."""
    (models / "big").rename(tmp_path / "elsewhere")
    (models / "big").symlink_to(tmp_path / "elsewhere")
    assert bundled.find_by_folder(checkpoint.resolve("big").resolve()).name == "big"
    assert run("generate", "big", "--tokens", 5).err.startswith("big: trained on Tunes; weights CC-BY-NC-SA-4.0")


def test_installation_without_models(models, run):
    shutil.rmtree(models)
    ended = run("generate")
    assert (ended.code, ended.out) == (2, "")
    assert "no checkpoint given, and this installation lacks the bundled tiny" in ended.err
    assert run("models").out == "this installation has no bundled models\n"


def test_list_shows_recommended_options(models, run):
    lines = run("models").out.splitlines()
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in OPTIONS.items())
    assert [line for line in lines if "default options" in line] == [
        f"tiny: default options of generate and live: {options}"
    ]


def test_load_default_model_in_any_dtype(models):
    stored, tokenizer = dsmr_mlx.load(as_stored=True)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    cast, _ = dsmr_mlx.load("tiny", mx.float32)
    half, _ = dsmr_mlx.load("tiny", mx.float16)
    other, _ = dsmr_mlx.load("big")
    for name, array in parameters(stored).items():
        assert array.dtype == mx.bfloat16
        assert parameters(half)[name].dtype == mx.float16
        assert parameters(cast)[name].dtype == mx.float32
        assert mx.array_equal(parameters(cast)[name], array), "no value changes"
    assert not mx.array_equal(parameters(other)["embed.weight"], parameters(stored)["embed.weight"])


def test_load_on_a_cpu_casts_to_float32_unless_as_stored(models, monkeypatch):
    def found(**options) -> set:
        return {array.dtype for array in parameters(dsmr_mlx.load(**options)[0]).values()}

    for kind, own in ((mx.DeviceType.cpu, mx.float32), (mx.DeviceType.gpu, mx.bfloat16)):
        monkeypatch.setattr(mx, "default_device", lambda kind=kind: mx.Device(kind))
        assert found() == {own}
        assert found(as_stored=True) == {mx.bfloat16}


@pytest.mark.slow
def test_generate_without_arguments_makes_a_new_piece_each_time(models, run):
    """Files are named by model and seed; the licence and how to play the file are printed."""
    first, second = run("generate"), run("generate")
    assert first.code == second.code == 0, first.err + second.err
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["tiny-1.mid", "tiny-2.mid"]
    assert first.err.splitlines()[0] == (
        "tiny: trained on Tunes; weights CC-BY-NC-SA-4.0, share alike; the program is MIT"
    )
    assert "tiny-1.mid: listen with any MIDI player, or in a browser: dsmr-mlx show tiny-1.mid --html" in first.out
    assert read_notes("tiny-1.mid") != read_notes("tiny-2.mid")
    assert run("generate", "tiny", "--seed", 1, "--out", "again.mid").code == 0
    assert Path("again.mid").read_bytes() == Path("tiny-1.mid").read_bytes()
    written = json.loads(read_text("tiny-2.mid"))
    assert (written["model"], written["seed"], written["seconds"]) == ("tiny", 2, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["tiny-1.mid"]),
        (["--seed", 7], ["tiny-7.mid"]),
        (["-n", 2], ["tiny-1/1.mid", "tiny-1/2.mid"]),
        (["--prompt", "song.mid"], ["song-1.mid"]),
        (["--from-state", "pause.safetensors"], ["pause-1.mid"]),
    ],
)
def test_default_file_names(models, run, trained, options, expected):
    shutil.copy(trained.midi / "0.mid", "song.mid")
    assert run("generate", "--seconds", 1, "--save-state", "pause.safetensors", "--out", "made/1.mid").code == 2
    assert run("generate", "--tokens", 5, "--save-state", "pause.safetensors", "--out", "made").code == 0
    made = run("generate", "--tokens", 5, *options)
    assert made.code == 0, made.err
    names = {str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*.mid")}
    assert names - {"song.mid", "made/1.mid"} == set(expected)
    again = run("generate", "--tokens", 5, *options)
    assert again.code == (2 if "--seed" in options else 0)


def steered(file: str) -> tuple[dict, list[dict]]:
    """The sampling options and processors stored in a file."""
    written = json.loads(read_text(file))
    return {name: written[name] for name in SAMPLING_OPTIONS}, written.get("processors", [])


@pytest.mark.slow
def test_recommended_options_are_defaults(models, run):
    """The recommended ending applies only if no length is given; a saved piece keeps its options."""
    long_notes = {"kind": "MaxNoteSeconds", "seconds": 2.0, "nudge": 3.0}
    ending = {"kind": "EndWithin", "start": 1.0, "within": 1.0, "may_end": False}
    recommended = {"temperature": 0.9, "top_k": 0, "top_p": 0.95, "min_p": 0.0}
    assert run("generate", "--out", "a.mid").code == 0
    assert steered("a.mid") == (recommended, [long_notes, ending])
    assert run("generate", "--seconds", 1, "--top-p", 1, "--out", "b.mid").code == 0
    assert steered("b.mid") == (recommended | {"top_p": 1.0}, [long_notes])
    assert run("generate", "--seconds", 1, "--save-state", "s.safetensors", "--out", "c.mid").code == 0
    assert run("generate", "--from-state", "s.safetensors", "--seconds", 1, "--out", "d.mid").code == 0
    assert steered("c.mid") == steered("d.mid") == (recommended, [long_notes])
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert run("generate", "big", "--seconds", 1, "--out", "e.mid").code == 0
    assert steered("e.mid") == (plain, [])
    assert run("generate", "--seconds", 1, "--no-recommended", "--top-p", 0.9, "--out", "f.mid").code == 0
    assert steered("f.mid") == (plain | {"top_p": 0.9}, [])
    refused = run("generate", "--from-state", "s.safetensors", "--no-recommended", "--out", "g.mid")
    assert (refused.code, "--no-recommended: not with --from-state" in refused.err) == (2, True)


@pytest.mark.slow
def test_recommended_options_from_python(models, run):
    """The same notes as from the command line with the same arguments."""
    found = dsmr_mlx.recommended()
    assert found == {"sampling": Sampling(temperature=0.9, top_p=0.95), "processors": [MaxNoteSeconds(2)]}
    assert dsmr_mlx.recommended("big") == {"sampling": Sampling(), "processors": []}
    model, tokenizer = dsmr_mlx.load()
    notes = list(dsmr_mlx.generate(model, tokenizer, seconds=1, seed=4, as_notes=True, **found))
    assert run("generate", "--seconds", 1, "--seed", 4).code == 0
    in_file = read_notes("tiny-4.mid")
    assert sorted(note.pitch for note in notes) == sorted(in_file.pitch.tolist())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"top_q": 1}', "generation.json: unknown option top_q; known are temperature, top_k, top_p"),
        ('{"best_of": 0}', "generation.json: --best-of 0, expected a whole number from 1 on"),
        ("[1]", "generation.json: holds [1], expected options by name"),
        ("{", "generation.json: not valid JSON"),
        ('{"pitch_range": 60}', "--pitch-range 60: expected a string"),
        ('{"key": null, "velocity_range": [30, 90]}', "--velocity-range [30, 90]: expected a string"),
        ('{"top_p": 2}', "--top-p 2: expected more than 0 and at most 1"),
    ],
)
def test_invalid_recommendations(models, run, content, message):
    (models / "tiny" / "generation.json").write_text(content)
    ended = run("generate", "--tokens", 5)
    assert ended.code == 2
    assert message in ended.err


def test_recommended_candidates_are_for_one_short_piece(models, run):
    (models / "tiny" / "generation.json").write_text('{"best_of": 3}')
    for options, expected in (
        (["--seconds", 1], 3),
        (["--seconds", 1, "--best-of", 2], 2),
        (["--seconds", 1, "-n", 1], None),
        (["--tokens", 5], None),
        (["--seconds", 1, "--no-recommended"], None),
        (["--seconds", 1, "--save-state", "a.safetensors"], None),
    ):
        made = run("generate", *options, "--out", "a.mid", "--force")
        assert (made.code, json.loads(read_text("a.mid")).get("best_of")) == (0, expected), (options, made.err)
    assert dsmr_mlx.recommended("tiny")["processors"] == []
    assert RANKED_SECONDS >= DEFAULT_SECONDS


def test_models_command(models, run):
    shown = run("models")
    assert shown.code == 0
    assert re.search(
        r"^tiny +1,234 +1 × 12 \+ 1 × 4 +Tunes +5,000,000 +12\.346 +[\d.]+ KiB +CC-BY-NC-SA-4\.0", shown.out, re.M
    )
    values = json.loads(run("models", "--json").out)
    assert [(value["name"], value["default"]) for value in values] == [("tiny", True), ("big", False)]
    assert values[0]["horizons"] == [12, 4]
    assert values[0]["bytes"] == (models / "tiny" / "model.safetensors").stat().st_size
    (models / "tiny" / "card.json").write_text(json.dumps(CARD | {"licence": {}}))
    assert "card.json: damaged, 'id' is missing" in run("models").err


@pytest.mark.slow
def test_every_command_accepts_a_name(models, run, tmp_path):
    """Evaluation, comparison, conversion both ways, and a run initialized from it."""
    corpus = write_corpus(tmp_path / "corpus").path
    result = run("evaluate", "--data", corpus)
    assert result.code == 0, result.err
    assert re.search(r"^weights: [\d,]+ parameters, bfloat16, [\d.]+ KiB, computed in float32$", result.out, re.M)
    values = json.loads(run("evaluate", "big", "--data", corpus, "--json").out)
    assert (values["checkpoint"], values["computed_in"], values["weights"]["dtype"]) == ("big", "float32", "bfloat16")
    assert run("compare", "tiny", "big", "--data", corpus).code == 0
    assert run("convert", "tiny", "cast", "--dtype", "float32").code == 0
    assert parameters(checkpoint.load("cast")[0])["embed.weight"].dtype == mx.float32
    assert run("convert", "--to-pytorch", "tiny", "back.safetensors").code == 0
    result = run("train", "--init", "tiny", "--data", corpus, "--out", "run", "--max-steps", 1, "--set", "batch_size=2")
    assert result.code == 0, result.err


NOTICE = "tiny: trained on Tunes; weights CC-BY-NC-SA-4.0, share alike; the program is MIT"


@pytest.mark.slow
def test_conversions_keep_licence_and_recommended_options(models, run, tmp_path):
    """A cast copy and a copy of it. Users may edit both files. The card is not copied: it is of other weights."""
    (models / "tiny" / "LICENSE").write_text("the licence")
    (models / "tiny" / "README.md").write_text("perplexity 12.3456")
    result = run("convert", "tiny", "cast", "--dtype", "float32")
    assert result.code == 0, result.err
    assert NOTICE in result.err
    assert run("convert", "cast", "again", "--horizons", "uniform:4").code == 0
    for folder in (Path("cast"), Path("again")):
        assert (folder / "LICENSE").read_text() == "the licence"
        assert generation_options(folder) == OPTIONS
        assert not (folder / "card.json").exists()
        assert not (folder / "README.md").exists()
    (Path("again") / "generation.json").write_text('{"top_p": 0.5}')
    assert run("generate", "again", "--tokens", 5, "--out", "a.mid").code == 0
    assert steered("a.mid")[0]["top_p"] == 0.5
    assert NOTICE in run("convert", "--to-pytorch", "tiny", "back.safetensors").err
    corpus = write_corpus(tmp_path / "corpus").path
    assert NOTICE in run("train", "--init", "tiny", "--data", corpus, "--out", "run", "--max-steps", 1).err


def test_live_without_a_checkpoint(models, run, trained):
    options = ["--in-file", trained.midi / "0.mid", "--offline", "--max-turn", 1, "--out-file", "session.mid"]
    ended = run("live", *options)
    assert ended.code == 0, ended.err
    assert "tiny: trained on Tunes; weights CC-BY-NC-SA-4.0" in ended.err
    assert len(read_notes("session.mid"))


def test_player_saved_in_one_dtype_continues_in_another(models, tmp_path):
    """A model in half precision on a GPU and in float32 on a CPU can load each other's states."""
    half, tokenizer = dsmr_mlx.load("tiny", as_stored=True)
    whole, _ = dsmr_mlx.load("tiny", mx.float32)
    player = Player(whole, tokenizer)
    steps = player.play()
    for _ in range(20):
        next(steps)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", half, tokenizer)
    assert loaded.position == player.position
    np.testing.assert_allclose(np.array(loaded.logits), np.array(player.logits))
    assert len(list(zip(loaded.play(), range(5), strict=False))) == 5
    with pytest.raises(UserError, match="saved with the weights"):
        Player.load(tmp_path / "a", dsmr_mlx.load("big")[0], tokenizer)


@pytest.fixture(scope="module", params=bundled.names())
def shipped(request) -> Namespace:
    """A model as it comes with the program."""
    folder = bundled.FOLDER / request.param
    return Namespace(folder=folder, card=json.loads((folder / bundled.CARD).read_text(encoding="utf-8")))


def test_shipped_model_is_small_complete_and_documented(shipped):
    """Less than 25 MB, weights as in card.json, a licence, and a README with the figures of card.json."""
    files = {path.name for path in shipped.folder.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer", "card.json", "generation.json", "README.md"}
    assert sum(path.stat().st_size for path in shipped.folder.rglob("*") if path.is_file()) < MAX_BYTES
    verify_checkpoint(shipped.folder)
    assert shipped.card["sha256"] == sha256(shipped.folder / "model.safetensors")
    model = bundled.load_card(shipped.folder.name)
    assert model.licence == "CC-BY-NC-SA-4.0"
    assert "MIT" in model.notice
    words = (shipped.folder / "README.md").read_text(encoding="utf-8")
    for figure in (f"{model.parameters:,}", f"{model.perplexity:.4f}", f"{model.tokens:,}", "Hawthorne", "MAESTRO"):
        assert figure in words
    licence = (shipped.folder / "LICENSE").read_text(encoding="utf-8")
    assert all(text in licence for text in ("creativecommons.org/licenses/by-nc-sa/4.0", "Hawthorne", "MAESTRO", "MIT"))


def test_shipped_model_generates(shipped, run):
    """Its recommended options exist, its weights are finite, and the command line generates from it."""
    name = shipped.folder.name
    assert recommended_options(name) == generation_options(shipped.folder)
    model, _ = dsmr_mlx.load(name, mx.float32)
    assert model.n_parameters == shipped.card["parameters"]
    assert all(bool(mx.isfinite(array).all()) for array in parameters(model).values())
    made = run("generate", name, "--seconds", 1, "--out", "a.mid")
    assert made.code == 0, made.err
    assert "CC-BY-NC-SA-4.0" in made.err
    assert len(read_notes("a.mid"))
    assert json.loads(read_text("a.mid"))["model"] == name
    assert run("models").out.splitlines()[1].startswith(bundled.DEFAULT)
