"""The studio as users experience it: seconds until the first note, and memory over long use.

    python benchmarks/studio.py latency [--json]    # a table: start, continue, key to sound, passages
    python benchmarks/studio.py memory --rounds 60  # scripted use, with the process's memory after each tenth
    python benchmarks/studio.py memory --rounds 60 --minutes 60  # the same in real time, as if somebody listened

Both start `dsmr-mlx studio` as a process and talk to its socket, as a page does.
"""

import argparse
import base64
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from websockets.sync.client import connect

from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.music.notes import without_overlaps

REPEATS = 5
LONG_SECONDS = 300.0  # of the long piece


class Studio:
    """A running studio and a client of it. started: seconds until the address was printed."""

    def __init__(self, folder: Path, model: str | None = None):
        began = time.perf_counter()
        command = [sys.executable, "-m", "dsmr_mlx", "studio", "--no-browser", "--port", "0", "--folder", str(folder)]
        command += [] if model is None else ["--model", model]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = urlsplit(self.process.stdout.readline().strip())
        self.started = time.perf_counter() - began
        url = f"ws://{self.address.netloc}/socket?{self.address.query}"
        self.closing = contextlib.ExitStack()
        self.socket = self.closing.enter_context(connect(url, max_size=None))
        self.requests, self.stops = 0, []  # stops: seconds from stopping until the take is complete and saved
        self.activity = "idle"  # of the last status
        self.receive()

    def receive(self) -> dict:
        """The next message."""
        message = json.loads(self.socket.recv(600))
        self.activity = message.get("activity", self.activity)
        return message

    def send(self, type: str, **fields) -> int:
        """Send a request; return its number."""
        self.requests += 1
        self.socket.send(json.dumps({"type": type, "request": self.requests} | fields))
        return self.requests

    def do(self, type: str, **fields) -> int | None:
        """Send a request and wait for its answer; return the first new take."""
        number = self.send(type, **fields)
        while True:
            message = self.receive()
            if message.get("request") == number:
                if message["type"] == "error":
                    raise SystemExit(f"{type}: {message['message']}")
                return message.get("take")

    def idle(self) -> float:
        """Wait until nothing is read ahead, and return since when. Reading begins a moment after the last request."""
        quiet: list[float] = []
        while len(quiet) < 4:
            time.sleep(0.1)
            self.do("ping")
            quiet = [*quiet, time.perf_counter()] if self.activity == "idle" else []
        return quiet[0]

    def first_note(self, type: str, begin: float, **fields) -> float:
        """Seconds from a request until the first new note arrives; the rest is stopped."""
        began = time.perf_counter()
        number = self.send(type, **fields)
        taken = None
        while taken is None:
            message = self.receive()
            if message["type"] == "notes" and any(note[0] >= begin for note in message["notes"]):
                taken = time.perf_counter() - began
            elif message.get("request") == number:
                raise SystemExit(f"{type}: no note came, {message}")
        began = time.perf_counter()
        self.send("stop")
        while (message := self.receive()).get("request") != number:
            pass
        self.stops.append(time.perf_counter() - began)
        return taken

    @property
    def memory(self) -> float:
        """The resident memory of the process in MiB, on Linux."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            done = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
            return int(done.stdout) / 1024
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def close(self) -> None:
        """End it."""
        self.closing.close()
        self.process.terminate()
        self.process.wait(30)


def piece(seconds: float, seed: int = 0) -> str:
    """A random piece of about 8 notes a second, as a MIDI file in base64."""
    rng = np.random.default_rng(seed)
    n = int(8 * seconds)
    onset = np.sort(rng.uniform(0, seconds, n)).round(2)
    pitch, velocity = rng.integers(36, 84, n).astype(np.uint8), rng.integers(30, 100, n)
    notes = without_overlaps(onset, onset + rng.uniform(0.1, 1.0, n).round(2), pitch, velocity)
    return base64.b64encode(midi_bytes(notes)).decode()


def latency(folder: Path, model: str | None = None) -> list[tuple[str, list[float]]]:
    """Rows of the table: a name, and the seconds of each attempt."""
    studio = Studio(folder, model)
    rows = [("start to address", [studio.started])]
    rows.append(("first continue, while the model loads", [studio.first_note("continue", 0.0)]))
    studio.idle()
    rows.append(("continue from nothing", [studio.first_note("continue", 0.0) for _ in range(REPEATS)]))
    studio.do("import", name="short.mid", data=piece(20))
    began = time.perf_counter()
    studio.do("import", name="long.mid", data=piece(LONG_SECONDS))
    long = max(take_ids(studio))
    two_thirds = round(LONG_SECONDS * 2 / 3, 2)
    at_once = studio.first_note("continue", two_thirds, take=long, at=two_thirds)
    rows.append((f"continue a file of {LONG_SECONDS:g} s at {two_thirds:g} s, at once", [at_once]))
    rows.append((f"until {LONG_SECONDS:g} s are read ahead", [studio.idle() - began]))
    points = np.linspace(20, LONG_SECONDS - 10, REPEATS).round(2).tolist()
    rows.append(("then continue it anywhere", [studio.first_note("continue", at, take=long, at=at) for at in points]))
    take = studio.do("continue", take=long, at=10.0, seconds=10, seed=1)
    further = [studio.first_note("continue", 15.0, take=take, at=None) for _ in range(REPEATS)]
    rows.append(("continue a new take", further))
    began = time.perf_counter()
    studio.do("replace", take=long, start=20.0, end=24.0)
    rows.append(("replace 4 s, until done", [time.perf_counter() - began]))
    rows.append(("stop, until the take is complete", studio.stops))
    studio.do("listen", on=True)
    rows.append(("key to its note in the page", [key_to_note(studio, pitch) for pitch in range(60, 60 + 4 * REPEATS)]))
    studio.do("listen", on=False)
    studio.close()
    return rows


def key_to_note(studio: Studio, pitch: int) -> float:
    """Seconds from a key until its note is written and published."""
    began = time.perf_counter()
    studio.send("key", pitch=pitch, velocity=70)
    while True:
        message = studio.receive()
        if message["type"] == "notes" and any(note[2] == pitch for note in message["notes"]):
            break
    taken = time.perf_counter() - began
    studio.do("key", pitch=pitch, velocity=0)
    return taken


def take_ids(studio: Studio) -> list[int]:
    """The ids of all takes, as a new client sees them."""
    url = f"ws://{studio.address.netloc}/socket?{studio.address.query}"
    with connect(url, max_size=None) as socket:
        return [take["id"] for take in json.loads(socket.recv(60))["takes"]] or [0]


def use(studio: Studio, rng: np.random.Generator, file: int) -> None:
    """One round of use: takes, kept and thrown away, a passage, steering, undo."""
    at = float(rng.uniform(5, 50))
    take = studio.do("replace", take=file, start=at, end=at + 2)
    studio.do("keep", take=take, kept=False)
    take = studio.do("continue", take=file, at=at, seconds=10, count=int(rng.integers(1, 4)))
    studio.do("keep", take=take, kept=bool(rng.integers(2)))
    studio.do("settings", settings={"temperature": float(rng.uniform(0.8, 1.2))})
    take = studio.do("continue", take=take, seconds=5)
    studio.do("undo")
    studio.do("redo")
    studio.do("select", take=file)
    studio.do("listen", on=True)
    for pitch in rng.integers(40, 80, 10).tolist():
        studio.do("key", pitch=pitch, velocity=60)
        studio.do("key", pitch=pitch, velocity=0)
    studio.do("listen", on=False)


def memory(
    folder: Path, rounds: int, minutes: float = 0.0, model: str | None = None
) -> Iterator[tuple[int, float, float, float]]:
    """Yield rows: rounds done, minutes, memory in MiB, size of the session in MiB. They take `minutes` or more."""
    studio, rng = Studio(folder, model), np.random.default_rng(0)
    studio.do("import", name="piece.mid", data=piece(60))
    began = time.perf_counter()
    for i in range(1, rounds + 1):
        use(studio, rng, 1)
        time.sleep(max(began + 60 * minutes * i / rounds - time.perf_counter(), 0))
        if i % max(rounds // 10, 1) == 0:
            size = sum(path.stat().st_size for path in folder.glob("*.studio*")) / 2**20
            yield i, (time.perf_counter() - began) / 60, studio.memory, size
    studio.close()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "memory"))
    parser.add_argument("--rounds", type=int, default=60, help="of use (default 60, about an hour of music)")
    parser.add_argument("--minutes", type=float, default=0.0, help="minimum duration of the rounds (default 0)")
    parser.add_argument("--model", help="a checkpoint (default: the bundled model)")
    parser.add_argument("--json", action="store_true", help="print the rows of the latency as JSON")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if a.what == "latency":
            rows = [(name, statistics.median(s), max(s)) for name, s in latency(Path(folder), a.model)]
            if a.json:
                print(json.dumps([dict(zip(("name", "median", "most"), row, strict=True)) for row in rows]))
                return
            print(f"{'':<40} {'median':>8} {'most':>8}  seconds")
            for name, median, most in rows:
                print(f"{name:<40} {median:>8.3f} {most:>8.3f}")
        else:
            print("rounds  minutes  memory MiB  session MiB")
            for i, minutes, mib, size in memory(Path(folder), a.rounds, a.minutes, a.model):
                print(f"{i:>6} {minutes:>8.1f} {mib:>11.0f} {size:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
