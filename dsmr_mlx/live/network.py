"""MIDI over TCP: plain MIDI bytes in both directions, compatible with mido's sockets."""

import contextlib
import ipaddress
import socket as sockets
import threading

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.parsing import is_whole_number
from dsmr_mlx.live.midi_bytes import Decoder
from dsmr_mlx.live.ports import Listener, PortLost

CONNECT_TIMEOUT = 10.0  # seconds
SEND_TIMEOUT = 1.0  # seconds; after that the peer counts as lost
RETRY_TIMEOUT = 0.02  # seconds, for each message to a lost peer
LOCALHOST = "127.0.0.1"


class NetworkPort:
    """A connection that is input and output in one. Made by `connect` or `Server.accept`."""

    is_input = True

    def __init__(self, connection: sockets.socket, name: str):
        self.name = name
        self._socket = connection
        self._closed = False
        # Without this a note waits for the acknowledgement of the one before.
        connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        connection.settimeout(SEND_TIMEOUT)

    def start(self, listener: Listener) -> None:
        """Start a thread that passes incoming messages, and the end of the connection, to the listener."""
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
        """Send a message. Raises `PortLost`; later messages are still tried, with a short timeout."""
        try:
            self._socket.sendall(message.bin())
        except OSError as error:
            with contextlib.suppress(OSError):  # the socket may be closed
                self._socket.settimeout(RETRY_TIMEOUT)
            raise PortLost(f"{self.name}: {reason(error)}") from error

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        with contextlib.suppress(OSError):  # the peer may have closed it first
            self._socket.shutdown(sockets.SHUT_RDWR)
        self._socket.close()


class Server:
    """Listens at an address HOST:PORT for one peer. port: the actual port, chosen by the system if 0 was given.

    Raises `UserError` if the address is invalid or cannot be used.
    """

    def __init__(self, listen: str):
        self.host, port = parse_address("listen", listen)
        family = sockets.AF_INET6 if ":" in self.host else sockets.AF_INET
        try:
            self._socket = sockets.create_server((self.host, port), family=family, backlog=1)
        except (OSError, UnicodeError) as error:
            raise UserError(f"`listen` {listen}: cannot listen ({reason(error)})") from None
        self.port: int = self._socket.getsockname()[1]

    @property
    def is_local(self) -> bool:
        """Whether only programs on this computer can connect."""
        return ipaddress.ip_address(self._socket.getsockname()[0].partition("%")[0]).is_loopback

    def accept(self) -> NetworkPort:
        """Wait for the first peer, refuse all others, and return the connection."""
        with self._socket:
            connection, address = self._socket.accept()
        return NetworkPort(connection, f"{address[0]}:{address[1]}")


def connect(socket: str) -> NetworkPort:
    """Connect to a server at HOST:PORT. Raises `UserError` if the address is invalid or does not answer."""
    host, port = parse_address("socket", socket)
    try:
        return NetworkPort(sockets.create_connection((host, port), timeout=CONNECT_TIMEOUT), f"{host}:{port}")
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        raise UserError(f"`socket` {socket}: cannot connect ({reason(error)})") from None


def parse_address(argument: str, address: str) -> tuple[str, int]:
    """Parse HOST:PORT; the host may be omitted (localhost) and an IPv6 host is in brackets. Raises `UserError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not is_whole_number(port) or not int(port) < 1 << 16:
        raise UserError(f"`{argument}` {address}: expected HOST:PORT, such as {LOCALHOST}:9080")
    return host.strip("[]") or LOCALHOST, int(port)


def reason(error: Exception) -> str:
    """Return the system's message for an error."""
    return getattr(error, "strerror", None) or str(error)
