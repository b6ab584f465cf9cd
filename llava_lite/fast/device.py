"""Choose the device and the dtype; name the machine; wait for the device."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from llava_lite.config import FastViTHDConfig, TowerConfig


def pick_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the first available of cuda, mps, cpu. Raises ValueError for
    an unknown name, and for a device that this machine does not have."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        device = next(name for name, count in counts.items() if count)
    unknown = f"device {str(device)!r} is not one of auto, cuda, mps, cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(unknown) from None
    if chosen.type not in counts:
        raise ValueError(unknown)
    count = counts[chosen.type]
    if (chosen.index or 0) >= count:
        there = f", there are {count} of {chosen.type}, counted from 0" if count else ""
        raise ValueError(f"device {str(device)!r} is not available here{there}")
    return chosen


# Up to so many parameters, a model on a CPU runs in float32. The weights stay in the caches of the
# CPU, so their size hardly matters, and float32 is faster and more exact.
FEW_PARAMETERS = 1 << 24


def pick_dtype(
    stored: torch.dtype, device: torch.device, parameters: int, quantized: bool
) -> torch.dtype:
    """The dtype to run in: the stored one, but on a CPU float32 for a small model without quantized
    layers, and bfloat16 for float16, which is slow there."""
    if device.type == "cpu" and parameters <= FEW_PARAMETERS and not quantized:
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 and device.type == "cpu" else stored


def pick_tower_dtype(vision: TowerConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the vision tower in front of a decoder in `dtype`.

    FastViTHD runs in float32 instead of float16, whose range its features exceed, and on CPUs whose
    convolutions in bfloat16 are many times slower than those in float32."""
    if not isinstance(vision, FastViTHDConfig) or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    fast = device.type != "cpu" or has_bfloat16_instructions()
    return dtype if dtype == torch.bfloat16 and fast else torch.float32


def has_bfloat16_instructions() -> bool:
    """Whether the CPU multiplies in bfloat16. False where torch does not know."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


PROC = Path("/proc")


def machine(device: str, threads: int) -> dict[str, Any]:
    """The facts of this machine that a measurement depends on."""
    name = platform.processor() or platform.machine()
    cpuinfo = PROC / "cpuinfo"
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    facts = {"device": device, "name": name, "threads": threads, "cores": os.cpu_count()}
    return {**facts, "torch": torch.__version__}


def synchronize(device: str) -> None:
    """Wait until the GPU has finished its queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()
