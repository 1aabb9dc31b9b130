"""The output options of all benchmarks, and what else their command lines share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import save

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.plotting import check_picture


def run_main(main: Callable[[], None]) -> None:
    """Call the main function of a benchmark; invalid input ends it with one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def numbers(text: str) -> list[int]:
    """An argparse type: integers separated by commas."""
    return [int(word) for word in text.split(",")]


def add_outputs(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    """Add the options of `write_outputs`."""
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    if plot:
        parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw the results, PNG or SVG")


def picture_path(text: str) -> Path:
    """An argparse type: a writable path for a picture, checked before the work starts."""
    try:
        return check_picture("--plot", text, force=True)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--plot ")) from None


def write_outputs(a: argparse.Namespace, result: dict[str, Any], draw: Callable[[Path], None] | None = None) -> None:
    """Write the result as JSON and, with `draw`, as a picture, if requested."""
    if a.json:
        save(a.json, result)
    if draw and a.plot:
        draw(a.plot)
