"""`dsmr-mlx show`: a MIDI file → something to see and to hear."""

import argparse
from pathlib import Path

from dsmr_mlx.commands.common import add_command
from dsmr_mlx.errors import UserError

PICTURES = {"png": (".png",), "svg": (".svg",), "html": (".html", ".htm")}


def add(commands) -> None:
    p = add_command(
        commands,
        "show",
        run,
        "show a MIDI file as a piano roll: here, as a picture, as a page that plays it, as sound",
        "dsmr-mlx show new.mid --start 30 --seconds 10\n  dsmr-mlx show new.mid --html new.html --audio new.wav",
    )
    p.add_argument("file", metavar="FILE.mid", help="its drums are left out, its pedal is in the length of the notes")
    p.add_argument("--start", type=float, default=0.0, metavar="X", help="only from X seconds on")
    p.add_argument("--seconds", type=float, metavar="X", help="only so many seconds")
    p.add_argument(
        "--systems", type=int, metavar="N", help="break a long piece into at most N (default 2, in pictures 8)"
    )
    p.add_argument("--png", metavar="FILE.png", help="write a picture; needs matplotlib")
    p.add_argument("--svg", metavar="FILE.svg", help="write a picture that can be enlarged")
    p.add_argument("--html", metavar="FILE.html", help="write a page that shows and plays the music, without network")
    p.add_argument("--audio", metavar="FILE.wav", help="write sound (.wav, .flac, .ogg); needs the program fluidsynth")
    p.add_argument("--soundfont", metavar="FILE.sf2", help="of the sound (default $SOUNDFONT, or one in a usual place)")
    p.add_argument("--force", action="store_true", help="overwrite files")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import audio, console
    from dsmr_mlx.files import check_output, write_output
    from dsmr_mlx.midi import read_notes, read_text
    from dsmr_mlx.pianoroll import SYSTEMS, excerpt, roll_png, roll_svg
    from dsmr_mlx.player_page import player_html

    suffixes = {**PICTURES, "audio": tuple(audio.TYPES)}
    outputs = {kind: Path(path) for kind in suffixes if (path := getattr(a, kind)) is not None}
    if a.soundfont is not None and a.audio is None:
        raise UserError(f"--soundfont {a.soundfont}: expected --audio FILE.wav with it")
    if a.systems is not None and outputs and a.png is None and a.svg is None:
        raise UserError(f"--systems {a.systems}: expected --png or --svg with it, or no output at all")
    for kind, path in outputs.items():
        check_output(f"--{kind}", path, suffixes[kind], a.force)
    notes = excerpt(read_notes(a.file, may_be_empty=True), a.start, a.seconds)
    title, stored = Path(a.file).name, read_text(a.file)
    if not outputs:
        console.show_pianoroll(notes, title=title, stored=stored, start=a.start, systems=a.systems)
        return
    layout = {"title": title, "start": a.start, "systems": SYSTEMS if a.systems is None else a.systems}
    make = {
        "png": lambda: roll_png(notes, **layout),
        "svg": lambda: roll_svg(notes, **layout),
        "html": lambda: player_html(notes, title=title, stored=stored, start=a.start),
    }
    console.show_piece(notes, title, stored)
    for kind, path in outputs.items():
        if kind == "audio":
            audio.write_audio(notes, path, a.soundfont)
        else:
            write_output(f"--{kind}", path, make[kind]())
        console.out.print(f"{path}: {console.size(path.stat().st_size)}")
