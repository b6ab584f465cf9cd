"""The process: a socket, uvicorn, and a shutdown that finishes running requests."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.server.settings import Settings

POLL_SECONDS = 0.05
CLOSE_SECONDS = 5  # for the last step of the model, and then for the open responses
BACKLOG = 1024
MOST_CONNECTIONS = 16_384  # most of them idle; the app accepts fewer requests
LOG = logging.getLogger("llava_lite.server")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this host name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free port. Raises LlavaLiteError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise LlavaLiteError(f"cannot listen on {host}, port {port}: {one_line(error)}") from error


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn without its own log."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,  # the app refuses earlier
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )


def serve(
    app: FastAPI, settings: Settings, sock: socket.socket, on_ready: Callable[[], None]
) -> int | None:
    """Answer until a signal; returns the signal. `on_ready` is called when the server is ready."""
    return asyncio.run(Process(app, settings).serve(sock, on_ready))


class Process:
    """A server with a graceful shutdown.

    SIGTERM or Ctrl-C refuses new requests and finishes running ones; a second signal exits at once.

    A step of the model cannot be interrupted. If it takes too long, the process exits with the
    status 128 + signal."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.server = make_server(app)
        self.signal: int | None = None
        self.ending: asyncio.Task[None] | None = None

    async def serve(self, sock: socket.socket, on_ready: Callable[[], None]) -> int | None:
        """Run until the end."""
        running = asyncio.create_task(self.server.serve(sockets=[sock]))
        while not self.server.started and not running.done():
            await asyncio.sleep(POLL_SECONDS)
        if not running.done():
            self.take_signals()  # uvicorn installs its handlers before
            on_ready()
        await running
        return self.signal

    def take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self.end, number)
            except NotImplementedError:  # Windows: uvicorn's handlers remain
                return

    def end(self, number: int) -> None:
        """Handle a signal."""
        self.signal = number
        if self.ending is None:
            self.ending = asyncio.create_task(self.drain())
        else:
            os._exit(128 + number)

    async def drain(self) -> None:
        """Refuse new requests with 503, wait for running ones until a timeout, then stop."""
        service = self.app.state.service
        service.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.shutdown_timeout
        while self.app.state.open_requests and loop.time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        if not await service.stop_model(CLOSE_SECONDS):
            LOG.warning("the model's last step did not end within %g s", CLOSE_SECONDS)
            os._exit(128 + (self.signal or signal.SIGTERM))
        self.server.should_exit = True
