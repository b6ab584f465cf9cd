"""Labels of the patches of scenes, and batches of labeled images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from llava_lite.evaluation.scenes.world import COLORS, PLACES, SHAPES, Scene, draw_instances
from llava_lite.inputs.pixels import MEAN, STD
from training.scenes import GRID, PATCH, SIZE, SceneSet

CROP = 8  # patches along a crop's side
IGNORE = -100


@dataclass
class PatchLabels:
    """Targets for every patch of a batch. Class indices (B, P) are IGNORE without an object.

    third   the place of the object among the nine thirds of the image, (B, P)
    center  1 at the object's center, else 0, (B, P)
    offset  from the patch to the object's center, in patches, (B, P, 2)
    spot    the object's center in the unpadded image, -1..1 from edge to edge, (B, P, 2)
    extent  width and height of the unpadded image, padded side = 1, (B, P, 2)
    area    the number of the object's patches, 0 in the background, (B, P)
    own     row and column of the patch, -1..1 from edge to edge of the padded image, (B, P, 2)

    spot, extent and own are NaN in crops, which may come from anywhere."""

    color: Tensor
    shape: Tensor
    digit: Tensor
    third: Tensor
    center: Tensor
    offset: Tensor
    spot: Tensor
    extent: Tensor
    area: Tensor
    own: Tensor

    @property
    def whole(self) -> bool:
        """True for images of the full size or some of their patches, False for crops."""
        return bool(self.own.isfinite().all())

    def at(self, patches: Tensor) -> "PatchLabels":
        """The labels of some patches (B, N) of each image."""
        index = torch.arange(len(patches))[:, None], patches
        return PatchLabels(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: str) -> "PatchLabels":
        """The same labels on another device."""
        return PatchLabels(**{name: value.to(device) for name, value in vars(self).items()})


def label_patches(scene: Scene, instances: np.ndarray, corner: tuple[int, int]) -> dict[str, Any]:
    """Labels of one window of a scene. instances: (s, s) of the window; corner: its (x, y) in the
    image."""
    grid = instances.shape[0] // PATCH
    blocks = instances.reshape(grid, PATCH, grid, PATCH).transpose(0, 2, 1, 3)
    blocks = blocks.reshape(grid * grid, -1)
    areas = np.stack(
        [(blocks == i + 1).sum(1) for i in range(len(scene.objects))], 1
    )  # (P, objects)
    owner = np.where(areas.max(1) >= 16, areas.argmax(1), -1)  # (P,)
    side = max(scene.width, scene.height)
    scale, left, top = SIZE / side, (side - scene.width) // 2, (side - scene.height) // 2
    objects = scene.objects
    centers = np.array([((o.x + left) * scale, (o.y + top) * scale) for o in objects]) - corner
    shapes = np.array([SHAPES.index(o.shape) for o in objects])
    colors = np.array([list(COLORS).index(o.color) + 1 for o in objects])
    digits = np.array([0 if o.digit is None else o.digit + 1 for o in objects])
    digits[~np.isin(shapes, (SHAPES.index("circle"), SHAPES.index("square")))] = IGNORE
    thirds = np.array([PLACES.index(scene.place(o)) for o in objects])
    spots = np.array([(2 * o.x / scene.width - 1, 2 * o.y / scene.height - 1) for o in objects])
    extent = np.float32([scene.width / side, scene.height / side])
    if grid < GRID:  # a crop does not show its place
        thirds[:], spots[:], extent[:] = IGNORE, np.nan, np.nan
    outside = ((centers < 0) | (centers >= grid * PATCH)).any(1)
    shapes[outside], digits[outside] = IGNORE, IGNORE  # half an object need not be recognized
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    middles = np.stack((columns + 0.5, rows + 0.5), 1) * PATCH
    center = np.zeros(grid * grid, np.float32)
    cells = (centers[~outside] // PATCH).astype(int)
    center[cells[:, 1] * grid + cells[:, 0]] = 1
    background = owner < 0
    return {
        "color": np.where(background, 0, colors[owner]),
        "shape": np.where(background, IGNORE, shapes[owner]),
        "digit": np.where(background, IGNORE, digits[owner]),
        "third": np.where(background, IGNORE, thirds[owner]),
        "center": center,
        "offset": ((centers[owner] - middles) / PATCH).astype(np.float32),
        "spot": spots[owner].astype(np.float32),
        "extent": np.tile(extent, (grid * grid, 1)),
        "area": (owner[:, None] == owner).sum(1) * np.float32(~background),
        "own": np.full((grid * grid, 2), np.nan, np.float32),
    }


def stack_labels(labels: Sequence[dict[str, Any]]) -> PatchLabels:
    """Labels of a batch as tensors."""
    stacked = {key: torch.from_numpy(np.stack([one[key] for one in labels])) for key in labels[0]}
    if stacked["own"].shape[1] == GRID * GRID:
        stacked["own"] = patch_places().repeat(len(labels), 1, 1)
    return PatchLabels(**stacked)


def to_pixel_values(images: np.ndarray) -> Tensor:
    """uint8 (B, S, S, 3) -> normalized (B, 3, S, S) float32."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def cut_crop(scenes: SceneSet, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """A window of CROP x CROP patches around some object of some scene, at any pixel offset."""
    index, window = rng.integers(len(scenes)), CROP * PATCH
    scene = scenes.scenes[index]
    side = max(scene.width, scene.height)
    candidates = scene.objects
    if rng.random() < 0.5:  # one object in six has a digit, which is hardest to read
        candidates = tuple(o for o in scene.objects if o.digit is not None) or scene.objects
    chosen = candidates[rng.integers(len(candidates))]
    margins = (side - scene.width) // 2, (side - scene.height) // 2
    middle = (np.array([chosen.x, chosen.y]) + margins) * SIZE / side
    corner = middle - window / 2 + rng.uniform(-2 * PATCH, 2 * PATCH, 2)
    x, y = np.clip(corner, 0, SIZE - window).astype(int)
    instances = draw_instances(scene, SIZE)[y : y + window, x : x + window]
    pixels = scenes.pixels[index, y : y + window, x : x + window]
    return pixels, label_patches(scene, instances, (x, y))


def crop_batch(scenes: SceneSet, rng: np.random.Generator, size: int) -> tuple[Tensor, PatchLabels]:
    """A batch of `size` crops."""
    pixels, labels = zip(*(cut_crop(scenes, rng) for _ in range(size)), strict=True)
    return to_pixel_values(np.stack(pixels)), stack_labels(labels)


def mosaic_batch(
    scenes: SceneSet, rng: np.random.Generator, size: int
) -> tuple[Tensor, PatchLabels]:
    """`size` images of the full size, each of 3 x 3 crops: as many patches as in a whole scene, and
    an object in every tile."""
    tiles = GRID // CROP
    images, labels = [], []
    for _ in range(size):
        pixels, tile_labels = zip(*(cut_crop(scenes, rng) for _ in range(tiles**2)), strict=True)
        layout = "(ty tx) y x c -> (ty y) (tx x) c"
        images.append(rearrange(np.stack(pixels), layout, ty=tiles))
        labels.append(
            {
                key: rearrange(
                    np.stack([tile[key] for tile in tile_labels]),
                    "(ty tx) (y x) ... -> (ty y tx x) ...",
                    ty=tiles,
                    y=CROP,
                )
                for key in tile_labels[0]
            }
        )
    return to_pixel_values(np.stack(images)), stack_labels(labels)


def whole_batch(scenes: SceneSet, indices: Sequence[int]) -> tuple[Tensor, PatchLabels]:
    """Whole images with the labels of their 576 patches."""
    pixel_values = to_pixel_values(scenes.pixels[np.asarray(indices)])
    return pixel_values, label_scenes([scenes.scenes[i] for i in indices])


def label_scenes(scenes: Sequence[Scene]) -> PatchLabels:
    """The labels of all 576 patches of scenes."""
    return stack_labels([label_patches(one, draw_instances(one, SIZE), (0, 0)) for one in scenes])


def patch_places() -> Tensor:
    """Row and column of every patch, -1..1 from edge to edge, (P, 2)."""
    steps = torch.linspace(-1, 1, GRID)
    return torch.cartesian_prod(steps, steps)
