"""OpenAI messages become the turns of a prompt, its system text, and the sources of its images."""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

from llava_lite.inputs.messages import (
    Conversation,
    ImagePart,
    Message,
    MessageError,
    Part,
    fold_messages,
)
from llava_lite.inputs.prompt import IMAGE_MARKER, check_images, place_images
from llava_lite.server import protocol
from llava_lite.server.errors import ApiError

SYSTEM_ROLES = ("system", "developer")
TEXT_TYPES, IMAGE_TYPES = ("text", "input_text"), ("image_url", "input_image")


def read_messages(messages: Sequence[protocol.Message], template: str) -> Conversation:
    """The conversation in these messages; its images are URLs. System messages come first.

    Raises ApiError (400), and PromptError for markers and images that differ in number."""
    num_system = len(list(takewhile(lambda message: message.role in SYSTEM_ROLES, messages)))
    read = [
        read_message(message, number, number < num_system)
        for number, message in enumerate(messages)
    ]
    try:
        return fold_messages(read, partial(write_messages, template=template))
    except MessageError as error:
        raise ApiError(400, str(error), "messages") from None


def refusal(number: int, reason: str) -> ApiError:
    return ApiError(400, f"messages.{number}: {reason}", "messages")


def read_message(message: protocol.Message, number: int, is_system: bool) -> Message:
    """Check one message, named by its number. Raises ApiError."""
    if is_system:
        return Message("system", (read_text(message, number),))
    if message.role == "user":
        return Message("user", read_parts(message, number))
    if message.role == "assistant":
        text = read_text(message, number).strip()
        return Message("assistant", (text,) if text else ())
    raise refusal(number, f"the role {message.role[:40]!r} is not supported here")


def read_parts(message: protocol.Message, number: int) -> tuple[Part, ...]:
    """The texts and images of a user message. Raises ApiError."""
    if not message.content and not isinstance(message.content, str):
        raise refusal(number, "a user message needs content")
    if isinstance(message.content, str):
        return (message.content,)
    parts: list[Part] = []
    for index, part in enumerate(message.content):
        url = part.image_url
        found: Part | None = part.text
        if part.type in IMAGE_TYPES:
            url = url.url if isinstance(url, protocol.ImageUrl) else url
            found = None if url is None else ImagePart(url)
        elif part.type not in TEXT_TYPES:
            kind = part.type[:40]
            raise refusal(number, f"content.{index}: a part of type {kind!r} is not supported")
        if found is None:
            raise refusal(number, f"content.{index}: the {part.type} part is empty")
        parts.append(found)
    return tuple(parts)


def read_text(message: protocol.Message, number: int) -> str:
    """The text of a system or an assistant message. Raises ApiError for anything else in it."""
    if message.tool_calls:
        raise refusal(number, "tool calls are not supported")
    parts = message.content
    if isinstance(parts, list):
        if any(part.type not in TEXT_TYPES for part in parts):
            raise refusal(number, f"a message with the role {message.role!r} holds text only")
        parts = "\n".join(part.text or "" for part in parts)
    text = parts or ""
    if IMAGE_MARKER in text:  # it would shift the images of the conversation
        raise refusal(number, f"{IMAGE_MARKER} can only stand in a user message")
    return text


def write_messages(messages: Sequence[Message], template: str) -> str:
    """One text with a marker per image. Images before or after all text go first, as the model was
    trained; images between texts stay there."""
    parts = [part for message in messages for part in message.parts]
    images = [isinstance(part, ImagePart) for part in parts]
    count = sum(images)
    if not any(images[count:]) or not any(images[: len(parts) - count]):
        texts = [part for part in parts if isinstance(part, str)]
        text = place_images("\n".join(texts), count, template)
    else:
        text = "\n".join(IMAGE_MARKER if isinstance(part, ImagePart) else part for part in parts)
    check_images(text, count)  # in every turn: its images must not stand in another one
    return text
