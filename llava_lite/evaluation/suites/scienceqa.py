"""ScienceQA as LLaVA asks it: multiple choice with or without an image.

Questions: [{"id", "image"?, "conversations": [{"from": "human", "value"}, ...]}]
Problems:  {id: {"choices", "answer": index, "subject", "grade", "hint", "image", ...}}
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Sample, Scores, accuracy, accuracy_by_group
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.multiple_choice import LETTER_INSTRUCTIONS
from llava_lite.evaluation.suites.records import (
    Record,
    as_record,
    read_json,
    records_of,
    refuse_repeated_ids,
)

MAX_NEW_TOKENS = 1024
MOST_CHOICES = 5
THE_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
GRADES = {f"grade{grade}": "1-6" if grade <= 6 else "7-12" for grade in range(1, 13)}


@dataclass(frozen=True)
class ScienceQuestion:
    """One question; `answer` is the index of the right choice. No image: asked as text."""

    id: str
    text: str
    choices: int
    answer: int
    where: str
    image: str | None = None
    subject: str = ""
    contexts: tuple[str, ...] = ()
    grades: str = ""

    @property
    def prompt(self) -> str:
        """The text with the official instruction, once."""
        instruction = LETTER_INSTRUCTIONS["en"]
        return self.text if self.text.endswith(instruction) else f"{self.text}\n{instruction}"

    def is_right(self, answer: str | None) -> bool:
        """Whether an answer names the right choice."""
        letter = parse_letter(answer or "")
        return letter is not None and ascii_uppercase.index(letter) == self.answer


@dataclass
class ScienceQaSuite:
    """ScienceQA. A failed question, and one without a clear letter, counts as wrong."""

    questions: Sequence[ScienceQuestion]
    folder: ImageFolder
    files: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "scienceqa"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        refuse_repeated_ids((question.id, question.where) for question in self.questions)

    def samples(self) -> Sequence[Sample]:
        """All questions, those without an image as text only."""
        return [self.sample(question) for question in self.questions]

    def sample(self, question: ScienceQuestion) -> Sample:
        """One question, ready to ask."""
        if question.image is None:
            return Sample(question.id, question.prompt)
        return self.folder.sample(question.id, question.prompt, question.image)

    def select(self, ids: Collection[str]) -> "ScienceQaSuite":
        """The suite of these questions only."""
        chosen = [question for question in self.questions if question.id in ids]
        return replace(self, questions=chosen)

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy of all questions and of questions with an image, and by subject, context and
        grade as in the paper. A question may have both text and image as context."""
        outcomes = [(one, one.is_right(answers.get(one.id))) for one in self.questions]
        metrics = {
            "accuracy": accuracy(right for _, right in outcomes),
            "image_accuracy": accuracy(right for one, right in outcomes if one.image is not None),
        }
        groups = {
            "accuracy by subject": [(one.subject, right) for one, right in outcomes],
            "accuracy by context": [
                (context, right) for one, right in outcomes for context in one.contexts
            ],
            "accuracy by grades": [(one.grades, right) for one, right in outcomes],
        }
        return Scores(metrics, {name: accuracy_by_group(pairs) for name, pairs in groups.items()})


def parse_letter(answer: str) -> str | None:
    """The letter of an answer by the official rules: only a letter, a beginning such as "B. ", or
    one "The answer is B."."""
    choices = ascii_uppercase[:MOST_CHOICES]
    text = answer.strip()
    if len(text) == 1 and text in choices:
        return text
    if len(text) >= 3 and text[0] in choices and text[1:3] == ". ":
        return text[0]
    found = THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


# ---- reading -----------------------------------------------------------------------------------


def open_scienceqa(files: Sequence[Path], folder: Path) -> ScienceQaSuite:
    """The suite of a question file and problems.json, in any order.

    Raises EvaluationError naming file and item."""
    contents = {path: read_json(path) for path in files}
    asking = [path for path, content in contents.items() if isinstance(content, list)]
    problems = [path for path, content in contents.items() if isinstance(content, dict)]
    if len(asking) != 1 or len(problems) != 1:
        names = ", ".join(map(str, files))
        raise EvaluationError(
            f"{names}: must be a list of questions and an object of problems by id"
        )
    [path], [problems_path] = asking, problems
    questions = [
        question_of(record, problem_of(record, contents[problems_path], problems_path))
        for record in records_of(contents[path], path)
    ]
    return ScienceQaSuite(questions, ImageFolder(folder), list(files))


def problem_of(record: Record, problems: Mapping[str, Any], path: Path) -> Record:
    """The entry of a question in the problem file."""
    question_id = record.id("id")
    if question_id not in problems:
        raise EvaluationError(f"{record.where}: the id {question_id!r} is not in {path}")
    return as_record(problems[question_id], f"{path}, problem {question_id}")


def question_of(record: Record, problem: Record) -> ScienceQuestion:
    """One question. Raises EvaluationError for an answer that is not one of the choices."""
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not choices:
        raise EvaluationError(f"{problem.where}: 'choices' must be a list")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise EvaluationError(
            f"{problem.where}: the answer {answer!r} is not in 0..{len(choices) - 1}"
        )
    image = record.get("image")
    return ScienceQuestion(
        id=record.id("id"),
        text=human_text(record),
        choices=len(choices),
        answer=answer,
        where=record.where,
        image=None if image is None else record.text("image"),
        subject=str(problem.get("subject", default="")),
        contexts=tuple(contexts_of(problem)),
        grades=GRADES.get(str(problem.get("grade")), ""),
    )


def human_text(record: Record) -> str:
    """The first human turn without the image marker: LLaVA puts the image first."""
    turns = record.get("conversations", default=[])
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, dict) and turn.get("from") == "human":
                text = Record(turn, f"{record.where}: conversations").text("value")
                return text.replace("<image>", "").strip()
    raise EvaluationError(f"{record.where}: 'conversations' has no turn from 'human'")


def contexts_of(problem: Record) -> Iterator[str]:
    """The context of a question: text, an image, both or none."""
    hint, image = problem.get("hint"), problem.get("image")
    if hint:
        yield "text"
    if image:
        yield "image"
    if not hint and not image:
        yield "none"
