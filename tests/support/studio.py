"""A studio as a process of its own, and a client of its socket."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

from websockets.sync.client import connect

TIMEOUT = 60.0


class StudioProcess:
    """A running `dsmr-mlx studio`; address: what it has printed."""

    def __init__(self, *arguments: str, **options):
        command = [sys.executable, "-m", "dsmr_mlx", "studio", "--no-browser", *map(str, arguments)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.stderr.read()
        parts = urlsplit(self.address)
        self.host, self.port, self.token = parts.hostname, parts.port, parse_qs(parts.query)["token"][0]

    def get(self, path: str, token: str | None = None, **headers: str) -> http.client.HTTPResponse:
        """The answer to a request, read."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        token = self.token if token is None else token
        connection.request("GET", f"{path}?token={token}", headers=headers)
        response = connection.getresponse()
        response.content = response.read()
        connection.close()
        return response

    @contextmanager
    def client(self) -> Iterator["Client"]:
        """A client that has got the session."""
        url = f"ws://{self.host}:{self.port}/socket?token={self.token}"
        with connect(url, max_size=None, open_timeout=TIMEOUT) as socket:
            yield Client(socket.send, lambda: socket.recv(TIMEOUT))

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode


@contextmanager
def running_studio(*arguments: str, **options) -> Iterator[StudioProcess]:
    """A studio that is ended with Ctrl-C."""
    studio = StudioProcess(*arguments, **options)
    try:
        yield studio
    finally:
        studio.end()


class Client:
    """A client: `takes` and `selected` follow the messages, as a page's would."""

    def __init__(self, send: Callable[[str], None], receive: Callable[[], str]):
        self._send, self._receive = send, receive
        self.takes: dict[int, dict] = {}
        self.log: list[dict] = []
        self.requests = 0
        self.session = self.next("session")

    def send(self, type: str, **fields) -> None:
        """Send a message."""
        self._send(json.dumps({"type": type} | fields))

    def receive(self) -> dict:
        """The next message."""
        message = json.loads(self._receive())
        self.log.append(message)
        self._follow(message)
        return message

    def next(self, *types: str) -> dict:
        """The next message of one of these types."""
        while (message := self.receive())["type"] not in types:
            pass
        return message

    def ask(self, type: str, **fields) -> dict:
        """Send a request; return its answer, `done`, `error` or `pong`."""
        self.requests += 1
        self.send(type, request=self.requests, **fields)
        while True:
            message = self.next("done", "error", "pong")
            if message["request"] == self.requests:
                return message

    def do(self, type: str, **fields) -> int | None:
        """Send a request that must succeed; return its first new take."""
        answer = self.ask(type, **fields)
        assert answer["type"] == "done", answer
        return answer["take"]

    def _follow(self, message: dict) -> None:
        match message["type"]:
            case "session":
                self.takes = {take["id"]: take for take in message["takes"]}
                self.selection = {name: message[name] for name in ("selected", "can_undo", "can_redo", "hidden")}
                self.settings = message["settings"]
            case "take":
                take = message["take"]
                self.takes.setdefault(take["id"], {"notes": [], "pedal": [], "voice": None}).update(take)
            case "notes":
                take = self.takes[message["take"]]
                assert message["from"] <= len(take["notes"])
                take["notes"][message["from"] :] = message["notes"]
                if message["voice"] is not None:
                    take["voice"] = [*(take["voice"] or [])[: message["from"]], *message["voice"]]
                if message["pedal"] is not None:
                    assert message["pedal_from"] <= len(take["pedal"])
                    take["pedal"][message["pedal_from"] :] = message["pedal"]
                take["end"] = message["end"]
            case "selection":
                self.selection = {name: value for name, value in message.items() if name != "type"}
            case "settings":
                self.settings = message["settings"]

    def music(self, take: int) -> list[list]:
        """The music of a take as `docs/studio-protocol.md` defines it, note by note."""
        own = self.takes[take]
        notes = [] if own["parent"] is None else self.music(own["parent"])
        after = own["after"] or 0.0
        before = [note for note in notes if note[1] <= own["begin"]]
        later = [note for note in notes if own["resume"] is not None and note[0] >= own["resume"]]
        moved = [[round(on + after, 3), round(off + after, 3), pitch, velocity] for on, off, pitch, velocity in later]
        return sorted(before + own["notes"] + moved)


class Recorder:
    """What a studio publishes, for tests without a server."""

    def __init__(self) -> None:
        self.messages: list[dict] = []
        self.changed = threading.Condition()
        self.then: Callable[[dict], None] = lambda message: None  # called after each message

    def __call__(self, message: dict, but: object = None) -> None:
        with self.changed:
            self.messages.append(json.loads(json.dumps(message, allow_nan=False)))
            self.changed.notify_all()
        self.then(message)

    send = __call__

    def of(self, type: str) -> list[dict]:
        """The messages of a type."""
        with self.changed:
            return [message for message in self.messages if message["type"] == type]

    def wait(self, condition: Callable[[list[dict]], object], timeout: float = TIMEOUT) -> None:
        """Wait until the messages fulfil a condition."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.messages), timeout), self.messages[-5:]
