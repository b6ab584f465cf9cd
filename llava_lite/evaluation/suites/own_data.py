"""Your own questions, one JSON object per line.

    {"id"?, "image" | "images"?, "question" | "prompt" | "text", "answer" | "answers"?, "choices"?}

An image is a URL, a data URL, or a path relative to the file or to a given folder. The text is
asked unchanged; choices and LLaVA's instruction to answer with a letter follow, if given. Choices
are scored by the letter, ten answers by VQA accuracy, other answers by equality with one of them
after normalizing. The right choice is given as its text, its letter or its index from 0. Scores are
also grouped by `category`, if given.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suites.base import Judge, Question, QuestionSuite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.multiple_choice import (
    MOST_OPTIONS,
    chosen_letter,
    letters,
    multiple_choice_prompt,
)
from llava_lite.evaluation.suites.records import Record, read_json_lines
from llava_lite.evaluation.suites.short_answers import (
    PEOPLE,
    short_answer_prompt,
    short_answer_score,
)

FieldNames = Mapping[str, tuple[str, ...]]

FIELDS: FieldNames = {
    "id": ("id", "question_id"),
    "prompt": ("question", "prompt", "text"),
    "image": ("images", "image"),
    "answer": ("answers", "answer"),
    "choices": ("choices",),
}


def open_jsonl(
    files: Sequence[Path], folder: Path | None = None, short_answer: bool = False
) -> QuestionSuite:
    """The suite of a JSON lines file. Raises EvaluationError naming file and line."""
    [path] = files
    return own_suite(
        read_json_lines(path), FIELDS, path, folder or path.parent, "jsonl", short_answer
    )


def own_suite(
    records: Sequence[Record],
    names: FieldNames,
    path: Path,
    folder: Path,
    suite: str,
    short_answer: bool = False,
    **settings: str,
) -> QuestionSuite:
    """The suite of records with questions. `names`: the names that each field may have."""
    images = ImageFolder(folder, urls=True)
    questions = [
        question_of(record, str(number), names, images, short_answer)
        for number, record in enumerate(records, start=1)
    ]
    return QuestionSuite(
        questions, [path], folder, {"short_answer": short_answer, **settings}, suite
    )


def question_of(
    record: Record, default_id: str, names: FieldNames, images: ImageFolder, short_answer: bool
) -> Question:
    """One question. With choices the reference is the right letter."""
    choices = texts_of(record, names["choices"])
    if len(choices) == 1 or len(choices) > MOST_OPTIONS:
        raise EvaluationError(
            f"{record.where}: has {len(choices)} choices, must be 2 to {MOST_OPTIONS}"
        )
    judge: Judge = short_answer_score
    if choices:
        answers = as_list(record.get(*names["answer"], default=[]))
        references = tuple(letter_of(answer, choices, record) for answer in answers)
        judge, scoring = partial(judge_choice, choices), "choice"
    else:
        references = texts_of(record, names["answer"])
        scoring = "vqa" if len(references) == PEOPLE else "exact"
    text = record.text(*names["prompt"])
    if choices:
        text = multiple_choice_prompt(text, choices)
    elif short_answer:
        text = short_answer_prompt(text)
    sample_id = record.id(*names["id"]) if record.has(*names["id"]) else default_id
    sources = [(name,) for name in texts_of(record, names["image"])]
    groups = {"category": (str(record.get("category", default="")),), "scoring": (scoring,)}
    sample = images.sample(sample_id, text, *sources)
    return Question(sample, record.where, references, judge, groups)


def judge_choice(choices: Sequence[str], answer: str, references: Sequence[str]) -> float:
    """1 if the answer names the right choice."""
    return float(chosen_letter(answer, choices) in references)


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
        name = next(name for name in names if record.has(name))
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
