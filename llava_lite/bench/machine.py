"""The machine below a model: its name and its limits, the memory of a process, and how to time.

A figure of speed says little without the rate at which this machine multiplies matrices and reads
memory at the same moment, so those are runs like any other (`limit_runs`) and take their turns with
what they are to be compared with (`time_in_turns`).
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


CGROUP = Path("/sys/fs/cgroup")  # where a container's limits are


LIMITS = {  # of memory: the limit, what is taken of it
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # cgroup v1
}


# ---- time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A run that needs something made beforehand, in time that does not count: `make` returns the
    call to time. What it made is freed when that has ended."""

    make: Callable[[], Callable[[], Any]]


Run = Callable[[], Any] | Prepared


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall clock of one call, what it queued on a GPU included."""
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return perf_counter() - start


def time_in_turns(
    runs: Mapping[Key, Run], repeat: int, device: str, hidden: bool = False
) -> dict[Key, list[float]]:
    """Seconds of every run, `repeat` times each. All take their turn, then all the next one, so
    that a slow moment hits all of them; the first round warms up and does not count. Progress goes
    to stderr unless `hidden`."""
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    total = (repeat + 1) * len(runs)
    with tqdm(total=total, unit="run", file=sys.stderr, disable=hidden) as bar:
        for turn in range(repeat + 1):
            for key, run in runs.items():
                call = run.make() if isinstance(run, Prepared) else run
                elapsed = seconds_of(call, device)
                del call  # before the next one needs the memory
                if turn:
                    seconds[key].append(elapsed)
                bar.update()
    return seconds


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third; both the value where there is only one."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# ---- limits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """A run that asks how fast the machine can be: `amount` operations ("matmul") or bytes
    ("read"), in one of several ways, of which the fastest counts."""

    kind: str
    way: str
    run: Callable[[], Any]
    amount: int


def limit_runs(dtype: torch.dtype, device: str) -> list[Limit]:
    """A product of two large matrices in `dtype`, and all the ways to read memory: products of many
    matrices with one vector each, with and without oneDNN on a CPU, and a sum in float32."""
    rows, width, out = MATMUL
    count = -(-READ_BYTES // (width * out * dtype.itemsize))
    # Written, not only reserved: pages of zeros that nobody wrote are all the same page.
    matrices = torch.full((count, out, width), 0.01, dtype=dtype, device=device)
    vector, prompt = (torch.full((n, width), 0.5, dtype=dtype, device=device) for n in (1, rows))
    reads: dict[str, Callable[[], Any]] = {"matrix-vector": partial(multiply_all, matrices, vector)}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        reads["matrix-vector without oneDNN"] = partial(multiply_without_onednn, matrices, vector)
    # A view of the same memory: what its bits mean as float32 is no matter.
    reads["sum"] = partial(torch.sum, matrices.flatten().view(torch.float32))
    products = matrices[:1] if device == "cpu" else matrices  # one is over too soon on a GPU
    product = partial(multiply_all, products, prompt)
    operations = 2 * len(products) * rows * width * out
    return [
        Limit("matmul", "matrix", product, operations),
        *(Limit("read", way, run, matrices.nbytes) for way, run in reads.items()),
    ]


def multiply_all(matrices: Tensor, x: Tensor) -> None:
    """Each of the matrices (count, out, in) with x (rows, in)."""
    for matrix in matrices:
        F.linear(x, matrix)


def multiply_without_onednn(matrices: Tensor, vector: Tensor) -> None:
    """The same by torch's own kernel, which may read faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch talks about a GPU that nobody asked for
        with torch.backends.mkldnn.flags(enabled=False):
            multiply_all(matrices, vector)


# ---- memory ------------------------------------------------------------------------------------


def proc_bytes(file: str, field: str) -> int | None:
    """A field in kB of a file below /proc, in bytes; None where the system has none."""
    try:
        text = (PROC / file).read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def private_bytes() -> int | None:
    """Memory that belongs to this process alone and that the system cannot take back: not the pages
    of a mapped checkpoint."""
    return proc_bytes("self/smaps_rollup", "Private_Dirty")


def free_bytes(device: str) -> int | None:
    """What can still be taken without swapping, the page cache included, of the machine and within
    a container's limit; None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    known = [proc_bytes("meminfo", "MemAvailable"), *map(free_in_group, control_groups())]
    return min((value for value in known if value is not None), default=None)


def control_groups() -> list[Path]:
    """The folders of this process's control groups that may limit its memory, and of those above
    them, whose limits hold as well."""
    lines = read_text(PROC / "self/cgroup").splitlines()
    own = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    inner = [Path(path) for path in own if ".." not in path]
    paths = {Path(): None} | {p: None for path in inner for p in (path, *path.parents)}
    return [CGROUP / controller / path for controller in LIMITS for path in paths]


def free_in_group(folder: Path) -> int | None:
    """What its limit leaves, None without one. Pages of files count as taken there, but are given
    back when something else needs the memory."""
    names = next((names for names in LIMITS.values() if (folder / names[0]).exists()), None)
    if names is None:
        return None
    limit, taken = (read_text(folder / name).strip() for name in names)
    if not limit.isdigit() or not taken.isdigit():  # "max": no limit
        return None
    files = re.findall(r"^(?:in)?active_file (\d+)$", read_text(folder / "memory.stat"), re.M)
    return max(0, int(limit) - max(0, int(taken) - sum(map(int, files))))


def read_text(path: Path) -> str:
    """Of a small file of the system's; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


class MemoryWatch:
    """Peaks of this process within a `with`, looked at every hundredth of a second: `resident` all
    of its pages, `anonymous` those that no file backs. On a GPU both are what torch allocated
    there. None where the system does not say."""

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
        self.resident = higher(self.resident, resident)
        self.anonymous = higher(self.anonymous, anonymous)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.look()


def higher(a: int | None, b: int | None) -> int | None:
    """The larger one that is known."""
    return max((value for value in (a, b) if value is not None), default=None)
