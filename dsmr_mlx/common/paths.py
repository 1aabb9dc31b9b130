"""Describe a path that is not the expected checkpoint or corpus, as parts of an error message.

Folders are recognized by a file in them: `corpus.json`, `model.safetensors`, `metrics.jsonl`.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from dsmr_mlx.common.errors import did_you_mean

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
MIDI_SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
KINDS = {"corpus.json": "a corpus", "model.safetensors": "a checkpoint", "metrics.jsonl": "a run"}


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form: file systems of macOS may return "é" as "e" and an accent."""
    return unicodedata.normalize("NFC", name)


def describe_path(path: Path) -> str:
    """Describe a path: "is a file", "no such folder", or a kind of folder such as "a corpus"."""
    if not path.is_dir():
        return "is a file" if path.exists() else "no such folder"
    return next((kind for name, kind in KINDS.items() if (path / name).exists()), "a folder of another kind")


def checkpoint_hint(path: Path, names: Iterable[str]) -> str:
    """Return a hint for a path without a checkpoint, or "".

    names: of the bundled models, for "did you mean".
    """
    if path.is_dir():
        weights = any(file.suffix.lower() in WEIGHT_SUFFIXES for file in path.iterdir())
        return f"; dsmr-mlx convert {path} FOLDER makes a checkpoint from its weights" if weights else ""
    if not path.is_file():
        return did_you_mean(str(path), names)
    suffix = path.suffix.lower()
    if suffix in MIDI_SUFFIXES:
        return f"; dsmr-mlx generate --prompt {path} continues a MIDI file"
    if suffix == ".safetensors" and (path.parent / "config.json").is_file():
        return f"; the checkpoint is its folder, {path.parent}"
    if suffix in WEIGHT_SUFFIXES:
        return f"; dsmr-mlx convert {path} FOLDER makes a checkpoint from it"
    return ""


def explain_no_checkpoint(folder: Path) -> str | None:
    """Return why a folder has no checkpoint and how to make one; None if it is neither a corpus nor a run."""
    kind = describe_path(folder)
    if kind == "a corpus":
        return f"{kind}, expected a checkpoint or a run: dsmr-mlx train --data {folder} --out RUN makes one"
    if kind == "a run":
        return f"{kind}, but no checkpoint yet; the first is written after `checkpoint_every` steps or on Ctrl-C"
    return None


def explain_no_corpus(path: Path) -> str:
    """Describe a path without a corpus, and how to make one."""
    kind = describe_path(path)
    if kind == "a folder of another kind":
        return f"{kind}, expected a corpus: dsmr-mlx prepare {path} --out CORPUS makes one from the MIDI files there"
    return f"{kind}, expected a corpus, which dsmr-mlx prepare makes from a folder of MIDI files"
