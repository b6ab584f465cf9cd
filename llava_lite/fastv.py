"""FastV (Chen et al., arXiv 2403.06764): prune image tokens once, in front of decoder layer K.

After a few layers the decoder hardly attends to most image tokens. A token's score is its attention
from the last prompt token in layer K - 1, averaged over heads. (The paper's text averages over all
queries; its code uses this one row.) The row is computed from the query and the cached keys of
layer K - 1, so no layer leaves the fused kernel.

Kept tokens keep their order and their positions. Dropped tokens are missing from layer K on, in the
caches too. A merged token at several positions (layout.py) scores the sum over its positions.

All functions are pure. Shapes: H heads, D head dim, n cached and new positions of an item, N new
positions, U new rows, M image tokens among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pruning:
    """The result for one item: scores (M,) of the tokens of all images in order; kept (M',), the
    image tokens that stay; kept_indices (U',), the rows that stay, text included. Both ascend."""

    scores: Tensor
    kept: Tensor
    kept_indices: Tensor


def last_row(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last token: query (1, H, 1, D) and keys (1, H, n, D), both rotated ->
    probabilities (n,), the mean over heads. Computes in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ keys.to(wide).mT * query.shape[-1] ** -0.5  # (1, H, 1, n)
    return scores.softmax(-1).mean(1).flatten()


def row_scores(probs: Tensor, mapping_indices: Tensor | None, num_rows: int, score: str) -> Tensor:
    """Probabilities of positions (N,) -> scores of rows (U,): the "sum" or the "mean" over the
    positions of each row."""
    if mapping_indices is None:
        return probs
    scores = probs.new_zeros(num_rows)
    return scores.scatter_reduce(0, mapping_indices, probs, score, include_self=False)


def rank_tokens(scores: Tensor, num_kept: int) -> Tensor:
    """The indices of the `num_kept` highest scores (M,), ascending. Of equal scores the first."""
    return scores.argsort(descending=True, stable=True)[:num_kept].sort().values


def choose(
    scores: Tensor, image_spans: Sequence[tuple[int, int]], num_kept: Sequence[int]
) -> Pruning:
    """Choose the rows that stay, by the scores of all rows (U,). `num_kept`: one number for each
    image, or a single number for all images together."""
    sizes = [stop - start for start, stop in image_spans]
    image_rows = [torch.arange(*span, device=scores.device) for span in image_spans]
    candidates = torch.cat(image_rows)  # (M,) rows
    groups = scores[candidates].split(sizes if len(num_kept) > 1 else sum(sizes))
    firsts = accumulate((0, *(len(group) for group in groups)))
    kept = torch.cat(
        [
            rank_tokens(group, count) + first
            for group, count, first in zip(groups, num_kept, firsts, strict=False)
        ]
    )
    stays = torch.ones_like(scores, dtype=torch.bool).index_fill(0, candidates, False)
    stays = stays.index_fill(0, candidates[kept], True)
    # A stable sort moves the rows that stay to the front. nonzero() would wait for the device.
    num_rows = len(scores) - len(candidates) + len(kept)
    kept_indices = (~stays).int().argsort(stable=True)[:num_rows]
    return Pruning(scores[candidates], kept, kept_indices)
