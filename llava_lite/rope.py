"""Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4), half-split convention.

Channel i of the first half and channel i of the second half form a pair. A pair turns by the angle
position * theta^(-2i/D). Positions are explicit, so pruned and merged tokens keep their rotation.

Shapes: N positions, H heads, D head dim.
"""

import torch
from torch import Tensor


def rope_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Position ids (N,) -> cos, sin (N, D), float32 for every dtype of the model."""
    # At position 4095 an angle in 16 bit is off by more than a radian.
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = 1.0 / theta ** (pairs / head_dim)  # (D/2,)
    angles = position_ids.float()[:, None] * inv_freq  # (N, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (N, D)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """[x1, x2] -> [-x2, x1], a quarter turn of every pair: (..., D) -> (..., D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (N, H, D) by cos, sin (N, D). Computes in float32 at least; the result
    has the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rotated = wide * cos[:, None] + rotate_half(wide) * sin[:, None]
    return rotated.to(x.dtype)
