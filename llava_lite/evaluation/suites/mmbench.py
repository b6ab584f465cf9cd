"""MMBench: multiple choice from a TSV file with the images in it, asked with rotated options.

Columns: index, image, question, A, B, ...; hint, answer, category, l2-category where there are any.
`image` is an encoded image file in base64, or in at most 64 characters the index of the row that
has it. A row with index i + k * 1,000,000 is row i with its options rotated; circular accuracy
counts a question as right only if every rotation is answered rightly, vanilla accuracy counts the
unrotated rows.
"""

import base64
import binascii
import csv
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Sample, Scores, accuracy, accuracy_by_group
from llava_lite.evaluation.suites.base import ListSuite
from llava_lite.evaluation.suites.multiple_choice import (
    LETTER_INSTRUCTIONS,
    chosen_letter,
    is_missing,
    letters,
    multiple_choice_prompt,
)
from llava_lite.evaluation.suites.records import Record, read_tab_separated

ROTATION_OFFSET = 1_000_000
LONGEST_REFERENCE = 64
LONGEST_INDEX = 18  # digits, as many as 64-bit integers surely hold
GROUPINGS = ("category", "l2-category")
EXTRACTION = "rules only, no judge model: what they cannot tell is wrong"


@dataclass(frozen=True)
class RowImage:
    """An encoded image file, or the error. The key is the same for the same bytes."""

    content: bytes = b""
    key: str = ""
    error: str | None = None


@dataclass(frozen=True)
class MMBenchRow:
    """One question. `answer`: a letter, None if unknown. `made`: a rotation that is not in the
    file."""

    id: str
    question: str
    options: tuple[str, ...]
    image: RowImage
    where: str
    hint: str = ""
    answer: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    made: bool = False

    @property
    def index(self) -> int | None:
        """The row's number; None for a bad index."""
        return index_of(self.id)

    @property
    def group(self) -> str:
        """The key that all rotations of one question share."""
        return self.id if self.index is None else str(self.index % ROTATION_OFFSET)

    @property
    def is_rotation(self) -> bool:
        """Whether the options are rotated against the question's first row."""
        return self.index is not None and self.index >= ROTATION_OFFSET

    def sample(self, language: str) -> Sample:
        """The question with the official prompt."""
        error = self.error or self.image.error
        prompt = multiple_choice_prompt(self.question, self.options, self.hint, language)
        if error:
            return Sample(self.id, prompt, error=error)
        return Sample(self.id, prompt, (self.image.content,), image_key=self.image.key)


@dataclass
class MMBenchSuite(ListSuite[MMBenchRow]):
    """MMBench, English or Chinese. A failed row, and an answer without a clear letter, is wrong.

    `incomplete`: questions without all their rotations, in a part of the suite. Circular accuracy
    leaves them out, because it would be too high for them."""

    name: str = "mmbench"
    max_new_tokens: int = 1024
    language: str = "en"
    incomplete: frozenset[str] = frozenset()

    def computed_settings(self) -> Mapping[str, Any]:
        return {
            "language": self.language,
            "letter_extraction": EXTRACTION,
            "rotations": describe_rotations(self.entries),
            "questions_left_out_of_circular": len(self.incomplete),
        }

    def samples(self) -> Sequence[Sample]:
        """All rows in the order of the file. Made rotations follow their row."""
        return [row.sample(self.language) for row in self.entries]

    def select(self, ids: Collection[str]) -> "MMBenchSuite":
        """The suite of these rows only."""
        chosen = super().select(ids)
        whole = Counter(row.group for row in self.entries)
        part = Counter(row.group for row in chosen.entries)
        incomplete = {group for group, count in part.items() if count < whole[group]}
        incomplete |= self.incomplete & set(part)
        return replace(chosen, incomplete=frozenset(incomplete))

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Circular and vanilla accuracy, also by category; no metrics without known answers."""
        scored = [row for row in self.entries if row.answer or row.error]
        if not any(row.answer for row in scored):
            return Scores({})
        right = {row.id: is_right(row, answers) for row in scored}
        rotations_of: dict[str, list[MMBenchRow]] = {}
        for row in scored:
            rotations_of.setdefault(row.group, []).append(row)
        by_kind = {
            "circular": [
                (rows[0], all(right[row.id] for row in rows))
                for group, rows in rotations_of.items()
                if group not in self.incomplete
            ],
            "vanilla": [(row, right[row.id]) for row in scored if not row.is_rotation],
        }
        metrics = {
            kind: accuracy(outcome for _, outcome in outcomes) for kind, outcomes in by_kind.items()
        }
        groups = {
            f"{kind} by {grouping}": accuracy_by_group(
                (row.groups.get(grouping, ""), outcome) for row, outcome in outcomes
            )
            for grouping in GROUPINGS
            for kind, outcomes in by_kind.items()
        }
        return Scores(metrics, {name: shares for name, shares in groups.items() if shares})

    def export(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the official submission as a tab-separated file: index, question, options,
        prediction (the unchanged answer), for each row of the file.

        The server takes the same table as .xlsx; a spreadsheet program can convert the file."""
        rows = [row for row in self.entries if not row.made]
        columns = letters(max((len(row.options) for row in rows), default=0))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["index", "question", *columns, "prediction"])
            for row in rows:
                padded = [*row.options, *[""] * (len(columns) - len(row.options))]
                writer.writerow([row.id, row.question, *padded, answers.get(row.id, "")])


def is_right(row: MMBenchRow, answers: Mapping[str, str]) -> bool:
    """Whether the row has an answer and the answer names the right option."""
    chosen = chosen_letter(answers.get(row.id, ""), row.options)
    return chosen is not None and chosen == row.answer


def describe_rotations(rows: Iterable[MMBenchRow]) -> str:
    """Where rotated rows come from, for the settings of a report."""
    rows = list(rows)
    if any(row.made for row in rows):
        return "made here: as many as a question has options"
    if any(row.is_rotation for row in rows):
        return "the file's own"
    return "none: circular accuracy equals vanilla accuracy"


# ---- rotating ----------------------------------------------------------------------------------


def with_rotations(rows: Sequence[MMBenchRow]) -> list[MMBenchRow]:
    """Every row followed by its rotations: as many rows as the question has options.

    Raises EvaluationError if the file has rotated rows."""
    rotated = next((row for row in rows if row.is_rotation), None)
    if rotated is not None:
        raise EvaluationError(
            f"{rotated.where}: index {rotated.id} is a rotation; the file has its own"
        )
    return [each for row in rows for each in (row, *rotations(row))]


def rotations(row: MMBenchRow) -> Iterator[MMBenchRow]:
    """The row with its options rotated by 1, 2, ... places."""
    if row.index is None or row.error:
        return
    for turn in range(1, len(row.options)):
        answer = row.answer and rotated_letter(row.answer, turn, len(row.options))
        yield replace(
            row,
            id=str(row.index + turn * ROTATION_OFFSET),
            options=row.options[turn:] + row.options[:turn],
            answer=answer,
            made=True,
        )


def rotated_letter(letter: str, turn: int, count: int) -> str:
    """The new letter of an option after a rotation of `count` options by `turn` places."""
    return ascii_uppercase[(ascii_uppercase.index(letter) - turn) % count]


# ---- reading -----------------------------------------------------------------------------------


def open_mmbench(
    files: Sequence[Path], language: str = "en", circular: bool = False
) -> MMBenchSuite:
    """The suite of a TSV file. `circular` makes rotations for a file without them.

    A row with a broken image, a bad index or too few options is a sample with an error. Raises
    EvaluationError naming file and line for what is wrong with the file."""
    if language not in LETTER_INSTRUCTIONS:
        known = " or ".join(LETTER_INSTRUCTIONS)
        raise EvaluationError(f"language {language!r} is not {known}")
    [path] = files
    rows = read_rows(path)
    return MMBenchSuite(with_rotations(rows) if circular else rows, [path], language=language)


def read_rows(path: Path) -> list[MMBenchRow]:
    """All rows of a file with their images."""
    needed = ("index", "image", "question", "A", "B")
    images: dict[str, RowImage | str] = {}  # by index; a text is the index of another row
    known: dict[str, RowImage] = {}  # by key: rows with the same bytes share them
    rows = []
    for record in read_tab_separated(path, needed):
        row = row_of(record)
        rows.append(row)
        image = image_or_reference(cell(record, "image"))
        if isinstance(image, RowImage) and image.key:
            image = known.setdefault(image.key, image)
        images[row.id] = image
    if not rows:
        raise EvaluationError(f"{path}: holds no rows")
    return [replace(row, image=follow(row.id, images)) for row in rows]


def row_of(record: Record) -> MMBenchRow:
    """One row, without its image."""
    index = index_of(cell(record, "index"))
    options = tuple(options_of(record))
    answer = cell(record, "answer").upper() or None
    question = text(record, "question")
    error = None
    if index is None:
        error = f"{record.where}: the index {cell(record, 'index')!r} is not a whole number"
    elif not question:
        error = f"{record.where}: has no question"
    elif len(options) < 2:
        error = f"{record.where}: has {len(options)} options, needs 2 or more"
    elif answer and answer not in tuple(letters(len(options))):
        known = ", ".join(letters(len(options)))
        error = f"{record.where}: the answer {answer!r} is none of {known}"
    return MMBenchRow(
        id=record.where.rsplit(", ")[-1] if index is None else str(index),
        question=question,
        options=options,
        image=RowImage(),
        where=record.where,
        hint=text(record, "hint"),
        answer=answer,
        groups={name: cell(record, name) for name in GROUPINGS},
        error=error,
    )


def text(record: Record, column: str) -> str:
    """The unchanged text of a cell, because prompts must match exactly; "" for an empty cell."""
    content = str(record.get(column, default=""))
    return "" if is_missing(content) else content


def cell(record: Record, column: str) -> str:
    """The text of a cell without surrounding blanks."""
    return text(record, column).strip()


def options_of(record: Record) -> Iterator[str]:
    """The options before the first empty cell."""
    for letter in ascii_uppercase:
        option = text(record, letter)
        if not option:
            return
        yield option


def index_of(said: str) -> int | None:
    """A row's number. Tables that went through a spreadsheet write 7 as 7.0."""
    whole = said.removesuffix(".0")
    is_number = whole.isascii() and whole.isdigit() and len(whole) <= LONGEST_INDEX
    return int(whole) if is_number else None


# ---- images ------------------------------------------------------------------------------------


def image_or_reference(said: str) -> RowImage | str:
    """The image in a cell, or the index of the row that has it."""
    if not said:
        return RowImage(error="the row has no image")
    if len(said) <= LONGEST_REFERENCE:
        index = index_of(said)
        return (
            RowImage(error=f"the image {said!r} is no row's index") if index is None else str(index)
        )
    try:
        content = base64.b64decode("".join(said.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return RowImage(error=f"the image is not valid base64: {error}")
    return RowImage(content, sha256(content).hexdigest())


def follow(index: str, images: Mapping[str, RowImage | str]) -> RowImage:
    """The image of a row. Follows references to other rows."""
    seen: list[str] = []
    found: RowImage | str = index
    while isinstance(found, str):
        if found in seen:
            circle = " -> ".join([*seen, found])
            return RowImage(error=f"the image references go in a circle: {circle}")
        if found not in images:
            return RowImage(error=f"the image is that of row {found}, which is not in the file")
        seen.append(found)
        found = images[found]
    if found.error and len(seen) > 1:
        return RowImage(error=f"the image is that of row {seen[-1]}: {found.error}")
    return found
