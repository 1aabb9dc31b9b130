"""Draw the schedules: perplexity over throughput, and the difference from full memory per seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import OURS, THEIRS, write_picture
from schedule_setting import HEADLINE, REFERENCE

from dsmr_mlx.common.formatting import format_number
from dsmr_mlx.common.plotting import LIGHT

SIZE = (9.6, 3.6)  # inches
LABEL, NEAR = 0.062, 0.08  # of a panel: height of a label, and width within which points share a column of labels
COLOURS = {REFERENCE: THEIRS, HEADLINE: OURS}


def draw_schedules(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the rows of `schedules.make_rows`; schedules that were measured only in part are left out."""
    measured = [row for row in rows if row["quality"] and row["cost"]]
    compared = [row for row in rows[1:] if row["quality"] and row["quality"]["difference"]]

    def draw(figure: Any) -> None:
        figure.text(0.012, 1 - 0.24 / SIZE[1], title, size=10)
        if measured:
            draw_trade(figure.add_axes((0.055, 0.14, 0.44, 0.66)), measured)
        if compared:
            panel = figure.add_axes((0.65, 0.14, 0.24, 0.66))
            draw_differences(panel, compared, f"Perplexity against {rows[0]['schedule']}, a dot for each seed")

    write_picture(path, draw, SIZE)


def colour(row: dict[str, Any]) -> str:
    """The colour of a schedule."""
    return COLOURS.get(row["schedule"], LIGHT["muted"])


def draw_trade(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean perplexity over training throughput (lower right is better); lines show the range over seeds."""
    rates = [row["cost"]["training"]["tokens_per_second"]["median"] for row in rows]
    values = [row["quality"]["perplexity"] for row in rows]
    low, high = min(value["low"] for value in values), max(value["high"] for value in values)
    room = 0.15 * (high - low) or 0.02 * high
    panel.set(xlim=(0, 1.3 * max(rates)), ylim=(low - room, high + room))
    for row, rate, value in zip(rows, rates, values, strict=True):
        panel.vlines(rate, value["low"], value["high"], color=colour(row), linewidth=1.2)
        panel.plot([rate], [value["mean"]], "o", color=colour(row), markersize=6, zorder=3)
    points = panel.transData.transform([(rate, value["mean"]) for rate, value in zip(rates, values, strict=True)])
    labels = label_places(points.tolist(), panel.bbox.height * LABEL, panel.bbox.width * NEAR)
    ends = panel.transData.inverted().transform(labels)
    line = {"arrowstyle": "-", "color": LIGHT["base"], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for row, rate, value, end in zip(rows, rates, values, ends, strict=True):
        panel.annotate(row["schedule"], (rate, value["mean"]), end, va="center", color=colour(row), arrowprops=line)
    panel.grid(True, axis="both")
    panel.xaxis.set_major_formatter(lambda value, _: format_number(value))
    panel.set_xlabel("training tokens/s", labelpad=2)
    panel.set_title("Validation perplexity (less is better)")


def label_places(points: Sequence[Sequence[float]], gap: float, near: float) -> list[tuple[float, float]]:
    """Where the labels of points (x, y) start: right of the points, in their order, at least `gap` apart.

    near: points closer than this in x share a column of labels.
    """
    columns: list[list[int]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i][0]):
        if columns and points[i][0] - points[columns[-1][-1]][0] < near:
            columns[-1].append(i)
        else:
            columns.append([i])
    places = [(0.0, 0.0)] * len(points)
    for column in columns:
        column.sort(key=lambda i: points[i][1])
        left = max(points[i][0] for i in column) + near / 2
        for i, height in zip(column, spaced([points[i][1] for i in column], gap), strict=True):
            places[i] = left, height
    return places


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Move rising heights apart to at least `gap`, each group around its mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and lowest(groups[-1], gap) < lowest(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [lowest(group, gap) + gap * i for group in groups for i in range(len(group))]


def lowest(group: Sequence[float], gap: float) -> float:
    """The lowest position of a group centred on its mean."""
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def draw_differences(panel: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """One row per schedule: the difference from full memory with each seed, and the mean as a number."""
    panel.axvline(0, color=THEIRS, linewidth=1.2)
    for y, row in enumerate(rows):
        difference = row["quality"]["difference"]
        each = [100 * value for value in difference["each"]]
        panel.plot(each, [y] * len(each), "o", color=colour(row), markersize=5, alpha=0.75, clip_on=False)
        place, offset = ("axes fraction", "data"), "offset points"
        panel.annotate(signed(difference["mean"]), (1, y), (10, 0), place, offset, va="center", color=colour(row))
    panel.set(ylim=(len(rows) - 0.5, -0.5))
    panel.margins(x=0.06)
    panel.set_yticks(range(len(rows)), [row["schedule"] for row in rows])
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(colour(row))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g} %".replace("-", "−"))
    panel.grid(True, axis="x")
    panel.set_title(title, x=-0.5)


def signed(difference: float) -> str:
    """A fraction in per cent with its sign."""
    return f"{100 * difference:+.2f} %".replace("-", "−")
