"""The command line: `dsmr-mlx COMMAND`. Arguments in, calls out; what is shown is in `console.py`.

Every command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsmr_mlx import __version__
from dsmr_mlx.errors import UserError

NO_CHECKPOINT = (
    "no CHECKPOINT given, and no model comes with this version: train one with "
    "`dsmr-mlx prepare MIDI_DIR --out CORPUS` and `dsmr-mlx train --data CORPUS --out RUN`, then give RUN"
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after an error of the user's, 1 after one of the system's.

    Either is shown as one line.
    """
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror or f"system: {error}", 1
        )
    except ImportError as error:
        return fail(f"{error.name or 'a library'}: cannot be imported ({error})", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


def fail(message: str, code: int) -> int:
    print(f"dsmr-mlx: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def make_parser() -> Parser:
    parser = Parser(
        prog="dsmr-mlx",
        description="Full-piece piano-music modelling: MIDI folder in, trained model and new music out.",
    )
    parser.add_argument("--version", action="version", version=f"dsmr-mlx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_prepare, add_train, add_evaluate, add_generate, add_horizons, add_report):
        add(commands)
    return parser


def add_command(commands, name: str, run, help: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_prepare(commands) -> None:
    p = add_command(
        commands,
        "prepare",
        run_prepare,
        "turn a folder of MIDI files into a corpus",
        "dsmr-mlx prepare ~/maestro-v3.0.0 --out corpus",
    )
    p.add_argument("midi_dir", metavar="MIDI_DIR", help="a folder of MIDI files, or MAESTRO's layout with its CSV")
    p.add_argument("--out", required=True, metavar="CORPUS", help="the folder to write")
    p.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="of the files, where no CSV says which (default 0.1)",
    )
    p.add_argument("--seed", type=int, default=0, help="of that choice (default 0)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: several from some thousand files on)")
    p.add_argument("--force", action="store_true", help="replace a corpus made from other files")


def run_prepare(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.prepare import prepare

    with console.progress("reading MIDI", "files") as progress:
        report = prepare(
            a.midi_dir,
            a.out,
            validation_fraction=a.validation_fraction,
            seed=a.seed,
            workers=a.workers,
            force=a.force,
            progress=progress,
        )
    console.show_prepare_report(report)


def add_train(commands) -> None:
    p = add_command(
        commands,
        "train",
        run_train,
        "train a model on a corpus",
        "dsmr-mlx train --data corpus --out runs/first --preset small --max-minutes 90",
    )
    p.add_argument("--data", required=True, metavar="CORPUS", help="what `dsmr-mlx prepare` wrote")
    p.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    p.add_argument("--preset", help="tiny (1 M parameters), small (5 M, the default) or base (40 M)")
    p.add_argument("--config", metavar="FILE.toml", help="settings by name, over the preset's")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="one setting, over all others"
    )
    p.add_argument("--max-steps", type=int, metavar="N", help="updates of the weights")
    p.add_argument("--max-tokens", type=int, metavar="N", help="tokens to learn from")
    p.add_argument("--max-minutes", type=float, metavar="M", help="minutes of training, validation aside")
    p.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint, or begin")
    p.add_argument("--force", action="store_true", help="begin anew, deleting the run in RUN")
    p.add_argument("--plan", action="store_true", help="only show what the run would need: memory, steps, time")


def run_train(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.corpus import Corpus
    from dsmr_mlx.plan import make_plan
    from dsmr_mlx.train import saved_config, train
    from dsmr_mlx.train_config import LIMITS, build_config

    if a.resume and a.force:
        raise UserError("--resume and --force: expected one of them")
    base = saved_config(a.out) if a.resume and a.preset is None else None
    limits = {name: getattr(a, name) for name in LIMITS if getattr(a, name) is not None}
    config = build_config(a.preset, a.config, a.settings, base, **limits)
    if a.plan:
        console.show_plan(make_plan(config, Corpus.load(a.data)))
        return
    with console.TrainingDisplay() as display:
        train(config, a.data, a.out, resume=a.resume, force=a.force, callback=display)


def add_evaluate(commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "measure how well a model predicts whole pieces",
        "dsmr-mlx evaluate runs/first --data corpus",
    )
    p.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint, or a run (its best checkpoint)")
    p.add_argument("--data", required=True, metavar="CORPUS")
    p.add_argument("--split", default="validation", help="train, validation (the default) or test")
    p.add_argument("--batch-size", type=int, default=8, metavar="B", help="pieces read side by side (default 8)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="a fixed sample of pieces of about so many tokens")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run_evaluate(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.corpus import Corpus
    from dsmr_mlx.evaluation import evaluate

    model, tokenizer, _ = load_checkpoint(a.checkpoint)
    corpus = Corpus.load(a.data)
    if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--data {a.data}: vocabulary {corpus.tokenizer.fingerprint[:12]}, "
            f"the checkpoint has {tokenizer.fingerprint[:12]}: not the same tokenizer"
        )
    for option, value in (("--batch-size", a.batch_size), ("--max-tokens", a.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    with console.progress("evaluating", "tokens", quiet=a.json) as progress:
        evaluation = evaluate(
            model, corpus, a.split, batch_size=a.batch_size, max_tokens=a.max_tokens, progress=progress
        )
    if a.json:
        print(json.dumps(finite({"split": a.split, **evaluation.to_dict()}), indent=2, allow_nan=False))
    else:
        console.show_evaluation(evaluation, a.split)


def finite(value):
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_generate(commands) -> None:
    p = add_command(
        commands,
        "generate",
        run_generate,
        "make new music, from nothing or from where a MIDI file stops",
        "dsmr-mlx generate runs/first --prompt song.mid --prompt-seconds 20 --seconds 60 -n 4 --out continued",
    )
    p.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint, or a run (its best checkpoint)")
    p.add_argument("--prompt", metavar="FILE.mid", help="continue this music")
    p.add_argument("--prompt-seconds", type=float, metavar="X", help="only its first X seconds")
    p.add_argument("--continuation-only", action="store_true", help="leave the prompt out of the output")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="of new music (default 60)")
    length.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="events of new music, instead of seconds; what still sounds is released after them",
    )
    p.add_argument("--may-end", action="store_true", help="let the model end the piece earlier")
    p.add_argument("-n", type=int, default=1, metavar="N", help="variations (default 1)")
    p.add_argument("--temperature", type=float, default=1.0, help="default 1; lower is safer, 0 takes the likeliest")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest events")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest events that make up P")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only events P times as likely as the best")
    p.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    p.add_argument("--out", default="generated.mid", metavar="FILE.mid|DIR", help="default generated.mid")
    p.add_argument("--force", action="store_true", help="overwrite files")


def run_generate(a: argparse.Namespace) -> None:
    from dsmr_mlx import console, outputs
    from dsmr_mlx.generation import generate_variations, prompt_ids
    from dsmr_mlx.sampling import Sampling

    sampling = Sampling.from_dict(
        {name: getattr(a, name) for name in ("temperature", "top_k", "top_p", "min_p")}, "sampling"
    )
    seconds = 60.0 if a.seconds is None and a.tokens is None else a.seconds
    paths = outputs.output_paths(a.out, a.n, a.force)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    prompt = outputs.read_prompt(tokenizer, a.prompt, a.prompt_seconds)
    options = {k: v for k, v in vars(a).items() if k not in ("run", "out", "force", "checkpoint")}
    made_by = outputs.provenance(checkpoint, options | {"seconds": seconds})
    with console.progress("playing", "events" if a.tokens else "seconds") as progress:
        report = generate_variations(
            model,
            tokenizer,
            a.n,
            prompt=prompt,
            seconds=seconds,
            tokens=a.tokens,
            sampling=sampling,
            seed=a.seed,
            may_end=a.may_end,
            progress=lambda tokens, music: progress(*((tokens, a.tokens) if a.tokens else (music, seconds))),
        )
    shown_prompt = None if a.continuation_only else prompt_ids(tokenizer, prompt)
    outputs.write_variations(paths, tokenizer, report, shown_prompt, made_by)
    console.show_generation(report, paths)


def add_horizons(commands) -> None:
    p = add_command(
        commands,
        "horizons",
        run_horizons,
        "show what a horizon schedule gives each layer",
        "dsmr-mlx horizons two-scale:long=2x1024,short=128 --layers 6 --segment 128",
    )
    p.add_argument("spec", metavar="SPEC", help="such as two-scale:long=2x1024,short=128 or uniform:budget=2560")
    p.add_argument("--layers", type=int, required=True, metavar="L")
    p.add_argument("--segment", type=int, default=128, metavar="S", help="tokens in a segment (default 128)")
    p.add_argument("--kv-heads", type=int, default=4, metavar="H", help="key/value heads (default 4)")
    p.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    p.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="per number (default 2: bf16)")


def run_horizons(a: argparse.Namespace) -> None:
    from dsmr_mlx import console, horizons

    for name in ("segment", "kv_heads", "head_dim"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: expected at least 1")
    schedule = horizons.parse(a.spec, a.layers)
    rows = horizons.table(schedule, a.kv_heads, a.head_dim, a.segment, a.bytes)
    console.show_horizons(schedule.describe(a.kv_heads, a.head_dim, a.bytes), rows)


def add_report(commands) -> None:
    p = add_command(
        commands,
        "report",
        run_report,
        "make one HTML page of a training run: curves, memory, samples, settings",
        "dsmr-mlx report runs/first",
    )
    p.add_argument("run_dir", metavar="RUN", help="the folder of the run, which may be going on")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    p.add_argument("--force", action="store_true", help="overwrite FILE.html")


def run_report(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.report import write_report

    path = write_report(a.run_dir, a.out, a.force)
    console.out.print(f"{path}: {console.size(path.stat().st_size)}")


def load_checkpoint(path: str | None):
    """The model, its tokenizer, and the folder that they came from: a run's `best` may soon be another one."""
    if path is None:
        raise UserError(NO_CHECKPOINT)
    from dsmr_mlx.checkpoint import load, resolve

    folder = resolve(path).resolve()
    return *load(folder), folder


if __name__ == "__main__":
    sys.exit(main())
