"""`llava-lite serve`: its arguments, and what they mean for a server.

Imports nothing heavy: help and errors of usage come at once.
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_model_arguments,
    natural,
    port,
    positive,
)
from llava_lite.cli.console import INTERRUPTED, say
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.cli.wanted import load_model, parse_reduction
from llava_lite.errors import LlavaLiteError

if TYPE_CHECKING:
    from llava_lite.generation.model import Model
    from llava_lite.reduction import Reduction
    from llava_lite.server.settings import Settings

KEY_VARIABLE = "LLAVA_LITE_API_KEY"


LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


HELP = f"""\
POST /v1/chat/completions (text and image_url parts, stream), GET /v1/models, /health, /metrics.
Any OpenAI client reaches it as base_url http://HOST:PORT/v1. Without a temperature answers are
greedy. Extensions of a request: "top_k", and "reduction", the name of a preset (or "none").

Images are data URLs. URLs and files are refused unless a domain or a folder is allowed. Whoever
reaches the port may ask: set a key ({KEY_VARIABLE} or --api-key) before listening elsewhere
than on this machine, and put a proxy with TLS in front.

examples:
  llava-lite serve
  llava-lite serve -m weights/llava-1.5-7b --port 9000 --reduction hybrid-72-36
  {KEY_VARIABLE}=... llava-lite serve --host 0.0.0.0 --allow-url-domain images.example.org"""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """All but those of the model and of token reduction."""
    add_address(parser.add_argument_group("address"))
    add_sources(parser.add_argument_group("images"))
    add_limits(parser.add_argument_group("limits"))
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def add_address(group: argparse._ArgumentGroup) -> None:
    """Where it listens, and to whom."""
    group.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address (default: 127.0.0.1)"
    )
    group.add_argument(
        "--port", type=port, default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send (default: ${KEY_VARIABLE}, which other users of this "
        "machine cannot see in the list of processes)",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call it (default: its own name)"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may ask from a browser, such as http://localhost:3000; may be repeated",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further name of this machine that requests may carry, where it listens on this "
        "machine only and needs no key; may be repeated",
    )


def add_sources(group: argparse._ArgumentGroup) -> None:
    """Where images may come from."""
    group.add_argument(
        "--allow-url-domain",
        action="append",
        default=[],
        metavar="DOMAIN",
        help='host to fetch image URLs from, "*.example.org" is all below it; may be repeated',
    )
    group.add_argument(
        "--media-root", type=Path, metavar="DIR", help="folder whose files may be named as images"
    )
    group.add_argument(
        "--no-pad", action="store_true", help="crop the middle square instead of padding to one"
    )
    group.add_argument(
        "--no-exif", action="store_true", help="ignore the camera's rotation, as LLaVA does"
    )


def add_limits(group: argparse._ArgumentGroup) -> None:
    """How much of everything."""
    for name, default, text in (
        ("--max-batch-size", 8, "requests that the model answers at once"),
        ("--max-queue", 64, "requests that may wait; more get status 429"),
        ("--max-new-tokens", 2048, "longest answer that may be asked for"),
        ("--max-images", 8, "images of one request"),
        ("--max-image-mb", 20, "megabytes of one image as it is sent"),
        ("--max-body-mb", 32, "megabytes of one request"),
        ("--max-pixels", 64_000_000, "pixels of one image"),
        ("--image-workers", 2, "images that are decoded at once"),
        ("--request-timeout", 300, "seconds from a request's first byte to its answer's last"),
        ("--shutdown-timeout", 30, "seconds for what runs to finish at the end"),
    ):
        group.add_argument(
            name,
            type=positive,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        "--image-cache",
        type=natural,
        default=16,
        metavar="N",
        help="encoded images that are kept for the next turns of their chats, 0 for none "
        "(default: 16)",
    )


def require_packages() -> None:
    """Raises LlavaLiteError where the extra is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise LlavaLiteError(
            f"{' and '.join(missing)} must be installed: pip install 'llava-lite[serve]'"
        )


def read_settings(args: argparse.Namespace, reduction: "Reduction | None") -> "Settings":
    """What the arguments say; the model's name is still missing. Raises ValueError."""
    from llava_lite.server.run import is_loopback
    from llava_lite.server.settings import Settings

    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    local = is_loopback(args.host)
    # Other names than these reach a local server only from a page that plays tricks with names.
    hosts = (*LOCAL_NAMES, args.host, *map(str.lower, args.allow_host))
    return Settings(
        model_name=args.served_model_name or "",
        api_key=key,
        max_queue=args.max_queue,
        max_batch_size=args.max_batch_size,
        request_timeout=args.request_timeout,
        shutdown_timeout=args.shutdown_timeout,
        max_body_bytes=args.max_body_mb * 10**6,
        max_image_bytes=args.max_image_mb * 10**6,
        max_pixels=args.max_pixels,
        max_images=args.max_images,
        max_new_tokens=args.max_new_tokens,
        image_workers=args.image_workers,
        image_cache=args.image_cache,
        url_domains=tuple(domain.lower().rstrip(".") for domain in args.allow_url_domain),
        media_root=args.media_root,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=hosts if local and key is None else None,
        reduction=reduction,
    )


def run(args: argparse.Namespace, settings: "Settings", load: "Callable[[], Model]") -> int:
    """Load the model and serve it until a signal. Raises LlavaLiteError, ValueError."""
    from dataclasses import replace

    from llava_lite.fast.allocator import return_freed_pictures
    from llava_lite.server.app import create_app
    from llava_lite.server.run import is_loopback, listen, serve

    with listen(args.host, args.port) as sock:  # a port in use shows before the model is loaded
        model = load()
        return_freed_pictures()
        model.reduction_for([], settings.reduction)
        settings = replace(settings, model_name=settings.model_name or model.config.name)
        start_log(args.quiet)
        if settings.api_key is None and not is_loopback(args.host):
            say(
                f"warning: everyone who reaches {args.host} may use this server: set "
                f"${KEY_VARIABLE} or --api-key"
            )
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{sock.getsockname()[1]}/v1"

        def announce() -> None:
            if not args.quiet:
                say(f"serving {settings.model_name} at {url} (Ctrl-C stops)")

        ended_by = serve(create_app(model, settings), settings, sock, announce)
    return INTERRUPTED if ended_by == signal.SIGINT else 0


def start_log(quiet: bool) -> None:
    """One line per request on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("llava_lite.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def add_serve(commands: Any) -> None:
    summary = "answer over HTTP as OpenAI's chat completions do"
    parser = add_command(commands, "serve", run_serve, "[-m MODEL]", summary, HELP)
    add_serve_arguments(parser)
    add_reduction_arguments(parser)
    add_model_arguments(parser)


def run_serve(args: argparse.Namespace) -> int:
    """`llava-lite serve`."""
    require_packages()
    settings = read_settings(args, parse_reduction(args))
    return run(args, settings, lambda: load_model(args))
