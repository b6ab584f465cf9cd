"""Read DToMe thresholds: our JSON, a JSON list, or a DyMU `.pth`."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_lite.config import FastViTHDConfig, TowerConfig, VisionConfig
from llava_lite.errors import CheckpointError

if TYPE_CHECKING:
    from llava_lite.checkpoints.source import Source

FILE_NAME = "thresholds.json"


NEVER = 1.0  # no pair merges, because no cosine is larger; also the first value in DyMU's training

# Published by DyMU's authors for this tower: 72 tokens after its last block.
OPENAI_CLIP_L_336 = (
    *(0.99609375, 0.97265625, 0.94140625, 0.91015625, 0.87890625, 0.87890625),
    *(0.87890625, 0.84765625, 0.84765625, 0.87890625, 0.84765625, 0.84765625),
    *(0.87890625, 0.87890625, 0.91015625, 0.91015625, 0.91015625, 0.91015625),
    *(0.94140625, 0.87890625, 0.87890625, 0.97265625, 0.99609375, 0.81640625),
)


# ---- read ----------------------------------------------------------------------------------------


def read_thresholds(path: str | os.PathLike[str]) -> tuple[float, ...]:
    """Read one threshold per block from a file.

    A `.json` file holds a list of numbers, or an object with such a list as "thresholds". Any other
    file is a checkpoint of DyMU's training, whose names may start with "module."; there, a block
    without a threshold gets 1.0. Raises CheckpointError that names the file."""
    path = Path(path)
    values = read_list(path) if path.suffix.lower() == ".json" else read_dymu(path)
    for block, value in enumerate(values):
        if not math.isfinite(value):
            raise CheckpointError(f"{path}: the threshold of block {block} is {value}")
    return tuple(values)


def read_list(path: Path) -> list[float]:
    """Read the numbers of a JSON file."""
    from llava_lite.checkpoints.tensors import read_json_value

    content = read_json_value(path)
    if isinstance(content, dict):
        content = content.get("thresholds")
    if not isinstance(content, list) or not content:
        raise CheckpointError(f'{path}: holds no list of thresholds, alone or as "thresholds"')
    for block, value in enumerate(content):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{path}: the threshold of block {block} is {value!r}, no number")
    try:
        return [float(value) for value in content]
    except OverflowError:
        raise CheckpointError(f"{path}: a threshold is too large for a number") from None


def read_dymu(path: Path) -> list[float]:
    """Read the thresholds of a state dict with open_clip's names."""
    from llava_lite.checkpoints.tensors import read_tensors

    found: dict[int, float] = {}
    num_blocks = 0
    for name, tensor in read_tensors(path).items():
        place = re.fullmatch(r"(?:module\.)?visual\.transformer\.resblocks\.(\d{1,3})\.(.+)", name)
        if place is None:
            continue
        block = int(place[1])
        num_blocks = max(num_blocks, block + 1)
        if place[2] == "threshold":
            if not tensor.is_floating_point() or tensor.numel() != 1:
                shape = tuple(tensor.shape)
                raise CheckpointError(
                    f"{path}: {name!r} is {tensor.dtype} of shape {shape}, not a single float"
                )
            found[block] = tensor.item()
    if not found:
        raise CheckpointError(
            f"{path}: holds no thresholds (visual.transformer.resblocks.0.threshold, ...)"
        )
    return [found.get(block, NEVER) for block in range(num_blocks)]


@dataclass(frozen=True)
class OwnThresholds:
    """The thresholds of a checkpoint, as they were when it was opened.

    file: the thresholds.json of the checkpoint, if it has one. error: why it cannot be used, which
    matters only to calls that need the thresholds."""

    file: Path | None
    values: tuple[float, ...] | None
    error: str | None = None

    @staticmethod
    def of(source: "Source") -> "OwnThresholds":
        """Read the file. Without a file: DyMU's list for a tower with the sizes of OpenAI's
        CLIP-L/336, and no thresholds for any other tower."""
        file, vision = find_thresholds_file(source), source.config.vision
        if file is None:
            return OwnThresholds(None, known_list(vision))
        try:
            thresholds = read_thresholds(file)
            check_length(file, thresholds, vision)
            return OwnThresholds(file, thresholds)
        except CheckpointError as error:
            return OwnThresholds(file, None, str(error))

    def read(self) -> tuple[float, ...] | None:
        """The thresholds, if any. Raises CheckpointError for a damaged file and for a file that
        does not fit the tower."""
        if self.error is not None:
            raise CheckpointError(self.error)
        return self.values


def known_list(vision: TowerConfig) -> tuple[float, ...] | None:
    """DyMU's published list, if the tower has the sizes of OpenAI's CLIP-L/336."""
    openai = VisionConfig()
    if isinstance(vision, FastViTHDConfig):
        return None
    depth = {"num_layers": openai.num_layers, "feature_layer": openai.feature_layer}
    if replace(vision, **depth) == openai and vision.num_layers <= openai.num_layers:
        return OPENAI_CLIP_L_336[: vision.num_layers]
    return None


def find_thresholds_file(source: "Source") -> Path | None:
    """The thresholds.json in the checkpoint's folder, else in the folder of its tower's weights."""
    is_fastvithd = isinstance(source.config.vision, FastViTHDConfig)
    first = "vision.stem.0.weight" if is_fastvithd else "vision.class_embed"
    tower = source.entries[first].file
    # An open_clip model object lies in no folder.
    folders = [source.path] if tower in source.in_memory else [source.path, tower.parent]
    files = (folder / FILE_NAME for folder in folders)
    return next((file for file in files if file.is_file()), None)


def check_length(path: Path, thresholds: tuple[float, ...], vision: TowerConfig) -> None:
    """Raise CheckpointError unless there is one threshold for each block of CLIP, or for each of
    some rounds behind FastViTHD."""
    from llava_lite.reduction import MAX_ROUNDS

    if isinstance(vision, FastViTHDConfig):
        if len(thresholds) > MAX_ROUNDS:
            raise CheckpointError(
                f"{path}: holds {len(thresholds)} thresholds, but FastViTHD merges after the "
                f"tower: name 1 to {MAX_ROUNDS}"
            )
        return
    if len(thresholds) not in (vision.num_blocks, vision.num_layers):
        raise CheckpointError(
            f"{path}: holds {len(thresholds)} thresholds, but the tower runs {vision.num_blocks} "
            f"of {vision.num_layers} blocks: name {vision.num_blocks} or {vision.num_layers}"
        )
