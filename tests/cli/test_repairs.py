"""What was repaired in MIDI files is never silent: `prepare` lists it, the other commands warn."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.midi_files import midi, note, note_on, track, tune, write_midi_files

import dsmr_mlx
from dsmr_mlx.music.repairs import RepairWarning

OPEN = midi(track(note(0, 100, 60), (500, note_on(64)), (900, b"\xb0\x07\x90")))
WARNING = "warning: a.mid: read with repairs (data bytes above 127: 1; notes without an end: 1)\n"


def different(i: int) -> bytes:
    return midi(track(note(0, 100, 40 + i), (500, note_on(64))))


def test_prepare_lists_few_files_and_sums_up_many(run):
    write_midi_files(Path("midi"), {"a.mid": OPEN, "b.mid": tune()})
    shown = run("prepare", "midi", "--out", "corpus")
    assert "repaired a.mid: data bytes above 127: 1; notes without an end: 1\n" in shown.err
    assert "; 1 file repaired, 0 files skipped; " in shown.out
    pieces = {
        piece["source"]: piece["repairs"] for piece in json.loads(Path("corpus/corpus.json").read_text())["pieces"]
    }
    assert pieces == {"a.mid": "data bytes above 127: 1; notes without an end: 1", "b.mid": ""}
    write_midi_files(Path("midi"), {f"{i}.mid": different(i) for i in range(7)})
    shown = run("prepare", "midi", "--out", "corpus", "--force", "--subwords", "bpe:400")
    assert "repaired 8 files (all in corpus/corpus.json):\n" in shown.err
    assert "  notes without an end: 8 in 8 files\n" in shown.err
    assert "  data bytes above 127: 1 in 1 file\n" in shown.err


@pytest.mark.parametrize(
    "command",
    ["show a.mid", "tokenize a.mid", "generate {run} --prompt a.mid --tokens 1 --out b.mid",
     "live {run} --in-file a.mid --offline --out-file c.mid --max-turn 1"],
)  # fmt: skip
def test_commands_warn_once(run, trained, command):
    Path("a.mid").write_bytes(OPEN)
    shown = run(*command.format(run=trained.run).split())
    assert shown.code == 0
    assert shown.err.count(WARNING) == 1
    assert "RepairWarning" not in shown.err


def test_assess_names_the_file(run):
    write_midi_files(Path("midi"), {"a.mid": OPEN, "b.mid": tune()})
    assert "warning: midi/a.mid: read with repairs (" in run("assess", "midi").err


def test_names_cannot_speak_to_the_terminal(run):
    Path("\x1b[31ma.mid").write_bytes(OPEN)
    assert "\x1b" not in run("show", "\x1b[31ma.mid").err


def test_the_library_warns(tmp_path):
    (tmp_path / "a.mid").write_bytes(OPEN)
    with pytest.warns(RepairWarning, match=r"a\.mid: read with repairs \(data bytes above 127: 1; notes"):
        dsmr_mlx.read_notes(tmp_path / "a.mid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsmr_mlx.read_notes(tune())
    code = f"import dsmr_mlx; dsmr_mlx.read_notes({str(tmp_path / 'a.mid')!r})"
    assert b"RepairWarning" in subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr
