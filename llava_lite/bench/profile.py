"""Where the time of a part goes: one more pass of it under torch's profiler, after all were timed.

Operators count with the time that they spend themselves, not with what they call, in three kinds:
products of matrices, fused attention, and the others. What is left of the wall clock passed between
operators, in Python, in the profiler itself, and, on a GPU, where it waited for work.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch.profiler import DeviceType, ProfilerActivity, profile

from llava_lite.bench.cases import Case
from llava_lite.bench.machine import Prepared
from llava_lite.fast.device import synchronize

PARTS = ("tower", "prefill", "decode", "growing prefill")  # of bench_cases.PARTS
PRODUCTS, ATTENTION, OTHERS = KINDS = ("products", "attention", "others")
PATTERNS = {
    ATTENTION: re.compile("attention|scaled_dot_product|flash"),
    PRODUCTS: re.compile(r"::_?(addmm|baddbmm|bmm|mm|addmv|mv|\w*pack_mm\w*|\w*convolution\w*)_?$"),
}


@dataclass(frozen=True)
class Profile:
    """Seconds of one pass, of these by operator, the longest first, and by kind."""

    contender: str
    part: str
    setting: str
    seconds: float
    operators: Mapping[str, float]

    @property
    def kinds(self) -> dict[str, float]:
        """Seconds of each of KINDS."""
        sums = dict.fromkeys(KINDS, 0.0)
        for name, seconds in self.operators.items():
            sums[kind(name)] += seconds
        return sums


def kind(operator: str) -> str:
    """Which of KINDS an operator is."""
    return next((name for name, known in PATTERNS.items() if known.search(operator)), OTHERS)


def profile_cases(cases: Iterable[Case], device: str) -> list[Profile]:
    """One pass of each case that is of one of PARTS."""
    # Or the profiler's library prints two lines to stderr for every pass.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return [profile_case(case, device) for case in cases if case.part in PARTS]


def profile_case(case: Case, device: str) -> Profile:
    """One pass, with all its steps; seconds are those of one step."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    call = case.run.make() if isinstance(case.run, Prepared) else case.run
    synchronize(device)
    with profile(activities=activities) as seen:
        start = perf_counter()
        call()
        synchronize(device)
        seconds = perf_counter() - start
    # Kernels of a GPU count once, with the operator that queued them.
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CPU]
    took = {event.key: own_microseconds(event, on_gpu) / 1e6 / case.steps for event in events}
    longest = sorted((name for name in took if took[name] > 0), key=took.__getitem__, reverse=True)
    return Profile(*case.key, seconds / case.steps, {name: took[name] for name in longest})


def own_microseconds(event: Any, on_gpu: bool) -> float:
    """Of an operator, without those that it calls; on a GPU, of its kernels."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
