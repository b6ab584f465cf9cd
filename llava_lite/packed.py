"""Weights in the order in which a CPU's matrix units read them.

oneDNN, the library below torch's bfloat16 products on a CPU, wants weights in blocks and rearranges
them within every call. For hundreds of rows that is little beside the product itself; for few rows,
merged image tokens or a decoded word, it is not. Packed once, the same product gives the same bits
in less time, in return for memory of its own: packed weights are no pages of the checkpoint's file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED_FOR = 640  # rows that the order is chosen for; it is as good for fewer
ROUNDS = 3
WORTH_IT = 0.95  # of the plain time


class PackedLinear(nn.Module):
    """An nn.Linear whose weight (out, in) is packed. It stays where it is, in its dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As an nn.Linear."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        probe = torch.empty(0, dtype=self.packed.dtype)
        if fn(probe).dtype != probe.dtype or fn(probe).device != probe.device:
            raise RuntimeError(
                "packed weights stay on the CPU in their dtype; load without packing"
            )
        return super()._apply(fn, recurse)


def pack(module: nn.Module, rows: Sequence[int]) -> int:
    """Pack those linears in `module` that are faster so, measured here, on one of each shape, with
    inputs of so many `rows`. Returns how many. Nothing happens where oneDNN cannot: on other
    devices, in other dtypes than bfloat16, and on CPUs without instructions for it."""
    faster: dict[tuple[int, int], bool] = {}
    count = 0
    for parent in list(module.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or not can_pack(linear.weight):
                continue
            shape = linear.out_features, linear.in_features
            if shape not in faster:
                faster[shape] = is_faster(linear, rows)
            if faster[shape]:
                setattr(parent, name, PackedLinear(linear))
                count += 1
    return count


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed order for it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.inference_mode()
def is_faster(linear: nn.Linear, rows: Sequence[int]) -> bool:
    """Whether the packed form needs less time, over all of `rows` alike."""
    packed = PackedLinear(linear)
    ratio = 0.0
    for count in rows:
        x = linear.weight.new_zeros(count, linear.in_features)
        plain = fastest(partial(F.linear, x, linear.weight, linear.bias))
        ratio += fastest(partial(packed, x)) / plain / len(rows)
    return ratio < WORTH_IT


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)
