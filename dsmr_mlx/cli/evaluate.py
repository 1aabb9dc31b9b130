"""`dsmr-mlx evaluate`: how well a model predicts."""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from dsmr_mlx.cli.common import add_checkpoint, add_command, finite, load_checkpoint, name_of
from dsmr_mlx.cli.console import err, out, progress, table
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import duration, size


def add(commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run,
        "dsmr-mlx evaluate runs/first --data corpus",
    )
    add_checkpoint(p)
    p.add_argument("--data", required=True, metavar="CORPUS", help="what `dsmr-mlx prepare` wrote")
    p.add_argument("--split", default="validation", help="train, validation (the default) or test")
    p.add_argument("--batch-size", type=int, default=8, metavar="B", help="pieces read side by side (default 8)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="a fixed sample of pieces of about so many tokens")
    p.add_argument(
        "--context-curve",
        action="store_true",
        help="also what the memory is worth: the loss when all layers, or a group of them, carry less of the past, and "
        "that of motifs that return. For a model with horizons of 1,024 it takes as long as evaluating 1.5 million "
        "tokens: about 10 evaluations of a fixed sample of pieces, 100,000 tokens unless --max-tokens says otherwise, "
        "and 32 motifs",
    )
    p.add_argument(
        "--distances",
        metavar="N,N,…",
        help="with --context-curve: after how many tokens motifs return, 128 or more (default: 128, 256, … to twice "
        "what the model can have heard of, at most 8,192 or twice the longest horizon)",
    )
    p.add_argument("--plot", metavar="FILE.png|svg", help="draw the --context-curve; needs matplotlib")
    p.add_argument("--force", action="store_true", help="overwrite FILE")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.common.files import write_output
    from dsmr_mlx.evaluation.context_plot import context_picture
    from dsmr_mlx.evaluation.corpora import choose_corpora
    from dsmr_mlx.evaluation.losses import Measured, evaluate, stored_weights

    model, tokenizer, folder = load_checkpoint(a.checkpoint)
    name = name_of(a.checkpoint)
    (corpus,) = choose_corpora([(name, folder, tokenizer)], [a.data])
    for option, value in (("--batch-size", a.batch_size), ("--max-tokens", a.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    distances, plot = context_options(a, model)
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    with progress(f"evaluating {name}", "tokens", quiet=a.json) as update:
        evaluation = evaluate(model, corpus, a.split, **options, progress=update)
    measured = Measured(name, stored_weights(model, folder), evaluation)
    curves, probe, missing = measure_context(a, distances, model, corpus) if a.context_curve else (None, None, None)
    if plot is not None:
        write_output("--plot", plot, context_picture(curves, probe, plot.suffix.lower()[1:]))
    if a.json:
        found = {"split": a.split, "computed_in": computed_in(model), **measured.to_dict()}
        if curves is not None:
            found |= {"context": curves.to_dict(), "motifs": probe and probe.to_dict(), "no_motifs": missing}
        print(json.dumps(finite(found), indent=2, allow_nan=False))
        return
    show_evaluation(measured, a.split, computed_in(model))
    if curves is not None:
        show_context(curves, probe, missing)
    if plot is not None:
        out.print(f"{plot}: {size(plot.stat().st_size)}")


def computed_in(model: Any) -> str:
    """The type of what the model computes."""
    return str(model.norm.weight.dtype).removeprefix("mlx.core.")


def context_options(a: argparse.Namespace, model: Any) -> tuple[list[int] | None, Path | None]:
    """The distances of motifs, None for the usual ones, and where the picture goes. Raises `UserError`."""
    from dsmr_mlx.common.plotting import check_picture
    from dsmr_mlx.evaluation.motif import checked_distances

    for option, value in (("--distances", a.distances), ("--plot", a.plot)):
        if value is not None and not a.context_curve:
            raise UserError(f"{option} {value}: expected --context-curve with it")
    distances = None
    if a.distances is not None:
        texts = a.distances.split(",")
        if not all(text.strip().isdecimal() for text in texts):
            raise UserError(f"--distances {a.distances}: expected numbers of tokens, such as 128,1024,8192")
        distances = checked_distances(model.config, [int(text) for text in texts])
    return distances, None if a.plot is None else check_picture("--plot", a.plot, a.force)


def measure_context(a: argparse.Namespace, distances: list[int] | None, model: Any, corpus: Any) -> tuple:
    """The curves, the probe, and why there is none where the corpus has no music for one."""
    from dsmr_mlx.evaluation.context import CURVE_TOKENS, context_curves, evaluations_of, plan_curves
    from dsmr_mlx.evaluation.motif import NoProbe, motif_probe

    n = len(evaluations_of(plan_curves(model.config)))
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens or CURVE_TOKENS}
    with progress(f"context curve, {n} evaluations", "tokens", quiet=a.json) as update:
        curves = context_curves(model, corpus, a.split, **options, progress=update)
    options = {"batch_size": a.batch_size, "distances": distances}
    try:
        with progress("motifs that return", "tokens", quiet=a.json) as update:
            return curves, motif_probe(model, corpus, a.split, **options, progress=update), None
    except NoProbe as error:
        return curves, None, str(error)


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


def weight_type(weights: Any) -> str:
    """`float32`, or `4 bits in groups of 64` with the type of what is not quantized."""
    if weights.bits is None:
        return weights.dtype
    return f"{weights.bits} bits in groups of {weights.group_size}, {weights.dtype}"


def show_evaluation(measured: Any, split: str, computed_in: str) -> None:
    e, w = measured.evaluation, measured.weights
    if e.notes_encoded < e.notes:
        err.print(
            f"note: the tokens say {e.notes_encoded:,} of {e.notes:,} notes: the others need not be predicted, which "
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
