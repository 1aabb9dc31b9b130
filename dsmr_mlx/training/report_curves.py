"""The curves of a training run, as figures of its report. No MLX."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsmr_mlx.common import charts
from dsmr_mlx.common.charts import Axis, Line, element, text
from dsmr_mlx.common.formatting import NARROW_SPACE, SUPERSCRIPTS, compact, size
from dsmr_mlx.training.run_record import Column, RunRecord, number


def figure(
    title: str,
    takeaway: str,
    *content: str,
    legend: Iterable[tuple[str, str]] = (),
    left_out: int = 0,
    style: str | None = None,
) -> str:
    """A picture with its title, what it shows in a few words, and the (class, name) of its lines."""
    keys = [element("li", element("i", " ", class_=style), text(name)) for style, name in legend]
    caption = [element("h3", text(title)), element("p", text(takeaway))] + ([element("ul", *keys)] if keys else [])
    remark = f"Left out because not finite or not positive: {left_out:,} value{'s' * (left_out > 1)}."
    return element(
        "figure",
        element("figcaption", *caption),
        *(content or [remark_element("Nothing to draw yet.")]),
        *([remark_element(remark, "warning")] if left_out else []),
        class_=style,
    )


def remark_element(words: str, style: str = "remark") -> str:
    return element("p", text(words), class_=style)


def whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def fixed(value: Any, decimals: int = 3) -> str:
    value = number(value)
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "–"


def smoothing(n: int) -> int:
    """How many steps on either side a smoothed line averages over: a fortieth of the run."""
    return n // 40


def smooth_lines(name: str, x: np.ndarray, y: np.ndarray, mean=charts.smoothed) -> list[Line]:
    """A line drawn lightly and its running mean over it; the line alone if there are few points."""
    if not len(x):
        return []
    if not (reach := smoothing(len(x))):
        return [Line(name, "train", x, y, dots=len(x) == 1)]
    return [
        Line(name, "train raw", x, y, told=False),
        Line(f"{name}, mean of {2 * reach + 1:,} steps", "train", x, mean(y, reach)),
    ]


def geometric(y: np.ndarray, reach: int) -> np.ndarray:
    return np.exp(charts.smoothed(np.log(y), reach))


def validation_lines(r: RunRecord, key: str) -> list[Line]:
    column = Column.of(r.validations, "trained_tokens", key, positive=True)
    return [Line("validation", "validation", column.x, column.y, dots=True)] if len(column) else []


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    return [(line.style, line.name) for line in lines]


def ring(r: RunRecord, key: str) -> tuple[float, float, str] | None:
    """The mark of the best validation, if there are several."""
    x, y = (number((r.best or {}).get(k)) for k in ("trained_tokens", key))
    if len(r.validations) < 2 or not (math.isfinite(x) and math.isfinite(y) and x > 0):
        return None
    return x, y, f"best {y:.3f}"


def token_axis(lines: Sequence[Line], log: bool = False) -> Axis:
    return Axis.over("tokens", *(line.x for line in lines), log=log, zero=not log)


def loss_figure(r: RunRecord) -> str:
    column = r.column("loss")
    training = smooth_lines("training", column.x, column.y)
    lines = training + validation_lines(r, "nats_per_token")
    if not lines:
        return figure("Loss", "", left_out=column.left_out, style="wide")
    x, y = token_axis(lines), Axis.over("nats per token", *(line.y for line in lines), margin=0.04)
    both = [f"training {training[-1].y[-1]:.3f}"] if training else []
    both += [f"validation {lines[-1].y[-1]:.3f}"] if len(lines) > len(training) else []
    takeaway = ", ".join(both) + " at the end"
    label, mark = f"loss over trained tokens: {takeaway}", ring(r, "nats_per_token")
    return figure(
        "Loss",
        takeaway,
        charts.line_chart(lines, x, y, label, ring=mark, width=charts.WIDE, height=330, style="on-wide"),
        charts.line_chart(lines, x, y, label, ring=mark, height=300, style="on-narrow"),
        legend=legend(lines),
        left_out=column.left_out,
        style="wide",
    )


def perplexity_figure(r: RunRecord) -> str:
    column = r.column("perplexity", positive=True)
    lines = smooth_lines("training", column.x, column.y, geometric) + validation_lines(r, "perplexity")
    if not lines:
        return figure("Perplexity", "", left_out=column.left_out)
    x, y = token_axis(lines, log=True), Axis.over("perplexity", *(line.y for line in lines), log=True, margin=0.04)
    best = f"best validation {fixed(r.best['perplexity'])}, " if r.best and "perplexity" in r.best else ""
    chart = charts.line_chart(
        lines, x, y, "perplexity over trained tokens, both logarithmic", ring=ring(r, "perplexity")
    )
    return figure("Perplexity", f"{best}both axes logarithmic", chart, legend=legend(lines), left_out=column.left_out)


def rate_figure(r: RunRecord) -> str:
    column = r.column("learning_rate")
    if not len(column):
        return figure("Learning rate", "", left_out=column.left_out)
    power = math.floor(math.log10(column.y.max())) if column.y.max() > 0 else 0
    scale = 10.0**power if power < -1 else 1.0
    label = "learning rate" + (f" × 10{str(power).translate(SUPERSCRIPTS)}" if scale != 1.0 else "")
    line = Line("learning rate", "train", column.x, column.y / scale, dots=len(column) == 1)
    x, y = token_axis([line]), Axis.over(label, line.y, zero=True, margin=0.04)
    takeaway = f"highest {compact(column.y.max())}, at the end {compact(column.y[-1])}"
    return figure("Learning rate", takeaway, charts.line_chart([line], x, y, takeaway), left_out=column.left_out)


def gradient_figure(r: RunRecord) -> str:
    column, clip = r.column("gradient_norm", positive=True), r.config.clip_norm
    lines = smooth_lines("gradient norm", column.x, column.y, geometric)
    if not lines:
        return figure("Gradient norm", "", left_out=column.left_out)
    x, y = token_axis(lines), Axis.over("gradient norm", column.y, np.array([clip]), log=True, margin=0.05)
    clipped = 100 * float((column.y > clip).mean())
    takeaway = f"above {compact(clip)} and clipped in {clipped:.0f} % of the steps"
    chart = charts.line_chart(lines, x, y, takeaway, rule=(clip, f"clip_norm {compact(clip)}"))
    return figure("Gradient norm", takeaway, chart, legend=legend(lines), left_out=column.left_out)


def throughput_figure(r: RunRecord) -> str:
    column = r.column("tokens_per_second", positive=True)
    lines = smooth_lines("throughput", column.x, column.y)
    if not lines:
        return figure("Throughput", "", left_out=column.left_out)
    x, y = token_axis(lines), Axis.over("tokens per second", column.y, zero=True, margin=0.04)
    takeaway = f"median {np.median(column.y):,.0f} tokens a second"
    chart = charts.line_chart(lines, x, y, takeaway)
    return figure("Throughput", takeaway, chart, legend=legend(lines), left_out=column.left_out)


def memory_figure(r: RunRecord) -> str:
    column = r.column("peak_memory", positive=True)
    if not len(column):
        return figure("Peak memory", "", left_out=column.left_out)
    unit, name = (2**30, "GiB") if column.y.max() >= 2**30 else (2**20, "MiB")
    line = Line("peak memory", "train", column.x, column.y / unit, dots=len(column) == 1)
    x, y = token_axis([line]), Axis.over(name, line.y, zero=True, margin=0.04)
    takeaway = f"{size(column.y.max())} at most"
    return figure("Peak memory", takeaway, charts.line_chart([line], x, y, takeaway), left_out=column.left_out)


def position_figure(r: RunRecord) -> str:
    """Loss by position in the piece: what longer memory is for."""
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
    x = Axis("position in tokens", -0.5, len(edges) - 0.5, named=tuple(enumerate(names)))
    y = Axis.over("nats per token", *(line.y for line in lines), margin=0.12)
    first, final = lines[-1].y[[0, -1]]
    takeaway = f"from {first:.3f} at the start to {final:.3f} at {names[int(lines[-1].x[-1])]} tokens"
    return figure(title, takeaway, charts.line_chart(lines, x, y, takeaway), legend=legend(lines))


def position_rows(validation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a validation's loss by position that can be drawn; lines of older versions have none."""
    rows = validation.get("by_position")
    good = []
    for row in rows if isinstance(rows, list) else []:
        known = isinstance(row, dict) and math.isfinite(number(row.get("start")))
        if known and math.isfinite(number(row.get("nats_per_token"))):
            good.append({**row, "end": row.get("end") if math.isfinite(number(row.get("end"))) else None})
    return good


def short(position: float) -> str:
    """512, 1 k, 2 k: powers of two as people say them."""
    return f"{position / 1024:g}{NARROW_SPACE}k" if position >= 1024 and position % 512 == 0 else f"{position:g}"
