"""What it is worth to be shown what follows a gap, as two panels of a picture."""

from textwrap import fill
from typing import Any

import numpy as np

from dsmr_mlx.common.plotting import LIGHT
from dsmr_mlx.evaluation.gaps import KINDS, GapReport

LOOKS = (("nothing", "nothing shown", LIGHT["train"]), ("shown", "what follows shown", LIGHT["validation"]))


def draw_lengths(panel: Any, report: GapReport) -> None:
    """Draw the loss of true passages by length of the gap, with what follows shown and without."""
    rows = report.by_length
    at = np.arange(len(rows))
    for shift, (name, label, colour) in zip((-0.06, 0.06), LOOKS, strict=True):
        found = [getattr(row, name) for row in rows]
        errors = np.nan_to_num([each.error for each in found])
        look = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.4}
        panel.errorbar(at + shift, [each.nats for each in found], errors, label=label, **look)
    panel.set_xticks(at, [f"{row.start:g} – {row.end:g} s\n{row.gaps:,} gaps" for row in rows])
    panel.set_title("true passages in gaps")
    panel.set_xlabel(f"length of the gap; gain over all: {report.everything.gain}")
    panel.set_ylabel("nats per note, ± standard error over works")
    panel.margins(x=0.15)
    panel.legend(loc="best")


def draw_joins(panel: Any, report: GapReport) -> None:
    """Draw the loss of what follows passages of each kind."""
    found = [kind.following for kind in report.joins]
    at = np.arange(len(found))
    errors = np.nan_to_num([each.error for each in found])
    colours = [LIGHT["ink"], LIGHT["validation"], LIGHT["train"], LIGHT["base"]]
    panel.bar(at, [each.nats for each in found], 0.6, yerr=errors, color=colours, ecolor=LIGHT["muted"])
    panel.set_xticks(at, [fill(KINDS[kind.kind], 12) for kind in report.joins])
    panel.set_title(f"what follows passages of {report.seconds:g} s, in {report.joined} gaps")
    panel.set_ylabel("nats per note of the first seconds after them")
