"""The options of `generate` that say how events are drawn and steered, and what they stand for."""

import argparse
from typing import TYPE_CHECKING

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import (
    SAMPLING_OPTIONS,
    STEERING_OPTIONS,
    make_processors,
    make_sampling,
    recommended_options,
)
from dsmr_mlx.model.bundled import locate

if TYPE_CHECKING:
    from dsmr_mlx.generation.sampling import Sampling
    from dsmr_mlx.generation.steering import Steering


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
    p.add_argument(
        "--no-recommended",
        action="store_true",
        help="without the options that the checkpoint is best played with; `dsmr-mlx models` shows a bundled model's",
    )


def add_steering(p: argparse.ArgumentParser, ends: bool = True) -> None:
    """The options of `processors_of`; `ends`: with those about how a piece ends."""
    limits = p.add_argument_group(
        "limits",
        "what these forbid does not happen; keys that a prompt holds may sound on; a bundled model has defaults of its "
        "own, see `dsmr-mlx models`",
    )
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
    limits.add_argument(
        "--max-silence-seconds", metavar="X", type=float, help="it is never silent for longer: then a note begins: 2"
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
    return make_sampling(vars(a))


def processors_of(a: argparse.Namespace, seconds: float | None) -> "list[Steering]":
    """What steers, in a fixed order; `seconds`: of new music, None if it is limited otherwise.

    Raises `UserError` that names the option.
    """
    return make_processors(vars(a), seconds, getattr(a, "may_end", False))


def is_key(text: str) -> bool:
    from dsmr_mlx.generation.steering.pitches import pitch_classes_of_key

    try:
        return bool(pitch_classes_of_key(text))
    except UserError:
        return False


def recommend(a: argparse.Namespace) -> None:
    """Fill in what is not given with the options that the checkpoint recommends, see `options.recommended_options`.

    None of them with --no-recommended. How a piece ends is left alone where its length is given, or it does not end; a
    saved state goes on as it was.
    Raises `UserError` for a checkpoint that there is not, and for options that there are not.
    """
    whole = f"{a.key} {a.checkpoint}"  # of which the shell may have made two words
    if a.key and a.checkpoint and is_key(whole) and not locate(a.checkpoint).exists():
        raise UserError(f'--key {whole}: expected it in quotes, --key "{whole}"')
    if a.no_recommended:
        if a.from_state is not None:
            raise UserError("--no-recommended: not with --from-state, which goes on as it was")
        return
    options = recommended_options(a.checkpoint)
    if a.from_state is not None:
        return
    free = hasattr(a, "tokens") and a.seconds is None and a.tokens is None and a.save_state is None
    for name, value in options.items():
        if getattr(a, name) is None and (free or name != "end_within"):
            setattr(a, name, value)


def refuse_beside_state(a: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` for options beside --from-state with which the saved player would not go on as it was: those of
    this module, and others by name.
    """
    if not a.from_state:
        raise UserError("--from-state: expected FILE.safetensors")
    for name in (*SAMPLING_OPTIONS, *STEERING_OPTIONS, *names):
        if getattr(a, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: not with --from-state, which goes on as it was")
