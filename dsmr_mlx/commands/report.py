"""`dsmr-mlx report`: a page about a run."""

import argparse

from dsmr_mlx.commands.common import add_command


def add(commands) -> None:
    p = add_command(
        commands,
        "report",
        run,
        "make one HTML page of a training run: curves, memory, samples, settings",
        "dsmr-mlx report runs/first",
    )
    p.add_argument("run_dir", metavar="RUN", help="the folder of the run, which may be going on")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    p.add_argument("--force", action="store_true", help="overwrite FILE.html")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.report import write_report

    path = write_report(a.run_dir, a.out, a.force)
    console.out.print(f"{path}: {console.size(path.stat().st_size)}")
