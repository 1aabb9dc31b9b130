"""Who may talk to the server: only who knows its token, and only pages of its own address.

A page of another origin cannot read the token; one whose name was rebound to this computer (DNS rebinding) is found out
by its Host. Every answer forbids scripts and styles from anywhere else.
"""

import hmac
import ipaddress
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import hidden_name

TOKEN_FILE = ".token"
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
LOCAL = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 80  # browsers leave it out
OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # of documentation, RFC 5737 and 3849


def bracketed(host: str) -> str:
    """A name or an address as it stands in an address of the web."""
    return f"[{host}]" if ":" in host else host


def own_address(family: int) -> str:
    """Return the address by which other computers reach this one; the local one if there is no network."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sending:  # sends nothing: the system only chooses a way
            sending.connect((OUTSIDE[family], 9))
            return sending.getsockname()[0]
    except OSError:
        return "127.0.0.1" if family == socket.AF_INET else "::1"


def kept_token(folder: Path) -> str:
    """Return the token of a folder of sessions, a secret; made if the folder has no safe one.

    It is kept, so that an open page finds a program that was ended and started again. Raises `UserError` if it cannot
    be kept.
    """
    path = folder / TOKEN_FILE
    with suppress(OSError, UnicodeDecodeError):
        found = path.lstat()
        secret = stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077 and found.st_uid == os.getuid()
        token = path.read_text(encoding="ascii").strip() if secret and found.st_size < 100 else ""
        if TOKEN.fullmatch(token):
            return token
    token, partial = secrets.token_urlsafe(32), hidden_name(path, "partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return token


@dataclass(frozen=True)
class Guard:
    """Checks requests: token or cookie, Host and Origin.

    host: where the server listens; network: whether other computers may connect, by any address of this one
    """

    token: str
    host: str
    port: int
    network: bool = False
    headers: tuple[tuple[str, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        sockets = " ".join(f"ws://{name}:{self.port}" for name in LOCAL[:2])
        policy = (
            f"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' {sockets}; "
            "img-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self'; font-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = (
            ("content-security-policy", policy),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-store"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
        )
        object.__setattr__(self, "headers", headers)

    @property
    def cookie(self) -> str:
        """The name of the cookie: browsers share cookies between all ports of a host."""
        return f"dsmr-mlx-studio-{self.port}"

    @property
    def set_cookie(self) -> str:
        """The header that sets the cookie."""
        return f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"

    @property
    def address(self) -> str:
        """The address of the page."""
        every = {"0.0.0.0": socket.AF_INET, "::": socket.AF_INET6}  # no address of its own: it means all
        host = own_address(every[self.host]) if self.host in every else self.host
        return f"http://{bracketed(host)}:{self.port}/?token={self.token}"

    def allows(self, headers: Iterable[tuple[bytes, bytes]], query: bytes) -> bool:
        """Whether a request with these headers and this query is answered."""
        found: dict[str, list[str]] = {}
        for name, value in headers:
            found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = found.get("host", []), found.get("origin", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]) or len(origins) > 1:
            return False
        if origins and origins[0] != f"http://{hosts[0]}":
            return False
        return self.has_token(query) or self._has_cookie(found.get("cookie", []))

    def has_token(self, query: bytes) -> bool:
        """Whether a query has the token."""
        try:
            tokens = parse_qs(query.decode("ascii"), max_num_fields=20).get("token", [])
        except ValueError:
            return False
        return len(tokens) == 1 and self._is_token(tokens[0])

    def _has_cookie(self, cookies: list[str]) -> bool:
        for text in cookies:
            try:
                morsel = SimpleCookie(text).get(self.cookie)
            except CookieError:
                continue
            if morsel is not None and self._is_token(morsel.value):
                return True
        return False

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server."""
        names = (*LOCAL, bracketed(self.host.lower()))
        ports = (f":{self.port}", "") if self.port == HTTP_PORT else (f":{self.port}",)
        if host.lower() in {name + port for name in names for port in ports}:
            return True
        if not self.network:
            return False
        try:  # by its address, whichever it has; a name could be anybody's
            parts = urlsplit(f"//{host}")
            return (parts.port or HTTP_PORT) == self.port and bool(ipaddress.ip_address(parts.hostname or ""))
        except ValueError:
            return False
