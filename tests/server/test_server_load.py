"""Two hundred requests at once: right answers, clear refusals, nobody lost."""

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from helpers.models import load_tool

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import llava_lite
from helpers.serving import eventually, serving
from llava_lite.bench.memory import proc_bytes
from llava_lite.generation.model import Model
from llava_lite.generation.state import Request, Row
from llava_lite.server.chat import Events
from llava_lite.server.protocol import ChatRequest
from llava_lite.server.worker import Job

EXAMPLES = llava_lite.embedded_model() / "examples"


@pytest.fixture(scope="module")
def load_server() -> ModuleType:
    return load_tool("load_server")


@pytest.fixture
def host(load_server: ModuleType) -> Iterator[Any]:
    """Where images and redirects are, under the names of public hosts."""
    with load_server.public_hosts(), load_server.ImageHost() as host:
        yield host


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_lite.load(llava_lite.embedded_model(), device="cpu", dtype="float32")


@pytest.mark.slow
def test_two_hundred_at_once(load_server: ModuleType, model: Model, host: Any) -> None:
    cases = load_server.mixture(model, EXAMPLES, host, 200)
    domains = load_server.ALLOWED_DOMAINS
    with serving(model, max_queue=256, url_domains=domains) as running:
        outcome = asyncio.run(load_server.run(f"{running.url}/v1", cases, 200))
        running.until_idle()
        statuses, service = running.app.state.statuses, running.service
        assert not running.app.state.open_requests
    assert outcome.wrong == [] and outcome.lost == []
    kinds = outcome.kinds
    assert sum(kinds.values()) == 200
    assert kinds["200"] == 100 and kinds["left"] == 25
    # The server saw each of them: those who left are 499, unless they left after the end.
    assert sum(statuses.values()) == 200
    assert statuses[400] == kinds["400"] and statuses[499] + statuses[200] == 125
    assert statuses[500] == 0 and statuses[499] > 10
    assert service.totals["answers"] == statuses[200]
    # Redirects were followed as far as they may be.
    assert host.visits["/to"] == sum("/to?" in case.name for case in cases) > 15
    assert host.visits["/scene.png"] > 2 and host.visits[load_server.INSIDE] == 0


def test_more_than_the_queue_holds(load_server: ModuleType, model: Model) -> None:
    """Who is refused hears so, and who is not gets the right answer."""
    good = load_server.good_cases(model, EXAMPLES)
    text = [case for case in good if case.name == "text only"] * 40
    with serving(model, max_queue=4, max_batch_size=2) as running:
        outcome = asyncio.run(load_server.run(f"{running.url}/v1", text, 40))
    refused = [line for line in outcome.wrong if "status 429, not 200" in line]
    assert outcome.wrong == refused and refused and outcome.lost == []
    assert outcome.kinds["200"] >= 4 and sum(outcome.kinds.values()) == 40


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")
def test_memory_is_flat(load_server: ModuleType, model: Model, host: Any) -> None:
    """The first rounds fill pools and caches; after that nothing may grow with the requests."""
    cases = load_server.mixture(model, EXAMPLES, host, 200)
    cheap = [case for case in cases if case.status != 200 or case.name == "text only"] * 5
    answered = [case for case in cases if case.status == 200 and "scene" in case.name][:24]
    leaving = [case for case in cases if case.leaves]
    cheap += answered + leaving
    with load_server.start_server(1) as (url, process):  # this process holds much else
        sizes = []
        for _ in range(4):
            outcome = asyncio.run(load_server.run(url, cheap, 16))
            assert outcome.wrong == [] and outcome.lost == []
            sizes.append(proc_bytes(f"{process}/status", "VmRSS"))
    assert len(cheap) * 4 > 1700
    # A leak grows in every round; the heap may take another page or two in one of them.
    assert min(sizes[2] - sizes[1], sizes[3] - sizes[2]) < 20 * 2**20


def test_nothing_of_a_request_waits_for_the_garbage_collector(
    load_server: ModuleType, model: Model, host: Any
) -> None:
    """It comes late to a server that makes few objects, and an image may be a quarter of a GB."""
    cases = load_server.mixture(model, EXAMPLES, host, 64)
    with serving(model, max_batch_size=2, url_domains=load_server.ALLOWED_DOMAINS) as running:
        before = alive()
        with collector_off():
            outcome = asyncio.run(load_server.run(f"{running.url}/v1", cases, 8))
            assert outcome.wrong == [] and outcome.lost == [] and outcome.kinds["left"] == 8
            running.until_idle()
            eventually(lambda: not running.app.state.open_requests)
            after = alive()
    for kind in (Job, Row, Request, Events, ChatRequest, Image.Image):
        assert after[kind] - before[kind] <= 2, kind  # what the idle worker last saw


@contextmanager
def collector_off() -> Iterator[None]:
    """Only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive() -> Counter[type]:
    """How many objects of each type there are, pictures of all formats as one."""
    things = gc.get_objects()
    pictures = sum(issubclass(type(thing), Image.Image) for thing in things)
    return Counter(map(type, things)) + Counter({Image.Image: pictures})
