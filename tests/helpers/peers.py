"""Independent implementations that tests compare with: the extra `peers`."""

from types import ModuleType

import pytest
import torch

OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
REGISTERED: list[torch.library.Library] = []


def peer(name: str) -> ModuleType:
    """Import a module of the extra `peers`, or skip the test."""
    declare_torchvision_operators()
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is in the extra `peers`")


def declare_torchvision_operators() -> None:
    """Declare two operators of torchvision, whose compiled library a CPU build of torch may refuse.

    Importing torchvision needs their names. Nothing here calls them."""
    for name, signature in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(name + signature)
            REGISTERED.append(library)
