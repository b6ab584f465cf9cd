"""A server on a free port of this machine, in a thread, for tests."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from torch import Tensor

from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Request, Row
from llava_lite.server.app import create_app
from llava_lite.server.chat import ChatService
from llava_lite.server.run import listen, make_server
from llava_lite.server.settings import Settings

TIMEOUT = 20.0


class Gated(Model):
    """A model that takes a step when a test says so, and can be made to fail."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.llava, model.tokenizer)
        self.steps = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.poison: Request | None = None
        self.fails_to_start: Request | None = None
        self.breaks_after_drawing: Request | None = None

    def step(self, rows: Sequence[Row]) -> None:
        assert self.steps.acquire(timeout=TIMEOUT)
        if any(row.request is self.poison for row in rows):
            if len(rows) > 1:
                self.steps.release(len(rows))  # each will be tried alone
            raise RuntimeError("poison")
        self.sizes.append(len(rows))
        super().step(rows)

    def next_tokens(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        tokens = super().next_tokens(logits, rows)
        if any(row.request is self.breaks_after_drawing for row in rows):
            raise RuntimeError("broken")
        return tokens

    def start(
        self, requests: Sequence[Request], options: Sequence[GenerationOptions], batch_size: int
    ) -> list[Row]:
        if any(request is self.fails_to_start for request in requests):
            raise RuntimeError("bad start")
        return super().start(requests, options, batch_size)


@dataclass
class Running:
    """A server that runs: where, and what is inside."""

    url: str  # without /v1
    app: FastAPI

    @property
    def service(self) -> ChatService:
        return self.app.state.service

    def until_idle(self) -> None:
        """Wait until nobody waits and nothing runs."""
        worker = self.service.worker
        eventually(lambda: not (self.service.num_waiting or worker.num_running))


def eventually(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    """Wait for a condition. Fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def serving(model: Model, **settings: Any) -> Iterator[Running]:
    """Serve a model with these settings."""
    app = create_app(model, Settings(**{"model_name": "tiny", **settings}))
    server = make_server(app)
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
