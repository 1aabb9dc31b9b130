"""Folders as macOS and network drives have them: files that nobody put there, locks that do not exist."""

import errno
import fcntl

import pytest

from dsmr_mlx.common import files
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.folders import folder_content, write_folder
from dsmr_mlx.training.lock import RunLock


@pytest.fixture
def touched(tmp_path):
    """A folder that a Mac has looked at."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".DS_Store", "._x"):
        (folder / name).write_bytes(b"Bud1")
    return folder


def test_what_macos_writes_is_no_content(touched):
    assert folder_content(touched) == []
    (touched / ".hidden").touch()
    assert folder_content(touched) == [touched / ".hidden"]


def test_a_folder_with_nothing_of_the_user_is_free(touched):
    write_folder(touched, lambda folder: (folder / "new").touch(), replace=False)
    assert [path.name for path in touched.iterdir()] == ["new"]
    with pytest.raises(UserError, match="appeared in the meantime"):
        write_folder(touched, lambda folder: (folder / "newer").touch(), replace=False)


def test_a_run_and_a_corpus_may_start_there(touched, trained, tmp_path):
    from dsmr_mlx.data.prepare import prepare
    from dsmr_mlx.training.run_folder import check_room

    check_room(touched, resume=False, force=False)
    assert prepare(trained.midi, touched).pieces


@pytest.mark.parametrize("name", ["out", "o" * 255])
def test_a_file_is_replaced_by_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    write_folder(tmp_path / name, lambda folder: (folder / "new").touch())
    assert [path.name for path in tmp_path.rglob("*")] == [name, "new"]


def refusing(code):
    """A `flock` that fails with an error."""

    def flock(descriptor, operation):
        raise OSError(code, "from a test")

    return flock


def test_a_drive_without_locks_is_no_other_process(tmp_path, monkeypatch):
    """SMB answers ENOTSUP."""
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOTSUP))
    with RunLock(tmp_path / "run"):
        write_folder(tmp_path / "out", lambda folder: (folder / "new").touch())
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EWOULDBLOCK))
    with pytest.raises(UserError, match="locked by process"), RunLock(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="another process is writing it"):
        write_folder(tmp_path / "out", lambda folder: None)


def test_a_commit_reaches_the_disk_of_a_mac(tmp_path, monkeypatch):
    """`fsync` stops at the drive's cache there. A network drive may not know the stronger flush."""
    calls = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda descriptor, command: calls.append(command))
    write_folder(tmp_path / "out", lambda folder: (folder / "new").touch())
    assert calls == [51]
    monkeypatch.setattr(files.fcntl, "fcntl", lambda *_: refusing(errno.ENOTTY)(*_))
    write_folder(tmp_path / "out", lambda folder: (folder / "new").touch())
