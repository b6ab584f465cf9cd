"""Every image source, every bad one, URLs that reach too far, and bit-exact pixel values."""

import base64
import hashlib
import http.server
import io
import json
import queue
import re
import socket
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

import llava_lite.inputs.fetch as fetch_module
import llava_lite.inputs.images as image_module
from helpers.examples import examples
from helpers.models import TINY_CONFIG
from helpers.peers import peer
from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.errors import ImageError
from llava_lite.inputs.images import FORMATS, load_image, to_rgb
from llava_lite.inputs.pixels import (
    load_pixels,
    load_square,
    pad_to_square,
    preprocess,
    to_square,
)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PIXELS = noise(9, 5)
PICTURE = Image.fromarray(PIXELS)
PNG = encoded(PICTURE)


def same(image: Image.Image, pixels: np.ndarray = PIXELS) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


# ---- sources -----------------------------------------------------------------------------------


def test_files_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    assert same(load_image(str(path)))
    assert same(load_image(path))
    assert same(load_image(PNG))
    assert same(load_image(bytearray(PNG)))
    assert same(load_image(io.BytesIO(PNG)))
    assert same(load_image(PICTURE))
    with open(path, "rb") as file:
        assert same(load_image(file))


def test_data_urls() -> None:
    base = base64.b64encode(PNG).decode()
    assert same(load_image(f"data:image/png;base64,{base}"))
    assert same(load_image(f"DATA:;BASE64,{base[:20]}\n{base[20:]}", allow_urls=False))
    assert same(load_image("data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)))


def test_percent_signs_in_data_urls() -> None:
    data = encoded(Image.fromarray(PIXELS))
    for quoted in (
        quote(data),
        quote(base64.b64encode(data) + b"\n"),
        "%00a%zz%%41%",
        "%",
        "%4",
        "a%4F",
    ):
        assert image_module._unquote(quoted.encode()) == unquote_to_bytes(quoted)
    assert same(load_image("data:image/png," + quote(data)))
    assert same(load_image("data:image/png;base64," + quote(base64.b64encode(data) + b"\n")))


def test_data_urls_take_memory_in_proportion() -> None:
    """Neither percent signs nor white space cost an object each."""
    for piece in ("%", "a ", "a%20"):
        for header in ("data:image/png;base64,", "data:image/png,"):
            url = header + piece * (2**20 // len(piece))
            tracemalloc.start()
            with pytest.raises(ImageError):
                load_image(url, max_bytes=2**20)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 20 * 2**20


def test_base64_that_is_too_long_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module.base64, "b64decode", None)
    refused("data:image/png;base64," + "A" * 137, "more than 100 bytes", max_bytes=100)


def test_jpegs_of_very_many_scans_are_refused() -> None:
    image = Image.fromarray(PIXELS)
    data = encoded(image, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan, scans = data[start:-2], image_module._count_scans(data)
    assert data.endswith(b"\xff\xd9") and 5 < scans < 20
    more = 100 - scans
    assert load_image(data[:-2] + scan * more + b"\xff\xd9").size == image.size
    refused(data[:-2] + scan * (more + 1) + b"\xff\xd9", "a JPEG of more than 100 scans")
    fill = scan.replace(b"\xff\xda", b"\xff\xff\xff\xda")
    refused(data[:-2] + fill * (more + 1) + b"\xff\xd9", "a JPEG of more than 100 scans")
    # What follows the end is no scan, nor is what stands in a segment, such as a thumbnail.
    comment = b"\xff\xfe" + (2 + 2 * 300).to_bytes(2, "big") + b"\xff\xda" * 300
    assert load_image(data[:2] + comment + data[2:] + b"\xff\xda" * 300).size == image.size


def test_arrays_and_tensors() -> None:
    assert same(load_image(PIXELS))
    assert same(load_image(PIXELS[:, ::-1]), PIXELS[:, ::-1])  # not contiguous
    gray = PIXELS[:, :, 0]
    replicated = np.stack([gray] * 3, axis=-1)
    assert same(load_image(gray), replicated)
    assert same(load_image(gray[:, :, None]), replicated)
    assert same(load_image(noise(9, 5, 4)), noise(9, 5, 4)[:, :, :3])
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert same(load_image(tensor))
    for dtype in (torch.float32, torch.float64):
        assert same(load_image(tensor.to(dtype) / 255))
    assert same(load_image(tensor[:1]), replicated)


def test_loading_leaves_the_source_alone() -> None:
    image = Image.open(io.BytesIO(encoded(PICTURE.convert("P"), transparency=0)))
    load_image(image)
    assert image.mode == "P" and image.info["transparency"] == 0
    result = load_image(PICTURE)
    result.putpixel((0, 0), (1, 2, 3))
    assert same(PICTURE)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str) -> None:
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(PICTURE, format, **lossless)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert same(load_image(data), np.asarray(expected))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_convert_as_pil_does(mode: str) -> None:
    via = {"LAB": "RGB", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGBA")
    source = Image.fromarray(noise(20, 10, 4)).convert(via)
    if mode == "LAB":
        source = Image.frombytes("LAB", source.size, source.tobytes())
    else:
        source = source.convert(mode)
    assert source.mode == mode
    assert same(load_image(source), np.asarray(source.convert("RGB")))


def test_grey_is_replicated_and_alpha_dropped_not_composited() -> None:
    transparent = noise(4, 3, 4)
    transparent[:, :, 3] = 0
    assert same(load_image(encoded(Image.fromarray(transparent))), transparent[:, :, :3])
    grey_alpha = Image.fromarray(transparent).convert("LA")
    gray = np.asarray(grey_alpha)[:, :, 0]
    assert same(load_image(encoded(grey_alpha)), np.stack([gray] * 3, axis=-1))


def test_deep_grey_is_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 100, 255, 256, 600, 65535]], dtype=np.uint16))
    assert deep.mode == "I;16"
    for source in (deep, encoded(deep)):
        assert np.asarray(load_image(source))[0, :, 1].tolist() == [0, 100, 255, 255, 255, 255]
    integers = Image.fromarray(np.array([[-5, 7, 300]], dtype=np.int32))
    floats = Image.fromarray(np.array([[-5.0, 7.0, 300.0]], dtype=np.float32))
    for source in (integers, floats):
        assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 7, 255]


def test_palette_transparency_is_ignored_without_a_warning() -> None:
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    expected = np.asarray(palette.convert("RGB"))
    for transparency in (0, bytes(range(256))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(load_image(encoded(palette, transparency=transparency)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, "PNG", exif=exif)
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS, 1),
    }[orientation]
    assert same(load_image(data), upright)
    stored = load_image(data, exif=False)
    assert same(stored)
    for exif in (True, False):  # loaded once, it carries nothing that would turn it later
        assert same(load_image(stored, exif=exif))
        assert same(load_image(load_image(data), exif=exif), upright)


def test_damaged_exif_does_not_cost_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF header")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    assert same(load_image(PNG))


# ---- bad sources -------------------------------------------------------------------------------


def refused(source: Any, message: str, **options: Any) -> str:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(source, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "missing.png", r"missing\.png: No such file")
    refused(str(tmp_path), f"{re.escape(str(tmp_path))}: ")
    refused("", "empty string")
    refused("nul\0byte.png", r"nul\?byte")
    refused("x" * 5000, r"xxx\.\.\.: ")
    locked = tmp_path / "locked.png"
    locked.write_bytes(PNG)

    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # Whoever runs the tests as root may read every file.
    monkeypatch.setattr("builtins.open", deny)
    refused(locked, r"locked\.png: Permission denied")


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("just text, long enough to look like something")
    refused(path, r"notes\.png: not an image, or an unsupported format .*JPEG, PNG")
    path.write_bytes(b"")
    refused(path, r"notes\.png: the file is empty")
    refused(b"", "<0 bytes>: the file is empty")
    refused(b"GIF89a", "<6 bytes>: ")
    for source in (5, None, object(), ["a.png"]):
        refused(source, f"<{type(source).__name__}>: not an image source")
    refused(io.StringIO("text"), "StringIO.*binary")


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "TGA"])
def test_unsupported_formats(format: str) -> None:
    refused(encoded(PICTURE, format), "unsupported format")


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(tmp_path: Path, format: str) -> None:
    data = encoded(Image.fromarray(noise(60, 40)), format)
    path = tmp_path / "cut.img"
    for length in (1, 8, 20, 60, len(data) // 4, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        refused(path, r"cut\.img: ")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_truncated_image_opened_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(Image.fromarray(noise(60, 40)), "JPEG")[:-500])
    with Image.open(path) as image:
        refused(image, r"cut\.jpg: .*truncated")


def test_damaged_data_urls() -> None:
    refused("data:image/png;base64", "needs a comma")
    refused("data:,", "empty")
    refused("data:image/png;base64,!!!!", "damaged base64")
    base = base64.b64encode(PNG * 1000).decode()
    text = refused(f"data:image/png;base64,{base[:-5]}", r"data:image/png;base64,\.\.\. \(\d+ char")
    assert base[:40] not in text
    refused(f"data:image/png;base64,{base}", "more than 1000 bytes", max_bytes=1000)
    refused(io.BytesIO(PNG), "more than 50 bytes", max_bytes=50)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), "uint8 .4, 4, 2."),
        (np.zeros((3, 4, 4), np.float32), "float32 .3, 4, 4."),
        (np.zeros((1, 4, 4, 3), np.uint8), "uint8 .1, 4, 4, 3."),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8)[:, :, :2].permute(2, 0, 1), r"got \(2, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"got \(1, 3, 4, 4\)"),
        (torch.zeros(3, 0, 4), "has no pixels"),
        (torch.full((3, 2, 2), 1.5), r"0\.\.1, got 1\.5\.\.1\.5"),
        (torch.full((3, 2, 2), -0.1), r"0\.\.1, got -0\.1"),
        (torch.full((3, 2, 2), float("nan")), r"0\.\.1, got nan"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "got torch.int64"),
        (Image.new("RGB", (0, 5)), "0x5, it has no pixels"),
    ],
)
def test_unusable_arrays(source: Any, message: str) -> None:
    refused(source, message)


def bmp_header(width: int, height: int) -> bytes:
    """A BMP that promises pixels it does not hold."""
    header = io.BytesIO(encoded(Image.new("RGB", (1, 1)), "BMP"))
    data = bytearray(header.getvalue())
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("side", [8001, 9500, 14000, 60000])
def test_size_is_checked_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, between and beyond PIL's own two limits; none of them surfaces."""

    def decode(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(bmp_header(side, side), "pixels")
    assert Image.MAX_IMAGE_PIXELS == limit


def test_pixel_limit_is_exact() -> None:
    assert load_image(PNG, max_pixels=45).size == (9, 5)
    for source in (PNG, PICTURE, PIXELS):
        refused(source, "9x5 = 45 pixels exceed the limit of 44", max_pixels=44)


# ---- URLs --------------------------------------------------------------------------------------


HEADER_LINES = 90  # http.client gives up at 100


class Handler(http.server.BaseHTTPRequestHandler):
    """`/status` and `/to` answer as their query says; the other paths misbehave by name."""

    seen: list[str] = []
    drips: queue.Queue[int] = queue.Queue()
    dripped = 0

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        self.seen.append(self.path)
        path, _, query = self.path.partition("?")
        try:
            if path == "/ok.png":
                self.answer(200, {"Content-Length": str(len(PNG))}, PNG)
            elif path == "/stream.png":
                self.answer(200, {}, PNG)
            elif path == "/to":
                self.answer(302, {"Location": query})
            elif path == "/hop":
                left = int(query)
                target = f"/hop?{left - 1}" if left > 1 else "/ok.png"
                self.answer(301, {"Location": target})
            elif path == "/loop":
                self.answer(307, {"Location": "/loop"})
            elif path == "/status":
                self.answer(int(query), {}, b"gone")
            elif path == "/announced":
                self.answer(200, {"Content-Length": "999999999"}, b"x")
            elif path == "/short":
                self.answer(200, {"Content-Length": str(len(PNG))}, PNG[:-20])
            elif path == "/endless":
                self.answer(200, {})
                while True:
                    self.wfile.write(bytes(4096))
            elif path == "/drip":
                self.answer(200, {})
                for byte in PNG:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            elif path == "/drip-header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for self.dripped in range(HEADER_LINES):
                    self.wfile.write(b"X-A: b\r\n")
                    time.sleep(0.05)
            elif path == "/silent":
                time.sleep(2)
            elif path == "/garbage":
                self.wfile.write(b"\x00\x01\x02\r\n\r\n")
            else:
                self.answer(200, {}, b"<html>hello</html>")
        except OSError:
            pass  # the client went away, as it should
        finally:
            if path == "/drip-header":
                self.drips.put(self.dripped)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        httpd.block_on_close = False
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def fetch(url: str, **options: Any) -> Image.Image:
    return load_image(url, allow_private=True, **options)


def test_urls(server: str) -> None:
    assert same(fetch(f"{server}/ok.png"))
    assert same(fetch(f"{server}/stream.png"))
    assert same(fetch(server.replace("http", "HTTP") + "/ok.png?a=b c&d=é#part"))
    assert Handler.seen[-1] == "/ok.png?a=b%20c&d=%C3%A9"
    assert same(fetch(server.replace("127.0.0.1", "localhost") + "/ok.png"))
    assert same(fetch(f"{server}/hop?5"))
    assert same(fetch(f"{server}/to?{server}/ok.png"))


def test_bad_answers(server: str) -> None:
    def fails(path: str, message: str, **options: Any) -> None:
        refused(f"{server}{path}", message, allow_private=True, **options)

    fails("/status?404", "/status: HTTP status 404")
    fails("/status?302", "HTTP status 302")
    fails("/page.html", "not an image")
    fails("/loop", "more than 5 redirects")
    fails("/hop?6", "more than 5 redirects")
    fails("/to?ftp://example.com/a.png", "leads to ftp://example.com/a.png")
    fails("/to?file:///etc/passwd", "leads to file:///etc/passwd")
    fails("/to?http://[::1", "cannot be fetched")
    fails("/announced", "999999999 bytes exceed the limit of 1000", max_bytes=1000)
    fails("/endless", "more than 100000 bytes", max_bytes=100_000)
    fails("/short", r"ended after \d+ of \d+ bytes")
    fails("/garbage", "cannot be fetched")


@pytest.mark.parametrize("path", ["/silent", "/drip"])
def test_timeout_covers_the_whole_transfer(server: str, path: str) -> None:
    refused(f"{server}{path}", r"timed out after 0\.3 s", allow_private=True, timeout=0.3)


def test_timeout_cuts_the_connection_while_bytes_still_come(server: str) -> None:
    """A socket timeout alone starts anew with every byte, and would sit through all the headers."""
    refused(f"{server}/drip-header", "timed out", allow_private=True, timeout=0.3)
    assert 0 < Handler.drips.get(timeout=30) < HEADER_LINES - 1


def test_unreachable_and_malformed_urls(server: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        refused(f"http://127.0.0.1:{port}/", "cannot be fetched", allow_private=True)
    refused("http://[::1", "Invalid IPv6")
    refused("http://host:99999/", "Port out of range")
    refused("http:///path", "not an http")
    refused("ftp://host/a.png", "unsupported URL scheme 'ftp'")
    refused("file:///etc/passwd", "unsupported URL scheme 'file'")
    refused(f"{server}/ok.png", "switched off", allow_private=True, allow_urls=False)


def test_messages_hold_no_credentials(server: str) -> None:
    address = server.removeprefix("http://")
    text = refused(f"http://name:word@{address}/status?404&token=hidden", "status", timeout=5)
    assert "word" not in text and "hidden" not in text


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0.0.0.0", "169.254.169.254", "10.1.2.3"]
)
def test_private_addresses_are_refused_before_any_request(server: str, host: str) -> None:
    before = len(Handler.seen)
    port = server.rpartition(":")[2]
    refused(f"http://{host}:{port}/ok.png", "non-public address .*, refused")
    assert len(Handler.seen) == before


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("192.168.0.1", False),
        ("172.16.0.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert fetch_module._is_public(address) is public


@pytest.fixture()
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 127.0.0.1, so that the local server can play a public host."""
    really = fetch_module._is_public
    monkeypatch.setattr(
        fetch_module, "_is_public", lambda address: address == "127.0.0.1" or really(address)
    )


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("target", ["127.0.0.2", "169.254.169.254", "[::1]"])
def test_redirect_to_a_private_address_is_refused(server: str, target: str) -> None:
    assert same(load_image(f"{server}/ok.png"))
    port = server.rpartition(":")[2]
    refused(f"{server}/to?http://{target}:{port}/ok.png", "non-public address")
    assert Handler.seen[-1].startswith("/to?")


@pytest.mark.usefixtures("loopback_is_public")
def test_the_checked_address_is_the_one_connected_to(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that changes its answer after the check gets no second question."""
    answers = ["127.0.0.1", "127.0.0.2"]
    port = int(server.rpartition(":")[2])

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (answers.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert same(load_image(f"http://rebinding.example:{port}/ok.png"))
    assert answers == ["127.0.0.2"]
    refused(f"http://rebinding.example:{port}/ok.png", "rebinding.example is at the non-public")


@pytest.mark.usefixtures("loopback_is_public")
def test_one_private_address_among_several_is_enough(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(server.rpartition(":")[2])
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))
        for address in ("127.0.0.1", "10.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    refused(f"http://mixed.example:{port}/ok.png", "non-public address 10.0.0.1")


def test_https_checks_the_certificate(server: str) -> None:
    """A plain HTTP server cannot pass for a TLS one."""
    refused(server.replace("http", "https") + "/ok.png", "cannot be fetched", allow_private=True)


# ---- pixel values ------------------------------------------------------------------------------


def test_padding_centres_with_the_rest_at_the_end() -> None:
    wide = np.asarray(pad_to_square(Image.fromarray(noise(5, 2))))
    assert wide.shape == (5, 5, 3)
    assert np.array_equal(wide[1:3], noise(5, 2))
    assert (wide[[0, 3, 4]] == (122, 116, 104)).all()
    tall = np.asarray(pad_to_square(Image.fromarray(noise(2, 5)), color=(1, 2, 3)))
    assert np.array_equal(tall[:, 1:3], noise(2, 5))
    assert (tall[:, [0, 3, 4]] == (1, 2, 3)).all()
    square = Image.fromarray(noise(4, 4))
    assert pad_to_square(square) is square


@pytest.mark.parametrize("pad", [True, False])
def test_shape_dtype_and_values(pad: bool) -> None:
    values = preprocess(Image.new("RGB", (30, 30), (255, 0, 128)), size=56, pad=pad)
    assert values.shape == (1, 3, 56, 56) and values.dtype == torch.float32
    assert values.is_contiguous()
    expected = torch.tensor(
        [
            (1.0 - 0.48145466) / 0.26862954,
            -0.4578275 / 0.26130258,
            (128 / 255 - 0.40821073) / 0.27577711,
        ]
    )
    torch.testing.assert_close(values, expected[None, :, None, None].expand(1, 3, 56, 56))


def test_other_modes_are_converted_first() -> None:
    gray = Image.fromarray(noise(30, 20)[:, :, 0])
    assert torch.equal(preprocess(gray), preprocess(gray.convert("RGB")))
    assert to_rgb(gray).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1), (40_000, 20)])
def test_extreme_shapes_need_no_giant_canvas(size: tuple[int, int]) -> None:
    strip = Image.new("RGB", size, (200, 30, 90))
    color = preprocess(Image.new("RGB", (2, 2), (200, 30, 90)), size=56)
    assert torch.equal(preprocess(strip, size=56, pad=False), color)
    padded = preprocess(strip, size=56)
    assert torch.equal(padded[..., 27, 27], color[..., 27, 27])
    assert not torch.equal(padded[..., 0, 0], color[..., 0, 0])


def test_both_ways_around_the_canvas_limit_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(448, 112)).resize((896, 224), Image.Resampling.BICUBIC)
    exact = [preprocess(image, size=56, pad=pad) for pad in (True, False)]
    monkeypatch.setattr("llava_lite.inputs.pixels._MAX_CANVAS_SIDE", 100)
    for pad, values in zip((True, False), exact, strict=True):
        # One or two of 256 levels: where the picture meets the border the kernels differ.
        inner = (preprocess(image, size=56, pad=pad) - values)[:, :, 24:32]
        assert inner.abs().max() < 3 / 255 / 0.26


def test_golden_pixel_values(shared: Path) -> None:
    from safetensors.torch import load_file

    folder = shared / "goldens" / "llava"
    tensors = load_file(folder / "preproc_goldens.safetensors")
    report = json.loads((folder / "preproc_goldens.json").read_text())
    cases = [c for c in report["cases"] if (folder / "preproc" / c["file"]).is_file()]
    assert len(cases) >= 5
    for case in cases:
        name, image = case["name"], load_image(folder / "preproc" / case["file"])
        assert hashlib.sha256(image.tobytes()).hexdigest() == case["rgb_sha256"]
        square = pad_to_square(image)
        assert hashlib.sha256(square.tobytes()).hexdigest() == case["square_sha256_rgb_bytes"]
        resized = square.resize((336, 336), Image.Resampling.BICUBIC)
        digest = hashlib.sha256(resized.tobytes()).hexdigest()
        assert digest == case["resized_uint8_sha256_hwc"]
        for way in ("pad", "nopad"):
            values = preprocess(image, pad=way == "pad")[0]
            sample = values.flatten()[tensors["sample_flat_index"].long()]
            assert torch.equal(sample, tensors[f"{name}.{way}.sample"]), (name, way)
            if f"{name}.{way}.full" in tensors:
                assert torch.equal(values, tensors[f"{name}.{way}.full"]), (name, way)


def test_golden_pixel_values_of_fastvlm(shared: Path) -> None:
    """A black square, bicubic, values in 0..1; or the center crop."""
    goldens = shared / "goldens"
    report = json.loads((goldens / "fastvlm/preproc/preproc_goldens.json").read_text())
    assert len(report["images"]) == 13
    config = LlavaConfig(vision=FastViTHDConfig())
    for name, facts in report["images"].items():
        places = (goldens / "fastvlm/preproc" / name, goldens / "llava/preproc" / name)
        file = next(place for place in places if place.is_file())
        image = load_image(file, exif=False)
        if hashlib.sha256(image.tobytes()).hexdigest() != facts["rgb_sha256"]:
            assert name.endswith(".jpg")  # another decoder
            continue
        for way, pad in (("pad", True), ("crop", False)):
            for size in (256, 1024):
                values = load_pixels(file, replace(config, pad=pad).at(size), exif=False)
                expected, levels = facts[f"{way}_{size}"], (values[0] * 255).round().byte()
                digest = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
                assert digest == expected["u8_chw_sha256"], (name, way, size)
                if "f32_sha256" in expected:
                    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
                    assert digest == expected["f32_sha256"], (name, way, size)


def test_fastvlm_keeps_all_levels_and_pads_with_black() -> None:
    config = LlavaConfig(vision=FastViTHDConfig(256))
    levels = np.arange(256, dtype=np.uint8)[None].repeat(256, 0)
    values = load_pixels(Image.fromarray(levels), config)
    assert torch.equal(values[0, 1, 7], torch.arange(256, dtype=torch.float32) / 255)
    white = load_pixels(Image.new("RGB", (256, 64), "white"), config)
    assert (white[..., :88, :] == 0).all() and (white[..., 112:144, :] == 1).all()
    cropped = load_pixels(Image.new("RGB", (256, 64), "white"), replace(config, pad=False))
    assert (cropped == 1).all()


def _import_image_processor() -> Any:
    """The PIL image processor of transformers, which imports torchvision.

    With a CPU-only torch, torchvision's compiled operators are missing; declaring them is enough.
    """
    transformers = peer("transformers")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _import_image_processor.library = library  # type: ignore[attr-defined]
    for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
        if hasattr(transformers, name):
            return getattr(transformers, name)
    pytest.skip("transformers has no PIL image processor for CLIP")


@pytest.fixture(scope="module")
def clip_processor() -> Callable[[Image.Image], torch.Tensor]:
    processor = _import_image_processor()(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return lambda image: processor(image, return_tensors="pt")["pixel_values"]


@examples(25, derandomize=True)
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 500), st.integers(1, 500)),
        st.sampled_from([(1, 1), (1, 47), (47, 1), (2, 3), (335, 337), (336, 336), (337, 336)]),
    ).filter(lambda size: max(size) <= 48 * min(size)),
    seed=st.integers(0, 99),
)
def test_parity_with_transformers(
    clip_processor: Callable[[Image.Image], torch.Tensor], size: tuple[int, int], seed: int
) -> None:
    image = Image.fromarray(noise(*size, seed=seed))
    assert torch.equal(preprocess(image, pad=False), clip_processor(image))
    assert torch.equal(preprocess(image, pad=True), clip_processor(pad_to_square(image)))


@pytest.mark.parametrize("pad", [True, False])
def test_a_square_of_the_right_size_is_not_worked_on_again(pad: bool) -> None:
    """The evaluation and the server open images in threads, and pass on squares."""
    config = replace(TINY_CONFIG, pad=pad)
    size = config.vision.image_size
    for width, height in ((90, 60), (60, 91), (size, size), (500, 3)):
        image = Image.fromarray(noise(width, height))
        square = load_square(image, config)
        assert square.size == (size, size) and to_square(square, size, pad) is square
        again = square.resize((size, size), Image.Resampling.BICUBIC)
        assert again.tobytes() == square.tobytes()
        pixels = load_pixels(image, config)
        assert torch.equal(pixels, preprocess(image, size, pad))
        assert torch.equal(pixels, load_pixels(square, config))
