"""Music: its figures and its piano roll."""

import shutil
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from dsmr_mlx.console.base import out

VELOCITY_COLOURS = ("#7090c0", "#4d9cab", "#57a36a", "#b99a32", "#d67f2c", "#d0453c")  # quiet to loud
LONGEST_TEXT = 600  # characters of what a MIDI file says about itself


def show_piece(notes: Any, title: str | None = None, stored: str | None = None) -> None:
    """The figures of `midi.Notes` in a line, after its title, and in another what its file says about itself."""
    from dsmr_mlx.pianoroll import printable, stored_pairs, summarize

    out.print(f"{printable(title)}: {summarize(notes)}" if title else str(summarize(notes)))
    if pairs := stored_pairs(stored):
        told = printable(", ".join(f"{name}: {value}" for name, value in pairs))
        out.print(told if len(told) <= LONGEST_TEXT else f"{told[:LONGEST_TEXT]}…")


def show_pianoroll(
    notes: Any,
    *,
    title: str | None = None,
    stored: str | None = None,
    start: float = 0.0,
    systems: int | None = None,
) -> None:
    """The figures of `midi.Notes` and their piano roll, as wide as the terminal; loudness as colour where there is any.

    title, stored: what stands before the roll; stored is the text of a MIDI file (`midi.read_text`). start: what the
    clock shows at the left edge, in seconds. systems: the most lines that the piece is broken into (default 2).
    Raises `UserError` for `systems` below 1.
    """
    from dsmr_mlx.text_roll import SYSTEMS, text_systems

    width = shutil.get_terminal_size().columns
    drawn = text_systems(notes, width, SYSTEMS if systems is None else systems, start)
    show_piece(notes, title, stored)
    coloured = out.color_system is not None and not out.no_color
    for system in drawn:
        out.print()
        for line in coloured_lines(system) if coloured else system.lines():
            out.print(line)
    if drawn and coloured:
        out.print(Text.assemble("quiet ", *(("▄▄", colour) for colour in VELOCITY_COLOURS), " loud"))


def coloured_lines(system: Any) -> Iterator[Text]:
    """The lines of a `text_roll.TextSystem`; each half of a cell has the colour of its loudness."""
    colours = [VELOCITY_COLOURS[velocity * len(VELOCITY_COLOURS) // 128] for velocity in range(128)]
    for row, name in enumerate(system.names):
        line = Text.assemble((system.margin(name), "dim"))
        cells = zip(system.blocks(row), *([colours[v] for v in half] for half in system.velocity[row]), strict=True)
        for (character, upper, lower), run in groupby(cells):
            styles = {"▀": upper, "▄": lower, "█": f"{upper} on {lower}"}
            line.append(("▀" if character == "█" else character) * len(list(run)), styles.get(character, "dim"))
        yield line
    for below in (system.ruler, system.times):
        yield Text(below, "dim")
