"""Many machines, or many GPUs of one: a model in each of several Ray actors, fed by Ray Data.

    llava-lite batch questions.jsonl -o answers.jsonl --ray --ray-actors 4
    ray.data.read_json("questions.jsonl").map_batches(Predictor, ...)     a pipeline of your own

`map_blocks` is the core: blocks of anything picklable go to a pool of actors, and what each makes
of them comes back in order. `run_batch` is `batch.run_batch` over it: same files, same rules. An
evaluation over it is ray_eval.py.
Actors open images themselves: paths must mean the same on every machine.
"""

import argparse
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.batch import (
    ROW_ERRORS,
    Record,
    Row,
    Summary,
    answer_rows,
    append_records,
    plan,
    reason_of,
    select_shard,
)
from llava_lite.errors import LlavaLiteError

if TYPE_CHECKING:
    from llava_lite.answer import Answer
    from llava_lite.generation import Model

Work = Callable[["Model", Any], Any]  # what an actor does with its model and one block

# Ray Data keeps some state per block: with more than this, several of ours share one of its.
MOST_RAY_BLOCKS = 4096


class RayError(LlavaLiteError):
    """Ray is not there, has no room for the actors, or an actor failed."""


@dataclass(frozen=True)
class Cluster:
    """Where actors run. address: of a Ray cluster ("auto" finds the one of this machine); None: one
    that is started here and ends with the run. actors: how many, each with a model of its own
    (None: one per GPU, or a single one on CPUs). cpus: of each actor, and its torch threads (None:
    one beside a GPU, otherwise an equal share of all)."""

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
    of paths; None for text only). It adds `answer`, `finish_reason` and `error`: a row that fails
    has an empty answer, "error" and the reason, and costs no other row. `model` and `load_options`
    are those of `llava_lite.load`, `options` those of `Model.generate`."""

    def __init__(
        self,
        model: str | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        import llava_lite

        self.model, self.options = llava_lite.load(model, **(load_options or {})), options

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its answers."""
        prompts = [str(prompt) for prompt in batch["prompt"]]
        images = [images_of(cell) for cell in batch.get("image", [None] * len(prompts))]
        found = answer_each(self.model, images, prompts, self.options)
        return {
            **batch,
            "answer": ["" if isinstance(one, BaseException) else str(one) for one in found],
            "finish_reason": [getattr(one, "finish_reason", "error") for one in found],
            "error": [reason_of(one) if isinstance(one, BaseException) else "" for one in found],
        }


def images_of(cell: Any) -> list[Any]:
    """The images in one cell of a column; Ray gives lists back as arrays of strings."""
    if cell is None:
        return []
    is_list = getattr(getattr(cell, "dtype", None), "kind", "") in ("O", "U", "S")
    return list(cell) if is_list or isinstance(cell, list | tuple) else [cell]


def answer_each(
    model: "Model", images: Sequence[Any], prompts: Sequence[str], options: Mapping[str, Any]
) -> "list[Answer | BaseException]":
    """Each prompt's answer, asked as one batch, or one by one if that fails; its error if it has
    none. An image that is a function is called for it."""
    if not prompts:
        return []
    try:
        opened = [[image() if callable(image) else image for image in own] for own in images]
        return [*model.generate(opened, list(prompts), batch_size=len(prompts), **options)]
    except ROW_ERRORS as error:
        if len(prompts) == 1:
            return [error]
    pairs = zip(images, prompts, strict=True)
    return [one for image, text in pairs for one in answer_each(model, [image], [text], options)]


# ---- blocks of work ------------------------------------------------------------------------------


def map_blocks(
    blocks: Sequence[Any], work: Work, source: ModelSource, cluster: Cluster
) -> Generator[Any, None, None]:
    """`work(model, block)` of every block, each in some actor of the cluster, in the order of the
    blocks, as soon as they come.

    Blocks, `work` and what it returns travel between processes: they are pickled, lambdas and
    functions included. An actor that dies is replaced and its blocks run again. Raises RayError
    where Ray is missing or too small, where a model does not load, and for what `work` raises."""
    if not blocks:
        return
    import_ray()
    from ray import cloudpickle

    with connected(cluster):
        import ray.data

        size, cpus, gpus = pool(cluster)
        ray_blocks = min(len(blocks), MOST_RAY_BLOCKS)
        size = min(size, ray_blocks)  # more would load a model for nothing
        items = [{"block": cloudpickle.dumps(block)} for block in blocks]
        answered = ray.data.from_items(items, override_num_blocks=ray_blocks).map_batches(
            Actor,
            fn_constructor_args=(cloudpickle.dumps((work, source.everywhere())), cpus),
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            batch_size=None,  # a whole Ray block, nothing is bundled
            num_cpus=cpus,
            num_gpus=gpus,
        )
        with ray_errors():
            for row in answered.iter_rows():
                if row["failure"]:
                    raise RayError(row["failure"])
                yield cloudpickle.loads(row["result"])


class Actor:
    """One model, and the work it does. What fails here comes back as a result: an error raised in
    an actor is a page of Ray's own frames, and for one in its constructor Ray tries again."""

    def __init__(self, work_and_source: bytes, threads: int) -> None:
        import torch
        from ray import cloudpickle

        import llava_lite
        from llava_lite.allocator import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(threads)
        self.work, source = cloudpickle.loads(work_and_source)
        self.error = ""
        try:
            self.model = llava_lite.load(source.name, **source.options)
        except Exception as error:
            self.error = f"no model in a Ray actor: {described(error)}"

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        from ray import cloudpickle

        for block in batch["block"]:
            result = None
            if not self.error:
                try:
                    result = self.work(self.model, cloudpickle.loads(block))
                except Exception as error:
                    self.error = f"a Ray actor failed: {described(error)}"
            yield {"result": [cloudpickle.dumps(result)], "failure": [self.error]}


def described(error: Exception) -> str:
    """What an error says; of one that is no user's also what it is."""
    is_users = isinstance(error, LlavaLiteError | ValueError | OSError)
    return reason_of(error) if is_users else f"{type(error).__name__}: {reason_of(error)}"


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
            raise RayError(f"no Ray cluster at {where}: {reason_of(error)}") from error
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        context.enable_progress_bars, context.execution_options.preserve_order = before
        if not there:
            ray.shutdown()


def pool(cluster: Cluster) -> tuple[int, int, int]:
    """(actors, CPUs of each, GPUs of each) in the cluster this is connected to. Raises RayError
    where a cluster of this machine alone has no room for them."""
    have = import_ray().cluster_resources()
    all_cpus, all_gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    gpus = 1 if all_gpus else 0
    actors = cluster.actors or all_gpus or 1
    cpus = cluster.cpus or (1 if gpus else max(1, all_cpus // actors))
    if cluster.address is None and (actors * cpus > all_cpus or actors * gpus > all_gpus):
        raise RayError(
            f"{actors} actors need {actors * cpus} CPUs and {actors * gpus} GPUs, but there are "
            f"{all_cpus} and {all_gpus}"
        )
    return actors, cpus, gpus


@contextmanager
def ray_errors() -> Iterator[None]:
    """What went wrong in Ray itself, as one line: the last of its report says it."""
    import ray.exceptions

    try:
        yield
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
    on_record: Callable[[Record], None] | None = None,
    **options: Any,
) -> Summary:
    """`batch.run_batch` on a cluster: the same lines in the same order, resumable in the same way.

    Batches that are done wait for those before them, so what is lost when this process is killed
    are at most the batches that were on their way; --resume runs them again. Raises as
    `batch.run_batch`, and RayError."""
    from llava_lite.generation import checked_batch_size

    size, output = checked_batch_size(batch_size), Path(output)
    todo_of = plan(
        select_shard(rows, shard),
        output,
        resume=resume,
        retry_errors=retry_errors,
        reduction=options.get("reduction"),
    )
    blocks = in_blocks([absolute(row) for row in todo_of.todo], size)

    def work(model: "Model", block: list[Row]) -> list[Record]:
        return answer_rows(model, block, None, options)

    return append_records(output, todo_of, map_blocks(blocks, work, source, cluster), on_record)


def absolute(row: Row) -> Row:
    """The row with images that are found from anywhere."""
    from dataclasses import replace

    return replace(row, folder=row.folder.absolute())


def in_blocks(items: Sequence[Any], size: int) -> list[list[Any]]:
    """The items in order, `size` in a block."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


# ---- command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The flags of a command that can run on a cluster. `positive` reads a number from 1 on."""
    group = parser.add_argument_group("many machines")
    group.add_argument(
        "--ray", action="store_true", help="run on Ray: on this machine, or with --ray-address"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster; auto finds that of here"
    )
    group.add_argument(
        "--ray-actors",
        type=positive,
        metavar="N",
        help="models that work at once (default: one per GPU, else one; --threads are of each)",
    )


def parse_cluster(args: argparse.Namespace) -> Cluster | None:
    """What the flags say; None without --ray. The others without it are wrong usage."""
    if args.ray:
        return Cluster(args.ray_address, args.ray_actors, args.threads)
    for name in ("ray_address", "ray_actors"):
        if getattr(args, name) is not None:
            args.parser.error(f"--{name.replace('_', '-')} needs --ray")
    return None
