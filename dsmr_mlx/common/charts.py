"""Charts as SVG text: axes with round ticks, lines, bars per layer. Plain arithmetic, no plotting library.

A chart has no colours of its own. Its parts carry class names (`train`, `validation`, `grid`, …) and the style sheet
says how they look, by day, by night, on a phone and on paper. Tooltips are `<title>` elements; there are no scripts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Self

import numpy as np

from dsmr_mlx.common.formatting import NARROW_SPACE, PREFIXES, compact

WIDTH, HEIGHT, WIDE = 460, 270, 980  # of a chart, in units that are about a pixel each
MAX_POINTS = 600  # of a line: more than it has pixels
STRIPS = 48  # with a tooltip each, side by side over a chart
MAX_DOTS = 60  # beyond which a line is drawn without its dots
CHARACTER = 7.0  # width of a digit
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STEPS = (1.0, 2.0, 2.5, 5.0)
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2126",
    "muted": "#626c76",
    "grid": "#e7eaed",
    "base": "#a9b1b9",
    "well": "#f5f6f8",
    "train": "#3a6ea5",
    "validation": "#c2581f",
    "segment": "#e3b28f",
    "warning": "#a03a1c",
}
DARK = {
    "paper": "#15181b",
    "ink": "#e3e7ea",
    "muted": "#97a1ab",
    "grid": "#292e34",
    "base": "#59626b",
    "well": "#1d2125",
    "train": "#7eb0e6",
    "validation": "#f09a5f",
    "segment": "#7a5236",
    "warning": "#f0a08a",
}


def text(value: object) -> str:
    """Anything as the text of an element or attribute; what XML cannot hold is replaced."""
    raw = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return escape(NOT_XML.sub("\ufffd", raw))


def element(name: str, *content: str, **attributes: object) -> str:
    """One element. The content is markup, the attributes are text; `class_` stands for class, `stroke_width` for
    stroke-width, and None for no attribute.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = name + "".join(f' {key}="{text(coordinate(value))}"' for key, value in given.items())
    return f"<{opening}>{''.join(content)}</{name}>" if content else f"<{opening}/>"


def coordinate(value: object) -> object:
    """A float with one decimal at most: a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


@dataclass(frozen=True)
class Axis:
    """A range of values. `named` ticks, (value, text), take the place of round numbers."""

    label: str
    low: float
    high: float
    log: bool = False
    named: tuple[tuple[float, str], ...] = ()

    @classmethod
    def over(cls, label: str, *values: np.ndarray, log: bool = False, zero: bool = False, margin: float = 0.0) -> Self:
        """An axis that holds all values (at least one, finite, positive if `log`), from zero on if asked."""
        low, high = min(float(v.min()) for v in values if len(v)), max(float(v.max()) for v in values if len(v))
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if log:
            spread = max((high / low) ** margin, 1.0 if high > low else 1.5)
            return cls(label, low / spread, high * spread, log=True)
        spread = margin * (high - low) if high > low else 0.05 * abs(high) or 1.0
        return cls(label, low - (0.0 if zero and low == 0 else spread), high + spread)

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Values → places, 0 at the low end and 1 at the high end."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (np.log(values) - low) / (high - low)
        return (np.asarray(values) - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """The value at a place: what `at` does, undone."""
        if self.log:
            return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        return self.low + place * (self.high - self.low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most about so many round values inside the range, with their texts."""
        if self.named:
            return list(self.named[:: -(-len(self.named) // most)])
        values = log_ticks(self.low, self.high, most) if self.log else round_ticks(self.low, self.high, most)
        return list(zip(values, map(compact, values) if self.log else tick_texts(values), strict=True))


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples in [low, high] of 1, 2, 2.5 or 5 times a power of ten: the finest of which there are at most `most`."""
    power = 10.0 ** math.floor(math.log10((high - low) / most) - 1)
    steps = (step * power * decade for decade in (1, 10, 100, 1000) for step in STEPS)
    ranges = ((step, math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)) for step in steps)
    step, first, last = next((step, first, last) for step, first, last in ranges if last - first < most)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, or with 2 and 5, or whatever is finest and fits; round numbers where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    choices = [(every, (1,)) for every in range(last - first + 1, 0, -1)]
    choices += [(1, (1, 3)), (1, (1, 2, 5)), (1, (1, 1.5, 2, 3, 4, 5, 7))]
    best: list[float] = []
    for every, digits in choices:
        powers = range(-(-first // every) * every, last + 1, every)
        values = [digit * 10.0**power for power in powers for digit in digits]
        values = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(best) < len(values) <= most:
            best = values
    return best if len(best) >= 3 else round_ticks(low, high, most)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Multiples of one step as texts, with the same decimals and the same unit."""
    largest = max(map(abs, values), default=0.0)
    if largest and not 1e-2 <= largest < 1e15:
        return [compact(value) for value in values]
    unit, prefix = next(((unit, prefix) for unit, prefix in PREFIXES if largest >= max(unit, 1e4)), (1.0, ""))
    decimals = next((d for d in range(6) if all(abs(round(v / unit, d) - v / unit) < 1e-9 for v in values)), 6)
    suffix = f"{NARROW_SPACE}{prefix}" if prefix else ""
    return [f"{value / unit:,.{decimals}f}{suffix}".replace("-", "−") if value else "0" for value in values]


@dataclass(frozen=True)
class Line:
    """Points from left to right, all of them finite; `style` is its class name, `value` its unit in tooltips."""

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    told: bool = True  # in the tooltips

    def path(self, x: Axis, y: Axis, frame: "Frame") -> str:
        u, v = thinned(x.at(self.x), y.at(self.y))
        points = [f"{coordinate(a)} {coordinate(b)}" for a, b in zip(*frame.place(u, v), strict=True)]
        return element("path", d="M" + "L".join(points), class_=f"line {self.style}")


def thinned(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A line of at most `most` points that looks the same: the lowest and the highest of each of many columns.

    x and y are (N,), with x rising; the first and the last point stay, and so do the extremes.
    """
    if len(x) <= most:
        return x, y
    columns = most // 2 - 1
    column = np.minimum((x - x[0]) / ((x[-1] - x[0]) or 1.0) * columns, columns - 1).astype(int)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    kept = {0, len(x) - 1}
    for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    order = sorted(kept)
    return x[order], y[order]


def smoothed(y: np.ndarray, reach: int) -> np.ndarray:
    """Means of (N,) values over up to `reach` on either side.

    At the start, where curves are steep, the reach is a quarter of the way; at the end the right side is cut off, so
    that the last mean is that of the last `reach` + 1 values.
    """
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    i = np.arange(len(y))
    left = np.minimum(reach, i // 4)
    right = np.minimum(left, len(y) - 1 - i)
    return (sums[i + right + 1] - sums[i - left]) / (left + right + 1)


@dataclass(frozen=True)
class Frame:
    """The rectangle in which the lines are drawn, and the size of the whole picture."""

    width: float
    height: float
    left: float
    top: float = 26.0
    right: float = 20.0
    bottom: float = 40.0

    @property
    def inner(self) -> tuple[float, float]:
        return self.width - self.left - self.right, self.height - self.top - self.bottom

    def place(self, u, v):
        """Places on the axes → coordinates in the picture."""
        width, height = self.inner
        return self.left + u * width, self.top + (1 - v) * height

    def svg(self, label: str, *content: str, style: str | None = None) -> str:
        box = f"0 0 {self.width:g} {self.height:g}"
        return element("svg", *content, viewBox=box, role="img", aria_label=label, class_=style)


def axes(frame: Frame, x: Axis, y: Axis, x_ticks: int, y_ticks: int) -> str:
    """Grid lines, the texts of the ticks, and the names of the axes."""
    (left, bottom), (right, _) = frame.place(0.0, 0.0), frame.place(1.0, 0.0)
    parts = []
    for value, label in y.ticks(y_ticks):
        _, at = frame.place(0.0, y.at(value))
        parts.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(element("text", text(label), x=left - 7, y=at + 4, class_="tick end"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="base"))
    for value, label in x.ticks(x_ticks):
        at, _ = frame.place(x.at(value), 0.0)
        parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="base"))
        parts.append(element("text", text(label), x=at, y=bottom + 17, class_="tick middle"))
    if y.label:
        parts.append(element("text", text(y.label), x=2.0, y=12.0, class_="axis"))
    if x.label:
        parts.append(element("text", text(x.label), x=right, y=frame.height - 4, class_="axis end"))
    return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    label: str,
    *,
    rule: tuple[float, str] | None = None,
    ring: tuple[float, float, str] | None = None,
    width: float = WIDTH,
    height: float = HEIGHT,
    style: str | None = None,
) -> str:
    """Lines over two axes, with tooltips.

    `rule` is a dashed line across at some y, with a text; `ring` a circle with a text around the point (x, y).
    `label` is what a screen reader says.
    """
    y_ticks = y.ticks(6)
    frame = Frame(width, height, left=16 + CHARACTER * max((len(t) for _, t in y_ticks), default=1))
    widest = CHARACTER * max((len(t) for _, t in x.named), default=7)
    parts = [axes(frame, x, y, int(frame.inner[0] / (widest + 14)), 6)]
    parts += [line.path(x, y, frame) for line in lines]
    if rule:
        left, at = frame.place(0.0, y.at(rule[0]))
        parts.append(element("line", x1=left, x2=width - frame.right, y1=at, y2=at, class_="rule"))
        parts.append(element("text", text(rule[1]), x=width - frame.right, y=at - 5, class_="note halo end"))
    if not x.named:
        parts += strips(lines, x, frame)
    for line in lines:
        if line.dots and len(line.x) <= MAX_DOTS:
            parts += dots(frame, x, y, line)
    if ring:
        a, b = frame.place(x.at(ring[0]), y.at(ring[1]))
        end = "end" if a > width / 2 else "start"
        parts.append(element("circle", cx=a, cy=b, r=6.5, class_="ring"))
        below = b + 22 < height - frame.bottom
        parts.append(element("text", text(ring[2]), x=a, y=b + 20 if below else b - 13, class_=f"note halo {end}"))
    return frame.svg(label, *parts, style=style)


def dots(frame: Frame, x: Axis, y: Axis, line: Line) -> list[str]:
    """A dot with a tooltip on each point of a line, where there is room for it."""
    parts, free = [], -math.inf
    for at, value, left, top in zip(line.x, line.y, *frame.place(x.at(line.x), y.at(line.y)), strict=True):
        if left < free:
            continue
        free = left + 8
        where = dict(x.named).get(at) or f"{compact(at)} {x.label}"
        title = element("title", text(f"{line.name}: {value:.4g} {y.label}, {where}"))
        parts.append(element("circle", title, cx=left, cy=top, r=3.2, class_=f"dot {line.style}"))
    return parts


def strips(lines: Sequence[Line], x: Axis, frame: Frame) -> list[str]:
    """Invisible columns, each with a tooltip that tells the values of all lines there."""
    parts = []
    width, height = frame.inner
    for i in range(STRIPS):
        low, high = x.value(i / STRIPS), x.value((i + 1) / STRIPS)
        middle = x.value((i + 0.5) / STRIPS)
        told = []
        for line in (line for line in lines if line.told and len(line.x)):
            nearest = int(np.abs(line.x - middle).argmin())
            if low <= line.x[nearest] <= high:
                told.append(f"{line.name}: {line.y[nearest]:.4g}")
        if told:
            title = element("title", text("\n".join([f"{compact(middle)} {x.label}", *told])))
            left = frame.left + width * i / STRIPS
            parts.append(
                element("rect", title, x=left, y=frame.top, width=width / STRIPS, height=height, class_="strip")
            )
    return parts


def horizon_picture(horizons: Sequence[int], segment: int, tooltips: Sequence[str]) -> str:
    """A bar for each layer, the lowest at the bottom: what it remembers, left of where the segment begins."""
    row = min(24.0, max(7.0, 240 / len(horizons)))
    frame = Frame(WIDTH, 66 + row * len(horizons), left=34.0)
    longest = max(*horizons, segment)
    x = Axis("tokens before and after the segment's start", -float(longest), float(segment))
    (zero, bottom), (end, top) = frame.place(x.at(0.0), 0.0), frame.place(1.0, 1.0)
    parts = [element("text", "layer", x=2.0, y=12.0, class_="axis")]
    parts.append(element("line", x1=frame.left, x2=end, y1=bottom, y2=bottom, class_="base"))
    for value, label in x.ticks(5):
        at, _ = frame.place(x.at(value), 0.0)
        parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="base"))
        parts.append(element("text", text(label), x=at, y=bottom + 17, class_="tick middle"))
    every = -(-len(horizons) // 12)
    for layer, (horizon, tooltip) in enumerate(zip(horizons, tooltips, strict=True)):
        y, thick = bottom - row * (layer + 1) + 0.12 * row, 0.76 * row
        left, _ = frame.place(x.at(-float(horizon)), 0.0)
        bars = [
            element("rect", x=left, y=y, width=max(zero - left, 0.0), height=thick, class_="memory"),
            element("rect", x=zero, y=y, width=end - zero, height=thick, class_="segment"),
            element(
                "rect",
                element("title", text(tooltip)),
                x=frame.left,
                y=y,
                width=end - frame.left,
                height=thick,
                class_="strip",
            ),
        ]
        parts += bars
        if layer % every == 0:
            middle = y + thick / 2 + 4
            parts.append(element("text", text(layer), x=frame.left - 9, y=middle, class_="tick end"))
            fits = zero - left > 60
            parts.append(
                element(
                    "text",
                    text(f"{horizon:,}"),
                    x=left + 6 if fits else left - 6,
                    y=middle,
                    class_="tick inside" if fits else "tick end",
                )
            )
    parts.append(element("line", x1=zero, x2=zero, y1=top - 6, y2=bottom, class_="now"))
    parts.append(element("text", text(x.label), x=end, y=frame.height - 4, class_="axis end"))
    return frame.svg(f"memory horizons of {len(horizons)} layers: {', '.join(map(str, horizons))} tokens", *parts)


def variables(colours: Mapping[str, str]) -> str:
    """Colours as the custom properties of a style sheet."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


# The page around the charts as well, after `SCHEMES`; fonts are the reader's own.
SCHEMES = (
    f":root {{ color-scheme: light dark; {variables(LIGHT)} }} "
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}"
)
STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 48px; font-variant-numeric: tabular-nums; }
h1 { margin: 0 0 8px; font-size: 32px; line-height: 1.15; overflow-wrap: anywhere; }
h2 { margin: 44px 0 16px; padding-top: 12px; border-top: 1px solid var(--base); font-size: 20px; }
h3 { margin: 0; font-size: 15px; }
p { margin: 0; }
header p { max-width: 75ch; overflow-wrap: anywhere; }
.kind, .remark, footer, figcaption p, dt, dd span { color: var(--muted); }
.warning { color: var(--warning); }
.remark, .warning, footer, figcaption p, figcaption ul, table { font-size: 13px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 20px 24px; margin: 28px 0 0; }
dt { font-size: 13px; }
dd { margin: 0; }
dd b { display: block; font-size: 23px; font-weight: 600; line-height: 1.3; white-space: nowrap; }
dd span { display: block; font-size: 12.5px; line-height: 1.35; }
div.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 32px 36px; }
div.grid > * { min-width: 0; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; }
figcaption { margin-bottom: 8px; }
figcaption p, .remark { overflow-wrap: anywhere; }
figcaption ul { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0; list-style: none; }
figcaption i { display: inline-block; width: 16px; height: 3px; margin-right: 6px; vertical-align: middle; }
i.train { background: var(--train); }
i.raw { opacity: 0.4; }
i.validation { background: var(--validation); }
i.memory, i.segment { width: 11px; height: 11px; background: var(--train); }
i.segment { background: var(--segment); }
svg { display: block; width: 100%; height: auto; font-size: 12.5px; }
svg.on-narrow { display: none; }
.tick, .axis, .note { fill: var(--muted); }
.note { font-size: 12px; }
.halo { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.inside { fill: var(--paper); }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
line.grid { stroke: var(--grid); }
line.base { stroke: var(--base); }
line.rule { stroke: var(--muted); stroke-dasharray: 4 4; }
line.now { stroke: var(--ink); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.train { stroke: var(--train); }
.line.raw { stroke-width: 1; opacity: 0.4; }
.line.validation { stroke: var(--validation); }
.dot { stroke: var(--paper); stroke-width: 1; }
.dot.train { fill: var(--train); }
.dot.validation { fill: var(--validation); }
.ring { fill: none; stroke: var(--validation); stroke-width: 1.5; }
.strip { fill: transparent; }
.strip:hover { fill: var(--muted); fill-opacity: 0.15; }
rect.memory { fill: var(--train); }
rect.segment { fill: var(--segment); }
.notes { fill: none; stroke: var(--train); }
.scroll { overflow-x: auto; margin-top: 6px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--grid); text-align: right; font-weight: 400; }
th:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); }
td { overflow-wrap: anywhere; }
.numbers th, .numbers td { white-space: nowrap; }
.settings td { text-align: left; }
.settings th { width: 45%; }
.marked th, .marked td { font-weight: 650; }
pre { margin: 0 0 8px; padding: 12px 14px; background: var(--well); overflow-x: auto; font-size: 13px; }
a { color: var(--train); }
footer { margin-top: 44px; padding-top: 12px; border-top: 1px solid var(--base); }
@media (max-width: 700px) {
  main { padding-top: 20px; }
  svg.on-wide { display: none; }
  svg.on-narrow { display: block; }
  .numbers th, .numbers td { padding-right: 6px; font-size: 12px; }
}
@media print {
  main { max-width: none; padding: 0; }
  div.grid { grid-template-columns: 1fr 1fr; gap: 20px 24px; }
  figure, dl, table, pre { break-inside: avoid; }
  h2 { break-after: avoid; margin-top: 24px; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
