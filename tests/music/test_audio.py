"""Rendering by FluidSynth: its command line, its failures, and the real program if it is installed."""

import json
import os
import shutil
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from dsmr_mlx import UserError
from dsmr_mlx.cli import main
from dsmr_mlx.music import audio
from dsmr_mlx.music.audio import find_soundfont, peak_of, write_audio
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.music.notes import Notes

SOUNDFONT = b"RIFF\x04\0\0\0sfbk"
NOTES = Notes([0.0, 0.5], [0.4, 2.0], [60, 67], [64, 100])
FULL_SCALE = 0.25  # the peak of the stand-in at gain 0.1
# A stand-in that logs its arguments and behaves as $MOOD says.
PROGRAM = f"""#!{sys.executable}
import json, os, shutil, struct, sys, time, wave
arguments = sys.argv[1:]
value = lambda option: arguments[arguments.index(option) + 1]
log = os.path.join(os.path.dirname(__file__), "calls")
open(log, "a").write(json.dumps(arguments) + "\\n")
shutil.copy(arguments[-1], log + ".mid")
mood = os.environ.get("MOOD", "")
if mood == "hangs":
    time.sleep(60)
if mood == "fails":
    sys.exit("fluidsynth: warning: careful\\nfluidsynth: error: out of\\t strings\\nbye")
if mood == "writes nothing":
    sys.exit(0)
if mood == "writes text":
    sys.exit(open(value("-F"), "w").write("sound") and 0)
if mood == "takes another":
    sys.stderr.write("fluidsynth: error: EOF\\nfluidsynth: error: Failed to load SoundFont\\nplaying on\\n")
level = 0 if mood == "is silent" else min(10 * float(value("-g")) * {FULL_SCALE}, 1)
with wave.open(value("-F"), "wb") as file:
    file.setnchannels(2)
    file.setsampwidth(2)
    file.setframerate(44100)
    file.writeframes(struct.pack("<4h", 0, round(-32768 * level), 0, 0))
"""


@pytest.fixture
def fluidsynth(tmp_path, monkeypatch):
    """Put a stand-in on the PATH and a SoundFont in the environment. Return a function that returns the calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "fluidsynth").write_text(PROGRAM)
    (folder / "fluidsynth").chmod(0o755)
    (tmp_path / "a piano.sf2").write_bytes(SOUNDFONT)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SOUNDFONT", str(tmp_path / "a piano.sf2"))
    monkeypatch.delenv("MOOD", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda: [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def nothing_left(folder: Path) -> bool:
    """Whether no temporary file is left."""
    return not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("name", "kind"), [("a.wav", "wav"), ("a b;$(x).FLAC", "flac"), ("-o.ogg", "oga")])
def test_command_line_of_both_passes(fluidsynth, tmp_path, name, kind):
    assert write_audio(NOTES, name) == tmp_path / "a piano.sf2"
    calls = fluidsynth()
    assert len(calls) == 2
    assert [call[call.index("-T") + 1] for call in calls] == ["wav", kind]
    assert all(call[-2] == str(tmp_path / "a piano.sf2") for call in calls)
    assert all(Path(call[-1]).is_absolute() and Path(call[call.index("-F") + 1]).is_absolute() for call in calls)
    assert read_notes(tmp_path / "bin" / "calls.mid") == NOTES
    assert peak_of(Path(name)) == pytest.approx(audio.PEAK, abs=1e-3)
    assert nothing_left(tmp_path)


def test_an_existing_file_is_replaced_only_by_a_complete_one(fluidsynth, tmp_path, monkeypatch):
    Path("a.wav").write_bytes(b"old")
    monkeypatch.setenv("MOOD", "fails")
    with pytest.raises(UserError, match="failed"):
        write_audio(NOTES, "a.wav")
    assert Path("a.wav").read_bytes() == b"old"
    assert nothing_left(tmp_path)
    monkeypatch.setenv("MOOD", "")
    write_audio(NOTES, "a.wav")
    assert Path("a.wav").read_bytes() != b"old"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("fails", r"`audio`: fluidsynth failed \(fluidsynth: error: out of strings\)"),
        ("writes nothing", r"`audio`: fluidsynth failed \(exit code 0\)"),
        ("writes text", r"`audio`: fluidsynth did not write a 16-bit WAV file"),
        ("is silent", r"`audio`: fluidsynth rendered silence with .*a piano.sf2, expected a SoundFont with a piano"),
        ("takes another", r"`audio`: fluidsynth failed \(fluidsynth: error: Failed to load SoundFont\)"),
    ],
)
def test_failures_are_errors_of_one_line(fluidsynth, tmp_path, monkeypatch, capsys, mood, message):
    monkeypatch.setenv("MOOD", mood)
    with pytest.raises(UserError, match=message):
        write_audio(NOTES, "a.wav")
    write_notes(NOTES, "a.mid")
    assert main(["show", "a.mid", "--audio", "a.wav"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("a.wav").exists()
    assert nothing_left(tmp_path)


@pytest.mark.slow
def test_a_hanging_program_is_stopped(fluidsynth, tmp_path, monkeypatch):
    monkeypatch.setenv("MOOD", "hangs")
    monkeypatch.setattr(audio, "START_SECONDS", 0.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="`audio`: fluidsynth took longer than 2 s and was stopped"):
        write_audio(NOTES, "a.wav")
    assert time.monotonic() - began < 20
    assert nothing_left(tmp_path)


def test_a_program_that_cannot_be_run(fluidsynth, tmp_path):
    (tmp_path / "bin" / "fluidsynth").write_bytes(b"\x7fELF junk")
    with pytest.raises(UserError, match=r"`audio`: .*bin/fluidsynth cannot be run \("):
        write_audio(NOTES, "a.wav")


def test_the_program_is_found_where_brew_puts_it(fluidsynth, tmp_path, monkeypatch):
    """A program that Finder starts has no such folder on its PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(audio, "BREW_PATH", f"{tmp_path / 'none'}:{tmp_path / 'bin'}")
    assert audio.find_fluidsynth() == str(tmp_path / "bin" / "fluidsynth")


def test_without_the_program_the_error_says_what_to_install(fluidsynth, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(audio, "BREW_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"`brew install fluid-synth` on macOS or `apt install fluidsynth fluid-sound"):
        write_audio(NOTES, "a.wav")


@pytest.mark.parametrize(
    ("notes", "path", "message"),
    [
        (Notes.empty(), "a.wav", "`audio` a.wav: no notes to render"),
        (NOTES.shifted(25_000), "a.wav", "`audio` a.wav: 25002 s long, expected at most 24000 s"),
        (NOTES, "a.mp3", "`audio` a.mp3: expected a name that ends in .wav or .flac or .ogg"),
        (NOTES, "nowhere/a.wav", r"`audio` nowhere/a.wav: cannot be written \(No such file or directory\)"),
    ],
)
def test_invalid_notes_and_paths_are_refused(fluidsynth, notes, path, message):
    with pytest.raises(UserError, match=message):
        write_audio(notes, path)


def test_order_in_which_soundfonts_are_found(tmp_path, monkeypatch):
    """The one given, that of the environment, or the default or largest in the first folder that has any."""
    folders = [tmp_path / name for name in ("none", "empty", "first", "second")]
    for folder in folders[1:]:
        folder.mkdir()
    monkeypatch.setattr(audio, "FOLDERS", [str(folder) for folder in folders])
    with pytest.raises(UserError, match=r"`audio`: no SoundFont found, expected `soundfont`, a path in \$SOUNDFONT"):
        find_soundfont(None, {})
    for name, more in (("first/Small.SF2", 0), ("first/large.sf3", 9), ("first/notes.txt", 99), ("second/a.sf2", 999)):
        (tmp_path / name).write_bytes(SOUNDFONT + bytes(more))
    assert find_soundfont(None, {}) == tmp_path / "first/large.sf3"
    (tmp_path / "first/default-GM.sf2").write_bytes(SOUNDFONT)
    assert find_soundfont(None, {}) == tmp_path / "first/default-GM.sf2"
    of_environment = {"SOUNDFONT": str(tmp_path / "second/a.sf2")}
    assert find_soundfont(None, of_environment) == tmp_path / "second/a.sf2"
    assert find_soundfont(tmp_path / "first/Small.SF2", of_environment) == tmp_path / "first/Small.SF2"


def test_a_file_that_is_not_a_soundfont_is_refused(tmp_path):
    (tmp_path / "a.sf2").write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(UserError, match=r"`soundfont` .*a\.sf2: not a SoundFont, expected an \.sf2 or \.sf3 file"):
        find_soundfont(tmp_path / "a.sf2", {})
    with pytest.raises(UserError, match=r"\$SOUNDFONT .*b\.sf2: cannot be read \(No such file"):
        find_soundfont(None, {"SOUNDFONT": str(tmp_path / "b.sf2")})


def test_files_that_are_no_soundfonts_do_not_count(tmp_path, monkeypatch):
    """Web pages under such a name, and what macOS writes beside files; alone, the page is named."""
    monkeypatch.setattr(audio, "FOLDERS", [str(tmp_path / "a"), str(tmp_path / "b")])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a/._Grand.sf2").write_bytes(SOUNDFONT)
    with pytest.raises(UserError, match="no SoundFont found"):
        find_soundfont(None, {})
    (tmp_path / "a/default.sf2").write_text("<html>404 Not Found</html>")
    with pytest.raises(UserError, match=r"SoundFont .*a/default\.sf2: not a SoundFont"):
        find_soundfont(None, {})
    (tmp_path / "b/real.sf2").write_bytes(SOUNDFONT)
    assert find_soundfont(None, {}) == tmp_path / "b/real.sf2"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_real_fluidsynth(tmp_path, monkeypatch, suffix):
    """Two notes are heard at their times, with silence between them."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if shutil.which("fluidsynth") is None:
        pytest.skip("no fluidsynth")
    try:
        find_soundfont(None)
    except UserError as error:
        pytest.skip(str(error))
    path = tmp_path / f"a{suffix}"
    (tmp_path / "broken").write_bytes(SOUNDFONT)
    with pytest.raises(UserError, match="fluidsynth failed"):
        write_audio(NOTES, path, tmp_path / "broken")
    (tmp_path / "broken").unlink()
    write_audio(Notes([0.0, 3.0], [0.3, 3.5], [84, 84], [90, 90]), path)
    assert path.stat().st_size > 5000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".wav":
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels()) == (44100, 2)
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).astype(float)
        loudness = [np.abs(sound[int(t * 44100) :][:4410]).mean() for t in (0.05, 2.8, 3.05)]
        assert loudness[0] > 20 * loudness[1]
        assert loudness[2] > 20 * loudness[1]
        assert np.abs(sound).max() / 32768 == pytest.approx(audio.PEAK, abs=0.03)
