"""What `llava-lite info` prints: a model, its tensors and the presets, as text for people."""

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
        "thresholds": info.source and format_thresholds(info),
    }
    return [config.name, *(f"  {name:<11}{fact}" for name, fact in facts.items() if fact)]


def format_thresholds(info: Info) -> str:
    """Say whether the model has thresholds of its own for DToMe."""
    if info.thresholds_error is not None:
        return f"unusable: {info.thresholds_error}"
    if info.thresholds is None:
        return "none: dymu-72 and --merge dtome need some (llava-lite thresholds)"
    return f"{len(info.thresholds)}, what dymu-72 and --merge dtome go by"


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
