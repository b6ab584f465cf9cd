"""FastV (Chen et al., arXiv 2403.06764): prune image tokens in front of decoder layer K.

After a few layers the decoder hardly attends to most image tokens. A token's score is its attention
from the last prompt token in layer K - 1, averaged over heads. (The paper's text averages over all
queries; its code uses this one row.) The row is computed from the query and the cached keys of
layer K - 1, so no layer leaves the fused kernel.

Kept tokens keep their order and their positions. Two things can happen to the rest:

    drop    they are missing from layer K on, in the caches too (the paper)
    fold    each becomes a part of the kept token of its image that is most like it: the positions
            of both belong to the kept token, and the hidden state is their mean, weighted by size

Pruning can go on in front of later layers, in stages. A merged token at several positions
(layout.py) scores the sum over its positions; with folding, the mean.

All functions are pure. Shapes: H heads, G of keys, D head dim, C width, n cached and new keys of an
item, K new keys, U new rows, M image tokens among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_lite.cache import share_keys
from llava_lite.layout import Layout
from llava_lite.tome import average


@dataclass(frozen=True)
class ImageRows:
    """The image tokens of one item: rows (M,), ascending; images (M,), the number of the image of
    each, below num_images; counts, the tokens of each image, or of all images together once a
    shared budget has pruned them: then only the device knows the count of each."""

    rows: Tensor
    images: Tensor
    num_images: int
    counts: tuple[int, ...]

    @staticmethod
    def of(image_spans: Sequence[tuple[int, int]], device: torch.device) -> "ImageRows":
        """The rows (start, stop) of each image."""
        counts = tuple(stop - start for start, stop in image_spans)
        return ImageRows(
            torch.cat([torch.arange(*span, device=device) for span in image_spans]),
            torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)]),
            len(counts),
            counts,
        )


@dataclass(frozen=True)
class Pruning:
    """The result of one stage for one item: layer, the first without the other tokens; scores (M,)
    of the tokens of all images in order; kept (M',), the image tokens that stay; kept_indices
    (U',), the rows that stay, text included. Both ascend. image_rows: the tokens that stay, as rows
    of the next layer. folded_into (M,): the kept token that each token is a part of now, None if
    the rest is dropped."""

    layer: int
    scores: Tensor
    kept: Tensor
    kept_indices: Tensor
    image_rows: ImageRows
    folded_into: Tensor | None = None


def last_row(query: Tensor, keys: Tensor, log_sizes: Tensor | None = None) -> Tensor:
    """Attention of the last token: query (1, H, 1, D) and keys (1, G, n, D), both rotated ->
    probabilities (n,), the mean over H heads. log_sizes (n,) of the keys (None: each counts once).
    Computes in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = share_keys(query.to(wide), keys) @ keys.to(wide).mT * query.shape[-1] ** -0.5
    if log_sizes is not None:
        scores = scores + log_sizes
    return scores.softmax(-1).flatten(0, 2).mean(0)  # (1, G, H / G, n) -> (n,)


def row_scores(probs: Tensor, layout: Layout, score: str) -> Tensor:
    """Probabilities of keys (K,) -> scores of rows (U,): the "sum" or the "mean" over the positions
    of each row."""
    if layout.mapping_indices is None:
        return probs
    if layout.folded:  # one key has the weight of all positions
        return probs if score == "sum" else probs / layout.row_sizes()
    scores = probs.new_zeros(layout.num_rows)
    return scores.scatter_reduce(0, layout.mapping_indices, probs, score, include_self=False)


def rank_tokens(scores: Tensor, num_kept: int) -> Tensor:
    """The indices of the `num_kept` highest scores (M,), ascending. Of equal scores the first."""
    return scores.argsort(descending=True, stable=True)[:num_kept].sort().values


def choose(
    scores: Tensor,
    image_rows: ImageRows,
    num_kept: Sequence[int],
    layer: int,
    every_image: bool = False,
) -> Pruning:
    """Choose the rows that stay, by the scores of all rows (U,). `num_kept`: one number for each
    image, or a single number for all images together. every_image: the best token of every image
    stays; `num_kept` must leave room for them."""
    candidates = image_rows.rows  # (M,)
    ranked = of_tokens = scores[candidates]
    if every_image:
        ranked = favor_best(of_tokens, image_rows)
    sizes = list(image_rows.counts) if len(num_kept) > 1 else [len(candidates)]
    firsts = accumulate((0, *sizes))
    kept = torch.cat(
        [
            rank_tokens(group, count) + first
            for group, count, first in zip(ranked.split(sizes), num_kept, firsts, strict=False)
        ]
    )
    stays = torch.ones_like(scores, dtype=torch.bool).index_fill(0, candidates, False)
    stays = stays.index_fill(0, candidates[kept], True)
    # A stable sort moves the rows that stay to the front. nonzero() would wait for the device.
    num_rows = len(scores) - len(candidates) + len(kept)
    kept_indices = (~stays).int().argsort(stable=True)[:num_rows]
    new_row = stays.cumsum(0) - 1
    left = ImageRows(
        new_row[candidates[kept]], image_rows.images[kept], image_rows.num_images, tuple(num_kept)
    )
    return Pruning(layer, of_tokens, kept, kept_indices, left)


def favor_best(scores: Tensor, image_rows: ImageRows) -> Tensor:
    """The scores (M,) of image tokens, with the best token of every image above all others."""
    numbers = torch.arange(image_rows.num_images, device=scores.device)
    belongs = image_rows.images == numbers[:, None]  # (images, M)
    best = torch.where(belongs, scores, -torch.inf).argmax(-1)  # of equal scores the first
    return scores.index_fill(0, best, torch.inf)


def match_kept(x: Tensor, image_rows: ImageRows, kept: Tensor) -> Tensor:
    """The kept token of the same image that is most like each image token, by the cosine of the
    hidden states x (M, C): a number in `kept` for each (M,). A kept token is most like itself."""
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    cosines = unit @ unit[kept].mT  # (M, M')
    other = image_rows.images[:, None] != image_rows.images[kept]
    best = cosines.masked_fill(other, -torch.inf).argmax(-1)  # of equal cosines the first
    return kept[best].scatter(0, kept, kept)


def fold_tokens(
    x: Tensor, layout: Layout, image_rows: ImageRows, pruning: Pruning
) -> tuple[Tensor, Layout, Pruning]:
    """Fold the image tokens that do not stay into kept tokens: x (U, C) -> (U', C), the layout of
    the new rows, and the pruning with `folded_into`."""
    rows = image_rows.rows
    folded_into = match_kept(x[rows], image_rows, pruning.kept)
    num_rows = len(pruning.kept_indices)
    takers = torch.arange(len(x), device=x.device).scatter(0, rows, rows[folded_into])
    new_row = torch.empty_like(takers).index_copy_(
        0, pruning.kept_indices, torch.arange(num_rows, device=x.device)
    )[takers]
    mean, _ = average(x[None], layout.row_sizes()[None], new_row[None], num_rows)
    return mean[0], layout.fold(new_row, num_rows), replace(pruning, folded_into=folded_into)
