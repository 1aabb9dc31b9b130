"""Draw what each layer sees under a horizon schedule. Needs the `plot` extra.

python examples/draw_schedule.py two-scale:long=2x1024,short=128 --layers 6 --segment 128 --out schedule.svg
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Polygon, Rectangle

from dsmr_mlx.model import horizons

MEMORY, SEGMENT, PAST = "#4c72b0", "#dd8452", "#e8e8ec"


def draw(schedule: horizons.HorizonSchedule, segment: int, path: str) -> None:
    """One row per layer, lowest at the bottom: its memory before the segment, and the segment, causally visible."""
    before = 1.25 * max(max(schedule.horizons), segment)
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(schedule.horizons) + 1.6))
    for layer, horizon in enumerate(schedule.horizons):
        axes.add_patch(Rectangle((-before, layer + 0.14), before, 0.72, color=PAST, linewidth=0))
        axes.add_patch(Rectangle((-horizon, layer + 0.14), horizon, 0.72, color=MEMORY, linewidth=0))
        causal = [(0, layer + 0.14), (segment, layer + 0.14), (segment, layer + 0.86), (0, layer + 0.2)]
        axes.add_patch(Polygon(causal, color=SEGMENT, linewidth=0))
        axes.text(segment * 1.15, layer + 0.5, f"M = {horizon:,}", va="center", fontsize=9)
    axes.set(xlim=(-before, segment * 2.1), ylim=(0, len(schedule.horizons)))
    axes.set_yticks(
        [i + 0.5 for i in range(len(schedule.horizons))], [f"layer {i}" for i in range(len(schedule.horizons))]
    )
    axes.set_xlabel("tokens before the current segment")
    axes.xaxis.set_label_coords(0.36, -0.09)
    ticks = [0, *(-h for h in sorted(set(schedule.horizons)) if h)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    for colour, label in (
        (PAST, "forgotten"),
        (MEMORY, "carried keys and values (no gradient)"),
        (SEGMENT, "current segment"),
    ):
        axes.add_patch(Rectangle((0, 0), 0, 0, color=colour, label=label))
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, frameon=False, fontsize=9)
    axes.set_title(schedule.describe(), fontsize=10, pad=30)
    figure.savefig(path, bbox_inches="tight", dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", metavar="SPEC")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--out", default="schedule.svg", help="a file name that ends in .svg, .png or .pdf")
    a = parser.parse_args()
    draw(horizons.parse(a.spec, a.layers), a.segment, a.out)


if __name__ == "__main__":
    main()
