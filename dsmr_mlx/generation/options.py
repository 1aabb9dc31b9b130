"""Options for sampling and steering by name, as on the command line and in a checkpoint's `generation.json`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsmr_mlx.common.errors import SettingError, UserError
from dsmr_mlx.model.checkpoint_folder import GENERATION, generation_options

if TYPE_CHECKING:
    from dsmr_mlx.generation.sampling import Sampling
    from dsmr_mlx.generation.steering import Steering

T = TypeVar("T")

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
STEERING_OPTIONS = (
    *("pitch_range", "key", "pitch_classes", "avoid_pitch_classes", "velocity_range"),
    *("max_polyphony", "max_note_seconds", "max_silence_seconds", "end_within"),
    *("pitch_temperature", "tonality", "tempo", "dynamics", "density", "loop_penalty"),
)

RANKING_OPTIONS = ("best_of",)  # how many candidates `generate` plays for a piece of at most `RANKED_SECONDS`
RANKED_SECONDS = 60.0

PREFIX_OPTIONS = ("composer", "form", "genre")  # labels before the music, see `Tokenizer.with_prefixes`

TEXT_OPTIONS = ("pitch_range", "key", "pitch_classes", "avoid_pitch_classes", "velocity_range")


def recommended(checkpoint: str | Path | None = None) -> dict[str, Any]:
    """The `sampling` and `processors` that a checkpoint recommends, as keyword arguments of `generate`,
    `generate_variations` and `Player`; the defaults if it recommends nothing.

        model, tokenizer = dsmr_mlx.load()
        dsmr_mlx.generate(model, tokenizer, seconds=60, **dsmr_mlx.recommended())

    How a piece ends is left to `steering.EndWithin`, and candidates to `ranking`. Raises `UserError` for an unknown
    checkpoint.
    """
    options = recommended_options(checkpoint)
    options.pop("end_within", None)
    return {"sampling": make_sampling(options), "processors": make_processors(options)}


def recommended_options(checkpoint: str | Path | None) -> dict[str, Any]:
    """The options in a checkpoint's `generation.json`, by name.

    Raises `UserError` for an unknown option, or a `best_of` that is not a number of candidates.
    """
    from dsmr_mlx.model.checkpoint import resolve

    folder = resolve(checkpoint)
    options = generation_options(folder)
    known = (*SAMPLING_OPTIONS, *STEERING_OPTIONS, *RANKING_OPTIONS)
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{folder / GENERATION}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    best_of = options.get("best_of", 1)
    if type(best_of) is not int or best_of < 1:
        raise UserError(f"{folder / GENERATION}: `best_of` {best_of!r}, expected a whole number from 1 on")
    return options


def make_sampling(options: Mapping[str, Any]) -> "Sampling":
    """The `Sampling` of `SAMPLING_OPTIONS`, the default for None. Raises `UserError` that names the option.

    A temperature may be a string, see `parse_temperature`.
    """
    from dsmr_mlx.generation.sampling import Sampling

    given = {name: options[name] for name in SAMPLING_OPTIONS if options.get(name) is not None}
    values = dict(given)
    if isinstance(values.get("temperature"), str):
        values["temperature"] = parse_option("temperature", given["temperature"], parse_temperature)
    for name, value in values.items():
        parse_option(name, given[name], lambda _, only={name: value}: Sampling(**only))
    return Sampling(**values)


def make_processors(
    options: Mapping[str, Any], seconds: float | None = None, may_end: bool = False
) -> "list[Steering]":
    """The processors of some `STEERING_OPTIONS`, in a fixed order; None means no processor.

    seconds: of new music, None if it is limited by tokens; may_end: see `steering.EndWithin`. Raises `UserError` that
    names the option.
    """
    from dsmr_mlx.generation import steering as s
    from dsmr_mlx.generation.steering.pitches import pitch_classes, pitch_range

    given = {name: options[name] for name in STEERING_OPTIONS if options.get(name) is not None}
    if "end_within" in given and seconds is None:
        raise UserError(f"`end_within` {given['end_within']:g}: expected `seconds`, not `tokens`")
    makers: dict[str, Callable[[Any], s.Steering]] = {
        "pitch_range": lambda text: s.PitchRange(*pitch_range(text)),
        "key": s.PitchClasses.key,
        "pitch_classes": lambda text: s.PitchClasses(pitch_classes(text)),
        "avoid_pitch_classes": lambda text: s.PitchClasses.without(pitch_classes(text)),
        "velocity_range": lambda text: s.VelocityRange(*parse_range(text)),
        "max_polyphony": s.MaxPolyphony,
        "max_note_seconds": s.MaxNoteSeconds,
        "max_silence_seconds": s.MaxSilenceSeconds,
        "end_within": lambda within: s.EndWithin(seconds, within, may_end),
        "pitch_temperature": lambda temperature: s.PitchChoice(temperature=temperature),
        "tonality": lambda tonality: s.PitchChoice(tonality=tonality),
        "tempo": s.Tempo,
        "dynamics": s.Dynamics,
        "density": s.Density,
        "loop_penalty": s.LoopPenalty,
    }
    for name in TEXT_OPTIONS:
        if not isinstance(given.get(name, ""), str):
            raise UserError(f"`{name}` {given[name]}: expected a string")
    made = {name: parse_option(name, value, makers[name]) for name, value in given.items()}
    if {"pitch_temperature", "tonality"} <= made.keys():  # one processor
        tonality = made.pop("tonality").tonality
        made["pitch_temperature"] = replace(made["pitch_temperature"], tonality=tonality)
    return list(made.values())


def parse_option(name: str, value: Any, make: Callable[[Any], T]) -> T:
    """Return `make(value)`; a `UserError` names the option and its value instead of the setting that is made of it."""
    try:
        return make(value)
    except UserError as error:
        reason = f"expected {error.expected}" if isinstance(error, SettingError) else error
        raise UserError(f"`{name}` {value}: {reason}") from None


def parse_temperature(text: str) -> float | list[list[float]]:
    """Parse a temperature: `0.9`, or pairs such as `0:1.2,30:0.9`. Raises `UserError` for anything else."""
    try:
        if ":" not in text:
            return float(text)
        return [[float(number) for number in pair.split(":")] for pair in text.split(",")]
    except ValueError:
        raise UserError("expected a number, or pairs SECONDS:TEMPERATURE such as 0:1.2,30:0.9") from None


def parse_range(text: str) -> tuple[int, int]:
    """Parse `30-90` → (30, 90). Raises `UserError` for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if match is None:
        raise UserError("expected two numbers such as 30-90")
    return int(match[1]), int(match[2])
