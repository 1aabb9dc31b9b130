"""Notes as sound: the FluidSynth program and a SoundFont make a WAV, FLAC or Ogg file of them.

FluidSynth says little by its exit code (where a SoundFont cannot be read it takes another one, or renders silence), so
what it prints and writes is looked at. SoundFonts differ in loudness by a factor of ten: a first pass measures the
peak, the second is as loud as fits.
"""

import os
import shutil
import subprocess
import wave
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import sync
from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.music.notes import Notes

TYPES = {".wav": "wav", ".flac": "flac", ".ogg": "oga"}  # by suffix, as FluidSynth calls them
SOUNDFONT_SUFFIXES = (".sf2", ".sf3")
FOLDERS = (
    "~/Library/Audio/Sounds/Banks",
    "/Library/Audio/Sounds/Banks",
    "~/.local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
    "/usr/local/share/soundfonts",
    "/usr/share/sounds/sf2",
    "/usr/share/sounds/sf3",
    "/usr/share/soundfonts",
)
RATE = 44_100  # Hz
POLYPHONY = 1024  # a held pedal over fast music; FluidSynth's own 256 would cut notes off
MEASURED_GAIN, MOST_GAIN = 0.1, 10.0  # FluidSynth's range ends at 10
PEAK = 0.89  # -1 dB of full scale
START_SECONDS = 60.0  # for a program that starts and reads a large SoundFont; rendering is some 100 × real time
NO_PROGRAM = (
    "the program fluidsynth is not installed, expected `brew install fluid-synth` on macOS, "
    "`apt install fluidsynth fluid-soundfont-gm` on Debian or Ubuntu"
)
NO_SOUNDFONT = (
    "no SoundFont found, expected --soundfont FILE.sf2, its path in $SOUNDFONT, or a file in "
    "~/Library/Audio/Sounds/Banks (macOS) or /usr/share/sounds/sf2 (`apt install fluid-soundfont-gm`)"
)


def find_soundfont(given: str | os.PathLike | None, environment: Mapping[str, str] = os.environ) -> Path:
    """The SoundFont to use: the one given, that of $SOUNDFONT, or the best in the usual places.

    Of several in a folder that is the system's default, else the largest. Raises `UserError` when there is none, and
    for a file that is no SoundFont.
    """
    for origin, path in (("--soundfont", given), ("$SOUNDFONT", environment.get("SOUNDFONT"))):
        if path:
            return checked_soundfont(origin, Path(path).expanduser())
    for folder in FOLDERS:
        found = [p for p in Path(folder).expanduser().glob("*") if p.suffix.lower() in SOUNDFONT_SUFFIXES]
        if found := [p for p in found if p.is_file()]:
            return max(sorted(found), key=lambda p: (p.stem.lower().startswith("default"), p.stat().st_size))
    raise UserError(f"--audio: {NO_SOUNDFONT}")


def checked_soundfont(origin: str, path: Path) -> Path:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"{origin} {path}: cannot be read ({error.strerror or error})") from error
    if head[:4] != b"RIFF" or head[8:] != b"sfbk":
        raise UserError(f"{origin} {path}: not a SoundFont, expected an .sf2 or .sf3 file")
    return path


def write_audio(notes: Notes, path: str | os.PathLike, soundfont: str | os.PathLike | None = None) -> Path:
    """Play the notes into a file, all or nothing; the SoundFont that was used.

    path: its suffix (.wav, .flac, .ogg) is the kind; 16 bits, 44.1 kHz, stereo, the loudest sample at -1 dB. A file
    that exists is replaced. soundfont: see `find_soundfont`. Raises `UserError`, in terms of the command line, when
    the program or a SoundFont is missing, the program fails, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in TYPES:
        raise UserError(f"--audio {path}: expected a name that ends in {' or '.join(TYPES)}")
    if not len(notes):
        raise UserError(f"--audio {path}: no notes to play")
    program = shutil.which("fluidsynth")
    if program is None:
        raise UserError(f"--audio: {NO_PROGRAM}")
    soundfont = find_soundfont(soundfont)
    limit = START_SECONDS + notes.duration
    try:
        with TemporaryDirectory(prefix=".dsmr-mlx-", dir=path.parent) as folder:
            midi, sound = (Path(folder).absolute() / name for name in ("a.mid", f"a{path.suffix}"))
            midi.write_bytes(midi_bytes(notes))
            play(program, midi, soundfont, sound, fitting_gain(program, midi, soundfont, limit), limit)
            sync(sound)
            sound.replace(path)
    except OSError as error:
        raise UserError(f"--audio {path}: cannot be written ({error.strerror or error})") from None
    return soundfont


def fitting_gain(program: str, midi: Path, soundfont: Path, limit: float) -> float:
    """The gain with which the loudest sample is at `PEAK`, at most `MOST_GAIN`. Raises `UserError` for silence."""
    measured = midi.with_name("measured.wav")
    for gain in (MEASURED_GAIN, MOST_GAIN):
        play(program, midi, soundfont, measured, gain, limit)
        peak = peak_of(measured)
        measured.unlink()
        if peak:
            return min(gain * PEAK / peak, MOST_GAIN)
    raise UserError(f"--audio: fluidsynth made no sound with {soundfont} (has it a piano?)")


def play(program: str, midi: Path, soundfont: Path, sound: Path, gain: float, limit: float) -> None:
    """Render a file with FluidSynth in at most `limit` seconds. Raises `UserError` when it fails or takes longer."""
    options = ["-n", "-i", "-q", "-f", os.devnull, "-r", str(RATE), "-g", f"{gain:.4f}", "-O", "s16"]
    options += ["-o", f"synth.polyphony={POLYPHONY}", "-T", TYPES[sound.suffix.lower()], "-F", str(sound)]
    command = [program, *options, str(soundfont.absolute()), str(midi)]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    code = 0
    try:
        output = subprocess.check_output(command, timeout=limit, **streams)
    except subprocess.CalledProcessError as error:
        output, code = error.output, error.returncode
    except subprocess.TimeoutExpired:
        raise UserError(f"--audio: fluidsynth took longer than {limit:.0f} s and was stopped") from None
    except OSError as error:
        raise UserError(f"--audio: {program} cannot be run ({error.strerror or error})") from None
    lines = [" ".join(line.split()) for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("fluidsynth: error:", "fluidsynth: panic:"))]
    if code or errors or not sound.is_file():
        reason = (errors or lines or [f"exit code {code}"])[-1]
        raise UserError(f"--audio: fluidsynth failed ({reason})")


def peak_of(path: Path) -> float:
    """The largest sample of a 16-bit WAV file, 0 to 1. Raises `UserError` if it is not one."""
    peak = 0
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise wave.Error(f"{8 * file.getsampwidth()} bits")
            while frames := file.readframes(1 << 20):
                samples = np.frombuffer(frames[: len(frames) // 2 * 2], "<i2").astype(np.int32)
                peak = max(peak, int(np.abs(samples).max(initial=0)))
    except (wave.Error, EOFError) as error:
        raise UserError(f"--audio: fluidsynth wrote what is not a 16-bit WAV file ({error})") from error
    return min(peak / 32768, 1.0)
