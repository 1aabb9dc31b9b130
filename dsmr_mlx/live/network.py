"""MIDI over TCP: plain MIDI bytes both ways, which is what mido's sockets send and understand."""

import contextlib
import socket
import threading

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.midi_bytes import Decoder
from dsmr_mlx.live.ports import Listener, PortLost

SECONDS_TO_SEND = 1.0  # a peer that takes longer does not listen any more
SECONDS_TO_TRY_AGAIN = 0.02  # for each message after that
HERE = "127.0.0.1"


def parse_address(option: str, text: str) -> tuple[str, int]:
    """HOST:PORT, or :PORT on this machine; a host with colons stands in brackets. Raises `UserError` otherwise."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not int(port) < 1 << 16:
        raise UserError(f"{option} {text}: expected HOST:PORT, such as {HERE}:9080")
    return host.strip("[]") or HERE, int(port)


class NetworkPort:
    """One connection, input and output in one. Use `connect` or `Server.accept`."""

    plays = True

    def __init__(self, connection: socket.socket, name: str):
        self.name = name
        self._socket = connection
        self._closed = False
        # Otherwise a note waits for the acknowledgement of the one before.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SECONDS_TO_SEND)

    def start(self, listener: Listener) -> None:
        """Let a listener know of everything that comes in, and of the end."""
        threading.Thread(target=self._read, args=(listener,), daemon=True).start()

    def _read(self, listener: Listener) -> None:
        decoder = Decoder()
        while not self._closed:
            try:
                data = self._socket.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                listener.stop(f"{self.name}: the connection was closed")
                return
            for message in decoder.feed(data):
                listener.receive(message)

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`; later messages are tried again, and not waited for."""
        try:
            self._socket.sendall(message.bin())
        except OSError as error:
            with contextlib.suppress(OSError):  # it may be closed
                self._socket.settimeout(SECONDS_TO_TRY_AGAIN)
            raise PortLost(f"{self.name}: {reason(error)}") from error

    def close(self) -> None:
        """Hang up."""
        self._closed = True
        with contextlib.suppress(OSError):  # the other side may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(option: str, text: str) -> NetworkPort:
    """The connection to a server. Raises `UserError` if there is none."""
    host, port = parse_address(option, text)
    try:
        return NetworkPort(socket.create_connection((host, port), timeout=10), f"{host}:{port}")
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        raise UserError(f"{option} {text}: cannot connect ({reason(error)})") from None


def reason(error: Exception) -> str:
    """What the system says, in a few words."""
    return getattr(error, "strerror", None) or str(error)


class Server:
    """Waits for one peer. `port` is the number it listens on, chosen by the system if it was 0.

    Raises `UserError` if the address cannot be used.
    """

    def __init__(self, option: str, text: str):
        self.host, port = parse_address(option, text)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._socket = socket.create_server((self.host, port), family=family, backlog=1)
        except (OSError, UnicodeError) as error:
            raise UserError(f"{option} {text}: cannot listen ({reason(error)})") from None
        self.port: int = self._socket.getsockname()[1]

    def accept(self) -> NetworkPort:
        """The connection to the first peer that comes; then no other is let in."""
        with self._socket:
            connection, address = self._socket.accept()
        return NetworkPort(connection, f"{address[0]}:{address[1]}")
