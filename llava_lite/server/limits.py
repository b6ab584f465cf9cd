"""Bodies of bounded size. Waiting ends when the client disconnects or the time is up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.types import Receive

from llava_lite.server.errors import ApiError, ClientGone

DRAIN_SECONDS = 2.0
T = TypeVar("T")


class Memory:
    """Bytes of all bodies that are being read or prepared."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    def take(self, count: int) -> None:
        """Add bytes. Raises ApiError (429) above the limit."""
        if self.taken + count > self.limit:
            raise ApiError(429, "too many bodies are being sent", code="queue_full", retry_after=1)
        self.taken += count


class Body:
    """The body of one request, at most `limit` bytes in memory. Call `release` after `read`."""

    def __init__(self, receive: Receive, limit: int, memory: Memory | None = None) -> None:
        self.receive, self.limit, self.ended = receive, limit, False
        self.memory, self.held = memory or Memory(limit), 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """The rest of the body. Raises ClientGone."""
        while not self.ended:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.ended = True
                raise ClientGone
            self.ended = not message.get("more_body", False)
            yield message.get("body", b"")

    async def read(self, declared: str | None, seconds: float) -> bytes:
        """Read the whole body. `declared`: the length named by the client.

        Raises ApiError (413 if it is too long, 408 if it takes too long), ClientGone."""
        if declared is not None and declared.isdecimal():
            if len(declared) > 18 or int(declared) > self.limit:
                raise self.too_long()
        try:
            return await asyncio.wait_for(self.gather(), seconds)
        except asyncio.TimeoutError:  # noqa: UP041  its own class in Python 3.10
            self.ended = True  # the rest is not awaited
            raise ApiError(408, f"the body did not arrive within {seconds:g} s") from None

    async def gather(self) -> bytes:
        body = bytearray()
        async for chunk in self.chunks():
            if len(body) + len(chunk) > self.limit:
                raise self.too_long()
            self.memory.take(len(chunk))
            self.held += len(chunk)
            body += chunk
        return bytes(body)

    def release(self) -> None:
        """Give the memory of the body back."""
        self.memory.taken -= self.held
        self.held = 0

    async def drain(self) -> None:
        """Read and drop the rest for a moment: a client that is cut off misses the refusal."""
        try:
            await asyncio.wait_for(self.discard(), DRAIN_SECONDS)
        except (asyncio.TimeoutError, ClientGone):  # noqa: UP041
            pass

    async def discard(self) -> None:
        length = 0
        async for chunk in self.chunks():
            length += len(chunk)
            if length > 2 * self.limit:
                return

    def too_long(self) -> ApiError:
        return ApiError(413, f"the body exceeds the limit of {self.limit} bytes")


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client disconnects. Call it after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_while_connected(work: Awaitable[T], receive: Receive, seconds: float) -> T:
    """The result of `work`. It is cancelled when the client disconnects (ClientGone) or after
    `seconds` (ApiError 504)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    both: set[asyncio.Future] = {task, gone}
    try:
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else timeout_error()
    finally:
        for future in both:
            future.cancel()
        # The error of a task refers to this frame. A frame that refers to the task makes a cycle:
        # it keeps the damaged image until the garbage collector runs.
        del task, both, future


def timeout_error() -> ApiError:
    return ApiError(504, "the request took too long")
