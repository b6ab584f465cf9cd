"""Reading and writing the files of a checkpoint: JSON, safetensors, pickle, shards, whole folders.

Pure input and output: which tensors a model has, and what layouts call them, is not known here.
Weight files are mapped, so that nothing is read before its tensor is used. A folder is written
beside its destination and takes its place only when all of it is there.
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


BYTE_CODES = {torch.int8: "I8", torch.uint8: "U8"}  # of tensors that stand for weights, not weights

# The first that a folder has is used: safetensors before pickle, an index before loose files.
# open_clip's repositories hold a second copy, as model.safetensors, whose names are timm's.
WEIGHT_FILES = (
    "open_clip_*.safetensors",
    "open_clip_*.bin",
    "model.safetensors.index.json",
    "model*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model*.bin",
)

# Everything in a folder that says what checkpoint it is: none of it may outlive a replacement.
CHECKPOINT_FILES = (
    "manifest.json",  # first: what is left without it never passes for a checked folder
    "config.json",
    *WEIGHT_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "thresholds.json",
)

# Weight file -> names that an index promises to be in it (empty without an index).
Files = dict[Path, list[str]]

# Shape and dtype of a tensor to write.
Spec = tuple[tuple[int, ...], torch.dtype]


# ---- read ----------------------------------------------------------------------------------------


def read_json_value(path: Path) -> Any:
    """Read any JSON. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError when it is missing or damaged."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or pickle file by stored name, mapped: no data is read yet.

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
    """The only place that reads pickle: tensors and plain containers, nothing that runs code."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # The rest of torch's words is about how to run such code nevertheless.
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


def file_in(folder: Path, name: object, index: Path) -> Path:
    """A file an index names. Raises CheckpointError unless it lies in the index's own folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+", name) or name in (".", ".."):
        raise CheckpointError(f"{index}: file name {name!r} leads outside the folder")
    return folder / name


def indexed_files(index: Path, weight_map: object) -> Files:
    """Group `weight_map` (stored name -> file name) by file."""
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: holds no weight_map")
    files: Files = {}
    for name, file_name in weight_map.items():
        files.setdefault(file_in(index.parent, file_name, index), []).append(name)
    for file, names in files.items():
        if not file.is_file():
            raise CheckpointError(
                f"{file}: the shard is missing; it holds {len(names)} tensors, first {names[0]!r}"
            )
    return files


def weight_files(folder: Path) -> Files:
    """The weight files of a folder: by manifest (ours), by index, or by name; {} without any."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        rows = read_json(manifest).get("tensors")
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise CheckpointError(f"{manifest}: holds no table of tensors")
        return indexed_files(manifest, {name: row.get("file") for name, row in rows.items()})
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if found and pattern.endswith(".index.json"):
            return indexed_files(found[0], read_json(found[0]).get("weight_map"))
        if found:
            return {file: [] for file in found}
    return {}


# ---- write ---------------------------------------------------------------------------------------


def num_bytes(spec: Spec) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return math.prod(spec[0]) * spec[1].itemsize


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write one safetensors file, one tensor in memory at a time. Returns each tensor's sha256.

    The library's writer wants the whole file in memory at once, which at 2 GB a shard is most of
    what a conversion may use."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        end = offset + num_bytes((shape, dtype))
        header[name] = {
            "dtype": (DTYPE_CODES | BYTE_CODES)[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors start on a cache line
    hashes = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise CheckpointError(f"{path}: tensor {name!r} is not the {shape} announced")
            data = tensor_bytes(tensor)
            hashes[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only here
    return hashes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's raw bytes, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def plan_shards(specs: Mapping[str, Spec], shard_size: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most `shard_size` bytes of tensors (a
    larger tensor gets a file of its own)."""
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
    """Write all tensors, in files as `plan_shards` says.

    Returns the manifest's table: name -> file, shape, dtype, sha256."""
    table = {}
    for file, names in plan_shards(specs, shard_size).items():
        hashes = write_safetensors(folder / file, {name: specs[name] for name in names}, read)
        for name in names:
            shape, dtype = specs[name]
            table[name] = {
                "file": file,
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": hashes[name],
            }
    return table


@contextmanager
def staged(destination: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, to become `destination` only if the block succeeds.

    On any error or interrupt nothing is left behind. A destination that exists, or is a link to a
    folder, stays that folder (it may be a disk of its own): the temporary one lies in it, else
    beside it. With `force`, a checkpoint that is already there is replaced, and files that are none
    of a checkpoint's stay. Raises CheckpointError when the destination is not empty, or the disk is
    full."""
    place = destination.resolve()
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{destination}: is a file, not a folder")
    check_free(place, force)
    scratch: str | None = None
    try:
        parent = place if place.is_dir() else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two runs with one destination must not write into one folder.
        scratch = tempfile.mkdtemp(prefix=scratch_prefix(place), dir=parent)
        staging = Path(scratch) / "staging"
        staging.mkdir()  # mkdtemp's own folder is closed to other users, this one follows the umask
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
    """Raise CheckpointError when something is in the folder, unless `force`."""
    if force or not destination.is_dir():
        return
    # A new disk is empty but for the folder of its file system.
    names = (file.name for file in destination.iterdir())
    if any(n != "lost+found" and not n.startswith(scratch_prefix(destination)) for n in names):
        raise CheckpointError(f"{destination}: is not empty (force, --force, replaces it)")


def publish(staging: Path, destination: Path, force: bool) -> None:
    """Move the finished folder into place.

    In a folder that exists, the old checkpoint goes before the new one comes, whose config and
    manifest come last: stopped in between, it is no checkpoint rather than a mixture of two."""
    check_free(destination, force)  # again: another run may have been faster
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
