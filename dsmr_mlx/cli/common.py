"""Options, checks and conversions that several commands share."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli.console import hint_blas
from dsmr_mlx.cli.parser import COMMANDS, HelpFormatter, Parser
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.bundled import DEFAULT

if TYPE_CHECKING:
    from dsmr_mlx.model.dsmr import DSMR
    from dsmr_mlx.tokenizers.base import Tokenizer


def add_command(commands, name: str, run: Callable[[argparse.Namespace], None], *examples: str) -> Parser:
    """Add and return the parser of a command. The help ends with the examples.

    `run` is called with the parsed arguments; `with_options` among them is the method of the parser.
    """
    help = COMMANDS[name]
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *examples]),
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, with_options=parser.with_options)
    return parser


def add_tokenizer_options(p: argparse.ArgumentParser) -> None:
    """Add the options that choose a tokenizer."""
    p.add_argument(
        "--tokenizer",
        default="performance",
        metavar="NAME|DIR",
        help="performance (the default), a MidiTok tokenizer such as miditok:REMI, miditok:TSD or miditok:MIDILike, "
        "aria or aria:N for Aria's vocabulary of 17727 (the default), 17729 or 2675 ids, or a corpus, checkpoint or "
        "run to take the tokenizer from",
    )
    p.add_argument("--tokenizer-config", metavar="FILE.json", help="MidiTok settings, as saved by MidiTok")
    p.add_argument("--programs", action="store_true", help="encode instruments and drums; MidiTok and aria only")


def add_data_options(p: argparse.ArgumentParser) -> None:
    """Add the options of a measurement on a corpus."""
    p.add_argument("--split", default="validation", help="train, validation (the default) or test")
    p.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="pieces per batch (default 8); speeds depend on it"
    )
    p.add_argument(
        "--max-tokens", type=int, metavar="N", help="only a fixed sample of whole pieces, with about N tokens together"
    )


def add_output_options(p: argparse.ArgumentParser, plot: str) -> None:
    """Add --plot, with its help, --force and --json."""
    p.add_argument("--plot", metavar="FILE.png|svg", help=f"{plot}; needs matplotlib")
    p.add_argument("--force", action="store_true", help="overwrite FILE")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def add_checkpoint(p: argparse.ArgumentParser) -> None:
    """Add the optional argument that `load_checkpoint` takes."""
    p.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help=f"a checkpoint, a run (its best checkpoint) or a bundled model (default {DEFAULT}, see `dsmr-mlx models`)",
    )


def load_checkpoint(path: str | None) -> "tuple[DSMR, Tokenizer, Path]":
    """Return the model, its tokenizer and their folder, resolved because the `best` link of a run may change."""
    from dsmr_mlx.model.checkpoint import load, resolve

    folder = resolve(path).resolve()
    hint_blas()
    return *load(folder), folder


def check_positive(a: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` if one of these arguments is given and is not more than 0."""
    for name in names:
        value = getattr(a, name)
        if value is not None and not value > 0:
            raise UserError(f"`{name}` {value:g}: expected more than 0")


def name_of(checkpoint: str | None) -> str:
    """Return the name of a checkpoint for tables and file names."""
    return DEFAULT if checkpoint is None else checkpoint


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None in nested dicts and lists, as JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    """Print a value as JSON, with null for NaN and infinity."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))
