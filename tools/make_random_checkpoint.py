"""Write a checkpoint of random weights in an official layout, to measure conversion and speed with.

python tools/make_random_checkpoint.py --layout official --size 7b --out big/llava-v1.5-7b \
    --tokenizer path/to/tokenizer.model

Written are the weights under the published names, shapes and dtypes, in files of about the
published sizes, and their indexes; a config.json with the fields that a loader reads, for llava-hf
also generation_config.json, preprocessor_config.json and processor_config.json. `official` also
writes the vision half of the CLIP repository into the folder clip-vit-large-patch14-336 beside OUT,
with a few tensors to be ignored in place of its text half (1.2 GB instead of 1.7). There is no
tokenizer but the file given as --tokenizer, and no mm_projector.bin.

python tools/make_random_checkpoint.py --layout fastvlm --size fastvlm-0.5b --out big/fastvlm \
    --tokenizer path/to/folder

`fastvlm` is the layout of the published FastVLM folders: one file or some shards, with the tower
and the tensors to be ignored. Its tokenizer is a folder with vocab.json and merges.txt; their three
added tokens are written beside them.

The values are noise of a sensible scale, so logits are finite and speed is the real one, but
answers are not. A 7B model takes 13.5 GB of disk (official, without the tower) or 14.1 GB;
fastvlm-0.5b takes 1.5 GB, fastvlm-7b 15.5 GB. With --layers the decoder has fewer layers.
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import replace
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_lite.bench.models import SIZES, Settings, random_config
from llava_lite.checkpoints.configs import FASTVLM, QWEN2_FIELDS
from llava_lite.checkpoints.export import (
    hf_documents,
    hf_text_config,
    hf_vision_config,
    hf_vocab_size,
    write_hf_index,
)
from llava_lite.checkpoints.names import fastvlm_name, hf_name
from llava_lite.checkpoints.names_fastvithd import PREFIX
from llava_lite.checkpoints.skeleton import EMBEDDING, HEAD, expected_shapes
from llava_lite.checkpoints.tensors import Spec, num_bytes, plan_shards, read_json, write_shards
from llava_lite.cli.arguments import positive
from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.inputs.byte_level import MERGES, VOCAB
from llava_lite.saving import write_json

ADDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OFFICIAL_SHARD, HF_SHARD = 10_000_000_000, 5_000_000_000
TOWER_NAME = "clip-vit-large-patch14-336"


class Noise:
    """Random tensors from one block of random numbers, read at a new place each time."""

    def __init__(self, seed: int, length: int = (1 << 22) + 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(length, generator=generator)
        self.start = 0

    def fill(self, name: str, tensor: Tensor) -> None:
        """Fill in place: norms 1, biases small, matrices with variance 1 / fan-in."""
        if "layer_scale" in name:
            tensor.fill_(0.1)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.fill_(1.0)
        elif tensor.dtype == torch.int64:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
        elif tensor.ndim <= 1 and "norm" in name and "weight" in name:
            tensor.fill_(1.0)
        elif name.endswith("inv_freq"):
            tensor.copy_(10000.0 ** (-torch.arange(len(tensor)) / len(tensor)))
        else:
            scale = 0.02 if tensor.ndim <= 1 else math.prod(tensor.shape[1:]) ** -0.5
            half = len(self.block) // 2
            for part in tensor.view(-1).split(half):
                torch.mul(self.block[self.start : self.start + len(part)], scale, out=part)
                self.start = (self.start + 7919) % half


def hf_specs(config: LlavaConfig, rows: int) -> dict[str, Spec]:
    """llava-hf names (old style) of every published tensor, in float16."""
    whole_tower = replace(config.vision, feature_layer=-1)  # last block included
    shapes = expected_shapes(replace(config, vision=whole_tower))
    specs: dict[str, Spec] = {hf_name(name): (s, torch.float16) for name, s in shapes.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        specs[name] = ((rows, config.text.hidden_size), torch.float16)
    for kind in ("weight", "bias"):
        name = f"vision_tower.vision_model.post_layernorm.{kind}"
        specs[name] = ((config.vision.hidden_size,), torch.float16)
    return specs


def official_specs(config: LlavaConfig) -> dict[str, Spec]:
    """Names of the original release: Llama, projector and rotary buffers, no tower."""
    specs: dict[str, Spec] = {}
    for name, spec in hf_specs(config, config.text.vocab_size).items():
        if name.startswith("language_model."):
            specs[name.removeprefix("language_model.")] = spec
        elif name.startswith("multi_modal_projector."):
            number, kind = name.removeprefix("multi_modal_projector.linear_").split(".")
            specs[f"model.mm_projector.{2 * (int(number) - 1)}.{kind}"] = spec
    for layer in range(config.text.num_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        specs[name] = ((config.text.head_dim // 2,), torch.float32)
    return specs


def tower_specs(config: LlavaConfig) -> dict[str, Spec]:
    """The CLIP repository's float32 file, with some of the text tower and buffers to ignore."""
    width, positions = config.vision.hidden_size, config.vision.num_patches + 1
    specs: dict[str, Spec] = {
        name.removeprefix("vision_tower."): (spec[0], torch.float32)
        for name, spec in hf_specs(config, config.text.vocab_size).items()
        if name.startswith("vision_tower.")
    }
    specs["vision_model.embeddings.position_ids"] = ((1, positions), torch.int64)
    specs["text_model.final_layer_norm.weight"] = ((width,), torch.float32)
    specs["visual_projection.weight"] = ((width, width), torch.float32)
    specs["logit_scale"] = ((), torch.float32)
    return specs


def write_pickle(path: Path, specs: dict[str, Spec], noise: Noise) -> None:
    """A .bin file of any size in little memory: first the container with holes, then the values,
    written through a mapping."""
    with FakeTensorMode():
        holes = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(holes, path)
    with torch.serialization.set_default_mmap_options(MAP_SHARED):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in tensors.items():
        noise.fill(name, tensor)


def write_official(config: LlavaConfig, folder: Path, noise: Noise) -> None:
    """pytorch_model-*.bin with index and config, and the CLIP tower in a folder beside it."""
    specs, vision = official_specs(config), config.vision
    total = sum(map(num_bytes, specs.values()))
    parts = plan_shards(specs, min(OFFICIAL_SHARD, total * 3 // 4)).values()
    weight_map = {}
    for number, names in enumerate(parts, start=1):
        file = f"pytorch_model-{number:05}-of-{len(parts):05}.bin"
        write_pickle(folder / file, {name: specs[name] for name in names}, noise)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)
    write_json(folder / "config.json", official_config(config))
    tower = folder.parent / TOWER_NAME
    tower.mkdir(exist_ok=True)
    write_pickle(tower / "pytorch_model.bin", tower_specs(config), noise)
    vision_config = hf_vision_config(vision, True) | {"torch_dtype": "float32"}
    write_json(tower / "config.json", {"model_type": "clip", "vision_config": vision_config})
    size = {"size": vision.image_size, "crop_size": vision.image_size}
    write_json(tower / "preprocessor_config.json", size)


def official_config(config: LlavaConfig) -> dict[str, Any]:
    """The flat config.json of the original release."""
    text = config.text
    return hf_text_config(text) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "pad_token_id": 0,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_tower": f"openai/{TOWER_NAME}",
    }


def write_llava_hf(config: LlavaConfig, folder: Path, noise: Noise) -> None:
    """model-*.safetensors with index, config and processor files."""
    rows = hf_vocab_size(config)
    specs = hf_specs(config, rows)

    def random_tensor(name: str) -> Tensor:
        shape, dtype = specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        noise.fill(name, tensor)
        return tensor

    table = write_shards(folder, specs, random_tensor, HF_SHARD)
    write_hf_index(folder, table, sum(map(num_bytes, specs.values())))
    for name, content in hf_documents(config, True, rows, torch.float16).items():
        write_json(folder / name, content)


def fastvlm_specs(config: LlavaConfig) -> dict[str, Spec]:
    """Names of a published FastVLM folder, in bfloat16. The head is stored even if it is tied."""
    specs: dict[str, Spec] = {}
    for ours, shape in expected_shapes(config).items():
        name = fastvlm_name(ours)
        specs[name] = (shape, torch.bfloat16)
        if name.endswith("running_var"):
            specs[name.replace("running_var", "num_batches_tracked")] = ((), torch.int64)
    specs[f"{PREFIX}head.proj"] = ((config.vision.hidden_size, 768), torch.bfloat16)
    return specs


def fastvlm_config(config: LlavaConfig) -> dict[str, Any]:
    """The config.json of a published FastVLM folder, with the sizes of other towers."""
    text, vision = config.text, config.vision
    assert isinstance(vision, FastViTHDConfig)
    raw = {theirs: getattr(text, ours) for ours, theirs in QWEN2_FIELDS.items()}
    sizes = {"layers": vision.depths, "embed_dims": vision.widths}
    is_published = vision == FastViTHDConfig(image_size=vision.image_size)
    return raw | {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": FASTVLM,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": f"mlp{config.projector_depth}x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "torch_dtype": "bfloat16",
        "unfreeze_mm_vision_tower": True,
        "use_sliding_window": False,
        **({} if is_published else {"vision_config": sizes}),
    }


def write_fastvlm(config: LlavaConfig, folder: Path, noise: Noise) -> None:
    """model.safetensors, or shards with an index, and the config."""
    specs = fastvlm_specs(config)
    head, embedding = fastvlm_name(HEAD), fastvlm_name(EMBEDDING)
    tied: dict[str, Tensor] = {}

    def random_tensor(name: str) -> Tensor:
        if name == head and config.text.tie_embeddings:
            return tied.pop(embedding)
        shape, dtype = specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        noise.fill(name, tensor)
        if name == embedding and config.text.tie_embeddings:
            tied[name] = tensor
        return tensor

    table = write_shards(folder, specs, random_tensor, HF_SHARD)
    write_hf_index(folder, table, sum(map(num_bytes, specs.values())))
    write_json(folder / "config.json", fastvlm_config(config))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a file, or from a folder the files of a byte-level tokenizer."""
    if not source.is_dir():
        shutil.copyfile(source, folder / source.name)
        return
    for name in (VOCAB, MERGES):
        shutil.copyfile(source / name, folder / name)
    count = len(read_json(folder / VOCAB))
    added = {text: count + number for number, text in enumerate(ADDED_TOKENS)}
    write_json(folder / "added_tokens.json", added)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(added)})


WRITERS = {"official": write_official, "llava-hf": write_llava_hf, "fastvlm": write_fastvlm}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=tuple(WRITERS), required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--layers", type=positive, help="decoder layers (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    text = "tokenizer.model or tokenizer.json to copy, or a folder with vocab.json and merges.txt"
    parser.add_argument("--tokenizer", type=Path, help=text)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.size.startswith("fastvlm") != (args.layout == "fastvlm"):
        parser.error(f"the size {args.size} has no layout {args.layout}")
    folders = [args.out, args.out.absolute().parent / TOWER_NAME]
    for folder in folders if args.layout == "official" else folders[:1]:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            parser.error(f"{folder} is there and not empty, nothing is overwritten")
    args.out.mkdir(parents=True, exist_ok=True)
    config = random_config(Settings(size=args.size, layers=args.layers))
    WRITERS[args.layout](config, args.out, Noise(args.seed))
    if args.tokenizer:
        copy_tokenizer(args.tokenizer, args.out)
    facts = {"layout": args.layout, "size": args.size, "layers": config.text.num_layers}
    print(json.dumps({"folder": str(args.out), **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
