"""CLIP ViT-L/14 at 336 px (Radford et al., arXiv 2103.00020), the part LLaVA-1.5 looks through.

LLaVA reads the hidden states after 23 of the 24 blocks and drops the class token, so the last
block, the final norm and CLIP's own projection are never built.

Shapes: B images, P patches (24 x 24 = 576, row by row), T = P + 1 tokens with the class token at
row 0, H heads, D head dim, C width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.config import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): OpenAI's CLIP was trained with it; exact GELU quietly degrades it."""
    return x * torch.sigmoid(1.702 * x)


class VisionMLP(nn.Module):
    """Two linear layers with QuickGELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionAttention(nn.Module):
    """Full self-attention: every patch sees every patch, no mask, no positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        return self.o_proj(rearrange(mixed, "b h t d -> b t (h d)"))


class VisionBlock(nn.Module):
    """Pre-norm transformer block. Token merging belongs between its two halves."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """pixel_values -> image_features: one vector per patch, as LLaVA's projector expects them."""

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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, S, S) -> image_features (B, P, C)"""
        x = self.pre_norm(self.embed(pixel_values))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]
