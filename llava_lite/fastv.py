"""FastV (Chen et al., arXiv 2403.06764): after a few layers a decoder hardly looks at most image
tokens, so they are dropped there, once, in front of layer K.

Which ones, the layer before tells: the attention of the prompt's last token, averaged over heads
(the paper's text averages over all queries; its code, and every system derived from it, takes this
one row). One row is all that is computed, from the query and the cached keys that layer K - 1 has
made anyway, so no layer leaves the fused kernel. Those that stay keep their order and their
positions; what is gone is gone for layers K and up, their caches are shorter from the start.

A merged token that fills several positions (layout.py) scores the sum of them: the attention the
model spends on it, and what pruning would take away.

All functions are pure. Shapes: H heads, D head dim, N new positions of an item after any cached
ones, U new rows, M image tokens among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pruning:
    """What was dropped: scores (M,) of the image tokens of all images in order, kept (M',) those
    that stay, ascending, and kept_indices (U',) all rows that stay, text included."""

    scores: Tensor
    kept: Tensor
    kept_indices: Tensor


def last_row(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last token: query (1, H, 1, D), keys (1, H, n, D), both rotated -> (n,)
    probabilities, softmax in float32 at least, mean over heads."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ keys.to(wide).mT * query.shape[-1] ** -0.5  # (1, H, 1, n)
    return scores.softmax(-1).mean(1).flatten()


def row_scores(probs: Tensor, mapping_indices: Tensor | None, num_rows: int, score: str) -> Tensor:
    """Probabilities of positions (N,) -> scores of rows (U,): "sum" or "mean" over the positions of
    each row."""
    if mapping_indices is None:
        return probs
    scores = probs.new_zeros(num_rows)
    return scores.scatter_reduce(0, mapping_indices, probs, score, include_self=False)


def rank_tokens(scores: Tensor, num_kept: int) -> Tensor:
    """The `num_kept` best of scores (M,), ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:num_kept].sort().values


def choose(
    scores: Tensor, image_spans: Sequence[tuple[int, int]], num_kept: Sequence[int]
) -> Pruning:
    """Which rows stay, from the scores of all rows (U,). `num_kept` has one number for each
    image, or a single one for all images together."""
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
    num_rows = len(scores) - len(candidates) + len(kept)
    kept_indices = (~stays).int().argsort(stable=True)[:num_rows]
    return Pruning(scores[candidates], kept, kept_indices)
