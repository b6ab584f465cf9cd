"""The limits and permissions of a server."""

from dataclasses import dataclass, field
from pathlib import Path

from llava_lite.inputs.images import MAX_PIXELS
from llava_lite.reduction import Reduction

# The limit of JPEG. It refuses strips such as 1 x 1,000,000, which have few pixels.
MAX_SIDE = 65_535


@dataclass(frozen=True)
class Settings:
    """One server. Bytes, pixels and counts are upper limits, times are seconds.

    max_queue: waiting requests, including those in preparation. A request above it gets status 429.
        Also bounds the bodies in transfer: max_queue * max_body_bytes in all.
    max_batch_size: requests that the model runs at once.
    request_timeout: from the first byte of a request to the last byte of its answer.
    shutdown_timeout: for running requests to finish.
    max_pixels: of an image and of its padded square. A larger square is resized before padding.
    image_workers: images that are decoded at once.
    image_cache: encoded images that are kept for the next messages of a chat.
    url_domains: hosts for image URLs, none by default; "*.example.org" is all below it.
    media_root: folder for image files, none by default.
    allowed_hosts: host names of the server that browsers may use, None for any.

    Raises ValueError."""

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 64
    max_batch_size: int = 8
    request_timeout: float = 300.0
    body_timeout: float = 30.0
    shutdown_timeout: float = 30.0
    max_body_bytes: int = 32 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_pixels: int = MAX_PIXELS
    max_side: int = MAX_SIDE
    max_images: int = 8
    max_new_tokens: int = 2048
    image_workers: int = 2
    image_cache: int = 16
    url_domains: tuple[str, ...] = ()
    url_timeout: float = 10.0
    media_root: Path | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("the API key must be printable ASCII without spaces, and not empty")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ValueError(f"{self.media_root}: the media root is not a folder")
        for domain in self.url_domains:
            name = domain.removeprefix("*.")
            if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-."):
                raise ValueError(f"{domain!r} is not a domain such as images.example.org")
