"""A comparison of checkpoints as a picture, drawn by matplotlib: a row and a colour for each, quality beside prices."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsmr_mlx.common.charts import LIGHT
from dsmr_mlx.common.formatting import compact, duration, printable, size
from dsmr_mlx.common.plotting import picture
from dsmr_mlx.evaluation.comparison import Comparison, Row

WIDTH, ROW, SCATTER = 11.0, 0.29, 2.7  # inches: of the picture, and the heights of a row and of a lower panel
TOP, BETWEEN, BOTTOM, LEFT, RIGHT, GAP = 0.85, 0.75, 0.42, 0.62, 0.2, 0.18  # inches
VALUE = 0.7  # inches that a value needs behind its bar
NAME_CHARACTERS, CHARACTER = 44, 0.0705  # beyond which a name is cut in its middle; inches
NEAR = 0.2  # inches: points that are nearer to one another have one label
LOGARITHMIC = 8.0  # from this ratio of the largest value to the smallest on
LEAST_SPAN = 0.01  # of a loss: smaller differences must not look large
DIFFERENT = 1.05  # ratio from which on a price is worth an axis
COLOURS = ("#3a6ea5", "#c2581f", "#4b8b3b", "#7d5ba6", "#2b8f94", "#a8871b", "#b94d7f", "#626c76")


@dataclass(frozen=True)
class Measure:
    """What the picture shows of a row: its title over a column and over an axis, its value, and how that is written."""

    title: str
    long_title: str
    value: Callable[[Row], float]
    shown: Callable[[float], str]


def byte_size(value: float) -> str:
    return size(value) if value else "0"


QUALITY = Measure("nats / second of music", "", lambda r: r.measured.evaluation.nats_per_second, "{:.2f}".format)
STATE = Measure("state, a lane", "recurrent state of a lane", lambda r: r.state_bytes, byte_size)
PARAMETERS = Measure("parameters", "parameters", lambda r: r.measured.weights.parameters, compact)
DISK = Measure("on disk", "size on disk", lambda r: r.measured.weights.bytes, byte_size)
SPEED = Measure("music / second", "music read in a second", lambda r: r.music_per_second, lambda v: f"{compact(v)} s")
MEMORY = Measure("peak memory", "peak memory", lambda r: r.peak_memory, byte_size)
PRICES = (STATE, PARAMETERS, DISK, SPEED, MEMORY)


def comparison_picture(comparison: Comparison, kind: str) -> bytes:
    """A row for each checkpoint, with its loss for a second of music and its prices; below, the loss over the recurrent
    state, or where that is the same for all another price, and over the speed. Same comparison, same bytes.

    kind: "png" or "svg". Raises `UserError` where matplotlib is not installed.
    """
    rows, names = comparison.rows, [shortened(label) for label in comparison.labels]
    over = [*[m for m in (STATE, PARAMETERS, DISK, MEMORY) if differ(m, rows)][:1], SPEED]
    height = TOP + ROW * len(rows) + BETWEEN + SCATTER + BOTTOM

    def draw(figure: Any) -> None:
        heading = f"{comparison.pieces} {comparison.split} pieces, {duration(comparison.seconds)} of music"
        in_folder = f", checkpoints in {shortened(comparison.folder)}" if comparison.folder else ""
        figure.text(0.2 / WIDTH, 1 - 0.28 / height, f"{heading}{in_folder}", size=10)
        draw_rows(figure, names, rows)
        draw_trades(figure, over, rows)

    return picture(draw, (WIDTH, height), kind)


def shortened(name: str) -> str:
    """A name as it can be drawn, without its middle where it is long: names of one kind differ at their ends."""
    name, first = printable(name), NAME_CHARACTERS // 3
    return name if len(name) <= NAME_CHARACTERS else f"{name[:first]}…{name[len(name) - NAME_CHARACTERS + first + 1 :]}"


def differ(measure: Measure, rows: Sequence[Row]) -> bool:
    values = [measure.value(row) for row in rows]
    return max(values) > DIFFERENT * min(values)


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def finite_values(measure: Measure, rows: Sequence[Row]) -> list[float]:
    return [value for row in rows if math.isfinite(value := measure.value(row))]


def loss_range(rows: Sequence[Row]) -> tuple[float, float]:
    """From the lowest loss to the highest, and wider where they are nearly the same."""
    values = finite_values(QUALITY, rows) or [0.0]
    low, high = min(values), max(values)
    wider = max(LEAST_SPAN * abs(high) - (high - low), 0.0) / 2
    return low - wider, high + wider or 1.0


def draw_rows(figure: Any, names: Sequence[str], rows: Sequence[Row]) -> None:
    """The names, and a column for each measure; the first row on top."""
    height = figure.get_figheight()
    bottom, tall = 1 - (TOP + ROW * len(rows)) / height, ROW * len(rows) / height
    for i, name in enumerate(names):
        y = bottom + tall * (1 - (i + 0.5) / len(rows))
        figure.text(0.3 / WIDTH, y, str(i + 1), color=colour(i), weight="bold", va="center", ha="right")
        figure.text(0.38 / WIDTH, y, name, va="center")
    left = 0.55 + CHARACTER * max(map(len, names))
    shares = {QUALITY: 1.6, **dict.fromkeys(PRICES, 1.0)}
    unit = (WIDTH - left - RIGHT - GAP * len(PRICES)) / sum(shares.values())
    for measure, share in shares.items():
        panel = figure.add_axes((left / WIDTH, bottom, share * unit / WIDTH, tall))
        draw_column(panel, measure, rows, share * unit)
        left += share * unit + GAP


def draw_column(panel: Any, measure: Measure, rows: Sequence[Row], width: float) -> None:
    """The losses as dots on an axis that shows their differences, the prices as bars from 0; each with its value.

    width: of the panel, in inches.
    """
    values = [measure.value(row) for row in rows]
    low, high = loss_range(rows) if measure is QUALITY else (0.0, max(finite_values(measure, rows), default=0) or 1.0)
    low -= 0.1 * (high - low) if measure is QUALITY else 0.0
    panel.set(xlim=(low, low + (high - low) / (1 - VALUE / width)), ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    for y, value in enumerate(values):
        known = math.isfinite(value)
        if known and measure is QUALITY:
            panel.hlines(y, low, value, color=LIGHT["grid"], linewidth=0.7)
            panel.plot([value], [y], "o", color=colour(y), markersize=6.5)
        elif known:
            panel.barh(y, value, height=0.55, color=colour(y))
        text, place = (measure.shown(value), value) if known else ("–", low)
        offset = (7 if measure is QUALITY else 3, 0)
        panel.annotate(text, (place, y), offset, textcoords="offset points", va="center")
    panel.set_title(measure.title, fontsize=8.5, pad=6)
    panel.spines["bottom"].set_visible(False)
    panel.spines["left"].set_visible(measure is not QUALITY)


def draw_trades(figure: Any, over: Sequence[Measure], rows: Sequence[Row]) -> None:
    """The loss over each of some prices, side by side on one scale."""
    height = figure.get_figheight()
    width = (WIDTH - LEFT - RIGHT - 2 * GAP) / 2
    for i, measure in enumerate(over):
        place = (LEFT + i * (width + 2 * GAP)) / WIDTH, BOTTOM / height, width / WIDTH, SCATTER / height
        panel = figure.add_axes(place)
        draw_trade(panel, measure, rows)
        panel.set_title(f"{QUALITY.title} (less is better) over {measure.long_title}", fontsize=8.5)
        if i:
            panel.tick_params(labelleft=False)


def draw_trade(panel: Any, measure: Measure, rows: Sequence[Row]) -> None:
    """The loss of each checkpoint over a price, with its number."""
    places = [(measure.value(row), QUALITY.value(row), i) for i, row in enumerate(rows)]
    points = [place for place in places if math.isfinite(place[1])]
    values = finite_values(measure, rows)
    if min(values) > 0 and max(values) / min(values) > LOGARITHMIC:
        panel.set_xscale("log", base=2)
        panel.set_xlim(min(values) / 1.5, max(values) * 1.5)
    else:
        panel.set_xlim(0, 1.12 * max(values) or 1.0)
        if measure.shown is byte_size:
            step = 2.0 ** math.ceil(math.log2(max(values) / 5))
            panel.set_xticks([i * step for i in range(int(1.12 * max(values) / step) + 1)])
    low, high = loss_range(rows)
    panel.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
    panel.xaxis.set_major_formatter(lambda value, _: measure.shown(value))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(True, axis="both")
    for x, y, i in points:
        panel.plot([x], [y], "o", color=colour(i), markersize=7.5, zorder=3, clip_on=False)
    label_points(panel, points)


def label_points(panel: Any, points: Sequence[tuple[float, float, int]]) -> None:
    """The number of each point to its right; points that lie together have one label, the upper ones first."""
    to_inches = panel.transData + panel.figure.dpi_scale_trans.inverted()
    groups: list[list[tuple[float, float, int]]] = []
    for x, y, i in points:
        place = (*to_inches.transform((x, y)), i)
        near = [group for group in groups if any(math.dist(place[:2], other[:2]) < NEAR for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([place, *(other for group in near for other in group)])
    for group in groups:
        x, y = max(place[0] for place in group), sum(place[1] for place in group) / len(group)
        text = ", ".join(str(i + 1) for _, _, i in sorted(group, key=lambda place: (-place[1], place[2])))
        at = panel.figure.dpi_scale_trans.transform((x + 0.1, y))
        panel.text(*panel.transData.inverted().transform(at), text, va="center")
