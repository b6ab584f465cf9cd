"""Find thresholds for DToMe from images, as in DyMU (arXiv 2504.17040, section 3.1).

A threshold is a cosine, one per block of the vision tower: more similar tokens merge. So a plain
image keeps fewer tokens than a busy one. Files of thresholds are in checkpoints/thresholds.py.

Behind FastViTHD, every round of merging has a threshold in place of every block.

In every block, tokens of a whole batch compete for the merges: the most similar pairs merge, as
many as `merge` wants on average. The cosine of the best pair that did not merge is the threshold of
the batch. The result is the mean over all batches, weighted by their numbers of images.

`llava-lite thresholds` does this for a folder or a list. torch is imported on first use.
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

    from llava_lite.fastvithd import FastViTHD
    from llava_lite.generation.model import Model
    from llava_lite.reduction import ToMe
    from llava_lite.tome import Merged
    from llava_lite.vision import VisionBlock, VisionTower

DEFAULT_KEEP = 72
DEFAULT_BATCH_SIZE = 8
Tokens = list[tuple["Tensor", "Merged | None"]]


@dataclass(frozen=True)
class Finding:
    """The result of the images so far. sums: for each block, the batches' thresholds times their
    images. images: how many were used; skipped: how many could not be read."""

    sums: tuple[float, ...]
    images: int = 0
    skipped: int = 0

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The mean of each block, in double precision."""
        return tuple(total / self.images for total in self.sums)

    def add(self, thresholds: Sequence[float], images: int, skipped: int) -> "Finding":
        """The result with one more batch."""
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
    """Thresholds, one per block, with which images like these keep on average as many tokens as
    with `merge` (default: 72).

    images: as in `Model.generate`; an unreadable image gives a warning. Mix them: the images of a
    batch compete. Raises ValueError if the tower cannot do `merge`, and ImageError if no image can
    be read."""
    steps = deque(find_by_batches(model, images, merge, batch_size), maxlen=1)
    if not steps or not steps[0].images:
        raise ImageError(f"none of {len(images)} images can be read: thresholds need some")
    return steps[0].thresholds


def find_by_batches(
    model: "Model",
    images: Sequence[Any],
    merge: "ToMe | None" = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    found: Finding | None = None,
    on_error: Callable[[ImageError], None] | None = None,
) -> Iterator[Finding]:
    """`find_thresholds` step by step: yield the result after each batch. found: an earlier step
    over the same images, to resume. on_error: called for each unreadable image."""
    from llava_lite.reduction import ToMe

    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    steps = (merge or ToMe(keep=DEFAULT_KEEP)).steps(model.config.vision)
    counts = [step.r or 0 for step in steps]
    if not counts:
        raise ValueError("nothing merges, so there are no thresholds to find: keep fewer tokens")
    found = found or Finding((0.0,) * len(counts))
    for start in range(found.images + found.skipped, len(images), batch_size):
        batch = images[start : start + batch_size]
        pixel_values = [
            p for image in batch if (p := open_image(model, image, on_error)) is not None
        ]
        thresholds = batch_thresholds(model.llava.vision, pixel_values, counts)
        found = found.add(thresholds, len(pixel_values), len(batch) - len(pixel_values))
        yield found


def open_image(
    model: "Model", image: Any, on_error: Callable[[ImageError], None] | None
) -> "Tensor | None":
    """Pixel values (1, 3, S, S) for the model's tower; None for an unreadable image."""
    try:
        pixel_values = model.prepare(image)
    except ImageError as error:
        if on_error is None:
            warnings.warn(f"{one_line(error)} (left out)", stacklevel=2)
        else:
            on_error(error)
        return None
    return pixel_values.to(model.llava.device, model.llava.vision_dtype)


def batch_thresholds(
    tower: "VisionTower | FastViTHD", pixel_values: Sequence["Tensor"], counts: Sequence[int]
) -> list[float]:
    """The thresholds of one batch of images (1, 3, S, S), one per block or per round. counts: how
    many tokens each merges per image, on average over the batch.

    Images keep different numbers of tokens, so each passes a block alone. This also makes the
    scores exactly equal to those at inference with thresholds."""
    import torch

    from llava_lite.fastvithd import FastViTHD

    if not pixel_values:
        return []
    thresholds = []
    tokens: Tokens
    with torch.inference_mode():
        if isinstance(tower, FastViTHD):
            tokens = [(tower(image).image_features, None) for image in pixel_values]
            for count in counts:
                alike = [(x, x, merged) for x, merged in tokens]
                threshold, tokens = merge_alike(alike, count, class_token=False)
                thresholds.append(threshold)
            return thresholds
        tokens = [(tower.pre_norm(tower.embed(image)), None) for image in pixel_values]
        for block, count in zip(tower.blocks, counts, strict=True):
            threshold, tokens = merge_batch(cast("VisionBlock", block), tokens, count)
            thresholds.append(threshold)
    return thresholds


def merge_batch(block: "VisionBlock", tokens: Tokens, count: int) -> tuple[float, Tokens]:
    """Run one block on the tokens (1, T, C) of each image. Returns its threshold and the tokens."""
    attended = []
    for x, merged in tokens:
        mixed, keys = block.attn(block.norm1(x), merged)
        attended.append((x + mixed, keys.mean(1), merged))
    threshold, after = merge_alike(attended, count)
    return threshold, [(x + block.mlp(block.norm2(x)), merged) for x, merged in after]


def merge_alike(
    images: Sequence[tuple["Tensor", "Tensor", "Merged | None"]],
    count: int,
    class_token: bool = True,
) -> tuple[float, Tokens]:
    """Merge the tokens (1, T, C) of each image, `count` on average, by the similarity of its metric
    (1, T, D). Returns the threshold and the tokens."""
    from llava_lite.tome import MergeStep, match_tokens, merge_tokens

    step, threshold = MergeStep(r=0), NEVER
    if count:
        metrics = [metric for _, metric, _ in images if metric.shape[1] > 1]
        scores = [match_tokens(metric, class_token)[0][0, class_token:] for metric in metrics]
        threshold = competing_threshold(scores, count) if scores else 0.0
        step = MergeStep(threshold=threshold)
    return threshold, [merge_tokens(*image, step, class_token) for image in images]


def competing_threshold(scores: Sequence["Tensor"], count: int) -> float:
    """The best score that does not merge, if the best `count` scores per image merge over the whole
    batch. scores: the cosines (A,) of each image's sources.

    At least 0, and 0 if every source merges: opposite tokens never merge."""
    import torch

    ranked = torch.cat(list(scores)).sort(descending=True).values
    rank = count * len(scores)
    return max(ranked[rank].item(), 0.0) if rank < len(ranked) else 0.0
