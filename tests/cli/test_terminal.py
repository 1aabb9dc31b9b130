"""Nothing from a file speaks to the terminal, and no terminal is too poor for a message."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmr_mlx import Notes, write_notes
from dsmr_mlx.cli import fail, main
from dsmr_mlx.cli.console import Screen, table
from dsmr_mlx.cli.terminal import encode_leniently
from dsmr_mlx.common.formatting import one_line
from dsmr_mlx.common.html import text

HOSTILE = "a\x1b[31m\x1b]0;pwned\x07b\r\n\x9b2Jc\x7f\u202egnp\u2028\udcff\ud800.mid"
SPEAKING = ("\x1b", "\x07", "\x9b", "\r", "\x7f", "\u202e", "\u2028")


def midi(path, marker=None):
    notes = Notes(np.arange(4.0), np.arange(4.0) + 0.5, np.array([60, 64, 67, 72]), np.full(4, 64))
    write_notes(notes, path, **({} if marker is None else {"text": marker}))
    return path


@given(st.text(st.characters(), max_size=40))
def test_one_line_says_nothing_to_the_terminal(given_text):
    shown = one_line(given_text)
    assert len(shown.splitlines()) <= 1
    shown.encode()  # no lone surrogates
    assert all(c.isprintable() or c in given_text for c in shown)
    assert one_line(shown) == shown
    if given_text.isprintable():
        assert shown == given_text


def test_consoles_neutralize_texts_and_cells():
    file = io.StringIO()
    screen = Screen(file=file, width=1000, highlight=False, soft_wrap=True, markup=False, emoji=False)
    rows = table("name", "n")
    rows.add_row(HOSTILE, "1")
    screen.print(HOSTILE)
    screen.print(rows)
    printed = file.getvalue()
    assert not any(character in printed for character in SPEAKING)
    assert printed.count("\n") == 3
    assert printed.count("pwned") == 2


def test_errors_are_one_line(capsys):
    assert fail(f"{HOSTILE}: invalid", 2) == 2
    message = capsys.readouterr().err
    assert not any(character in message for character in SPEAKING)
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["tokenize", HOSTILE.replace("\ud800", "")], ["prepare", "x", "--out", "y", "--tokenizer", HOSTILE], [HOSTILE]],
)
def test_commands_quote_hostile_words(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    message = capsys.readouterr().err
    assert code == 2
    assert not any(character in message for character in SPEAKING)
    assert message.strip().count("\n") == 0


def test_names_and_markers_of_files(capsys, tmp_path):
    folder = tmp_path / "midi"
    folder.mkdir()
    for i in range(2):
        midi(folder / f"{i}.mid")
    (folder / "a\x1b]0;pwned\x07\n.mid").write_bytes(b"nothing")
    if sys.platform != "darwin":  # which has UTF-8 names only
        (folder / os.fsdecode(b"b\xff.mid")).write_bytes(b"nothing")
    assert main(["prepare", str(folder), "--out", str(tmp_path / "c")]) == 0
    assert main(["prepare", str(folder), "--out", str(tmp_path / "c")]) == 0  # names are read back from the index
    for marker in ('{"k": "\\ud800"}', json.dumps({HOSTILE: HOSTILE}), '{"a": ' + "9" * 5000 + "}", "[" * 10_000):
        path = midi(tmp_path / "x.mid", marker)
        page = tmp_path / "x.html"
        assert main(["show", str(path), "--html", str(page), "--force"]) == 0
        assert main(["show", str(path)]) == 0
        page.read_bytes().decode()
    captured = capsys.readouterr()
    assert not any(character in captured.out + captured.err for character in SPEAKING)


@given(st.text(st.characters(), max_size=20))
def test_html_has_no_lone_surrogates(given_text):
    text(given_text).encode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_has_a_piano_roll(encoding, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    encode_leniently(stream, None)
    stream.write("█▀▄ – · 10⁻³ × 3\u202fk \ud800 ü\n")
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert "\\ud800" in shown
    assert len(shown.splitlines()) == 1
    if encoding == "ascii":
        assert shown == '#"_ - . 10-3 x 3 k \\ud800 \\xfc\n'
    program = f"from dsmr_mlx.cli import main; raise SystemExit(main(['show', {str(midi(tmp_path / 'x.mid'))!r}]))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert len(run.stdout.decode(encoding).splitlines()) > 3


def test_a_link_to_itself_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.pt").symlink_to("l.pt")
    (tmp_path / "c").symlink_to("c")
    for words in (["convert", "l.pt", "out"], ["show", "l.pt"], ["prepare", "c", "--out", "d"], ["generate", "c"]):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "l.pt" in message or "c" in message


@pytest.mark.parametrize(
    ("error", "words", "shown"),
    [
        ("[metal::malloc] Attempting to allocate 9 bytes", ["models"], "not enough memory ([metal::malloc] Attempting"),
        ("[METAL] Command buffer execution failed: GPU hang", ["models"], "the GPU failed ([METAL] Command buffer"),
        ("[METAL] hang", ["train", "--data", "d", "--out", "o"], "([METAL] hang): --resume continues from the last"),
    ],
)
def test_errors_of_a_gpu_are_one_line(error, words, shown, monkeypatch, capsys):
    def fail(arguments):
        raise RuntimeError(error)

    monkeypatch.setattr(f"dsmr_mlx.cli.{words[0]}.run", fail)
    assert main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"dsmr-mlx: error: {shown}" if words == ["models"] else "dsmr-mlx: error: the GPU failed")
    assert shown in message
    assert message.count("\n") == 1
