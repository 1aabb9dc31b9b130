"""Checkpoint folders on disk: commit, verify, keep and remove them. Needs no MLX.

A checkpoint appears complete or not at all. These steps write one, from the inside out:

    1. `checkpoint.save_model` writes config.json, model.safetensors and tokenizer/ into a folder
    2. `training.run` adds training.*, training_config.json and memory.safetensors
    3. `write_checkpoint` flushes all files to disk and adds checksums.json
    4. `folders.write_folder` makes the hidden folder of steps 1 to 3 and renames it to its final name
    5. `CheckpointStore.save` points `last` at it, removes old checkpoints, and removes the memory of kept ones that a
       run does not resume from; `training.run` moves the other links

`convert.importing` writes the files of step 1 by itself, one tensor at a time, then takes steps 3 and 4.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json, sha256, sync
from dsmr_mlx.common.folders import write_folder
from dsmr_mlx.common.paths import checkpoint_hint, describe_path, explain_no_checkpoint
from dsmr_mlx.model import bundled

CHECKSUMS = "checksums.json"
MEMORY = "memory.safetensors"  # the recurrent state of a run's lanes, often far larger than everything else
PARTS = ("config.json", "model.safetensors", f"tokenizer/{TOKENIZER_FILE}")
GENERATION, LICENCE = "generation.json", "LICENSE"
COMPANIONS = (GENERATION, LICENCE)  # copied with the weights; without checksum, because people edit them
LINKS = ("last", "best", "before-cooldown")  # of a run, to checkpoints that are kept
RESUMED = ("last", "before-cooldown")  # links whose checkpoints keep their memory


def verify_checkpoint(folder: Path) -> None:
    """Raise `UserError` if parts of a checkpoint are missing or their checksums differ. It may lack its memory."""
    if missing := [part for part in PARTS if not (folder / part).is_file()]:
        raise UserError(f"{folder}: not a complete checkpoint, {', '.join(missing)} missing")
    if not (folder / CHECKSUMS).is_file():
        return  # written by hand or by another program
    recorded = read_json(folder / CHECKSUMS, "checksums")
    if not isinstance(recorded, dict) or not recorded.keys() >= set(PARTS):
        raise UserError(f"{folder / CHECKSUMS}: damaged, expected entries for {', '.join(PARTS)}")
    for name, expected in recorded.items():
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise UserError(f"{folder / CHECKSUMS}: damaged, {name} has {expected}, expected bytes and sha256")
        path = folder / name
        if name == MEMORY and not path.exists():
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / CHECKSUMS}: damaged, {name} is not in the folder")
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {CHECKSUMS}")
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for key in expected:
            if found[key] != expected[key]:
                raise UserError(f"{path}: damaged, {key} is {found[key]}, expected {expected[key]}")


def resolve(checkpoint: str | Path | None) -> Path:
    """Return the checkpoint folder of a path, run or name.

    A run resolves to its `best` checkpoint, else its `last`; for names and None see `bundled.locate`. Raises
    `UserError` if there is no checkpoint.
    """
    path = bundled.locate(checkpoint)
    hint = checkpoint_hint(path, bundled.names())
    if not path.is_dir():
        known = f", or a bundled model: {', '.join(bundled.names())}" if bundled.names() else ""
        raise UserError(f"{path}: {describe_path(path)}, expected a checkpoint or a run{known}{hint}")
    for link in (path / "best", path / "last"):
        if link.is_dir():
            return link
    if found := CheckpointStore(path, keep_last=1).complete():
        return found[-1]  # the run was killed before it could set its links, or what they name was deleted
    missing = [part for part in PARTS if not (path / part).is_file()]
    if missing:
        unknown = f"not a checkpoint, {', '.join(missing)} missing, and not a run, no best or last in it{hint}"
        raise UserError(f"{path}: {explain_no_checkpoint(path) or unknown}")
    return path


def is_checkpoint_or_run(path: str | Path) -> bool:
    """Return whether a folder is a checkpoint, even a damaged one, or a run of this program.

    Other programs may write a `tokenizer/tokenizer.json` or a `checkpoints` folder too, but in other formats.
    """
    path = Path(path)
    checkpoints = (path, path / "best", path / "last", *CheckpointStore(path, keep_last=1).complete())
    return any(_is_checkpoint(folder) for folder in checkpoints)


def _is_checkpoint(folder: Path) -> bool:
    keys_by_file = {f"tokenizer/{TOKENIZER_FILE}": {"kind", "fingerprint"}, CHECKSUMS: set(PARTS)}
    for name, keys in keys_by_file.items():
        try:
            content = read_json(folder / name, "a checkpoint")
        except UserError:
            continue
        if isinstance(content, dict) and content.keys() >= keys:
            return True
    return False


def check_replaceable(folder: str | Path, force: bool) -> None:
    """Raise `UserError` unless a new checkpoint may take this path: it is free or, with `force`, another checkpoint."""
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise UserError(f"{folder}: already exists, `force` replaces it")
    whole = all((folder / part).is_file() for part in PARTS) and _is_checkpoint(folder)
    if not whole or (folder / "training.json").exists():
        raise UserError(f"{folder}: is not a checkpoint that `force` may replace, expected another name")


def write_checkpoint(final: Path, write: Callable[[Path], None], replace: bool = True) -> None:
    """Let `write` fill a checkpoint folder, add its checksums, and commit it as `final`; see `folders.write_folder`."""

    def write_with_checksums(folder: Path) -> None:
        write(folder)
        _seal(folder)

    write_folder(final, write_with_checksums, replace)


class CheckpointStore:
    """The checkpoints of a run folder, written atomically; the newest `keep_last` and those of `LINKS` are kept."""

    def __init__(self, run: Path, keep_last: int):
        self.run = Path(run)
        self.folder = self.run / "checkpoints"
        self.keep_last = keep_last

    def save(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder, commit it under a free `name`, and make it the new `last`."""
        final = self.folder / name
        with _naming(final):
            write_checkpoint(final, write)
        self.point("last", final)
        self._prune()
        return final

    def free_name(self, name: str) -> str:
        """Return the name or, if one like it is taken, the name with `+2`, `+3` …, one more than the largest."""
        taken = [number for base, number in map(order, self.complete()) if base == name]
        return f"{name}+{max(taken) + 1}" if taken else name

    def point(self, link: str, checkpoint: Path) -> None:
        """Make one of `LINKS` a link to a checkpoint, atomically."""
        temporary = self.run / f".{link}.incomplete"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.relative_to(self.run))
        os.replace(temporary, self.run / link)
        sync(self.run)

    def target(self, link: str) -> Path | None:
        """Return the checkpoint that one of `LINKS` points at, or None."""
        path = self.run / link
        return self.run / path.readlink() if path.is_symlink() and path.exists() else None

    def complete(self) -> list[Path]:
        """Return the committed checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        whole = (path for path in found if (path / CHECKSUMS).is_file() and not path.name.endswith(".incomplete"))
        return sorted(whole, key=order)

    def latest(self) -> Path | None:
        """Return the newest committed checkpoint, or None."""
        return next(reversed(self.complete()), None)

    def set_aside(self, after: Path) -> Path:
        """Keep the newest checkpoint and `best` as `cooled-…`, out of the sequence, if they are newer than `after`.

        Removes all checkpoints that are newer. Returns the copy of the newest. An interrupted call can be repeated.
        """
        newer = [path for path in self.complete() if order(path) > order(after)]
        best = self.target("best")
        for path in newer:
            if path in (best, newer[-1]):
                aside = path.with_name(path.name.replace("step", "cooled", 1))
                with _naming(aside):
                    ignored = shutil.ignore_patterns(MEMORY)
                    copy = partial(shutil.copytree, path, ignore=ignored, copy_function=_copy, dirs_exist_ok=True)
                    write_folder(aside, copy)
                if path == best:
                    self.point("best", aside)
        for path in newer:  # the newest last: while it exists, a resumed run calls this again
            self._remove(path)
        return aside

    @staticmethod
    def is_set_aside(path: Path) -> bool:
        """Return whether a checkpoint was made by `set_aside`."""
        return path.name.startswith("cooled-")

    def remove_leftovers(self) -> None:
        """Remove the leftovers of interrupted saves. No other process may be writing to the run."""
        for folder in (*self.folder.glob("*.incomplete"), *self.folder.glob(".*.replaced")):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (*self.run.glob(".*.incomplete"), *self.run.glob(".*.partial")):
            file.unlink()

    def _prune(self) -> None:
        complete = self.complete()
        kept = {*map(self.target, LINKS), *complete[-self.keep_last :]}
        resumed = {*map(self.target, RESUMED)}
        for path in complete:
            if path not in kept:
                self._remove(path)
            elif path not in resumed:
                (path / MEMORY).unlink(missing_ok=True)

    @staticmethod
    def _remove(path: Path) -> None:
        # Renamed first: a checkpoint that was half deleted must not look complete.
        doomed = path.with_name(f"{path.name}.incomplete")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """Make system errors, such as a full disk, name the checkpoint and state that earlier ones are intact."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; no checkpoint was written, earlier ones are intact"
        raise OSError(error.errno or errno.EIO, reason, str(checkpoint)) from error


def checkpoint_name(step: int, segments: int = 0) -> str:
    """Return a name that sorts in the order of the run; segments: accumulated towards the next step."""
    return f"step-{step:08d}" + (f"-{segments:04d}" if segments else "")


def order(checkpoint: Path) -> tuple[str, int]:
    """Return the key that sorts checkpoints in the order of the run: of `NAME` `(NAME, 1)`, of `NAME+2` `(NAME, 2)`."""
    name, number = re.fullmatch(r"(.*?)(?:\+([0-9]{1,9}))?", checkpoint.name, re.DOTALL).groups()
    return name, int(number or 1)


def _copy(source: str, target: str) -> None:
    """Copy a file and flush it to disk."""
    shutil.copyfile(source, target)
    sync(Path(target))


def _seal(folder: Path) -> None:
    """Flush every file to disk and write the checksums, which mark the checkpoint as complete."""
    checksums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(folder).as_posix()
        if name not in COMPANIONS:
            checksums[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    sync(folder / CHECKSUMS)


def generation_options(folder: str | Path) -> dict[str, Any]:
    """Return the options of `generate` that a checkpoint recommends in `generation.json`; {} without that file.

    Raises `UserError` if the file is not a JSON object.
    """
    path = Path(folder) / GENERATION
    if not path.is_file():
        return {}
    options = read_json(path, "options of generate")
    if not isinstance(options, dict):
        raise UserError(f"{path}: holds {json.dumps(options)}, expected options by name")
    return options
