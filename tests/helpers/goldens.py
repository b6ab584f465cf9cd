"""Read the golden files of the reference systems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_lite.checkpoints.names import our_names
from llava_lite.config import TextConfig
from llava_lite.llava import Llava

GOLDEN_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Golden:
    """A model with the reference's weights, its tensors and its figures."""

    llava: Llava
    tensors: dict[str, Tensor]
    figures: dict[str, Any]


def load_weights(llava: Llava, stored: dict[str, Tensor], parts: Sequence[str]) -> Llava:
    """Copy what has a place in the model; every parameter of these parts must get a value."""
    state, loaded = llava.state_dict(), set()
    for name, tensor in stored.items():
        names = our_names(name)
        for index, ours in enumerate(names):
            if ours in state:
                state[ours].copy_(tensor.chunk(len(names))[index])
                loaded.add(ours)
    assert loaded == {name for name in state if name.split(".")[0] in parts}
    return llava.eval()


def text_config(raw: dict[str, Any]) -> TextConfig:
    """The reference's llama config, by our names."""
    return TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=raw["rope_theta"],
        sampled_vocab_size=raw["vocab_size"],
    )


def strip(tensors: dict[str, Tensor], prefix: str, new: str = "") -> dict[str, Tensor]:
    """The tensors under a prefix, which becomes `new`."""
    return {
        new + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
