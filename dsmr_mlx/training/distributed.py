"""Data parallel training: the lanes of one global batch divided among the processes of `mlx.launch`.

Every process walks the same lanes and takes its share of each batch; gradients are added once per step. Rank 0 reads
and writes files and speaks. Started alone, a process is the only rank and nothing is sent.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dsmr_mlx.common.errors import UserError

LOST = "lost a process of this run; --resume goes on from the last checkpoint"


class RankLost(OSError):
    """Another process of the run is gone."""

    def __init__(self) -> None:
        super().__init__(0, LOST)


class Ranks:
    """The processes that train together, and what they tell each other. Whatever one calls, all must call.

    timeout: seconds that one waits for the others before it takes them for lost; MLX's own error does not always come
    on_lost: told why, from another thread, right before the process ends
    """

    def __init__(self, timeout: float = 300.0, on_lost: Callable[[str], None] = lambda reason: None) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.timeout = timeout
        self.on_lost = on_lost

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise `RankLost` when another rank goes away: MLX says so in the middle of some evaluation."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(word in str(error) for word in ("[ring]", "[mpi]", "[nccl]", "[jaccl]")):
                raise
            raise RankLost from None

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is refused on one rank is refused on all, instead of leaving the others waiting."""
        refused: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            refused = error
        if self.any(refused is not None):
            raise refused or UserError("another process of this run was refused; its message says why")

    def share(self, lanes: int) -> slice:
        """This rank's lanes of the global batch. Raises `UserError` if they cannot be divided evenly."""
        if lanes % self.size:
            raise UserError(f"batch_size = {lanes}: expected a multiple of the {self.size} processes")
        each = lanes // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, tree: Any) -> Any:
        """A tree of float32 arrays added over all ranks, in one message."""
        if self.size == 1:
            return tree
        names, leaves = zip(*tree_flatten(tree), strict=True)
        message = mx.concatenate([leaf.reshape(-1) for leaf in leaves])
        total = self._received(mx.distributed.all_sum(message, group=self.group))
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
        parts = [part.reshape(leaf.shape) for part, leaf in zip(mx.split(total, ends), leaves, strict=True)]
        return tree_unflatten(list(zip(names, parts, strict=True)))

    def total(self, values: Sequence[float], patient: bool = False) -> list[float]:
        """Numbers added over all ranks, each with the precision of a double; `patient`: however long it takes."""
        if self.size == 1:
            return list(values)
        # float32 is all that travels: a double goes as three parts whose sums lose nothing that matters
        parts = np.zeros((3, len(values)), np.float32)
        rest = np.asarray(values, np.float64)
        for row in parts:
            row[:] = rest
            rest = rest - row
        summed = self._received(mx.distributed.all_sum(mx.array(parts), group=self.group), patient)
        return np.array(summed, np.float64).sum(axis=0).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total([float(flag)])[0] > 0

    def gather(self, array: mx.array) -> mx.array:
        """`[B / size, …]` of every rank, put together in the order of the lanes: `[B, …]`."""
        return array if self.size == 1 else self._received(mx.distributed.all_gather(array, group=self.group))

    def from_main(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank: another machine need not have its files."""
        if self.size == 1:
            return data
        (length,) = self.total([len(data) if self.is_main else 0])
        message = np.zeros(int(length) + 1, np.uint8)
        if self.is_main:
            message[:-1] = np.frombuffer(data, np.uint8)
        return np.array(self._received(mx.distributed.all_sum(mx.array(message), group=self.group)))[:-1].tobytes()

    def agree(self, **values: str) -> None:
        """Raise `UserError` on every rank if one has another value than rank 0, naming both where they differ."""
        theirs = json.loads(self.from_main(json.dumps(values).encode()))
        with self.together():
            for name, mine in values.items():
                if mine != theirs[name]:
                    raise UserError(f"{name}: process {self.rank} has {mine}, process 0 has {theirs[name]}")

    def _received(self, array: mx.array, patient: bool = False) -> mx.array:
        """Evaluate what the others take part in; end the process if they do not answer in time."""
        timer = threading.Timer(self.timeout, self._give_up)
        timer.daemon = True
        if not patient:
            timer.start()
        try:
            mx.eval(array)
        finally:
            timer.cancel()
        return array

    def _give_up(self) -> None:
        """A thread stuck in MLX cannot be interrupted: say why and end the process as it is."""
        self.on_lost(LOST)
        os._exit(1)
