"""The vision tower of FastVLM: FastViTHD (Vasu et al., arXiv 2412.13303, section 3.2).

Convolutions shrink the image 64 times along each side, so an image of 1024 px has 256 tokens, not
the 5329 of a plain transformer with patches of 14 px:

    stem        three convolutions, stride 4                                   (B, 96, S/4, S/4)
    stages 1-3  RepMixer blocks: convolutions mix places                     (B, 384, S/16, S/16)
    stages 4-5  attention blocks: every place sees every other one          (B, 1536, S/64, S/64)
    expand      one more convolution, weighted by channel                   (B, 3072, S/64, S/64)

Stages 2 to 5 begin with a convolution of stride 2. One positional convolution in front of each
attention stage is all that tells places apart. In training, each of these convolutions is a sum of
branches with norms. They are folded into one (checkpoints/reparameterize.py).

Every layer needs the whole grid. So tokens merge behind the tower, in rounds (tome.py), or the
image is made smaller.

Shapes: B images, S pixels of a side, C width, h x w the grid of a stage, H heads, D head dim, T =
h w tokens, U tokens after merging.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.config import FASTVITHD_HEAD_DIM, FastViTHDConfig
from llava_lite.tome import Merged, MergeStep, merge_tokens
from llava_lite.vision import VisionOutput

FFN_RATIO = 4
GATE_RATIO = 16
ATTENTION_STAGE = 3  # the first stage with attention, counted from 0
EPS = 1e-5


def depthwise(width: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    """A convolution (B, C, h, w) -> (B, C, h, w) of each channel by its own kernel."""
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=bias)


class Stem(nn.Module):
    """Three convolutions with GELU: a quarter of the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, S/4, S/4)"""
        return F.gelu(self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Downsample(nn.Module):
    """Half of the side, more channels: a large depthwise convolution, then one by place."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 7, stride=2, padding=3, groups=width_in)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/2, w/2)"""
        return F.gelu(self.mix(F.gelu(self.conv(x))))


class BatchNorm(nn.Module):
    """Normalize each channel by the statistics of the training data."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


class ConvFFN(nn.Module):
    """A transformer's MLP behind a depthwise convolution. Its norm stands between the two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = depthwise(width, 7, bias=False)
        self.norm = BatchNorm(width)
        self.fc1 = nn.Conv2d(width, FFN_RATIO * width, 1)
        self.fc2 = nn.Conv2d(FFN_RATIO * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(self.conv(x)))))


class LayerScale(nn.Module):
    """A learned weight for each channel of a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class RepMixerBlock(nn.Module):
    """Mix places with a small convolution, then channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = depthwise(width, 3)
        self.ffn = ConvFFN(width)
        self.ffn_scale = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)  # the kernel contains the skip connection
        return x + self.ffn_scale(self.ffn(x))


class GridAttention(nn.Module):
    """Full self-attention between all places, without positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        q, k, v = rearrange(self.qkv(x), "b t (i h d) -> i b h t d", i=3, d=FASTVITHD_HEAD_DIM)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        return self.o_proj(rearrange(mixed, "b h t d -> b t (h d)"))


class AttentionBlock(nn.Module):
    """Mix places with attention, then channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.attn = GridAttention(width)
        self.attn_scale = LayerScale(width)
        self.ffn = ConvFFN(width)
        self.ffn_scale = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c h w -> b (h w) c")
        mixed = rearrange(
            self.attn(self.norm(tokens)), "b (h w) c -> b c h w", h=x.shape[2], w=x.shape[3]
        )
        x = x + self.attn_scale(mixed)
        return x + self.ffn_scale(self.ffn(x))


class Stage(nn.Module):
    """Blocks of one width, behind the convolutions that lead to them."""

    def __init__(self, config: FastViTHDConfig, index: int) -> None:
        super().__init__()
        width, attends = config.widths[index], index >= ATTENTION_STAGE
        block = AttentionBlock if attends else RepMixerBlock
        self.down = Downsample(config.widths[index - 1], width) if index else nn.Identity()
        self.position = depthwise(width, 7) if attends else nn.Identity()
        self.blocks = nn.Sequential(*(block(width) for _ in range(config.depths[index])))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/2, w/2); the first stage keeps the shape."""
        return self.blocks(self.position(self.down(x)))


class Gate(nn.Module):
    """Weigh the channels by their means over the whole grid (squeeze and excite)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // GATE_RATIO, 1)
        self.expand = nn.Conv2d(width // GATE_RATIO, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.expand(self.reduce(means).relu()).sigmoid()


class Expand(nn.Module):
    """Twice the channels: the features of the projector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.gate = Gate(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 2 C, h, w)"""
        return F.gelu(self.gate(self.conv(x)))


class FastViTHD(nn.Module):
    """Pixels in, image features for the projector out."""

    def __init__(self, config: FastViTHDConfig) -> None:
        super().__init__()
        self.stem = Stem(config.widths[0])
        self.stages = nn.Sequential(*(Stage(config, index) for index in range(len(config.depths))))
        self.expand = Expand(config.widths[-1])

    def forward(
        self, pixel_values: Tensor, steps: Sequence[MergeStep] | None = None
    ) -> VisionOutput:
        """pixel_values (B, 3, S, S), and one merge step per round (None: no merging)."""
        x = self.expand(self.stages(self.stem(pixel_values)))
        return merge_rounds(rearrange(x, "b c h w -> b (h w) c"), steps or ())


def merge_rounds(x: Tensor, steps: Sequence[MergeStep]) -> VisionOutput:
    """Merge the tokens x (B, T, C) by their own similarity, once per step: (B, U, C)."""
    merged: Merged | None = None
    counts = []
    for step in steps:
        x, merged = merge_tokens(x, x, merged, step, class_token=False)
        counts.append(x.shape[1])
    return VisionOutput(x, None if merged is None else merged.mapping, tuple(counts))
