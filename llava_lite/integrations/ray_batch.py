"""Run batches on Ray: several actors, on one machine or on many, each with a model.

    llava-lite batch questions.jsonl -o answers.jsonl --ray --ray-actors 4
    ray.data.read_json("questions.jsonl").map_batches(Predictor, ...)     your own pipeline

`map_blocks` gives blocks of work to a pool of actors and yields the results in order. `run_batch`
is `batch_file.run_batch` on top of it. ray_eval.py runs an evaluation on top of it.
Actors open the images, so a path must mean the same on every machine.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.generation.batch_file import (
    Row,
    Summary,
    answer_rows,
    append_records,
    plan,
    select_shard,
)
from llava_lite.generation.failures import try_together
from llava_lite.saving import JsonObject

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model

Work = Callable[["Model", Any], Any]  # (the actor's model, a block) -> the block's result

# Ray runs a block again, once, if the block's actor dies. If the second actor dies too, the block
# is lost and the run goes on. More lost blocks than this mean that the actors are broken.
MOST_LOST = 8
# A lost block costs two restarts, and one actor may lose all of them. A model that kills the actor
# while loading uses up the restarts and so ends the run.
MOST_RESTARTS = 2 * MOST_LOST + 8


class RayError(LlavaLiteError):
    """Ray is not installed, has no room for the actors, or an actor failed."""


class LostBlock(RayError):
    """The result of a block that killed its actor twice."""

    def __init__(self) -> None:
        super().__init__("the Ray actor that worked on it died, twice")


class DyingActors(RayError):
    """Actors die, no matter which block they work on."""

    def __init__(self) -> None:
        super().__init__(
            f"Ray actors died again and again, in more than {MOST_LOST} blocks of work or while "
            "loading the model (out of memory?)"
        )


@dataclass(frozen=True)
class Cluster:
    """Where actors run.

    address: of a running Ray cluster ("auto" finds one on this machine); None starts a cluster
    here, for this run only. actors: their number (None: one per GPU, or one if there is no GPU).
    cpus: CPUs and torch threads of each actor (None: one beside a GPU, else an equal share)."""

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class ModelSource:
    """The arguments of `llava_lite.load` in every actor."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def everywhere(self) -> "ModelSource":
        """The same source with absolute paths: an actor's working folder may differ."""
        paths = {name: absolute_path(self.options.get(name)) for name in ("base", "vision_tower")}
        return ModelSource(absolute_path(self.name), {**self.options, **paths})


def absolute_path(name: Any) -> Any:
    """The absolute path of an existing file or folder; anything else (a hub id) unchanged."""
    is_path = isinstance(name, str | os.PathLike) and os.path.exists(name)
    return os.path.abspath(name) if is_path else name


# ---- a user's own pipeline -----------------------------------------------------------------------


class Predictor:
    """A stage of a Ray Data pipeline that answers prompts:

        ds.map_batches(Predictor, fn_constructor_kwargs={"model": "weights/llava-1.5-7b"},
                       compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1, batch_size=16)

    Reads the column `prompt` and, if present, `image`: a path, URL, encoded bytes, array, or list
    of paths; None or NaN for text only. Adds `answer`, `finish_reason` and `error`. A row that
    fails gets an empty answer, "error" and the reason; other rows are not affected. `model` and
    `load_options` go to `llava_lite.load`, `options` to `Model.generate`."""

    def __init__(
        self,
        model: str | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from llava_lite.checkpoints.load import load

        self.model, self.options = load(model, **(load_options or {})), options

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its answers: asked together, and one by one if that fails. Raises an
        accelerator's failure."""
        prompts = [str(prompt) for prompt in batch["prompt"]]
        cells = batch.get("image", [None] * len(prompts))
        pairs = list(zip(map(images_of, cells), prompts, strict=True))
        answers = try_together(pairs, self.answer, lambda _, error: error.with_traceback(None))
        return {
            **batch,
            "answer": ["" if isinstance(one, Exception) else str(one) for one in answers],
            "finish_reason": [getattr(one, "finish_reason", "error") for one in answers],
            "error": [one_line(one) if isinstance(one, Exception) else "" for one in answers],
        }

    def answer(self, pairs: Sequence[tuple[list[Any], str]]) -> "list[Answer | Exception]":
        """The answers to pairs of images and a prompt, as one batch."""
        images, prompts = zip(*pairs, strict=True)
        return [*self.model.generate(images, prompts, batch_size=len(pairs), **self.options)]


def images_of(cell: Any) -> list[Any]:
    """The images in one cell of a column. Ray turns a list into an array of strings."""
    if cell is None or (isinstance(cell, Real) and math.isnan(cell)):
        return []  # a block that holds only nulls arrives as numbers
    is_list = getattr(getattr(cell, "dtype", None), "kind", "") in ("O", "U", "S")
    return list(cell) if is_list or isinstance(cell, list | tuple) else [cell]


# ---- blocks of work ------------------------------------------------------------------------------


def map_blocks(
    blocks: Sequence[Any], work: Work, source: ModelSource, cluster: Cluster
) -> Generator[Any, None, None]:
    """Yield `work(model, block)` of every block, in order; a LostBlock for one that killed two
    actors. Blocks, `work` and results are pickled with cloudpickle.

    Raises RayError if Ray is missing or too small, a model does not load, or `work` raises.
    More than MOST_LOST lost blocks start no further block: the results of the started blocks are
    yielded, then DyingActors is raised."""
    if not blocks:
        return
    ray = import_ray()
    check_device(source)
    with connect(cluster):
        todo, done, following = deque(enumerate(blocks)), {}, 0
        lost, broken = 0, False
        tasks = start_actors(len(blocks), work, source, cluster)
        while todo or any(number is not None for _, number in tasks.values()):
            [task], _ = ray.wait([*tasks])
            actor, number = tasks.pop(task)
            result = get_result(task)
            if isinstance(result, LostBlock):
                lost += 1
                broken = broken or number is None or lost > MOST_LOST  # None: died while loading
                if broken:
                    todo.clear()
            elif isinstance(result, RayError):
                raise result  # at once, also if an earlier block is unfinished
            if number is not None:
                done[number] = result
            if todo:
                number, block = todo.popleft()
                tasks[actor.run.remote(block)] = actor, number
            while following in done:
                yield done.pop(following)
                following += 1
        if broken:
            raise DyingActors


def start_actors(
    most: int, work: Work, source: ModelSource, cluster: Cluster
) -> dict[Any, tuple[Any, int | None]]:
    """Start the pool, at most `most` actors. Returns a task for each actor, which ends when its
    model is loaded: task -> (actor, no block).

    An actor gets its first block after that, so an actor without room in the cluster delays no
    block. It has one block at a time, so its death loses no other block."""
    actors, cpus, gpus = pool(cluster, source)
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": MOST_RESTARTS}
    start = import_ray().remote(Actor).options(**options, max_task_retries=1).remote
    started = [start(work, source.everywhere(), cpus) for _ in range(min(actors, most))]
    return {actor.check.remote(): (actor, None) for actor in started}


def get_result(task: Any) -> Any:
    """The result of a finished task; a LostBlock if its actor died. Raises RayError."""
    ray = import_ray()
    try:
        return ray.get(task)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        return LostBlock()
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RayError(f"Ray failed: {lines[-1]}") from error


def answer_blocks(
    blocks: Sequence[Sequence[Any]],
    work: Work,
    source: ModelSource,
    cluster: Cluster,
    fail: Callable[[Any, LostBlock], Any],
) -> Generator[Any, None, None]:
    """`map_blocks` for work that returns a list with one result per item of the block.

    The items of lost blocks run again at the end, one at a time. An item that kills its actor even
    then gets `fail(item, error)`; no other item is lost. Raises as `map_blocks`, and LostBlock for
    a block without items."""
    lost: list[Any] = []
    broken: DyingActors | None = None
    try:
        with closing(map_blocks(blocks, work, source, cluster)) as results:
            for block, result in zip(blocks, results, strict=True):
                if not isinstance(result, LostBlock):
                    yield result
                elif block:
                    lost.extend(block)
                else:
                    raise result
    except DyingActors as error:
        broken = error  # record the lost items first, or a resumed run would end here again
    with closing(map_blocks([[item] for item in lost], work, source, cluster)) as results:
        for item, result in zip(lost, results, strict=True):
            yield [fail(item, result)] if isinstance(result, LostBlock) else result
    if broken is not None:
        raise broken


class Actor:
    """A model in a process of Ray. Errors are returned as a RayError, not raised: Ray would add its
    own frames, and would start the actor again after an error in `__init__`."""

    def __init__(self, work: Work, source: ModelSource, threads: int) -> None:
        import torch

        from llava_lite.checkpoints.load import load
        from llava_lite.fast.allocator import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(threads)
        self.work = work
        self.error: RayError | None = None
        try:
            self.model = load(source.name, **source.options)
        except Exception as error:
            self.error = RayError(f"no model in a Ray actor: {describe_error(error)}")

    def check(self) -> RayError | None:
        """None once the model is loaded, or the reason why there is none."""
        return self.error

    def run(self, block: Any) -> Any:
        """The result of one block."""
        try:
            return self.error or self.work(self.model, block)
        except Exception as error:
            return RayError(f"a Ray actor failed: {describe_error(error)}")


def describe_error(error: Exception) -> str:
    """The error's message, with its type unless the user caused the error."""
    is_users = isinstance(error, LlavaLiteError | ValueError | OSError)
    return one_line(error) if is_users else f"{type(error).__name__}: {one_line(error)}"


# ---- the cluster ---------------------------------------------------------------------------------


def import_ray() -> Any:
    """The module ray. Raises RayError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise RayError("Ray is not installed: pip install 'llava-lite[ray]'") from error
    return ray


@contextmanager
def connect(cluster: Cluster) -> Iterator[None]:
    """Connect to the cluster, without Ray's log. Uses an existing connection, and keeps it open.
    Raises RayError if there is no cluster at the address."""
    import logging

    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    options = {"address": cluster.address or "local", "log_to_driver": False}
    options |= {} if cluster.address else {"include_dashboard": False}
    try:
        ray.init(**options, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RayError(
            f"no Ray cluster at {cluster.address or 'here'}: {one_line(error)}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class Node(NamedTuple):
    """The CPUs and GPUs of one machine in the cluster."""

    cpus: int
    gpus: int

    def holds(self, cpus: int, gpus: int) -> int:
        """How many actors of this size fit."""
        by_cpus = self.cpus // cpus
        return min(by_cpus, self.gpus // gpus) if gpus else by_cpus

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus} GPUs"


def pool(cluster: Cluster, source: ModelSource) -> tuple[int, int, int]:
    """(actors, CPUs of each, GPUs of each) for the connected cluster.

    Raises RayError if no node has room for an actor, if the actors do not fit on this machine, or
    if no actor can have the source's device. Another cluster may be small: it may still grow."""
    resources = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    nodes = [Node(int(have.get("CPU", 0)), int(have.get("GPU", 0))) for have in resources]
    device = check_device(source)
    has_gpu = any(node.gpus for node in nodes)
    if device.startswith("cuda") and not has_gpu:
        raise RayError(f"device {device}: no node of the Ray cluster has a GPU")
    gpus = int(has_gpu and device.startswith(("auto", "cuda")))
    actors = cluster.actors or (None if gpus else 1)  # None: as many as fit, one per GPU
    cpus = cluster.cpus or (1 if gpus else share_cpus(nodes, actors or 1))
    room = sum(node.holds(cpus, gpus) for node in nodes)
    if not room:
        have = ", ".join(sorted({str(node) for node in nodes})) or "nothing"
        raise RayError(f"no node has room for an actor of {Node(cpus, gpus)}; nodes have {have}")
    actors = actors or room
    if cluster.address is None and actors > room:
        total = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
        raise RayError(
            f"{actors} actors need {Node(actors * cpus, actors * gpus)}, but there are "
            f"{total.cpus} and {total.gpus}"
        )
    return actors, cpus, gpus


def check_device(source: ModelSource) -> str:
    """The source's device. Raises RayError for a GPU's number: an actor sees one GPU, the first."""
    device = str(source.options.get("device", "auto"))
    if device.startswith("cuda:") and device != "cuda:0":
        raise RayError(f"device {device}: Ray gives every actor a GPU of its own, name only cuda")
    return device


def share_cpus(nodes: Sequence[Node], actors: int) -> int:
    """The most CPUs, at least 1, that each actor can have if all fit on the nodes."""
    largest = max((node.cpus for node in nodes), default=0)
    fitting = (c for c in range(largest, 0, -1) if sum(n.holds(c, 0) for n in nodes) >= actors)
    return next(fitting, 1)


# ---- batches -------------------------------------------------------------------------------------


def run_batch(
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    source: ModelSource,
    cluster: Cluster,
    *,
    batch_size: int | None = None,
    resume: bool = False,
    retry_errors: bool = False,
    shard: tuple[int, int] = (1, 1),
    on_record: Callable[[JsonObject], None] | None = None,
    **options: Any,
) -> Summary:
    """`batch_file.run_batch` on a cluster: the same lines in the same order, resumable.

    A batch is written after all batches before it. A killed run loses the batches that were not
    written, and `resume` runs them again. The rows of a lost batch come last, asked one by one.
    Raises as `batch_file.run_batch`, and RayError. The output is untouched if Ray, the cluster or
    the model is missing."""
    from llava_lite.generation.loop import check_batch_size
    from llava_lite.generation.sampling import with_size

    size, output = check_batch_size(batch_size), Path(output)
    todo_of = plan(
        select_shard(rows, shard),
        output,
        resume=resume,
        retry_errors=retry_errors,
        reduction=with_size(options.get("reduction"), options.get("image_size")),
    )
    todo = [replace(row, folder=row.folder.absolute()) for row in todo_of.todo]
    blocks = [todo[start : start + size] for start in range(0, len(todo), size)]

    def work(model: "Model", block: list[Row]) -> list[JsonObject]:
        return answer_rows(model, block, None, options)

    with closing(answer_blocks(blocks, work, source, cluster, Row.record_error)) as records:
        # No file is touched before a model has answered.
        first = [one for one in [next(records, None)] if one is not None]
        return append_records(output, todo_of, chain(first, records), on_record)
