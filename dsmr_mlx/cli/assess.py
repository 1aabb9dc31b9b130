"""`dsmr-mlx assess`: compare generated music with real music."""

import argparse
import math
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, add_output_options, print_json
from dsmr_mlx.cli.console import err, out, progress, show_file, table
from dsmr_mlx.common.formatting import format_number, format_time

if TYPE_CHECKING:
    from dsmr_mlx.evaluation.music.assess import Assessment
    from dsmr_mlx.evaluation.music.copies import SharedRun, SharedWithTraining


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "assess", run, "dsmr-mlx assess generated --reference corpus --plot assessed.png")
    p.add_argument("paths", nargs="+", metavar="PATH", help="MIDI files, .npy files of ids, or folders of them")
    p.add_argument("--reference", metavar="CORPUS|DIR", help="real music: a corpus, or a folder of MIDI files")
    p.add_argument("--split", metavar="NAME", help="split of the reference corpus (default validation)")
    p.add_argument(
        "--excerpts", type=int, default=100, metavar="N", help="excerpts of the reference, as long as the files (100)"
    )
    p.add_argument("--seed", type=int, default=0, help="random seed of the excerpts (default 0)")
    p.add_argument(
        "--training",
        metavar="CORPUS|DIR",
        help="training data: a corpus (its training split), or a folder of MIDI files; shows the longest runs of "
        "events that the files share with it, and those of the reference; takes a minute for 85 hours of music",
    )
    add_output_options(p, "draw the distributions")


def run(a: argparse.Namespace) -> None:
    """Assess generated music."""
    from dsmr_mlx.common.errors import UserError
    from dsmr_mlx.common.files import write_output
    from dsmr_mlx.common.plotting import check_picture
    from dsmr_mlx.evaluation.music.assess import assess
    from dsmr_mlx.evaluation.music.plot import distributions_picture

    if a.reference is None and a.split is not None:
        raise UserError(f"--split {a.split}: expected --reference CORPUS with it")
    if a.plot is not None:
        path = check_picture("--plot", a.plot, a.force)
    options = {"split": a.split, "excerpts": a.excerpts, "seed": a.seed, "training": a.training}
    with progress("reading music", "steps", quiet=a.json) as update:
        assessment = assess(a.paths, a.reference, **options, progress=update)
    if a.plot is not None:
        write_output("--plot", path, distributions_picture(assessment, path.suffix.lower()[1:]))
    if a.json:
        print_json(assessment.to_dict())
        return
    show_assessment(assessment)
    if a.plot is not None:
        show_file(path)


def show_assessment(assessment: "Assessment") -> None:
    """Show the files, the comparison with the reference, runs shared with training data, and warnings."""
    for skipped in [s for part in (assessment, assessment.reference, assessment.shared) if part for s in part.skipped]:
        err.print(f"skipped {skipped.source}: {skipped.reason}")
    columns = ("notes", "seconds", "notes/s", "polyphony", "max", "silence", "longest note", "loop", "errors")
    files = table("file", *columns)
    for f in assessment.files:
        figures = (f"{f.notes:,}", f"{f.seconds:.1f}", f"{f.notes_per_second:.1f}", f"{f.mean_polyphony:.1f}")
        loop = f"{f.loop.copies} × {f.loop.length}" if f.loop else "–"
        errors = "–" if f.syntax_errors is None else str(f.syntax_errors)
        times = (f"{f.longest_silence:.1f} s", f"{f.longest_note:.1f} s")
        files.add_row(f.name, *figures, str(f.max_polyphony), *times, loop, errors)
    out.print(files)
    if assessment.reference is not None:
        out.print()
        show_set_comparison(assessment)
    if assessment.shared is not None:
        out.print()
        show_shared(assessment.shared)
    warnings = [f"{f.name}: {warning}" for f in assessment.files for warning in f.warnings]
    if warnings:
        out.print()
    for warning in warnings:
        out.print(f"warning: {warning}")


def show_set_comparison(assessment: "Assessment") -> None:
    """Show the features of the files and of the reference, and how much they overlap."""

    def decimal(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "–"

    def centre(median: float, mean: float) -> str:
        return " / ".join(format_number(round(value, 3)) for value in (median, mean)) if math.isfinite(mean) else "–"

    reference = assessment.reference
    out.print(
        f"compared with {len(reference.music)} excerpts of {reference.pieces} {reference.kind}, as long as the files"
    )
    columns = ("generated", "reference", "overlap", "real", "KL", "OA", "real", "KL of distances")
    result = table("median / mean of the pieces", *columns)
    for c in assessment.compared:
        figures = (c.overlap, c.real_overlap, c.kl, c.oa, c.real_oa, c.distance_kl)
        result.add_row(c.title, centre(*c.generated), centre(*c.reference), *map(decimal, figures))
    out.print(result)
    out.print(
        "overlap, KL: over all notes or times; OA: over distances between pieces; real: the same for other real pieces"
    )
    low = ", ".join(f"{c.title} {c.overlap:.2f} (real {decimal(c.real_overlap)})" for c in assessment.low)
    out.print(f"overlap below 0.8: {low}" if low else "every overlap is 0.8 or more")
    if assessment.discrimination is not None:
        out.print(str(assessment.discrimination))
    for remark in assessment.remarks:
        out.print(f"note: {remark}")


def show_shared(shared: "SharedWithTraining") -> None:
    """Show the longest runs of events that the files share with training pieces, in each reading."""

    def figures(found: dict[str, float | None]) -> list[str]:
        return [f"{found['median']:.0f}", "–" if found["longest"] is None else f"{found['longest']}"]

    out.print(f"longest runs shared with {shared.pieces:,} {shared.kind}, {shared.events:,} events")
    files, compared = (len(runs) for runs in (shared.readings[0].generated, shared.readings[0].reference))
    rows = table("", "median", "longest", *(("of reference: median", "longest") if compared else ()))
    for reading in shared.readings:
        rows.add_row(reading.title, *(cell for found in reading.summaries.values() for cell in figures(found)))
    out.print(rows)
    if 0 < compared < files:
        out.print(f"{compared} excerpts of the reference for {files} files: their longest runs cannot be compared")
    for reading in shared.readings:
        out.print(f"{reading.title}: {describe_run(max(reading.generated, key=lambda run: run.length))}")


def describe_run(run: "SharedRun") -> str:
    """Describe a shared run: its length, and where it is in the file and in the training piece."""
    if run.piece is None:
        return f"no shared run in {run.name}"
    moved = f", {run.semitones:+d} semitones" if run.semitones else ""
    what = f"{run.length} in {run.seconds:.1f} s on {run.pitches} pitches"
    return f"{what}, {run.name} at {format_time(run.at)} and {run.piece} at {format_time(run.piece_at)}{moved}"
