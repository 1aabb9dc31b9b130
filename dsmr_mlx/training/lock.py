"""A lock on a run's folder: one process at a time."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import lock

LOCK_FILE = ".lock"


class RunLock:
    """A context manager that locks a run's folder, creating it if necessary. The lock ends with the process at latest.

    Raises `UserError`, naming the process that holds the lock, if another one does.
    """

    def __init__(self, run: Path):
        self.run = run

    def __enter__(self) -> Self:
        self.run.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(self.descriptor)
        except BlockingIOError:
            holder = os.read(self.descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self.descriptor)
            raise UserError(f"{self.run}: the folder is locked by process {holder}") from None
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(os.getpid()).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)
