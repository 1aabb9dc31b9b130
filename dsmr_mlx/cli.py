"""The command line: `dsmr-mlx COMMAND`. Arguments in, calls out; what is shown is in `console`.

Every command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsmr_mlx import __version__
from dsmr_mlx.commands import (
    assess,
    compare,
    convert,
    evaluate,
    generate,
    horizons,
    live,
    models,
    prepare,
    report,
    show,
    tokenize,
    train,
)
from dsmr_mlx.errors import UserError

COMMANDS = (
    *(prepare, tokenize, train, evaluate, compare, generate, live),
    *(assess, show, models, convert, horizons, report),
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after an error of the user's, 1 after one of the system's.

    Either is shown as one line.
    """
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror or f"system: {error}", 1
        )
    except ImportError as error:
        return fail(f"{error.name or 'a library'}: cannot be imported ({error})", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


def fail(message: str, code: int) -> int:
    print(f"dsmr-mlx: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def make_parser() -> Parser:
    parser = Parser(
        prog="dsmr-mlx",
        description="Full-piece piano-music modelling: MIDI folder in, trained model and new music out.",
    )
    parser.add_argument("--version", action="version", version=f"dsmr-mlx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
