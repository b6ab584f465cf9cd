"""A model on the meta device: all names and shapes, and no memory for the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llava_lite.config import LlavaConfig
from llava_lite.llava import Llava

# Ends of names: of training data, no weights of the model.
STATISTICS = ("running_mean", "running_var")
HEAD, EMBEDDING = "decoder.lm_head.weight", "decoder.embed_tokens.weight"


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our name and shape of every tensor of a model."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def stored_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """As `expected_shapes`, without a tied head: only the embedding is stored."""
    tied = {HEAD} if config.text.tie_embeddings else set()
    return {name: shape for name, shape in expected_shapes(config).items() if name not in tied}


def meta_model(config: LlavaConfig, build: Callable[[LlavaConfig], Llava] = Llava) -> Llava:
    """Build a model without memory, ready for `load_state_dict(assign=True)`."""
    with torch.device("meta"), WithoutInit():
        return build(config).eval().requires_grad_(False)


IN_PLACE_RANDOM = {
    *("normal_", "uniform_", "trunc_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
}


class WithoutInit(TorchFunctionMode):
    """Skips random initialization. On the meta device it would only import torch's compiler.
    Elsewhere it would write all of the memory with values that are replaced later."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if getattr(func, "__module__", "") == "torch.nn.init" or name in IN_PLACE_RANDOM:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
