"""From samples to answers, fast: in batches, every image looked at once.

    workers   open, pad and resize the images ahead of time, a bounded number of them
    Feed      encodes them several at a time, runs what prompts about one image share, and hands
              out requests when the model has room
    Engine    runs the requests, and yields an outcome for every sample as it is done

Answers are those of `Model.generate` for every sample by itself. Samples with the same images come
one after the other, so none is encoded twice and none is kept longer than needed. Long prompts come
first: if memory is short that shows at once, and the last batch is no straggler. A sample that
cannot be asked or answered costs no other one; where a batch fails, its halves are tried. An
accelerator that fails ends the run: every sample after it would fail, too.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import Any, TypeVar

import torch

from llava_lite.evaluation.shared_prefix import after_shared_prefixes
from llava_lite.evaluation.suite import Sample
from llava_lite.fast.device import synchronize
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
# A cached beginning costs its prompt the fast kernel of causal attention, which knows no cache. So
# one that is less than this share of the prompt is run again with it: a sixth less prefill.
LEAST_PREFIX = 0.125
PHASES = ("preprocess", "vision", "prefill", "decode")

AnyImage = Any  # whatever `load_image` takes, or an EncodedImage
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """What became of a sample: an answer, or the error why there is none. `seconds` is its own part
    of each phase; over all samples they add up to what the phase took."""

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
        """Those of each of its samples."""
        return self.samples[0].images

    @property
    def size(self) -> tuple[int, int]:
        """By this, groups of prompts of about the same length stand together."""
        return len(self.images), max(
            len(sample.prompt.encode(errors="replace")) for sample in self.samples
        )


@dataclass(frozen=True)
class Prepared:
    """A group whose images are opened: squares, ready for the model; or the error of one."""

    group: Group
    images: tuple[AnyImage, ...] = ()
    error: Exception | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A sample with its request, checked, and the seconds that went into it so far."""

    sample: Sample
    request: Request
    seconds: dict[str, float]


# ---- order ---------------------------------------------------------------------------------------


def image_groups(samples: Iterable[Sample]) -> list[Group]:
    """Samples with the same images together, in the order in which these first appear."""
    groups: dict[Any, list[Sample]] = {}
    for position, sample in enumerate(samples):
        alone = sample.image_key is None or not sample.images
        groups.setdefault(position if alone else sample.image_key, []).append(sample)
    return [Group(tuple(members)) for members in groups.values()]


def longest_first(samples: Iterable[Sample]) -> list[Group]:
    """Groups of samples about the same images, those with long prompts first."""
    return sorted(image_groups(samples), key=lambda group: group.size, reverse=True)


def select_shard(samples: Sequence[Sample], shard: tuple[int, int]) -> list[Sample]:
    """Every n-th group of samples about the same images from the i-th on, for shard = (i, n), in
    the order of the samples.

    Over all i the shards hold every sample once. Raises ValueError out of range."""
    part, total = shard
    if not 1 <= part <= total:
        raise ValueError(f"shard {part}/{total}: must be i/n with 1 <= i <= n")
    chosen = image_groups(samples)[part - 1 :: total]
    ids = {sample.id for group in chosen for sample in group.samples}
    return [sample for sample in samples if sample.id in ids]


# ---- images --------------------------------------------------------------------------------------


def prepare(model: Model, group: Group) -> Prepared:
    """Open the images of a group and make squares of them, without torch: in a thread of its own it
    would take a second set of CPU threads."""
    start = perf_counter()
    try:
        images = tuple(square(model, image) for image in group.images)
    except ROW_ERRORS as error:
        return Prepared(group, error=bare(error), seconds=perf_counter() - start)
    return Prepared(group, images, seconds=perf_counter() - start)


def square(model: Model, image: AnyImage) -> AnyImage:
    """The picture that the model's own preprocessing would make pixel values of. A function is
    called for its image."""
    image = image() if callable(image) else image
    if isinstance(image, EncodedImage):
        return image
    return load_square(image, model.config, model.exif)


def prepared_ahead(
    groups: Iterable[Group], work: Callable[[Group], Prepared], workers: int, ahead: int
) -> Iterator[Prepared]:
    """Every group's work done, in order, by threads that are at most `ahead` images further than
    what was asked for. Without workers it is done when asked for."""
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

    `batch_size` questions, and images in the tower, at once (None: 8); `workers` threads open
    images (0: none). `reuse_prefix`: what questions about one image share runs once. Raises
    ValueError for options that the model does not allow."""

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
        """An outcome for every sample, in the order in which they are done."""
        askable: list[Sample] = []
        for sample in samples:
            if sample.error is None:
                askable.append(sample)
            else:
                yield Outcome(sample, error=sample.error)
        ahead = LOOK_AHEAD * self.batch_size
        opened = prepared_ahead(longest_first(askable), self.prepare, self.workers, ahead)
        try:
            yield from self.run(Feed(self, opened))
        finally:
            opened.close()  # type: ignore[attr-defined]  # a generator: its threads end

    def prepare(self, group: Group) -> Prepared:
        return prepare(self.model, group)

    def run(self, feed: "Feed") -> Iterator[Outcome]:
        """Outcomes of all that the feed has. Out of memory, batches become half as large."""
        size = self.batch_size
        while not feed.ended:
            in_flight: dict[int, Job] = {}
            requests = noted(feed, in_flight)
            error = yield from self.attempt(requests, in_flight, size, feed.failed)
            yield from passed_on(feed.failed)
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
        """Run requests, whose jobs are `in_flight` until they are done, and pass on what `failed`
        meanwhile. Returns the error that ended it early."""
        try:
            for index, row in self.model.run(requests, self.options, size):
                if row.finish_reason is not None:
                    yield finished(in_flight.pop(index), row)
                yield from passed_on(failed)
        except ROW_ERRORS as error:
            if not in_flight or is_accelerator_failure(error):
                raise
            return bare(error)
        return None

    def in_halves(self, jobs: Sequence[Job], error: Exception) -> Iterator[Outcome]:
        """Outcomes of a batch that failed with `error`: of each half by itself, and so on down to
        the job whose error it is."""
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
    """Jobs, made when they are asked for; what cannot become one is in `failed`.

    It makes a pause as if at its end while there are failures to pass on, so that none waits for
    images that are slow to open. `ended`: there is nothing left."""

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
            checked = [self.checked(prepared) for prepared in taken]
            self.encode([jobs for jobs in checked if jobs])
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

    def checked(self, prepared: Prepared) -> list[Job]:
        """Jobs of the samples of one group that fit into the context, before anything is computed;
        their images are opened, not encoded."""
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
                self.failed.append(Outcome(sample, error=bare(error), seconds=seconds))
        return jobs

    def encode(self, groups: Sequence[Sequence[Job]]) -> None:
        """Look at the images of some groups, all together or, if that fails, in halves."""
        wanted = [(image, self.engine.reduction) for jobs in groups for image in images_of(jobs)]
        try:
            encoded, seconds = self.model.encode_images(wanted, self.engine.batch_size)
            # A GPU goes on after the call: what is left of the tower's work is not the decoder's.
            seconds["vision"] += self.seconds_until_idle()
        except ROW_ERRORS as error:
            if is_accelerator_failure(error):
                raise
            failure = bare(error)
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
        """Wait for what a GPU still has queued, where a phase ends whose seconds are taken. Steps
        of the decoder end with their tokens on this side."""
        start = perf_counter()
        synchronize(str(self.model.llava.device))
        return perf_counter() - start

    def begin(self, groups: Sequence[Sequence[Job]]) -> None:
        """Run what the prompts of each group share; all jobs are ready then."""
        start = perf_counter()
        requests = [[without_short_prefix(job.request) for job in jobs] for jobs in groups]
        if self.engine.reuse_prefix:
            try:
                requests = after_shared_prefixes(self.model, requests)
                self.seconds_until_idle()
            except ROW_ERRORS as error:
                if is_accelerator_failure(error):
                    raise
                # Without it every prompt runs as a whole, which takes less memory.
        sharing = sum(len(jobs) for jobs in groups if len(jobs) > 1)
        share = (perf_counter() - start) / sharing if sharing else 0.0
        for jobs, begun in zip(groups, requests, strict=True):
            prefill = share if len(jobs) > 1 else 0.0
            for job, request in zip(jobs, begun, strict=True):
                seconds = {**job.seconds, "prefill": prefill}
                self.ready.append(replace(job, request=request, seconds=seconds))


def images_of(jobs: Sequence[Job]) -> tuple[AnyImage, ...]:
    """The images of a group's jobs: each has the same."""
    return jobs[0].request.images


def with_images(
    jobs: Sequence[Job], encoded: Iterator[EncodedImage], seconds: dict[str, float]
) -> list[Job]:
    """The jobs of one group with its images from `encoded`, each of which took `seconds`."""
    images = tuple(islice(encoded, len(images_of(jobs))))
    own = {phase: time * len(images) / len(jobs) for phase, time in seconds.items()}
    own["preprocess"] += jobs[0].seconds["preprocess"]
    return [replace(job, request=replace(job.request, images=images), seconds=own) for job in jobs]


def without_short_prefix(request: Request) -> Request:
    """The request, its images encoded, with a cached beginning only where that is worth it."""
    image_rows = sum(len(image.image_embeds) for image in request.images)
    rows = len(request.state.pending_ids) - len(request.images) + image_rows
    return request if len(request.prefix) >= LEAST_PREFIX * rows else replace(request, prefix=())


def noted(jobs: Iterable[Job], in_flight: dict[int, Job]) -> Iterator[Request]:
    """The jobs' requests; each job is entered under the number that its request gets."""
    for index, job in enumerate(jobs):
        in_flight[index] = job
        yield job.request


def finished(job: Job, row: Row) -> Outcome:
    """The outcome of a job whose row is done."""
    seconds = {phase: job.seconds.get(phase, 0.0) + row.shares.get(phase, 0.0) for phase in PHASES}
    return Outcome(job.sample, row.answer(), seconds=seconds)


def passed_on(failed: deque[Outcome]) -> Iterator[Outcome]:
    """What failed so far, taken out."""
    while failed:
        yield failed.popleft()


def bare(error: Exception) -> Exception:
    """The error without the frames that raised it, which keep images, and tensors of a batch."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether less at once may help. On a CPU torch has no class of its own for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """The first half and the second, of at least two."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
