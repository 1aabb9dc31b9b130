"""`dsmr-mlx report`: write a page about a training run."""

import argparse

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import show_file


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "report", run, "dsmr-mlx report runs/first")
    p.add_argument("run_dir", metavar="RUN", help="the folder of the run, which may still be running")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    p.add_argument("--force", action="store_true", help="overwrite FILE.html")


def run(a: argparse.Namespace) -> None:
    """Write the report of a run."""
    from dsmr_mlx.training.report import write_report

    show_file(write_report(a.run_dir, a.out, a.force))
