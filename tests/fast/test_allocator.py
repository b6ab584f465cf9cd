"""Freed memory stays with the process, but not all: looked at in processes of their own."""

import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.models import ROOT

PROGRAM = """
import json, resource, sys
from statistics import median
import torch
from llava_lite.fast.allocator import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def prefill():
    # As activations do, several blocks of 5 to 25 MB live side by side: 150 MB.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(megabytes * 2**18) for megabytes in (5, 10, 15, 20, 25) * 2]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = [prefill() for _ in range(12)][-5:]  # the heap has found its size by then
before, small = resident(), []
for _ in range(8):
    torch.ones(2**26)  # 256 MB
    small.append(torch.ones(2**10))  # where a hole is not closed, something settles in it
print(json.dumps({"faults": median(faults), "growth": resident() - before}))
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def measured(how: str) -> SimpleNamespace:
    """faults: pages that the system had to find for the activations of one more prefill.
    growth: bytes that are left after large blocks, each freed before the next."""
    # What a user has set for the C library would decide in its place.
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "LD_PRELOAD": "", "OMP_NUM_THREADS": "1"}
    environment.pop("GLIBC_TUNABLES", None)
    # Its own threshold at the start; set, it does not adapt while the process runs.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return SimpleNamespace(**json.loads(done.stdout))


@pytest.mark.slow
@GLIBC
def test_the_same_pages_serve_again_and_the_heap_stays_small() -> None:
    kept, given_back = measured("keep"), measured("give back")
    assert kept.faults < 100 < 5000 < given_back.faults
    assert kept.growth < 2**25


def test_elsewhere_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_lite.fast import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    monkeypatch.undo()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks on Linux only")
def test_what_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_lite.fast import allocator

    asked = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append(parameter)
        return 0

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert not allocator.keep_freed_memory()
    assert asked == [allocator.M_MMAP_THRESHOLD]


PICTURES = """
import re, sys, threading
from PIL import Image
from llava_lite.fast.allocator import keep_freed_memory, return_freed_pictures

def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1])

keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_pictures()
before = resident()
for _ in range(2):
    draw = lambda: Image.new("RGB", (6000, 6000), "red").close()  # 144 MB
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
print(resident() - before)
"""


@GLIBC
def test_large_pictures_are_returned() -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "LD_PRELOAD": "", "OMP_NUM_THREADS": "1"}
    for name in ("GLIBC_TUNABLES", "PILLOW_BLOCK_SIZE"):
        environment.pop(name, None)
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", PICTURES, how], env=environment))
        for how in ("keep", "return")
    )
    assert returned < 40 * 1024 < 100 * 1024 < kept  # KiB
