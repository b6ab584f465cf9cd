"""Answer a file of questions, one JSON line per answer. A run that was killed can be resumed.

    read_rows(path)    a JSONL file, a CSV file or a folder of images -> rows
    plan(rows, ...)    the rows still to answer; checks input and output before any work
    run_batch(...)     answers the rows batch by batch and appends each batch to the output

The output grows by whole batches of lines {id, prompt, image, answer | error, ...}. A killed run
leaves at most one incomplete line at the end, which the next run removes.
"""

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.generation.failures import try_together
from llava_lite.saving import JsonObject, check_output, lines_of, lock, parse_object

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)
DEFAULT_BATCH_SIZE = 8

RowId = str | int
Item = TypeVar("Item")


class BatchError(LlavaLiteError):
    """The input or the output of a batch cannot be used. Names the file and the line."""


@dataclass(frozen=True)
class Row:
    """One question. `image`: as in the input, relative to `folder`; None for text only."""

    id: RowId
    prompt: str
    image: str | list[str] | None
    folder: Path
    line: int
    reduction: str | None = None  # preset or parts of the reduction

    @property
    def sources(self) -> list[str]:
        """The images as URLs, or as paths that include the folder."""
        names = [self.image] if isinstance(self.image, str) else self.image or []
        return [name if URL.match(name) else str(self.folder / name) for name in names]

    def start_record(self) -> JsonObject:
        """The part of the output line that repeats the question."""
        asked = {"id": self.id, "prompt": self.prompt, "image": self.image}
        return asked if self.reduction is None else {**asked, "reduction": self.reduction}

    def record_answer(self, answer: "Answer") -> JsonObject:
        """The output line of an answer."""
        return {**self.start_record(), **answer_fields(answer)}

    def record_error(self, error: BaseException) -> JsonObject:
        """The output line of an error."""
        return {**self.start_record(), **error_fields(error)}


def answer_fields(answer: "Answer") -> JsonObject:
    """The outcome in an output line, for an answer."""
    return {"answer": str(answer), "finish_reason": answer.finish_reason, "usage": answer.usage}


def error_fields(error: BaseException | str | None) -> JsonObject:
    """The outcome in an output line, for an error."""
    return {"error": one_line(error), "finish_reason": "error", "usage": {}}


# ---- input -------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike[str], prompt: str | None = None) -> list[Row]:
    """Read all rows of a `.csv` file with a header, of a JSONL file, or of a folder of images.

    Fields: `id` or `question_id` (default: the line number), `image` or `images`, and `prompt`,
    `question` or `text` (default: the argument `prompt`). A folder is searched with its subfolders;
    the id of an image is its path in the folder. Raises BatchError for malformed rows and repeated
    ids, with file and line."""
    path = Path(path)
    if path.is_dir():
        rows = list(folder_rows(path, prompt))
    elif not path.is_file():
        raise BatchError(f"{path}: no such file or folder")
    else:
        read = read_csv if path.suffix.lower() == ".csv" else read_jsonl
        try:
            rows = [parse_row(fields, path, line, prompt) for line, fields in read(path)]
        except UnicodeDecodeError as error:
            raise BatchError(f"{path}: is not UTF-8 text: {error.reason}") from error
    if not rows:
        what = "images" if path.is_dir() else "rows"
        raise BatchError(f"{path}: contains no {what}")
    refuse_repeated_ids(rows, path)
    return rows


def folder_rows(folder: Path, prompt: str | None) -> Iterator[Row]:
    """One row per image file, ordered by path, without hidden files."""
    if not prompt:
        raise BatchError(f"{folder}: a folder of images needs a prompt (-p, --prompt)")
    for number, name in enumerate(image_names(folder), start=1):
        yield Row(name, prompt, name, folder, number)


def image_names(folder: Path) -> list[str]:
    """The paths of image files in a folder and its subfolders, ordered, without hidden files."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    )
    return [name for name in names if not any(part[0] == "." for part in name.split("/"))]


def read_jsonl(path: Path) -> Iterator[tuple[int, JsonObject]]:
    """(line number, object) of every line that is not blank."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_object(line, f"{path}, line {number}", BatchError)


def read_csv(path: Path) -> Iterator[tuple[int, JsonObject]]:
    """(line number, fields) of every row. An empty cell is a missing field."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for cells in reader:
                if None in cells or None in cells.values():
                    columns = len(reader.fieldnames or ())
                    raise BatchError(
                        f"{path}, line {reader.line_num}: needs {columns} columns like the header"
                    )
                yield reader.line_num, {name.strip(): cell for name, cell in cells.items() if cell}
        except csv.Error as error:
            raise BatchError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def parse_row(fields: JsonObject, path: Path, line: int, prompt: str | None) -> Row:
    """Check one row's fields. Raises BatchError naming the line and the field."""
    where = f"{path}, line {line}"
    row_id = pick_field(fields, ("id", "question_id"), where, line)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise BatchError(f"{where}: the id {row_id!r} is neither a string nor an integer")
    question = pick_field(fields, ("prompt", "question", "text"), where, prompt)
    if not isinstance(question, str) or not question:
        raise BatchError(f"{where}: needs a prompt (fields prompt, question or text, or --prompt)")
    image = pick_field(fields, ("image", "images"), where, None)
    several = isinstance(image, list) and all(isinstance(name, str) and name for name in image)
    if not (several or image is None or (isinstance(image, str) and image)):
        raise BatchError(
            f"{where}: the image {image!r} is neither a path, a list of paths nor null"
        )
    return Row(row_id, question, image, path.parent, line)


def pick_field(fields: JsonObject, names: tuple[str, ...], where: str, default: Any) -> Any:
    """The value of the one field with one of these names. Raises BatchError for two fields."""
    present = [name for name in names if fields.get(name) is not None]
    if len(present) > 1:
        raise BatchError(f"{where}: has both {present[0]!r} and {present[1]!r}, give one")
    return fields[present[0]] if present else default


def refuse_repeated_ids(rows: Iterable[Row], path: Path) -> None:
    """Raise BatchError for an id that occurs twice, with both lines."""
    first: dict[RowId, int] = {}
    for row in rows:
        line = first.setdefault(row.id, row.line)
        if line != row.line:
            raise BatchError(f"{path}: lines {line} and {row.line} have the same id {row.id!r}")


def select_shard(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Every n-th item from the i-th on, for shard = (i, n) with 1 <= i <= n.

    All n shards together contain every item once. Raises ValueError out of range."""
    part, total = shard
    if not 1 <= part <= total:
        raise ValueError(f"shard {part}/{total}: must be i/n with 1 <= i <= n")
    return list(items[part - 1 :: total])


# ---- output ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    todo: rows to answer. answered, failed: numbers of rows that stay in the output. drop: ids whose
    error lines are removed. size: bytes of the complete lines in the output. found: bytes of the
    whole output."""

    todo: list[Row]
    answered: int = 0
    failed: int = 0
    drop: frozenset[RowId] = frozenset()
    size: int = 0
    found: int = 0


def plan(
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    retry_errors: bool = False,
    reduction: object = None,
) -> Plan:
    """Compare the rows and the reduction with the output. Changes nothing.

    Raises BatchError if the output is not empty and `resume` is False, if it is not the output of a
    batch, and if it answers another question with the same id."""
    output = Path(output)
    rows = [replace(row, reduction=reduction_name(reduction)) for row in rows]
    check_output(output, BatchError, appends=True)
    if not output.exists() or not output.stat().st_size:
        return Plan(list(rows))
    if not resume:
        raise BatchError(f"{output}: is not empty; resume it (--resume) or name another file")
    done: dict[RowId, bool] = {}
    size, found, by_id = 0, output.stat().st_size, {row.id: row for row in rows}
    for number, line in complete_lines(output):
        record = parse_record(line, output, number)
        row_id = record["id"]
        if row_id in by_id:
            refuse_other_question(by_id[row_id], record, f"{output}, line {number}")
        done[row_id] = done.get(row_id, False) or "answer" in record
        size += len(line)
    failed = [row.id for row in rows if not done.get(row.id, True)]
    drop = frozenset(failed if retry_errors else ())
    todo = [row for row in rows if row.id not in done or row.id in drop]
    failures = len(failed) - len(drop)
    return Plan(todo, len(rows) - len(todo) - failures, failures, drop, size, found)


def reduction_name(reduction: object) -> str | None:
    """A reduction as it is written in an output line; None for no reduction."""
    if reduction is None:
        return None
    from llava_lite.reduction import NO_REDUCTION, Reduction

    checked = Reduction.of(cast("Reduction | str", reduction))
    return None if checked == NO_REDUCTION else str(checked)


def complete_lines(output: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the complete lines of an output file.

    An incomplete last line of a killed run is skipped. Raises BatchError if that line is something
    else, because it would be lost."""
    with open(output, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line
            elif not b'{"id": '.startswith(line[:7]) or b"\0" in line:
                raise BatchError(f"{output}, line {number}: is not a line of a batch output")


def parse_record(line: bytes, output: Path, number: int) -> JsonObject:
    """Parse one line of an output file. Raises BatchError with the line number."""
    where = f"{output}, line {number}"
    record = parse_object(line, where, BatchError)
    is_row = isinstance(record.get("id"), str | int) and ("answer" in record) != ("error" in record)
    if not is_row:
        raise BatchError(f"{where}: is not a line of a batch output")
    return record


def refuse_other_question(row: Row, record: JsonObject, where: str) -> None:
    """Raise BatchError if the line of the output has another prompt, image or reduction than the
    row."""
    for name in ("prompt", "image", "reduction"):
        if record.get(name) != getattr(row, name):
            there, here = record.get(name), getattr(row, name)
            which = f" ({there or 'none'}, now {here or 'none'})" if name == "reduction" else ""
            raise BatchError(
                f"{where}: id {row.id!r} was asked with another {name}{which}; name another output "
                "file"
            )


def repair(output: Path, plan: Plan) -> None:
    """Cut off an incomplete last line. Remove the error lines of rows that run again."""
    if not output.exists():
        return
    if plan.size < output.stat().st_size:
        os.truncate(output, plan.size)
    if plan.drop:
        output = output.resolve()  # replace the target of a link, not the link
        staging = output.with_name(f".{output.name}.partial")
        with open(staging, "wb") as file:
            for number, line in complete_lines(output):
                record = parse_record(line, output, number)
                if "answer" in record or record["id"] not in plan.drop:
                    file.write(line)
        shutil.copymode(output, staging)
        os.replace(staging, output)


@contextmanager
def open_output(output: Path, plan: Plan) -> Iterator[BinaryIO]:
    """Repair the output, lock it and open it to append. Raises BatchError if another process writes
    to it, or has written to it since the plan."""
    with ExitStack() as files:
        file = files.enter_context(open(output, "ab"))
        lock(file, output, BatchError)
        if os.fstat(file.fileno()).st_size != plan.found:
            raise BatchError(f"{output}: another run has changed it; start again")
        repair(output, plan)
        if plan.drop:  # the name belongs to a new file now
            file = files.enter_context(open(output, "ab"))
            lock(file, output, BatchError)
        yield file


# ---- run ---------------------------------------------------------------------------------------


@dataclass
class Summary:
    """Numbers of rows by outcome.

    present: answered by an earlier run. failed: includes the errors of an earlier run. first_error:
    the line of the first row that failed in this run."""

    answered: int = 0
    failed: int = 0
    present: int = 0
    first_error: JsonObject | None = None


def run_batch(
    model: "Model",
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    resume: bool = False,
    retry_errors: bool = False,
    shard: tuple[int, int] = (1, 1),
    open_image: Callable[[str], Any] | None = None,
    on_record: Callable[[JsonObject], None] | None = None,
    **options: Any,
) -> Summary:
    """Answer rows in order and append their lines to `output`, one batch at a time.

    resume: continue an output and skip its rows. retry_errors: run failed rows again. open_image:
    opens a path or URL (None: the model does). on_record: called with each written line. options:
    as in `Model.generate`.

    A failed row is recorded with its error and does not affect other rows. A failed accelerator
    ends the run. An interrupt leaves complete lines. Raises as `plan` and `select_shard`,
    ValueError for bad options, and OSError if the output cannot be written."""
    from llava_lite.generation.loop import check_batch_size
    from llava_lite.generation.sampling import with_size

    size = check_batch_size(batch_size)
    output = Path(output)
    work = plan(
        select_shard(rows, shard),
        output,
        resume=resume,
        retry_errors=retry_errors,
        reduction=with_size(options.get("reduction"), options.get("image_size")),
    )
    starts = range(0, len(work.todo), size)
    batches = (answer_rows(model, work.todo[s : s + size], open_image, options) for s in starts)
    return append_records(output, work, batches, on_record)


def append_records(
    output: Path,
    work: Plan,
    batches: Iterable[Sequence[JsonObject]],
    on_record: Callable[[JsonObject], None] | None = None,
) -> Summary:
    """Write the records of a plan, each batch as soon as it is done."""
    summary = Summary(failed=work.failed, present=work.answered)
    with open_output(output, work) as file:
        for records in batches:
            file.write(lines_of(*records))
            file.flush()
            for record in records:
                if "error" in record:
                    summary.failed += 1
                    summary.first_error = summary.first_error or record
                else:
                    summary.answered += 1
                if on_record:
                    on_record(record)
    return summary


def answer_rows(
    model: "Model",
    rows: Sequence[Row],
    open_image: Callable[[str], Any] | None,
    options: dict[str, Any],
) -> list[JsonObject]:
    """The records of some rows, answered as one batch, or one by one if that fails."""

    def answer(rows: Sequence[Row]) -> list[JsonObject]:
        images = [
            [open_image(s) for s in row.sources] if open_image else row.sources for row in rows
        ]
        prompts = [row.prompt for row in rows]
        answers = model.generate(images, prompts, batch_size=len(rows), **options)
        return [row.record_answer(answer) for row, answer in zip(rows, answers, strict=True)]

    return try_together(rows, answer, Row.record_error)
