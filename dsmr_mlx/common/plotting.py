"""What all pictures that matplotlib draws share: their look, their formats, and what is said where it is missing."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmr_mlx.common.charts import LIGHT
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output

SUFFIXES = (".png", ".svg")
DPI = 160
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["base"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "xtick.color": LIGHT["base"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["base"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.left": False,
    "legend.frameon": False,
    "svg.hashsalt": "dsmr-mlx",
}


def require_matplotlib(option: str) -> None:
    """Raise `UserError` that names the option and says what to install where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        expected = "`pip install 'dsmr-mlx[plot]'` or `pip install matplotlib`"
        raise UserError(f"{option}: matplotlib is not installed, expected {expected}") from error


def check_picture(option: str, path: str | os.PathLike, force: bool) -> Path:
    """The path of a picture to be drawn later. Raises `UserError` as `files.check_output` does, and where matplotlib is
    missing: known before the work that the picture shows.
    """
    path = check_output(option, path, SUFFIXES, force)
    require_matplotlib(option)
    return path


def picture(draw: Callable[[Any], None], size: tuple[float, float], kind: str, option: str = "--plot") -> bytes:
    """What `draw` puts on a matplotlib figure of `size` inches, as the content of a file. Same drawing, same bytes.

    kind: "png" or "svg"; option: which to name in the `UserError` that is raised where matplotlib is missing.
    """
    require_matplotlib(option)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font has not is drawn as boxes
        figure = Figure(figsize=size, dpi=DPI, facecolor=LIGHT["paper"])
        draw(figure)
        return figure_bytes(figure, kind)


def figure_bytes(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as the content of a "png" or "svg" file, without the time or a version in it."""
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None})
    return stream.getvalue()
