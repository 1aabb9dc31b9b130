"""Hard limits: what these forbid does not happen, unless a prompt has brought the music where nothing else is possible.

They forbid to press, never to release: a key that the prompt holds outside a range can be let go.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.errors import UserError
from dsmr_mlx.grammar import PITCHES, Played
from dsmr_mlx.performance import Grammar
from dsmr_mlx.steering.base import Steering, at_key, at_token, per_lane, ticks_of, velocity_of
from dsmr_mlx.steering.pitches import pitch_classes_of_key


@dataclass(frozen=True)
class PitchRange(Steering):
    """Only keys from `low` to `high` are pressed, MIDI numbers, both included (60 is middle C)."""

    low: int = 0
    high: int = PITCHES - 1

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("low", 0 <= self.low < PITCHES, f"a MIDI pitch from 0 to {PITCHES - 1}")
        self.require("high", self.low <= self.high < PITCHES, f"a MIDI pitch from low = {self.low} to {PITCHES - 1}")

    def begin(self, tables: Grammar, ids: np.ndarray) -> mx.array:
        """`[1, V]` bool: what is forbidden."""
        self.require_events(tables.press >= 0, "pitches")
        return per_lane((tables.press >= 0) & ((tables.press < self.low) | (tables.press > self.high)))

    def __call__(self, logits: mx.array, played: Played, state: mx.array) -> mx.array:
        return mx.where(state, -mx.inf, logits)


@dataclass(frozen=True)
class PitchClasses(Steering):
    """Only keys of these pitch classes are pressed, 0 = C … 11 = B."""

    allowed: list[int]

    stage = "constraint"

    def __post_init__(self) -> None:
        if isinstance(self.allowed, Iterable) and not isinstance(self.allowed, str):
            object.__setattr__(self, "allowed", list(self.allowed))
        self.check_types()
        right = bool(self.allowed) and all(0 <= c < 12 for c in self.allowed)
        self.require("allowed", right, "at least one pitch class from 0 (C) to 11 (B)")
        object.__setattr__(self, "allowed", sorted(set(self.allowed)))

    @classmethod
    def key(cls, name: str) -> Self:
        """Those of a key or mode, such as "C major", "F# minor" or "D dorian"; see `pitches`."""
        return cls(pitch_classes_of_key(name))

    @classmethod
    def without(cls, avoided: Iterable[int]) -> Self:
        """All but these."""
        avoided = cls(avoided).allowed
        if len(avoided) == 12:
            raise UserError(f"avoided = {avoided}: expected at least one pitch class that is left")
        return cls([c for c in range(12) if c not in avoided])

    def begin(self, tables: Grammar, ids: np.ndarray) -> mx.array:
        """`[1, V]` bool: what is forbidden."""
        self.require_events(tables.press >= 0, "pitches")
        return per_lane((tables.press >= 0) & ~np.isin(tables.press % 12, self.allowed))

    def __call__(self, logits: mx.array, played: Played, state: mx.array) -> mx.array:
        return mx.where(state, -mx.inf, logits)


@dataclass(frozen=True)
class MaxPolyphony(Steering):
    """At most `keys` sound at a time: then no key is pressed until one is released."""

    keys: int

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("keys", self.keys >= 1, "at least 1")

    def begin(self, tables: Grammar, ids: np.ndarray) -> mx.array:
        """`[1, V]` bool: what presses a key."""
        self.require_events(tables.press >= 0, "pitches")
        return per_lane(tables.press >= 0)

    def __call__(self, logits: mx.array, played: Played, state: mx.array) -> mx.array:
        full = played.sounding.sum(axis=-1, keepdims=True) >= self.keys
        return mx.where(full & state, -mx.inf, logits)


class Loudness(NamedTuple):
    """What the ids mean; all bool."""

    velocity: mx.array  # [1, V], ids that set a velocity
    inside: mx.array  # [1, V], those that set one in the range
    bins: mx.array  # [1, bins], the velocity bins in the range
    press: mx.array  # [1, V]


@dataclass(frozen=True)
class VelocityRange(Steering):
    """Only velocities from `low` to `high` are set, MIDI numbers from 1 to 127, both included.

    While the velocity that the prompt has left is outside, one inside is set before a key is pressed. Raises
    `UserError` where the vocabulary's steps leave no velocity in the range.
    """

    low: int = 1
    high: int = 127

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("low", 1 <= self.low <= 127, "a MIDI velocity from 1 to 127")
        self.require("high", self.low <= self.high <= 127, f"a MIDI velocity from low = {self.low} to 127")

    def begin(self, tables: Grammar, ids: np.ndarray) -> Loudness:
        self.require_events(tables.velocity >= 0, "velocities")
        velocity = velocity_of(tables)
        inside = (velocity >= self.low) & (velocity <= self.high)
        if not inside.any():
            steps = ", ".join(f"{v:g}" for v in np.unique(velocity[~np.isnan(velocity)]))
            raise UserError(f"VelocityRange: {self.low} to {self.high} holds none of the velocities there are: {steps}")
        bins = np.isin(np.arange(tables.velocity.max() + 1), tables.velocity[inside])
        return Loudness(per_lane(tables.velocity >= 0), per_lane(inside), per_lane(bins), per_lane(tables.press >= 0))

    def __call__(self, logits: mx.array, played: Played, state: Loudness) -> mx.array:
        logits = mx.where(state.velocity & ~state.inside, -mx.inf, logits)
        running = mx.maximum(played.velocity, 0)[:, None]
        fits = mx.take_along_axis(state.bins, running, axis=1) & (played.velocity >= 0)[:, None]  # (n, 1)
        can_set = (state.inside & (logits > -mx.inf)).any(axis=-1, keepdims=True)
        return mx.where(~fits & can_set & state.press, -mx.inf, logits)


class HeldSince(NamedTuple):
    """What the ids mean, and since when keys sound; all int32."""

    press: mx.array  # [1, V], the pitch or −1
    release: mx.array  # [1, V], the pitch or −1
    ticks: mx.array  # [1, V]
    limit: mx.array  # [1], in ticks
    since: mx.array  # [1, 128], the ticks at which each key was pressed last; below 0: in the prompt


@dataclass(frozen=True)
class MaxNoteSeconds(Steering):
    """No key is held for more than `seconds`.

    From half of that time on a release is made likelier, by up to `nudge` nats. No pause goes past the moment when
    a key is due; then only keys that are due can be released, until none is left. Where a prompt ends with a key
    that is overdue, and the grammar asks for a pause before a release, the shortest one comes first.
    """

    seconds: float
    nudge: float = 3.0

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("seconds", self.seconds > 0, "more than 0")
        self.require("nudge", self.nudge >= 0, "0 or more")

    def begin(self, tables: Grammar, ids: np.ndarray) -> HeldSince:
        self.require_events(tables.release >= 0, "releases")
        self.require_events(tables.ticks > 0, "duration")
        ids = np.asarray(ids, np.int64)
        clock = np.cumsum(tables.ticks[ids]) if len(ids) else np.zeros(0, np.int64)
        pressed = tables.press[ids] >= 0
        since = np.zeros(PITCHES, np.int64)
        since[tables.press[ids][pressed]] = (clock - clock[-1])[pressed] if len(ids) else 0  # the last one counts
        limit = max(ticks_of(self.seconds, tables), 1)
        tables_of_ids = (per_lane(table, mx.int32) for table in (tables.press, tables.release, tables.ticks))
        return HeldSince(*tables_of_ids, per_lane(limit, mx.int32), per_lane(np.maximum(since, -(2**30)), mx.int32))

    def __call__(self, logits: mx.array, played: Played, state: HeldSince) -> mx.array:
        age = mx.where(played.sounding, played.ticks[:, None] - state.since, 0)  # (n, 128)
        limit = state.limit[:, None]
        due = age >= limit
        due_release = at_key(due, state.release) & (logits > -mx.inf)
        late = due.any(axis=-1, keepdims=True)
        too_long = state.ticks > mx.maximum(limit - age.max(axis=-1, keepdims=True), 1)
        forbidden = mx.where(
            due_release.any(axis=-1, keepdims=True), ~due_release, too_long | (late & (state.press >= 0))
        )
        ripeness = mx.clip(2 * age / limit - 1, 0, 1)
        return mx.where(forbidden, -mx.inf, logits + self.nudge * at_key(ripeness, state.release))

    def advance(self, state: HeldSince, token: mx.array, played: Played) -> HeldSince:
        pressed = mx.arange(PITCHES) == at_token(state.press, token)[:, None]
        return state._replace(since=mx.where(pressed, played.ticks[:, None], state.since))
