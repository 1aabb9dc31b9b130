"""Drawing for the benchmarks: pairs of figures in rows, and small multiples of curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.common.formatting import format_number
from dsmr_mlx.common.plotting import LIGHT, picture

OURS, THEIRS = LIGHT["train"], LIGHT["validation"]
WIDTH, ROW, HEAD, FOOT, TITLE, CHARACTER = 9.6, 0.3, 0.36, 0.36, 0.5, 0.066  # inches
PANEL_WIDTH, PANEL_HEIGHT = 2.75, 2.35  # inches, of one of many
MIN_RANGE = 10.0  # of a logarithmic axis, so that small changes look small


@dataclass(frozen=True)
class Pair:
    """One row: two sides, each a `spread`, and a remark after them."""

    name: str
    values: Sequence[dict[str, float]]
    remark: str


@dataclass(frozen=True)
class Group:
    """Rows that share a logarithmic axis with a title."""

    title: str
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Curve:
    """y over x, with a name and a colour; `fit`: the fitted values of y, if any."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: str = OURS
    fit: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Curves on a pair of axes; `log`: both logarithmic."""

    title: str
    x_title: str
    curves: Sequence[Curve] = field(default_factory=list)
    log: bool = True


def write_picture(path: Path, draw: Any, size: tuple[float, float]) -> None:
    """Write what `draw` puts on a figure of `size` inches, as PNG or SVG by the suffix."""
    write_atomically(path, picture(draw, size, path.suffix[1:].lower()))


def draw_pairs(path: Path, groups: Sequence[Group], legend: tuple[str, str], title: str) -> None:
    """One panel per group; dots are medians, lines reach from quartile to quartile."""
    names, remarks = (  # inches
        CHARACTER * max(len(text) for group in groups for text in texts(group)) + 0.25
        for texts in (lambda g: [p.name for p in g.pairs], lambda g: [p.remark for p in g.pairs])
    )
    heights = [HEAD + ROW * len(group.pairs) + FOOT for group in groups]
    height = sum(heights) + TITLE

    def draw(figure: Any) -> None:
        figure.text(0.12 / WIDTH, 1 - 0.24 / height, title, size=10)
        for text, colour, x in ((legend[0], OURS, 0.12), (legend[1], THEIRS, CHARACTER * len(legend[0]) + 0.6)):
            figure.text(x / WIDTH, 1 - 0.48 / height, f"● {text}", color=colour)
        top = height - TITLE
        for group, tall in zip(groups, heights, strict=True):
            place = (names / WIDTH, (top - tall + FOOT) / height)
            size = ((WIDTH - names - remarks) / WIDTH, ROW * len(group.pairs) / height)
            draw_group(figure.add_axes((*place, *size)), group)
            top -= tall

    write_picture(path, draw, (WIDTH, height))


def draw_group(panel: Any, group: Group) -> None:
    """The rows of a group, the first on top."""
    for y, pair in enumerate(group.pairs):
        for value, colour, shift in zip(pair.values, (OURS, THEIRS), (-0.1, 0.1), strict=True):
            panel.hlines(y + shift, value["low"], value["high"], color=colour, linewidth=1.5)
            panel.plot([value["median"]], [y + shift], "o", color=colour, markersize=5)
        panel.annotate(pair.remark, (1, y), (6, 0), ("axes fraction", "data"), "offset points", va="center")
    values = [value[name] for pair in group.pairs for value in pair.values for name in ("low", "high")]
    panel.set_xscale("log")
    panel.set(xlim=(min(values) / 1.3, max(values) * 1.3), ylim=(len(group.pairs) - 0.5, -0.5))
    panel.set_yticks(range(len(group.pairs)), [pair.name for pair in group.pairs])
    panel.tick_params(axis="y", labelcolor=LIGHT["ink"])
    log_ticks(panel.xaxis, min(values) / 1.3, max(values) * 1.3)
    panel.grid(True, axis="x")
    panel.set_title(group.title)


def draw_curves(path: Path, panels: Sequence[Panel], columns: int, title: str) -> None:
    """Small multiples, row by row."""
    rows = math.ceil(len(panels) / columns)
    size = (PANEL_WIDTH * columns, PANEL_HEIGHT * rows + 0.4)

    def draw(figure: Any) -> None:
        figure.text(0.12 / size[0], 1 - 0.24 / size[1], title, size=10)
        for i, content in enumerate(panels):
            row, column = divmod(i, columns)
            left, bottom = PANEL_WIDTH * column + 0.68, PANEL_HEIGHT * (rows - 1 - row) + 0.5
            place = (left / size[0], bottom / size[1], (PANEL_WIDTH - 0.85) / size[0], (PANEL_HEIGHT - 0.9) / size[1])
            draw_panel(figure.add_axes(place), content)

    write_picture(path, draw, size)


def draw_panel(panel: Any, content: Panel) -> None:
    """The curves of a panel."""
    for curve in content.curves:
        line = {"color": curve.colour, "markersize": 4}
        panel.plot(curve.x, curve.y, "o" if curve.fit else "o-", linewidth=1.2, **line)
        if curve.fit:
            panel.plot(curve.x, curve.fit, linewidth=1.2, color=curve.colour)
    values = [value for curve in content.curves for value in curve.y]
    places = [value for curve in content.curves for value in curve.x]
    if content.log:
        panel.set(xscale="log", yscale="log")
        decades = math.log10(max(max(values) / min(values), MIN_RANGE))
        low, high = min(values) / 10 ** (0.1 * decades), min(values) * 10 ** (1.35 * decades)  # room for the labels
        panel.set(xlim=(min(places) / 1.5, max(places) * 1.5), ylim=(low, high))
        log_ticks(panel.xaxis, *panel.get_xlim())
        log_ticks(panel.yaxis, *panel.get_ylim())
    else:
        panel.set(xlim=(0, max(places) * 1.05), ylim=(0, max(values) * 1.35))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(nice_ticks())
            axis.set_major_formatter(lambda value, _: format_number(value))
    label_curves(panel, content.curves)
    panel.set_title(content.title, fontsize=8.5)
    panel.set_xlabel(content.x_title, labelpad=2)


def label_curves(panel: Any, curves: Sequence[Curve]) -> None:
    """The labels in the upper left corner, in the order and colours of the curves."""
    for i, curve in enumerate(curve for curve in curves if curve.label):
        place = (0.03, 0.985 - 0.12 * i)
        panel.text(*place, curve.label, color=curve.colour, transform=panel.transAxes, va="top", fontsize=7.5)


def nice_ticks() -> Any:
    """A locator of at most four ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def log_ticks(axis: Any, low: float, high: float, max_ticks: int = 5) -> None:
    """Round ticks: powers of ten, and values between them if there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= max_ticks:
            break
    axis.set_ticks(ticks[:: math.ceil(len(ticks) / max_ticks)], minor=False)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: format_number(value))
