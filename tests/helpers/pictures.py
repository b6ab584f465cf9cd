"""Pictures of noise: no two alike, and none of the model's size."""

import torch
from PIL import Image
from torch import Tensor


def noise(seed: int, width: int = 60, height: int = 40) -> Tensor:
    """A picture as a tensor (3, height, width) of bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def picture(seed: int = 0, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(noise(seed, width, height).permute(1, 2, 0).numpy())
