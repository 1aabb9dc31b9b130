"""The files of `generate`: read the prompt, name and write the MIDI files."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np

from dsmr_mlx import __version__
from dsmr_mlx.cli.console import err
from dsmr_mlx.common.claims import claim_file, claim_folder, holds
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_writable, claim_output, read_json, sha256
from dsmr_mlx.generation.recording import Recording, record
from dsmr_mlx.model.base import BASE, parse_base
from dsmr_mlx.model.bundled import find_by_folder
from dsmr_mlx.model.checkpoint import resolve
from dsmr_mlx.music.midi import read_midi, read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment

OUTPUT_SUFFIXES = (".mid", ".midi")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac")  # refused as names of folders


def output_paths(out: str | Path, n: int, force: bool) -> list[Path]:
    """Return the paths of n variations: FILE.mid, FILE-1.mid … for several, DIR/1.mid … if `out` is not a MIDI file.

    Raises `UserError` for files that exist, unless `force`, and for a folder that does not exist or is read-only.
    """
    if not str(out):
        raise UserError("--out: expected a MIDI file or a folder")
    out = Path(out)
    if out.suffix.lower() in AUDIO_SUFFIXES:
        raise UserError(f"--out {out}: expected FILE.mid or a folder; dsmr-mlx show makes audio from a MIDI file")
    if n < 1:
        raise UserError(f"-n {n}: expected at least 1")
    if out.suffix.lower() not in OUTPUT_SUFFIXES:
        paths = [out / f"{i}.mid" for i in range(1, n + 1)]
    elif n == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, n + 1)]
    for path in paths:
        if path.is_dir():
            raise UserError(f"--out {path}: is a folder, expected a MIDI file")
        if os.path.lexists(path) and not force and not holds(path):
            raise UserError(f"--out {path}: already exists, --force overwrites it")
    parent = paths[0].parent
    if out.suffix.lower() in OUTPUT_SUFFIXES and not parent.is_dir():
        raise UserError(f"--out {out}: no such folder {parent}")
    if (existing := nearest_existing(parent)) and not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder, or a name that ends in .mid")
    check_writable("--out", paths[0])
    if not force:
        _claim(paths)
    return paths


def _claim(paths: Sequence[Path]) -> None:
    """Claim the files and make their folders. Raises `UserError` if another process has just claimed one."""
    for path in paths:
        missing = [folder for folder in path.absolute().parents if not folder.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                claim_folder(folder)
        claim_output("--out", path)


def free_name(stem: str, n: int, seed: int | None) -> tuple[str, int]:
    """Return STEM-SEED.mid, or STEM-SEED (a folder) for several variations, and the seed.

    Without a given seed, it is the first from 1 on whose file or folder can be claimed, see `claims`.
    """
    suffix, claim = (".mid", claim_file) if n == 1 else ("", claim_folder)
    named = ((f"{stem}-{number}{suffix}", number) for number in count(1 if seed is None else seed))
    return next((name, number) for name, number in named if seed is not None or _is_free(Path(name), claim))


def _is_free(path: Path, claim: Callable[[Path], None]) -> bool:
    """Claim a name. Return whether it was free; later checks report a folder that is not writable."""
    if os.path.lexists(path):
        return False
    try:
        claim(path)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def nearest_existing(path: Path) -> Path:
    """Return the path if it exists, else the nearest folder above it that does."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def encode_prompt(
    tokenizer: Tokenizer, path: str | Path | None, start: float | None, seconds: float | None
) -> np.ndarray | None:
    """Return the ids of a MIDI file `(T,)`, or of the `seconds` from `start` on; None without a file.

    Keys that sound at the end of the excerpt stay down. Raises `UserError` for an unreadable or too short file.
    """
    for option, value, least in (("--prompt-start", start, "0 or more"), ("--prompt-seconds", seconds, "more than 0")):
        if value is not None and path is None:
            raise UserError(f"{option} {value:g}: expected --prompt FILE.mid with it")
        if value is not None and not (value >= 0 if least == "0 or more" else value > 0):
            raise UserError(f"{option} {value:g}: expected {least}")
    if path is None:
        return None
    if start is None:
        ids = tokenizer.encode(path)
    else:
        ids = tokenizer.encode_excerpt(path, notes_from(read_notes(path, programs=tokenizer.programs), start, path))
    if not tokenizer.programs and (lost := read_midi(path, programs=True).notes.lost_as_piano):
        err.print(f"note: {path}: {lost}")
    if seconds is None:
        return ids
    duration = tokenizer.seconds(ids)
    if duration is None:
        raise UserError(
            f"--prompt-seconds {seconds:g}: tokenizer {tokenizer.label} does not encode time, so the prompt cannot be "
            "cut; expected a shorter file"
        )
    if seconds < duration + tokenizer.event_grammar().seconds_per_tick:
        return tokenizer.first_seconds(ids, seconds)
    after = "" if start is None else f" from {start:g} s on"
    raise UserError(f"--prompt-seconds {seconds:g}: {path} lasts {duration:.2f} s{after}, expected at most that")


def notes_from(notes: Notes, start: float, path: str | Path) -> Notes:
    """Return the notes that begin at `start` seconds or later. Raises `UserError`, which names the file, if none do."""
    late = notes.take(notes.onset >= start - 1e-9)
    if not len(late):
        raise UserError(f"--prompt-start {start:g}: the last note of {path} is at {notes.onset.max():.2f} s")
    return late


def provenance(checkpoint: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the bytes of the files, as JSON values: program, weights, options."""
    folder = resolve(checkpoint)
    model = find_by_folder(folder)
    made_by = {"program": f"dsmr-mlx {__version__}", **({"model": model.name} if model else {})}
    made_by |= {"weights": sha256(folder / "model.safetensors"), **options}
    if (folder / BASE).is_file():
        made_by["base"] = parse_base(read_json(folder / BASE, "the base of adapters"), folder / BASE)["sha256"]
    for name in ("prompt", "from_state"):
        if source := options.get(name):
            made_by |= {name: Path(source).name, f"{name}_sha256": sha256(Path(source))}
    return made_by


class Recordings:
    """The lanes of a generation, each recorded in a MIDI file that is valid at any time.

    moments `(B,)`: the state of the keys before the new music; recent: its last ids, lane by lane, see
    `recording.record`; prompt: ids at the start of every file, None for new music only; made_by: stored in the files
    as JSON, with the lane's number and its `details`; ended: lanes that have ended before, which get no file.

    Leaving the context releases all keys and completes the files, also after an error or an interruption. A lane
    without tokens then leaves no file. Raises `UserError` if a file cannot be written.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        made_by: dict[str, Any],
        *,
        moments: Iterable[Moment],
        recent: Iterable[Sequence[int]] | None = None,
        prompt: np.ndarray | None = None,
        details: Sequence[dict[str, Any]] | None = None,
        ended: Sequence[bool] | None = None,
    ):
        texts = (json.dumps(made_by | {"variation": i} | own) for i, own in enumerate(details or [{}] * len(paths), 1))
        before = zip(moments, recent or [()] * len(paths), strict=True)
        before = [(None, ())] * len(paths) if prompt is not None else before
        self.lanes = [record(path, tokenizer, text, *b) for path, text, b in zip(paths, texts, before, strict=True)]
        self.ending = tokenizer.eos_id
        self.ended = list(ended or [False] * len(self.lanes))
        self.written = [lane for lane, ended in zip(self.lanes, self.ended, strict=True) if not ended]
        for lane in self.lanes if prompt is not None else ():
            self._write(lane, lambda lane=lane: lane.prompt(prompt.tolist()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        failed = []
        for lane in self.written:
            if kind is None or lane.tokens:
                try:
                    self._write(lane, lane.close)
                except UserError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def play(self, step: np.ndarray) -> None:
        """Record one more token of each lane, `(B,)`. Tokens after the EOS of a lane are ignored."""
        for i, (lane, token) in enumerate(zip(self.lanes, step.tolist(), strict=True)):
            if not self.ended[i]:
                self._write(lane, lambda lane=lane, token=token: lane.play(token))
                self.ended[i] = token == self.ending

    def _write(self, lane: Recording, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"--out {lane.path}: cannot be written ({error.strerror or error})") from None
