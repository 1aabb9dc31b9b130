"""The grammar of a tokenizer while sampling: which ids may come next in each lane, given what it has played so far.

Everything stays in MLX arrays, so that no step waits for the host.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.gap_rules import GapBounds, GapRules, Kept
from dsmr_mlx.generation.pauses import to_longest
from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, UNCHANGED, token_tables

RELEASE_SECONDS, RELEASE_TOKENS = 3.0, 64  # how long the last notes may ring on after a limit; then all keys go up
AS_BEFORE, UP, DOWN = 0, 1, 2  # a key after an id
AFTER_THE_END = 5  # rank of PAD
GOING_ON, FINISHING, LATE = 0, 1, 2  # stages of a lane
MAY, PADS = 1, 2  # an id may follow a state: as a part of the music, or as padding after its end
ENDING_TOKENS = 5  # tokens of an ending besides the releases: a note that is due, a pause after it, EOS


class GrammarState(NamedTuple):
    """The grammar state of B lanes, int32 but for `sounding`.

    state:         `(B,)`, state of the `EventGrammar`; one that has ended does not change
    sounding:      `(B, 128)` bool, keys that are down; none if the vocabulary gives notes a length
    velocity:      `(B,)`, index of the last velocity, −1 before the first
    pending_pitch: `(B,)`, pitch of a note whose velocity or length is still to come, or −1
    phase:         `(B,)`, ticks since the bar began; without bars, since the piece began
    ticks:         `(B,)`, the clock: ticks since the piece began, through prompt, later reading and drawn tokens
    tokens:        `(B,)`, tokens since the piece began
    prompt_ticks:  `(B,)`, the clock at the end of the prompt
    """

    state: mx.array
    sounding: mx.array
    velocity: mx.array
    pending_pitch: mx.array
    phase: mx.array
    ticks: mx.array
    tokens: mx.array
    prompt_ticks: mx.array

    @property
    def new_ticks(self) -> mx.array:
        """Ticks since the end of the prompt, `(B,)`."""
        return self.ticks - self.prompt_ticks

    def take(self, lanes: Sequence[int]) -> Self:
        """The state with these lanes, in this order."""
        index = mx.array(list(lanes), mx.int32)
        return type(self)(*(mx.take(array, index, axis=0) for array in self))

    @classmethod
    def of(cls, moments: Iterable[Sequence], tokens: np.ndarray, prompt_ticks: np.ndarray) -> Self:
        """B moments, given field by field as in `Moments`, with two counters `(B,)`, as B lanes."""
        arrays = [np.asarray(array) for array in (*moments, tokens, prompt_ticks)]
        return cls(*(mx.array(array if array.dtype == bool else array.astype(np.int32)) for array in arrays))

    def moments(self) -> list[Moment]:
        """The moment of each lane."""
        sounding = np.array(self.sounding)
        columns = (self.state, self.velocity, self.pending_pitch, self.phase, self.ticks)
        rows = zip(sounding, *(column.tolist() for column in columns), strict=True)
        return [Moment(state, keys, *rest) for keys, state, *rest in rows]


@dataclass(frozen=True)
class Limits:
    """When a lane should end. After a limit it releases the keys that are down, in the model's own time.

    ticks:   ticks from now; all keys are released at most `RELEASE_SECONDS` later
    tokens:  tokens from now; the model has `RELEASE_TOKENS` more, then only releases follow, one per key
    room:    tokens in all, EOS included; when just enough are left, all keys are released at once
    may_end: whether the model may end the piece earlier
    since:   the clock, for all lanes or for each, from which `ticks`, `silent` and `held` count; None: now
    silent:  ticks in which no key is pressed or released
    held:    pairs (pitch, ticks) for keys that are down: each is released after exactly this many ticks

    If the vocabulary's EOS is unknown, the stream is cut after `tokens`.
    """

    ticks: int = NEVER
    tokens: int = NEVER
    room: int = NEVER
    may_end: bool = False
    since: tuple[int, ...] | None = None
    silent: int = 0
    held: tuple[tuple[int, int], ...] = ()


class Ends(NamedTuple):
    """Limits on the lanes' own counters, `(B,)` int32, so that one compiled step serves all of them.

    ticks, tokens: when a lane starts to release its keys
    last_tick:     when the last key must be released
    last_token:    the count from which only releases follow
    room:          tokens in all
    """

    ticks: mx.array
    tokens: mx.array
    last_tick: mx.array
    last_token: mx.array
    room: mx.array


class Bounds(NamedTuple):
    """`Limits` as arrays.

    may_end: scalar bool
    ends:    when lanes end; None without limits, which is faster
    gap:     the rules of a gap; None if there are none
    """

    may_end: mx.array
    ends: Ends | None = None
    gap: GapBounds | None = None


class GrammarWalk:
    """The grammar of a tokenizer as MLX tables, with its state transitions; `tables` is the same in NumPy.

    If a tokenizer's grammar is unknown, any id but PAD and BOS may come at any time, until EOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tables = t = token_tables(tokenizer)
        self.tokenizer, self.grammar = tokenizer, t.grammar
        ids, n_events = np.arange(tokenizer.vocab_size), (t.events >= 0).sum(axis=1)
        self.pad_id = tokenizer.pad_id or 0  # without PAD, id 0 is yielded; `has_ended` marks it as padding
        self.ending = known_ids(tokenizer.eos_id)
        specials = known_ids(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
        self.specials = np.union1d(specials, np.flatnonzero(n_events == 0))
        # Later ids are never allowed. They are left out of the draw, so that their number does not change the music.
        self.n_drawn = int(max([self.pad_id, *self.ending, *np.flatnonzero(t.allowed.any(axis=0))])) + 1
        self.release_ticks = round(RELEASE_SECONDS / t.grammar.seconds_per_tick)
        ended = ~t.grammar.allowed.any(axis=1)
        self.has_ended = mx.array(ended)  # (Q,)
        self.multi_event = bool((n_events > 1).any())

        # What an id requires of the state before it.
        self.allowed_after = mx.array(np.where(ended[:, None] & (ids == self.pad_id), PADS, t.allowed).astype(np.int8))
        # Conflicts with the keys s that are down: Σ s·silent + Σ (1 − s)·sounding = s·(silent − sounding) + Σ sounding.
        self.key_conflicts = mx.array((t.silent.astype(np.float32) - t.sounding).T)  # (128, V)
        self.n_sounding = mx.array(t.sounding.sum(axis=1).astype(np.float32))  # (V,)
        self.first_velocity = mx.array(np.where(t.first_velocity < 0, -2, t.first_velocity))  # −2: differs from any
        self.max_phase = mx.array(np.minimum(t.max_phase, NEVER).astype(np.int32))

        # The effects of an id, in as few gathers as possible; `advance` splits the columns of `effects`.
        state = np.where(ended[:, None], np.arange(len(ended))[:, None], t.next_state)  # (Q, V)
        effects = (np.broadcast_to(a, state.shape) for a in (state, t.velocity, t.pending_pitch, t.ticks, t.phase))
        self.effects = mx.array(np.stack(list(effects), axis=-1).astype(np.int32))  # (Q, V, 5)
        keys_after = np.select([t.released, t.pressed], [UP, DOWN], AS_BEFORE)  # (V, 128)
        self.keys_after = mx.array(keys_after.astype(np.int8))
        self.ticks, self.phase = mx.array(t.ticks), mx.array(t.phase)
        self.sets_pending_pitch = bool((t.pending_pitch >= 0).any())

        # Kinds of ids, (V,) bool, and numbers of keys, (V,) int32; the end and what announces it are final.
        self.is_end = mx.array(np.isin(ids, self.ending))
        announces = False if t.grammar.announces is None else t.contains(t.grammar.announces)
        self.not_final = mx.array(~(np.isin(ids, self.ending) | announces))
        self.ends_in_velocity = mx.array(t.ends_in_velocity)
        # After a limit, while keys are down, rank first releases and short pauses (`fading_ticks`), then ids that press
        # a key whose velocity is already set. No vocabulary with releases has bars.
        fades = t.fades & ~np.isin(ids, self.ending)
        self.fading_ticks = mx.array(np.where(fades & (t.ticks > 0), t.ticks - 1, NEVER).astype(np.int32))
        is_brief = (t.notes <= 1) & ~t.takes_time & ~t.ends_in_velocity
        completing = np.where(np.isin(ids, self.ending), 0, np.where(is_brief & self.multi_event, 2, 1))
        releases = fades & t.released.any(axis=1) & ~t.takes_time
        self.finishing_rank = mx.array(np.where(releases, 4, completing).astype(np.int32))
        self.presses_and_waits = mx.array((t.notes > 0) & t.takes_time)
        # The number of keys that are down before it if all are down after it and it ends in a velocity.
        self.down_before_all = mx.array(np.where(t.ends_in_velocity, PITCHES - t.net_presses, NEVER).astype(np.int32))
        self.due = mx.array(t.net_presses + t.ends_in_velocity)  # tokens needed later, to press or release keys

    @cached_property
    def gap_rules(self) -> GapRules:
        """The rules for filling gaps, made on first use."""
        return GapRules(self.tables)

    def check(self, limits: Limits) -> None:
        """Raise `UserError` for limits that this vocabulary does not support."""
        label = self.tokenizer.label
        if limits.ticks < NEVER and not self.grammar.has_clock:
            reason = "its tokens have no known duration"
            raise UserError(f"tokenizer {label}: {reason}, expected `tokens` instead of `seconds`")
        if not all(0 <= pitch < PITCHES for pitch, _ in limits.held):
            raise UserError(f"`held` {limits.held}: expected pitches from 0 to {PITCHES - 1}")
        if limits.may_end and self.tokenizer.eos_id is None:
            raise UserError(f"tokenizer {label}: its EOS is unknown, expected `tokens` without `may_end`")

    def bounds(self, limits: Limits, music: GrammarState) -> Bounds:
        """The limits counted from `music`. Without an EOS, those on tokens are left out, see `Limits`."""
        ends = self.tokenizer.eos_id is not None
        ticks, tokens = np.array(music.ticks, np.int64), np.array(music.tokens, np.int64)
        ticks = ticks if limits.since is None else np.full_like(ticks, limits.since)
        max_ticks = min(limits.ticks, NEVER)
        max_tokens, room = (min(limit, NEVER) if ends else NEVER for limit in (limits.tokens, limits.room))
        gap = GapBounds.of(ticks, limits.silent, limits.held) if limits.silent or limits.held else None
        if gap is None and min(max_ticks, max_tokens, room) == NEVER:
            return Bounds(mx.array(limits.may_end))
        counts = Ends(
            ticks=ticks + max_ticks,
            tokens=tokens + max_tokens,
            last_tick=ticks + max_ticks + self.release_ticks,
            last_token=tokens + max_tokens + RELEASE_TOKENS,
            room=tokens + room,
        )
        counts = Ends(*(mx.array(np.minimum(c, NEVER).astype(np.int32)) for c in counts))
        return Bounds(mx.array(limits.may_end), counts, gap)

    def begin(self, ids: np.ndarray) -> GrammarState:
        """The state of one lane after the prompt `ids` `(T,)`. PAD, BOS, EOS and what is shown have no effect."""
        empty = GrammarState.of([[value] for value in beginning(self.grammar)], np.zeros(1), np.zeros(1))
        music = self.read(empty, ids)
        return music._replace(prompt_ticks=music.ticks)

    def read(self, music: GrammarState, ids: np.ndarray) -> GrammarState:
        """The state after all lanes have read `ids` `(T,)`. PAD, BOS, EOS and what is shown have no effect.

        Equal to `advance` T times, computed at once; ended lanes are reopened.
        """
        ids = self.tokenizer.without_shown(np.asarray(ids, np.int64))
        ids = ids[~np.isin(ids, self.specials)]
        if not len(ids):
            return music
        after = [self.tables.after_all(moment, ids) for moment in self.reopened(music).moments()]
        return GrammarState.of(zip(*after, strict=True), np.array(music.tokens) + len(ids), music.prompt_ticks)

    def before_each(self, music: GrammarState, ids: np.ndarray) -> GrammarState:
        """The states of one lane before each of `ids` `(T,)`, neither PAD nor BOS, and after the last: T + 1 lanes."""
        (before,) = music.moments()
        tokens = music.tokens.item() + np.arange(len(ids) + 1)
        return GrammarState.of(
            self.tables.moments(before, ids), tokens, np.full(len(tokens), music.prompt_ticks.item())
        )

    def check_open(self, music: GrammarState, ids: np.ndarray) -> None:
        """Raise `UserError` if nothing may follow `ids` `(T,)`, after which the state is `music`."""
        if not self.allowed(music, self.bounds(Limits(), music)).any(axis=-1).all().item():
            raise UserError(f"`prompt`: nothing may follow its last id, {ids[-1]}; expected music that can go on")

    def keys_fit(self, music: GrammarState) -> mx.array:
        """`(B, V)` bool: keys that an id presses are up, keys that it releases are down."""
        return music.sounding.astype(mx.float32) @ self.key_conflicts + self.n_sounding == 0

    def ticks_taken(self, music: GrammarState) -> mx.array:
        """`(B, V)` int32, or `(1, V)` if it is always the same: the ticks that each id would take."""
        return ticks_taken(self.ticks, self.phase, music) if self.grammar.bar_ticks else self.ticks[None]

    def allowed(self, music: GrammarState, bounds: Bounds) -> mx.array:
        """`(B, V)` bool: the ids that may come next; at least one in every lane, and only PAD after the end.

        An id that presses keys never passes the limit on ticks, because its notes could begin after it; and none
        presses more keys than there is room to release. If a limit falls into silence, EOS may follow any id:
        `generate.finish` removes what is incomplete.
        """
        after, held = self.allowed_after[music.state], self.grammar.held
        down = music.sounding.sum(axis=-1, keepdims=True) if held else mx.array([[0]], mx.int32)
        may = self._fit(after == MAY, down, music)
        going_on = may & (self.not_final | ((down == 0) & bounds.may_end))
        if bounds.ends is None:
            return going_on | (after == PADS)
        rank = mx.where(after == PADS, AFTER_THE_END, self._rank(may, going_on, down, music, bounds.ends))
        return (rank > 0) & (rank == rank.max(axis=-1, keepdims=True))

    def _fit(self, may: mx.array, down: mx.array, music: GrammarState) -> mx.array:
        """The ids of `may` `(B, V)` that fit the keys that are down, `(B, 1)`, the velocity and the bar."""
        g = self.grammar
        if g.held:
            may = may & self.keys_fit(music)
        if g.running_velocity:
            may = may & (self.first_velocity != music.velocity[:, None]) & (self.down_before_all != down)
        if g.bar_ticks:
            may = may & (self.max_phase >= music.phase[:, None])
        return may

    def _rank(self, may: mx.array, going_on: mx.array, down: mx.array, music: GrammarState, ends: Ends) -> mx.array:
        """`(B, V)` int32: an id may come if no other ranks higher; 0: it may not come.

        may, going_on: the ids that the grammar allows, and those of them that do not need a limit; down: `(B, 1)`
        """
        stage, rank, finishing = self._stage(down[:, 0], music, ends)[:, None], going_on, self.is_end
        if self.multi_event:
            too_late = self.presses_and_waits & (self.ticks_taken(music) > (ends.ticks - music.ticks)[:, None])
            room = (ends.room - ENDING_TOKENS - music.tokens)[:, None] - down
            rank = mx.where(rank, mx.where(too_late | ((self.due > 1) & (self.due > room)), 1, 2), 0)
        if self.grammar.held:
            # `fading_ticks` is one less than the ticks, so that `NEVER` is never in time.
            in_time = self.fading_ticks < (ends.last_tick - music.ticks)[:, None]
            fading = mx.where(in_time, mx.where(stage == LATE, 3, 4), self.finishing_rank)
            finishing = mx.where(down == 0, self.is_end, mx.where(may, fading, 0))
        return mx.where(stage == GOING_ON, rank, finishing)

    def _stage(self, down: mx.array, music: GrammarState, ends: Ends) -> mx.array:
        """`(B,)`: the stage of each lane: `GOING_ON`, `FINISHING`, or `LATE`, in which releases come before pauses;
        down: `(B,)` or `(1,)`, the number of keys that are down.
        """
        out_of_room = music.tokens + down >= ends.room - ENDING_TOKENS  # only the ending fits
        finishing = (music.ticks >= ends.ticks) | (music.tokens >= ends.tokens) | out_of_room
        late = (music.tokens >= ends.last_token) | out_of_room
        return mx.where(finishing, mx.where(late, LATE, FINISHING), GOING_ON)

    def possible(self, logits: mx.array, music: GrammarState, bounds: Bounds) -> mx.array:
        """Logits `(B, V)` that are −inf unless the grammar, the limits and the rules of a gap allow the id.

        A pause that would pass the release of a held key gives its probability to the pause until then.
        """
        may = self.allowed(music, bounds)
        if bounds.gap is None:
            return mx.where(may, logits, -mx.inf)
        taken = self.ticks_taken(music)
        fits, too_long = self.gap_rules.fits(taken, music.ticks, music.sounding, bounds.gap)
        result = mx.where(unless_empty(may & fits, may), logits, -mx.inf)
        lost = mx.where(may & too_long & self.gap_rules.pause, logits, -mx.inf)
        return to_longest(result, lost, self.gap_rules.pause, taken)

    def kept(self, music: GrammarState, bounds: Bounds) -> Kept | None:
        """The restrictions of a gap; None without a gap, and in vocabularies that give notes a length."""
        if bounds.gap is None or not self.grammar.held:
            return None
        taken = self.ticks_taken(music)
        return self.gap_rules.kept(taken, music.ticks, music.sounding, bounds.gap, bounds.ends.ticks)

    def advance(self, music: GrammarState, tokens: mx.array) -> GrammarState:
        """The state after one more token `(B,)` in each lane."""
        state, velocity, pitch, ticks, phase = self.effects[music.state, tokens].T
        keys = self.keys_after[tokens]
        passed = ticks
        if self.grammar.bar_ticks:
            passed = mx.where(phase < 0, ticks, ticks + phase - music.phase)
            phase = mx.where(phase < 0, music.phase + ticks, phase)
        now = music.ticks + passed
        if self.sets_pending_pitch:
            pitch = mx.where(pitch == UNCHANGED, music.pending_pitch, pitch)
        return GrammarState(
            state=state,
            sounding=mx.where(keys == AS_BEFORE, music.sounding, keys == DOWN),
            velocity=mx.where(velocity >= 0, velocity, music.velocity),
            pending_pitch=pitch if self.sets_pending_pitch else music.pending_pitch,
            phase=phase if self.grammar.bar_ticks else now,
            ticks=now,
            tokens=music.tokens + 1,
            prompt_ticks=music.prompt_ticks,
        )

    def reopened(self, music: GrammarState) -> GrammarState:
        """The state with ended lanes reset to a beginning, for music that goes on after an end."""
        ended, g = self.has_ended[music.state], self.grammar
        phase = mx.where(ended, g.first_phase, music.phase) if g.bar_ticks else music.phase
        return music._replace(state=mx.where(ended, g.start, music.state), phase=phase)


def unless_empty(mask: mx.array, fallback: mx.array) -> mx.array:
    """`mask` `(B, V)` bool, but `fallback` in lanes where it is all false."""
    return mx.where(mask.any(axis=-1, keepdims=True), mask, fallback)


def ticks_taken(ticks: mx.array, phase: mx.array, music: GrammarState) -> mx.array:
    """`(B, V)` int32: the ticks that each id would take; `ticks`, `phase`: of `TokenTables`, `(V,)` or `(1, V)`.

    An id with a phase ≥ 0 moves to that place in the bar, so the ticks depend on how long the bar has lasted.
    """
    return ticks + mx.where(phase < 0, 0, phase - music.phase[:, None])


def known_ids(*ids: int | None) -> np.ndarray:
    """The ids that are not None, int64."""
    return np.array([i for i in ids if i is not None], np.int64)
