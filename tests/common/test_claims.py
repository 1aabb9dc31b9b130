"""Names of output files are claimed at the start: nothing that others have written is lost."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsmr_mlx import UserError
from dsmr_mlx.cli.outputs import free_name, output_paths
from dsmr_mlx.common.claims import claiming
from dsmr_mlx.common.files import check_output, write_atomically, write_output
from dsmr_mlx.common.folders import temporary_folder, write_folder


def test_a_claimed_name_is_taken(tmp_path):
    path = tmp_path / "a.png"
    with claiming():
        assert check_output("--png", path, (".png",), force=False) == path
        check_output("--png", path, (".png",), force=False)  # the same command may check it again
        with claiming(), pytest.raises(UserError, match=r"--png .*a\.png: already exists, `force` overwrites it"):
            check_output("--png", path, (".png",), force=False)
        write_output("--png", path, b"mine")
        write_output("--png", path, b"mine too")
    assert path.read_bytes() == b"mine too"


def test_unwritten_claims_are_given_up(tmp_path):
    with claiming():
        check_output("--png", tmp_path / "a.png", (".png",), force=False)
        output_paths(tmp_path / "deep" / "folder", 3, force=False)
        assert len(list(tmp_path.rglob("*.mid"))) == 3
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.png"
    with claiming():
        check_output("--png", path, (".png",), force=False)
        (tmp_path / "other").write_bytes(b"of others")
        os.replace(tmp_path / "other", path)
        with pytest.raises(UserError, match=r"a\.png: cannot be written \(another program wrote it in the meantime\)"):
            write_output("--png", path, b"mine")
    assert path.read_bytes() == b"of others"


def test_links_to_nowhere_are_taken(tmp_path):
    path = tmp_path / "a.mid"
    path.symlink_to("nowhere.mid")
    with claiming():
        for check in (lambda: check_output("--out", path, (".mid",), False), lambda: output_paths(path, 1, False)):
            with pytest.raises(UserError, match="already exists"):
                check()
    assert path.is_symlink()


@pytest.mark.parametrize("n", [1, 3])
def test_free_names_differ_between_commands_that_start_together(tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    together = threading.Barrier(8)

    def start(_):
        with claiming():  # each thread has its own claims, as each process has
            together.wait()
            name = free_name("piece", n, None)
            together.wait()
            return name

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(start, range(8)))
    assert sorted(number for _, number in found) == list(range(1, 9))
    assert len({name for name, _ in found}) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        write_atomically(tmp_path / "a.mid", b"x" * 100)
    assert failed.value.filename == str(tmp_path / "a.mid")
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    final = tmp_path / "c"
    with temporary_folder(final), pytest.raises(UserError, match="c: another process is writing it"):
        write_folder(final, lambda folder: None)
    assert list(tmp_path.iterdir()) == []
    write_folder(final, lambda folder: (folder / "a").write_text("1"))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    left = tmp_path / ".c.dsmr-mlx.incomplete"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "tokens.npy").write_bytes(b"x")
    (left / "link").symlink_to(tmp_path)
    write_folder(tmp_path / "c", lambda folder: (folder / "a").write_text("1"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["c", "c/a"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    final = tmp_path / "c"

    def write(folder):
        final.mkdir()
        (final / "theirs").write_text("1")
        (folder / "mine").write_text("2")

    with pytest.raises(UserError, match="c: appeared in the meantime, nothing was replaced"):
        write_folder(final, write, replace=False)
    assert [path.name for path in final.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
