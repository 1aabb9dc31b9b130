"""Invalid input of the commands: the error is one line that names it, and nothing is written."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from support.midi_files import write_midi_files

from dsmr_mlx import cli
from dsmr_mlx.common.files import sha256
from dsmr_mlx.generation import generate as generation
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import PARTS
from dsmr_mlx.music.midi import read_text
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import KINDS

TOKENIZER = PerformanceTokenizer()
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
        "{run}: already exists; --resume continues it, --force starts anew",
    ),
    "run is a file": ("train --data {corpus} --out odd.mid", "odd.mid: already exists"),
    "no run": ("train --data {corpus} --out bad", "bad: not empty and not a training run, expected another folder"),
    "force": ("train --data {corpus} --out bad --force", "bad: not empty and not a training run"),
    "both": ("train --data {corpus} --out {run} --resume --force", "--resume and --force: expected only one of them"),
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
    "batch size": ("evaluate {run} --data {corpus} --batch-size 0", "--batch-size 0: expected more than 0"),
    "max tokens": ("evaluate {run} --data {corpus} --max-tokens -4", "--max-tokens -4: expected more than 0"),
    "not a corpus": (
        "evaluate {run} --data {midi}",
        "{midi}: a folder of another kind, expected a corpus: dsmr-mlx prepare {midi}",
    ),
    # generate
    "no checkpoint": ("generate nowhere", "nowhere: no such folder, expected a checkpoint or a run"),
    "file": ("generate odd.toml", "odd.toml: is a file, expected a checkpoint or a run"),
    "music": ("generate odd.mid", "odd.mid: is a file, expected a checkpoint or a run"),
    "near model": ("generate maestro_small", "or a bundled model: maestro-small, did you mean maestro-small?"),
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
    "top-p": ("generate {run} --top-p 1.5", "--top-p 1.5: expected more than 0 and at most 1"),
    "top-k": ("generate {run} --top-k -1", "--top-k -1: expected 0 or more"),
    "min-p": ("generate {run} --min-p 1", "--min-p 1.0: expected at least 0 and below 1"),
    "temperature": ("generate {run} --temperature -1", "--temperature -1: expected 0 or more"),
    "none": ("generate {run} -n 0", "-n 0: expected at least 1"),
    "seconds": ("generate {run} --seconds -1", "error: --seconds -1: expected more than 0"),
    "tokens": ("generate {run} --tokens 0", "error: --tokens 0: expected more than 0"),
    "negative": ("generate {run} --tokens -1e3", "error: --tokens -1000: expected more than 0"),
    "audio": ("generate {run} --out a.mp3", "--out a.mp3: expected FILE.mid or a folder; dsmr-mlx show makes audio"),
    "no run and a key": ("generate runs/firts --key C", "error: runs/firts: no such folder, expected a checkpoint or"),
    "unquoted": ("generate --key C major", '--key C major: expected quotes: --key "C major"'),
    "two lengths": ("generate {run} --tokens 5 --seconds 5", "argument --seconds: not allowed with argument --tokens"),
    "seed": ("generate {run} --seed -1", "--seed -1: expected an integer, 0 or more"),
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
    "heads": ("horizons none --layers 4 --kv-heads 0", "--kv-heads 0: expected more than 0"),
    "command": ("compose", "argument COMMAND: invalid choice: 'compose'"),
    "near command": ("genrate", "'report'), did you mean generate? (see dsmr-mlx --help)"),
    "option": ("generate {run} --loud", "unrecognized arguments: --loud (see dsmr-mlx generate --help)"),
    "near option": ("generate --sceonds=5", "--sceonds=5, did you mean --seconds? (see dsmr-mlx generate --help)"),
    "option of the program": ("--verison", "unrecognized arguments: --verison, did you mean --version?"),
    "one more": ("generate {run} again", "unrecognized arguments: again (see dsmr-mlx generate --help)"),
}


def everything_under(*folders: Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def assert_refused(result: Namespace, message: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"dsmr-mlx( \w+)?: error: [^\n]+\n", result.err), result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not re.search(r"`\w+`", result.err), "arguments of the library are shown as options"


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_a_one_line_error_and_writes_nothing(run, trained, tmp_path, case):
    command, message = WRONG[case]
    write_midi_files(Path.cwd(), {"bad/1.mid": b"no", "bad/2.mid": b"", "odd.toml": b"depth = 3", "odd.mid": b"mine"})
    write_midi_files(Path.cwd(), {"two-2.mid": b"mine"})
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


def test_a_vocabulary_of_ids_cannot_make_midi(run, trained, damaged):
    (damaged / "checksums.json").unlink()
    IdTokenizer(TOKENIZER.vocab_size, "aria").save(damaged / "tokenizer")
    message = (
        f"{damaged}: the vocabulary of aria is not part of this program: it can neither encode MIDI nor decode ids; "
        "if the ids are those of a known tokenizer, dsmr-mlx convert MODEL NEW --tokenizer adds it; "
        "from Python, dsmr_mlx.generate(model, tokenizer, prompt=ids, tokens=N) works on ids"
    )
    for options in ([], ["--prompt", trained.midi / "0.mid"], ["--tokens", 5]):
        assert_refused(run("generate", damaged, *options), message)
    assert not list(Path.cwd().iterdir())
    model, tokenizer = checkpoint.load(damaged)
    assert len(list(generation.generate(model, tokenizer, prompt=[1, 5], tokens=7))) == 7


@pytest.mark.parametrize("part", [*PARTS, "training.json"])
@pytest.mark.parametrize("command", ["generate {} --seconds 1", "evaluate {} --data {corpus}"])
def test_a_checkpoint_with_a_missing_file(run, trained, damaged, part, command):
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


def test_a_checkpoint_with_another_vocabulary(run, damaged):
    (damaged / "checksums.json").unlink()  # a checkpoint put together by hand has none
    edit(damaged / "tokenizer" / "tokenizer.json", fingerprint="0" * 64)
    assert_refused(run("generate", damaged), f"{damaged}/tokenizer/tokenizer.json: fingerprint 0000")


def test_a_corpus_with_another_vocabulary(run, trained, tmp_path, monkeypatch):
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


def test_a_write_error_names_the_file_and_the_others_are_complete(generate, monkeypatch):
    def full(path, data):
        if "2" in path.name:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("dsmr_mlx.music.growing_midi.write_atomically", full)
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
def test_system_errors_are_one_line(run, trained, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dsmr_mlx.data.prepare.prepare", fail)
    result = run("prepare", trained.midi, "--out", "c")
    assert result.code == code
    assert result.err.startswith(f"dsmr-mlx: error: {message}")
    assert result.err.count("\n") == 1
