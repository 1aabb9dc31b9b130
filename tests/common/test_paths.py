"""A path that is not the expected checkpoint or corpus is described, with a way to make one."""

import pytest

from dsmr_mlx.common.paths import checkpoint_hint, describe_path, explain_no_checkpoint, explain_no_corpus

NAMES = ("maestro-small",)
FOLDERS = {
    "a corpus": "corpus.json",
    "a checkpoint": "model.safetensors",
    "a run": "metrics.jsonl",
    "a folder of another kind": "song.mid",
}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("song.MID", "; dsmr-mlx generate --prompt {path} continues a MIDI file"),
        ("model.pt", "; dsmr-mlx convert {path} FOLDER makes a checkpoint from it"),
        ("model.safetensors", "; dsmr-mlx convert {path} FOLDER makes a checkpoint from it"),
        ("notes.txt", ""),
    ],
)
def test_hint_for_a_file(tmp_path, name, hint):
    path = tmp_path / name
    path.touch()
    assert describe_path(path) == "is a file"
    assert checkpoint_hint(path, NAMES) == hint.format(path=path)


def test_hint_for_the_weights_file_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_hint(tmp_path / "model.safetensors", NAMES) == f"; the checkpoint is its folder, {tmp_path}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_kinds(tmp_path, kind):
    (tmp_path / FOLDERS[kind]).touch()
    assert describe_path(tmp_path) == kind
    assert explain_no_corpus(tmp_path).startswith(f"{kind}, expected a corpus")
    assert (f"dsmr-mlx prepare {tmp_path} --out" in explain_no_corpus(tmp_path)) == (kind == [*FOLDERS][-1])
    known = {
        "a corpus": f"{tmp_path} --out RUN makes one",
        "a run": "a run, but no checkpoint yet; the first",
    }
    assert known.get(kind, "") in (explain_no_checkpoint(tmp_path) or "")
    assert (explain_no_checkpoint(tmp_path) is None) == (kind not in known)


def test_hint_for_a_folder_of_weights(tmp_path):
    (tmp_path / "config.json").touch()
    assert checkpoint_hint(tmp_path, NAMES) == ""
    (tmp_path / "pytorch_model.bin").touch()
    assert (
        checkpoint_hint(tmp_path, NAMES) == f"; dsmr-mlx convert {tmp_path} FOLDER makes a checkpoint from its weights"
    )


def test_missing_path(tmp_path):
    path = tmp_path / "none"
    assert describe_path(path) == "no such folder"
    assert checkpoint_hint(path, NAMES) == ""
