"""From an image to pixel values, bit-exact with the official preprocessing.

load_square    any image source -> the square RGB picture that the model sees
load_pixels    any image source -> pixel values
preprocess     a PIL image -> pixel values
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.inputs.images import load_image, to_rgb

# 255 * MEAN, truncated as in the official code, not rounded.
BACKGROUND = (122, 116, 104)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Colors:
    """How a tower was trained to see colors: pixel values are (x / 255 - mean) / std. background:
    the color around a padded image."""

    background: tuple[int, int, int] = BACKGROUND
    mean: Channels = MEAN
    std: Channels = STD


CLIP = Colors()
FASTVITHD = Colors((0, 0, 0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# A padded canvas with a longer side takes more than 800 MB. Such strips are resized before padding.
_MAX_CANVAS_SIDE = 16_384


def load_square(source: Any, config: LlavaConfig, exif: bool = True) -> Image.Image:
    """The square picture that the model sees of an image. `source`, `exif`: see `load_image`.

    Raises ImageError."""
    image, color = load_image(source, exif=exif), colors_of(config).background
    return to_square(image, config.vision.image_size, config.pad, color=color)


def load_pixels(source: Any, config: LlavaConfig, exif: bool = True) -> Tensor:
    """Pixel values (1, 3, S, S) in float32 of an image. `source`, `exif`: see `load_image`.

    Raises ImageError."""
    return normalize(load_square(source, config, exif), colors_of(config))


def colors_of(config: LlavaConfig) -> Colors:
    """How the tower of a model sees colors."""
    return FASTVITHD if isinstance(config.vision, FastViTHDConfig) else CLIP


def preprocess(
    image: Image.Image, size: int = 336, pad: bool = True, colors: Colors = CLIP
) -> Tensor:
    """Pixel values (1, 3, size, size) in float32 of an image in any mode.

    `pad=True` is the preprocessing of LLaVA: the whole image on a square. `pad=False` is that of
    llava-hf: short edge to `size`, center crop. Both are bit-exact, with one exception. A strip
    that needs a canvas with a side above 16384 pixels is padded after the resize, or cropped before
    it, to bound the memory.
    """
    return normalize(to_square(image, size, pad, color=colors.background), colors)


def normalize(square: Image.Image, colors: Colors = CLIP) -> Tensor:
    """Pixel values (1, 3, S, S) in float32 of an RGB picture (S, S)."""
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255  # (3, S, S)
    mean, std = (torch.tensor(c)[:, None, None] for c in (colors.mean, colors.std))
    return ((pixels - mean) / std)[None].contiguous()


def to_square(
    image: Image.Image,
    size: int = 336,
    pad: bool = True,
    max_canvas_side: int = _MAX_CANVAS_SIDE,
    color: tuple[int, int, int] = BACKGROUND,
) -> Image.Image:
    """The RGB picture (size, size) behind the pixel values of `preprocess`.

    An image that needs a larger canvas than `max_canvas_side` is padded after the resize."""
    image = to_rgb(image) if image.mode != "RGB" else image
    if image.size == (size, size):
        return image  # the evaluation and the server pass squares, made in other threads
    if pad:
        return _resize_padded(image, size, max_canvas_side, color)
    return _resize_cropped(image, size)


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """The image in the center of a square of its longer side. An odd pixel goes right or below."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _resize_padded(
    image: Image.Image, size: int, max_canvas_side: int, color: tuple[int, int, int]
) -> Image.Image:
    side = max(image.size)
    if side > max_canvas_side and image.size[0] != image.size[1]:
        width, height = (max(1, round(edge * size / side)) for edge in image.size)
        return pad_to_square(image.resize((width, height), Image.Resampling.BICUBIC), color)
    return pad_to_square(image, color).resize((size, size), Image.Resampling.BICUBIC)


def _resize_cropped(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long_edge = int(size * long / short)
    if long_edge > _MAX_CANVAS_SIDE:
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    new_size = (long_edge, size) if width >= height else (size, long_edge)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
