"""The command line, `dsmr-mlx COMMAND`: one module per command, with its options, its call and its output.

A command imports MLX and other large libraries only when it runs, so that `--help` is fast.
"""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial

from dsmr_mlx import __version__
from dsmr_mlx.cli.parser import COMMANDS, Parser
from dsmr_mlx.cli.terminal import encode_leniently, one_message
from dsmr_mlx.common.claims import claiming
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.signals import ENDING_SIGNALS, Ended, end, handled
from dsmr_mlx.music.repairs import RepairWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit code: 0, 2 after invalid input, 1 after a system error, 130 after Ctrl-C,
    128 + N after signal N. `generate`, which completes its files, returns 130 after any of them, `live` 0.

    An error is one line on standard error. Without a command, print the help and return 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    encode_leniently(sys.stdout, sys.stderr)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        parser = make_parser(command)
        arguments = parser.parse_args(argv)
        if "run" not in arguments:
            parser.print_help(sys.stderr)
            return 2
        with warnings.catch_warnings():
            warnings.simplefilter("always", RepairWarning)
            warnings.showwarning = partial(show_warning, warnings.showwarning)
            with claiming(), handled(end, ENDING_SIGNALS):
                if os.environ.get("DSMR_DEVICE"):  # without it MLX may not be needed
                    importlib.import_module("dsmr_mlx.model.device").choose_device()
                arguments.run(arguments)
        if sys.stdout is not None:  # None if it was closed before the start
            sys.stdout.flush()
    except UserError as error:
        return fail(arguments.with_options(str(error)), 2)
    except BrokenPipeError:
        return leave_quietly()
    except OSError as error:
        return fail(
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror or f"system: {error}", 1
        )
    except (MemoryError, RuntimeError) as error:
        if "Symlink loop" in str(error):  # from `Path.resolve`
            return fail(f"{str(error).partition('from ')[2]}: a link to itself", 2)
        if out_of_memory(error):
            return fail(f"not enough memory ({error})", 1)
        if gpu_failed(error):
            again = ": --resume continues from the last checkpoint" if command == "train" else ""
            return fail(f"the GPU failed ({error}){again}", 1)
        raise
    except ImportError as error:
        return fail(f"{error.name or 'a library'}: cannot be imported ({error})", 1)
    except Ended as error:
        return fail(f"ended by {error.signal.name}", 128 + error.signal)
    except KeyboardInterrupt:
        print("dsmr-mlx: interrupted", file=sys.stderr)  # not an error: files written so far are complete
        return 130
    return 0


def make_parser(command: str | None) -> Parser:
    """Return the parser of `dsmr-mlx` with the options of one command. The modules of the others are not imported."""
    parser = Parser(
        prog="dsmr-mlx",
        description="Full-piece piano-music modelling: train a model on MIDI files and make new music with it.",
    )
    parser.add_argument("--version", action="version", version=f"dsmr-mlx {__version__}")
    parser.commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, help in COMMANDS.items():
        if name == command:
            importlib.import_module(f"dsmr_mlx.cli.{name}").add(parser.commands)
        else:
            parser.commands.add_parser(name, help=help)
    return parser


def show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place) -> None:
    """Print a `RepairWarning` as one line; other warnings as Python does."""
    if issubclass(category, RepairWarning):
        print(f"warning: {one_message(str(message))}", file=sys.stderr)
    else:
        otherwise(message, category, *place)


def leave_quietly() -> int:
    """Silence the closed pipe and return the exit code of a process ended by SIGPIPE. For readers such as `head`."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # Python flushes them again at exit
        os.dup2(silence, stream.fileno())
    return 128 + signal.SIGPIPE


def out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, in Python, NumPy or MLX, which raises a `RuntimeError` for it."""
    return isinstance(error, MemoryError) or "malloc" in str(error)


def gpu_failed(error: Exception) -> bool:
    """Return whether Metal has reported an error, after which it computes nothing more in this process."""
    return str(error).lower().startswith(("[metal]", "[metal::"))


def fail(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    print(f"dsmr-mlx: error: {one_message(message)}", file=sys.stderr)
    return code
