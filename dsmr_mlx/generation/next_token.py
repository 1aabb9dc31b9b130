"""The choice of the next token: grammar, processors and draw, in one step that never leaves MLX."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.generation.grammar import Bounds, GrammarWalk, Played
from dsmr_mlx.generation.sampling import Processor, Sampler, Sampling, keys_at
from dsmr_mlx.model.compiled import Compiled

NO_TOKEN = -1  # where the model's predictions are NaN
CHUNK, FOLLOWED = 4096, 32  # ids that are read at once; ids that are followed one by one between two evaluations


class Source(Enum):
    """Where a token came from. New music begins behind a prompt; what is read later belongs to it, and goes on where
    there was an end.
    """

    PROMPT = 0
    READ = 1
    DRAWN = 2


class Heard(NamedTuple):
    """What a choice knows of the music besides the logits: what has been played, and the processors' states.

    A tree of arrays whose first axis is that of the lanes.
    """

    played: Played
    steering: Any

    @property
    def lanes(self) -> int:
        return len(self.played.state)

    def take(self, lanes: Sequence[int]) -> "Heard":
        index = mx.array(list(lanes), mx.int32)
        return tree_map(lambda array: mx.take(array, index, axis=0), self)


class Choice:
    """How n lanes choose; it holds no state. Raises `UserError` for processors that there cannot be."""

    def __init__(
        self, walk: GrammarWalk, sampling: Sampling, processors: Sequence[Processor | Callable], compiled: bool
    ):
        self.walk = walk
        self.sampler = Sampler(walk, sampling, processors)
        self._choose = Compiled(self._chosen, compiled, lazy=True)
        self._follow = Compiled(self._followed, compiled, lazy=True)

    def begin(self, ids: np.ndarray) -> Heard:
        """One lane that has read the prompt `ids` `[T]`. Raises `UserError` as `Sampler.begin` does."""
        return Heard(self.walk.begin(ids), self.sampler.begin(ids))

    def __call__(
        self, logits: mx.array, heard: Heard, keys: mx.array, time: mx.array, bounds: Bounds
    ) -> tuple[mx.array, Heard]:
        """A token `[n]` int32 for each lane, `NO_TOKEN` where the logits `[n, V]` are NaN, and what is heard with it.

        keys `[n, 2]` and time, a uint32 scalar: see `keys_at`.
        """
        return self._choose(logits, heard, keys, time, bounds)

    def read(self, heard: Heard, ids: np.ndarray) -> Heard:
        """What is heard when all lanes have read `ids` `[T]` besides, none of them PAD, BOS or EOS; evaluated.

        At once where every processor can; else token by token.
        """
        if not self.sampler.reads:
            for count, token in enumerate(ids.tolist(), start=1):
                heard = self.follow(heard, mx.array([token]), Source.READ)
                if count % FOLLOWED == 0:
                    mx.eval(heard)
        else:
            for start in range(0, len(ids), CHUNK):
                chunk, before = ids[start : start + CHUNK], self.walk.moments(self.walk.awake(heard.played))
                steering = self.sampler.read(heard.steering, chunk, before)
                heard = Heard(self.walk.read(heard.played, chunk), steering)
        mx.eval(heard)
        return heard

    def follow(self, heard: Heard, token: mx.array, source: Source) -> Heard:
        """What is heard with one more token, `[1]` for all lanes or `[n]`; the same as `__call__` or `begin` gave.

        PAD, BOS and EOS mean something where they were drawn; where they were read only processors hear of them.
        """
        silent = source is not Source.DRAWN and token[0].item() in self.walk.specials
        flags = (mx.array(flag) for flag in (source is Source.DRAWN, source is Source.PROMPT, silent))
        return self._follow(heard, mx.broadcast_to(token, (heard.lanes,)), *flags)

    def _chosen(self, logits, heard, keys, time, bounds):
        possible = mx.where(self.walk.allowed(heard.played, bounds), logits, -mx.inf)
        token = self.sampler.draw(possible, heard.played, heard.steering, keys_at(keys, time))
        drawn = mx.take_along_axis(possible, token[:, None], axis=-1)[:, 0]
        token = mx.where(drawn > -mx.inf, token, NO_TOKEN)  # false for NaN too
        played = self.walk.advance(heard.played, token)
        return token, Heard(played, self.sampler.advance(heard.steering, token, played))

    def _followed(self, heard, token, drawn, prompt, silent):
        before = heard.played
        awake = self.walk.awake(before)
        start = Played(*(mx.where(drawn, old, new) for old, new in zip(before, awake, strict=True)))
        played = self.walk.advance(start, token)
        played = played._replace(begun=mx.where(prompt, played.ticks, played.begun))
        played = Played(*(mx.where(silent, old, new) for old, new in zip(before, played, strict=True)))
        return Heard(played, self.sampler.advance(heard.steering, token, played))
