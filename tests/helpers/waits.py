"""Count how often the host waits for the device."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Collects the operators whose result or shape the host can only know by waiting.

    Not under inference_mode, which hides what an operator consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        else:
            waits = bool(TAGS & set(func.tags))
        if waits:
            self.names.append(str(func))
        return func(*args, **kwargs)


Watch = Callable[[], AbstractContextManager[list[str]]]


COPIES = ("tolist", "cpu", "numpy")  # no operators where the tensor is on the CPU


@contextmanager
def dispatched_waits() -> Iterator[list[str]]:
    """Names of the waits within, told from operators and from methods: works on any device."""

    def recording(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def copy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.names.append(name)
            return method(tensor, *args, **kwargs)

        return copy

    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        for name in COPIES:
            patch.setattr(Tensor, name, recording(name))
        yield waits.names


@contextmanager
def cuda_waits() -> Iterator[list[str]]:
    """What CUDA itself reports."""
    found: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "synchronizing CUDA" in str(w.message)]
