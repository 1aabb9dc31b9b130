"""The sampling and steering options of `generate` and `live`."""

import argparse
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import (
    SAMPLING_OPTIONS,
    STEERING_OPTIONS,
    make_processors,
    make_sampling,
    recommended_options,
)
from dsmr_mlx.model.bundled import locate


def add_sampling(p: argparse.ArgumentParser) -> None:
    """Add the options of sampling, and --no-recommended."""
    p.add_argument(
        "--temperature",
        metavar="T|S:T,S:T",
        help="default 1; lower is more predictable, 0 is greedy; pairs SECONDS:TEMPERATURE such as 0:1.2,30:0.9 change "
        "it over time, counted from the end of the prompt, also across --save-state",
    )
    p.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens (default 0: all)")
    p.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the most likely tokens that together reach probability P (default 1: all)",
    )
    p.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the most likely one (default 0: all)",
    )
    p.add_argument(
        "--no-recommended",
        action="store_true",
        help="ignore the options that the checkpoint recommends; `dsmr-mlx models` shows those of bundled models",
    )


def add_steering(p: argparse.ArgumentParser, ends: bool = True) -> None:
    """Add the options of steering; ends: include --end-within."""
    add_limits(p, ends)
    add_biases(p)


def add_limits(p: argparse.ArgumentParser, ends: bool) -> None:
    """Add the hard constraints; ends: include --end-within."""
    limits = p.add_argument_group(
        "limits",
        "hard constraints on the new music (keys held by the prompt may keep sounding); for the defaults of a bundled "
        "model see `dsmr-mlx models`",
    )
    limits.add_argument(
        "--pitch-range", metavar="LOW-HIGH", help="keys, as MIDI numbers or names: 48-84, C3-C6 (C4 is 60)"
    )
    limits.add_argument(
        "--key", help='only the pitches of a key: "C major", "F# minor", "D dorian", "G minor pentatonic"'
    )
    limits.add_argument("--pitch-classes", metavar="P,P,P", help="only these pitch classes: 0,4,7 or C,E,G")
    limits.add_argument("--avoid-pitch-classes", metavar="P,P,P", help="without these pitch classes: 1,6 or C#,F#")
    limits.add_argument("--velocity-range", metavar="LOW-HIGH", help="MIDI velocities from 1 to 127: 30-90")
    limits.add_argument("--max-polyphony", type=int, metavar="N", help="at most N keys down at a time: 6")
    limits.add_argument(
        "--max-note-seconds",
        type=float,
        metavar="X",
        help="release each key within X seconds; releases become more likely from X/2",
    )
    limits.add_argument(
        "--max-silence-seconds", metavar="X", type=float, help="start a note after at most X seconds of silence: 2"
    )
    p.set_defaults(end_within=None)
    if ends:
        limits.add_argument(
            "--end-within",
            type=float,
            metavar="N",
            help="after --seconds let the model end the piece at a silence, at most N seconds later: 10",
        )


def add_biases(p: argparse.ArgumentParser) -> None:
    """Add the soft constraints."""
    biases = p.add_argument_group("biases", "soft constraints: they make events more or less likely")
    biases.add_argument(
        "--pitch-temperature",
        type=float,
        metavar="T",
        help="temperature of the choice between keys alone; below 1 fewer wrong notes, 1 is neutral: 0.85",
    )
    biases.add_argument(
        "--tonality",
        type=float,
        metavar="S",
        help="above 0 keep to the pitch classes, and so to the key, of the music so far, 0 is neutral: 0.2",
    )
    biases.add_argument(
        "--tempo",
        type=float,
        metavar="B",
        help="above 0 slower, below 0 faster; 1 makes a pause of twice the length twice as likely",
    )
    biases.add_argument(
        "--dynamics",
        type=float,
        metavar="B",
        help="above 0 louder, below 0 softer: nats between the softest and the loudest velocity, such as 3",
    )
    biases.add_argument("--density", type=float, metavar="N", help="aim for N notes per second, such as 6")
    biases.add_argument(
        "--loop-penalty",
        type=float,
        metavar="NATS",
        help="discourage repeated cycles of up to 64 events, more with each repetition: 1",
    )


def playing_options(a: argparse.Namespace, seconds: float | None = None) -> dict[str, Any]:
    """Return the `sampling` and the `processors` of the options, as arguments of `Player`.

    seconds: length of the new music, None if it is limited in another way. Raises `UserError` for invalid values.
    """
    options, may_end = vars(a), getattr(a, "may_end", False)
    return {"sampling": make_sampling(options), "processors": make_processors(options, seconds, may_end)}


def is_key(text: str) -> bool:
    """Whether a text is a musical key."""
    from dsmr_mlx.generation.steering.pitches import pitch_classes_of_key

    try:
        return bool(pitch_classes_of_key(text))
    except UserError:
        return False


def fill_recommended(a: argparse.Namespace, one_short_piece: bool = False) -> None:
    """Fill in the options that the checkpoint recommends and the user has not given.

    Nothing is filled in with --no-recommended or --from-state, nor `end_within` if the length is given, nor `best_of`
    unless it is for `one_short_piece`. Raises `UserError` for a missing checkpoint and unknown recommended options.
    """
    whole = f"{a.key} {a.checkpoint}"  # --key C major: "major" is parsed as the checkpoint
    if a.key and a.checkpoint and is_key(whole) and not locate(a.checkpoint).exists():
        raise UserError(f'--key {whole}: expected quotes: --key "{whole}"')
    if a.no_recommended:
        if a.from_state is not None:
            raise UserError("--no-recommended: not with --from-state, which keeps the options of the state")
        return
    options = recommended_options(a.checkpoint)
    if a.from_state is not None:
        return
    # `live` has no --tokens and never ends a piece.
    may_be_ended = hasattr(a, "tokens") and a.seconds is None and a.tokens is None and a.save_state is None
    apply = {"end_within": may_be_ended, "best_of": one_short_piece}
    for name, value in options.items():
        if apply.get(name, True) and getattr(a, name) is None:
            setattr(a, name, value)


def refuse_with_state(a: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` for options given with --from-state that the state fixes: those of this module and `names`."""
    if not a.from_state:
        raise UserError("--from-state: expected FILE.safetensors")
    for name in (*SAMPLING_OPTIONS, *STEERING_OPTIONS, *names):
        if getattr(a, name) is not None:
            raise UserError(f"`{name}`: not with --from-state, which keeps the options of the state")
