"""Random tensors, comparisons, and slow oracles."""

import torch
from torch import Tensor


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=tolerance, rtol=tolerance, check_dtype=False
    )


def log_sizes_of(pair: tuple[Tensor, Tensor]) -> list[float]:
    """The log size of every key of a layer's cache."""
    log_sizes = getattr(pair, "log_sizes", None)
    known = [] if log_sizes is None else log_sizes.tolist()
    return known + [0.0] * (pair[0].shape[2] - len(known))


def rms_norm_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
