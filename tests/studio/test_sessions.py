"""Sessions by way of the server: new ones, their names, downloads and uploads."""

import time
from contextlib import suppress

import pytest
from support.studio_server import TOKEN, midi

from dsmr_mlx.studio import server as module
from dsmr_mlx.studio.folder import chosen_path


def test_sessions_are_opened_and_made(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.do("save_as", name="Copy")
        client.do("new", name="Second")
        assert client.session["name"] == "First"
        (new,) = (m for m in client.log[1:] if m["type"] == "session")
        assert (new["name"], new["takes"]) == ("Second", [])
        assert "there is a session of this name" in client.ask("new", name="First")["message"]
        client.do("open", name="Copy")
        assert len(client.takes) == 1
        client.send("sessions")
        found = {s["name"]: s["takes"] for s in client.next("sessions")["sessions"]}
        assert found == {"First": 1, "Second": 0, "Copy": 1}
        (running.home / "Broken.studio").write_text("no")
        assert "not a session" in client.ask("open", name="Broken")["message"]
        client.do("select", take=1)  # the other one is still open
        client.do("open", name="Copy")


@pytest.mark.parametrize("name", ["漢" * 100, "é" * 101, "漢" * 67])
def test_names_that_no_file_can_have_are_refused(running, name):
    with running.client() as client:
        assert client.ask("new", name=name)["type"] == "error"
        assert client.ask("save_as", name=name)["type"] == "error"
    assert running.http.post("/session", params={"token": TOKEN, "name": name}, content=b"x").status_code == 409


def test_long_names_are_possible(running):
    with running.client() as client:
        client.do("new", name="漢" * 66)
        client.do("save_as", name="é" * 100)
        client.do("open", name="é" * 100)


def test_sessions_are_found_by_what_their_files_are_called(running):
    """Accents may be letters of their own; unreadable names are not listed."""
    running.studio.session.flush()
    for name in ("e\u0301tude", "What?", ".hidden", "bad\udcff"):
        with suppress(OSError):  # macOS has no names that are not UTF-8
            (running.home / f"{name}.studio").write_bytes((running.home / "First.studio").read_bytes())
    with running.client() as client:
        for name in ("étude", "e\u0301tude"):
            client.send("sessions")
            assert {s["name"] for s in client.next("sessions")["sessions"]} == {"First", "étude"}
            client.do("open", name=name)
            assert running.studio.session.name == "étude"
            assert "there is a session" in client.ask("new", name=name)["message"]
            client.do("open", name="First")
    assert chosen_path("étude", running.home).name == "e\u0301tude.studio"
    assert running.get("/session").status_code == 200


def test_a_session_is_downloaded_and_put_back(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.do("continue", take=1, at=2.0, seconds=0.5)
        data = running.get("/session").content
        assert len(data) < 1 << 20  # without states
        put = lambda name, content: running.http.post(  # noqa: E731
            "/session", params={"token": TOKEN, "name": name}, content=content
        )
        assert put("Back", data).json() == {"name": "Back"}
        client.do("open", name="Back")
        assert len(client.takes) == 2
        for name, content, reason in (
            ("Back", data, "there is a session of this name"),
            ("../x", data, "a name without"),
            ("", data, "1 to 100"),
            ("Bad", b"nothing", "not a session"),
            ("Bad", data[: len(data) // 2], "Bad"),
        ):
            answer = put(name, content)
            assert (answer.status_code, reason in answer.text) == (409, True), answer.text
        assert {p.name for p in running.home.iterdir() if p.suffix == ".studio"} == {"First.studio", "Back.studio"}
        assert not [p for p in running.home.iterdir() if "partial" in p.name or p.name.startswith(".dsmr-mlx-")]
        foreign = {"origin": "http://evil.example"}
        answer = running.http.post("/session", params={"token": TOKEN, "name": "x"}, content=data, headers=foreign)
        assert answer.status_code == 403


def test_an_upload_replaces_no_session_that_was_made_meanwhile(running, monkeypatch):
    data = running.get("/session").content
    load = module.Store.load

    def slow(store):
        with running.client() as client:
            client.do("new", name="New")
            client.do("import", name="a.mid", data=midi())
            client.do("open", name="First")
        return load(store)

    with monkeypatch.context() as patch:
        patch.setattr(module.Store, "load", lambda store: (patch.undo(), slow(store))[1])
        answer = running.http.post("/session", params={"token": TOKEN, "name": "New"}, content=data)
    assert answer.status_code == 409
    assert answer.text == "name New: there is a session of this name, expected another one\n"
    with running.client() as client:
        client.do("open", name="New")
        assert len(client.takes) == 1


def test_an_open_file_is_soon_complete(running, monkeypatch):
    monkeypatch.setattr(module, "STATUS_SECONDS", 0.01)
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        log, end = running.home / "First.studio-wal", time.monotonic() + 10
        while log.stat().st_size and time.monotonic() < end:
            time.sleep(0.01)
        assert log.stat().st_size == 0


def test_too_large_uploads_are_refused(running, monkeypatch):
    monkeypatch.setattr(module, "MAX_SESSION_BYTES", 1000)
    answer = running.http.post("/session", params={"token": TOKEN, "name": "x"}, content=bytes(2000))
    assert answer.status_code == 409
