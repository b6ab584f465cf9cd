"""Time runs and this machine's limits in turns.

A figure of speed means little without the rates of this machine at the same moment. So the limits
are runs too (`limit_cases`), and take turns with the runs they are compared with (`time_in_turns`).
"""

import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
ROWS_IN_A_HURRY = 256


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


@dataclass
class Clock:
    """The end of rounds that may stop early, and how they ended.

    deadline: by `perf_counter`. expected: at most so many seconds a case takes, by its key.
    rounds: the counted rounds that were completed. left_out: keys of cases that would have ended
    after the deadline. interrupted: by the user. show: called with lines on the progress."""

    deadline: float = math.inf
    show: Callable[[str], None] = field(default=lambda line: None)
    expected: dict[Any, float] = field(default_factory=dict)
    rounds: int = 0
    left_out: list[Any] = field(default_factory=list)
    interrupted: bool = False

    def has(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return perf_counter() + seconds <= self.deadline


def time_in_turns(
    runs: Mapping[Key, Run],
    repeat: int,
    device: str,
    hidden: bool = False,
    clock: Clock | None = None,
) -> dict[Key, list[float]]:
    """Seconds of every run, `repeat` times each.

    Each round runs all of them once, so a slow moment of the machine hits all of them. The first
    round warms up and does not count. Shows progress on stderr unless `hidden`.

    With a clock the rounds end at its deadline or when the user interrupts them. Then a run that
    was only warmed up has the seconds of that round, and a run that never ended is missing."""
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    total = (repeat + 1) * len(runs)
    with tqdm(total=total, unit="run", file=sys.stderr, disable=hidden) as bar:
        try:
            for turn in range(repeat + 1):
                if not run_round(runs, seconds, turn, device, bar, clock):
                    break
        except KeyboardInterrupt:
            if clock is None:
                raise
            clock.interrupted = True
    return {key: values[1:] or values for key, values in seconds.items() if values}


def run_round(
    runs: Mapping[Key, Run],
    seconds: dict[Key, list[float]],
    turn: int,
    device: str,
    bar: Any,
    clock: Clock | None,
) -> bool:
    """Time every run once, and add its `seconds`. Returns whether there is time for one more round.
    In the warming round (turn 0) runs without time are left out."""
    clock, start = clock or Clock(), perf_counter()
    clock.rounds = max(0, turn - 1)
    for key, run in runs.items():
        if turn == 0 and key in clock.expected and not clock.has(clock.expected[key]):
            clock.left_out.append(key)
        if key in clock.left_out:
            continue
        call = run.make() if isinstance(run, Prepared) else run
        elapsed = time_call(call, device)
        del call  # before the next run needs the memory
        seconds[key].append(elapsed)
        bar.update()
        if turn == 0:
            name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            clock.show(f"{name}: {1000 * elapsed:.1f} ms, the first time")
    clock.rounds = turn
    took = perf_counter() - start
    name = f"round {turn}" if turn else "the round that warms up"
    clock.show(f"{name} took {took:.1f} s; Ctrl-C ends the rounds and prints the table")
    return clock.has(took)


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
    cases: Sequence[Case],
    repeat: int,
    dtype: torch.dtype,
    device: str,
    hidden: bool,
    clock: Clock | None = None,
) -> tuple[dict[str, float], list[Measurement]]:
    """Time cases and the machine's limits in turns, `repeat` rounds. Returns a measurement of every
    case, and the limits: operations ("matmul") and bytes per second, by each way to read and by the
    fastest ("read"). With a clock, see `time_in_turns`; KeyboardInterrupt without any limit."""
    hurried = clock is not None and clock.deadline < math.inf
    limits = limit_cases(dtype, device, ROWS_IN_A_HURRY if hurried else MATMUL[0])
    expected = clock.expected if clock else {}
    in_order = sorted(cases, key=lambda case: expected.get(case.key, 0.0))  # the quickest first
    runs = {case.key: case.run for case in (*limits, *in_order)}
    seconds = time_in_turns(runs, repeat, device, hidden, clock)
    if any(limit.key not in seconds for limit in limits):
        raise KeyboardInterrupt
    rates = {"matmul": 0.0, "read": 0.0}
    for limit in limits:
        rate = (limit.flops or limit.bytes) / statistics.median(seconds[limit.key])
        rates[limit.part] = max(rate, rates[limit.part])
        if limit.part == "read":
            rates[f"read, {limit.setting}"] = rate
    timed = [case for case in cases if case.key in seconds]
    return rates, [measure(case, seconds[case.key], rates) for case in timed]


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


def limit_cases(dtype: torch.dtype, device: str, rows: int) -> list[Case]:
    """A product of two large matrices in `dtype`, one with so many rows ("matmul"), and several
    ways to "read" memory: matrix-vector products (on a CPU with and without oneDNN), and a sum in
    float32."""
    _, width, out = MATMUL
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
