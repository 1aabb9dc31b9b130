"""Recurrent states, found by the ids that the model has read: to go on from any point without reading it all again.

A state is used only if the ids that it has read are a beginning of those that are wanted. So it is exact, whichever
take it came from, and whatever was undone since. Some are in memory; some, and those at the ends of takes, are in the
session's file as well.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.safetensors_header import parse_header
from dsmr_mlx.generation import player_file
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.horizons import model_reach
from dsmr_mlx.studio.models import LoadedModel
from dsmr_mlx.studio.store import Store

MEMORY_BYTES = 256 << 20  # of states in memory; the one used last is always kept
STRIDE = 1024  # tokens between two states that are kept in memory
STORED_STRIDE = 4096  # tokens between two that are stored as well

Progress = Callable[[int, int], None]  # (tokens read, tokens to read); may raise to interrupt


class Interrupted(Exception):
    """Raised to end work that is no longer wanted."""


class States:
    """The states of all models in memory, at most `memory` bytes. Used by one thread."""

    def __init__(self, memory: int = MEMORY_BYTES):
        self.memory = memory
        self._players: dict[tuple[str, bytes], Player] = {}  # by the model's key and the digest of the ids
        self._used: dict[tuple[str, bytes], int] = {}  # when each was used last
        self._uses = 0

    def now(self) -> int:
        """Return a time for `player_at`, after all uses so far."""
        self._uses += 1
        return self._uses

    def player_at(
        self,
        loaded: LoadedModel,
        ids: np.ndarray,
        store: Store | None = None,
        progress: Progress | None = None,
        *,
        ahead: bool = False,
        time: int | None = None,
    ) -> Player:
        """Return a player of one lane, without processors, that has read exactly `ids` `(T,)`, BOS included.

        It continues from the nearest state before. ahead: nobody waits, so read all of the music and leave states
        behind everywhere, also if `progress` interrupts; else only what the end depends on is read, if that is less.
        time: when its states count as used, None for now. States that were used later are not given up for them.
        """
        player = self._nearest(loaded, ids, store, time)
        begin, total = player.position, len(ids)
        in_parts = ahead or model_reach(loaded.model.config) >= total - begin
        while player.position < total:
            at = player.position
            until = min((at // STRIDE + 1) * STRIDE, total) if in_parts else total
            part = None if progress is None else lambda done, _, at=at: progress(at + done - begin, total - begin)
            player.read(ids[at:until], part)
            self.keep(loaded, player, ids[:until], store if until % STORED_STRIDE == 0 else None, time)
        return player.copy()

    def keep(
        self,
        loaded: LoadedModel,
        player: Player,
        ids: np.ndarray,
        store: Store | None = None,
        time: int | None = None,
    ) -> None:
        """Keep the state of a player of one lane, without processors, that has read `ids` `(T,)`.

        store: where to write it, too. time: see `player_at`.
        """
        digest = digest_of(ids)
        self._players[loaded.key, digest] = player.copy()
        self._use((loaded.key, digest), time)
        while len(self._players) > 1 and self.nbytes > self.memory:
            oldest = min(self._players, key=self._used.__getitem__)  # of several, the one that came first
            del self._players[oldest], self._used[oldest]
        if store is not None:
            store.save_state(loaded.key, digest, len(ids), packed(player, loaded))

    def forget_others(self, keys: set[str]) -> None:
        """Drop the states of all models but those with these keys: each state keeps its model in memory."""
        for key in [key for key in self._players if key[0] not in keys]:
            del self._players[key], self._used[key]

    def _use(self, key: tuple[str, bytes], time: int | None) -> None:
        self._used[key] = max(self._used.get(key, 0), self.now() if time is None else time)

    @property
    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return sum(player.nbytes for player in self._players.values())

    def _nearest(self, loaded: LoadedModel, ids: np.ndarray, store: Store | None, time: int | None) -> Player:
        """A player that has read as many of the first ids as any that is kept, or nothing."""
        in_memory = {(p.position, digest) for (key, digest), p in self._players.items() if key == loaded.key}
        stored = set() if store is None else {(n, digest) for n, digest in store.states(loaded.key)}
        matching = matches(ids, in_memory | stored)
        for digest in matching:
            if (loaded.key, digest) in self._players:
                self._use((loaded.key, digest), time)
                return self._players[loaded.key, digest].copy()
            if player := self._restored(loaded, digest, ids, store, time):
                return player
        return Player(loaded.model, loaded.tokenizer)

    def _restored(
        self, loaded: LoadedModel, digest: bytes, ids: np.ndarray, store: Store, time: int | None
    ) -> Player | None:
        """A player from the session's file, None if what is there is damaged; then it is removed."""
        data = store.state(loaded.key, digest)
        player = None if data is None else unpacked(data, loaded, ids)
        if player is None:
            store.drop_state(loaded.key, digest)
            return None
        self.keep(loaded, player, ids[: player.position], time=time)
        return player


def digest_of(ids: np.ndarray) -> bytes:
    """The SHA-256 of some ids."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).digest()


def matches(ids: np.ndarray, known: set[tuple[int, bytes]]) -> list[bytes]:
    """Return the digests of those pairs (length, digest) that are of a beginning of `ids`, the longest first."""
    data, found, done, hashed = np.ascontiguousarray(ids, "<i8").tobytes(), [], 0, hashlib.sha256()
    for length, digest in sorted(known, key=lambda pair: pair[0]):
        if not 0 < length <= len(ids):
            continue
        hashed.update(data[8 * done : 8 * length])
        done = length
        if hashed.digest() == digest:
            found.append(digest)
    return found[::-1]


def packed(player: Player, loaded: LoadedModel) -> bytes:
    """A player of one lane without processors as the bytes of a safetensors file with a checksum."""
    arrays, metadata = player.arrays(), {"format": player_file.FORMAT, "key": loaded.key}
    sha256 = player_file.checksum(player_file.to_bytes(arrays, metadata), metadata)
    return player_file.to_bytes(arrays, metadata | {"sha256": sha256})


def unpacked(data: bytes, loaded: LoadedModel, ids: np.ndarray) -> Player | None:
    """The player of `packed`; None if the bytes are not those of a player that has read the first of `ids`."""
    name = Path("state")
    try:
        arrays, metadata = load_arrays(name, data), parse_header(io.BytesIO(data), len(data), name)[1]
        recorded = metadata.pop("sha256", None)
        if metadata.get("key") != loaded.key or player_file.checksum(data, metadata) != recorded:
            return None
        player = Player(loaded.model, loaded.tokenizer)
        player.restore(arrays)
    except (UserError, ValueError, KeyError):
        return None
    right = player.lanes == 1 and player.position <= len(ids) and player.history.ends([ids[: player.position]])
    return player if right else None
