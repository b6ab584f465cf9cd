"""Read and write the files of a checkpoint: JSON, safetensors, pickle, shards, whole folders.

Weight files are mapped: a tensor is read from disk when it is used. A folder is written to a
temporary place, and moves to its destination when it is complete.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_lite.errors import CheckpointError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
BYTE_CODES = {torch.int8: "I8", torch.uint8: "U8"}  # codes of quantized weights
COUNTER_CODES = {torch.int64: "I64"}  # steps of a training

# The first pattern with a file is used: safetensors before pickle, an index before loose files.
# open_clip repositories also hold model.safetensors, a second copy with timm's names.
WEIGHT_FILES = (
    "open_clip_*.safetensors",
    "open_clip_*.bin",
    "model.safetensors.index.json",
    "model*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model*.bin",
)

# The files that make a folder a checkpoint. Replacing a checkpoint removes all of them.
CHECKPOINT_FILES = (
    "manifest.json",  # first: without it, a half-removed folder is not trusted
    "config.json",
    *WEIGHT_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.gguf",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "thresholds.json",
)

# Weight file -> the tensor names that the index lists for it (empty without an index).
Files = dict[Path, list[str]]

# Shape and dtype of a tensor to write.
Spec = tuple[tuple[int, ...], torch.dtype]


# ---- read ----------------------------------------------------------------------------------------


def read_json_value(path: Path) -> Any:
    """Read a JSON value. Raises CheckpointError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing or damaged."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map all tensors of a .safetensors or pickle file, by stored name.

    Raises CheckpointError for a missing, truncated, damaged or unsafe file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a pickle file that holds only tensors and plain containers. Code in it never runs."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 are not zip archives, so they cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # The rest of torch's message explains how to run the code anyway.
        found = re.search(r"(?:WeightsUnpickler error|PytorchStreamReader.*?): (.+)", str(error))
        reason = f": {found[1]}" if found else ""
        raise CheckpointError(
            f"{path}: damaged, no checkpoint of torch, or holds more than tensors (code is never "
            f"run){reason}"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, no tensor")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise CheckpointError(f"{path}: tensor {name!r} is sparse, nested or quantized")
        if tensor.device.type == "meta":
            raise CheckpointError(f"{path}: tensor {name!r} was saved without its values")
    return content


def group_by_file(index: Path, weight_map: object) -> Files:
    """Group a weight_map (stored name -> file name) by file. Raises CheckpointError for a missing
    file, and for one outside the folder."""
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: holds no weight_map")
    files: Files = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not re.fullmatch(r"[^/\\:\0]+", file)
            or file in (".", "..")
        ):
            raise CheckpointError(f"{index}: file name {file!r} leads outside the folder")
        files.setdefault(index.parent / file, []).append(name)
    for path, names in files.items():
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the shard is missing; it holds {len(names)} tensors, first {names[0]!r}"
            )
    return files


def weight_files(folder: Path) -> Files:
    """Find the weight files of a folder: by our manifest, by an index, or by name ({}: none)."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        rows = read_json(manifest).get("tensors")
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise CheckpointError(f"{manifest}: holds no table of tensors")
        return group_by_file(manifest, {name: row.get("file") for name, row in rows.items()})
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if found and pattern.endswith(".index.json"):
            return group_by_file(found[0], read_json(found[0]).get("weight_map"))
        if found:
            return {file: [] for file in found}
    return {}


# ---- write ---------------------------------------------------------------------------------------


def num_bytes(spec: Spec) -> int:
    """The bytes of a tensor with this shape and dtype."""
    return math.prod(spec[0]) * spec[1].itemsize


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """Write one safetensors file, with one tensor in memory at a time. Returns its rows in the
    manifest's table: name -> file, shape, dtype, sha256.

    The library's own writer needs the whole file, 2 GB, in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        end = offset + num_bytes((shape, dtype))
        header[name] = {
            "dtype": (DTYPE_CODES | BYTE_CODES | COUNTER_CODES)[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors start on a cache line
    table = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise CheckpointError(f"{path}: tensor {name!r} is not the {shape} announced")
            data = tensor_bytes(tensor)
            file.write(data)
            table[name] = {
                "file": path.name,
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        file.flush()
        os.fsync(file.fileno())  # a full disk may be reported only here
    return table


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy if it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def plan_shards(specs: Mapping[str, Spec], shard_size: int) -> dict[str, list[str]]:
    """Spread tensors over files: file name -> tensor names, in order. A file holds at most
    `shard_size` bytes, or one larger tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + num_bytes(spec) > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += num_bytes(spec)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    total = len(shards)
    return {f"model-{i:05}-of-{total:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def write_shards(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    shard_size: int,
) -> dict[str, dict[str, Any]]:
    """Write all tensors to the files of `plan_shards`. Returns the manifest's table."""
    table: dict[str, dict[str, Any]] = {}
    for file, names in plan_shards(specs, shard_size).items():
        table |= write_safetensors(folder / file, {name: specs[name] for name in names}, read)
    return table


@contextmanager
def stage_folder(destination: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `destination` if the block succeeds. An error or
    interrupt leaves nothing behind.

    An existing destination folder stays, because it may be a mounted disk: its content is moved in.
    `force` replaces a checkpoint at the destination, and keeps all other files there. Raises
    CheckpointError if the destination is not empty, or the disk is full."""
    place = destination.resolve()
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{destination}: is a file, not a folder")
    check_free(place, force)
    scratch: str | None = None
    try:
        parent = place if place.is_dir() else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        # A unique name: two runs with one destination must not share a folder.
        scratch = tempfile.mkdtemp(prefix=scratch_prefix(place), dir=parent)
        staging = Path(scratch) / "staging"
        staging.mkdir()  # follows the umask; mkdtemp's folder is closed to other users
        yield staging
        publish(staging, place, force)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def scratch_prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def check_free(destination: Path, force: bool) -> None:
    """Raise CheckpointError if the folder is not empty, unless `force`."""
    if force or not destination.is_dir():
        return
    # A new disk holds only the folder of its file system.
    names = (file.name for file in destination.iterdir())
    if any(n != "lost+found" and not n.startswith(scratch_prefix(destination)) for n in names):
        raise CheckpointError(f"{destination}: is not empty (use force, --force, to overwrite)")


def publish(staging: Path, destination: Path, force: bool) -> None:
    """Move the finished folder to its destination.

    In an existing folder, the old checkpoint is removed first, and the new config and manifest are
    moved last. An interrupted move leaves no checkpoint, instead of a mixture of two."""
    check_free(destination, force)  # again: another run may have finished first
    if not destination.exists():
        staging.replace(destination)
        return
    for pattern in CHECKPOINT_FILES:
        for file in destination.glob(pattern):
            if not file.is_dir():
                file.unlink()
    last = ("config.json", "manifest.json")
    files = [file for file in sorted(staging.iterdir()) if file.name not in last]
    files += [staging / name for name in last if (staging / name).is_file()]
    for file in files:
        file.replace(destination / file.name)
