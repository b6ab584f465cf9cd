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
        stop_ids=(1,),
    ),
    template="qwen_2",
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
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    return folder


def unfold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the tower in training form: branches whose sum is the folded tower."""
    unfolded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        unit, _, kind = name.rpartition(".")
        if not unit.endswith(("reparam_conv", "lkb_reparam")):
            unfolded[name] = tensor
        elif kind == "weight":
            parent = unit.rpartition(".")[0]
            unfolded |= branches(parent, tensor.float(), state[f"{unit}.bias"].float())
    return unfolded


def branches(unit: str, kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The branches of one convolution; all but one of them change nothing."""
    identity = torch.zeros_like(kernel)
    channels, middle = torch.arange(len(kernel)), kernel.shape[-1] // 2
    identity[channels, channels % kernel.shape[1], middle, middle] = 1
    if unit.endswith("token_mixer"):
        return {
            **norm(f"{unit}.norm.rbr_skip", torch.zeros_like(bias)),
            **branches(f"{unit}.mixer", kernel, bias),
            f"{unit}.layer_scale": torch.ones(len(kernel), 1, 1),
        }
    if unit.endswith("proj.0"):
        small = torch.zeros_like(kernel[..., :3, :3])
        return {
            f"{unit}.lkb_origin.conv.weight": kernel,
            **norm(f"{unit}.lkb_origin.bn", bias),
            f"{unit}.small_conv.conv.weight": small,
            **norm(f"{unit}.small_conv.bn", torch.zeros_like(bias)),
        }
    if unit.endswith(("network.6", "network.9")):
        return {f"{unit}.pe.weight": kernel - identity, f"{unit}.pe.bias": bias}
    branch = f"{unit}.rbr_conv.0"
    return {f"{branch}.conv.weight": kernel, **norm(f"{branch}.bn", bias)}


def norm(name: str, bias: Tensor) -> dict[str, Tensor]:
    """A norm with fixed statistics that only adds a bias."""
    ones, zeros = torch.ones_like(bias), torch.zeros_like(bias)
    parts = {"weight": ones, "bias": bias, "running_mean": zeros, "running_var": ones - 1e-5}
    counter = {f"{name}.num_batches_tracked": torch.tensor(7)}
    return {f"{name}.{kind}": tensor for kind, tensor in parts.items()} | counter
