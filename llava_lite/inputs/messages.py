"""Messages with roles become the turns of a prompt, for the server and for the evaluation kits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_lite.errors import PromptError
from llava_lite.inputs.prompt import Turn


@dataclass(frozen=True)
class ImagePart:
    """An image among the texts of a message: any image source, or an `EncodedImage`."""

    image: Any


Part = str | ImagePart


class MessageError(PromptError):
    """A message has a role or a place that no conversation allows. Names its number from 0."""


@dataclass(frozen=True)
class Message:
    """One message of "system", "user" or "assistant": its texts and images in order."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns with `<image>` markers, the last without an answer; the images of the markers; and the
    system text, None for the template's."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    system: str | None = None


def fold_messages(
    messages: Sequence[Message], write: Callable[[Sequence[Message]], str]
) -> Conversation:
    """Fold messages into turns. Neighbors with the same role become one question or answer.

    `write` makes one text of such neighbors, with an `<image>` marker for each image. The images
    are in the order of the prompt: those of system messages first.
    Raises MessageError, and the errors of `write`."""
    system: list[Message] = []
    turns: list[tuple[list[Message], list[Message] | None]] = []
    for number, message in enumerate(messages):
        question, answer = turns[-1] if turns else ([], [])
        if message.role == "system":
            system.append(message)
        elif message.role == "user" and answer is not None:
            turns.append(([message], None))
        elif message.role == "user":
            question.append(message)
        elif message.role != "assistant":
            role = message.role[:40]
            raise MessageError(f"messages.{number}: the role {role!r} is not supported here")
        elif not turns:
            raise MessageError(
                f"messages.{number}: an assistant message needs a user message before it"
            )
        else:
            turns[-1] = question, [*(answer or []), message]
    if not turns or turns[-1][1] is not None:
        raise MessageError("messages: the last message must have the role 'user'")
    ordered = [*system, *(message for q, a in turns for message in [*q, *(a or [])])]
    parts = [part for message in ordered for part in message.parts]
    return Conversation(
        tuple((write(q), None if a is None else write(a)) for q, a in turns),
        tuple(part.image for part in parts if isinstance(part, ImagePart)),
        write(system) if system else None,
    )
