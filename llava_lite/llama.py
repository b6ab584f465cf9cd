"""The Llama-2 decoder (arXiv 2307.09288): RMSNorm, SwiGLU, RoPE, causal attention, no biases. Qwen2
(arXiv 2407.10671) differs in facts of its `TextConfig` only.

In front of some layers the decoder may prune image rows (fastv.py).

Shapes: R packed rows of all items (attention.py), S packed keys, C width, V vocabulary; of one
item: U rows, K new keys, n cached and new keys, H heads, G of keys, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.attention import HybridAttention
from llava_lite.cache import KVCache, LayerCache, pad_sizes
from llava_lite.config import TextConfig
from llava_lite.fastv import ImageRows, Pruning, choose, fold_tokens, last_row, row_scores
from llava_lite.layout import Layout, PackedLayout, pack
from llava_lite.reduction import FastV
from llava_lite.rope import rope_cos_sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # The square of a 16-bit number overflows or loses digits.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight  # cast back before the weight, as Llama does


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, both pre-norm and with a residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = HybridAttention(config)
        self.post_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout,
        past_key_values: Sequence[tuple[Tensor, Tensor] | None],
        masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[LayerCache], list[Tensor]]:
        """As `HybridAttention.forward`, with norms, residuals and MLP."""
        mixed, caches, queries = self.attn(
            self.input_norm(x), cos, sin, layout, past_key_values, masks
        )
        x = x + mixed
        return x + self.mlp(self.post_attn_norm(x)), caches, queries


@dataclass(frozen=True)
class DecoderOutput:
    """hidden_states (R', C), normed, of the rows that are left, and their layout; per item the
    longer cache, and what each stage has pruned."""

    hidden_states: Tensor
    layout: PackedLayout
    past_key_values: list[KVCache]
    prunings: list[tuple[Pruning, ...]]


# Hidden states (R', C); per item the layout, and all stages so far.
Pruned = tuple[Tensor, list[Layout], list[tuple[Pruning, ...]]]


class LlamaDecoder(nn.Module):
    """Embeddings in, normed hidden states and longer caches out. The caller applies `lm_head`, so
    the logits of most rows are never computed."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = config.tie_embeddings
        self.tie_head()

    def tie_head(self) -> None:
        """Let a tied head read the embedding's tensor. Call it again after tensors are replaced."""
        if self.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_embeds: Tensor,
        layouts: Sequence[Layout],
        past_key_values: Sequence[KVCache | None],
        fastv: Sequence[FastV | None] | None = None,
        masks: Sequence[Tensor | None] | None = None,
    ) -> DecoderOutput:
        """Run all layers over the packed rows of a batch.

        input_embeds (R, C); per item its layout, its cache (None at prefill), its FastV (None: no
        pruning) and an attention mask (n, keys) (None: causal). Masks and pruning exclude each
        other."""
        x, layouts = input_embeds, list(layouts)
        queries: list[Tensor] = []
        nothing = [None] * len(layouts)
        masks = masks or nothing
        fastv = [
            wish if layout.image_spans else None  # a decode step has no image rows to prune
            for wish, layout in zip(fastv or nothing, layouts, strict=True)
        ]
        prunings: list[tuple[Pruning, ...]] = [()] * len(layouts)
        packed = pack(layouts)
        cos, sin = self.rotate(packed)  # (S, D)
        grown: list[list[LayerCache]] = []
        for layer_idx, layer in enumerate(self.layers):
            if any(wish is not None and layer_idx in wish.amounts for wish in fastv):
                x, layouts, prunings = self.prune(
                    layer_idx, x, layouts, prunings, queries, grown[-1], fastv
                )
                packed = pack(layouts)
                cos, sin = self.rotate(packed)
            past = [cache[layer_idx] if cache is not None else None for cache in past_key_values]
            x, caches, queries = layer(x, cos, sin, packed, past, masks)
            grown.append(caches)
        grown_caches = [tuple(cache) for cache in zip(*grown, strict=True)]
        return DecoderOutput(self.norm(x), packed, grown_caches, prunings)

    def rotate(self, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """cos, sin (S, D) of every key, the means over its positions. float32."""
        cos, sin = rope_cos_sin(layout.position_ids, self.head_dim, self.rope_theta)
        return layout.fold(cos), layout.fold(sin)

    def prune(
        self,
        layer_idx: int,
        x: Tensor,
        layouts: Sequence[Layout],
        prunings: Sequence[tuple[Pruning, ...]],
        queries: Sequence[Tensor],
        caches: Sequence[LayerCache],
        fastv: Sequence[FastV | None],
    ) -> Pruned:
        """Prune image rows in front of a layer, from every item whose FastV has a stage there.

        x (R, C); per item its layout, the earlier stages, and the last query (1, H, 1, D) and cache
        of the layer before. Returns x (R', C), and the layouts and stages with this one."""
        left, kept_layouts, stages = [], [], []
        rows_of_items = x.split([layout.num_rows for layout in layouts])
        for rows, layout, done, query, cache, wish in zip(
            rows_of_items, layouts, prunings, queries, caches, fastv, strict=True
        ):
            if wish is not None:
                tokens = done[-1].image_rows if done else ImageRows.of(layout.image_spans, x.device)
                budgets = wish.budgets(tokens.counts, layer_idx, tokens.num_images)
                if budgets is not None:
                    scores = self.fastv_scores(query, cache, layout, wish.score_of_merged)
                    pruning = choose(scores, tokens, budgets, layer_idx, wish.rest == "fold")
                    if wish.rest == "fold":
                        rows, layout, pruning = fold_tokens(rows, layout, tokens, pruning)
                    else:
                        kept_indices = pruning.kept_indices
                        rows, layout = rows[kept_indices], layout.keep(kept_indices)
                    done = (*done, pruning)
            left.append(rows)
            kept_layouts.append(layout)
            stages.append(done)
        return torch.cat(left), kept_layouts, stages

    def fastv_scores(self, query: Tensor, cache: LayerCache, layout: Layout, score: str) -> Tensor:
        """The score of every row of one item (U,): the attention of the last query (1, H, 1, D)
        to the keys of its positions. `score` is "sum" or "mean", see `FastV`."""
        keys, log_sizes = cache[0], cache.log_sizes  # (1, G, n, D)
        if log_sizes is not None:
            log_sizes = pad_sizes(log_sizes, keys.shape[2])
        # Cached keys before this item's new rows are never pruned.
        probs = last_row(query, keys, log_sizes)[-layout.num_keys :]
        return row_scores(probs, layout, score)
