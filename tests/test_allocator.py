"""Freed memory stays with the process: looked at in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import resource, sys
import torch
from llava_lite.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(2**22)  # 16 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to find for 20 blocks of 16 MB, each freed before the next."""
    # What a user has set for the C library would decide in its place.
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "LD_PRELOAD": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_the_same_pages_serve_again() -> None:
    assert faults("keep") < 100 < 5000 < faults("give back")


def test_elsewhere_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_lite import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    monkeypatch.undo()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
