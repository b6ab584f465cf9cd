"""DyMU's names, and a slow attention for its thresholds."""

import torch
from torch import Tensor
from torch.nn import functional as F


def named(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def slow_attention(
    part: dict[str, Tensor], x: Tensor, size: list[float] | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """x (T, C) -> what attention adds to it, and the keys' mean over heads (T, D)."""
    y = F.layer_norm(x, x.shape[-1:], *named(part, "norm1"))
    q, k, v = (
        F.linear(y, *named(part, f"attn.{kind}_proj")).chunk(num_heads, -1) for kind in "qkv"
    )
    bias = torch.tensor(size or [1.0] * len(x), dtype=x.dtype).log()
    heads = [
        torch.softmax(a @ b.T / b.shape[1] ** 0.5 + bias, -1) @ c
        for a, b, c in zip(q, k, v, strict=True)
    ]
    return F.linear(torch.cat(heads, -1), *named(part, "attn.o_proj")), torch.stack(k).mean(0)
