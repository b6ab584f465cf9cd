"""Load a checkpoint of any layout, and save and verify one in our format.

A converted folder is memory-mapped: loading copies nothing and checks no values again.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_lite.checkpoints.configs import parse_vision
from llava_lite.checkpoints.gguf_format import SUFFIX
from llava_lite.checkpoints.gguf_in import read_tokenizer
from llava_lite.checkpoints.names import SHARD_SIZE, is_unused
from llava_lite.checkpoints.opening import find_tokenizer, open_source, tower_from_shapes
from llava_lite.checkpoints.quantized import QuantizedSource
from llava_lite.checkpoints.skeleton import HEAD, meta_model
from llava_lite.checkpoints.source import Inventory, Source, check_finite
from llava_lite.checkpoints.tensors import (
    DTYPE_CODES,
    DTYPES,
    read_json,
    read_tensors,
    stage_folder,
    tensor_bytes,
    weight_files,
    write_shards,
)
from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.device import pick_tower_dtype
from llava_lite.fast.quantize import (
    QuantizedLinear,
    QuantizedLlava,
    check_operator,
    check_shapes,
    decoder_linears,
    get_method,
    replace_linear,
    round_weight,
)
from llava_lite.inputs.prompt import check_family
from llava_lite.llava import Llava
from llava_lite.saving import write_json

if TYPE_CHECKING:
    from llava_lite.inputs.tokenizer import Tokenizer


# ---- load ----------------------------------------------------------------------------------------


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of "bfloat16", torch.bfloat16 or None. Raises ValueError for others."""
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
    """Load a checkpoint of any layout (see `opening.open_source`), ready for inference.

    `dtype` None keeps the decoder's. On the CPU, tensors of this dtype stay in the mapped file,
    whose pages are read when used. Raises CheckpointError."""
    return load_source(open_source(path, base, vision_tower), device, dtype)


def load_source(
    source: Source,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    method: str | None = None,
) -> Llava:
    """Build the model on the meta device, and give it one tensor after the other. With a `method`,
    or from a quantized source, the decoder's linear layers are quantized.

    Raises ValueError as `quantize`, and CheckpointError if the source has another method."""
    kind = get_method(method) if method else None
    if isinstance(source, QuantizedSource):
        kind = source.find_kind(method)
    source.check_head()
    device, wanted = torch.device(device), parse_dtype(dtype) or source.dtype
    model = meta_model(source.config, QuantizedLlava if kind else Llava)
    done = set_quantized(model, source, kind, device, wanted) if kind else []
    tower = pick_tower_dtype(source.config.vision, wanted, device)
    state = {
        name: source.read(name, tower if name.startswith("vision.") else wanted).to(device)
        for name in source.names()
        if name not in done
    }
    model.load_state_dict(state, strict=True, assign=True)
    if kind is None:
        model.decoder.tie_head()
    return model.eval().requires_grad_(False)


def set_quantized(
    model: Llava,
    source: Source,
    kind: type[QuantizedLinear],
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Replace the decoder's linear layers by quantized ones. Returns the names of their weights.
    One weight is quantized, or packed, at a time."""
    shapes = decoder_linears(model)
    check_shapes(shapes, kind)
    check_operator(kind.method, device, dtype)
    linears = [name for name in source.names() if name.removesuffix(".weight") in shapes]
    for name in linears:
        parts = make_parts(source, name, kind, device, dtype)
        own = not isinstance(source, QuantizedSource)
        replace_linear(model, name.removesuffix(".weight"), kind(parts, own=own))
    # Pages that were read count as this process's memory while the file is mapped. So unmap it, and
    # map it again for the tensors that stay in it, such as the embeddings.
    source.unmap()
    return linears


def make_parts(
    source: Source,
    name: str,
    kind: type[QuantizedLinear],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The codes and scales of one weight: as stored, or quantized now."""
    if isinstance(source, QuantizedSource):
        parts = source.read_parts(name)
        check_cast(name, parts, dtype)
        wide = {part: tensor.is_floating_point() for part, tensor in parts.items()}
        return {part: t.to(device, dtype if wide[part] else t.dtype) for part, t in parts.items()}
    # Read the stored dtype: a cast would round twice.
    weight = source.read(name, source.entries[name].dtype).to(device)
    try:
        return round_weight(name.removesuffix(".weight"), weight, kind, dtype)
    except ValueError as error:
        raise CheckpointError(f"{source.entries[name].file}: {error}") from None


def check_cast(name: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise CheckpointError if `dtype` changes a stored scale or zero by more than 1/32 of the
    scale, as float16 can do, whose range is smaller than bfloat16's."""
    most = parts["scales"].float() / 32
    for part, stored in parts.items():
        moved = (stored.to(dtype).float() - stored.float()).abs()
        if stored.is_floating_point() and not (moved <= most).all():
            raise CheckpointError(
                f"{name.removesuffix('.weight')}.{part}: stored in {stored.dtype}, out of the "
                f"range of {dtype}: load it in the dtype that it was written in"
            )


def load_tokenizer(path: str | Path, config: LlavaConfig) -> "Tokenizer":
    """Load the tokenizer of a folder, or of a file: tokenizer.model or .json, vocab.json, GGUF.

    Raises CheckpointError if it is missing or damaged, or of another family than the template."""
    path = Path(path)
    file = find_tokenizer(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise CheckpointError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
    tokenizer = read_tokenizer_file(file, config.legacy_tokenizer)
    try:
        check_family(config.template, tokenizer.family)
    except ValueError as error:
        raise CheckpointError(f"{file}: does not fit the config: {error}") from error
    if tokenizer.family != "llama" and tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"{file}: the tokenizer has {tokenizer.vocab_size} ids, but the model has only "
            f"{config.text.vocab_size}"
        )
    return tokenizer


def read_tokenizer_file(file: Path, legacy: bool) -> "Tokenizer":
    """Read a tokenizer file of any family. Raises CheckpointError if it is damaged."""
    from llava_lite.inputs.byte_level import MERGES, VOCAB, ByteLevelTokenizer, is_byte_level
    from llava_lite.inputs.tokenizer import Tokenizer

    if file.suffix == SUFFIX:
        return read_tokenizer(file, legacy)
    if file.suffix == ".model":
        return Tokenizer.from_sentencepiece(file, legacy)
    if file.name in (VOCAB, MERGES):
        return ByteLevelTokenizer.from_folder(file.parent)
    return (ByteLevelTokenizer if is_byte_level(file) else Tokenizer).from_file(file, legacy)


def vision_state_from_open_clip(
    model: nn.Module, config: VisionConfig | None = None
) -> dict[str, Tensor]:
    """The state dict of `Llava.vision`, from an open_clip model in memory, or from its `visual`.

    Without a `config`, the tensors' shapes give the sizes, and the last block is left out. Raises
    CheckpointError for an unknown tensor or an exact-GELU model."""
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


# ---- save ----------------------------------------------------------------------------------------


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
    """Write a model as a folder in our format, with weights cast to `dtype` (None: no cast).

    Raises CheckpointError for NaN or infinite weights, a folder that is not empty, or a full
    disk."""
    state, wanted = model.state_dict(), parse_dtype(dtype)
    if config.text.tie_embeddings:
        del state[HEAD]  # the embedding is written once

    def read(name: str) -> Tensor:
        tensor = state[name].to(dtype=wanted or state[name].dtype)
        check_finite(tensor, f"{folder}: tensor {name!r}")
        return tensor

    specs = {name: (tuple(t.shape), wanted or t.dtype) for name, t in state.items()}
    with stage_folder(Path(folder), force) as staging:
        table = write_shards(staging, specs, read, SHARD_SIZE)
        write_json(staging / "config.json", config.to_dict())
        if tokenizer is not None:
            tokenizer.save(staging / "tokenizer.json")
        write_json(
            staging / "manifest.json", {"source": source, "revision": None, "tensors": table}
        )


def verify_folder(folder: str | Path) -> int:
    """Compare every tensor of a folder in our format with the sha256 in its manifest.

    Returns the number of tensors. Raises CheckpointError that names the file and the tensor."""
    folder = Path(folder)
    weight_files(folder)  # checks the manifest
    return verify_tensors(folder, read_json(folder / "manifest.json")["tensors"])


def verify_tensors(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> int:
    """Compare the written tensors with the table of a manifest, as `verify_folder`."""
    for file in sorted({str(row["file"]) for row in table.values()}):
        tensors = read_tensors(folder / file)
        for name in (name for name, row in table.items() if row["file"] == file):
            if name not in tensors:
                raise CheckpointError(f"{folder / file}: tensor {name!r} is missing")
            if hashlib.sha256(tensor_bytes(tensors[name])).hexdigest() != table[name].get("sha256"):
                raise CheckpointError(f"{folder / file}: tensor {name!r} differs from its sha256")
    return len(table)
