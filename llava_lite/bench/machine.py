"""Time runs and this machine's limits in turns.

A figure of speed means little without the rates of this machine at the same moment. So the limits
are runs too (`limit_cases`), and take turns with the runs they are compared with (`time_in_turns`).
"""

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from llava_lite.fast.device import synchronize

Key = TypeVar("Key")

MATMUL = (2048, 4096, 11008)  # rows, in, out: a prompt and the widest product of the 7B model
READ_BYTES = 1_500_000_000  # more than any cache holds


# ---- time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A run with an untimed preparation: `make` returns the call to time. Everything that `make`
    created is freed after the call."""

    make: Callable[[], Callable[[], Any]]


Run = Callable[[], Any] | Prepared


def time_call(run: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of one call, including work it queued on a GPU."""
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return perf_counter() - start


def time_in_turns(
    runs: Mapping[Key, Run], repeat: int, device: str, hidden: bool = False
) -> dict[Key, list[float]]:
    """Seconds of every run, `repeat` times each.

    Each round runs all of them once, so a slow moment of the machine hits all of them. The first
    round warms up and does not count. Shows progress on stderr unless `hidden`."""
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    total = (repeat + 1) * len(runs)
    with tqdm(total=total, unit="run", file=sys.stderr, disable=hidden) as bar:
        for turn in range(repeat + 1):
            for key, run in runs.items():
                call = run.make() if isinstance(run, Prepared) else run
                elapsed = time_call(call, device)
                del call  # before the next run needs the memory
                if turn:
                    seconds[key].append(elapsed)
                bar.update()
    return seconds


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and third quartile; the value twice if there is only one."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# ---- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to time. `run` makes `steps` steps; tokens, operations and bytes read are per step
    (0: not counted)."""

    contender: str
    part: str
    setting: str
    run: Run
    steps: int = 1
    tokens: int = 0
    flops: int = 0
    bytes: int = 0
    image_tokens: int | None = None
    kv_bytes: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.contender, self.part, self.setting


@dataclass(frozen=True)
class Measurement:
    """A timed case: median seconds of a step, quartiles and all rounds; rates per second (None: not
    counted), and their shares of the machine's limits."""

    contender: str
    part: str
    setting: str
    seconds: float
    quartiles: tuple[float, float]
    rounds: tuple[float, ...]
    tokens_per_second: float | None
    flops_per_second: float | None = None
    matmul_share: float | None = None
    bytes_per_second: float | None = None
    read_share: float | None = None
    bytes: int = 0
    image_tokens: int | None = None
    kv_bytes: int | None = None


def time_cases(
    cases: Sequence[Case], repeat: int, dtype: torch.dtype, device: str, hidden: bool
) -> tuple[dict[str, float], list[Measurement]]:
    """Time cases and the machine's limits in turns, `repeat` rounds. Returns a measurement of every
    case, and the limits: operations ("matmul") and bytes per second, by each way to read and by the
    fastest ("read")."""
    limits = limit_cases(dtype, device)
    runs = {case.key: case.run for case in (*limits, *cases)}
    seconds = time_in_turns(runs, repeat, device, hidden)
    rates = {"matmul": 0.0, "read": 0.0}
    for limit in limits:
        rate = (limit.flops or limit.bytes) / statistics.median(seconds[limit.key])
        rates[limit.part] = max(rate, rates[limit.part])
        if limit.part == "read":
            rates[f"read, {limit.setting}"] = rate
    return rates, [measure(case, seconds[case.key], rates) for case in cases]


def measure(case: Case, rounds: Sequence[float], rates: Mapping[str, float]) -> Measurement:
    """The measurement of a case, from its seconds in every round and the machine's rates."""
    steps = [seconds / case.steps for seconds in rounds]
    median = statistics.median(steps)
    flops = case.flops / median if case.flops else None
    read = case.bytes / median if case.bytes else None
    return Measurement(
        *case.key,
        median,
        quartiles(steps),
        tuple(steps),
        case.tokens / median if case.tokens else None,
        flops,
        None if flops is None else flops / rates["matmul"],
        read,
        None if read is None else read / rates["read"],
        case.bytes,
        case.image_tokens,
        case.kv_bytes,
    )


# ---- limits ------------------------------------------------------------------------------------


def limit_cases(dtype: torch.dtype, device: str) -> list[Case]:
    """A product of two large matrices in `dtype` ("matmul"), and several ways to "read" memory:
    matrix-vector products (on a CPU with and without oneDNN), and a sum in float32."""
    rows, width, out = MATMUL
    count = -(-READ_BYTES // (width * out * dtype.itemsize))
    # Written, not only reserved: all untouched pages of zeros share one page of memory.
    matrices = torch.full((count, out, width), 0.01, dtype=dtype, device=device)
    vector, prompt = (torch.full((n, width), 0.5, dtype=dtype, device=device) for n in (1, rows))
    reads: dict[str, Callable[[], Any]] = {"matrix-vector": partial(multiply_all, matrices, vector)}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        reads["matrix-vector without oneDNN"] = partial(multiply_without_onednn, matrices, vector)
    # A view of the same memory: the float32 values have no meaning.
    reads["sum"] = partial(torch.sum, matrices.flatten().view(torch.float32))
    products = matrices[:1] if device == "cpu" else matrices  # one is too short a run on a GPU
    multiply = partial(multiply_all, products, prompt)
    return [
        Case("machine", "matmul", "matrix", multiply, flops=2 * rows * products.numel()),
        *(Case("machine", "read", way, run, bytes=matrices.nbytes) for way, run in reads.items()),
    ]


def multiply_all(matrices: Tensor, x: Tensor) -> None:
    """Multiply x (rows, in) by each of the matrices (count, out, in)."""
    for matrix in matrices:
        F.linear(x, matrix)


def multiply_without_onednn(matrices: Tensor, vector: Tensor) -> None:
    """The same with torch's own kernel, which may read faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch warns about a GPU
        with torch.backends.mkldnn.flags(enabled=False):
            multiply_all(matrices, vector)
