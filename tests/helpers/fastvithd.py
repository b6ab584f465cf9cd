"""Weights and pictures of the FastViTHD goldens, which are formulas, and the tower on them."""

import math
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.models import TINY_TEXT, random_llava
from llava_lite.checkpoints.names_fastvithd import NORM, fastvithd_name, published_name
from llava_lite.checkpoints.skeleton import WithoutInit
from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.fastvithd import FastViTHD
from llava_lite.llava import Llava

SALT = "dev:"
TINY = FastViTHDConfig(256, depths=(1, 2, 2, 1, 1), widths=(8, 16, 32, 64, 128))
FASTVLM = LlavaConfig(vision=TINY, text=TINY_TEXT, name="random-fastvlm")


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


Shapes = dict[str, tuple[int, ...]]


def published_shapes(config: FastViTHDConfig) -> Shapes:
    """The published name and the shape of every tensor of a folded tower."""
    state = meta_tower(config).state_dict()
    return {str(published_name(name)): tuple(tensor.shape) for name, tensor in state.items()}


def meta_tower(config: FastViTHDConfig) -> FastViTHD:
    """A tower without memory for its weights."""
    with torch.device("meta"), WithoutInit():
        return FastViTHD(config).eval().requires_grad_(False)


def norm_shapes(name: str, width: int) -> Shapes:
    """The tensors of a norm with fixed statistics."""
    return {f"{name}.{kind}": (width,) for kind in NORM}


def branch_shapes(name: str, kernel: tuple[int, ...]) -> Shapes:
    """The tensors of a convolution without bias, and of its norm."""
    return {f"{name}.conv.weight": kernel, **norm_shapes(f"{name}.bn", kernel[0])}


def training_shapes(folded: Shapes) -> Shapes:
    """The same tower in training form: each folded convolution as its branches."""
    shapes: Shapes = {}
    for name, kernel in folded.items():
        unit, _, kind = name.rpartition(".")
        unit, _, conv = unit.rpartition(".")
        if conv not in ("reparam_conv", "lkb_reparam"):
            shapes[name] = kernel
        elif unit in ("network.6", "network.9"):
            shapes[f"{unit}.pe.{kind}"] = kernel
        elif kind == "weight":
            shapes |= unit_shapes(unit, kernel)
    return shapes


def unit_shapes(unit: str, kernel: tuple[int, ...]) -> Shapes:
    """The branches of one convolution in training form."""
    width, per_group, *_ = kernel
    if unit.endswith(".proj.0"):
        small = (width, per_group, 3, 3)
        origin = branch_shapes(f"{unit}.lkb_origin", kernel)
        return origin | branch_shapes(f"{unit}.small_conv", small)
    if unit.endswith(".token_mixer"):
        norm = norm_shapes(f"{unit}.norm.rbr_skip", width)
        scale = {f"{unit}.layer_scale": (width, 1, 1)}
        return norm | scale | unit_shapes(f"{unit}.mixer", kernel)
    shapes = branch_shapes(f"{unit}.rbr_conv.0", kernel)
    if unit.endswith(".mixer") or unit == "conv_exp":
        shapes |= branch_shapes(f"{unit}.rbr_scale", (width, per_group, 1, 1))
    if unit.endswith((".mixer", ".proj.1")) or unit == "patch_embed.2":
        shapes |= norm_shapes(f"{unit}.rbr_skip", width)
    return shapes


def make_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The goldens' weights, by published names."""
    return {name: make_tensor(name, shape).to(dtype) for name, shape in shapes.items()}


def our_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our tower."""
    return {str(fastvithd_name(name)): tensor for name, tensor in published.items()}


def make_tower(config: FastViTHDConfig, published: Mapping[str, Tensor]) -> FastViTHD:
    """A tower with these weights, in their dtype."""
    tower = meta_tower(config)
    tower.load_state_dict(our_state(published), assign=True)
    return tower


def random_fastvlm(config: LlavaConfig = FASTVLM) -> Llava:
    """A model of random weights behind a FastViTHD tower."""
    llava = random_llava(config)
    assert isinstance(config.vision, FastViTHDConfig)
    llava.vision.load_state_dict(our_state(make_state(published_shapes(config.vision))))
    return llava


# Our modules whose outputs the goldens know: the published name of each.
TAPS = {
    "patch_embed": "stem",
    "network.0": "stages.0",
    "network.1": "stages.1.down",
    "network.2": "stages.1",
    "network.3": "stages.2.down",
    "network.4": "stages.2",
    "network.5": "stages.3.down",
    "network.6": "stages.3.position",
    "network.7": "stages.3",
    "network.8": "stages.4.down",
    "network.9": "stages.4.position",
    "network.10": "stages.4",
    "conv_exp": "expand",
}


def run_taps(tower: FastViTHD, pixel_values: Tensor) -> dict[str, Tensor]:
    """The output of every tap, by its published name, and the tokens (B, T, C)."""
    seen: dict[str, Tensor] = {}

    def keep(tap: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.__setitem__(tap, output)

    hooks = [
        tower.get_submodule(ours).register_forward_hook(keep(tap)) for tap, ours in TAPS.items()
    ]
    with torch.inference_mode():
        seen["tokens"] = tower(pixel_values).image_features
    for hook in hooks:
        hook.remove()
    return seen
