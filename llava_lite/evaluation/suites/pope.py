"""POPE: is this object in the image? Scores by the choice of the absent objects.

A question file has lines {"question_id", "image", "text", "label": "yes" | "no"}, perhaps with
"category"; otherwise the category is read from the file's name.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric, Scores
from llava_lite.evaluation.suites.base import Question, QuestionSuite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import Record, read_json_lines
from llava_lite.evaluation.suites.short_answers import short_answer_prompt

CATEGORIES = ("random", "popular", "adversarial")
NEGATIONS = ("No", "not", "no")


@dataclass(frozen=True)
class Confusion:
    """Counts of yes and no answers, right and wrong. `yes`: yes answers that were given."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int
    yes: int
    answered: int

    @property
    def count(self) -> int:
        """All questions."""
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    def metrics(self) -> dict[str, Metric]:
        """POPE's metrics, with yes as the positive class; NaN without answers."""
        wrong = self.false_yes + self.false_no
        right = self.true_yes + self.true_no
        f1 = 2 * self.true_yes / (2 * self.true_yes + wrong) if self.true_yes + wrong else math.nan
        return {
            "f1": Metric(f1, self.count),
            "accuracy": Metric.share(right, self.count),
            "precision": Metric.share(self.true_yes, self.true_yes + self.false_yes),
            "recall": Metric.share(self.true_yes, self.true_yes + self.false_no),
            "yes_ratio": Metric.share(self.yes, self.answered),
        }


@dataclass
class PopeSuite(QuestionSuite):
    """Yes-or-no questions. A failed question counts as answered wrongly."""

    name: str = "pope"

    def computed_settings(self) -> Mapping[str, Any]:
        f1 = "mean over the categories, as LLaVA publishes it; the other metrics are over all"
        return {"f1": f1, **super().computed_settings()}

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Mean F1 of the categories, then accuracy, precision, recall and the share of yes over all
        questions; the same for each category."""
        if not self.scored:
            return Scores({})
        members: dict[str, list[Question]] = {}
        for question in self.scored:
            members.setdefault(question.groups["category"][0], []).append(question)
        by_category = {
            category: confusion(questions, answers).metrics()
            for category, questions in members.items()
        }
        total = confusion(self.scored, answers).metrics()
        f1 = mean(metrics["f1"].value for metrics in by_category.values())
        groups = {
            f"{name} by category": {
                category: metrics[name] for category, metrics in by_category.items()
            }
            for name in total
        }
        return Scores({**total, "f1": Metric(f1, len(self.scored))}, groups)


def says_yes(answer: str) -> bool:
    """The official reading of an answer: yes unless its first sentence holds No, not or no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in NEGATIONS for word in words)


def confusion(questions: Iterable[Question], answers: Mapping[str, str]) -> Confusion:
    """Count the answers. A missing answer counts as the wrong answer."""
    counts: Counter[tuple[bool, bool]] = Counter()
    yes = answered = 0
    for question in questions:
        answer, right = answers.get(question.id), question.references == ("yes",)
        said = says_yes(answer) if answer is not None else not right
        counts[said, right] += 1
        answered += answer is not None
        yes += answer is not None and said
    return Confusion(
        counts[True, True], counts[True, False], counts[False, False], counts[False, True],
        yes, answered,
    )  # fmt: skip


# ---- reading -----------------------------------------------------------------------------------


def open_pope(files: Sequence[Path], folder: Path) -> PopeSuite:
    """The suite of one or more question files. Raises EvaluationError naming file and line."""
    images = ImageFolder(folder)
    questions = [
        question_of(record, category_of(path), images)
        for path in files
        for record in read_json_lines(path)
    ]
    return PopeSuite(questions, list(files), folder)


def category_of(path: Path) -> str:
    """The category in a file's name, else the name."""
    return next((name for name in CATEGORIES if name in path.stem.lower()), path.stem)


def question_of(record: Record, category: str, images: ImageFolder) -> Question:
    """One question. Ids begin with the category, because every file of POPE counts from 1."""
    category = str(record.get("category", default=category))
    prompt = short_answer_prompt(record.text("text", "question"))
    question_id = f"{category}/{record.id('question_id', 'id')}"
    sample = images.sample(question_id, prompt, (record.text("image"),))
    return Question(sample, record.where, label_of(record), groups={"category": (category,)})


def label_of(record: Record) -> tuple[str, ...]:
    """The right answer, yes or no; none if unknown. Raises EvaluationError for any other label."""
    label = record.get("label", "answer")
    if label is None:
        return ()
    said = label.strip().lower() if isinstance(label, str) else None
    if said not in ("yes", "no"):
        raise EvaluationError(f"{record.where}: the label {label!r} is not yes or no")
    return (said,)
