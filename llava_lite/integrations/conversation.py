"""The conversations of an evaluation kit, and the model's answers to many of them at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_lite.inputs.messages import Conversation, ImagePart, Message, Part, fold_messages
from llava_lite.inputs.prompt import IMAGE_MARKER, get_template

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model
    from llava_lite.generation.sampling import GenerationOptions


def read_question(text: str, images: Sequence[Any], template: str) -> Conversation:
    """One question about some images.

    As many `<image>` markers as images stay where they are. Otherwise the markers are removed and
    the images come first."""
    return read_conversation([Message("user", (*map(ImagePart, images), text))], template)


def read_conversation(messages: Sequence[Message], template: str) -> Conversation:
    """The turns of some messages. Markers count as in `read_question`, over all messages together.

    Raises PromptError for an unknown role and for messages that do not end with a user message."""
    parts = [part for message in messages for part in message.parts]
    markers = sum(part.count(IMAGE_MARKER) for part in parts if isinstance(part, str))
    images = sum(isinstance(part, ImagePart) for part in parts)
    keep_markers = 0 < markers == images
    return fold_messages(messages, partial(write_messages, template=template, keep=keep_markers))


def write_messages(messages: Sequence[Message], template: str, keep: bool) -> str:
    """Neighbors with the same role as one text, each message on a line."""
    return "\n".join(write_parts(message.parts, template, keep) for message in messages)


def write_parts(parts: Sequence[Part], template: str, keep: bool) -> str:
    """One text, each part on a line. With `keep` the markers in the texts stand for the images,
    else each image gets a marker and markers in texts are removed."""
    text, after_image = "", get_template(template).image_end
    ends_with_image = False
    for part in parts:
        if isinstance(part, ImagePart):
            piece = "" if keep else IMAGE_MARKER
        else:
            piece = part if keep else remove_markers(part)
        if piece:
            between = (after_image if ends_with_image else "\n") if text else ""
            text, ends_with_image = text + between + piece, isinstance(part, ImagePart)
    return text


def remove_markers(text: str) -> str:
    """Remove markers and strip the text, as LLaVA's ScienceQA script does."""
    return text.replace(IMAGE_MARKER, "").strip() if IMAGE_MARKER in text else text


def answer_conversations(
    model: "Model",
    conversations: Sequence[Conversation],
    options: Sequence["GenerationOptions"],
    batch_size: int | None = None,
) -> list["Answer"]:
    """The answer to each conversation, with its options, in order.

    Conversations run together if only the length and the system text of their options differ.
    Raises as `Model.generate`."""
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
