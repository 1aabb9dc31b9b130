"""`dsmr-mlx show`: in the terminal, as pictures, and what it refuses."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from support.midi_files import META_END, midi, note, track, write_midi_files
from support.music import random_piece

from dsmr_mlx.cli import main
from dsmr_mlx.common.formatting import printable
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.music.piano_roll import roll_picture
from dsmr_mlx.music.summary import excerpt, summarize
from dsmr_mlx.music.text_roll import roll_text


@pytest.fixture
def show(capsys, monkeypatch, tmp_path):
    """Run `dsmr-mlx show` in a folder with some MIDI files. Return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "70")
    write_notes(random_piece(1, 300, 40.0), "a.mid", text='{"program": "dsmr-mlx 9", "seed": 3}')
    empty, drums = midi(b"MTrk\0\0\0\4\0" + META_END), midi(track(note(0, 500, 40, channel=9)))
    write_midi_files(tmp_path, {"empty.mid": empty, "drums.mid": drums, "one.mid": midi(track(note(0, 500, 60)))})
    (tmp_path / "bad.mid").write_bytes(b"no MIDI")

    def show(*arguments: object) -> Namespace:
        capsys.readouterr()
        try:
            code = main(["show", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        found = capsys.readouterr()
        return Namespace(code=code, out=found.out, err=found.err)

    return show


def test_show_in_the_terminal(show):
    whole = show("a.mid")
    assert whole.code == 0
    notes = read_notes("a.mid")
    lines = whole.out.splitlines()
    assert lines[0] == f"a.mid: {summarize(notes)}"
    assert lines[1] == "program: dsmr-mlx 9, seed: 3"
    assert whole.out.rstrip("\n").endswith(roll_text(notes, width=70))
    assert all(len(line) <= 70 for line in lines[2:])
    part = show("a.mid", "--start", 10, "--seconds", 5, "--systems", 1)
    assert part.out.splitlines()[0] == f"a.mid: {summarize(excerpt(notes, 10, 5))}"
    assert "0:10" in part.out.splitlines()[-1]


@pytest.mark.parametrize("name", ["empty.mid", "drums.mid"])
def test_show_a_file_without_notes(show, name):
    assert show(name).out == f"{name}: no notes\n"
    assert show(name, "--svg", "a.svg", "--html", "a.html").code == 0


def test_show_one_note(show):
    assert "1 note in 0.5 s" in show("one.mid").out


@pytest.mark.slow
def test_show_writes_the_given_files(show):
    result = show("a.mid", "--svg", "a.svg", "--html", "a.HTM", "--start", 5, "--systems", 3)
    assert result.code == 0
    assert re.fullmatch(r"a\.mid: .*\nprogram: .*\na\.svg: .* KiB\na\.HTM: .* KiB\n", result.out)
    notes = excerpt(read_notes("a.mid"), 5)
    assert Path("a.svg").read_bytes() == roll_picture(notes, "svg", title="a.mid", start=5, systems=3)
    before = Path("a.svg").read_bytes()
    refused = show("a.mid", "--html", "new.html", "--svg", "a.svg")
    assert (refused.code, refused.err) == (2, "dsmr-mlx: error: --svg a.svg: already exists, --force overwrites it\n")
    assert not Path("new.html").exists()
    assert show("a.mid", "--svg", "a.svg", "--force").code == 0
    assert Path("a.svg").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.mid", "missing.mid: cannot be read (No such file or directory)"),
        ("bad.mid", "bad.mid: not a readable MIDI file"),
        (". ", ".: cannot be read (Is a directory)"),
        ("a.mid --start 99", "--start 99: the music lasts"),
        ("a.mid --systems 0", "--systems 0: expected at least 1"),
        ("a.mid --systems 2 --html b.html", "--systems 2: expected --png or --svg with it"),
        ("a.mid --svg a.mid --force", "--svg a.mid: expected a name that ends in .svg"),
        ("a.mid --html a.png", "--html a.png: expected a name that ends in .html or .htm"),
        ("a.mid --svg no/a.svg", "--svg no/a.svg: no such folder no"),
        ("a.mid --audio a.mp3", "--audio a.mp3: expected a name that ends in .wav or .flac or .ogg"),
        ("a.mid --soundfont a.sf2", "--soundfont a.sf2: expected --audio FILE.wav with it"),
    ],
)
def test_errors_of_show(show, arguments, message):
    files = sorted(Path().iterdir())
    result = show(*arguments.split())
    assert result.code == 2
    assert result.err.startswith(f"dsmr-mlx: error: {message}")
    assert result.err.count("\n") == 1
    assert sorted(Path().iterdir()) == files


def test_control_characters_in_a_name_are_replaced(show):
    undecodable = "" if sys.platform == "darwin" else "\udcff"  # macOS has UTF-8 names only
    name = f"\x1b]0;owned\x07\u202e{undecodable}.mid"
    write_notes(random_piece(2, 5, 2.0), name, text="\x1b[2J" + "x" * 5000)
    result = show(name)
    assert result.code == 0
    assert result.out.startswith(printable(name))
    assert all(c.isprintable() or c == "\n" for c in result.out)
    assert len(result.out.splitlines()[1]) < 900


@pytest.mark.slow
def test_show_needs_matplotlib_for_pictures_only(show):
    """Text and pages need only NumPy, symusic and rich; a picture says what to install, before anything is written."""
    code = (
        "import sys\nfor name in ('mlx', 'matplotlib', 'matplotlib.figure'): sys.modules[name] = None\n"
        "from dsmr_mlx.cli import main\nsys.exit(main(sys.argv[1:]))"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, "show", "a.mid", *arguments]
        return subprocess.run(command, env=os.environ, check=False, capture_output=True, text=True)

    assert run("--html", "a.html").returncode == 0
    assert run().returncode == 0
    refused = run("--html", "b.html", "--svg", "b.svg")
    assert refused.returncode == 2
    expected = "--svg: matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`"
    assert expected in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not Path("b.html").exists()
