"""The vision tower of FastVLM: FastViTHD (Vasu et al., arXiv 2412.13303, section 3.2).

Convolutions shrink the image 64 times along each side. An image of 1024 px has only 256 tokens:

    stem        three convolutions, stride 4                                    (B, 96, S/4, S/4)
    stages 1-3  RepMixer blocks: convolutions mix places                     (B, 384, S/16, S/16)
    stages 4-5  attention blocks: every place sees all others               (B, 1536, S/64, S/64)
    expand      one more convolution, and a gate for each channel           (B, 3072, S/64, S/64)

Stages 2 to 5 begin with two convolutions that halve the side. A convolution in front of stages 4
and 5 is all that tells positions apart. In training these convolutions have branches and norms,
which are folded into one kernel (checkpoints/reparameterize.py).

All layers need the whole grid, so tokens merge after the last one, in rounds (tome.py).

Shapes: B images, S pixels of a side, C width, h x w the grid of a stage, T = h w tokens, H heads, D
head dim, U tokens after merging.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.config import FASTVITHD_HEAD_DIM as HEAD_DIM
from llava_lite.config import FastViTHDConfig
from llava_lite.tome import Merged, MergeStep, merge_tokens
from llava_lite.vision import VisionOutput

FFN_RATIO, GATE_RATIO = 4, 16
ATTENTION_STAGES = (3, 4)  # counted from 0; the others have RepMixer blocks
EPS = 1e-5


class ConvGELU(nn.Conv2d):
    """A convolution and exact (erf) GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


def depthwise(width: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    """(B, C, h, w) -> (B, C, h, w), each channel with its own kernel."""
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=bias)


class BatchNorm(nn.Module):
    """Normalize each channel by the statistics of the training data, which never change."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean = nn.Buffer(torch.zeros(width))
        self.running_var = nn.Buffer(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


class GridAttention(nn.Module):
    """Full self-attention between all places, without positions, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(rearrange(x, "b c h w -> b (h w) c"))
        q, k, v = rearrange(self.qkv(tokens), "b t (i h d) -> i b h t d", i=3, d=HEAD_DIM)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        mixed = self.o_proj(rearrange(mixed, "b h t d -> b t (h d)"))
        return x + self.scale * rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class ConvFFN(nn.Module):
    """The MLP of a transformer behind a depthwise convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = depthwise(width, 7, bias=False)
        self.norm = BatchNorm(width)
        self.fc1 = ConvGELU(width, FFN_RATIO * width, 1)
        self.fc2 = nn.Conv2d(FFN_RATIO * width, width, 1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(self.fc1(self.norm(self.conv(x))))


class Block(nn.Module):
    """Mix places, then channels."""

    def __init__(self, width: int, attends: bool) -> None:
        super().__init__()
        # RepMixer is one small convolution: its kernel contains the skip connection.
        self.mixer = GridAttention(width) if attends else depthwise(width, 3)
        self.ffn = ConvFFN(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(x))


class Stage(nn.Module):
    """The blocks of one width, behind the convolutions that lead to this width."""

    def __init__(self, config: FastViTHDConfig, index: int) -> None:
        super().__init__()
        width, attends = config.widths[index], index in ATTENTION_STAGES
        self.down: nn.Module = nn.Identity()
        if index:
            before = config.widths[index - 1]
            large = ConvGELU(before, width, 7, stride=2, padding=3, groups=before)
            self.down = nn.Sequential(large, ConvGELU(width, width, 1))
        self.position = depthwise(width, 7) if attends else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, attends) for _ in range(config.depths[index])))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/2, w/2); the first stage keeps the shape."""
        return self.blocks(self.position(self.down(x)))


class Gate(nn.Module):
    """Weigh each channel by the means of all channels (squeeze and excite, arXiv 1709.01507)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // GATE_RATIO, 1)
        self.expand = nn.Conv2d(width // GATE_RATIO, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.expand(self.reduce(means).relu()).sigmoid()


class FastViTHD(nn.Module):
    """Pixels in, image features for the projector out."""

    def __init__(self, config: FastViTHDConfig) -> None:
        super().__init__()
        first, last = config.widths[0], config.widths[-1]
        self.stem = nn.Sequential(
            ConvGELU(3, first, 3, stride=2, padding=1),
            ConvGELU(first, first, 3, stride=2, padding=1, groups=first),
            ConvGELU(first, first, 1),
        )
        self.stages = nn.Sequential(*(Stage(config, index) for index in range(len(config.depths))))
        conv = nn.Conv2d(last, 2 * last, 3, padding=1, groups=last)
        self.expand = nn.Sequential(conv, Gate(2 * last), nn.GELU())

    def forward(
        self, pixel_values: Tensor, steps: Sequence[MergeStep] | None = None
    ) -> VisionOutput:
        """pixel_values (B, 3, S, S), and one merge step for each round (None: no merging)."""
        x = self.expand(self.stages(self.stem(pixel_values)))  # (B, C, h, w)
        return merge_rounds(rearrange(x, "b c h w -> b (h w) c"), steps or ())


def merge_rounds(x: Tensor, steps: Sequence[MergeStep]) -> VisionOutput:
    """Merge the tokens x (B, T, C) by their similarity, once for each step: (B, U, C)."""
    merged: Merged | None = None
    counts = []
    for step in steps:
        x, merged = merge_tokens(x, x, merged, step, class_token=False)
        counts.append(x.shape[1])
    return VisionOutput(x, None if merged is None else merged.mapping, tuple(counts))
