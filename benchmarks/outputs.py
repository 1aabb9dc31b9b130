"""The output options of all benchmarks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import save

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.plotting import check_picture


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options of `write_outputs`."""
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw the results, PNG or SVG")


def picture_path(text: str) -> Path:
    """An argparse type: a writable path for a picture, checked before the work starts."""
    try:
        return check_picture("--plot", text, force=True)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--plot ")) from None


def write_outputs(a: argparse.Namespace, result: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """Write the result as JSON and as a picture, if requested."""
    if a.json:
        save(a.json, result)
    if a.plot:
        draw(a.plot)
