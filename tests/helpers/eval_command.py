"""`llava-lite eval` run by tests, and every number of its report that no data set has its own of,
worked out again from the predictions file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from llava_lite.cli import console
from llava_lite.cli import program as cli

NEW_TOKENS = 8
PHASES = ("preprocess", "vision", "prefill", "decode")
COUNTED = (
    *("prompt_tokens", "image_patches", "image_tokens", "kept_image_tokens", "completion_tokens"),
)
BROKEN = b"\xff\xd8\xff\xe0 begins like a JPEG file and goes on as none, whatever comes after"

Share = tuple[float, int]  # right answers, questions


# ---- commands and what they write ----------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One evaluation as it is typed, and the files that it writes."""

    words: tuple[str, ...]
    folder: Path

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.jsonl"

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.predictions.read_bytes().splitlines()]

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The line of each sample; none has two."""
        found = [line for line in self.lines if "id" in line]
        records = {line["id"]: line for line in found}
        assert len(records) == len(found)
        return records

    @property
    def answers(self) -> dict[str, str]:
        return {name: line["answer"] for name, line in self.records.items() if "answer" in line}

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return content

    def run(self, *more: str) -> dict[str, Any]:
        """Run it in this process. Its exit code says whether a sample failed."""
        code = cli.main([*self.words, *more])
        assert code == (console.FAILED if self.report["samples"]["failed"] else console.OK)
        return self.report

    def run_with_answers(self, answers: Mapping[str, str]) -> dict[str, Any]:
        """Go on with these answers in place of the model's: nothing is left to ask."""
        assert set(answers) == set(self.answers)
        lines = self.lines
        for line in lines:
            if "answer" in line:
                line["answer"] = answers[line["id"]]
        self.predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = self.run("--reuse")
        assert self.answers == answers
        assert report["runs"][-1]["samples"] == 0
        assert len(self.lines) == len(lines) + 1
        return report


def command(folder: Path, model: Path, *words: object) -> Command:
    options = ("-m", model, "--threads", 1, "-n", NEW_TOKENS, "--quiet")
    return Command(("eval", *map(str, (*words, "-o", folder, *options))), folder)


# ---- numbers of every report ---------------------------------------------------------------------


def check_share(metric: Mapping[str, Any], share: Share) -> None:
    """An accuracy, its count, and its interval: the shares p which the normal approximation at p
    does not tell from what was found, (found - p)^2 = z^2 p (1 - p) / count."""
    right, count = share
    assert metric["count"] == count
    assert metric["value"] == pytest.approx(right / count, abs=1e-12)
    z_squared = 1.959963984540054**2
    found = right / count
    a, b, c = count + z_squared, -(2 * count * found + z_squared), count * found**2
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    expected = [(-b - root) / (2 * a), (-b + root) / (2 * a)]
    assert metric["interval"] == pytest.approx(expected, abs=1e-9)


def check_shares(metrics: Mapping[str, Any], shares: Mapping[str, Share]) -> None:
    assert list(metrics) == list(shares)
    for name, share in shares.items():
        check_share(metrics[name], share)


def check_groups(groups: Mapping[str, Any], shares: Mapping[str, Mapping[str, Share]]) -> None:
    assert set(groups) == set(shares)
    for name, of_groups in shares.items():
        check_shares(groups[name], dict(sorted(of_groups.items())))


def check_rest(
    command: Command, files: Sequence[Path], total: int, failed: Sequence[str], images: int
) -> None:
    """All other numbers of the report, from the predictions file and the data set's files."""
    report, lines, records = command.report, command.lines, command.records
    assert len(records) == total
    answered = [line for line in records.values() if "answer" in line]
    assert sorted(name for name in records if name not in command.answers) == sorted(failed)
    cut_off = [line for line in answered if line["finish_reason"] == "length"]
    assert cut_off and {line["usage"]["completion_tokens"] for line in cut_off} == {NEW_TOKENS}
    assert report["samples"] == {
        "total": total,
        "asked": total,
        "answered": total - len(failed),
        "failed": len(failed),
        "cut_off": len(cut_off),
    }
    reasons = {records[name]["error"] for name in failed}
    assert {failure["reason"] for failure in report["failures"]} == reasons
    assert sum(failure["count"] for failure in report["failures"]) == len(failed)
    named = [name for failure in report["failures"] for name in failure["ids"]]
    assert sorted(named) == sorted(failed)
    assert report["tokens"] == {
        name: sum(line["usage"][name] for line in answered) / len(answered) for name in COUNTED
    }
    check_measured(report, lines, images)
    check_settings(report, lines[0]["settings"], files)


def check_measured(report: Mapping[str, Any], lines: Sequence[dict[str, Any]], images: int) -> None:
    runs: list[list[dict[str, Any]]] = []
    for line in lines[1:]:
        if "run" in line:
            runs.append([])
        else:
            runs[-1].append(line)
    assert [run["samples"] for run in report["runs"]] == [len(run) for run in runs]
    ends = [run[-1]["elapsed"] for run in runs if run]
    assert [run["seconds"] for run in report["runs"] if run["samples"]] == ends
    of_samples = [line for run in runs for line in run]
    measured, wall = report["measured"], sum(ends)
    assert measured["wall_seconds"] == wall > 0
    assert measured["images"] == images
    assert measured["images_per_second"] == images / wall
    assert measured["questions_per_second"] == len(of_samples) / wall
    for phase in PHASES:
        seconds = math.fsum(line["seconds"].get(phase, 0.0) for line in of_samples)
        assert measured["seconds_per_image"][phase] == pytest.approx(seconds / images, abs=1e-12)
    assert measured["peak_memory_bytes"] == max(line["peak_bytes"] for line in of_samples)


def check_settings(
    report: Mapping[str, Any], settings: Mapping[str, Any], files: Sequence[Path]
) -> None:
    assert report["settings"] == settings
    assert settings["files"] == [
        {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()} for path in files
    ]
    names = ("suite", "model", "dtype", "template", "pad", "reduction", "max_new_tokens")
    expected = [report["suite"], "random", "float32", "vicuna_v1", True, "none", NEW_TOKENS]
    assert [settings[name] for name in names] == expected
    assert settings["temperature"] == 0.0


# ---- pictures and files --------------------------------------------------------------------------


def draw(path: Path, number: int) -> Path:
    """A small picture, another one for each number; a broken one for a negative number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if number < 0:
        path.write_bytes(BROKEN)
        return path
    image = Image.new("RGB", (40 + number % 7, 30 + number % 5), (number * 37 % 256, 90, 120))
    corner = (number % 11, number % 13, 20 + number % 17, 20 + number % 9)
    ImageDraw.Draw(image).ellipse(corner, fill=(250, number * 53 % 256, 30))
    image.save(path)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, *lines: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
