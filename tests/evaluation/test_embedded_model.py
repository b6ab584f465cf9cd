"""The trained weights through the public API: a broken tower, tokenizer or RoPE fails here."""

from typing import Any

import pytest
from PIL import Image

import llava_lite
from llava_lite.evaluation.scenes.accuracy import (
    MAX_NEW_TOKENS,
    RENDERERS,
    Tally,
    evaluate_scenes,
    fresh_scenes,
    overall,
)
from llava_lite.evaluation.scenes.questions import ANSWERS
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.generation.model import Model

FOLDER = llava_lite.embedded_model()
EXAMPLES = FOLDER / "examples"
SEED, SCENES, EACH, FEW = 77, 100, 40, 8
# Guessing gets about a sixth to a quarter right, half where the answer is yes or no.
FLOORS = {
    "count": 0.9,
    "count_color": 0.93,
    "count_shape": 0.86,
    "color": 0.95,
    "shape": 0.95,
    "exists": 0.95,
    "where": 0.9,
    "relation": 0.92,
    "digit": 0.8,
    "describe": 0.75,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_lite.load(FOLDER)


@pytest.fixture(scope="module")
def tallies(model: Model) -> dict[str, Tally]:
    return evaluate(model, SCENES)


def evaluate(model: Model, count: int, **options: Any) -> dict[str, Tally]:
    """The first of the fixed scenes, many questions at once."""
    scenes = fresh_scenes(count, SEED)
    return evaluate_scenes(model, scenes, batch_size=64, reuse_prefix=True, **options)


@pytest.mark.parametrize(
    ("reduction", "floor"), [("none", 0.85), ("folded-144-36", 0.8), ("hybrid-72-36", 0.6)]
)
def test_most_answers_about_a_few_scenes_are_right(
    model: Model, reduction: str, floor: float
) -> None:
    """The fast twin of the tests below, which ask about many scenes."""
    tallies = evaluate(model, FEW, reduction=reduction)
    assert overall(tallies).asked > 60
    assert overall(tallies).accuracy >= floor, tallies


@pytest.mark.slow
def test_nine_of_ten_answers_about_fresh_scenes_are_right(tallies: dict[str, Tally]) -> None:
    assert overall(tallies).asked > 850
    assert overall(tallies).accuracy >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOORS)
def test_answers_about_fresh_scenes_are_above_chance(
    tallies: dict[str, Tally], family: str
) -> None:
    assert tallies[family].accuracy >= FLOORS[family], tallies[family].mistakes


@pytest.mark.slow
def test_nine_of_ten_answers_to_a_question_about_each_image_are_right(model: Model) -> None:
    """Through `generate`, a list of images and prompts at once; another family for each image."""
    asked = [
        (scene, some[index % len(some)])
        for index, (scene, some) in enumerate(fresh_scenes(EACH, SEED))
    ]
    answers = model.generate(
        [draw_scene(scene) for scene, _ in asked],
        [question.text for _, question in asked],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=16,
    )
    right = [
        answer == question.answer for answer, (_, question) in zip(answers, asked, strict=True)
    ]
    assert len({question.family for _, question in asked}) == len(FLOORS)
    assert sum(right) >= 0.9 * EACH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "floor", "spared"),
    [
        *(("tome-72", 0.88, 0.9), ("hybrid-72-36", 0.65, 0.9)),
        *(("folded-72", 0.88, 0.9), ("folded-144-36", 0.88, 0.9), ("folded-72-36", 0.85, 0.9)),
    ],
)
def test_reduced_images_are_answered_about(
    model: Model, reduction: str, floor: float, spared: float
) -> None:
    """As the README's figures say. Counting and descriptions suffer without folding."""
    tallies = evaluate(model, 30, reduction=reduction)
    assert overall(tallies).accuracy >= floor, tallies
    for family in ("color", "shape", "exists"):
        assert tallies[family].accuracy >= spared, (family, tallies[family].mistakes)


@pytest.mark.slow
def test_a_drawing_by_other_code_is_understood(model: Model) -> None:
    tallies = evaluate(model, 30, draw=RENDERERS["smooth"])
    assert overall(tallies).accuracy >= 0.88, tallies


@pytest.mark.slow
def test_wrong_short_answers_are_words_that_the_question_allows(tallies: dict[str, Tally]) -> None:
    wrong = [
        (answer, ANSWERS[family])
        for family, tally in tallies.items()
        if family in ANSWERS
        for _, _, answer in tally.mistakes
    ]
    assert len([answer for answer, allowed in wrong if answer not in allowed]) <= 1, wrong


def test_the_readme_s_question_is_answered_rightly(model: Model) -> None:
    answer = model.generate(EXAMPLES / "scene.png", "What shape is the red object?")
    assert answer == "ring"
    assert answer.finish_reason == "stop"
    assert answer.usage["image_tokens"] == 576


def test_the_image_matters(model: Model) -> None:
    blank = Image.new("RGB", (400, 400), (128, 128, 128))
    question = "Describe the image."
    assert model.generate(EXAMPLES / "scene.png", question) != model.generate(blank, question)


def test_it_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
