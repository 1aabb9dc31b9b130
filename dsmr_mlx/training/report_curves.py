"""The curves of a training run, as figures of its report. Drawn by matplotlib; no MLX."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsmr_mlx.common.formatting import NARROW_SPACE, format_bytes, format_number
from dsmr_mlx.common.html import element, text
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.training.run_record import Column, RunRecord, number

CHART, WIDE_CHART = (4.6, 2.7), (9.8, 3.3)  # inches
LEFT, RIGHT, TOP, BOTTOM = 0.5, 0.15, 0.28, 0.42  # inches around the axes of a chart
MAX_POINTS = 600  # of a line: more than it has pixels
NOTE_BOX = {"facecolor": LIGHT["paper"], "alpha": 0.8, "linewidth": 0, "pad": 1}  # behind a text over lines
MAX_DOTS = 60  # of a line; with more points it is drawn without dots


@dataclass(frozen=True)
class Line:
    """Finite points with rising x, each `(N,)`; `style` is "train", "validation" or "train raw" (drawn lightly)."""

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False


def inline_svg(draw: Callable[[Any], None], inches: tuple[float, float], title: str, style: str | None = None) -> str:
    """Return a picture as an element of a page, with the class `style`."""
    svg = picture(draw, inches, "svg", title=title).decode()
    for name in (' xmlns:xlink="http://www.w3.org/1999/xlink"', ' xmlns="http://www.w3.org/2000/svg"', "xlink:"):
        svg = svg.replace(name, "")  # a page needs no namespaces
    return svg.replace("<svg ", f'<svg class="{style}" ', 1) if style else svg


def add_axes(figure: Any, x_label: str = "", y_label: str = "") -> Any:
    """Return the axes of a figure with one chart, with room for the labels."""
    width, height = figure.get_size_inches()
    inner = (width - LEFT - RIGHT) / width, (height - TOP - BOTTOM) / height
    axes = figure.add_axes((LEFT / width, BOTTOM / height, *inner))
    axes.set_xlabel(x_label, loc="right", labelpad=2)
    axes.set_title(y_label, x=-LEFT / (width - LEFT - RIGHT), size=8.5, weight="normal", color=LIGHT["muted"])
    return axes


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str,
    *,
    log: Sequence[str] = (),
    zero: bool = False,
    rule: tuple[float, str] | None = None,
    ring: tuple[float, float, str] | None = None,
    names: Sequence[str] = (),
    inches: tuple[float, float] = CHART,
    style: str | None = None,
) -> str:
    """Draw lines over two axes.

    log: the logarithmic axes, "x" and "y". zero: begin the y axis at 0. rule: a dashed line at some y with a text.
    ring: a circle with a text around the point (x, y). names: tick labels for x = 0, 1, ….
    """

    def draw(figure: Any) -> None:
        axes = add_axes(figure, x_label, y_label)
        for line in lines:
            draw_line(axes, line, "x" in log)
        axes.margins(x=0 if "x" in log else 0.01, y=0.05)
        if rule:
            axes.axhline(rule[0], color=LIGHT["muted"], linestyle=(0, (4, 4)), linewidth=0.8)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(rule[1], (1, rule[0]), (0, 4), ha="right", bbox=NOTE_BOX, **place)
        if ring:
            axes.plot(*ring[:2], "o", mfc="none", mec=LIGHT["validation"], markersize=8, clip_on=False)
            side = "right" if 2 * ring[0] > max(line.x[-1] for line in lines) else "left"
            axes.annotate(ring[2], ring[:2], (0, 9), textcoords="offset points", ha=side, bbox=NOTE_BOX)
        for name in ("x", "y"):
            set_scale(axes, name, name in log)
        if names:
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.set_xticks(range(len(names)), names)
        elif "x" not in log:
            axes.set_xlim(left=0)
        if zero:
            axes.set_ylim(bottom=0)

    return inline_svg(draw, inches, title, style)


def draw_line(axes: Any, line: Line, log: bool) -> None:
    """Draw a line, thinned to what can be seen; `log` if the x axis is logarithmic."""
    colour, raw = LIGHT[line.style.split()[0]], line.style.endswith("raw")
    shown = thinned(np.log(line.x) if log else line.x, line.y)
    axes.plot(line.x[shown], line.y[shown], color=colour, linewidth=0.7 if raw else 1.3, alpha=0.4 if raw else None)
    if line.dots and len(line.x) <= MAX_DOTS:
        axes.plot(line.x, line.y, "o", color=colour, mec=LIGHT["paper"], mew=0.6, markersize=4, clip_on=False)


def set_scale(axes: Any, name: str, log: bool) -> None:
    """Make the axis "x" or "y" linear or logarithmic, with few ticks and short numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if log:
        axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    if log and high > 4 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=7))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: tick_text(value))


def tick_text(value: float) -> str:
    """Return a number as `format_number` does, with more digits if it has more than three, and 0.0005 as it is."""
    if 1e-5 <= abs(value) < 1e-3:
        return f"{value:.7f}".rstrip("0").replace("-", "−")
    exact = math.isclose(float(f"{value:.3g}"), value, rel_tol=1e-9)
    return format_number(value) if exact else f"{value:g}".replace("-", "−")


def thinned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the indices of at most `MAX_POINTS` points that look the same as a line of all of them.

    x and y are `(N,)`, with x rising; the first and the last point stay, and the extremes of each of many columns.
    """
    if len(x) <= MAX_POINTS:
        return np.arange(len(x))
    columns = MAX_POINTS // 2 - 1
    column = np.minimum((x - x[0]) / ((x[-1] - x[0]) or 1.0) * columns, columns - 1).astype(int)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    kept = {0, len(x) - 1}
    for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    return np.array(sorted(kept))


def smoothed(y: np.ndarray, reach: int) -> np.ndarray:
    """Return means of `(N,)` values over up to `reach` neighbours on either side.

    At the start, where curves are steep, the reach of value i is i // 4. At the end the right side is cut off, so that
    the last mean is that of the last `reach` + 1 values.
    """
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    i = np.arange(len(y))
    left = np.minimum(reach, i // 4)
    right = np.minimum(left, len(y) - 1 - i)
    return (sums[i + right + 1] - sums[i - left]) / (left + right + 1)


def geometric(y: np.ndarray, reach: int) -> np.ndarray:
    """Return geometric means over neighbours, as `smoothed` does."""
    return np.exp(smoothed(np.log(y), reach))


def smoothing(n: int) -> int:
    """Return the reach of a smoothed line of n steps: a fortieth of the run."""
    return n // 40


def smooth_lines(name: str, column: Column, mean: Callable[[np.ndarray, int], np.ndarray] = smoothed) -> list[Line]:
    """Return a line drawn lightly and its running mean; the line alone if it has few points."""
    x, y = column.x, column.y
    if not len(x):
        return []
    if not (reach := smoothing(len(x))):
        return [Line(name, "train", x, y, dots=len(x) == 1)]
    return [
        Line(name, "train raw", x, y),
        Line(f"{name}, mean of {2 * reach + 1:,} steps", "train", x, mean(y, reach)),
    ]


def validation_lines(r: RunRecord, key: str) -> list[Line]:
    """Return the line of a validation metric over trained tokens, if any is finite and positive."""
    column = Column.of(r.validations, "trained_tokens", key, positive=True)
    return [Line("validation", "validation", column.x, column.y, dots=True)] if len(column) else []


def best_ring(r: RunRecord, key: str) -> tuple[float, float, str] | None:
    """Return the mark of the best validation, or None if there are fewer than two."""
    x, y = (number((r.best or {}).get(k)) for k in ("trained_tokens", key))
    if len(r.validations) < 2 or not (math.isfinite(x) and math.isfinite(y) and x > 0):
        return None
    return x, y, f"best {y:.3f}"


def figure(
    title: str,
    takeaway: str,
    *content: str,
    lines: Iterable[tuple[str, str]] = (),
    left_out: int = 0,
    style: str | None = None,
) -> str:
    """Return a picture with its title, a remark, and a legend of the (class, name) of its lines."""
    keys = [element("li", element("i", " ", class_=style), text(name)) for style, name in lines]
    caption = [element("h3", text(title)), element("p", text(takeaway))] + ([element("ul", *keys)] if keys else [])
    warning = f"Left out because not finite or not positive: {left_out:,} value{'s' * (left_out > 1)}."
    return element(
        "figure",
        element("figcaption", *caption),
        *(content or [remark_element("Nothing to draw yet.")]),
        *([remark_element(warning, "warning")] if left_out else []),
        class_=style,
    )


def remark_element(words: str, style: str = "remark") -> str:
    """Return a paragraph in small type."""
    return element("p", text(words), class_=style)


def curve_figure(
    title: str, takeaway: str, lines: Sequence[Line], column: Column, y_label: str, legend: bool = True, **look: Any
) -> str:
    """Return the figure of some lines over trained tokens; `look` is passed to `line_chart`."""
    if not lines:
        return figure(title, "", left_out=column.left_out)
    chart = line_chart(lines, "tokens", y_label, f"{title}: {takeaway}", **look)
    return figure(title, takeaway, chart, lines=legend_of(lines) if legend else (), left_out=column.left_out)


def legend_of(lines: Iterable[Line]) -> list[tuple[str, str]]:
    """Return the legend of a figure with these lines."""
    return [(line.style, line.name) for line in lines]


def whole(value: float) -> str:
    """Return a number without decimals, – if it is not finite."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def fixed(value: Any, decimals: int = 3) -> str:
    """Return a metric with some decimals, – if it is not a finite number."""
    value = number(value)
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "–"


def loss_figure(r: RunRecord) -> str:
    """Training and validation loss, drawn twice: for a wide and for a narrow window."""
    column = r.column("loss")
    training = smooth_lines("training", column)
    lines = training + validation_lines(r, "nats_per_token")
    if not lines:
        return figure("Loss", "", left_out=column.left_out, style="wide")
    both = [f"training {training[-1].y[-1]:.3f}"] if training else []
    both += [f"validation {lines[-1].y[-1]:.3f}"] if len(lines) > len(training) else []
    takeaway = ", ".join(both) + " at the end"
    charts = [
        line_chart(
            *(lines, "tokens", "nats per token", f"Loss: {takeaway}"),
            ring=best_ring(r, "nats_per_token"),
            inches=inches,
            style=style,
        )
        for inches, style in ((WIDE_CHART, "on-wide"), (CHART, "on-narrow"))
    ]
    return figure("Loss", takeaway, *charts, lines=legend_of(lines), left_out=column.left_out, style="wide")


def perplexity_figure(r: RunRecord) -> str:
    """Training and validation perplexity, both axes logarithmic."""
    column = r.column("perplexity", positive=True)
    lines = smooth_lines("training", column, geometric) + validation_lines(r, "perplexity")
    best = f"best validation {fixed(r.best['perplexity'])}, " if r.best and "perplexity" in r.best else ""
    takeaway, ring = f"{best}both axes logarithmic", best_ring(r, "perplexity")
    return curve_figure("Perplexity", takeaway, lines, column, "perplexity", log=("x", "y"), ring=ring)


def rate_figure(r: RunRecord) -> str:
    """The learning rate; with Muon, that of the matrices."""
    column, c = r.column("learning_rate"), r.config
    lines = [Line("learning rate", "train", column.x, column.y, dots=len(column) == 1)] if len(column) else []
    takeaway = f"highest {format_number(column.y.max())}, at the end {format_number(column.y[-1])}" if lines else ""
    if lines and c.optimizer == "muon":
        takeaway += f"; of Muon, {c.adamw_learning_rate / c.learning_rate:.3g} times as high for AdamW"
    return curve_figure("Learning rate", takeaway, lines, column, "learning rate", legend=False, zero=True)


def gradient_figure(r: RunRecord) -> str:
    """The gradient norm before clipping, and the norm that it is clipped to."""
    column, clip = r.column("gradient_norm", positive=True), r.config.clip_norm
    lines = smooth_lines("gradient norm", column, geometric)
    clipped = 100 * float((column.y > clip).mean()) if lines else 0.0
    takeaway = f"above {format_number(clip)} and clipped in {clipped:.0f} % of the steps"
    rule = (clip, f"clip_norm {format_number(clip)}")
    return curve_figure("Gradient norm", takeaway, lines, column, "gradient norm", log=("y",), rule=rule)


def throughput_figure(r: RunRecord) -> str:
    """Trained tokens per second."""
    column = r.column("tokens_per_second", positive=True)
    lines = smooth_lines("throughput", column)
    takeaway = f"median {np.median(column.y):,.0f} tokens a second" if lines else ""
    return curve_figure("Throughput", takeaway, lines, column, "tokens per second", zero=True)


def memory_figure(r: RunRecord) -> str:
    """The peak memory that MLX allocated."""
    column = r.column("peak_memory", positive=True)
    unit, name = (2**30, "GiB") if max(column.y, default=0) >= 2**30 else (2**20, "MiB")
    lines = [Line("peak memory", "train", column.x, column.y / unit, dots=len(column) == 1)] if len(column) else []
    takeaway = f"{format_bytes(column.y.max())} at most" if lines else ""
    return curve_figure("Peak memory", takeaway, lines, column, name, legend=False, zero=True)


def position_figure(r: RunRecord) -> str:
    """Loss by position in the piece, of the best and the last validation: it shows what longer memory is for."""
    title, measured = "Loss by position in the piece", [v for v in r.validations if position_rows(v)]
    best, last = r.best, measured[-1] if measured else None
    shown = [("best", "validation", best)] if best in measured else []
    if last is not None and last is not best:
        shown.insert(0, ("last", "train", last))
    if not shown:
        return figure(title, "", *([remark_element("Not recorded by this run.")] if r.validations else []))
    edges = sorted({(row["start"], row["end"] or math.inf) for _, _, v in shown for row in position_rows(v)})
    names = [f"{short(start)}–{short(end)}" if end < math.inf else f"{short(start)} on" for start, end in edges]
    lines = []
    for name, style, validation in shown:
        rows = {(row["start"], row["end"] or math.inf): row["nats_per_token"] for row in position_rows(validation)}
        places = [i for i, edge in enumerate(edges) if edge in rows]
        values = np.array([rows[edges[i]] for i in places], np.float64)
        label = f"{name} validation, step {whole(number(validation.get('step')))}"
        lines.append(Line(label, style, np.array(places, np.float64), values, dots=True))
    first, final = lines[-1].y[[0, -1]]
    takeaway = f"from {first:.3f} at the start to {final:.3f} at {names[int(lines[-1].x[-1])]} tokens"
    chart = line_chart(lines, "position in tokens", "nats per token", f"{title}: {takeaway}", names=names)
    return figure(title, takeaway, chart, lines=legend_of(lines))


def position_rows(validation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a validation's loss by position that can be drawn; runs of older versions have none."""
    rows = validation.get("by_position")
    good = []
    for row in rows if isinstance(rows, list) else []:
        known = isinstance(row, dict) and math.isfinite(number(row.get("start")))
        if known and math.isfinite(number(row.get("nats_per_token"))):
            good.append({**row, "end": row.get("end") if math.isfinite(number(row.get("end"))) else None})
    return good


def short(position: float) -> str:
    """Return a position as text, powers of two as people write them: 512, 1 k, 2 k."""
    return f"{position / 1024:g}{NARROW_SPACE}k" if position >= 1024 and position % 512 == 0 else f"{position:g}"
