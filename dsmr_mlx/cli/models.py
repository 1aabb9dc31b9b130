"""`dsmr-mlx models`: what comes with the program."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import err, out, table
from dsmr_mlx.common.formatting import size


def add(commands) -> None:
    p = add_command(commands, "models", run, "dsmr-mlx models")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.model import bundled

    models = [bundled.describe(name) for name in bundled.names()]
    if a.json:
        print(json.dumps([model.to_dict() for model in models], indent=2))
        return
    show_models(models)


def show_models(models: Sequence[Any]) -> None:
    """A row for each `bundled.BundledModel`, and where its card is."""
    from dsmr_mlx.model.bundled import generation_options
    from dsmr_mlx.model.horizons import parse

    if not models:
        out.print("this installation has no models in it")
        return
    columns = ("parameters", "horizons", "trained on", "tokens seen", "perplexity", "size", "licence")
    rows = table("name", *columns)
    for i in (2, 3, 7):
        rows.columns[i].justify = "left"
    for m in models:
        horizons = parse(f"custom:{','.join(map(str, m.horizons))}", len(m.horizons)).summary
        counts = (f"{m.parameters:,}", horizons, m.data, f"{m.tokens:,}", f"{m.perplexity:.3f}", size(m.bytes))
        rows.add_row(m.name, *counts, m.licence)
    out.print(rows)
    out.print()
    for m in models:
        out.print(f"{m.name}: perplexity of its {m.split} split; {m.terms}; card: {m.path / 'README.md'}")
        if options := generation_options(m.path):
            shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
            out.print(f"{m.name}: played with {shown}, but for what is said otherwise")
    out.print("a name stands for its model wherever a CHECKPOINT is expected; the first one is the default")


def show_licence(folder: Path) -> None:
    """Whose a model is, if it is one that comes with the program."""
    from dsmr_mlx.model.bundled import bundled

    if model := bundled(folder):
        err.print(model.notice)


def show_listening(paths: Sequence[Path]) -> None:
    """How to hear what was made."""
    first = paths[0]
    files = f"{first}" if len(paths) == 1 else f"{first} and {len(paths) - 1} more"
    page = first.with_suffix(".html")
    out.print(f"{files}: any MIDI player plays it, and so does a browser: dsmr-mlx show {first} --html {page}")
