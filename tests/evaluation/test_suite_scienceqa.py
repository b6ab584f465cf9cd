"""ScienceQA in LLaVA's format; every number by hand."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.eval_command import write_json
from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric
from llava_lite.evaluation.suites.scienceqa import ScienceQaSuite, open_scienceqa, parse_letter

LETTER = "Answer with the option's letter from the given choices directly."


def question(number: str, image: str | None = None) -> dict[str, Any]:
    text = f"Context: N/A\nOptions: (A) x (B) y (C) z {number}"
    turns = [
        {"from": "human", "value": f"<image>\n{text}" if image else text},
        {"from": "gpt", "value": "The answer is A."},
    ]
    return {"id": number, "conversations": turns, **({"image": image} if image else {})}


def problem(answer: int, subject: str, grade: int, **fields: Any) -> dict[str, Any]:
    return {
        "question": "?", "choices": ["x", "y", "z"], "answer": answer, "hint": "", "image": None,
        "subject": subject, "grade": f"grade{grade}", "split": "test", **fields,
    }  # fmt: skip


PROBLEMS = {
    "4": problem(1, "natural science", 2, image="image.png"),
    "5": problem(0, "natural science", 7, image="image.png", hint="Look."),
    "11": problem(2, "language science", 6),
    "12": problem(0, "social science", 12, hint="Read."),
    "13": problem(1, "social science", 8, image="image.png"),
    "99": problem(1, "of the training split", 8),
}
QUESTIONS = [
    *(question("4", "4/image.png"), question("5", "5/image.png"), question("11")),
    *(question("12"), question("13", "13/image.png")),
]


@pytest.fixture
def suite(tmp_path: Path) -> ScienceQaSuite:
    """Five questions; the image of the last one is missing."""
    for number in ("4", "5"):
        (tmp_path / number).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / number / "image.png")
    questions = write_json(tmp_path / "llava_test.json", QUESTIONS)
    return open_scienceqa([questions, write_json(tmp_path / "problems.json", PROBLEMS)], tmp_path)


def test_samples(suite: ScienceQaSuite, tmp_path: Path) -> None:
    samples = suite.samples()
    assert [sample.id for sample in samples] == ["4", "5", "11", "12", "13"]
    for sample in samples:
        text = f"Context: N/A\nOptions: (A) x (B) y (C) z {sample.id}"
        assert sample.prompt == f"{text}\n{LETTER}"
    assert samples[0].images == (tmp_path / "4" / "image.png",)
    assert samples[2].images == () and samples[2].image_key is None and samples[2].error is None
    missing = tmp_path / "13" / "image.png"
    assert samples[4].error == f"{missing}: no such image file"
    assert (suite.name, suite.max_new_tokens) == ("scienceqa", 1024)


def test_scores_by_hand(suite: ScienceQaSuite) -> None:
    # 4 and 12 are right, 5 and 11 wrong, 13 failed.
    scores = suite.score({"4": "B", "5": "B", "11": "z", "12": "The answer is A."})
    assert list(scores.metrics) == ["accuracy", "image_accuracy"]
    assert scores.metrics["accuracy"] == Metric.share(2, 5)
    assert scores.metrics["image_accuracy"] == Metric.share(1, 3)
    assert scores.groups["accuracy by subject"] == {
        "language science": Metric.share(0, 1),
        "natural science": Metric.share(1, 2),
        "social science": Metric.share(1, 2),
    }
    assert scores.groups["accuracy by context"] == {
        "image": Metric.share(1, 3),  # 4, 5, 13
        "none": Metric.share(0, 1),  # 11
        "text": Metric.share(1, 2),  # 5, 12
    }
    assert scores.groups["accuracy by grades"] == {
        "1-6": Metric.share(1, 2),  # 4, 11
        "7-12": Metric.share(1, 3),
    }


def test_files_in_any_order_and_the_instruction_once(tmp_path: Path) -> None:
    one = question("11")
    one["conversations"][0]["value"] += f"\n{LETTER}"
    files = [write_json(tmp_path / "p.json", PROBLEMS), write_json(tmp_path / "q.json", [one])]
    [sample] = open_scienceqa(files, tmp_path).samples()
    assert sample.prompt.count(LETTER) == 1


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), (" B ", "B"), ("B. y", "B"), ("The answer is B.", "B"),
        ("So: The answer is C. Yes", "C"), ("F", None), ("b", None), ("B.", None), ("B) y", None),
        ("The answer is B", None), ("The answer is A. The answer is B.", None), ("y", None),
        ("", None), ("A dog. B", None),
        # The full stop is one: no other character stands for it.
        ("The answer is B, I think", None), ("The answer is Blue", None),
        ("The answer is A, no: The answer is B.", "B"),
    ],
)  # fmt: skip
def test_letters_are_read_as_officially(answer: str, letter: str | None) -> None:
    assert parse_letter(answer) == letter


@pytest.mark.parametrize(
    ("questions", "problems", "message"),
    [
        ([question("1")], PROBLEMS, r"q.json, item 1: the id '1' is not in .*p.json"),
        ([question("4"), question("4")], PROBLEMS, "item 2: repeats the id '4'"),
        ([{"id": "4"}], PROBLEMS, "item 1: 'conversations' has no turn from 'human'"),
        ([{"id": "4", "conversations": [{"from": "human"}]}], PROBLEMS, "needs a text in 'value'"),
        ([], PROBLEMS, "q.json: holds no items"),
        ([question("4")], {"4": problem(3, "x", 1)}, r"problem 4: the answer 3 is not in 0\.\.2"),
        ([question("4")], {"4": problem(True, "x", 1)}, "problem 4: the answer True is not in"),
        ([question("4")], {"4": {"answer": 0}}, "problem 4: 'choices' must be a list"),
        ([question("4")], {"4": []}, "problem 4: a list, not a JSON object"),
        (PROBLEMS, PROBLEMS, "must be a list of questions and an object of problems by id"),
        ([{**question("4"), "image": 5}], PROBLEMS, "item 1: needs a text in 'image'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, questions: Any, problems: Any, message: str) -> None:
    files = [write_json(tmp_path / "q.json", questions), write_json(tmp_path / "p.json", problems)]
    with pytest.raises(EvaluationError, match=message):
        open_scienceqa(files, tmp_path)
