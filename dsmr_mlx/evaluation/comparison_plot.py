"""A comparison of checkpoints as a picture, drawn by matplotlib: one row and one colour for each checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsmr_mlx.common.formatting import format_bytes, format_number, format_time, printable
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.evaluation.comparison import Comparison, ComparisonRow

WIDTH, ROW, SCATTER = 11.0, 0.29, 2.7  # inches: of the picture, and the heights of a row and of a lower panel
TOP, BETWEEN, BOTTOM, LEFT, RIGHT, GAP = 0.85, 0.75, 0.42, 0.62, 0.2, 0.18  # inches
VALUE_WIDTH = 0.7  # inches for the value behind a bar
MAX_NAME, CHARACTER_WIDTH = 44, 0.0705  # characters, longer names are shortened; inches
LABEL_DISTANCE = 0.2  # inches: closer points share one label
LOG_SCALE_RATIO = 8.0  # of the largest value to the smallest: above it the axis is logarithmic
MIN_SPAN = 0.01  # of a loss, so that smaller differences do not look large
MIN_RATIO = 1.05  # of the largest cost to the smallest: below it the cost gets no axis
COLOURS = ("#3a6ea5", "#c2581f", "#4b8b3b", "#7d5ba6", "#2b8f94", "#a8871b", "#b94d7f", "#626c76")


@dataclass(frozen=True)
class Measure:
    """A figure of a row: its title over a column and over an axis, its value, and the text of a value."""

    title: str
    long_title: str
    value: Callable[[ComparisonRow], float]
    text: Callable[[float], str]


def byte_size(value: float) -> str:
    """Format a number of bytes, 0 without a unit."""
    return format_bytes(value) if value else "0"


LOSS = Measure("nats / second of music", "", lambda r: r.measured.evaluation.nats_per_second, "{:.2f}".format)
STATE = Measure("state per lane", "recurrent state of a lane", lambda r: r.state_bytes, byte_size)
PARAMETERS = Measure("parameters", "parameters", lambda r: r.measured.weights.parameters, format_number)
DISK = Measure("on disk", "size on disk", lambda r: r.measured.weights.bytes, byte_size)
SPEED = Measure(
    "music / second", "music read in a second", lambda r: r.music_per_second, lambda v: f"{format_number(v)} s"
)
MEMORY = Measure("peak memory", "peak memory", lambda r: r.peak_memory, byte_size)
COSTS = (STATE, PARAMETERS, DISK, SPEED, MEMORY)


def comparison_picture(comparison: Comparison, kind: str) -> bytes:
    """Draw a row for each checkpoint with its loss and costs; below, the loss against the state size and the speed.

    If the state size is the same for all, another cost takes its place. kind: "png" or "svg". Deterministic. Raises
    `UserError` if matplotlib is not installed.
    """
    rows, names = comparison.rows, [shortened(label) for label in comparison.labels]
    costs = [*[m for m in (STATE, PARAMETERS, DISK, MEMORY) if differ(m, rows)][:1], SPEED]
    height = TOP + ROW * len(rows) + BETWEEN + SCATTER + BOTTOM

    def draw(figure: Any) -> None:
        heading = f"{comparison.pieces} {comparison.split} pieces, {format_time(comparison.seconds)} of music"
        in_folder = f", checkpoints in {shortened(comparison.folder)}" if comparison.folder else ""
        figure.text(0.2 / WIDTH, 1 - 0.28 / height, f"{heading}{in_folder}", size=10)
        draw_rows(figure, names, rows)
        draw_scatters(figure, costs, rows)

    return picture(draw, (WIDTH, height), kind, title="Comparison of checkpoints")


def shortened(name: str) -> str:
    """Return a printable name; one longer than `MAX_NAME` loses its middle, because names differ at their ends."""
    name, first = printable(name), MAX_NAME // 3
    return name if len(name) <= MAX_NAME else f"{name[:first]}…{name[len(name) - MAX_NAME + first + 1 :]}"


def differ(measure: Measure, rows: Sequence[ComparisonRow]) -> bool:
    """Return whether the values of the rows differ by more than `MIN_RATIO`."""
    values = [measure.value(row) for row in rows]
    return max(values) > MIN_RATIO * min(values)


def colour(i: int) -> str:
    """Return the colour of row i."""
    return COLOURS[i % len(COLOURS)]


def finite_values(measure: Measure, rows: Sequence[ComparisonRow]) -> list[float]:
    """Return the finite values of a measure."""
    return [value for row in rows if math.isfinite(value := measure.value(row))]


def loss_range(rows: Sequence[ComparisonRow]) -> tuple[float, float]:
    """Return the lowest and highest loss, widened to a span of at least `MIN_SPAN` of the loss."""
    values = finite_values(LOSS, rows) or [0.0]
    low, high = min(values), max(values)
    margin = max(MIN_SPAN * abs(high) - (high - low), 0.0) / 2
    return low - margin, high + margin or 1.0


def draw_rows(figure: Any, names: Sequence[str], rows: Sequence[ComparisonRow]) -> None:
    """Draw the names, and a column for each measure; the first row on top."""
    height = figure.get_figheight()
    bottom, tall = 1 - (TOP + ROW * len(rows)) / height, ROW * len(rows) / height
    for i, name in enumerate(names):
        y = bottom + tall * (1 - (i + 0.5) / len(rows))
        figure.text(0.3 / WIDTH, y, str(i + 1), color=colour(i), weight="bold", va="center", ha="right")
        figure.text(0.38 / WIDTH, y, name, va="center")
    left = 0.55 + CHARACTER_WIDTH * max(map(len, names))
    shares = {LOSS: 1.6, **dict.fromkeys(COSTS, 1.0)}
    unit = (WIDTH - left - RIGHT - GAP * len(COSTS)) / sum(shares.values())
    for measure, share in shares.items():
        panel = figure.add_axes((left / WIDTH, bottom, share * unit / WIDTH, tall))
        draw_column(panel, measure, rows, share * unit)
        left += share * unit + GAP


def draw_column(panel: Any, measure: Measure, rows: Sequence[ComparisonRow], width: float) -> None:
    """Draw the losses as dots on a zoomed axis, the costs as bars from 0, each with its value.

    width: of the panel, in inches.
    """
    values = [measure.value(row) for row in rows]
    low, high = loss_range(rows) if measure is LOSS else (0.0, max(finite_values(measure, rows), default=0) or 1.0)
    low -= 0.1 * (high - low) if measure is LOSS else 0.0
    right = low + (high - low) / (1 - VALUE_WIDTH / width)
    panel.set(xlim=(low, right), ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    for y, value in enumerate(values):
        known = math.isfinite(value)
        if known and measure is LOSS:
            panel.hlines(y, low, value, color=LIGHT["grid"], linewidth=0.7)
            panel.plot([value], [y], "o", color=colour(y), markersize=6.5)
        elif known:
            panel.barh(y, value, height=0.55, color=colour(y))
        text, place = (measure.text(value), value) if known else ("–", low)
        offset = (7 if measure is LOSS else 3, 0)
        panel.annotate(text, (place, y), offset, textcoords="offset points", va="center")
    panel.set_title(measure.title, fontsize=8.5, pad=6)
    panel.spines["bottom"].set_visible(False)
    panel.spines["left"].set_visible(measure is not LOSS)


def draw_scatters(figure: Any, costs: Sequence[Measure], rows: Sequence[ComparisonRow]) -> None:
    """Draw the loss against each of the costs, side by side on one scale."""
    height = figure.get_figheight()
    width = (WIDTH - LEFT - RIGHT - 2 * GAP) / 2
    for i, measure in enumerate(costs):
        place = (LEFT + i * (width + 2 * GAP)) / WIDTH, BOTTOM / height, width / WIDTH, SCATTER / height
        panel = figure.add_axes(place)
        draw_scatter(panel, measure, rows)
        panel.set_title(f"{LOSS.title} (less is better) over {measure.long_title}", fontsize=8.5)
        if i:
            panel.tick_params(labelleft=False)


def draw_scatter(panel: Any, measure: Measure, rows: Sequence[ComparisonRow]) -> None:
    """Draw the loss of each checkpoint against a cost, labelled with the number of its row."""
    points = [(measure.value(row), LOSS.value(row), i) for i, row in enumerate(rows)]
    points = [point for point in points if math.isfinite(point[1])]
    values = finite_values(measure, rows)
    if min(values) > 0 and max(values) / min(values) > LOG_SCALE_RATIO:
        panel.set_xscale("log", base=2)
        panel.set_xlim(min(values) / 1.5, max(values) * 1.5)
    else:
        panel.set_xlim(0, 1.12 * max(values) or 1.0)
        if measure.text is byte_size:  # ticks at multiples of a power of two
            step = 2.0 ** math.ceil(math.log2(max(values) / 5))
            panel.set_xticks([i * step for i in range(int(1.12 * max(values) / step) + 1)])
    low, high = loss_range(rows)
    panel.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
    panel.xaxis.set_major_formatter(lambda value, _: measure.text(value))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(True, axis="both")
    for x, y, i in points:
        panel.plot([x], [y], "o", color=colour(i), markersize=7.5, zorder=3, clip_on=False)
    label_points(panel, points)


def label_points(panel: Any, points: Sequence[tuple[float, float, int]]) -> None:
    """Write the number of each point to its right; points within `LABEL_DISTANCE` share a label, the upper first."""
    to_inches = panel.transData + panel.figure.dpi_scale_trans.inverted()
    groups: list[list[tuple[float, float, int]]] = []
    for x, y, i in points:
        place = (*to_inches.transform((x, y)), i)
        near = [group for group in groups if any(math.dist(place[:2], other[:2]) < LABEL_DISTANCE for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([place, *(other for group in near for other in group)])
    for group in groups:
        x, y = max(place[0] for place in group), sum(place[1] for place in group) / len(group)
        text = ", ".join(str(i + 1) for _, _, i in sorted(group, key=lambda place: (-place[1], place[2])))
        at = panel.figure.dpi_scale_trans.transform((x + 0.1, y))
        panel.text(*panel.transData.inverted().transform(at), text, va="center")
