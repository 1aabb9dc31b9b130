"""`dsmr-mlx prepare`: MIDI files → a corpus."""

import argparse

from dsmr_mlx.commands.common import add_command, add_tokenizer_options


def add(commands) -> None:
    p = add_command(
        commands,
        "prepare",
        run,
        "turn a folder of MIDI files into a corpus",
        "dsmr-mlx prepare ~/maestro-v3.0.0 --out corpus\n"
        "  dsmr-mlx prepare pop --tokenizer miditok:REMI --programs --out corpus",
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
    add_tokenizer_options(p)
    p.add_argument(
        "--subwords",
        metavar="MODEL:SIZE",
        help="learn which events to put together: bpe:2000 or unigram:2000 for 2000 ids, with SentencePiece",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: several where that takes long)")
    p.add_argument("--force", action="store_true", help="replace a corpus made from other files")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.prepare import prepare
    from dsmr_mlx.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(a.tokenizer, a.tokenizer_config, a.programs)
    with console.progress("reading MIDI", "files") as progress:
        report = prepare(
            a.midi_dir,
            a.out,
            tokenizer=tokenizer,
            subwords=a.subwords,
            validation_fraction=a.validation_fraction,
            seed=a.seed,
            workers=a.workers,
            force=a.force,
            progress=progress,
            learning=lambda events: console.err.print(f"learning {a.subwords} from {events:,} events"),
        )
    console.show_prepare_report(report)
