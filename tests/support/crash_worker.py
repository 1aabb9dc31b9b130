"""Save checkpoints in forked processes that are killed at every write point in turn. Run by test_crash.py.

    python -m support.crash_worker FOLDER

It is a separate process because it forks, before which MLX must not compute anything. Prints the number of points.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from support.tiny import TOKENIZER, tiny_config

from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import CheckpointStore, checkpoint_name, verify_checkpoint

POINTS = [
    (os, "fsync"),
    (os, "replace"),
    (os, "symlink"),
    (os, "unlink"),
    (os, "mkdir"),
    (shutil, "rmtree"),
    (mx, "save_safetensors"),
]


def kill_at(n: int) -> Callable[[], bool]:
    """Arrange that this process is killed at write point n: before or after a call of a function in POINTS.

    Return a function that tells whether the point has not been reached.
    """
    passed, fsync = 0, os.fsync

    def point() -> None:
        nonlocal passed
        passed += 1
        if passed == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        def call(*args, **kwargs):
            point()
            result = function(*args, **kwargs)
            if function is not fsync:  # which changes nothing for a killed process
                point()
            return result

        return call

    for module, name in POINTS:
        setattr(module, name, watched(getattr(module, name)))
    return lambda: passed < n


def save(store: CheckpointStore, step: int) -> None:
    """Save a checkpoint of random weights; the one of step 2 is the best."""
    from dsmr_mlx import DSMR

    def write(folder: Path) -> None:
        mx.random.seed(step)
        model = DSMR(tiny_config().model_config(TOKENIZER))
        checkpoint.save_model(folder, model.config, model.parameters(), TOKENIZER)

    path = store.save(checkpoint_name(step), write)
    if step == 2:
        store.point("best", path)


def child(function: Callable[[], bool | None]) -> int:
    """Run a function in a forked process. Return its wait status: 1 if the function returns True."""
    pid = os.fork()
    if pid == 0:
        os._exit(1 if function() else 0)
    return os.waitpid(pid, 0)[1]


def crash(run: Path, n: int) -> bool:
    """Save two checkpoints, killed at write point n. Return whether there are fewer points."""
    unreached = kill_at(n)
    store = CheckpointStore(run, keep_last=1)
    for step in (2, 3):
        save(store, step)
    return unreached()


def inspect(run: Path) -> None:
    """Check what a resumed run finds: complete checkpoints, no partial files, and the next save works."""
    store = CheckpointStore(run, keep_last=1)
    store.remove_leftovers()
    latest = store.latest()
    assert latest is not None
    for path in store.complete():
        verify_checkpoint(path)
        checkpoint.load(path)
    checkpoint.load(run)
    assert not list(run.rglob("*.incomplete")), list(run.rglob("*"))
    save(store, 9)
    checkpoint.load(run / "last")
    assert store.target("last").name == checkpoint_name(9)


def main(folder: Path) -> None:
    """Try write points until one is not reached; then, as nothing is forked any more, inspect what each has left."""
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    n, first, status = 0, folder / "first", signal.SIGKILL
    assert child(lambda: save(CheckpointStore(first, keep_last=1), 1)) == 0
    while status == signal.SIGKILL:
        n += 1
        run = shutil.copytree(first, folder / str(n), symlinks=True)
        status = child(lambda run=run, n=n: crash(run, n))
    for point in range(1, n + 1):
        try:
            inspect(folder / str(point))
        except Exception as error:
            error.add_note(f"write point {point}")
            raise
    print(n)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
