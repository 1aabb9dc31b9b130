"""The last one or two segments of a stream, token by token: what a player needs to rewind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dsmr_mlx.generation.next_token import DecodeState, NextToken, TokenOrigin


class Snapshot(NamedTuple):
    """The decoding state where a segment begins."""

    position: int
    state: DecodeState


@dataclass
class History:
    """The tokens since the first snapshot.

    snapshots: one or two, where the previous and the current segment begin (one at position 0 in a new stream)
    position:  tokens in the whole stream
    tokens:    those from the first snapshot on, an array `(1,)` or `(B,)` each
    origins:   the origin of each token
    """

    snapshots: list[Snapshot]
    position: int = 0
    tokens: list[mx.array] = field(default_factory=list)
    origins: list[TokenOrigin] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The position of the first token that is kept."""
        return self.snapshots[0].position

    def copy(self) -> "History":
        """An independent history of the same tokens."""
        return History(list(self.snapshots), self.position, list(self.tokens), list(self.origins))

    def to_arrays(self, rows: int, lanes: int) -> dict[str, mx.array]:
        """The history as named arrays, see `from_arrays`; tokens and their origins have `rows` rows, at least all."""
        first, last = self.snapshots[0], self.snapshots[-1]
        tokens, origins = np.zeros((rows, lanes), np.int32), np.zeros(rows, np.uint8)
        for row, token in zip(tokens[: len(self.tokens)], self.tokens, strict=True):
            row[:] = np.array(token)
        origins[: len(self.origins)] = [origin.value for origin in self.origins]
        positions = np.array([self.position, first.position, last.position], np.int64)
        arrays = {"tokens": mx.array(tokens), "origins": mx.array(origins), "positions": mx.array(positions)}
        for name, state in (("first", first.state), ("last", last.state)):
            arrays |= {f"{name}.{place}": leaf for place, leaf in tree_flatten(state)}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, mx.array], states: Sequence[DecodeState]) -> Self:
        """The history that `to_arrays` stored; states: those of its first and its last snapshot."""
        position, first, last = arrays["positions"].tolist()
        snapshots = [Snapshot(*pair) for pair in zip((first, last), states, strict=True)]
        tokens, origins = (np.array(arrays[name])[: position - first] for name in ("tokens", "origins"))
        return cls(
            snapshots if last > first else snapshots[:1],
            position,
            [mx.array(row) for row in tokens],
            [TokenOrigin(value) for value in origins.tolist()],
        )

    def take(self, lane: int, n: int) -> "History":
        """The history of one lane, n times."""
        snapshots = [Snapshot(position, state.take([lane] * n)) for position, state in self.snapshots]
        tokens = [token if len(token) == 1 else token[lane : lane + 1] for token in self.tokens]
        return History(snapshots, self.position, tokens, list(self.origins))

    def ends(self, lanes: Sequence[np.ndarray]) -> bool:
        """Whether these are the ids `(T,)` of each lane, as far as they are remembered."""
        if len(lanes) != self.snapshots[-1].state.lanes or {len(lane) for lane in lanes} != {self.position}:
            return False
        last = np.stack(lanes, axis=1)[self.start :]  # (remembered, B)
        return all((row == np.array(token)).all() for row, token in zip(last, self.tokens, strict=True))

    def begun_with(self, lanes: Sequence[np.ndarray], next_token: NextToken) -> "History":
        """The history of the same tokens, read as a prompt, `(T,)` for each lane, with other sampling."""
        states = [
            DecodeState.joined([next_token.begin(lane[: snapshot.position]) for lane in lanes])
            for snapshot in self.snapshots
        ]
        positions = [snapshot.position for snapshot in self.snapshots]
        read = [o if o is TokenOrigin.SHOWN else TokenOrigin.PROMPT for o in self.origins]
        return History(
            [Snapshot(*pair) for pair in zip(positions, states, strict=True)], self.position, list(self.tokens), read
        )

    def append(self, token: mx.array, origin: TokenOrigin) -> None:
        """Append one token, `(1,)` or `(B,)`."""
        self.tokens.append(token)
        self.origins.append(origin)
        self.position += 1

    def extend(self, ids: np.ndarray, origins: Sequence[TokenOrigin], snapshots: Sequence[Snapshot]) -> None:
        """Append `ids` `(T,)`, the same in all lanes, and where each comes from, with snapshots of the segments that
        begin among them.
        """
        self.snapshots = [*self.snapshots, *snapshots][-2:]
        first = max(self.start - self.position, 0)
        self.tokens += [mx.array([token]) for token in ids[first:].tolist()]
        self.origins += origins[first:]
        self.position += len(ids)
        self._trim()

    def add_snapshot(self, state: DecodeState) -> None:
        """Begin a segment at the current position, and forget what lies before the previous one."""
        self.snapshots = [*self.snapshots, Snapshot(self.position, state)][-2:]
        self._trim()

    def _trim(self) -> None:
        excess = len(self.tokens) - (self.position - self.start)
        del self.tokens[:excess], self.origins[:excess]

    def state_at(self, position: int, next_token: NextToken) -> DecodeState:
        """The decoding state at an earlier position, not before `start`: replayed from the snapshot before it."""
        begin, state = next(snapshot for snapshot in reversed(self.snapshots) if snapshot.position <= position)
        replayed = slice(begin - self.start, position - self.start)
        for token, origin in zip(self.tokens[replayed], self.origins[replayed], strict=True):
            state = next_token.follow(state, token, origin)
        return state

    def truncate(self, position: int) -> tuple[mx.array, TokenOrigin]:
        """Forget everything from `position` on. Return the first token that is forgotten and its origin."""
        kept = position - self.start
        token, origin = self.tokens[kept], self.origins[kept]
        del self.tokens[kept:], self.origins[kept:]
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.position <= position]
        self.position = position
        return token, origin
