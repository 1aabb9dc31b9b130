"""Constraints: what they forbid does not happen, unless the prompt leaves no other possibility.

They forbid pressing keys, never releasing them: a key that the prompt holds outside a range can be released.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.pauses import only_waits
from dsmr_mlx.generation.steering.base import (
    Constraint,
    PedalRule,
    Steering,
    TickCosts,
    at_key,
    at_token,
    leaves_velocity,
    max_ticks,
    per_lane,
    presses,
    sets_velocity,
)
from dsmr_mlx.generation.steering.pitches import pitch_classes_of_key
from dsmr_mlx.generation.steering.spans import holds_of
from dsmr_mlx.generation.verdicts import Verdict
from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables

KEYS = mx.array(np.arange(PITCHES, dtype=np.int32))


@dataclass(frozen=True)
class PitchRange(Constraint):
    """Only keys from `low` to `high` are pressed: MIDI numbers, both included (60 is middle C)."""

    low: int = 0
    high: int = PITCHES - 1

    def __post_init__(self) -> None:
        self.check_types()
        expected = f"MIDI pitches 0 ≤ low ≤ high ≤ {PITCHES - 1}"
        self.require("low", 0 <= self.low < PITCHES, expected)
        self.require("high", self.low <= self.high < PITCHES, expected)

    def begin(self, tables: TokenTables, ids: np.ndarray) -> mx.array:
        """The ids that are forbidden, `(1, V)` bool."""
        self.require_events(presses(tables), "pitches")
        pitch = np.arange(PITCHES)
        return per_lane(tables.presses[:, (pitch < self.low) | (pitch > self.high)].any(axis=1))

    def judge(self, music: GrammarState, state: mx.array) -> Verdict:
        """See `Constraint.judge`."""
        return Verdict(~state)


@dataclass(frozen=True)
class PitchClasses(Constraint):
    """Only keys of these pitch classes are pressed, 0 = C … 11 = B."""

    allowed: list[int]

    def __post_init__(self) -> None:
        if isinstance(self.allowed, Iterable) and not isinstance(self.allowed, str):
            object.__setattr__(self, "allowed", list(self.allowed))
        self.check_types()
        valid = bool(self.allowed) and all(0 <= c < 12 for c in self.allowed)
        self.require("allowed", valid, "at least one pitch class from 0 (C) to 11 (B)")
        object.__setattr__(self, "allowed", sorted(set(self.allowed)))

    @classmethod
    def key(cls, name: str) -> Self:
        """The pitch classes of a key or mode, such as "C major", "F# minor" or "D dorian"; see `pitches`."""
        return cls(pitch_classes_of_key(name))

    @classmethod
    def without(cls, avoided: Iterable[int]) -> Self:
        """All pitch classes but these. Raises `UserError` if none is left."""
        avoided = cls(avoided).allowed
        if len(avoided) == 12:
            raise UserError(f"avoided = {avoided}: expected at least one remaining pitch class")
        return cls([c for c in range(12) if c not in avoided])

    def begin(self, tables: TokenTables, ids: np.ndarray) -> mx.array:
        """The ids that are forbidden, `(1, V)` bool."""
        self.require_events(presses(tables), "pitches")
        return per_lane(tables.presses[:, ~np.isin(np.arange(PITCHES) % 12, self.allowed)].any(axis=1))

    def judge(self, music: GrammarState, state: mx.array) -> Verdict:
        """See `Constraint.judge`."""
        return Verdict(~state)


class VelocityIds(NamedTuple):
    """The effect of the ids on the velocity; all bool."""

    outside: mx.array  # (1, V), ids that set a velocity outside the range
    inside: mx.array  # (1, V), ids that set one in the range before they press a key
    bins: mx.array  # (1, bins), the velocities in the range
    press: mx.array  # (1, V), ids that press a key before they set a velocity


@dataclass(frozen=True)
class VelocityRange(Steering):
    """Only velocities from `low` to `high` are set, MIDI numbers from 1 to 127, both included.

    If the velocity at the end of the prompt is outside, one inside is set before a key is pressed. `begin` raises
    `UserError` if the vocabulary has no velocity in the range.
    """

    low: int = 1
    high: int = 127

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        expected = "MIDI velocities 1 ≤ low ≤ high ≤ 127"
        self.require("low", 1 <= self.low <= 127, expected)
        self.require("high", self.low <= self.high <= 127, expected)

    def begin(self, tables: TokenTables, ids: np.ndarray) -> VelocityIds:
        """See `Processor.begin`."""
        self.require_events(sets_velocity(tables), "velocities")
        g = tables.grammar
        bins = (g.velocities >= self.low) & (g.velocities <= self.high)
        if not bins.any():
            steps = ", ".join(f"{v:g}" for v in g.velocities)
            raise UserError(
                f"VelocityRange: {self.low} to {self.high} contains none of the vocabulary's velocities: {steps}"
            )
        outside = tables.contains((g.velocity >= 0) & ~bins[g.velocity])
        too_early = presses_first(tables)
        return VelocityIds(*map(per_lane, (outside, sets_velocity(tables) & ~outside & ~too_early, bins, too_early)))

    def __call__(self, logits: mx.array, music: GrammarState, state: VelocityIds) -> mx.array:
        logits = mx.where(state.outside, -mx.inf, logits)
        running = mx.maximum(music.velocity, 0)[:, None]
        fits = mx.take_along_axis(state.bins, running, axis=1) & (music.velocity >= 0)[:, None]  # (B, 1)
        can_set = (state.inside & (logits > -mx.inf)).any(axis=-1, keepdims=True)
        return mx.where(~fits & can_set & state.press, -mx.inf, logits)


def presses_first(tables: TokenTables) -> np.ndarray:
    """Ids that press a key before they set a velocity, if velocities apply to later notes, `(V,)` bool."""
    g, real = tables.grammar, tables.events >= 0
    pressed = np.cumsum((g.press >= 0)[tables.events] & real, axis=1) > 0
    set_before = np.cumsum((g.velocity >= 0)[tables.events] & real, axis=1) > 0
    return (pressed & ~set_before).any(axis=1) & g.running_velocity


class HeldSince(NamedTuple):
    """The meaning of the ids, and when keys were pressed; int32 unless bool."""

    pedal: PedalRule | tuple[()]
    long: mx.array  # (1, V) bool, ids of a note that is too long, or that hold a key for too long themselves
    press: mx.array  # (1, V) bool, ids that press a key, or after which one must be pressed
    pause: mx.array  # (1, V) bool, ids that let time pass and do nothing else
    release: mx.array  # (1, V), the pitch that the first event of an id releases, or −1
    only: mx.array  # (1, V) bool, ids that release keys and nothing else
    holds: mx.array  # (1, V, 2, R), the keys that an id presses and leaves down, or −1, and for how many ticks
    costs: TickCosts
    limit: mx.array  # (1,), in ticks
    since: mx.array  # (1, 128), the clock at which each key that is down was pressed


@dataclass(frozen=True)
class MaxNoteSeconds(Constraint):
    """No key is held for more than `seconds`.

    From half of that time on, its release gains up to `nudge` nats. No pause passes the time when a key is due; the
    longest pause that does not gets the probability of the longer ones. Then only due keys can be released, until none
    is left. If the prompt ends with an overdue key and the grammar needs a pause before a release, the shortest pause
    comes first. If the vocabulary gives notes a length, longer lengths are forbidden, and so is its pedal.

    Keys that a gap keeps down do not count, see `music.gapped`. Shorter notes mean more notes: each pause that is cut
    gives the model one more chance to press a key.
    """

    seconds: float
    nudge: float = 3.0

    limits_releases: ClassVar = True
    remembers: ClassVar = {"since": (-NEVER, NEVER)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("seconds", self.seconds > 0, "more than 0")
        self.require("nudge", self.nudge >= 0, "0 or more")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> HeldSince:
        """See `Processor.begin`."""
        g = tables.grammar
        self.require_events(g.held or (g.duration >= 0).any(), "releases")
        self.require_events(tables.takes_time, "duration")
        limit, holds = max_ticks(self.seconds, tables), holds_of(tables)
        first, press = tables.events[:, 0], presses(tables) | leaves_velocity(tables)
        releases = (first >= 0) & g.held & (g.release[first] >= 0)
        # A key that is due at the end of the id could not be released at once if the id had just pressed another.
        inside = g.held & (holds.longest > limit - press)
        too_long = tables.contains(g.duration > max(limit, g.duration[g.duration >= 0].min(initial=0)))
        blank = HeldSince(
            pedal=PedalRule.of(tables),
            long=per_lane(inside | too_long),
            press=per_lane(press),
            pause=per_lane(only_waits(tables)),
            release=per_lane(np.where(releases, g.release[first], -1), mx.int32),
            only=per_lane(releases & tables.fades & ~tables.takes_time),
            holds=per_lane(np.stack([holds.pitch, holds.age], axis=1), mx.int32),
            costs=TickCosts.of(tables),
            limit=per_lane(limit, mx.int32),
            since=per_lane(np.zeros(PITCHES), mx.int32),
        )
        return self.read(tables, blank, ids, [beginning(g)])

    def judge(self, music: GrammarState, state: HeldSince) -> Verdict:
        """See `Constraint.judge`."""
        age = mx.where(music.sounding, music.ticks[:, None] - state.since, -1)  # (B, 128)
        limit, oldest = state.limit[:, None], age.max(axis=-1, keepdims=True)
        left = limit - oldest
        waits, released = state.costs.ticks_taken(music), at_key(age, state.release)  # (B, V)
        too_long = (waits > mx.maximum(left, 1)) | (state.press & (waits >= left))
        forbidden = state.long | ((oldest >= 0) & too_long)
        if state.pedal:
            forbidden = forbidden | state.pedal.forbidden(music)
        return Verdict(
            fits=~forbidden,
            first=(released >= limit) & state.only,
            gain=self.nudge * mx.clip(2 * released / limit - 1, 0, 1),
            pause=state.pause,
            waits=waits,
        )

    def advance(self, state: HeldSince, token: mx.array, music: GrammarState) -> HeldSince:
        """See `Processor.advance`."""
        holds, since = at_token(state.holds, token), state.since  # (B, 2, R)
        for pitch, age in zip(*(holds[:, i].T[:, :, None] for i in range(2)), strict=True):  # (B, 1) each
            since = mx.where(pitch == KEYS, music.ticks[:, None] - age, since)
        return state._replace(since=since)

    def read(self, tables: TokenTables, state: HeldSince, ids: np.ndarray, before: Sequence[Moment]) -> HeldSince:
        """See `Steering.read`."""
        pitch, age = np.array(state.holds)[0][ids].swapaxes(0, 1)  # (T, R)
        lanes = np.array(state.since)
        for since, moment in zip(lanes, before, strict=True):
            times = tables.moments(moment, ids).ticks[1:, None] - age
            since[pitch[pitch >= 0]] = times[pitch >= 0]  # if a key appears twice, the last counts
        return state._replace(since=mx.array(lanes))
