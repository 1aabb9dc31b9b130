"""`dsmr-mlx compare`: checkpoints side by side, also of different tokenizers."""

import argparse
import json

from dsmr_mlx.cli.common import add_command, finite
from dsmr_mlx.cli.console import hint_blas, out, progress
from dsmr_mlx.cli.evaluate import show_comparison
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import size


def add(commands) -> None:
    p = add_command(
        commands,
        "compare",
        run,
        "dsmr-mlx compare runs/first runs/remi --data corpus --data remi",
    )
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoints, or runs (their best checkpoints)")
    p.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="CORPUS",
        help="a corpus of the tokenizer of one or more checkpoints; several times for several tokenizers, all prepared "
        "from the same files (default: those that the runs were trained on)",
    )
    p.add_argument("--split", default="validation", help="train, validation (the default) or test")
    p.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="B",
        help="pieces read side by side (default 8); the speeds are those of this machine now, with so many",
    )
    p.add_argument(
        "--max-tokens", type=int, metavar="N", help="a fixed sample of pieces of about so many tokens, the same for all"
    )
    p.add_argument("--plot", metavar="FILE.png|svg", help="draw the comparison; needs matplotlib")
    p.add_argument("--force", action="store_true", help="overwrite FILE")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.common.files import write_output
    from dsmr_mlx.common.plotting import check_picture
    from dsmr_mlx.evaluation.comparison import compare
    from dsmr_mlx.evaluation.comparison_plot import comparison_picture

    if len(a.checkpoints) < 2:
        raise UserError(f"{a.checkpoints[0]}: a checkpoint alone, expected two or more; dsmr-mlx evaluate measures one")
    for option, value in (("--batch-size", a.batch_size), ("--max-tokens", a.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    if a.plot is not None:
        path = check_picture("--plot", a.plot, a.force)
    hint_blas()
    options = {"batch_size": a.batch_size, "max_tokens": a.max_tokens}
    with progress("evaluating", "tokens", quiet=a.json) as update:
        comparison = compare(a.checkpoints, a.data, a.split, **options, progress=update)
    if a.plot is not None:
        write_output("--plot", path, comparison_picture(comparison, path.suffix.lower()[1:]))
    if a.json:
        print(json.dumps(finite(comparison.to_dict()), indent=2, allow_nan=False))
        return
    show_comparison(comparison)
    if a.plot is not None:
        out.print(f"{path}: {size(path.stat().st_size)}")
