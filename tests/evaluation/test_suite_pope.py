"""POPE: files as published, written here; counts by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric
from llava_lite.evaluation.suites.pope import open_pope, says_yes

SHORT = "Answer the question using a single word or phrase."


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def question(number: int, label: str | None = None, **fields: Any) -> dict[str, Any]:
    known = {} if label is None else {"label": label}
    text = "Is there a dog in the image?"
    return {"question_id": number, "image": "a.png", "text": text, **known, **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def files(folder: Path) -> list[Path]:
    """Two categories that both count from 1."""
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    lines = [question(number, label) for number, label in enumerate(labels, start=1)]
    return [
        write(folder / "coco_pope_random.json", lines),
        write(folder / "coco_pope_adversarial.json", lines[:2] + lines[3:5]),
    ]


def test_samples(files: list[Path], folder: Path) -> None:
    suite = open_pope(files, folder)
    samples = suite.samples()
    assert [sample.id for sample in samples] == [
        *(f"random/{number}" for number in range(1, 7)),
        *(f"adversarial/{number}" for number in (1, 2, 4, 5)),
    ]
    assert {sample.prompt for sample in samples} == {f"Is there a dog in the image?\n{SHORT}"}
    assert {sample.images for sample in samples} == {(folder / "a.png",)}
    assert len({sample.image_key for sample in samples}) == 1
    assert (suite.name, suite.files, suite.max_new_tokens) == ("pope", files, 128)


def test_scores_by_hand(files: list[Path], folder: Path) -> None:
    answers = {
        "random/1": "Yes",
        "random/2": "Yes.",
        "random/3": "No",  # right, right, wrong
        "random/4": "No",
        "random/5": "yes, there is",
        "random/6": "There is not",  # wrong: 5
        "adversarial/1": "Yes",
        "adversarial/2": "Yes",
        "adversarial/4": "Yes",  # wrong: 4
    }  # 5 of adversarial failed, where no is right: wrong
    scores = open_pope(files, folder).score(answers)
    f1 = scores.groups["f1 by category"]
    # random: 2 true yes, 1 false yes, 1 false no; adversarial: 2 true yes, 2 false yes.
    assert f1 == {"random": Metric(4 / 6, 6), "adversarial": Metric(4 / 6, 4)}
    assert list(scores.metrics) == ["f1", "accuracy", "precision", "recall", "yes_ratio"]
    assert scores.metrics["f1"] == Metric(4 / 6, 10)
    assert scores.metrics["accuracy"] == Metric.share(6, 10)
    assert scores.metrics["precision"] == Metric.share(4, 7)
    assert scores.metrics["recall"] == Metric.share(4, 5)
    assert scores.metrics["yes_ratio"] == Metric.share(6, 9)  # of those answered
    assert scores.groups["accuracy by category"] == {
        "random": Metric.share(4, 6),
        "adversarial": Metric.share(2, 4),
    }
    assert scores.groups["yes_ratio by category"]["adversarial"] == Metric.share(3, 3)


def test_the_headline_is_the_mean_over_categories(files: list[Path], folder: Path) -> None:
    answers = {f"random/{number}": "Yes" if number < 4 else "No" for number in range(1, 7)}
    suite = open_pope(files, folder)
    scores = suite.score(answers)
    # random is all right (1.0), adversarial all wrong (0.0); pooled it would be 6/10.
    assert scores.metrics["f1"].value == 0.5
    assert "mean over the categories" in suite.settings["f1"]


def test_one_file_with_a_category_field(folder: Path) -> None:
    lines = [question(1, "yes", category="popular"), question(1, "no", category="random")]
    suite = open_pope([write(folder / "llava_pope_test.jsonl", lines)], folder)
    assert [sample.id for sample in suite.samples()] == ["popular/1", "random/1"]
    scores = suite.score({"popular/1": "No", "random/1": "No"})
    assert scores.groups["accuracy by category"] == {
        "popular": Metric.share(0, 1),
        "random": Metric.share(1, 1),
    }
    # No yes was right or said in random: there is nothing to measure.
    assert math.isnan(scores.groups["f1 by category"]["random"].value)


def test_the_instruction_is_not_given_twice(folder: Path) -> None:
    line = question(1, "yes", text=f"Is there a dog?\n{SHORT}")
    [sample] = open_pope([write(folder / "own.jsonl", [line])], folder).samples()
    assert (sample.id, sample.prompt) == ("own/1", f"Is there a dog?\n{SHORT}")


def test_without_labels_there_are_predictions_only(folder: Path) -> None:
    suite = open_pope([write(folder / "a.jsonl", [question(1), question(2)])], folder)
    assert suite.score({"a/1": "yes"}).metrics == {}
    assert suite.settings["without_reference"] == 2


def test_a_missing_image_costs_one_row(folder: Path) -> None:
    lines = [question(1, "yes", image="b.png"), question(2, "yes"), question(3, "no", image="\0")]
    suite = open_pope([write(folder / "a.jsonl", lines)], folder)
    errors = [sample.error for sample in suite.samples()]
    assert errors[0] == f"{folder / 'b.png'}: no such image file"
    assert errors[1] is None
    assert errors[2] and "no such image file" in errors[2]
    assert suite.score({"a/2": "Yes"}).metrics["accuracy"] == Metric.share(1, 3)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True), ("No", False), ("no", False), ("NO", True), ("no,", False), ("No.", False),
        ("Yes. But not here", True), ("There is not one", False), ("nothing", True), ("", True),
        ("There is no dog. Yes", False), ("No, there is a cat", False), ("no\n", True),
    ],
)  # fmt: skip
def test_answers_are_read_as_officially(answer: str, yes: bool) -> None:
    assert says_yes(answer) == yes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (question(1, "maybe"), "a.jsonl, line 2: the label 'maybe' is not yes or no"),
        (question(1) | {"label": 1}, "line 2: the label 1 is not yes or no"),
        (question(0), "line 2: repeats the id 'a/0' of .*line 1"),
        (question(1, text=""), "line 2: needs a text in 'text' or 'question'"),
        (question(1, image=None), "line 2: needs a text in 'image'"),
        (question(1, question_id=None), "line 2: needs an id in 'question_id' or 'id'"),
        (question(1, question_id=1.5), "line 2: needs an id"),
    ],
)
def test_a_bad_file_is_refused(folder: Path, line: dict[str, Any], message: str) -> None:
    path = write(folder / "a.jsonl", [question(0, "yes"), line])
    with pytest.raises(EvaluationError, match=message):
        open_pope([path], folder)


def test_what_is_not_json_lines_is_refused(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_text('{"question_id": 1\n', encoding="utf-8")
    with pytest.raises(EvaluationError, match="a.jsonl, line 1: not valid JSON"):
        open_pope([path], folder)
    path.write_text("\n\n[1]\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="a.jsonl, line 3: a list, not a JSON object"):
        open_pope([path], folder)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="a.jsonl: holds no rows"):
        open_pope([path], folder)
