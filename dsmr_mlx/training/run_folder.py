"""Check whether a run may start in a folder, before anything is written or deleted."""

import shutil
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import contains, read_regular, write_atomically
from dsmr_mlx.common.folders import folder_content
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.checkpoint_folder import LICENCE, CheckpointStore
from dsmr_mlx.training import warm_start
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.lock import LOCK_FILE
from dsmr_mlx.training.run_record import METRICS_FILE


def _content(out: Path) -> list[Path]:
    """The paths in a folder, without the lock and the partial files of a killed run."""
    names = (LOCK_FILE, "*.partial", "*.incomplete")
    return [path for path in folder_content(out) if not any(map(path.match, names))] if out.exists() else []


def check_room(out: Path, resume: bool, force: bool) -> None:
    """Raise `UserError` if the folder is not empty, unless it is a run to resume or to replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: already exists and is a file, expected a folder for the run")
    if not _content(out):
        return
    if not (out / METRICS_FILE).is_file() and not CheckpointStore(out, keep_last=1).complete():
        raise UserError(f"{out}: not empty and not a training run, expected another folder")
    if not resume and not force:
        raise UserError(f"{out}: already exists; `resume` continues it, `force` starts anew")


def check_data(corpus: Corpus, out: Path, force: bool) -> None:
    """Raise `UserError` if `force` would delete the corpus."""
    if force:
        _check_kept("data", corpus.path, corpus.path, out)


def check_init(config: TrainConfig, corpus: Corpus, out: Path, resume: bool, force: bool) -> None:
    """Raise `UserError` for an unsuitable initial checkpoint, before anything is written or deleted."""
    resumes = resume and CheckpointStore(out, config.keep_last).latest()
    if config.init is None or resumes:
        return
    folder = warm_start.check(config, corpus)
    if force:
        _check_kept("init", config.init, folder, out)


def _check_kept(name: str, given: str | Path, folder: Path, out: Path) -> None:
    if contains(out, folder):
        raise UserError(f"`{name}` {given}: is in {out}, which `force` would delete; expected another `out`")


def empty(out: Path) -> None:
    """Delete what is in a folder, except the lock; last the file that marks it as a run, so that a start with `force`
    can be repeated if it is interrupted.
    """
    for path in sorted(_content(out), key=lambda path: path.name == METRICS_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def copy_licence(source: Path, target: Path) -> None:
    """Copy the licence of weights, if they have one, to what is derived from them."""
    if (source / LICENCE).is_file():
        write_atomically(target / LICENCE, read_regular(source / LICENCE))
