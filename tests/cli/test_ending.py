"""However a command is ended, nothing stays behind: no process, no hidden folder, no key that is down."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from support.midi_files import tune, write_midi_files

from dsmr_mlx.data.corpus import TOKENS
from dsmr_mlx.music.midi import read_notes

COMMAND = "import sys; from dsmr_mlx.cli import main; sys.exit(main(sys.argv[1:]))"


def start(*words: object, cwd: Path) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds: float = 20.0) -> bool:
    """Wait for a condition. Return whether it came true in time."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true)


def group(leader: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group_id = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group_id) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def many_files(tmp_path_factory) -> Path:
    """A folder of 1,500 MIDI files, ten of them different, which take some seconds to encode."""
    tunes = [tune(i, 1000) for i in range(10)]
    folder = tmp_path_factory.mktemp("many") / "midi"
    return write_midi_files(folder, {f"{i}.mid": tunes[i % 10] for i in range(1500)})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes of Linux")
@pytest.mark.parametrize(
    ("name", "workers"), [("SIGTERM", 2), ("SIGINT", 2), ("SIGKILL", 2), ("SIGHUP", 2), ("SIGQUIT", 1)]
)
def test_prepare_leaves_no_worker_and_no_folder(tmp_path, many_files, name, workers):
    """While files are encoded, by two worker processes or by the command itself."""
    (tmp_path / "midi").symlink_to(many_files)
    words = ("prepare", "midi", "--out", "c", "--workers")
    process = start(*words, workers, cwd=tmp_path)
    assert wait_until(lambda: any(path.stat().st_size > 1000 for path in tmp_path.glob(f".*/{TOKENS}")), 60)
    assert len(group(process.pid)) >= (3 if workers == 2 else 1)
    # A terminal sends its signals to all processes of a command, `kill` to one.
    (os.kill if name in ("SIGTERM", "SIGKILL") else os.killpg)(process.pid, getattr(signal, name))
    _, shown = process.communicate(timeout=30)
    assert wait_until(lambda: not group(process.pid), 5), group(process.pid)
    if name == "SIGKILL":  # the next command removes what a killed one has left
        (tmp_path / "midi").unlink()
        write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i) for i in range(3)})
        process = start(*words, 1, cwd=tmp_path)
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "midi"]
        return
    assert process.returncode == (130 if name == "SIGINT" else 128 + getattr(signal, name))
    assert len(shown.strip().splitlines()[-1:]) == 1
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["midi"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT"])
def test_generate_completes_its_file(tmp_path, trained, name):
    process = start("generate", trained.run, "--tokens", 100_000, "--out", "x.mid", cwd=tmp_path)
    path = tmp_path / "x.mid"
    assert wait_until(lambda: path.exists() and path.stat().st_size > 100, 60)
    process.send_signal(getattr(signal, name))
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in shown
    pressed = released = 0
    data = path.read_bytes()
    assert data.endswith(b"\xff\x2f\x00")
    notes = read_notes(path)
    assert len(notes) > 0
    from mido import MidiFile

    for message in MidiFile(path):
        pressed += message.type == "note_on" and message.velocity > 0
        released += message.type == "note_off" or (message.type == "note_on" and message.velocity == 0)
    assert pressed == released == len(notes)


class Client:
    """A client of a live session that knows which keys are down."""

    def __init__(self, port: int):
        assert wait_until(lambda: self._connect(port), 60)
        self.received = bytearray()
        threading.Thread(target=self._read, daemon=True).start()

    def _connect(self, port: int) -> bool:
        try:
            self.socket = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return False
        return True

    def _read(self) -> None:
        while data := self.socket.recv(4096):
            self.received += data

    @property
    def down(self) -> set[int]:
        """The keys that are down."""
        keys: set[int] = set()
        for i in range(0, len(self.received) - 2, 3):  # whole messages without running status
            status, key, velocity = self.received[i : i + 3]
            if status & 0xF0 == 0x90 and velocity:
                keys.add(key)
            elif status & 0xF0 in (0x80, 0x90):
                keys.discard(key)
        return keys


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTSTP"])
def test_live_releases_every_key(tmp_path, trained, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("live", trained.run, "--listen", f"127.0.0.1:{port}", "--pause", 0.1, cwd=tmp_path)
    try:
        client = Client(port)
        time.sleep(1.0)
        client.socket.sendall(bytes([0x90, 60, 64, 0x80, 60, 0]))
        assert wait_until(lambda: client.down, 60)
        process.send_signal(getattr(signal, name))
        assert wait_until(lambda: not client.down, 5)
        if name == "SIGTSTP":
            status = Path(f"/proc/{process.pid}/stat")
            assert not status.exists() or wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", 5)
            os.kill(process.pid, signal.SIGCONT)
            client.socket.sendall(bytes([0x90, 62, 64, 0x80, 62, 0]))
            assert wait_until(lambda: client.down, 60)  # it goes on
            process.terminate()
        _, shown = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in shown
        assert not client.down
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_run_survives_its_terminal(tmp_path, trained):
    """A closed terminal window sends SIGHUP, and printing to it fails from then on: the run is saved all the same."""
    here, there = os.openpty()
    settings = ("horizons=uniform:8", "batch_size=1", "eval_every=10000", "checkpoint_every=10000", "max_steps=10000")
    settings = [word for setting in settings for word in ("--set", setting)]
    words = ("train", "--data", trained.corpus, "--out", "run", "--preset", "tiny", *settings)
    command = [sys.executable, "-c", COMMAND, *map(str, words)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=there, stdout=there, stderr=there, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(there)
    shown = b""
    while b"step" not in shown:
        shown += os.read(here, 4096)
    os.close(here)
    process.wait(60)
    assert (tmp_path / "run/last/model.safetensors").exists()
    assert process.returncode in (0, 130, 128 + signal.SIGHUP), shown
