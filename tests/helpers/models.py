"""A tiny random model, and where things are."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.llava import Llava
from llava_lite.vision import VisionTower

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LLAVA_LITE_SHARED", ROOT.parent / "shared"))

TINY_VISION = VisionConfig(
    image_size=56, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4
)
TINY_TEXT = TextConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    max_positions=512,
    sampled_vocab_size=310,
)
TINY_CONFIG = LlavaConfig(vision=TINY_VISION, text=TINY_TEXT, name="random")
# Facts of Qwen2: fewer key/value heads, biases, a tied head.
GQA_TEXT = replace(
    TINY_TEXT, num_kv_heads=2, attention_bias=True, tie_embeddings=True, rope_theta=1e6
)
GQA_CONFIG = replace(TINY_CONFIG, text=GQA_TEXT, name="random, fewer heads")
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "What color is the star? red orange yellow green blue purple white black circle square ring",
] * 2


def random_llava(
    config: LlavaConfig = TINY_CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Llava:
    """A model of random weights, the same in every dtype, scaled so that its answers vary."""
    generator = torch.Generator().manual_seed(seed)
    llava = Llava(config).to(torch.float64)
    with torch.no_grad():
        for name, tensor in llava.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim > 1 and "embed" not in name:
                tensor.copy_(noise * 1.5 / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(noise * (1.0 if "embed" in name else 0.1))
        if isinstance(llava.vision, VisionTower):
            llava.vision.patch_embed.weight *= 0.1
    return llava.to(dtype).eval()


def load_tool(name: str) -> ModuleType:
    """A developer's tool, loaded by its path: tools are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
