"""The kernels that multiply one row, or a few: measured on this machine, not guessed.

While an answer grows, every token passes every weight once, as a single row, a batch of answers as
a few: what counts is how fast a kernel reads memory. On a CPU torch has several that give the same
product in bfloat16, and which of them is at the limit of the memory and which at two thirds of it
differs from machine to machine. So each tries the weights of each shape when a model is loaded, and
the fastest stays.

For many rows there is nothing to choose: oneDNN's product, which `F.linear` is, wins. Fewer and
larger products, as of q, k and v in one, read memory only two percent faster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor], Tensor]  # weight (out, in), x (rows, in) -> (rows, out)

FEW_ROWS = 32  # so many at most
TRIED_ROWS = 8  # stand for all few: their products take as long as it takes to read the weights
READ_BYTES = 2**28  # of every shape, at most: several weights, so that no cache holds them
# Smaller weights are bound by other things. That their kernel is always the same also makes answers
# of small models the same everywhere, to the bit.
MIN_BYTES = 2**22
WORTH_IT = 0.97  # of the time of F.linear


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """What an nn.Linear does."""
    return F.linear(x, weight)


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """BLAS's product of a matrix and a vector; of one row."""
    return torch.mv(weight, x[0])[None]


def weight_first(weight: Tensor, x: Tensor) -> Tensor:
    """The transposed product: oneDNN then reads the weights as the operand that it streams."""
    return (weight @ x.T).T.contiguous()


# No kernel here may change settings of the process: torch's switch for oneDNN is one, and threads
# that answer side by side would leave it off.
ONE_ROW: tuple[Kernel, ...] = (matrix_vector,)
FEW: tuple[Kernel, ...] = (weight_first,)


@dataclass(frozen=True)
class Choice:
    """The fastest kernels for one row and for a few; None where that is `F.linear`."""

    one: Kernel | None
    few: Kernel | None

    def __bool__(self) -> bool:
        return self.one is not None or self.few is not None

    def kernel(self, rows: int) -> Kernel | None:
        """That for so many rows."""
        return self.one if rows == 1 else self.few if 1 < rows <= FEW_ROWS else None


class ChosenLinear(nn.Linear):
    """An nn.Linear, its weights included, with kernels of its own for inputs of few rows."""

    def __init__(self, plain: nn.Linear, choice: Choice) -> None:
        nn.Module.__init__(self)  # what nn.Linear would allocate is there
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,) or x.dtype != torch.bfloat16:
            return super().forward(x)  # which says what is wrong with x
        kernel = self.choice.kernel(x.numel() // self.in_features)
        if kernel is None:
            return super().forward(x)
        rows = kernel(self.weight, x.reshape(-1, self.in_features))
        return (rows if self.bias is None else rows + self.bias).view(*x.shape[:-1], -1)


def choose_kernels(module: nn.Module) -> dict[tuple[int, int], Choice]:
    """Give the linears in `module` the fastest kernels: what was found for each shape (out, in)
    where that is not `F.linear`. Nothing changes but on a CPU in bfloat16, and no layer with hooks.
    """
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
    """Whether there is something to choose, and nothing of the layer would be lost."""
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
    """Which of `kernels` multiplies these weights, of one shape, fastest with so many rows; None
    where that is `F.linear`."""
    weights = [part.weight for part in linears]
    weights = weights[: max(1, READ_BYTES // weights[0].nbytes)]
    x = torch.ones(rows, weights[0].shape[1], dtype=weights[0].dtype)
    seconds = dict.fromkeys((linear, *kernels), float("inf"))
    for warm in (False, True, True):  # the first round brings the pages in
        for kernel in seconds:
            start = perf_counter()
            for weight in weights:
                kernel(weight, x)
            if warm:
                seconds[kernel] = min(seconds[kernel], perf_counter() - start)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < WORTH_IT * seconds[linear] else None
