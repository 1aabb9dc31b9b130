"""From logits to the next token. This is the one place that says what happens to them, and in which order:

    1. grammar       −inf for what may not come next (`GrammarWalk.allowed`, before the logits arrive here)
    2. constraints   processors of stage "constraint": range, polyphony, …, in the order given
    3. biases        processors of stage "bias", the default
    4. repetition    processors of stage "repetition", which look at what is likely after all that
    5. temperature
    6. top-k, top-p, min-p, each on what the one before has left
    7. draw

Constraints come first, so that whatever follows weighs only what can happen: top-p 0.9 keeps nine tenths of the music
that is possible, not of all tokens. Biases are nats at temperature 1; a temperature scales them like the model's own
preferences. Temperature stands before the filters, as in Aria and in Transformers, because top-p and min-p then speak
of the probabilities that are drawn from; mlx-lm filters first, and the candidates do not depend on the temperature.

No step may take everything away: where one would leave a lane without a token, that lane does without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import UserError

if TYPE_CHECKING:
    from dsmr_mlx.generation.grammar import GrammarWalk, Played
    from dsmr_mlx.tokenizers.event_grammar import Moment
    from dsmr_mlx.tokenizers.token_tables import TokenTables

LEAST_TEMPERATURE = 1e-30  # float32 has nothing much smaller, and the likeliest token is certain long before
MOST_TEMPERATURE = 1e38  # nor much larger
LATEST = 1e9  # seconds
STAGES = ("constraint", "bias", "repetition")


class Processor(Protocol):
    """One way to steer: changes the logits of n lanes before a token is drawn.

    All is MLX arrays of constant shapes, for these methods run inside one compiled step: no host round trips. A class
    may set `stage`, one of `STAGES`; without one it is a bias. What must hold of a whole note needs the stage
    "constraint": the sampler asks constraints twice, of the tokens that may come next and of the keys that could be
    pressed after a change of velocity. Where a step has no state, a function (logits, played) → logits is enough.

    What depends on time looks at one clock, `played.ticks`, which begins with the piece; a prompt takes time like all
    other music, and `played.new_ticks` tells how long the music behind it has lasted. A state that holds moments of
    this clock stays right wherever the music is taken back to.

        class Softly:                               # each press is likelier the higher it is
            def begin(self, tables, ids):
                highest = tables.strikes * np.arange(128)           # (V, 128)
                return mx.array(highest.max(axis=1) / 128)[None]    # (1, V)

            def __call__(self, logits, played, state):
                return logits + state

            def advance(self, state, token, played):
                return state

        dsmr_mlx.generate(model, tokenizer, processors=[Softly()])
    """

    def begin(self, tables: "TokenTables", ids: np.ndarray) -> Any:
        """The state of ONE lane that has read the prompt `ids` `[T]`: () or a tree of arrays `[1, …]`.

        Trees are tuples, lists and dicts; the first axis of each array is that of the lanes. `tables` says what the
        tokens mean, each of which may be several events. What `__call__` needs of it belongs into the state. Raises
        `UserError` for a vocabulary that cannot be steered so.
        """
        ...

    def __call__(self, logits: mx.array, played: "Played", state: Any) -> mx.array:
        """New logits `[n, V]` float32; −inf forbids a token, and what is −inf stays so."""
        ...

    def advance(self, state: Any, token: mx.array, played: "Played") -> Any:
        """The state after `token` `[n]` int32; `played` is what has been played then, the token included.

        A class may have `read(tables, state, ids, before)` besides, the same for all lanes and for each of `ids` `[T]`
        at once; `before`: the moment `[n]` that each lane is in. Without it music that is read in the middle of a
        piece takes a step for each token.
        """
        ...


class Stateless:
    """A function (logits `[n, V]`, played) → logits as a `Processor`."""

    def __init__(self, function: Callable[[mx.array, "Played"], mx.array]):
        self.function = function
        self.stage = getattr(function, "stage", "bias")

    def begin(self, tables: "TokenTables", ids: np.ndarray) -> tuple:
        return ()

    def __call__(self, logits: mx.array, played: "Played", state: tuple) -> mx.array:
        return self.function(logits, played)

    def advance(self, state: tuple, token: mx.array, played: "Played") -> tuple:
        return state

    def read(self, tables: "TokenTables", state: tuple, ids: np.ndarray, before: "list[Moment]") -> tuple:
        return state


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How a token is drawn. The filters act on the probabilities after the temperature, in the order of the fields.

    temperature: divides the logits; 0 takes the likeliest token. Or pairs (seconds of new music, temperature) with
        rising seconds, counted from the end of the prompt through all that is played or read later: linear in between,
        constant before the first and after the last
    top_k: keep the k likeliest tokens; 0 keeps all
    top_p: keep the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all
    min_p: keep tokens at least so likely relative to the likeliest (Nguyen et al. 2024); 0 keeps all
    """

    temperature: float | tuple = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, list | tuple):
            object.__setattr__(self, "temperature", self._checked_schedule())
        self.check_types()
        lowest, highest = (best(value for _, value in self.points) for best in (min, max))
        self.require("temperature", lowest >= 0, "0 or more")
        self.require("temperature", highest <= MOST_TEMPERATURE, f"at most {MOST_TEMPERATURE:g}")
        self.require("top_k", self.top_k >= 0, "0 or more")
        self.require("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        self.require("min_p", 0 <= self.min_p < 1, "at least 0 and below 1")

    def _checked_schedule(self) -> tuple[tuple[float, float], ...]:
        expected = f"a number, or pairs (seconds, temperature) with rising seconds from 0 to {LATEST:,.0f}"
        try:
            points = tuple((float(seconds), float(value)) for seconds, value in self.temperature)
        except (TypeError, ValueError):
            raise UserError(f"temperature = {self.temperature!r}: expected {expected}") from None
        finite = all(math.isfinite(number) for point in points for number in point)
        seconds = [point[0] for point in points]
        rising = all(a < b for a, b in pairwise(seconds))
        right = bool(points) and finite and rising and seconds[0] >= 0 and seconds[-1] <= LATEST
        self.require("temperature", right, expected)
        return points

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The temperature as pairs (seconds, temperature): one for a constant."""
        return self.temperature if isinstance(self.temperature, tuple) else ((0.0, self.temperature),)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken at any time."""
        return all(value == 0 for _, value in self.points)

    def temperature_at(self, seconds: mx.array) -> mx.array:
        """Temperatures `[n]` float32 at so many seconds `[n]` of new music."""
        result = mx.full(seconds.shape, self.points[0][1])
        for (start, value), (end, next_value) in pairwise(self.points):
            result = result + mx.clip((seconds - start) / (end - start), 0, 1) * (next_value - value)
        return result


def filter_logits(logits: mx.array, sampling: Sampling, seconds: mx.array | None = None) -> mx.array:
    """Log-odds `[n, V]` against the likeliest token, at a temperature above 0; −inf where a filter removes the token.

    seconds `[n]`: of new music so far, for a temperature that changes; None: its beginning. Ties are kept together.
    """
    temperature = sampling.temperature_at(mx.zeros(len(logits)) if seconds is None else seconds)
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / mx.maximum(temperature, LEAST_TEMPERATURE)[:, None]
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits >= kth, logits, -mx.inf)
    if sampling.top_p < 1:
        probabilities = mx.softmax(logits, axis=-1)
        descending = -mx.sort(-probabilities, axis=-1)
        before = mx.cumsum(descending, axis=-1) - descending
        least = mx.where(before < sampling.top_p, descending, 2.0).min(axis=-1, keepdims=True)
        logits = mx.where(probabilities >= least, logits, -mx.inf)
    if sampling.min_p > 0:
        logits = mx.where(logits >= math.log(sampling.min_p), logits, -mx.inf)
    return logits


def draw(logits: mx.array, keys: mx.array, sampling: Sampling, seconds: mx.array | None = None) -> mx.array:
    """Tokens `[n]` int32 drawn from logits `[n, V]`, each lane by its own random key `[n, 2]`; see `filter_logits`."""
    if sampling.is_greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    filtered = filter_logits(logits, sampling, seconds)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(filtered, keys).astype(mx.int32)


class Sampler:
    """All that stands between the grammar and a token: processors, then temperature, filters and draw.

    `begin` gives the state of one lane, a tuple with one entry for each processor; lanes are taken and put together
    along the first axis of its arrays. Raises `UserError` for a processor of an unknown stage or that is none.
    """

    def __init__(self, walk: "GrammarWalk", sampling: Sampling, processors: Sequence[Processor | Callable] = ()):
        self.walk, self.sampling = walk, sampling
        staged = [(as_processor(processor), i) for i, processor in enumerate(processors)]
        self.processors = [p for p, _ in sorted(staged, key=lambda pair: (STAGES.index(stage_of(pair[0])), pair[1]))]
        self.n_constraints = sum(stage_of(p) == "constraint" for p in self.processors)
        self.reads = all(hasattr(p, "read") for p in self.processors)  # whether there is a `read` besides `advance`
        g, first = walk.grammar, walk.tables.events[:, 0]
        self.is_press = mx.array((first >= 0) & (g.press[first] >= 0))  # (V,), ids that press a key at once
        self.presses = mx.array(walk.tables.notes > 0)

    def begin(self, ids: np.ndarray) -> tuple:
        """The state of one lane after the prompt `ids` `[T]`.

        Raises `UserError` for a processor that the vocabulary does not allow, or constraints that leave no key.
        """
        state = tuple(processor.begin(self.walk.tables, ids) for processor in self.processors)
        if self.n_constraints and self.is_press.any().item():
            silence = self.walk.begin(np.empty(0, np.int64))
            if not self.playable(silence, state).item():
                names = ", ".join(type(p).__name__ for p in self.processors[: self.n_constraints])
                raise UserError(
                    f"processors: {names} together forbid every key, expected at least one that may be pressed"
                )
        return state

    def process(self, logits: mx.array, played: "Played", state: tuple) -> mx.array:
        """Logits `[n, V]`, −inf where the grammar forbids, after all processors; some token remains in every lane."""
        if self.n_constraints and self.walk.grammar.running_velocity:
            useless = self.walk.ends_in_velocity & (self.presses | ~self.playable(played, state)[:, None])
            logits = unless_nothing_is_left(mx.where(useless, -mx.inf, logits), logits)
        for processor, own in zip(self.processors, state, strict=True):
            logits = unless_nothing_is_left(processor(logits, played, own), logits)
        return logits

    def playable(self, played: "Played", state: tuple) -> mx.array:
        """`[n]` bool: some silent key may be pressed under the constraints, so that a velocity is no dead end."""
        presses = mx.where(self.is_press & self.walk.keys_fit(played), 0.0, -mx.inf)  # (n, V)
        for processor, own in zip(self.processors[: self.n_constraints], state, strict=False):
            presses = processor(presses, played, own)
        return (presses > -mx.inf).any(axis=-1)

    def draw(self, logits: mx.array, played: "Played", state: tuple, keys: mx.array) -> mx.array:
        """Tokens `[n]` int32 from logits `[n, V]` float32, −inf where the grammar forbids, by random keys `[n, 2]`."""
        seconds = played.new_ticks * self.walk.grammar.seconds_per_tick
        return draw(self.process(logits, played, state), keys, self.sampling, seconds)

    def advance(self, state: tuple, token: mx.array, played: "Played") -> tuple:
        """The state after `token` `[n]`; `played` includes it."""
        return tuple(p.advance(own, token, played) for p, own in zip(self.processors, state, strict=True))

    def read(self, state: tuple, ids: np.ndarray, before: "list[Moment]") -> tuple:
        """The state after each of `ids` `[T]` in all lanes, which are in the moments `before` `[n]`; if it `reads`."""
        tables = self.walk.tables
        return tuple(p.read(tables, own, ids, before) for p, own in zip(self.processors, state, strict=True))


def as_processor(processor: Processor | Callable) -> Processor:
    """A processor as it is, a function as one. Raises `UserError` for what is neither, or has an unknown stage."""
    if not callable(processor) or isinstance(processor, type):
        raise UserError(f"processors: {processor!r}, expected a Processor or a function (logits, played) → logits")
    made = processor if hasattr(processor, "begin") else Stateless(processor)
    if stage_of(made) not in STAGES:
        raise UserError(f"processors: {processor!r} has the stage {stage_of(made)!r}, expected {', '.join(STAGES)}")
    return made


def stage_of(processor: Processor) -> str:
    return getattr(processor, "stage", "bias")


def unless_nothing_is_left(logits: mx.array, before: mx.array) -> mx.array:
    """`logits` `[n, V]`, but as `before` in lanes where every token is −inf."""
    return mx.where((logits > -mx.inf).any(axis=-1, keepdims=True), logits, before)


def lane_keys(seed: int, lanes: int) -> mx.array:
    """Random keys `[B, 2]` uint32: lane i's depends on the seed and i alone, not on how many lanes there are.

    Raises `UserError` for a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed = {seed}: expected 0 or more")
    return mx.array(np.stack([np.random.SeedSequence([seed, i]).generate_state(2) for i in range(lanes)]))


def keys_at(keys: mx.array, time: mx.array) -> mx.array:
    """The lanes' keys `[n, 2]` for the draw at a `time`, a uint32 scalar: a counter instead of a state, so that going
    back in time needs no more than the number. The keys of two times are as unlike as any two (Salmon et al. 2011).
    """
    return mx.concatenate([keys[:, :1], keys[:, 1:] + time], axis=1)
