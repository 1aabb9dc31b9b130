"""The files around a generation: the prompt that is read, the music that is written."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dsmr_mlx import __version__
from dsmr_mlx.checkpoint import resolve, sha256
from dsmr_mlx.errors import UserError
from dsmr_mlx.files import write_atomically
from dsmr_mlx.generation import GenerationReport
from dsmr_mlx.midi import midi_bytes
from dsmr_mlx.tokenizer import Tokenizer

MIDI_SUFFIXES = (".mid", ".midi")


def output_paths(out: str | Path, n: int, force: bool) -> list[Path]:
    """Where n variations go: FILE.mid, or FILE-1.mid … for several; DIR/1.mid … when `out` names no MIDI file.

    Raises `UserError` for what exists already, unless `force`, and for a folder that is not there.
    """
    if not str(out):
        raise UserError("--out: expected a MIDI file or a folder")
    out = Path(out)
    if n < 1:
        raise UserError(f"-n {n}: expected at least 1")
    if out.suffix.lower() not in MIDI_SUFFIXES:
        paths = [out / f"{i}.mid" for i in range(1, n + 1)]
    elif n == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, n + 1)]
    for path in paths:
        if path.is_dir():
            raise UserError(f"--out {path}: is a folder, expected a MIDI file")
        if path.exists() and not force:
            raise UserError(f"--out {path}: already exists, --force overwrites it")
    parent = paths[0].parent
    if out.suffix.lower() in MIDI_SUFFIXES and not parent.is_dir():
        raise UserError(f"--out {out}: no such folder {parent}")
    if (existing := nearest_existing(parent)) and not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder, or a name that ends in .mid")
    return paths


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def read_prompt(tokenizer: Tokenizer, path: str | Path | None, seconds: float | None) -> np.ndarray | None:
    """The ids of a MIDI file, or of its first `seconds`, keys that sound at the cut still held; None without a file.

    Raises `UserError` for a file that cannot be read or is shorter than asked.
    """
    if path is None:
        if seconds is not None:
            raise UserError(f"--prompt-seconds {seconds:g}: expected --prompt FILE.mid with it")
        return None
    ids = tokenizer.encode(path)
    if seconds is None:
        return ids
    if not seconds > 0:
        raise UserError(f"--prompt-seconds {seconds:g}: expected more than 0")
    grammar = tokenizer.grammar()
    if grammar is None or not grammar.ticks.any():
        raise UserError(f"--prompt-seconds {seconds:g}: tokenizer {tokenizer.kind!r} has no clock, give a shorter file")
    elapsed = np.cumsum(grammar.ticks[ids])
    limit = seconds / grammar.seconds_per_tick + 1e-6  # 0.57 s are 57 ticks, and in floating point a little less
    if limit < elapsed[-1] + 1:
        return ids[elapsed <= limit]
    raise UserError(
        f"--prompt-seconds {seconds:g}: {path} lasts {elapsed[-1] * grammar.seconds_per_tick:.2f} s, expected no more"
    )


def provenance(checkpoint: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What is needed to make the same bytes again, as JSON values: the program, the weights, the options."""
    weights = sha256(resolve(checkpoint) / "model.safetensors")
    made_by = {"program": f"dsmr-mlx {__version__}", "weights": weights, **options}
    if prompt := options.get("prompt"):
        made_by |= {"prompt": Path(prompt).name, "prompt_sha256": sha256(Path(prompt))}
    return made_by


def write_variations(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    report: GenerationReport,
    prompt: np.ndarray | None,
    made_by: dict[str, Any],
) -> None:
    """Write one MIDI file for each variation, after the ids of the prompt if given; all files appear, or none.

    `made_by` and the variation's number are stored in the file, as JSON. Raises `UserError` for a folder that
    cannot be written to.
    """
    parent = paths[0].parent
    try:
        with TemporaryDirectory(prefix=".dsmr-mlx-", dir=nearest_existing(parent)) as folder:
            for i, (path, variation) in enumerate(zip(paths, report.variations, strict=True), start=1):
                whole = prompt is not None
                notes = tokenizer.decode(np.concatenate([prompt, variation.ids])) if whole else variation.notes
                text = json.dumps(made_by | {"variation": i})
                write_atomically(Path(folder) / path.name, midi_bytes(notes, text))
            parent.mkdir(parents=True, exist_ok=True)
            for path in paths:
                os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise UserError(f"--out {parent}: cannot be written ({error.strerror or error})") from None
