"""Data-parallel training: the lanes of one global batch are divided among the processes of `mlx.launch`.

Every process walks the same lanes and takes its share of each batch; gradients are summed once per step. Rank 0 does
file I/O and logging. A process started alone is the only rank, and nothing is sent.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_regular

PART = 1 << 28  # bytes of a message, because MLX counts them as int32
LOST = "lost a process of this run; it can be resumed from the last checkpoint"


class RankLost(OSError):
    """Raised if another process of the run is lost."""

    def __init__(self) -> None:
        super().__init__(0, LOST)


class Ranks:
    """The processes of a run and their communication. A method that one rank calls must be called by all.

    timeout: seconds to wait for the other ranks before they are considered lost; MLX does not always raise an error.
    on_lost: called with the reason right before the process ends, from another thread.
    """

    def __init__(self, timeout: float = 300.0, on_lost: Callable[[str], None] = lambda reason: None) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.timeout = timeout
        self.on_lost = on_lost

    @property
    def is_main(self) -> bool:
        """Whether this rank does file I/O and logging."""
        return self.rank == 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise `RankLost` if another rank is lost, which MLX reports as an error of some evaluation."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(word in str(error) for word in ("[ring]", "[mpi]", "[nccl]", "[jaccl]")):
                raise
            raise RankLost from None

    @contextmanager
    def together(self, patient: bool = False) -> Iterator[None]:
        """Raise an error on all ranks if it is raised on one; `patient`: wait for rank 0 without a timeout."""
        raised: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            raised = error
        if self.any(raised is not None, patient):
            raise raised or UserError("another process of this run failed; see its message")

    def share(self, lanes: int) -> slice:
        """Return this rank's lanes of the global batch. Raises `UserError` if they cannot be divided evenly."""
        if lanes % self.size:
            raise UserError(f"batch_size = {lanes}: expected a multiple of the {self.size} processes")
        each = lanes // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, tree: Any) -> Any:
        """Return a tree of float32 arrays summed over all ranks, sent as one message."""
        if self.size == 1:
            return tree
        names, leaves = zip(*tree_flatten(tree), strict=True)
        message = mx.concatenate([leaf.reshape(-1) for leaf in leaves])
        total = self._received(mx.distributed.all_sum(message, group=self.group))
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
        parts = [part.reshape(leaf.shape) for part, leaf in zip(mx.split(total, ends), leaves, strict=True)]
        return tree_unflatten(list(zip(names, parts, strict=True)))

    def total(self, values: Sequence[float], patient: bool = False) -> list[float]:
        """Return numbers summed over all ranks in double precision; `patient`: wait for rank 0 without a timeout."""
        if self.size == 1:
            return list(values)
        # Only float32 can be sent: each double is split into three float32 parts, of 24 bits each.
        parts = np.zeros((3, len(values)), np.float32)
        rest = np.asarray(values, np.float64)
        for row in parts:
            row[:] = rest
            rest = rest - row
        summed = self._received(mx.distributed.all_sum(mx.array(parts), group=self.group), patient)
        return np.array(summed, np.float64).sum(axis=0).tolist()

    def any(self, flag: bool, patient: bool = False) -> bool:
        """Return whether the flag is set on any rank; `patient`: wait for rank 0 without a timeout."""
        return self.total([float(flag)], patient)[0] > 0

    def gather(self, array: mx.array) -> mx.array:
        """Concatenate the `(B / size, …)` arrays of all ranks, in the order of the lanes. Return `(B, …)`."""
        return array if self.size == 1 else self._received(mx.distributed.all_gather(array, group=self.group))

    def from_main(self, data: bytes) -> bytes:
        """Return rank 0's bytes on every rank; other machines need not have its files. They are sent in parts."""
        if self.size == 1:
            return data
        (length,) = self.total([len(data) if self.is_main else 0])
        parts = []
        for start in range(0, int(length), PART):
            size = min(PART, int(length) - start)
            message = np.frombuffer(data, np.uint8, size, start) if self.is_main else np.zeros(size, np.uint8)
            total = self._received(mx.distributed.all_sum(mx.array(message), group=self.group))
            parts.append(np.array(total).tobytes())
        return b"".join(parts)

    def read(self, path: Path) -> bytes:
        """Return the content of a file of rank 0 on every rank; other ranks need not have it."""
        with self.together():
            content = read_regular(path) if self.is_main else b""
        return self.from_main(content)

    def agree(self, **values: str) -> None:
        """Raise `UserError` on every rank if one has another value than rank 0, with both values."""
        theirs = json.loads(self.from_main(json.dumps(values).encode()))
        with self.together():
            for name, mine in values.items():
                if mine != theirs[name]:
                    raise UserError(f"{name}: process {self.rank} has {mine}, process 0 has {theirs[name]}")

    def _received(self, array: mx.array, patient: bool = False) -> mx.array:
        """Evaluate a collective operation; end the process if the other ranks do not answer in time."""
        timer = threading.Timer(self.timeout, self._give_up)
        timer.daemon = True
        if self.is_main or not patient:
            timer.start()
        try:
            mx.eval(array)
        finally:
            timer.cancel()
        return array

    def _give_up(self) -> None:
        """Report the loss and exit at once, because a thread that waits in MLX cannot be interrupted."""
        self.on_lost(LOST)
        os._exit(1)
