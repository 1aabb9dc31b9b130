"""`dsmr-mlx evaluate`: how well a model predicts."""

import argparse
import json
from pathlib import Path
from typing import Any

from dsmr_mlx.commands.common import add_checkpoint, add_command, finite, load_checkpoint, name_of
from dsmr_mlx.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run,
        "measure how well a model predicts whole pieces",
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
    from dsmr_mlx import console
    from dsmr_mlx.evaluation.context_plot import context_picture
    from dsmr_mlx.evaluation.corpora import choose_corpora
    from dsmr_mlx.evaluation.losses import Measured, evaluate, stored_weights
    from dsmr_mlx.files import write_output

    model, tokenizer, folder = load_checkpoint(a.checkpoint)
    name = name_of(a.checkpoint)
    (corpus,) = choose_corpora([(name, folder, tokenizer)], [a.data])
    for option, value in (("--batch-size", a.batch_size), ("--max-tokens", a.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    distances, plot = context_options(a, model)
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    with console.progress(f"evaluating {name}", "tokens", quiet=a.json) as progress:
        evaluation = evaluate(model, corpus, a.split, **options, progress=progress)
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
    console.show_evaluation(measured, a.split, computed_in(model))
    if curves is not None:
        console.show_context(curves, probe, missing)
    if plot is not None:
        console.out.print(f"{plot}: {console.size(plot.stat().st_size)}")


def computed_in(model: Any) -> str:
    """The type of what the model computes."""
    return str(model.norm.weight.dtype).removeprefix("mlx.core.")


def context_options(a: argparse.Namespace, model: Any) -> tuple[list[int] | None, Path | None]:
    """The distances of motifs, None for the usual ones, and where the picture goes. Raises `UserError`."""
    from dsmr_mlx.evaluation.motif import checked_distances
    from dsmr_mlx.plotting import check_picture

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
    from dsmr_mlx import console
    from dsmr_mlx.evaluation.context import CURVE_TOKENS, context_curves, evaluations_of, plan_curves
    from dsmr_mlx.evaluation.motif import NoProbe, motif_probe

    n = len(evaluations_of(plan_curves(model.config)))
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens or CURVE_TOKENS}
    with console.progress(f"context curve, {n} evaluations", "tokens", quiet=a.json) as progress:
        curves = context_curves(model, corpus, a.split, **options, progress=progress)
    options = {"batch_size": a.batch_size, "distances": distances}
    try:
        with console.progress("motifs that return", "tokens", quiet=a.json) as progress:
            return curves, motif_probe(model, corpus, a.split, **options, progress=progress), None
    except NoProbe as error:
        return curves, None, str(error)
