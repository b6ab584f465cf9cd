"""OpenAI messages become the turns of a prompt, its system text, and the sources of its images."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_lite.inputs.prompt import IMAGE_MARKER, check_images, place_images
from llava_lite.server.errors import ApiError
from llava_lite.server.protocol import ImageUrl, Message, Part

SYSTEM_ROLES = ("system", "developer")
TEXT_TYPES, IMAGE_TYPES = ("text", "input_text"), ("image_url", "input_image")


@dataclass(frozen=True)
class Conversation:
    """What `prompt.build_prompt` takes, and where its images come from, in their order."""

    turns: tuple[tuple[str, str | None], ...]
    system: str | None
    sources: tuple[str, ...]


def read_messages(messages: Sequence[Message], template: str) -> Conversation:
    """The conversation in these messages, to be answered. System messages stand first; user and
    assistant take turns, several of one in a row are one. Raises ApiError (400), PromptError."""
    rest = list(enumerate(messages))
    systems = []
    while rest and rest[0][1].role in SYSTEM_ROLES:
        place, message = rest.pop(0)
        systems.append(plain_text(message, place))
    turns: list[tuple[list[Part], str | None]] = []
    for place, message in rest:
        if message.role == "user":
            if not turns or turns[-1][1] is not None:
                turns.append(([], None))
            turns[-1][0].extend(parts_of(message, place))
        elif message.role == "assistant":
            if not turns:
                raise refusal(place, "an assistant message needs a user message before it")
            question, before = turns[-1]
            texts = [text for text in (before, plain_text(message, place).strip()) if text]
            turns[-1] = (question, "\n".join(texts))
        else:
            raise refusal(place, f"the role {message.role[:40]!r} is not supported here")
    if not turns or turns[-1][1] is not None:
        raise ApiError(400, "messages: the last message must be a user's", "messages")
    questions = [question_text(question, template) for question, _ in turns]
    sources = [source for question, _ in turns for source in image_sources(question)]
    check_images("\n".join(questions), len(sources))  # before images are fetched
    return Conversation(
        tuple((text, answer) for text, (_, answer) in zip(questions, turns, strict=True)),
        "\n".join(systems) if systems else None,
        tuple(sources),
    )


def refusal(place: int, reason: str) -> ApiError:
    return ApiError(400, f"messages.{place}: {reason}", "messages")


def parts_of(message: Message, place: int) -> list[Part]:
    """The parts of a user's message, each text or image."""
    if isinstance(message.content, str):
        return [Part(type="text", text=message.content)]
    if not message.content:
        raise refusal(place, "a user message needs content")
    for number, part in enumerate(message.content):
        if part.type not in TEXT_TYPES + IMAGE_TYPES:
            kind = part.type[:40]
            raise refusal(place, f"content.{number}: a part of type {kind!r} is not supported")
        if (part.image_url if is_image(part) else part.text) is None:
            raise refusal(place, f"content.{number}: the {part.type} part is empty")
    return list(message.content)


def plain_text(message: Message, place: int) -> str:
    """The text of a message that can hold nothing else."""
    if message.tool_calls:
        raise refusal(place, "tool calls are not supported")
    parts = message.content
    if isinstance(parts, list):
        if any(part.type not in TEXT_TYPES for part in parts):
            raise refusal(place, f"a message of the role {message.role!r} holds text only")
        parts = "\n".join(part.text or "" for part in parts)
    text = parts or ""
    if IMAGE_MARKER in text:  # it would shift the images of the conversation
        raise refusal(place, f"{IMAGE_MARKER} can only stand in a user's message")
    return text


def is_image(part: Part) -> bool:
    return part.type in IMAGE_TYPES


def image_sources(parts: Sequence[Part]) -> list[str]:
    """Where the images of a question come from."""
    urls = [part.image_url for part in parts if is_image(part)]
    return [url.url if isinstance(url, ImageUrl) else url or "" for url in urls]


def question_text(parts: Sequence[Part], template: str) -> str:
    """A question with a marker per image. Images before or after all of the text go first, as the
    model was trained; images within the text stay where they are."""
    images = [is_image(part) for part in parts]
    count = sum(images)
    at_one_end = not any(images[count:]) or not any(images[: len(parts) - count])
    pieces = [
        IMAGE_MARKER if is_image(part) else part.text or ""
        for part in parts
        if not (at_one_end and is_image(part))
    ]
    return place_images("\n".join(pieces), count, template)
