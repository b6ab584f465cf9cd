"""Around every route: access control, and one line of log per request."""

import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_lite.inputs.fetch import shorten
from llava_lite.server.errors import ApiError
from llava_lite.server.limits import Body
from llava_lite.server.settings import Settings

LOG = logging.getLogger("llava_lite.server")
OPEN_PATHS = ("/health",)  # monitoring has no key
MOST_REQUESTS = 1024  # at once, /health apart
KEY = "llava_lite.record"


@dataclass
class Record:
    """The log entry of a request. tokens: in + out."""

    status: int = 0
    tokens: str = ""

    @staticmethod
    def of(scope: Scope) -> "Record":
        """The record of a request."""
        record: Record = scope.setdefault(KEY, Record())
        return record


class RequestLog:
    """Logs method, path, status, seconds and tokens, but no contents, no query and no key."""

    def __init__(self, app: ASGIApp, statuses: Counter[int], open_requests: set[int]) -> None:
        self.app, self.statuses, self.open_requests = app, statuses, open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, record = time.monotonic(), Record.of(scope)

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        crowded = len(self.open_requests) >= MOST_REQUESTS and scope["path"] not in OPEN_PATHS
        self.open_requests.add(id(record))
        try:
            if crowded:
                refusal = ApiError(503, "too many requests at once", retry_after=1)
                await refusal.response()(scope, receive, note_status)
            else:
                await self.app(scope, receive, note_status)
        except Exception:
            record.status = record.status or 500  # an outer layer sends it
            raise
        finally:
            self.open_requests.discard(id(record))
            self.statuses[record.status] += 1
            seconds = time.monotonic() - start
            tokens = f" {record.tokens} tokens" if record.tokens else ""
            path = shorten(scope["path"])
            LOG.info("%s %s %d %.3fs%s", scope["method"], path, record.status, seconds, tokens)


class Gate:
    """Refuses requests without the key (401) and with a host name that is not allowed (403).

    The host name protects against a web page whose own domain points to this server."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refused = self.refusal(scope)
            if refused is not None:
                await Body(receive, self.settings.max_body_bytes).drain()
                await refused.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        """The error for a request that is refused, or None."""
        headers, settings = Headers(scope=scope), self.settings
        allowed = settings.allowed_hosts
        if allowed is not None and host_name(headers.get("host", "")) not in allowed:
            return ApiError(403, "this host name is not allowed here (see --allow-host)")
        if settings.api_key is None or scope["path"] in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        if secrets.compare_digest(given.encode(), settings.api_key.encode()):
            return None
        return ApiError(401, "a valid API key is needed", code="invalid_api_key")


def host_name(host: str) -> str:
    """The Host header without its port."""
    name = host.rpartition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removeprefix("[").lower()
