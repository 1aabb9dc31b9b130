"""`dsmr-mlx train`: a corpus → a model."""

import argparse

from dsmr_mlx.commands.common import add_command, check_positive
from dsmr_mlx.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "train",
        run,
        "train a model on a corpus",
        "dsmr-mlx train --data corpus --out runs/first --preset small --max-minutes 90",
    )
    p.add_argument("--data", required=True, metavar="CORPUS", help="what `dsmr-mlx prepare` wrote")
    p.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    p.add_argument("--preset", metavar="NAME", help="tiny (1 M parameters), small (5 M, the default) or base (40 M)")
    p.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="begin with the weights of this checkpoint or run, and with its architecture: a preset then supplies only "
        "the other settings, of the architecture --set may change horizons, segment_length and dropout alone; with "
        "--resume it is used only if the run has yet to begin, after that the run's own checkpoints count",
    )
    p.add_argument("--config", metavar="FILE.toml", help="settings by name, over the preset's")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="one setting, over all others, such as batch_size=8; RUN/config.json has all of them",
    )
    p.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="updates of the weights (default: the preset's, 5,000 for small; none if another limit is given)",
    )
    p.add_argument("--max-tokens", type=int, metavar="N", help="tokens to learn from")
    p.add_argument("--max-minutes", type=float, metavar="M", help="minutes of training, validation aside")
    p.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint, or begin")
    p.add_argument("--force", action="store_true", help="begin anew, deleting the run in RUN")
    p.add_argument("--plan", action="store_true", help="only show what the run would need: memory, steps, time")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.corpus import Corpus
    from dsmr_mlx.plan import make_plan
    from dsmr_mlx.train import saved_config, train
    from dsmr_mlx.train_config import LIMITS, build_config

    if a.resume and a.force:
        raise UserError("--resume and --force: expected one of them")
    check_positive(a, *LIMITS)
    saved = saved_config(a.out) if a.resume else None
    base = saved if a.preset is None else None
    options = {name: getattr(a, name) for name in (*LIMITS, "init") if getattr(a, name) is not None}
    config = build_config(a.preset, a.config, a.settings, base, saved, **options)
    console.hint_blas()
    if a.plan:
        console.show_plan(make_plan(config, Corpus.load(a.data)))
        return
    with console.TrainingDisplay() as display:
        train(config, a.data, a.out, resume=a.resume, force=a.force, callback=display)
