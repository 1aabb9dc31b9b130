"""The options of `generate` that say how events are drawn and steered, and what they stand for."""

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from dsmr_mlx.errors import UserError

if TYPE_CHECKING:
    from dsmr_mlx.sampling import Sampling
    from dsmr_mlx.steering import Steering

T = TypeVar("T")

DRAWN = ("temperature", "top_k", "top_p", "min_p")
STEERED = (
    *("pitch_range", "key", "pitch_classes", "avoid_pitch_classes", "velocity_range"),
    *("max_polyphony", "max_note_seconds", "end_within", "tempo", "dynamics", "density", "loop_penalty"),
)


def add_sampling(p: argparse.ArgumentParser) -> None:
    """The options of `sampling_of`."""
    p.add_argument(
        "--temperature",
        metavar="T|S:T,S:T",
        help="default 1; lower is safer, 0 takes the likeliest; over time as SECONDS:TEMPERATURE pairs, 0:1.2,30:0.9, "
        "from the prompt on and on through pauses (--save-state)",
    )
    p.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest events (default 0: all)")
    p.add_argument("--top-p", type=float, metavar="P", help="only the likeliest events that make up P (default 1: all)")
    p.add_argument(
        "--min-p", type=float, metavar="P", help="only events P times as likely as the best (default 0: all)"
    )


def add_steering(p: argparse.ArgumentParser, ends: bool = True) -> None:
    """The options of `processors_of`; `ends`: with those about how a piece ends."""
    limits = p.add_argument_group("limits", "what these forbid does not happen; keys that a prompt holds may sound on")
    limits.add_argument(
        "--pitch-range", metavar="LOW-HIGH", help="keys, as MIDI numbers or names: 48-84, C3-C6 (C4 is 60)"
    )
    limits.add_argument("--key", help='only its pitches: "C major", "F# minor", "D dorian", "G minor pentatonic"')
    limits.add_argument("--pitch-classes", metavar="P,P,P", help="only these: 0,4,7 or C,E,G")
    limits.add_argument("--avoid-pitch-classes", metavar="P,P,P", help="none of these: 1,6 or C#,F#")
    limits.add_argument("--velocity-range", metavar="LOW-HIGH", help="MIDI velocities from 1 to 127: 30-90")
    limits.add_argument("--max-polyphony", type=int, metavar="N", help="keys that sound at a time: 6")
    limits.add_argument(
        "--max-note-seconds", type=float, metavar="X", help="no key is held longer; from X/2 on it tends to be released"
    )
    p.set_defaults(end_within=None)
    if ends:
        limits.add_argument(
            "--end-within",
            type=float,
            metavar="N",
            help="after --seconds let the piece end in its own time, where nothing sounds, at most N seconds later: 10",
        )
    pulls = p.add_argument_group("gentle pulls", "these change how likely events are, and forbid none")
    pulls.add_argument(
        "--tempo",
        type=float,
        metavar="B",
        help="above 0 slower, below faster; with 1 twice the pause is twice as likely",
    )
    pulls.add_argument(
        "--dynamics",
        type=float,
        metavar="B",
        help="above 0 louder, below softer: nats from softest to loudest, such as 3",
    )
    pulls.add_argument("--density", type=float, metavar="N", help="about N notes a second, such as 6")
    pulls.add_argument(
        "--loop-penalty",
        type=float,
        metavar="NATS",
        help="against cycles of up to 64 events that come again and again, more each time round: 1",
    )


def sampling_of(a: argparse.Namespace) -> "Sampling":
    """How events are drawn. Raises `UserError` that names the option."""
    from dsmr_mlx.sampling import Sampling

    values = {name: getattr(a, name) for name in DRAWN if getattr(a, name) is not None}
    if "temperature" in values:
        values["temperature"] = named("temperature", a.temperature, temperature)
    for name, value in values.items():
        named(name, getattr(a, name), lambda _, only={name: value}: Sampling(**only))
    return Sampling(**values)


def processors_of(a: argparse.Namespace, seconds: float | None) -> "list[Steering]":
    """What steers, in a fixed order; `seconds`: of new music, None if it is limited otherwise.

    Raises `UserError` that names the option.
    """
    from dsmr_mlx import steering as s
    from dsmr_mlx.steering.pitches import pitch_classes, pitch_range

    if a.end_within is not None and seconds is None:
        raise UserError(f"--end-within {a.end_within:g}: expected --seconds, not --tokens")
    makers: dict[str, Callable[[Any], s.Steering]] = {
        "pitch_range": lambda text: s.PitchRange(*pitch_range(text)),
        "key": s.PitchClasses.key,
        "pitch_classes": lambda text: s.PitchClasses(pitch_classes(text)),
        "avoid_pitch_classes": lambda text: s.PitchClasses.without(pitch_classes(text)),
        "velocity_range": lambda text: s.VelocityRange(*number_range(text)),
        "max_polyphony": s.MaxPolyphony,
        "max_note_seconds": s.MaxNoteSeconds,
        "end_within": lambda within: s.EndWithin(seconds, within, a.may_end),
        "tempo": s.Tempo,
        "dynamics": s.Dynamics,
        "density": s.Density,
        "loop_penalty": s.LoopPenalty,
    }
    given = {name: getattr(a, name) for name in STEERED if getattr(a, name) is not None}
    return [named(name, value, makers[name]) for name, value in given.items()]


def refuse_beside_state(a: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` for options beside --from-state with which the saved player would not go on as it was: those of
    this module, and others by name.
    """
    if not a.from_state:
        raise UserError("--from-state: expected FILE.safetensors")
    for name in (*DRAWN, *STEERED, *names):
        if getattr(a, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: not with --from-state, which goes on as it was")


def named(name: str, value: Any, make: Callable[[Any], T]) -> T:
    """`make(value)`; a `UserError` says which option it is about."""
    try:
        return make(value)
    except UserError as error:
        raise UserError(f"--{name.replace('_', '-')} {value}: {error}") from None


def temperature(text: str) -> float | list[list[float]]:
    """`0.9`, or `0:1.2,30:0.9` as pairs. Raises `UserError`."""
    try:
        if ":" not in text:
            return float(text)
        return [[float(number) for number in pair.split(":")] for pair in text.split(",")]
    except ValueError:
        raise UserError("expected a number, or pairs SECONDS:TEMPERATURE such as 0:1.2,30:0.9") from None


def number_range(text: str) -> tuple[int, int]:
    """`30-90` → (30, 90). Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if match is None:
        raise UserError("expected two numbers such as 30-90")
    return int(match[1]), int(match[2])
