"""From logits to the next token. Only this module decides how they are processed, and in which order:

    1. grammar       −inf for ids that may not come next (`GrammarWalk.allowed`, before the logits arrive here)
    2. constraints   processors of stage "constraint": range, polyphony, …, in the order given
    3. biases        processors of stage "bias", the default
    4. repetition    processors of stage "repetition", which see the logits after 1 to 3
    5. temperature
    6. top-k, top-p, min-p, each on what the one before has left
    7. random draw

Constraints come first, so that the later steps weigh only what can happen: top-p 0.9 keeps nine tenths of the music
that is possible, not of all tokens. Biases are nats at temperature 1; the temperature scales them like the model's own
preferences. Temperature comes before the filters, as in Aria and in Transformers, because top-p and min-p then apply
to the probabilities that are drawn from. (mlx-lm filters first, so its candidates do not depend on the temperature.)

No step leaves a lane without a token: a step that would is skipped for that lane.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import SettingError, UserError
from dsmr_mlx.generation.verdicts import Verdict, judged

if TYPE_CHECKING:
    from dsmr_mlx.generation.gap_rules import Kept
    from dsmr_mlx.generation.grammar import GrammarState, GrammarWalk
    from dsmr_mlx.tokenizers.event_grammar import Moment
    from dsmr_mlx.tokenizers.token_tables import TokenTables

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e38  # about the range of float32
MAX_SECONDS = 1e9  # of a temperature schedule
SECOND = mx.array([0, 1], mx.uint32)
STAGES = ("constraint", "bias", "repetition")


class Processor(Protocol):
    """Changes the logits of B lanes before a token is drawn.

    Everything is MLX arrays of constant shapes, because these methods run inside one compiled step: no host round
    trips. A class may set `stage`, one of `STAGES`; the default is "bias". A rule that must hold for whole notes needs
    the stage "constraint": the sampler calls constraints twice, for the tokens that may come next and for the keys that
    could be pressed after a change of velocity. With `limits_releases = True` it does not see the keys that a gap keeps
    down, which cannot be released. Without a state, a function (logits, music) → logits is enough.

    A constraint that does not depend on the logits may have `judge(music, state)`, which returns a `verdicts.Verdict`:
    the sampler then applies it together with others instead of calling it. A processor that never forbids a token may
    set `forbids = False`.

    music: the `GrammarState` of the lanes. `music.ticks` is the clock, which starts with the piece and counts the
    prompt too; `music.new_ticks` counts from the end of the prompt. Times of this clock kept in a state stay valid when
    the player rewinds.

        class Higher:                               # each press is more likely the higher it is
            def begin(self, tables, ids):
                highest = tables.presses * np.arange(128)           # (V, 128)
                return mx.array(highest.max(axis=1) / 128)[None]    # (1, V)

            def __call__(self, logits, music, state):
                return logits + state

            def advance(self, state, token, music):
                return state

        dsmr_mlx.generate(model, tokenizer, processors=[Higher()])
    """

    def begin(self, tables: "TokenTables", ids: np.ndarray) -> Any:
        """The state of ONE lane after the prompt `ids` `(T,)`: () or a tree of arrays `(1, …)`.

        Trees are tuples, lists and dicts; the first axis of each array is the lanes. `tables` describes the ids; an id
        may stand for several events. Whatever `__call__` needs of it belongs in the state. Raises `UserError` if the
        processor does not work with this vocabulary.
        """
        ...

    def __call__(self, logits: mx.array, music: "GrammarState", state: Any) -> mx.array:
        """New logits `(B, V)` float32. −inf forbids a token; logits that are −inf must stay so."""
        ...

    def advance(self, state: Any, token: mx.array, music: "GrammarState") -> Any:
        """The state after `token` `(B,)` int32; `music` is the grammar state after it.

        A class may also have `read(tables, state, ids, before)`: the state after all lanes have read `ids` `(T,)`, at
        once; `before`: B moments. Without it, reading in the middle of a piece takes a step per token.
        """
        ...


class Stateless:
    """A function (logits `(B, V)`, music) → logits as a `Processor`."""

    def __init__(self, function: Callable[[mx.array, "GrammarState"], mx.array]):
        self.function = function
        self.stage = getattr(function, "stage", "bias")

    def begin(self, tables: "TokenTables", ids: np.ndarray) -> tuple:
        """See `Processor.begin`."""
        return ()

    def __call__(self, logits: mx.array, music: "GrammarState", state: tuple) -> mx.array:
        return self.function(logits, music)

    def advance(self, state: tuple, token: mx.array, music: "GrammarState") -> tuple:
        """See `Processor.advance`."""
        return state

    def read(self, tables: "TokenTables", state: tuple, ids: np.ndarray, before: "list[Moment]") -> tuple:
        """See `Processor.advance`."""
        return state


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How a token is drawn. The filters apply to the probabilities after the temperature, in the order of the fields.

    temperature: divides the logits; 0 takes the most likely token. Or pairs (seconds, temperature) with rising seconds
        of new music, counted from the end of the prompt: linear in between, constant before the first and after the
        last
    top_k: keep the k most likely tokens; 0 keeps all
    top_p: keep the fewest, most likely tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all
    min_p: keep tokens with at least this probability relative to the most likely one (Nguyen et al. 2024); 0 keeps all
    """

    temperature: float | tuple = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, list | tuple):
            object.__setattr__(self, "temperature", self._checked_schedule())
        self.check_types()
        temperatures = [value for _, value in self.points]
        self.require("temperature", min(temperatures) >= 0, "0 or more")
        self.require("temperature", max(temperatures) <= MAX_TEMPERATURE, f"at most {MAX_TEMPERATURE:g}")
        self.require("top_k", self.top_k >= 0, "0 or more")
        self.require("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        self.require("min_p", 0 <= self.min_p < 1, "at least 0 and below 1")

    def _checked_schedule(self) -> tuple[tuple[float, float], ...]:
        expected = f"a number, or pairs (seconds, temperature) with rising seconds from 0 to {MAX_SECONDS:,.0f}"
        try:
            points = tuple((float(seconds), float(value)) for seconds, value in self.temperature)
        except (TypeError, ValueError):
            raise SettingError("temperature", self.temperature, expected) from None
        finite = all(math.isfinite(number) for point in points for number in point)
        seconds = [point[0] for point in points]
        rising = all(a < b for a, b in pairwise(seconds))
        valid = bool(points) and finite and rising and seconds[0] >= 0 and seconds[-1] <= MAX_SECONDS
        self.require("temperature", valid, expected)
        return points

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The temperature as pairs (seconds, temperature); one pair if it is constant."""
        return self.temperature if isinstance(self.temperature, tuple) else ((0.0, self.temperature),)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return all(value == 0 for _, value in self.points)

    def temperature_at(self, seconds: mx.array) -> mx.array:
        """Temperatures `(B,)` float32 at `seconds` `(B,)` of new music."""
        result = mx.full(seconds.shape, self.points[0][1])
        for (start, value), (end, next_value) in pairwise(self.points):
            result = result + mx.clip((seconds - start) / (end - start), 0, 1) * (next_value - value)
        return result


def filter_logits(logits: mx.array, sampling: Sampling, seconds: mx.array | None = None) -> mx.array:
    """Log-odds `(B, V)` relative to the most likely token, after the temperature; −inf if a filter removes a token.

    seconds `(B,)`: of new music so far, for a temperature schedule; None: 0. The temperature must not be 0. Ties are
    kept together.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)
    if len(sampling.points) > 1:
        temperature = sampling.temperature_at(mx.zeros(len(logits)) if seconds is None else seconds)
        logits = logits / mx.maximum(temperature, MIN_TEMPERATURE)[:, None]
    elif sampling.temperature != 1:
        logits = logits / max(sampling.points[0][1], MIN_TEMPERATURE)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits >= kth, logits, -mx.inf)
    if sampling.top_p < 1:
        probabilities = mx.softmax(logits, axis=-1)
        descending = -mx.sort(-probabilities, axis=-1)
        before = mx.cumsum(descending, axis=-1) - descending
        lowest = mx.where(before < sampling.top_p, descending, 2.0).min(axis=-1, keepdims=True)
        logits = mx.where(probabilities >= lowest, logits, -mx.inf)
    if sampling.min_p > 0:
        logits = mx.where(logits >= math.log(sampling.min_p), logits, -mx.inf)
    return logits


def sample_tokens(logits: mx.array, keys: mx.array, sampling: Sampling, seconds: mx.array | None = None) -> mx.array:
    """Draw tokens `(B,)` uint32 from logits `(B, V)`, each lane with its random key `(B, 2)`; see `filter_logits`."""
    if sampling.is_greedy:
        return mx.argmax(logits, axis=-1)
    filtered = filter_logits(logits, sampling, seconds)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(filtered, keys)


class Turn(NamedTuple):
    """A processor with its inputs for one token, and its verdict if it has `judge`."""

    processor: Processor
    state: Any
    music: "GrammarState"
    verdict: Verdict | None

    @classmethod
    def of(cls, processor: Processor, state: Any, music: "GrammarState", kept: "Kept | None" = None) -> "Turn":
        """Return the turn of a processor; kept: the restrictions of a gap."""
        music = seen_by(processor, music, kept)
        return cls(processor, state, music, processor.judge(music, state) if hasattr(processor, "judge") else None)

    def __call__(self, logits: mx.array) -> mx.array:
        return self.processor(logits, self.music, self.state)


class Sampler:
    """Processors, temperature, filters and draw, for logits that the grammar has masked.

    The state is a tuple with one entry per processor; lanes are along the first axis of its arrays. Raises `UserError`
    for an unknown stage, or an object that is not a processor.
    """

    def __init__(self, walk: "GrammarWalk", sampling: Sampling, processors: Sequence[Processor | Callable] = ()):
        self.walk, self.sampling = walk, sampling
        staged = [(as_processor(processor), i) for i, processor in enumerate(processors)]
        self.processors = [p for p, _ in sorted(staged, key=lambda pair: (STAGES.index(stage_of(pair[0])), pair[1]))]
        self.n_constraints = sum(stage_of(p) == "constraint" for p in self.processors)
        self.reads = all(hasattr(p, "read") for p in self.processors)
        g, first = walk.grammar, walk.tables.events[:, 0]
        self.is_press = mx.array((first >= 0) & (g.press[first] >= 0))  # (V,), ids whose first event presses a key
        self.presses = mx.array(walk.tables.notes > 0)

    def begin(self, ids: np.ndarray) -> tuple:
        """The state of one lane after the prompt `ids` `(T,)`.

        Raises `UserError` if a processor does not work with the vocabulary, or if the constraints forbid every key.
        """
        if not self.leaves_keys:
            names = ", ".join(type(p).__name__ for p in self.processors[: self.n_constraints])
            raise UserError(
                f"`processors`: {names} together forbid every key, expected at least one that may be pressed"
            )
        return tuple(processor.begin(self.walk.tables, ids) for processor in self.processors)

    @cached_property
    def leaves_keys(self) -> bool:
        """Whether the constraints allow pressing some key at the beginning of a piece, where nothing sounds."""
        if not (self.n_constraints and self.is_press.any().item()):
            return True
        nothing, constraints = np.empty(0, np.int64), self.processors[: self.n_constraints]
        music, tables = self.walk.begin(nothing), self.walk.tables
        return self._can_press([Turn.of(p, p.begin(tables, nothing), music) for p in constraints], music).item()

    def process(self, logits: mx.array, music: "GrammarState", state: tuple, kept: "Kept | None" = None) -> mx.array:
        """The logits `(B, V)`, masked by the grammar, after all processors; every lane keeps a token.

        kept: the restrictions of a gap.
        """
        turns = [Turn.of(*pair, music, kept) for pair in zip(self.processors, state, strict=True)]
        pending = self._dead_ends(turns[: self.n_constraints], music, kept)  # constraints come first
        for turn in turns:
            if turn.verdict is not None:
                pending.append(turn.verdict)
                continue
            before, pending = judged(logits, pending), []
            logits = turn(before)
            if getattr(turn.processor, "forbids", True):
                logits = with_fallback(logits, before)
        return judged(logits, pending)

    def _dead_ends(self, constraints: "list[Turn]", music: "GrammarState", kept: "Kept | None") -> list[Verdict]:
        """Verdicts that exclude velocities and pauses after which the constraints forbid every id."""
        running, found = self.walk.grammar.running_velocity, []
        if not constraints or not (running or kept is not None):
            return found
        can_press = self._can_press(constraints, music)
        if running:
            found.append(Verdict(~(self.walk.ends_in_velocity & (self.presses | ~can_press))))
        if kept is not None:
            can_release = (music.sounding & ~kept.keys).any(axis=-1, keepdims=True)
            found.append(Verdict(~(kept.short & ~can_press & ~can_release)))
        return found

    def _can_press(self, constraints: "list[Turn]", music: "GrammarState") -> mx.array:
        """`(B, 1)` bool: whether the constraints allow pressing a key that is up, so that a velocity is no dead end."""
        presses = mx.where(self.is_press & self.walk.keys_fit(music), 0.0, -mx.inf)  # (B, V)
        for turn in constraints:
            presses = turn(presses) if turn.verdict is None else mx.where(turn.verdict.fits, presses, -mx.inf)
        return (presses > -mx.inf).any(axis=-1, keepdims=True)

    def sample(
        self, logits: mx.array, music: "GrammarState", state: tuple, keys: mx.array, kept: "Kept | None" = None
    ) -> mx.array:
        """Draw tokens `(B,)` uint32 from logits `(B, V)` float32, masked by the grammar, with random keys `(B, 2)`."""
        seconds = music.new_ticks * self.walk.grammar.seconds_per_tick
        logits = self.process(logits, music, state, kept)[:, : self.walk.n_drawn]
        return sample_tokens(logits, keys, self.sampling, seconds)

    def advance(self, state: tuple, token: mx.array, music: "GrammarState") -> tuple:
        """The state after `token` `(B,)`; `music` includes it."""
        return tuple(p.advance(own, token, music) for p, own in zip(self.processors, state, strict=True))

    def read(self, state: tuple, ids: np.ndarray, before: "list[Moment]") -> tuple:
        """The state after all lanes have read `ids` `(T,)` from the B moments `before`; only if `reads`."""
        tables = self.walk.tables
        return tuple(p.read(tables, own, ids, before) for p, own in zip(self.processors, state, strict=True))


def as_processor(processor: Processor | Callable) -> Processor:
    """Return a processor unchanged, a function as one. Raises `UserError` for anything else or an unknown stage."""
    if not callable(processor) or isinstance(processor, type):
        raise UserError(f"`processors`: {processor!r}, expected a Processor or a function (logits, music) → logits")
    made = processor if hasattr(processor, "begin") else Stateless(processor)
    if stage_of(made) not in STAGES:
        raise UserError(f"`processors`: {processor!r} has the stage {stage_of(made)!r}, expected {', '.join(STAGES)}")
    return made


def stage_of(processor: Processor) -> str:
    """The stage of a processor, "bias" by default."""
    return getattr(processor, "stage", "bias")


def seen_by(processor: Processor, music: "GrammarState", kept: "Kept | None") -> "GrammarState":
    """The state that a processor gets: without the keys that a gap keeps down, if it `limits_releases`."""
    if kept is None or not getattr(processor, "limits_releases", False):
        return music
    return music._replace(sounding=music.sounding & ~kept.keys)


def with_fallback(logits: mx.array, fallback: mx.array) -> mx.array:
    """`logits` `(B, V)`, but `fallback` in lanes where every token is −inf."""
    return mx.where((logits > -mx.inf).any(axis=-1, keepdims=True), logits, fallback)


def lane_keys(seed: int, lanes: int) -> mx.array:
    """Random keys `(B, 2)` uint32. The key of lane i depends on the seed and i alone, not on the number of lanes.

    Raises `UserError` unless the seed is an integer from 0 on.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"`seed` {seed}: expected an integer, 0 or more")
    return mx.array(np.stack([np.random.SeedSequence([seed, i]).generate_state(2) for i in range(lanes)]))


def keys_at(keys: mx.array, position: mx.array) -> mx.array:
    """The lanes' keys `(B, 2)` for the draw at a `position`, a uint32 scalar.

    A counter instead of a generator state, so that rewinding needs only the position; keys of different positions are
    independent (Salmon et al. 2011).
    """
    return keys + position * SECOND
