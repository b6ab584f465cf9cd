"""The output of a conversion: a folder in our format or in llava-hf's.

An `Output` lists the tensors, and makes each one when it is written. Configs, the tokenizer and our
manifest or llava-hf's index are written beside the weights.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_lite.checkpoints.checkpoint import load_tokenizer, make_parts
from llava_lite.checkpoints.configs import TEXT_FIELDS, VISION_FIELDS
from llava_lite.checkpoints.names import hf_name
from llava_lite.checkpoints.quantized import QuantizedSource, document
from llava_lite.checkpoints.skeleton import STATISTICS, meta_model
from llava_lite.checkpoints.source import Source
from llava_lite.checkpoints.tensors import Spec, num_bytes, read_json_value
from llava_lite.checkpoints.thresholds import FILE_NAME, OwnThresholds
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.quantize import check_shapes, decoder_linears, get_method
from llava_lite.inputs.pixels import MEAN, STD
from llava_lite.saving import write_json

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
class Output:
    """The plan of a conversion: tensors, a function that makes each, and JSON files.

    weights: the number of the model's weights, if the tensors are codes (None: count)."""

    specs: dict[str, Spec]
    read: Callable[[str], Tensor]
    documents: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    weights: int | None = None

    @property
    def size(self) -> int:
        return sum(num_bytes(spec) for spec in self.specs.values())

    @property
    def num_parameters(self) -> int:
        counted = (spec for name, spec in self.specs.items() if not name.endswith(STATISTICS))
        return self.weights or sum(math.prod(shape) for shape, _ in counted)


def write_side_files(
    folder: Path,
    opened: Source,
    output: Output,
    table: Mapping[str, Mapping[str, Any]],
    to: str,
    names: Mapping[str, str],
) -> None:
    """Write everything but the weights: configs, tokenizer, and the manifest or the index.

    names: entries of the manifest for "source" and "base" instead of their paths."""
    for name, content in output.documents.items():
        write_json(folder / name, content)
    if to == "gguf":
        return  # the facts and the tokenizer are in the files
    if to == "hf":
        write_hf_index(folder, table, output.size)
        write_hf_tokenizer(folder, opened)
        return
    if opened.tokenizer_file is not None:
        load_tokenizer(opened.tokenizer_file, opened.config).save(folder / "tokenizer.json")
    origin = {
        "source": str(opened.path),
        "layout": opened.layout,
        "revision": opened.revision,
        "base": opened.base,
        "vision_tower": opened.vision_tower,
    }
    write_json(folder / "manifest.json", {**origin, **names, "tensors": table})


def threshold_document(opened: Source) -> dict[str, dict[str, Any]]:
    """thresholds.json for the blocks that run, if the source has a thresholds.json."""
    own = OwnThresholds.of(opened)
    thresholds = own.read()
    if own.file is None or thresholds is None:
        return {}
    if isinstance(opened.config.vision, VisionConfig):
        thresholds = thresholds[: opened.config.vision.num_blocks]
    content = read_json_value(own.file)
    return {FILE_NAME: {**(content if isinstance(content, dict) else {}), "thresholds": thresholds}}


def own_output(opened: Source, dtype: torch.dtype) -> Output:
    """Plan a folder in our format, with only the tensors that the model uses."""
    names = [name for name in opened.names() if not opened.is_tied(name)]
    return Output(
        specs={name: (opened.entries[name].shape, dtype) for name in names},
        read=lambda name: opened.read(name, dtype),
        documents={"config.json": opened.config.to_dict()} | threshold_document(opened),
        unused=list(dict.fromkeys(entry.stored for entry in opened.unused.values())),
    )


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
    for name in opened.names():
        spec = opened.shape(name), dtype
        module = name.removesuffix(".weight")
        parts = kind.specs(spec[0], dtype) if module in shapes else None
        specs |= {f"{module}.{part}": s for part, s in parts.items()} if parts else {name: spec}
    last: dict[str, dict[str, Tensor]] = {}  # the parts of the weight that is being written

    def read(name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        if module not in shapes or part == "bias":
            return plain.read(name)
        if module not in last:
            last.clear()
            last[module] = make_parts(opened, f"{module}.weight", kind, torch.device("cpu"), dtype)
        return last[module][part]

    config = plain.documents["config.json"] | document(kind)
    return replace(
        plain,
        specs=specs,
        read=read,
        documents=plain.documents | {"config.json": config},
        weights=opened.num_parameters,
    )


def hf_output(opened: Source, dtype: torch.dtype) -> Output:
    """Plan a folder in llava-hf's format, with the old names, which all its versions read."""
    config, notes = opened.config, []
    vision = clip_tower(config, "llava-hf")
    if config.projector_depth != 2:
        raise CheckpointError(f"{opened.path}: llava-hf has 2 projector layers, not the source's")
    whole = has_whole_tower(opened)
    ours = {hf_name(name): name for name in [*opened.names(), *(opened.unused if whole else ())]}
    shapes = {name: opened.shape(ours[name]) for name in ours}
    made: dict[str, Tensor] = {}
    if not whole:
        width = vision.hidden_size
        made["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(width)
        made["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
        notes.append(
            f"the source has only the {vision.num_blocks} vision blocks that LLaVA runs: "
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
    documents = hf_documents(config, whole, rows, dtype) | threshold_document(opened)
    left_out = [] if whole else [entry.stored for entry in opened.unused.values()]
    return Output(specs, read, documents, notes, left_out)


def clip_tower(config: LlavaConfig, layout: str) -> VisionConfig:
    """The CLIP tower of a model. Raises CheckpointError for any other tower, and for a decoder that
    is no Llama-2."""
    if not isinstance(config.vision, VisionConfig):
        raise CheckpointError(f"{config.name}: {layout} cannot store a FastViTHD tower")
    text = config.text
    if text.kv_heads != text.num_heads or text.attention_bias or text.tie_embeddings:
        raise CheckpointError(f"{config.name}: {layout} can store only a Llama-2 decoder")
    return config.vision


def has_whole_tower(opened: Source) -> bool:
    """Whether the source has all blocks of its tower and the final norm, in matching shapes."""
    vision = clip_tower(opened.config, "llava-hf")
    block = [name for name in opened.entries if name.startswith("vision.blocks.0.")]
    expected = {
        name.replace(".0.", f".{number}.", 1): opened.entries[name].shape
        for number in range(vision.num_blocks, vision.num_layers)
        for name in block
    }
    expected |= {f"vision.post_norm.{kind}": (vision.hidden_size,) for kind in ("weight", "bias")}
    return expected == {name: entry.shape for name, entry in opened.unused.items()}


def hf_vocab_size(config: LlavaConfig) -> int:
    """The vocabulary with `<image>` and `<pad>` behind the text ids, a multiple of 64."""
    text = config.text
    needed = text.sampled_vocab_size + 2
    return text.vocab_size if text.vocab_size >= needed else -(-needed // 64) * 64


def grow_rows(tensor: Tensor, rows: int, text_rows: int) -> Tensor:
    """Append rows up to `rows`. Each is the mean of the text rows, so it is never the likeliest
    next token."""
    if len(tensor) == rows:
        return tensor
    mean = tensor[:text_rows].mean(dim=0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(rows - len(tensor), -1)))


def hf_documents(
    config: LlavaConfig, whole_tower: bool, rows: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The JSON files of a llava-hf folder, except the tokenizer's."""
    vision, text = clip_tower(config, "llava-hf"), config.text
    image_id = text.sampled_vocab_size
    precision = {"torch_dtype": str(dtype).removeprefix("torch.")}
    ids = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": image_id + 1}
    model_config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": vision.num_patches,
        "pad_token_id": image_id + 1,
        "projector_hidden_act": "gelu",
        "text_config": hf_text_config(text) | ids | precision | {"vocab_size": rows},
        "vision_config": hf_vision_config(vision, whole_tower) | precision,
        "vision_feature_layer": vision.feature_layer if whole_tower else -1,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
        "tie_word_embeddings": False,
        **precision,
    }
    documents = {"config.json": model_config, "generation_config.json": ids}
    return documents | hf_processor_documents(config)


def hf_text_config(text: TextConfig) -> dict[str, Any]:
    """The config of the decoder, with transformers' names."""
    fields = {theirs: getattr(text, ours) for ours, theirs in TEXT_FIELDS.items()}
    return fields | {
        "model_type": "llama",
        "num_key_value_heads": text.num_heads,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def hf_vision_config(vision: VisionConfig, whole: bool) -> dict[str, Any]:
    """The config of the CLIP tower, with transformers' names."""
    fields = {theirs: getattr(vision, ours) for ours, theirs in VISION_FIELDS.items()}
    blocks = vision.num_layers if whole else vision.num_blocks
    kind = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    return fields | kind | {"num_hidden_layers": blocks}


def hf_processor_documents(config: LlavaConfig) -> dict[str, dict[str, Any]]:
    """How transformers must prepare images. `do_pad` needs transformers 4.49."""
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
        "image_mean": list(MEAN),
        "image_std": list(STD),
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
    """Write model.safetensors.index.json if there is more than one shard."""
    weight_map = {name: row["file"] for name, row in table.items()}
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_hf_tokenizer(folder: Path, opened: Source) -> None:
    """Copy the tokenizer of a llava-hf source, or write ours with `<image>` and `<pad>` added."""
    if opened.tokenizer_file is None:
        return
    home = opened.tokenizer_file.parent
    if opened.family == "llava-hf" and (home / "tokenizer_config.json").is_file():
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
