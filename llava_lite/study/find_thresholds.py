"""Thresholds for DToMe (DyMU, arXiv 2504.17040): how alike two tokens must be to merge, one cosine
per block of the vision tower. With them an image keeps as many tokens as it needs.

    read_thresholds(path)      from a file: ours, a JSON list, or a checkpoint of DyMU
    own_thresholds(source)     those that belong to a checkpoint
    find_thresholds(model, images, merge)
                               from images, as the paper does (section 3.1): let a batch compete

Finding: let every block merge the pairs that are most alike over a whole batch, as many as `merge`
wants of so many images. A plain image loses more of its tokens than a busy one. The cosine of the
best pair that did not merge is the batch's threshold; the mean over all batches, each counted by
its images, is the result.

`llava-lite thresholds` does this over a folder or a list. Imports nothing heavy before it starts.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llava_lite.checkpoints.thresholds import NEVER
from llava_lite.errors import ImageError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lite.generation.model import Model
    from llava_lite.reduction import ToMe
    from llava_lite.tome import Merged
    from llava_lite.vision import VisionBlock, VisionTower

DEFAULT_KEEP = 72


DEFAULT_BATCH_SIZE = 8


# ---- find ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the images so far have given: for each block the sum of the batches' thresholds, each
    times its images; how many images went in, and how many could not be read."""

    sums: tuple[float, ...]
    images: int = 0
    skipped: int = 0

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Their mean, in double precision."""
        return tuple(total / self.images for total in self.sums)

    def plus(self, thresholds: Sequence[float], images: int, skipped: int) -> "Finding":
        """With one more batch."""
        sums = self.sums
        if images:
            sums = tuple(s + images * t for s, t in zip(sums, thresholds, strict=True))
        return Finding(sums, self.images + images, self.skipped + skipped)


def find_thresholds(
    model: "Model",
    images: Sequence[Any],
    merge: "ToMe | None" = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> tuple[float, ...]:
    """Thresholds with which an image like these keeps, on average, as many tokens as with `merge`
    (default: 72), one per block that runs.

    `images`: whatever `Model.generate` takes; one that cannot be read costs a warning. The order
    matters a little: each `batch_size` of them compete, so they should be a mixture. Raises
    ValueError for a `merge` that the tower cannot do, and ImageError when no image can be read."""
    steps = deque(finding(model, images, merge, batch_size), maxlen=1)
    if not steps or not steps[0].images:
        raise ImageError(f"none of {len(images)} images can be read: thresholds need some")
    return steps[0].thresholds


def finding(
    model: "Model",
    images: Sequence[Any],
    merge: "ToMe | None" = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    found: Finding | None = None,
    on_error: Callable[[ImageError], None] | None = None,
) -> Iterator[Finding]:
    """`find_thresholds` step by step: what is found after each batch. It goes on from `found`, an
    earlier step over the same images; `on_error` hears of images that cannot be read."""
    from llava_lite.reduction import ToMe

    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    steps = (merge or ToMe(keep=DEFAULT_KEEP)).steps(model.config.vision)
    counts = [step.r or 0 for step in steps]
    found = found or Finding((0.0,) * len(counts))
    for start in range(found.images + found.skipped, len(images), batch_size):
        batch = images[start : start + batch_size]
        pixel_values = [
            p for image in batch if (p := open_image(model, image, on_error)) is not None
        ]
        thresholds = batch_thresholds(model.llava.vision, pixel_values, counts)
        found = found.plus(thresholds, len(pixel_values), len(batch) - len(pixel_values))
        yield found


def open_image(
    model: "Model", image: Any, on_error: Callable[[ImageError], None] | None
) -> "Tensor | None":
    """Pixel values (1, 3, S, S) for the model's tower; None for an image that cannot be read."""
    try:
        pixel_values = model.prepare(image)
    except ImageError as error:
        if on_error is None:
            warnings.warn(f"{one_line(error)} (left out)", stacklevel=2)
        else:
            on_error(error)
        return None
    return pixel_values.to(model.llava.device, model.llava.dtype)


def batch_thresholds(
    tower: "VisionTower", pixel_values: Sequence["Tensor"], counts: Sequence[int]
) -> list[float]:
    """One batch's threshold for every block, of images (1, 3, S, S) each. counts: tokens that a
    block merges per image, on average over the batch.

    The images keep different numbers of tokens, so each passes a block alone: then the scores are
    also exactly those that the same image has when the thresholds are used."""
    import torch

    if not pixel_values:
        return []
    thresholds = []
    with torch.inference_mode():
        tokens: Tokens = [(tower.pre_norm(tower.embed(image)), None) for image in pixel_values]
        for block, count in zip(tower.blocks, counts, strict=True):
            threshold, tokens = merge_batch(cast("VisionBlock", block), tokens, count)
            thresholds.append(threshold)
    return thresholds


Tokens = list[tuple["Tensor", "Merged | None"]]


def merge_batch(block: "VisionBlock", tokens: Tokens, count: int) -> tuple[float, Tokens]:
    """One block over the images of a batch, tokens (1, T, C) each: its threshold, and the tokens
    behind it."""
    from llava_lite.tome import MergeStep, match_tokens, merge_tokens

    attended = []
    for x, merged in tokens:
        mixed, keys = block.attn(block.norm1(x), merged)
        attended.append((x + mixed, keys.mean(1), merged))
    step, threshold = MergeStep(r=0), NEVER
    if count:
        scores = [match_tokens(metric)[0][0, 1:] for _, metric, _ in attended]  # no class token
        threshold = competing_threshold(scores, count)
        step = MergeStep(threshold=threshold)
    after: Tokens = []
    for x, metric, merged in attended:
        x, merged = merge_tokens(x, metric, merged, step)
        after.append((x + block.mlp(block.norm2(x)), merged))
    return threshold, after


def competing_threshold(scores: Sequence["Tensor"], count: int) -> float:
    """The best score that stays when so many times `count` merge as there are images, the best of
    all: what is above it is what merges. scores: the cosines (A,) of each image's sources.

    It is never below 0, and 0 where no source is left to stay: opposites never merge."""
    import torch

    ranked = torch.cat(list(scores)).sort(descending=True).values
    rank = count * len(scores)
    return max(ranked[rank].item(), 0.0) if rank < len(ranked) else 0.0
