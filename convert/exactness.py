"""Which horizons a converted model gets, and how far it then computes what its original does.

Here a token of the segment that starts at s sees all positions from s − M_l on. As long as s ≤ M_l in every layer that
is the whole piece, as in an original with full attention over its context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmr_mlx.model.config import ModelConfig

LONGEST_SEGMENT, SHORTEST_SEGMENT = 512, 16  # tokens, where neither the source nor the user says
CONTEXT = 2048  # tokens that an original without a stated context is taken to know
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")


@dataclass(frozen=True)
class Exactness:
    """How far a converted model computes what its original does.

    tokens     up to so many tokens of a piece; None: any number
    context    tokens that the original was made for; None: not known, or any number
    recurrent  the original is a DSMR, which without learned positions reads any number of tokens
    assumed    the horizons are those for an assumed context
    """

    tokens: int | None
    context: int | None
    recurrent: bool = False
    assumed: bool = False

    @property
    def warm_start(self) -> bool:
        """Whether it ends before the original does, or may do so, for where that ends is not known."""
        if self.tokens is None:
            return False
        return not self.assumed if self.context is None else self.tokens < self.context


def stated_context(fields: Mapping[str, Any], source_config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for, from its learned positions or its program's configuration."""
    stated = (fields.get("max_positions"), *(source_config.get(name) for name in CONTEXT_NAMES))
    return next((n for n in stated if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def spans(context: int, windows: Sequence[int | None], n_layers: int) -> list[int]:
    """For each layer how many tokens, its own included, one sees at most in the original."""
    windows = windows or [None] * n_layers
    return [context if window is None else min(context, window + 1) for window in windows]


def usual_segment(seen: Sequence[int]) -> int:
    """The segment length for layers that see so many tokens: a power of two, from 16 to 512 where that is possible.

    On streams longer than the context a token sees S more or fewer tokens, depending on its place in the segment, and
    with S as long as the context nothing before its segment. A quarter of the shortest span keeps it near the original.
    """
    shortest = min(seen)
    quarter = 1 << max(0, (shortest // 4).bit_length() - 1)
    return min(LONGEST_SEGMENT, max(quarter, SHORTEST_SEGMENT if shortest > SHORTEST_SEGMENT else 1))


def exact_horizons(seen: Sequence[int], segment_length: int) -> list[int]:
    """The shortest horizons with which the last of so many tokens sees the first, for each layer."""
    return [segment_length * ((span - 1) // segment_length) for span in seen]


def exact_tokens(
    config: ModelConfig, windows: Sequence[int | None] = (), original: ModelConfig | None = None
) -> int | None:
    """Up to how many tokens of a piece every layer sees all that the original's layer sees, and nothing else.

    windows:  of the original's layers, as in `rules.Configuration`
    original: with its own horizons and segments, if it is a DSMR

    None if that is any number: for a DSMR with the same horizons and segments.
    """
    S, ends = config.segment_length, [window + 1 for window in windows if window is not None]
    if original is None:
        ends += [_whole(S, horizon) for horizon in config.horizons]
    else:
        theirs = original.segment_length
        for horizon, own in zip(config.horizons, original.horizons, strict=True):
            if (S, horizon) != (theirs, own):
                ends += [_whole(S, horizon), _whole(theirs, own)]
        if not ends:
            return None
    return min([*ends, config.max_positions or math.inf])


def _whole(segment_length: int, horizon: int) -> int:
    """The tokens of the segments in which everything is seen."""
    return segment_length * (horizon // segment_length + 1)
