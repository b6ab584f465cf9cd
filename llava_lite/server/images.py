"""Image sources become small pictures: data URLs and, if allowed, http(s) URLs and files.

Only the square that the model sees is kept of an image, at 336 px a third of a megabyte. Error
messages name an image by its number; they never show a path of the server.
"""

import logging
import math
import urllib.parse

from PIL import Image

from llava_lite.config import LlavaConfig
from llava_lite.errors import ImageError
from llava_lite.inputs.fetch import SCHEME, Limits, describe, fetch
from llava_lite.inputs.images import load_image
from llava_lite.inputs.pixels import colors_of, to_square
from llava_lite.server.settings import Settings

LOG = logging.getLogger("llava_lite.server")
NOT_FOUND = "no such file below the media root"
NOT_FETCHED = "not an image that can be fetched from here; send a data URL"


def is_remote(source: str) -> bool:
    """Whether the source is an http(s) URL."""
    scheme = SCHEME.match(source)
    return scheme is not None and scheme[1].lower() in ("http", "https")


def fetch_image(source: str, settings: Settings) -> bytes:
    """The bytes of a URL. On every redirect the domain must be allowed and the address public.

    Raises ImageError without details: clients must not explore the internal network. The log has
    the details."""
    name = describe(source)
    if not settings.url_domains:
        raise ImageError(f"{name}: image URLs are switched off here, send a data URL")
    limits = Limits(
        True, False, settings.url_timeout, settings.max_image_bytes, settings.url_domains
    )
    try:
        return fetch(source, name, limits)
    except ImageError as error:
        LOG.info("an image was not fetched: %s", error)
        raise ImageError(f"{name}: {NOT_FETCHED}") from None


def open_image(
    source: str | bytes, settings: Settings, config: LlavaConfig, exif: bool
) -> Image.Image:
    """The square picture that the model sees of a data URL, a file, or the bytes of an image.

    Raises ImageError."""
    try:
        return square_picture(source, settings, config, exif)
    except ImageError as error:
        message = str(error)
    # A new error: the frames of the first one keep the pixels until the request ends.
    raise ImageError(message)


def square_picture(
    source: str | bytes, settings: Settings, config: LlavaConfig, exif: bool
) -> Image.Image:
    """`open_image`, with errors that keep the pixels."""
    if isinstance(source, str) and source[:5].lower() != "data:":
        source = read_file(source, settings)
    image = load_image(
        source,
        exif=exif,
        max_pixels=settings.max_pixels,
        allow_urls=False,
        max_bytes=settings.max_image_bytes,
    )
    width, height = image.size
    if max(image.size) > settings.max_side:
        raise ImageError(
            f"the image is {width}x{height}, a side may have {settings.max_side} pixels"
        )
    # Padding turns a strip of few pixels into a square of many.
    side, color = math.isqrt(settings.max_pixels), colors_of(config).background
    return to_square(image, config.vision.image_size, config.pad, side, color)


def read_file(source: str, settings: Settings) -> bytes:
    """The bytes of a file below the media root: an absolute path or a path relative to the root,
    with or without `file://`. Raises the same ImageError for a file outside and a missing file."""
    scheme = SCHEME.match(source)
    if scheme is not None and scheme[1].lower() != "file":
        raise ImageError(f"URLs with the scheme {scheme[1][:20]!r} are not supported")
    if settings.media_root is None:
        raise ImageError("files are switched off here, send a data URL")
    name = source if scheme is None else urllib.parse.unquote(source[scheme.end() :])
    root = settings.media_root.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file():  # a pipe would never end
            raise ImageError(NOT_FOUND)
        with open(path, "rb") as file:
            data = file.read(settings.max_image_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a null byte, a loop
        raise ImageError(NOT_FOUND) from error
    if len(data) > settings.max_image_bytes:
        raise ImageError(f"more than {settings.max_image_bytes} bytes")
    return data
