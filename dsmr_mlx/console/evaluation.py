"""How well models predict."""

import math
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from dsmr_mlx.console.base import duration, err, out, size, table


def weight_type(weights: Any) -> str:
    """`float32`, or `4 bits in groups of 64` with the type of what is not quantized."""
    if weights.bits is None:
        return weights.dtype
    return f"{weights.bits} bits in groups of {weights.group_size}, {weights.dtype}"


def show_evaluation(measured: Any, split: str, computed_in: str) -> None:
    e, w = measured.evaluation, measured.weights
    if e.notes_said < e.notes:
        err.print(
            f"note: the tokens say {e.notes_said:,} of {e.notes:,} notes: the others need not be predicted, which "
            "lowers the losses per note and per second"
        )
    out.print(f"perplexity {e.perplexity:.4f} on {e.tokens:,} tokens of {e.pieces} {split} pieces")
    out.print(
        f"nats: {e.nats_per_token:.4f} a token, {e.nats_per_event:.4f} an event, {e.nats_per_note:.4f} a note, "
        f"{e.nats_per_second:.2f} a second of music"
    )
    computed = "" if computed_in == w.dtype else f", computed in {computed_in}"
    out.print(f"weights: {w.parameters:,} parameters, {weight_type(w)}, {size(w.bytes)}{computed}")
    positions = table("position in the piece", "tokens", "nats a token", "perplexity")
    for row in e.by_position:
        end = "…" if row.end is None else f"{row.end:,}"
        positions.add_row(
            f"{row.start:,} – {end}",
            f"{row.tokens:,}",
            f"{row.nats_per_token:.4f}",
            f"{math.exp(row.nats_per_token):.3f}",
        )
    out.print()
    out.print(positions)
    extremes = table("best and worst pieces", "tokens", "perplexity")
    shown = e.by_piece if len(e.by_piece) <= 6 else [*e.by_piece[:3], *e.by_piece[-3:]]
    for piece in shown:
        extremes.add_row(piece.source, f"{piece.tokens:,}", f"{piece.perplexity:.3f}")
    out.print()
    out.print(extremes)


def show_comparison(comparison: Any) -> None:
    """A `comparison.Comparison`: what the checkpoints are, how well they predict, what that costs; a row for each."""
    c = comparison
    for remark in c.remarks:
        err.print(f"note: {remark}")
    out.print(f"on {c.pieces} {c.split} pieces: {c.notes:,} notes, {duration(c.seconds)} of music")
    if c.folder:
        out.print(f"checkpoints in {c.folder}")
    for part in (models(c), qualities(c), costs(c)):
        part.columns[0].min_width = max(map(cell_len, c.labels))  # the parts stand below one another
        out.print()
        out.print(part)
    out.print()
    out.print("nats/s: for a second of music; change: from the first checkpoint")
    out.print(f"speed, peak memory: on this machine, {c.batch_size} pieces at a time")
    if "perplexity" not in c.comparable:
        alike = "nats/s, nats/note and nats/event" if "nats_per_event" in c.comparable else "nats/s and nats/note"
        out.print(f"the tokenizers differ: compare {alike}")


def models(c: Any) -> Table:
    """What each checkpoint is."""
    result = table("checkpoint", "tokenizer", "ids", "parameters", "horizons", "budget", "state")
    for i in (1, 4):
        result.columns[i].justify = "left"
    for label, tokenizer, row in zip(c.labels, c.tokenizers, c.rows, strict=True):
        result.add_row(
            label,
            tokenizer,
            f"{row.vocabulary.size:,}",
            f"{row.measured.weights.parameters:,}",
            row.schedule.summary,
            f"{row.schedule.budget:,}",
            size(row.state_bytes) if row.state_bytes else "0",
        )
    return result


def qualities(c: Any) -> Table:
    """How well each checkpoint predicts; the best value in bold, where the rows can be compared."""
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


def costs(c: Any) -> Table:
    """What each checkpoint takes to be kept and to be run."""
    result = table("checkpoint", "weights", "on disk", "change", "tokens/s", "events/s", "music/s", "peak memory")
    result.columns[1].justify = "left"
    for i, row in enumerate(c.rows):
        w = row.measured.weights
        result.add_row(
            c.labels[i],
            w.dtype if w.bits is None else f"{w.bits} bits, {w.dtype}",
            size(w.bytes),
            percentage(c.change(row).bytes_percent) if i else "",
            f"{row.tokens_per_second:,.0f}",
            f"{row.events_per_second:,.0f}",
            f"{row.music_per_second:,.1f} s",
            size(row.peak_memory),
        )
    return result


def percentage(value: float | None) -> str:
    """A change from the first checkpoint."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f} %"
