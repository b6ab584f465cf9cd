"""The decoder's attention over packed rows, with virtual token unmerging and a tuple KV cache.

A batch is its items' rows, one item after the other, with no padding between them: projections run
on all rows at once, attention on each item by itself. So items of any length share a batch, and
nobody has to mask anybody.

Where image tokens have merged (layout.py), a row may stand at several positions. Attention then
runs over positions, all the rest over rows (virtual token unmerging, DyMU, arXiv 2504.17040):

    q, k, v = projections          R rows
    unmerge                        S positions: every patch shows the row it is part of
    rotate, attend, cache          each position by its own angle, in the one fused kernel
    remerge                        R rows: the mean over the positions of each
    o_proj                         R rows

With no row at two positions, both steps are the identity and are not done at all.

The cache of one layer is a plain pair (k, v), each (1, H, length, D); k is stored rotated, so later
tokens need not know any earlier position. Nothing is kept on the module: caches go in and come out,
and after pruning (fastv.py) their lengths differ from layer to layer. Values could be kept once per
row instead of once per position: a `vtu` prompt of the 7B model, 640 positions of 136 rows, would
then take 194 MiB in 16 bit instead of 320, at 0.9 to 1.4 times the time of this attention. It would
leave the fused kernel in every decode step; who wants a small cache prunes, or takes `logical`.

Shapes: R packed rows, S packed positions, n positions of one item, H heads, D head dim, C width.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from llava_lite.cache import LayerCache
from llava_lite.config import TextConfig
from llava_lite.layout import PackedLayout
from llava_lite.rope import apply_rope


class HybridAttention(nn.Module):
    """Multi-head attention with RoPE. One forward serves prefill, chat continuation and decode,
    with image tokens merged, pruned, or neither."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim  # how many heads, the projections know (tensor_parallel.py)
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout,
        past_key_values: Sequence[tuple[Tensor, Tensor] | None],
        masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[LayerCache], list[Tensor]]:
        """Attend within each item.

        x (R, C) packed rows, cos and sin (S, D) of the layout's positions; per item this layer's
        cache so far, and a mask (n, keys), bool (True = may attend) or additive (None = causal).
        Returns (R, C), and of each item its new cache and the query (1, H, 1, D) of its last
        position, by which FastV asks what that one looked at."""
        q, k, v = (
            layout.unmerge(rearrange(proj(x), "r (h d) -> r h d", d=self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (S, H, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mixed, caches, queries = [], [], []
        for past, mask, new in zip(
            past_key_values, masks, split_items((q, k, v), layout.num_positions), strict=True
        ):
            item_q, item_k, item_v = new  # (1, H, n, D) each
            seen, cache = LayerCache.wrap(past, item_k).attend(item_q, item_k, item_v, mask)
            mixed.append(seen)
            caches.append(cache)
            queries.append(item_q[:, :, -1:])
        x = torch.cat([rearrange(item, "1 h n d -> n (h d)") for item in mixed])  # (S, C)
        return self.o_proj(layout.remerge(x)), caches, queries


def split_items(packed: Sequence[Tensor], lengths: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Packed (S, H, D) tensors -> for each item its (1, H, n, D) slice of every tensor."""
    pieces = [tensor.split(list(lengths)) for tensor in packed]
    return [
        tuple(rearrange(piece, "n h d -> 1 h n d") for piece in item)
        for item in zip(*pieces, strict=True)
    ]
