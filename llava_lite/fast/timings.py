"""Keep the times of kernels in the user's cache folder, for every machine, torch and numba.

    with Timings.open() as timings:
        times = timings.get("bfloat16 4096 x 4096", measure)    # measures only if nothing is kept

A file that another machine, torch, numba or number of threads wrote has another name. A damaged
file is measured anew and replaced. Times that other programs have disturbed are used, and not kept.
The folder is `$XDG_CACHE_HOME/llava_lite`, else `~/.cache/llava_lite`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from llava_lite.fast.device import PROC, machine
from llava_lite.saving import replace_json

MOST_DISTURBED = 0.1  # the share of all cores that other programs may take during a timing
FORMAT = 2  # another number after a change of the kernels or of the classes of rows
# Settings of the libraries below torch that change their kernels.
SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME")


@dataclass
class Timings:
    """Times by kind of weight. facts: what they depend on. disturbed: kinds that are not kept."""

    path: Path
    facts: dict[str, Any]
    times: dict[str, Any] = field(default_factory=dict)
    disturbed: set[str] = field(default_factory=set)
    new: bool = False

    @staticmethod
    @contextmanager
    def open() -> Iterator["Timings"]:
        """The times of this machine. New times are written at the end."""
        facts = machine_facts()
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        timings = Timings(cache_folder() / f"kernels-{name}.json", facts)
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(timings.path.read_text(encoding="utf-8"))
            if content["facts"] == json.loads(json.dumps(facts)):
                timings.times = dict(content["times"])
        yield timings
        if timings.new:
            with suppress(OSError):  # a cache that cannot be written costs a second per load
                timings.path.parent.mkdir(parents=True, exist_ok=True)
                kept = {k: t for k, t in timings.times.items() if k not in timings.disturbed}
                replace_json(timings.path, {"facts": facts, "times": kept})

    def get(self, kind: str, measure: Callable[[], Any]) -> Any:
        """The kept times of a kind, measured if there are none."""
        if kind in self.times:
            return self.times[kind]
        before, start = others_seconds(), perf_counter()
        times = measure()
        cores = os.cpu_count() or 1
        quiet = others_seconds() - before <= MOST_DISTURBED * cores * (perf_counter() - start)
        self.times[kind] = times  # disturbed or not: the next layer of this kind is not measured
        if quiet:
            self.new = True
        else:
            self.disturbed.add(kind)
        return times

    def forget(self, kinds: Iterable[str]) -> None:
        """Drop the kept times of these kinds."""
        self.times = {kind: times for kind, times in self.times.items() if kind not in set(kinds)}


def cache_folder() -> Path:
    """The folder for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_lite"


def others_seconds() -> float:
    """The CPU seconds that all other programs, and other guests of a virtual machine, have taken
    since the start of the system; 0 where the system does not tell."""
    try:
        line = (PROC / "stat").read_text(encoding="utf-8").split("\n", 1)[0]
        user, nice, system, _, _, *rest = map(int, line.split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - process_time()


def machine_facts() -> dict[str, Any]:
    """All that the times depend on: the processor and its flags, threads, versions, settings."""
    threads = torch.get_num_threads()
    return {
        "format": FORMAT,
        **machine("cpu", threads),
        "numba": numba_version(),
        "flags": cpu_flags(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def numba_version() -> str | None:
    """The version of the installed numba, which compiles the kernels of int4-dynamic."""
    try:
        return version("numba")
    except PackageNotFoundError:
        return None


def cpu_flags() -> list[str]:
    """The vector and matrix instructions of the processor, as far as the system tells."""
    cpuinfo = PROC / "cpuinfo"
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if is_flags(line)), [])
    wanted = ("avx", "amx", "fma", "f16c", "bf16", "vnni", "asimd", "sve", "i8mm", "fphp")
    return sorted(flag for flag in flags if any(name in flag for name in wanted))


def is_flags(line: str) -> bool:
    """Whether a line of /proc/cpuinfo lists instructions: "flags" on x86, "Features" on Arm."""
    return line.startswith(("flags", "Features"))
