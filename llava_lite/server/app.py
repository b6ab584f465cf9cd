"""The routes."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from llava_lite.generation.model import Model
from llava_lite.server.chat import ChatService
from llava_lite.server.errors import ApiError
from llava_lite.server.middleware import Gate, RequestLog
from llava_lite.server.settings import Settings

COUNTED = ("answers", "prompt_tokens", "completion_tokens")


def create_app(model: Model, settings: Settings) -> FastAPI:
    """The application. `app.state` has the `service`, the counts of HTTP `statuses`, and the
    `open_requests`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service.start()
        try:
            yield
        finally:
            await app.state.service.stop()

    app = FastAPI(
        title="llava-lite",
        lifespan=lifespan,
        openapi_url=None,  # requests are parsed without FastAPI, so a schema would be empty
        redirect_slashes=False,
        exception_handlers={HTTPException: refuse, Exception: fail},
    )
    app.state.service = ChatService(model, settings)
    app.state.statuses, app.state.open_requests = Counter(), set()
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    counters = {"statuses": app.state.statuses, "open_requests": app.state.open_requests}
    app.add_middleware(RequestLog, **counters)  # outermost: it sees every status
    add_routes(app, settings)
    return app


def add_routes(app: FastAPI, settings: Settings) -> None:
    """Add all routes to the application."""
    service: ChatService = app.state.service
    card = {
        "id": settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "llava-lite",
        "context_length": service.preparer.model.config.text.max_positions,
    }

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.respond(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.model_name:
            message = f"the model {name[:200]!r} is not served here"
            return ApiError(404, message, "model", "model_not_found").response()
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> Response:
        status, content = service.health()
        return JSONResponse(content, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(counters_text(app))


def counters_text(app: FastAPI) -> str:
    """Counters in the text format of Prometheus."""
    service: ChatService = app.state.service
    lines = [
        f'llava_lite_requests_total{{status="{status}"}} {count}'
        for status, count in sorted(app.state.statuses.items())
    ]
    figures = {
        **{f"{name}_total": service.totals[name] for name in COUNTED},
        "queue": service.num_waiting,
        "running": service.worker.num_running,
    }
    lines += [f"llava_lite_{name} {value}" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


async def refuse(request: Request, error: Exception) -> Response:
    """An unknown route or method, as OpenAI's error object."""
    assert isinstance(error, HTTPException)
    messages = {404: "no such path", 405: "this method is not allowed here"}
    response = ApiError(error.status_code, messages.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def fail(request: Request, error: Exception) -> Response:
    """A bug in a route. The server logs it."""
    return ApiError(500, "the server failed to answer this request").response()
