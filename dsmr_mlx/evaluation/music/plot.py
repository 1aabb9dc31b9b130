"""The distributions of an assessment as a picture, drawn by matplotlib."""

from collections.abc import Sequence

import numpy as np

from dsmr_mlx.common.formatting import printable
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.evaluation.music.assess import Assessment
from dsmr_mlx.evaluation.music.distances import FeatureSet
from dsmr_mlx.evaluation.music.features import BINS_PER_OCTAVE, BY_KEY, SIMILARITY_LAGS, SIMILARITY_WINDOW, Distribution
from dsmr_mlx.music.summary import PITCH_NAMES, pitch_name

SHOWN = ("pitch", "pitch_class", "interval", "ioi", "duration", "velocity", "polyphony", "density")
COLUMNS = 3
SIZE = (11.0, 8.6)  # inches
TIMES = {0.01: "0.01", 0.03: "0.03", 0.1: "0.1", 0.3: "0.3", 1.0: "1", 3.0: "3", 10.0: "10"}
ENDS = {  # values beyond the ends are counted in the first and last bin
    "interval": {-24: "≤ −24", -12: "−12", 0: "0", 12: "12", 24: "≥ 24"},
    "polyphony": {0: "0", 6: "6", 12: "12", 18: "18", 24: "≥ 24"},
    "density": {0: "0", 10: "10", 20: "20", 30: "≥ 30"},
}
AXES = {
    "interval": "semitones",
    "ioi": "seconds; shares per quarter octave",
    "duration": "seconds; shares per quarter octave",
    "polyphony": "simultaneous notes",
    "density": "notes per second",
}
MIN_TIME = 0.0075  # seconds: lower edge of the first bin of times on a logarithmic axis


def distributions_picture(assessment: Assessment, kind: str) -> bytes:
    """Draw eight distributions and the self-similarity, the generated music over the reference if there is one.

    kind: "png" or "svg". Deterministic. Raises `UserError` if matplotlib is not installed.
    """

    def draw(figure) -> None:
        panels = figure.subplots(COLUMNS, COLUMNS).ravel()
        for panel, key in zip(panels, SHOWN, strict=False):
            draw_distribution(panel, BY_KEY[key], assessment)
        draw_similarity(panels[len(SHOWN)], assessment)
        add_legend(figure, panels[0], assessment)

    return picture(draw, SIZE, kind, title="Distributions of the generated music")


def add_legend(figure, panel, assessment: Assessment) -> None:
    """Draw one legend above all panels."""
    handles, _ = panel.get_legend_handles_labels()
    names = [f"{len(assessment.files)} generated"]
    if assessment.reference is not None:
        r = assessment.reference
        names.append(f"{len(r.music)} excerpts of {r.pieces} {printable(r.kind)}")
    figure.legend(handles, names, loc="upper left", ncols=2, bbox_to_anchor=(0.035, 0.995), fontsize=10)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.9, bottom=0.065, hspace=0.42, wspace=0.16)


def draw_distribution(panel, distribution: Distribution, assessment: Assessment) -> None:
    """Draw the share of each bin; for times, whose bins differ in width, the share per quarter octave."""
    timed = distribution.unit == "s"
    edges = np.append(MIN_TIME, distribution.edges[1:]) if timed else distribution.edges
    width = BINS_PER_OCTAVE * np.diff(np.log2(edges)) if timed else np.ones(len(edges) - 1)
    highest = 0.0
    for features, style in styles(assessment):
        masses = features.masses(distribution.key).sum(axis=0)
        share = 100 * masses / max(masses.sum(), 1e-12) / width
        highest = max(highest, share.max())
        panel.stairs(share, edges, **style)
    title = distribution.title
    for compared in assessment.compared:
        if compared.key == distribution.key:
            title += f": overlap {compared.overlap:.2f}"
            title += f" (real {compared.real_overlap:.2f})" if np.isfinite(compared.real_overlap) else ""
    panel.set_title(title)
    panel.set_ylim(0, 1.08 * highest or 1)
    panel.yaxis.get_major_locator().set_params(steps=(1, 2, 5, 10))
    panel.yaxis.set_major_formatter("{x:g} %")
    panel.set_xlim(*shown_range(distribution, edges, assessment))
    label_axis(panel, distribution)


def styles(assessment: Assessment) -> Sequence[tuple[FeatureSet, dict]]:
    """Return the sets to draw with their matplotlib styles; the first is in front."""
    line = {"color": LIGHT["train"], "linewidth": 1.5, "zorder": 3, "label": "generated"}
    area = {"facecolor": LIGHT["segment"], "edgecolor": LIGHT["segment"], "fill": True, "alpha": 0.75, "label": "real"}
    return [(assessment.generated, line), *([(assessment.real, area)] if assessment.real is not None else [])]


def shown_range(distribution: Distribution, edges: np.ndarray, assessment: Assessment) -> tuple[float, float]:
    """Return the range of the bins that are not (nearly) empty; all bins if they have no order."""
    masses = sum(features.masses(distribution.key).sum(axis=0) for features, _ in styles(assessment))
    filled = np.flatnonzero(masses > 1e-4 * masses.sum())
    if not len(filled) or not distribution.ordered:
        return float(edges[0]), float(edges[-1])
    return float(edges[filled[0]]), float(edges[filled[-1] + 1])


def label_axis(panel, distribution: Distribution) -> None:
    """Set musical ticks: pitch names, seconds on a logarithmic axis, whole numbers."""
    low, high = panel.get_xlim()
    if distribution.unit == "s":
        panel.set_xscale("log", base=2)
        panel.set_xlim(low, high)
        shown = {at: name for at, name in TIMES.items() if low < at < high}
        panel.set_xticks(list(shown), list(shown.values()))
        panel.set_xticks([], minor=True)
    elif distribution.key == "pitch_class":
        panel.set_xticks(range(12), PITCH_NAMES)
    elif distribution.key == "pitch":
        octaves = [pitch for pitch in range(0, 128, 12) if low < pitch < high]
        panel.set_xticks(octaves, [pitch_name(pitch) for pitch in octaves])
    elif distribution.key in ENDS:
        ticks = {at: name for at, name in ENDS[distribution.key].items() if low <= at <= high}
        if len(ticks) > 2:
            panel.set_xticks(list(ticks), list(ticks.values()))
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
    if distribution.key in AXES:
        panel.set_xlabel(AXES[distribution.key], labelpad=1)


def draw_similarity(panel, assessment: Assessment) -> None:
    """Draw the median self-similarity over the pieces, and the 10 to 90 % range of the reference."""
    lags = SIMILARITY_WINDOW * np.arange(1, SIMILARITY_LAGS + 1)
    for features, style in styles(assessment):
        curves = np.stack([piece.similarity for piece in features.features])
        known = ~np.isnan(curves).all(axis=0)
        if not known.any():
            continue
        low, middle, high = np.nanquantile(curves[:, known], (0.1, 0.5, 0.9), axis=0)
        if features is assessment.real:
            panel.fill_between(lags[known], low, high, color=LIGHT["segment"], alpha=0.4, linewidth=0)
            panel.plot(lags[known], middle, color=LIGHT["validation"], linewidth=1.2)
        else:
            panel.plot(lags[known], middle, **style)
    panel.set_title("self-similarity")
    panel.set_xlim(0, lags[-1])
    panel.set_xlabel("seconds later; medians, and 10 to 90 % of the real", labelpad=1)
