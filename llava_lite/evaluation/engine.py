"""From samples to answers, fast: in batches, and every image is encoded once.

    workers   open, pad and resize a bounded number of images ahead of time
    Feed      encodes several images at a time, prefills the shared beginning of prompts about one
              image, and hands out requests when the model has room
    Engine    runs the requests, and yields an outcome for every sample as it is done

Answers equal those of `Model.generate` for each sample alone. Samples with the same images follow
each other, so an image is encoded once and kept no longer than needed. Long prompts come first:
a lack of memory shows at once, and the last batch is short. A sample that fails does not affect
other samples; if a batch fails, its halves are tried. A failed accelerator ends the run, because
every later sample would fail, too.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, TypeVar

import torch

from llava_lite.evaluation.shared_prefix import after_shared_prefixes
from llava_lite.evaluation.suite import Sample
from llava_lite.fast.device import synchronize
from llava_lite.generation import batch_file
from llava_lite.generation.answer import Answer
from llava_lite.generation.failures import ROW_ERRORS, is_accelerator_failure
from llava_lite.generation.loop import check_batch_size
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Request, Row
from llava_lite.inputs.pixels import load_square
from llava_lite.llava import EncodedImage

DEFAULT_WORKERS = 2
LOOK_AHEAD = 2  # batches of images that are opened before they are needed
# The fast kernel of causal attention cannot use a cache. So a cached prefix that is a smaller share
# of the prompt than this is computed again instead.
LEAST_PREFIX = 0.125
PHASES = ("preprocess", "vision", "prefill", "decode")

AnyImage = Any  # whatever `load_image` takes, or an EncodedImage
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """The answer to a sample, or the error that prevented it.

    `seconds`: the sample's share of each phase. The shares of all samples add up to the phase."""

    sample: Sample
    answer: Answer | None = None
    error: Exception | str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Samples about the same images."""

    samples: tuple[Sample, ...]

    @property
    def images(self) -> tuple[AnyImage, ...]:
        """The images of each sample of the group."""
        return self.samples[0].images

    @property
    def size(self) -> tuple[int, int]:
        """Sort key: puts prompts of similar length next to each other."""
        return len(self.images), max(
            len(sample.prompt.encode(errors="replace")) for sample in self.samples
        )


@dataclass(frozen=True)
class Prepared:
    """A group with its images opened as squares, or the error of one image."""

    group: Group
    images: tuple[AnyImage, ...] = ()
    error: Exception | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A sample with its checked request, and the seconds spent on it so far."""

    sample: Sample
    request: Request
    seconds: dict[str, float]


# ---- order ---------------------------------------------------------------------------------------


def image_groups(samples: Iterable[Sample]) -> list[Group]:
    """Groups of samples with the same images, in order of first appearance."""
    groups: dict[Any, list[Sample]] = {}
    for position, sample in enumerate(samples):
        alone = sample.image_key is None or not sample.images
        groups.setdefault(position if alone else sample.image_key, []).append(sample)
    return [Group(tuple(members)) for members in groups.values()]


def longest_first(samples: Iterable[Sample]) -> list[Group]:
    """Groups of samples about the same images, long prompts first."""
    return sorted(image_groups(samples), key=lambda group: group.size, reverse=True)


def select_shard(samples: Sequence[Sample], shard: tuple[int, int]) -> list[Sample]:
    """For shard = (i, n): every n-th group of samples about the same images, from the i-th on.

    The samples stay in order. All n shards together hold every sample once. Raises ValueError for
    a shard out of range."""
    chosen = batch_file.select_shard(image_groups(samples), shard)
    ids = {sample.id for group in chosen for sample in group.samples}
    return [sample for sample in samples if sample.id in ids]


# ---- images --------------------------------------------------------------------------------------


def prepare(model: Model, image_size: int | None, group: Group) -> Prepared:
    """Open the images of a group as squares. Uses no torch: torch in another thread would start a
    second set of CPU threads."""
    start = perf_counter()
    try:
        images = tuple(square(model, image, image_size) for image in group.images)
    except ROW_ERRORS as error:
        return Prepared(group, error=strip_traceback(error), seconds=perf_counter() - start)
    return Prepared(group, images, seconds=perf_counter() - start)


def square(model: Model, image: AnyImage, image_size: int | None) -> AnyImage:
    """The square image that the model's preprocessing starts from. A function is called first."""
    image = image() if callable(image) else image
    if isinstance(image, EncodedImage):
        return image
    return load_square(image, model.config.at(image_size), model.exif)


def prepare_ahead(
    groups: Iterable[Group], work: Callable[[Group], Prepared], workers: int, ahead: int
) -> Iterator[Prepared]:
    """Yield every group's result in order. Threads run at most `ahead` images in advance; without
    workers each result is computed when it is needed."""
    if not workers:
        yield from map(work, groups)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    waiting: deque[tuple[int, Future[Prepared]]] = deque()
    try:
        for group in groups:
            waiting.append((max(1, len(group.images)), pool.submit(work, group)))
            while sum(images for images, _ in waiting) > ahead:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---- engine --------------------------------------------------------------------------------------


class Engine:
    """Answers samples with one model and one set of options.

    `batch_size`: questions, and images in the tower, at once (None: 8). `workers`: threads that
    open images (0: none). `reuse_prefix`: prefill the shared beginning of questions about one image
    once. Raises ValueError for options that the model does not allow."""

    def __init__(
        self,
        model: Model,
        options: GenerationOptions,
        batch_size: int | None = None,
        workers: int = DEFAULT_WORKERS,
        reuse_prefix: bool = True,
    ) -> None:
        self.model, self.options, self.workers = model, options, workers
        self.batch_size = check_batch_size(batch_size)
        self.reuse_prefix = reuse_prefix
        self.reduction = model.reduction_for([], options.reduction)

    def answer(self, samples: Iterable[Sample]) -> Iterator[Outcome]:
        """Yield an outcome for every sample, as each one is done."""
        askable: list[Sample] = []
        for sample in samples:
            if sample.error is None:
                askable.append(sample)
            else:
                yield Outcome(sample, error=sample.error)
        ahead = LOOK_AHEAD * self.batch_size
        opened = prepare_ahead(
            longest_first(askable),
            partial(prepare, self.model, self.reduction.image_size),
            self.workers,
            ahead,
        )
        try:
            yield from self.run(Feed(self, opened))
        finally:
            opened.close()  # type: ignore[attr-defined]  # a generator: its threads end

    def run(self, feed: "Feed") -> Iterator[Outcome]:
        """Yield the outcomes of the feed's jobs. Out of memory, batches are halved."""
        size = self.batch_size
        while not feed.ended:
            in_flight: dict[int, Job] = {}
            requests = record_jobs(feed, in_flight)
            error = yield from self.attempt(requests, in_flight, size, feed.failed)
            yield from drain(feed.failed)
            if error is None:
                continue
            if is_out_of_memory(error):
                size = max(1, size // 2)
            yield from self.in_halves(list(in_flight.values()), error)

    def attempt(
        self,
        requests: Iterable[Request],
        in_flight: dict[int, Job],
        size: int,
        failed: deque[Outcome],
    ) -> Generator[Outcome, None, Exception | None]:
        """Run requests and yield the outcomes, with those that arrive in `failed` meanwhile.

        `in_flight` holds the jobs that are not done. Returns the error that ended the run early."""
        try:
            for index, row in self.model.run(requests, self.options, size):
                if row.finish_reason is not None:
                    yield outcome_of(in_flight.pop(index), row)
                yield from drain(failed)
        except ROW_ERRORS as error:
            if not in_flight or is_accelerator_failure(error):
                raise
            return strip_traceback(error)
        return None

    def in_halves(self, jobs: Sequence[Job], error: Exception) -> Iterator[Outcome]:
        """Yield the outcomes of a batch that failed with `error`: try each half alone, and so on
        down to the failing job."""
        if len(jobs) == 1:
            yield Outcome(jobs[0].sample, error=error, seconds=jobs[0].seconds)
            return
        for half in halves(jobs):
            in_flight = dict(enumerate(half))
            requests = [job.request for job in half]
            again = yield from self.attempt(requests, in_flight, len(half), deque())
            if again is not None:
                yield from self.in_halves(list(in_flight.values()), again)


class Feed:
    """An iterator that makes jobs on demand. Samples that cannot become jobs are in `failed`.

    The iterator stops while `failed` holds outcomes, so that none of them waits for images that
    open slowly. `ended`: nothing is left."""

    def __init__(self, engine: Engine, opened: Iterator[Prepared]) -> None:
        self.engine, self.model, self.opened = engine, engine.model, opened
        self.ready: deque[Job] = deque()
        self.failed: deque[Outcome] = deque()
        self.ended = False

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Job:
        while not self.ready:
            if self.failed:
                raise StopIteration
            taken = self.take()
            if not taken:
                self.ended = True
                raise StopIteration
            groups = [self.make_jobs(prepared) for prepared in taken]
            self.encode([jobs for jobs in groups if jobs])
        return self.ready.popleft()

    def take(self) -> list[Prepared]:
        """The next groups, with as many images as the tower takes at once."""
        taken: list[Prepared] = []
        images = 0
        while images < self.engine.batch_size:
            prepared = next(self.opened, None)
            if prepared is None:
                break
            taken.append(prepared)
            images += max(1, len(prepared.images))
        return taken

    def make_jobs(self, prepared: Prepared) -> list[Job]:
        """Jobs of a group's samples that fit into the context. Their images are not encoded yet."""
        jobs = []
        samples = prepared.group.samples
        seconds = {"preprocess": prepared.seconds / len(samples)}
        for sample in samples:
            if prepared.error is not None:
                self.failed.append(Outcome(sample, error=prepared.error, seconds=seconds))
                continue
            try:
                request = self.model.request(prepared.images, sample.prompt, self.engine.options)
                jobs.append(Job(sample, request, seconds))
            except (*ROW_ERRORS, UnicodeError) as error:  # half a character cannot be a token
                self.failed.append(Outcome(sample, error=strip_traceback(error), seconds=seconds))
        return jobs

    def encode(self, groups: Sequence[Sequence[Job]]) -> None:
        """Encode the images of some groups, all together or, if that fails, in halves."""
        wanted = [
            (image, self.engine.reduction) for jobs in groups for image in jobs[0].request.images
        ]
        try:
            encoded, seconds = self.model.encode_images(wanted, self.engine.batch_size)
            # A GPU still computes after the call; that time belongs to the tower.
            seconds["vision"] += self.seconds_until_idle()
        except ROW_ERRORS as error:
            if is_accelerator_failure(error):
                raise
            failure = strip_traceback(error)
        else:
            rest = iter(encoded)
            shares = {phase: time / max(1, len(wanted)) for phase, time in seconds.items()}
            self.begin([with_images(jobs, rest, shares) for jobs in groups])
            return
        if len(groups) > 1:
            for half in halves(groups):
                self.encode(half)
            return
        [jobs] = groups
        self.failed.extend(Outcome(job.sample, error=failure, seconds=job.seconds) for job in jobs)

    def seconds_until_idle(self) -> float:
        """Wait for the GPU's queue at the end of a timed phase. Decoder steps need no such wait:
        their tokens are copied to the CPU."""
        start = perf_counter()
        synchronize(str(self.model.llava.device))
        return perf_counter() - start

    def begin(self, groups: Sequence[Sequence[Job]]) -> None:
        """Prefill the shared beginning of each group's prompts. Afterwards all jobs are ready."""
        start = perf_counter()
        requests = [[without_short_prefix(job.request) for job in jobs] for jobs in groups]
        if self.engine.reuse_prefix:
            try:
                requests = after_shared_prefixes(self.model, requests)
                self.seconds_until_idle()
            except ROW_ERRORS as error:
                if is_accelerator_failure(error):
                    raise
                # Without a shared beginning every prompt is prefilled alone: less memory at once.
        sharing = sum(len(jobs) for jobs in groups if len(jobs) > 1)
        share = (perf_counter() - start) / sharing if sharing else 0.0
        for jobs, begun in zip(groups, requests, strict=True):
            prefill = share if len(jobs) > 1 else 0.0
            for job, request in zip(jobs, begun, strict=True):
                seconds = {**job.seconds, "prefill": prefill}
                self.ready.append(replace(job, request=request, seconds=seconds))


def with_images(
    jobs: Sequence[Job], encoded: Iterator[EncodedImage], seconds: dict[str, float]
) -> list[Job]:
    """The jobs of one group with its images from `encoded`. Each image took `seconds`."""
    images = tuple(islice(encoded, len(jobs[0].request.images)))
    own = {phase: time * len(images) / len(jobs) for phase, time in seconds.items()}
    own["preprocess"] += jobs[0].seconds["preprocess"]
    return [replace(job, request=replace(job.request, images=images), seconds=own) for job in jobs]


def without_short_prefix(request: Request) -> Request:
    """The request (images encoded) without its cached prefix, if the prefix is too short."""
    image_rows = sum(len(image.image_embeds) for image in request.images)
    rows = len(request.state.pending_ids) - len(request.images) + image_rows
    return request if len(request.prefix) >= LEAST_PREFIX * rows else replace(request, prefix=())


def record_jobs(jobs: Iterable[Job], in_flight: dict[int, Job]) -> Iterator[Request]:
    """Yield the jobs' requests, and enter each job in `in_flight` under its request's number."""
    for index, job in enumerate(jobs):
        in_flight[index] = job
        yield job.request


def outcome_of(job: Job, row: Row) -> Outcome:
    """The outcome of a job with a finished row."""
    seconds = {phase: job.seconds.get(phase, 0.0) + row.shares.get(phase, 0.0) for phase in PHASES}
    return Outcome(job.sample, row.answer(), seconds=seconds)


def drain(failed: deque[Outcome]) -> Iterator[Outcome]:
    """Take all outcomes out of the queue."""
    while failed:
        yield failed.popleft()


def strip_traceback(error: Exception) -> Exception:
    """The error without its frames, which would keep images and tensors alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help. On a CPU torch raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """The first and the second half of at least two items."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
