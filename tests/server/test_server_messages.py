"""What is read from a request: its fields, its messages, its images."""

import base64
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.models import TINY_CONFIG

pytest.importorskip("fastapi")

from llava_lite.errors import ImageError, PromptError
from llava_lite.inputs import fetch
from llava_lite.inputs.messages import Conversation
from llava_lite.inputs.pixels import to_square
from llava_lite.server import protocol
from llava_lite.server.errors import ApiError
from llava_lite.server.images import fetch_image, is_remote, open_image
from llava_lite.server.messages import read_messages
from llava_lite.server.protocol import parse_request
from llava_lite.server.settings import Settings

FIELDS = st.sampled_from(
    ["n", "stop", "tools", "stream", "stream_options", "max_tokens", "type", "text", "url", "role"]
)
USER = {"role": "user", "content": "star?"}


def request_of(**fields: Any) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def image_part(url: str = "data:,x") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def conversation(*messages: dict[str, Any], template: str = "vicuna_v1") -> Conversation:
    body = json.dumps({"messages": messages}).encode()
    return read_messages(parse_request(body).messages, template)


# ---- fields ------------------------------------------------------------------------------------


def test_harmless_fields_are_accepted() -> None:
    request = parse_request(
        request_of(
            n=1,
            user="me",
            tools=[],
            tool_choice="none",
            logprobs=False,
            presence_penalty=0,
            frequency_penalty=0.0,
            logit_bias={},
            response_format={"type": "text"},
            metadata={"a": 1},
            something_new=[1],
            stream_options={"include_usage": True, "more": 1},
        )
    )
    assert request.include_usage and not request.stream


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "text"}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"temperature": "warm"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stream": "perhaps"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [USER] * 1001}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(request_of(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{}] * 257}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 257}],
        [{"role": "user", "content": [5] * 1_000_000}],
        [5] * 1_000_000,
        [{"role": "user", "content": "x", "tool_calls": [1] * 129}],
    ],
)
def test_long_lists_are_left_early(messages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    real = protocol.depth
    monkeypatch.setattr(protocol, "depth", lambda error: counts.append(1) or real(error))
    with pytest.raises(ApiError) as caught:
        parse_request(json.dumps({"messages": messages}).encode())
    assert caught.value.param == "messages"
    assert len(counts) < 10  # errors that were looked at


def test_fields_that_nobody_knows_are_not_kept() -> None:
    request = parse_request(request_of(unknown=["x" * 1000], seed=1))
    assert "unknown" not in request.model_dump() and request.model_extra is None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"messages":' + b"[" * 100_000, b'"\\ud800"']
)
def test_a_body_that_is_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not valid JSON") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_a_body_that_is_no_object() -> None:
    with pytest.raises(ApiError, match="body: "):
        parse_request(b"[]")


# ---- messages ----------------------------------------------------------------------------------


def test_one_question() -> None:
    assert conversation(USER) == Conversation((("star?", None),), (), None)


def test_system_history_and_several_messages_in_a_row() -> None:
    found = conversation(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [text_part("Be kind.")]},
        {"role": "user", "content": "one"},
        {"role": "user", "content": [text_part("two")]},
        {"role": "assistant", "content": " three "},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    )
    assert found.system == "Be brief.\nBe kind."
    assert found.turns == (("one\ntwo", "three\nfour"), ("five", None))


def test_images_at_an_end_go_first_and_those_within_stay() -> None:
    first, second = image_part("data:,a"), image_part("data:,b")
    for parts in ([text_part("x"), first, second], [first, second, text_part("x")]):
        found = conversation({"role": "user", "content": parts})
        assert found.turns == (("<image>\n<image>\nx", None),)
        assert found.images == ("data:,a", "data:,b")
    found = conversation({"role": "user", "content": [first, text_part("and"), second]})
    assert found.turns == (("<image>\nand\n<image>", None),)
    found = conversation({"role": "user", "content": [text_part("a"), first, text_part("b")]})
    assert found.turns == (("a\n<image>\nb", None),)


def test_a_text_may_place_its_images_itself() -> None:
    parts = [text_part("Compare <image> and <image>."), image_part(), image_part()]
    found = conversation({"role": "user", "content": parts})
    assert found.turns == (("Compare <image> and <image>.", None),)


def test_the_template_says_what_follows_an_image() -> None:
    found = conversation({"role": "user", "content": [image_part()]}, template="plain")
    assert found.turns == (("<image>", None),)


def test_images_of_all_turns_in_order() -> None:
    found = conversation(
        {"role": "user", "content": [image_part("data:,a"), text_part("x")]},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": [text_part("z"), {"type": "input_image", "image_url": "q"}]},
    )
    assert found.images == ("data:,a", "q")
    assert found.turns == (("<image>\nx", "y"), ("<image>\nz", None))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "messages.0: the role 'tool' is not supported"),
        ([USER, {"role": "system", "content": "x"}], "messages.1: the role 'system'"),
        ([{"role": "assistant", "content": "x"}, USER], "needs a user message before it"),
        (
            [USER, {"role": "assistant", "content": "x"}],
            "the last message must have the role 'user'",
        ),
        ([{"role": "system", "content": "x"}], "the last message must have the role 'user'"),
        ([{"role": "user"}], "messages.0: a user message needs content"),
        ([{"role": "user", "content": []}], "needs content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "content.0: a part of type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "the text part is empty"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "the image_url part is empty"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}, USER], "tool calls"),
        ([{"role": "system", "content": [image_part()]}, USER], "holds text only"),
        ([{"role": "system", "content": "<image>"}, USER], "only stand in a user message"),
    ],
)
def test_messages_that_make_no_conversation(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        conversation(*messages)
    assert reason in caught.value.message
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "parts",
    [
        [text_part("<image>")],
        [text_part("<image> <image>"), image_part()],
        [image_part(), text_part("<image>"), image_part()],
    ],
)
def test_markers_without_images(parts: list[dict[str, Any]]) -> None:
    with pytest.raises(PromptError, match="<image>"):
        conversation({"role": "user", "content": parts})


def test_markers_fit_the_images_of_their_own_turn() -> None:
    """Three markers and three images in all, but an image would stand in another turn."""
    with pytest.raises(PromptError, match="2 <image> markers, but 1 image was given"):
        conversation(
            {"role": "user", "content": [text_part("<image> and <image>?"), image_part()]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [text_part("<image>?"), image_part(), image_part()]},
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | JSON,
        "content": st.text(max_size=9)
        | st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "image_url", "input_image", "video"])},
                optional={"text": JSON | st.text(max_size=9), "image_url": JSON},
            ),
            max_size=3,
        )
        | JSON,
    },
)


@given(st.lists(MESSAGE, max_size=4) | JSON, st.dictionaries(FIELDS, JSON, max_size=3))
def test_anything_else_is_a_refusal_and_no_crash(messages: Any, fields: dict[str, Any]) -> None:
    body = json.dumps({**fields, "messages": messages}).encode()
    try:
        found = read_messages(parse_request(body).messages, "vicuna_v1")
    except (ApiError, PromptError):
        return
    assert found.turns[-1][1] is None
    assert sum(question.count("<image>") for question, _ in found.turns) == len(found.images)


# ---- images ------------------------------------------------------------------------------------


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def opened(source: str | bytes, exif: bool = True, **settings: Any) -> Image.Image:
    return open_image(source, Settings("tiny", **settings), TINY_CONFIG, exif)


def refused(source: str | bytes, reason: str, **settings: Any) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        opened(source, **settings)
    assert os.fspath(settings.get("media_root") or "no root") not in str(caught.value)


def test_what_is_left_of_an_image_is_the_square_that_the_model_sees() -> None:
    expected = to_square(picture(), TINY_CONFIG.vision.image_size, TINY_CONFIG.pad)
    assert expected.size == (56, 56)
    for source in (data_url(encoded(picture())), encoded(picture())):
        assert opened(source).tobytes() == expected.tobytes()


def test_rotation_is_the_models_choice() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), exif=exif)
    assert opened(data).tobytes() != opened(data, exif=False).tobytes()


def test_limits_of_images() -> None:
    data = encoded(picture())
    refused(data, "5400 pixels exceed the limit of 5399", max_pixels=5399)
    assert opened(data, max_pixels=5400).size == (56, 56)
    refused(data_url(data), "more than 100 bytes", max_image_bytes=100)
    refused(data, "90x60, a side may have 89 pixels", max_side=89)
    assert opened(data, max_side=90).size == (56, 56)
    refused(encoded(Image.new("L", (1, 1_000_000))), "1x1000000, a side may have 65535 pixels")
    refused(b"GIF89a", "cannot|not an image")


def test_padding_keeps_to_the_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of few pixels is no way to a square of many."""
    sizes = []
    real = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *c: sizes.append(size) or real(mode, size))
    data = encoded(real("L", (1, 3000)))
    assert opened(data, max_pixels=1_000_000).size == (56, 56)
    assert sizes and max(width * height for width, height in sizes) <= 1_000_000


def test_files_are_switched_off() -> None:
    for source in ("file:///etc/passwd", "/etc/passwd", "../x.png", "a.png", "C:\\a.png", ""):
        refused(source, "files are switched off")


@pytest.fixture
def media_root(tmp_path: Path) -> Path:
    """A folder with a picture, beside one with a secret."""
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b.png").write_bytes(encoded(picture()))
    (tmp_path / "secret.png").write_bytes(encoded(picture()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_files_below_the_media_root(media_root: Path) -> None:
    path = media_root / "sub" / "a b.png"
    for source in (f"file://{path}", str(path), "sub/a b.png", "file://sub/a%20b.png"):
        assert opened(source, media_root=media_root).size == (56, 56)
    refused(str(path), "more than 50 bytes", media_root=media_root, max_image_bytes=50)


def test_nothing_else_is_read(media_root: Path) -> None:
    secret = media_root.parent / "secret.png"
    sources = (
        *("/etc/passwd", "file:///etc/passwd", str(secret), f"file://{secret}", "../secret.png"),
        *("sub/../../secret.png", "file://..%2Fsecret.png", "link.png", "loop.png", "pipe.png"),
        *("sub", "", "nothing.png", "a\0b", "file://%00", "x" * 5000),
    )
    for source in sources:
        refused(source, "^no such file below the media root$", media_root=media_root)
    refused("ftp://example.org/a.png", "scheme 'ftp'", media_root=media_root)


def test_urls_are_switched_off() -> None:
    for url in ("http://example.org/a.png", "HTTPS://example.org/a.png?token=secret"):
        assert is_remote(url)
        with pytest.raises(ImageError, match="image URLs are switched off") as caught:
            fetch_image(url, Settings("tiny"))
        assert "secret" not in str(caught.value)
    assert not any(map(is_remote, ("file:///a", "data:image/png,", "a.png", "http:/a")))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.test/a.png", "other.test, a domain that is not allowed"),
        ("http://images.test.other.test/a.png", "not allowed"),
        ("http://images.test@other.test/a.png", "not allowed"),
        ("http://169.254.169.254/latest", "not allowed"),
        ("http://127.0.0.1/a.png", "non-public address 127.0.0.1"),
        ("http://[::1]/a.png", "not allowed"),
        ("http://sub/a.png", "not allowed"),
    ],
)
def test_hosts_that_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, reason: str
) -> None:
    caplog.set_level(logging.INFO, "llava_lite.server")
    settings = Settings("tiny", url_domains=("images.test", "*.sub", "127.0.0.1"))
    monkeypatch.setattr(fetch.socket, "socket", None)  # nothing can be connected to
    with pytest.raises(ImageError, match="not an image that can be fetched from here"):
        fetch_image(url, settings)
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("images.test", True),
        ("IMAGES.test.", True),
        ("a.images.test", False),
        ("a.sub.test", True),
        ("a.b.sub.test", True),
        ("sub.test", False),
        ("xsub.test", False),
    ],
)
def test_names_of_hosts(host: str, allowed: bool) -> None:
    limits = fetch.Limits(True, False, 1.0, 1, ("images.test", "*.sub.test"))
    assert limits.allows_host(host) is allowed
    assert limits._replace(domains=None).allows_host(host)
    assert not limits._replace(domains=()).allows_host(host)


@pytest.mark.parametrize("domain", ["http://a.test", "a.test/x", "*", "*.", "", "a b", "a.test:80"])
def test_domains_that_are_none(domain: str) -> None:
    with pytest.raises(ValueError, match="is not a domain"):
        Settings("tiny", url_domains=(domain,))


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the media root is not a folder"):
        Settings("tiny", media_root=tmp_path / "nowhere")
    for key in ("", "a b", "\u00e9", "a\n", " a"):  # none of these survives the way to here
        with pytest.raises(ValueError, match="the API key must be printable ASCII"):
            Settings("tiny", api_key=key)
