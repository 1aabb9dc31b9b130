"""Processors that steer a generation.

    dsmr_mlx.generate(model, tokenizer, processors=[PitchRange(48, 84), MaxPolyphony(6)])

`dsmr_mlx.generation.sampling` describes processors and the order in which they act. These use the meaning of events,
not their ids, and work with every vocabulary whose tokenizer has a grammar. `per_lane`, `at_token`, `at_key` and `tilt`
help to write others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.steering.base import Steering, at_key, at_token, per_lane, tilt
from dsmr_mlx.generation.steering.biases import Density, Dynamics, Tempo
from dsmr_mlx.generation.steering.constraints import (
    MaxNoteSeconds,
    PitchClasses,
    PitchRange,
    VelocityRange,
)
from dsmr_mlx.generation.steering.endings import EndWithin
from dsmr_mlx.generation.steering.loops import LoopPenalty
from dsmr_mlx.generation.steering.pitch_choice import PitchChoice
from dsmr_mlx.generation.steering.polyphony import MaxPolyphony
from dsmr_mlx.generation.steering.silences import MaxSilenceSeconds

CONSTRAINTS = (PitchRange, PitchClasses, VelocityRange, MaxPolyphony, MaxNoteSeconds, MaxSilenceSeconds, EndWithin)
BIASES = (PitchChoice, Tempo, Dynamics, Density, LoopPenalty)
KINDS = {kind.__name__: kind for kind in (*CONSTRAINTS, *BIASES)}

__all__ = ["KINDS", "Steering", "at_key", "at_token", "from_dicts", "per_lane", "tilt", "to_dicts", *KINDS]


def to_dicts(processors: Iterable[Any]) -> list[dict[str, Any]]:
    """Processors as JSON values. Raises `UserError` for one that is not built in: it could not be rebuilt."""
    processors = list(processors)
    for processor in processors:
        if type(processor) not in KINDS.values():
            raise UserError(f"`processors`: {processor!r} cannot be stored, expected one of {', '.join(KINDS)}")
    return [processor.to_dict() for processor in processors]


def from_dicts(values: Sequence[dict[str, Any]], source: str = "processors") -> list[Steering]:
    """The processors of `to_dicts`. Raises `UserError` that names `source` for unknown kinds or keys."""
    if not isinstance(values, list | tuple):
        raise UserError(f"{source}: expected a list of processors, found {type(values).__name__}")
    return [_from_dict(value, source) for value in values]


def _from_dict(values: dict[str, Any], source: str) -> Steering:
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{source}: kind {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind].from_dict({k: v for k, v in values.items() if k != "kind"}, f"{source}: {kind}")
