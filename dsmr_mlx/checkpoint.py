"""Checkpoints: folders that are complete by themselves, and appear complete or not at all.

    config.json           the model's configuration
    model.safetensors     its weights
    tokenizer/            its vocabulary
    training.*            what only a resumed run needs
    checksums.json        size and SHA-256 of every other file, written last; not of `bundled.BESIDE`

A run keeps them as `checkpoints/step-00001000`, and `last` and `best` are links to two of them.
"""

import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx import bundled, mistaken
from dsmr_mlx.config import ModelConfig
from dsmr_mlx.errors import UserError
from dsmr_mlx.files import read_json, sync
from dsmr_mlx.model import DSMR
from dsmr_mlx.tokenizer import FILE as TOKENIZER_FILE
from dsmr_mlx.tokenizer import Tokenizer, load_tokenizer

CHECKSUMS = "checksums.json"
PARTS = ("config.json", "model.safetensors", f"tokenizer/{TOKENIZER_FILE}")


def load(
    checkpoint: str | Path | None = None, dtype: mx.Dtype | None = None, *, as_stored: bool = False
) -> tuple[DSMR, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint folder, of a run's best checkpoint, or of a
    bundled model by its name; without a checkpoint of `bundled.DEFAULT`.

    dtype: what weights that are floats are cast to, and what the model computes in. None: on a CPU, which is several
        times slower with half precision, float32, which has the same values; elsewhere what is stored, float32,
        bfloat16 or float16
    as_stored: leave the weights as they are on a CPU, too

    Raises `UserError` that names the folder or file and what is wrong with it.
    """
    if dtype is None and not as_stored and mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    folder = resolve(checkpoint)
    config, tokenizer = describe(folder)
    model = DSMR(config)
    weights = load_arrays(folder / "model.safetensors")
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/model.safetensors: does not fit config.json ({reason})") from None
    if dtype is not None:
        model.set_dtype(dtype)
    return model.eval(), tokenizer


def describe(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a checkpoint folder, all of whose files are whole. See `load`."""
    verify(folder)
    config = ModelConfig.load(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return config, tokenizer


def save_model(folder: Path, model_config: ModelConfig, parameters: dict, tokenizer: Tokenizer) -> None:
    """Write what `load` reads into a folder; `parameters` is the model's parameter tree, quantized or not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model_config.to_json(), encoding="utf-8")
    save_arrays(folder / "model.safetensors", dict(tree_flatten(parameters)))
    tokenizer.save(folder / "tokenizer")


def weight_bytes(checkpoint: str | Path) -> int:
    """The size of a checkpoint's weights on disk, in bytes. Raises `UserError` if there is no checkpoint."""
    return (resolve(checkpoint) / "model.safetensors").stat().st_size


def resolve(checkpoint: str | Path | None) -> Path:
    """The checkpoint folder meant by a path or name: itself, the `best`, else the `last`, of a run, or that of a
    bundled model, see `bundled.located`.
    """
    path = bundled.located(checkpoint)
    if not path.is_dir():
        known = f", or a bundled model: {', '.join(bundled.names())}" if bundled.names() else ""
        hint = mistaken.no_checkpoint(path, bundled.names())
        raise UserError(f"{path}: {mistaken.kind(path)}, expected a checkpoint or a run{known}{hint}")
    for link in (path / "best", path / "last"):
        if link.is_symlink() or link.is_dir():
            return link
    if found := CheckpointStore(path, keep_last=1).complete():
        return found[-1]  # the run was killed before it could set its links
    missing = [part for part in PARTS if not (path / part).is_file()]
    if missing:
        unknown = f"not a checkpoint, {', '.join(missing)} missing, and not a run, no best or last in it"
        raise UserError(f"{path}: {mistaken.no_checkpoint_in(path) or unknown}")
    return path


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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file. Raises `OSError` if it cannot be written whole."""
    with path.open("wb") as file:
        mx.save_safetensors(file, arrays)


def load_arrays(path: Path, data: bytes | None = None) -> dict[str, mx.array]:
    """Read a safetensors file, or its content as `data`, whole: what MLX loads lazily follows changes of the file."""
    try:
        arrays = mx.load(str(path)) if data is None else mx.load(io.BytesIO(data), format="safetensors")
        mx.eval(arrays)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return arrays


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


def holds(folder: str | Path, path: str | Path) -> bool:
    """Whether a path is the folder or lies in it, by whatever links, or spelling where case does not matter."""
    folder, path = Path(folder), Path(path).resolve()
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))


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
        if path.relative_to(folder).as_posix() in bundled.BESIDE:
            continue
        checksums[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    sync(folder / CHECKSUMS)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)
