"""One evaluation: ask the samples that are missing, and write every answer down as it comes."""

import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llava_lite.evaluation.engine import DEFAULT_WORKERS, Engine, Outcome, select_shard
from llava_lite.evaluation.predictions import FILE_NAME, PredictionsWriter, Record
from llava_lite.evaluation.suite import Sample
from llava_lite.generation import Model
from llava_lite.hardware import machine
from llava_lite.sampling import GenerationOptions


@dataclass(frozen=True)
class Selection:
    """Which samples of a suite a run asks: the first `limit` (None: all), and of these every n-th
    group about the same images from the i-th on, for `shard` = (i, n)."""

    limit: int | None = None
    shard: tuple[int, int] = (1, 1)

    def of(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, in the order of the suite."""
        return select_shard(samples[: self.limit], self.shard)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Selection":
        """What `asdict` made of one, as JSON gives it back."""
        part, total = fields.get("shard") or (1, 1)
        return cls(fields.get("limit"), (part, total))


@dataclass(frozen=True)
class Files:
    """Where predictions go, and what happens to those that are there."""

    folder: Path
    reuse: bool = False
    retry_errors: bool = False
    force: bool = False

    @property
    def predictions(self) -> Path:
        return self.folder / FILE_NAME


@dataclass(frozen=True)
class Work:
    """How the samples are asked."""

    model: Model
    options: GenerationOptions
    batch_size: int | None = None
    workers: int = DEFAULT_WORKERS


def run(
    samples: Sequence[Sample],
    work: Work,
    files: Files,
    settings: Mapping[str, Any],
    selection: Selection,
    reopen: Mapping[str, Any] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> None:
    """Ask what `selection` takes of all samples and the predictions do not hold.

    `settings` make their header; `reopen` says how the suite is opened again for a report.
    `on_start` hears how many samples there are, and how many of them are done; `on_record` of each
    line. Every line is kept whatever ends the run. Raises as `PredictionsWriter` and `Engine`."""
    engine = Engine(work.model, work.options, work.batch_size, work.workers)
    chosen = selection.of(samples)
    about = about_run(work, selection, reopen or {})
    start = perf_counter()
    with PredictionsWriter(files.predictions, settings, about, files.reuse, files.force) as writer:
        done = writer.before.done(files.retry_errors)
        todo = missing(chosen, done)
        if on_start:
            on_start(len(chosen), len(chosen) - len(todo))
        for outcome in engine.answer(todo):
            elapsed = perf_counter() - start
            record = record_of(outcome, elapsed, peak_bytes(work.model.llava.device))
            writer.append(record)
            if on_record:
                on_record(record)


def missing(samples: Sequence[Sample], done: Collection[str]) -> list[Sample]:
    """The samples that are not done, in order."""
    return [sample for sample in samples if sample.id not in done]


def about_run(work: Work, selection: Selection, reopen: Mapping[str, Any]) -> Record:
    """What does not change an answer, but is worth knowing of a run."""
    device = work.model.llava.device
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(selection),
        "batch_size": work.batch_size,
        "workers": work.workers,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine(str(device), torch.get_num_threads()),
        "suite": dict(reopen),
    }


def record_of(outcome: Outcome, elapsed: float, peak: int | None) -> Record:
    """The line of one sample. `elapsed`: seconds since its run began; `peak`: of its memory."""
    about = {
        "seconds": {phase: round(time, 6) for phase, time in outcome.seconds.items()},
        "elapsed": round(elapsed, 3),
        "peak_bytes": peak,
    }
    answer, name = outcome.answer, outcome.sample.id
    if answer is None:
        failed = {"error": reason_of(outcome.error), "finish_reason": "error", "usage": {}}
        return {"id": name, **failed, **about}
    answered = {"answer": str(answer), "finish_reason": answer.finish_reason, "usage": answer.usage}
    return {"id": name, **answered, **about}


def reason_of(error: Exception | str | None) -> str:
    """An error in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def peak_bytes(device: torch.device) -> int | None:
    """The most memory so far: of a GPU what torch took there, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
