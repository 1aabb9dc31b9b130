"""Which of several continuations the model itself finds best, and which of them run in circles.

The likelihood is that of the unsteered model at temperature 1, as generation draws from it: among the tokens that the
grammar and the limits allow. What a limit forces at the end then costs little, and a candidate is not judged by the
options that made it. It is given per note, so that long pauses and many short notes do not decide.

A low figure alone is no virtue, for nothing is as predictable as a loop: what loops comes last.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import Bounds, Limits, Played
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.music.loops import LOOPING_COPIES, Loop, worst_loop


@dataclass(frozen=True)
class Score:
    """What the model thinks of a continuation: nats in all, what they are spread over, and the worst loop, if any."""

    nats: float
    tokens: int
    notes: int
    loop: Loop | None

    @property
    def nats_per_note(self) -> float:
        """Infinite without a note."""
        return self.nats / self.notes if self.notes else float("inf")

    @property
    def loops(self) -> bool:
        """Whether a cycle comes too often in a row for music, `LOOPING_COPIES` times."""
        return self.loop is not None and self.loop.copies >= LOOPING_COPIES

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"nats_per_note": self.nats_per_note if self.notes else None, "loops": self.loops}


def token_nats(player: Player, ids: np.ndarray, limits: Limits | None = None) -> np.ndarray:
    """What each of `ids` `[T]` would cost a player if they came next, float64 `[T]` in nats.

    That is −ln of its probability among what the grammar allows, and the limits that the music was made with. The
    player's first lane is asked, and left as it is; one that has heard nothing is at the beginning of a piece. Read
    segment by segment. Raises `UserError` for an id that is not allowed where it stands.
    """
    ids, walk, model = np.asarray(ids, np.int64), player.walk, player.model
    state, logits, played = start_of(player)
    bounds = bounds_of(player, limits or Limits(may_end=player.tokenizer.eos_id is not None), played)
    nats, done = np.zeros(len(ids)), 0
    while done < len(ids):
        n = min(state.segment_room if done else 1, len(ids) - done)
        chunk = ids[done : done + n]
        if done:
            hidden, state = model.advance(mx.array(ids[None, done - 1 : done + n - 1]), state)
            logits = model.logits(hidden)[0]  # (n, V)
        after = walk.after_each(played, chunk)
        moments, played = after.take(range(n)), after.take([n])
        possible = mx.where(walk.allowed(moments, bounds), logits.astype(mx.float32), -mx.inf)
        chosen = mx.take_along_axis(possible, mx.array(chunk)[:, None], axis=-1)[:, 0]
        nats[done : done + n] = np.array(mx.logsumexp(possible, axis=-1) - chosen)
        mx.eval(state.arrays)
        done += n
    if (wrong := np.flatnonzero(np.isinf(nats))).size:
        raise UserError(f"ids: {walk.tokenizer.tokens[ids[wrong[0]]]} may not stand at index {wrong[0]}")
    return nats


def start_of(player: Player) -> tuple[RecurrentState, mx.array, Played]:
    """What a player's first lane is: the state, the logits `[1, V]`, what has been played."""
    if player.logits is None and player.position == 0:
        player.read(np.empty(0, np.int64))
    if player.logits is None:
        raise UserError(f"player: nothing can follow its {player.position} tokens, the learned positions are used up")
    return player.state.take([0]), player.logits[:1], player.heard.take([0]).played


def bounds_of(player: Player, limits: Limits, played: Played) -> Bounds:
    """The limits of a player's first lane, which has `played` this."""
    since = limits.since and limits.since[:1]
    return player.walk.bounds(replace(player.within_positions(limits), since=since), played)


def score(player: Player, ids: np.ndarray, limits: Limits) -> Score:
    """The score of a continuation `ids` `[T]`; arguments and errors as in `token_nats`.

    A closing EOS counts where it may stand, not where a pause before it was cut off.
    """
    ids, walk = np.asarray(ids, np.int64), player.walk
    if len(ids) and ids[-1] in walk.ending:
        played = start_of(player)[2]
        after = walk.after_each(played, ids[:-1]).take([len(ids) - 1])
        bounds = bounds_of(player, limits, played)
        ids = ids if walk.allowed(after, bounds)[0, int(ids[-1])].item() else ids[:-1]
    notes = walk.tables.notes
    nats = token_nats(player, ids, limits)
    return Score(float(nats.sum()), len(ids), int(notes[ids].sum()), worst_loop(ids, notes))


def best(scores: Sequence[Score], n: int) -> list[int]:
    """The numbers of the n best, the best first: those that do not loop, by nats per note; then those that do."""
    return sorted(range(len(scores)), key=lambda i: (scores[i].loops, scores[i].nats_per_note, i))[:n]
