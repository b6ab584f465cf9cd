"""A model on the meta device: all names and shapes, and no memory for the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llava_lite.config import LlavaConfig
from llava_lite.llava import Llava


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our name and shape of every tensor of a model."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def meta_model(config: LlavaConfig, build: Callable[[LlavaConfig], Llava] = Llava) -> Llava:
    """Build a model without memory, ready for `load_state_dict(assign=True)`."""
    with torch.device("meta"), WithoutInit():
        return build(config).eval().requires_grad_(False)


class WithoutInit(TorchFunctionMode):
    """Skips random initialization, which on the meta device only imports torch's compiler."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
