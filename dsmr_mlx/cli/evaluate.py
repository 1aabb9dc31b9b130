"""`dsmr-mlx evaluate`: measure how well a model predicts."""

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from dsmr_mlx.cli import gap_tables
from dsmr_mlx.cli.common import (
    add_checkpoint,
    add_command,
    add_data_options,
    add_output_options,
    check_positive,
    load_checkpoint,
    name_of,
    print_json,
)
from dsmr_mlx.cli.console import count, err, out, progress, show_file, table
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.common.parsing import is_whole_number

if TYPE_CHECKING:
    import numpy as np

    from dsmr_mlx.data.corpus import Corpus, Piece
    from dsmr_mlx.evaluation.context import ContextCurves, Curve
    from dsmr_mlx.evaluation.losses import EvaluatedCheckpoint, WeightInfo
    from dsmr_mlx.evaluation.motif import MotifProbe
    from dsmr_mlx.evaluation.reset import ResetCurve
    from dsmr_mlx.model.dsmr import DSMR


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "evaluate", run, "dsmr-mlx evaluate runs/first --data corpus")
    add_checkpoint(p)
    p.add_argument("--data", required=True, metavar="CORPUS", help="a corpus written by `dsmr-mlx prepare`")
    add_data_options(p)
    p.add_argument(
        "--context-curve",
        action="store_true",
        help="also measure what the memory is worth: the loss when all layers, or a group of them, carry less history, "
        "and the loss on motifs that return. Takes about 10 evaluations of a fixed sample of pieces (100,000 tokens, "
        "or --max-tokens) and of 32 motifs at several distances",
    )
    p.add_argument(
        "--distances",
        metavar="N,N,…",
        help="with --context-curve: tokens after which motifs return, 128 or more (default: 128, 256, … up to twice "
        "the reach of the model, at most 8,192 or twice the longest horizon)",
    )
    p.add_argument(
        "--reset-at",
        nargs="?",
        type=int,
        const=True,
        metavar="N",
        help="also measure what the memory is worth after N tokens, a multiple of the segment length (default 8,192): "
        "each piece is read again from there with all memory emptied, and the losses are compared. Takes less than "
        "another evaluation",
    )
    p.add_argument(
        "--gaps",
        action="store_true",
        help="also measure the gain from being shown what follows a gap, for a model that supports gaps: the loss of "
        "the true passages, and how well generated passages join. Takes about four evaluations",
    )
    add_output_options(p, "draw the --context-curve, the --reset-at curve and the --gaps")


def run(a: argparse.Namespace) -> None:
    """Evaluate a checkpoint."""
    from dsmr_mlx.common.files import write_output
    from dsmr_mlx.evaluation.corpora import choose_corpora, leak_remark
    from dsmr_mlx.evaluation.gaps import check_gaps
    from dsmr_mlx.evaluation.losses import EvaluatedCheckpoint, piece_losses, sample_pieces, summarize, weight_info
    from dsmr_mlx.evaluation.memory_plot import memory_picture

    check_positive(a, "batch_size", "max_tokens")
    model, tokenizer, folder = load_checkpoint(a.checkpoint)
    name = name_of(a.checkpoint)
    if a.gaps:
        check_gaps(model, tokenizer)
    (corpus,) = choose_corpora([(name, folder, tokenizer)], [a.data])
    pieces = sample_pieces(corpus.pieces(a.split), a.max_tokens)
    for remark in leak_remark(name, folder, corpus, pieces):
        err.print(f"note: {remark}")
    distances, reset_at, plot = check_options(a, model, pieces)
    ids = [corpus.tokens(piece) for piece in pieces]
    with progress(f"evaluating {name}", "tokens", quiet=a.json) as update:
        losses = piece_losses(model, ids, a.batch_size, update)
    measured = EvaluatedCheckpoint(name, weight_info(model, folder), summarize(corpus, pieces, losses))
    curves, probe, missing = measure_context(a, distances, model, corpus) if a.context_curve else (None, None, None)
    reset = None if reset_at is None else measure_after_reset(a, reset_at, model, pieces, ids, losses)
    gaps = gap_tables.measure(a, model, corpus) if a.gaps else None
    if plot is not None:
        write_output("--plot", plot, memory_picture(plot.suffix.lower()[1:], curves, probe, reset, gaps))
    if a.json:
        found = {"split": a.split, "computed_in": computed_in(model), **measured.to_dict()}
        if curves is not None:
            found |= {"context": curves.to_dict(), "motifs": probe and probe.to_dict(), "no_motifs": missing}
        if reset is not None:
            found["reset"] = reset.to_dict()
        if gaps is not None:
            found["gaps"] = gaps.to_dict()
        print_json(found)
        return
    show_evaluation(measured, a.split, computed_in(model))
    if curves is not None:
        show_context(curves, probe, missing)
    if reset is not None:
        show_reset(reset)
    if gaps is not None:
        gap_tables.show(gaps)
    if plot is not None:
        show_file(plot)


def computed_in(model: "DSMR") -> str:
    """Return the dtype that the model computes in."""
    return str(model.norm.weight.dtype).removeprefix("mlx.core.")


def check_options(
    a: argparse.Namespace, model: "DSMR", pieces: Sequence["Piece"]
) -> tuple[list[int] | None, int | None, Path | None]:
    """Return the distances of motifs (None: the default), the boundary of --reset-at and the path of the picture.

    Raises `UserError`.
    """
    from dsmr_mlx.common.plotting import check_picture
    from dsmr_mlx.evaluation.motif import check_distances
    from dsmr_mlx.evaluation.reset import check_reset_at

    if a.distances is not None and not a.context_curve:
        raise UserError(f"--distances {a.distances}: expected --context-curve with it")
    if a.plot is not None and not a.context_curve and a.reset_at is None and not a.gaps:
        raise UserError(f"--plot {a.plot}: expected --context-curve, --reset-at or --gaps with it")
    distances = reset_at = None
    if a.distances is not None:
        texts = a.distances.split(",")
        if not all(is_whole_number(text.strip()) for text in texts):
            raise UserError(f"--distances {a.distances}: expected numbers of tokens, such as 128,1024,8192")
        distances = check_distances(model.config, [int(text) for text in texts])
    if a.reset_at is not None:
        reset_at = check_reset_at(model.config, pieces, None if a.reset_at is True else a.reset_at)
    return distances, reset_at, None if a.plot is None else check_picture("--plot", a.plot, a.force)


def measure_after_reset(
    a: argparse.Namespace,
    reset_at: int,
    model: "DSMR",
    pieces: "Sequence[Piece]",
    ids: Sequence["np.ndarray"],
    losses: Sequence["np.ndarray"],
) -> "ResetCurve":
    """Read pieces again from `reset_at` on, and compare with the losses of the first reading."""
    from dsmr_mlx.evaluation.reset import measure_reset

    with progress(f"memory emptied at {reset_at:,}", "tokens", quiet=a.json) as update:
        works = [piece.work for piece in pieces]
        return measure_reset(model, ids, losses, reset_at, works, batch_size=a.batch_size, progress=update)


def measure_context(
    a: argparse.Namespace, distances: list[int] | None, model: "DSMR", corpus: "Corpus"
) -> "tuple[ContextCurves, MotifProbe | None, str | None]":
    """Return the curves, and the motif probe or else the reason why this corpus allows none."""
    from dsmr_mlx.evaluation.context import CURVE_TOKENS, context_curves, distinct_horizons, plan_curves
    from dsmr_mlx.evaluation.motif import NoProbe, motif_probe

    n = len(distinct_horizons(plan_curves(model.config)))
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens or CURVE_TOKENS}
    with progress(f"context curve, {n} evaluations", "tokens", quiet=a.json) as update:
        curves = context_curves(model, corpus, a.split, **options, progress=update)
    options = {"batch_size": a.batch_size, "distances": distances}
    try:
        with progress("returning motifs", "sequences", quiet=a.json) as update:
            return curves, motif_probe(model, corpus, a.split, **options, progress=update), None
    except NoProbe as error:
        return curves, None, a.with_options(str(error))


def show_context(curves: "ContextCurves", probe: "MotifProbe | None", missing: str | None) -> None:
    """Show the context curves and the motif probe, or why it is missing."""
    out.print()
    show_curves(curves)
    out.print()
    show_positions(curves.curves[0])
    if probe is not None:
        out.print()
        show_motifs(probe)
    if missing:
        err.print(f"note: no motif probe: {missing}")


def show_reset(reset: "ResetCurve") -> None:
    """Show the gain of the memory after a boundary, on average and by distance."""
    out.print()
    out.print(
        f"all memory emptied after {reset.reset_at:,} tokens: {reset.gain} nats per token lost over the next "
        f"{reset.window:,}, on {reset.tokens:,} tokens of {count(reset.pieces, 'piece')}"
    )
    if reset.left_out:
        out.print(f"pieces left out because they are shorter: {reset.left_out}")
    rows = table("tokens since then", "pieces", "tokens", "memory kept", "emptied", "gain of the memory")
    for row in reset.by_distance:
        losses = (f"{nats:.4f}" for nats in (row.kept, row.emptied))
        rows.add_row(f"{row.start:,} – {row.end:,}", f"{row.pieces:,}", f"{row.tokens:,}", *losses, str(row.gain))
    out.print(rows)
    out.print("nats per token ± standard error over works; gain: emptied − kept, called KRCU in the paper of DSMR")


def show_curves(curves: "ContextCurves") -> None:
    """Show the loss by how much history the layers carry."""
    out.print(
        f"loss by history, on {curves.tokens:,} tokens of {count(curves.pieces, 'piece')}: "
        "nats per token ± standard error over works"
    )
    rows = table("truncated", "history", "nats/token", "gain over none", "gain of this step", "cost")
    for curve in curves.curves:
        for i, point in enumerate(curve.points):
            gains = (str(point.gain), str(point.step)) if i else ("", "")
            cost = str(point.cost) if i < len(curve.points) - 1 else ""
            name = "" if i else curve.label
            rows.add_row(name, f"{point.visible:,}", f"{point.nats_per_token:.4f}", *gains, cost)
    out.print(rows)
    out.print("history: most tokens that a layer carries into a segment; cost: compared with the full model")


def show_positions(curve: "Curve") -> None:
    """Show the gain of each step of history by position in the piece."""
    steps = [f"{before.visible:,} → {now.visible:,}" for before, now in pairwise(curve.points)]
    rows = table("position in the piece", "tokens", "nats without", *steps, "with all")
    for i, none in enumerate(curve.points[0].by_position):
        end = "…" if none.end is None else f"{none.end:,}"
        gains = [str(point.by_position[i].step or "–") for point in curve.points[1:]]
        first, last = (f"{curve.points[k].by_position[i].nats_per_token:.4f}" for k in (0, -1))
        rows.add_row(f"{none.start:,} – {end}", f"{none.tokens:,}", first, *gains, last)
    out.print(rows)


def show_motifs(probe: "MotifProbe") -> None:
    """Show the loss on motifs that return, by distance."""
    from dsmr_mlx.evaluation.context import layer_names

    out.print(
        f"{probe.probes} returning motifs of {probe.motif_tokens:.0f} tokens from {probe.works} compositions: nats per "
        "token ± standard error over compositions"
    )
    rows = table("returns after", "first", "repeat", "control", "gain", "in the memory of")
    for row in probe.distances:
        seen = layer_names(row.layers) if row.layers else "the stack" if row.within_reach else "none"
        losses = (f"{found.nats:.4f}" for found in (row.first, row.repeat, row.control))
        rows.add_row(f"{row.tokens:,.0f}", *losses, str(row.gain), seen)
    out.print(rows)
    out.print(
        "control: the same, but another motif came first; gain: control − repeat; the stack reaches "
        f"{probe.reach:,} tokens back from a segment of {probe.segment_length:,}"
    )


def weight_type(weights: "WeightInfo") -> str:
    """Format as `float32`, or `4 bits in groups of 64, bfloat16`: the last is the dtype of other arrays."""
    adapters = f", adapters of rank {weights.adapters}" if weights.adapters else ""
    if weights.bits is None:
        return weights.dtype + adapters
    return f"{weights.bits} bits in groups of {weights.group_size}, {weights.dtype}{adapters}"


def show_evaluation(measured: "EvaluatedCheckpoint", split: str, computed_in: str) -> None:
    """Show the losses of a checkpoint: in total, by position in the piece, and of the best and worst pieces."""
    e, w = measured.evaluation, measured.weights
    if e.notes_encoded < e.notes:
        err.print(
            f"note: the tokens encode {e.notes_encoded:,} of {e.notes:,} notes; the others are not predicted, which "
            "lowers the losses per note and per second"
        )
    out.print(f"perplexity {e.perplexity:.4f} on {e.tokens:,} tokens of {e.pieces} {split} pieces")
    out.print(
        f"nats: {e.nats_per_token:.4f} per token, {e.nats_per_event:.4f} per event, {e.nats_per_note:.4f} per note, "
        f"{e.nats_per_second:.2f} per second of music"
    )
    computed = "" if computed_in == w.dtype else f", computed in {computed_in}"
    out.print(f"weights: {w.parameters:,} parameters, {weight_type(w)}, {format_bytes(w.bytes)}{computed}")
    positions = table("position in the piece", "tokens", "nats/token", "perplexity")
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
