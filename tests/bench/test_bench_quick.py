"""A quick look chooses its sizes, and rounds that end early leave a table.

Run: pytest tests/bench/test_bench_quick.py
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_lite.bench import footprint as footprints
from llava_lite.bench import machine as hardware
from llava_lite.bench import models, quick
from llava_lite.bench import report as bench_report
from llava_lite.bench import run as bench
from llava_lite.bench.cases import OURS
from llava_lite.bench.machine import Case, Clock, Prepared, time_in_turns
from llava_lite.bench.models import BenchError, Settings
from llava_lite.bench.quick import count_prompts, expect_seconds, prompt_flops
from llava_lite.cli import program as cli
from llava_lite.config import LLAVA_1_5_7B, TINY

NARROW = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=48, intermediate_size=96, num_layers=4, num_heads=4),
    text=replace(TINY.text, hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4),
)
LIMITS = 4  # runs of the machine alone, in front of every round


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow model in this process, and the machine's limits in a moment."""
    monkeypatch.setitem(models.SIZES, "tiny", NARROW)
    monkeypatch.setattr(footprints, "apart", lambda task, *args: task(*args))
    monkeypatch.setattr(hardware, "MATMUL", (8, 64, 96))
    monkeypatch.setattr(hardware, "READ_BYTES", 1 << 20)


class Time:
    """A clock that only moves when a run takes time. stop: the number of the run that the user
    interrupts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.now, self.calls, self.stop = 0.0, list[str](), stop
        monkeypatch.setattr(hardware, "perf_counter", lambda: self.now)

    def take(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.now += seconds

    def runs(self, **seconds: float) -> dict[str, Callable[[], None]]:
        return {name: partial(self.take, name, took) for name, took in seconds.items()}


# ---- rounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "seconds", "rounds"),
    [
        (1, {}, 0),
        (2, {"a": [1.0]}, 0),  # of the round that warms up
        (4, {"a": [1.0], "b": [2.0]}, 0),
        (5, {"a": [1.0], "b": [2.0]}, 1),
        (6, {"a": [1.0, 1.0], "b": [2.0]}, 1),
        (None, {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}, 3),
    ],
)
def test_interrupted_rounds_keep_what_was_measured(
    stop: int | None,
    seconds: dict[str, list[float]],
    rounds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time, clock = Time(monkeypatch, stop), Clock()
    assert time_in_turns(time.runs(a=1.0, b=2.0), 3, "cpu", True, clock) == seconds
    assert (clock.rounds, clock.interrupted) == (rounds, stop is not None)


def test_without_a_clock_an_interrupt_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        time_in_turns(Time(monkeypatch, 3).runs(a=1.0, b=2.0), 3, "cpu", True)


@pytest.mark.parametrize(("deadline", "rounds"), [(8.9, 1), (9.0, 2), (100.0, 4)])
def test_no_round_begins_that_would_end_late(
    deadline: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, clock = Time(monkeypatch), Clock(deadline)
    found = time_in_turns(time.runs(a=1.0, b=2.0), 4, "cpu", True, clock)
    assert [len(values) for values in found.values()] == [rounds, rounds]
    assert clock.rounds == rounds and not clock.interrupted and time.now <= deadline


def test_a_run_that_would_end_late_is_left_out_of_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time, clock = Time(monkeypatch), Clock(9.0, expected={"a": 1.0, "long": 8.5, "b": 2.0})
    found = time_in_turns(time.runs(a=1.0, long=8.5, b=2.0), 4, "cpu", True, clock)
    assert time.calls == ["a", "b"] * 3 and set(found) == {"a", "b"}
    assert clock.left_out == ["long"]


def test_every_first_run_and_every_round_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    runs = {(OURS, "decode", name): run for name, run in Time(monkeypatch).runs(none=0.25).items()}
    time_in_turns(runs, 1, "cpu", True, Clock(show=lines.append))
    assert lines[0] == "llava_lite decode none: 250.0 ms, the first time"
    assert lines[1].startswith("the round that warms up took 0.2 s; Ctrl-C ends the rounds")
    assert lines[2].startswith("round 1 took 0.2 s") and len(lines) == 3


# ---- sizes -------------------------------------------------------------------------------------


@given(
    rate=st.floats(1e8, 1e15),
    layers=st.integers(1, 32),
    against=st.booleans(),
    formats=st.sets(st.sampled_from(("bf16", "q8_0", "q4_k"))),
    lengths=st.sets(st.integers(1, 2048)),
)
def test_chosen_sizes_fit_and_are_at_most_the_wishes(
    rate: float, layers: int, against: bool, formats: set[str], lengths: set[int]
) -> None:
    wished = Settings(
        size="7b",
        layers=layers,
        against=against,
        llamacpp=tuple(formats),
        lengths=tuple(lengths),
        reductions=("none", "folded-72"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "time_product", lambda dtype, device: rate)
        chosen, line = quick.choose_sizes(wished)
    assert chosen.layers is not None and 1 <= chosen.layers <= layers
    assert set(chosen.lengths) <= lengths and chosen.batch_sizes == ()
    assert replace(wished, layers=None, lengths=(), batch_sizes=(), against=False) == replace(
        chosen, layers=None, lengths=(), against=False
    )
    prompt = prompt_flops(LLAVA_1_5_7B, chosen.layers) / rate
    budget = quick.FIRST_SHARE * quick.SECONDS
    extra = 2 * sum(chosen.lengths) / 640
    if chosen.layers > 1 or chosen.lengths:
        assert (count_prompts(wished) + extra) * prompt <= budget * 1.0001
    if chosen.layers < layers:
        bigger = prompt_flops(LLAVA_1_5_7B, 2 * chosen.layers) / rate
        assert count_prompts(wished) * bigger > budget
    assert chosen.against == (against and prompt <= quick.PEER_SHARE * quick.SECONDS)
    assert f"{chosen.layers} of {layers} layers" in line
    assert ("transformers is left out" in line) == (against and not chosen.against)


def test_operations_of_a_prompt_are_two_for_each_weight_and_row() -> None:
    """Attention is 5 % more."""
    text, layers = LLAVA_1_5_7B.text, (1, 2)
    one, two = (prompt_flops(LLAVA_1_5_7B, count) for count in layers)
    weights = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    assert 1.0 < (two - one) / (2 * 640 * weights) < 1.05


def test_cases_are_expected_to_take_as_long_as_their_operations() -> None:
    """A case without a count takes a whole prompt; all with a margin of a quarter."""
    cases = [
        Case(OURS, "tower", "none", Prepared(lambda: list), flops=30),
        Case(OURS, "prefill", "none", Prepared(lambda: list), flops=80),
        Case(OURS, "first token", "none", Prepared(lambda: list)),
        Case(OURS, "decode", "none", Prepared(lambda: list), steps=8, flops=1),
    ]
    expected = [expect_seconds(cases, 10.0, 100)[case.key] for case in cases]
    assert expected == pytest.approx([3.75, 10.0, 12.5, 1.0])


# ---- whole runs --------------------------------------------------------------------------------


def run_until(monkeypatch: pytest.MonkeyPatch, stop: int, **changes: Any) -> bench.Report:
    """A run that the user interrupts at a timed call."""
    calls: Iterator[int] = iter(range(stop))
    real = hardware.time_call

    def time_call(run: Callable[[], Any], device: str) -> float:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(run, device)

    monkeypatch.setattr(hardware, "time_call", time_call)
    plain = {"size": "tiny", "reductions": ("none",), "lengths": (16,), "batch_sizes": (1,)}
    return bench.bench(Settings(**{**plain, "quiet": True, "repeat": 2, **changes}))


@pytest.mark.parametrize("more", [1, 2, 8, 9, 14])
def test_an_interrupted_run_has_a_table(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Nine cases: in the first round as many rows as calls, later all."""
    report = run_until(monkeypatch, LIMITS + more)
    assert report.interrupted and report.rounds == 0
    assert len(report.measurements) == min(more, 9)
    text = "\n".join(bench_report.table(report))
    assert "no round was completed, then interrupted" in text
    assert "not run (the run ended before)" in text or more >= 5  # decode is the fifth case
    json.dumps(bench_report.to_dict(report))


def test_medians_of_an_interrupted_run_are_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_until(monkeypatch, 2 * (LIMITS + 9) + LIMITS + 1)
    assert report.rounds == 1 and "medians of 1 rounds, then interrupted" in "\n".join(
        bench_report.table(report)
    )
    assert [len(row.rounds) for row in report.measurements] == [2] + 8 * [1]


def test_without_any_figure_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_until(monkeypatch, LIMITS - 1)


def test_after_an_interrupt_no_other_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10**8)
    monkeypatch.setattr(models, "quantize_model", lambda llava, method: None)
    report = run_until(monkeypatch, LIMITS + 3, quantize="int8")
    assert report.phases == ((OURS,),) and len(report.measurements) == 3


def test_the_command_prints_writes_and_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_until(monkeypatch, LIMITS + 3)
    monkeypatch.setattr(bench, "bench", lambda settings: report)
    file = tmp_path / "figures.json"
    assert cli.main(["bench", "--size", "tiny", "--strict", "-o", str(file)]) == 130
    printed = capsys.readouterr()
    assert printed.out == "\n".join(bench_report.table(report)) + "\n"
    assert printed.err == "interrupted\n"
    assert json.loads(file.read_text())["interrupted"] is True


def test_a_quick_look_says_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quick, "time_product", lambda dtype, device: 1e15)
    assert cli.main(["bench", "--size", "tiny", "--quick", "--repeat", "1", "--layers", "2"]) == 0
    printed = capsys.readouterr()
    [line] = [line for line in printed.out.splitlines() if line.startswith("a quick look: ")]
    assert "chosen are 2 of 2 layers" in line and "128 256 512 1024 2048 growing words" in line
    assert printed.err.startswith(line)
    assert "llava_lite prefill folded-72: " in printed.err
    assert "  llava_lite folded-72 " in printed.out


def test_a_quick_look_without_time_has_the_limits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(quick, "time_product", lambda dtype, device: 1e15)
    report = bench.bench(Settings(size="tiny", quick=True, quiet=True, reductions=("none",)))
    assert report.measurements == () and report.limits["matmul"] > 0
    assert report.skipped["llava_lite prefill none"] == bench.NO_TIME
    assert not report.interrupted and list(bench_report.table(report))


def test_a_quick_look_needs_memory_for_the_chosen_layers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2_000_000_000)
    monkeypatch.setattr(quick, "time_product", lambda dtype, device: 1e10)
    monkeypatch.setattr(bench, "run_phases", lambda *_: pytest.fail("started"))
    bench.check(Settings(size="7b", quick=True))
    monkeypatch.setattr(quick, "time_product", lambda dtype, device: 1e15)
    with pytest.raises(BenchError, match="32 layers .* use fewer --layers"):
        bench.bench(Settings(size="7b", quick=True, quiet=True))


def test_a_quick_look_needs_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick"]) == 2
    assert "--quick goes with --size" in capsys.readouterr().err
