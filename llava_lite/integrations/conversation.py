"""Messages of texts and images, as the kits give them, and the model's answers to many at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llava_lite.errors import PromptError
from llava_lite.inputs.prompt import IMAGE_MARKER, get_template

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model
    from llava_lite.generation.sampling import GenerationOptions


@dataclass(frozen=True)
class Picture:
    """One image among the texts of a message: whatever `Model.generate` takes as an image."""

    image: Any


@dataclass(frozen=True)
class Message:
    """What somebody ("system", "user" or "assistant") said: texts and pictures in their order."""

    role: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Conversation:
    """(question, answer) pairs with `<image>` markers, the last without an answer; the images of
    the markers; and the system text, None for the template's own."""

    turns: tuple[tuple[str, str | None], ...]
    images: tuple[Any, ...] = ()
    system: str | None = None


def question(text: str, images: Sequence[Any], template: str) -> Conversation:
    """One question about some images. Its `<image>` markers stay when they are as many as the
    images; otherwise they mean something else and go, and the images come first."""
    return conversation([Message("user", (*map(Picture, images), text))], template)


def conversation(messages: Sequence[Message], template: str) -> Conversation:
    """The turns of some messages; neighbours of one role are one message. Raises PromptError for
    another role, a missing question, and messages that do not end with the user's."""
    images = tuple(
        part.image for message in messages for part in message.parts if isinstance(part, Picture)
    )
    markers = sum(
        part.count(IMAGE_MARKER) for m in messages for part in m.parts if isinstance(part, str)
    )
    in_text = markers > 0 and markers == len(images)
    system: list[str] = []
    turns: list[tuple[str, str | None]] = []
    for message in messages:
        text = message_text(message, template, in_text)
        if message.role == "system":
            system.append(text)
        elif message.role == "user" and turns and turns[-1][1] is None:
            turns[-1] = (f"{turns[-1][0]}\n{text}", None)
        elif message.role == "user":
            turns.append((text, None))
        elif message.role == "assistant" and turns:
            before, answer = turns[-1]
            turns[-1] = (before, text if answer is None else f"{answer}\n{text}")
        else:
            raise PromptError(f"a message of {message.role!r} has no place in a conversation here")
    if not turns or turns[-1][1] is not None:
        raise PromptError("a conversation must end with a message of the user")
    return Conversation(tuple(turns), images, "\n".join(system) if system else None)


def message_text(message: Message, template: str, markers_in_text: bool) -> str:
    """The message as one text: parts on lines of their own, a marker for every picture.

    With `markers_in_text` the texts say where their images stand, else markers in texts go."""
    text, after_image = "", get_template(template).image_end
    ends_with_image = False
    for part in message.parts:
        if isinstance(part, Picture):
            piece = "" if markers_in_text else IMAGE_MARKER
        else:
            piece = part if markers_in_text else without_markers(part)
        if piece:
            between = (after_image if ends_with_image else "\n") if text else ""
            text, ends_with_image = text + between + piece, isinstance(part, Picture)
    return text


def without_markers(text: str) -> str:
    """As LLaVA's ScienceQA script does it: markers out, and what is left stripped."""
    return text.replace(IMAGE_MARKER, "").strip() if IMAGE_MARKER in text else text


def answer_conversations(
    model: "Model",
    conversations: Sequence[Conversation],
    options: Sequence["GenerationOptions"],
    batch_size: int | None = None,
) -> list["Answer"]:
    """The answer to each conversation with its own options, in order. Those whose options differ
    in no more than the length and the system text run together. Raises as `Model.generate`."""
    requests = []
    for one, own in zip(conversations, options, strict=True):
        if one.system is not None:
            own = replace(own, system=one.system)
        requests.append(model.request(one.images, one.turns, own))
    alike: dict[Any, list[int]] = {}
    for index, own in enumerate(options):
        key = (own.temperature, own.top_p, own.top_k, own.seed, own.stop_strings)
        alike.setdefault(key, []).append(index)
    answers: dict[int, Answer] = {}
    for indices in alike.values():
        group = [requests[index] for index in indices]
        for at, row in model.run(group, options[indices[0]], batch_size):
            if row.finish_reason is not None:
                answers[indices[at]] = row.answer()
    return [answers[index] for index in range(len(requests))]
