"""`dsmr-mlx prepare`: MIDI files → a corpus."""

import argparse

from dsmr_mlx.commands.common import add_command


def add(commands) -> None:
    p = add_command(
        commands,
        "prepare",
        run,
        "turn a folder of MIDI files into a corpus",
        "dsmr-mlx prepare ~/maestro-v3.0.0 --out corpus",
    )
    p.add_argument("midi_dir", metavar="MIDI_DIR", help="a folder of MIDI files, or MAESTRO's layout with its CSV")
    p.add_argument("--out", required=True, metavar="CORPUS", help="the folder to write")
    p.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="of the files, where no CSV says which (default 0.1)",
    )
    p.add_argument("--seed", type=int, default=0, help="of that choice (default 0)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: several from some thousand files on)")
    p.add_argument("--force", action="store_true", help="replace a corpus made from other files")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.prepare import prepare

    with console.progress("reading MIDI", "files") as progress:
        report = prepare(
            a.midi_dir,
            a.out,
            validation_fraction=a.validation_fraction,
            seed=a.seed,
            workers=a.workers,
            force=a.force,
            progress=progress,
        )
    console.show_prepare_report(report)
