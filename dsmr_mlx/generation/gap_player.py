"""Play a passage into a gap: from the last moment before the gap to exactly its end.

    … music | FILL | length | what follows | PLAY | the last music before the gap | the passage

A model that supports gaps is shown what follows a little before the gap, see `data.gaps.lead_in`, and again, with the
remaining length, before this leaves the longest memory horizon. A gap longer than those of training is played without
it until the rest is short enough. Candidates share the beginning and are played in one batch as long as possible, then
one after another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.gaps import MAX_EXCERPT, MAX_TICKS, MIN_EXCERPT, MIN_TICKS, lead_in
from dsmr_mlx.generation.foresight import between_moments, why_no_gaps
from dsmr_mlx.generation.generate import MAX_TOKENS_AT_ONCE, MAX_TOKENS_PER_SECOND, notes_of
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.gapped import GappedMusic
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.token_tables import NEVER

ROUNDING = 1e-6  # ticks


class Watch:
    """Progress and cancellation. `progress(done, total)` counts seconds of music; if `stop()` is true, passages end.

    gap: the one that is being filled, with the tokens of its lanes so far
    """

    gap: "GapPlayer"

    def __init__(
        self, progress: Callable[[float, float], None] | None = None, stop: Callable[[], bool] = lambda: False
    ):
        self.progress, self.stop = progress, stop
        self.tokens = self.state_bytes = 0
        self.done = self.total = 0.0

    def step(self, player: Player, lanes: int, seconds: float) -> None:
        """Count one token in each of `lanes` lanes, and the seconds of music that they played, summed over lanes."""
        self.tokens, self.state_bytes = self.tokens + lanes, player.nbytes
        self.done += seconds
        if self.progress:
            self.progress(min(self.done, self.total), self.total)


class Before(NamedTuple):
    """The music before a gap as events.

    events: `(T,)` int64, of the base vocabulary, up to the last moment before the gap, without special ids. As in
        training, time passes before anything else happens
    begin:  the first tick at which keys may be pressed or released
    held:   pairs (pitch, tick) of the keys that are down, and the tick of their release, at `begin` or later
    start:  the time of tick 0 in seconds
    """

    events: np.ndarray
    begin: int
    held: tuple[tuple[int, int], ...]
    start: float


def events_of(tokenizer: Tokenizer, notes: Notes) -> np.ndarray:
    """The events of notes, int64 `(T,)` without special ids; empty if there are no notes."""
    if not len(notes):
        return np.empty(0, np.int64)
    return tokenizer.to_events(tokenizer.without_special(tokenizer.encode_notes(notes)))


def before_gap(tokenizer: Tokenizer, music: GappedMusic) -> Before:
    """Return the music before the first gap. Raises `UserError` for a vocabulary without a clock."""
    grammar = clock_of(tokenizer)
    notes, gap_start = music.before, music.gaps[0][0]
    start = float(notes.onset[0]) if len(notes) else gap_start
    events = events_of(tokenizer, notes)
    elapsed = grammar.elapsed(events)
    later = grammar.timed_later.any()
    presses = elapsed[grammar.begins[events] if later else grammar.press[events] >= 0]
    begin = int(np.ceil((gap_start - start) / grammar.seconds_per_tick - ROUNDING))
    begin = max(begin, int(presses.max(initial=-1)) + 1)  # an onset just before the gap may be rounded into it
    known = events[elapsed < begin]
    n = complete(grammar, known)
    rest = slice(n, None if grammar.held else n)
    releases = grammar.release[events[rest]]
    held = zip(releases[releases >= 0].tolist(), elapsed[rest][releases >= 0].tolist(), strict=True)
    return Before(events[:n], begin, tuple(held), start)


def clock_of(tokenizer: Tokenizer) -> EventGrammar:
    """The grammar of a vocabulary's events. Raises `UserError` if it cannot fill gaps."""
    grammar = tokenizer.event_grammar()
    if grammar is None or not grammar.has_clock:
        raise UserError(f"tokenizer {tokenizer.label}: its tokens have no known duration, so it cannot fill gaps")
    if grammar.timed_later.any() and not (grammar.bar.any() and (grammar.position >= 0).any()):
        raise UserError(f"tokenizer {tokenizer.label}: it writes notes before their onsets, so it cannot fill gaps")
    return grammar


def ids_of(tokenizer: Tokenizer, events: np.ndarray) -> np.ndarray:
    """The ids of events, int64 `(T,)` without special ids."""
    return tokenizer.without_special(tokenizer.from_events(events)).astype(np.int64)


def complete(grammar: EventGrammar, events: np.ndarray) -> int:
    """The number of the events `(T,)` without a final pause, incomplete note or final velocity for later notes."""
    if grammar.timed_later.any():
        return grammar.complete_length(events)
    leads = (grammar.ticks > 0) | grammar.bar | (grammar.position >= 0)
    if grammar.running_velocity:
        leads = leads | (grammar.velocity >= 0)
    kept = np.flatnonzero(~leads[events])
    return int(kept[-1]) + 1 if len(kept) else 0


def check_lengths(tokenizer: Tokenizer, music: GappedMusic) -> None:
    """Raise `UserError` if a gap is too short for a vocabulary, or the music has drums and the vocabulary has none."""
    if DRUMS in music.notes.programs and not tokenizer.programs:
        raise UserError(f"`notes`: has drums, which {tokenizer.label} leaves out; expected music without drums")
    for i, (start, end) in enumerate(music.gaps):
        rest = GappedMusic(music.notes, music.gaps[i:])
        if not GapPlayer(tokenizer, rest, before_gap(tokenizer, rest)).has_room:
            tick = 1000 * clock_of(tokenizer).seconds_per_tick
            raise UserError(
                f"a gap from {start:g} to {end:g} s: too short for the vocabulary {tokenizer.label}, whose ticks last "
                f"{tick:g} ms"
            )


class Reader:
    """Reads the music before each gap as it is in the result: without what was shown, passages cut at the gaps' ends.

    player: the player that reads; events: those it has read so far
    gaps:   the number of gaps that it has read to; all music before the first gap is the prompt
    """

    def __init__(self, player: Player, events: np.ndarray | None = None, gaps: int = 0):
        self.player, self.gaps = player, gaps
        self.events = np.empty(0, np.int64) if events is None else events

    def branch(self, lane: int) -> "Reader":
        """Return a reader of one lane that has read the same."""
        return Reader(self.player.branch(1, lane=lane), self.events, self.gaps)

    def read_to(self, music: GappedMusic, progress: Callable[[int, int], None] | None = None) -> Before:
        """Read on to the first gap and return the music before it."""
        before = before_gap(self.player.tokenizer, music)
        if not np.array_equal(before.events[: len(self.events)], self.events):
            # Later notes have changed how the vocabulary writes a bar.
            self.player, self.events = self.player.restarted(), self.events[:0]
        self.gaps += 1
        self._read(before.events[: place_to_show(self.player.model, self.player.tokenizer, before, music)], progress)
        self._early, self._lead = self.player.copy(), before.events[len(self.events) :]
        self._read(before.events, progress)
        return before

    def shown(self, show: Callable[[Player, int], int]) -> tuple[Player, int]:
        """Return a copy of the player that has been shown what follows at the place for it, and what `show` returned.

        show(player, lead): shows it; lead: the number of tokens that the player then reads up to the gap.
        """
        player, lead = self._early.copy(), ids_of(self.player.tokenizer, self._lead)
        result = show(player, len(lead))
        player.read(lead, prompt=self.gaps == 1)
        return player, result

    def _read(self, events: np.ndarray, progress: Callable[[int, int], None] | None) -> None:
        """Read on to the end of `events`, which begin with those that have been read or are fewer."""
        new = events[len(self.events) :]
        if len(new) or not self.player.position:
            self.player.read(ids_of(self.player.tokenizer, new), progress, prompt=self.gaps == 1)
            self.events = events


def place_to_show(model: DSMR, tokenizer: Tokenizer, before: Before, music: GappedMusic) -> int:
    """The number of events after which a model is shown what follows the first gap, see `data.gaps.lead_in`.

    All of them if the model does not support gaps.
    """
    if why_no_gaps(model, tokenizer):
        return len(before.events)
    end = end_tick(tokenizer.event_grammar(), before, music)
    return lead_in(before.events, len(before.events), end)


def end_tick(grammar: EventGrammar, before: Before, music: GappedMusic) -> int:
    """The tick at which the first gap ends."""
    return int(np.floor((music.gaps[0][1] - before.start) / grammar.seconds_per_tick + ROUNDING))


@dataclass
class GapPlayer:
    """Fills the first gap of `music`, after the events `before` it.

    foresees: show what follows to models that support gaps

    A gap without a free tick stays empty: an onset just before it may be rounded into its only tick.

    lanes: the ids that each lane has played. The last may be a pause that passes the end
    ticks: the tick that each lane has reached, at most that of the end
    """

    tokenizer: Tokenizer
    music: GappedMusic
    before: Before
    watch: Watch = field(default_factory=Watch)
    foresees: bool = True

    def __post_init__(self) -> None:
        self.grammar = clock_of(self.tokenizer)
        self.tick = self.grammar.seconds_per_tick
        self.end = end_tick(self.grammar, self.before, self.music)
        self.lanes: list[list[int]] = []
        self.ticks: list[int] = []

    @property
    def has_room(self) -> bool:
        """Whether a note can begin in the gap."""
        return self.end > self.before.begin

    def play(self, reader: Reader) -> None:
        """Fill `lanes`, with copies of the player of a reader that has read to the gap."""
        player = reader.player
        self.watch.gap, self.lanes = self, [[] for _ in range(player.lanes)]
        self._walk, self._moment, self._begun = player.walk, player.moments[0], player.ticks[0]
        self.ticks = [self._begun] * player.lanes
        if not self.has_room:
            return
        player, unfinished, until = player.copy(), list(range(player.lanes)), NEVER
        if self._can_show(player):
            short = self.end - self._begun <= MAX_TICKS
            player, until = reader.shown(self._show) if short else (player, 0)
        if until:
            unfinished = self._together(player, until)
        for i in unfinished:
            self._alone(player.branch(1, lane=i), i, until)

    def notes(self, lane: int) -> Notes:
        """The notes that a lane has played so far, in the time of the piece. Held notes end now."""
        prompt = ids_of(self.tokenizer, self.before.events)
        notes = notes_of(self._walk, prompt, self._moment, np.array(self.lanes[lane], np.int64))
        return notes.shifted(self.before.start + self._begun * self.tick)

    def reached(self, lane: int) -> float:
        """The time of the piece that a lane has reached: it begins no note earlier."""
        return max(self.before.start + self.ticks[lane] * self.tick, self.music.gaps[0][0])

    def limits(self, now: int) -> Limits:
        """The limits from tick `now` of the player's clock."""
        left, tokens = self.end - now, NEVER
        if not self.grammar.held:
            tokens = MAX_TOKENS_AT_ONCE + round(MAX_TOKENS_PER_SECOND * left * self.tick)
        held = tuple((pitch, ticks - now) for pitch, ticks in self.before.held if ticks >= now)
        return Limits(ticks=left, tokens=tokens, since=(now,), silent=max(self.before.begin - now, 0), held=held)

    def _can_show(self, player: Player) -> bool:
        return self.foresees and not why_no_gaps(player.model, player.tokenizer)

    def _show(self, player: Player, lead: int = 0) -> int:
        """Show what follows. Return the position of the player at which it should be shown again.

        lead: the number of tokens that are read next, before the gap
        """
        reach = max(player.model.config.horizons)
        events = min(MAX_EXCERPT, max(MIN_EXCERPT, reach // 4))
        after = self.music.after.shifted(-(self.before.start + self.end * self.tick))
        begin = player.position
        shown = player.foresee(after, (self.end - player.ticks[0]) * self.tick, events)
        return begin + max(reach, 2 * (shown + lead))

    def _together(self, player: Player, until: int) -> list[int]:
        """Play all lanes to the end, at most up to the position `until`. Return the unfinished lanes."""
        before = np.array(player.ticks)
        going = before < self.end
        for step in player.play(self.limits(int(before[0]))) if player.position < until else ():
            now = np.array(player.ticks)
            passed = (np.minimum(now, self.end) - np.minimum(before, self.end))[going].sum()
            ended = np.isin(step, player.walk.ending)
            for i in np.flatnonzero(going):
                self.lanes[i].append(int(step[i]))
                self.ticks[i] = self.end if ended[i] else min(int(now[i]), self.end)
            self.watch.step(player, int(going.sum()), float(passed) * self.tick)
            going &= (now < self.end) & ~ended
            before = now
            if not going.any() or player.position >= until or self.watch.stop():
                break
        return [] if self.watch.stop() else np.flatnonzero(going).tolist()

    def _alone(self, player: Player, lane: int, again: int) -> None:
        """Play a lane to the end. What follows is shown, or shown again, at a pause after the position `again`."""
        ids = self.lanes[lane]
        foresees, first = self._can_show(player), player.walk.tables.events[:, 0]
        waits = self.grammar.ticks[np.maximum(first, 0)] > 0
        over = False
        while not over:
            over = True
            before, complete = player.ticks[0], between_moments(player.walk.tables, player.moments[0])
            for step in player.play(self.limits(before)):
                token, left = int(step[0]), self.end - before
                due = foresees and MIN_TICKS <= left <= MAX_TICKS and player.position > again
                if due and waits[token] and complete and before >= self.before.begin:
                    player.rewind(1)
                    again, over = self._show(player), False
                    break
                ids.append(token)
                self.ticks[lane] = self.end if token in player.walk.ending else min(player.ticks[0], self.end)
                self.watch.step(player, 1, float(min(player.ticks[0], self.end) - before) * self.tick)
                before, complete = player.ticks[0], between_moments(player.walk.tables, player.moments[0])
                if before >= self.end or token in player.walk.ending or self.watch.stop():
                    break
