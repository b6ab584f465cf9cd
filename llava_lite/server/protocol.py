"""Requests and responses in the format of OpenAI.

Unknown fields are accepted and ignored. A known field that would change the answer, but is not
supported, is refused. Lists are bounded and stop at the first error: a small body must not cost
much time.
"""

import time
import uuid
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from llava_lite.generation.answer import Answer
from llava_lite.server.errors import ApiError

MOST_MESSAGES, MOST_PARTS = 1000, 256
MOST_TOOL_CALLS = 128  # tool calls are refused
MOST_STOPS, LONGEST_STOP = 16, 1000


class Unsupported:
    """Marks a field that is refused, unless it is missing or has a value that requests nothing."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = (None, *neutral)


class ImageUrl(BaseModel):
    """`detail` is accepted and ignored."""

    url: str


class Part(BaseModel):
    """A piece of a message: text, or an image by its URL."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    """One message of the conversation."""

    role: str
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    tool_calls: list[Any] | None = Field(None, max_length=MOST_TOOL_CALLS)


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions. `top_k`, `reduction` and `image_size` are extensions."""

    messages: list[Message] = Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    reduction: str | None = None
    image_size: int | None = None
    response_format: Any = None
    tools: Annotated[Any, Unsupported([])] = None
    functions: Annotated[Any, Unsupported([])] = None
    tool_choice: Annotated[Any, Unsupported("none", "auto")] = None
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    logprobs: Annotated[Any, Unsupported(False)] = None
    top_logprobs: Annotated[Any, Unsupported(0)] = None
    logit_bias: Annotated[Any, Unsupported({})] = None
    frequency_penalty: Annotated[Any, Unsupported(0)] = None
    presence_penalty: Annotated[Any, Unsupported(0)] = None
    modalities: Annotated[Any, Unsupported(["text"])] = None
    audio: Annotated[Any, Unsupported()] = None
    web_search_options: Annotated[Any, Unsupported()] = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError (400) naming the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = max(error.errors(include_url=False, include_input=False), key=depth)
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg']}") from None
        place = ".".join(map(str, first["loc"]))
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{place or 'body'}: {first['msg']}", param) from None
    refuse_unsupported(request)
    return request


def depth(error: Any) -> int:
    """The depth of an error in the body. The deepest error of a union is the most specific."""
    return len(error["loc"])


def refuse_unsupported(request: ChatRequest) -> None:
    """Raise ApiError (400) for unsupported values."""
    if request.n not in (None, 1):
        raise ApiError(400, f"n {request.n}: only one answer per request is supported", "n")
    for name, field in ChatRequest.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Unsupported)]
        if any(getattr(request, name) not in mark.neutral for mark in marks):
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
    form = request.response_format
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        name = "response_format"
        raise ApiError(400, f"{name}: only text is supported", name, "unsupported_parameter")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stops):
        raise ApiError(
            400, f"stop: at most {MOST_STOPS} strings of {LONGEST_STOP} characters", "stop"
        )


# ---- responses ---------------------------------------------------------------------------------


def count_usage(answer: Answer) -> dict[str, Any]:
    """Tokens before the answer, image tokens included, and tokens of the answer."""
    image, new = answer.usage["image_tokens"], answer.usage["completion_tokens"]
    prompt = answer.usage["prompt_tokens"] + image
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "image_tokens": image,
            "kept_image_tokens": answer.usage["kept_image_tokens"],
        },
    }


class Completion:
    """One response: id, time and model are the same in every chunk."""

    def __init__(self, model_name: str, include_usage: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model_name, self.include_usage = model_name, include_usage

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response without streaming. `timings`, in seconds, is an extension."""
        message = {"role": "assistant", "content": str(answer), "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        return {
            **self.head("chat.completion"),
            "choices": [choice],
            "usage": count_usage(answer),
            "timings": answer.timings,
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self.head("chat.completion.chunk"), "choices": [choice], **usage}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last event of a stream with `include_usage`."""
        head = self.head("chat.completion.chunk")
        return {**head, "choices": [], "usage": count_usage(answer)}

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}
