"""The text of `llava-lite info`: a model, its tensors, and the presets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from llava_lite.checkpoints.info import (
    Info,
    TensorInfo,
    describe_preset,
    format_bytes,
    format_count,
)
from llava_lite.config import LLAVA_1_5_7B, PRESETS, FastViTHDConfig, TextConfig, TowerConfig
from llava_lite.tables import table_lines

if TYPE_CHECKING:
    from llava_lite.reduction import FastV, Reduction

# The purpose of each preset of token reduction.
PURPOSES = {
    "none": "plain LLaVA",
    "folded-72": "merge only",
    "folded-144-72": "closest to plain",
    "folded-144-36": "try this first",
    "folded-72-36": "merge, then fold",
    "folded-72-36-18": "faster",
    "folded-72-18-9": "fastest",
    "fastv-72-folded": "fold only",
    "tome-72": "merge, unmerge",
    "tome-72-logical": "merge, lose weights",
    "dymu-72": "few for plain images",
    "fastv-50": "prune only",
    "hybrid-72-36": "merge, then drop",
    "hybrid-vtu-72-36": "merge, unmerge, drop",
}

# The right answers of the embedded model in percent, float32, on the study's 150 scenes.
RIGHT = {
    "none": 96.1,
    "folded-72": 93.5,
    "folded-144-72": 95.6,
    "folded-144-36": 94.4,
    "folded-72-36": 92.4,
    "folded-72-36-18": 90.4,
    "folded-72-18-9": 84.4,
    "fastv-72-folded": 94.0,
    "tome-72": 94.7,
    "tome-72-logical": 75.9,
    "dymu-72": 94.6,
    "fastv-50": 94.1,
    "hybrid-72-36": 75.7,
    "hybrid-vtu-72-36": 89.1,
}

NUM_TEXT = 64  # text tokens of the prompt behind work and KV cache
LEGEND = f"""\
work: the share that is left of the decoder's prefill. KV cache: in 16 bit. Both are for
LLaVA-1.5-7B, one image and {NUM_TEXT} text tokens. They are empty where they depend on the image.
right: right answers of the embedded model about 150 scenes."""


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
        f"{vision.grid} = {vision.num_patches} image tokens; {format_blocks(vision)}",
        "projector": f"{config.projector_depth} linear layers, "
        f"{vision.hidden_size} -> {text.hidden_size}",
        "decoder": f"{text.num_layers} layers, {text.hidden_size} wide, {text.num_heads} heads of "
        f"{text.head_dim}{format_kv_heads(text)}, vocabulary {text.vocab_size}",
        "context": f"{text.max_positions} tokens",
        "template": f"{config.template}, images {images}",
        "thresholds": info.source and format_thresholds(info),
    }
    return [config.name, *(f"  {name:<11}{fact}" for name, fact in facts.items() if fact)]


def format_kv_heads(text: TextConfig) -> str:
    """The heads of keys and values, where they are fewer."""
    fewer = text.kv_heads < text.num_heads
    return f", {text.kv_heads} for keys and values" if fewer else ""


def format_blocks(vision: TowerConfig) -> str:
    """The blocks of a tower and their widths."""
    if isinstance(vision, FastViTHDConfig):
        depths, widths = (" + ".join(map(str, part)) for part in (vision.depths, vision.widths))
        return f"{depths} blocks, {widths.replace(' +', ',')} wide"
    return (
        f"{vision.num_blocks} of {vision.num_layers} blocks run, {vision.hidden_size} wide, "
        f"{vision.num_heads} heads"
    )


def format_thresholds(info: Info) -> str:
    """Say whether the model has thresholds of its own for DToMe."""
    if info.thresholds_error is not None:
        return f"unusable: {info.thresholds_error}"
    if info.thresholds is None:
        return "none: dymu-72 and --merge dtome need some (llava-lite thresholds)"
    return f"{len(info.thresholds)}, used by dymu-72 and --merge dtome"


def parameter_lines(info: Info) -> list[str]:
    """Weights per part."""
    rows = [
        {"parameters": f"  {name}", "weights": f"{count:,}", "": format_count(count)}
        for name, count in info.parameters.items()
    ]
    return [*table_lines(rows, ["parameters"])]


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
    rows = [
        {
            "memory": f"  {label}",
            "float32": format_bytes(wide[name]),
            "16 bit": format_bytes(narrow[name]),
        }
        for name, label in labels.items()
    ]
    return [*table_lines(rows, ["memory"])]


def tensor_lines(tensors: Sequence[TensorInfo], all_tensors: bool = False) -> list[str]:
    """The table of tensors: name, shape, dtype."""
    groups = [[tensor] for tensor in tensors] if all_tensors else list(group_blocks(tensors))
    note = "" if all_tensors else "; blocks of equal shapes in one line, --tensors lists each"
    title = f"tensors ({len(tensors)}{note})"
    rows = [
        {
            "name": f"  {group_name(group)}",
            "shape": " x ".join(map(str, group[0].shape)),
            "dtype": group[0].dtype or "",
        }
        for group in groups
    ]
    _, *lines = table_lines(rows, ["name", "shape", "dtype"])
    return [title, *lines]


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
    rows = []
    for name in PRESETS:
        info = describe_preset(name)
        row = {"model": name, "parameters": format_count(info.parameters["total"])}
        for title, dtype in (("16 bit", "bfloat16"), ("float32", "float32")):
            row[title] = format_bytes(info.memory[dtype]["weights"])
        rows.append(row | {"context": str(info.config.text.max_positions)})
    return "\n".join(table_lines(rows, ["model"]))


def describe_reductions() -> dict[str, dict[str, Any]]:
    """The presets of token reduction by name: purpose, parts, cost and right answers, as plain
    types."""
    from llava_lite.reduction import REDUCTIONS

    return {
        name: {
            "purpose": PURPOSES[name],
            **asdict(reduction),
            **estimate_cost(reduction),
            "right_answers": RIGHT[name],
        }
        for name, reduction in REDUCTIONS.items()
    }


def estimate_cost(reduction: "Reduction") -> dict[str, Any]:
    """The share of the decoder's FLOPs that a reduction leaves, and the bytes of the KV cache in 16
    bit, of LLaVA-1.5-7B on one image and `NUM_TEXT` text tokens. None where the image decides."""
    from llava_lite.generation.trace import decoder_flops, expected_lengths, kv_bytes

    text = LLAVA_1_5_7B.text
    lengths = expected_lengths(LLAVA_1_5_7B, reduction, NUM_TEXT)
    if lengths is None:
        return {"prefill_work": None, "kv_cache_bytes": None}
    whole = [NUM_TEXT + LLAVA_1_5_7B.vision.num_patches] * text.num_layers
    share = decoder_flops(text, *lengths) / decoder_flops(text, whole, whole)
    return {"prefill_work": round(share, 4), "kv_cache_bytes": kv_bytes(text, lengths[1])}


def format_reductions() -> str:
    """One line per preset of token reduction: name, parts, cost, right answers, purpose."""
    from llava_lite.reduction import REDUCTIONS, ToMe

    rows = []
    for name, facts in describe_reductions().items():
        reduction = REDUCTIONS[name]
        merge, fastv = reduction.merge, reduction.fastv
        placed = merge is not None or reduction.positions == "folded"
        work, cache = facts["prefill_work"], facts["kv_cache_bytes"]
        row = {
            "reduction": name,
            "merge": "-",
            "positions": reduction.positions if placed else "-",
            "fastv": "-" if fastv is None else describe_fastv(fastv),
            "work": "" if work is None else f"{100 * work:.0f} %",
            "KV cache": "" if cache is None else f"{cache / 2**20:.0f} MiB",
            "right": f"{facts['right_answers']:.1f} %",
            "purpose": facts["purpose"],
        }
        if merge is not None:
            row["merge"] = f"keep {merge.keep}" if isinstance(merge, ToMe) else "dynamic"
        rows.append(row)
    left = ["reduction", "merge", "positions", "fastv", "purpose"]
    return "\n".join([*table_lines(rows, left), "", LEGEND])


def describe_fastv(fastv: "FastV") -> str:
    """Every stage in short: fold to 48 from layer 1, 36 from 3."""
    amounts = [n if isinstance(n, int) else f"{100 * n:g} %" for n in fastv.amounts.values()]
    stages = [f"{n} from {layer}" for layer, n in zip(fastv.amounts, amounts, strict=True)]
    verb = fastv.rest
    if isinstance(amounts[0], int):
        verb = "fold to" if fastv.rest == "fold" else "keep"
    return f"{verb} {', '.join(stages)}".replace("from", "from layer", 1)


def format_machine(facts: dict[str, Any], times: dict[str, Any]) -> str:
    """The processor, and for every kind of weight the kernel of each class of row counts."""
    from llava_lite.fast.kernels import best_ways, choose, rows_of_classes

    lines = [f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}"]
    lines += wrap(f"instructions: {' '.join(facts['flags']) or 'not known here'}", 96)
    lines += [f"setting: {name}={value}" for name, value in facts["settings"].items()]
    classes = [f"{rows} rows" if rows != "1" else "1 row" for rows in rows_of_classes()]
    rows, others = [], []
    for kind, seconds in times.items():
        if isinstance(seconds, dict):
            shares = (f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
            others.append(f"{kind}, one query: {', '.join(shares)}")
        elif "codes" in seconds[0]:
            most, dtype = best_ways(seconds)
            wide = "the model's dtype" if dtype is None else "float32"
            others.append(f"{kind}: codes for {most} rows at most, else weights written in {wide}")
        else:
            chosen = zip(classes, choose(seconds).names, seconds, strict=True)
            cells = {name: compare_kernel(best, found) for name, best, found in chosen}
            rows.append({"weight": kind, **cells})
    lines += ["", *table_lines(rows, ["weight", *classes]), "", *others, ""]
    lines += wrap(
        "The fastest kernel for each weight and number of rows, with its share of the time of "
        "torch's own product (linear). Kernels are measured at the first load; --again repeats it.",
        96,
    )
    return "\n".join(lines)


def compare_kernel(name: str, seconds: dict[str, float]) -> str:
    """A kernel and its share of the time of `F.linear`: "mv 0.62"."""
    return name if name == "linear" else f"{name} {seconds[name] / seconds['linear']:.2f}"
