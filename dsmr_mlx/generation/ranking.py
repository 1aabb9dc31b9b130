"""Rank continuations by the model's own likelihood, those that loop last.

The likelihood is that of the model without processors, at temperature 1, among the tokens that the grammar and the
limits allow. So a forced ending costs little, and the sampling options of a candidate do not count. It is divided by
the notes, so that long pauses and many short notes do not dominate. Loops come last: nothing is as predictable.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import Bounds, GrammarState, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.music.loops import LOOPING_COPIES, Loop, worst_loop


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a continuation in nats, its tokens and notes, and its worst loop, if any."""

    nats: float
    tokens: int
    notes: int
    loop: Loop | None

    @property
    def nats_per_note(self) -> float:
        """Nats divided by notes; infinite without notes."""
        return self.nats / self.notes if self.notes else float("inf")

    @property
    def loops(self) -> bool:
        """Whether a cycle is repeated at least `LOOPING_COPIES` times in a row."""
        return self.loop is not None and self.loop.copies >= LOOPING_COPIES

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values."""
        return asdict(self) | {"nats_per_note": self.nats_per_note if self.notes else None, "loops": self.loops}


def token_nats(player: Player, ids: np.ndarray, limits: Limits | None = None) -> np.ndarray:
    """The cost of each of `ids` `(T,)` if they came next in a player's first lane, float64 `(T,)` in nats.

    That is −ln of its probability among the ids that the grammar and the limits allow. The limits are those that the
    music was made with. The player is not changed; an empty one is at the beginning of a piece. Evaluated segment by
    segment. Raises `UserError` for an id that is not allowed at its place.
    """
    ids, walk, model = np.asarray(ids, np.int64), player.walk, player.model
    state, logits, music, bounds = _start(player, limits or Limits(may_end=player.tokenizer.eos_id is not None))
    nats, done = np.zeros(len(ids)), 0
    while done < len(ids):
        n = min(state.segment_room if done else 1, len(ids) - done)  # the player's logits are those of the first id
        chunk = ids[done : done + n]
        if done:
            fed = ids[None, done - 1 : done + n - 1]  # the ids before those of the chunk, which they predict
            hidden, state = model.advance(mx.array(fed), state)
            logits = model.logits(hidden)[0]  # (n, V)
        before = walk.before_each(music, chunk)  # n + 1 lanes
        lanes, music = before.take(range(n)), before.take([n])
        possible = walk.possible(logits.astype(mx.float32), lanes, bounds)
        chosen = mx.take_along_axis(possible, mx.array(chunk)[:, None], axis=-1)[:, 0]
        nats[done : done + n] = np.array(mx.logsumexp(possible, axis=-1) - chosen)
        mx.eval(state.arrays)
        done += n
    if (wrong := np.flatnonzero(np.isinf(nats))).size:
        raise UserError(f"`ids`: {walk.tokenizer.tokens[ids[wrong[0]]]} is not allowed at index {wrong[0]}")
    return nats


def _start(player: Player, limits: Limits) -> tuple[RecurrentState, mx.array, GrammarState, Bounds]:
    """The recurrent state, logits `(1, V)`, grammar state and bounds of a player's first lane."""
    if player.logits is None and player.position == 0:
        player.read(np.empty(0, np.int64))
    if player.logits is None:
        raise UserError(f"`player`: nothing can follow its {player.position} tokens, the learned positions are used up")
    music = player.decode_state.music.take([0])
    bounds = player.bounds(replace(limits, since=limits.since and limits.since[:1]), music)
    return player.state.take([0]), player.logits[:1], music, bounds


def score(player: Player, ids: np.ndarray, limits: Limits) -> Score:
    """The score of a continuation `ids` `(T,)`; arguments and errors as in `token_nats`.

    A closing EOS counts if it is allowed there, which it is not if a pause before it was cut off.
    """
    ids, walk = np.asarray(ids, np.int64), player.walk
    if len(ids) and ids[-1] in walk.ending:
        _, _, music, bounds = _start(player, limits)
        before_end = walk.before_each(music, ids[:-1]).take([len(ids) - 1])
        ids = ids if walk.allowed(before_end, bounds)[0, int(ids[-1])].item() else ids[:-1]
    notes = walk.tables.notes
    nats = token_nats(player, ids, limits)
    return Score(float(nats.sum()), len(ids), int(notes[ids].sum()), worst_loop(ids, notes))


def best(scores: Sequence[Score], n: int) -> list[int]:
    """The indices of the n best scores, best first: those without loops by nats per note, then those with loops."""
    return sorted(range(len(scores)), key=lambda i: (scores[i].loops, scores[i].nats_per_note, i))[:n]
