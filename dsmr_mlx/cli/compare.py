"""`dsmr-mlx compare`: measure checkpoints side by side, also with different tokenizers."""

import argparse
import math
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from dsmr_mlx.cli.common import add_command, add_data_options, add_output_options, check_positive, print_json
from dsmr_mlx.cli.console import count, err, hint_blas, out, progress, show_file, table
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes, format_time

if TYPE_CHECKING:
    from dsmr_mlx.evaluation.comparison import Comparison


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "compare", run, "dsmr-mlx compare runs/first runs/remi --data corpus --data remi")
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoints, or runs (their best checkpoints)")
    p.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="CORPUS",
        help="a corpus for the checkpoints with its tokenizer; give one for each tokenizer, all prepared from the same "
        "files (default: the corpora that the runs were trained on)",
    )
    add_data_options(p)
    add_output_options(p, "draw the comparison")


def run(a: argparse.Namespace) -> None:
    """Compare checkpoints."""
    from dsmr_mlx.common.files import write_output
    from dsmr_mlx.common.plotting import check_picture
    from dsmr_mlx.evaluation.comparison import compare
    from dsmr_mlx.evaluation.comparison_plot import comparison_picture

    if len(a.checkpoints) < 2:
        raise UserError(f"{a.checkpoints[0]}: one checkpoint, expected two or more; dsmr-mlx evaluate measures one")
    check_positive(a, "batch_size", "max_tokens")
    if a.plot is not None:
        path = check_picture("--plot", a.plot, a.force)
    hint_blas()
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    with progress("evaluating", "tokens", quiet=a.json) as update:
        comparison = compare(a.checkpoints, a.data, a.split, **options, progress=update)
    if a.plot is not None:
        write_output("--plot", path, comparison_picture(comparison, path.suffix.lower()[1:]))
    if a.json:
        print_json(comparison.to_dict())
        return
    show_comparison(comparison)
    if a.plot is not None:
        show_file(path)


def show_comparison(comparison: "Comparison") -> None:
    """Show three tables with a row for each checkpoint: its size and horizons, its losses, its costs."""
    c = comparison
    for remark in c.remarks:
        err.print(f"note: {remark}")
    out.print(f"on {count(c.pieces, f'{c.split} piece')}: {count(c.notes, 'note')}, {format_time(c.seconds)} of music")
    if c.folder:
        out.print(f"checkpoints in {c.folder}")
    for part in (models(c), qualities(c), costs(c)):
        part.columns[0].min_width = max(map(cell_len, c.labels))  # the tables are aligned
        out.print()
        out.print(part)
    out.print()
    out.print("nats/s: nats per second of music; change: from the first checkpoint")
    out.print(f"speed, peak memory: on this machine, {c.batch_size} pieces at a time")
    if "perplexity" not in c.comparable:
        comparable = "nats/s, nats/note and nats/event" if "nats_per_event" in c.comparable else "nats/s and nats/note"
        out.print(f"the tokenizers differ: compare {comparable}")


def models(c: "Comparison") -> Table:
    """Return the table of tokenizers, sizes and horizons."""
    result = table("checkpoint", "tokenizer", "ids", "parameters", "horizons", "budget", "state")
    for i in (1, 4):
        result.columns[i].justify = "left"
    for label, tokenizer, row in zip(c.labels, c.tokenizers, c.rows, strict=True):
        result.add_row(
            label,
            tokenizer,
            f"{row.tokenizer.vocab_size:,}",
            f"{row.measured.weights.parameters:,}",
            row.schedule.summary,
            f"{row.schedule.budget:,}",
            format_bytes(row.state_bytes) if row.state_bytes else "0",
        )
    return result


def qualities(c: "Comparison") -> Table:
    """Return the table of losses, the best comparable values in bold."""
    heads = {
        "nats_per_second": ("nats/s", 2),
        "nats_per_note": ("nats/note", 4),
        "nats_per_event": ("nats/event", 4),
        "nats_per_token": ("nats/token", 4),
        "perplexity": ("perplexity", 4),
    }
    titles = [title for title, _ in heads.values()]
    result = table("checkpoint", titles[0], "change", *titles[1:], "change", "tokens")
    best = {name: c.best(name) for name in heads}
    for i, row in enumerate(c.rows):
        e, change = row.measured.evaluation, c.change(row)
        cells = [
            Text(f"{getattr(e, name):,.{decimals}f}", "bold" if i in best[name] else "")
            for name, (_, decimals) in heads.items()
        ]
        changes = (change.nats_per_second_percent, change.perplexity_percent)
        second, token = (percentage(value) if i else "" for value in changes)
        result.add_row(c.labels[i], cells[0], second, *cells[1:], token, f"{e.tokens:,}")
    return result


def costs(c: "Comparison") -> Table:
    """Return the table of sizes, speeds and memory."""
    result = table("checkpoint", "weights", "on disk", "change", "tokens/s", "events/s", "music/s", "peak memory")
    result.columns[1].justify = "left"
    for i, row in enumerate(c.rows):
        w = row.measured.weights
        stored = w.dtype if w.bits is None else f"{w.bits} bits, {w.dtype}"
        result.add_row(
            c.labels[i],
            stored + (f", adapters of rank {w.adapters}" if w.adapters else ""),
            format_bytes(w.bytes),
            percentage(c.change(row).bytes_percent) if i else "",
            f"{row.tokens_per_second:,.0f}",
            f"{row.events_per_second:,.0f}",
            f"{row.music_per_second:,.1f} s",
            format_bytes(row.peak_memory),
        )
    return result


def percentage(value: float | None) -> str:
    """Format a change from the first checkpoint."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f} %"
