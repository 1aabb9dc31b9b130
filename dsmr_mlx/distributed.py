"""Data parallel training: the lanes of one global batch divided among the processes of `mlx.launch`.

Every process walks the same lanes and takes its share of each batch; gradients are added once per step. Started
alone, a process is the only rank and nothing is sent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dsmr_mlx.errors import UserError


class RankLost(OSError):
    """Another process of the run is gone."""

    def __init__(self) -> None:
        super().__init__(0, "lost a process of this run; the last checkpoint is whole, --resume goes on from it")


class Ranks:
    """The processes that train together, and what they tell each other."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise `RankLost` when another rank goes away: MLX says so in the middle of some evaluation."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(word in str(error) for word in ("[ring]", "[mpi]", "[nccl]", "[jaccl]")):
                raise
            raise RankLost from None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

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
        total = mx.distributed.all_sum(message, group=self.group)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
        parts = [part.reshape(leaf.shape) for part, leaf in zip(mx.split(total, ends), leaves, strict=True)]
        return tree_unflatten(list(zip(names, parts, strict=True)))

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers added over all ranks, each with the precision of a double."""
        if self.size == 1:
            return list(values)
        # float32 is all that travels: a double goes as three parts whose sums lose nothing that matters
        parts = np.zeros((3, len(values)), np.float32)
        rest = np.asarray(values, np.float64)
        for row in parts:
            row[:] = rest
            rest = rest - row
        summed = mx.distributed.all_sum(mx.array(parts), group=self.group)
        return np.array(summed, np.float64).sum(axis=0).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total([float(flag)])[0] > 0

    def gather(self, array: mx.array) -> mx.array:
        """`[B / size, …]` of every rank, put together in the order of the lanes: `[B, …]`."""
        return array if self.size == 1 else mx.distributed.all_gather(array, group=self.group)
