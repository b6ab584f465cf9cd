"""From any image source to pixel values, bit-exact with the official preprocessing.

Bad input ends in an ImageError that names the source. PIL does the decoding and the resizing; its
global settings are never touched.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_lite.inputs.images import _HEX_DIGITS, to_rgb

# 255 * mean, truncated as the official code does, not rounded.
BACKGROUND = (122, 116, 104)


MEAN = (0.48145466, 0.4578275, 0.40821073)


STD = (0.26862954, 0.26130258, 0.27577711)

# Beyond this side a padded canvas takes more than 800 MB; such strips are resized before padding.
_MAX_CANVAS_SIDE = 16_384


_HEX_DIGITS[np.frombuffer(b"0123456789abcdefABCDEF", np.uint8)] = (*range(16), *range(10, 16))


# ---- pixel values ------------------------------------------------------------------------------


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """The image centred on a square canvas of its longer side; an odd rest goes right or below."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def preprocess(image: Image.Image, size: int = 336, pad: bool = True) -> Tensor:
    """Pixel values (1, 3, size, size) in float32 of an image in any mode.

    `pad=True` is LLaVA's own preprocessing (whole image on a square), `pad=False` that of llava-hf
    (short edge to `size`, centre crop). Bit-exact with both, except for strips that would need a
    canvas with a side of more than 16384 pixels: they take an approximation of bounded memory,
    padded after the resize, or cropped before it.
    """
    square = to_square(image, size, pad)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255  # (3, size, size)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((pixels - mean) / std)[None].contiguous()


def to_square(
    image: Image.Image, size: int = 336, pad: bool = True, max_canvas_side: int = _MAX_CANVAS_SIDE
) -> Image.Image:
    """The RGB picture (size, size) that the pixel values of `preprocess` are made of. What would
    need a larger canvas to pad is padded after the resize."""
    image = to_rgb(image) if image.mode != "RGB" else image
    if pad:
        return _resize_padded(image, size, max_canvas_side)
    return _resize_cropped(image, size)


def _resize_padded(image: Image.Image, size: int, max_canvas_side: int) -> Image.Image:
    side = max(image.size)
    if side > max_canvas_side and image.size[0] != image.size[1]:
        width, height = (max(1, round(edge * size / side)) for edge in image.size)
        return pad_to_square(image.resize((width, height), Image.Resampling.BICUBIC))
    return pad_to_square(image).resize((size, size), Image.Resampling.BICUBIC)


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
