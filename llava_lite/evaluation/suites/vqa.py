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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suites.base import Question, QuestionSuite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import (
    Record,
    as_record,
    read_json,
    read_json_lines,
    records_of,
)
from llava_lite.evaluation.suites.short_answers import PEOPLE, normalize_answer, short_answer_prompt

DEFAULT_SUBTYPE = "val2014"
OCR_LINE = "Reference OCR token: "


@dataclass
class VqaSuite(QuestionSuite):
    """Short answers. A failed question counts as wrong."""

    name: str = "vqa"

    def computed_settings(self) -> Mapping[str, Any]:
        return {"scoring": scoring_of(self.entries), **super().computed_settings()}

    def export(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the format of the VQA servers: [{"question_id", "answer"}] with normalized answers.
        For VizWiz the id is "image"."""
        results = [
            {**question.result, "answer": normalize_answer(answers.get(question.id, ""))}
            for question in self.entries
        ]
        path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")


def scoring_of(questions: Iterable[Question]) -> str:
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
class Format:
    """The names of fields in one kind of question file, and the fields that group questions."""

    id: tuple[str, ...] = ("question_id", "image")  # in VizWiz the image is the id
    text: tuple[str, ...] = ("question",)
    groups: tuple[str, ...] = ("question_type", "answer_type")


OFFICIAL = Format()
LINES = Format(("question_id", "id"), ("text", "question"), (*OFFICIAL.groups, "category"))
GQA = Format(groups=("structural", "semantic"))


@dataclass(frozen=True)
class Beside:
    """All that questions need beside their records. From second files: annotations by question,
    OCR tokens by image. `ocr`: the prompts have the OCR tokens."""

    annotations: Mapping[str, Record]
    ocr_tokens: Mapping[str, tuple[str, ...]]
    images: ImageFolder
    subtype: str
    ocr: bool

    def tokens_of(self, record: Record) -> tuple[str, ...]:
        """The OCR tokens of the record, or of its image."""
        return ocr_tokens_of(record) or self.ocr_tokens.get(str(record.get("image_id")), ())


def open_vqa(files: Sequence[Path], folder: Path, ocr: bool = False) -> VqaSuite:
    """The suite of a question file and, in any order, its annotation or OCR file.

    `ocr` puts the OCR tokens into the prompt. Raises EvaluationError naming file and item."""
    contents = [(path, read_any(path)) for path in files]
    asking = [(path, content) for path, content in contents if asks(content)]
    if len(asking) != 1:
        names = ", ".join(map(str, files))
        raise EvaluationError(f"{names}: {len(asking)} of these hold questions, must be 1")
    [(path, content)] = asking
    kind, records = read_records(path, content)
    subtype = DEFAULT_SUBTYPE
    if isinstance(content, dict) and "questions" in content:
        subtype = str(content.get("data_subtype") or subtype).replace("-dev", "")
    second = read_second([item for item in contents if item[0] != path])
    beside = Beside(*second, ImageFolder(folder), subtype, ocr)
    if ocr and not any(map(beside.tokens_of, records)):
        raise EvaluationError(f"{path}: no question has OCR tokens")
    questions = [question_of(record, kind, beside) for record in records]
    if kind is LINES:
        questions = number_repeated_ids(questions, beside)
    return VqaSuite(questions, list(files), folder, {"ocr": ocr})


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


def read_second(
    contents: Iterable[tuple[Path, Any]],
) -> tuple[dict[str, Record], dict[str, tuple[str, ...]]]:
    """Annotations and OCR tokens of second files, by question and by image."""
    annotations: dict[str, Record] = {}
    tokens: dict[str, tuple[str, ...]] = {}
    for path, content in contents:
        if "annotations" in content:
            for record in records_of(content, path, "annotations"):
                annotations[record.id("question_id")] = record
        else:
            for record in records_of(content, path, "data"):
                tokens[record.id("image_id")] = ocr_tokens_of(record) or ()
    return annotations, tokens


def read_records(path: Path, content: Any) -> tuple[Format, list[Record]]:
    """The entries of a question file, and its format."""
    if isinstance(content, list) and content and isinstance(content[0], Record):
        return LINES, content
    if not isinstance(content, dict):
        return OFFICIAL, records_of(content, path)
    for key in ("questions", "data"):
        if key in content:
            return OFFICIAL, records_of(content, path, key)
    if not content:
        raise EvaluationError(f"{path}: holds no items")
    return GQA, [
        gqa_record(question_id, as_record(item, f"{path}, question {question_id}"))
        for question_id, item in content.items()
    ]


def gqa_record(question_id: str, record: Record) -> Record:
    """An entry of GQA with the field names of the other files."""
    image = f"{record.id('imageId')}.jpg"
    types = {name: value for name, value in record.get("types", default={}).items() if value}
    return replace(
        record, fields={**types, **record.fields, "question_id": question_id, "image": image}
    )


def question_of(record: Record, kind: Format, beside: Beside) -> Question:
    """One question. An annotation has the answers, if there is one, else the record."""
    question_id, text = record.id(*kind.id), record.text(*kind.text)
    tokens = beside.tokens_of(record)
    if beside.ocr and tokens:
        text = f"{text}\n{OCR_LINE}{', '.join(tokens)}"
    names = (record.text("image"),) if kind is LINES else image_names(record, beside.subtype)
    source = beside.annotations.get(question_id, record)
    has_own_id = kind is LINES or record.has("question_id")
    return Question(
        sample=beside.images.sample(question_id, short_answer_prompt(text), names),
        where=record.where,
        references=references_of(source),
        groups={name: (str(source.get(name)),) for name in kind.groups if source.has(name)},
        result={"question_id" if has_own_id else "image": record.get(*kind.id)},
    )


def number_repeated_ids(questions: Sequence[Question], beside: Beside) -> list[Question]:
    """The questions with repeated ids numbered. An id with an annotation stays, to be refused: the
    annotation could belong to any of its questions."""
    seen: Counter[str] = Counter()
    unique = []
    for question in questions:
        seen[question.id] += 1
        if seen[question.id] > 1 and question.id not in beside.annotations:
            sample = replace(question.sample, id=f"{question.id}/{seen[question.id]}")
            question = replace(question, sample=sample)
        unique.append(question)
    return unique


def image_names(record: Record, subtype: str) -> tuple[str, ...]:
    """The names that the image may have: its own, or what COCO and others make of its number."""
    if record.has("image"):
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
