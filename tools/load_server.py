#!/usr/bin/env python3
"""Put load on `llava-lite serve`: check answers, refusals, lost requests and memory.

    python tools/load_server.py                             # 200 at once, on a new server
    python tools/load_server.py --requests 2000 --concurrency 16

Starts a server of the embedded model in float32 on 127.0.0.1, and sends a fixed mixture of
requests: whole and streamed answers, greedy and sampled, with and without token reduction, clients
that leave early, malformed requests, hostile image sources, redirects to this machine. Each answer
is compared with `Model.generate`. All connections stay on this machine. The exit code is 1 if an
answer is wrong, a request is lost, a refusal is not the expected one, or the server followed a
forbidden redirect.
"""

import argparse
import asyncio
import base64
import contextlib
import http.server
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from PIL import Image

import llava_lite
from llava_lite.bench.memory import proc_bytes
from llava_lite.cli import program as cli
from llava_lite.generation.model import Model
from llava_lite.inputs import fetch

EXAMPLES = ("scene.png", "scene2.png")
QUESTIONS = (
    "How many objects are there?",
    "What shape is the red object?",
    "Is there a blue square?",
    "How many circles are there?",
)
REDUCTIONS = (None, "hybrid-72-36", "tome-72-logical", "hybrid-72-36")
MOST_TOKENS = 8
QUEUE = 256
ROOT = Path(__file__).resolve().parents[1]
SERVE = "serve"  # as first argument: run the server, with the public hosts
PUBLIC_HOSTS = ("images.test", "other.test")  # names of the local image host
# The last three are allowed by name, but refused because of their addresses.
ALLOWED_DOMAINS = ("images.test", "127.0.0.1", "localhost", "169.254.169.254")
INSIDE = "/inside.png"  # the server must not fetch it
PATH, LEAVING = "/chat/completions", httpx.Timeout(300, read=0.05)  # after so many seconds
MARKS = (200, 500, 1000, 1500, 2000)  # numbers of requests after which to read the memory


@dataclass(frozen=True)
class Case:
    """One request with the expected answer or status. leaves: the client leaves early, and expects
    nothing."""

    name: str
    body: bytes
    answer: str | None = None
    status: int = 200
    stream: bool = False
    leaves: bool = False
    content_type: str = "application/json"


@dataclass
class Outcome:
    """The results of all requests. wrong: unexpected answers, statuses or error objects; lost:
    requests without a response."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)  # requests so far: bytes of the server

    @property
    def count(self) -> int:
        """The number of finished requests."""
        return sum(self.kinds.values()) + len(self.lost)


# ---- images ------------------------------------------------------------------------------------


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size but has almost no pixels."""
    data = png(Image.new("RGB", (10, 10)))
    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


# ---- a host of images --------------------------------------------------------------------------


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Serves an image (/scene.png, /inside.png), a redirect (/to?URL), an endless one (/loop), and
    many bytes (/much). Counts every visit."""

    server: "ImageHost"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.visits[path] += 1
        self.send_response(302 if path in ("/to", "/loop") else 200)
        if path in ("/to", "/loop"):
            self.send_header("Location", query or path)
        self.end_headers()
        if path in ("/scene.png", INSIDE):
            self.wfile.write((llava_lite.embedded_model() / "examples" / EXAMPLES[0]).read_bytes())
        if path == "/much":
            with contextlib.suppress(OSError):
                self.wfile.write(bytes(300_000))

    def log_message(self, *_: Any) -> None:
        pass


class ImageHost(http.server.ThreadingHTTPServer):
    """A host of images on a free port of this machine, for the time of a `with`."""

    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Elsewhere)
        self.visits: Counter[str] = Counter()

    def __enter__(self) -> "ImageHost":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def url(self, name: str, path: str) -> str:
        """A URL of this host, by a name of this machine or of `PUBLIC_HOSTS`."""
        return f"http://{name}:{self.server_port}{path}"


@contextmanager
def public_hosts() -> Iterator[None]:
    """In this process, connect `PUBLIC_HOSTS` to this machine as if it had a public address. Other
    names and addresses are checked as usual."""
    connect = fetch._connect

    def directed(host: str, port: int, *rest: Any) -> socket.socket:
        if host in PUBLIC_HOSTS:
            return socket.create_connection(("127.0.0.1", port), 10)
        return connect(host, port, *rest)

    with mock.patch.object(fetch, "_connect", directed):
        yield


# ---- cases -------------------------------------------------------------------------------------


def body_of(text: str, image: str | None = None, **fields: Any) -> bytes:
    """A request about one image, or none."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": image}})
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "max_tokens": MOST_TOKENS, **fields}).encode()


def good_cases(model: Model, folder: Path) -> list[Case]:
    """Requests with an answer: every question about every example, whole and streamed."""
    cases = []
    for example in EXAMPLES:
        data = (folder / example).read_bytes()
        for number, question in enumerate(QUESTIONS):
            reduction = REDUCTIONS[number]
            options: dict[str, Any] = {"reduction": reduction} if reduction else {}
            if number == 3:
                options |= {"temperature": 1.5, "top_p": 0.9, "seed": 7}
            answer = str(model.generate(data, question, max_new_tokens=MOST_TOKENS, **options))
            name, ask = f"{example}: {question}", partial(body_of, question, data_url(data))
            cases.append(Case(name, ask(**options), answer))
            cases.append(Case(name, ask(stream=True, **options), answer, stream=True))
    answer = model.generate(None, QUESTIONS[0], max_new_tokens=MOST_TOKENS)
    cases.append(Case("text only", body_of(QUESTIONS[0]), str(answer)))
    return cases


def fetched_cases(model: Model, folder: Path, host: ImageHost) -> list[Case]:
    """Requests with an image to fetch, one directly and one by a redirect."""
    scene = host.url("images.test", "/scene.png")
    answer = model.generate(folder / EXAMPLES[0], QUESTIONS[1], max_new_tokens=MOST_TOKENS)
    return [
        Case(f"fetched: {url}", body_of(QUESTIONS[1], url), str(answer))
        for url in (scene, host.url("images.test", f"/to?{scene}"))
    ]


def redirected_cases(host: ImageHost) -> list[Case]:
    """Redirects from an allowed host to forbidden places."""
    targets = [host.url(name, INSIDE) for name in ("127.0.0.1", "localhost", "[::1]", "other.test")]
    targets += [
        f"http://[::ffff:127.0.0.1]:{host.server_port}{INSIDE}",
        f"http://2130706433:{host.server_port}{INSIDE}",  # 127.0.0.1 as one number
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
    ]
    urls = [host.url("images.test", f"/to?{target}") for target in targets]
    urls += [host.url("images.test", "/loop"), host.url("127.0.0.1", INSIDE)]
    return [Case(f"redirect: {url}", body_of("What is it?", url), status=400) for url in urls]


def leaving_cases(folder: Path) -> list[Case]:
    """Clients that leave before the answer is complete."""
    image = data_url((folder / EXAMPLES[0]).read_bytes())
    return [
        Case(
            "leaves",
            body_of("Describe the image.", image, max_tokens=200, stream=stream),
            stream=stream,
            leaves=True,
        )
        for stream in (False, True)
    ]


def malformed_cases() -> list[Case]:
    """Requests that are malformed or not supported."""
    fields: tuple[tuple[str, Any], ...] = (
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("logprobs", True),
        ("response_format", {"type": "json_schema"}),
        ("temperature", -1),
        ("max_tokens", 10**9),
        ("reduction", "much"),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "x"}]),
    )
    bodies = [(name, body_of("x", **{name: value})) for name, value in fields]
    bodies += [
        ("no JSON", b"{nothing"),
        ("deep JSON", b'{"messages":' + b"[" * 100_000),
        ("long prompt", body_of("star " * 5000)),
        ("very long prompt", body_of("star" * 250_000)),
        ("markers", body_of("<image> <image>")),
    ]
    return [
        *(Case(name, body, status=400) for name, body in bodies),
        Case("model", body_of("x", model="gpt-4o"), status=404),
        Case("text", body_of("x"), status=415, content_type="text/plain"),
    ]


def hostile_cases() -> list[Case]:
    """Image sources that the server must refuse."""
    strip = png(Image.new("L", (1, 1_000_000)))
    bomb = png(Image.new("1", (9000, 9000)))  # 81 megapixels in 10 kB
    sources = {
        "metadata": "http://169.254.169.254/latest/meta-data/",
        "loopback": "http://127.0.0.1:1/",
        "loopback by name": "http://localhost:1/",
        "not allowed": "http://images.invalid/a.png",
        "mapped": "http://[::ffff:127.0.0.1]/a.png",
        "file": "file:///etc/passwd",
        "path": "/etc/passwd",
        "dots": "../../../../etc/passwd",
        "ftp": "ftp://127.0.0.1/a.png",
        "no image": "data:image/png;base64,AAAA",
        "no base64": "data:image/png;base64,%%%",
        "percent signs": "data:image/png;base64," + "%" * 2**20,
        "strip": data_url(strip),
        "bomb": data_url(bomb),
        "claims 3.6 gigapixels": data_url(png_of_size(60_000, 60_000)),
        "claims 49 megapixels": data_url(png_of_size(7000, 7000)),  # within the limit on pixels
        "no pixels": data_url(png_of_size(0, 10)),
        "cut off": data_url(png(Image.new("RGB", (50, 50)))[:60]),
    }
    return [
        Case(f"image: {name}", body_of("What is it?", url), status=400)
        for name, url in sources.items()
    ]


def mixture(model: Model, folder: Path, host: ImageHost, count: int, seed: int = 0) -> list[Case]:
    """`count` requests: half good, one in eight leaves early, the rest are malformed or hostile."""
    good = cycle([*good_cases(model, folder), *fetched_cases(model, folder, host)])
    leaving = cycle(leaving_cases(folder))
    malformed, hostile = cycle(malformed_cases()), cycle(hostile_cases())
    redirected = cycle(redirected_cases(host))
    pattern = (good, malformed, good, hostile, good, leaving, good, redirected)
    cases = [next(pattern[number % 8]) for number in range(count)]
    random.Random(seed).shuffle(cases)
    return cases


# ---- asking ------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, case: Case, outcome: Outcome) -> None:
    """Send one request and check the result."""
    try:
        if case.leaves:
            await leave(client, case)
            outcome.kinds["left"] += 1
            return
        headers = {"Content-Type": case.content_type}
        response = await client.post(PATH, content=case.body, headers=headers)
    except httpx.HTTPError as error:
        outcome.lost.append(f"{case.name}: {type(error).__name__}: {error}")
        return
    status, text = response.status_code, response.text
    outcome.kinds[str(status)] += 1
    if status != case.status:
        outcome.wrong.append(f"{case.name}: status {status}, not {case.status}: {text[:200]}")
    elif status != 200:
        error = response.json()["error"]
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            outcome.wrong.append(f"{case.name}: {text[:200]}")
    else:
        if case.stream:
            answer = join_stream(text)
        else:
            answer = response.json()["choices"][0]["message"]["content"]
        if answer != case.answer:
            outcome.wrong.append(f"{case.name}: {answer!r}, not {case.answer!r}")


async def leave(client: httpx.AsyncClient, case: Case) -> None:
    """Leave after the first piece of a stream, or shortly after the request."""
    headers = {"Content-Type": case.content_type}
    if case.stream:
        async with client.stream("POST", PATH, content=case.body, headers=headers) as response:
            async for _ in response.aiter_bytes():
                return
    with contextlib.suppress(httpx.ReadTimeout):
        await client.post(PATH, content=case.body, headers=headers, timeout=LEAVING)


def join_stream(text: str) -> str:
    """The text of a stream, or a description of what is wrong with the stream."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if events[-1] != "[DONE]":
        return f"no end: {events[-1]}"
    chunks = [json.loads(event) for event in events[:-1]]
    if any("error" in chunk for chunk in chunks):
        return f"error: {chunks[-1]}"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def run(
    url: str, cases: Sequence[Case], concurrency: int, process: int | None = None
) -> Outcome:
    """Send all requests, `concurrency` at once. process: id of the process to watch."""
    outcome, queue = Outcome(), iter(cases)
    watched = (0, *MARKS, len(cases))

    def look_at_memory() -> None:
        if process is not None and outcome.count in watched:
            outcome.memory[outcome.count] = proc_bytes(f"{process}/status", "VmRSS") or 0

    look_at_memory()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:

        async def one_after_the_other() -> None:
            for case in queue:
                await ask(client, case, outcome)
                look_at_memory()

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    return outcome


# ---- the program -------------------------------------------------------------------------------


@contextmanager
def start_server(threads: int) -> Iterator[tuple[str, int]]:
    """Run a server on a free port of this machine. Yields its URL and process id."""
    command = [sys.executable, __file__, SERVE, "--port", "0", "--dtype", "float32"]
    command += ["--device", "cpu", "--threads", str(threads), "--max-queue", str(QUEUE)]
    command += ["-m", str(llava_lite.embedded_model())]
    for domain in ALLOWED_DOMAINS:
        command += ["--allow-url-domain", domain]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"at (http://127\.0\.0\.1:\d+/v1)", line):
                    break
            else:
                raise SystemExit("the server did not start")
            log = threading.Thread(target=process.stderr.read, daemon=True)
            log.start()  # a full pipe would stop the server
            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait(60)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [SERVE]:
        with public_hosts():
            return cli.main(argv)
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--concurrency", type=int, default=200, metavar="N", help="at once")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    args = parser.parse_args(argv)
    folder = llava_lite.embedded_model()
    model = llava_lite.load(folder, device="cpu", dtype="float32")
    concurrency = min(args.concurrency, QUEUE)
    with ImageHost() as host, start_server(args.threads) as (url, process):
        cases = mixture(model, folder / "examples", host, args.requests)
        outcome = asyncio.run(run(url, cases, concurrency, process))
        health = httpx.get(url.removesuffix("/v1") + "/health").json()
    print(f"{len(cases)} requests, {concurrency} at once: {dict(sorted(outcome.kinds.items()))}")
    print(f"wrong {len(outcome.wrong)}, lost {len(outcome.lost)}; afterwards {health}")
    print(f"redirects {host.visits['/to']}, of these to {INSIDE}: {host.visits[INSIDE]}")
    print("server's memory, MiB, after so many requests:")
    print(*(f"{count}: {size >> 20}" for count, size in outcome.memory.items()), sep="  ")
    for line in (outcome.wrong + outcome.lost)[:20]:
        print(line)
    return 1 if outcome.wrong or outcome.lost or host.visits[INSIDE] else 0


if __name__ == "__main__":
    sys.exit(main())
