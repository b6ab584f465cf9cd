"""Run an evaluation on Ray: blocks of samples go to actors, all answers into one predictions file.

    llava-lite eval mmbench MMBench_DEV_EN.tsv -o runs/mmbench --ray --ray-actors 4

The driver loads no model. The first block is empty: its result describes the model, for the header
of the predictions. Samples about the same images share a block, so each image is encoded once.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from llava_lite.evaluation.engine import DEFAULT_WORKERS, Engine, Outcome, longest_first
from llava_lite.evaluation.runner import Ask, Asked, about, record_of, records_of
from llava_lite.evaluation.settings import Origin, model_settings
from llava_lite.evaluation.suite import Sample
from llava_lite.generation.loop import check_batch_size
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.integrations.ray_batch import (
    Cluster,
    LostBlock,
    ModelSource,
    absolute_path,
    answer_blocks,
    check_device,
    connect,
    import_ray,
    pool,
)
from llava_lite.saving import JsonObject

# Batches in a block. More: fewer batches are only partly full. Fewer: a killed driver loses less,
# because a block's answers arrive together.
BATCHES = 4


def asking_actors(
    source: ModelSource,
    cluster: Cluster,
    options: GenerationOptions,
    batch_size: int | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Ask:
    """For `runner.run`: actors answer, each with an `Engine`.

    Images are sent as they are: bytes, picklable functions, or paths, which must mean the same on
    every machine. `source` must have a name. `run` then raises as `map_blocks`."""
    import_ray()  # both checks come before any file is touched
    check_device(source)
    source = source.everywhere()
    most = BATCHES * check_batch_size(batch_size)

    def fail(sample: Sample, error: LostBlock) -> JsonObject:
        return record_of(Outcome(sample, error=error), None)

    def work(model: Model, samples: Sequence[Sample]) -> Any:
        engine = Engine(model, options, batch_size, workers)
        if samples:
            return list(records_of(engine, samples))
        # The empty block asks for the model's settings.
        origin = Origin.of(str(source.name), source.options)
        return model_settings(model, origin, options), about(engine)

    @contextmanager
    def ask(samples: Sequence[Sample]) -> Iterator[Asked]:
        with connect(cluster):
            actors, *_ = pool(cluster, source)
            share = -(-len(samples) // actors)  # every actor gets work
            asked = split_groups(list(map(with_absolute_paths, samples)), max(1, min(most, share)))
            blocks: list[list[Sample]] = [[], *asked]
            with closing(answer_blocks(blocks, work, source, cluster, fail)) as results:
                settings, about_first = next(results)
                about_all = {**about_first, "actors": min(actors, len(blocks))}
                yield Asked(settings, about_all, chain.from_iterable(results))

    return ask


def split_groups(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Blocks of at least `size` samples (the last may be smaller), long prompts first. Samples
    about the same images share a block."""
    blocks: list[list[Sample]] = []
    for group in longest_first(samples):
        if not blocks or len(blocks[-1]) >= size:
            blocks.append([])
        blocks[-1].extend(group.samples)
    return blocks


def with_absolute_paths(sample: Sample) -> Sample:
    """The sample with image paths that hold in any working folder."""
    return replace(sample, images=tuple(map(absolute_path, sample.images)))
