"""`llava-lite serve` as a process: its arguments, its signals, its end."""

import argparse
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.models import ROOT, TINY_CONFIG, TINY_TEXT, random_llava
from helpers.processes import Fork

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from helpers.serving import eventually
from llava_lite.cli import program as cli
from llava_lite.cli import serve as serve_cli
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import Reduction
from llava_lite.server import run
from llava_lite.server.settings import Settings


def parsed(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["serve", *arguments])


def settings_of(*arguments: str) -> Settings:
    return serve_cli.read_settings(parsed(*arguments), None)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """The program sets its log up for the whole process."""
    log = logging.getLogger("llava_lite.server")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


# ---- arguments ---------------------------------------------------------------------------------


def test_a_server_is_closed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_LITE_API_KEY", raising=False)
    args, settings = parsed(), settings_of()
    assert (args.host, args.port) == ("127.0.0.1", 8000)
    assert (settings.url_domains, settings.media_root, settings.cors_origins) == ((), None, ())
    assert settings.allowed_hosts == ("localhost", "127.0.0.1", "::1", "127.0.0.1")
    assert settings.api_key is None
    assert settings.max_pixels == 64_000_000


def test_arguments_become_settings(tmp_path: Path) -> None:
    settings = settings_of(
        *("--api-key", "k", "--max-queue", "5", "--max-batch-size", "2", "--max-new-tokens", "9"),
        *("--max-images", "3", "--max-image-mb", "4", "--max-body-mb", "6", "--max-pixels", "7"),
        *(
            "--image-workers",
            "1",
            "--image-cache",
            "0",
            "--request-timeout",
            "8",
            "--shutdown-timeout",
            "10",
        ),
        *("--allow-url-domain", "A.test.", "--allow-url-domain", "*.b.test"),
        *("--media-root", str(tmp_path), "--cors-origin", "http://c.test"),
        *("--served-model-name", "mine"),
    )
    assert settings == Settings(
        "mine",
        api_key="k",
        max_queue=5,
        max_batch_size=2,
        max_new_tokens=9,
        max_images=3,
        max_image_bytes=4_000_000,
        max_body_bytes=6_000_000,
        max_pixels=7,
        image_workers=1,
        image_cache=0,
        request_timeout=8,
        shutdown_timeout=10,
        url_domains=("a.test", "*.b.test"),
        media_root=tmp_path,
        cors_origins=("http://c.test",),
    )


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_LITE_API_KEY", "outside")
    assert settings_of().api_key == "outside"
    assert settings_of().allowed_hosts is None  # the key is what counts
    assert settings_of("--api-key", "mine").api_key == "mine"
    monkeypatch.setenv("LLAVA_LITE_API_KEY", "")
    assert settings_of().api_key is None


def test_names_of_this_machine() -> None:
    assert settings_of("--host", "0.0.0.0").allowed_hosts is None
    names = settings_of("--allow-host", "Box.test").allowed_hosts
    assert names is not None and "box.test" in names


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "65536"], "'65536' is not a port, 0 to 65535"),
        (["--port", "-1"], "'-1' is not a port"),
        (["--max-queue", "0"], "'0' is not a number of at least 1"),
        (["--image-cache", "-1"], "'-1' is not a number of at least 0"),
        (["--request-timeout", "1.5"], "'1.5' is not a number"),
        (["--reduction", "much"], "much"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--media-root", "no/such/folder"], "no/such/folder: the media root is not a folder"),
        (["--api-key", ""], "the API key must be printable ASCII"),
        (["--allow-url-domain", "http://a.test"], "'http://a.test' is not a domain"),
        (["--host", "127.0.0.1", "--port", "PORT"], "cannot listen on 127.0.0.1, port "),
    ],
)
def test_what_fails_before_a_model_is_loaded(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_cli, "load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = cli.main(["serve", *(port if text == "PORT" else text for text in arguments)])
    error = capsys.readouterr().err
    assert code == 1 and reason in error and error.count("\n") == 1


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve"]) == 1
    expected = "error: fastapi and uvicorn must be installed: pip install 'llava-lite[serve]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("box.test", False)),
    ],
)
def test_who_can_reach_a_host(host: str, loopback: bool) -> None:
    assert run.is_loopback(host) is loopback


class NoSocket:
    """Stands for a listening socket."""

    def __enter__(self) -> "NoSocket":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "", 1234


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ],
)
def test_everybodys_server_is_warned_of(
    tiny_model: Model,
    arguments: list[str],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def serve(app: Any, settings: Settings, sock: Any, on_ready: Any) -> int:
        on_ready()
        assert settings.model_name == "random"
        return signal.SIGTERM

    monkeypatch.delenv("LLAVA_LITE_API_KEY", raising=False)
    monkeypatch.setattr(run, "listen", lambda host, port: NoSocket())
    monkeypatch.setattr(run, "serve", serve)
    monkeypatch.setattr(serve_cli, "load_model", lambda args: tiny_model)
    assert cli.main(["serve", *arguments]) == 0
    error = capsys.readouterr().err
    assert ("warning: everyone who reaches" in error) is warned
    assert re.search(r"serving random at http://(\[::\]|[\d.]+):1234/v1", error)


def test_a_reduction_that_the_model_cannot_do(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_cli, "load_model", lambda args: tiny_model)
    with pytest.raises(ValueError) as expected:
        tiny_model.check_reduction(Reduction.of("fastv-50"))
    assert cli.main(["serve", "--port", "0", "--reduction", "fastv-50"]) == 1
    assert str(expected.value) in capsys.readouterr().err


def test_the_command_line_imports_no_server() -> None:
    code = "import sys, llava_lite.cli.program, llava_lite.cli.serve; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    tops = {name.partition(".")[0] for name in output.split()}
    assert "llava_lite" in tops
    assert not tops & {"fastapi", "uvicorn", "starlette", "pydantic", "torch"}


# ---- the process -------------------------------------------------------------------------------

SLOW_SERVER = """
import sys, time
from dataclasses import replace
from helpers.models import CORPUS, TINY_CONFIG, TINY_TEXT, random_llava
from llava_lite.generation.model import Model
from llava_lite.server import run
from llava_lite.server.app import create_app
from llava_lite.server.run import listen, serve
from llava_lite.server.settings import Settings
from llava_lite.inputs.tokenizer import train_tokenizer

run.CLOSE_SECONDS = 0.5

class Slow(Model):
    def step(self, rows):
        time.sleep(float(sys.argv[2]))
        super().step(rows)

endless = replace(TINY_CONFIG, text=replace(TINY_TEXT, eos_id=0))  # ends only where it must
model = Slow(random_llava(), train_tokenizer(CORPUS, TINY_TEXT.sampled_vocab_size), endless)
settings = Settings("slow", shutdown_timeout=float(sys.argv[1]))
with listen("127.0.0.1", 0) as sock:
    port = sock.getsockname()[1]
    print(serve(create_app(model, settings), settings, sock, lambda: print(port, flush=True)))
"""


@contextmanager
def slow_server(shutdown_timeout: float, step_seconds: float = 0.05) -> Iterator[tuple[Fork, str]]:
    """A process with a model of 20 steps a second or fewer, and its URL."""
    process = Fork(SLOW_SERVER, shutdown_timeout, step_seconds)
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()


def stream_of(url: str, tokens: int) -> Any:
    body = {
        "messages": [{"role": "user", "content": "star?"}],
        "max_tokens": tokens,
        "stream": True,
    }
    return httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60)


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if "choices" in chunk]
    return "".join(delta.get("content", "") for delta in deltas)


def test_a_signal_lets_running_requests_finish(tiny_tokenizer: Tokenizer) -> None:
    endless = replace(TINY_CONFIG, text=replace(TINY_TEXT, eos_id=0))
    model = Model(random_llava(), tiny_tokenizer, endless)
    expected = model.generate(None, "star?", max_new_tokens=40)
    assert expected.usage["completion_tokens"] == 40
    with slow_server(30) as (process, url), stream_of(url, 40) as response:
        lines = response.iter_lines()
        seen = [next(lines)]
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": []})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        seen += lines
        assert seen[-2] == "data: [DONE]"
        assert text_of(seen) == expected
        assert process.wait(20) == 0 and process.stdout.read() == f"{signal.SIGTERM.value}\n"


def test_a_request_that_does_not_finish_in_time_hears_of_it() -> None:
    with slow_server(0.3) as (process, url), stream_of(url, 300) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        events = [line for line in lines if line]
        assert json.loads(events[-1][6:])["error"]["message"] == "the server is shutting down"
        assert process.wait(20) == 0 and process.stdout.read() == f"{signal.SIGINT.value}\n"


def test_a_second_signal_does_not_wait() -> None:
    seen = []
    with slow_server(60) as (process, url), stream_of(url, 300) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        with suppress(httpx.HTTPError):
            seen += lines
        process.wait(20)
    assert "data: [DONE]" not in seen and len(text_of(seen)) < 300


@pytest.mark.parametrize("signals", [1, 2])
def test_no_step_of_the_model_keeps_the_process(signals: int) -> None:
    """Neither after the time to finish, nor after a second signal."""
    with (
        slow_server(0.1 if signals == 1 else 60, step_seconds=60) as (process, url),
        stream_of(url, 300) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        eventually(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
        process.send_signal(signal.SIGINT)
        if signals == 2:
            eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.slow
def test_the_program() -> None:
    command = [sys.executable, "-m", "llava_lite", "serve", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("LLAVA_LITE_API_KEY", None)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.fullmatch(
                r"serving llava-tiny-scenes at (\S+) \(Ctrl-C stops\)\n", line
            ):
                break
        else:
            pytest.fail("the server did not start")
        assert httpx.get(f"{found[1]}/models").json()["data"][0]["id"] == "llava-tiny-scenes"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 130
    assert re.fullmatch(r"\S+ \S+ GET /v1/models 200 \d\.\d+s\n", rest)
