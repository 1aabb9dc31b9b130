"""Who is answered: token, cookie, Host and Origin."""

import ipaddress
import socket

import pytest

from dsmr_mlx.studio import security
from dsmr_mlx.studio.security import TOKEN, Guard, kept_token

GUARD = Guard("secret-token", "127.0.0.1", 8642)
HOST = (b"host", b"127.0.0.1:8642")
QUERY = b"token=secret-token"
COOKIE = (b"cookie", b"dsmr-mlx-studio-8642=secret-token")


@pytest.mark.parametrize(
    ("headers", "query", "allowed"),
    [
        ([HOST], QUERY, True),
        ([HOST], b"a=b&token=secret-token", True),
        ([HOST, COOKIE], b"", True),
        ([(b"Host", b"localhost:8642")], QUERY, True),
        ([(b"host", b"[::1]:8642")], QUERY, True),
        ([HOST, (b"origin", b"http://127.0.0.1:8642")], QUERY, True),
        ([HOST, (b"cookie", b"other=1; dsmr-mlx-studio-8642=secret-token; x=y")], b"", True),
        ([HOST], b"", False),
        ([HOST], b"token=", False),
        ([HOST], b"token=secret-toke", False),
        ([HOST], b"token=secret-token2", False),
        ([HOST], b"token=secret-token&token=secret-token", False),
        ([HOST], b"token=\xff", False),
        ([HOST], b"&".join([b"a=1"] * 100) + b"&token=secret-token", False),
        ([HOST, (b"cookie", b"dsmr-mlx-studio-8643=secret-token")], b"", False),
        ([HOST, (b"cookie", b"dsmr-mlx-studio-8642=wrong")], b"", False),
        ([HOST, (b"cookie", b"\xff\xfe=;;;===")], b"", False),
        ([], QUERY, False),
        ([HOST, HOST], QUERY, False),
        ([(b"host", b"evil.example:8642")], QUERY, False),
        ([(b"host", b"127.0.0.1")], QUERY, False),
        ([(b"host", b"127.0.0.1:8643")], QUERY, False),
        ([(b"host", b"192.168.1.5:8642")], QUERY, False),
        ([HOST, (b"origin", b"http://evil.example")], QUERY, False),
        ([HOST, (b"origin", b"null")], QUERY, False),
        ([HOST, (b"origin", b"https://127.0.0.1:8642")], QUERY, False),
        ([HOST, (b"origin", b"http://localhost:8642")], QUERY, False),
        ([HOST, (b"origin", b"http://127.0.0.1:8642"), (b"origin", b"http://evil.example")], QUERY, False),
        ([HOST, COOKIE, (b"origin", b"http://127.0.0.1:9999")], b"", False),
    ],
)
def test_who_is_answered(headers, query, allowed):
    assert GUARD.allows(headers, query) is allowed


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (b"192.168.1.5:8642", True),
        (b"[fe80::1]:8642", True),
        (b"evil.example:8642", False),
        (b"192.168.1.5:80", False),
        (b"192.168.1.5", False),
        (b"]:8642", False),
        (b"", False),
    ],
)
def test_on_a_network_every_address_is_its_own_but_no_name(host, allowed):
    assert Guard("secret-token", "0.0.0.0", 8642, network=True).allows([(b"host", host)], QUERY) is allowed


@pytest.mark.parametrize(("port", "allowed"), [(80, True), (8642, False)])
def test_browsers_leave_out_the_usual_port(port, allowed):
    guard = Guard("secret-token", "::1", port)
    for host in (b"127.0.0.1", b"localhost", b"[::1]"):
        assert guard.allows([(b"host", host)], QUERY) is allowed
        assert guard.allows([(b"host", host), (b"origin", b"http://" + host)], QUERY) is allowed
        assert not guard.allows([(b"host", host), (b"origin", b"http://evil.example")], QUERY)
    network = Guard("secret-token", "0.0.0.0", port, network=True)
    assert network.allows([(b"host", b"192.168.1.5")], QUERY) is allowed
    assert network.allows([(b"host", b"[fe80::1]")], QUERY) is allowed
    assert not network.allows([(b"host", b"evil.example")], QUERY)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("::1", "[::1]"),
        ("fe80::1", "[fe80::1]"),
        ("0.0.0.0", "192.168.1.5"),
        ("::", "[2001:db8::5]"),
    ],
)
def test_the_address_is_one_that_can_be_opened(host, shown, monkeypatch):
    own = {socket.AF_INET: "192.168.1.5", socket.AF_INET6: "2001:db8::5"}
    monkeypatch.setattr(security, "own_address", own.get)
    guard = Guard("secret-token", host, 8642, network=True)
    assert guard.address == f"http://{shown}:8642/?token=secret-token"
    assert guard.allows([(b"host", f"{shown}:8642".encode())], QUERY)


def test_the_address_of_this_computer():
    assert ipaddress.IPv4Address(security.own_address(socket.AF_INET))
    assert ipaddress.IPv6Address(security.own_address(socket.AF_INET6).partition("%")[0])


def test_the_token_is_kept_and_secret(tmp_path):
    token = kept_token(tmp_path)
    path = tmp_path / ".token"
    assert TOKEN.fullmatch(token)
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept_token(tmp_path) == token
    path.chmod(0o644)  # others may have read it
    assert (other := kept_token(tmp_path)) != token
    for content in ("short", "x" * 5000, "\x00" * 43):
        path.write_text(content)
        assert kept_token(tmp_path) not in (token, other, content)
    path.unlink()
    (tmp_path / "elsewhere").write_text(token)
    path.symlink_to(tmp_path / "elsewhere")
    assert kept_token(tmp_path) != token
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("partial")] == []


def test_headers_allow_only_own_files():
    headers = dict(GUARD.headers)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "HttpOnly" in GUARD.set_cookie
    assert "SameSite=Strict" in GUARD.set_cookie
