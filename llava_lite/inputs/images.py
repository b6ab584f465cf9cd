"""Open an image from any source, hostile ones included: path, bytes, URL, array, tensor.

Bad input raises an ImageError that names the source. Pillow decodes; its global settings stay
unchanged."""

import base64
import contextlib
import io
import os
import re
import threading
import warnings
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from llava_lite.errors import ImageError, one_line
from llava_lite.inputs.fetch import MAX_BYTES, SCHEME, Limits, describe, fetch, shorten

# TIFF is left out: its decoder is by far the largest attack surface of the common formats.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000

# Encoders write about ten scans. Each costs a pass over all pixels, even a scan of few bytes.
_MAX_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # the end, and markers with a length
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

# The value of each character as a hexadecimal digit; 16 for all other characters.
_HEX_DIGITS = np.full(256, 16, np.uint8)
_HEX_DIGITS[np.frombuffer(b"0123456789abcdefABCDEF", np.uint8)] = (*range(16), *range(10, 16))
_WHITESPACE = b" \t\n\r\v\f"

# Pillow warns about large images through the filters of the process. Two threads must not replace
# them at once.
_WARNING_FILTERS = threading.Lock()


# ---- loading -----------------------------------------------------------------------------------


def load_image(
    source: Any,
    *,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    allow_urls: bool = True,
    allow_private: bool = False,
    timeout: float = 10.0,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Load an image as RGB.

    source: a path, bytes, a PIL image, a uint8 numpy array (H, W) or (H, W, 1 | 3 | 4), a tensor
        (1 | 3 | 4, H, W) of uint8 or of floats in 0..1, an http(s) URL, a data URL, or a binary
        file object.
    exif: apply the rotation in the metadata; LLaVA's scripts do not. The result has no metadata:
        loading it again does not rotate it again.
    max_pixels: checked before any pixel is decoded.
    allow_urls: http(s) URLs; data URLs are always allowed.
    allow_private: addresses that are not public, checked again on every redirect.
    timeout: seconds per URL, redirects included, name resolution excluded. Proxies are not used.
    max_bytes: of URLs, data URLs and file objects.

    Raises ImageError.
    """
    name = describe(source)
    limits = Limits(allow_urls, allow_private, timeout, max_bytes)
    try:
        return _load(source, name, limits, exif, max_pixels)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or shorten(one_line(error))}") from error
    except Exception as error:  # Pillow's parsers raise almost anything on damaged data
        raise ImageError(f"{name}: cannot be decoded: {shorten(one_line(error))}") from error


def _load(source: Any, name: str, limits: Limits, exif: bool, max_pixels: int) -> Image.Image:
    with contextlib.ExitStack() as files:
        image = _open_source(source, name, limits, files)
        _check_size(image, name, max_pixels)
        image.load()
        if exif:
            image = _turn_upright(image)  # not nested: the first image is freed here
        image = to_rgb(image)
        image.info.clear()
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy of an image in any PIL mode, as `Image.convert` makes it.

    Gray is replicated, alpha is dropped without compositing, 16-bit and float gray is clipped at
    255.
    """
    if "transparency" in image.info:
        # It never changes the RGB values, but Pillow warns about some forms.
        image = image.copy()
        del image.info["transparency"]
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _open_source(
    source: Any, name: str, limits: Limits, files: contextlib.ExitStack
) -> Image.Image:
    """The image of a source. Pixels are not decoded yet if that is possible."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Tensor):
        return _from_tensor(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_encoded(io.BytesIO(source), name)
    if isinstance(source, str) and not source:
        raise ImageError("the image source is an empty string")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open_encoded(io.BytesIO(_data_url_bytes(source, name, limits)), name)
    if isinstance(source, str) and (scheme := SCHEME.match(source)):
        if scheme[1].lower() not in ("http", "https"):
            raise ImageError(f"{name}: unsupported URL scheme {scheme[1]!r}, use http or https")
        return _open_encoded(io.BytesIO(fetch(source, name, limits)), name)
    if isinstance(source, (str, os.PathLike)):
        file = files.enter_context(open(source, "rb"))
        return _open_encoded(file if file.seekable() else _drain(file, name, limits), name)
    if hasattr(source, "read"):
        return _open_encoded(_drain(source, name, limits), name)
    raise ImageError(f"{name}: not an image source (path, URL, bytes, PIL image, array or tensor)")


def _open_encoded(file: BinaryIO, name: str) -> Image.Image:
    """Read the header only. Our limit of pixels replaces Pillow's, which is global and warns."""
    if not file.read(1):
        raise ImageError(f"{name}: the file is empty")
    file.seek(0)
    _check_scans(file, name)
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ImageError(
            f"{name}: not an image, or an unsupported format (supported: {known})"
        ) from error


def _check_scans(file: BinaryIO, name: str) -> None:
    """Refuse a JPEG with very many scans: it would take hours to decode."""
    if file.read(2) == b"\xff\xd8":
        data = b"\xff\xd8" + file.read()
        most = data.count(b"\xff\xda")  # also in thumbnails and after the end
        if most > _MAX_SCANS and _count_scans(data) > _MAX_SCANS:
            raise ImageError(f"{name}: a JPEG of more than {_MAX_SCANS} scans")
    file.seek(0)


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG, segment by segment, to the end of the image."""
    count, place = 0, 0
    while found := _JPEG_MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        count += marker == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return count


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is {width}x{height}, it has no pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} = {width * height} pixels exceed the limit of {max_pixels}"
        )


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF has no orientation; the pixels are fine
        return image


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    has_channels = array.ndim == 3 and shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or has_channels):
        raise ImageError(
            f"{name}: an array must be uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} {shape}"
        )
    if array.size == 0:
        raise ImageError(f"{name}: the array {shape} has no pixels")
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _from_tensor(tensor: Tensor, name: str) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ImageError(
            f"{name}: a tensor must be (C, H, W) with 1, 3 or 4 channels, got {tuple(tensor.shape)}"
        )
    if tensor.numel() == 0:
        raise ImageError(f"{name}: the tensor {tuple(tensor.shape)} has no pixels")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        low, high = tensor.min().item(), tensor.max().item()
        if not (0.0 <= low and high <= 1.0):  # also false for NaN
            raise ImageError(f"{name}: float values must lie in 0..1, got {low:g}..{high:g}")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ImageError(f"{name}: a tensor must be uint8 or float, got {tensor.dtype}")
    return _from_array(tensor.permute(1, 2, 0).numpy(), name)  # (H, W, C)


def _drain(file: Any, name: str, limits: Limits) -> io.BytesIO:
    data = file.read(limits.max_bytes + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: the file object is not opened in binary mode")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: more than {limits.max_bytes} bytes")
    return io.BytesIO(data)


def _data_url_bytes(url: str, name: str, limits: Limits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: a data URL needs a comma before its data")
    if len(payload) > 4 * limits.max_bytes:  # percent-encoding takes 3 characters for a byte
        raise ImageError(f"{name}: more than {limits.max_bytes} bytes")
    data = _unquote(payload.encode()) if "%" in payload else payload.encode()
    if header.lower().endswith(";base64"):
        data = data.translate(None, _WHITESPACE)
        if len(data) > 4 * -(-limits.max_bytes // 3):
            raise ImageError(f"{name}: more than {limits.max_bytes} bytes")
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ImageError(f"{name}: damaged base64 data: {error}") from error
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: more than {limits.max_bytes} bytes")
    return data


def _unquote(data: bytes) -> bytes:
    """`urllib.parse.unquote_to_bytes`, but without an object per percent sign."""
    values = np.frombuffer(data, np.uint8)
    digits = _HEX_DIGITS[values]
    escaped = (values[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16)
    [places] = np.nonzero(escaped)  # escapes cannot overlap: a percent sign is not a digit
    result, kept = values.copy(), np.ones(len(values), bool)
    result[places] = digits[places + 1] * 16 + digits[places + 2]
    kept[places + 1] = kept[places + 2] = False
    return result[kept].tobytes()
