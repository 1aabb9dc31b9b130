"""The studio as a process: killed and started again, ended by signals, started twice."""

import base64
import signal
import sys
import time
from pathlib import Path

import pytest
from support.music import on_grid, random_notes
from support.studio import StudioProcess, running_studio
from support.studio_models import save_tiny

from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.studio.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny model."""
    return save_tiny(tmp_path_factory.mktemp("models"))


def options(folder: Path, model: str) -> tuple:
    """Options of a studio whose sessions are in a folder."""
    return ("--port", "0", "--folder", folder / "sessions", "--model", model)


@pytest.fixture
def arguments(tmp_path, model):
    """Options of a studio without sessions."""
    return options(tmp_path, model)


@pytest.fixture(scope="module")
def studio(tmp_path_factory, model):
    """A running studio, shared by tests that do not end it; arguments: its options. Ctrl-C ends it without an error."""
    arguments = options(tmp_path_factory.mktemp("studio"), model)
    with running_studio(*arguments) as studio:
        studio.arguments = arguments
        yield studio
    assert studio.process.returncode == 0


def midi() -> str:
    """A MIDI file in base64."""
    return base64.b64encode(midi_bytes(on_grid(random_notes(1, 20)))).decode()


def seen(client) -> dict:
    """All takes as a client has them."""
    return {n: {k: v for k, v in take.items() if k != "growing"} for n, take in client.takes.items()}


def test_a_kill_loses_nothing_that_was_seen(arguments):
    studio = StudioProcess(*arguments)
    with studio.client() as client:
        client.do("import", name="a.mid", data=midi())
        client.do("rename", take=1, name="Mine")
        client.do("settings", settings={"temperature": 0.7})
        client.send("continue", take=1, at=2.0)
        for _ in range(8):
            client.next("notes")
        studio.process.kill()
        studio.process.wait()
        before = seen(client)
    assert studio.process.returncode == -signal.SIGKILL
    studio.process.communicate()
    with running_studio(*arguments) as again, again.client() as client:
        assert again.token == studio.token
        after = seen(client)
        assert client.settings["temperature"] == 0.7
        assert after.keys() == before.keys()
        for number, take in before.items():
            # What was written before the kill may not have been sent any more.
            assert len(after[number]["notes"]) >= len(take["notes"])
            complete = [note for note in take["notes"] if note[1] < take["end"]]
            assert [note for note in complete if note not in after[number]["notes"]] == []
            assert after[number]["name"] == take["name"]
        assert not any(take["growing"] for take in client.takes.values())
        client.do("continue", take=2, seconds=0.5)  # it goes on
        client.do("undo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_with_everything_saved(arguments, tmp_path, number):
    studio = StudioProcess(*arguments)
    with studio.client() as client:
        client.do("listen", on=True)
        client.send("key", pitch=60, velocity=70)
        client.next("notes")
        began = time.monotonic()
        studio.process.send_signal(number)
        out, err = studio.process.communicate(timeout=30)
    assert (studio.process.returncode, out, err) == (0, "", "")
    assert time.monotonic() - began < 8
    (path,) = (tmp_path / "sessions").glob("*.studio")
    store = Store(path)
    (take,) = store.load()[0].takes.values()
    assert (take.kind, take.growing, len(take.rows)) == ("played", False, 1)
    store.close()


def test_a_second_one_is_refused_or_opens_another_session(studio, run):
    with studio.client() as client:
        name = client.session["name"]
    done = run("studio", "--no-browser", *studio.arguments, name)
    assert done.code == 2
    assert f"{name}.studio: open in another studio" in done.err
    with running_studio(*studio.arguments) as second, second.client() as other:
        assert other.session["name"] != name


def test_it_prints_one_line_and_answers_only_with_the_token(studio):
    assert studio.address == f"http://127.0.0.1:{studio.port}/?token={studio.token}"
    assert studio.get("/").status == 200
    assert studio.get("/", token="wrong").status == 403
    assert studio.get("/", Host="evil.example").status == 403
    assert studio.get("/", Origin="http://evil.example").status == 403


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: other computers could connect; expected --allow-network"),
        (("--port", "99999"), "--port 99999: expected 0 to 65535"),
        (("../x",), "../x: expected the name of a session, or a path that ends in .studio"),
        (("--model", "nothing"), "nothing: no such folder"),
        (("nowhere/x.studio",), "nowhere/x.studio: no such folder nowhere"),
    ],
)
def test_invalid_options_are_one_line(run, options, reason):
    done = run("studio", "--no-browser", "--folder", ".", *options)
    assert done.code == 2
    assert done.err.startswith(f"dsmr-mlx: error: {reason}")
    assert done.err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "dsmr_mlx.studio.server", raising=False)
    monkeypatch.delattr("dsmr_mlx.studio.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run("studio", "--no-browser", "--folder", ".")
    assert done.code == 2
    assert done.err == ("dsmr-mlx: error: the studio needs uvicorn, install it with pip install 'dsmr-mlx[studio]'\n")
