"""GGUF, the files of llama.cpp: their names of tensors and of facts, and our names for both.

A LLaVA is two files: the text model, of architecture `llama`, and the tower with the projector, of
architecture `clip`. The package `gguf` does the reading and writing of bytes. It is optional.
"""

import re
from types import ModuleType
from typing import Any

from einops import rearrange
from torch import Tensor

from llava_lite.checkpoints.names import expand
from llava_lite.errors import CheckpointError

SUFFIX = ".gguf"
OWN_KEY = "llava_lite.config"  # what no key of llama.cpp says: JSON

# GGUF's facts -> our fields.
TEXT_KEYS = {
    "llama.context_length": "max_positions",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "tokenizer.ggml.bos_token_id": "bos_id",
    "tokenizer.ggml.eos_token_id": "eos_id",
}
VISION_KEYS = {
    "clip.vision.image_size": "image_size",
    "clip.vision.patch_size": "patch_size",
    "clip.vision.embedding_length": "hidden_size",
    "clip.vision.feed_forward_length": "intermediate_size",
    "clip.vision.block_count": "num_layers",
    "clip.vision.attention.head_count": "num_heads",
    "clip.vision.attention.layer_norm_epsilon": "layer_norm_eps",
}
TOKENS, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
FEATURE_LAYER = "clip.vision.feature_layer"
MERGES = "tokenizer.ggml.merges"
UNUSED = 5  # a token type: a row without a text

# Our names -> GGUF's. `{}` is a layer number, `.*` stands for `.weight` and `.bias`.
TEXT_TENSORS = {
    "decoder.embed_tokens.weight": "token_embd.weight",
    "decoder.layers.{}.input_norm.weight": "blk.{}.attn_norm.weight",
    "decoder.layers.{}.attn.q_proj.weight": "blk.{}.attn_q.weight",
    "decoder.layers.{}.attn.k_proj.weight": "blk.{}.attn_k.weight",
    "decoder.layers.{}.attn.v_proj.weight": "blk.{}.attn_v.weight",
    "decoder.layers.{}.attn.o_proj.weight": "blk.{}.attn_output.weight",
    "decoder.layers.{}.post_attn_norm.weight": "blk.{}.ffn_norm.weight",
    "decoder.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "decoder.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "decoder.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "decoder.norm.weight": "output_norm.weight",
    "decoder.lm_head.weight": "output.weight",
}
VISION_TENSORS = {
    "vision.class_embed": "v.class_embd",
    "vision.patch_embed.weight": "v.patch_embd.weight",
    "vision.pos_embed": "v.position_embd.weight",
    "vision.pre_norm.*": "v.pre_ln.*",
    "vision.blocks.{}.norm1.*": "v.blk.{}.ln1.*",
    "vision.blocks.{}.attn.q_proj.*": "v.blk.{}.attn_q.*",
    "vision.blocks.{}.attn.k_proj.*": "v.blk.{}.attn_k.*",
    "vision.blocks.{}.attn.v_proj.*": "v.blk.{}.attn_v.*",
    "vision.blocks.{}.attn.o_proj.*": "v.blk.{}.attn_out.*",
    "vision.blocks.{}.norm2.*": "v.blk.{}.ln2.*",
    "vision.blocks.{}.mlp.fc1.*": "v.blk.{}.ffn_up.*",
    "vision.blocks.{}.mlp.fc2.*": "v.blk.{}.ffn_down.*",
    "vision.post_norm.*": "v.post_ln.*",
    "projector.layers.0.*": "mm.0.*",
    "projector.layers.1.*": "mm.2.*",
}


TO_GGUF = {ours: names[0] for ours, names in expand(TEXT_TENSORS | VISION_TENSORS).items()}
FROM_GGUF = {theirs: ours for ours, theirs in TO_GGUF.items()}


def rename(name: str, table: dict[str, str]) -> str | None:
    """Look a name up, with its layer number. None if the table does not have it."""
    number = re.search(r"\.(\d+)\.", name)
    if name in table or number is None:
        return table.get(name)
    found = table.get(re.sub(r"\.\d+\.", ".{}.", name, count=1))
    return None if found is None else found.replace("{}", number[1])


def is_rotated(ours: str) -> bool:
    """Whether the rows of a weight are paired by rotary positions."""
    return ours.startswith("decoder.") and ours.endswith(("q_proj.weight", "k_proj.weight"))


def pair_rows(weight: Tensor, heads: int) -> Tensor:
    """Our order of rows -> llama.cpp's. In each head our RoPE turns channel i with channel i + D/2,
    llama.cpp's turns channel 2i with channel 2i + 1."""
    return rearrange(weight, "(h half pair) c -> (h pair half) c", h=heads, half=2)


def split_rows(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of rows -> ours: the inverse of `pair_rows`."""
    return rearrange(weight, "(h pair half) c -> (h half pair) c", h=heads, half=2)


def import_gguf() -> ModuleType:
    """The package `gguf`. Raises CheckpointError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the package gguf: pip install 'llava-lite[gguf]'"
        ) from error
    return gguf


def own_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config without its sizes."""
    return {name: value for name, value in facts.items() if name not in ("vision", "text")}
