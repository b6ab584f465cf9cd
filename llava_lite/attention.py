"""The decoder's attention, with virtual token unmerging and a tuple KV cache.

A batch is packed: the rows of all items are concatenated, without padding. Linear layers run on all
rows at once, attention runs per item. Items may differ in length, and no padding mask is needed.

With merged image tokens, one row may stand at several positions (layout.py). Attention runs over
keys and everything else over rows. With virtual token unmerging (DyMU, arXiv 2504.17040) every
position is a key:

    q, k, v = projections          R rows
    unmerge                        S keys: every patch shows the row of its token
    rotate, attend, cache          each key with its own angle
    remerge                        R rows: the mean over the keys of each row
    o_proj                         R rows

With folded positions a row is one key: cos and sin are means over the positions of the row, and
log_sizes make the key count as often as it has positions (proportional attention, ToMe, arXiv
2210.09461, section 3). If every row stands at one position, all of this is the identity and costs
nothing.

The keys and values may have fewer heads (GQA, arXiv 2305.13245): each serves H / G queries, and the
cache holds G.

The module keeps no state: caches go in and come out. Keys are cached rotated, so later tokens need
no earlier position. After pruning (fastv.py), caches differ in length from layer to layer. For a
smaller cache, prune or use `folded` positions.

Shapes: R packed rows, S packed keys, n keys of one item, H heads, G <= H heads of keys and values,
D head dim, C width.
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
    """Multi-head attention with RoPE. One forward serves prefill, the next turn of a chat, and
    decode; image tokens may be merged, pruned, both or neither."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        # No number of heads: it follows from the width of the projections, which may be a share.
        self.head_dim = config.head_dim
        width, kv_width, bias = config.hidden_size, config.kv_width, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=False)
        # Of attention and the cache (None: that of the rows). Some CPUs attend faster in float32.
        self.cache_dtype: torch.dtype | None = None

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

        x (R, C) packed rows; cos and sin (S, D) of the layout's keys; per item the cache of this
        layer, and a mask (n, keys), bool (True = may attend) or additive (None = causal). Returns
        (R, C), and per item the longer cache and the last query (1, H, 1, D), which FastV needs."""
        dtype = self.cache_dtype or x.dtype
        q, k, v = (
            layout.unmerge(rearrange(proj(x).to(dtype), "r (h d) -> r h d", d=self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (S, H, D), (S, G, D), (S, G, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mixed, caches, queries = [], [], []
        items = split_items((q, k, v), layout.num_keys)  # (1, H or G, n, D) each
        for past, mask, log_sizes, (item_q, item_k, item_v) in zip(
            past_key_values, masks, layout.log_sizes, items, strict=True
        ):
            cache = LayerCache.wrap(past, item_k)
            seen, cache = cache.attend(item_q, item_k, item_v, log_sizes, mask)
            mixed.append(seen)
            caches.append(cache)
            queries.append(item_q[:, :, -1:])
        keys = torch.cat([rearrange(item, "1 h n d -> n (h d)") for item in mixed])  # (S, C)
        return self.o_proj(layout.remerge(keys).to(x.dtype)), caches, queries


def split_items(packed: Sequence[Tensor], lengths: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Split packed (S, heads, D) tensors: for each item, one (1, heads, n, D) of every tensor."""
    pieces = [tensor.split(list(lengths)) for tensor in packed]
    return [
        tuple(rearrange(piece, "n h d -> 1 h n d") for piece in item)
        for item in zip(*pieces, strict=True)
    ]
