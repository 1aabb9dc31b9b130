"""Checkpoint folders on disk: complete or not there at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json, sha256, sync

CHECKSUMS = "checksums.json"
PARTS = ("config.json", "model.safetensors", f"tokenizer/{TOKENIZER_FILE}")


def verify(folder: Path) -> None:
    """Raise `UserError` for parts that are missing or whose checksum differs."""
    if missing := [part for part in PARTS if not (folder / part).is_file()]:
        raise UserError(f"{folder}: not a complete checkpoint, {', '.join(missing)} missing")
    if not (folder / CHECKSUMS).is_file():
        return  # put together by hand or by another program
    recorded = read_json(folder / CHECKSUMS, "checksums")
    if not isinstance(recorded, dict) or not recorded.keys() >= set(PARTS):
        raise UserError(f"{folder / CHECKSUMS}: damaged, expected entries for {', '.join(PARTS)}")
    for name, expected in recorded.items():
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise UserError(f"{folder / CHECKSUMS}: damaged, {name} has {expected}, expected bytes and sha256")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {CHECKSUMS}")
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for key in expected:
            if found[key] != expected[key]:
                raise UserError(f"{path}: damaged, {key} is {found[key]}, expected {expected[key]}")


def is_ours(path: str | Path) -> bool:
    """Whether a folder is a checkpoint, even a damaged one, or a run of this program.

    Folders of other programs may have a `tokenizer/tokenizer.json` or a `checkpoints` too, but not of this format.
    """
    path = Path(path)
    checkpoints = (path, path / "best", path / "last", *CheckpointStore(path, keep_last=1).complete())
    return any(_is_checkpoint(folder) for folder in checkpoints)


def _is_checkpoint(folder: Path) -> bool:
    told_by = {f"tokenizer/{TOKENIZER_FILE}": {"kind", "fingerprint"}, CHECKSUMS: set(PARTS)}
    for name, keys in told_by.items():
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.keys() >= keys:
            return True
    return False


def check_room(folder: str | Path, force: bool) -> None:
    """Raise `UserError` unless `folder` can become a checkpoint: nothing is there, or with `force` another one."""
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise UserError(f"{folder}: already exists, --force replaces it")
    whole = all((folder / part).is_file() for part in PARTS) and _is_checkpoint(folder)
    if not whole or (folder / "training.json").exists():
        raise UserError(f"{folder}: is not a checkpoint that --force may replace, expected another name")


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then commit it as `final` by one rename, in place of what is there.

    Where `final` is a link to a folder, that folder is replaced and the link stays.
    """
    final = final.resolve()
    mark = f".{final.name}.{secrets.token_hex(4)}"
    temporary, replaced = (final.with_name(f"{mark}.{what}") for what in ("incomplete", "replaced"))
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
    finally:
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    sync(final.parent)


class CheckpointStore:
    """The checkpoints of a run folder: written atomically, the newest few and the best kept."""

    def __init__(self, run: Path, keep_last: int):
        self.run = Path(run)
        self.folder = self.run / "checkpoints"
        self.keep_last = keep_last

    def save(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder, commit it under a free `name`, and make it the new `last`."""
        final = self.folder / name
        try:
            write_folder(final, write)
        except OSError as error:
            reason = f"{error.strerror}; no checkpoint was written, the one before, if any, is whole"
            raise OSError(error.errno, reason, str(final)) from error
        self.point("last", final)
        self._prune()
        return final

    def free_name(self, name: str) -> str:
        """The name, or if it is taken the name and `+2`, `+3` …, which sort behind it."""
        taken = {path.name for path in self.complete()}
        candidates = (name, *(f"{name}+{i}" for i in range(2, len(taken) + 3)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def point(self, link: str, checkpoint: Path) -> None:
        """Make `last` or `best` a link to a checkpoint, atomically."""
        temporary = self.run / f".{link}.incomplete"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.relative_to(self.run))
        os.replace(temporary, self.run / link)
        sync(self.run)

    def target(self, link: str) -> Path | None:
        """The checkpoint that `last` or `best` points at, None if there is none."""
        path = self.run / link
        return self.run / path.readlink() if path.is_symlink() and path.exists() else None

    def complete(self) -> list[Path]:
        """Checkpoints that were committed, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted(path for path in found if (path / CHECKSUMS).is_file() and not path.name.endswith(".incomplete"))

    def latest(self, clean: bool = True) -> Path | None:
        """The newest complete checkpoint; with `clean` what an interrupted save left behind is removed."""
        if clean and self.folder.is_dir():
            for leftover in (*self.folder.glob("*.incomplete"), *self.folder.glob(".*.replaced")):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in self.run.glob(".*.incomplete"):
                leftover.unlink()
        if clean:
            for leftover in self.run.glob(".*.partial"):
                leftover.unlink()
        return self.complete()[-1] if self.complete() else None

    def _prune(self) -> None:
        complete = self.complete()
        kept = {path.name for path in (self.target("last"), self.target("best"), *complete[-self.keep_last :]) if path}
        for path in complete:
            if path.name in kept:
                continue
            # Renamed first: a checkpoint that was half deleted must not look complete.
            doomed = path.with_name(f"{path.name}.incomplete")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def checkpoint_name(step: int, segments: int = 0) -> str:
    """A name whose order is the run's order; `segments` counts those accumulated towards the next step."""
    return f"step-{step:08d}" + (f"-{segments:04d}" if segments else "")


def _seal(folder: Path) -> None:
    """Flush every file to disk and write the checksums, whose presence marks the checkpoint as complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {}
    for path in files:
        sync(path)
        if path.relative_to(folder).as_posix() in COMPANIONS:
            continue
        checksums[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    sync(folder / CHECKSUMS)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


GENERATION, LICENCE = "generation.json", "LICENSE"
COMPANIONS = (GENERATION, LICENCE)  # what goes with weights into every copy, and has no checksum: it is changed by hand
