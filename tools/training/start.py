"""Initial weights of a tower, which gradients alone would find late or never."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_lite.vision import VisionTower
from training.labels import label_scenes, to_pixel_values, whole_batch
from training.readers import PatchHeads, patch_loss
from training.scenes import GRID, SceneSet
from training.seeing import run_blocks, see


def start_local(tower: VisionTower, gain: float = 2.0) -> None:
    """Start with attention to patches that look alike and are near: those of the same object.

    Queries and keys start as one projection (mimetic initialization, Trockman and Kolter, arXiv
    2305.09828) of tokens with sines of their place. With random weights every patch would see the
    average of all 576 patches, and learn nothing for a long time."""
    with torch.no_grad():
        tower.pos_embed[1:] = grid_positions(tower.pos_embed.shape[1])
        for block in tower.blocks:
            for head in block.attn.q_proj.weight.chunk(block.attn.num_heads):
                nn.init.orthogonal_(head, gain)
            block.attn.k_proj.weight.copy_(block.attn.q_proj.weight)


def grid_positions(width: int) -> Tensor:
    """Initial position table (GRID * GRID, width): sines and cosines of row and column.

    With a random table, a crop teaches nothing about patches further apart than its side. With
    sines, distance means the same everywhere."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies  # (GRID, width / 4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # (GRID, width / 2)
    rows = line[:, None].expand(GRID, GRID, -1)
    columns = line[None].expand(GRID, GRID, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


HEAD_STEPS = 600


def fit_heads(tower: VisionTower, heads: PatchHeads, scenes: SceneSet) -> None:
    """Train new heads on a frozen tower. Gradients of untrained heads would harm the tower."""
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


# Lengths of the place vectors before and after the first norm. A patch has length 25 before it; the
# vectors in the blocks have lengths of 15 to 100.
CARRIER_GAIN, CARRIED = 40.0, 12.0


@torch.no_grad()
def carry_places(tower: VisionTower, heads: PatchHeads, scenes: SceneSet) -> None:
    """Reserve four channels of the tower for each patch's place: sine and cosine of its column and
    of its row. No block writes to them, and at first no block reads them.

    Without them the position is 1/50 of a block's input, and patches know their place only to a
    quarter of a patch. The two lengths are the same for all patches, so norms hardly change them.
    The channels are those that carried least. The norms' gains grow as much as the new channels
    make their inputs longer."""
    width = tower.pos_embed.shape[1]
    lengths, carried = measure_stream(tower, scenes)
    channels = carried.argsort()[:4]
    angles = torch.linspace(-1, 1, GRID, device=channels.device) * (0.25 * math.pi)
    line = torch.stack((angles.sin(), angles.cos()), dim=1)  # (GRID, 2)
    columns, rows = line.repeat(GRID, 1), line.repeat_interleave(GRID, 0)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0]).to(angles)  # keeps the mean almost the same
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
    """Fit the heads for place, spot and extent on objects' patches by least squares. By gradients,
    weights that start at zero need a thousand steps."""
    inputs, targets = [], []
    for start in range(0, len(scenes), 16):
        pixels, labels = whole_batch(scenes, range(start, min(start + 16, len(scenes))))
        features = heads.norm(tower(pixels.to(tower.pos_embed.device)).image_features)
        on_object = labels.color > 0
        inputs.append(features[on_object])
        known = torch.cat((labels.own, labels.spot, labels.extent), dim=-1).to(features)
        targets.append(known[on_object])
    weight, bias = fit_linear(torch.cat(inputs).double(), torch.cat(targets).double())
    for index, head in enumerate((heads.place, heads.spot, heads.extent)):
        head.weight.copy_(weight[2 * index : 2 * index + 2])
        head.bias.copy_(bias[2 * index : 2 * index + 2])


def fit_linear(x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (M, C) and bias (M,) of the linear map from x (N, C) to `wanted` (N, M), by least
    squares with a small ridge."""
    centered = x - x.mean(0)
    ridge = centered.T @ centered + 0.1 * torch.eye(x.shape[1]).to(x)
    weight = torch.linalg.solve(ridge, centered.T @ (wanted - wanted.mean(0))).T
    return weight, wanted.mean(0) - weight @ x.mean(0)


def measure_stream(tower: VisionTower, scenes: SceneSet) -> tuple[list[float], Tensor]:
    """Before every norm and at the end: the length of the longest tenth of patches, most of them
    objects'. And each channel's share of the variation there, on average (C,)."""
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
    """Initialize one attention head to tell every patch the extent of the unpadded image.

    An object's place in thirds of the image depends on the extent, but no patch near the object
    shows it. By gradient alone the tower does not find it in 1,500 steps. The mean of all patches
    before block EXTENT_BLOCK contains it. So a linear map from this mean is fitted to `scenes` by
    least squares. The head attends to all patches equally and adds the result to every patch."""
    attn, width = tower.blocks[EXTENT_BLOCK].attn, tower.pos_embed.shape[1]
    seen, spread = mean_patches(tower, scenes)  # (scenes, C)
    sizes = [(scene.width, scene.height) for scene in scenes.scenes]
    extents = torch.tensor([(w / max(w, h), h / max(w, h)) for w, h in sizes]).to(seen)
    wanted = (extents - extents.mean(0)) / extents.std(0).clamp(min=1e-2)
    weight, bias = fit_linear(seen, wanted)
    last = slice(width - width // attn.num_heads, width)  # the rows of the last head
    for proj, std in ((attn.q_proj, 0.003), (attn.k_proj, 0.003), (attn.v_proj, 0.05)):
        nn.init.normal_(proj.weight[last], std=std)
        nn.init.zeros_(proj.bias[last])
    nn.init.normal_(attn.o_proj.weight[:, last], std=0.05)
    first = slice(last.start, last.start + 2)
    attn.v_proj.weight[first], attn.v_proj.bias[first] = weight, bias
    directions = torch.linalg.qr(torch.randn(width, 2, device=seen.device))[0]
    attn.o_proj.weight[:, first] = EXTENT_GAIN * spread * directions


def mean_patches(tower: VisionTower, scenes: SceneSet) -> tuple[Tensor, Tensor]:
    """The mean over patches of the input of block EXTENT_BLOCK, (scenes, C), and the standard
    deviation of its inputs."""
    means, spread = [], []
    for start in range(0, len(scenes), 32):
        pixels = to_pixel_values(np.array(scenes.pixels[start : start + 32]))
        x = tower.pre_norm(tower.embed(pixels.to(tower.pos_embed.device)))
        x = run_blocks(tower.blocks[:EXTENT_BLOCK], x)
        means.append(tower.blocks[EXTENT_BLOCK].norm1(x).mean(1))
        spread.append(x.std())
    return torch.cat(means), torch.stack(spread).mean()
