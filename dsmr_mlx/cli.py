"""The command line: `dsmr-mlx COMMAND`. Arguments in, calls out; what is shown is in `console`.

Every command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsmr_mlx import __version__
from dsmr_mlx.errors import UserError
from dsmr_mlx.suggestions import meant

COMMANDS = (
    *("prepare", "tokenize", "train", "evaluate", "compare", "generate", "live"),
    *("assess", "show", "models", "convert", "horizons", "report"),
)

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Errors are one line, like all others, and say what may have been meant."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register("type", float, number)
        self.register("type", int, whole_number)
        self._negative_number_matcher = NEGATIVE  # argparse takes -1e-3 for an option

    def parse_known_args(self, args=None, namespace=None):
        """Nothing may be left over: what a command does not know is its own error, not that of the program."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = meant(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if chosen := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += meant(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number") from None


def whole_number(text: str) -> int:
    """Also one such as 1e6: token counts have many zeros."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if (value := float(text)).is_integer():
            return int(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, such as 8 or 1e6")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after an error of the user's, 1 after one of the system's.

    Either is shown as one line. Without a command the help is shown, which counts as an error too.
    """
    try:
        parser = make_parser()
        arguments = parser.parse_args(argv)
        if "run" not in arguments:
            parser.print_help(sys.stderr)
            return 2
        arguments.run(arguments)
        if sys.stdout is not None:  # it was closed before we began
            sys.stdout.flush()
    except UserError as error:
        return fail(str(error), 2)
    except BrokenPipeError:
        return leave_quietly()
    except OSError as error:
        return fail(
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror or f"system: {error}", 1
        )
    except ImportError as error:
        return fail(f"{error.name or 'a library'}: cannot be imported ({error})", 1)
    except KeyboardInterrupt:
        print("dsmr-mlx: interrupted", file=sys.stderr)  # which is no error: what was made until then is whole
        return 130
    return 0


def leave_quietly() -> int:
    """The exit code where the reader of a pipe, such as `head`, has what it wanted: as if SIGPIPE had ended us."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # which Python flushes once more at the exit
        os.dup2(silence, stream.fileno())
    return 128 + signal.SIGPIPE


def fail(message: str, code: int) -> int:
    print(f"dsmr-mlx: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def make_parser() -> Parser:
    parser = Parser(
        prog="dsmr-mlx",
        description="Full-piece piano-music modelling: MIDI folder in, trained model and new music out.",
    )
    parser.add_argument("--version", action="version", version=f"dsmr-mlx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:  # imported here, where an impatient Ctrl-C is shown as what it is
        importlib.import_module(f"dsmr_mlx.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
