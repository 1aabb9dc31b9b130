"""The files around a generation: the prompt that is read, the music that is written."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np

from dsmr_mlx import __version__
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_writable, sha256
from dsmr_mlx.generation.recording import Recording, record
from dsmr_mlx.model.bundled import bundled
from dsmr_mlx.model.checkpoint import resolve
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment

MIDI_SUFFIXES = (".mid", ".midi")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac")  # what a folder is hardly called


def output_paths(out: str | Path, n: int, force: bool) -> list[Path]:
    """Where n variations go: FILE.mid, or FILE-1.mid … for several; DIR/1.mid … when `out` names no MIDI file.

    Raises `UserError` for what exists already, unless `force`, and for a folder that is not there or is read-only.
    """
    if not str(out):
        raise UserError("--out: expected a MIDI file or a folder")
    out = Path(out)
    if out.suffix.lower() in AUDIO_SUFFIXES:
        raise UserError(f"--out {out}: expected FILE.mid or a folder; dsmr-mlx show makes audio of a MIDI file")
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
    check_writable("--out", paths[0])
    return paths


def free_name(stem: str, n: int, seed: int | None) -> tuple[str, int]:
    """STEM-SEED.mid, or the folder STEM-SEED for several variations, and the seed: the given one, else the first from
    1 on whose file or folder is not there yet.
    """
    names = (f"{stem}-{number}{'.mid' if n == 1 else ''}" for number in count(1 if seed is None else seed))
    numbered = zip(names, count(1 if seed is None else seed), strict=False)
    return next((name, number) for name, number in numbered if seed is not None or not Path(name).exists())


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def read_prompt(
    tokenizer: Tokenizer, path: str | Path | None, start: float | None, seconds: float | None
) -> np.ndarray | None:
    """The ids of a MIDI file, of its notes from `start` seconds on, or of the first `seconds` from there, keys that
    sound at the cut still held; None without a file.

    Raises `UserError` for a file that cannot be read or is shorter than asked.
    """
    for option, value, least in (("--prompt-start", start, "0 or more"), ("--prompt-seconds", seconds, "more than 0")):
        if value is not None and path is None:
            raise UserError(f"{option} {value:g}: expected --prompt FILE.mid with it")
        if value is not None and not (value >= 0 if least == "0 or more" else value > 0):
            raise UserError(f"{option} {value:g}: expected {least}")
    if path is None:
        return None
    ids = tokenizer.encode(path) if start is None else encoded_from(tokenizer, path, start)
    if seconds is None:
        return ids
    lasting = tokenizer.seconds(ids)
    if lasting is None:
        raise UserError(f"--prompt-seconds {seconds:g}: tokenizer {tokenizer.label} has no clock, give a shorter file")
    if seconds < lasting + tokenizer.event_grammar().seconds_per_tick:
        return tokenizer.first_seconds(ids, seconds)
    lasts = f"{path} lasts {lasting:.2f} s"
    after = "" if start is None else f" from {start:g} s on"
    raise UserError(f"--prompt-seconds {seconds:g}: {lasts}{after}, expected no more")


def encoded_from(tokenizer: Tokenizer, path: str | Path, start: float) -> np.ndarray:
    """The ids of the notes that begin at `start` seconds or later. Raises `UserError` if there are none."""
    notes = read_notes(path, programs=tokenizer.programs)
    late = notes.take(notes.onset >= start - 1e-9)
    if not len(late):
        raise UserError(f"--prompt-start {start:g}: {path} has its last note at {notes.onset.max():.2f} s")
    return tokenizer.encode_notes(late)


def provenance(checkpoint: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What is needed to make the same bytes again, as JSON values: the program, the weights, the options."""
    folder = resolve(checkpoint)
    model = bundled(folder)
    made_by = {"program": f"dsmr-mlx {__version__}", **({"model": model.name} if model else {})}
    made_by |= {"weights": sha256(folder / "model.safetensors"), **options}
    for name in ("prompt", "from_state"):
        if source := options.get(name):
            made_by |= {name: Path(source).name, f"{name}_sha256": sha256(Path(source))}
    return made_by


class Recordings:
    """The lanes of a generation on their way into MIDI files; each file is whole at every moment.

    moments `[n]`: what the music before has left; recent: its last ids, lane by lane, see `recording.record`; prompt:
    ids that come first in every file, None for new music alone.
    `made_by`, the lane's number and its own `details`, if any, are stored in the files, as JSON. Leaving the context
    releases the keys that are down and completes the files, also when an error or an interruption ends it; but files
    that no music has been recorded for do not appear. Raises `UserError` where one cannot be written.
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
    ):
        texts = (json.dumps(made_by | {"variation": i} | own) for i, own in enumerate(details or [{}] * len(paths), 1))
        before = zip(moments, recent or [()] * len(paths), strict=True)
        before = [(None, ())] * len(paths) if prompt is not None else before
        self.lanes = [record(path, tokenizer, text, *b) for path, text, b in zip(paths, texts, before, strict=True)]
        self.ending = tokenizer.eos_id
        self.ended = [False] * len(self.lanes)
        for lane in self.lanes if prompt is not None else ():
            self._write(lane, lambda lane=lane: lane.prompt(prompt.tolist()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        failed = []
        for lane in self.lanes:
            if kind is None or lane.tokens:
                try:
                    self._write(lane, lane.close)
                except UserError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def play(self, step: np.ndarray) -> None:
        """One more token of each lane, `[n]`; what comes after a lane's EOS is passed over."""
        for i, (lane, token) in enumerate(zip(self.lanes, step.tolist(), strict=True)):
            if not self.ended[i]:
                self._write(lane, lambda lane=lane, token=token: lane.play(token))
                self.ended[i] = token == self.ending

    def _write(self, lane: Recording, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"--out {lane.path}: cannot be written ({error.strerror or error})") from None
