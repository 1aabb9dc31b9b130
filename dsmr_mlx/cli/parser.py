"""The argument parser of all commands: one-line errors with hints, numbers such as 1e6 and -1e-3."""

import argparse
import re
from typing import NoReturn

from dsmr_mlx.common.errors import did_you_mean

# command → what it does, in the order of `dsmr-mlx --help`
COMMANDS = {
    "prepare": "turn a folder of MIDI files into a corpus",
    "tokenize": "show the tokens of a MIDI file, how many, and what is lost",
    "train": "train a model on a corpus",
    "evaluate": "measure how well a model predicts whole pieces",
    "compare": "compare checkpoints: how well they predict, what they remember, and what they cost on this machine",
    "generate": "make new music, from nothing or from where a MIDI file stops",
    "live": "play with the model: it listens, and answers until you play again",
    "assess": "measure generated music, and compare it with real music",
    "show": "show a MIDI file as a piano roll: here, as a picture, as a page that plays it, as sound",
    "models": "list the models that come with the program",
    "convert": "bring a PyTorch checkpoint here, take one back, cast or quantize",
    "horizons": "show what a horizon schedule gives each layer",
    "report": "make one HTML page of a training run: curves, memory, samples, settings",
}

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
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if chosen := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(chosen[1], re.findall(r"[\w-]+", chosen[2]))
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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions are wrapped, examples stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
