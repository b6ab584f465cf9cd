"""Your own questions, one JSON object per line.

    {"id"?, "image" | "images"?, "question" | "prompt" | "text", "answer" | "answers"?, "choices"?}

An image is a URL, a data URL, or a path relative to the file or to a given folder. The text is
asked unchanged; choices and LLaVA's instruction to answer with a letter follow, if given. Choices
are scored by the letter, ten answers by VQA accuracy, other answers by equality with one of them
after normalizing. The right choice is given as its text, its letter or its index from 0. Scores are
also grouped by `category`, if given.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Sample, Scores, accuracy, accuracy_by_group, settings_of
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.multiple_choice import (
    MOST_OPTIONS,
    chosen_letter,
    letters,
    multiple_choice_prompt,
)
from llava_lite.evaluation.suites.records import Record, read_json_lines, refuse_repeated_ids
from llava_lite.evaluation.suites.short_answers import (
    exact_match,
    short_answer_prompt,
    vqa_accuracy,
)

MAX_NEW_TOKENS = 128
PEOPLE = 10
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)

ID_NAMES = ("id", "question_id")
PROMPT_NAMES = ("question", "prompt", "text")
IMAGE_NAMES = ("images", "image")
ANSWER_NAMES = ("answers", "answer")
CHOICE_NAMES = ("choices",)


@dataclass(frozen=True)
class Question:
    """One question. `references`: right answers; with choices the right letter. Without references
    the question is not scored."""

    id: str
    text: str
    images: tuple[str, ...]
    references: tuple[str, ...]
    where: str
    choices: tuple[str, ...] = ()
    category: str = ""

    @property
    def scoring(self) -> str:
        """How the answer is scored."""
        if self.choices:
            return "choice"
        return "vqa" if len(self.references) == PEOPLE else "exact"

    def prompt(self, short_answer: bool) -> str:
        """The prompt. `short_answer` adds LLaVA's instruction for short answers."""
        if self.choices:
            return multiple_choice_prompt(self.text, self.choices)
        return short_answer_prompt(self.text) if short_answer else self.text

    def outcome(self, answer: str | None) -> float:
        """The score of an answer, 0..1; 0 without an answer."""
        if answer is None:
            return 0.0
        if self.choices:
            return float(chosen_letter(answer, self.choices) in self.references)
        if self.scoring == "vqa":
            return vqa_accuracy(answer, self.references)
        return float(exact_match(answer, self.references))


@dataclass
class OwnDataSuite:
    """Your own questions. A failed question counts as wrong."""

    questions: Sequence[Question]
    folder: ImageFolder
    files: Sequence[Path]
    short_answer: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "jsonl"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        refuse_repeated_ids((question.id, question.where) for question in self.questions)
        unknown = sum(not question.references for question in self.questions)
        given = {"short_answer": self.short_answer, **self.settings}
        self.settings = settings_of(given, {"without_reference": unknown})

    def samples(self) -> Sequence[Sample]:
        """All questions in the order of the file."""
        return [self.sample(question) for question in self.questions]

    def sample(self, question: Question) -> Sample:
        """One question, with an error if one of its images does not exist."""
        prompt = question.prompt(self.short_answer)
        sources: list[str | Path] = []
        error = None
        for name in question.images:
            source = name if URL.match(name) else self.folder.find(name)
            missing = self.folder.folder / name
            if source is None:
                error = error or f"{missing}: no such image file"
            sources.append(source or missing)
        key = "\n".join(question.images) or None
        return Sample(question.id, prompt, tuple(sources), key, error)

    def select(self, ids: Collection[str]) -> "OwnDataSuite":
        """The suite of these questions only."""
        chosen = [question for question in self.questions if question.id in ids]
        return replace(self, questions=chosen)

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy, also by category and by kind of scoring; no metrics without references."""
        outcomes = [
            (question, question.outcome(answers.get(question.id)))
            for question in self.questions
            if question.references
        ]
        if not outcomes:
            return Scores({})
        groups = {
            "accuracy by category": [
                (question.category, outcome) for question, outcome in outcomes
            ],
            "accuracy by scoring": [(question.scoring, outcome) for question, outcome in outcomes],
        }
        shares = {name: accuracy_by_group(pairs) for name, pairs in groups.items()}
        return Scores(
            {"accuracy": accuracy(outcome for _, outcome in outcomes)},
            {name: share for name, share in shares.items() if share},
        )


# ---- reading -----------------------------------------------------------------------------------


def open_jsonl(
    files: Sequence[Path], folder: Path | None = None, short_answer: bool = False
) -> OwnDataSuite:
    """The suite of a JSON lines file. Raises EvaluationError naming file and line."""
    [path] = files
    questions = [
        question_of(record, default_id=str(number))
        for number, record in enumerate(read_json_lines(path), start=1)
    ]
    return OwnDataSuite(questions, ImageFolder(folder or path.parent), [path], short_answer)


def question_of(
    record: Record,
    default_id: str,
    id_names: Sequence[str] = ID_NAMES,
    prompt_names: Sequence[str] = PROMPT_NAMES,
    image_names: Sequence[str] = IMAGE_NAMES,
    answer_names: Sequence[str] = ANSWER_NAMES,
    choice_names: Sequence[str] = CHOICE_NAMES,
) -> Question:
    """One question. Each field may have any of the given names."""
    choices = texts_of(record, choice_names)
    if len(choices) == 1 or len(choices) > MOST_OPTIONS:
        raise EvaluationError(
            f"{record.where}: has {len(choices)} choices, must be 2 to {MOST_OPTIONS}"
        )
    answers = record.get(*answer_names, default=[])
    if choices:
        references = tuple(letter_of(answer, choices, record) for answer in as_list(answers))
    else:
        references = texts_of(record, answer_names)
    known = any(not record.lacks(name) for name in id_names)
    return Question(
        id=record.id(*id_names) if known else default_id,
        text=record.text(*prompt_names),
        images=texts_of(record, image_names),
        references=references,
        where=record.where,
        choices=choices,
        category=str(record.get("category", default="")),
    )


def as_list(value: Any) -> list[Any]:
    """A list unchanged; any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def texts_of(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    """The texts of a field that holds a text or a list. Numbers become texts.

    Raises EvaluationError naming the field for other values, and for an empty text."""
    values = as_list(record.get(*names, default=[]))
    texts = tuple(
        str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for value in values
    )
    if not all(isinstance(text, str) and text.strip() for text in texts):
        name = next(name for name in names if not record.lacks(name))
        raise EvaluationError(f"{record.where}: {name!r} must be a text or a list of texts")
    return texts


def letter_of(answer: Any, choices: Sequence[str], record: Record) -> str:
    """The letter of a right choice, given as its text, its letter or its index from 0.

    A number that equals a choice's text means that choice. Raises EvaluationError for any other
    value."""
    is_known = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if is_known and str(answer) in choices:
        return ascii_uppercase[choices.index(str(answer))]
    if is_known and isinstance(answer, int) and 0 <= answer < len(choices):
        return ascii_uppercase[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters(len(choices)):
        return answer
    raise EvaluationError(f"{record.where}: the answer {answer!r} is none of the choices")
