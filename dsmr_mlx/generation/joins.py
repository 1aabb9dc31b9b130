"""Rank passages in gaps by two likelihoods: of the passage given the music before it, and of what follows given both.

Both are conditioned on the past only, without what was shown: a model that has seen what follows finds it likely after
any passage. So candidates of models without gap support are ranked in the same way.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.generation.gap_player import Before, complete, events_of, ids_of
from dsmr_mlx.generation.grammar import ENDING_TOKENS, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.ranking import Score, token_nats
from dsmr_mlx.music.gapped import GappedMusic, joined
from dsmr_mlx.music.loops import worst_loop
from dsmr_mlx.music.notes import Notes

FOLLOWING_SECONDS = 4.0  # of the following music that is scored


@dataclass(frozen=True)
class JoinScore:
    """The score of a passage, and of the first seconds that follow it; None if nothing follows."""

    passage: Score
    following: Score | None

    @property
    def nats_per_note(self) -> float:
        """Nats per note of the passage, plus nats per note of what follows; infinite for an empty passage."""
        return self.passage.nats_per_note + (self.following.nats_per_note if self.following else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values."""
        following = None if self.following is None else asdict(self.following) | {"loop": None}
        return {"passage": self.passage.to_dict(), "following": following}


def rank(candidates: Sequence[Sequence[JoinScore]], n: int) -> list[int]:
    """The indices of the n best candidates, best first, loops last. Each candidate has a score for every gap."""

    def key(i: int) -> tuple:
        scores = candidates[i]
        return any(s.passage.loops for s in scores), sum(s.nats_per_note for s in scores) / max(len(scores), 1), i

    return sorted(range(len(candidates)), key=key)[:n]


def first_seconds(after: Notes, end: float, seconds: float = FOLLOWING_SECONDS) -> Notes:
    """The notes that begin in the first seconds after the end of a gap, at least those with the first onset."""
    if not len(after):
        return after
    return after.take(after.onset <= max(end + seconds, float(after.onset[0])))


def score_passage(player: Player, music: GappedMusic, before: Before, passage: Notes) -> JoinScore:
    """The score of a passage in the first gap of some music.

    player: one lane that has read only `before`; it reads the passage and the first seconds after it, as far as learned
    positions reach. The cost of what follows is infinite if it is beyond them. Raises `UserError` as
    `ranking.token_nats` does.
    """
    tokenizer, g = player.tokenizer, player.walk.grammar
    end = music.gaps[0][1]
    following = first_seconds(music.after, end)
    scored = joined(music.before, music.fitted(passage), following)
    events = events_of(tokenizer, scored)
    start = float(scored.onset[0]) if len(scored) else before.start  # an opening may begin late in its gap
    elapsed, last = g.elapsed(events), (end - start) / g.seconds_per_tick
    n, split = len(before.events), complete(g, events[elapsed < np.floor(last + 1e-6)])
    if not np.array_equal(events[:n], before.events):  # later notes have changed how the vocabulary writes a bar
        n = min(complete(g, events[elapsed < before.begin]), split)
        player = player.restarted()
        player.read(ids_of(tokenizer, events[:n]))
    split = max(split, n)
    presses = np.flatnonzero(g.press[events] >= 0)
    until = int(np.searchsorted(elapsed, elapsed[presses[-1]], side="right")) if len(presses) else len(events)
    parts = ids_of(tokenizer, events[n:split]), ids_of(tokenizer, events[split:until] if len(following) else events[:0])
    scores = []
    for ids in parts:
        ids = ids[: fitting(player, ids)]
        scores.append(score_ids(player, ids))
        player.read(ids)
    return JoinScore(scores[0], scores[1] if len(following) else None)


def fitting(player: Player, ids: np.ndarray) -> int:
    """How many of `ids` `(T,)` a player can read before the model's learned positions, if any, force an ending."""
    table, walk = player.model.config.max_positions, player.walk
    if table is None or not len(ids):
        return len(ids)
    down = walk.before_each(player.decode_state.music.take([0]), ids).sounding.sum(axis=-1)[:-1]
    needed = np.arange(len(ids)) + np.array(down) + ENDING_TOKENS + int(walk.due.max().item())
    too_late = np.flatnonzero(needed >= table + 1 - player.position)
    return int(too_late[0]) if len(too_late) else len(ids)


def score_ids(player: Player, ids: np.ndarray) -> Score:
    """The score of `ids` `(T,)` after what a player has read, without an ending."""
    notes = player.walk.tables.notes
    nats = token_nats(player, ids, Limits()) if len(ids) else np.zeros(0)
    return Score(float(nats.sum()), len(ids), int(notes[ids].sum()), worst_loop(ids, notes))
