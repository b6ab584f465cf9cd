"""The goldens of FastVLM: a tiny model in the published layout, and variants of its folder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_lite.config import FastViTHDConfig, LlavaConfig, TextConfig

TOLERANCE = 2e-5
TINY_FASTVLM = LlavaConfig(
    vision=FastViTHDConfig(image_size=256, depths=(1, 1, 1, 1, 1), widths=(8, 16, 32, 32, 32)),
    text=TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        attention_bias=True,
        tie_embeddings=True,
        max_positions=512,
        sampled_vocab_size=310,
    ),
    name="random FastVLM",
)


class FastVLMGolden:
    """The folder of the tiny model, with its figures and tensors."""

    def __init__(self, shared: Path) -> None:
        self.place = shared / "goldens" / "fastvlm" / "tiny"
        self.folder = self.place / "llava-fastvithd_tiny_stage3"
        self.images = shared / "goldens" / "llava" / "preproc"
        self.facts = self.read("tiny_goldens.json")
        self.tensors = load_file(self.place / "tiny_goldens.safetensors")
        self.reductions = self.read("reduction_goldens.json")["decoder"]
        self.reduced = load_file(self.place / "reduction_goldens.safetensors")

    def read(self, name: str) -> Any:
        return json.loads((self.place / name).read_text(encoding="utf-8"))

    def copy(self, folder: Path, **fields: Any) -> Path:
        """A copy of the folder, with some fields of its config.json changed."""
        folder.mkdir(parents=True)
        for file in self.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


def replace_weights(folder: Path, state: dict[str, Tensor]) -> Path:
    """The folder with other weights."""
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()},
        folder / "model.safetensors",
    )
    return folder


def last_ids(logits: Tensor, vocabulary: int) -> int:
    """The most likely id among the first ones."""
    return int(torch.argmax(logits[..., :vocabulary]))
