"""The studio as a process: killed and started again, ended by signals, started twice."""

import base64
import signal
import subprocess
import sys
import time

import pytest
from support.music import on_grid, random_notes
from support.studio import StudioProcess, running_studio
from support.studio_models import save_tiny

from dsmr_mlx.music.midi import midi_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(tmp_path):
    """Options of a studio with a tiny model."""
    return ("--port", "0", "--folder", tmp_path / "sessions", "--model", save_tiny(tmp_path))


def midi() -> str:
    """A MIDI file in base64."""
    return base64.b64encode(midi_bytes(on_grid(random_notes(1, 40)))).decode()


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
        for _ in range(15):
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
def test_signals_end_it_with_everything_saved(arguments, number):
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
    with running_studio(*arguments) as again, again.client() as client:
        (take,) = client.takes.values()
        assert (take["kind"], take["growing"], len(take["notes"])) == ("played", False, 1)


def test_a_second_one_is_refused_or_opens_another_session(arguments):
    with running_studio(*arguments) as first, first.client() as client:
        name = client.session["name"]
        command = [sys.executable, "-m", "dsmr_mlx", "studio", "--no-browser", *map(str, arguments), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"{name}.studio: open in another studio" in done.stderr
        with running_studio(*arguments) as second, second.client() as other:
            assert other.session["name"] != name


def test_it_prints_one_line_and_answers_only_with_the_token(arguments):
    with running_studio(*arguments) as studio:
        assert studio.address == f"http://127.0.0.1:{studio.port}/?token={studio.token}"
        assert studio.get("/").status == 200
        assert studio.get("/", token="wrong").status == 403
        assert studio.get("/", Host="evil.example").status == 403
        assert studio.get("/", Origin="http://evil.example").status == 403
    assert studio.process.returncode == 0


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
def test_invalid_options_are_one_line(tmp_path, options, reason):
    command = [sys.executable, "-m", "dsmr_mlx", "studio", "--no-browser", "--folder", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dsmr-mlx: error: {reason}")
    assert done.stderr.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['uvicorn'] = None; from dsmr_mlx.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "studio", "--no-browser", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "dsmr-mlx: error: the studio needs uvicorn, install it with pip install 'dsmr-mlx[studio]'\n"
    )
