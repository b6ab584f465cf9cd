"""Questions with short answers: VQAv2, VizWiz, TextVQA, GQA.

VQAv2     {"questions": [{"question_id", "image_id", "question"}]} and a second file {"annotations":
          [{"question_id", "answers": [{"answer"}], "question_type", "answer_type"}]}
TextVQA   {"data": [{"question_id", "image_id", "question", "answers": [text]}]}; OCR tokens in
          `ocr_tokens` there, or in a second file {"data": [{"image_id", "ocr_tokens"}]}
VizWiz    [{"image", "question", "answers": [{"answer"}], "answer_type"}]
GQA       {question id: {"imageId", "question", "answer", "types": {"structural", "semantic"}}}
LLaVA     lines of {"question_id", "image", "text"}, with or without an annotation file; of an id
          that several lines have, which TextVQA's do, the second becomes "id/2" and so on

Ten answers are scored by VQA accuracy, a single answer by equality after normalizing. An image is
COCO_val2014_000000000042.jpg, 000000000042.jpg, 42.jpg or 42.png, or the value of `image`.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Sample, Scores, accuracy, accuracy_by_group, settings_of
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import (
    Record,
    as_record,
    read_json,
    read_json_lines,
    records_of,
    refuse_repeated_ids,
)
from llava_lite.evaluation.suites.short_answers import (
    exact_match,
    normalize_answer,
    short_answer_prompt,
    vqa_accuracy,
)

MAX_NEW_TOKENS = 128
PEOPLE = 10  # people who answered each question of VQA
DEFAULT_SUBTYPE = "val2014"
OCR_LINE = "Reference OCR token: "


@dataclass(frozen=True)
class VqaQuestion:
    """One question. `image_names`: possible names of the image file. Without references the
    question is not scored."""

    id: str
    text: str
    image_names: tuple[str, ...]
    references: tuple[str, ...]
    where: str
    question_id: str | int
    groups: Mapping[str, str] = field(default_factory=dict)
    ocr_tokens: tuple[str, ...] | None = None
    result_key: str = "question_id"  # the id's name in a result file

    def prompt(self, ocr: bool) -> str:
        """The question, its OCR tokens if wanted and known, the official instruction."""
        if not ocr or not self.ocr_tokens:
            return short_answer_prompt(self.text)
        return short_answer_prompt(f"{self.text}\n{OCR_LINE}{', '.join(self.ocr_tokens)}")

    def outcome(self, answer: str | None) -> float:
        """The score of an answer, 0..1; 0 without an answer."""
        if answer is None:
            return 0.0
        if len(self.references) == 1:
            return float(exact_match(answer, self.references))
        return vqa_accuracy(answer, self.references)


@dataclass
class VqaSuite:
    """Short answers. A failed question counts as wrong."""

    questions: Sequence[VqaQuestion]
    folder: ImageFolder
    files: Sequence[Path]
    ocr: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "vqa"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        refuse_repeated_ids((question.id, question.where) for question in self.questions)
        unknown = sum(not question.references for question in self.questions)
        computed = {"scoring": scoring_of(self.questions), "without_reference": unknown}
        self.settings = settings_of({"ocr": self.ocr, **self.settings}, computed)

    def samples(self) -> Sequence[Sample]:
        """All questions, with the official instruction to answer shortly."""
        return [
            self.folder.sample(question.id, question.prompt(self.ocr), *question.image_names)
            for question in self.questions
        ]

    def select(self, ids: Collection[str]) -> "VqaSuite":
        """The suite of these questions only."""
        chosen = [question for question in self.questions if question.id in ids]
        return replace(self, questions=chosen)

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy, also by each kind of group in the file; no metrics without references."""
        outcomes = [
            (question, question.outcome(answers.get(question.id)))
            for question in self.questions
            if question.references
        ]
        if not outcomes:
            return Scores({})
        kinds = dict.fromkeys(kind for question, _ in outcomes for kind in question.groups)
        groups = {
            f"accuracy by {kind}": accuracy_by_group(
                (question.groups.get(kind, ""), outcome) for question, outcome in outcomes
            )
            for kind in kinds
        }
        return Scores({"accuracy": accuracy(outcome for _, outcome in outcomes)}, groups)

    def export(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the format of the VQA servers: [{"question_id", "answer"}] with normalized answers.
        For VizWiz the id is "image"."""
        results = [
            {
                question.result_key: question.question_id,
                "answer": normalize_answer(answers.get(question.id, "")),
            }
            for question in self.questions
        ]
        path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")


def scoring_of(questions: Iterable[VqaQuestion]) -> str:
    """How answers are scored, for the settings of a report.

    Raises EvaluationError for a number of references other than 0, 1 and 10."""
    counts = set()
    for question in questions:
        count = len(question.references)
        if count not in (0, 1, PEOPLE):
            raise EvaluationError(
                f"{question.where}: has {count} answers; VQA accuracy needs {PEOPLE}, equality 1"
            )
        counts.add(count)
    equality = "equality after normalising"  # codespell:ignore normalising
    names = {PEOPLE: "VQA accuracy of 10 answers", 1: equality}
    return " and ".join(names[count] for count in names if count in counts) or "none"


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """The content of second files: annotations by question, OCR tokens by image."""

    annotations: Mapping[str, Record]
    ocr_tokens: Mapping[str, tuple[str, ...]]

    def of(self, question_id: str, record: Record) -> Record:
        """The record that holds the answers."""
        return self.annotations.get(question_id, record)


def open_vqa(files: Sequence[Path], folder: Path, ocr: bool = False) -> VqaSuite:
    """The suite of a question file and, in any order, its annotation or OCR file.

    `ocr` puts the OCR tokens into the prompt. Raises EvaluationError naming file and item."""
    contents = [(path, read_any(path)) for path in files]
    asking = [(path, content) for path, content in contents if asks(content)]
    if len(asking) != 1:
        names = ", ".join(map(str, files))
        raise EvaluationError(f"{names}: {len(asking)} of these hold questions, must be 1")
    [(path, content)] = asking
    beside = read_beside([item for item in contents if item[0] != path])
    questions = read_questions(path, content, beside)
    if ocr and not any(question.ocr_tokens for question in questions):
        raise EvaluationError(f"{path}: no question has OCR tokens")
    return VqaSuite(questions, ImageFolder(folder), list(files), ocr)


def read_any(path: Path) -> Any:
    """The content of a JSON file, or the list of records of a .jsonl file."""
    return read_json_lines(path) if path.suffix.lower() == ".jsonl" else read_json(path)


def asks(content: Any) -> bool:
    """Whether the content has questions, not annotations or OCR tokens."""
    if not isinstance(content, dict):
        return True
    if "questions" in content:
        return True
    if "data" in content:
        items = content["data"]
        first = items[0] if isinstance(items, list) and items else None
        return not isinstance(first, dict) or "question" in first
    return "annotations" not in content


def read_beside(contents: Iterable[tuple[Path, Any]]) -> Beside:
    """Annotations and OCR tokens of second files."""
    annotations: dict[str, Record] = {}
    tokens: dict[str, tuple[str, ...]] = {}
    for path, content in contents:
        if "annotations" in content:
            for record in records_of(content, path, "annotations"):
                annotations[record.id("question_id")] = record
        else:
            for record in records_of(content, path, "data"):
                tokens[record.id("image_id")] = ocr_tokens_of(record) or ()
    return Beside(annotations, tokens)


def read_questions(path: Path, content: Any, beside: Beside) -> list[VqaQuestion]:
    """All questions of a file of any of the formats."""
    if isinstance(content, list) and content and isinstance(content[0], Record):
        questions = [line_question(record, beside) for record in content]
        return number_repeated_ids(questions, beside)
    if not isinstance(content, dict):
        records = records_of(content, path)
        return [question_of(record, DEFAULT_SUBTYPE, beside) for record in records]
    if "questions" in content:
        subtype = str(content.get("data_subtype") or DEFAULT_SUBTYPE).replace("-dev", "")
        records = records_of(content, path, "questions")
        return [question_of(record, subtype, beside) for record in records]
    if "data" in content:
        records = records_of(content, path, "data")
        return [question_of(record, DEFAULT_SUBTYPE, beside) for record in records]
    if not content:
        raise EvaluationError(f"{path}: holds no items")
    return [
        gqa_question(question_id, as_record(item, f"{path}, question {question_id}"))
        for question_id, item in content.items()
    ]


def question_of(record: Record, subtype: str, beside: Beside) -> VqaQuestion:
    """A question of VQAv2, TextVQA or VizWiz. In VizWiz the image is the id."""
    question_id = record.id("question_id", "image")
    source = beside.of(question_id, record)
    kinds = ("question_type", "answer_type")
    return VqaQuestion(
        id=question_id,
        text=record.text("question"),
        image_names=image_names(record, subtype),
        references=references_of(source),
        where=record.where,
        question_id=record.get("question_id", "image"),
        result_key="image" if record.lacks("question_id") else "question_id",
        groups={kind: str(source.get(kind)) for kind in kinds if not source.lacks(kind)},
        ocr_tokens=ocr_tokens_of(record) or beside.ocr_tokens.get(str(record.get("image_id"))),
    )


def line_question(record: Record, beside: Beside) -> VqaQuestion:
    """A question of LLaVA's files."""
    question_id = record.id("question_id", "id")
    source = beside.of(question_id, record)
    kinds = ("question_type", "answer_type", "category")
    return VqaQuestion(
        id=question_id,
        text=record.text("text", "question"),
        image_names=(record.text("image"),),
        references=references_of(source),
        where=record.where,
        question_id=record.get("question_id", "id"),
        groups={kind: str(source.get(kind)) for kind in kinds if not source.lacks(kind)},
        ocr_tokens=ocr_tokens_of(record),
    )


def number_repeated_ids(questions: Sequence[VqaQuestion], beside: Beside) -> list[VqaQuestion]:
    """The questions with repeated ids numbered. An id with an annotation stays, to be refused: the
    annotation could belong to any of its questions."""
    seen: Counter[str] = Counter()
    unique = []
    for question in questions:
        seen[question.id] += 1
        if seen[question.id] > 1 and question.id not in beside.annotations:
            question = replace(question, id=f"{question.id}/{seen[question.id]}")
        unique.append(question)
    return unique


def gqa_question(question_id: str, record: Record) -> VqaQuestion:
    """A question of GQA, with one answer or none."""
    types = record.get("types", default={})
    return VqaQuestion(
        id=question_id,
        text=record.text("question"),
        image_names=(f"{record.id('imageId')}.jpg",),
        references=references_of(record),
        where=record.where,
        question_id=question_id,
        groups={kind: str(types[kind]) for kind in ("structural", "semantic") if types.get(kind)},
    )


def image_names(record: Record, subtype: str) -> tuple[str, ...]:
    """The names that the image may have: its own, or what COCO and others make of its number."""
    if not record.lacks("image"):
        return (record.text("image"),)
    image_id = record.id("image_id")
    plain = (f"{image_id}.jpg", f"{image_id}.png")
    if not (image_id.isascii() and image_id.isdigit()):
        return plain
    return (f"COCO_{subtype}_{image_id:0>12}.jpg", f"{image_id:0>12}.jpg", *plain)


def references_of(record: Record) -> tuple[str, ...]:
    """The right answers, from texts or from objects with an `answer`; none if there are none."""
    answers = record.get("answers", "answer", default=[])
    listed = answers if isinstance(answers, list) else [answers]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in listed]
    strings = tuple(text for text in texts if isinstance(text, str))
    if len(strings) < len(texts):
        raise EvaluationError(f"{record.where}: the answers must be texts")
    return strings


def ocr_tokens_of(record: Record) -> tuple[str, ...] | None:
    """The words read off the image, None if the record does not say."""
    tokens = record.get("ocr_tokens")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise EvaluationError(f"{record.where}: 'ocr_tokens' must be a list of texts")
    return tuple(tokens)
