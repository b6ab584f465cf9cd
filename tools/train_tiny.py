"""Train the embedded model `weights/tiny` from nothing: crops, tower, decoder, joint, export.

    python tools/train_tiny.py                     # all stages; continues where it was interrupted
    python tools/train_tiny.py --stage tower       # one stage
    python tools/train_tiny.py --device cuda
    python tools/train_tiny.py --stage joint --start-from weights/tiny    # go on from given weights

The stages are LLaVA's own in small. `crops` and `tower` teach the vision tower what every patch
belongs to (shape, color, digit, centre of its object) and where it lies, first on crops around
objects, which are cheap, then on images of the full size, most of them by few of their patches.
`decoder` trains projector and decoder on the frozen tower's features of scenes that are always new,
with most background patches left out. `joint` trains everything on other new scenes, of which the
tower sees few patches until shortly before the end. `export` writes the folder that
`llava_lite.load` reads. The scenes of crops and tower are drawn once, at the start.

Every image stands in front of many questions at once: each question block sees the image and
itself, not its neighbours, and takes the positions it would have alone.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count as count_from
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from llava_lite.checkpoint import load_model, save_model
from llava_lite.config import TINY
from llava_lite.image import MEAN, STD, pad_to_square
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder
from llava_lite.llava import IMAGE_TOKEN_ID, Llava
from llava_lite.projector import Projector
from llava_lite.prompt import build_prompt
from llava_lite.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    Question,
    Scene,
    SceneObject,
    draw_instances,
    draw_scene,
    questions,
    sample_scene,
)
from llava_lite.tokenizer import Tokenizer, train_tokenizer
from llava_lite.tome import Merged
from llava_lite.vision import VisionTower

SIZE, PATCH, GRID = 336, 14, 24
CROP = 8  # patches along a crop's side
TRAIN_SEED, HELD_OUT_SEED, DECODER_SEED = 1, 2, 3
SCENES_OF_A_STEP = 100_000  # how far apart the steps of decoder and joint look for scenes
HELD_OUT_SCENES = 64
IGNORE = -100

Task = tuple[int, int]  # seed and index of a scene


# ------------------------------------------------------------------------------ scenes


def make_scene(seed: int, index: int) -> Scene:
    """Scene `index` of a set; the same every time, so only its pixels are stored."""
    rng = np.random.default_rng([seed, index])
    sizes = (224, 480) if rng.random() < 0.8 else (480, 1024)
    return sample_scene(rng, short_side=sizes)


def difficulty(scene: Scene) -> int:
    """How much there is to learn from a scene: as much as it has objects, three times as much from
    a hard one. That is one with a digit, one that is small in the model's image, or one close to a
    border between thirds. (Weights with 95.8 % of all answers right took one shape in ten of the
    small objects for another, and one in a hundred of the others; their wrong places were almost
    all of objects within a fiftieth of the image of a border.)"""

    def hard(one: SceneObject) -> bool:
        small = one.radius * SIZE / max(scene.width, scene.height) < 16
        spot = one.x / scene.width, one.y / scene.height
        border = min(abs(value - third / 3) for value in spot for third in (1, 2))
        return one.digit is not None or small or border < 0.02

    return sum(3 if hard(one) else 1 for one in scene.objects)


def render(task: Task) -> np.ndarray:
    """Draw one scene and bring it to the model's input size, as image.py does: (S, S, 3) uint8."""
    scene = make_scene(*task)
    image = pad_to_square(draw_scene(scene, supersample=1 + task[1] % 3))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class SceneSet:
    """`count` scenes of a seed with their pixels (count, S, S, 3) in a memory-mapped file."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        path = folder / f"scenes_{seed}_{count}.npy"
        if not path.exists():
            draw_all(path, seed, count)
        self.pixels = np.load(path, mmap_mode="r")
        self.scenes = [make_scene(seed, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def head(self, count: int) -> "SceneSet":
        """Only the first `count` scenes."""
        first = copy(self)
        first.pixels, first.scenes = self.pixels[:count], self.scenes[:count]
        return first


def draw_all(path: Path, seed: int, count: int) -> None:
    """Draw all scenes with every core into a file that takes its name only when it is complete."""
    partial = path.with_suffix(".partial.npy")
    shape = (count, SIZE, SIZE, 3)
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    tasks = [(seed, index) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        drawn = pool.imap(render, tasks, chunksize=32)
        for index, image in enumerate(tqdm(drawn, "draw scenes", count)):
            pixels[index] = image
    pixels.flush()
    partial.rename(path)


# ------------------------------------------------------------------- what each patch shows


@dataclass
class PatchLabels:
    """Targets for every patch of a batch: class indices (B, P), IGNORE where there is none;
    `third` the place of its object among the nine thirds of the image; `center` (B, P) 0/1;
    `offset` (B, P, 2) from patch to object centre in patches; `spot` (B, P, 2) the object's centre
    in the image without its padding, -1..1 from edge to edge; `extent` (B, P, 2) width and height
    of that image in sides of the padded square, the same for all patches; both NaN in crops;
    `area` (B, P) how many patches belong to its object, 0 in the background; `own` (B, P, 2) the
    row and column of the patch itself, -1..1 from edge to edge of the padded image, NaN in crops,
    which may lie anywhere."""

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
        """Whether these are images of the full size, or some of their patches; not crops."""
        return bool(self.own.isfinite().all())

    def at(self, patches: Tensor) -> "PatchLabels":
        """Only the labels of some patches of each image, (B, N) by number."""
        index = torch.arange(len(patches))[:, None], patches
        return PatchLabels(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: str) -> "PatchLabels":
        """The same labels on another device."""
        return PatchLabels(**{name: value.to(device) for name, value in vars(self).items()})


def label_patches(scene: Scene, instances: np.ndarray, corner: tuple[int, int]) -> dict[str, Any]:
    """Labels of one window of a scene: `instances` (s, s) of it, `corner` its (x, y) in the
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
    if grid < GRID:  # a crop does not show where it was cut
        thirds[:], spots[:], extent[:] = IGNORE, np.nan, np.nan
    outside = ((centers < 0) | (centers >= grid * PATCH)).any(1)
    shapes[outside], digits[outside] = IGNORE, IGNORE  # half an object need not be recognised
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
    """uint8 (B, S, S, 3) -> normalised (B, 3, S, S) float32."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def cut_crop(scenes: SceneSet, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """A window of CROP x CROP patches around some object of some scene, at any pixel offset."""
    index, window = rng.integers(len(scenes)), CROP * PATCH
    scene = scenes.scenes[index]
    side = max(scene.width, scene.height)
    candidates = scene.objects
    if rng.random() < 0.5:  # only one object in six has a digit, and it is the hardest to read
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
    """`size` crops as images of their own."""
    pixels, labels = zip(*(cut_crop(scenes, rng) for _ in range(size)), strict=True)
    return to_pixel_values(np.stack(pixels)), stack_labels(labels)


def mosaic_batch(
    scenes: SceneSet, rng: np.random.Generator, size: int
) -> tuple[Tensor, PatchLabels]:
    """`size` images of the full size, each tiled with 3 x 3 crops: as many patches to look among as
    in a whole scene, but an object in every tile."""
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


# ------------------------------------------------------------------------------- tower


class PatchHeads(nn.Module):
    """Linear readers of the tower's features, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.shape = nn.Linear(width, len(SHAPES))
        self.digit = nn.Linear(width, 11)
        self.third = nn.Linear(width, len(PLACES))
        self.center = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.place = nn.Linear(width, 2)
        self.spot = nn.Linear(width, 2)
        self.extent = nn.Linear(width, 2)
        self.share = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.norm(features)
        heads = {name: head for name, head in self.named_children() if name != "norm"}
        return {name: head(x).float() for name, head in heads.items()}


def labelled_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the patches that have a label; 0 where none has."""
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


# Smooth L1 counts a distance below its beta quadratically, that is less and less. A tower gets as
# exact as that and not much more, so these are below a pixel or two: 0.8 pixels of a place and 1.7
# of an extent, whose units are half and whole sides of the image, and 0.4 of an offset, in patches.
SMOOTH_L1_BETA, OFFSET_BETA = 0.005, 0.03


def known_loss(read: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 distance to the targets that are numbers; 0 where none is."""
    known = targets.isfinite()
    total = F.smooth_l1_loss(read[known], targets[known], beta=SMOOTH_L1_BETA, reduction="sum")
    return total / known.sum().clamp(min=1)


def patch_loss(read: dict[str, Tensor], labels: PatchLabels) -> Tensor:
    """How badly the heads read the labels."""
    on_object = labels.color > 0
    background_weight = torch.full((1 + len(COLORS),), 1.0, device=labels.color.device)
    background_weight[0] = 0.3
    color = F.cross_entropy(read["color"].flatten(0, 1), labels.color.flatten(), background_weight)
    shape = labelled_loss(read["shape"], labels.shape)
    digit = labelled_loss(read["digit"], labels.digit)
    center = F.binary_cross_entropy_with_logits(
        read["center"].squeeze(-1), labels.center, pos_weight=labels.center.new_tensor(5.0)
    )
    offset = F.smooth_l1_loss(read["offset"][on_object], labels.offset[on_object], beta=OFFSET_BETA)
    loss = color + shape + 0.7 * digit + center + 0.5 * offset
    if labels.whole:
        third = labelled_loss(read["third"], labels.third)
        # Three objects in four lie within a tenth of the image of a border between thirds: what
        # must become sharp is the centre. It takes the size of the image without its padding, which
        # an object's patches learn from far away. Both are small numbers beside the others,
        # which are about kinds: hence 8.
        spot = known_loss(read["spot"][on_object], labels.spot[on_object])
        extent = known_loss(read["extent"], labels.extent)
        extent = extent + 3 * known_loss(read["extent"][on_object], labels.extent[on_object])
        loss = loss + third + 8 * (spot + extent) + place_loss(read["place"], labels)
        loss = loss + share_loss(read["share"].squeeze(-1), labels.area)
    return loss


def share_loss(read: Tensor, area: Tensor) -> Tensor:
    """How far each object patch (B, P) is from knowing its share of the object, one over its area,
    and the sum of an image's shares from its number of objects: what a decoder that can only
    average over patches counts by."""
    on_object = area > 0
    shares = torch.where(on_object, 1 / area.clamp(min=1), 0)
    each = F.smooth_l1_loss((read * area)[on_object], torch.ones_like(read[on_object]), beta=0.1)
    total = F.smooth_l1_loss(read.sum(1), shares.sum(1), beta=0.1)
    # What multiplies and sums over patches has steep slopes, which would drown the other losses.
    return 0.05 * each + 0.01 * total


def place_loss(read: Tensor, labels: PatchLabels) -> Tensor:
    """How far from its own row and column each patch of a whole image (B, P, 2) believes to be, in
    halves of the image. Left to themselves, the tower's features forget it, those of objects first,
    and then the decoder cannot say where anything is."""
    distances = F.smooth_l1_loss(read, labels.own, beta=SMOOTH_L1_BETA, reduction="none").mean(-1)
    return distances.mean() + 3 * distances[labels.color > 0].mean()


def patch_places() -> Tensor:
    """Row and column of every patch, -1..1 from edge to edge, (P, 2)."""
    steps = torch.linspace(-1, 1, GRID)
    return torch.cartesian_prod(steps, steps)


def start_local(tower: VisionTower, gain: float = 2.0) -> None:
    """Start with attention to patches that look alike and lie near: an object's own.

    Queries and keys begin as one projection (mimetic initialisation, Trockman and Kolter, arXiv
    2305.09828) of tokens that carry sines of their place. From random weights every patch would
    see the average of all 576 and learn nothing from it for a long time."""
    with torch.no_grad():
        tower.pos_embed[1:] = grid_positions(tower.pos_embed.shape[1])
        for block in tower.blocks:
            for head in block.attn.q_proj.weight.chunk(block.attn.num_heads):
                nn.init.orthogonal_(head, gain)
            block.attn.k_proj.weight.copy_(block.attn.q_proj.weight)


def grid_positions(width: int) -> Tensor:
    """Sines and cosines of row and column, (GRID * GRID, width), to start the position table from.

    With random rows a crop teaches nothing about patches further apart than its own side, and in a
    whole image attention strays; here nearness means the same everywhere from the start."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies  # (GRID, width / 4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # (GRID, width / 2)
    rows = line[:, None].expand(GRID, GRID, -1)
    columns = line[None].expand(GRID, GRID, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def see_crops(tower: VisionTower, pixel_values: Tensor, rng: np.random.Generator) -> Tensor:
    """The tower on crops, each put at a random place of the position table."""
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
    x = tower.pre_norm(x)
    for block in tower.blocks:
        x, _ = block(x, merged=None, step=None)
    return x[:, 1:]


def initialise(module: nn.Module, num_blocks: int) -> None:
    """Small normal weights; what ends a residual branch starts smaller the deeper the model is."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 and not name.endswith("class_embed"):
            continue
        std = 0.02
        if name.endswith(("o_proj.weight", "fc2.weight", "down_proj.weight")):
            std /= math.sqrt(2 * num_blocks)
        if name.endswith("patch_embed.weight"):
            std = 0.04
        nn.init.normal_(parameter, std=std)


class Trainer:
    """AdamW with warm-up and cosine, gradient clipping, a JSONL log, and a state to resume from."""

    def __init__(
        self,
        name: str,
        work: Path,
        modules: dict[str, nn.Module],
        rates: dict[str, float],
        steps: int,
    ) -> None:
        self.name, self.modules, self.steps, self.step = name, modules, steps, 0
        self.state_path, self.log_path = work / f"{name}.state.pt", work / "log.jsonl"
        groups: list[dict[str, Any]] = []
        self.rates: list[float] = []
        for key, module in modules.items():
            named = list(module.named_parameters())
            # A decaying position table would fade under patches that get no smaller.
            matrices = [p for name, p in named if p.dim() >= 2 and name != "pos_embed"]
            others = [p for name, p in named if p.dim() < 2 or name == "pos_embed"]
            groups.append({"params": matrices, "weight_decay": 0.05})
            groups.append({"params": others, "weight_decay": 0.0})
            self.rates += [rates[key]] * 2
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        if self.state_path.exists():
            self._restore(torch.load(self.state_path, "cpu", weights_only=True))

    def share_of_rate(self) -> float:
        """Warm-up, then cosine down to a fiftieth. It follows from the step alone, so that a stage
        goes on with the rate and the number of steps that it is given then."""
        warm_up = min(200, self.steps // 10 + 1)
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * self.step / self.steps))
        return min(1.0, (self.step + 1) / warm_up) * cosine

    def _restore(self, state: dict[str, Any]) -> None:
        for key, module in self.modules.items():
            module.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        state: dict[str, Any] = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = self.state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.state_path)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = rate * self.share_of_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def log(self, **values: float) -> None:
        line = {"stage": self.name, "step": self.step, "time": round(time.time()), **values}
        with self.log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))

    def run(self) -> Iterator[int]:
        """Step numbers from where the stage stands, with a progress bar; saves on the way."""
        if self.step >= self.steps:
            print(f"{self.name} has had its {self.step} steps ({self.state_path})")
        bar = tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps)
        for step in bar:
            yield step
            if self.step % 100 == 0 or self.step == self.steps:
                self.save()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


class PlainAttention(TorchFunctionMode):
    """Within it, attention is what its formula says. On a CPU the way back through the fused kernel
    takes twice as long, and torch's own plain one spends a third on rows that see nothing."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v = args
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        mask = kwargs.get("attn_mask")
        if mask is not None:
            seen = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if seen else scores + mask
        return scores.softmax(-1) @ v


def attention(device: str) -> AbstractContextManager:
    """The fastest attention to train with."""
    return PlainAttention() if device == "cpu" else nullcontext()


def train_crops(args: argparse.Namespace) -> None:
    """Stage `crops`: the tower on small windows around objects, which are cheap."""
    torch.manual_seed(0)
    tower, heads = VisionTower(TINY.vision), PatchHeads(TINY.vision.hidden_size)
    initialise(tower, TINY.vision.num_blocks)
    start_local(tower)

    train = SceneSet(args.work, TRAIN_SEED, args.scenes)

    def batch(rng: np.random.Generator, progress: float) -> tuple[Tensor, PatchLabels]:
        pixel_values, labels = crop_batch(train, rng, 64)
        return see_crops(tower, pixel_values.to(args.device), rng), labels

    fit_tower("crops", tower, heads, batch, args.crop_steps, args.crop_rate, args)


def train_tower(args: argparse.Namespace) -> None:
    """Stage `tower`: on images of the full size, mosaics of crops and whole scenes. Among
    576 patches attention must be sharper than among the 64 of a crop."""
    begins = not (args.work / "tower.state.pt").exists()
    tower, heads = trained_tower(args, "crops" if begins and not args.start_from else "tower")
    train = SceneSet(args.work, TRAIN_SEED, args.scenes)
    if begins:
        scenes = train.head(2048)
        if args.start_from:
            fit_heads(tower, heads, scenes.head(512))
        else:
            carry_places(tower, heads, scenes)
            show_extent(tower, scenes)
        fit_places(tower, heads, scenes.head(256))

    weights = np.array([difficulty(scene) for scene in train.scenes], float)
    weights /= weights.sum()

    def batch(rng: np.random.Generator, progress: float) -> tuple[Tensor, PatchLabels]:
        if rng.random() < 0.2:
            pixel_values, labels = mosaic_batch(train, rng, 8)
            return tower(pixel_values.to(args.device)).image_features, labels
        count = 16 if progress < FEW_PATCHES_UNTIL else 8
        indices = rng.choice(len(train), count, p=weights)
        pixel_values, labels = whole_batch(train, indices)
        patches, size = choose_patches(labels, progress, rng)
        features = see_patches(tower, pixel_values.to(args.device), patches, size)
        return features, labels.at(patches)

    fit_tower("tower", tower, heads, batch, args.tower_steps, args.tower_rate, args)


# Of most images the tower sees few patches, with the class token a multiple of vision.KEY_BLOCK,
# which takes less than half of the time. It ends with all.
FEW_PATCHES, FEW_PATCHES_UNTIL = 223, 0.85


def choose_patches(
    labels: PatchLabels, progress: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Which patches of each image the tower sees (B, N), ascending, and how many each stands for
    (None: all of them, each for itself)."""
    if progress < FEW_PATCHES_UNTIL:
        return few_patches(labels, rng)
    return torch.arange(GRID * GRID).expand(len(labels.area), -1), None


def few_patches(labels: PatchLabels, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The patches of objects, those next to them, and some of the others, which stand for those
    left out: which, ascending (B, FEW_PATCHES), and how many each stands for."""
    area = rearrange(labels.area, "b (r c) -> b 1 r c", r=GRID)
    near = F.max_pool2d(area, 3, stride=1, padding=1).flatten(1) > 0
    chosen, sizes = [], []
    for objects, around in zip((labels.area > 0).numpy(), near.numpy(), strict=True):
        size = np.ones(GRID * GRID, np.float32)
        kept: list[np.ndarray] = []
        # Objects and what is next to them may fill an image; the rest must be seen all the same.
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
    """The tower's features (B, N, C) where it sees but some patches (B, N) of each image, which
    stand for `size` (B, N) patches each. Attention counts them as often, as if they had merged
    (tome.py), and so sees on average what it would in all."""
    if size is None:
        return tower(pixel_values).image_features
    x = tower.embed(pixel_values)
    tokens = F.pad(patches + 1, (1, 0)).to(x.device)  # the class token in front
    # No block merges on, so only the sizes are read.
    merged = Merged(tokens, F.pad(size, (1, 0), value=1.0).to(x.device))
    x = tower.pre_norm(x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])))
    for block in tower.blocks:
        x, _ = block(x, merged, step=None)
    return x[:, 1:]


HEAD_STEPS = 600


def fit_heads(tower: VisionTower, heads: PatchHeads, scenes: SceneSet) -> None:
    """Let fresh readers learn what a given tower knows, which stays as it is: what they pulled it
    by before they can read would only harm it."""
    device = str(tower.pos_embed.device)
    seen = []
    for start in range(0, len(scenes), 16):
        stop = min(start + 16, len(scenes))
        labels = label_scenes(scenes.scenes[start:stop])
        seen.append((see(tower, scenes.pixels[start:stop], device).float(), labels.to(device)))
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS)
    for step in tqdm(range(HEAD_STEPS), "heads"):
        features, labels = seen[step % len(seen)]
        patch_loss(heads(features), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# Of the position table in front of its norm, and of what leaves it: a patch of an image has there a
# length of 25, what passes the blocks one of 15 to 100.
CARRIER_GAIN, CARRIED = 40.0, 12.0


@torch.no_grad()
def carry_places(tower: VisionTower, heads: PatchHeads, scenes: SceneSet) -> None:
    """Give the tower four channels for nothing but where each patch is: sine and cosine of its
    column and of its row, which no block writes to, nor reads at first.

    Without them the position is a fiftieth of what passes the blocks, and an object's patches know
    their own place to a quarter of a patch, four times worse than how far they are from the middle
    of their object. The two lengths are the same for all patches, so that no norm on the way
    changes them much. The channels are those that carried least; the norms' gains grow by as much
    as the new ones make their inputs longer."""
    width = tower.pos_embed.shape[1]
    lengths, carried = measure_stream(tower, scenes)
    channels = carried.argsort()[:4]
    angles = torch.linspace(-1, 1, GRID, device=channels.device) * (0.25 * math.pi)
    line = torch.stack((angles.sin(), angles.cos()), dim=1)  # (GRID, 2)
    columns, rows = line.repeat(GRID, 1), line.repeat_interleave(GRID, 0)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0]).to(angles)  # so that the mean hardly moves
    tower.pos_embed[1:, channels] = CARRIER_GAIN * signs * torch.cat((columns, rows), dim=1)
    tower.pos_embed[0, channels] = CARRIER_GAIN * torch.tensor([0.0, 1.0, 0.0, -1.0]).to(angles)
    tower.class_embed[channels] = 0
    tower.patch_embed.weight[channels] = 0

    def make_room(
        norm: nn.LayerNorm, length: float, added: float, readers: Sequence[nn.Linear]
    ) -> None:
        norm.weight *= math.sqrt(1 + 2 * (added / length) ** 2)
        norm.weight[channels], norm.bias[channels] = 1, 0
        for reader in readers:
            reader.weight[:, channels] = 0

    make_room(tower.pre_norm, lengths[0], CARRIER_GAIN, [])
    # A channel leaves this norm as GAIN / sqrt(mean square) times its weight.
    total = math.sqrt(lengths[0] ** 2 + 2 * CARRIER_GAIN**2)
    tower.pre_norm.weight[channels] = CARRIED * total / (CARRIER_GAIN * math.sqrt(width))
    for index, block in enumerate(tower.blocks):
        before, between = lengths[1 + 2 * index : 3 + 2 * index]
        make_room(
            block.norm1, before, CARRIED, [block.attn.q_proj, block.attn.k_proj, block.attn.v_proj]
        )
        make_room(block.norm2, between, CARRIED, [block.mlp.fc1])
        for writer in (block.attn.o_proj, block.mlp.fc2):
            writer.weight[channels], writer.bias[channels] = 0, 0
    readers = [head for head in heads.children() if isinstance(head, nn.Linear)]
    make_room(heads.norm, lengths[-1], CARRIED, readers)


@torch.no_grad()
def fit_places(tower: VisionTower, heads: PatchHeads, scenes: SceneSet) -> None:
    """Let the heads read what objects' patches know now of their own and their object's place and
    of the image's extent, by least squares: by gradients, weights that start at zero take a
    thousand steps to get there."""
    inputs, targets = [], []
    for start in range(0, len(scenes), 16):
        pixels, labels = whole_batch(scenes, range(start, min(start + 16, len(scenes))))
        features = heads.norm(tower(pixels.to(tower.pos_embed.device)).image_features)
        on_object = labels.color > 0
        inputs.append(features[on_object])
        known = torch.cat((labels.own, labels.spot, labels.extent), dim=-1).to(features)
        targets.append(known[on_object])
    x, wanted = torch.cat(inputs).double(), torch.cat(targets).double()
    centered = x - x.mean(0)
    ridge = centered.T @ centered + 0.1 * torch.eye(x.shape[1]).to(x)
    reading = torch.linalg.solve(ridge, centered.T @ (wanted - wanted.mean(0))).T  # (6, C)
    bias = wanted.mean(0) - reading @ x.mean(0)
    for index, head in enumerate((heads.place, heads.spot, heads.extent)):
        head.weight.copy_(reading[2 * index : 2 * index + 2])
        head.bias.copy_(bias[2 * index : 2 * index + 2])


def measure_stream(tower: VisionTower, scenes: SceneSet) -> tuple[list[float], Tensor]:
    """How long the vectors of the longest tenth of patches, most of them objects', are in front of
    every norm and at the end, and how much each channel varies, of all that varies there, on
    average over these places (C,)."""
    seen: list[Tensor] = []
    norms = [tower.pre_norm]
    for block in tower.blocks:
        norms += [block.norm1, block.norm2]
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1:]))
        for norm in norms
    ]
    pixels = to_pixel_values(np.array(scenes.pixels[:32])).to(tower.pos_embed.device)
    seen.append(tower(pixels).image_features)
    for hook in hooks:
        hook.remove()
    spreads = [x.flatten(0, 1).std(0) for x in seen]
    carried = torch.stack([spread / spread.norm() for spread in spreads]).mean(0)
    return [x.norm(dim=-1).quantile(0.9).item() for x in seen], carried


EXTENT_BLOCK, EXTENT_GAIN = 3, 2.5


@torch.no_grad()
def show_extent(tower: VisionTower, scenes: SceneSet) -> None:
    """Let one head start by telling every patch how large the image is without its padding.

    Where an object is "in thirds of the image" depends on it, but nothing near the object shows it,
    and each image is a single example of it: by gradient alone the tower had not found it after
    1,500 steps. In front of block EXTENT_BLOCK it can be read off the mean of all patches. So that
    reading is fitted to `scenes` by least squares, and one head looks at everything alike and
    passes it on; from there the training goes on as usual."""
    attn, width = tower.blocks[EXTENT_BLOCK].attn, tower.pos_embed.shape[1]
    seen, spread = mean_patches(tower, scenes)  # (scenes, C)
    sizes = [(scene.width, scene.height) for scene in scenes.scenes]
    extents = torch.tensor([(w / max(w, h), h / max(w, h)) for w, h in sizes]).to(seen)
    wanted = (extents - extents.mean(0)) / extents.std(0).clamp(min=1e-2)
    centered = seen - seen.mean(0)
    ridge = centered.T @ centered + 0.1 * torch.eye(width, device=seen.device)
    reading = torch.linalg.solve(ridge, centered.T @ wanted)  # (C, 2)
    last = slice(width - width // attn.num_heads, width)  # the rows of the last head
    for proj, std in ((attn.q_proj, 0.003), (attn.k_proj, 0.003), (attn.v_proj, 0.05)):
        nn.init.normal_(proj.weight[last], std=std)
        nn.init.zeros_(proj.bias[last])
    nn.init.normal_(attn.o_proj.weight[:, last], std=0.05)
    first = slice(last.start, last.start + 2)
    attn.v_proj.weight[first] = reading.T
    attn.v_proj.bias[first] = -seen.mean(0) @ reading
    directions = torch.linalg.qr(torch.randn(width, 2, device=seen.device))[0]
    attn.o_proj.weight[:, first] = EXTENT_GAIN * spread * directions


def mean_patches(tower: VisionTower, scenes: SceneSet) -> tuple[Tensor, Tensor]:
    """What block EXTENT_BLOCK sees, on average over the patches of each scene (scenes, C), and how
    far its inputs spread."""
    means, spread = [], []
    for start in range(0, len(scenes), 32):
        pixels = to_pixel_values(np.array(scenes.pixels[start : start + 32]))
        pixels = pixels.to(tower.pos_embed.device)
        class_token = tower.class_embed.expand(len(pixels), 1, -1)
        patches = rearrange(tower.patch_embed(pixels), "b c h w -> b (h w) c")
        x = tower.pre_norm(torch.cat((class_token, patches), 1) + tower.pos_embed)
        for block in tower.blocks[:EXTENT_BLOCK]:
            x, _ = block(x, merged=None, step=None)
        means.append(tower.blocks[EXTENT_BLOCK].norm1(x).mean(1))
        spread.append(x.std())
    return torch.cat(means), torch.stack(spread).mean()


def fit_tower(
    name: str,
    tower: VisionTower,
    heads: PatchHeads,
    batch: Callable[[np.random.Generator, float], tuple[Tensor, PatchLabels]],
    steps: int,
    rate: float,
    args: argparse.Namespace,
) -> None:
    """Train tower and heads on the features and labels that `batch` gives, told how far the stage
    is, 0..1."""
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    modules: dict[str, nn.Module] = {"tower": tower.to(args.device), "heads": heads.to(args.device)}
    trainer = Trainer(name, args.work, modules, dict.fromkeys(modules, rate), steps)
    losses = []
    for step in trainer.run():
        with autocast(args.device), attention(args.device):
            rng = np.random.default_rng([args.scene_seed, step, *name.encode()])
            features, labels = batch(rng, step / steps)
            loss = patch_loss(heads(features), labels.to(args.device))
        trainer.update(loss)
        losses.append(loss.item())
        if trainer.step % 250 == 0 or trainer.step == steps:
            seen = measure_tower(tower, heads, held_out, args)
            trainer.log(loss=round(float(np.mean(losses[-250:])), 4), **seen)


@torch.no_grad()
def measure_tower(
    tower: VisionTower, heads: PatchHeads, scenes: SceneSet, args: argparse.Namespace
) -> dict[str, float]:
    """Accuracy of the heads on held-out crops and whole images, over patches that have the
    label."""
    results = {}
    rng = np.random.default_rng(0)
    for name in ("crop", "whole"):
        with autocast(args.device):
            if name == "crop":
                pixel_values, labels = crop_batch(scenes, rng, 128)
                read = heads(see_crops(tower, pixel_values.to(args.device), rng))
            else:
                pixel_values, labels = whole_batch(scenes, range(min(32, len(scenes))))
                read = heads(tower(pixel_values.to(args.device)).image_features)
        for key in ("color", "shape", "digit", "third"):
            target = getattr(labels, key)
            valid = (target > 0) if key == "color" else (target != IGNORE)
            if not valid.any():
                continue
            right = read[key].argmax(-1).cpu()[valid] == target[valid]
            results[f"{name}_{key}"] = round(right.float().mean().item(), 3)
        found = read["center"].squeeze(-1).cpu() > 0
        results[f"{name}_center_iou"] = round(
            float((found & (labels.center > 0)).sum() / (found | (labels.center > 0)).sum()), 3
        )
    labels = labels.to(args.device)
    on_object = labels.color > 0
    results["whole_place_loss"] = round(place_loss(read["place"], labels).item(), 4)
    counted = read["share"].squeeze(-1).sum(1).cpu().round()
    objects = torch.tensor([len(scene.objects) for scene in scenes.scenes[: len(counted)]])
    results["whole_count"] = round((counted == objects).float().mean().item(), 3)
    for key in ("spot", "extent"):
        misses = (read[key] - getattr(labels, key)).abs()[on_object]
        results[f"whole_{key}_error"] = round(misses.mean().item(), 4)
    return results


# ----------------------------------------------------------------------------- decoder

# How many background patches an image of the decoder stage may keep: few are fast, but a decoder
# that never saw all of them loses the objects among 576.
BACKGROUND_PATCHES = (24, 24, 128, GRID * GRID)

# How often each family is asked about an image, per question block: from nothing, and when the
# decoder goes on from weights that know the first ones.
FAMILY_WEIGHTS = {
    "count": (1.5, 2.0),
    "count_color": (1.0, 1.5),
    "count_shape": (1.0, 1.5),
    "color": (2.0, 1.0),
    "shape": (2.0, 1.0),
    "exists": (5.0, 1.0),  # two properties must be found on the same object
    "where": (1.0, 3.0),
    "relation": (0.7, 1.5),
    "digit": (0.7, 2.5),
}


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The embedded model's own tokenizer, trained once on prompts about undrawn scenes."""
    if args.start_from:
        return Tokenizer.from_file(args.start_from / "tokenizer.json")
    path = args.work / "tokenizer.json"
    if not path.exists():
        rng = np.random.default_rng(0)
        texts = []
        for _ in range(1500):
            scene = sample_scene(rng)
            asked = questions(scene, rng, 0.75)[::2] + questions(scene, rng, 1.0)[-1:]
            texts += [conversation(((one.text, one.answer),)) for one in asked]
        train_tokenizer(texts, TINY.text.vocab_size).save(path)
    return Tokenizer.from_file(path)


def conversation(turns: tuple[tuple[str, str | None], ...]) -> str:
    """The prompt text of question-answer turns about one image."""
    first = (f"<image>\n{turns[0][0]}", turns[0][1])
    return build_prompt(TINY.template, [first, *turns[1:]])


class Writer:
    """Turns conversations into ids: the part before the image (always the same) and the block after
    it, with the answer tokens marked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.encode_prompt(conversation((("?", None),)))
        self.head = ids[: ids.index(IMAGE_TOKEN_ID)]
        self.block = lru_cache(maxsize=200_000)(self._block)

    def _block(self, turns: tuple[tuple[str, str], ...]) -> tuple[list[int], list[int]]:
        """Ids after the image, and for each its target: the next id where that belongs to an
        answer (or ends it), else IGNORE."""
        skip = len(self.head) + 1
        ids = self.tokenizer.encode_prompt(conversation(turns))[skip:]
        targets = [IGNORE] * len(ids)
        for done in range(len(turns)):
            question = (*turns[:done], (turns[done][0], None))
            start = len(self.tokenizer.encode_prompt(conversation(question))) - skip
            stop = len(self.tokenizer.encode_prompt(conversation(turns[: done + 1]))) - skip
            targets[start - 1 : stop - 1] = ids[start:stop]
        return ids, targets


def pick_turns(
    asked: Sequence[Question], rng: np.random.Generator, count: int, late: bool = False
) -> list[tuple[tuple[str, str], ...]]:
    """`count` blocks of one question, some of two or three, families by FAMILY_WEIGHTS; in front,
    the description of the image, which names every object."""
    by_family: dict[str, list[Question]] = {}
    for one in asked:
        by_family.setdefault(one.family, []).append(one)
    describe = by_family.pop("describe")[0]
    families = list(by_family)
    weights = np.array([FAMILY_WEIGHTS[family][late] for family in families])
    blocks: list[tuple[tuple[str, str], ...]] = [((describe.text, describe.answer),)]
    while len(blocks) <= count:
        turns = []
        for family in rng.choice(
            families, rng.choice([1, 1, 1, 1, 2, 3]), p=weights / weights.sum()
        ):
            one = by_family[family][rng.integers(len(by_family[family]))]
            turns.append((one.text, one.answer))
        blocks.append(tuple(turns))
    return blocks


@dataclass
class Packed:
    """A training batch: every image with its question blocks is one item of packed rows."""

    token_ids: list[int]  # (R,), IMAGE_TOKEN_ID at image rows
    position_ids: list[int]  # (R,)
    targets: list[int]  # (R,)
    lengths: list[int]
    masks: list[Tensor]
    patches: list[np.ndarray]  # per item: which patches stand in the image slot, ascending


def pack(
    writer: Writer,
    blocks_per_image: Sequence[Sequence[tuple[tuple[str, str], ...]]],
    patches: list[np.ndarray],
    device: str,
) -> Packed:
    """Lay out head, image rows and blocks of each image. A block sees head, image and itself, and
    its positions go on after all 576 patches, whichever of them are there."""
    packed = Packed([], [], [], [], [], patches)
    head = len(writer.head)
    for blocks, kept in zip(blocks_per_image, patches, strict=True):
        token_ids = writer.head + [IMAGE_TOKEN_ID] * len(kept)
        position_ids = [*range(head), *(head + kept)]
        targets = [IGNORE] * len(token_ids)
        owner = [0] * len(token_ids)
        for index, turns in enumerate(blocks, start=1):
            ids, wanted = writer.block(turns)
            start = head + GRID * GRID
            token_ids, targets = token_ids + ids, targets + wanted
            position_ids += range(start, start + len(ids))
            owner += [index] * len(ids)
        owners = torch.tensor(owner, device=device)
        seen = ((owners == 0)[None, :] | (owners[:, None] == owners[None, :])).tril()
        # Additive and in bfloat16: a bool mask would be converted again in every layer.
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device)
        packed.masks.append(mask.masked_fill_(~seen, -1e4))
        packed.lengths.append(len(token_ids))
        packed.token_ids += token_ids
        packed.position_ids += [int(position) for position in position_ids]
        packed.targets += targets
    return packed


def answer_loss(
    decoder: LlamaDecoder, packed: Packed, image_embeds: Tensor, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answer tokens. image_embeds (image rows of all items, C). Returns loss,
    and for every answer token whether it is right and its row."""
    token_ids = torch.tensor(packed.token_ids, device=device)
    targets = torch.tensor(packed.targets, device=device)
    is_image = token_ids == IMAGE_TOKEN_ID
    words = decoder.embed_tokens(token_ids.clamp(min=0))
    input_embeds = words.index_put((is_image.nonzero()[:, 0],), image_embeds.to(words.dtype))
    places = torch.tensor(packed.position_ids, device=device).split(packed.lengths)
    past = [None] * len(packed.lengths)
    # Nothing follows these rows, so their next position does not matter.
    layouts = [Layout(len(item), item, next_position=0) for item in places]
    x = decoder(input_embeds, layouts, past, masks=packed.masks).hidden_states
    rows = (targets != IGNORE).nonzero()[:, 0]
    logits = decoder.lm_head(x[rows]).float()
    # A description is long: its tokens must not drown the short answers.
    run_length = torch.tensor(answer_lengths(packed.targets), device=device)[rows]
    weights = run_length.clamp(min=3).float().rsqrt()
    losses = F.cross_entropy(logits, targets[rows], reduction="none")
    return (losses * weights).sum() / weights.sum(), logits.argmax(-1) == targets[rows], rows


def answer_lengths(targets: Sequence[int]) -> list[int]:
    """For every row with a target, how many tokens its answer has; 0 elsewhere."""
    lengths = [0] * len(targets)
    for is_answer, run in groupby(range(len(targets)), key=lambda row: targets[row] != IGNORE):
        rows = list(run)
        if is_answer:
            for row in rows:
                lengths[row] = len(rows)
    return lengths


def see(tower: VisionTower, pixels: np.ndarray, device: str) -> Tensor:
    """Features of every patch of images (n, S, S, 3), (n, 576, C), without a way back."""
    with torch.no_grad(), autocast(device):
        parts = to_pixel_values(np.array(pixels)).split(16)
        return torch.cat([tower(part.to(device)).image_features for part in parts])


def fresh_batches(
    args: argparse.Namespace, steps: range, batch: int, late: bool
) -> Iterator[tuple[list[Scene], np.ndarray]]:
    """For each step `batch` scenes and their pixels (batch, S, S, 3). No scene comes twice: 6,000
    of them, seen four times each, the decoder had learnt by heart. They are drawn while the step
    before is computed. Unless it is late, the first scenes have few objects."""

    def collect(started: tuple[list[Task], Iterator[np.ndarray]]) -> tuple[list[Scene], np.ndarray]:
        tasks, images = started
        return [make_scene(*task) for task in tasks], np.stack(list(images))

    before = None
    with drawers(args.drawers) as draw:
        for step in steps:
            most = curriculum(1.0 if late else step / steps.stop)
            tasks = scene_tasks(args.scene_seed, step, batch, most, late)
            started = tasks, draw(render, tasks)
            if before:
                yield collect(before)
            before = started
        if before:
            yield collect(before)


@contextmanager
def drawers(count: int) -> Iterator[Callable[..., Iterator[np.ndarray]]]:
    """`map`, by so many processes; 0: by this one, when the results are wanted."""
    if count == 0:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield pool.map


EVERY_TIME = 12  # the difficulty from which on no scene is skipped


def scene_tasks(seed: int, step: int, batch: int, most: int, late: bool) -> list[Task]:
    """The `batch` scenes of one step, of at most `most` objects. Late, in a training that goes on,
    a scene comes the more often the more difficult it is, up to EVERY_TIME."""
    found: list[Task] = []
    for index in count_from(step * SCENES_OF_A_STEP):
        scene = make_scene(seed, index)
        skipped = difficulty(scene) <= np.random.default_rng([seed, index, 1]).random() * EVERY_TIME
        if len(scene.objects) <= most and not (late and skipped):
            found.append((seed, index))
        if len(found) == batch:
            return found


def curriculum(progress: float) -> int:
    """How many objects a scene may have by now: 2 at first, all from 30 % on."""
    return 2 + int(progress / 0.075)


def object_patches(scene: Scene, rng: np.random.Generator, background: int) -> np.ndarray:
    """Patches that touch an object, the middle row and column, which show where the image ends and
    its padding begins, and `background` others, ascending."""
    instances = draw_instances(scene, SIZE).reshape(GRID, PATCH, GRID, PATCH)
    kept = instances.any(axis=(1, 3))
    kept[GRID // 2], kept[:, GRID // 2] = True, True
    others = rng.permutation(np.flatnonzero(~kept))[:background]
    return np.sort(np.concatenate((np.flatnonzero(kept), others)))


def new_decoder(args: argparse.Namespace) -> tuple[Projector, LlamaDecoder]:
    """Projector and decoder with fresh weights, or those of `--start-from`."""
    torch.manual_seed(1)
    projector, decoder = Projector(TINY), LlamaDecoder(TINY.text)
    for module in (projector, decoder):
        initialise(module, TINY.text.num_layers)
    for layer in projector.layers:
        nn.init.xavier_uniform_(layer.weight)
    if args.start_from:
        earlier = load_model(args.start_from, dtype="float32")
        projector.load_state_dict(earlier.projector.state_dict())
        decoder.load_state_dict(earlier.decoder.state_dict())
    return projector.to(args.device), decoder.to(args.device)


def trained_tower(args: argparse.Namespace, stage: str = "tower") -> tuple[VisionTower, PatchHeads]:
    """The tower and its readers as the stage left them; where it never ran, the tower of
    `--start-from` with fresh readers."""
    torch.manual_seed(0)
    tower, heads = VisionTower(TINY.vision), PatchHeads(TINY.vision.hidden_size)
    path = args.work / f"{stage}.state.pt"
    if args.start_from and not path.exists():
        tower.load_state_dict(load_model(args.start_from, dtype="float32").vision.state_dict())
        return tower.to(args.device), heads.to(args.device)
    if not path.exists():
        raise SystemExit(f"no {path}: run --stage {stage} first, or give --start-from")
    state = torch.load(path, "cpu", weights_only=True)
    tower.load_state_dict(state["tower"])
    heads.load_state_dict(state["heads"])
    return tower.to(args.device), heads.to(args.device)


def train_decoder(args: argparse.Namespace) -> None:
    """Stage `decoder`: projector and decoder on the frozen tower's features, of scenes that are
    always new."""
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    tower, _ = trained_tower(args)
    held_out_features = see(tower, held_out.pixels, args.device)
    writer = Writer(load_tokenizer(args))
    projector, decoder = new_decoder(args)
    rates = {"projector": args.decoder_rate, "decoder": args.decoder_rate}
    modules: dict[str, nn.Module] = {"projector": projector, "decoder": decoder}
    trainer = Trainer("decoder", args.work, modules, rates, args.decoder_steps)
    losses = []
    late = args.start_from is not None
    steps = range(trainer.step, args.decoder_steps)
    batches = fresh_batches(args, steps, args.decoder_batch, late)
    for step, (scenes, pixels) in zip(trainer.run(), batches, strict=True):
        rng = np.random.default_rng([step, 8])
        kept = [object_patches(one, rng, int(rng.choice(BACKGROUND_PATCHES))) for one in scenes]
        packed = pack_scenes(scenes, kept, writer, rng, args.questions, late, args.device)
        features = see(tower, pixels, args.device)
        rows = [seen[some] for seen, some in zip(features, packed.patches, strict=True)]
        with autocast(args.device), attention(args.device):
            image_embeds = projector(torch.cat(rows).float())
            loss, _, _ = answer_loss(decoder, packed, image_embeds, args.device)
        trainer.update(loss)
        losses.append(loss.item())
        if trainer.step % 100 == 0 or trainer.step == args.decoder_steps:
            right = measure_answers(projector, decoder, held_out, held_out_features, writer, args)
            trainer.log(loss=round(float(np.mean(losses[-100:])), 4), **right)


def pack_scenes(
    scenes: Sequence[Scene],
    patches: list[np.ndarray],
    writer: Writer,
    rng: np.random.Generator,
    count: int,
    late: bool,
    device: str,
) -> Packed:
    """A description and `count` question blocks about each scene, of which the decoder sees some
    patches."""
    asked = [questions(scene, rng, 0.4) for scene in scenes]
    blocks = [pick_turns(one, rng, count, late) for one in asked]
    return pack(writer, blocks, patches, device)


@torch.no_grad()
def measure_answers(
    projector: Projector,
    decoder: LlamaDecoder,
    scenes: SceneSet,
    features: Tensor,
    writer: Writer,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Per family, the share of held-out answers whose every token has the highest logit, given all
    576 patches."""
    right: dict[str, list[float]] = {}
    for start in range(0, len(scenes), 8):
        indices = range(start, min(start + 8, len(scenes)))
        asked = [questions(scenes.scenes[i], np.random.default_rng([i, 9]), 0.0) for i in indices]
        asked = [one[:1] + one[1::3] + one[-1:] for one in asked]
        blocks = [[((one.text, one.answer),) for one in each] for each in asked]
        everything = [np.arange(GRID * GRID)] * len(indices)
        packed = pack(writer, blocks, everything, args.device)
        with autocast(args.device):
            embeds = projector(features[start : start + 8].flatten(0, 1).to(args.device).float())
            _, hits, rows = answer_loss(decoder, packed, embeds, args.device)
        runs = np.split(hits.cpu().numpy(), np.flatnonzero(np.diff(rows.cpu().numpy()) > 1) + 1)
        families = [one.family for each in asked for one in each]
        for family, run in zip(families, runs, strict=True):
            right.setdefault(family, []).append(bool(run.all()))
    return {family: round(float(np.mean(values)), 3) for family, values in right.items()}


# ------------------------------------------------------------------------------- joint


# Of how many background patches the decoder is shown those that the tower sees, and how much what
# the tower's readers say counts beside the answers.
JOINT_PATCHES, HEADS_SHARE = (64, 64, GRID * GRID), 0.3


def train_joint(args: argparse.Namespace) -> None:
    """Stage `joint`: tower, projector and decoder together, on scenes that are always new. Of most
    of them the tower sees few patches, of the last ones all 576; the decoder is shown those of
    objects with a few others, or all that the tower has seen."""
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    writer = Writer(load_tokenizer(args))
    tower, heads = trained_tower(args)
    begun = args.work / "joint.state.pt"
    if begun.exists():
        has_heads = "heads" in torch.load(begun, "cpu", weights_only=True)
    else:  # with a tower from a model folder the heads are fresh, and would teach it nothing
        has_heads = (args.work / "tower.state.pt").exists()
    projector, decoder = new_decoder(args)
    first = args.decoder_steps
    if (args.work / "decoder.state.pt").exists() or not args.start_from:
        state = torch.load(args.work / "decoder.state.pt", "cpu", weights_only=True)
        projector.load_state_dict(state["projector"])
        decoder.load_state_dict(state["decoder"])
        first = state["step"]
    modules: dict[str, nn.Module] = {"tower": tower, "projector": projector, "decoder": decoder}
    if has_heads:
        modules["heads"] = heads
    rates = dict.fromkeys(modules, args.joint_rate)
    trainer = Trainer("joint", args.work, modules, rates, args.joint_steps)
    # Its scenes are those that the decoder would have seen next.
    steps = range(first + trainer.step, first + args.joint_steps)
    batches = fresh_batches(args, steps, args.joint_batch, late=True)
    losses = []
    for step, (scenes, pixels) in zip(trainer.run(), batches, strict=True):
        rng = np.random.default_rng([step, 9])
        pixel_values, labels = to_pixel_values(pixels).to(args.device), label_scenes(scenes)
        patches, size = choose_patches(labels, step / args.joint_steps, rng)
        shown = show_patches(scenes, patches.numpy(), rng)
        kept = [seen[some] for seen, some in zip(patches.numpy(), shown, strict=True)]
        asked = args.joint_questions
        packed = pack_scenes(scenes, kept, writer, rng, asked, True, args.device)
        with autocast(args.device), attention(args.device):
            features = see_patches(tower, pixel_values, patches, size)
            image_embeds = projector(features[torch.from_numpy(shown)])
            loss, _, _ = answer_loss(decoder, packed, image_embeds, args.device)
            if has_heads:
                read = heads(features)
                loss = loss + HEADS_SHARE * patch_loss(read, labels.at(patches).to(args.device))
        trainer.update(loss)
        losses.append(loss.item())
        if trainer.step % 100 == 0 or trainer.step == args.joint_steps:
            seen = see(tower, held_out.pixels, args.device)
            right = measure_answers(projector, decoder, held_out, seen, writer, args)
            trainer.log(loss=round(float(np.mean(losses[-100:])), 4), **right)


def show_patches(
    scenes: Sequence[Scene], patches: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Which of the patches that the tower sees (B, N) the decoder is shown: (B, N) bool."""
    chosen = [object_patches(one, rng, int(rng.choice(JOINT_PATCHES))) for one in scenes]
    return np.stack([np.isin(seen, some) for seen, some in zip(patches, chosen, strict=True)])


# ------------------------------------------------------------------------------ export


def export(args: argparse.Namespace) -> None:
    """Write the newest weights as a model folder in bfloat16, or the mean of them and those of
    `--average-with`, such as earlier ends of the same training (Izmailov et al. 2018, Averaging
    weights leads to wider optima and better generalization)."""
    begun = [path for name in ("decoder", "joint") for path in args.work.glob(f"{name}.state.pt")]
    if not begun:
        raise SystemExit(f"nothing to export: no decoder.state.pt or joint.state.pt in {args.work}")
    newest = max(begun, key=lambda path: path.stat().st_mtime)
    state = torch.load(newest, "cpu", weights_only=True)
    tower = state.get("tower") or trained_tower(args)[0].state_dict()
    tokenizer = load_tokenizer(args)
    text = replace(TINY.text, sampled_vocab_size=tokenizer.vocab_size)
    config = replace(TINY, text=text)
    model = Llava(config)
    model.vision.load_state_dict(tower)
    model.projector.load_state_dict(state["projector"])
    model.decoder.load_state_dict(state["decoder"])
    if args.average_with:
        every = [model, *(load_model(folder, dtype="float32") for folder in args.average_with)]
        states = [one.state_dict() for one in every]
        mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        model.load_state_dict(mean)
    save_model(
        model.to(torch.bfloat16),
        config,
        args.out,
        tokenizer,
        source="tools/train_tiny.py",
        force=True,
    )


STAGES = {
    "crops": train_crops,
    "tower": train_tower,
    "decoder": train_decoder,
    "joint": train_joint,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="scenes, states, log")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"))
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="model folder that tower, decoder or joint goes on from, in a work folder of its own",
    )
    parser.add_argument(
        "--average-with",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="export the mean of the trained weights and those of these model folders",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--crop-steps", type=int, default=4000)
    parser.add_argument("--crop-rate", type=float, default=1.2e-3)
    parser.add_argument("--tower-steps", type=int, default=15000)
    parser.add_argument("--tower-rate", type=float, default=8e-4)
    parser.add_argument(
        "--questions", type=int, default=14, help="question blocks per image of the decoder stage"
    )
    parser.add_argument(
        "--drawers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes that draw scenes for decoder and joint (default: a core each; 0: none)",
    )
    parser.add_argument("--decoder-steps", type=int, default=7000)
    parser.add_argument(
        "--scene-seed",
        type=int,
        default=DECODER_SEED,
        metavar="N",
        help="which scenes decoder and joint see, and in which order the tower; 3 or more, another "
        "in every run that goes on",
    )
    parser.add_argument("--decoder-batch", type=int, default=20, help="images")
    parser.add_argument("--decoder-rate", type=float, default=1e-3)
    parser.add_argument("--joint-steps", type=int, default=1500)
    parser.add_argument("--joint-batch", type=int, default=24, help="images")
    parser.add_argument("--joint-questions", type=int, default=5, help="the same of joint")
    parser.add_argument("--joint-rate", type=float, default=3e-4)
    args = parser.parse_args()
    if args.start_from and args.stage not in ("tower", "decoder", "joint", "export"):
        parser.error("--start-from goes with --stage tower, decoder, joint or export")
    if args.average_with and args.stage != "export":
        parser.error("--average-with goes with --stage export")
    if args.scene_seed < DECODER_SEED:  # the ones below are the tower's and held out
        parser.error(f"--scene-seed must be {DECODER_SEED} or more")
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    args.work.mkdir(parents=True, exist_ok=True)
    if problem := misplaced(args.work, stages[0], args.start_from):
        parser.error(f"{problem}; give another --work")
    origin(args.work).write_text(name_of(args.start_from))
    for name in stages:
        STAGES[name](args)


def origin(work: Path) -> Path:
    """Where a work folder notes what its training started from."""
    return work / "started_from.txt"


def name_of(start_from: Path | None) -> str:
    return str(start_from.resolve()) if start_from else "nothing"


def misplaced(work: Path, stage: str, start_from: Path | None) -> str | None:
    """Why the stage must not run in this work folder, which holds one training from its beginning:
    else it would go on from another one's tower, or export another one's tokenizer."""
    later = list(STAGES)[list(STAGES).index(stage) + 1 :]
    begun = [name for name in later if (work / f"{name}.state.pt").exists()]
    if begun and stage != "export" and not (work / f"{stage}.state.pt").exists():
        return f"{work} has a training that is at {begun[-1]}, past {stage}"
    before = origin(work).read_text() if origin(work).exists() else None
    if before not in (None, name_of(start_from)):
        return f"{work} has a training that started from {before}, not from {name_of(start_from)}"
    return None


if __name__ == "__main__":
    main()
