"""Many machines, or many GPUs of one: a model in each of several Ray actors, fed by Ray Data.

    llava-lite batch questions.jsonl -o answers.jsonl --ray --ray-actors 4
    ray.data.read_json("questions.jsonl").map_batches(Predictor, ...)     a pipeline of your own

`map_blocks` is the core: blocks of anything picklable go to a pool of actors, and what each makes
of them comes back in order. `run_batch` is `batch.run_batch` over it: same files, same rules. An
evaluation over it is ray_eval.py.
Actors open images themselves: paths must mean the same on every machine.
"""

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.generation.batch_file import (
    Row,
    Summary,
    answer_rows,
    append_records,
    plan,
    select_shard,
)
from llava_lite.generation.failures import together_or_alone
from llava_lite.saving import JsonObject

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model

Work = Callable[["Model", Any], Any]  # what an actor does with its model and one block

# A block may kill its actor: it then runs once more, and after that the run goes on without it. So
# many blocks of Ray's may be lost before something is wrong with more than them.
MOST_LOST = 8
# Twice for each of them, even if all were one actor's, and some for what others may do to it: an
# actor that may not start again leaves Ray waiting. A model that kills it in loading ends the run.
MOST_RESTARTS = 2 * MOST_LOST + 8

# Ray Data keeps some state per block: with more than this, several of ours share one of its.
MOST_RAY_BLOCKS = 4096


class RayError(LlavaLiteError):
    """Ray is not there, has no room for the actors, or an actor failed."""


class LostBlock(RayError):
    """What stands for a block's result when its actors died with it."""

    def __init__(self) -> None:
        super().__init__("the Ray actor that worked on it died, twice")


class DyingActors(RayError):
    """Actors die whatever they do."""

    def __init__(self) -> None:
        super().__init__(
            f"Ray actors died again and again, in more than {MOST_LOST} blocks of work or while "
            "loading the model (out of memory?)"
        )


@dataclass(frozen=True)
class Cluster:
    """Where actors run. address: of a Ray cluster ("auto" finds the one of this machine); None: one
    that is started here and ends with the run. actors: how many, each with a model of its own
    (None: one per GPU, or a single one on CPUs). cpus: of each actor, and its torch threads (None:
    one beside a GPU, otherwise as many as all actors can have alike; each is on one node)."""

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class ModelSource:
    """What every actor gives to `llava_lite.load`."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def everywhere(self) -> "ModelSource":
        """With folders and files of here as absolute paths: actors may stand in another folder."""
        paths = {name: path_of(self.options.get(name)) for name in ("base", "vision_tower")}
        return ModelSource(path_of(self.name), {**self.options, **paths})


def path_of(name: Any) -> Any:
    """The absolute path of what is there; anything else, such as a hub id, as it is."""
    is_path = isinstance(name, str | os.PathLike) and os.path.exists(name)
    return os.path.abspath(name) if is_path else name


# ---- a user's own pipeline -----------------------------------------------------------------------


class Predictor:
    """A stage of a Ray Data pipeline that answers prompts:

        ds.map_batches(Predictor, fn_constructor_kwargs={"model": "weights/llava-1.5-7b"},
                       compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1, batch_size=16)

    Columns: `prompt`, and if there are images `image` (path, URL, encoded bytes, array, or a list
    of paths; None or NaN for text only). It adds `answer`, `finish_reason` and `error`: a row that
    fails has an empty answer, "error" and the reason, and costs no other row. `model` and
    `load_options` are those of `llava_lite.load`, `options` those of `Model.generate`."""

    def __init__(
        self,
        model: str | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from llava_lite.checkpoints.load import load

        self.model, self.options = load(model, **(load_options or {})), options

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its answers."""
        prompts = [str(prompt) for prompt in batch["prompt"]]
        images = [images_of(cell) for cell in batch.get("image", [None] * len(prompts))]
        found = answer_each(self.model, images, prompts, self.options)
        return {
            **batch,
            "answer": ["" if isinstance(one, BaseException) else str(one) for one in found],
            "finish_reason": [getattr(one, "finish_reason", "error") for one in found],
            "error": [one_line(one) if isinstance(one, BaseException) else "" for one in found],
        }


def images_of(cell: Any) -> list[Any]:
    """The images in one cell of a column; Ray gives lists back as arrays of strings."""
    if cell is None or (isinstance(cell, Real) and math.isnan(cell)):
        return []  # a block of nothing but nulls comes as numbers
    is_list = getattr(getattr(cell, "dtype", None), "kind", "") in ("O", "U", "S")
    return list(cell) if is_list or isinstance(cell, list | tuple) else [cell]


def answer_each(
    model: "Model", images: Sequence[Any], prompts: Sequence[str], options: Mapping[str, Any]
) -> "list[Answer | BaseException]":
    """Each prompt's answer, asked as one batch, or one by one if that fails; its error if it has
    none. An image that is a function is called for it. Raises an accelerator's failure."""

    def answered(pairs: Sequence[tuple[Any, str]]) -> "list[Answer | BaseException]":
        opened = [[image() if callable(image) else image for image in own] for own, _ in pairs]
        texts = [text for _, text in pairs]
        return [*model.generate(opened, texts, batch_size=len(pairs), **options)]

    pairs = list(zip(images, prompts, strict=True))
    return together_or_alone(pairs, answered, lambda _, error: error.with_traceback(None))


# ---- blocks of work ------------------------------------------------------------------------------


def map_blocks(
    blocks: Sequence[Any],
    work: Work,
    source: ModelSource,
    cluster: Cluster,
    in_flight: int = 2,
) -> Generator[Any, None, None]:
    """`work(model, block)` of every block, each in some actor of the cluster, in the order of the
    blocks, as soon as they come. An actor has `in_flight` blocks: one that it works on, others that
    wait there already, and may be lost with it.

    Blocks, `work` and what it returns travel between processes: they are pickled, lambdas and
    functions included. An actor that dies is replaced and its blocks run again, once: then a
    LostBlock stands for their results. Raises RayError where Ray is missing or too small, where a
    model does not load and for what `work` raises; DyingActors for more than MOST_LOST."""
    if not blocks:
        return
    import_ray()
    checked_device(source)
    with connected(cluster):
        expected = 0
        with closing(answered_rows(blocks, work, source, cluster, in_flight)) as rows:
            for row in rows:
                if row["failure"]:
                    raise RayError(row["failure"])
                yield from (LostBlock() for _ in range(expected, row["number"]))
                yield unpickled(row["result"])
                expected = row["number"] + 1
        yield from (LostBlock() for _ in range(expected, len(blocks)))


def answered_rows(
    blocks: Sequence[Any], work: Work, source: ModelSource, cluster: Cluster, in_flight: int
) -> Generator[dict[str, Any], None, None]:
    """What `Actor` gives for every block that is not lost, in order. To be called in a cluster."""
    import ray.data
    from ray import cloudpickle

    size, cpus, gpus = pool(cluster, source)
    ray_blocks = min(len(blocks), MOST_RAY_BLOCKS)
    size = min(size, ray_blocks)  # more would load a model for nothing
    items = [
        {"number": number, "block": cloudpickle.dumps(block)} for number, block in enumerate(blocks)
    ]
    with ray_errors(), warnings.catch_warnings():
        # Ray has no other way yet to say how often an actor and its tasks start again.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        answered = ray.data.from_items(items, override_num_blocks=ray_blocks).map_batches(
            Actor,
            fn_constructor_args=(cloudpickle.dumps((work, source.everywhere())), cpus),
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=in_flight),
            batch_size=None,  # a whole Ray block, nothing is bundled
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=MOST_RESTARTS,
            max_task_retries=1,
        )
    with ray_errors():
        yield from answered.iter_rows()


def unpickled(content: bytes) -> Any:
    """What was pickled in an actor."""
    from ray import cloudpickle

    return cloudpickle.loads(content)


def answer_blocks(
    blocks: Sequence[Sequence[Any]],
    work: Work,
    source: ModelSource,
    cluster: Cluster,
    failed: Callable[[Any, LostBlock], Any],
) -> Generator[Any, None, None]:
    """`map_blocks` for work that gives a list with a result for each item of a block. The items of
    lost blocks are asked again at the end, each alone: what kills its actor even then gets
    `failed(item, error)`, and costs no other item."""
    lost: list[Any] = []
    end: DyingActors | None = None
    try:
        with closing(map_blocks(blocks, work, source, cluster)) as results:
            for block, result in zip(blocks, results, strict=True):
                if not isinstance(result, LostBlock):
                    yield result
                elif not block:
                    raise result
                else:
                    lost.extend(block)
    except DyingActors as error:
        end = error  # once the lost are booked: else they would end every further run here, too
    alone = [[item] for item in lost]
    with closing(map_blocks(alone, work, source, cluster, 1)) as results:
        for item, result in zip(lost, results, strict=True):
            yield [failed(item, result)] if isinstance(result, LostBlock) else result
    if end is not None:
        raise end


class Actor:
    """One model, and the work it does. What fails here comes back as a result: an error raised in
    an actor is a page of Ray's own frames, and for one in its constructor Ray tries again."""

    def __init__(self, work_and_source: bytes, threads: int) -> None:
        import torch
        from ray import cloudpickle

        from llava_lite.checkpoints.load import load
        from llava_lite.fast.allocator import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(threads)
        self.work, source = cloudpickle.loads(work_and_source)
        self.error = ""
        try:
            self.model = load(source.name, **source.options)
        except Exception as error:
            self.error = f"no model in a Ray actor: {describe_error(error)}"

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        from ray import cloudpickle

        for number, block in zip(batch["number"], batch["block"], strict=True):
            result = None
            if not self.error:
                try:
                    result = self.work(self.model, cloudpickle.loads(block))
                except Exception as error:
                    self.error = f"a Ray actor failed: {describe_error(error)}"
            yield {
                "number": [int(number)],
                "result": [cloudpickle.dumps(result)],
                "failure": [self.error],
            }


def describe_error(error: Exception) -> str:
    """The error in one line; with its type where it is a bug."""
    is_users = isinstance(error, LlavaLiteError | ValueError | OSError)
    return one_line(error) if is_users else f"{type(error).__name__}: {one_line(error)}"


def import_ray() -> Any:
    """The module ray.data. Raises RayError where it is not installed."""
    try:
        import ray.data
    except ImportError as error:
        raise RayError("Ray is not installed: pip install 'llava-lite[ray]'") from error
    return ray


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Connected to the cluster, quietly, with Ray Data keeping the order of its rows. A connection
    that is there already is used and stays. Raises RayError where there is no such cluster."""
    import logging

    ray = import_ray()
    there = ray.is_initialized()
    if not there:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if cluster.address is None:
            options |= {"address": "local", "include_dashboard": False}
        else:
            options["address"] = cluster.address
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = cluster.address or "here"
            raise RayError(f"no Ray cluster at {where}: {one_line(error)}") from error
    context = ray.data.DataContext.get_current()
    options_then = context.execution_options
    before = context.enable_progress_bars, options_then.preserve_order, context.max_errored_blocks
    context.enable_progress_bars, options_then.preserve_order = False, True
    context.max_errored_blocks = MOST_LOST
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # errors come as ours, or stand in the output
    try:
        yield
    finally:
        logger.setLevel(level)
        context.enable_progress_bars, options_then.preserve_order = before[:2]
        context.max_errored_blocks = before[2]
        if not there:
            ray.shutdown()


def pool(cluster: Cluster, source: ModelSource) -> tuple[int, int, int]:
    """(actors, CPUs of each, GPUs of each) in the cluster this is connected to; an actor has to fit
    on one node. Raises RayError for `source`'s device where actors cannot have it, where no node
    has room for an actor, and where a cluster of this machine alone has none for all of them."""
    nodes = rooms()
    gpus = gpus_of_actor(source, nodes)
    actors = cluster.actors or (None if gpus else 1)  # None: one per GPU
    cpus = cluster.cpus or (1 if gpus else equal_share(nodes, actors or 1))
    room = sum(node.holds(cpus, gpus) for node in nodes)
    if not room:
        have = ", ".join(sorted({str(node) for node in nodes})) or "nothing"
        raise RayError(
            f"no node has room for an actor of {cpus} CPUs and {gpus} GPUs; nodes have {have}"
        )
    actors = actors or room
    if cluster.address is None and actors > room:  # any other may grow, or start with fewer
        all_cpus, all_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        raise RayError(
            f"{actors} actors need {actors * cpus} CPUs and {actors * gpus} GPUs, but there are "
            f"{all_cpus} and {all_gpus}"
        )
    return actors, cpus, gpus


@dataclass(frozen=True)
class Room:
    """What one node of a cluster has in all."""

    cpus: int
    gpus: int

    def holds(self, cpus: int, gpus: int) -> int:
        """How many actors of this size fit."""
        by_cpus = self.cpus // cpus
        return min(by_cpus, self.gpus // gpus) if gpus else by_cpus

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus} GPUs"


def rooms() -> list[Room]:
    """Of every node that is alive."""
    resources = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    return [Room(int(have.get("CPU", 0)), int(have.get("GPU", 0))) for have in resources]


def gpus_of_actor(source: ModelSource, nodes: Sequence[Room]) -> int:
    """How many GPUs an actor reserves for the source's device. Raises RayError as `pool`."""
    device = checked_device(source)
    some = any(node.gpus for node in nodes)
    if device.startswith("cuda") and not some:
        raise RayError(f"device {device}: no node of the Ray cluster has a GPU")
    return int(some and (device == "auto" or device.startswith("cuda")))


def checked_device(source: ModelSource) -> str:
    """The device to load on. Raises RayError for the number of a GPU: an actor sees only its own,
    as the first."""
    device = str(source.options.get("device", "auto"))
    if device.startswith("cuda:") and device != "cuda:0":
        raise RayError(f"device {device}: Ray gives every actor a GPU of its own, name only cuda")
    return device


def equal_share(nodes: Sequence[Room], actors: int) -> int:
    """The most CPUs that each of so many actors can have on these nodes; at least one."""
    largest = max((node.cpus for node in nodes), default=0)
    fitting = (c for c in range(largest, 0, -1) if sum(n.holds(c, 0) for n in nodes) >= actors)
    return next(fitting, 1)


@contextmanager
def ray_errors() -> Iterator[None]:
    """What went wrong in Ray itself, as one line: the last of its report says it."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise DyingActors() from error
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RayError(f"Ray failed: {lines[-1]}") from error


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
    """`batch.run_batch` on a cluster: the same lines in the same order, resumable in the same way.

    Batches that are done wait for those before them, so what is lost when this process is killed
    are at most the batches that were on their way; --resume runs them again. The rows of a batch
    that killed its actors come last, asked one by one. Raises as `batch.run_batch`, and RayError:
    where Ray, its cluster or the model are not there before the output is touched."""
    from llava_lite.generation.loop import checked_batch_size

    size, output = checked_batch_size(batch_size), Path(output)
    todo_of = plan(
        select_shard(rows, shard),
        output,
        resume=resume,
        retry_errors=retry_errors,
        reduction=options.get("reduction"),
    )
    blocks = in_blocks([absolute(row) for row in todo_of.todo], size)

    def work(model: "Model", block: list[Row]) -> list[JsonObject]:
        return answer_rows(model, block, None, options)

    with closing(answer_blocks(blocks, work, source, cluster, Row.failed)) as records:
        # No file is touched before a model has answered.
        first = [one for one in [next(records, None)] if one is not None]
        return append_records(output, todo_of, chain(first, records), on_record)


def absolute(row: Row) -> Row:
    """The row with images that are found from anywhere."""
    from dataclasses import replace

    return replace(row, folder=row.folder.absolute())


def in_blocks(items: Sequence[Any], size: int) -> list[list[Any]]:
    """The items in order, `size` in a block."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
