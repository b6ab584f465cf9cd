"""Open a checkpoint of any layout as a `Source`: folder, projector file, or LoRA adapter.

The content of a folder decides its layout, never its name.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llava_lite.checkpoints.configs import FASTVLM, family, parse_config
from llava_lite.checkpoints.gguf_format import SUFFIX
from llava_lite.checkpoints.gguf_in import open_gguf
from llava_lite.checkpoints.names import TRAINING, describe
from llava_lite.checkpoints.names_fastvithd import PREFIX as FASTVITHD
from llava_lite.checkpoints.quantized import KEY, QuantizedSource, fold, read_kind
from llava_lite.checkpoints.reparameterize import is_training_form, reparameterize
from llava_lite.checkpoints.skeleton import EMBEDDING, HEAD
from llava_lite.checkpoints.source import Entry, Inventory, Source, check_entries, check_lora
from llava_lite.checkpoints.tensors import read_json, read_tensors, weight_files
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.inputs.byte_level import MERGES, VOCAB, ByteLevelTokenizer, read_added

CLIP_REPO = "openai/clip-vit-large-patch14-336"
TOWER_INSIDE = "{}: has its own vision tower, the one given is not used"


# ---- layouts -------------------------------------------------------------------------------------


def open_source(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | nn.Module | None = None,
) -> Source:
    """Open a checkpoint of any layout, and check everything but the values of its tensors.

    base: the Llama or LLaVA folder below a LoRA adapter or a projector. vision_tower: the CLIP
    folder, file (HF or OpenAI names) or open_clip model for a checkpoint without a tower. Raises
    CheckpointError that names the file and the tensor."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.suffix == SUFFIX or (path.is_dir() and is_gguf_folder(path)):
        if base is not None:
            raise CheckpointError(f"{path}: GGUF files need no base")
        return open_gguf(path, vision_tower)
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
    quantized = read_kind(path)
    inventory = Inventory()
    raw = add_folder(inventory, path)
    if quantized:
        del raw[KEY]
    config = complete(inventory, raw, path, vision_tower)
    parts = fold(inventory, config, quantized, path) if quantized else {}
    kind = family(raw)
    trusted = kind == "llava_lite" and (path / "manifest.json").is_file()
    source = finish(path, inventory, config, (path,), family=kind, trusted=trusted)
    if quantized is None:
        return source
    source.layout = f"llava_lite with {quantized.method} decoder"
    return QuantizedSource(**vars(source), kind=quantized, parts=parts)


def is_gguf_folder(folder: Path) -> bool:
    """Whether a folder holds GGUF files, and no checkpoint of another layout."""
    found = any(folder.glob(f"*{SUFFIX}"))
    return found and not (folder / "config.json").is_file() and not weight_files(folder)


def add_folder(inventory: Inventory, folder: Path) -> dict[str, Any]:
    """Add a folder's weights to the inventory and return its config.json."""
    raw = read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin)"
        )
    try:
        inventory.qwen2 = family(raw) == "fastvlm"
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    inventory.add_files(files, own_names=raw.get("format") == "llava_lite")
    return raw


def projector_file(folder: Path) -> Path | None:
    """The projector file of a folder. Raises CheckpointError if there are several."""
    for name in ("mm_projector.safetensors", "mm_projector.bin"):
        if (folder / name).is_file():
            return folder / name
    # Stage-1 training also leaves a directory mm_projector/.
    found = [file for file in sorted(folder.glob("mm_projector*")) if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder}: holds several projectors, name one of them: {names}")
    return found[0] if found else None


def open_projector(
    path: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """Open a trained projector (a file, or a folder with mm_projector.bin) over a base Llama."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else projector_file(path)
    if file is None or not any("mm_projector." in name for name in read_tensors(file)):
        raise CheckpointError(
            f"{file or path}: holds no mm_projector tensors; give the checkpoint's folder"
        )
    inventory = Inventory()
    base_folder, raw = add_base(inventory, base, None, folder)
    inventory.add_files({file: []}, only="projector.")
    config = complete(inventory, raw, folder, vision_tower, base_folder)
    # A projector alone comes from the captioning stage, which has no chat prompts.
    config = replace(config, template="plain")
    facts = {"layout": "projector over a base", "base": origin(base, None, base_folder)}
    return finish(path, inventory, config, (folder, base_folder), **facts)


def open_lora(
    folder: Path, base: str | Path | None, vision_tower: str | Path | nn.Module | None
) -> Source:
    """Open a LoRA adapter: the base, then non_lora_trainables, then W + (alpha / r) B A."""
    adapter = read_json(folder / "adapter_config.json")
    scale = lora_scale(adapter, folder)
    inventory = Inventory()
    named = adapter.get("base_model_name_or_path")
    base_folder, raw = add_base(inventory, base, named, folder)
    for name in ("non_lora_trainables.safetensors", "non_lora_trainables.bin"):
        if (folder / name).is_file():
            inventory.add_files({folder / name: []})
            break
    safe = folder / "adapter_model.safetensors"
    inventory.add_lora(safe if safe.is_file() else folder / "adapter_model.bin")
    config = complete(inventory, raw, folder, vision_tower, base_folder)
    check_lora(inventory, folder)
    facts = {"layout": "LoRA over a base", "base": origin(base, named, base_folder)}
    return finish(folder, inventory, config, (folder, base_folder), lora_scale=scale, **facts)


def lora_scale(adapter: Mapping[str, Any], folder: Path) -> float:
    """alpha / r. Raises CheckpointError for variants other than W + (alpha / r) B A."""
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


def add_base(
    inventory: Inventory, base: str | Path | None, named: object, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Add the base model below the adapter or projector in `folder`. Returns the base's folder, and
    its config with the fields of `folder`'s own."""
    base_folder, own = find_base(base, named, folder), folder / "config.json"
    raw = add_folder(inventory, base_folder)
    if own.is_file() and "hidden_size" in raw:
        raw |= read_json(own)
    return base_folder, raw


def find_base(base: str | Path | None, named: object, folder: Path) -> Path:
    """The folder of the base model: the argument, or the base that the adapter names."""
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
    """Parse the config. For an official config, also find and add the missing tower."""
    if raw.get("model_type") == FASTVLM:
        if vision_tower is not None:
            warnings.warn(TOWER_INSIDE.format(folder), stacklevel=3)
        return complete_fastvlm(inventory, raw, folder, base_folder)
    vision: dict[str, Any] | None = None
    if "hidden_size" in raw and raw.get("format") != "llava_lite":
        vision = add_tower(inventory, raw, folder, vision_tower, base_folder)
        if "mm_projector_type" not in raw:
            layers = [name for name in inventory.entries if re.match(r"projector.*weight", name)]
            if not any(key.startswith("mm_") for key in raw):
                # A plain Llama's config pads images; the key below would turn padding off.
                raw = {"image_aspect_ratio": "pad", **raw}
            raw = {**raw, "mm_projector_type": f"mlp{max(len(layers), 1)}x_gelu"}
    elif vision_tower is not None:
        warnings.warn(TOWER_INSIDE.format(folder), stacklevel=3)
    return parse_config(raw, vision, folder / "config.json")


# ---- FastVLM -------------------------------------------------------------------------------------


def complete_fastvlm(
    inventory: Inventory, raw: dict[str, Any], folder: Path, base_folder: Path | None
) -> LlavaConfig:
    """Parse the config of a FastVLM folder, and make its tensors those of the model: fold a tower
    in training form, and leave out the head if it is tied."""
    place = base_folder or folder
    config = parse_config(raw, None, folder / "config.json")
    fold_tower(inventory, place)
    if not any(name.startswith("vision.") for name in inventory.entries):
        raise CheckpointError(
            f"{place}: holds no vision tower; published FastVLM folders hold the tower among their "
            f"weights ({FASTVITHD}*)"
        )
    head = inventory.entries.get(HEAD)
    if config.text.tie_embeddings and head is not None:
        inventory.stored_head = inventory.entries.pop(HEAD)
        inventory.ignored.append(head.stored)
    elif not config.text.tie_embeddings and head is None:
        raise CheckpointError(f"{place}: holds no lm_head.weight, and the config does not tie it")
    ids = max((count_ids(place) for place in (folder, place)), default=0)
    if ids > config.text.vocab_size:
        raise CheckpointError(
            f"{place}: the tokenizer has {ids} ids, but vocab_size is {config.text.vocab_size}"
        )
    # Without a tokenizer: at least the tokens that end an answer.
    ids = ids or 1 + max(config.text.eos_id, *config.text.stop_ids)
    text = replace(config.text, sampled_vocab_size=min(ids, config.text.vocab_size))
    return replace(config, text=text)


def fold_tower(inventory: Inventory, folder: Path) -> None:
    """Fold the tensors of a tower in training form, if there are any, into those of the model."""
    entries = inventory.entries
    branches = {
        name.removeprefix(TRAINING): entry
        for name, entry in entries.items()
        if name.startswith(TRAINING)
    }
    for name, entry in branches.items():
        if not is_training_form([name]):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.stored!r} belongs to no known layout"
            )
    if not branches:
        return
    stored = {file: read_tensors(file) for file in {entry.file for entry in branches.values()}}
    state = {name: stored[entry.file][entry.stored] for name, entry in branches.items()}
    try:
        folded = {f"{FASTVITHD}{name}": tensor for name, tensor in reparameterize(state).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    file = folder / "folded tower"
    inventory.in_memory[file] = folded
    for name in branches:
        del entries[f"{TRAINING}{name}"]
    entries |= inventory.locate(file, folded)


def count_ids(folder: Path) -> int:
    """The ids of the byte-level tokenizer in a folder, 0 without one. Added tokens have the last
    ids. Raises CheckpointError for a damaged file."""
    added = read_added(folder)
    if not added and (folder / "tokenizer.json").is_file():
        return ByteLevelTokenizer.from_file(folder / "tokenizer.json").vocab_size
    return 1 + max((token.token_id for token in added.values()), default=-1)


# ---- vision tower, tokenizer ---------------------------------------------------------------------


def add_tower(
    inventory: Inventory,
    raw: Mapping[str, Any],
    folder: Path,
    vision_tower: str | Path | nn.Module | None,
    base_folder: Path | None,
) -> dict[str, Any]:
    """Add the CLIP tower if the checkpoint has none. Returns the tower's config."""
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
        else:  # a Llama base names no tower: use LLaVA-1.5's
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
    """The message for a tower that is not on this disk."""
    return (
        f"{folder}: needs the vision tower {str(wanted or CLIP_REPO)!r} (about 1.7 GB), which is "
        f"not on this disk: run `llava-lite download {CLIP_REPO}`, or give its folder as "
        "vision_tower (--vision-tower)"
    )


def tower_config(place: Path | None) -> dict[str, Any] | None:
    """The config of a CLIP tower in or beside `place`, None without one."""
    if place is None:
        return None
    path = (place if place.is_dir() else place.parent) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    is_clip = "vision_config" in raw or raw.get("model_type") in ("clip", "clip_vision_model")
    return raw if is_clip else None


def tower_from_shapes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """A CLIP config from the shapes of the tensors. OpenAI's heads always have 64 channels."""
    try:
        width, _, patch, _ = entries["vision.patch_embed.weight"].shape
        rows = entries["vision.pos_embed"].shape[0]
        mlp = entries["vision.blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        return {}  # the default tower; check_entries then reports the problem
    numbers = (re.match(r"vision\.blocks\.(\d+)", name) for name in entries)
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(max(rows - 1, 0)),
        "intermediate_size": mlp,
        "num_hidden_layers": 1 + max(int(found[1]) for found in numbers if found),
        "num_attention_heads": max(width // 64, 1),
    }


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder: the original tokenizer.model, or vocab.json with merges.txt,
    before tokenizer.json. Our own format has only tokenizer.json."""
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    names: tuple[str, ...] = ("tokenizer.model", "tokenizer.json")
    if raw.get("format") == "llava_lite":
        names = ("tokenizer.json",)
    elif raw.get("model_type") == FASTVLM:
        names = (VOCAB, MERGES, "tokenizer.json")
    files = (folder / name for name in names)
    return next((file for file in files if file.is_file()), None)


HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def find_local(name: str, near: Path) -> Path | None:
    """Find a path or hub id of a config without the network: relative to the folder `near`, as an
    absolute path, beside `near`, or in the huggingface_hub cache."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    if not last:
        return None
    return find_existing(near / name, near.resolve().parent / last) or find_cached(name)


def find_given(name: str) -> Path | None:
    """Find a path or hub id of a user: exactly this path, or the cache."""
    if not name:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home of a user that does not exist
        path = Path(name)
    return find_existing(path) or find_cached(name)


def find_near(name: object, places: list[Path]) -> Path | None:
    """`find_local` near the first place that has it. None if `name` is no string."""
    if not isinstance(name, str):
        return None
    return next((found for place in places if (found := find_local(name, place))), None)


def find_existing(*paths: Path) -> Path | None:
    """The first path that exists. An invalid path does not exist."""
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
    """The name for the manifest: the given name, else the config's hub id, else the path."""
    if given is not None:
        return str(given)
    return named if isinstance(named, str) and HUB_ID.fullmatch(named) else str(found)


def finish(
    path: Path,
    inventory: Inventory,
    config: LlavaConfig,
    tokenizer_from: tuple[Path, ...],
    **facts: Any,
) -> Source:
    """Check all tensors against the model, and make the Source. facts: its other fields."""
    if config.text.tie_embeddings and EMBEDDING in inventory.entries:
        inventory.entries.setdefault(HEAD, inventory.entries[EMBEDDING])
    unused = check_entries(inventory.entries, config, path)
    facts = {"layout": describe(inventory.stored), **facts}
    tokenizers = (find_tokenizer(folder) for folder in tokenizer_from)
    return Source(
        path=path,
        config=config,
        entries={name: e for name, e in inventory.entries.items() if name not in unused},
        unused=unused,
        ignored=inventory.ignored,
        lora=inventory.lora,
        tokenizer_file=next((file for file in tokenizers if file), None),
        vision_tower=inventory.vision_tower,
        stored_head=inventory.stored_head,
        in_memory=inventory.in_memory,
        **facts,
    )
