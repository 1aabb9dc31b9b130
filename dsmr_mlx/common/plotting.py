"""Pictures drawn with matplotlib: colours, style, PNG and SVG output."""

import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output

SUFFIXES = (".png", ".svg")
DPI = 160
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
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["base"],
    "axes.facecolor": "none",
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
    "path.simplify": False,  # every note and point is drawn
    "svg.fonttype": "none",
    "svg.hashsalt": "dsmr-mlx",
}


def require_matplotlib(name: str) -> None:
    """Raise `UserError` if matplotlib is missing; `name` is the option or argument that needs it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        expected = "`pip install 'dsmr-mlx[plot]'` or `pip install matplotlib`"
        raise UserError(f"{name}: matplotlib is not installed, expected {expected}") from error


def check_picture(option: str, path: str | os.PathLike, force: bool) -> Path:
    """Return the path of a picture to be drawn later, checked before the work that the picture shows.

    Raises `UserError` as `files.check_output` does, and if matplotlib is missing.
    """
    path = check_output(option, path, SUFFIXES, force)
    require_matplotlib(option)
    return path


def picture(
    draw: Callable[[Any], None], size: tuple[float, float], kind: str, name: str = "`plot`", title: str | None = None
) -> bytes:
    """Return the file content of a matplotlib figure of `size` inches that `draw` draws on. Deterministic.

    kind: "png" or "svg"; an SVG follows the reader's light or dark scheme. title: of the SVG, for screen readers.
    Raises `UserError`, naming the argument `name`, if matplotlib is missing.
    """
    require_matplotlib(name)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks is drawn as boxes
        figure = Figure(figsize=size, dpi=DPI, facecolor=LIGHT["paper"])
        draw(figure)
        if kind == "png":
            figure.savefig(stream, format="png", metadata={"Software": None})
            return stream.getvalue()
        figure.savefig(stream, format="svg", metadata={"Date": None} | ({"Title": title} if title else {}))
    return compact_svg(stream.getvalue().decode()).encode()


def compact_svg(svg: str) -> str:
    """Return matplotlib's SVG without prolog, metadata and unused ids, to 0.01 pt, with a dark scheme for screens."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: compact_tag(tag[0]), svg)  # text between tags stays unchanged
    rules = "".join(
        f'[style*="{use}: {LIGHT[name]}"] {{ {use}: {DARK[name]} !important; }} '
        for name in LIGHT
        for use in ("fill", "stroke")
        if f"{use}: {LIGHT[name]}" in svg
    )
    svg = svg.replace("</style>", f" @media screen and (prefers-color-scheme: dark) {{ {rules}}}</style>", 1)
    return re.sub(r"\s*\n\s*", "\n", svg.replace("<svg ", '<svg role="img" ', 1))


def compact_tag(tag: str) -> str:
    """Return a tag with rounded numbers and the system font, without unused ids."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"| transform="rotate\(-0 [^"]*"', "", tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag.replace("'DejaVu Sans'", "system-ui, sans-serif"))
