"""`dsmr-mlx assess`: how generated music compares with real music."""

import argparse
import json

from dsmr_mlx.commands.common import add_command, finite


def add(commands) -> None:
    p = add_command(
        commands,
        "assess",
        run,
        "measure generated music, and compare it with real music",
        "dsmr-mlx assess generated --reference corpus --plot assessed.png",
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="MIDI files, .npy files of ids, or folders of them")
    p.add_argument("--reference", metavar="CORPUS|DIR", help="real music: a prepared corpus, or a folder of MIDI files")
    p.add_argument("--split", metavar="NAME", help="of the corpus (default validation)")
    p.add_argument(
        "--excerpts", type=int, default=100, metavar="N", help="of the reference, as long as the files (default 100)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the choice of excerpts (default 0)")
    p.add_argument(
        "--training",
        metavar="CORPUS|DIR",
        help="what the model was trained on: the training split of a corpus, or a folder of MIDI files; shows the "
        "longest runs of events that the files share with it, beside those of the reference; takes a minute for 85 "
        "hours of music",
    )
    p.add_argument("--plot", metavar="FILE.png|svg", help="draw the distributions; needs matplotlib")
    p.add_argument("--force", action="store_true", help="overwrite FILE")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.assessment.plot import distributions_picture
    from dsmr_mlx.assessment.report import assess
    from dsmr_mlx.errors import UserError
    from dsmr_mlx.files import write_output
    from dsmr_mlx.plotting import check_picture

    if a.reference is None and a.split is not None:
        raise UserError(f"--split {a.split}: expected --reference CORPUS with it")
    if a.plot is not None:
        path = check_picture("--plot", a.plot, a.force)
    options = {"split": a.split, "excerpts": a.excerpts, "seed": a.seed, "training": a.training}
    with console.progress("reading music", "steps", quiet=a.json) as progress:
        assessment = assess(a.paths, a.reference, **options, progress=progress)
    if a.plot is not None:
        write_output("--plot", path, distributions_picture(assessment, path.suffix.lower()[1:]))
    if a.json:
        print(json.dumps(finite(assessment.to_dict()), indent=2, allow_nan=False))
        return
    console.show_assessment(assessment)
    if a.plot is not None:
        console.out.print(f"{path}: {console.size(path.stat().st_size)}")
