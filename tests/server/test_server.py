"""The server from outside: the real `openai` client, and raw HTTP where no client would go."""

import asyncio
import base64
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.models import ROOT, load_tool, random_llava
from helpers.peers import peer

pytest.importorskip("fastapi")

import httpx
from PIL import Image

import llava_lite
from helpers.serving import Gated, Running, eventually, serving
from llava_lite.errors import ContextError
from llava_lite.generation.model import Model
from llava_lite.inputs import fetch
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import Reduction
from llava_lite.server import middleware, prepare
from llava_lite.server.app import create_app
from llava_lite.server.settings import Settings

try:
    import openai
except ImportError:  # `client_of` skips
    pass

SCENE = ROOT / "weights" / "tiny" / "examples" / "scene.png"
SHAPE = "What shape is the red object?"
LONG = "Describe the image."


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def about(url: str, text: str) -> list[dict[str, Any]]:
    """Messages that ask about one image."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def said(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def model() -> Model:
    """The embedded model in float32, where batches answer exactly as single calls."""
    return llava_lite.load(llava_lite.embedded_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with serving(model, max_new_tokens=100, max_images=2, max_body_bytes=3_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def client_of(server: Running, key: str = "none", **options: Any) -> Any:
    peer("openai")
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=key, timeout=60, **{"max_retries": 0, **options}
    )


@pytest.fixture
def gated(tiny_tokenizer: Tokenizer) -> Iterator[Gated]:
    """A random model that takes a step when a test says so."""
    model = Gated(Model(random_llava(), tiny_tokenizer))
    yield model
    model.steps.release(10_000)


# ---- answers -----------------------------------------------------------------------------------


def test_a_question_about_an_image(client: Any, model: Model) -> None:
    expected = model.generate(SCENE, SHAPE)
    completion = client.chat.completions.create(
        model="tiny", messages=about(data_url(SCENE.read_bytes()), SHAPE)
    )
    [choice] = completion.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content == expected == "ring"
    assert choice.finish_reason == "stop"
    assert completion.object == "chat.completion" and completion.model == "tiny"
    assert completion.id.startswith("chatcmpl-") and completion.created > 1_700_000_000
    usage = completion.usage
    prompt = expected.usage["prompt_tokens"] + 576
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 1)
    assert usage.total_tokens == prompt + 1
    assert set(completion.timings) == set(expected.timings)


def test_a_stream(client: Any, model: Model) -> None:
    expected = model.generate(SCENE, LONG, max_new_tokens=20)
    stream = client.chat.completions.create(
        model="tiny",
        messages=about(data_url(SCENE.read_bytes()), LONG),
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *texts, end, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == expected
    assert len(texts) > 5
    assert {chunk.choices[0].finish_reason for chunk in texts} == {None}
    assert (end.choices[0].finish_reason, end.choices[0].delta.content) == ("length", None)
    assert usage.choices == [] and usage.usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in [*texts, end])


def test_a_stream_ends_with_done_and_has_usage_only_where_asked(server: Running) -> None:
    body = {"messages": [said(SHAPE)], "stream": True, "max_tokens": 2}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert not any("usage" in json.loads(event[6:]) for event in events[:-2])


def test_several_turns_are_what_a_chat_would_say(client: Any, model: Model) -> None:
    chat = model.chat(SCENE, max_new_tokens=12)
    first, second = chat.send("How many objects are there?"), chat.send("And circles?")
    messages = about(data_url(SCENE.read_bytes()), "How many objects are there?")
    messages += [said(f" {first}\n", "assistant"), said("And circles?")]
    completion = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert completion.choices[0].message.content == second
    # The prompt holds the turn before: it is longer than the question alone.
    alone = model.generate(SCENE, "And circles?", max_new_tokens=12)
    assert completion.usage.prompt_tokens > alone.usage["prompt_tokens"] + 576 + 10


def test_a_system_message_takes_the_place_of_the_templates(client: Any, model: Model) -> None:
    for system in ("Count.", ""):
        expected = model.generate(None, SHAPE, system=system, max_new_tokens=4)
        completion = client.chat.completions.create(
            model="tiny", messages=[said(system, "system"), said(SHAPE)], max_tokens=4
        )
        assert completion.choices[0].message.content == expected
        assert completion.usage.prompt_tokens == expected.usage["prompt_tokens"]


OPTIONS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"max_completion_tokens": 3, "max_tokens": 9}, {"max_new_tokens": 3}),
    ({"temperature": 1.4, "seed": 3, "max_tokens": 9}, dict(temperature=1.4, seed=3)),
    (
        {"temperature": 2, "top_p": 0.5, "seed": 4, "max_tokens": 9},
        dict(temperature=2.0, top_p=0.5, seed=4),
    ),
    ({"temperature": 1, "top_p": 0, "max_tokens": 9}, {}),
    ({"stop": "object", "max_tokens": 9}, {"stop": "object"}),
    ({"stop": ["object", "are"], "max_tokens": 9}, {"stop": ["object", "are"]}),
    (
        {"extra_body": {"reduction": "hybrid-72-36"}, "max_tokens": 9},
        dict(reduction="hybrid-72-36"),
    ),
    (
        {"extra_body": {"top_k": 2}, "temperature": 2, "seed": 5, "max_tokens": 9},
        dict(temperature=2.0, top_k=2, seed=5),
    ),
)


@pytest.mark.parametrize(("sent", "options"), OPTIONS)
def test_options(client: Any, model: Model, sent: dict[str, Any], options: dict[str, Any]) -> None:
    expected = model.generate(SCENE, LONG, **{"max_new_tokens": 9, **options})
    completion = client.chat.completions.create(
        model="tiny", messages=about(data_url(SCENE.read_bytes()), LONG), **sent
    )
    assert completion.choices[0].message.content == expected
    assert completion.choices[0].finish_reason == expected.finish_reason
    details = completion.usage.prompt_tokens_details
    assert details.image_tokens == expected.usage["image_tokens"]
    assert details.kept_image_tokens == expected.usage["kept_image_tokens"]


def test_the_servers_own_reduction_and_how_to_do_without(model: Model) -> None:
    messages = about(data_url(SCENE.read_bytes()), SHAPE)
    with (
        serving(model, reduction=Reduction.of("tome-72")) as running,
        client_of(running) as client,
    ):
        for name, kept in ((None, 72), ("none", 576), ("hybrid-72-36", 36)):
            extra = {"reduction": name} if name else {}
            completion = client.chat.completions.create(
                model="tiny", messages=messages, extra_body=extra, max_tokens=2
            )
            assert completion.usage.prompt_tokens_details.kept_image_tokens == kept


def test_two_images_in_one_message(client: Any, model: Model) -> None:
    other = SCENE.with_name("scene2.png")
    expected = model.generate([SCENE, other], "What differs?", max_new_tokens=6)
    messages = about(data_url(SCENE.read_bytes()), "What differs?")
    second = {"type": "image_url", "image_url": {"url": data_url(other.read_bytes())}}
    messages[0]["content"].append(second)
    completion = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    assert completion.choices[0].message.content == expected
    assert completion.usage.prompt_tokens_details.image_tokens == 1152


def test_many_at_once(server: Running, model: Model) -> None:
    """More than the batch holds, in all ways, through the asynchronous client."""
    peer("openai")
    questions = [SHAPE, LONG, "How many objects are there?"]
    expected = {text: model.generate(SCENE, text, max_new_tokens=4) for text in questions}
    url = data_url(SCENE.read_bytes())

    async def ask(client: Any, number: int) -> tuple[str, str]:
        text = questions[number % 3]
        wish: dict[str, Any] = {"model": "tiny", "messages": about(url, text), "max_tokens": 4}
        if number % 2:
            stream = await client.chat.completions.create(**wish, stream=True)
            return text, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        completion = await client.chat.completions.create(**wish)
        return text, completion.choices[0].message.content

    async def ask_all() -> list[tuple[str, str]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(12)))

    assert all(answer == expected[text] for text, answer in asyncio.run(ask_all()))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"n": 2}, "only one answer"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"temperature": -1}, "temperature -1.0 must be in"),
        ({"top_p": 1.5}, r"top_p 1.5 must be in \(0, 1\]"),
        ({"seed": -1}, "seed -1 must be in"),
        ({"max_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"max_tokens": 101}, "max_tokens 101: at most 100"),
        ({"stop": [""]}, "stop string must not be empty"),
        ({"extra_body": {"reduction": "much"}}, "much"),
        ({"messages": [said("x " * 3000)]}, "exceed the context of 2048"),
        ({"messages": [said("x" * 10**6)]}, "exceeds the context of 2048"),
        ({"messages": [said("<image>")]}, "1 <image> marker, but 0 images were given"),
        ({"messages": [said("x", "tool")]}, "the role 'tool' is not supported"),
        ({"messages": about("data:image/png;base64,AAAA", "x")}, "image 1: .*not an image"),
        ({"messages": about("http://169.254.169.254/", "x")}, "image 1: .*URLs are switched off"),
        ({"messages": about("file:///etc/passwd", "x")}, "image 1: files are switched off"),
    ],
)
def test_bad_requests_are_the_clients_exceptions(
    client: Any, wish: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": [said("x")], **wish})
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["type"] == "invalid_request_error"


def test_too_many_images(client: Any) -> None:
    messages = about(data_url(SCENE.read_bytes()), "x") * 3
    with pytest.raises(openai.BadRequestError, match="3 images, a request may have 2"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_models(client: Any) -> None:
    [card] = client.models.list().data
    assert (card.id, card.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    for ask in (
        lambda: client.models.retrieve("gpt-4o/x"),
        lambda: client.chat.completions.create(model="gpt-4o", messages=[said("x")]),
    ):
        with pytest.raises(openai.NotFoundError, match="is not served here") as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_paths_and_methods_that_are_not_there(server: Running) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        response = httpx.request(method, server.url + path)
        assert response.status_code == status, path
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["allow"] == "GET"


def post(server: Running, content: Any, **headers: str) -> Any:
    headers = {"Content-Type": "application/json", **headers}
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, content=content, headers=headers, timeout=60)


def test_only_json_is_read(server: Running) -> None:
    body = json.dumps({"messages": [said(SHAPE)], "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = post(server, body, **{"Content-Type": kind})
        assert response.status_code == 415
    assert post(server, body, **{"Content-Type": "application/json; charset=utf-8"}).is_success
    response = post(server, "{")
    assert response.status_code == 400 and "not valid JSON" in response.text


def test_a_body_that_is_too_long(server: Running) -> None:
    """Announced or in chunks, the sender hears 413, whatever it had still wanted to send."""

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    for content in (b"x" * 4_000_000, chunks()):
        response = post(server, content)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the body exceeds the limit of 3000000 bytes"


def test_bugs_are_logged_and_not_told(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(server.service.preparer, "read", broken)
    response = post(server, "{}")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "the server failed to answer this request",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert "KeyError: '/secret/path'" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_costs_one_request(gated: Gated, stream: bool) -> None:
    gated.steps.release(10_000)
    with serving(gated) as running, client_of(running) as client:
        real, gated.step = gated.step, fail  # type: ignore[method-assign]
        wish: dict[str, Any] = {"model": "tiny", "messages": [said("x")], "max_tokens": 3}
        with pytest.raises(openai.APIError, match="the server failed to answer"):
            list(client.chat.completions.create(**wish, stream=stream))
        gated.step = real  # type: ignore[method-assign]
        assert client.chat.completions.create(**wish).usage.completion_tokens == 3


def fail(*_: Any) -> None:
    raise ValueError("inside")  # even one that a client could have caused


# ---- who may ask -------------------------------------------------------------------------------


def test_a_key(model: Model) -> None:
    with serving(model, api_key="sesame") as running:
        wish: dict[str, Any] = {"model": "tiny", "messages": [said("x")], "max_tokens": 1}
        for key in ("wrong", "sesamE", "sesame2", "sesam", "sesam\u00e9"):
            header = {"Authorization": f"Bearer {key}".encode()}
            response = httpx.post(f"{running.url}/v1/chat/completions", json=wish, headers=header)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        with client_of(running, key="wrong") as client:
            for ask in (client.models.list, lambda: client.chat.completions.create(**wish)):
                with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
                    ask()
        for path in ("/v1/models", "/metrics", "/nowhere"):
            assert httpx.get(running.url + path).status_code == 401
            basic = {"Authorization": "Basic sesame"}
            assert httpx.get(running.url + path, headers=basic).status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
    with serving(model, api_key="sesame") as running, client_of(running, key="sesame") as client:
        assert client.chat.completions.create(**wish).usage.completion_tokens == 1


def test_other_names_of_a_local_server_are_refused(model: Model) -> None:
    """A page can let its own name point here; the browser then thinks that it may read answers."""
    with serving(model, allowed_hosts=("localhost", "127.0.0.1", "::1")) as running:
        for host, status in (
            ("localhost", 200),
            ("LOCALHOST:8000", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:8000", 200),
            ("evil.test", 403),
            ("localhost.evil.test:8000", 403),
            ("127.0.0.1.evil.test", 403),
        ):
            response = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
            assert response.status_code == status, host


def test_pages_of_other_sites(model: Model, server: Running) -> None:
    page = {"Origin": "http://page.test"}
    asking = {**page, "Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    assert (
        "access-control-allow-origin" not in httpx.get(server.url + "/health", headers=page).headers
    )
    assert httpx.options(server.url + path, headers=asking).status_code == 405
    with serving(model, cors_origins=("http://page.test",), api_key="k") as running:
        response = httpx.options(running.url + path, headers=asking)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://page.test"
        other = httpx.get(f"{running.url}/health", headers={"Origin": "http://other.test"})
        assert "access-control-allow-origin" not in other.headers


# ---- images from elsewhere ---------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of a host that passes for a public one under the name images.test."""
    tool = load_tool("load_server")
    with tool.public_hosts(), tool.ImageHost() as host:
        yield host.url("images.test", "")


def test_urls_of_allowed_domains_and_where_they_lead(
    model: Model, elsewhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llava_lite.server")
    home = elsewhere.replace("images.test", "127.0.0.1")
    other = elsewhere.replace("images.test", "other.test")
    domains = ("images.test", "127.0.0.1", "169.254.169.254")
    limits = {"url_domains": domains, "max_image_bytes": 100_000}
    with serving(model, **limits) as running, client_of(running) as client:

        def ask(url: str) -> str:
            completion = client.chat.completions.create(
                model="tiny", messages=about(url, SHAPE), max_tokens=3
            )
            return completion.choices[0].message.content

        assert ask(f"{elsewhere}/scene.png") == "ring"
        assert ask(f"{elsewhere}/to?{elsewhere}/scene.png") == "ring"
        for url, reason in (
            (f"{home}/scene.png", "non-public address 127.0.0.1"),
            (f"{elsewhere}/to?{home}/scene.png", "non-public address 127.0.0.1"),
            (f"{elsewhere}/to?http://169.254.169.254/x", "non-public address 169.254.169.254"),
            (f"{other}/scene.png", "other.test, a domain that is not allowed"),
            (f"{elsewhere}/to?{other}/scene.png", "other.test, a domain that is not allowed"),
            (f"{elsewhere}/to?file:///etc/passwd", "not an http"),
            (f"{elsewhere}/to?data:image/png;base64,AAAA", "not an http"),
            (f"{elsewhere}/loop", "more than 5 redirects"),
            (f"{elsewhere}/much", "more than 100000 bytes"),
        ):
            caplog.clear()
            with pytest.raises(openai.BadRequestError) as caught:
                ask(url)
            # What is inside the network is for the log alone.
            said = caught.value.body["message"].removeprefix(f"image 1: {fetch.describe(url)}: ")
            assert said == "not an image that can be fetched from here; send a data URL"
            assert reason in caplog.text


def test_files_below_the_media_root(model: Model) -> None:
    with serving(model, media_root=SCENE.parent) as running, client_of(running) as client:

        def ask(url: str) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=about(url, SHAPE), max_tokens=3
            )

        assert ask(f"file://{SCENE}").choices[0].message.content == "ring"
        assert ask("scene.png").choices[0].message.content == "ring"
        for url in ("file:///etc/passwd", "../config.json", str(SCENE.parents[1] / "config.json")):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(url)
            message = caught.value.body["message"]
            assert message == "image 1: no such file below the media root"


# ---- the queue ---------------------------------------------------------------------------------


def background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wish_for(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [said("x")], "max_tokens": tokens, **fields}


def health(server: Running) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health").json()


def test_a_full_queue(gated: Gated) -> None:
    statuses: list[int] = []
    with serving(gated, max_batch_size=1, max_queue=2) as running, client_of(running) as client:

        def ask() -> None:
            client.chat.completions.create(**wish_for(2))
            statuses.append(200)

        threads = [background(ask)]
        eventually(lambda: health(running)["running"] == 1)
        threads += [background(ask), background(ask)]
        eventually(lambda: running.service.worker.num_waiting == 2)
        state = health(running)
        assert (state["status"], state["queue"], state["running"]) == ("ok", 2, 1)
        assert state["busy"] is True
        with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
            client.chat.completions.create(**wish_for(2))
        assert caught.value.response.headers["retry-after"] == "1"
        gated.steps.release(10_000)
        for thread in threads:
            thread.join(20)
        assert statuses == [200] * 3
        running.until_idle()
        assert health(running)["busy"] is False
        text = httpx.get(f"{running.url}/metrics").text
        assert 'llava_lite_requests_total{status="429"} 1\n' in text
        assert "llava_lite_answers_total 3\n" in text
        assert "llava_lite_completion_tokens_total 6\n" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_computation(gated: Gated, stream: bool) -> None:
    with serving(gated, max_batch_size=1) as running:
        body = {**wish_for(300), "stream": stream}
        gated.steps.release(3)
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as sock:
            content = json.dumps(body).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            sock.sendall(head.encode() + content)
            eventually(lambda: len(gated.sizes) == 3)
        eventually(lambda: not running.app.state.open_requests)
        gated.steps.release(10_000)
        running.until_idle()
        assert len(gated.sizes) <= 4  # the step it was in, and no other
        assert running.app.state.statuses[499] == 1
        assert running.service.preparing == 0
        with client_of(running) as client:
            assert client.chat.completions.create(**wish_for(2)).usage.completion_tokens == 2


def test_a_client_that_closes_its_stream(gated: Gated) -> None:
    with serving(gated, max_batch_size=1) as running, client_of(running) as client:
        gated.steps.release(8)
        stream = client.chat.completions.create(**wish_for(300), stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: not running.app.state.open_requests)
        gated.steps.release(10_000)
        running.until_idle()
        assert len(gated.sizes) < 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(gated: Gated, stream: bool) -> None:
    with serving(gated, request_timeout=0.5) as running, client_of(running) as client:
        with pytest.raises(openai.APIError, match="the request took too long") as caught:
            list(client.chat.completions.create(**wish_for(300), stream=stream))
        assert stream or caught.value.status_code == 504
        gated.steps.release(10_000)
        running.until_idle()
        assert len(gated.sizes) < 20  # the worker hears of it between two steps, not of 300


def test_those_who_leave_make_room(gated: Gated) -> None:
    """While the model is busy with a step, the queue holds only who is there."""
    with serving(gated, max_batch_size=1, max_queue=2) as running:
        worker, port = running.service.worker, int(running.url.rpartition(":")[2])
        with connection(port, posted(wish_for(2))):
            eventually(lambda: health(running)["running"] == 1)
            with connection(port, posted(wish_for(2))), connection(port, posted(wish_for(2))):
                eventually(lambda: worker.num_waiting == 2)
            eventually(lambda: worker.num_waiting == 0)
            with connection(port, posted(wish_for(2))):
                eventually(lambda: worker.num_waiting == 1)
                gated.steps.release(10_000)
                running.until_idle()
        assert running.app.state.statuses[429] == 0


def posted(body: Any, missing: int = 0) -> bytes:
    """A request as it is sent, its last bytes missing."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content[: len(content) - missing]


@contextlib.contextmanager
def connection(port: int, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(data)
        yield sock


def test_bodies_that_do_not_come_take_no_place_in_the_queue(gated: Gated) -> None:
    gated.steps.release(10_000)
    with serving(gated, max_queue=2) as running, contextlib.ExitStack() as open_ones:
        port = int(running.url.rpartition(":")[2])
        for _ in range(5):
            open_ones.enter_context(connection(port, posted(wish_for(2), missing=1)))
        eventually(lambda: len(running.app.state.open_requests) == 5)
        eventually(lambda: running.service.memory.taken > 0)
        with client_of(running) as client:
            assert client.chat.completions.create(**wish_for(2)).usage.completion_tokens == 2
        open_ones.close()
        eventually(lambda: not running.app.state.open_requests)
        assert running.service.memory.taken == 0


def test_bodies_have_bounded_memory_together(gated: Gated) -> None:
    with serving(gated, max_queue=2, max_body_bytes=1000) as running:
        port, body = int(running.url.rpartition(":")[2]), {"messages": "x" * 900}
        with connection(port, posted(body, 1)), connection(port, posted(body, 1)):
            eventually(lambda: running.service.memory.taken > 1800)
            with connection(port, posted(body)) as third:
                assert b" 429 " in third.recv(1000).partition(b"\r\n")[0]


def test_idle_connections_do_not_make_the_server_unwell(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    with contextlib.ExitStack() as idle:
        for _ in range(1100):
            idle.enter_context(connection(port, b""))
        assert health(server)["status"] == "ok"


def test_too_many_requests_at_once(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MOST_REQUESTS", 1)
    with serving(gated) as running:
        port = int(running.url.rpartition(":")[2])
        with connection(port, posted(wish_for(2), missing=1)):
            eventually(lambda: len(running.app.state.open_requests) == 1)
            response = httpx.get(f"{running.url}/v1/models")
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["message"] == "too many requests at once"
            assert health(running)["status"] == "ok"


def test_an_answer_is_as_long_as_server_and_context_allow(gated: Gated) -> None:
    """A request that names no limit is not refused for the server's own."""
    preparer = create_app(gated, Settings("tiny", max_new_tokens=300)).state.service.preparer

    def prepared(prompt: str, **fields: Any) -> Any:
        body = json.dumps({"messages": [said(prompt)], **fields}).encode()
        return asyncio.run(preparer.prepare(body))[0].request

    limit = gated.config.text.max_positions
    assert prepared("x").max_new_tokens == min(300, limit - prepared("x").counts.prompt)
    long = "x " * ((limit - prepared("x").counts.prompt) // 2)
    request = prepared(long)
    assert 1 < request.max_new_tokens == limit - request.counts.prompt < 300
    with pytest.raises(ContextError, match="exceed the context"):
        prepared(long, max_tokens=300)
    preparer.settings = Settings("tiny", max_new_tokens=7)
    assert prepared("x").max_new_tokens == 7


def test_system_texts_of_requests_are_not_cached(gated: Gated) -> None:
    gated.steps.release(10_000)
    with serving(gated) as running, client_of(running) as client:
        for number in range(10):
            messages = [said(f"Count {number}.", "system"), said("x")] if number else [said("x")]
            wish: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 1}
            client.chat.completions.create(**wish)
        [(template, system)] = gated.prefix.known_ids
        assert system is None
        assert list(gated.prefix.caches) == [gated.prefix.ids(template, None)]


@pytest.mark.parametrize("broken", ["read", "prompt"])
def test_a_value_error_inside_is_a_bug(
    server: Running, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(server.service.preparer, broken, fail)
    response = post(server, json.dumps({"messages": [said("x")]}))
    assert response.status_code == 500 and "inside" not in response.text


def test_an_error_outside_of_the_service_is_counted(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = server.app.state.statuses
    before = statuses[500]
    monkeypatch.setattr(server.service, "health", fail)
    assert httpx.get(f"{server.url}/health").status_code == 500
    eventually(lambda: statuses[500] == before + 1)
    assert statuses[0] == 0


def test_the_key_is_not_in_the_settings_text() -> None:
    assert "sesame" not in repr(Settings("tiny", api_key="sesame"))


def test_a_body_that_never_comes(gated: Gated) -> None:
    with serving(gated, body_timeout=0.2) as running:
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 20) as sock:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            sock.sendall(head + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
            assert b" 408 " in sock.recv(1000).partition(b"\r\n")[0]
        assert running.service.preparing == 0


def test_the_end_refuses_what_is_new(gated: Gated) -> None:
    with serving(gated) as running, client_of(running) as client:
        running.service.draining = True
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client.chat.completions.create(**wish_for(2))
        assert caught.value.status_code == 503
        response = httpx.get(f"{running.url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "shutting down")


@pytest.mark.parametrize("stream", [False, True])
def test_what_still_runs_at_the_end_hears_of_it(gated: Gated, stream: bool) -> None:
    errors: list[Exception] = []
    with serving(gated, max_batch_size=1) as running, client_of(running) as client:

        def ask() -> None:
            try:
                list(client.chat.completions.create(**wish_for(300), stream=stream))
            except openai.APIError as error:
                errors.append(error)

        threads = [background(ask), background(ask)]
        eventually(lambda: running.service.worker.num_waiting == 1)
        gated.steps.release(2)
        eventually(lambda: len(gated.sizes) == 2)
        threading.Timer(0.2, gated.steps.release).start()  # the step that is being waited for
        asyncio.run(running.service.stop_model())
        for thread in threads:
            thread.join(20)
    assert ["shutting down" in str(error) for error in errors] == [True, True]


def test_the_log_has_no_contents(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llava_lite.server"):
        body = json.dumps({"messages": [said("secret question")], "max_tokens": 2})
        post(server, body, Authorization="Bearer secretkey")
        httpx.get(f"{server.url}/v1/mod%0Aels?secret=1")
        eventually(lambda: len(caplog.records) == 2)
    chat, other = [record.getMessage() for record in caplog.records]
    assert chat.startswith("POST /v1/chat/completions 200 ") and chat.endswith("+2 tokens")
    assert other.startswith("GET /v1/mod?els 404 ")
    assert "secret" not in caplog.text and "\n" not in chat + other


def test_an_app_can_be_made_without_serving_it(model: Model, tmp_path: Path) -> None:
    app = create_app(model, Settings("tiny"))
    assert app.state.service.health()[0] == 503


def test_few_fetched_images_wait_to_be_decoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have 20 MB, and no body that was counted."""
    fetched: list[str] = []
    monkeypatch.setattr(prepare, "fetch_image", lambda source, _: fetched.append(source) or b"")

    async def crowd() -> None:
        preparer = prepare.Preparer(model, Settings(model_name="tiny"))
        decoding = asyncio.Event()

        async def opened(*_: object) -> Image.Image:
            await decoding.wait()
            return Image.new("RGB", (8, 8))

        monkeypatch.setattr(preparer, "open", opened)
        names = [f"https://images.example.org/{number}.png" for number in range(20)]
        tasks = [asyncio.create_task(preparer.image(1, name)) for name in names]
        await asyncio.sleep(0.2)
        assert len(fetched) == prepare.FETCHES
        decoding.set()
        assert len(await asyncio.gather(*tasks)) == len(fetched) == 20
        preparer.close()

    asyncio.run(crowd())
