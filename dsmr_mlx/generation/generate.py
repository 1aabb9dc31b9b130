"""Generate music: read a prompt, then draw one token after another, in constant memory."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import ENDING_TOKENS, GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.prompts import prompt_ids
from dsmr_mlx.generation.recording import notes_after
from dsmr_mlx.generation.sampling import Processor, Sampling
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.keyboard import Keyboard, completed_notes, notes_played
from dsmr_mlx.tokenizers.token_tables import NEVER

MAX_SECONDS = 1_000_000
MAX_TOKENS_AT_ONCE, MAX_TOKENS_PER_SECOND = 1000, 500  # several times those of real music


class Note(NamedTuple):
    """A finished note; times in seconds since the prompt ended."""

    onset: float
    offset: float
    pitch: int
    velocity: int


@dataclass
class Variation:
    """One continuation: its ids `(T,)` with the closing EOS, without the prompt, and their notes."""

    ids: np.ndarray
    notes: Notes


@dataclass
class Statistics:
    """Numbers of tokens, wall times and the size of the recurrent state.

    prompt_tokens: tokens read; tokens: tokens drawn, in all lanes until their ends; decode_seconds: of drawing, and of
    scoring if candidates are ranked
    """

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn per second of `decode_seconds`, in all lanes together."""
        return self.tokens / max(self.decode_seconds, 1e-9)


@dataclass
class GenerationReport(Statistics):
    """Statistics and results of a generation."""

    variations: list[Variation] = field(default_factory=list)


def generate(
    model: DSMR,
    tokenizer: Tokenizer,
    *,
    prompt: np.ndarray | Notes | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    sampling: Sampling | None = None,
    processors: Sequence[Processor | Callable] = (),
    seed: int = 0,
    may_end: bool = False,
    as_notes: bool = False,
) -> Iterator[int] | Iterator[Note]:
    """Yield one continuation token by token, or with `as_notes` each `Note` when its key is released.

    prompt: ids or `Notes` to continue; None to begin a piece
    seconds, tokens: stop after this much new music, whichever comes first, and release the last keys. With neither,
        stop when the model ends the piece
    may_end: let the model end the piece earlier
    sampling, processors: see `dsmr_mlx.generation.sampling`
    seed: the same arguments give the same music

    The stream also ends, with all keys released, at the end of learned positions. Raises `UserError` for invalid
    arguments, such as a prompt longer than those positions, and while the stream runs if logits are NaN.

    A tokenizer that cannot decode notes needs `tokens`, and a prompt of ids unless its BOS is known. If its EOS is
    unknown, exactly `tokens` ids are yielded. `as_notes` needs a vocabulary with `EventGrammar.plays_keys`.
    """
    player = Player(model, tokenizer, sampling=sampling, processors=processors, seed=seed)
    if as_notes and not player.walk.grammar.plays_keys:
        reason = tokenizer.why_not or f"tokenizer {tokenizer.label}: its ids cannot be decoded one by one"
        raise UserError(f"`as_notes`: {reason}")
    limits = make_limits(tokenizer, seconds, tokens, may_end)
    prefill(player, prompt, limits)
    (before,) = player.moments
    stream = (int(step[0]) for step in player.play(limits))
    return finished_notes(stream, player.walk, before) if as_notes else stream


def generate_variations(
    model: DSMR,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    prompt: np.ndarray | Notes | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    sampling: Sampling | None = None,
    processors: Sequence[Processor | Callable] = (),
    seed: int = 0,
    may_end: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> GenerationReport:
    """Return n continuations of one prompt, which is read once; arguments as in `generate`.

    Variation i depends on the seed and i alone, up to the rounding of batched arithmetic. `progress(tokens, seconds of
    music)` is called after each token, for the slowest lane.
    """
    player = Player(model, tokenizer, n=n, sampling=sampling, processors=processors, seed=seed)
    limits = make_limits(tokenizer, seconds, tokens, may_end)
    started = time.perf_counter()
    ids = prefill(player, prompt, limits)
    before = player.moments[0]
    report = GenerationReport(prompt_tokens=len(ids), prefill_seconds=time.perf_counter() - started)
    steps = list(timed(player, player.play(limits), report, progress))
    lanes = np.stack(steps, axis=1) if steps else np.zeros((n, 0), np.int64)
    for lane in (finish(player.walk, lane) for lane in lanes):
        report.variations.append(Variation(lane, notes_of(player.walk, ids, before, lane)))
    return report


def timed(
    player: Player,
    steps: Iterable[np.ndarray],
    report: GenerationReport,
    progress: Callable[[int, float], None] | None = None,
    since: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the steps `(B,)` of a player, updating the report; `progress` as in `generate_variations`.

    The slowest lane is the slowest that has not ended. since: as in `Limits`.
    """
    started, going = time.perf_counter(), ~np.array(player.ended)
    start, seconds_per_tick = player.ticks if since is None else since, player.walk.grammar.seconds_per_tick
    for count, step in enumerate(steps, start=1):
        report.tokens += int(going.sum())
        report.decode_seconds = time.perf_counter() - started
        report.state_bytes = player.nbytes
        going &= ~np.isin(step, player.walk.ending)
        if progress:
            ticks = np.subtract(player.ticks, start)
            progress(count, float(ticks[going].min() if going.any() else ticks.max()) * seconds_per_tick)
        yield step


def make_limits(tokenizer: Tokenizer, seconds: float | None, tokens: int | None, may_end: bool) -> Limits:
    """The limits of `generate`. Raises `UserError` for an invalid length.

    A vocabulary that gives notes a length may start any number of notes at one time, so a limit on seconds needs one on
    tokens too.
    """
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"`seconds` {seconds}: expected more than 0 and at most {MAX_SECONDS:,}")
    if tokens is not None and tokens < 1:
        raise UserError(f"`tokens` {tokens}: expected at least 1")
    grammar, unlimited = tokenizer.event_grammar(), seconds is None and tokens is None
    per_second = 1 / grammar.seconds_per_tick if grammar else 100
    if seconds is not None and tokens is None and grammar and not grammar.held:
        tokens = MAX_TOKENS_AT_ONCE + round(MAX_TOKENS_PER_SECOND * seconds)
    return Limits(
        ticks=NEVER if seconds is None else max(round(seconds * per_second), 1),
        tokens=NEVER if tokens is None else min(tokens, NEVER),
        may_end=may_end or unlimited,
    )


def prefill(
    player: Player,
    prompt: np.ndarray | Notes | None,
    limits: Limits,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Read a prompt with a new player. Return its ids `(T,)`; `progress` as in `Player.read`.

    Raises `UserError`, before anything is computed, for invalid limits and if the prompt leaves no room for an end in
    the model's learned positions.
    """
    player.walk.check(limits)
    ids, table = prompt_ids(player.tokenizer, prompt), player.model.config.max_positions
    if table is not None:
        held = int(player.walk.begin(ids).sounding.sum().item())
        ending = 1 if player.tokenizer.eos_id is None else held + ENDING_TOKENS
        if table - len(ids) + 1 < ending:  # the last token drawn is not read
            raise UserError(
                f"`prompt`: {len(ids)} tokens, expected at most {max(table + 1 - ending, 0)}: "
                f"the model has {table} learned positions (max_positions)"
            )
    player.read(ids, progress)
    return ids


def notes_of(walk: GrammarWalk, prompt: np.ndarray, before: Moment, ids: np.ndarray) -> Notes:
    """The notes of a continuation `ids` `(T,)`, in seconds after its prompt `(T′,)`, which ended at `before`."""
    if walk.grammar.plays_keys:
        return notes_played(walk.grammar, walk.tables.flat(ids).tolist(), before)
    return notes_after(walk.tokenizer, prompt, ids)


def finish(walk: GrammarWalk, lane: np.ndarray) -> np.ndarray:
    """The ids `(T,)` of a lane up to its end, without a final pause or an incomplete note, then EOS, if there is one.

    If an id of several events is cut, its remaining events are encoded by other ids.
    """
    ends = np.flatnonzero(np.isin(lane, walk.ending))
    ids = lane[: ends[0]] if len(ends) else lane
    if not len(walk.ending):
        return ids
    events = walk.tables.flat(ids)
    n = walk.grammar.complete_length(events)
    until = np.cumsum((walk.tables.events[ids] >= 0).sum(axis=1))  # until[i]: events up to and including ids[i]
    kept = int(np.searchsorted(until, n, side="right"))  # ids of which all events remain
    rest = events[until[kept - 1] if kept else 0 : n]
    other = walk.tokenizer.from_events(rest) if len(rest) else rest
    return np.concatenate([ids[:kept], other[~np.isin(other, walk.specials)], walk.ending])


def finished_notes(stream: Iterator[int], walk: GrammarWalk, before: Moment) -> Iterator[Note]:
    """Yield notes from a stream of tokens when their keys are released; keys that were down `before` are left out."""
    keyboard, pressed, tick = Keyboard(walk.grammar, before), {}, walk.grammar.seconds_per_tick
    played = (keyboard.play(event) for token in stream for event in walk.tables.flat([token]).tolist())
    for events in chain(played, [keyboard.release_all()]):
        for start, end in completed_notes(events, pressed):
            yield Note(start.tick * tick, end.tick * tick, end.pitch, start.velocity)
