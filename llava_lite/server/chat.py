"""/v1/chat/completions: a request becomes a job, the events of the job become a response.

When the client disconnects, its job is cancelled.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.server.errors import ApiError, ClientGone, as_api_error, internal_error
from llava_lite.server.limits import (
    Body,
    Memory,
    run_while_connected,
    timeout_error,
    wait_for_disconnect,
)
from llava_lite.server.middleware import Record
from llava_lite.server.prepare import Preparer
from llava_lite.server.protocol import Completion, count_usage
from llava_lite.server.settings import Settings
from llava_lite.server.worker import Event, Job, Stopped, Worker, ignore

RETRY_SECONDS = 1
CLIENT_GONE = 499  # for the log only
DONE = b"data: [DONE]\n\n"


class ChatService:
    """The model behind the routes: admits requests, prepares them, answers them."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.settings = settings
        self.preparer = Preparer(model, settings)
        self.worker = Worker(model, settings.max_batch_size, settings.image_cache)
        # Room for a full queue of the longest bodies. Bytes count as they arrive.
        self.memory = Memory(settings.max_queue * settings.max_body_bytes)
        self.preparing = 0
        self.draining = False
        self.totals: Counter[str] = Counter()  # of all answers so far

    def start(self) -> None:
        """Start the worker."""
        self.worker.start()

    async def stop_model(self, seconds: float | None = None) -> bool:
        """Stop after the current step of the model. Waiting requests get status 503.

        Returns whether the model stopped within `seconds`."""
        self.draining = True
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.worker.stop, seconds)

    async def stop(self) -> None:
        """End all threads, after the last open request."""
        await self.stop_model()
        self.preparer.close()

    @property
    def num_waiting(self) -> int:
        """Open requests that are not yet in the model."""
        return self.preparing + self.worker.num_waiting

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health."""
        alive = self.worker.is_alive and not self.draining
        status = "ok" if alive else "shutting down" if self.draining else "stopped"
        running = self.worker.num_running
        counts = {"queue": self.num_waiting, "running": running, "busy": running > 0}
        return 200 if alive else 503, {
            "status": status,
            **counts,
            "max_queue": self.settings.max_queue,
            "max_batch_size": self.settings.max_batch_size,
        }

    async def respond(self, request: Request) -> Response:
        """Answer one request. Every error becomes a response."""
        body = Body(request.receive, self.settings.max_body_bytes, self.memory)
        try:
            return await self.answer(request, body)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            await body.drain()
            return as_api_error(error).response()

    async def answer(self, request: Request, body: Body) -> Response:
        """The response. Raises ApiError, ClientGone, and errors of a bad request."""
        deadline = asyncio.get_running_loop().time() + self.settings.request_timeout
        job, include_usage = await self.prepare(request, body, deadline)
        events = Events(self.worker, job, request.receive, deadline)
        try:
            self.worker.submit(job)
        except Stopped:
            events.close()
            raise shutdown_error() from None
        completion = Completion(self.settings.model_name, include_usage)
        if job.wants_pieces:
            return EventStream(self.chunks(events, completion, request.scope), events)
        try:
            return JSONResponse(completion.whole(await self.last(events, request.scope)))
        finally:
            events.close()

    async def prepare(self, request: Request, body: Body, deadline: float) -> tuple[Job, bool]:
        """Admit and read a request: its job, and whether its stream ends with the usage.

        Raises ApiError and the errors of a bad request."""
        if self.draining:
            raise shutdown_error()
        # A page of another site can send text without asking the browser, but not JSON.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the content type must be application/json")
        self.refuse_if_full()
        declared = request.headers.get("content-length")
        seconds = min(self.settings.body_timeout, self.settings.request_timeout)
        try:
            data = await body.read(declared, seconds)
            self.refuse_if_full()  # a request takes a place after its body has arrived
            self.preparing += 1
            try:
                left = deadline - asyncio.get_running_loop().time()
                return await run_while_connected(self.preparer.prepare(data), request.receive, left)
            finally:
                self.preparing -= 1
        finally:
            body.release()

    def refuse_if_full(self) -> None:
        """Raise ApiError (429) if the queue is full."""
        if self.num_waiting >= self.settings.max_queue:
            raise ApiError(429, "the queue is full", code="queue_full", retry_after=RETRY_SECONDS)

    async def last(self, events: "Events", scope: Scope) -> Answer:
        """The answer. Raises ApiError, ClientGone."""
        while not isinstance(event := await events.next(), Answer):
            pass
        self.book(event, scope)
        return event

    async def chunks(
        self, events: "Events", completion: Completion, scope: Scope
    ) -> AsyncIterator[bytes]:
        """The events of a stream."""
        yield sse(completion.chunk({"role": "assistant", "content": ""}))
        try:
            while not isinstance(event := await events.next(), Answer):
                yield sse(completion.chunk({"content": event}))
        except ApiError as error:
            yield sse(error.body())
        except ClientGone:
            Record.of(scope).status = CLIENT_GONE
        else:
            self.book(event, scope)
            yield sse(completion.chunk({}, event.finish_reason))
            if completion.include_usage:
                yield sse(completion.usage_chunk(event))
            yield DONE

    def book(self, answer: Answer, scope: Scope) -> None:
        """Count an answer. Its tokens go to the log."""
        usage = count_usage(answer)
        prompt, new = usage["prompt_tokens"], usage["completion_tokens"]
        self.totals.update(answers=1, prompt_tokens=prompt, completion_tokens=new)
        Record.of(scope).tokens = f"{prompt}+{new}"


class Events:
    """The events of a job on the event loop, until the client disconnects or the deadline passes.

    After `close` nothing here may refer to itself: a reference cycle would keep the image until the
    garbage collector runs."""

    def __init__(self, worker: Worker, job: Job, receive: Receive, deadline: float) -> None:
        self.worker, self.job, self.loop = worker, job, asyncio.get_running_loop()
        self.deadline = deadline
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        job.deliver = self.deliver
        self.timer = self.loop.call_at(deadline, self.queue.put_nowait, timeout_error())
        self.gone = self.loop.create_task(leave(receive, worker, job, self.queue))

    def deliver(self, event: Event) -> None:
        """Called on the worker's thread."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def next(self) -> str | Answer:
        """The next piece, or the answer. Raises ApiError, ClientGone."""
        event = await self.queue.get()
        if not isinstance(event, BaseException):
            return event
        try:
            raise as_failure(event)
        finally:
            del event  # its traceback refers to this frame

    def close(self) -> None:
        """Cancel the job and stop listening."""
        self.worker.cancel(self.job)
        self.job.deliver = ignore
        self.timer.cancel()
        self.gone.cancel()


async def leave(receive: Receive, worker: Worker, job: Job, queue: asyncio.Queue[Event]) -> None:
    """Cancel a job when its client disconnects."""
    await wait_for_disconnect(receive)
    worker.cancel(job)
    queue.put_nowait(ClientGone())


class EventStream(StreamingResponse):
    """Server-sent events. The job ends with the response. A client that stops reading is
    disconnected at the deadline."""

    def __init__(self, chunks: AsyncIterator[bytes], events: Events) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # asks a proxy to pass pieces on at once
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.events.deadline - self.events.loop.time()
        try:
            # One second more than the deadline, so that the stream can report it first.
            await asyncio.wait_for(self.stream_response(send), left + 1)
        except (asyncio.TimeoutError, OSError):  # noqa: UP041
            Record.of(scope).status = CLIENT_GONE
        finally:
            self.events.close()


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()


def as_failure(error: BaseException) -> Exception:
    """The error that ended a job, for its client."""
    if isinstance(error, ApiError | ClientGone):
        return error
    return shutdown_error() if isinstance(error, Stopped) else internal_error(error)


def shutdown_error() -> ApiError:
    return ApiError(503, "the server is shutting down", retry_after=RETRY_SECONDS)
