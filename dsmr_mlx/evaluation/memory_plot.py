"""A picture of what the context of a model is worth: a panel for each measurement."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.evaluation.context import CAP_RATIO, ContextCurves, Curve
from dsmr_mlx.evaluation.estimates import Estimate
from dsmr_mlx.evaluation.gaps import GapReport
from dsmr_mlx.evaluation.gaps_plot import draw_joins, draw_lengths
from dsmr_mlx.evaluation.motif import MotifProbe
from dsmr_mlx.evaluation.reset import DistanceGain, ResetCurve

WIDTH, HEIGHT = 4.4, 4.5  # inches, of a panel
COLOURS = (LIGHT["ink"], LIGHT["train"], LIGHT["validation"], "#4f9a6b", "#8a6fb3")
MAX_ALPHA, MIN_ALPHA = 0.95, 0.3  # of the lines for the longest and the shortest history
NAMES = 0.22  # of the height of the data: the band for names above it
LINEAR, GAIN_TICKS = 0.01, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats: the axis of gains is linear below the first
SPREAD = 0.24  # between the first and the last of the points at one position


def memory_picture(
    kind: str,
    curves: ContextCurves | None = None,
    probe: MotifProbe | None = None,
    reset: ResetCurve | None = None,
    gaps: GapReport | None = None,
) -> bytes:
    """Draw what was measured: loss by history and gain by position, the loss of repeated motifs, gain after a reset,
    the loss of passages in gaps and of what follows them.

    kind: "png" or "svg". Raises `UserError` if matplotlib is not installed.
    """
    panels: list[Callable[[Any], None]] = []
    if curves is not None:
        panels += [partial(draw_curves, curves=curves), partial(draw_positions, curve=curves.curves[0])]
    if probe is not None:
        panels.append(partial(draw_motifs, probe=probe))
    if reset is not None:
        panels.append(partial(draw_reset, reset=reset))
    if gaps is not None:
        panels.append(partial(draw_lengths, report=gaps))
        if gaps.joins:
            panels.append(partial(draw_joins, report=gaps))
    n = len(panels)

    def draw(figure: Any) -> None:
        for draw_panel, panel in zip(panels, figure.subplots(1, n, squeeze=False)[0], strict=True):
            draw_panel(panel)
        figure.subplots_adjust(left=0.15 / n, right=1 - 0.045 / n, top=0.92, bottom=0.13, wspace=0.2)

    return picture(draw, (WIDTH * n, HEIGHT), kind, title="What the context is worth")


def values_and_errors(found: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means and the standard errors `(n,)`, 0 for an error that is NaN."""
    return np.array([e.nats for e in found]), np.nan_to_num([e.error for e in found])


def draw_curves(panel: Any, curves: ContextCurves) -> None:
    """Draw loss against visible history, a line for all layers and one for each group."""
    caps = sorted({point.visible for curve in curves.curves for point in curve.points})
    places = history_places(caps)
    for i, curve in enumerate(curves.curves):
        colour = COLOURS[i % len(COLOURS)]
        at = [places[point.visible] for point in curve.points]
        losses = np.array([point.nats_per_token for point in curve.points])
        _, errors = values_and_errors([point.cost for point in curve.points])
        width = 1.4 if i else 2.0
        panel.fill_between(at, losses - errors, losses + errors, color=colour, alpha=0.16, linewidth=0)
        panel.plot(at, losses, color=colour, linewidth=width, marker="o", markersize=3.5, label=curve.label)
    panel.set_title("loss by visible history")
    panel.set_xticks(list(places.values()), [f"{cap:,}" for cap in caps])
    panel.set_xlabel("tokens that these layers carry into a segment, at most")
    panel.set_ylabel("nats per token; band: error of the difference from the model")
    panel.legend(loc="upper right", title="truncated")


def history_places(caps: Sequence[int]) -> dict[int, float]:
    """Map numbers of tokens to a logarithmic axis; 0 is one step before the smallest of the others."""
    some = [cap for cap in caps if cap]
    none = np.log2(min(some)) - np.log2(CAP_RATIO) if some else 0.0
    return {cap: float(np.log2(cap)) if cap else float(none) for cap in caps}


def draw_positions(panel: Any, curve: Curve) -> None:
    """Draw the gain over no memory by position in the piece, a line for each length of history."""
    points = curve.points[1:]
    ranges = curve.points[0].by_position
    for i, point in enumerate(points):
        gains, errors = values_and_errors([row.gain for row in point.by_position])
        shift = SPREAD * (i / (len(points) - 1) - 0.5) if len(points) > 1 else 0.0
        share = i / (len(points) - 1) if len(points) > 1 else 1.0
        look = {"color": LIGHT["train"], "alpha": MIN_ALPHA + share * (MAX_ALPHA - MIN_ALPHA), "linewidth": 1.4}
        at = np.arange(len(ranges)) + shift
        panel.errorbar(at, gains, errors, marker="o", markersize=3.5, label=f"{point.visible:,} tokens", **look)
    panel.axhline(0, color=LIGHT["base"], linewidth=0.8, zorder=1)
    panel.margins(y=0.08)
    names = [f"{row.start:,}\n– {'…' if row.end is None else f'{row.end:,}'}" for row in ranges]
    panel.set_xticks(range(len(ranges)), names)
    panel.set_title("gain over no memory, by position")
    panel.set_xlabel("position in the piece, in tokens")
    panel.set_ylabel("nats per token, ± standard error over works")
    if points:
        panel.legend(loc="best", title="visible history")


def draw_motifs(panel: Any, probe: MotifProbe) -> None:
    """Draw the loss of a motif the first time, of its repeat and of the control; the gain is between the last two."""
    at = np.array([row.tokens for row in probe.distances])
    lines = (
        ("first", "first time", LIGHT["base"], "--"),
        ("control", "control: after another motif", LIGHT["train"], "-"),
        ("repeat", "repeat", LIGHT["validation"], "-"),
    )
    for key, name, colour, style in lines:
        values, _ = values_and_errors([getattr(row, key) for row in probe.distances])
        panel.plot(at, values, style, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=name)
    repeat, _ = values_and_errors([row.repeat for row in probe.distances])
    gain, error = values_and_errors([row.gain for row in probe.distances])
    panel.fill_between(at, repeat, repeat + gain, color=LIGHT["segment"], alpha=0.35, linewidth=0, label="gain")
    panel.errorbar(at, repeat, error, fmt="none", color=LIGHT["validation"], linewidth=1.2)
    panel.set_xscale("log", base=2)
    panel.set_xticks(at, [f"{row.wanted:,}" for row in probe.distances])
    panel.set_xticks([], minor=True)
    panel.set_title(f"repeated motifs of {probe.motif_tokens:.0f} tokens")
    panel.set_xlabel("tokens from the motif to its repeat")
    panel.set_ylabel("nats per token; bars: error of the gain")
    panel.set_xlim(at.min() / 1.5, at.max() * 1.5)
    mark_reach(panel, probe)
    panel.legend(loc="best")


def draw_reset(panel: Any, reset: ResetCurve) -> None:
    """Draw the gain of the memory by distance from the boundary at which it is emptied in the other reading."""
    rows = reset.by_distance
    at = np.array([middle(row) for row in rows])
    gains, errors = values_and_errors([row.gain for row in rows])
    colour = LIGHT["validation"]
    panel.fill_between(at, gains - errors, gains + errors, color=colour, alpha=0.2, linewidth=0)
    panel.plot(at, gains, color=colour, linewidth=1.6, marker="o", markersize=3.5)
    panel.axhline(0, color=LIGHT["base"], linewidth=0.8, zorder=1)
    panel.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    ticks = [sign * step for step in GAIN_TICKS for sign in (1, -1)]
    panel.set_yticks([0, *ticks], [f"{tick:g}" for tick in (0, *ticks)])
    panel.set_yticks([], minor=True)
    low, high = min((gains - errors).min(), -LINEAR / 10), (gains + errors).max()
    panel.set_ylim(1.3 * low, 1.3 * max(high, LINEAR))
    panel.set_xscale("log", base=2)
    edges = [row.end for row in rows]
    panel.set_xticks(edges[::-2], [f"{edge:,}" for edge in edges[::-2]])
    panel.set_xticks([], minor=True)
    panel.set_xlim(at[0] / 1.5, 1.2 * edges[-1])
    mark_reach(panel, reset)
    panel.set_title(f"gain over a memory emptied at {reset.reset_at:,} tokens")
    panel.set_xlabel(f"tokens since then; mean over the first {reset.window:,}: {reset.gain}")
    panel.set_ylabel("nats per token; band: standard error over works")


def middle(row: DistanceGain) -> float:
    """Return the place of a range of distances on a logarithmic axis; the first range is drawn like its upper half."""
    return float(np.sqrt(max(row.start, row.end / 2) * row.end))


def mark_reach(panel: Any, probe: MotifProbe | ResetCurve) -> None:
    """Draw lines at the horizons and at the reach of the stack, with names in a band above the data."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + NAMES * (high - low))
    first, last = panel.get_xlim()
    marks = {f"horizon {h:,}": h for h in sorted(set(probe.horizons)) if h} | {f"reach {probe.reach:,}": probe.reach}
    for name, place in marks.items():
        if first < place < last:
            panel.axvline(place, color=LIGHT["muted"], linewidth=0.8, linestyle=":", zorder=1)
            look = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 7.5, "color": LIGHT["muted"]}
            panel.annotate(name, (place, 0.99), xycoords=("data", "axes fraction"), **look)
