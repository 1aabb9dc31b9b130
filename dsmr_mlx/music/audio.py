"""Render notes as WAV, FLAC or Ogg with the FluidSynth program and a SoundFont.

FluidSynth's exit code is not enough (if it cannot read a SoundFont, it uses another one or renders silence), so its
output is checked too. SoundFonts differ in loudness by a factor of ten: a first pass measures the peak, the second
renders as loud as possible.
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
from dsmr_mlx.common.files import open_regular, sync
from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.music.notes import Notes

TYPES = {".wav": "wav", ".flac": "flac", ".ogg": "oga"}  # FluidSynth's name for each suffix
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
    "/opt/homebrew/share/fluid-synth/sf2",  # a small example that comes with brew's FluidSynth
    "/usr/local/share/fluid-synth/sf2",
)
BREW_PATH = "/opt/homebrew/bin:/usr/local/bin"  # not on the PATH of a program that Finder starts
RATE = 44_100  # Hz
MAX_SECONDS = 24_000.0  # 6.7 hours; the size of a 16-bit stereo WAV file must be below 4 GiB
POLYPHONY = 1024  # for a held pedal over fast music; FluidSynth's default of 256 would cut notes off
MEASURED_GAIN, MAX_GAIN = 0.1, 10.0  # FluidSynth allows up to 10
PEAK = 0.89  # -1 dB of full scale
START_SECONDS = 60.0  # to start and read a large SoundFont; rendering is about 100 × real time
NO_PROGRAM = (
    "the program fluidsynth is not installed; install it with `brew install fluid-synth` on macOS or "
    "`apt install fluidsynth fluid-soundfont-gm` on Debian and Ubuntu"
)
NO_SOUNDFONT = (
    "no SoundFont found, expected `soundfont`, a path in $SOUNDFONT, or a file in "
    "~/Library/Audio/Sounds/Banks (macOS) or /usr/share/sounds/sf2 (`apt install fluid-soundfont-gm`)"
)


class NoSoundFont(UserError):
    """Raised if no SoundFont is found."""


def find_soundfont(soundfont: str | os.PathLike | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the SoundFont to use: the one given, that of $SOUNDFONT, or one in the first of `FOLDERS` that has any.

    In a folder, one named default… comes first, then the largest. Hidden files, which macOS adds on some drives, and
    files of other types are ignored. Raises `NoSoundFont` if none is found, and `UserError`, which names the file, for
    one that is not a SoundFont.
    """
    problem: UserError = NoSoundFont(f"`audio`: {NO_SOUNDFONT}")
    for origin, path in (("`soundfont`", soundfont), ("$SOUNDFONT", environment.get("SOUNDFONT"))):
        if path:
            return check_soundfont(origin, Path(path).expanduser())
    for folder in FOLDERS:
        found = [p for p in Path(folder).expanduser().glob("[!.]*") if p.suffix.lower() in SOUNDFONT_SUFFIXES]
        found = sorted(p for p in found if p.is_file())
        for path in sorted(found, key=lambda p: (not p.stem.lower().startswith("default"), -p.stat().st_size)):
            try:
                return check_soundfont("SoundFont", path)
            except UserError as error:
                problem = error
    raise problem


def find_fluidsynth() -> str | None:
    """Return the path of the program, from the PATH or Homebrew's folders; None if it is not installed."""
    return shutil.which("fluidsynth") or shutil.which("fluidsynth", path=BREW_PATH)


def check_soundfont(origin: str, path: Path) -> Path:
    """Return the path of a SoundFont file. Raises `UserError`, which names its origin, if it is not one."""
    try:
        with open_regular(path) as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"{origin} {path}: cannot be read ({error.strerror or error})") from error
    if head[:4] != b"RIFF" or head[8:] != b"sfbk":
        raise UserError(f"{origin} {path}: not a SoundFont, expected an .sf2 or .sf3 file")
    return path


def write_audio(notes: Notes, audio: str | os.PathLike, soundfont: str | os.PathLike | None = None) -> Path:
    """Render notes into a file, atomically. Return the SoundFont used.

    audio: a path whose suffix (.wav, .flac, .ogg) is the format: 16 bits, 44.1 kHz, stereo, peak at -1 dB. An existing
    file is replaced. soundfont: see `find_soundfont`. Raises `UserError` if FluidSynth or a SoundFont is missing, the
    program fails, or the file cannot be written.
    """
    path = Path(audio)
    if path.suffix.lower() not in TYPES:
        raise UserError(f"`audio` {path}: expected a name that ends in {' or '.join(TYPES)}")
    if not len(notes):
        raise UserError(f"`audio` {path}: no notes to render")
    if notes.duration > MAX_SECONDS:
        raise UserError(f"`audio` {path}: {notes.duration:.0f} s long, expected at most {MAX_SECONDS:.0f} s")
    program = find_fluidsynth()
    if program is None:
        raise UserError(f"`audio`: {NO_PROGRAM}")
    soundfont = find_soundfont(soundfont)
    limit = START_SECONDS + notes.duration
    try:
        with TemporaryDirectory(prefix=".dsmr-mlx-", dir=path.parent) as folder:
            midi, sound = (Path(folder).absolute() / name for name in ("a.mid", f"a{path.suffix}"))
            midi.write_bytes(midi_bytes(notes))
            render(program, midi, soundfont, sound, fitting_gain(program, midi, soundfont, limit), limit)
            sync(sound)
            sound.replace(path)
    except OSError as error:
        raise UserError(f"`audio` {path}: cannot be written ({error.strerror or error})") from None
    return soundfont


def fitting_gain(program: str, midi: Path, soundfont: Path, limit: float) -> float:
    """Return the gain at which the peak is `PEAK`, at most `MAX_GAIN`. Raises `UserError` if the sound is silent."""
    measured = midi.with_name("measured.wav")
    for gain in (MEASURED_GAIN, MAX_GAIN):
        render(program, midi, soundfont, measured, gain, limit)
        peak = peak_of(measured)
        measured.unlink()
        if peak:
            return min(gain * PEAK / peak, MAX_GAIN)
    raise UserError(f"`audio`: fluidsynth rendered silence with {soundfont}, expected a SoundFont with a piano")


def render(program: str, midi: Path, soundfont: Path, sound: Path, gain: float, limit: float) -> None:
    """Render a MIDI file with FluidSynth. Raises `UserError` if it fails or takes longer than `limit` seconds."""
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
        raise UserError(f"`audio`: fluidsynth took longer than {limit:.0f} s and was stopped") from None
    except OSError as error:
        raise UserError(f"`audio`: {program} cannot be run ({error.strerror or error})") from None
    lines = [" ".join(line.split()) for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("fluidsynth: error:", "fluidsynth: panic:"))]
    if code or errors or not sound.is_file():
        reason = (errors or lines or [f"exit code {code}"])[-1]
        raise UserError(f"`audio`: fluidsynth failed ({reason})")


def peak_of(path: Path) -> float:
    """Return the peak of a 16-bit WAV file, 0 to 1. Raises `UserError` if it is not one."""
    peak = 0
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise wave.Error(f"{8 * file.getsampwidth()} bits")
            while frames := file.readframes(1 << 20):
                samples = np.frombuffer(frames[: len(frames) // 2 * 2], "<i2").astype(np.int32)
                peak = max(peak, int(np.abs(samples).max(initial=0)))
    except (wave.Error, EOFError) as error:
        raise UserError(f"`audio`: fluidsynth did not write a 16-bit WAV file ({error})") from error
    return min(peak / 32768, 1.0)
