"""What there is to see of a piece: its figures in one line, and piano rolls as SVG and PNG.

A long piece is broken into systems, one below the other, like a score. Times are seconds; `start` is what the clock
shows at the left edge, for notes that are an excerpt of something longer.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from dsmr_mlx.common.charts import DARK, LIGHT, WIDE, WIDTH, Axis, Frame, axes, coordinate, element, text
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import clock, printable
from dsmr_mlx.common.plotting import figure_bytes, require_matplotlib
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import pitch_name, summarize

MAX_DRAWN = 4000  # notes of a small roll in a report
LOUDNESS = 8  # shades of a note
SYSTEMS = 8  # of a picture: with them it fills a page
PREFERRED_SECONDS, SHORTEST_SECONDS = 20.0, 5.0  # of a system of a picture
HEAD, MARGIN = 56.0, 12.0  # above the systems, and below them
TITLE_CHARACTERS = 90
PNG_SCALE = 2  # dots for each unit of the SVG
GAP = 0.6  # between two notes of one pitch
CLOCK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


def clock_ticks(low: float, high: float, most: float) -> tuple[tuple[float, str], ...]:
    """Round times in [low, high] and what a clock shows then: the finest of which there are at most `most`."""
    fine = (step for step in CLOCK_STEPS if (high - low) / step < most)
    step = next(fine, CLOCK_STEPS[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((i * step, clock(i * step, 1 if step < 1 else 0)) for i in range(first, last + 1))


def break_into_systems(seconds: float, preferred: float, shortest: float, most: int) -> tuple[int, float]:
    """How many systems, and the seconds of each: about `preferred`, more when there would be over `most` of them,
    and at least `shortest`. Raises `UserError` for a `most` below 1.
    """
    if most < 1:
        raise UserError(f"--systems {most}: expected at least 1")
    n = min(max(math.ceil(seconds / preferred), 1), most)
    return n, max(seconds / n, shortest)


def pitch_axis(lowest: int, highest: int, fewest: int) -> Axis:
    """An axis over these pitches and a little more, over `fewest` semitones at least, with the Cs named."""
    middle, span = (lowest + highest) / 2, max(highest - lowest + 4, fewest)
    low, high = middle - span / 2, middle + span / 2
    octaves = [(float(c), pitch_name(c)) for c in range(0, 128, 12) if low < c < high]
    return Axis("pitch", low, high, named=tuple(octaves))


def shades(notes: Notes) -> np.ndarray:
    """(N,) the shade of each note, 0 to `LOUDNESS` - 1."""
    return notes.velocity.astype(int) * LOUDNESS // 128


def opacity(shade: int) -> float:
    """Of a note of this shade."""
    return 0.25 + 0.75 * shade / (LOUDNESS - 1)


def bars(notes: Notes, frame: Frame, x: Axis, y: Axis) -> list[str]:
    """The notes as lines, a path for each shade; what is over the edges is cut off."""
    thick = max(frame.inner[1] / (y.high - y.low) * 0.9, 1.2)
    left, top = frame.place(x.at(np.maximum(notes.onset, x.low)), y.at(notes.pitch.astype(float)))
    right, _ = frame.place(x.at(np.minimum(notes.offset, x.high)), 0.0)
    length = np.minimum(np.maximum(right - left - GAP, 0.8), frame.width - frame.right - left)
    shade = shades(notes)
    parts = []
    for level in np.unique(shade):
        chosen = np.flatnonzero(shade == level)
        path = "".join(f"M{coordinate(left[i])} {coordinate(top[i])}h{coordinate(length[i])}" for i in chosen)
        strength = f"{opacity(level):.2f}"
        parts.append(element("path", d=path, class_="notes", stroke_width=thick, stroke_opacity=strength))
    return parts


def piano_roll(notes: Notes, seconds: float, pitches: tuple[int, int], label: str) -> str:
    """A small roll for a page with `charts.STYLE`; `seconds` and `pitches` are the ranges shown.

    Pitch over time, the louder the darker; at most `MAX_DRAWN` notes are drawn.
    """
    x, y = Axis("seconds", 0.0, seconds), pitch_axis(*pitches, fewest=26)
    frame = Frame(WIDTH, 230, left=34.0)
    drawn = Notes(*(column[:MAX_DRAWN] for column in (notes.onset, notes.offset, notes.pitch, notes.velocity)))
    return frame.svg(label, axes(frame, x, y, 6, 8), *bars(drawn, frame, x, y))


@dataclass(frozen=True)
class Sheet:
    """The layout of a picture of a whole piece: its systems from top to bottom, all of one size and scale."""

    notes: Notes
    start: float
    systems: int
    seconds: float
    pitches: Axis

    @classmethod
    def of(cls, notes: Notes, start: float, most: int) -> Self:
        """Raises `UserError` for a `most` below 1."""
        systems, seconds = break_into_systems(notes.duration, PREFERRED_SECONDS, SHORTEST_SECONDS, most)
        lowest, highest = (int(notes.pitch.min()), int(notes.pitch.max())) if len(notes) else (60, 60)
        return cls(notes, start, systems, seconds, pitch_axis(lowest, highest, fewest=26))

    @property
    def frame(self) -> Frame:
        """Of one system."""
        height = min(max(2.4 * (self.pitches.high - self.pitches.low), 90.0), 200.0)
        return Frame(WIDE, height + 30, left=34.0, top=6.0, right=26.0, bottom=24.0)

    @property
    def height(self) -> float:
        """Of the whole picture."""
        return HEAD + self.systems * self.frame.height + MARGIN

    def __iter__(self) -> Iterator[tuple[Axis, Notes]]:
        """The time axis of each system, and the notes that sound in it, in the time of the axis."""
        onset, offset = self.notes.onset + self.start, self.notes.offset + self.start
        for i in range(self.systems):
            low, high = self.start + i * self.seconds, self.start + (i + 1) * self.seconds
            seen = (onset < high) & (offset > low)
            notes = Notes(onset[seen], offset[seen], self.notes.pitch[seen], self.notes.velocity[seen])
            yield Axis("", low, high, named=clock_ticks(low, high, self.frame.inner[0] / 70)), notes


def rules(colours: dict[str, str]) -> str:
    """The style sheet of a picture; no custom properties, which many programs that read SVG do not know."""
    return (
        f".paper {{ fill: {colours['paper']}; }} .title {{ fill: {colours['ink']}; font-size: 16px; "
        f"font-weight: 600; }} .tick, .remark {{ fill: {colours['muted']}; font-size: 12px; }} "
        f".grid {{ stroke: {colours['grid']}; }} .base {{ stroke: {colours['base']}; }} "
        f".notes {{ fill: none; stroke: {colours['train']}; }}"
    )


ROLL_STYLE = (
    "text { font-family: system-ui, sans-serif; } .end { text-anchor: end; } .middle { text-anchor: middle; } "
    f"{rules(LIGHT)} @media screen and (prefers-color-scheme: dark) {{ {rules(DARK)} }}"
)


def roll_svg(notes: Notes, *, title: str = "", start: float = 0.0, systems: int = SYSTEMS) -> str:
    """A piece as an SVG file: title, figures, and piano rolls in at most so many systems.

    It needs nothing else, is dark where the reader's screen is, and light on paper. Raises `UserError` for `systems`
    below 1.
    """
    sheet, summary = Sheet.of(notes, start, systems), str(summarize(notes))
    frame = sheet.frame
    parts = [
        element("title", text(title or "Piano roll")),
        element("style", text(ROLL_STYLE)),
        element("rect", width=WIDE, height=sheet.height, class_="paper"),
        element("text", text(shortened(title)), x=frame.left, y=24.0, class_="title"),
        element("text", text(summary), x=frame.left, y=44.0, class_="remark"),
    ]
    for i, (x, seen) in enumerate(sheet):
        y = Axis("", sheet.pitches.low, sheet.pitches.high, named=sheet.pitches.named)
        system = [axes(frame, x, y, len(x.named) or 1, 8), *bars(seen, frame, x, y)]
        parts.append(element("g", *system, transform=f"translate(0 {HEAD + i * frame.height:g})"))
    size = {"width": WIDE, "height": sheet.height, "viewBox": f"0 0 {WIDE} {sheet.height:g}"}
    label = f"Piano roll of {title or 'a piece'}: {summary}"
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size, role="img", aria_label=label) + "\n"


def shortened(title: str) -> str:
    return title if len(title) <= TITLE_CHARACTERS else f"{title[: TITLE_CHARACTERS - 1]}…"


def roll_png(notes: Notes, *, title: str = "", start: float = 0.0, systems: int = SYSTEMS) -> bytes:
    """The picture of `roll_svg` by day as a PNG file, drawn by matplotlib. Same notes, same bytes.

    Raises `UserError` for `systems` below 1, and where matplotlib is not installed.
    """
    require_matplotlib("--png")
    from matplotlib.figure import Figure

    sheet = Sheet.of(notes, start, systems)
    picture = Figure(figsize=(WIDE / 100, sheet.height / 100), dpi=100 * PNG_SCALE, facecolor=LIGHT["paper"])
    left = sheet.frame.left / WIDE
    words = (
        (24.0, printable(shortened(title)), {"size": 11.5, "weight": "bold", "color": LIGHT["ink"]}),
        (44.0, str(summarize(notes)), {"size": 8.6, "color": LIGHT["muted"]}),
    )
    for y, line, look in words:
        picture.text(left, 1 - y / sheet.height, line, parse_math=False, **look)
    for i, (x, seen) in enumerate(sheet):
        plot_system(picture, sheet, i, x, seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a title in a script that the font has not is drawn as boxes
        return figure_bytes(picture, "png")


def plot_system(picture, sheet: Sheet, i: int, x: Axis, notes: Notes) -> None:
    """Draw one system where `roll_svg` has it."""
    frame, (width, height) = sheet.frame, sheet.frame.inner
    top = HEAD + i * frame.height + frame.top
    place = (frame.left / WIDE, 1 - (top + height) / sheet.height, width / WIDE, height / sheet.height)
    plot = picture.add_axes(place, xlim=(x.low, x.high), ylim=(sheet.pitches.low, sheet.pitches.high))
    plot.set_facecolor("none")
    plot.set_xticks([at for at, _ in x.named], [name for _, name in x.named])
    plot.set_yticks([at for at, _ in sheet.pitches.named], [name for _, name in sheet.pitches.named])
    plot.tick_params(labelsize=8.6, labelcolor=LIGHT["muted"], color=LIGHT["base"], length=3, width=0.7)
    plot.tick_params(axis="y", length=0)
    plot.grid(axis="y", color=LIGHT["grid"], linewidth=0.7)
    plot.set_axisbelow(True)
    for side, spine in plot.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=LIGHT["base"], linewidth=0.7)
    units = x.high - x.low
    end = np.maximum(notes.offset - GAP / width * units, notes.onset + 0.8 / width * units)
    thick = 0.72 * max(height / (sheet.pitches.high - sheet.pitches.low) * 0.9, 1.2)  # 72 points, 100 units an inch
    for level in np.unique(shades(notes)):
        chosen, look = shades(notes) == level, {"colors": LIGHT["train"], "alpha": opacity(level), "linewidth": thick}
        plot.hlines(notes.pitch[chosen], notes.onset[chosen], end[chosen], capstyle="butt", **look)
