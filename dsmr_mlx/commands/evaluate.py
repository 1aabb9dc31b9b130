"""`dsmr-mlx evaluate`: how well a model predicts."""

import argparse
import json

from dsmr_mlx.commands.common import add_command, finite, load_checkpoint
from dsmr_mlx.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run,
        "measure how well a model predicts whole pieces",
        "dsmr-mlx evaluate runs/first --data corpus",
    )
    p.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint, or a run (its best checkpoint)")
    p.add_argument("--data", required=True, metavar="CORPUS")
    p.add_argument(
        "--against",
        metavar="OTHER",
        help="a second checkpoint or run: both side by side, measured on the same pieces, and the change from OTHER to "
        "CHECKPOINT",
    )
    p.add_argument("--split", default="validation", help="train, validation (the default) or test")
    p.add_argument("--batch-size", type=int, default=8, metavar="B", help="pieces read side by side (default 8)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="a fixed sample of pieces of about so many tokens")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.corpus import Corpus
    from dsmr_mlx.evaluation.losses import Comparison, Measured, evaluate, stored_weights

    names = [a.checkpoint] if a.against is None else [a.checkpoint, a.against]
    checkpoints = [load_checkpoint(name) for name in names]
    corpus = Corpus.load(a.data)
    for name, (_, tokenizer, _) in zip(names, checkpoints, strict=True):
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            advice = ""
            if tokenizer.no_notes is not None and tokenizer.vocab_size == corpus.tokenizer.vocab_size:
                advice = f"; if its ids mean the same, dsmr-mlx convert {name} NEW --tokenizer {a.data} says so"
            raise UserError(
                f"--data {a.data}: vocabulary {corpus.tokenizer.fingerprint[:12]}, "
                f"the checkpoint {name} has {tokenizer.fingerprint[:12]}: not the same tokenizer{advice}"
            )
    for option, value in (("--batch-size", a.batch_size), ("--max-tokens", a.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    measured = []
    for name, (model, _, folder) in zip(names, checkpoints, strict=True):
        with console.progress(f"evaluating {name}", "tokens", quiet=a.json) as progress:
            evaluation = evaluate(model, corpus, a.split, **options, progress=progress)
        measured.append(Measured(name, stored_weights(model, folder), evaluation))
    result = measured[0] if a.against is None else Comparison(*measured)
    if a.json:
        print(json.dumps(finite({"split": a.split, **result.to_dict()}), indent=2, allow_nan=False))
    elif a.against is None:
        console.show_evaluation(result, a.split)
    else:
        console.show_comparison(result, a.split)
