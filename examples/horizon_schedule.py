"""Define your own horizon schedule and measure the value of each part of its memory to a model. Draws two pictures.

    python examples/horizon_schedule.py                                       # the melodies of these examples
    python examples/horizon_schedule.py --data corpus staircase:top=2048,step=1

Weights do not depend on horizons, so a trained model can run with other horizons. But memory that a layer did not
have in training seldom helps it. To train with the schedule:

    train(build_config("small", horizons="staircase:top=2048"), "corpus", "run")
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
from draw_schedule import draw
from melodies import write_melodies

import dsmr_mlx
from dsmr_mlx import evaluate, prepare
from dsmr_mlx.evaluation import context_curves, with_horizons
from dsmr_mlx.evaluation.memory_plot import memory_picture
from dsmr_mlx.model import horizons
from dsmr_mlx.model.horizon_families import family


@family
def staircase(n_layers: int, *, top: int, step: int = 2) -> tuple[int, ...]:
    """`top` tokens for the lowest `step` layers, half as many for the next `step` layers, and so on."""
    return tuple(top >> (layer // step) for layer in range(n_layers))


def main() -> None:
    """Show the schedule and measure a model under it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedule", nargs="?", default="staircase:top=512", metavar="SCHEDULE")
    parser.add_argument("--data", metavar="CORPUS", help="a corpus made by `dsmr-mlx prepare`")
    parser.add_argument("--max-tokens", type=int, default=6000, help="tokens of the corpus to measure on")
    parser.add_argument("--model", help="a checkpoint or a run (default: the bundled model)")
    parser.add_argument("--out", type=Path, default=Path("example-output/schedule"), help="output folder")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    model, _ = dsmr_mlx.load(a.model, dtype=mx.float32)  # float32, so that small differences are not rounding
    c = model.config

    schedule = horizons.parse(a.schedule, c.n_layers)
    print(schedule.describe(c.n_kv_heads, c.head_dim))
    for row in reversed(horizons.table(schedule, c.n_kv_heads, c.head_dim, c.segment_length)):
        print(f"layer {row.layer}: {row.horizon:>5,} tokens, {row.bytes:>9,} bytes, reach {row.reach:>6,} tokens")
    draw(schedule, c.segment_length, str(a.out / "schedule.svg"))

    if a.data is None:
        a.data = prepare(write_melodies(a.out / "midi"), a.out / "corpus", validation_fraction=0, force=True).out
    corpus = dsmr_mlx.Corpus.load(a.data)
    split = "validation" if "validation" in corpus.splits else "train"
    for name, lengths in (("the model's horizons", c.horizons), (schedule.spec, schedule.horizons)):
        found = evaluate(with_horizons(model, lengths), corpus, split, max_tokens=a.max_tokens)
        print(f"perplexity {found.perplexity:7.3f} with {name}: {', '.join(f'{M:,}' for M in lengths)}")

    curves = context_curves(with_horizons(model, schedule.horizons), corpus, split, max_tokens=a.max_tokens)
    for curve in curves.curves:
        losses = "  ".join(f"{point.visible:,}: {point.nats_per_token:.3f}" for point in curve.points)
        print(f"nats per token by tokens carried, {curve.label} capped:  {losses}")
    (a.out / "context.png").write_bytes(memory_picture("png", curves))
    print(f"pictures: {a.out / 'schedule.svg'}, {a.out / 'context.png'}")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"horizon_schedule: error: {error}")
