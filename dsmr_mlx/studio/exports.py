"""The music of a take as a file."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.audio import find_fluidsynth, find_soundfont, write_audio
from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import roll_picture

TYPES = {"mid": "audio/midi", "svg": "image/svg+xml", "png": "image/png", "wav": "audio/wav"}


def available() -> list[str]:
    """Return the endings of the files that can be made on this computer."""
    pictures = ["svg", "png"] if find_spec("matplotlib") else []
    try:
        sound = ["wav"] if find_fluidsynth() and find_soundfont(None) else []
    except UserError:
        sound = []
    return ["mid", *pictures, *sound]


def export(notes: Notes, kind: str, title: str, text: str | None = None) -> bytes:
    """Return the file of some music; kind: one of `TYPES`. text: stored in a MIDI file.

    Raises `UserError` if something that it needs is not installed.
    """
    if kind == "mid":
        return midi_bytes(notes, text)
    if kind in ("svg", "png"):
        return roll_picture(notes, kind, title=title)
    with TemporaryDirectory(prefix="dsmr-mlx-") as folder:
        path = Path(folder) / "music.wav"
        write_audio(notes, path)
        return path.read_bytes()
