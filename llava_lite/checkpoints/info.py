"""Describe a checkpoint or an architecture without loading it: sizes, tensors, memory."""

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_lite.config import PRESETS, LlavaConfig
from llava_lite.errors import CheckpointError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CODES = {"int8": 1, "uint8": 1}  # bytes of a quantized weight's codes, in every dtype
# Weights of the model per number of a tensor, by the end of its name, where not 1.
WEIGHTS = {
    **{"weight_int4": 2, "scales": 0, "zeros": 0, "steps": 0, "offsets": 0},
    **{"running_mean": 0, "running_var": 0},
}
# Text tokens of the memory estimate, prompt and answer, beside one image.
TEXT_TOKENS = 256


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by our name, with its stored dtype (None: a preset without files)."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None

    @property
    def num_weights(self) -> int:
        """The number of the model's weights in this tensor."""
        return math.prod(self.shape) * WEIGHTS.get(self.name.rpartition(".")[2], 1)

    def num_bytes(self, dtype: str) -> int:
        """The bytes of this tensor if the model is in `dtype`."""
        return math.prod(self.shape) * CODES.get(self.dtype or "", BYTES[dtype])


@dataclass(frozen=True)
class Info:
    """A model without its weights.

    source, layout: None for a preset. ignored: number of stored tensors that are never read.
    thresholds: the model's own for DToMe, if any. thresholds_error: why they cannot be read.
    quantized: the method of a quantized folder, whose tensors are codes and scales."""

    config: LlavaConfig
    tensors: tuple[TensorInfo, ...]
    source: str | None = None
    layout: str | None = None
    revision: str | None = None
    ignored: int = 0
    thresholds: tuple[float, ...] | None = None
    thresholds_error: str | None = None
    quantized: str | None = None

    @property
    def parameters(self) -> dict[str, int]:
        """The number of weights per part, and the total."""
        counts = {"vision": 0, "projector": 0, "decoder": 0}
        tied = "decoder.lm_head." if self.config.text.tie_embeddings else None
        for tensor in self.tensors:
            if tied and tensor.name.startswith(tied):
                continue  # a quantized copy of the embedding
            counts[tensor.name.split(".")[0]] += tensor.num_weights
        return {**counts, "total": sum(counts.values())}

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes, the most frequent first."""
        counts = Counter(tensor.dtype for tensor in self.tensors if tensor.dtype)
        return [dtype for dtype, _ in counts.most_common()]

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes per dtype: of the weights, and of the KV cache for one token, for one image with
        `TEXT_TOKENS` tokens of text, and for a full context."""
        text = self.config.text
        numbers_per_token = 2 * text.num_layers * text.kv_width
        tokens = {"kv_cache_per_token": 1, "kv_cache_image_prompt": self.prompt_tokens}
        tokens["kv_cache_full_context"] = text.max_positions
        return {
            dtype: {
                "weights": sum(tensor.num_bytes(dtype) for tensor in self.tensors),
                **{name: size * numbers_per_token * count for name, count in tokens.items()},
            }
            for dtype, size in BYTES.items()
        }

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the memory estimate's image prompt."""
        wanted = self.config.vision.num_patches + TEXT_TOKENS
        return min(wanted, self.config.text.max_positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {
            "name": self.config.name,
            "source": self.source,
            "layout": self.layout,
            "revision": self.revision,
            "quantized": self.quantized,
            "config": asdict(self.config),
            "image_tokens": self.config.vision.num_patches,
            "context": self.config.text.max_positions,
            "template": self.config.template,
            "parameters": self.parameters,
            "memory": self.memory,
            "ignored_tensors": self.ignored,
            "thresholds": self.thresholds,
            "thresholds_error": self.thresholds_error,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def describe_preset(name: str) -> Info:
    """Describe an architecture of `config.PRESETS`. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    from llava_lite.checkpoints.skeleton import stored_shapes

    shapes = stored_shapes(PRESETS[name])
    return Info(PRESETS[name], tuple(TensorInfo(*item) for item in shapes.items()))


def describe_source(
    path: str | os.PathLike[str],
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> Info:
    """Describe a checkpoint of any layout, from its files' headers. Raises CheckpointError."""
    from llava_lite.checkpoints.gguf_in import GgufSource
    from llava_lite.checkpoints.opening import open_source
    from llava_lite.checkpoints.quantized import QuantizedSource
    from llava_lite.checkpoints.skeleton import expected_shapes
    from llava_lite.checkpoints.thresholds import OwnThresholds

    source = open_source(Path(path), base, vision_tower)
    tensors = []
    for name in (name for name in expected_shapes(source.config) if not source.is_tied(name)):
        entries = {name: source.entries[name]}
        if isinstance(source, QuantizedSource) and name in source.parts:
            module = name.removesuffix(".weight")
            entries = {f"{module}.{part}": e for part, e in source.parts[name].items()}
        known = source.stored_type(name) if isinstance(source, GgufSource) else None
        tensors += [
            TensorInfo(stored, entry.shape, known or str(entry.dtype).removeprefix("torch."))
            for stored, entry in entries.items()
        ]
    skipped = len(source.ignored) + len({entry.stored for entry in source.unused.values()})
    own = OwnThresholds.of(source)  # with an error the rest can still be described
    return Info(
        source.config,
        tuple(tensors),
        str(source.path),
        source.layout,
        source.revision,
        skipped,
        own.values,
        own.error,
        source.method if isinstance(source, QuantizedSource) else None,
    )


def verify_checksums(info: Info) -> int:
    """Compare every tensor of a converted folder with its manifest. Returns their number.

    Raises CheckpointError that names the file and the tensor."""
    from llava_lite.checkpoints.checkpoint import verify_folder

    if info.source is None or not (Path(info.source) / "manifest.json").is_file():
        where = info.source or info.config.name
        raise CheckpointError(f"{where}: no manifest.json; only converted folders have checksums")
    return verify_folder(info.source)


def format_count(count: int) -> str:
    """Format a number of weights with three digits: 7.06 B, 303 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Format bytes in binary units: 13.2 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
