"""The options that every benchmark has for what it leaves behind, and the writing of it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import save

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.plotting import check_picture


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that `write_outputs` follows."""
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw it, PNG or SVG")


def picture_path(text: str) -> Path:
    """For `type=` of an option: a file that a picture can be written to, known before the work that it shows."""
    try:
        return check_picture("--plot", text, force=True)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--plot ")) from None


def write_outputs(a: argparse.Namespace, result: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """The result as JSON and as a picture, where these are asked for."""
    if a.json:
        save(a.json, result)
    if a.plot:
        draw(a.plot)
