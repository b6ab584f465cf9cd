"""The one thread that runs the model, with continuous batching.

Between two steps, finished and cancelled jobs leave the batch and waiting jobs join. An error of
one job does not affect the others.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Request, Row
from llava_lite.server.image_cache import ImageCache

LOG = logging.getLogger("llava_lite.server")

# The events of a job: pieces of text, then the answer or an error.
Event: TypeAlias = str | Answer | BaseException


class Stopped(Exception):
    """The worker ended before the job."""


def ignore(event: Event) -> None:
    """Ignore an event."""


@dataclass(eq=False)
class Job:
    """One request for the worker.

    `deliver` is called on the worker's thread: with pieces if wanted, and with an `Answer` or an
    exception at the end. `Worker.cancel` ends the job within a step."""

    request: Request
    options: GenerationOptions
    wants_pieces: bool = False
    deliver: Callable[[Event], None] = ignore
    cancelled: bool = False


@dataclass(eq=False)
class Member:
    """A job in the batch with its row."""

    job: Job
    row: Row


class Worker:
    """Runs jobs in order, at most `max_batch_size` at once. Keeps `image_cache` encoded images."""

    def __init__(self, model: Model, max_batch_size: int, image_cache: int = 0) -> None:
        self.model, self.max_batch_size = model, max_batch_size
        self.images = ImageCache(image_cache)
        self.condition = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.num_running = 0
        self.stopping = False
        self.thread = threading.Thread(target=self.run, name="llava-lite-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self, seconds: float | None = None) -> bool:
        """End after the current step; unfinished jobs get `Stopped`. Waits at most `seconds`;
        returns whether the thread has ended."""
        with self.condition:
            self.stopping = True
            self.condition.notify()
        if self.thread.ident is not None:
            self.thread.join(seconds)
        return not self.thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not started."""
        return len(self.waiting)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Stopped."""
        with self.condition:
            if self.stopping:
                raise Stopped
            self.waiting.append(job)
            self.condition.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job: it leaves the queue now, or the batch after the current step."""
        with self.condition:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    # ---- on the thread ----

    def run(self) -> None:
        """The loop, until `stop`."""
        batch: list[Member] = []
        while not self.stopping:
            joining = self.next_jobs(self.max_batch_size - len(batch), wait=not batch)
            self.num_running = len(batch) + len(joining)
            batch += self.begin(joining)
            batch = self.advance(batch)
            self.num_running = len(batch)
        with self.condition:
            left = [member.job for member in batch] + list(self.waiting)
            self.waiting.clear()
        for job in left:
            tell(job, Stopped())
        self.num_running = 0

    def next_jobs(self, count: int, wait: bool) -> list[Job]:
        """Take up to `count` waiting jobs. `wait`: block until there is one, or until `stop`."""
        with self.condition:
            while wait and not self.waiting and not self.stopping:
                self.condition.wait()
            taken: list[Job] = []
            while self.waiting and len(taken) < count:
                job = self.waiting.popleft()
                if not job.cancelled:
                    taken.append(job)
            return taken

    def begin(self, jobs: Sequence[Job]) -> list[Member]:
        """Encode the images of jobs together, or one by one if that fails."""
        if not jobs:
            return []
        try:
            rows = self.images.start(
                self.model, [job.request for job in jobs], [job.options for job in jobs]
            )
            return [Member(job, row) for job, row in zip(jobs, rows, strict=True)]
        except Exception as error:
            if len(jobs) == 1:
                tell(jobs[0], error)
                return []
        return [member for job in jobs for member in self.begin([job])]

    def advance(self, batch: Sequence[Member]) -> list[Member]:
        """One token for each member that is not cancelled. Returns the unfinished members."""
        present = [member for member in batch if not member.job.cancelled]
        return [
            member
            for member in self.step(present)
            if self.report(member) and not member.job.cancelled
        ]

    def step(self, members: Sequence[Member]) -> list[Member]:
        """Step members together, or one by one if that fails. Returns the successful members."""
        if not members:
            return []
        steps = [member.row.steps for member in members]
        generators = [member.row.generator for member in members]
        random_states = [g.get_state() if g is not None else None for g in generators]
        try:
            self.model.step([member.row for member in members])
            return list(members)
        except Exception as error:
            if len(members) == 1:
                tell(members[0].job, error)
                return []
        made: list[Member] = []
        for member, before, random_state in zip(members, steps, random_states, strict=True):
            if member.row.steps > before:
                made.append(member)
                continue
            # A failed step leaves the state of a row unchanged, so the step can be repeated. Only
            # the random numbers may have advanced.
            if member.row.generator is not None and random_state is not None:
                member.row.generator.set_state(random_state)
            made += self.step([member])
        return made

    def report(self, member: Member) -> bool:
        """Deliver the result of a step. Returns whether the job goes on."""
        job, row = member.job, member.row
        try:
            if job.wants_pieces and row.piece:
                tell(job, row.piece)
            if row.finish_reason is None:
                return True
            tell(job, row.answer())
        except Exception as error:
            tell(job, error)
        return False


def tell(job: Job, event: Event) -> None:
    """Deliver an event. A job that cannot be reached is cancelled."""
    try:
        job.deliver(event)
    except Exception as error:
        job.cancelled = True
        LOG.debug("an event could not be delivered: %s", error)
