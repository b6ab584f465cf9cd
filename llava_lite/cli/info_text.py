"""The text of `llava-lite info`: a model, its tensors, and the presets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from llava_lite.checkpoints.info import (
    Info,
    TensorInfo,
    describe_preset,
    format_bytes,
    format_count,
)
from llava_lite.config import PRESETS
from llava_lite.tables import table_row

# The purpose of each preset of token reduction.
PURPOSES = {
    "none": "plain LLaVA: every image token",
    "tome-72": "merge; attention still sees every position",
    "tome-72-logical": "merge; attention sees only what is left",
    "dymu-72": "merge plain images more, busy ones less",
    "fastv-50": "drop the half with the least attention",
    "hybrid-72-36": "merge, then prune: the fast one",
    "hybrid-vtu-72-36": "the same over every position: more accurate",
}


def format_info(info: Info, all_tensors: bool = False) -> str:
    """Architecture, parameters, memory, and the table of tensors.

    Tensors of equal blocks share a line unless `all_tensors`."""
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
        "thresholds": info.source and format_thresholds(info),
    }
    return [config.name, *(f"  {name:<11}{fact}" for name, fact in facts.items() if fact)]


def format_thresholds(info: Info) -> str:
    """Say whether the model has thresholds of its own for DToMe."""
    if info.thresholds_error is not None:
        return f"unusable: {info.thresholds_error}"
    if info.thresholds is None:
        return "none: dymu-72 and --merge dtome need some (llava-lite thresholds)"
    return f"{len(info.thresholds)}, used by dymu-72 and --merge dtome"


def parameter_lines(info: Info) -> list[str]:
    """Weights per part."""
    return [
        "parameters",
        *(
            table_row("<13 >16 >9", f"  {name}", f"{count:,}", format_count(count))
            for name, count in info.parameters.items()
        ),
    ]


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
    columns = "<44 >12 >12"
    lines = [table_row(columns, "memory", "float32", "16 bit")]
    for name, label in labels.items():
        sizes = format_bytes(wide[name]), format_bytes(narrow[name])
        lines.append(table_row(columns, f"  {label}", *sizes))
    return lines


def tensor_lines(tensors: Sequence[TensorInfo], all_tensors: bool = False) -> list[str]:
    """The table of tensors: name, shape, dtype."""
    groups = [[tensor] for tensor in tensors] if all_tensors else list(group_blocks(tensors))
    rows = [
        (group_name(group), " x ".join(map(str, group[0].shape)), group[0].dtype or "")
        for group in groups
    ]
    first, second = (max(len(row[column]) for row in rows) + 2 for column in range(2))
    note = "" if all_tensors else "; blocks of equal shapes in one line, --tensors lists each"
    lines = [f"tensors ({len(tensors)}{note})"]
    columns = f"<{first + 2} <{second} <0"
    return lines + [table_row(columns, f"  {name}", *rest) for name, *rest in rows]


def group_blocks(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """Groups of tensors that differ only in the block number, in order of appearance."""
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
    columns = "<20 >12 >12 >12 >10"
    lines = [table_row(columns, "model", "parameters", "16 bit", "float32", "context")]
    for name in PRESETS:
        info = describe_preset(name)
        wide, narrow = (format_bytes(info.memory[d]["weights"]) for d in ("float32", "bfloat16"))
        total = format_count(info.parameters["total"])
        context = str(info.config.text.max_positions)
        lines.append(table_row(columns, name, total, narrow, wide, context))
    return "\n".join(lines)


def describe_reductions() -> dict[str, dict[str, Any]]:
    """The presets of token reduction by name: purpose and parts, as plain types."""
    from llava_lite.reduction import REDUCTIONS

    return {
        name: {"purpose": PURPOSES[name], **asdict(reduction)}
        for name, reduction in REDUCTIONS.items()
    }


def format_reductions() -> str:
    """One line per preset of token reduction: name, parts, purpose."""
    from llava_lite.reduction import REDUCTIONS, ToMe

    columns = "<18 <16 <11 <20 <0"
    lines = [table_row(columns, "reduction", "merge", "positions", "fastv", "for")]
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
        lines.append(table_row(columns, name, merging, positions, pruning, PURPOSES[name]))
    return "\n".join(lines)
