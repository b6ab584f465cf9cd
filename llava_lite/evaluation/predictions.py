"""The predictions file: one JSON line per sample, in a file that only grows.

    {"predictions": 1, "settings": {...}}      all settings that change an answer
    {"run": {...}}                             one per process: when, where, which samples
    {"id": ..., "answer" | "error": ..., "finish_reason", "usage", "seconds", "elapsed", ...}

Of several lines with one id the last counts. Every line is written as soon as its sample is done.
A killed process leaves at most one incomplete line, which the next run cuts off. Lines are synced
to the disk (fsync) every five seconds and at the end: after a power failure the samples of the last
seconds are asked again.

A run holds a lock on the file. The system releases the lock when the process ends.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from llava_lite.errors import LlavaLiteError
from llava_lite.saving import JsonObject, lines_of, lock, parse_object

FILE_NAME = "predictions.jsonl"
FORMAT = 1
HEADER_START = b'{"predictions": '
SYNC_SECONDS = 5.0


class PredictionsError(LlavaLiteError):
    """A predictions file cannot be used. Names the file, and the line or the settings."""


@dataclass(frozen=True)
class Predictions:
    """The content of a file: settings, runs, and the last line of each sample.

    `size`: bytes of all complete lines."""

    settings: JsonObject
    runs: list[JsonObject] = field(default_factory=list)
    records: dict[str, JsonObject] = field(default_factory=dict)
    size: int = 0

    @property
    def answers(self) -> dict[str, str]:
        """Answers by sample id, without failed samples."""
        return {
            name: record["answer"] for name, record in self.records.items() if "answer" in record
        }

    def done(self, retry_errors: bool = False) -> set[str]:
        """Ids that need not be asked again."""
        return set(self.answers if retry_errors else self.records)


# ---- reading -------------------------------------------------------------------------------------


def read_predictions(path: Path) -> Predictions:
    """Read all complete lines of a file. Raises PredictionsError naming a bad line."""
    try:
        with open(path, "rb") as file:
            found = parse(file, path)
    except OSError as error:
        raise PredictionsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found is None:
        raise PredictionsError(f"{path}: holds no predictions")
    return found


def parse(file: BinaryIO, path: Path) -> Predictions | None:
    """The file's content; None if its first line is incomplete. Raises PredictionsError."""
    found: Predictions | None = None
    size = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            refuse_foreign_end(line, number, path)
            break
        record = parse_object(line, f"{path}, line {number}", PredictionsError)
        size += len(line)
        if found is None:
            found = Predictions(read_header(record, path))
        elif isinstance(record.get("run"), dict):
            found.runs.append({**record["run"], "samples": 0})
        else:
            add_sample(found, record, number, path)
    if found is None:
        return None
    return Predictions(found.settings, found.runs, found.records, size)


def read_header(record: JsonObject, path: Path) -> JsonObject:
    """The settings of a header. Raises PredictionsError for no header or another format."""
    settings = record.get("settings")
    if "predictions" not in record or not isinstance(settings, dict):
        raise PredictionsError(f"{path}, line 1: is not the header of a predictions file")
    if record["predictions"] != FORMAT:
        raise PredictionsError(
            f"{path}: is written in format {record['predictions']!r}, this version reads {FORMAT}"
        )
    return settings


def add_sample(found: Predictions, record: JsonObject, number: int, path: Path) -> None:
    """Add a sample's line, and its time to the run. Raises PredictionsError."""
    is_sample = isinstance(record.get("id"), str) and ("answer" in record) != ("error" in record)
    if not is_sample:
        raise PredictionsError(f"{path}, line {number}: is no line of a predictions file")
    found.records[record["id"]] = record
    if found.runs:
        run = found.runs[-1]
        run["samples"] += 1
        run["seconds"] = record.get("elapsed", 0.0)
        peaks = (run.get("peak_bytes"), record.get("peak_bytes"))  # of several actors the highest
        run["peak_bytes"] = max((peak for peak in peaks if peak), default=None)


def refuse_foreign_end(line: bytes, number: int, path: Path) -> None:
    """Raise PredictionsError if the incomplete last line is not from a killed run. Cutting it off
    would lose foreign data."""
    starts = (HEADER_START,) if number == 1 else (b'{"id": ', b'{"run": ')
    if not any(line[: len(start)] == start[: len(line)] for start in starts):
        if line.strip(b"\0"):  # a disk without power may leave zeros where a line should be
            raise PredictionsError(f"{path}, line {number}: is no line of a predictions file")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each setting that differs."""
    names = dict.fromkeys((*before, *now))
    return [
        f"{name} {show_setting(before.get(name))}, now {show_setting(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def show_setting(value: Any) -> str:
    """The text of a setting for an error message, shortened."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


# ---- writing -------------------------------------------------------------------------------------


class PredictionsWriter:
    """Appends to a predictions file: call `begin`, then `append` for each sample.

    `reuse` resumes a file, `force` overwrites one; without either a file with content is refused.
    `before`: the content that stays in the file. The file changes only in `begin`. Raises
    PredictionsError, also if another process writes to the file, and OSError."""

    def __init__(self, path: Path, reuse: bool = False, force: bool = False) -> None:
        self.path, self.synced = path, monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        try:
            self.before = lock_and_read(self.file, path, reuse, force)
        except BaseException:
            self.file.close()
            raise

    def begin(self, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Cut off an incomplete line (with `force` everything), and write the lines before the
        samples. Raises PredictionsError if the file has other settings."""
        plain = json.loads(json.dumps(settings))  # as it will be read from the file
        starts = {"run": dict(run)}
        if not self.before.size:
            self.file.truncate(0)
            self.write({"predictions": FORMAT, "settings": plain}, starts)
            return
        refuse_other_settings(self.before.settings, plain, self.path)
        self.file.truncate(self.before.size)
        self.write(starts)

    def append(self, record: JsonObject) -> None:
        """Write one sample's line. Raises OSError."""
        self.write(record)
        if monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def write(self, *records: JsonObject) -> None:
        """Write complete lines in one piece and flush them to the system."""
        self.file.write(lines_of(*records))
        self.file.flush()

    def sync(self) -> None:
        """Force all written lines to the disk."""
        os.fsync(self.file.fileno())
        self.synced = monotonic()

    def __enter__(self) -> "PredictionsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.sync()
        finally:
            self.file.close()


def check(path: Path, reuse: bool, force: bool, settings: Mapping[str, Any]) -> None:
    """Raise PredictionsError for a file that `PredictionsWriter` would refuse.

    Checks these settings only and changes nothing. Call it before a model is loaded."""
    if not path.exists():
        return
    try:
        with open(path, "r+b") as file:  # over NFS only a file to write to can be locked
            before = lock_and_read(file, path, reuse, force)
    except OSError as error:
        raise PredictionsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if before.size:
        known = {name: before.settings.get(name) for name in settings}
        refuse_other_settings(known, json.loads(json.dumps(settings)), path)


def lock_and_read(file: BinaryIO, path: Path, reuse: bool, force: bool) -> Predictions:
    """Lock the file and read the content that stays. Raises PredictionsError."""
    lock(file, path, PredictionsError)
    if force:
        return Predictions({})
    file.seek(0)
    if not reuse and file.read(1):
        raise PredictionsError(
            f"{path} already exists (use --reuse to resume, --force to overwrite, or another "
            "folder)"
        )
    file.seek(0)
    return parse(file, path) or Predictions({})


def refuse_other_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise PredictionsError naming the settings that differ."""
    different = differences(before, now)
    if different:
        raise PredictionsError(f"{path}: was answered with other settings: {'; '.join(different)}")
