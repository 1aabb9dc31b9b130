"""Comparisons of checkpoints: each figure equals that of `evaluate`, and all are on the same music."""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.checkpoints import save
from support.memory import active_memory
from support.music import random_notes
from support.tiny import TOKENIZER, tiny_config

from dsmr_mlx import UserError
from dsmr_mlx.cli import compare as compare_command
from dsmr_mlx.cli.common import finite
from dsmr_mlx.cli.compare import show_comparison
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.evaluation.comparison import METRICS, Comparison, compare
from dsmr_mlx.evaluation.comparison_plot import comparison_picture
from dsmr_mlx.evaluation.corpora import HASH_DIGITS, choose_corpora, leak_remark, shared_pieces
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.quantization import quantize_model
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.subwords import learn_subwords

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

MUSIC = {f"{i}.mid": random_notes(i, 12 + 5 * i) for i in range(7)}
KINDS = ("performance", "remi", "subwords")


def write(folder: Path, tokenizer: Tokenizer, longer: float = 0.0, **splits: str) -> Corpus:
    """A corpus of `MUSIC`, the last four pieces for validation; splits: p0="train" and so on, "" omits a piece."""
    with CorpusWriter(folder, tokenizer) as writer:
        for i, (source, notes) in enumerate(MUSIC.items()):
            split = splits.get(f"p{i}", "train" if i < 3 else "validation")
            about = {"source": source, "split": split, "duration": notes.duration + longer, "notes": len(notes)}
            if split:
                writer.add(tokenizer.encode_notes(notes), **about)
        writer.commit({})
    return Corpus.load(folder)


@dataclass(frozen=True)
class World:
    """A corpus and a checkpoint of each of `KINDS`, all corpora with the same music."""

    folder: Path
    corpora: dict[str, Path]
    models: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """See `World`."""
    folder = tmp_path_factory.mktemp("compared")
    base = [TOKENIZER.encode_notes(notes) for notes in MUSIC.values()]
    tokenizers = (TOKENIZER, make_tokenizer("miditok:REMI"), learn_subwords(TOKENIZER, base, "bpe", 420))
    for i, (kind, tokenizer) in enumerate(zip(KINDS, tokenizers, strict=True)):
        write(folder / f"{kind}-corpus", tokenizer)
        save(folder / kind, tokenizer, i, horizons=f"two-scale:long=1x{8 + 4 * i},short=4")
    return World(folder, *({kind: folder / f"{kind}{end}" for kind in KINDS} for end in ("-corpus", "")))


@pytest.fixture(scope="module")
def compared(world) -> tuple[Comparison, list[tuple[int, int]]]:
    """The checkpoints of all `KINDS`, each on its own corpus, and the progress that was reported."""
    seen = []
    corpora = [world.corpora[kind] for kind in reversed(KINDS)]
    c = compare(list(world.models.values()), corpora, progress=lambda *counts: seen.append(counts))
    return c, seen


def data(world: World, *kinds: str) -> list[object]:
    """Return the options `--data` for the corpora of some kinds, or of all."""
    return [word for kind in kinds or KINDS for word in ("--data", world.corpora[kind])]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["../experiments/2026-11", ".runs/2026-11-15", "/runs/of/a/study"])
def test_long_names_are_relative_to_their_folder(folder):
    rows = [SimpleNamespace(name=f"{folder}/two-scale-seed-{seed}") for seed in (1, 2)]
    compared = Comparison(rows, "validation", 1, 1, 1.0, 1, [])
    assert (compared.folder, compared.labels) == (folder, ["two-scale-seed-1", "two-scale-seed-2"])


def test_all_figures_equal_those_of_evaluate(run, world):
    """On all pieces and on a sample; float32 is computed in on a CPU, whatever is stored."""
    model = save(world.folder / "other", TOKENIZER, 9, horizons="none")
    model.set_dtype(mx.bfloat16)
    checkpoint.save_model(world.folder / "other", model.config, model.parameters(), TOKENIZER)
    for options in ((), ("--max-tokens", 150, "--batch-size", 2)):
        names = [world.models["performance"], world.folder / "other"]
        compared = json.loads(run("compare", *names, *data(world, "performance"), "--json", *options).out)
        for name, row in zip(names, compared["checkpoints"], strict=True):
            shown = run("evaluate", name, *data(world, "performance"), "--json", *options)
            alone = json.loads(shown.out)
            assert alone.pop("split") == compared["split"] == "validation"
            assert alone.pop("computed_in") == "float32"
            assert {key: row[key] for key in alone} == alone
        assert compared["pieces"] == alone["pieces"] == (1 if options else 4)


@pytest.mark.slow
def test_three_vocabularies_on_the_same_music(world, compared):
    """All losses have one denominator; each equals that of `evaluate` on the checkpoint's own corpus."""
    c, _ = compared
    assert c.comparable == ("nats_per_second", "nats_per_note")
    pieces = Corpus.load(world.corpora["subwords"]).pieces("validation")
    notes, seconds = sum(piece.notes for piece in pieces), sum(piece.duration for piece in pieces)
    for row, kind in zip(c.rows, KINDS, strict=True):
        e, corpus = row.measured.evaluation, Corpus.load(world.corpora[kind])
        model, tokenizer = checkpoint.load(world.models[kind])
        assert e == evaluate(model, corpus)
        assert (row.data, row.tokenizer.fingerprint) == (str(corpus.path), tokenizer.fingerprint)
        assert (c.notes, c.seconds) == (e.notes, e.seconds) == (notes, seconds)
        assert e.nats_per_second * seconds == pytest.approx(e.nats_per_token * e.tokens)
        assert e.nats_per_note * notes == pytest.approx(e.nats_per_token * e.tokens)
    assert len({row.measured.evaluation.tokens for row in c.rows}) == 3
    performance, _, subwords = c.rows
    assert performance.measured.evaluation.events == subwords.measured.evaluation.events
    assert [c.change(row).perplexity_percent for row in c.rows] == [0.0, None, None]
    assert replace(c, rows=[performance, subwords]).comparable == (*c.comparable, "nats_per_event")
    assert c.best("perplexity") == c.best("nats_per_event") == []
    losses = [row.measured.evaluation.nats_per_second for row in c.rows]
    assert c.best("nats_per_second") == c.best("nats_per_note") == [int(np.argmin(losses))]


@pytest.mark.slow
def test_durations_and_notes_of_the_first_corpus_apply_to_all(world, compared, tmp_path):
    """A second corpus with longer durations changes no denominator, but gives a remark."""
    write(tmp_path / "longer", make_tokenizer("miditok:REMI"), longer=1.0)
    names = [world.models["performance"], world.models["remi"]]
    c = compare(names, [world.corpora["performance"], tmp_path / "longer"])
    plain, _ = compared
    assert [row.measured.evaluation for row in c.rows] == [row.measured.evaluation for row in plain.rows[:2]]
    assert plain.remarks == []
    (remark,) = c.remarks
    assert "4 of 4 pieces differ in notes or length" in remark
    turned = compare(names[::-1], [world.corpora["performance"], tmp_path / "longer"])
    assert turned.seconds == pytest.approx(plain.seconds + 4)


@pytest.mark.slow
def test_a_sample_is_the_same_pieces_in_every_vocabulary(world):
    corpora = [Corpus.load(path) for path in world.corpora.values()]
    for limit in (1, 150, 225, 10_000):
        found = shared_pieces(corpora, "validation", limit)
        assert len({tuple(piece.source for piece in pieces) for pieces in found}) == 1
        (alone,) = shared_pieces(corpora[:1], "validation", limit)
        assert len(found[0]) <= len(alone)
    compared = compare(list(world.models.values()), list(world.corpora.values()), max_tokens=225)
    sources = [{piece.source for piece in row.measured.evaluation.by_piece} for row in compared.rows]
    assert sources[0] == sources[1] == sources[2]
    assert compared.pieces == len(sources[0]) < 4


@pytest.mark.slow
def test_state_size_parameters_speed_and_memory(world, tmp_path):
    """Against the formula of the state and the model itself; no memory stays allocated.

    The weights of the first checkpoint are several times larger than all temporaries of a segment, whose number at a
    time depends on how far Python is ahead of MLX.
    """
    save(tmp_path / "large", TOKENIZER, d_model=256, head_dim=64, d_ff=256, horizons="two-scale:long=1x8,short=4")
    before = active_memory()
    names = [tmp_path / "large", world.models["remi"], tmp_path / "large"]
    c = compare(names, list(world.corpora.values()), batch_size=2)
    assert active_memory() - before < 10_000
    for row, horizons in zip(c.rows, ([8, 4], [12, 4], [8, 4]), strict=True):
        model, _ = checkpoint.load(row.name)
        heads, size = model.config.n_kv_heads, model.config.head_dim
        assert (list(row.schedule.horizons), row.schedule.budget) == (horizons, sum(horizons))
        assert row.state_bytes == 2 * sum(horizons) * heads * size * 4
        assert row.measured.weights.parameters == model.n_parameters
        assert row.peak_memory > 4 * model.n_parameters + model.new_state(2).nbytes
        for rate, count in (("tokens", "tokens"), ("events", "events"), ("music", "seconds")):
            expected = getattr(row.measured.evaluation, count) / row.wall_seconds
            assert getattr(row, f"{rate}_per_second") == pytest.approx(expected)
    large = 4 * c.rows[0].measured.weights.parameters
    assert all(large < row.peak_memory < 1.5 * large for row in (c.rows[0], c.rows[2]))


@pytest.mark.slow
def test_changes_are_relative_to_the_first_checkpoint(run, world, tmp_path):
    """For the same weights in half precision, and for the checkpoint itself."""
    model, _ = checkpoint.load(world.models["performance"])
    model.set_dtype(mx.bfloat16)
    checkpoint.save_model(tmp_path / "halved", model.config, model.parameters(), TOKENIZER)
    names = [world.models["performance"], tmp_path / "halved", world.models["performance"]]
    first, halved, same = json.loads(run("compare", *names, *data(world), "--json").out)["checkpoints"]
    for row, dtype in ((first, "float32"), (halved, "bfloat16")):
        weights = {"parameters": model.n_parameters, "dtype": dtype, "bits": None, "group_size": None}
        size = checkpoint.weight_bytes(row["checkpoint"])
        assert row["weights"] == weights | {"bytes": size, "adapters": None}
    assert halved["state"]["bytes"] == first["state"]["bytes"], "both are computed in float32"
    ratio = halved["weights"]["bytes"] / first["weights"]["bytes"]
    assert halved["change"]["bytes_percent"] == pytest.approx(100 * (ratio - 1))
    assert ratio == pytest.approx(0.5, abs=0.1)
    for name in ("perplexity", "nats_per_second"):
        assert halved["change"][f"{name}_percent"] == pytest.approx(100 * (halved[name] / first[name] - 1))
    assert 0 < abs(halved["change"]["perplexity_percent"]) < 1
    zero = {"bytes_percent": 0.0, "nats_per_second_percent": 0.0, "perplexity_percent": 0.0}
    assert first["change"] == same["change"] == zero


@pytest.mark.slow
def test_the_tables_show_all_figures(run, world, compared, monkeypatch):
    """One row for each checkpoint in each of three tables; on a terminal the best values are bold."""
    shown = run("compare", *world.models.values(), *data(world))
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[1] == f"checkpoints in {world.folder}"
    c, _ = compared
    for kind, row in zip(KINDS, c.rows, strict=True):
        what, quality, cost = ([w for w in line.split() if w] for line in lines if line.startswith(f"{kind} "))
        e = row.measured.evaluation
        assert " ".join(what).startswith(f"{kind} {row.tokenizer.label} {row.tokenizer.vocab_size} ")
        assert what[-3] == f"{row.schedule.budget}"
        figures = [f"{e.nats_per_second:,.2f}", *(f"{getattr(e, name):,.4f}" for name in METRICS[1:]), f"{e.tokens:,}"]
        assert set(figures) <= set(quality)
        assert (cost[1], "–" in quality) == ("float32", kind != "performance")
    assert lines[-1] == "the tokenizers differ: compare nats/s and nats/note"
    terminal = StringIO()
    monkeypatch.setattr(compare_command, "out", Console(file=terminal, force_terminal=True, width=300))
    show_comparison(c)
    (best,) = c.best("nats_per_second")
    value = f"{c.rows[best].measured.evaluation.nats_per_second:,.2f}"
    assert f"\x1b[1m{value}\x1b[0m" in terminal.getvalue().replace(" ", "")


@pytest.mark.slow
def test_without_data_the_training_corpus_is_used(run, trained, tmp_path):
    """A checkpoint that records none uses that of another checkpoint with the same vocabulary."""
    shutil.copytree(trained.checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("training*", "checksums.json"))
    shown = run("compare", tmp_path / "copy", trained.run, "--json")
    assert shown.code == 0, shown.err
    first, second = json.loads(shown.out)["checkpoints"]
    assert first["data"] == second["data"] == str(trained.corpus.resolve())
    assert first["perplexity"] == second["perplexity"]
    given = json.loads(run("compare", tmp_path / "copy", trained.run, "--data", trained.corpus, "--json").out)
    assert [row["perplexity"] for row in given["checkpoints"]] == [first["perplexity"]] * 2


def changed_run(trained, folder: Path, corpus: Path) -> Path:
    """Copy the trained checkpoint, with another path of its training corpus."""
    shutil.copytree(trained.checkpoint, folder, ignore=shutil.ignore_patterns("checksums.json"))
    path = folder / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": str(corpus)}))
    return folder


@pytest.mark.slow
def test_a_missing_or_changed_training_corpus_is_refused(run, trained, tmp_path):
    folder = changed_run(trained, tmp_path / "changed", tmp_path / "c")
    shown = run("compare", folder, trained.run)
    assert shown.code == 2
    expected = f"{folder.resolve()}: training corpus not found, expected another as --data ({tmp_path / 'c'}: no such"
    assert expected in shown.err
    write(tmp_path / "c", TOKENIZER)
    shown = run("compare", folder, trained.run)
    assert shown.code == 2
    assert f"trained on {tmp_path / 'c'} with fingerprint {Corpus.load(trained.corpus).fingerprint[:12]}" in shown.err
    assert f"; --data {tmp_path / 'c'} uses it anyway" in shown.err
    assert run("compare", folder, trained.run, "--data", tmp_path / "c").code == 0


def record(checkpoint: Path, data: Path, corpus: Corpus) -> None:
    """Record that a checkpoint was trained on a corpus, at the path `data`."""
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "training.json").write_text(json.dumps({"data": str(data), "corpus": corpus.fingerprint}))


def test_pieces_of_the_training_corpus_are_found_in_another_corpus(world, tmp_path):
    """Unless the run was trained on this corpus, or its own has changed or cannot be found."""
    own, given = write(tmp_path / "own", TOKENIZER, p4="train", p6=""), Corpus.load(world.corpora["performance"])
    pieces = given.pieces("validation")
    record(tmp_path / "run", own.path, own)
    expected = f"a was trained on 1 of these 4 pieces, in {own.path}: its losses are too low"
    assert leak_remark("a", tmp_path / "run", given, pieces) == [expected]
    assert leak_remark("a", tmp_path / "run", given, pieces[2:]) == []
    for path, corpus in ((given.path, given), (given.path, own), (tmp_path / "gone", own)):
        record(tmp_path / "run", path, corpus)
        assert leak_remark("a", tmp_path / "run", given, pieces) == []


def test_the_card_of_a_bundled_model_names_the_pieces_it_was_trained_on(world, tmp_path):
    """Also when they are evaluated as the validation part of a corpus that was prepared from a part of the data."""
    given = Corpus.load(world.corpora["performance"])
    pieces = given.pieces("validation")
    own = write(tmp_path / "own", TOKENIZER, p4="train", p6="")
    hashes = [piece.sha256[:HASH_DIGITS] for piece in own.pieces("train")]
    (tmp_path / "card.json").write_text(json.dumps({"data": {"splits": {"train": {"sha256": hashes}}}}))
    expected = "a was trained on 1 of these 4 pieces: its losses are too low"
    assert leak_remark("a", tmp_path, given, pieces) == [expected]
    assert leak_remark("a", tmp_path, given, pieces[2:]) == []


@pytest.mark.slow
def test_leaks_are_reported(run, world, tmp_path):
    own, given = write(tmp_path / "own", TOKENIZER, p4="train"), world.corpora["performance"]
    model = shutil.copytree(world.models["performance"], tmp_path / "model")
    record(model, own.path, own)
    compared = json.loads(run("compare", model, world.models["performance"], "--data", given, "--json").out)
    assert compared["remarks"] == [f"{model} was trained on 1 of these 4 pieces, in {own.path}: its losses are too low"]
    assert run("evaluate", model, "--data", given, "--json").err == f"note: {compared['remarks'][0]}\n"


def test_a_checkpoint_without_a_corpus_is_refused(world):
    tokenizers = {kind: checkpoint.load(path)[1] for kind, path in world.models.items()}
    given = [(kind, world.models[kind], tokenizer) for kind, tokenizer in tokenizers.items()]
    marks = {kind: tokenizer.fingerprint[:12] for kind, tokenizer in tokenizers.items()}
    corpora = world.corpora
    with pytest.raises(UserError) as refused:
        choose_corpora(given, [corpora["remi"], corpora["performance"]])
    assert str(refused.value) == (
        f"`data` {corpora['remi']}: vocabulary {marks['remi']}, `data` {corpora['performance']}: vocabulary "
        f"{marks['performance']}, the checkpoint subwords has {marks['subwords']}: not the same tokenizer"
    )
    with pytest.raises(UserError, match="performance: no record of the corpus that it was trained on, expected `data`"):
        choose_corpora(given)
    twin = shutil.copytree(corpora["remi"], world.folder / "twin", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"have the same vocabulary, {marks['remi']}: expected one corpus for each"):
        choose_corpora(given, [*corpora.values(), twin])
    ids = IdTokenizer(TOKENIZER.vocab_size, "aria")
    hint = r"its ids mean the same, run dsmr-mlx convert a NEW --tokenizer .*performance-corp"
    with pytest.raises(UserError, match=hint):
        choose_corpora([("a", world.models["performance"], ids)], list(corpora.values()))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"p4": ""}, "{a} has 4.mid in validation, {b} does not: expected corpora prepared from the same files"),
        ({"p4": "", "p5": ""}, "{a} has 4.mid in validation, {b} does not, the same for 1 more: expected"),
        ({"p4": "train"}, "{a} has 4.mid in validation, {b} has it in train: expected"),
        ({"p1": "validation"}, "{b} has 1.mid in validation, {a} has it in train: expected"),
    ],
)
def test_corpora_with_different_pieces_are_refused(world, tmp_path, splits, message):
    write(tmp_path / "b", make_tokenizer("miditok:REMI"), **splits)
    with pytest.raises(UserError) as refused:
        compare([world.models["performance"], world.models["remi"]], [world.corpora["performance"], tmp_path / "b"])
    assert message.format(a=world.corpora["performance"], b=tmp_path / "b") in str(refused.value)


def test_a_damaged_checkpoint_is_refused_before_the_first_evaluation(world, tmp_path):
    done = []
    shutil.copytree(world.models["remi"], tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: "):
        compare([world.models["performance"], tmp_path / "bad"], list(world.corpora.values()), progress=done.append)
    assert not done


@pytest.mark.slow
def test_progress_counts_the_tokens_of_all_checkpoints(compared):
    c, seen = compared
    total = sum(row.measured.evaluation.tokens for row in c.rows)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{p}", "one checkpoint, expected two or more; dsmr-mlx evaluate measures one"),
        ("{p} nowhere", "nowhere: no such folder, expected a checkpoint or a run"),
        ("{p} {p} --data nowhere", "nowhere: no such folder, expected a corpus, which"),
        ("{p} {p} --split test", "no test pieces, expected --split train or validation"),
        ("{p} {p} --batch-size 0", "--batch-size 0: expected more than 0"),
        ("{p} {p} --max-tokens 0", "--max-tokens 0: expected more than 0"),
        ("{p} {p} --plot a.pdf", "--plot a.pdf: expected a name that ends in .png or .svg"),
        ("{p} {p} --plot old.png", "--plot old.png: already exists, --force overwrites it"),
    ],
)
def test_refusals_are_one_line(run, world, options, message):
    Path("old.png").touch()
    words = options.format(p=world.models["performance"]).split()
    shown = run("compare", *words, *([] if "--data" in words else data(world)))
    assert (shown.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err


@pytest.mark.slow
def test_the_command_draws_a_picture(run, world):
    """It reports the size of the file, except with --json."""
    image = pytest.importorskip("matplotlib.image")
    names = list(world.models.values())[:2]
    shown = run("compare", *names, *data(world), "--max-tokens", 150, "--plot", "a.png")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[-1].startswith("a.png: ")
    assert image.imread("a.png").shape[1] == 1760
    Path("a.png").write_text("")
    shown = run("compare", *names, *data(world), "--max-tokens", 150, "--plot", "a.png", "--json", "--force")
    assert len(json.loads(shown.out)["checkpoints"]) == 2
    assert len(Path("a.png").read_bytes()) > 10_000


@pytest.mark.slow
def test_the_picture_of_unusual_comparisons(world):
    """More checkpoints than colours, long names, losses that are not finite; the same input gives the same bytes."""
    pytest.importorskip("matplotlib")
    model, _ = checkpoint.load(world.models["performance"])
    model.norm.weight = model.norm.weight * float("nan")
    broken = world.folder / ("broken" * 12)
    checkpoint.save_model(broken, model.config, model.parameters(), TOKENIZER)
    c = compare([broken, world.models["performance"]], [world.corpora["performance"]], max_tokens=150)
    assert c.best("nats_per_second") == [1]
    assert finite(c.to_dict())["checkpoints"][0]["perplexity"] is None
    many, alone = replace(c, rows=c.rows * 5), replace(c, rows=c.rows[:1] * 2)
    assert alone.best("perplexity") == []
    assert b"<svg" in comparison_picture(alone, "svg")
    first = comparison_picture(many, "svg")
    assert b"<svg" in first
    assert comparison_picture(many, "svg") == first


def test_without_matplotlib_the_message_says_what_to_install(run, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = run("compare", *world.models.values(), *data(world), "--plot", "a.png")
    assert shown.code == 2
    assert "--plot: matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`" in shown.err


@pytest.mark.slow
def test_quantized_weights_are_shown_beside_their_originals(run, tmp_path):
    model = save(tmp_path / "whole", TOKENIZER, d_model=64, d_ff=64, n_heads=4, head_dim=16)
    write(tmp_path / "corpus", TOKENIZER)
    quantization = {"bits": 8, "group_size": 32}
    quantize_model(model, quantization)
    config = tiny_config(d_model=64, d_ff=64, n_heads=4, head_dim=16).model_config(TOKENIZER)
    small = type(config).from_dict(config.to_dict() | {"quantization": quantization})
    checkpoint.save_model(tmp_path / "small", small, model.parameters(), TOKENIZER)
    shown = run("compare", tmp_path / "whole", tmp_path / "small", "--data", tmp_path / "corpus")
    assert shown.code == 0, shown.err
    assert "8 bits, float32" in shown.out
