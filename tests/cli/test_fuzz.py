"""Damaged and hostile files: every command ends with an exit code and one line, without a crash, hang or traceback.

`DSMR_FUZZ_SECONDS` sets the time for each kind of file (1 by default; 60 for a longer run). A failure names the seed of
its mutation; `DSMR_FUZZ_SEED` starts there.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.midi_files import tune, write_midi_files

from dsmr_mlx.cli import main
from dsmr_mlx.generation.player_file import checksum, read_arrays, to_bytes
from dsmr_mlx.model.checkpoint_folder import CHECKSUMS

SECONDS = float(os.environ.get("DSMR_FUZZ_SECONDS", "1"))
FIRST_SEED = int(os.environ.get("DSMR_FUZZ_SEED", "0"))
SECONDS_TO_END = 30  # for one command
NASTY = (
    *(0, -1, 1, 7, 255, 65_536, 2**31, -(2**31), 2**63, 10**30, 10**400, 0.5, -1.5, 1e300, float("nan"), float("inf")),
    *(
        None,
        True,
        False,
        "",
        "x",
        "../x",
        "\0",
        "\ud800",
        "\x1b]0;a\x07\n",
        "a" * 1000,
        "1",
        "none",
        [],
        [[]],
        {},
        {"a": 1},
    ),
    *([1, 2, 3], [None], [2**40] * 3, ["x"] * 3),
)
BYTES = (b"\0", b"\xff", b"\x7f", b"{", b"[", b'"', b"-", b"9" * 30, b"\xff\xff\xff\xff", b"\xed\xa0\x80", b"\n", b"'")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change, insert, remove or repeat some bytes, near the start more often, where headers are."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = int(len(result) * rng.random() ** rng.choice((1, 4)))
        match rng.randrange(5):
            case 0 if result:
                result[min(at, len(result) - 1)] = rng.randrange(256)
            case 1:
                result[at:at] = rng.choice(BYTES)
            case 2:
                del result[at : at + rng.choice((1, 4, 100))]
            case 3:
                del result[at:]
            case 4:
                result[at:at] = result[at : at + rng.choice((4, 64))] * rng.choice((1, 50))
    return bytes(result)


def mutated_value(rng: random.Random, value: object) -> object:
    """Replace a value inside nested ones, or add or remove an entry."""
    children = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not children or rng.random() < 0.15:
        return rng.choice(NASTY)
    key, child = rng.choice(children)
    copy = dict(value) if isinstance(value, dict) else list(value)
    match rng.randrange(8):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[rng.choice(("more", "\x1b[31m", "", key + "x"))] = rng.choice(NASTY)
        case 1:
            copy.insert(key, child)
        case _:
            copy[key] = mutated_value(rng, child)
    return copy


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Mutate a JSON file, its values or its bytes."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = mutated_value(rng, value)
    return json.dumps(value).encode()


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Mutate the header of a safetensors file, its values, or any bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = mutated_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate(rng: random.Random, path: Path) -> None:
    """Mutate a file in the way that suits its kind."""
    data = path.read_bytes()
    change = {".json": mutated_json, ".jsonl": mutated_lines, ".safetensors": mutated_safetensors}
    path.write_bytes(change.get(path.suffix, mutated_bytes)(rng, data))


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """Mutate one line of a JSON lines file."""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = mutated_json(rng, lines[i])
    return b"\n".join(lines) + b"\n"


def seal(folder: Path) -> None:
    """Make the checksums of a checkpoint right again, so that more than they is tested."""
    recorded = folder / CHECKSUMS
    if recorded.exists():
        names = [path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS]
        entries = {p.relative_to(folder).as_posix(): p.read_bytes() for p in names if p.name != "generation.json"}
        sums = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in entries.items()}
        recorded.write_text(json.dumps(sums))


def files(folder: Path, *names: str) -> Callable[[random.Random, Path], None]:
    """Return a function that mutates one of these files in a copy of the folder."""

    def change(rng: random.Random, copy: Path) -> None:
        mutate(rng, copy / rng.choice(names))
        seal(copy)

    return change


class Kinds:
    """The kinds of files: a folder to be copied, how it is mutated, and the commands that read it."""

    def __init__(self, trained, folder: Path):
        self.trained, self.folder = trained, folder
        self.checkpoint = trained.checkpoint
        (folder / "given").mkdir()

    def checkpoint_files(self):
        """A checkpoint."""
        copy = self._copied(self.checkpoint, "checkpoint")
        (copy / "generation.json").write_text('{"temperature": 0.9, "tempo": 0.1, "key": "C major", "top_p": 0.9}')
        names = ("config.json", "tokenizer/tokenizer.json", "model.safetensors", "generation.json")
        commands = [["generate", "{}", "--tokens", "6", "--out", "x.mid", "--force"], ["convert", "{}", "out"]]
        return copy, files(copy, *names), commands

    def corpus_files(self):
        """A corpus."""
        copy = self._copied(self.trained.corpus, "corpus")
        names = ("corpus.json", "tokens.npy", "tokenizer/tokenizer.json")
        commands = [["evaluate", self.checkpoint, "--data", "{}"], ["compare", self.checkpoint, "--data", "{}"]]
        commands += [
            ["assess", "{}"],
            ["prepare", self.trained.midi, "--out", "{}"],
            ["tokenize", "a.mid", "--tokenizer", "{}"],
        ]
        return copy, files(copy, *names), commands

    def state_files(self):
        """A saved player, with a right checksum."""
        copy = self.folder / "given" / "state"
        copy.mkdir()
        main(
            [
                "generate",
                str(self.checkpoint),
                "--tokens",
                "9",
                "--out",
                "s.mid",
                "--save-state",
                str(copy / "a.safetensors"),
            ]
        )

        def change(rng: random.Random, copy: Path) -> None:
            path = copy / "a.safetensors"
            if rng.random() < 0.3:
                mutate(rng, path)
                return
            arrays, metadata = read_arrays(path)
            name = rng.choice(sorted(arrays))
            values = np.array(arrays[name])
            if values.size:
                with np.errstate(all="ignore"):
                    values.reshape(-1)[rng.randrange(values.size)] = np.array(
                        rng.choice((0, -1, 2**31 - 1, 2**62, 9))
                    ).astype(values.dtype)
            arrays[name] = mx.array(values)
            key = rng.choice(sorted(metadata))
            if rng.random() < 0.5:
                metadata[key] = mutated_bytes(rng, metadata[key].encode()).decode(errors="replace")
            path.write_bytes(to_bytes(arrays, metadata | {"sha256": checksum(to_bytes(arrays, metadata), metadata)}))

        state = "{}/a.safetensors"
        commands = [["generate", self.checkpoint, "--from-state", state, "--tokens", "6", "--out", "x.mid", "--force"]]
        return copy, change, commands

    def run_files(self):
        """A run that is resumed, and its report."""
        copy = self._copied(self.trained.run, "run")
        step = sorted((copy / "checkpoints").glob("step-*"))[-1].relative_to(copy)
        inner = ("training.json", "training_config.json", "config.json")
        arrays = ("model.safetensors", "training.safetensors", "memory.safetensors")
        names = [*(f"{step}/{name}" for name in (*inner, *arrays)), "config.json", "metrics.jsonl"]

        def change(rng: random.Random, copy: Path) -> None:
            mutate(rng, copy / rng.choice(names))
            seal(copy / step)

        commands = [
            ["train", "--data", self.trained.corpus, "--out", "{}", "--resume", "--max-steps", "5"],
            ["report", "{}", "--out", "r.html", "--force"],
        ]
        return copy, change, commands

    def foreign_files(self):
        """Checkpoints of other programs, with their configuration, and a map of names."""
        torch = pytest.importorskip("torch")
        copy = self.folder / "given" / "foreign"
        copy.mkdir()
        shapes = {"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,), "lm_head.weight": (9, 8)}
        layer = {f"self_attn.{k}_proj": (8, 8) for k in "qkvo"} | {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8)}
        layer |= {"mlp.down_proj": (8, 12), "input_layernorm": (8,), "post_attention_layernorm": (8,)}
        shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
        weights = {name: torch.ones(shape) for name, shape in shapes.items()}
        torch.save({"model": weights, "ema": weights, "step": 3}, copy / "a.pt")
        mx.save_safetensors(str(copy / "model.safetensors"), {name: mx.ones(shape) for name, shape in shapes.items()})
        config = {
            "model_type": "llama",
            "vocab_size": 9,
            "hidden_size": 8,
            "intermediate_size": 12,
            "rms_norm_eps": 1e-5,
        }
        config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e4}
        config |= {"rope_parameters": {"rope_theta": 500.0}, "hidden_act": "silu", "bos_token_id": 1, "horizons_": [1]}
        (copy / "config.json").write_text(json.dumps(config))
        index = {"weight_map": dict.fromkeys(shapes, "model.safetensors")}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(Path(__file__).parents[2] / "examples" / "custom_map.toml", copy / "map.toml")
        names = ("a.pt", "model.safetensors", "config.json", "model.safetensors.index.json", "map.toml")
        commands = [
            ["convert", "{}/a.pt", "out"],
            ["convert", "{}", "out"],
            ["convert", "{}/model.safetensors.index.json", "out"],
            ["convert", "{}/a.pt", "out", "--map", "{}/map.toml"],
            ["convert", "{}/a.pt", "out", "--weights", "ema"],
        ]
        return copy, files(copy, *names), commands

    def subword_files(self):
        """A tokenizer with several files, in a corpus."""
        pytest.importorskip("sentencepiece")
        copy = self.folder / "given" / "subwords"
        main(["prepare", str(self.trained.midi), "--out", str(copy), "--subwords", "bpe:420"])
        names = ("tokenizer/subwords.json", "tokenizer/subwords.model", "tokenizer/tokenizer.json", "corpus.json")

        def change(rng: random.Random, copy: Path) -> None:
            path = copy / rng.choice(names)
            mutate(rng, path)
            if path.suffix == ".model":  # the right fingerprint for the damaged file
                description = json.loads((copy / names[2]).read_text())
                description["parameters"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                (copy / names[2]).write_text(json.dumps(description))

        return copy, change, [["tokenize", "a.mid", "--tokenizer", "{}"], ["assess", "{}"]]

    def miditok_files(self):
        """A tokenizer of MidiTok and its settings."""
        pytest.importorskip("miditok")
        copy = self.folder / "given" / "miditok"
        main(["prepare", str(self.trained.midi), "--out", str(copy), "--tokenizer", "miditok:TSD"])
        (copy / "settings.json").write_text('{"use_rests": true, "beat_res": {"0_2": 50}, "num_velocities": 8}')
        names = ("tokenizer/vocabulary.json", "tokenizer/tokenizer.json", "settings.json")
        commands = [["tokenize", "a.mid", "--tokenizer", "{}"], ["evaluate", self.checkpoint, "--data", "{}"]]
        commands.append(["tokenize", "a.mid", "--tokenizer", "miditok:TSD", "--tokenizer-config", "{}/settings.json"])
        return copy, files(copy, *names), commands

    def small_files(self):
        """Tables, settings, ids and MIDI files."""
        copy = self.folder / "given" / "small"
        write_midi_files(copy / "midi", {f"{i}.mid": tune(i, 20) for i in range(3)})
        rows = "".join(f"c{i},t{i},{'validation' if i else 'train'},{i}.mid\n" for i in range(3))
        (copy / "midi" / "maestro-v3.0.0.csv").write_text(
            f"canonical_composer,canonical_title,split,midi_filename\n{rows}"
        )
        (copy / "json").mkdir()
        shutil.copy(copy / "midi" / "0.mid", copy / "json" / "0.mid")
        row = {"canonical_composer": "c", "canonical_title": "t", "split": "train", "midi_filename": "0.mid"}
        (copy / "json" / "maestro-v3.0.0.json").write_text(json.dumps([row]))
        np.save(copy / "ids.npy", np.arange(3, 200))
        (copy / "train.toml").write_text('max_steps = 1\nhorizons = "none"\nd_model = 16\nrope_scaling = "none"\n')
        assert tomllib.loads((copy / "train.toml").read_text())["max_steps"] == 1
        names = ("midi/0.mid", "midi/maestro-v3.0.0.csv", "json/maestro-v3.0.0.json", "ids.npy", "train.toml")
        commands = [
            ["prepare", "{}/midi", "--out", "c"],
            ["prepare", "{}/json", "--out", "c"],
            ["show", "{}/midi/0.mid"],
            ["show", "{}/midi/0.mid", "--html", "x.html", "--force"],
            ["assess", "{}/ids.npy"],
            ["train", "--data", "nowhere", "--config", "{}/train.toml", "--out", "r"],
        ]
        return copy, files(copy, *names), commands

    def _copied(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.folder / "given" / name, symlinks=True))


@pytest.mark.parametrize("kind", sorted(name for name in vars(Kinds) if name.endswith("_files")))
def test_damaged_files_are_one_line(trained, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    write_midi_files(tmp_path, {"a.mid": tune(3, 20)})
    given, change, commands = getattr(Kinds(trained, tmp_path), kind)()
    before, end, seed, failures = set(tmp_path.iterdir()), time.monotonic() + SECONDS, FIRST_SEED, []
    while time.monotonic() < end and len(failures) < 5:
        rng = random.Random(f"{kind}{seed}")
        copy = Path(shutil.copytree(given, tmp_path / "copy", symlinks=True))
        change(rng, copy)
        words = [str(word).format(copy) for word in rng.choice(commands)]
        try:
            with time_limit(SECONDS_TO_END):
                code = main(words)
        except SystemExit as left:
            code = left.code
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if "error:" in line]
        if code not in (0, 1, 2, 130) or (code and len(lines) != 1) or "\x1b" in shown.out + shown.err:
            failures.append(f"seed {seed}: {words} → {code}, {shown.err[-300:]}")
        for path in set(tmp_path.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        seed += 1
    assert seed > FIRST_SEED
    assert not failures, "\n".join(failures)
