"""`dsmr-mlx generate`: a model → music."""

import argparse

from dsmr_mlx.commands.common import add_command, load_checkpoint
from dsmr_mlx.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "generate",
        run,
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


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console, outputs
    from dsmr_mlx.generation import generate_variations, prompt_ids
    from dsmr_mlx.sampling import Sampling

    sampling = Sampling.from_dict(
        {name: getattr(a, name) for name in ("temperature", "top_k", "top_p", "min_p")}, "sampling"
    )
    seconds = 60.0 if a.seconds is None and a.tokens is None else a.seconds
    paths = outputs.output_paths(a.out, a.n, a.force)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    if tokenizer.no_notes is not None:
        raise UserError(f"{a.checkpoint}: {tokenizer.no_notes}")
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
