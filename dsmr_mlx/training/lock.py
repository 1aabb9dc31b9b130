"""One process at a time in a run's folder."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from dsmr_mlx.common.errors import UserError

FILE = ".lock"


class RunLock:
    """Holds a run's folder, made if need be, until it is left or the process ends, however it ends.

    Raises `UserError`, naming the process that holds it, if another one does.
    """

    def __init__(self, run: Path):
        self.run = run

    def __enter__(self) -> Self:
        self.run.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.run / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self.descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self.descriptor)
            raise UserError(f"{self.run}: process {holder} is training here, expected to be alone") from None
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(os.getpid()).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)
