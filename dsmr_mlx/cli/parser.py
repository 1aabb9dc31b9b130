"""The argument parser of all commands: one-line errors with hints; numbers such as 1e6 and -1e-3."""

import argparse
import re
from collections.abc import Callable, Collection
from typing import NoReturn

from dsmr_mlx.cli.terminal import one_message
from dsmr_mlx.common.errors import did_you_mean
from dsmr_mlx.common.limits import MAX_INTEGER, MAX_SIZES

# command → what it does, in the order of `dsmr-mlx --help`
COMMANDS = {
    "prepare": "turn a folder of MIDI files into a corpus",
    "tokenize": "show the tokens of a MIDI file, and the losses of a round trip",
    "train": "train a model on a corpus",
    "evaluate": "measure how well a model predicts whole pieces",
    "compare": "compare checkpoints: how well they predict, their memory, size and speed on this machine",
    "generate": "make new music, from scratch or as the continuation of a MIDI file",
    "live": "play with a model in real time: it answers when you pause",
    "studio": "open a page in the browser in which you play, listen, keep takes, and go on",
    "assess": "measure generated music and compare it with real music",
    "show": "show a MIDI file as a piano roll in the terminal, a picture, a web page that plays it, or audio",
    "models": "list the bundled models",
    "convert": "import or export a PyTorch checkpoint, change its dtype, or quantize it",
    "horizons": "show the horizon, bytes and reach of each layer under a schedule",
    "doctor": "check that everything is right on this machine, and measure its speed",
    "report": "write an HTML page about a training run: curves, memory, samples, settings",
}

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, with a "did you mean" hint.

    setting_names: returns the names that `--set` takes.
    """

    setting_names: Callable[[], Collection[str]] = tuple
    _words = ""  # the command line

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register("type", float, number)
        self.register("type", int, whole_number)
        self._negative_number_matcher = NEGATIVE  # argparse would take -1e-3 for an option

    def parse_known_args(self, args=None, namespace=None):
        """Report unknown arguments as an error of the command, not of the program."""
        self._words = " ".join(map(str, args or ()))
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        for name, most in MAX_SIZES.items():
            value = getattr(namespace, name, None)
            if type(value) is int and value > most:
                self.error(f"argument {self._spelling(name)}: found {value:,}, expected at most {most:,}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Print the error as one line and exit with code 2."""
        if chosen := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        self.exit(2, f"{self.prog}: error: {one_message(message)} (see {self.prog} --help)\n")

    def with_options(self, message: str) -> str:
        """Replace the arguments in a message of the library, written `like_this`, by the options --like-this.

        Names that the user typed in backquotes, such as those of files, are left alone.
        """
        return re.sub(r"`(\w+)`", lambda m: m[0] if m[0] in self._words else self._spelling(m[1]), message)

    def _spelling(self, argument: str) -> str:
        for action in self._actions:
            if action.dest == argument:
                return action.option_strings[-1] if action.option_strings else action.metavar
        return f"--set {argument}" if argument in self.setting_names() else argument


def number(text: str) -> float:
    """Parse a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number") from None


def whole_number(text: str) -> int:
    """Parse a whole number, also one like 1e6; of at most 64 bits, as MLX and NumPy have."""
    for parse in (int, float):
        try:
            value = parse(text)
        except ValueError:
            continue
        if -MAX_INTEGER <= value <= MAX_INTEGER and value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, such as 8 or 1e6")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A help formatter that wraps descriptions and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
