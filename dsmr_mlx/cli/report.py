"""`dsmr-mlx report`: a page about a run."""

import argparse

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import out
from dsmr_mlx.common.formatting import size


def add(commands) -> None:
    p = add_command(
        commands,
        "report",
        run,
        "dsmr-mlx report runs/first",
    )
    p.add_argument("run_dir", metavar="RUN", help="the folder of the run, which may be going on")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    p.add_argument("--force", action="store_true", help="overwrite FILE.html")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.training.report import write_report

    path = write_report(a.run_dir, a.out, a.force)
    out.print(f"{path}: {size(path.stat().st_size)}")
