"""Draw what each layer sees under a horizon schedule. Needs the `plot` extra.

python examples/draw_schedule.py two-scale:long=2x1024,short=128 --layers 6 --segment 128 --out schedule.svg
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.model import horizons

COLOURS = {
    "forgotten": LIGHT["grid"],
    "carried keys and values (no gradient)": LIGHT["train"],
    "current segment": LIGHT["validation"],
}


def draw(schedule: horizons.HorizonSchedule, segment: int, path: str) -> None:
    """Draw one row per layer, the lowest at the bottom: its memory before the segment, and the causal segment."""
    layers = range(len(schedule.horizons))
    before = 1.25 * max(*schedule.horizons, segment)
    forgotten, memory, current = COLOURS.values()
    size = (9, 0.5 * len(layers) + 1.4)

    def paint(figure: Any) -> None:
        axes = figure.add_axes((0.08, 0.5 / size[1], 0.9, 0.5 * len(layers) / size[1]))
        axes.barh(layers, before, left=-before, height=0.72, color=forgotten)
        axes.barh(layers, schedule.horizons, left=[-h for h in schedule.horizons], height=0.72, color=memory)
        for layer, horizon in enumerate(schedule.horizons):
            # The slanted edge shows that each token sees the segment only up to itself.
            axes.fill([0, segment, segment], [layer - 0.36, layer - 0.36, layer + 0.36], color=current, linewidth=0)
            axes.text(segment * 1.15, layer, f"M = {horizon:,}", va="center")
        axes.set(xlim=(-before, segment * 2.1), ylim=(-0.5, len(layers) - 0.5))
        axes.grid(False)
        axes.set_yticks(layers, [f"layer {layer}" for layer in layers])
        ticks = [0, *(-h for h in sorted(set(schedule.horizons)) if h)]
        axes.set_xticks(ticks, [f"{-tick:,}" for tick in ticks])
        axes.set_xlabel("tokens before the current segment", x=before / (before + segment * 2.1), ha="right")
        for label, colour in COLOURS.items():
            axes.bar(0, 0, color=colour, label=label)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3)
        figure.text(0.08, 1 - 0.3 / size[1], schedule.describe(), size=9.5, weight="bold")

    Path(path).write_bytes(picture(paint, size, Path(path).suffix[1:], title=f"Horizons: {schedule.describe()}"))


def main() -> None:
    """Draw the schedule of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", metavar="SPEC")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--out", default="schedule.svg", help="a file name that ends in .svg or .png")
    a = parser.parse_args()
    draw(horizons.parse(a.spec, a.layers), a.segment, a.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"draw_schedule: error: {error}")
