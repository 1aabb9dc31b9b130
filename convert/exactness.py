"""The horizons of a converted model, and the number of tokens up to which it is exact: equal to the original.

A token in the segment that starts at s sees all positions from s − M_l on. While s ≤ M_l in every layer, it sees the
whole piece, as in an original with full attention over its context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmr_mlx.model.config import ModelConfig

MAX_SEGMENT, MIN_SEGMENT = 512, 16  # tokens of a default segment
DEFAULT_CONTEXT = 2048  # tokens, if the source does not state its context
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")


@dataclass(frozen=True)
class Exactness:
    """The number of tokens up to which a converted model is exact.

    tokens     the largest number of tokens of a piece; None: any number
    context    context of the original, in tokens; None: unknown or unlimited
    recurrent  whether the original is a DSMR, which without learned positions has no limit
    assumed    whether the horizons are for an assumed context
    averaged   whether key/value heads are averaged; `tokens` applies to the model before that
    """

    tokens: int | None
    context: int | None
    recurrent: bool = False
    assumed: bool = False
    averaged: bool = False

    @property
    def warm_start(self) -> bool:
        """Whether the model is exact for less than the context of the original, or that context is unknown."""
        if self.averaged:
            return True
        if self.tokens is None:
            return False
        return not self.assumed if self.context is None else self.tokens < self.context


def stated_context(fields: Mapping[str, Any], source_config: Mapping[str, Any]) -> int | None:
    """Return the context of the original: its learned positions, or what its configuration states; None if unknown."""
    stated = (fields.get("max_positions"), *(source_config.get(name) for name in CONTEXT_KEYS))
    return next((n for n in stated if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def spans(context: int, windows: Sequence[int | None], n_layers: int) -> list[int]:
    """Return, for each layer of the original, the most tokens that a token sees, itself included."""
    windows = windows or [None] * n_layers
    return [context if window is None else min(context, window + 1) for window in windows]


def default_segment(seen: Sequence[int]) -> int:
    """Return the segment length S for layers with these spans: a power of two, from 16 to 512 if possible.

    Beyond the context, the number of tokens that a token sees varies by S with its place in the segment; with S as long
    as the context it would see nothing before its segment. A quarter of the shortest span stays close to the original.
    """
    shortest = min(seen)
    quarter = 1 << max(0, (shortest // 4).bit_length() - 1)
    return min(MAX_SEGMENT, max(quarter, MIN_SEGMENT if shortest > MIN_SEGMENT else 1))


def exact_horizons(seen: Sequence[int], segment_length: int) -> list[int]:
    """Return for each layer the shortest horizon with which the last token of its span sees the first."""
    return [segment_length * ((span - 1) // segment_length) for span in seen]


def exact_tokens(
    config: ModelConfig, windows: Sequence[int | None] = (), original: ModelConfig | None = None
) -> int | None:
    """Return the number of tokens of a piece up to which every layer sees exactly what that of the original sees.

    windows:  of the layers of the original, as in `rules.Configuration`
    original: its configuration, if it is a DSMR

    None for any number: the original is a DSMR with the same horizons and segments.
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
    """Return the number of tokens in the segments in which a token sees the whole piece."""
    return segment_length * (horizon // segment_length + 1)
