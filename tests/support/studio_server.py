"""A studio's server in this process."""

import base64
from contextlib import contextmanager

from starlette.testclient import TestClient
from support.music import on_grid, random_notes
from support.studio import Client

from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.studio.security import Guard
from dsmr_mlx.studio.server import Server
from dsmr_mlx.studio.studio import Studio

TOKEN, PORT = "the-token", 8642
BASE = f"http://127.0.0.1:{PORT}"
SOCKET = f"ws://127.0.0.1:{PORT}/socket"


class Running:
    """A server in this process. unexpected: errors of the program."""

    def __init__(self, home, models):
        self.unexpected, self.home = [], home
        guard = Guard(TOKEN, "127.0.0.1", PORT)
        path = home / "First.studio"
        self.server = Server(guard, lambda hub: Studio(path, home, models, hub.publish, self.unexpected.append))
        self.studio = self.server.studio
        self.http = TestClient(self.server.app, base_url=BASE, raise_server_exceptions=True)

    @contextmanager
    def client(self, **headers):
        """A client of the socket."""
        with self.http.websocket_connect(f"{SOCKET}?token={TOKEN}", headers=headers) as socket:
            client = Client(socket.send_text, socket.receive_text)
            client.socket = socket
            yield client

    def get(self, path: str, **options):
        """The answer to a request with the token."""
        return self.http.get(path, params={"token": TOKEN}, **options)


def midi(seed: int = 1, n: int = 40) -> str:
    """A MIDI file in base64."""
    return base64.b64encode(midi_bytes(on_grid(random_notes(seed, n, lengths=(20, 120))))).decode()
