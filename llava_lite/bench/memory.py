"""The memory of this machine and of this process, as far as the system tells."""

import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import torch

from llava_lite.fast.device import PROC

POLL_SECONDS = 0.01
CGROUP = Path("/sys/fs/cgroup")  # a container's limits
# By folder: files with the limit and the usage of memory. The second is cgroup v1.
CGROUP_FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


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
    known = [proc_bytes("meminfo", "MemAvailable"), *free_in_groups()]
    return min((value for value in known if value is not None), default=None)


def free_in_groups() -> Iterator[int]:
    """Memory left within the limit of each control group of this process; the limit of an outer
    group holds for the inner ones. Cached files count as used there, but the system reclaims their
    pages when needed."""
    lines = read_text(PROC / "self/cgroup").splitlines()
    inner = [Path(line.split(":", 2)[2].strip("/")) for line in lines if line.count(":") >= 2]
    paths = {p for path in inner if ".." not in path.parts for p in (path, *path.parents)}
    for root, names in CGROUP_FILES.items():
        for folder in (CGROUP / root / path for path in paths | {Path()}):
            limit, used = (read_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():  # "max": no limit
                stat = read_text(folder / "memory.stat")
                files = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", stat, re.M)))
                yield max(0, int(limit) - max(0, int(used) - files))


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
