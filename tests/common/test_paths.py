"""Something else than what is expected is named, and how to come by what is."""

import pytest

from dsmr_mlx.common import paths as mistaken

NAMES = ("asap-small",)
FOLDERS = {
    "a corpus": "corpus.json",
    "a checkpoint": "model.safetensors",
    "a run": "metrics.jsonl",
    "a folder of something else": "song.mid",
}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("song.MID", "; a MIDI file to go on from is given with --prompt"),
        ("model.pt", "; dsmr-mlx convert {path} FOLDER makes a checkpoint of it"),
        ("model.safetensors", "; dsmr-mlx convert {path} FOLDER makes a checkpoint of it"),
        ("notes.txt", ""),
    ],
)
def test_a_file_for_a_checkpoint(tmp_path, name, hint):
    path = tmp_path / name
    path.touch()
    assert mistaken.kind(path) == "is a file"
    assert mistaken.no_checkpoint(path, NAMES) == hint.format(path=path)


def test_the_weights_for_their_folder(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert mistaken.no_checkpoint(tmp_path / "model.safetensors", NAMES) == f"; that is its folder, {tmp_path}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind(tmp_path, kind):
    (tmp_path / FOLDERS[kind]).touch()
    assert mistaken.kind(tmp_path) == kind
    assert mistaken.no_corpus(tmp_path).startswith(f"{kind}, expected a corpus")
    assert (f"dsmr-mlx prepare {tmp_path} --out" in mistaken.no_corpus(tmp_path)) == (kind == [*FOLDERS][-1])
    known = {"a corpus": f"{tmp_path} --out RUN makes one", "a run": "a run without a checkpoint yet, expected one"}
    assert known.get(kind, "") in (mistaken.no_checkpoint_in(tmp_path) or "")
    assert (mistaken.no_checkpoint_in(tmp_path) is None) == (kind not in known)


def test_nothing_at_all(tmp_path):
    path = tmp_path / "none"
    assert mistaken.kind(path) == "no such folder"
    assert mistaken.no_checkpoint(path, NAMES) == ""
