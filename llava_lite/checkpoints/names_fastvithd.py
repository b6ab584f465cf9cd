"""Tensor names of the published FastViTHD tower <-> our names, without the tower's prefix.

The published names count the layers of one list, `network`: stages, and the convolutions between
them. Our names say the purpose of each layer. `{}` stands for the number of a block.

    network.4.{}.convffn.fc1.weight      stages.2.blocks.{}.ffn.fc1.weight
"""

import re
from collections.abc import Iterable

PREFIX = "model.vision_tower.vision_tower.model."  # of a published checkpoint; doubled indeed

CONV = ("weight", "bias")
NORM = (*CONV, "running_mean", "running_var")


def rename_all(stored: str, ours: str, kinds: Iterable[str] = CONV) -> dict[str, str]:
    """The published and our name of each tensor of a layer."""
    return {f"{stored}.{kind}": f"{ours}.{kind}" for kind in kinds}


def block_names(stored: str, ours: str) -> dict[str, str]:
    """The tensors that the blocks of all stages have."""
    return {
        f"{stored}.convffn.conv.conv.weight": f"{ours}.ffn.conv.weight",
        **rename_all(f"{stored}.convffn.conv.bn", f"{ours}.ffn.norm", NORM),
        **rename_all(f"{stored}.convffn.fc1", f"{ours}.ffn.fc1"),
        **rename_all(f"{stored}.convffn.fc2", f"{ours}.ffn.fc2"),
    }


def mixer_names(network: int, stage: int) -> dict[str, str]:
    """The blocks of a stage of RepMixers."""
    stored, ours = f"network.{network}.{{}}", f"stages.{stage}.blocks.{{}}"
    return {
        **rename_all(f"{stored}.token_mixer.reparam_conv", f"{ours}.mixer"),
        **block_names(stored, ours),
        f"{stored}.layer_scale": f"{ours}.ffn.scale",
    }


def attention_names(network: int, stage: int) -> dict[str, str]:
    """The blocks of a stage of attention, and the positional convolution in front of them."""
    stored, ours = f"network.{network}.{{}}", f"stages.{stage}.blocks.{{}}"
    return {
        **rename_all(f"network.{network - 1}.reparam_conv", f"stages.{stage}.position"),
        **rename_all(f"{stored}.norm", f"{ours}.mixer.norm"),
        f"{stored}.token_mixer.qkv.weight": f"{ours}.mixer.qkv.weight",
        **rename_all(f"{stored}.token_mixer.proj", f"{ours}.mixer.o_proj"),
        f"{stored}.layer_scale_1": f"{ours}.mixer.scale",
        **block_names(stored, ours),
        f"{stored}.layer_scale_2": f"{ours}.ffn.scale",
    }


def downsample_names(network: int, stage: int) -> dict[str, str]:
    """The convolutions in front of a stage."""
    return {
        **rename_all(f"network.{network}.proj.0.lkb_reparam", f"stages.{stage}.down.0"),
        **rename_all(f"network.{network}.proj.1.reparam_conv", f"stages.{stage}.down.1"),
    }


FASTVITHD = {
    **rename_all("patch_embed.0.reparam_conv", "stem.0"),
    **rename_all("patch_embed.1.reparam_conv", "stem.1"),
    **rename_all("patch_embed.2.reparam_conv", "stem.2"),
    **mixer_names(0, 0),
    **downsample_names(1, 1),
    **mixer_names(2, 1),
    **downsample_names(3, 2),
    **mixer_names(4, 2),
    **downsample_names(5, 3),
    **attention_names(7, 3),
    **downsample_names(8, 4),
    **attention_names(10, 4),
    **rename_all("conv_exp.reparam_conv", "expand.0"),
    **rename_all("conv_exp.se.reduce", "expand.1.reduce"),
    **rename_all("conv_exp.se.expand", "expand.1.expand"),
}
TO_PUBLISHED = {ours: stored for stored, ours in FASTVITHD.items()}

# Never read: the contrastive head, and counters of training steps.
IGNORED = re.compile(r"head\.proj|.*\.num_batches_tracked")


def fastvithd_name(stored: str) -> str | None:
    """Our name of a published tensor, without prefixes. None for an unknown name."""
    return look_up(FASTVITHD, stored, r"(network\.\d+\.)(\d+)(\..+)")


def published_name(ours: str) -> str | None:
    """The published name of one of our tensors, without prefixes. None for an unknown name."""
    return look_up(TO_PUBLISHED, ours, r"(stages\.\d\.blocks\.)(\d+)(\..+)")


def look_up(table: dict[str, str], name: str, block: str) -> str | None:
    """The name in the table. `block`: what is before, in and behind the number of a block."""
    numbered = re.fullmatch(block, name)
    if name in table or numbered is None:
        return table.get(name)
    pattern = table.get(f"{numbered[1]}{{}}{numbered[3]}")
    return pattern and pattern.replace("{}", numbered[2])
