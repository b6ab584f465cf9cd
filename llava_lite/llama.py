"""The Llama-2 decoder (arXiv 2307.09288): RMSNorm, SwiGLU, RoPE, causal attention, no biases.

Shapes: R packed rows of all items (attention.py), C width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.attention import HybridAttention, KVCache, LayerCache
from llava_lite.config import TextConfig
from llava_lite.rope import rope_cos_sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 at least, cast back BEFORE the weight, as Llama does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


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
    """Attention and MLP, each behind a norm and a residual."""

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
        lengths: Sequence[int],
        past_key_values: Sequence[LayerCache | None],
        masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[LayerCache]]:
        mixed, caches = self.attn(self.input_norm(x), cos, sin, lengths, past_key_values, masks)
        x = x + mixed
        return x + self.mlp(self.post_attn_norm(x)), caches


class LlamaDecoder(nn.Module):
    """Embeddings in, normed hidden states and the grown caches out; `lm_head` is applied by the
    caller, to the rows it wants."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_embeds: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        past_key_values: Sequence[KVCache | None],
        masks: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, list[KVCache]]:
        """Run all layers over the packed rows of a batch.

        input_embeds (R, C), position_ids (R,), `lengths` rows per item (they add up to R), per item
        its cache (None at prefill) and, rarely, its own attention mask (None = causal).
        Returns hidden states (R, C) and the new cache of each item."""
        masks = masks or [None] * len(lengths)
        cos, sin = rope_cos_sin(position_ids, self.head_dim, self.rope_theta)  # (R, D)
        x, grown = input_embeds, []
        for layer_idx, layer in enumerate(self.layers):
            past = [cache[layer_idx] if cache is not None else None for cache in past_key_values]
            x, caches = layer(x, cos, sin, lengths, past, masks)
            grown.append(caches)
        return self.norm(x), [tuple(cache) for cache in zip(*grown, strict=True)]
