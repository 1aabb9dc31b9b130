"""What stands at a path where something else is expected, as parts of an error's message.

Folders are told by their files, which `checkpoint`, `corpus` and `train` write.
"""

from collections.abc import Iterable
from pathlib import Path

from dsmr_mlx.common.errors import did_you_mean

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
MIDI_FILES = (".mid", ".midi", ".kar", ".rmi")


def kind(path: Path) -> str:
    """What is there, in words."""
    if not path.is_dir():
        return "is a file" if path.exists() else "no such folder"
    has = [(path / name).exists() for name in ("corpus.json", "model.safetensors", "metrics.jsonl")]
    kinds = ("a corpus", "a checkpoint", "a run")
    return next((kind for kind, found in zip(kinds, has, strict=True) if found), "a folder of something else")


def no_checkpoint(path: Path, names: Iterable[str]) -> str:
    """What to do with what is no folder but was given as a checkpoint, or which name was meant; may be empty."""
    if not path.is_file():
        return did_you_mean(str(path), names)
    suffix = path.suffix.lower()
    if suffix in MIDI_FILES:
        return "; a MIDI file to go on from is given with --prompt"
    if suffix == ".safetensors" and (path.parent / "config.json").is_file():
        return f"; that is its folder, {path.parent}"
    made = suffix in (*TORCH_FILES, ".safetensors")
    return f"; dsmr-mlx convert {path} FOLDER makes a checkpoint of it" if made else ""


def no_checkpoint_in(path: Path) -> str | None:
    """What a folder that holds no checkpoint is, and how to come by one; None if that is not known."""
    found = kind(path)
    if found == "a corpus":
        return f"{found}, expected a checkpoint or a run: dsmr-mlx train --data {path} --out RUN makes one"
    if found == "a run":
        return f"{found} without a checkpoint yet, expected one: the first comes with checkpoint_every or Ctrl-C"
    return None


def no_corpus(path: Path) -> str:
    """What a path without a corpus is, and how to come by one."""
    found = kind(path)
    if found == "a folder of something else":
        return f"{found}, expected a corpus: dsmr-mlx prepare {path} --out CORPUS makes one of the MIDI files there"
    return f"{found}, expected a corpus, which dsmr-mlx prepare makes of a folder of MIDI files"
