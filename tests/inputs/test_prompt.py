"""Templates byte for byte, image markers, and the text of a later chat turn."""

import pytest

from llava_lite.errors import PromptError
from llava_lite.inputs.prompt import (
    TEMPLATES,
    Template,
    build_prompt,
    check_images,
    get_template,
    next_turn_text,
    place_images,
)

SYSTEM_A = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_B = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
ONE_TURN = [("<image>\nQ1", None)]
TWO_TURNS = [("<image>\nQ1", "A1"), ("Q2", None)]


@pytest.mark.parametrize(
    ("template", "one_turn", "two_turns"),
    [
        (
            "vicuna_v1",
            f"{SYSTEM_A} USER: <image>\nQ1 ASSISTANT:",
            f"{SYSTEM_A} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
        ),
        (
            "llava_v1",
            f"{SYSTEM_B} USER: <image>\nQ1 ASSISTANT:",
            f"{SYSTEM_B} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
        ),
        (
            "llava-hf",
            "USER: <image>\nQ1 ASSISTANT:",
            "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:",
        ),
        ("plain", "<image>\nQ1", "<image>\nQ1A1\nQ2"),
    ],
)
def test_templates_are_byte_exact(template: str, one_turn: str, two_turns: str) -> None:
    assert build_prompt(template, ONE_TURN) == one_turn
    assert build_prompt(template, TWO_TURNS) == two_turns
    assert build_prompt(TEMPLATES[template], ONE_TURN) == one_turn


def test_a_finished_conversation_ends_as_in_training() -> None:
    assert build_prompt("vicuna_v1", [("Q", "A")]).endswith("USER: Q ASSISTANT: A</s>")
    assert build_prompt("llava-hf", [("Q", "A")]) == "USER: Q ASSISTANT: A "
    assert build_prompt("plain", [(place_images("", 1, "plain"), "a cat")]) == "<image>a cat\n"
    assert build_prompt("plain", [(place_images("", 1, "plain"), None)]) == "<image>"


def test_system_text_can_be_replaced_or_left_out() -> None:
    assert build_prompt("v1", [("Q", None)], system="Be brief.") == "Be brief. USER: Q ASSISTANT:"
    assert build_prompt("v1", [("Q", None)], system="") == "USER: Q ASSISTANT:"
    assert build_prompt("llava-hf", [("Q", None)], "Be brief.") == "Be brief. USER: Q ASSISTANT:"


def test_names_and_alias() -> None:
    assert set(TEMPLATES) == {"vicuna_v1", "llava_v1", "plain", "llava-hf", "qwen_2"}
    assert get_template("v1") is TEMPLATES["vicuna_v1"]
    own = Template("own", answer_end="###")
    assert get_template(own) is own
    with pytest.raises(ValueError, match="'v2'.*vicuna_v1, llava_v1, plain, llava-hf, qwen_2, v1"):
        get_template("v2")


def test_wrong_turns_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one turn, got 0"):
        build_prompt("v1", [])
    with pytest.raises(PromptError, match="turn 1 of 2 has no answer"):
        build_prompt("v1", [("Q1", None), ("Q2", None)])


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava-hf", "plain", "qwen_2"])
def test_next_turn_completes_the_history(template: str) -> None:
    cached = build_prompt(template, ONE_TURN) + get_template(template).answer_start + "A1"
    assert cached + next_turn_text(template, "Q2") == build_prompt(template, TWO_TURNS)


def test_images_go_first_unless_the_text_places_them() -> None:
    assert place_images("Q", 0) == "Q"
    assert place_images("Q", 1) == "<image>\nQ"
    assert place_images("Q", 3) == "<image>\n<image>\n<image>\nQ"
    assert place_images("a <image> b", 1) == "a <image> b"
    assert place_images("<image> and <image>", 2) == "<image> and <image>"
    assert place_images("Q", 1, "plain") == "<image>Q"
    for text, count in (("Q", 0), ("Q", 3), ("a <image> b", 1)):
        check_images(place_images(text, count), count)


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", 0, "1 <image> marker, but 0 images were given"),
        ("<image>", 2, "1 <image> marker, but 2 images were given"),
        ("<image><image>", 1, "2 <image> markers, but 1 image was given"),
        ("<image><image>", 3, "2 <image> markers, but 3 images were given"),
    ],
)
def test_marker_count_must_fit(text: str, images: int, message: str) -> None:
    with pytest.raises(PromptError, match=f"the prompt has {message}$"):
        check_images(place_images(text, images), images)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        place_images(text, -1)
