"""New music from a model: a prompt read segment by segment, then one token after another, in constant memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.errors import UserError
from dsmr_mlx.grammar import ENDING_TOKENS, NEVER, GrammarWalk, Limits, Played
from dsmr_mlx.midi import Notes
from dsmr_mlx.model import DSMR
from dsmr_mlx.performance import DEFAULT_BIN, bin_velocities
from dsmr_mlx.sampling import Sampling, draw, lane_keys, split_keys
from dsmr_mlx.state import RecurrentState
from dsmr_mlx.tokenizer import Tokenizer

MOST_SECONDS = 1_000_000
NO_TOKEN = -1  # where the model's predictions are NaN


class Note(NamedTuple):
    """A finished note; times in seconds since the generation began."""

    onset: float
    offset: float
    pitch: int
    velocity: int


@dataclass
class Variation:
    """One generated continuation: its ids `[T]` with the closing EOS, without the prompt."""

    ids: np.ndarray
    notes: Notes


@dataclass
class GenerationReport:
    """What it took: prompt tokens read, tokens drawn in all lanes, wall seconds, bytes of the recurrent state."""

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    state_bytes: int = 0
    variations: list[Variation] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.decode_seconds, 1e-9)


def generate(
    model: DSMR,
    tokenizer: Tokenizer,
    *,
    prompt: np.ndarray | Notes | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    may_end: bool = False,
    as_notes: bool = False,
) -> Iterator[int] | Iterator[Note]:
    """Yield one continuation token by token, or with `as_notes` note by note as each is released.

    prompt: ids or `Notes` to go on from, None to begin a piece. The stream stops after `seconds` of music or
    `tokens`, whichever comes first, once the last keys are released; with neither, when the model ends the
    piece. `may_end` lets it end earlier, and where a model's learned positions end so does the stream, all keys
    released. The same arguments give the same music. `UserError` for arguments that cannot be, such as a prompt
    longer than those positions, and while the stream runs for a model whose predictions are not finite.

    A tokenizer without notes (`no_notes`) needs `tokens`, and a prompt of ids unless its BOS is known; if its EOS is
    not, exactly so many ids come.
    """
    if as_notes and tokenizer.no_notes is not None:
        raise UserError(f"as_notes: {tokenizer.no_notes}")
    walk, ids = checked(model, tokenizer, prompt, make_limits(tokenizer, seconds, tokens, may_end))
    keys = lane_keys(seed, 1)
    steps = decode(model, walk, *prefill(model, ids), ids, keys, sampling or Sampling())
    stream = (int(step[0]) for step in steps)
    return finished_notes(stream, walk, ids) if as_notes else stream


def generate_variations(
    model: DSMR,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    prompt: np.ndarray | Notes | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    may_end: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> GenerationReport:
    """n continuations of one prompt, which is read once; arguments as in `generate`.

    Variation i depends on the seed and i alone up to the rounding of batched arithmetic. `progress(tokens,
    seconds of music)` is told how far the slowest lane has come.
    """
    if n < 1:
        raise UserError(f"n = {n}: expected at least 1")
    walk, ids = checked(model, tokenizer, prompt, make_limits(tokenizer, seconds, tokens, may_end))
    keys = lane_keys(seed, n)
    started = time.perf_counter()
    stream = decode(model, walk, *prefill(model, ids), ids, keys, sampling or Sampling())
    prefilled = time.perf_counter()
    steps: list[np.ndarray] = []
    ticks = np.zeros(n)
    for step in stream:
        steps.append(step)
        ticks += walk.tables.ticks[step]
        if progress:
            progress(len(steps), float(ticks.min()) * walk.tables.seconds_per_tick)
    lanes = np.stack(steps, axis=1) if steps else np.zeros((n, 0), np.int64)
    return GenerationReport(
        prompt_tokens=len(ids),
        tokens=sum(len(through_end(walk, lane)) for lane in lanes),
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - prefilled,
        state_bytes=model.new_state(n).nbytes,
        variations=[Variation(lane, notes_of(walk, ids, lane)) for lane in (finish(walk, lane) for lane in lanes)],
    )


def checked(
    model: DSMR, tokenizer: Tokenizer, prompt: np.ndarray | Notes | None, limits: Limits
) -> tuple[GrammarWalk, np.ndarray]:
    """The walk and the prompt's ids; `UserError` for what does not fit together, before anything is computed."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"tokenizer: {tokenizer.vocab_size} tokens, the model has {model.config.vocab_size}")
    ids, table = prompt_ids(tokenizer, prompt), model.config.max_positions
    if table is not None:
        limits = replace(limits, room=table - len(ids) + 1)  # the last token drawn is not read
    walk = GrammarWalk(tokenizer, limits)
    held = int(walk.begin(ids).sounding.sum().item())
    ending = 1 if tokenizer.eos_id is None else held + ENDING_TOKENS
    if limits.room < ending:
        raise UserError(
            f"prompt: {len(ids)} tokens, expected at most {max(table + 1 - ending, 0)}: "
            f"the model has {table} learned positions (max_positions)"
        )
    return walk, ids


def make_limits(tokenizer: Tokenizer, seconds: float | None, tokens: int | None, may_end: bool) -> Limits:
    if seconds is not None and not 0 < seconds <= MOST_SECONDS:
        raise UserError(f"seconds = {seconds}: expected more than 0 and at most {MOST_SECONDS:,}")
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens = {tokens}: expected at least 1")
    grammar = tokenizer.grammar()
    per_second = 1 / grammar.seconds_per_tick if grammar else 100
    return Limits(
        ticks=NEVER if seconds is None else round(seconds * per_second),
        tokens=NEVER if tokens is None else min(tokens, NEVER),
        may_end=may_end or (seconds is None and tokens is None),
    )


def prompt_ids(tokenizer: Tokenizer, prompt: np.ndarray | Notes | None) -> np.ndarray:
    """What the model reads of a prompt, see `Tokenizer.prompt`: int64 `[T]`, T ≥ 1."""
    if prompt is None:
        prompt = []
    ids = np.ravel(tokenizer.encode_notes(prompt) if isinstance(prompt, Notes) else prompt)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"prompt: an array of {ids.dtype}, expected Notes or integer ids")
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise UserError(f"prompt: ids from {ids.min()} to {ids.max()}, expected 0 to {tokenizer.vocab_size - 1}")
    return tokenizer.prompt(ids)


def prefill(
    model: DSMR, ids: np.ndarray, progress: Callable[[int, int], None] | None = None
) -> tuple[RecurrentState, mx.array]:
    """Read a prompt `[T]`, T ≥ 1, segment by segment, in the memory of one: the state and the last logits `[1, V]`."""
    state, done = model.new_state(1), 0
    while done < len(ids):
        n = min(state.segment_room, len(ids) - done)
        hidden, state = model.advance(mx.array(ids[None, done : done + n]), state)
        mx.eval(hidden, state.arrays)
        done += n
        if progress:
            progress(done, len(ids))
    return state, model.logits(hidden[:, -1])


def decode(
    model: DSMR,
    walk: GrammarWalk,
    state: RecurrentState,
    logits: mx.array,
    ids: np.ndarray,
    keys: mx.array,
    sampling: Sampling,
) -> Iterator[np.ndarray]:
    """Yield the next token of n lanes, int64 `[n]`, until every lane has ended; what comes after a lane's EOS is void.

    When learned positions are used up it stops; with the limits from `checked` every lane has ended by then.

    `state` and `logits` `[1, V]` are those after the prompt `ids`; `keys` `[n, 2]` are the lanes' random keys.
    The next step is under way while the caller looks at this one. Who holds on to `state` pays for it: the
    lanes' memory is a copy. Raises `UserError` when a prediction is NaN.
    """
    lanes = [0] * len(keys)
    state, played = state.take(lanes), walk.begin(ids).take(lanes)
    logits = mx.take(logits, mx.array(lanes), axis=0)

    def choose(logits: mx.array, played: Played, keys: mx.array) -> tuple[mx.array, Played, mx.array]:
        now, keys = split_keys(keys)
        possible = mx.where(walk.allowed(played), logits, -mx.inf)
        token = draw(possible, now, sampling)
        drawn = mx.take_along_axis(possible, token[:, None], axis=-1)[:, 0]
        token = mx.where(drawn > -mx.inf, token, NO_TOKEN)  # false for NaN too
        return token, walk.advance(played, token), keys

    token, played, keys = choose(logits, played, keys)
    mx.async_eval(token, played, keys)
    ended = np.zeros(len(keys), bool)
    for n in count(1):
        following = None
        if state.has_room and n < walk.most_tokens:
            hidden, state = model.advance(token[:, None], state)
            following, played, keys = choose(model.logits(hidden[:, -1]), played, keys)
            mx.async_eval(following, played, keys, state.arrays)
        step = np.array(token, np.int64)
        if (step == NO_TOKEN).any():
            raise UserError("model: its prediction is not a number, expected finite weights and activations")
        if ended.all():
            return
        yield step
        if following is None:
            return
        ended |= np.isin(step, walk.ending)
        token = following


def notes_of(walk: GrammarWalk, prompt: np.ndarray, ids: np.ndarray) -> Notes:
    """The notes of a continuation, whose first ones may have the velocity that the prompt was left with."""
    running = prompt[walk.tables.velocity[prompt] >= 0][-1:]
    return walk.tokenizer.decode(np.concatenate([running, ids]))


def through_end(walk: GrammarWalk, lane: np.ndarray) -> np.ndarray:
    """A lane's ids `[T]` up to its EOS, or all."""
    ends = np.flatnonzero(np.isin(lane, walk.ending))
    return lane[: ends[0] + 1] if len(ends) else lane


def finish(walk: GrammarWalk, lane: np.ndarray) -> np.ndarray:
    """A lane's ids `[T]` up to its end, without a last pause or velocity that no note follows, EOS, if any, last."""
    ids = through_end(walk, lane)
    ids = ids[~np.isin(ids, walk.ending)]
    sounds = np.flatnonzero((walk.tables.press[ids] >= 0) | (walk.tables.release[ids] >= 0))
    if walk.tables.ticks.any():
        ids = ids[: sounds[-1] + 1 if len(sounds) else 0]
    return np.concatenate([ids, walk.ending])


def finished_notes(stream: Iterator[int], walk: GrammarWalk, ids: np.ndarray) -> Iterator[Note]:
    """Notes from a stream of tokens, each as soon as its key is released; keys held by the prompt are left out."""
    g = walk.tables
    ticks, velocity, pressed = 0, int(walk.begin(ids).velocity.item()), {}
    for token in stream:
        ticks += int(g.ticks[token])
        if g.velocity[token] >= 0:
            velocity = int(g.velocity[token])
        if g.press[token] >= 0:
            pressed[int(g.press[token])] = (ticks, np.int64(velocity if velocity >= 0 else DEFAULT_BIN))
        if (pitch := int(g.release[token])) in pressed:
            start, loudness = pressed.pop(pitch)
            yield Note(start * g.seconds_per_tick, ticks * g.seconds_per_tick, pitch, int(bin_velocities(loudness)))
