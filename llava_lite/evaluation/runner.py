"""One evaluation: ask the missing samples, and write every answer as it arrives."""

import os
import platform
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llava_lite.evaluation.engine import Engine, Outcome, select_shard
from llava_lite.evaluation.predictions import FILE_NAME, PredictionsWriter
from llava_lite.evaluation.suite import Sample
from llava_lite.fast.device import machine
from llava_lite.generation.batch_file import answer_fields, error_fields
from llava_lite.saving import JsonObject


@dataclass(frozen=True)
class Selection:
    """The samples of a suite that a run asks.

    The first `limit` samples (None: all). Of these, for `shard` = (i, n), every n-th group about
    the same images, from the i-th on."""

    limit: int | None = None
    shard: tuple[int, int] = (1, 1)

    def of(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, in the order of the suite."""
        return select_shard(samples[: self.limit], self.shard)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Selection":
        """The inverse of `asdict`, after a way through JSON."""
        part, total = fields.get("shard") or (1, 1)
        return cls(fields.get("limit"), (part, total))


@dataclass(frozen=True)
class Files:
    """The folder of the predictions, and how to treat existing ones."""

    folder: Path
    reuse: bool = False
    retry_errors: bool = False
    force: bool = False


@dataclass(frozen=True)
class Asked:
    """Samples that are being answered.

    `settings`: the model's, for the header. `about`: model and machine, for the line of the run.
    `records`: the lines as they arrive, in any order."""

    settings: JsonObject
    about: JsonObject
    records: Iterator[JsonObject]


Ask = Callable[[Sequence[Sample]], AbstractContextManager[Asked]]


def run(
    samples: Sequence[Sample],
    ask: Ask,
    files: Files,
    settings: Mapping[str, Any],
    selection: Selection,
    reopen: Mapping[str, Any] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_record: Callable[[JsonObject], None] | None = None,
) -> None:
    """Answer the samples of `selection` that the predictions do not hold yet.

    `ask` answers, in this process or elsewhere. `settings` and the model's settings make the
    header. `reopen`: how to open the suite again for a report. `on_start` gets the number of
    samples and how many are done, `on_record` each line. Written lines survive any end of the run.
    Raises as `PredictionsWriter` and `ask`."""
    chosen = selection.of(samples)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with PredictionsWriter(files.folder / FILE_NAME, files.reuse, files.force) as writer:
        done = writer.before.done(files.retry_errors)
        todo = [sample for sample in chosen if sample.id not in done]
        with ask(todo) as asked:
            about = {"started": started, **asdict(selection), **asked.about}
            writer.begin({**asked.settings, **settings}, {**about, "suite": dict(reopen or {})})
            if on_start:
                on_start(len(chosen), len(chosen) - len(todo))
            start = perf_counter()
            for record in asked.records:
                line = {**record, "elapsed": round(perf_counter() - start, 3)}
                writer.append(line)
                if on_record:
                    on_record(line)


# ---- answering -----------------------------------------------------------------------------------


def ask_here(engine: Engine, settings: JsonObject) -> Ask:
    """An `Ask` for this process: the engine answers. `settings`: the model's."""

    @contextmanager
    def ask(samples: Sequence[Sample]) -> Iterator[Asked]:
        with closing(records_of(engine, samples)) as records:
            yield Asked(settings, about(engine), records)

    return ask


def about(engine: Engine) -> JsonObject:
    """Facts about a run that do not change an answer."""
    return {
        "batch_size": engine.batch_size,
        "workers": engine.workers,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine(str(engine.model.llava.device), torch.get_num_threads()),
    }


def records_of(engine: Engine, samples: Sequence[Sample]) -> Generator[JsonObject, None, None]:
    """Yield the line of each sample as it is done. `run` adds the time."""
    for outcome in engine.answer(samples):
        yield record_of(outcome, peak_bytes(engine.model.llava.device))


def record_of(outcome: Outcome, peak: int | None) -> JsonObject:
    """The line of one sample. `peak`: peak memory in bytes where it was answered."""
    about = {
        "seconds": {phase: round(time, 6) for phase, time in outcome.seconds.items()},
        "peak_bytes": peak,
    }
    answer = outcome.answer
    fields = error_fields(outcome.error) if answer is None else answer_fields(answer)
    return {"id": outcome.sample.id, **fields, **about}


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory in bytes: torch's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
