"""`dsmr-mlx prepare`: turn MIDI files into a corpus."""

import argparse
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, add_tokenizer_options
from dsmr_mlx.cli.console import count, err, out, progress

if TYPE_CHECKING:
    from dsmr_mlx.data.prepare import PrepareReport

MAX_LISTED = 5  # skipped files with the same reason


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "prepare",
        run,
        "dsmr-mlx prepare ~/maestro-v3.0.0 --out corpus",
        "dsmr-mlx prepare pop --tokenizer miditok:REMI --programs --out corpus",
    )
    p.add_argument("midi_dir", metavar="MIDI_DIR", help="a folder of MIDI files, or MAESTRO as downloaded")
    p.add_argument("--out", required=True, metavar="CORPUS", help="the folder to write")
    p.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="fraction of the files for validation if the folder has no official splits (default 0.1)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed for choosing them (default 0)")
    p.add_argument(
        "--strict-splits", action="store_true", help="refuse official splits, as in MAESTRO, if they share a work"
    )
    add_tokenizer_options(p)
    p.add_argument(
        "--subwords",
        metavar="MODEL:SIZE",
        help="learn subwords of events with SentencePiece: bpe:2000 or unigram:2000 for 2000 ids",
    )
    p.add_argument("--workers", type=int, metavar="N", help="number of processes (default: several for large folders)")
    p.add_argument("--force", action="store_true", help="replace a corpus made from other files")


def run(a: argparse.Namespace) -> None:
    """Prepare a corpus."""
    from dsmr_mlx.data.prepare import prepare
    from dsmr_mlx.tokenizers.registry import make_tokenizer

    tokenizer = make_tokenizer(a.tokenizer, a.tokenizer_config, a.programs)
    with progress("reading MIDI", "files") as update:
        report = prepare(
            a.midi_dir,
            a.out,
            tokenizer=tokenizer,
            subwords=a.subwords,
            validation_fraction=a.validation_fraction,
            seed=a.seed,
            strict_splits=a.strict_splits,
            workers=a.workers,
            force=a.force,
            progress=update,
            learning=lambda events: err.print(f"learning {a.subwords} from {events:,} events"),
        )
    show_prepare_report(report)


def show_prepare_report(report: "PrepareReport") -> None:
    """Show what is in the corpus, warnings, and skipped files."""
    splits = ", ".join(f"{n} {split}" for split, n in report.pieces.items())
    show_warnings(report)
    if report.up_to_date:
        out.print(f"{report.out} is up to date: {splits}, {report.tokens:,} tokens")
        return
    show_repaired(report)
    show_skipped(report)
    hours = f"{report.seconds / 3600:.1f} hours" if report.seconds >= 3600 else f"{report.seconds / 60:.1f} minutes"
    out.print(f"{report.out}: {splits}")
    if report.events > report.tokens:
        out.print(f"{report.events:,} events in {report.tokens:,} subwords, {report.events / report.tokens:.2f} each")
    amount = f"{count(report.tokens, 'token')}, {count(report.notes, 'note')}, {hours} of music"
    repaired = f"{count(len(report.repaired), 'file')} repaired, " if report.repaired else ""
    out.print(f"{amount}; {repaired}{count(len(report.skipped), 'file')} skipped; {report.wall_seconds:.1f} s")


def show_warnings(report: "PrepareReport") -> None:
    """Show works in several official splits, ignored splits, a missing validation part and losses of the encoding."""
    if report.shared_works:
        err.print(f"warning: {count(len(report.shared_works), 'work')} in several of the official splits:")
        for work in report.shared_works:
            err.print(f"  {work}")
    for path in report.unused_metadata:
        err.print(f"warning: the split in {path} is not used, prepare its folder to use it")
    if lost := report.notes - report.notes_encoded:
        err.print(f"warning: {report.tokenizer} cannot encode {lost:,} of {report.notes:,} notes")
    if not report.pieces.get("validation"):
        err.print("note: no piece is for validation, so a training will not be validated")
    if report.out_of_time:
        pieces = f"{report.out_of_time:,} of {sum(report.pieces.values()):,} pieces"
        err.print(f"warning: {report.tokenizer} changes the duration of {pieces} by more than 1 s")


def show_repaired(report: "PrepareReport") -> None:
    """Show what was repaired or dropped in the files: each of a few, or the sums."""
    from dsmr_mlx.data.corpus import INDEX
    from dsmr_mlx.music.repairs import describe_repairs

    if len(report.repaired) <= MAX_LISTED:
        for source, repairs in report.repaired.items():
            err.print(f"repaired {source}: {describe_repairs(repairs)}")
        return
    err.print(f"repaired {len(report.repaired):,} files (all in {report.out / INDEX}):")
    for repair in dict.fromkeys(repair for repairs in report.repaired.values() for repair in repairs):
        counts = [repairs[repair] for repairs in report.repaired.values() if repair in repairs]
        err.print(f"  {repair}: {sum(counts):,} in {count(len(counts), 'file')}")


def show_skipped(report: "PrepareReport") -> None:
    """Show skipped files with their reasons; many files with one reason in one line."""
    from dsmr_mlx.data.corpus import INDEX

    sources: dict[str, list[str]] = {}
    for skipped in report.skipped:
        sources.setdefault(skipped.reason, []).append(skipped.source)
    for reason, names in sources.items():
        if len(names) > MAX_LISTED:
            err.print(f"skipped {len(names):,} files ({names[0]}, …; all in {report.out / INDEX}): {reason}")
        else:
            for name in names:
                err.print(f"skipped {name}: {reason}")
