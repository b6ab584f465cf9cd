"""Which patches of an image the tower and the decoder see."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.evaluation.scenes.world import Scene, draw_instances
from llava_lite.tome import Merged
from llava_lite.vision import VisionTower
from training.labels import CROP, PatchLabels, to_pixel_values
from training.scenes import GRID, PATCH, SIZE
from training.trainer import autocast


def see_crops(tower: VisionTower, pixel_values: Tensor, rng: np.random.Generator) -> Tensor:
    """Run the tower on crops, each at a random place of the position table."""
    count = len(pixel_values)
    corners = rng.integers(0, GRID - CROP + 1, size=(count, 2))
    steps = np.arange(CROP)
    rows = 1 + (corners[:, :1] + steps)[:, :, None] * GRID + (corners[:, 1:] + steps)[:, None]
    places = torch.from_numpy(
        np.concatenate((np.zeros((count, 1), int), rows.reshape(count, -1)), 1)
    )
    patches = rearrange(tower.patch_embed(pixel_values), "b c h w -> b (h w) c")
    class_token = tower.class_embed.expand(count, 1, -1)
    x = torch.cat((class_token, patches), 1) + tower.pos_embed[places.to(patches.device)]
    return run_blocks(tower.blocks, tower.pre_norm(x))[:, 1:]


def run_blocks(blocks: nn.ModuleList, x: Tensor, merged: Merged | None = None) -> Tensor:
    """The tokens (B, T, C) after some blocks of a tower, none of which merges."""
    for block in blocks:
        x, _ = block(x, merged, step=None)
    return x


# The tower sees FEW_PATCHES patches of most images, which takes less than half of the time. With
# the class token that is a multiple of vision.KEY_BLOCK. Near the end it sees all patches.
FEW_PATCHES, FEW_PATCHES_UNTIL = 223, 0.85


def choose_patches(
    labels: PatchLabels, progress: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """The patches of each image that the tower sees (B, N), ascending, and how many patches each
    stands for (None: one)."""
    if progress < FEW_PATCHES_UNTIL:
        return few_patches(labels, rng)
    return torch.arange(GRID * GRID).expand(len(labels.area), -1), None


def few_patches(labels: PatchLabels, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Patches of objects, patches next to objects, and some others, which stand for the rest:
    patches (B, FEW_PATCHES), ascending, and how many patches each stands for."""
    area = rearrange(labels.area, "b (r c) -> b 1 r c", r=GRID)
    near = F.max_pool2d(area, 3, stride=1, padding=1).flatten(1) > 0
    chosen, sizes = [], []
    for objects, around in zip((labels.area > 0).numpy(), near.numpy(), strict=True):
        size = np.ones(GRID * GRID, np.float32)
        kept: list[np.ndarray] = []
        # Objects and their neighbors may fill an image, but the tower must see some of the rest.
        for kind, most in (
            (objects, FEW_PATCHES - 32),
            (around & ~objects, FEW_PATCHES - 32),
            (~around, FEW_PATCHES),
        ):
            numbers = rng.permutation(np.flatnonzero(kind))
            some = numbers[: max(0, most - sum(map(len, kept)))]
            size[some] = len(numbers) / max(len(some), 1)
            kept.append(some)
        chosen.append(np.sort(np.concatenate(kept)))
        sizes.append(size[chosen[-1]])
    return torch.from_numpy(np.stack(chosen)), torch.from_numpy(np.stack(sizes))


def see_patches(
    tower: VisionTower, pixel_values: Tensor, patches: Tensor, size: Tensor | None
) -> Tensor:
    """The tower's features (B, N, C) of some patches (B, N) of each image. size: how many patches
    each stands for, (B, N). Attention weighs a patch by its size, like a merged token (tome.py)."""
    if size is None:
        return tower(pixel_values).image_features
    x = tower.embed(pixel_values)
    tokens = F.pad(patches + 1, (1, 0)).to(x.device)  # the class token first
    merged = Merged(tokens, F.pad(size, (1, 0), value=1.0).to(x.device))
    x = tower.pre_norm(x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])))
    return run_blocks(tower.blocks, x, merged)[:, 1:]


def see(tower: VisionTower, pixels: np.ndarray, device: str) -> Tensor:
    """Features (n, 576, C) of all patches of images (n, S, S, 3), without gradients."""
    with torch.no_grad(), autocast(device):
        parts = to_pixel_values(np.array(pixels)).split(16)
        return torch.cat([tower(part.to(device)).image_features for part in parts])


def object_patches(scene: Scene, rng: np.random.Generator, background: int) -> np.ndarray:
    """Patches that touch an object, the middle row and column (they show where the padding begins),
    and `background` others, ascending."""
    instances = draw_instances(scene, SIZE).reshape(GRID, PATCH, GRID, PATCH)
    kept = instances.any(axis=(1, 3))
    kept[GRID // 2], kept[:, GRID // 2] = True, True
    others = rng.permutation(np.flatnonzero(~kept))[:background]
    return np.sort(np.concatenate((np.flatnonzero(kept), others)))
