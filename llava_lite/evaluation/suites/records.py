"""Read rows of data sets from JSON, JSON lines and tab-separated files. Errors name file and line.

for record in read_json_lines(path):
    record.get("question", "text"), record.where
"""

import csv
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lite.errors import EvaluationError

# csv refuses fields of over 128 KiB by default. The limit is global to the process.
LARGEST_FIELD = 2**31 - 1
FIELD_LIMIT = threading.Lock()
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Record:
    """One row or object. `where`: its place, for error messages."""

    fields: Mapping[str, Any]
    where: str

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is present and not null."""
        return next((self.fields[name] for name in names if self.has(name)), default)

    def has(self, *names: str) -> bool:
        """Whether one of these fields is present and not null."""
        return any(self.fields.get(name) is not None for name in names)

    def text(self, *names: str) -> str:
        """As `get`, but the value must be a text. Raises EvaluationError naming the field."""
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise EvaluationError(f"{self.where}: needs a text in {' or '.join(map(repr, names))}")
        return value

    def id(self, *names: str) -> str:
        """As `get`, but the value must be a string or an integer. Raises EvaluationError."""
        value = self.get(*names)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise EvaluationError(f"{self.where}: needs an id in {' or '.join(map(repr, names))}")
        return str(value)


# ---- files -------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises EvaluationError naming the file."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text. Raises EvaluationError naming `where` the text stands.

    Lone surrogates, which UTF-8 cannot hold, become replacement characters."""
    try:
        content = json.loads(text)
        return replace_surrogates(content) if SURROGATE_ESCAPE.search(text) else content
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not valid JSON: {error}") from error


def replace_surrogates(content: Any) -> Any:
    """The content with every lone surrogate replaced, in keys too."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, list):
        return [replace_surrogates(item) for item in content]
    if isinstance(content, dict):
        clean = replace_surrogates
        return {clean(name): clean(value) for name, value in content.items()}
    return content


def read_json_lines(path: Path) -> list[Record]:
    """One record per line without blank lines. Raises EvaluationError naming file and line."""
    records = []
    # Not str.splitlines: JSON strings may hold other line separators unescaped.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            records.append(as_record(parse_json(line, where), where))
    if not records:
        raise EvaluationError(f"{path}: holds no rows")
    return records


def read_text(path: Path) -> str:
    """A whole UTF-8 file, with or without a byte order mark. Raises EvaluationError."""
    with reading_errors(path):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into an EvaluationError that names the file."""
    try:
        yield
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not UTF-8 text: {error.reason}") from error


# ---- parts of JSON files -----------------------------------------------------------------------


def as_record(fields: Any, where: str) -> Record:
    """A JSON object as a record. Raises EvaluationError for anything else."""
    if not isinstance(fields, dict):
        raise EvaluationError(f"{where}: a {type(fields).__name__}, not a JSON object")
    return Record(fields, where)


def records_of(content: Any, path: Path, key: str | None = None) -> list[Record]:
    """The objects of a list, or of the list at `key` of an object. `where` counts from 1.

    Raises EvaluationError if there is no such list, or if it is empty or holds no objects."""
    place = f"{path}: {key}" if key else str(path)
    inside = content.get(key) if isinstance(content, dict) else None
    found = inside if key else content
    if not isinstance(found, list):
        raise EvaluationError(f"{path}: needs a list{f' at {key!r}' if key else ''}")
    if not found:
        raise EvaluationError(f"{place}: holds no items")
    return [as_record(item, f"{place}, item {n}") for n, item in enumerate(found, start=1)]


def refuse_repeated_ids(ids: Iterable[tuple[str, str]]) -> None:
    """Raise EvaluationError naming both places of a repeated id. `ids`: pairs (id, where)."""
    first: dict[str, str] = {}
    for sample_id, where in ids:
        if sample_id in first:
            raise EvaluationError(f"{where}: repeats the id {sample_id!r} of {first[sample_id]}")
        first[sample_id] = where


# ---- tab-separated files -----------------------------------------------------------------------


def read_tab_separated(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    """The rows of a TSV file with a header and csv quotes. Short rows lack their last fields.

    Raises EvaluationError for a missing column, for a row with more fields than the header, and for
    a row that csv cannot read."""
    with reading_errors(path), open(path, encoding="utf-8-sig", newline="") as file:
        # strict, because an unclosed quote would otherwise swallow the following rows.
        reader = csv.reader(file, delimiter="\t", strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            check_header(header, needed, path)
            line = reader.line_num + 1
            while (cells := next_row(reader)) is not None:
                where = f"{path}, line {line}"
                line = reader.line_num + 1
                if len(cells) > len(header):
                    raise EvaluationError(
                        f"{where}: {len(cells)} fields, more than the header's {len(header)}"
                    )
                if any(cells):
                    yield Record(dict(zip(header, cells, strict=False)), where)
        except csv.Error as error:
            where = f"{path}, line {line}"
            raise EvaluationError(f"{where}: not a tab-separated row: {error}") from error


def check_header(header: Sequence[str], needed: Sequence[str], path: Path) -> None:
    """Raise EvaluationError for missing or repeated columns."""
    missing = [name for name in needed if name not in header]
    if missing:
        columns = f"column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
        raise EvaluationError(f"{path}, line 1: the tab-separated header lacks the {columns}")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise EvaluationError(f"{path}, line 1: repeated columns {', '.join(sorted(repeated))}")


def next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row with fields of any size, None at the end. Restores csv's global limit."""
    with FIELD_LIMIT:
        before = csv.field_size_limit(LARGEST_FIELD)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)
