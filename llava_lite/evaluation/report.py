"""The report of an evaluation: scores, settings, speed, tokens, memory, failures.

`report` makes plain types for JSON from a suite and predictions. `table` makes text,
page.py a page.
Two runs with the same settings differ only in "measured" and "runs".
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.engine import PHASES, image_groups
from llava_lite.evaluation.fingerprint import file_hash
from llava_lite.evaluation.predictions import Predictions, differences
from llava_lite.evaluation.runner import Selection
from llava_lite.evaluation.suite import Metric, Sample, Suite
from llava_lite.saving import JsonObject
from llava_lite.tables import table_row

JSON_NAME, PAGE_NAME = "report.json", "report.html"
USAGE = {
    "prompt_tokens": "text tokens of the prompt",
    "image_patches": "image patches",
    "image_tokens": "image tokens after merging",
    "kept_image_tokens": "image tokens after pruning",
    "completion_tokens": "tokens of the answer",
}
EXAMPLES = 5  # ids named for each reason of a failure
REASONS = 10  # reasons that are listed; all others are counted together
COLUMNS = "<32 >9 >20 >8"
NOT_ASKED = "not asked yet"
OTHER_REASONS = "other reasons"


@dataclass(frozen=True)
class Evaluation:
    """Predictions of one suite, from one file or from several shards.

    `samples`: the samples that any run was to ask. All answers and the times of all runs count."""

    suite: Suite
    samples: Sequence[Sample]
    settings: Mapping[str, Any]
    runs: Sequence[JsonObject]
    records: Mapping[str, JsonObject]

    @classmethod
    def of(cls, suite: Suite, parts: Sequence[tuple[str, Predictions]]) -> "Evaluation":
        """From named predictions. Raises EvaluationError if their settings differ, or if the files
        of the suite have changed."""
        first_name, first = parts[0]
        for name, part in parts[1:]:
            different = differences(first.settings, part.settings)
            if different:
                raise EvaluationError(
                    f"{name}: was answered with other settings than {first_name}: "
                    f"{'; '.join(different)}"
                )
        refuse_other_files(suite, first.settings)
        samples = suite.samples()
        selections = [Selection.read(run) for _, part in parts for run in part.runs]
        asked = {sample.id for one in selections for sample in one.of(samples)}
        return cls(
            suite,
            [sample for sample in samples if sample.id in asked],
            first.settings,
            [run for _, part in parts for run in part.runs],
            merge_records([part.records for _, part in parts]),
        )

    @property
    def asked_records(self) -> list[JsonObject]:
        """The lines of the samples, in the samples' order. Samples without a line are left out."""
        return [self.records[s.id] for s in self.samples if s.id in self.records]

    @property
    def answers(self) -> dict[str, str]:
        """Answers by sample id."""
        return {
            record["id"]: record["answer"] for record in self.asked_records if "answer" in record
        }

    @property
    def part(self) -> Suite:
        """The suite reduced to the samples that were to be asked."""
        if len(self.samples) == len(self.suite.samples()):
            return self.suite
        return self.suite.select({sample.id for sample in self.samples})


def refuse_other_files(suite: Suite, settings: Mapping[str, Any]) -> None:
    """Raise EvaluationError if a file's content or the order of the files has changed.

    The samples follow the order of the files."""
    if suite.name != settings.get("suite"):
        raise EvaluationError(f"the predictions are of {settings.get('suite')}, not {suite.name}")
    known = settings.get("files", [])
    if len(known) != len(suite.files):
        names = ", ".join(entry["name"] for entry in known)
        raise EvaluationError(
            f"the questions were asked from {names}, got {len(suite.files)} files"
        )
    for path, before in zip(suite.files, known, strict=True):
        if file_hash(path) != before["sha256"]:
            name = before["name"]
            raise EvaluationError(
                f"{path} differs from the file that the questions were asked from, {name}"
            )


def merge_records(parts: Sequence[Mapping[str, JsonObject]]) -> dict[str, JsonObject]:
    """All lines by sample id. An answer replaces an error of another part."""
    records: dict[str, JsonObject] = {}
    for part in parts:
        for name, record in part.items():
            if "answer" in record or name not in records:
                records[name] = record
    return records


def report(evaluation: Evaluation) -> dict[str, Any]:
    """The report as plain types for JSON."""
    part, records = evaluation.part, evaluation.asked_records
    scores = part.score(evaluation.answers)
    answered = sum("answer" in record for record in records)
    return {
        "suite": evaluation.suite.name,
        "scores": {name: metric_dict(metric) for name, metric in scores.metrics.items()},
        "groups": {
            kind: {group: metric_dict(metric) for group, metric in groups.items()}
            for kind, groups in scores.groups.items()
        },
        "samples": {
            "total": len(evaluation.suite.samples()),
            "asked": len(evaluation.samples),
            "answered": answered,
            "failed": len(evaluation.samples) - answered,
            "cut_off": sum(record["finish_reason"] == "length" for record in records),
        },
        "failures": failures(evaluation),
        "settings": {**evaluation.settings, "suite_settings": dict(part.settings)},
        "tokens": tokens(records),
        "measured": measured(evaluation),
        "runs": [dict(run) for run in evaluation.runs],
    }


def metric_dict(metric: Metric) -> dict[str, Any]:
    """A metric as plain types. NaN becomes null, because JSON has no NaN."""
    interval = metric.interval
    return {
        "value": None if math.isnan(metric.value) else metric.value,
        "count": metric.count,
        "interval": None if interval is None or math.isnan(interval[0]) else list(interval),
    }


def failures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Reasons why samples have no answer, most frequent first, with a few ids each.

    Errors name files, so there may be many reasons: the rarest are counted together."""
    ids: dict[str, list[str]] = {}
    for sample in evaluation.samples:
        record = evaluation.records.get(sample.id, {"error": NOT_ASKED})
        if "error" in record:
            ids.setdefault(record["error"], []).append(sample.id)
    ordered = sorted(ids.items(), key=lambda item: -len(item[1]))
    if len(ordered) > REASONS:
        others = [name for _, found in ordered[REASONS - 1 :] for name in found]
        ordered = [*ordered[: REASONS - 1], (OTHER_REASONS, others)]
    return [
        {"reason": reason, "count": len(found), "ids": found[:EXAMPLES]}
        for reason, found in ordered
    ]


def tokens(records: Sequence[JsonObject]) -> dict[str, float]:
    """Mean number of tokens per answered question, by stage."""
    usages = [record["usage"] for record in records if "answer" in record]
    total: Counter[str] = Counter()
    for usage in usages:
        total.update({name: usage.get(name, 0) for name in USAGE})
    return {name: total[name] / len(usages) for name in USAGE} if usages else {}


def measured(evaluation: Evaluation) -> dict[str, Any]:
    """Seconds, rates and memory of all runs together.

    A run ends with its last line. The times of parallel shards are added."""
    records = evaluation.asked_records
    wall = sum(run.get("seconds", 0.0) for run in evaluation.runs)
    done = {record["id"] for record in records}
    groups = image_groups(sample for sample in evaluation.samples if sample.id in done)
    images = sum(len(group.images) for group in groups)
    peaks = [run["peak_bytes"] for run in evaluation.runs if run.get("peak_bytes")]
    phases = {
        phase: sum(record["seconds"].get(phase, 0.0) for record in records) for phase in PHASES
    }
    return {
        "wall_seconds": wall,
        "images": images,
        "images_per_second": images / wall if wall else None,
        "questions_per_second": len(records) / wall if wall else None,
        "seconds_per_image": {
            phase: seconds / images if images else None for phase, seconds in phases.items()
        },
        "peak_memory_bytes": max(peaks, default=None),
    }


def table(content: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table: scores, groups, then time and memory."""
    samples = content["samples"]
    yield headline(content)
    if samples["asked"] < samples["total"]:
        yield f"warning: {part_text(samples)}"
    yield ""
    yield table_row(COLUMNS, "score", "value", "95 % interval", "of")
    for name, metric in content["scores"].items():
        yield metric_row(name, metric)
    for kind, groups in content["groups"].items():
        yield ""
        yield kind
        for group, metric in groups.items():
            yield metric_row(f"  {group}", metric)
    yield ""
    yield f"{samples['answered']} answered, {samples['failed']} failed"
    for failure in content["failures"][:3]:
        yield f"  {failure['count']} x {failure['reason']} (first: {failure['ids'][0]})"
    yield from speed_lines(content)


def part_text(samples: Mapping[str, int]) -> str:
    """The warning of a report about a part of the data set."""
    asked, total = samples["asked"], samples["total"]
    return f"only {asked:,} of {total:,} samples of the data set: no score of the whole"


def headline(content: Mapping[str, Any]) -> str:
    """The most important settings in one line."""
    settings = content["settings"]
    shown = ("model", "dtype", "reduction", "template", "max_new_tokens")
    words = [f"{name} {settings.get(name)}" for name in shown]
    return ", ".join([f"{content['suite']}: {words[0]}", *words[1:]])


def metric_row(name: str, metric: Mapping[str, Any]) -> str:
    """One metric as a row of the table."""
    return table_row(COLUMNS, name, value_text(metric), interval_text(metric), str(metric["count"]))


def value_text(metric: Mapping[str, Any]) -> str:
    """A share with an interval in percent; any other number unchanged."""
    if metric["value"] is None:
        return "-"
    return f"{metric['value']:.3f}" if metric["interval"] is None else f"{metric['value']:.1%}"


def interval_text(metric: Mapping[str, Any]) -> str:
    """A metric's interval; "" without one."""
    return "" if metric["interval"] is None else "{:.1%} to {:.1%}".format(*metric["interval"])


def speed_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Rates, seconds per image and phase, tokens per stage, memory."""
    measured, used = content["measured"], content["tokens"]
    if measured["questions_per_second"] is not None:
        yield (
            f"{measured['questions_per_second']:.2f} questions/s, "
            f"{measured['images_per_second']:.2f} images/s over {measured['wall_seconds']:.0f} s"
        )
    if measured["images"]:
        times = measured["seconds_per_image"].items()
        yield "seconds an image: " + ", ".join(f"{phase} {time:.3f}" for phase, time in times)
    if used:
        yield "tokens a question: " + ", ".join(
            f"{used[name]:.0f} {words}" for name, words in USAGE.items()
        )
    if measured["peak_memory_bytes"]:
        yield f"peak memory {measured['peak_memory_bytes'] / 1e9:.2f} GB"
