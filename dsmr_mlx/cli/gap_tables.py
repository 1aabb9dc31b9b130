"""`dsmr-mlx evaluate --gaps`: what it is worth to be shown what follows a gap."""

import argparse
from typing import TYPE_CHECKING

from dsmr_mlx.cli.console import count, err, out, progress, table

if TYPE_CHECKING:
    from dsmr_mlx.data.corpus import Corpus
    from dsmr_mlx.evaluation.gaps import GapReport
    from dsmr_mlx.model.dsmr import DSMR


def measure(a: argparse.Namespace, model: "DSMR", corpus: "Corpus") -> "GapReport":
    """Measure gaps in the pieces that the options choose."""
    from dsmr_mlx.evaluation.gaps import measure_gaps

    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    with progress("gaps", "tokens", quiet=a.json) as update:
        return measure_gaps(model, corpus, a.split, **options, progress=update)


def show(report: "GapReport") -> None:
    """Show the losses of true passages by length, and how passages of each kind join."""
    from dsmr_mlx.evaluation.gaps import KINDS

    all_gaps = report.everything
    out.print()
    out.print(
        f"{count(all_gaps.gaps, 'gap')} in {count(all_gaps.pieces, 'piece')}: being shown what follows "
        f"is worth {all_gaps.gain} nats per note of the true passage"
    )
    rows = table("length", "gaps", "notes", "nothing shown", "shown", "gain")
    for row in report.by_length:
        counts = f"{row.start:g} – {row.end:g} s", f"{row.gaps:,}", f"{row.notes:,}"
        rows.add_row(*counts, str(row.nothing), str(row.shown), str(row.gain))
    out.print(rows)
    out.print("nats per note ± standard error over works; gain: nothing shown − shown")
    if not report.joins:
        err.print("note: no two pieces are long enough to put passages into gaps")
        return
    out.print()
    rows = table(f"passage of {report.seconds:g} s", "nats/note", "what follows", "more than after the true one")
    for kind in report.joins:
        cost = "" if kind.kind == "true" else str(kind.cost)
        rows.add_row(KINDS[kind.kind], str(kind.passage), str(kind.following), cost)
    out.print(rows)
    out.print(
        f"{report.joined} gaps: nats per note of the passage, and of the first seconds after it, with nothing shown"
    )
