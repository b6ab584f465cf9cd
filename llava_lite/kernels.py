"""The kernel that multiplies one row: measured on this machine, not guessed.

While an answer grows, every token passes every weight once, as a single row: what counts is how
fast a kernel reads memory. On a CPU torch has several that give the same product in bfloat16, and
which of them is at the limit of the memory and which at two thirds of it differs from machine to
machine. So each tries the weights of each shape when a model is loaded, and the fastest stays.

For many rows there is nothing to choose: oneDNN's product, which `F.linear` is, wins."""

import warnings
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor], Tensor]  # weight (out, in), x (in,) -> (out,)

READ_BYTES = 2**28  # of every shape, at most: several weights, so that no cache holds them
# Smaller weights are bound by other things. That their kernel is always the same also makes answers
# of small models the same everywhere, to the bit.
MIN_BYTES = 2**22
WORTH_IT = 0.97  # of the time of F.linear


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """What an nn.Linear does."""
    return F.linear(x, weight)


def linear_without_onednn(weight: Tensor, x: Tensor) -> Tensor:
    """The same by torch's own kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch talks about a GPU that nobody asked for
        with torch.backends.mkldnn.flags(enabled=False):
            return F.linear(x, weight)


KERNELS: tuple[Kernel, ...] = (torch.mv, linear_without_onednn)


class RowLinear(nn.Linear):
    """An nn.Linear, its weights included, with a kernel of its own for inputs of one row."""

    def __init__(self, plain: nn.Linear, kernel: Kernel) -> None:
        nn.Module.__init__(self)  # what nn.Linear would allocate is there
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.dtype != torch.bfloat16:
            return super().forward(x)
        row = self.kernel(self.weight, x.flatten())
        return (row if self.bias is None else row + self.bias).view(*x.shape[:-1], -1)


def choose_kernels(module: nn.Module) -> dict[tuple[int, int], Kernel]:
    """Give the linears in `module` the fastest kernel for one row: what was found for each shape
    (out, in) where that is not `F.linear`. Nothing changes but on a CPU in bfloat16."""
    groups: dict[tuple[int, int], list[nn.Linear]] = {}
    for part in module.modules():
        if type(part) is nn.Linear and is_eligible(part.weight):
            groups.setdefault((part.out_features, part.in_features), []).append(part)
    chosen = {}
    for shape, linears in groups.items():
        kernel = fastest(linears)
        if kernel is not None:
            chosen[shape] = kernel
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is nn.Linear and is_eligible(part.weight):
                kernel = chosen.get((part.out_features, part.in_features))
                if kernel is not None:
                    setattr(parent, name, RowLinear(part, kernel))
    return chosen


def is_eligible(weight: Tensor) -> bool:
    """Whether there is something to choose."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.nbytes >= MIN_BYTES
    )


@torch.inference_mode()
def fastest(linears: list[nn.Linear]) -> Kernel | None:
    """The kernel that reads these weights, of one shape, fastest; None where that is `F.linear`."""
    weights = [part.weight for part in linears]
    weights = weights[: max(1, READ_BYTES // weights[0].nbytes)]
    x = torch.ones(weights[0].shape[1], dtype=weights[0].dtype)
    seconds = dict.fromkeys((linear, *KERNELS), float("inf"))
    for warm in (False, True, True):  # the first round brings the pages in
        for kernel in seconds:
            start = perf_counter()
            for weight in weights:
                kernel(weight, x)
            if warm:
                seconds[kernel] = min(seconds[kernel], perf_counter() - start)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < WORTH_IT * seconds[linear] else None
