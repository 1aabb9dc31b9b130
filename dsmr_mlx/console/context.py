"""What a model's memory is worth to it."""

import math
from itertools import pairwise
from typing import Any

from dsmr_mlx.console.base import err, out, table


def show_context(curves: Any, probe: Any, missing: str | None = None) -> None:
    """A `context.ContextCurves` and a `motif.MotifProbe`, or what is `missing` for one."""
    out.print()
    show_curves(curves)
    out.print()
    show_positions(curves.curves[0])
    if probe is not None:
        out.print()
        show_motifs(probe)
    if missing:
        err.print(f"note: no motifs that return: {missing}")


def plus_minus(found: Any) -> str:
    """`0.0123 ± 0.0004` of an `Estimate`; nothing for None, no error for that of a single piece."""
    if found is None:
        return ""
    return f"{found.nats:.4f}" + (f" ± {found.error:.4f}" if math.isfinite(found.error) else "")


def show_curves(curves: Any) -> None:
    out.print(
        f"what memory buys, on {curves.tokens:,} tokens of {curves.pieces} pieces: nats a token, ± standard error over "
        "pieces"
    )
    rows = table("truncated", "visible history", "nats a token", "gain over none", "gain of this step", "lost")
    for curve in curves.curves:
        for i, point in enumerate(curve.points):
            gains = map(plus_minus, (point.gain if i else None, point.step))
            cost = plus_minus(point.cost) if i < len(curve.points) - 1 else ""
            name = "" if i else curve.label
            rows.add_row(name, f"{point.visible:,}", f"{point.nats_per_token:.4f}", *gains, cost)
    out.print(rows)
    out.print("visible history: tokens that a layer carries into a segment, at most; lost: against the model as it is")


def show_positions(curve: Any) -> None:
    """What each stretch of history buys, by position in the piece."""
    steps = [f"{before.visible:,} → {now.visible:,}" for before, now in pairwise(curve.points)]
    rows = table("position in the piece", "tokens", "nats with none", *steps, "with all")
    for i, none in enumerate(curve.points[0].by_position):
        end = "…" if none.end is None else f"{none.end:,}"
        gains = [plus_minus(point.by_position[i].step) or "–" for point in curve.points[1:]]
        least, most = (f"{curve.points[k].by_position[i].nats_per_token:.4f}" for k in (0, -1))
        rows.add_row(f"{none.start:,} – {end}", f"{none.tokens:,}", least, *gains, most)
    out.print(rows)


def show_motifs(probe: Any) -> None:
    from dsmr_mlx.evaluation.context import layer_names

    out.print(
        f"{probe.probes} motifs of {probe.motif_tokens:.0f} tokens, from {probe.works} compositions, that return: "
        "nats a token, ± standard error over compositions"
    )
    rows = table("returns after", "first time", "repeat", "control", "gain", "still in the memory of")
    for row in probe.distances:
        seen = layer_names(row.layers) if row.layers else "the stack" if row.within_reach else "none"
        losses = (f"{found.nats:.4f}" for found in (row.first, row.repeat, row.control))
        rows.add_row(f"{row.tokens:,.0f}", *losses, plus_minus(row.gain), seen)
    out.print(rows)
    out.print(
        "control: after the same music, but another motif came first; gain: control − repeat; the stack has heard of "
        f"{probe.reach:,} tokens before a segment of {probe.segment_length:,}"
    )
