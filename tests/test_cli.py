"""Every command, in this process, on little data; and what it says when it is given something wrong."""

import json
import re
import shutil
from argparse import Namespace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from midi_files import tune, write_folder
from rich.console import Console

from dsmr_mlx import checkpoint, cli, console, generation
from dsmr_mlx.checkpoint import PARTS, sha256
from dsmr_mlx.id_tokenizer import IdTokenizer
from dsmr_mlx.midi import read_notes, read_text
from dsmr_mlx.performance import encode_notes, performance_grammar
from dsmr_mlx.player import prompt_ids
from dsmr_mlx.sampling import Sampling
from dsmr_mlx.tokenizer import KINDS, PerformanceTokenizer

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


@pytest.fixture
def generate(run, trained):
    return lambda *arguments: run("generate", trained.run, *arguments)


def everything_under(*folders: Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


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
    assert "resumed from runs/a/checkpoints/step-00000002" in resumed.err
    steps = [json.loads(line)["step"] for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    assert sorted(path.name for path in Path("runs/a/samples").iterdir()) == ["step-00000002.mid", "step-00000004.mid"]

    told = run("evaluate", "runs/a", "--data", "corpus", "--batch-size", 2)
    assert told.code == 0
    assert re.match(r"perplexity [\d.]+ on [\d,]+ tokens of 2 validation pieces\nnats: ", told.out)
    assert re.search(r"^weights: [\d,]+ parameters, float32, [\d.]+ KiB$", told.out, re.MULTILINE)
    assert "0 – 512" in told.out

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


def test_no_midi_from_a_vocabulary_of_ids_alone(run, trained, damaged):
    (damaged / "checksums.json").unlink()
    IdTokenizer(TOKENIZER.vocab_size, "aria").save(damaged / "tokenizer")
    message = (
        f"{damaged}: the vocabulary of aria is not part of this program: MIDI cannot be turned into its ids, nor its "
        "ids into MIDI; from Python, dsmr_mlx.generate(model, tokenizer, prompt=ids, tokens=N) works on ids"
    )
    for options in ([], ["--prompt", trained.midi / "0.mid"], ["--tokens", 5]):
        assert_refused(run("generate", damaged, *options), message)
    assert not list(Path.cwd().iterdir())
    model, tokenizer = checkpoint.load(damaged)
    assert len(list(generation.generate(model, tokenizer, prompt=[1, 5], tokens=7))) == 7


def test_a_checkpoint_is_as_good_as_its_run(run, trained):
    assert run("generate", trained.run, "--tokens", 20, "--out", "a.mid").code == 0
    assert run("generate", trained.checkpoint, "--tokens", 20, "--out", "b.mid").code == 0
    assert Path("a.mid").read_bytes() == Path("b.mid").read_bytes()


def test_same_options_same_bytes_and_they_are_in_the_file(generate, trained):
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


def test_several_variations(generate):
    shown = generate("--tokens", 40, "-n", 3, "--out", "a.mid")
    assert shown.code == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a-1.mid", "a-2.mid", "a-3.mid"]
    assert [json.loads(read_text(f"a-{i}.mid"))["variation"] for i in (1, 2, 3)] == [1, 2, 3]
    assert len({encode_notes(read_notes(f"a-{i}.mid")).tobytes() for i in (1, 2, 3)}) == 3
    assert re.findall(r"a-\d\.mid", shown.out) == ["a-1.mid", "a-2.mid", "a-3.mid"]
    assert generate("--tokens", 40, "--out", "folder").code == 0
    assert read_notes("folder/1.mid") == read_notes("a-1.mid")


def test_a_prompt_goes_on(generate, trained):
    prompt = trained.midi / "0.mid"
    options = ["--prompt", prompt, "--prompt-seconds", 3, "--seconds", 2]
    shown = generate(*options, "--out", "whole.mid")
    assert shown.code == 0
    assert "prompt of " in shown.out
    written = json.loads(read_text("whole.mid"))
    assert (written["prompt"], written["prompt_sha256"]) == ("0.mid", sha256(prompt))
    whole, original = read_notes("whole.mid"), TOKENIZER.decode(TOKENIZER.encode(prompt))
    heard = original.onset <= 3
    assert np.array_equal(whole.pitch[: heard.sum()], original.pitch[heard])
    np.testing.assert_allclose(whole.onset[: heard.sum()], original.onset[heard], atol=1e-9)
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


def test_options_do_what_they_say(generate):
    assert generate("--tokens", 30, "--temperature", 0, "--seed", 1, "--out", "a.mid").code == 0
    assert generate("--tokens", 30, "--top-k", 1, "--seed", 2, "--out", "b.mid").code == 0
    assert read_notes("a.mid") == read_notes("b.mid")
    assert generate("--tokens", 30, "--seed", 2, "--out", "c.mid").code == 0
    assert read_notes("a.mid") != read_notes("c.mid")
    assert generate("--seconds", 1, "--may-end", "--out", "d.mid").code == 0


def test_without_a_length_it_is_a_minute(generate, monkeypatch):
    asked = []
    original = generation.make_limits

    def shorter(tokenizer, seconds, *arguments):
        asked.append(seconds)
        return original(tokenizer, 1.0, *arguments)

    monkeypatch.setattr(generation, "make_limits", shorter)
    assert generate().code == 0
    assert asked == [60.0]
    assert json.loads(read_text("run-1.mid"))["seconds"] == 60.0


def test_an_existing_file_is_overwritten_by_force_alone(generate):
    Path("a.mid").write_bytes(b"mine")
    refused = generate("--tokens", 5, "--out", "a.mid")
    assert refused.code == 2
    assert refused.err == "dsmr-mlx: error: --out a.mid: already exists, --force overwrites it\n"
    assert Path("a.mid").read_bytes() == b"mine"
    assert generate("--tokens", 5, "--out", "a.mid", "--force").code == 0
    assert read_text("a.mid")


def test_names_are_shown_as_they_are(run, trained):
    strange = write_folder(
        Path("midi"), {"[red] :smile: " + 40 * "long " + ".mid": tune(1), "[b].mid": b"no", "2.mid": tune(2)}
    )
    shown = run("prepare", strange, "--out", "[bold]corpus")
    assert shown.out.startswith("[bold]corpus: 1 train, 1 validation\n")
    assert "skipped [b].mid: not a readable MIDI file" in shown.err
    for split in ("train", "validation"):
        shown = run("evaluate", trained.run, "--data", "[bold]corpus", "--split", split)
        if "2.mid" not in shown.out:
            assert "[red] :smile: " + 40 * "long " + ".mid" in shown.out


def test_a_terminal_shows_bars(run, trained, monkeypatch):
    shown = StringIO()
    for part in (console.base, console.training):
        monkeypatch.setattr(part, "err", Console(file=shown, force_terminal=True, width=120, highlight=False))
    assert run("prepare", trained.midi, "--out", "c").out.startswith("c: ")
    assert run("train", "--data", "c", "--out", "r", *TINY_ARGS, "--max-steps", 2).out == ""
    made = run("generate", "r", "--tokens", 5)
    assert (made.code, made.err) == (0, "")
    for text in ("reading MIDI", "6 of 6 files", "step 2", "validation after step 2", "done: r", "5 of 5 events"):
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


def test_version_and_help(run):
    assert run("--version").out == "dsmr-mlx 0.1.0\n"
    for command in ("prepare", "train", "evaluate", "generate", "horizons"):
        assert command in run("--help").out
        shown = run(command, "--help")
        assert shown.code == 0
        assert re.search(rf"^example:\n  dsmr-mlx {command}\b", shown.out, re.MULTILINE)


WRONG = {
    # prepare
    "no folder": ("prepare nowhere --out c", "nowhere: does not exist, expected a folder of MIDI files"),
    "empty folder": ("prepare empty --out c", "empty: no MIDI file (.mid, .midi, .kar, .rmi), expected at least one"),
    "all bad": ("prepare bad --out c", "bad: none of 2 files can be used (1.mid: not a readable MIDI file"),
    "fraction": (
        "prepare {midi} --out c --validation-fraction 1",
        "--validation-fraction 1: expected at least 0 and b",
    ),
    "corpus taken": ("prepare {midi} --out bad", "bad: exists and is not a corpus, expected a new folder or a corpus"),
    # train
    "no corpus": ("train --data nowhere --out r", "nowhere: no such folder, expected a corpus, which dsmr-mlx prepare"),
    "key": (
        "train --data {corpus} --out r --set depth=3",
        "--set depth=3: unknown key depth; known are d_model, n_layers",
    ),
    "value": ("train --data {corpus} --out r --set d_model=x", "config: d_model = 'x': expected int"),
    "no value": ("train --data {corpus} --out r --set d_model", "--set d_model: expected key=value"),
    "near key": (
        "train --data {corpus} --out r --set learning-rate=1",
        "unknown key learning-rate, did you mean learning_rate?",
    ),
    "odd toml": ("train --data {corpus} --out r --config odd.mid", "--config odd.mid: not valid TOML ("),
    "no steps": ("train --data {corpus} --out r --max-steps 0", "error: --max-steps 0: expected more than 0"),
    "no minutes": ("train --data {corpus} --out r --max-minutes -1", "error: --max-minutes -1: expected more than 0"),
    "no report": ("report nowhere", "error: nowhere: no such folder, expected a training run"),
    "toml key": (
        "train --data {corpus} --out r --config odd.toml",
        "--config odd.toml: unknown key depth; known are d_model, n_layers",
    ),
    "no toml": ("train --data {corpus} --out r --config no.toml", "--config no.toml: cannot be read (No such file"),
    "preset": ("train --data {corpus} --out r --preset big", "--preset big: expected one of tiny, small, base"),
    "schedule": (
        "train --data {corpus} --out r --set horizons=two-scale:long=9x8,short=2",
        "number of long layers is 9",
    ),
    "run taken": (
        "train --data {corpus} --out {run}",
        "{run}: already exists; --resume goes on with it, --force begins",
    ),
    "run is a file": ("train --data {corpus} --out odd.mid", "odd.mid: already exists"),
    "no run": ("train --data {corpus} --out bad", "bad: is not a training run, and it is not empty; expected another"),
    "force": ("train --data {corpus} --out bad --force", "bad: is not a training run, and it is not empty"),
    "both": ("train --data {corpus} --out {run} --resume --force", "--resume and --force: expected one of them"),
    "fixed": (
        "train --data {corpus} --out {run} --resume --set d_model=8",
        "d_model = 8: the run in {run} has d_model =",
    ),
    "init nothing": (
        "train --data {corpus} --out r --init nowhere",
        "--init nowhere: no such folder, expected a chec",
    ),
    "init other": ("train --data {corpus} --out r --init bad", "--init bad: not a checkpoint, config.json, model.safe"),
    "init fixed": (
        "train --data {corpus} --out r --init {run} --set d_model=8",
        "d_model = 8: --init {run} has d_model = 16, which its weights fix; only horizons, segment_length and dropout",
    ),
    "init deleted": (
        "train --data {corpus} --out {run} --init {run} --force",
        "--init {run}: is in {run}, which --force would delete; expected another --out",
    ),
    # evaluate
    "evaluate what": ("evaluate nowhere --data {corpus}", "nowhere: no such folder, expected a checkpoint or a run"),
    "split": ("evaluate {run} --data {corpus} --split all", "split 'all', expected one of train, validation"),
    "batch size": ("evaluate {run} --data {corpus} --batch-size 0", "--batch-size 0: expected at least 1"),
    "max tokens": ("evaluate {run} --data {corpus} --max-tokens -4", "--max-tokens -4: expected at least 1"),
    "not a corpus": (
        "evaluate {run} --data {midi}",
        "{midi}: a folder of something else, expected a corpus: dsmr-mlx prepare {midi}",
    ),
    # generate
    "no checkpoint": ("generate nowhere", "nowhere: no such folder, expected a checkpoint or a run"),
    "file": ("generate odd.toml", "odd.toml: is a file, expected a checkpoint or a run"),
    "music": ("generate odd.mid", "odd.mid: is a file, expected a checkpoint or a run"),
    "near model": ("generate asap_small", "or a bundled model: asap-small, did you mean asap-small?"),
    "corpus": (
        "generate {corpus}",
        "{corpus}: a corpus, expected a checkpoint or a run: dsmr-mlx train --data {corpus}",
    ),
    "no corpus but a run": (
        "evaluate {run} --data {run}",
        "{run}: a run, expected a corpus, which dsmr-mlx prepare makes",
    ),
    "other": (
        "generate bad",
        "bad: not a checkpoint, config.json, model.safetensors, tokenizer/tokenizer.json missing",
    ),
    "no prompt": ("generate {run} --prompt no.mid", "no.mid: cannot be read (No such file or directory)"),
    "no prompt for the bundled": ("generate --prompt no.mid", "error: no.mid: cannot be read (No such file"),
    "bad prompt": ("generate {run} --prompt bad/1.mid", "bad/1.mid: not a readable MIDI file"),
    "folder": ("generate {run} --prompt bad", "bad: cannot be read (Is a directory)"),
    "short": ("generate {run} --prompt {midi}/0.mid --prompt-seconds 900", "--prompt-seconds 900: {midi}/0.mid lasts "),
    "alone": ("generate {run} --prompt-seconds 3", "--prompt-seconds 3: expected --prompt FILE.mid with it"),
    "top-p": ("generate {run} --top-p 1.5", "top_p = 1.5: expected more than 0 and at most 1"),
    "top-k": ("generate {run} --top-k -1", "top_k = -1: expected 0 or more"),
    "min-p": ("generate {run} --min-p 1", "min_p = 1.0: expected at least 0 and below 1"),
    "temperature": ("generate {run} --temperature -1", "temperature = -1.0: expected 0 or more"),
    "none": ("generate {run} -n 0", "-n 0: expected at least 1"),
    "seconds": ("generate {run} --seconds -1", "error: --seconds -1: expected more than 0"),
    "tokens": ("generate {run} --tokens 0", "error: --tokens 0: expected more than 0"),
    "audio": ("generate {run} --out a.mp3", "--out a.mp3: expected FILE.mid or a folder; dsmr-mlx show makes audio of"),
    "unquoted": ("generate --key C major", '--key C major: expected it in quotes, --key "C major"'),
    "two lengths": ("generate {run} --tokens 5 --seconds 5", "argument --seconds: not allowed with argument --tokens"),
    "seed": ("generate {run} --seed -1", "seed = -1: expected 0 or more"),
    "exists": ("generate {run} --out odd.mid", "--out odd.mid: already exists, --force overwrites it"),
    "one exists": ("generate {run} -n 2 --out two.mid", "--out two-2.mid: already exists, --force overwrites it"),
    "no out": ("generate {run} --out no/a.mid", "--out no/a.mid: no such folder no"),
    "number": ("generate {run} --seconds long", "argument --seconds: found 'long', expected a number"),
    "minutes": ("generate {run} --seconds 1m", "argument --seconds: found '1m', expected a number"),
    "millions": (
        "train --data c --out r --max-tokens 1M",
        "--max-tokens: found '1M', expected a whole number",
    ),
    "half a step": ("train --data c --out r --max-steps 0.5", "--max-steps: found '0.5', expected a whole number"),
    # horizons and the rest
    "family": ("horizons round --layers 4", "horizons 'round': "),
    "layers": ("horizons two-scale:long=5x8,short=2 --layers 4", "number of long layers is 5, expected 1 to 4"),
    "heads": ("horizons none --layers 4 --kv-heads 0", "--kv-heads 0: expected at least 1"),
    "command": ("compose", "argument COMMAND: invalid choice: 'compose'"),
    "near command": ("genrate", "'report'), did you mean generate? (see dsmr-mlx --help)"),
    "option": ("generate {run} --loud", "unrecognized arguments: --loud (see dsmr-mlx generate --help)"),
    "near option": ("generate --sceonds=5", "--sceonds=5, did you mean --seconds? (see dsmr-mlx generate --help)"),
    "option of the program": ("--verison", "unrecognized arguments: --verison, did you mean --version?"),
    "one more": ("generate {run} again", "unrecognized arguments: again (see dsmr-mlx generate --help)"),
}


def assert_refused(result: Namespace, message: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"dsmr-mlx( \w+)?: error: [^\n]+\n", result.err), result.err
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(run, trained, tmp_path, case):
    command, message = WRONG[case]
    write_folder(Path.cwd(), {"bad/1.mid": b"no", "bad/2.mid": b"", "odd.toml": b"depth = 3", "odd.mid": b"mine"})
    write_folder(Path.cwd(), {"two-2.mid": b"mine"})
    Path("empty").mkdir()
    places = {"run": trained.run, "midi": trained.midi, "corpus": trained.corpus}
    folders = (tmp_path, trained.run, trained.midi, trained.corpus)
    before = everything_under(*folders)
    assert_refused(run(*(word.format(**places) for word in command.split())), message.format(**places))
    assert everything_under(*folders) == before


@pytest.fixture
def damaged(trained, tmp_path) -> Path:
    """A copy of a checkpoint."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "copy"))


@pytest.mark.parametrize("part", [*PARTS, "training.json"])
@pytest.mark.parametrize("command", ["generate {} --seconds 1", "evaluate {} --data {corpus}"])
def test_a_checkpoint_without_one_of_its_parts(run, trained, damaged, part, command):
    (damaged / part).unlink()
    result = run(*command.format(damaged, corpus=trained.corpus).split())
    assert_refused(result, str(damaged))
    assert part in result.err
    assert "missing" in result.err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("part", [*PARTS, "training.safetensors"])
def test_a_damaged_checkpoint(run, damaged, part):
    content = bytearray((damaged / part).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / part).write_bytes(content)
    expected = json.loads((damaged / "checksums.json").read_text())[part]["sha256"]
    message = f"{damaged / part}: damaged, sha256 is {sha256(damaged / part)}, expected {expected}"
    assert_refused(run("generate", damaged, "--seconds", 1), message)
    assert not list(Path.cwd().iterdir())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_another_vocabulary(run, damaged):
    (damaged / "checksums.json").unlink()  # a checkpoint put together by hand has none
    edit(damaged / "tokenizer" / "tokenizer.json", fingerprint="0" * 64)
    assert_refused(run("generate", damaged), f"{damaged}/tokenizer/tokenizer.json: fingerprint 0000")


def test_a_corpus_of_another_vocabulary(run, trained, tmp_path, monkeypatch):
    corpus = Path(shutil.copytree(trained.corpus, tmp_path / "corpus"))
    edit(corpus / "tokenizer" / "tokenizer.json", fingerprint="0" * 64)
    assert_refused(
        run("evaluate", trained.run, "--data", corpus), f"{corpus}/tokenizer/tokenizer.json: fingerprint 0000"
    )

    class Revised(PerformanceTokenizer):
        kind = "revised"

    monkeypatch.setattr(cli, "Revised", Revised, raising=False)
    monkeypatch.setitem(KINDS, "revised", "dsmr_mlx.cli:Revised")
    edit(corpus / "tokenizer" / "tokenizer.json", kind="revised", fingerprint=Revised().fingerprint)
    edit(corpus / "corpus.json", tokenizer=Revised().fingerprint)
    message = (
        f"--data {corpus}: vocabulary {Revised().fingerprint[:12]}, "
        f"the checkpoint {trained.run} has {TOKENIZER.fingerprint[:12]}: not the same tokenizer"
    )
    assert_refused(run("evaluate", trained.run, "--data", corpus), message)


def test_an_error_while_writing_is_named_and_the_other_files_are_whole(generate, monkeypatch):
    def full(path, data):
        if "2" in path.name:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("dsmr_mlx.recording.write_atomically", full)
    for out, names in (("a.mid", ["a-1.mid", "a-3.mid"]), ("folder", ["1.mid", "3.mid"])):
        result = generate("--tokens", 10, "-n", 3, "--out", out)
        written = sorted(path for path in Path.cwd().rglob("*.mid") if path.name in names)
        failed = out.replace(".mid", "-2.mid") if out == "a.mid" else "folder/2.mid"
        assert_refused(result, f"--out {failed}: cannot be written (No space left on device)")
        assert [path.name for path in written] == names
        assert all(read_text(path) for path in written)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/disk/file"), 1, "/disk/file: No space left on device"),
        (OSError("odd"), 1, "system: odd"),
        (ModuleNotFoundError("No module named 'symusic'", name="symusic"), 1, "symusic: cannot be imported (No module"),
    ],
)
def test_what_the_system_refuses_is_a_line_too(run, trained, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dsmr_mlx.prepare.prepare", fail)
    result = run("prepare", trained.midi, "--out", "c")
    assert result.code == code
    assert result.err.startswith(f"dsmr-mlx: error: {message}")
    assert result.err.count("\n") == 1
