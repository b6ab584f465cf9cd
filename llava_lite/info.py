"""What is in a checkpoint and what it will need, without loading it: sizes, tensors, memory.

describe_preset(name)   an architecture alone, no files needed
describe_source(path)   a folder of any layout that can be loaded
format_info(info)       the same for people
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_lite.config import PRESETS, LlavaConfig
from llava_lite.errors import CheckpointError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CODES = {"int8": 1, "uint8": 1}  # bytes of what stays as it is in every dtype: codes of weights
# Weights that one number of a quantised tensor stands for, by the end of its name.
WEIGHTS = {"weight_int4": 2, "scales": 0, "zeros": 0}
# Words around one image in the prompt of the memory estimate, answer included.
TEXT_TOKENS = 256
# What each preset of token reduction is for.
PURPOSES = {
    "none": "plain LLaVA: every image token",
    "tome-72": "merge; attention still sees every position",
    "tome-72-logical": "merge; attention sees only what is left",
    "dymu-72": "merge plain images more, busy ones less",
    "fastv-50": "drop the half that the prompt looks at least",
    "hybrid-72-36": "merge, then prune: the fast one",
    "hybrid-vtu-72-36": "the same over every position: the careful one",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by our name; the dtype is the stored one, None for a preset without files."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None

    @property
    def num_weights(self) -> int:
        """Weights of the model that it holds."""
        return math.prod(self.shape) * WEIGHTS.get(self.name.rpartition(".")[2], 1)

    def num_bytes(self, dtype: str) -> int:
        """Bytes it takes when the model is in this dtype."""
        return math.prod(self.shape) * CODES.get(self.dtype or "", BYTES[dtype])


@dataclass(frozen=True)
class Info:
    """A model on paper. `source` and `layout` are None for a preset; `quantized` is the method of a
    quantised folder, whose tensors then are codes and scales; `ignored` counts the stored
    tensors that the model never reads; `thresholds` are what DToMe goes by, if it has some, or
    the error why they cannot be used."""

    config: LlavaConfig
    tensors: tuple[TensorInfo, ...]
    source: str | None = None
    layout: str | None = None
    revision: str | None = None
    ignored: int = 0
    thresholds: tuple[float, ...] | CheckpointError | None = None
    quantized: str | None = None

    @property
    def parameters(self) -> dict[str, int]:
        """Number of weights per part, and in all."""
        counts = {"vision": 0, "projector": 0, "decoder": 0}
        for tensor in self.tensors:
            counts[tensor.name.split(".")[0]] += tensor.num_weights
        return {**counts, "total": sum(counts.values())}

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that occur in the files, the commonest first."""
        counts = Counter(tensor.dtype for tensor in self.tensors if tensor.dtype)
        return [dtype for dtype, _ in counts.most_common()]

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes per dtype: the weights, and the KV cache of one token, of one image with a short
        talk about it (`TEXT_TOKENS`), and of a full context."""
        text = self.config.text
        numbers_per_token = 2 * text.num_layers * text.num_heads * text.head_dim
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
        """Tokens of the image prompt that the memory estimate is about."""
        wanted = self.config.vision.num_patches + TEXT_TOKENS
        return min(wanted, self.config.text.max_positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        unusable = isinstance(self.thresholds, CheckpointError)
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
            "thresholds": None if unusable else self.thresholds,
            "thresholds_error": str(self.thresholds) if unusable else None,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def describe_preset(name: str) -> Info:
    """An architecture of `config.PRESETS`, its tensors on the meta device. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    from llava_lite.meta import expected_shapes

    shapes = expected_shapes(PRESETS[name])
    return Info(PRESETS[name], tuple(TensorInfo(*item) for item in shapes.items()))


def describe_source(
    path: str | os.PathLike[str],
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> Info:
    """A checkpoint of any layout (`sources.open_source`), from its headers alone.

    Raises CheckpointError."""
    from llava_lite.meta import expected_shapes
    from llava_lite.quantized_checkpoint import QuantizedSource, open_source
    from llava_lite.thresholds import own_thresholds_or_error

    source = open_source(Path(path), base, vision_tower)
    tensors = []
    for name in expected_shapes(source.config):
        entries = {name: source.entries[name]}
        if isinstance(source, QuantizedSource) and name in source.parts:
            module = name.removesuffix(".weight")
            entries = {f"{module}.{part}": e for part, e in source.parts[name].items()}
        tensors += [
            TensorInfo(stored, entry.shape, str(entry.dtype).removeprefix("torch."))
            for stored, entry in entries.items()
        ]
    skipped = len(source.ignored) + len({entry.stored for entry in source.unused.values()})
    return Info(
        source.config,
        tuple(tensors),
        str(source.path),
        source.layout,
        source.revision,
        skipped,
        own_thresholds_or_error(source),
        source.method if isinstance(source, QuantizedSource) else None,
    )


def verify_checksums(info: Info) -> int:
    """Compare every tensor of a converted folder with its manifest; returns how many there are.

    Raises CheckpointError naming the file and the tensor that differs."""
    from llava_lite.checkpoint import verify_folder

    if info.source is None or not (Path(info.source) / "manifest.json").is_file():
        where = info.source or info.config.name
        raise CheckpointError(f"{where}: no manifest.json; only converted folders have checksums")
    return verify_folder(info.source)


# ---- for people --------------------------------------------------------------------------------


def format_info(info: Info, all_tensors: bool = False) -> str:
    """Several lines of text: architecture, parameters, memory, and the table of tensors, those of
    equal blocks in one line unless `all_tensors`."""
    sections = (
        architecture_lines(info),
        parameter_lines(info),
        memory_lines(info),
        tensor_lines(info.tensors, all_tensors),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def architecture_lines(info: Info) -> list[str]:
    """Name, origin, and the sizes of the three parts."""
    vision, text, config = info.config.vision, info.config.text, info.config
    images = "padded to a square" if config.pad else "cropped to a square"
    facts = {
        "source": info.source or "none: an architecture preset",
        "layout": info.layout and f"{info.layout}, {', '.join(info.dtypes)}",
        "revision": info.revision,
        "vision": f"{vision.image_size} px in patches of {vision.patch_size}: {vision.grid} x "
        f"{vision.grid} = {vision.num_patches} image tokens; {vision.num_blocks} of "
        f"{vision.num_layers} blocks run, {vision.hidden_size} wide, {vision.num_heads} heads",
        "projector": f"{config.projector_depth} linear layers, "
        f"{vision.hidden_size} -> {text.hidden_size}",
        "decoder": f"{text.num_layers} layers, {text.hidden_size} wide, {text.num_heads} heads of "
        f"{text.head_dim}, vocabulary {text.vocab_size}",
        "context": f"{text.max_positions} tokens",
        "template": f"{config.template}, images {images}",
        "thresholds": info.source and format_thresholds(info.thresholds),
    }
    return [config.name, *(f"  {name:<11}{fact}" for name, fact in facts.items() if fact)]


def format_thresholds(thresholds: Sequence[float] | CheckpointError | None) -> str:
    """Whether a model can merge by likeness as it is."""
    if isinstance(thresholds, CheckpointError):
        return f"unusable: {thresholds}"
    if thresholds is None:
        return "none: dymu-72 and --merge dtome need some (llava-lite thresholds)"
    return f"{len(thresholds)}, what dymu-72 and --merge dtome go by"


def parameter_lines(info: Info) -> list[str]:
    """Weights per part."""
    rows = ((name, f"{count:,}", format_count(count)) for name, count in info.parameters.items())
    return ["parameters", *(f"  {name:<11}{count:>16}  {short:>7}" for name, count, short in rows)]


def memory_lines(info: Info) -> list[str]:
    """The estimate, one column per dtype of different size."""
    tokens = info.config.text.max_positions
    labels = {
        "weights": "weights",
        "kv_cache_per_token": "KV cache, one token",
        "kv_cache_image_prompt": f"KV cache, image + text ({info.prompt_tokens} tokens)",
        "kv_cache_full_context": f"KV cache, full context ({tokens} tokens)",
    }
    wide, narrow = info.memory["float32"], info.memory["bfloat16"]
    lines = [f"{'memory':<44}{'float32':>12}{'16 bit':>12}"]
    for name, label in labels.items():
        lines.append(f"  {label:<42}{format_bytes(wide[name]):>12}{format_bytes(narrow[name]):>12}")
    return lines


def tensor_lines(tensors: Sequence[TensorInfo], all_tensors: bool = False) -> list[str]:
    """The table of tensors: name, shape, dtype."""
    groups = [[tensor] for tensor in tensors] if all_tensors else list(group_blocks(tensors))
    rows = [
        (group_name(group), " x ".join(map(str, group[0].shape)), group[0].dtype or "")
        for group in groups
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    note = "" if all_tensors else "; blocks of equal shapes in one line, --tensors lists each"
    lines = [f"tensors ({len(tensors)}{note})"]
    for name, shape, dtype in rows:
        lines.append(f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype}".rstrip())
    return lines


def group_blocks(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors that differ in nothing but the block number, together, in order of appearance."""
    groups: dict[tuple[str, tuple[int, ...], str | None], list[TensorInfo]] = {}
    for tensor in tensors:
        key = re.sub(r"(blocks|layers)\.\d+", r"\1.*", tensor.name), tensor.shape, tensor.dtype
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def group_name(group: Sequence[TensorInfo]) -> str:
    """The common name: `decoder.layers.{0..31}.attn.q_proj.weight`."""
    if len(group) == 1:
        return group[0].name
    numbers = [int(re.findall(r"(?:blocks|layers)\.(\d+)", tensor.name)[0]) for tensor in group]
    return re.sub(r"(blocks|layers)\.\d+", rf"\1.{{{ranges(numbers)}}}", group[0].name, count=1)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in short: 0..5,7."""
    runs = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0]):
        members = [number for _, number in run]
        runs.append(f"{members[0]}..{members[-1]}" if len(members) > 1 else f"{members[0]}")
    return ",".join(runs)


def format_presets() -> str:
    """One line per preset: name, size, memory, context."""
    lines = [f"{'model':<20}{'parameters':>12}{'16 bit':>12}{'float32':>12}{'context':>10}"]
    for name in PRESETS:
        info = describe_preset(name)
        wide, narrow = (format_bytes(info.memory[d]["weights"]) for d in ("float32", "bfloat16"))
        total = format_count(info.parameters["total"])
        lines.append(
            f"{name:<20}{total:>12}{narrow:>12}{wide:>12}{info.config.text.max_positions:>10}"
        )
    return "\n".join(lines)


def describe_reductions() -> dict[str, dict[str, Any]]:
    """The presets of token reduction by name: what each is for, and its parts. Plain types."""
    from llava_lite.reduction import REDUCTIONS

    return {
        name: {"purpose": PURPOSES[name], **asdict(reduction)}
        for name, reduction in REDUCTIONS.items()
    }


def format_reductions() -> str:
    """One line per preset of token reduction: name, its parts, and what it is for."""
    from llava_lite.reduction import REDUCTIONS, ToMe

    lines = [f"{'reduction':<18}{'merge':<16}{'positions':<11}{'fastv':<20}for"]
    for name, reduction in REDUCTIONS.items():
        merge, fastv = reduction.merge, reduction.fastv
        positions = reduction.positions if merge else "-"
        merging = (
            f"keep {merge.keep}" if isinstance(merge, ToMe) else "thresholds" if merge else "-"
        )
        pruning = "-"
        if fastv is not None:
            amount = f"keep {fastv.keep}" if fastv.keep else f"drop {100 * (fastv.drop or 0):.0f} %"
            pruning = f"{amount}, layer {fastv.layer}"
        lines.append(f"{name:<18}{merging:<16}{positions:<11}{pruning:<20}{PURPOSES[name]}")
    return "\n".join(lines)


def format_count(count: int) -> str:
    """A number of weights in three digits: 7.06 B, 303 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Bytes in binary units: 13.2 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
