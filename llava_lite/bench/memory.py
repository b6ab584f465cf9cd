"""The memory of this machine and of this process, as far as the system tells."""

import re
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
