"""Requests that wait for a slow one: keys pass them, their order is kept, and their number is limited."""

import threading
import time
from contextlib import contextmanager

from support.studio import TIMEOUT
from support.studio_server import midi

from dsmr_mlx.studio import folder
from dsmr_mlx.studio import server as module


@contextmanager
def busy(running, client, monkeypatch):
    """The client waits for the list of the sessions, until `go` is set."""
    begun, go, describe = threading.Event(), threading.Event(), folder.describe_sessions

    def slow(*arguments):
        begun.set()
        assert go.wait(TIMEOUT)
        return describe(*arguments)

    monkeypatch.setattr(folder, "describe_sessions", slow)
    client.send("sessions")
    assert begun.wait(TIMEOUT)
    try:
        yield go
    finally:
        go.set()


def test_keys_do_not_wait_for_slow_requests_of_their_client(running, monkeypatch):
    with running.client() as client, running.client() as other:
        client.send("listen", on=True)
        client.send("key", pitch=60, velocity=70)  # comes with `listen`
        with busy(running, client, monkeypatch):
            client.send("key", pitch=62, velocity=70)
            assert [other.next("key")["pitch"] for _ in range(2)] == [60, 62]
            assert client.ask("ping")["type"] == "pong"
            assert not [m for m in client.log if m["type"] == "sessions"]


def test_requests_are_handled_in_order_after_a_slow_one(running, monkeypatch):
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        with busy(running, client, monkeypatch) as go:
            for request in range(100, 110):
                client.send("rename", take=1, name=str(request), request=request)
            client.send("continue", take=1, request=110)
            client.send("stop", request=111)
            assert client.next("done")["request"] == 111  # at once
            go.set()
            answers = [client.next("done")["request"] for _ in range(11)]  # and the endless `continue` is not begun
        assert answers == list(range(100, 111))
        assert client.takes[1]["name"] == "109"


def test_waiting_requests_are_bounded(running, monkeypatch):
    monkeypatch.setattr(module, "MAX_REQUESTS", 3)
    with running.client() as client:
        client.do("import", name="a.mid", data=midi())
        with busy(running, client, monkeypatch):
            for request in range(100, 110):
                client.send("rename", take=1, name=str(request), request=request)
            (connection,) = running.server.hub.connections
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                assert connection.requests.qsize() <= 3
        assert [client.next("done")["request"] for _ in range(10)] == list(range(100, 110))


def test_a_client_that_goes_while_it_waits_releases_its_keys_and_gets_its_changes(running, monkeypatch):
    with running.client() as other, running.client() as client:  # the end of a test's client cancels its task
        other.do("import", name="a.mid", data=midi())
        other.do("listen", on=True)
        with busy(running, client, monkeypatch):
            client.send("key", pitch=60, velocity=70)
            client.send("rename", take=1, name="Mine")
            client.socket.close()
            assert [other.next("key")["velocity"] for _ in range(2)] == [70, 0]
        while other.takes[1]["name"] != "Mine":
            other.receive()
        while len(running.server.hub.connections) > 1:
            other.ask("ping")
