"""Checkpoints: open any published layout, read it tensor by tensor under our names, write our own.

    open_source(folder)  what is it, which tensors has it, do all names and shapes fit  -> Source
    load_model(folder)   Source -> Llava; a converted folder is memory-mapped, not copied
    save_model(...)      Llava -> config.json, model*.safetensors, tokenizer.json, manifest.json

Nothing is read from a weight file until its tensor is asked for, and every problem (missing,
unexpected, misshapen, unsafe) is found before the first one is. The layouts are told apart by what
is in a folder, never by what it is called.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llava_lite.config import LlavaConfig, VisionConfig, parse, parse_vision
from llava_lite.errors import CheckpointError
from llava_lite.layouts import describe, is_unused, lora_target, our_names
from llava_lite.llava import Llava

if TYPE_CHECKING:
    from llava_lite.tokenizer import Tokenizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
SHARD_SIZE = 2_000_000_000
CLIP_REPO = "openai/clip-vit-large-patch14-336"
TOWER_INSIDE = "{}: has its own vision tower, the one given is not used"

# The first that a folder has is used: safetensors before pickle, an index before loose files.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model*.bin",
    "open_clip_*.safetensors",
    "open_clip_*.bin",
)

# Weight file -> names that an index promises to be in it (empty without an index).
Files = dict[Path, list[str]]


# files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
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
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: damaged, or holds more than tensors (code is never run): {reason}"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, no tensor")
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


def find_local(name: str, near: Path) -> Path | None:
    """Find what a config names (a path, or a hub id) without any network: relative to the folder
    `near`, as an absolute path, beside `near`, or in the huggingface_hub cache."""
    places = (near / Path(name).expanduser(), near.resolve().parent / name.rsplit("/", 1)[-1])
    for place in places:
        if place.exists():
            return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


# what a source holds


@dataclass(frozen=True)
class Entry:
    """Where one of our tensors is stored. `block`: which third of a packed q, k, v."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int | None = None


@dataclass
class Inventory:
    """Tensors by our name. What is added later wins: base, then what was trained, then adapter."""

    entries: dict[str, Entry] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    lora: dict[str, dict[str, Entry]] = field(
        default_factory=dict
    )  # our name -> {"A": .., "B": ..}
    in_memory: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict)

    def add_files(self, files: Files, only: str = "", own_names: bool = False) -> None:
        """Add every tensor of the files; with `only`, those whose name in our words starts so."""
        added: dict[str, Entry] = {}
        for file, promised in files.items():
            tensors = read_tensors(file)
            lost = next((name for name in promised if name not in tensors), None)
            if lost is not None:
                raise CheckpointError(f"{file}: tensor {lost!r}, listed in the index, is missing")
            for name, entry in self.locate(file, tensors, own_names).items():
                if name in added:
                    raise CheckpointError(
                        f"{file}: tensor {entry.stored!r} is also in {added[name].file}"
                    )
                if name.startswith(only):
                    added[name] = entry
                else:
                    self.ignored.append(entry.stored)
        self.entries |= added

    def locate(
        self, file: Path, tensors: Mapping[str, Tensor], own_names: bool = False
    ) -> dict[str, Entry]:
        """Entries of one file by our name. Raises CheckpointError naming an unknown tensor."""
        # The state dict of open_clip's `model.visual` alone lacks the family's prefix.
        family = "visual." if "conv1.weight" in tensors else ""
        found: dict[str, Entry] = {}
        for stored, tensor in tensors.items():
            self.stored.append(stored)
            try:
                names = (stored,) if own_names else our_names(family + stored)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from None
            if not names:
                self.ignored.append(stored)
            shape = tuple(tensor.shape)
            if len(names) == 3:
                if not shape or shape[0] % 3:
                    raise CheckpointError(
                        f"{file}: tensor {stored!r} of {shape} is no packed q, k, v"
                    )
                shape = (shape[0] // 3, *shape[1:])
            for block, name in enumerate(names):
                if name in found:
                    raise CheckpointError(
                        f"{file}: {stored!r} and {found[name].stored!r} are one tensor"
                    )
                packed = block if len(names) == 3 else None
                found[name] = Entry(file, stored, shape, tensor.dtype, packed)
        return found

    def add_module(self, visual: nn.Module) -> None:
        """Add the tower of an open_clip model object, straight from memory."""
        visual, file = open_clip_visual(visual), Path("open_clip model")
        self.in_memory[file] = visual.state_dict()
        self.entries |= self.locate(file, self.in_memory[file])

    def add_lora(self, file: Path) -> None:
        """Add the A and B matrices of an adapter. LoRA on the tower is ignored with a warning."""
        tensors = read_tensors(file)
        skipped = 0
        for stored, tensor in tensors.items():
            try:
                target = lora_target(stored)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from None
            if target is None:
                skipped += 1
                self.ignored.append(stored)
                continue
            half, name = target
            entry = Entry(file, stored, tuple(tensor.shape), tensor.dtype)
            self.lora.setdefault(name, {})[half] = entry
        if skipped:
            warnings.warn(
                f"{file}: ignored {skipped} LoRA tensors of the vision tower", stacklevel=2
            )
        self.in_memory[file] = tensors  # small, and needed beside every shard of the base


@dataclass
class Source:
    """An opened checkpoint: its config, and its tensors by our name, read one at a time.

    `unused` are tower parts that LLaVA never runs, `ignored` the names of everything else that is
    skipped on purpose. `trusted`: our own folder, whose manifest was written after every check."""

    path: Path
    layout: str
    config: LlavaConfig
    entries: dict[str, Entry]
    unused: dict[str, Entry] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    lora: dict[str, dict[str, Entry]] = field(default_factory=dict)
    lora_scale: float = 1.0
    tokenizer_file: Path | None = None
    trusted: bool = False
    in_memory: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _last: tuple[Path, Mapping[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights; the tower runs in it, too."""
        return self.entries["decoder.embed_tokens.weight"].dtype

    @property
    def revision(self) -> str | None:
        """Commit of a folder inside the huggingface_hub cache."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by our name."""
        return (self.entries.get(name) or self.unused[name]).shape

    def names(self) -> list[str]:
        """Our names, file by file, so that reading in this order opens each file once."""
        order = {entry.file: None for entry in self.entries.values()}
        rank = {file: number for number, file in enumerate(order)}
        return sorted(self.entries, key=lambda name: rank[self.entries[name].file])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor by our name, LoRA merged, in `dtype` (default: the decoder's).

        Without a cast it is a view of the mapped file. Raises CheckpointError for NaN, infinity."""
        entry = self.entries.get(name) or self.unused[name]
        dtype = dtype or self.dtype
        tensor = self._stored(entry)
        if name in self.lora:
            # W + (alpha / r) B A, in float32 and cast once at the end.
            pair = self.lora[name]
            change = self._stored(pair["B"]).float() @ self._stored(pair["A"]).float()
            tensor = torch.add(tensor.float(), change, alpha=self.lora_scale)
        result = tensor.to(dtype).contiguous()
        if not self.trusted:
            check_finite(result, f"{entry.file}: tensor {entry.stored!r}")
        return result

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs in the order of `names`."""
        for name in self.names():
            yield name, self.read(name, dtype)

    def _stored(self, entry: Entry) -> Tensor:
        tensors = self.in_memory.get(entry.file)
        if tensors is None:
            if self._last is None or self._last[0] != entry.file:
                self._last = None  # unmap the last file before the next one is mapped
                self._last = (entry.file, read_tensors(entry.file))
            tensors = self._last[1]
        tensor = tensors[entry.stored]
        return tensor if entry.block is None else tensor.chunk(3)[entry.block]


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise CheckpointError for NaN or infinity; `where` names file and tensor."""
    for part in tensor.flatten().split(1 << 24):  # bounds the temporary memory of isfinite
        if not torch.isfinite(part).all():
            raise CheckpointError(f"{where} has NaN or infinite values (as {tensor.dtype})")


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of all tensors of a model, without building its weights."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def meta_model(config: LlavaConfig) -> Llava:
    """The model without memory behind its weights, ready for `load_state_dict(assign=True)`."""
    with torch.device("meta"), WithoutInit():
        return Llava(config).eval().requires_grad_(False)


class WithoutInit(TorchFunctionMode):
    """Skips random initialisation. On the meta device it does nothing but import a second's worth
    of torch's compiler."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def check_entries(
    entries: Mapping[str, Entry], config: LlavaConfig, where: Path
) -> dict[str, Entry]:
    """Compare names, shapes and dtypes with the model. Returns the unused tower parts.

    Raises CheckpointError naming the first offender and how many there are."""
    expected = expected_shapes(config)
    unused = {name: e for name, e in entries.items() if is_unused(name, config.vision)}
    unexpected = [name for name in entries if name not in expected and name not in unused]
    if unexpected:
        first = entries[unexpected[0]]
        raise CheckpointError(
            f"{first.file}: tensor {first.stored!r} has no place in this model "
            f"({len(unexpected)} such tensors)"
        )
    missing = [name for name in expected if name not in entries]
    if missing:
        hint = ""
        if all(name.startswith("projector.") for name in missing):
            hint = "; is it a plain Llama? give the projector as the model and this folder as base"
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}{hint}"
        )
    wrong = [name for name in expected if entries[name].shape != expected[name]]
    if wrong:
        first, shape = entries[wrong[0]], expected[wrong[0]]
        raise CheckpointError(
            f"{first.file}: tensor {first.stored!r} has shape {first.shape}, "
            f"the config says {shape} ({len(wrong)} such tensors)"
        )
    for entry in entries.values():
        if entry.dtype not in DTYPE_CODES:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.stored!r} is {entry.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )
    return unused


def check_lora(inventory: Inventory, where: Path) -> None:
    """Raise CheckpointError unless each A (r, in) and B (out, r) pair fits the weight (out, in)."""
    for name, pair in inventory.lora.items():
        base = inventory.entries.get(name)
        if base is None or len(pair) != 2:
            present = next(iter(pair.values())).stored
            raise CheckpointError(f"{where}: {present!r} lacks its other half or its base weight")
        a, b = pair["A"], pair["B"]
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or ((b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1])
        ):
            raise CheckpointError(
                f"{a.file}: {a.stored!r} {a.shape} with B {b.shape} does not fit {base.shape}"
            )


# layouts


def open_source(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | nn.Module | None = None,
) -> Source:
    """Open a checkpoint of any layout and check it completely, except for the values.

    `base`: the Llama or LLaVA folder below a LoRA adapter or a projector. `vision_tower`: the CLIP
    folder, file (HF or OpenAI names) or open_clip model for a checkpoint that has no tower inside.
    Raises CheckpointError naming file and tensor."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.is_file():
        return open_projector(path, base, vision_tower)
    if (path / "adapter_config.json").is_file():
        return open_lora(path, base, vision_tower)
    if not weight_files(path) and list(path.glob("mm_projector*")):
        return open_projector(path, base, vision_tower)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json, so it is no checkpoint folder")
    if base is not None:
        raise CheckpointError(f"{path}: a whole model needs no base (only LoRA and projectors do)")
    inventory = Inventory()
    raw = add_folder(inventory, path)
    config = complete(inventory, raw, path, vision_tower)
    return finish(path, inventory, config, tokenizer_from=(path,))


def add_folder(inventory: Inventory, folder: Path) -> dict[str, Any]:
    """Add a folder's weights to the inventory and return its config.json."""
    raw = read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin)"
        )
    inventory.add_files(files, own_names=raw.get("format") == "llava_lite")
    return raw


def open_projector(
    path: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """A trained projector (a file, or a folder with mm_projector.bin) over a base Llama."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else sorted(path.glob("mm_projector*"))[0]
    if not any("mm_projector." in name for name in read_tensors(file)):
        raise CheckpointError(
            f"{file}: holds no mm_projector tensors; give the checkpoint's folder"
        )
    inventory = Inventory()
    base_folder = find_base(base, None, folder)
    raw = add_folder(inventory, base_folder)
    inventory.add_files({file: []}, only="projector.")
    own = folder / "config.json"
    if own.is_file() and "hidden_size" in raw:
        raw = {**raw, **read_json(own)}
    config = complete(inventory, raw, folder, vision_tower, base_folder)
    # A projector alone comes from the captioning stage: it has never seen a chat prompt.
    config = replace(config, template="plain")
    return finish(path, inventory, config, (folder, base_folder), layout="projector over a base")


def open_lora(
    folder: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """A LoRA adapter: base, then non_lora_trainables, then W + (alpha / r) B A."""
    adapter = read_json(folder / "adapter_config.json")
    scale = lora_scale(adapter, folder)
    inventory = Inventory()
    base_folder = find_base(base, adapter.get("base_model_name_or_path"), folder)
    raw = add_folder(inventory, base_folder)
    for name in ("non_lora_trainables.safetensors", "non_lora_trainables.bin"):
        if (folder / name).is_file():
            inventory.add_files({folder / name: []})
            break
    safe = folder / "adapter_model.safetensors"
    inventory.add_lora(safe if safe.is_file() else folder / "adapter_model.bin")
    if (folder / "config.json").is_file() and "hidden_size" in raw:
        raw = {**raw, **read_json(folder / "config.json")}
    config = complete(inventory, raw, folder, vision_tower, base_folder)
    check_lora(inventory, folder)
    source = finish(folder, inventory, config, (folder, base_folder), layout="LoRA over a base")
    return replace(source, lora=inventory.lora, lora_scale=scale)


def lora_scale(adapter: Mapping[str, Any], folder: Path) -> float:
    """alpha / r. Raises CheckpointError for variants that W + (alpha / r) B A does not describe."""
    variants = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
    refused = [name for name in (*variants, "modules_to_save") if adapter.get(name)]
    if adapter.get("bias", "none") != "none":
        refused.append("bias")
    if refused:
        raise CheckpointError(f"{folder}: unsupported LoRA settings: {', '.join(refused)}")
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder}: adapter_config.json needs r >= 1 and lora_alpha")
    return alpha / rank


def find_base(base: str | Path | None, named: object, folder: Path) -> Path:
    """The folder of the base model: the argument, or what the adapter names, if on this disk."""
    wanted = str(base) if base is not None else named
    if not isinstance(wanted, str) or not wanted:
        raise CheckpointError(f"{folder}: needs its base model: give the folder as base (--base)")
    found = find_local(wanted, Path.cwd() if base is not None else folder)
    if found is None:
        raise CheckpointError(
            f"{folder}: the base model {wanted!r} is not on this disk: "
            "give its folder as base (--base)"
        )
    return found


def complete(
    inventory: Inventory,
    raw: dict[str, Any],
    folder: Path,
    vision_tower: str | Path | nn.Module | None,
    base_folder: Path | None = None,
) -> LlavaConfig:
    """Parse the config, and for a flat (official) one find and add the tower it lacks."""
    vision: dict[str, Any] | None = None
    if "hidden_size" in raw and raw.get("format") != "llava_lite":
        vision = add_tower(inventory, raw, folder, vision_tower, base_folder)
        if "mm_projector_type" not in raw:
            layers = [name for name in inventory.entries if re.match(r"projector.*weight", name)]
            raw = {**raw, "mm_projector_type": f"mlp{max(len(layers), 1)}x_gelu"}
    elif vision_tower is not None:
        warnings.warn(TOWER_INSIDE.format(folder), stacklevel=3)
    return parse_config(raw, vision, folder)


def parse_config(raw: dict[str, Any], vision: dict[str, Any] | None, folder: Path) -> LlavaConfig:
    """`config.parse` with every problem turned into a CheckpointError naming the folder."""
    try:
        config = parse(raw, vision)
        for part in (config.vision, config.text):
            for name, value in vars(part).items():
                check_number(name, value)
        return config
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def check_number(name: str, value: object) -> None:
    """Raise ValueError for a field that no model can have, before memory is spent on it."""
    signed = name.endswith("_id") or name == "feature_layer"
    lowest, highest = -1024 if signed else 0, 1024 if name == "num_layers" else 1 << 24
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} {value!r} is no number")
    if not lowest <= value <= highest or (value == 0 and not signed):
        raise ValueError(f"{name} {value!r} is out of range")


def add_tower(
    inventory: Inventory,
    raw: Mapping[str, Any],
    folder: Path,
    vision_tower: str | Path | nn.Module | None,
    base_folder: Path | None,
) -> dict[str, Any]:
    """Add the CLIP tower, unless the checkpoint contains one, and return the tower's config."""
    named = raw.get("mm_vision_tower")
    places = [p for p in (folder, base_folder) if p is not None and isinstance(named, str)]
    local = next((found for p in places if (found := find_local(str(named), p))), None)
    described = [local]
    if any(name.startswith("vision.") for name in inventory.entries):
        if vision_tower is not None:
            warnings.warn(TOWER_INSIDE.format(folder), stacklevel=4)
    elif isinstance(vision_tower, nn.Module):
        inventory.add_module(vision_tower)
    else:
        tower = find_local(str(vision_tower), Path.cwd()) if vision_tower is not None else local
        if tower is None:
            raise CheckpointError(tower_missing(folder, vision_tower or named))
        files = {tower: []} if tower.is_file() else weight_files(tower)
        if not files:
            raise CheckpointError(f"{tower}: the vision tower's folder holds no weights")
        inventory.add_files(files, only="vision.")
        described.insert(0, tower)
    configs = (tower_config(place) for place in described)
    return next((found for found in configs if found), None) or tower_from_shapes(inventory.entries)


def tower_missing(folder: Path, wanted: object) -> str:
    """What to do when the tower is not at hand."""
    return (
        f"{folder}: needs the vision tower {str(wanted or CLIP_REPO)!r} (about 1.7 GB), which is "
        f"not on this disk: run `llava-lite download {CLIP_REPO}`, or give its folder as "
        "vision_tower (--vision-tower)"
    )


def tower_config(place: Path | None) -> dict[str, Any] | None:
    """The CLIP config in or beside `place`, None when there is none that describes a tower."""
    if place is None:
        return None
    path = (place if place.is_dir() else place.parent) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    is_clip = "vision_config" in raw or raw.get("model_type") in ("clip", "clip_vision_model")
    return raw if is_clip else None


def tower_from_shapes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """A CLIP config read off the tensors; heads are 64 channels wide, as in every OpenAI model."""
    try:
        width, _, patch, _ = entries["vision.patch_embed.weight"].shape
        rows = entries["vision.pos_embed"].shape[0]
        mlp = entries["vision.blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        return {}  # the default tower; what is missing or misshapen is reported against it
    numbers = (re.match(r"vision\.blocks\.(\d+)", name) for name in entries)
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(max(rows - 1, 0)),
        "intermediate_size": mlp,
        "num_hidden_layers": 1 + max(int(found[1]) for found in numbers if found),
        "num_attention_heads": max(width // 64, 1),
    }


def finish(
    path: Path,
    inventory: Inventory,
    config: LlavaConfig,
    tokenizer_from: tuple[Path, ...],
    layout: str = "",
) -> Source:
    """Check everything against the model and hand out the Source."""
    unused = check_entries(inventory.entries, config, path)
    layout = layout or describe(inventory.stored)
    tokenizers = (find_tokenizer(folder) for folder in tokenizer_from)
    return Source(
        path=path,
        layout=layout,
        config=config,
        entries={name: e for name, e in inventory.entries.items() if name not in unused},
        unused=unused,
        ignored=inventory.ignored,
        tokenizer_file=next((file for file in tokenizers if file), None),
        trusted=layout == "llava_lite" and (path / "manifest.json").is_file(),
        in_memory=inventory.in_memory,
    )


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model before tokenizer.json: the sentencepiece file is the original."""
    files = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    return next((file for file in files if file.is_file()), None)


def open_clip_visual(model: nn.Module) -> nn.Module:
    """The visual tower of an open_clip model. Raises CheckpointError unless it uses QuickGELU."""
    visual = getattr(model, "visual", model)
    if not any(type(module).__name__ == "QuickGELU" for module in visual.modules()):
        # Exact GELU with these weights gives plausible, quietly worse answers.
        raise CheckpointError(
            "the open_clip model does not use QuickGELU: build its -quickgelu variant"
        )
    return visual


def vision_state_from_open_clip(
    model: nn.Module, config: VisionConfig | None = None
) -> dict[str, Tensor]:
    """State dict for `Llava.vision` from an open_clip model, or its `visual`, in memory.

    Without a `config` the sizes are read off the tensors and the last block is left out.
    Raises CheckpointError for an unknown tensor or an exact-GELU model."""
    inventory = Inventory()
    inventory.add_module(model)
    config = config or parse_vision(tower_from_shapes(inventory.entries))
    source = Source(Path(), "", LlavaConfig(vision=config), inventory.entries)
    source.in_memory = inventory.in_memory
    return {
        name.removeprefix("vision."): source.read(name, entry.dtype)
        for name, entry in inventory.entries.items()
        if not is_unused(name, config)
    }


# load


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """ "bfloat16", torch.bfloat16 or None. Raises ValueError for other dtypes."""
    if dtype is None or dtype in DTYPE_CODES:
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | nn.Module | None = None,
) -> Llava:
    """Load a checkpoint of any layout (see `open_source`), ready for inference.

    `dtype` None keeps the decoder's. On the CPU, tensors already in that dtype stay in the mapped
    file: loading takes no time and no memory, pages are read when used. Raises CheckpointError."""
    return load_source(open_source(path, base, vision_tower), device, dtype)


def load_source(
    source: Source, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> Llava:
    """Build the model on the meta device and give it the tensors, one at a time."""
    model = meta_model(source.config)
    wanted = parse_dtype(dtype)
    state = {name: tensor.to(device) for name, tensor in source.tensors(wanted)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False)


def load_tokenizer(path: str | Path, config: LlavaConfig) -> "Tokenizer":
    """The tokenizer of a folder, or of a tokenizer.model or tokenizer.json file.

    Raises CheckpointError when there is none or it is damaged."""
    from llava_lite.tokenizer import Tokenizer

    path = Path(path)
    file = find_tokenizer(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise CheckpointError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
    read = Tokenizer.from_sentencepiece if file.suffix == ".model" else Tokenizer.from_file
    return read(file, legacy=config.legacy_tokenizer)


# save

Spec = tuple[tuple[int, ...], torch.dtype]


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
            "dtype": DTYPE_CODES[dtype],
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
    shard_size: int = SHARD_SIZE,
) -> dict[str, dict[str, Any]]:
    """Write all tensors. Returns the manifest's table: name -> file, shape, dtype, sha256."""
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(destination: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `destination`, to take its place only if the block succeeds.

    On any error or interrupt nothing is left behind. With `force`, files of a folder that is
    already there are replaced, and files that are none of a checkpoint's stay. Raises
    CheckpointError when the destination is not empty, or the disk is full."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file, not a folder")
    if destination.is_dir() and any(destination.iterdir()) and not force:
        raise CheckpointError(f"{destination}: is not empty (force, --force, replaces it)")
    staging = destination.parent / f".{destination.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
    try:
        staging.mkdir(parents=True)
        yield staging
        publish(staging, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, destination: Path) -> None:
    """Move the finished folder into place, the manifest last."""
    if not destination.exists() or not any(destination.iterdir()):
        staging.replace(destination)
        return
    stale = {*destination.glob("model*.safetensors*"), *destination.glob("manifest.json")}
    for file in sorted(staging.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
        file.replace(destination / file.name)
        stale.discard(destination / file.name)
    for file in stale:
        file.unlink()


def save_model(
    model: Llava,
    config: LlavaConfig,
    folder: str | Path,
    tokenizer: "Tokenizer | None" = None,
    *,
    source: str = "save_model",
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Write a model as a folder in our format, weights cast to `dtype` (default: as they are).

    Raises CheckpointError for NaN or infinite weights, a folder in use, or a full disk."""
    state, wanted = model.state_dict(), parse_dtype(dtype)

    def read(name: str) -> Tensor:
        tensor = state[name].to(dtype=wanted or state[name].dtype)
        check_finite(tensor, f"{folder}: tensor {name!r}")
        return tensor

    specs = {name: (tuple(t.shape), wanted or t.dtype) for name, t in state.items()}
    with staged(Path(folder), force) as staging:
        table = write_shards(staging, specs, read)
        write_json(staging / "config.json", config.to_dict())
        if tokenizer is not None:
            tokenizer.save(staging / "tokenizer.json")
        write_json(
            staging / "manifest.json", {"source": source, "revision": None, "tensors": table}
        )


def verify_folder(folder: str | Path) -> int:
    """Read a folder in our format back and compare every tensor with the manifest's sha256.

    Returns the number of tensors. Raises CheckpointError naming file and tensor that differ."""
    folder = Path(folder)
    weight_files(folder)  # checks the manifest
    return verify_tensors(folder, read_json(folder / "manifest.json")["tensors"])


def verify_tensors(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> int:
    """Compare the written tensors with a manifest's table, see `verify_folder`."""
    for file in sorted({str(row["file"]) for row in table.values()}):
        tensors = read_tensors(folder / file)
        for name in (name for name, row in table.items() if row["file"] == file):
            if name not in tensors:
                raise CheckpointError(f"{folder / file}: tensor {name!r} is missing")
            if hashlib.sha256(tensor_bytes(tensors[name])).hexdigest() != table[name].get("sha256"):
                raise CheckpointError(f"{folder / file}: tensor {name!r} differs from its sha256")
    return len(table)
