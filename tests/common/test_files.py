"""Files are read only if they are regular, and JSON and TOML only within fixed limits."""

import errno
import json
import os
import socket

import pytest

from dsmr_mlx import UserError
from dsmr_mlx.common.files import (
    MAX_HIDDEN,
    atomic_file,
    hidden_path,
    open_regular,
    read_json,
    read_regular,
    read_toml,
    sha256,
    write_atomically,
)
from dsmr_mlx.common.parsing import MAX_DIGITS, MAX_NESTING, parse_json, parse_toml

# Of a socket the system says itself that it cannot be opened: Linux the third, macOS the fourth.
REFUSED = r"not a regular file|Is a directory|No such device|Operation not supported"


@pytest.fixture(params=["pipe", "device", "socket", "folder"])
def irregular(request, tmp_path, monkeypatch):
    """The path of something that is not a regular file."""
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        return "/dev/zero"
    elif request.param == "folder":
        path.mkdir()
    else:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    return path


def test_only_regular_files_are_opened(irregular):
    for read in (open_regular, read_regular):
        with pytest.raises(OSError, match=REFUSED) as refused:
            read(irregular)
        assert refused.value.filename == str(irregular)
    with pytest.raises(UserError, match=f"{irregular}: cannot be read .*, expected a table"):
        read_json(irregular, "a table")


def test_links_to_regular_files_are_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b") == b"abc"
    assert sha256(tmp_path / "b") == sha256(tmp_path / "a")
    with pytest.raises(OSError, match="3 bytes, expected at most 2"):
        read_regular(tmp_path / "b", 2)


def test_errors_of_other_files_keep_their_names(tmp_path):
    """An error of the file that is written, such as a full disk, names its final path."""
    for name, expected in (("other", "other"), (None, "a")):
        error = OSError(errno.ENOSPC, "No space left", *([] if name is None else [str(tmp_path / name)]))
        with pytest.raises(OSError, match="No space left") as raised, atomic_file(tmp_path / "a"):
            raise error
        assert raised.value.filename == str(tmp_path / expected)
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(tmp_path / "none" / "a", b"")
    assert raised.value.filename == str(tmp_path / "none" / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "€" * 85])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    path = tmp_path / name
    write_atomically(path, b"abc")
    assert [found.name for found in tmp_path.iterdir()] == [name]
    hidden = hidden_path(path, "new").name
    assert MAX_HIDDEN - 3 < len(os.fsencode(hidden)) <= MAX_HIDDEN
    assert hidden.startswith(f".{name[:70]}")


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 500, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_invalid(depth, opening, closing):
    for text in (opening * depth + "0" + closing * depth, opening * depth):
        with pytest.raises(ValueError, match=r"nested more than 64 deep|Expecting"):
            parse_json(text)


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 100_000])
def test_deep_toml_is_invalid(depth):
    for text in ("a = " + "[" * depth + "]" * depth, "a." * depth + "b = 1"):
        with pytest.raises(ValueError, match=r"nested more than 64 deep|parts"):
            parse_toml(text)


def test_what_is_allowed_is_parsed():
    deep = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert json.dumps(parse_json(deep)) == deep
    assert parse_json("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    assert parse_json(b'{"a": -1.5e3}') == {"a": -1500}


@pytest.mark.parametrize("digits", [MAX_DIGITS + 1, 400, 5000])
def test_long_integers_are_invalid(digits, tmp_path):
    for parse, text in (
        (parse_json, "9" * digits),
        (parse_json, f"[-{'9' * digits}]"),
        (parse_toml, f"a = {'9' * digits}"),
    ):
        with pytest.raises(ValueError, match="integer"):
            parse(text)
    (tmp_path / "a.toml").write_text(f"a = {'9' * digits}")
    with pytest.raises(UserError, match=r"a\.toml: not valid TOML"):
        read_toml(tmp_path / "a.toml", "settings")


def test_bytes_that_are_not_utf8_are_invalid(tmp_path):
    for data in (b'"\xff"', b'"\xed\xa0\x80"', b"\xff\xfe[\0]\0"):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
            read_json(tmp_path / "a.json", "a table")
