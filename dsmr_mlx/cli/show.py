"""`dsmr-mlx show`: a MIDI file → something to see and to hear."""

import argparse
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import out
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes

PICTURES = {"png": (".png",), "svg": (".svg",), "html": (".html", ".htm")}


def add(commands) -> None:
    p = add_command(
        commands,
        "show",
        run,
        "dsmr-mlx show new.mid --start 30 --seconds 10\n  dsmr-mlx show new.mid --html new.html --audio new.wav",
    )
    p.add_argument("file", metavar="FILE.mid", help="its drums are left out, its pedal is in the length of the notes")
    p.add_argument("--start", type=float, default=0.0, metavar="X", help="only from X seconds on")
    p.add_argument("--seconds", type=float, metavar="X", help="only so many seconds")
    p.add_argument(
        "--systems", type=int, metavar="N", help="break a long piece into at most N (default 2, in pictures 8)"
    )
    p.add_argument("--png", metavar="FILE.png", help="write a picture; needs matplotlib")
    p.add_argument("--svg", metavar="FILE.svg", help="write a picture that can be enlarged; needs matplotlib")
    p.add_argument("--html", metavar="FILE.html", help="write a page that shows and plays the music, without network")
    p.add_argument("--audio", metavar="FILE.wav", help="write sound (.wav, .flac, .ogg); needs the program fluidsynth")
    p.add_argument("--soundfont", metavar="FILE.sf2", help="of the sound (default $SOUNDFONT, or one in a usual place)")
    p.add_argument("--force", action="store_true", help="overwrite files")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.common.files import check_output, write_output
    from dsmr_mlx.common.plotting import require_matplotlib
    from dsmr_mlx.music import audio
    from dsmr_mlx.music.midi import read_notes, read_text
    from dsmr_mlx.music.piano_roll import SYSTEMS, roll_picture
    from dsmr_mlx.music.summary import excerpt
    from dsmr_mlx.music.web_page import player_html

    suffixes = {**PICTURES, "audio": tuple(audio.TYPES)}
    outputs = {kind: Path(path) for kind in suffixes if (path := getattr(a, kind)) is not None}
    if a.soundfont is not None and a.audio is None:
        raise UserError(f"--soundfont {a.soundfont}: expected --audio FILE.wav with it")
    if a.systems is not None and outputs and a.png is None and a.svg is None:
        raise UserError(f"--systems {a.systems}: expected --png or --svg with it, or no output at all")
    for kind, path in outputs.items():
        check_output(f"--{kind}", path, suffixes[kind], a.force)
        if kind in ("png", "svg"):
            require_matplotlib(f"--{kind}")
    notes = excerpt(read_notes(a.file, allow_empty=True), a.start, a.seconds)
    title, stored = Path(a.file).name, read_text(a.file)
    if not outputs:
        show_pianoroll(notes, title=title, stored=stored, start=a.start, systems=a.systems)
        return
    layout = {"title": title, "start": a.start, "systems": SYSTEMS if a.systems is None else a.systems}
    make = {
        "png": lambda: roll_picture(notes, "png", **layout),
        "svg": lambda: roll_picture(notes, "svg", **layout),
        "html": lambda: player_html(notes, title=title, stored=stored, start=a.start),
    }
    show_piece(notes, title, stored)
    for kind, path in outputs.items():
        if kind == "audio":
            audio.write_audio(notes, path, a.soundfont)
        else:
            write_output(f"--{kind}", path, make[kind]())
        out.print(f"{path}: {format_bytes(path.stat().st_size)}")


VELOCITY_COLOURS = ("#7090c0", "#4d9cab", "#57a36a", "#b99a32", "#d67f2c", "#d0453c")  # quiet to loud
LONGEST_TEXT = 600  # characters of what a MIDI file says about itself


def show_piece(notes: Any, title: str | None = None, stored: str | None = None) -> None:
    """The figures of `midi.Notes` in a line, after its title, and in another what its file says about itself."""
    from dsmr_mlx.common.formatting import printable
    from dsmr_mlx.music.summary import summarize, text_fields

    out.print(f"{printable(title)}: {summarize(notes)}" if title else str(summarize(notes)))
    if pairs := text_fields(stored):
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
    from dsmr_mlx.music.text_roll import SYSTEMS, text_systems

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
