"""Quantized checkpoints: folders in our format whose decoder weights are codes and scales.

config.json says {"quantization": {"method": "int4", "group_size": 128}}. The folder holds
`...q_proj.weight_int4`, `...q_proj.scales` and `...q_proj.zeros` in place of `...q_proj.weight`, as
fast/quantize.py describes them. All other tensors are as in other folders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_lite.checkpoints import checkpoint, opening
from llava_lite.checkpoints.checkpoint import parse_dtype
from llava_lite.checkpoints.export import Output, own_output
from llava_lite.checkpoints.opening import add_folder, complete, finish
from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.checkpoints.source import Entry, Inventory, Source, check_finite
from llava_lite.checkpoints.tensors import DTYPE_CODES, Spec, read_json
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.quantize import (
    METHODS,
    QuantizedLinear,
    QuantizedLlava,
    check_operator,
    check_shapes,
    decoder_linears,
    get_method,
    round_weight,
)
from llava_lite.llava import Llava

KEY = "quantization"


# ---- open ----------------------------------------------------------------------------------------


@dataclass
class QuantizedSource(Source):
    """A source with quantized decoder weights. parts: our name of the weight -> name of the part ->
    its entry. `entries` and `read` show these weights as if they were not quantized."""

    method: str = ""
    parts: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As `Source.read`; a quantized weight is restored from its codes."""
        if name not in self.parts:
            return super().read(name, dtype)
        return METHODS[self.method].restore(self.read_parts(name)).to(dtype or self.dtype)

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """The codes and scales of a quantized weight, as views of the mapped file."""
        parts = {part: self._stored(entry) for part, entry in self.parts[name].items()}
        if not self.trusted:
            for part, entry in self.parts[name].items():
                check_finite(parts[part], f"{entry.file}: tensor {entry.stored!r}")
        return parts


def open_source(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | nn.Module | None = None,
) -> Source:
    """Open a checkpoint of any layout, quantized or not; see `opening.open_source`."""
    folder = Path(path).expanduser()
    method = read_method(folder)
    if method is None:
        return opening.open_source(path, base, vision_tower)
    if base is not None:
        raise CheckpointError(f"{folder}: a quantized model needs no base")
    inventory = Inventory()
    raw = add_folder(inventory, folder)
    config = complete(inventory, remove_key(raw), folder, vision_tower)
    parts = fold(inventory, config, METHODS[method], folder)
    source = finish(folder, inventory, config, (folder,), f"llava_lite with {method} decoder")
    source = replace(source, family="llava_lite", trusted=(folder / "manifest.json").is_file())
    return QuantizedSource(**vars(source), method=method, parts=parts)


def remove_key(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the entry on quantization."""
    return {name: value for name, value in raw.items() if name != KEY}


def document(method: str) -> dict[str, Any]:
    """The entry on quantization in config.json."""
    group_size = METHODS[method].group_size
    return {KEY: {"method": method, **({"group_size": group_size} if group_size > 1 else {})}}


def read_method(folder: Path) -> str | None:
    """The method of a quantized folder, None for any other source. Raises CheckpointError for an
    unknown method."""
    if not (folder / "config.json").is_file():
        return None
    raw = read_json(folder / "config.json")
    if raw.get("format") != "llava_lite" or KEY not in raw:
        return None
    known = {method: document(method)[KEY] for method in METHODS}
    found = next((method for method, said in known.items() if said == raw[KEY]), None)
    if found is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: {KEY} {raw[KEY]!r} is none of {list(known.values())}"
        )
    return found


def fold(
    inventory: Inventory, config: LlavaConfig, kind: type[QuantizedLinear], folder: Path
) -> dict[str, dict[str, Entry]]:
    """Replace the parts of every quantized weight in the inventory by one entry for the weight.
    Returns the parts. Raises CheckpointError if a part is missing or misshapen."""
    folded, entries = {}, inventory.entries
    for module, shape in decoder_linears(meta_model(config)).items():
        parts = {}
        for part, (part_shape, dtype) in kind.specs(shape, torch.float32).items():
            name = f"{module}.{part}"
            entry = entries.pop(name, None)
            if entry is None:
                raise CheckpointError(f"{folder}: tensor {name!r} is missing")
            fits = entry.dtype in DTYPE_CODES if dtype.is_floating_point else entry.dtype == dtype
            if entry.shape != part_shape or not fits:
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} is {entry.dtype} {entry.shape}, which no "
                    f"{kind.method} weight of {shape} has"
                )
            parts[part] = entry
        if f"{module}.weight" in entries:
            raise CheckpointError(
                f"{folder}: {module!r} is stored twice: quantized and not quantized"
            )
        first, dtype = next(iter(parts.values())), parts["scales"].dtype
        folded[f"{module}.weight"] = parts
        entries[f"{module}.weight"] = Entry(first.file, first.stored, shape, dtype)
    return folded


# ---- load ----------------------------------------------------------------------------------------


def load_source(
    source: Source,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    method: str | None = None,
) -> Llava:
    """Build the model of a source. With a `method`, or from a quantized source, the decoder's
    linear layers are quantized. One weight is quantized, or packed, at a time.

    Raises ValueError as `quantize`, and CheckpointError if the source has another method."""
    stored = source.method if isinstance(source, QuantizedSource) else None
    if stored and method not in (None, stored):
        raise CheckpointError(f"{source.path}: is {stored} already, it cannot become {method}")
    method = method or stored
    if method is None:
        return checkpoint.load_source(source, device, dtype)
    kind, device = get_method(method), torch.device(device)
    wanted = parse_dtype(dtype) or source.dtype
    model = meta_model(source.config, QuantizedLlava)
    shapes = decoder_linears(model)
    check_shapes(shapes, kind)
    check_operator(method, device, wanted)
    names, state = source.names(), {}
    linears = [name for name in names if name.removesuffix(".weight") in shapes]
    for name in linears:
        parts = make_parts(source, name, kind, device, wanted)
        model.set_submodule(name.removesuffix(".weight"), kind(parts, own=stored is None))
    # Pages that were read count as this process's memory while the file is mapped. So unmap it, and
    # map it again for the tensors that stay in it, such as the embeddings.
    source.unmap()
    for name in names:
        if name not in linears:
            state[name] = source.read(name, wanted).to(device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


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


# ---- write ---------------------------------------------------------------------------------------


def quantized_output(opened: Source, dtype: torch.dtype, method: str) -> Output:
    """Plan a folder in our format with quantized decoder weights; everything else, scales too, is
    in `dtype`.

    Raises ValueError if the decoder does not divide into groups, and CheckpointError for a
    quantized source."""
    if isinstance(opened, QuantizedSource):
        raise CheckpointError(
            f"{opened.path}: is {opened.method} already: quantize its source instead"
        )
    kind, plain = get_method(method), own_output(opened, dtype)
    shapes = decoder_linears(meta_model(opened.config))
    check_shapes(shapes, kind)
    specs: dict[str, Spec] = {}
    for name, spec in plain.specs.items():
        module = name.removesuffix(".weight")
        parts = kind.specs(spec[0], dtype) if module in shapes else None
        specs |= {f"{module}.{part}": s for part, s in parts.items()} if parts else {name: spec}
    last: dict[str, dict[str, Tensor]] = {}  # the parts of the weight that is being written

    def read(name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        if module not in shapes:
            return plain.read(name)
        if module not in last:
            last.clear()
            last[module] = make_parts(opened, f"{module}.weight", kind, torch.device("cpu"), dtype)
        return last[module][part]

    config = plain.documents["config.json"] | document(method)
    return replace(
        plain,
        specs=specs,
        read=read,
        documents=plain.documents | {"config.json": config},
        weights=opened.num_parameters,
    )
