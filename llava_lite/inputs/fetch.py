"""Download an image from a URL without being led where it must not go.

Every hop of a redirect is resolved, checked against private addresses, and connected to by the
address that was checked, so a name cannot change its meaning in between. Bytes and time are capped.
"""

import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import Image

from llava_lite.errors import ImageError, one_line

MAX_BYTES = 64 * 2**20
MAX_REDIRECTS = 5
_REDIRECT_STATUS = (301, 302, 303, 307, 308)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class Limits(NamedTuple):
    """What a source may cost and reach."""

    allow_urls: bool
    allow_private: bool
    timeout: float
    max_bytes: int
    domains: tuple[str, ...] | None = None  # None: any; "*.example.org": all below it

    def allows_host(self, host: str) -> bool:
        """Whether a host name may be asked, as far as names go."""
        if self.domains is None:
            return True
        host = host.lower().rstrip(".")
        return any(
            host.endswith(domain[1:]) if domain.startswith("*.") else host == domain
            for domain in self.domains
        )


# ---- names for messages -------------------------------------------------------------------------


def describe(source: Any) -> str:
    """A short name for messages: no image data, no credentials, no query of a URL."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"{source.partition(',')[0][:40]},... ({len(source)} characters)"
    if isinstance(source, str) and SCHEME.match(source):
        scheme, rest = source.split("://", 1)
        location = re.split(r"[?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        return shorten(f"{scheme}://{location}")
    if isinstance(source, (str, os.PathLike)):
        return shorten(str(os.fspath(source)))
    if isinstance(source, Image.Image):
        return shorten(str(getattr(source, "filename", "") or "<PIL image>"))
    file_name = getattr(source, "name", None)  # of a file object
    return shorten(file_name) if isinstance(file_name, str) else f"<{type(source).__name__}>"


def shorten(text: str, limit: int = 200) -> str:
    """One printable line: names and servers must not get control characters into a terminal."""
    text = "".join(character if character.isprintable() else "?" for character in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# ---- URLs --------------------------------------------------------------------------------------


class _Redirect(NamedTuple):
    url: str


def fetch(url: str, name: str, limits: Limits) -> bytes:
    """Body of a URL; every hop is resolved, checked and connected to by its checked address."""
    if not limits.allow_urls:
        raise ImageError(f"{name}: image URLs are switched off here")
    deadline = time.monotonic() + limits.timeout
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = _get(url, name, limits, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _check_deadline(name, limits, deadline)
            raise ImageError(f"{name}: cannot be fetched: {shorten(one_line(error))}") from error
        if isinstance(response, bytes):
            return response
        url = response.url
    raise ImageError(f"{name}: more than {MAX_REDIRECTS} redirects")


def _check_deadline(name: str, limits: Limits, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise ImageError(f"{name}: timed out after {limits.timeout:g} s")


def _get(url: str, name: str, limits: Limits, deadline: float) -> bytes | _Redirect:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageError(f"{name}: leads to {describe(url)}, which is no http(s) URL")
    host = parts.hostname if ":" in parts.hostname else parts.hostname.encode("idna").decode()
    if not limits.allows_host(host):
        raise ImageError(f"{name}: leads to {shorten(host)}, a domain that is not allowed here")
    secure = parts.scheme == "https"
    default_port = 443 if secure else 80
    port = parts.port or default_port
    connection = http.client.HTTPConnection(host, port)
    with _connect(host, port, name, limits, deadline) as raw, _watchdog(raw, deadline) as guard:
        sock = _wrap_tls(raw, host, guard) if secure else raw
        with sock:
            connection.sock = sock
            authority = f"[{host}]" if ":" in host else host
            headers = {
                "Host": authority if port == default_port else f"{authority}:{port}",
                "User-Agent": "llava_lite",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            }
            connection.request("GET", _request_target(parts), headers=headers)
            with connection.getresponse() as response:
                location = response.headers.get("Location")
                if response.status in _REDIRECT_STATUS and location:
                    return _Redirect(urllib.parse.urljoin(url, location))
                return _read_body(response, name, limits, deadline)


def _request_target(parts: urllib.parse.SplitResult) -> str:
    """Path and query with everything quoted that may not stand in a request line."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return urllib.parse.quote(target, safe="%/:=&?~#+!$,;'@()*[]")


def _read_body(
    response: http.client.HTTPResponse, name: str, limits: Limits, deadline: float
) -> bytes:
    if response.status != 200:
        raise ImageError(f"{name}: HTTP status {response.status}")
    expected = response.length  # None without a Content-Length
    if expected is not None and expected > limits.max_bytes:
        raise ImageError(f"{name}: {expected} bytes exceed the limit of {limits.max_bytes}")
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > limits.max_bytes:
            raise ImageError(f"{name}: more than {limits.max_bytes} bytes")
        _check_deadline(name, limits, deadline)
    # A connection cut by the watchdog looks like the end of a body.
    _check_deadline(name, limits, deadline)
    if expected is not None and len(body) < expected:
        raise ImageError(f"{name}: the connection ended after {len(body)} of {expected} bytes")
    return bytes(body)


def _connect(host: str, port: int, name: str, limits: Limits, deadline: float) -> socket.socket:
    """Connect to an address that was checked: resolving again later could give another one."""
    candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in candidates:
        if not limits.allow_private and not _is_public(str(address[0])):
            raise ImageError(f"{name}: {host} is at the non-public address {address[0]}, refused")
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in candidates:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _is_public(address: str) -> bool:
    """Neither private, loopback, link-local, reserved nor multicast, also when wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    inner = [address for address in wrapped if address is not None]
    if inner:
        return all(address.is_global and not address.is_multicast for address in inner)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Guard:
    """The socket that the watchdog has to cut."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            # Unbound, because SSLSocket.shutdown drops its TLS state under the reading thread.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


@contextlib.contextmanager
def _watchdog(sock: socket.socket, deadline: float) -> Iterator[_Guard]:
    """Cut the connection at the deadline: socket timeouts start anew with every byte received."""
    guard = _Guard(sock)
    timer = threading.Timer(max(deadline - time.monotonic(), 0.0), guard.cut)
    timer.daemon = True
    timer.start()
    try:
        yield guard
    finally:
        timer.cancel()


def _wrap_tls(raw: socket.socket, host: str, guard: _Guard) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    sock = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
    guard.sock = sock
    sock.do_handshake()
    return sock
