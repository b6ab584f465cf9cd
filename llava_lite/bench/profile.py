"""Profile each part: one pass under torch's profiler, after all parts were timed.

An operator's time excludes the operators it calls. Operators have three kinds: matrix products,
fused attention, and others. The rest of the wall clock passes between operators: in Python, in the
profiler, and, on a GPU, in waiting for work.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch.profiler import DeviceType, ProfilerActivity, profile

from llava_lite.bench.machine import Case, Prepared
from llava_lite.fast.device import synchronize

PARTS = ("tower", "prefill", "decode", "growing prefill")  # of cases.PARTS
PRODUCTS, ATTENTION, OTHERS = KINDS = ("products", "attention", "others")
PATTERNS = {
    ATTENTION: re.compile("attention|scaled_dot_product|flash"),
    PRODUCTS: re.compile(
        r"::_?(addmm|baddbmm|bmm|int_mm|mm|addmv|mv|\w*pack_mm\w*|\w*convolution\w*)_?$"
    ),
}


@dataclass(frozen=True)
class Profile:
    """Seconds of one pass, and of each operator in it, the longest first."""

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
    """The kind of an operator, one of KINDS."""
    return next((name for name, known in PATTERNS.items() if known.search(operator)), OTHERS)


def profile_cases(cases: Iterable[Case], device: str) -> list[Profile]:
    """Profile one pass of each case of PARTS."""
    # Without it, the profiler's library prints two lines to stderr for every pass.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return [profile_case(case, device) for case in cases if case.part in PARTS]


def profile_case(case: Case, device: str) -> Profile:
    """Profile one pass. Seconds are per step."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    call = case.run.make() if isinstance(case.run, Prepared) else case.run
    synchronize(device)
    with profile(activities=activities) as seen:
        start = perf_counter()
        call()
        synchronize(device)
        seconds = perf_counter() - start
    # A GPU kernel counts once, for the operator that queued it.
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CPU]
    took = {event.key: self_microseconds(event, on_gpu) / 1e6 / case.steps for event in events}
    longest = sorted((name for name in took if took[name] > 0), key=took.__getitem__, reverse=True)
    return Profile(*case.key, seconds / case.steps, {name: took[name] for name in longest})


def self_microseconds(event: Any, on_gpu: bool) -> float:
    """An operator's time without the operators it calls; on a GPU, the time of its kernels."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
