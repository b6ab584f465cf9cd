"""Messages of the evaluation kits become turns.

Run: pytest tests/integrations/test_conversation.py
"""

import pytest

from llava_lite.inputs.messages import ImagePart, Message
from llava_lite.integrations.conversation import read_conversation

ONE, TWO = ImagePart(1), ImagePart(2)


def user(*parts: str | ImagePart) -> Message:
    return Message("user", parts)


@pytest.mark.parametrize(
    ("messages", "turns", "images"),
    [
        ([user(ONE), user("hi")], (("<image>\nhi", None),), (1,)),
        ([user(ONE), user(TWO, "q")], (("<image>\n<image>q", None),), (1, 2)),
        ([user(""), user("q")], (("\nq", None),), ()),
        (
            [user("a"), Message("assistant", ("b",)), Message("assistant", ("c",)), user("d")],
            (("a", "b\nc"), ("d", None)),
            (),
        ),
    ],
)
def test_neighbors_of_one_role_are_joined_by_lines(
    messages: list[Message], turns: tuple[tuple[str, str | None], ...], images: tuple[int, ...]
) -> None:
    found = read_conversation(messages, "plain")
    assert (found.turns, found.images, found.system) == (turns, images, None)


def test_images_are_in_the_order_of_the_prompt() -> None:
    """The system text is the beginning of the prompt, wherever its message stands."""
    found = read_conversation([user(ONE, "a"), Message("system", (TWO, "s"))], "plain")
    assert found.images == (2, 1)
    assert found.system == "<image>s" and found.turns == (("<image>a", None),)
