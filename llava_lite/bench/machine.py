"""Time runs in turns; measure this machine's limits and a process's memory.

A figure of speed means little without the rates of this machine at the same moment. So the limits
are runs too (`limit_runs`), and take turns with the runs they are compared with (`time_in_turns`).
"""

import re
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from llava_lite.fast.device import PROC, synchronize

Key = TypeVar("Key")

MATMUL = (2048, 4096, 11008)  # rows, in, out: a prompt and the widest product of the 7B model
READ_BYTES = 1_500_000_000  # more than any cache holds
POLL_SECONDS = 0.01
CGROUP = Path("/sys/fs/cgroup")  # a container's limits
# By folder: files with the limit and the usage of memory. The second is cgroup v1.
CGROUP_FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


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


# ---- limits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """A run at a limit of the machine: `amount` operations (kind "matmul") or bytes ("read").
    Several ways of one kind compete; the fastest counts."""

    kind: str
    way: str
    run: Callable[[], Any]
    amount: int


def limit_runs(dtype: torch.dtype, device: str) -> list[Limit]:
    """A product of two large matrices in `dtype`, and several ways to read memory: matrix-vector
    products (on a CPU with and without oneDNN), and a sum in float32."""
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
    operations = 2 * len(products) * rows * width * out
    return [
        Limit("matmul", "matrix", partial(multiply_all, products, prompt), operations),
        *(Limit("read", way, run, matrices.nbytes) for way, run in reads.items()),
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


# ---- memory ------------------------------------------------------------------------------------


def proc_bytes(file: str, field: str) -> int | None:
    """A field of a file in /proc, in bytes; None if the system does not have it."""
    found = re.search(rf"^{field}:\s+(\d+) kB", read_text(PROC / file), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def private_bytes() -> int | None:
    """Memory of this process alone that the system cannot reclaim. The pages of a memory-mapped
    checkpoint do not count."""
    return proc_bytes("self/smaps_rollup", "Private_Dirty")


def free_bytes(device: str) -> int | None:
    """Memory available without swapping, on this machine and within a container's limit; None if
    unknown. The page cache counts as available."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    known = [proc_bytes("meminfo", "MemAvailable"), *map(free_in_group, control_groups())]
    return min((value for value in known if value is not None), default=None)


def control_groups() -> list[tuple[str, Path]]:
    """The groups that may limit this process, each with the root folder that its files are in.
    The limit of an outer group holds for the inner ones."""
    lines = read_text(PROC / "self/cgroup").splitlines()
    own = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    inner = [Path(path) for path in own if ".." not in path]
    paths = {Path(): None} | {p: None for path in inner for p in (path, *path.parents)}
    return [(root, path) for root in CGROUP_FILES for path in paths]


def free_in_group(group: tuple[str, Path]) -> int | None:
    """Memory left within the limit of a control group; None without a limit. Cached files count as
    used there, but the system reclaims their pages when needed."""
    root, path = group
    folder = CGROUP / root / path
    limit, used = (read_text(folder / name).strip() for name in CGROUP_FILES[root])
    if not limit.isdigit() or not used.isdigit():  # "max": no limit
        return None
    files = re.findall(r"^(?:in)?active_file (\d+)$", read_text(folder / "memory.stat"), re.M)
    return max(0, int(limit) - max(0, int(used) - sum(map(int, files))))


def read_text(path: Path) -> str:
    """The text of a small system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


class MemoryWatch:
    """Peak memory of this process within a `with`, polled every POLL_SECONDS. resident: all pages;
    anonymous: pages without a file behind them. On a GPU both are torch's peak allocation there.
    None if the system does not tell."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.resident: int | None = None
        self.anonymous: int | None = None
        self.ended = Event()

    def __enter__(self) -> "MemoryWatch":
        if self.device.startswith("cuda"):
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.look()
        self.thread = Thread(target=self.poll, daemon=True)
        self.thread.start()
        return self

    def poll(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        if self.device.startswith("cuda"):
            self.resident = self.anonymous = torch.cuda.max_memory_allocated(self.device)
            return
        resident, anonymous = (proc_bytes("self/status", name) for name in ("VmRSS", "RssAnon"))
        self.resident = max(filter(None, (self.resident, resident)), default=None)
        self.anonymous = max(filter(None, (self.anonymous, anonymous)), default=None)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.look()
