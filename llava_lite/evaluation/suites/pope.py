"""POPE: is this object in the image? Scores by the choice of the absent objects.

A question file has lines {"question_id", "image", "text", "label": "yes" | "no"}, perhaps with
"category"; otherwise the category is read from the file's name.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric, Sample, Scores, settings_of
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import Record, read_json_lines, refuse_repeated_ids
from llava_lite.evaluation.suites.short_answers import short_answer_prompt

MAX_NEW_TOKENS = 128
CATEGORIES = ("random", "popular", "adversarial")
NEGATIONS = ("No", "not", "no")
LABELS = {"yes": True, "no": False}


@dataclass(frozen=True)
class PopeQuestion:
    """One question; `label` is None where the right answer is not known."""

    id: str
    text: str
    image: str
    category: str
    label: bool | None
    where: str


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
class PopeSuite:
    """Yes-or-no questions. A failed question counts as answered wrongly."""

    questions: Sequence[PopeQuestion]
    folder: ImageFolder
    files: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "pope"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        refuse_repeated_ids((question.id, question.where) for question in self.questions)
        unknown = sum(question.label is None for question in self.questions)
        computed = {
            "f1": "mean over the categories, as LLaVA publishes it; the other metrics are over all",
            "without_reference": unknown,
        }
        self.settings = settings_of(self.settings, computed)

    def samples(self) -> Sequence[Sample]:
        """All questions, with the official instruction to answer shortly."""
        return [
            self.folder.sample(question.id, short_answer_prompt(question.text), question.image)
            for question in self.questions
        ]

    def select(self, ids: Collection[str]) -> "PopeSuite":
        """The suite of these questions only."""
        chosen = [question for question in self.questions if question.id in ids]
        return replace(self, questions=chosen)

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Mean F1 of the categories, then accuracy, precision, recall and the share of yes over all
        questions; the same for each category."""
        scored = [question for question in self.questions if question.label is not None]
        if not scored:
            return Scores({})
        by_category = {
            category: confusion(
                (question for question in scored if question.category == category), answers
            ).metrics()
            for category in dict.fromkeys(question.category for question in scored)
        }
        total = confusion(scored, answers).metrics()
        f1 = mean(metrics["f1"].value for metrics in by_category.values())
        groups = {
            f"{name} by category": {
                category: metrics[name] for category, metrics in by_category.items()
            }
            for name in total
        }
        return Scores({**total, "f1": Metric(f1, len(scored))}, groups)


def says_yes(answer: str) -> bool:
    """The official reading of an answer: yes unless its first sentence holds No, not or no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in NEGATIONS for word in words)


def confusion(questions: Iterable[PopeQuestion], answers: Mapping[str, str]) -> Confusion:
    """Count the answers. A missing answer counts as the wrong answer."""
    counts: Counter[tuple[bool, bool]] = Counter()
    yes = answered = 0
    for question in questions:
        answer = answers.get(question.id)
        said = says_yes(answer) if answer is not None else not question.label
        counts[said, bool(question.label)] += 1
        answered += answer is not None
        yes += answer is not None and said
    return Confusion(
        counts[True, True], counts[True, False], counts[False, False], counts[False, True],
        yes, answered,
    )  # fmt: skip


# ---- reading -----------------------------------------------------------------------------------


def open_pope(files: Sequence[Path], folder: Path) -> PopeSuite:
    """The suite of one or more question files. Raises EvaluationError naming file and line."""
    questions = [
        question_of(record, category_of(path)) for path in files for record in read_json_lines(path)
    ]
    return PopeSuite(questions, ImageFolder(folder), list(files))


def category_of(path: Path) -> str:
    """The category in a file's name, else the name."""
    return next((name for name in CATEGORIES if name in path.stem.lower()), path.stem)


def question_of(record: Record, category: str) -> PopeQuestion:
    """One question. Ids begin with the category, because every file of POPE counts from 1."""
    category = str(record.get("category", default=category))
    return PopeQuestion(
        id=f"{category}/{record.id('question_id', 'id')}",
        text=record.text("text", "question"),
        image=record.text("image"),
        category=category,
        label=label_of(record),
        where=record.where,
    )


def label_of(record: Record) -> bool | None:
    """Whether the object is there. Raises EvaluationError for anything but yes and no."""
    label = record.get("label", "answer")
    if label is None:
        return None
    try:
        return LABELS[label.strip().lower()]
    except (KeyError, AttributeError) as error:
        raise EvaluationError(f"{record.where}: the label {label!r} is not yes or no") from error
