"""`llava-lite serve`: the arguments of the server, and its start.

Imports nothing heavy, so help appears at once.
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
    add_square_arguments,
    natural,
    port,
    positive,
)
from llava_lite.cli.console import INTERRUPTED, OK, say
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.cli.wanted import load_model, parse_reduction
from llava_lite.errors import LlavaLiteError

if TYPE_CHECKING:
    from llava_lite.generation.model import Model
    from llava_lite.reduction import Reduction
    from llava_lite.server.settings import Settings

KEY_VARIABLE = "LLAVA_LITE_API_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
LIMITS = (
    ("--max-batch-size", positive, 8, "requests that the model answers at once"),
    ("--max-queue", positive, 64, "requests that may wait; more get status 429"),
    ("--max-new-tokens", positive, 2048, "longest answer that may be asked for"),
    ("--max-images", positive, 8, "images of one request"),
    ("--max-image-mb", positive, 20, "megabytes of one image as it is sent"),
    ("--max-body-mb", positive, 32, "megabytes of one request"),
    ("--max-pixels", positive, 64_000_000, "pixels of one image"),
    ("--image-workers", positive, 2, "images that are decoded at once"),
    (
        "--request-timeout",
        positive,
        300,
        "seconds from the first byte of a request to the last of its answer",
    ),
    ("--shutdown-timeout", positive, 30, "seconds for running requests to finish at the end"),
    ("--image-cache", natural, 16, "encoded images kept for later turns of their chats, 0: none"),
)
SERVE_HELP = f"""\
POST /v1/chat/completions (text and image_url parts, stream), GET /v1/models, /health, /metrics.
Any OpenAI client reaches it as base_url http://HOST:PORT/v1. Without a temperature answers are
greedy. Extensions of a request: "top_k", and "reduction", the name of a preset (or "none").

Images are data URLs. URLs and files are refused unless a domain or a folder is allowed. Everyone
who reaches the port may ask. Before other machines can reach it, set a key ({KEY_VARIABLE} or
--api-key) and put a proxy with TLS in front.

examples:
  llava-lite serve
  llava-lite serve -m weights/llava-1.5-7b --port 9000 --reduction folded-144-36
  {KEY_VARIABLE}=... llava-lite serve --host 0.0.0.0 --allow-url-domain images.example.org"""


def add_serve(commands: Any) -> None:
    summary = "answer over HTTP as OpenAI's chat completions do"
    parser = add_command(commands, "serve", run_serve, "[-m MODEL]", summary, SERVE_HELP)
    add_address(parser.add_argument_group("address"))
    add_image_limits(parser.add_argument_group("images"))
    limits = parser.add_argument_group("limits")
    for name, kind, default, text in LIMITS:
        text = f"{text} (default: {default})"
        limits.add_argument(name, type=kind, default=default, metavar="N", help=text)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    add_reduction_arguments(parser)
    add_model_arguments(parser)


def add_address(group: argparse._ArgumentGroup) -> None:
    """Where the server listens, and which clients may ask."""
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address (default: 127.0.0.1)")
    text = "0 takes a free one (default: 8000)"
    add("--port", type=port, default=8000, metavar="N", help=text)
    text = (
        f"key that clients must send (default: ${KEY_VARIABLE}, which other users of this "
        "machine cannot see in the list of processes)"
    )
    add("--api-key", metavar="KEY", help=text)
    text = "name of the model for clients (default: the model's own)"
    add("--served-model-name", metavar="NAME", help=text)
    text = "web page that may ask from a browser, such as http://localhost:3000; may be repeated"
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = (
        "further name of this machine that requests may carry, for a server that listens on this "
        "machine only and needs no key; may be repeated"
    )
    add("--allow-host", action="append", default=[], metavar="NAME", help=text)


def add_image_limits(group: argparse._ArgumentGroup) -> None:
    """Where images may come from, and how they become squares."""
    add = group.add_argument
    text = 'host to fetch image URLs from, "*.example.org" is all below it; may be repeated'
    add("--allow-url-domain", action="append", default=[], metavar="DOMAIN", help=text)
    text = "folder whose files may be named as images"
    add("--media-root", type=Path, metavar="DIR", help=text)
    add_square_arguments(group)


def run_serve(args: argparse.Namespace) -> int:
    """`llava-lite serve`."""
    require_packages()
    settings = read_settings(args, parse_reduction(args))
    return run(args, settings, lambda: load_model(args))


def require_packages() -> None:
    """Raises LlavaLiteError if the extra `serve` is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise LlavaLiteError(
            f"{' and '.join(missing)} must be installed: pip install 'llava-lite[serve]'"
        )


def read_settings(args: argparse.Namespace, reduction: "Reduction | None") -> "Settings":
    """The server's settings. The model's name is empty if no flag gives one. Raises ValueError."""
    from llava_lite.server.run import is_loopback
    from llava_lite.server.settings import Settings

    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    local = is_loopback(args.host)
    limits = [flag.removeprefix("--").replace("-", "_") for flag, *_ in LIMITS]
    # A request to a local server under another name is DNS rebinding by a web page.
    hosts = (*LOCAL_NAMES, args.host, *map(str.lower, args.allow_host))
    return Settings(
        model_name=args.served_model_name or "",
        api_key=key,
        max_body_bytes=args.max_body_mb * 10**6,
        max_image_bytes=args.max_image_mb * 10**6,
        url_domains=tuple(domain.lower().rstrip(".") for domain in args.allow_url_domain),
        media_root=args.media_root,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=hosts if local and key is None else None,
        reduction=reduction,
        **{name: getattr(args, name) for name in limits if not name.endswith("_mb")},
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
    return INTERRUPTED if ended_by == signal.SIGINT else OK


def start_log(quiet: bool) -> None:
    """Log one line per request to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("llava_lite.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
