"""The input benchmark compares the same music, on small inputs."""

import json
import sys
from pathlib import Path

import pytest
from support.music import random_notes
from support.tiny import TOKENIZER, write_corpus
from support.workers import InProcess

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import write_notes

ROOT = Path(__file__).parents[2]
TINY = (
    *("d_model=16", "n_layers=2", "n_heads=2", "n_kv_heads=1", "head_dim=8", "d_ff=24"),
    *("segment_length=8", "batch_size=2"),
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import input_pipeline  # noqa: E402
import input_preparing  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three pieces and a file that is none."""
    folder = tmp_path_factory.mktemp("midi")
    for i in range(3):
        write_notes(random_notes(i, 20 + i), folder / f"{i}.mid")
    (folder / "broken.mid").write_bytes(b"MThd")
    return folder


def test_sides_read_the_same_files_and_count_skipped_ones(folder):
    """`prepare` makes what the tokenizer makes of each file; MidiTok's tokens are about as many."""
    files = input_preparing.chosen_files(folder, 10)
    outcomes = {name: build(files)() for name, (_, build) in input_preparing.SIDES.items()}
    assert {outcome["left_out"] for outcome in outcomes.values()} == {1}
    expected = sum(len(TOKENIZER.encode(path)) for path in files if path.stem != "broken")
    assert outcomes["prepare"]["tokens"] == expected
    assert 0.5 < outcomes["miditok"]["tokens"] / expected < 1.5
    assert outcomes["read"]["tokens"] is outcomes["symusic"]["tokens"] is None


def test_the_sample_is_evenly_spaced(folder):
    assert [path.name for path in input_preparing.chosen_files(folder, 2)] == ["0.mid", "2.mid"]


def test_a_folder_without_midi_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"--midi .*: no MIDI file"):
        input_preparing.chosen_files(tmp_path, 2)


@pytest.mark.slow
def test_both_parts_in_one_command(tmp_path, folder, monkeypatch, capsys):
    """Tables, JSON and a picture; every stream and side has its figures."""
    corpus = write_corpus(tmp_path / "corpus").path
    files = ("--json", tmp_path / "input.json", "--plot", tmp_path / "input.png")
    settings = [f"--set={setting}" for setting in (*TINY, "horizons=uniform:8")]
    numbers = ("--rounds=2", "--batches=20", "--steps=2", "--warmup=1")
    options = ("--midi", folder, "--data", corpus, "--preset", "tiny", *settings, *numbers, *files)
    monkeypatch.setattr(input_preparing, "Worker", InProcess)
    monkeypatch.setattr(sys, "argv", ["input_pipeline.py", *map(str, options)])
    input_pipeline.main()
    assert "target at most 5%" in capsys.readouterr().out
    found = json.loads((tmp_path / "input.json").read_text())
    assert [row["stream"] for row in found["streaming"]["streams"]] == ["plain", "augmented"]
    sides = found["preparing"]["sides"]
    assert all(side["files_per_second"]["median"] > 0 for side in sides.values())
    assert sides["prepare"]["against"] == "miditok"
    assert (tmp_path / "input.png").stat().st_size > 5000
