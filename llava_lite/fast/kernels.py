"""Choose the fastest kernel for few rows, by trying each on this machine.

A decode step multiplies every weight by one row, or by a few rows in a batch. Its time is the time
to read the weights. On a CPU, torch has several kernels for this product in bfloat16. Some reach
the limit of the memory and some do not, depending on the machine. So each kernel is timed on the
weights of each shape when a model is loaded.

For many rows, oneDNN's product (`F.linear`) is the fastest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor], Tensor]  # weight (out, in), x (rows, in) -> (rows, out)

FEW_ROWS = 32  # at most
TRIED_ROWS = 8  # timed for all few rows, because reading the weights takes the time
READ_BYTES = 2**28  # weights to read for a timing: more than a cache holds
# Below this size memory bandwidth is not the bottleneck. Always using `F.linear` there also keeps
# small models bit-identical across machines.
MIN_BYTES = 2**22
WORTH_IT = 0.97  # the largest part of F.linear's time for another kernel to be chosen


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """The product of nn.Linear."""
    return F.linear(x, weight)


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """BLAS's product of a matrix and a vector, for one row."""
    return torch.mv(weight, x[0])[None]


def weight_first(weight: Tensor, x: Tensor) -> Tensor:
    """The transposed product, for which oneDNN streams the weights."""
    return (weight @ x.T).T.contiguous()


# No kernel may change a setting of the process, such as torch's switch for oneDNN: other threads
# answer at the same time.
ONE_ROW: tuple[Kernel, ...] = (matrix_vector,)
FEW: tuple[Kernel, ...] = (weight_first,)


@dataclass(frozen=True)
class Choice:
    """The fastest kernels for one row and for a few rows (None: `F.linear`)."""

    one: Kernel | None
    few: Kernel | None

    def __bool__(self) -> bool:
        return self.one is not None or self.few is not None

    def kernel(self, rows: int) -> Kernel | None:
        """The kernel for this number of rows."""
        return self.one if rows == 1 else self.few if 1 < rows <= FEW_ROWS else None


class ChosenLinear(nn.Linear):
    """An nn.Linear with other kernels for few rows. Shares the weights of `plain`."""

    def __init__(self, plain: nn.Linear, choice: Choice) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate weights
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,) or x.dtype != torch.bfloat16:
            return super().forward(x)  # raises the usual error
        kernel = self.choice.kernel(x.numel() // self.in_features)
        if kernel is None:
            return super().forward(x)
        rows = kernel(self.weight, x.reshape(-1, self.in_features))
        return (rows if self.bias is None else rows + self.bias).view(*x.shape[:-1], -1)


def choose_kernels(module: nn.Module) -> dict[tuple[int, int], Choice]:
    """Give the linear layers in `module` their fastest kernels. Changes only layers on a CPU in
    bfloat16 without hooks. Returns the choice for each shape (out, in), except `F.linear`."""
    groups: dict[tuple[int, int], list[nn.Linear]] = {}
    for part in module.modules():
        if isinstance(part, nn.Linear) and is_eligible(part):
            groups.setdefault((part.out_features, part.in_features), []).append(part)
    found = {
        shape: Choice(fastest(linears, ONE_ROW, 1), fastest(linears, FEW, TRIED_ROWS))
        for shape, linears in groups.items()
    }
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear) and is_eligible(part):
                choice = found[part.out_features, part.in_features]
                if choice:
                    setattr(parent, name, ChosenLinear(part, choice))
    return {shape: choice for shape, choice in found.items() if choice}


def is_eligible(layer: nn.Linear) -> bool:
    """Whether the layer has several kernels, and can be replaced without losing its hooks."""
    hooks = (value for name, value in vars(layer).items() if name.endswith("_hooks"))
    return (
        type(layer) is nn.Linear
        and not any(hooks)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.nbytes >= MIN_BYTES
    )


@torch.inference_mode()
def fastest(linears: Sequence[nn.Linear], kernels: Sequence[Kernel], rows: int) -> Kernel | None:
    """The fastest of `kernels` for weights of one shape and this number of rows; None if that is
    `F.linear`."""
    weights = [part.weight for part in linears]
    weights = weights[: max(1, READ_BYTES // weights[0].nbytes)]
    x = torch.ones(rows, weights[0].shape[1], dtype=weights[0].dtype)
    seconds = dict.fromkeys((linear, *kernels), float("inf"))
    for warm in (False, True, True):  # the first round loads the pages
        for kernel in seconds:
            start = perf_counter()
            for weight in weights:
                kernel(weight, x)
            if warm:
                seconds[kernel] = min(seconds[kernel], perf_counter() - start)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < WORTH_IT * seconds[linear] else None
