"""`dsmr-mlx models`: list the bundled models."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, print_json
from dsmr_mlx.cli.console import err, out, table
from dsmr_mlx.common.formatting import format_bytes

if TYPE_CHECKING:
    from dsmr_mlx.model.bundled import BundledModel


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "models", run, "dsmr-mlx models")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(a: argparse.Namespace) -> None:
    """List the bundled models."""
    from dsmr_mlx.model import bundled

    models = [bundled.load_card(name) for name in bundled.names()]
    if a.json:
        print_json([model.to_dict() for model in models])
        return
    show_models(models)


def show_models(models: "Sequence[BundledModel]") -> None:
    """Show a row for each model, its card and its recommended options."""
    from dsmr_mlx.model.checkpoint_folder import generation_options
    from dsmr_mlx.model.horizons import HorizonSchedule

    if not models:
        out.print("this installation has no bundled models")
        return
    columns = ("parameters", "horizons", "trained on", "tokens seen", "perplexity", "size", "licence")
    rows = table("name", *columns)
    for i in (2, 3, 7):
        rows.columns[i].justify = "left"
    for m in models:
        horizons = HorizonSchedule.custom(m.horizons).summary
        counts = (f"{m.parameters:,}", horizons, m.data, f"{m.tokens:,}", f"{m.perplexity:.3f}", format_bytes(m.bytes))
        rows.add_row(m.name, *counts, m.licence)
    out.print(rows)
    out.print()
    for m in models:
        out.print(f"{m.name}: perplexity on its {m.split} split; {m.terms}; card: {m.path / 'README.md'}")
        if options := generation_options(m.path):
            shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
            out.print(f"{m.name}: default options of generate and live: {shown}")
    out.print("these names are valid wherever a CHECKPOINT is expected; the first model is the default")


def show_licence(folder: Path) -> None:
    """Show the licence notice of a bundled model."""
    from dsmr_mlx.model.bundled import find_by_folder

    if model := find_by_folder(folder):
        err.print(model.notice)


def show_listening(paths: Sequence[Path]) -> None:
    """Show how to listen to the generated files."""
    first = paths[0]
    files = f"{first}" if len(paths) == 1 else f"{first} and {len(paths) - 1} more"
    page = first.with_suffix(".html")
    out.print(f"{files}: listen with any MIDI player, or in a browser: dsmr-mlx show {first} --html {page}")
