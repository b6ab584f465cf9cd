"""The vision tower: CLIP ViT-L/14 at 336 px (Radford et al., arXiv 2103.00020).

LLaVA-1.5 reads the hidden states after 23 of the 24 blocks and drops the class token. So the last
block, the final norm and CLIP's own projection are not built.

Every block takes a merge step (tome.py), applied between its attention and its MLP. Without a step
(None) the block is plain CLIP.

Shapes: B images, P patches (24 x 24 = 576, row by row), T tokens with the class token at row 0
(P + 1 before the first merge), U = T - 1 image tokens, H heads, D head dim, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.config import VisionConfig
from llava_lite.tome import Merged, MergeStep, merge_tokens


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    # OpenAI trained CLIP with this form. Exact GELU gives plausible but worse features.
    return x * torch.sigmoid(1.702 * x)


class VisionMLP(nn.Module):
    """Two linear layers with QuickGELU in between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


KEY_BLOCK = 32  # fused kernels are faster if the number of keys is a multiple of this


def attend(q: Tensor, k: Tensor, v: Tensor, merged: Merged | None) -> Tensor:
    """Fused attention, q, k, v (B, H, T, D) -> (B, H, T, D). A token of s patches counts s times
    (None: every token is one patch)."""
    if merged is None:
        return F.scaled_dot_product_attention(q, k, v)
    padding = -k.shape[2] % KEY_BLOCK
    k, v = F.pad(k, (0, 0, 0, padding)), F.pad(v, (0, 0, 0, padding))
    bias = F.pad(merged.log_size(q.dtype), (0, padding), value=-torch.inf)  # hides the padding
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class VisionAttention(nn.Module):
    """Full self-attention without a mask and without positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, merged: Merged | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> mixed (B, T, C), and the keys (B, H, T, D), by which tokens merge."""
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(q, k, v, merged)
        return self.o_proj(rearrange(mixed, "b h t d -> b t (h d)")), k


class VisionBlock(nn.Module):
    """Pre-norm transformer block, with token merging between attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(
        self, x: Tensor, merged: Merged | None, step: MergeStep | None
    ) -> tuple[Tensor, Merged | None]:
        """x (B, T, C) -> (B, T', C), and the merges so far."""
        mixed, keys = self.attn(self.norm1(x), merged)
        x = x + mixed
        if step is not None:
            # The keys are already there, so similarity costs no extra projection.
            x, merged = merge_tokens(x, keys.mean(1), merged, step)
        return x + self.mlp(self.norm2(x)), merged


@dataclass(frozen=True)
class VisionOutput:
    """image_features (B, U, C), one vector per token; mapping (B, P), the token of each patch
    (None: patch i is token i); tokens_per_block, U after each block."""

    image_features: Tensor
    mapping: Tensor | None
    tokens_per_block: tuple[int, ...]


class VisionTower(nn.Module):
    """CLIP without its last block: pixels in, image features for the projector out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embed = nn.Parameter(torch.zeros(width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(config.num_patches + 1, width))
        self.pre_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_blocks))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, T, C): patches, class token in front, positions added."""
        patches = rearrange(self.patch_embed(pixel_values), "b c h w -> b (h w) c")
        class_token = self.class_embed.expand(len(patches), 1, -1)
        return torch.cat((class_token, patches), dim=1) + self.pos_embed

    def forward(
        self, pixel_values: Tensor, steps: Sequence[MergeStep | None] | None = None
    ) -> VisionOutput:
        """pixel_values (B, 3, S, S), and one merge step per block (None: no merging)."""
        x, merged = self.pre_norm(self.embed(pixel_values)), None  # (B, T, C)
        counts = []
        for block, step in zip(self.blocks, steps or [None] * len(self.blocks), strict=True):
            x, merged = block(x, merged, step)
            counts.append(x.shape[1] - 1)
        # Drop the class token, which is patch 0 and token 0.
        mapping = None if merged is None else merged.mapping[:, 1:] - 1
        return VisionOutput(x[:, 1:], mapping, tuple(counts))
