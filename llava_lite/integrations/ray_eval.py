"""An evaluation on Ray: blocks of samples go to actors, all answers into one predictions file.

    llava-lite eval mmbench MMBench_DEV_EN.tsv -o runs/mmbench --ray --ray-actors 4

The driver loads no model. The first block is empty: the actor that gets it says what the header of
the predictions needs to know of the model, before any answer is written. Samples about the same
images stay in one block, so these are still encoded once.
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
from llava_lite.generation.loop import checked_batch_size
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.integrations.ray_batch import (
    Cluster,
    LostBlock,
    ModelSource,
    answer_blocks,
    checked_device,
    connected,
    import_ray,
    path_of,
    pool,
)
from llava_lite.saving import JsonObject

# Of a block: towards its end batches are no longer full, so it holds several; but all its answers
# come at once, and are lost together with a driver that is killed.
BATCHES = 4


def asking_actors(
    source: ModelSource,
    cluster: Cluster,
    options: GenerationOptions,
    batch_size: int | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Ask:
    """Actors answer, each with an `Engine` of its own; for `runner.run`.

    Images travel as they are: bytes, functions that can be pickled, or paths, which must mean the
    same on every machine. `source` names its model. `run` then raises as `map_blocks`."""
    import_ray()  # what is missing or wrong shows before any file is touched
    checked_device(source)
    source = source.everywhere()
    most = BATCHES * checked_batch_size(batch_size)

    def work(model: Model, samples: Sequence[Sample]) -> Any:
        engine = Engine(model, options, batch_size, workers)
        if samples:
            return list(records_of(engine, samples))
        # The empty block: who is answering?
        origin = Origin.of(str(source.name), source.options)
        return model_settings(model, origin, options), about(engine)

    @contextmanager
    def ask(samples: Sequence[Sample]) -> Iterator[Asked]:
        with connected(cluster):
            actors, *_ = pool(cluster, source)
            share = -(-len(samples) // actors)  # so that none is without work
            asked = in_whole_groups(list(map(absolute, samples)), max(1, min(most, share)))
            blocks: list[list[Sample]] = [[], *asked]
            with closing(answer_blocks(blocks, work, source, cluster, died)) as results:
                settings, about_first = next(results)
                about_all = {**about_first, "actors": min(actors, len(blocks))}
                yield Asked(settings, about_all, chain.from_iterable(results))

    return ask


def died(sample: Sample, error: LostBlock) -> JsonObject:
    """The line of a sample that kills its actors."""
    return record_of(Outcome(sample, error=error), None)


def in_whole_groups(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """At least `size` samples in a block, but for the last; those about the same images together,
    long prompts first."""
    blocks: list[list[Sample]] = []
    for group in longest_first(samples):
        if not blocks or len(blocks[-1]) >= size:
            blocks.append([])
        blocks[-1].extend(group.samples)
    return blocks


def absolute(sample: Sample) -> Sample:
    """The sample with images that are found from any folder."""
    return replace(sample, images=tuple(map(path_of, sample.images)))
