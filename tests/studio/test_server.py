"""The web application, in this process: files, exports, sessions, the socket; and hostile clients."""

import errno
import json
import random
import socket
import sqlite3
import string
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from support.studio import Client
from support.studio_server import BASE, PORT, SOCKET, TOKEN, Running, midi

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.studio import server as module
from dsmr_mlx.studio.messages import CLIENT


def test_without_the_token_nothing_is_answered(running):
    for path in ("/", "/page/index.html", "/export/1.mid", "/session", "/nothing", "/socket", "/page/../x"):
        fresh = TestClient(running.server.app, base_url=BASE)
        for options in ({}, {"params": {"token": "wrong"}}, {"params": {"token": TOKEN}, "headers": {"host": "evil"}}):
            answer = fresh.get(path, **options)
            assert answer.status_code == 403
            assert "the-token" not in answer.text
            assert "set-cookie" not in answer.headers
    assert fresh.post("/session?name=x", content=b"x").status_code == 403
    for url, headers in (
        (SOCKET, {}),
        (f"{SOCKET}?token=wrong", {}),
        (f"ws://evil.example:8642/socket?token={TOKEN}", {}),
        (f"{SOCKET}?token={TOKEN}", {"origin": "http://evil.example"}),
    ):
        with pytest.raises(WebSocketDisconnect), fresh.websocket_connect(url, headers=headers):
            pass


def test_the_page_and_its_files(running):
    answer = running.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert f"dsmr-mlx-studio-{PORT}={TOKEN}" in answer.headers["set-cookie"]
    # From now on the cookie is enough.
    assert running.http.get("/page/index.html").status_code == 200
    colours = running.http.get("/shared/colours.css")
    assert (colours.status_code, colours.headers["content-type"]) == (200, "text/css; charset=utf-8")
    for name in (
        "../takes.py",
        "..%2Ftakes.py",
        "%2e%2e/takes.py",
        "/etc/passwd",
        "nothing.js",
        "",
        ".",
        "index.html%00",
    ):
        assert running.http.get(f"/page/{name}").status_code in (404, 405), name
    assert all(answer.headers["x-content-type-options"] == "nosniff" for answer in (colours, answer))


def test_a_session_from_the_beginning_to_the_end(running):
    with running.client() as client:
        assert client.session["takes"] == []
        assert client.session["exports"][0] == "mid"
        file = client.do("import", name="dir/1. Tune No. 14.mid", data=midi())
        assert client.selection["selected"] == file
        assert client.takes[file]["name"] == "1. Tune No. 14"
        take = client.do("continue", take=file, at=2.0, seconds=1.0, count=2, seed=3)
        assert client.selection["selected"] == take
        assert client.takes[take + 1]["group"] == client.takes[take]["group"]
        assert client.do("settings", settings={"best_of": 2}) is None
        passage = client.do("replace", take=take, start=1.0, end=1.6, seed=1)
        client.do("insert", take=passage, at=1.0, seconds=0.5)
        client.do("lead", take=take, at=1.5, to=file, seconds=0.5)
        client.do("keep", take=take, kept=True)
        client.do("rename", take=take, name="Good")
        client.do("undo")
        assert client.takes[take]["name"] != "Good"
        client.do("redo")
        client.do("select", take=file)
        for number in client.takes:
            with running.studio.session.lock:
                rows = running.studio.session.tree.music(number).rows
            assert client.music(number) == sorted(map(list, rows)), number
    with running.client() as again:  # another client sees the same
        assert again.takes == client.takes
        assert again.selection == client.selection
        answer = running.get(f"/export/{take}.mid")
        assert len(read_notes(answer.content)) == len(again.music(take))
        assert "Good" in answer.headers["content-disposition"]


def test_all_clients_see_the_same(running):
    with running.client() as one, running.client() as two:
        one.do("import", name="a.mid", data=midi())
        take = one.do("continue", take=1, at=1.0, seconds=1.0)
        two.do("keep", take=take, kept=False)
        one.ask("ping")
        two.ask("ping")
        assert one.takes == two.takes
        assert one.takes[take]["kept"] is False


def test_a_client_misses_nothing_while_it_connects(running, monkeypatch):
    """A note comes after the session was read for the client, before it is one of the clients."""
    session, encode = running.studio.session, module.encode
    (take,) = session.add("continue", growing=True, rows=[(0.0, 1.0, 60, 60)], end=1.0)

    def encode_slowly(message: dict) -> str:
        text = encode(message)
        if message["type"] == "session":
            thread = threading.Thread(target=session.extend, args=(take, 1, [(1.0, 2.0, 61, 60)], 2.0))
            thread.start()
            thread.join()
        return text

    monkeypatch.setattr(module, "encode", encode_slowly)
    with running.client() as client:
        client.ask("ping")
        assert [note[2] for note in client.takes[take]["notes"]] == [60, 61]


def test_requests_are_answered_once(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        assert client.ask("ping")["type"] == "pong"
        assert client.ask("select", take=99)["message"] == "take 99: no such take"
        assert client.ask("continue", take=99)["message"] == "take 99: no such take"
        assert client.ask("undo", x=1)["message"] == "undo: unknown field 'x'"
        assert client.ask("play", take=1)["message"].startswith("play: no MIDI output")
        assert client.ask("import", name="x.mid", data="!!")["message"].startswith("x.mid: not base64")
        assert client.ask("import", name="x.mid", data="AAAA")["message"].startswith("x.mid: not a readable MIDI file")
        assert client.ask("replace", take=1, start=5, end=2)["message"].startswith("replace 5-2:")
        assert client.ask("settings", settings={"model": "nobody"})["message"].startswith("model nobody: no such model")
        assert client.ask("open", name="nobody")["message"] == "name nobody: no such session"
        client.send("stop", request=77)
        assert client.next("done") == {"type": "done", "request": 77, "take": None}


def test_a_new_request_stops_the_one_before(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.send("continue", request=900, take=1, at=2.0)
        while not any(m["type"] == "notes" and m["take"] == 2 and m["notes"] for m in client.log):
            client.receive()
        take = client.do("continue", take=1, at=2.0, seconds=0.5)
        assert any(m["type"] == "done" and m["request"] == 900 and m["take"] == 2 for m in client.log)
        assert take == 3
        assert not client.takes[2]["growing"]


def test_undo_of_what_grows_stops_it(running):
    with running.client() as client:
        client.send("continue", request=900)
        while not any(m["type"] == "notes" and m["take"] == 2 and m["notes"] for m in client.log):
            client.receive()
        client.do("undo")
        while not any(m["type"] == "done" and m["request"] == 900 for m in client.log):
            client.receive()
        assert client.selection["hidden"] == [1, 2]


def test_steering_applies_to_what_is_made(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.send("continue", request=900, take=1, at=2.0)
        while client.takes.get(2, {"end": 0})["end"] < 4.0:
            client.receive()
        client.do("settings", settings={"pitch_range": [60, 62]}, at=3.0)
        while client.takes[2]["settings"] != {"pitch_range": [60, 62]} or client.takes[2]["end"] < 6.0:
            client.receive()
        client.do("stop")
        while client.takes[2]["growing"]:
            client.receive()
        assert {note[2] for note in client.takes[2]["notes"] if note[0] >= 3.0} <= {60, 61, 62}


def test_what_is_played_becomes_a_take(running):
    with running.client() as client, running.client() as other:
        client.do("listen", on=True)
        while not other.next("status")["recording"]:
            pass
        client.send("pedal", value=100)
        for pitch in (60, 64):
            client.send("key", pitch=pitch, velocity=70)
            client.send("key", pitch=pitch, velocity=0)
        client.send("pedal", value=0)
        made = client.do("listen", on=False)
        assert made == client.selection["selected"]
        assert client.do("listen", on=False) is None
        take = client.takes[made]
        assert (take["kind"], len(take["notes"]), take["growing"]) == ("played", 2, False)
        assert not [m for m in client.log if m["type"] in ("key", "pedal")]  # not sent back
        other.ask("ping")
        assert [m["value"] for m in other.log if m["type"] == "pedal"] == [100, 0]
        keys = [(m["pitch"], m["velocity"], m["voice"]) for m in other.log if m["type"] == "key"]
        assert keys == [(60, 70, 0), (60, 0, 0), (64, 70, 0), (64, 0, 0)]
        client.do("listen", on=True)
        client.do("listen", on=False)  # nothing was played
        assert len(client.takes) == 1


def test_keys_of_a_page_that_is_closed_are_released(running):
    with running.client() as other:
        with running.client() as client:
            client.do("listen", on=True)
            client.send("pedal", value=127)
            client.send("key", pitch=60, velocity=70)
            client.ask("ping")
            assert running.studio.through.pressed
        key = other.next("key")
        assert (key["pitch"], key["velocity"]) == (60, 70)
        key = other.next("key")
        assert (key["pitch"], key["velocity"]) == (60, 0)
        other.ask("ping")
        assert not running.studio.through.pressed
        other.do("listen", on=False)
        assert [value for _, value in other.takes[1]["pedal"]] == [0]


def test_a_duet(running):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.send("duet", on=True, take=1, pause=0.2, max_turn=1.0, request=900)
        client.send("key", pitch=60, velocity=70)
        client.send("key", pitch=60, velocity=0)
        turns = []
        while "model" not in turns or turns[-1] != "human":
            message = client.next("status")
            if message["activity"] == "duet":
                turns.append(message["turn"])
        client.do("duet", on=False)
        while not any(m["type"] == "done" and m["request"] == 900 for m in client.log):
            client.receive()
        (done,) = (m for m in client.log if m["type"] == "done" and m["request"] == 900)
        take = client.takes[done["take"]]
        assert (take["kind"], take["parent"], take["growing"]) == ("duet", 1, False)
        assert take["voice"][0] == 0
        assert len(take["voice"]) == len(take["notes"])
        played = [m for m in client.log if m["type"] == "key" and m["voice"] == 1]
        assert set(take["voice"]) == ({0, 1} if any(m["velocity"] for m in played) else {0})


def test_an_error_of_the_program_is_answered(running, monkeypatch):
    with running.client() as client:
        monkeypatch.setattr(running.studio.session, "edit", lambda *arguments: 1 // 0)
        for request in (1, 2):
            client.send("rename", take=1, name="x", request=request)
            message = "ZeroDivisionError: integer division or modulo by zero"
            assert client.next("error") == {"type": "error", "message": message, "request": request}
        assert client.ask("ping")["type"] == "pong"
    assert len(running.unexpected) == 2
    running.unexpected.clear()


def test_a_full_disk_is_answered_with_one_line(running, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
    monkeypatch.setattr(running.studio.session, "copy_to", full)
    monkeypatch.setattr(module.exports, "export", full)
    monkeypatch.setattr(module, "keep_session", full)
    upload = running.http.post("/session", params={"token": TOKEN, "name": "New"}, content=b"x")
    for answer in (running.get("/session"), running.get("/export/1.mid"), upload):
        assert (answer.status_code, answer.text) == (409, "cannot be written (No space left on device)\n")


def test_exports(running):
    with running.client() as client:
        client.do("import", name="<b>é/\\.mid", data=midi())
        for kind, head in (("mid", b"MThd"), ("svg", b"<svg"), ("png", b"\x89PNG")):
            answer = running.get(f"/export/1.{kind}")
            assert answer.status_code == 200
            assert answer.content.startswith(head)
        assert running.get("/export/1.wav").status_code in (200, 409)
        for path in (
            "/export/2.mid",
            "/export/1.exe",
            "/export/x.mid",
            "/export/99999999999999999999.mid",
            f"/export/{'9' * 5000}.mid",
            "/export/²1.mid",
            "/export/.mid",
            "/export/1",
        ):
            assert running.get(path).status_code == 404


def closed(client: Client) -> int:
    """Read until the server closes the socket; the code."""
    with pytest.raises(WebSocketDisconnect) as error:
        client.next("nothing more")
    return error.value.code


def test_the_rate_is_limited(running, monkeypatch):
    monkeypatch.setattr(module, "BURST", 20.0)
    monkeypatch.setattr(module, "RATE", 0.0)
    with running.client() as client:
        for _ in range(50):
            client.send("ping")
        assert closed(client) == 1008


def test_a_client_of_nonsense_is_closed(running):
    with running.client() as client:
        for _ in range(module.MAX_INVALID + 1):
            client._send("{")
        assert closed(client) == 1008


def test_the_number_of_clients_is_limited(running, monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIENTS", 1)
    with running.client(), pytest.raises(WebSocketDisconnect), running.client():
        pass


def test_slow_clients_are_given_up(running, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    connection = module.Connection(running.server.hub)
    for i in range(10):
        connection.take(str(i))
    assert connection.slow
    assert len(connection.waiting) == 3


TEXT = st.text(max_size=30)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, 0.5, 1.5, 60, "a", "First", {"temperature": 0.9}, {"key": "x"}]
)
# What would take long, or play to devices, is left to other tests.
SAFE = sorted(set(CLIENT) - {"continue", "replace", "insert", "lead", "duet", "midi"})


@st.composite
def hostile(draw) -> str | bytes:
    """A message, more or less broken."""
    kind = draw(st.sampled_from(SAFE))
    fields = {name: draw(LIKELY | VALUE) for name in CLIENT[kind] if draw(st.booleans())}
    message = json.dumps({"type": draw(st.just(kind) | VALUE), "request": draw(st.just(1) | VALUE)} | fields)
    return draw(
        st.just(message)
        | st.just(message[: len(message) // 2])
        | st.binary(max_size=50)
        | st.just("[" * 5000)
        | st.just('{"type":' * 1000)
        | st.just('{"type": "select", "take": ' + "9" * 5000 + "}")
        | TEXT
    )


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(hostile(), max_size=20))
def test_nothing_that_clients_send_does_harm(running, messages):
    with running.client() as client:
        for message in messages:
            if isinstance(message, bytes):
                client.socket.send_bytes(message)
            else:
                client._send(message)
        client.send("listen", on=False)
        client.send("ping", request=12345)
        while client.next("pong").get("request") != 12345:
            pass
        for message in client.log:
            assert message["type"] != "error" or "\n" not in message["message"]
    with running.client() as fresh:
        assert set(fresh.takes) == set(running.studio.session.tree.takes)
    assert running.unexpected == []


def test_a_random_hour_in_short(running):
    """Random but valid requests; at the end all clients, the tree and the file agree."""
    choose = random.Random(4)
    with running.client() as client, running.client() as other:
        client.do("import", name="a.mid", data=midi())
        for _ in range(25):
            shown = sorted(set(client.takes) - set(client.selection["hidden"]))
            take, at = choose.choice(shown), choose.uniform(0, 4)
            kind = choose.choice(["continue", "select", "undo", "redo", "keep", "rename", "settings", "import", "stop"])
            fields = {
                "continue": {"take": take, "at": at, "seconds": 0.3, "count": choose.randint(1, 2)},
                "select": {"take": take},
                "keep": {"take": take, "kept": choose.choice([True, False, None])},
                "rename": {"take": take, "name": "".join(choose.choices(string.printable[:90], k=5))},
                "settings": {"settings": {"temperature": choose.uniform(0.5, 1.5)}, "at": choose.choice([None, at])},
                "import": {"name": "b.mid", "data": midi(choose.randrange(9), 10)},
            }.get(kind, {})
            assert client.ask(kind, **fields)["type"] in ("done", "error")
        other.ask("ping")
        assert other.takes == client.takes
        tree = running.studio.session.tree
        stored, _ = running.studio.session.store.load()
        assert {n: t.rows for n, t in stored.takes.items()} == {n: t.rows for n, t in tree.takes.items()}
        assert (stored.done, stored.selected, stored.hidden) == (tree.done, tree.selected, tree.hidden)
        for number in tree.takes:
            assert client.music(number) == sorted(map(list, tree.music(number).rows))


def test_the_end_saves_everything(tmp_path, models):
    running = Running(tmp_path, models)
    with running.http, running.client() as client:
        client.do("listen", on=True)
        client.send("key", pitch=60, velocity=70)
        client.ask("ping")
        client.send("continue")  # ends the recording
        client.next("notes")
    db = sqlite3.connect(tmp_path / "First.studio")
    kinds = [json.loads(value)["kind"] for (value,) in db.execute("SELECT value FROM takes ORDER BY id")]
    assert kinds[0] == "played"
    assert db.execute("SELECT COUNT(*) FROM notes WHERE take = 1").fetchone() == (1,)
    db.close()


def test_messages_do_not_wait_for_acknowledgements():
    with module.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(UserError, match=r"^`port` \d+: cannot listen on 127.0.0.1 \(Address already in use\)$"):
            module.listen(*listening.getsockname())
    with pytest.raises(UserError, match=r"cannot listen on nowhere\.invalid"):
        module.listen("nowhere.invalid", 0)
