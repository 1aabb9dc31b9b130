"""`dsmr-mlx show`: show a MIDI file as a piano roll, or write a picture, a web page or audio."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import out, show_file
from dsmr_mlx.common.errors import UserError

if TYPE_CHECKING:
    from dsmr_mlx.music.notes import Notes
    from dsmr_mlx.music.text_roll import TextSystem

SUFFIXES = {"png": (".png",), "svg": (".svg",), "html": (".html", ".htm")}
VELOCITY_COLOURS = ("#7090c0", "#4d9cab", "#57a36a", "#b99a32", "#d67f2c", "#d0453c")  # soft to loud
MAX_TEXT = 800  # characters shown of the text in a MIDI file


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "show",
        run,
        "dsmr-mlx show new.mid --start 30 --seconds 10",
        "dsmr-mlx show new.mid --html new.html --audio new.wav",
    )
    p.add_argument("file", metavar="FILE.mid", help="a MIDI file; drums are left out, the pedal lengthens notes")
    p.add_argument("--start", type=float, default=0.0, metavar="X", help="skip the first X seconds")
    p.add_argument("--seconds", type=float, metavar="X", help="show only X seconds")
    p.add_argument(
        "--systems", type=int, metavar="N", help="break the piece into at most N systems (default 2, in pictures 8)"
    )
    p.add_argument("--png", metavar="FILE.png", help="write a picture; needs matplotlib")
    p.add_argument("--svg", metavar="FILE.svg", help="write a vector picture; needs matplotlib")
    p.add_argument("--html", metavar="FILE.html", help="write a web page that shows and plays the music, also offline")
    p.add_argument("--audio", metavar="FILE.wav", help="write audio (.wav, .flac, .ogg); needs the program fluidsynth")
    p.add_argument(
        "--soundfont", metavar="FILE.sf2", help="SoundFont for --audio (default $SOUNDFONT, or an installed one)"
    )
    p.add_argument("--force", action="store_true", help="overwrite files")


def run(a: argparse.Namespace) -> None:
    """Show a MIDI file, or write files."""
    from dsmr_mlx.common.files import check_output, write_output
    from dsmr_mlx.common.plotting import require_matplotlib
    from dsmr_mlx.music import audio
    from dsmr_mlx.music.midi import read_notes, read_text
    from dsmr_mlx.music.piano_roll import SYSTEMS, roll_picture
    from dsmr_mlx.music.summary import excerpt
    from dsmr_mlx.music.web_page import player_html

    suffixes = {**SUFFIXES, "audio": tuple(audio.TYPES)}
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
        show_file(path)


def show_piece(notes: "Notes", title: str | None, stored: str | None) -> None:
    """Show the title and figures of a piece, and the text stored in its file."""
    from dsmr_mlx.common.formatting import printable
    from dsmr_mlx.music.summary import summarize, text_fields

    out.print(f"{printable(title)}: {summarize(notes)}" if title else str(summarize(notes)))
    if pairs := text_fields(stored):
        text = printable(", ".join(f"{name}: {value}" for name, value in pairs))
        out.print(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…")


def show_pianoroll(
    notes: "Notes",
    *,
    title: str | None = None,
    stored: str | None = None,
    start: float = 0.0,
    systems: int | None = None,
    marks: Sequence[tuple[float, float]] = (),
) -> None:
    """Show the figures and the piano roll of a piece, as wide as the terminal, with velocities as colours if it can.

    stored: the text of a MIDI file (`midi.read_text`); start: the time at the left edge in seconds; systems:
    maximum number of systems that the piece is broken into (default 2); marks: passages to mark, from start to end in
    seconds, on the same clock as `start`. Raises `UserError` for `systems` below 1.
    """
    from dsmr_mlx.music.text_roll import MARK, SYSTEMS, text_systems

    width = shutil.get_terminal_size().columns
    drawn = text_systems(notes, width, SYSTEMS if systems is None else systems, start, marks)
    show_piece(notes, title, stored)
    coloured = out.color_system is not None and not out.no_color
    for system in drawn:
        out.print()
        for line in coloured_lines(system) if coloured else system.lines():
            out.print(line)
    if drawn and marks:
        out.print(f"{MARK * 2} new music")
    if drawn and coloured:
        out.print(Text.assemble("soft ", *(("▄▄", colour) for colour in VELOCITY_COLOURS), " loud"))


def coloured_lines(system: "TextSystem") -> Iterator[Text]:
    """Yield the lines of a system; each half of a cell has the colour of its velocity."""
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
