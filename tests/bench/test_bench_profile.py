"""Where the time goes: operators by kind, one pass of each part.

Run: pytest tests/bench/test_bench_profile.py
"""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from llava_lite.bench import profile as bench_profile
from llava_lite.bench.cases import OURS
from llava_lite.bench.machine import Case, Prepared, Run
from llava_lite.bench.profile import ATTENTION, OTHERS, PRODUCTS, kind, profile_case, profile_cases
from llava_lite.bench.report import profile_cells
from llava_lite.tables import table_lines


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        *((f"aten::{name}", PRODUCTS) for name in ("mm", "addmm", "bmm", "mv", "baddbmm", "addmv")),
        ("aten::addmv_", PRODUCTS),
        ("aten::_weight_int8pack_mm", PRODUCTS),
        ("aten::_int_mm", PRODUCTS),
        ("aten::_weight_int4pack_mm_for_cpu", PRODUCTS),
        ("aten::mkldnn_convolution", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::scaled_dot_product_attention", ATTENTION),
        *(
            (f"aten::{name}", OTHERS)
            for name in ("mul", "mul_", "cumsum", "matmul", "t", "linear", "mvlgamma")
        ),
    ],
)
def test_kinds(operator: str, expected: str) -> None:
    assert kind(operator) == expected


def run_case(run: Run, part: str = "prefill", steps: int = 1) -> Case:
    return Case(OURS, part, "none", run, steps=steps)


def test_a_product_counts_as_one() -> None:
    x = torch.randn(600, 600)
    found = profile_case(run_case(lambda: x @ x @ x), "cpu")
    assert (found.contender, found.part, found.setting) == (OURS, "prefill", "none")
    assert next(iter(found.operators)) == "aten::mm"  # the longest first
    assert found.kinds[PRODUCTS] == found.operators["aten::mm"]
    assert found.kinds[ATTENTION] == 0 < found.kinds[OTHERS]
    assert sum(found.kinds.values()) == pytest.approx(sum(found.operators.values()))
    assert list(found.operators.values()) == sorted(found.operators.values(), reverse=True)
    assert found.seconds >= sum(found.kinds.values()) > 0


def test_attention_counts_once() -> None:
    """Not again in what calls it."""
    q = torch.randn(1, 4, 128, 32)
    kinds = profile_case(run_case(lambda: F.scaled_dot_product_attention(q, q, q)), "cpu").kinds
    assert kinds[ATTENTION] > 0 == kinds[PRODUCTS]


def test_seconds_are_those_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that is prepared outside of what is seen."""
    x = torch.randn(64, 64)
    calls = []

    def make() -> Callable[[], None]:
        torch.linalg.inv(x)
        return lambda: calls.append([x @ x for _ in range(4)])

    monkeypatch.setattr(bench_profile, "perf_counter", iter([10.0, 18.0]).__next__)
    found = profile_case(run_case(Prepared(make), "decode", steps=4), "cpu")
    assert found.seconds == 2.0 and len(calls) == 1
    assert "aten::mm" in found.operators and not any("inv" in name for name in found.operators)


def test_only_parts_that_are_one_thing() -> None:
    ran = []
    cases = [
        run_case(lambda part=part: ran.append(part), part)
        for part in ("tower", "prefill", "first token", "decode", "batch", "growing prefill")
    ]
    found = profile_cases(cases, "cpu")
    assert [one.part for one in found] == ran == list(bench_profile.PARTS)


def test_lines() -> None:
    seen = bench_profile.Profile(
        OURS, "prefill", "none", 2.0, {"aten::mm": 1.0, "aten::mul": 0.5, "aten::add": 0.1}
    )
    head, line = table_lines([profile_cells(seen)])
    assert head.split()[:2] == ["ms", "products"]
    assert line.split() == (
        "llava_lite prefill none 2000.00 50.0% 0.0% 30.0% 20.0% mul 25.0%, add 5.0%".split()
    )


# The program with the machine's own limits asked for in a moment.
SMALL_LIMITS = """
import sys
from llava_lite.bench import machine
from llava_lite.cli.program import main
machine.MATMUL, machine.READ_BYTES = (8, 64, 96), 1 << 20
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_command() -> None:
    """In a process of its own: what torch's profiler prints by itself passes by Python."""
    counts = "--reductions hybrid-72-36 --batch-sizes 1 --lengths 16 --repeat 1".split()
    words = ["bench", "--size", "tiny", "--quiet", "--json", "--profile", *counts]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_LIMITS, *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)["profiles"]
    assert {(one["part"], one["setting"]) for one in found} == {
        *((part, name) for part in ("prefill", "decode") for name in ("none", "hybrid-72-36")),
        ("tower", "none"),
        ("growing prefill", "16"),
    }
    for one in found:
        assert one["operators"]["aten::mm" if one["part"] != "tower" else "aten::addmm"] > 0
