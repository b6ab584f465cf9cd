"""Download an image from a URL, safe against requests to internal addresses (SSRF).

Every redirect is resolved and checked for private addresses. The connection uses the checked
address, so a second resolution cannot change it. Bytes and time are limited.
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
    """Limits of one source."""

    allow_urls: bool
    allow_private: bool
    timeout: float
    max_bytes: int
    domains: tuple[str, ...] | None = None  # None: any domain; "*.example.org": all below it

    def allows_host(self, host: str) -> bool:
        """Whether the domains allow a host name."""
        if self.domains is None:
            return True
        host = host.lower().rstrip(".")
        return any(
            host.endswith(domain[1:]) if domain.startswith("*.") else host == domain
            for domain in self.domains
        )


# ---- names for messages -------------------------------------------------------------------------


def describe(source: Any) -> str:
    """A short name of a source for messages, without data, credentials or the query of a URL."""
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
    """One printable line: no control characters from names and servers reach a terminal."""
    text = "".join(character if character.isprintable() else "?" for character in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# ---- URLs --------------------------------------------------------------------------------------


class _Redirect(NamedTuple):
    url: str


def fetch(url: str, name: str, limits: Limits) -> bytes:
    """The body of a URL. Every redirect is resolved and checked. Raises ImageError."""
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
        raise ImageError(f"{name}: leads to {describe(url)}, which is not an http(s) URL")
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
    """Path and query, quoted for a request line."""
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
    """Connect to a checked address. Resolving the name again could give another address."""
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
    """Whether an address is public: not private, loopback, link-local, reserved or multicast, also
    inside an IPv6 address."""
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
    """The socket that the watchdog cuts."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            # Unbound: SSLSocket.shutdown drops the TLS state while another thread reads.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


@contextlib.contextmanager
def _watchdog(sock: socket.socket, deadline: float) -> Iterator[_Guard]:
    """Cut the connection at the deadline: a socket timeout restarts with every received byte."""
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
