"""Weights and pictures of the FastViTHD goldens, which are formulas, and the tower on them."""

import math
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SALT = "dev:"
TINY_DEPTHS, TINY_WIDTHS = (1, 2, 2, 1, 1), (8, 16, 32, 64, 128)


def noise(name: str, count: int) -> NDArray[np.float64]:
    """`count` values in [-1, 1), a hash of the name and the index."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(zlib.crc32((SALT + name).encode()))) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return x / 2**31 - 1


def make_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of a published name."""
    v = noise(name, math.prod(shape))
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_var":
        v = 1 + 0.5 * v
    elif last == "running_mean":
        v = 0.2 * v
    elif name.endswith("token_mixer.layer_scale"):
        v = 0.1 + 0.05 * v
    elif last.startswith("layer_scale"):
        v = 0.5 + 0.25 * v
    elif last == "bias":
        v = 0.1 * v
    elif len(shape) == 1:
        v = 1 + 0.25 * v
    else:
        v = v * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(v.astype(np.float32)).reshape(shape)


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Pixel values (B, 3, h, w) in float32."""
    b, c, y, x = np.ogrid[:batch, :3, :height, :width]
    values = (7 * y + 13 * x * (c + 1) + 31 * (y // 16) * (x // 16) + 101 * b) % 256
    return torch.from_numpy((values / 255).astype(np.float32))


def sample_indices(count: int, samples: int = 512) -> Tensor:
    """The flat indices that the goldens sample of a tensor with `count` elements."""
    return torch.tensor([(k * 2654435761) % count for k in range(samples)])
