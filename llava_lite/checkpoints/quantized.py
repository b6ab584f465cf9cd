"""Quantized checkpoints: folders in our format whose decoder weights are codes and scales.

config.json says {"quantization": {"method": "int4", "group_size": 32}}. The folder holds
`...q_proj.weight_int4`, `...q_proj.scales`, `...q_proj.steps` and `...q_proj.offsets` in place of
`...q_proj.weight`, as fast/quantize.py describes them. All other tensors are as in other folders.

Folders of version 0.1 have groups of 128, and zeros in place of steps and offsets.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.checkpoints.source import Entry, Inventory, Source, check_finite
from llava_lite.checkpoints.tensors import DTYPE_CODES, read_json
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.quantize import (
    METHODS,
    OldInt4Linear,
    QuantizedLinear,
    decoder_linears,
    get_method,
)

KEY = "quantization"
KINDS = (*METHODS.values(), OldInt4Linear)


@dataclass
class QuantizedSource(Source):
    """A source with quantized decoder weights. kind: the layer for them. parts: our name of the
    weight -> name of the part -> its entry. `entries` and `read` show these weights as if they were
    not quantized."""

    kind: type[QuantizedLinear] = QuantizedLinear
    parts: dict[str, dict[str, Entry]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.kind.method

    def find_kind(self, method: str | None) -> type[QuantizedLinear]:
        """The layer for a wished method (None: the stored one). Raises CheckpointError if the
        stored codes are no codes of it."""
        if method is None or method == self.method:
            return self.kind
        kind = get_method(method)
        same_codes = kind.codes == self.kind.codes
        if not same_codes or kind.group_size != self.kind.group_size:
            groups = f" in groups of {self.kind.group_size}" if same_codes else ""
            raise CheckpointError(
                f"{self.path}: is {self.method}{groups} already, it cannot become {method}"
            )
        return kind

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As `Source.read`; a quantized weight is restored from its codes."""
        if name not in self.parts:
            return super().read(name, dtype)
        return self.kind.restore(self.read_parts(name)).to(dtype or self.dtype)

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """The codes and scales of a quantized weight, as views of the mapped file."""
        parts = {part: self._stored(entry) for part, entry in self.parts[name].items()}
        if not self.trusted:
            for part, entry in self.parts[name].items():
                check_finite(parts[part], f"{entry.file}: tensor {entry.stored!r}")
        return parts


def document(kind: type[QuantizedLinear]) -> dict[str, Any]:
    """The entry on quantization in config.json."""
    group_size = {"group_size": kind.group_size} if kind.group_size > 1 else {}
    return {KEY: {"method": kind.method, **group_size}}


def read_kind(folder: Path) -> type[QuantizedLinear] | None:
    """The layer for the weights of a quantized folder, None for any other source. Raises
    CheckpointError for an unknown one."""
    if not (folder / "config.json").is_file():
        return None
    raw = read_json(folder / "config.json")
    if raw.get("format") != "llava_lite" or KEY not in raw:
        return None
    known = [document(kind)[KEY] for kind in KINDS]
    if raw[KEY] not in known:
        raise CheckpointError(f"{folder / 'config.json'}: {KEY} {raw[KEY]!r} is none of {known}")
    return KINDS[known.index(raw[KEY])]


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
