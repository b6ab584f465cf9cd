"""Quantized checkpoints: folders in our format whose decoder weights are codes and scales.

config.json says {"quantization": {"method": "int4", "group_size": 128}}. The folder holds
`...q_proj.weight_int4`, `...q_proj.scales` and `...q_proj.zeros` in place of `...q_proj.weight`, as
fast/quantize.py describes them. All other tensors are as in other folders.
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
from llava_lite.fast.quantize import METHODS, QuantizedLinear, decoder_linears

KEY = "quantization"


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
