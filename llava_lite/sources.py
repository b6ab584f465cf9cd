"""What a checkpoint holds: its layout, its config, and where each of our tensors is stored.

    open_source(folder)  what is it, which tensors has it, do all names and shapes fit  -> Source

Nothing is read from a weight file until its tensor is asked for, and every problem (missing,
unexpected, misshapen, unsafe) is found before the first one is. The layouts are told apart by what
is in a folder, never by what it is called.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_lite.config import LlavaConfig, family, parse
from llava_lite.errors import CheckpointError
from llava_lite.files import (
    DTYPE_CODES,
    DTYPES,
    Files,
    read_json,
    read_tensors,
    weight_files,
)
from llava_lite.layouts import describe, is_unused, lora_target, our_names
from llava_lite.meta import expected_shapes

CLIP_REPO = "openai/clip-vit-large-patch14-336"
TOWER_INSIDE = "{}: has its own vision tower, the one given is not used"


# ---- what a source holds -------------------------------------------------------------------------


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
    vision_tower: str | None = None  # where a tower from elsewhere came from

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
        self.vision_tower = str(file)
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
    skipped on purpose. `family`: of its config.json, "llava_lite", "llava-hf" or "official" (also
    every adapter and projector). `base`, `vision_tower`: what was used with it.

    `trusted`: a folder in our format with a manifest. The manifest is written after every value was
    checked, so reading such a folder does not look for NaN and infinity again; whether the values
    are still those that were written, `llava-lite info --checksums` tells."""

    path: Path
    layout: str
    config: LlavaConfig
    entries: dict[str, Entry]
    unused: dict[str, Entry] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    lora: dict[str, dict[str, Entry]] = field(default_factory=dict)
    lora_scale: float = 1.0
    tokenizer_file: Path | None = None
    family: str = "official"
    trusted: bool = False
    base: str | None = None
    vision_tower: str | None = None
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
        return self.read_part(name, (), dtype)

    def read_part(
        self, name: str, part: tuple[slice, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """`read`, of one part of a tensor: only that is cast, or copied if not contiguous."""
        entry = self.entries.get(name) or self.unused[name]
        dtype = dtype or self.dtype
        tensor = self._stored(entry)
        if name in self.lora:
            # W + (alpha / r) B A, in float32 and cast once at the end.
            pair = self.lora[name]
            change = self._stored(pair["B"]).float() @ self._stored(pair["A"]).float()
            tensor = torch.add(tensor.float(), change, alpha=self.lora_scale)
        result = tensor[part].to(dtype).contiguous()
        if not self.trusted:
            check_finite(result, f"{entry.file}: tensor {entry.stored!r}")
        return result

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs in the order of `names`."""
        for name in self.names():
            yield name, self.read(name, dtype)

    def unmap(self) -> None:
        """Let go of the mapped file: the next tensor maps it anew."""
        self._last = None

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


def check_entries(
    entries: Mapping[str, Entry], config: LlavaConfig, where: Path
) -> dict[str, Entry]:
    """Compare names, shapes and dtypes with the model. Returns the unused tower parts.

    Raises CheckpointError naming the first offender and how many there are."""
    try:
        expected = expected_shapes(config)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{where}: no model has the config's sizes: {reason}") from error
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


# ---- layouts -------------------------------------------------------------------------------------


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
    if not weight_files(path) and projector_file(path) is not None:
        return open_projector(path, base, vision_tower)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json, so it is no checkpoint folder")
    if base is not None:
        raise CheckpointError(f"{path}: a whole model needs no base (only LoRA and projectors do)")
    inventory = Inventory()
    raw = add_folder(inventory, path)
    config = complete(inventory, raw, path, vision_tower)
    source = finish(path, inventory, config, tokenizer_from=(path,))
    source.family = family(raw)
    source.trusted = source.family == "llava_lite" and (path / "manifest.json").is_file()
    return source


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


def projector_file(folder: Path) -> Path | None:
    """The projector of a folder (stage-1 training also leaves a directory mm_projector/ in it).

    Raises CheckpointError when several files could be it."""
    for name in ("mm_projector.safetensors", "mm_projector.bin"):
        if (folder / name).is_file():
            return folder / name
    found = [file for file in sorted(folder.glob("mm_projector*")) if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder}: holds several projectors, name one of them: {names}")
    return found[0] if found else None


def open_projector(
    path: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """A trained projector (a file, or a folder with mm_projector.bin) over a base Llama."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else projector_file(path)
    if file is None or not any("mm_projector." in name for name in read_tensors(file)):
        raise CheckpointError(
            f"{file or path}: holds no mm_projector tensors; give the checkpoint's folder"
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
    source = finish(path, inventory, config, (folder, base_folder), layout="projector over a base")
    return replace(source, base=origin(base, None, base_folder))


def open_lora(
    folder: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """A LoRA adapter: base, then non_lora_trainables, then W + (alpha / r) B A."""
    adapter = read_json(folder / "adapter_config.json")
    scale = lora_scale(adapter, folder)
    inventory = Inventory()
    named = adapter.get("base_model_name_or_path")
    base_folder = find_base(base, named, folder)
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
    base_name = origin(base, named, base_folder)
    return replace(source, lora=inventory.lora, lora_scale=scale, base=base_name)


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
    found = find_local(wanted, folder) if base is None else find_given(wanted)
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
            if not any(key.startswith("mm_") for key in raw):
                # Still a plain Llama's config: the key below must not turn its padding off.
                raw = {"image_aspect_ratio": "pad", **raw}
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
        check_number("projector_depth", config.projector_depth)
        return config
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def check_number(name: str, value: object) -> None:
    """Raise ValueError for a field that no model can have, before memory is spent on it."""
    signed = name.endswith("_id") or name == "feature_layer"
    limits = {"num_layers": 1024, "image_size": 1 << 14, "patch_size": 1 << 14}
    lowest, highest = -1024 if signed else 0, limits.get(name, 1 << 24)
    kinds = (int, float) if name.endswith("_eps") or name == "rope_theta" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} {value!r} is no {'number' if float in kinds else 'integer'}")
    if not lowest <= value <= highest or (value == 0 and not signed):
        raise ValueError(f"{name} {value!r} is out of range")


# ---- vision tower, tokenizer ---------------------------------------------------------------------


def add_tower(
    inventory: Inventory,
    raw: Mapping[str, Any],
    folder: Path,
    vision_tower: str | Path | nn.Module | None,
    base_folder: Path | None,
) -> dict[str, Any]:
    """Add the CLIP tower, unless the checkpoint contains one, and return the tower's config."""
    named = raw.get("mm_vision_tower")
    places = [place for place in (folder, base_folder) if place is not None]
    local = find_near(named, places)
    described = [local]
    if any(name.startswith("vision.") for name in inventory.entries):
        if vision_tower is not None:
            warnings.warn(TOWER_INSIDE.format(folder), stacklevel=4)
    elif isinstance(vision_tower, nn.Module):
        inventory.add_module(vision_tower)
    else:
        if vision_tower is not None:
            tower = find_given(str(vision_tower))
        else:  # a Llama base names none: LLaVA-1.5's
            tower = local if named else find_near(CLIP_REPO, places)
        if tower is None:
            raise CheckpointError(tower_missing(folder, vision_tower or named))
        files = {tower: []} if tower.is_file() else weight_files(tower)
        if not files:
            raise CheckpointError(f"{tower}: the vision tower's folder holds no weights")
        inventory.add_files(files, only="vision.")
        inventory.vision_tower = origin(vision_tower, named or CLIP_REPO, tower)
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


def open_clip_visual(model: nn.Module) -> nn.Module:
    """The visual tower of an open_clip model. Raises CheckpointError unless it uses QuickGELU."""
    visual = getattr(model, "visual", model)
    if not any(type(module).__name__ == "QuickGELU" for module in visual.modules()):
        # Exact GELU with these weights gives plausible, quietly worse answers.
        raise CheckpointError(
            "the open_clip model does not use QuickGELU: build its -quickgelu variant"
        )
    return visual


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model before tokenizer.json: the sentencepiece file is the original. Our own format
    has only tokenizer.json."""
    config = folder / "config.json"
    is_own = config.is_file() and read_json(config).get("format") == "llava_lite"
    names = ("tokenizer.json",) if is_own else ("tokenizer.model", "tokenizer.json")
    files = (folder / name for name in names)
    return next((file for file in files if file.is_file()), None)


HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def find_local(name: str, near: Path) -> Path | None:
    """Find what a config names (a path, or a hub id) without any network: relative to the folder
    `near`, as an absolute path, beside `near`, or in the huggingface_hub cache."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    if not last:
        return None
    return existing(near / name, near.resolve().parent / last) or find_cached(name)


def find_given(name: str) -> Path | None:
    """Find what a user names: exactly this path, or a hub id in the cache."""
    if not name:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home of a user that does not exist
        path = Path(name)
    return existing(path) or find_cached(name)


def find_near(name: object, places: list[Path]) -> Path | None:
    """`find_local` near the first place that has it. None for what is no name."""
    if not isinstance(name, str):
        return None
    return next((found for place in places if (found := find_local(name, place))), None)


def existing(*paths: Path) -> Path | None:
    """The first path that exists; one that no file system can hold does not."""
    for path in paths:
        try:
            if path.exists():
                return path
        except (OSError, ValueError):
            continue
    return None


def find_cached(name: str) -> Path | None:
    """The folder of a hub id in the huggingface_hub cache."""
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def origin(given: object, named: object, found: Path) -> str:
    """What a manifest records: the name given, or a hub id that a config names, else the path."""
    if given is not None:
        return str(given)
    return named if isinstance(named, str) and HUB_ID.fullmatch(named) else str(found)


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
        vision_tower=inventory.vision_tower,
        in_memory=inventory.in_memory,
    )
