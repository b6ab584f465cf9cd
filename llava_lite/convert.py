"""`llava-lite convert`: any checkpoint layout -> a folder in our format, or in llava-hf's.

One tensor is in memory at a time: read from the mapped source, cast, hashed, appended to the shard
being written. The result takes its place only when all of it is there.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_lite.checkpoint import (
    DTYPES,
    SHARD_SIZE,
    Source,
    Spec,
    load_tokenizer,
    num_bytes,
    open_source,
    parse_dtype,
    staged,
    verify_tensors,
    write_json,
    write_shards,
)
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.errors import CheckpointError
from llava_lite.layouts import hf_name

Progress = Callable[[int, int], None]

HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes."""

    source: str
    destination: str
    layout: str
    to: str
    dtype: str
    revision: str | None
    tensors: int
    parameters: int
    size: int
    tokenizer: bool
    unused: list[str]
    ignored: list[str]
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    written: bool = False
    verified: bool = False

    def summary(self) -> str:
        """The report in a few lines of text."""
        done = "wrote" if self.written else "would write"
        lines = [
            f"{self.source}: {self.layout}",
            f"{done} {self.tensors} tensors, {self.parameters:,} parameters, {self.dtype}, "
            f"{self.size / 1e9:.2f} GB as {self.to} to {self.destination or '(nowhere)'}",
            f"left out {len(self.unused)} tensors of the vision tower that LLaVA never runs "
            f"and {len(self.ignored)} that are no weights of the model",
        ]
        if self.files:
            lines.append(f"files: {', '.join(self.files)}")
        if self.verified:
            lines.append("verified: every tensor read back equals what was read from the source")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@dataclass
class Output:
    """What a conversion writes: tensors with a way to make each, and JSON files beside them."""

    specs: dict[str, Spec]
    read: Callable[[str], Tensor]
    documents: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(num_bytes(spec) for spec in self.specs.values())


def convert(
    source: str | Path,
    destination: str | Path | None,
    *,
    dtype: str | torch.dtype | None = "bfloat16",
    shard_size: int = SHARD_SIZE,
    base: str | Path | None = None,
    vision_tower: str | Path | nn.Module | None = None,
    dry_run: bool = False,
    verify: bool = False,
    to: str = "llava_lite",
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint of any layout (see `checkpoint.open_source`) to a self-contained folder.

    `dtype` None keeps the decoder's; `shard_size` in bytes; `to` "llava_lite" or "hf"; `verify`
    reads everything back and compares hashes; `force` replaces a checkpoint that is already there;
    `progress(done, total)` is told the bytes. On any error or interrupt nothing half-written is
    left. Raises CheckpointError naming file and tensor."""
    if to not in ("llava_lite", "hf") or shard_size < 1:
        raise ValueError(f"to {to!r} must be llava_lite or hf, shard_size {shard_size} at least 1")
    opened = open_source(source, base, vision_tower)
    wanted = parse_dtype(dtype) or opened.dtype
    output = (hf_output if to == "hf" else own_output)(opened, wanted)
    report = make_report(opened, destination, output, wanted, to)
    if dry_run:
        return report
    if destination is None:
        raise ValueError("a destination is needed, except with dry_run")
    place = Path(destination).expanduser()
    check_destination(place, opened, output.size)
    with staged(place, force) as staging:
        read = with_progress(output, progress)
        table = write_shards(staging, output.specs, read, shard_size)
        write_side_files(staging, opened, output, table, to)
        report.verified = verify and verify_tensors(staging, table) == len(output.specs)
    report.files = sorted({row["file"] for row in table.values()})
    report.written = True
    return report


def write_side_files(
    folder: Path, opened: Source, output: Output, table: Mapping[str, Mapping[str, Any]], to: str
) -> None:
    """Everything but the weights: configs, tokenizer, and the manifest or the index."""
    for name, content in output.documents.items():
        write_json(folder / name, content)
    if to == "hf":
        write_hf_index(folder, table, output.size)
        write_hf_tokenizer(folder, opened)
        return
    if opened.tokenizer_file is not None:
        load_tokenizer(opened.tokenizer_file, opened.config).save(folder / "tokenizer.json")
    origin = {"source": str(opened.path), "layout": opened.layout, "revision": opened.revision}
    write_json(folder / "manifest.json", {**origin, "tensors": table})


def make_report(
    opened: Source, destination: str | Path | None, output: Output, dtype: torch.dtype, to: str
) -> Report:
    """The report before anything is written."""
    report = Report(
        source=str(opened.path),
        destination=str(destination or ""),
        layout=opened.layout,
        to=to,
        dtype=str(dtype).removeprefix("torch."),
        revision=opened.revision,
        tensors=len(output.specs),
        parameters=sum(num_bytes(spec) // spec[1].itemsize for spec in output.specs.values()),
        size=output.size,
        tokenizer=opened.tokenizer_file is not None,
        unused=output.unused,
        ignored=opened.ignored,
        notes=list(output.notes),
    )
    if not report.tokenizer:
        report.notes.append("the source has no tokenizer, so the result has none: text needs one")
    return report


def check_destination(place: Path, opened: Source, size: int) -> None:
    """Raise CheckpointError when writing there would touch the source, or cannot fit."""
    sources = {opened.path.resolve(), *(e.file.parent.resolve() for e in opened.entries.values())}
    if place.resolve() in sources:
        raise CheckpointError(f"{place}: is where the source lies, choose another destination")
    parent = next(folder for folder in place.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise CheckpointError(
            f"{place}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on this disk"
        )


def with_progress(output: Output, progress: Progress | None) -> Callable[[str], Tensor]:
    """`output.read`, telling `progress` the bytes done before each tensor and at the end."""
    if progress is None:
        return output.read
    done, total = 0, output.size

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = output.read(name)
        done += num_bytes(output.specs[name])
        progress(done, total)
        return tensor

    return read


def own_output(opened: Source, dtype: torch.dtype) -> Output:
    """Our format: our names, config and manifest; only what the model runs."""
    return Output(
        specs={name: (opened.entries[name].shape, dtype) for name in opened.names()},
        read=lambda name: opened.read(name, dtype),
        documents={"config.json": opened.config.to_dict()},
        unused=list(dict.fromkeys(entry.stored for entry in opened.unused.values())),
    )


def hf_output(opened: Source, dtype: torch.dtype) -> Output:
    """llava-hf format (old names, which every transformers version reads)."""
    config, notes = opened.config, []
    if config.projector_depth != 2:
        raise CheckpointError(f"{opened.path}: llava-hf has 2 projector layers, not the source's")
    whole = has_whole_tower(opened)
    ours = {hf_name(name): name for name in [*opened.names(), *(opened.unused if whole else ())]}
    shapes = {name: opened.shape(ours[name]) for name in ours}
    made: dict[str, Tensor] = {}
    if not whole:
        width = config.vision.hidden_size
        made["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(width)
        made["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
        notes.append(
            f"the source has only the {config.vision.num_blocks} vision blocks that LLaVA runs: "
            "the result declares so many (vision_feature_layer -1), with an identity "
            "post_layernorm that LLaVA does not use; answers are the same"
        )
    rows = hf_vocab_size(config)
    if rows != config.text.vocab_size:
        notes.append(
            f"vocabulary grown from {config.text.vocab_size} to {rows} rows for <image> and <pad>: "
            "new rows are the mean of the old ones"
        )

    def read(name: str) -> Tensor:
        if name in made:
            return made[name].to(dtype)
        tensor = opened.read(ours[name], dtype)
        is_vocab = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        return grow_rows(tensor, rows, config.text.sampled_vocab_size) if is_vocab else tensor

    specs: dict[str, Spec] = {name: (shape, dtype) for name, shape in shapes.items()}
    specs |= {name: (tuple(tensor.shape), dtype) for name, tensor in made.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        specs[name] = ((rows, config.text.hidden_size), dtype)
    documents = hf_documents(config, whole, rows, dtype)
    left_out = [] if whole else [entry.stored for entry in opened.unused.values()]
    return Output(specs, read, documents, notes, left_out)


def has_whole_tower(opened: Source) -> bool:
    """True when the source has every block of its tower and the final norm, in matching shapes."""
    vision = opened.config.vision
    block = [name for name in opened.entries if name.startswith("vision.blocks.0.")]
    expected = {
        name.replace(".0.", f".{number}.", 1): opened.entries[name].shape
        for number in range(vision.num_blocks, vision.num_layers)
        for name in block
    }
    expected |= {f"vision.post_norm.{kind}": (vision.hidden_size,) for kind in ("weight", "bias")}
    return expected == {name: entry.shape for name, entry in opened.unused.items()}


def hf_vocab_size(config: LlavaConfig) -> int:
    """Rows with room for `<image>` and `<pad>` behind the text vocabulary, a multiple of 64."""
    text = config.text
    needed = text.sampled_vocab_size + 2
    return text.vocab_size if text.vocab_size >= needed else -(-needed // 64) * 64


def grow_rows(tensor: Tensor, rows: int, text_rows: int) -> Tensor:
    """Append rows up to `rows`, each the mean of the text rows: never the likeliest next token."""
    if len(tensor) == rows:
        return tensor
    mean = tensor[:text_rows].mean(dim=0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(rows - len(tensor), -1)))


def hf_documents(
    config: LlavaConfig, whole_tower: bool, rows: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The JSON files of a llava-hf folder but those of the tokenizer."""
    vision, text = config.vision, config.text
    image_id, precision = text.sampled_vocab_size, str(dtype).removeprefix("torch.")
    ids = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": image_id + 1}
    blocks = vision.num_layers if whole_tower else vision.num_blocks
    model_config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": vision.num_patches,
        "pad_token_id": image_id + 1,
        "projector_hidden_act": "gelu",
        "text_config": hf_text_config(text, rows) | ids | {"torch_dtype": precision},
        "vision_config": hf_vision_config(vision, blocks) | {"torch_dtype": precision},
        "vision_feature_layer": vision.feature_layer if whole_tower else -1,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
        "tie_word_embeddings": False,
        "torch_dtype": precision,
    }
    documents = {"config.json": model_config, "generation_config.json": ids}
    return documents | hf_processor_documents(config)


def hf_text_config(text: TextConfig, rows: int) -> dict[str, Any]:
    """The decoder in transformers' words."""
    return {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_positions,
        "tie_word_embeddings": False,
    }


def hf_vision_config(vision: VisionConfig, blocks: int) -> dict[str, Any]:
    """The CLIP tower in transformers' words."""
    return {
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": blocks,
        "num_attention_heads": vision.num_heads,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": "quick_gelu",
    }


def hf_processor_documents(config: LlavaConfig) -> dict[str, dict[str, Any]]:
    """How transformers has to prepare images; `do_pad` exists from transformers 4.49 on."""
    size, kind = config.vision.image_size, "Llava" if config.pad else "CLIP"
    image_processor = {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    if config.pad:
        image_processor["do_pad"] = True
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}


def write_hf_index(folder: Path, table: Mapping[str, Mapping[str, Any]], size: int) -> None:
    """model.safetensors.index.json, which llava-hf folders of more than one shard have."""
    weight_map = {name: row["file"] for name, row in table.items()}
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_hf_tokenizer(folder: Path, opened: Source) -> None:
    """Copy the tokenizer of a llava-hf source, or write ours with `<image>` and `<pad>` added."""
    if opened.tokenizer_file is None:
        return
    home = opened.tokenizer_file.parent
    if opened.layout.startswith("llava-hf") and (home / "tokenizer_config.json").is_file():
        for name in HF_TOKENIZER_FILES:
            if (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
        return
    path = folder / "tokenizer.json"
    load_tokenizer(opened.tokenizer_file, opened.config).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    image_id = opened.config.text.sampled_vocab_size
    for number, text in enumerate(("<image>", "<pad>"), start=image_id):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"].append({"id": number, "content": text, "special": True, **flags})
    write_json(path, content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
        "padding_side": "left",
        "model_max_length": opened.config.text.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def parse_size(text: str) -> int:
    """ "2GB", "500MB" or a number of bytes. Raises ValueError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = text.strip().upper(), 1
    if number[-2:] in units:
        number, factor = number[:-2], units[number[-2:]]
    size = int(float(number) * factor)
    if size < 1:
        raise ValueError(f"size {text!r} must be positive")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llava-lite convert`."""
    parser.add_argument("source", help="checkpoint folder, projector file, or cached hub id")
    parser.add_argument("destination", nargs="?", help="folder to write (not with --dry-run)")
    parser.add_argument("--dtype", choices=(*DTYPES, "keep"), default="bfloat16")
    parser.add_argument(
        "--shard-size", type=parse_size, default=SHARD_SIZE, metavar="SIZE", help="such as 2GB"
    )
    parser.add_argument("--base", help="base model of a LoRA adapter or a projector")
    parser.add_argument("--vision-tower", help="CLIP folder or file, where none is inside")
    parser.add_argument("--to", choices=("llava_lite", "hf"), default="llava_lite")
    parser.add_argument("--dry-run", action="store_true", help="only report what would be done")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint already there")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """`llava-lite convert`: report on stdout, progress on stderr. Raises CheckpointError."""
    from llava_lite.download import resolve

    if args.destination is None and not args.dry_run:
        print("convert: a destination is needed, except with --dry-run", file=sys.stderr)
        return 2
    source = resolve(args.source, revision=args.revision)
    base = resolve(args.base) if args.base else None
    report = convert(
        source,
        args.destination,
        dtype=None if args.dtype == "keep" else args.dtype,
        shard_size=args.shard_size,
        base=base,
        vision_tower=args.vision_tower,
        dry_run=args.dry_run,
        verify=args.verify,
        to=args.to,
        force=args.force,
        progress=terminal_progress(),
    )
    print(json.dumps(asdict(report), indent=2) if args.json else report.summary())
    return 0


def terminal_progress() -> Progress | None:
    """A progress bar on stderr, only where that is a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, desc="convert", file=sys.stderr)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update
