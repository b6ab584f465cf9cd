"""The benchmark runs and says everything it promises. No figure of time is asserted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.models import TINY_TEXT, load_tool, random_llava
from llava_lite.bench import machine as hardware
from llava_lite.bench import run as bench
from llava_lite.bench.cases import OURS
from llava_lite.bench.machine import Case, Measurement
from llava_lite.bench.models import BenchError, Settings, open_model
from llava_lite.bench.run import Report
from llava_lite.config import TINY


@pytest.fixture(scope="module", autouse=True)
def small_limits() -> Iterator[None]:
    """The machine's own limits, asked for in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "MATMUL", (8, 64, 96))
        patch.setattr(hardware, "READ_BYTES", 1 << 20)
        yield


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_tool("benchmark")


def test_reduction(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert benchmark.main(["--size", "tiny", "--repeat", "2", "--json", str(file)]) == 0
    text, content = capsys.readouterr().out, json.loads(file.read_text())
    rows = {(row["part"], row["setting"]): row for row in content["measurements"]}
    assert {part for part, _ in rows} == {"tower", "prefill", "decode"}
    for part in ("tower", "prefill", "decode"):
        assert rows[part, "none"]["ratio"] == 1
    # Bounds are those of another size, with more rounds.
    assert not any(row["verdict"] for row in rows.values())
    assert all(row["bound"] is None for row in rows.values())
    # 64 words, 4 layers of width 256 in 16 bit: 1024 bytes per position and layer.
    tokens = {"none": 4 * 640, "tome-72": 4 * 640, "tome-72-logical": 4 * 136}
    tokens |= {"fastv-50": 3 * 640 + 352, "hybrid-72-36": 3 * 136 + 100}
    for name, positions in tokens.items():
        assert rows["decode", name]["kv_bytes"] == 1024 * positions
        assert f"  {name} " in text
    assert rows["prefill", "hybrid-72-36"]["image_tokens"] == 72
    assert content["extrapolated_prefill_ratios"]["none"] == 1
    assert content["machine"]["torch"]


SECONDS = {("tower", "none"): 2.0, ("tower", "keep=144"): 1.5, ("tower", "keep=72"): 1.2}


def figure(benchmark: ModuleType, judged: bool = True) -> dict[str, Any]:
    row = Measurement(OURS, "tower", "keep=72", 1.2, (1.2, 1.2), (1.2,), None)
    found: dict[str, Any] = benchmark.make_figure(row, SECONDS, judged)
    return found


@pytest.mark.parametrize(
    ("against", "bound", "verdict"),
    [
        ("none", 0.65, "PASS: 0.60 of none, at most 0.65"),
        ("none", 0.55, "SHORT: 0.60 of none, at most 0.55"),
        ("keep=144", 0.85, "PASS: 0.80 of keep=144, at most 0.85"),
        ("keep=144", 0.75, "SHORT: 0.80 of keep=144, at most 0.75"),
    ],
)
def test_verdicts(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    against: str,
    bound: float,
    verdict: str,
) -> None:
    monkeypatch.setitem(benchmark.BOUNDS, ("tower", "keep=72"), (against, bound))
    found = figure(benchmark)
    assert (found["against"], found["bound"], found["verdict"]) == (against, bound, verdict)
    assert found["ratio"] == 0.6
    unjudged = figure(benchmark, judged=False)
    assert (unjudged["bound"], unjudged["verdict"], unjudged["ratio"]) == (None, "", 0.6)


@pytest.mark.parametrize("judged", [True, False])
def test_bounds_are_those_of_their_parts(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, judged: bool
) -> None:
    monkeypatch.setattr(hardware, "time_in_turns", lambda runs, *_: {key: [1.0] for key in runs})
    monkeypatch.setattr(hardware, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "extrapolate", lambda layers: {})
    model = open_model(Settings(size="tiny", layers=4))
    with torch.inference_mode():
        rows, _ = benchmark.measure_reduction(model, 1, judged)
    bounds = {(row["part"], row["setting"]): (row["against"], row["bound"]) for row in rows}
    found = {name: bound for name, bound in bounds.items() if bound != (None, None)}
    assert found == (benchmark.BOUNDS if judged else {})


@pytest.mark.parametrize(
    ("change", "judged"),
    [
        ("", True),
        ("--size tiny", False),
        ("--dtype float32", False),
        ("--dtype float16", False),
        ("--repeat 4", False),
        ("--repeat 5", True),
    ],
)
def test_bounds_hold_for_7b_in_bfloat16_on_a_cpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, change: str, judged: bool
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(benchmark, "open_model", lambda _: SimpleNamespace(config=TINY))
    monkeypatch.setattr(
        benchmark, "measure_reduction", lambda *args: seen.append(args[2]) or ([], {})
    )
    assert benchmark.main(change.split()) == 0
    assert seen == [judged]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device foo", "device 'foo' is not one of auto, cuda, mps, cpu"),
        ("--device cuda:99", "device 'cuda:99' is not available here"),
        ("--threads -1", "'-1' is not a number of at least 1"),
        ("--repeat 0", "'0' is not a number of at least 1"),
        ("--json /nowhere/at/all.json", "the folder /nowhere/at does not exist"),
        ("--dtype int8", "invalid choice: 'int8'"),
    ],
)
@pytest.mark.parametrize("what", ["reduction", "all"])
def test_bad_arguments_end_before_anything_slow(
    benchmark: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
    what: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--what", what, *arguments.split()])
    assert ended.value.code == 2
    assert message in (said := capsys.readouterr().err) and said.count("error:") == 1


@pytest.mark.parametrize("code", [0, 1])
def test_on_a_gpu_everything_runs_twice(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """Once more in compiled steps, unless the first run has failed."""
    asked: list[list[str]] = []
    monkeypatch.setattr(benchmark.cli, "main", lambda argv: asked.append(argv) or code)
    monkeypatch.setattr(benchmark, "pick_device", lambda name: name)
    monkeypatch.setattr(benchmark, "check_operator", lambda *_: None)
    file = tmp_path / "figures.json"
    arguments = ["--device", "cuda", "--dtype", "float16", "--json", str(file)]
    assert benchmark.main(arguments) == code
    plain = asked[0]
    assert plain[plain.index("--dtype") + 1] == "float16" and plain[-2:] == ["-o", str(file)]
    compiled = [*plain[:-2], "--compile", "-o", str(tmp_path / "figures-compiled.json")]
    assert asked == ([plain, compiled] if code == 0 else [plain])


@pytest.mark.parametrize(("bound", "code"), [(0.65, 0), (0.55, 1)])
def test_only_strict_runs_fail_beyond_a_bound(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, bound: float, code: int
) -> None:
    monkeypatch.setitem(benchmark.BOUNDS, ("tower", "keep=72"), ("none", bound))
    row = figure(benchmark)
    monkeypatch.setattr(benchmark, "measure_reduction", lambda *_: ([row], {}))
    assert benchmark.main(["--size", "tiny"]) == 0
    assert benchmark.main(["--size", "tiny", "--strict"]) == code


def test_every_layer_of_every_case_is_timed_in_turns(benchmark: ModuleType) -> None:
    model, token, ran = random_llava(), torch.tensor([[5]]), []

    def run(name: str) -> None:
        ran.append(name)
        model.prefill(token, None)

    cases = [Case(OURS, "prefill", name, partial(run, name)) for name in ("none", "tome-72")]
    with torch.inference_mode():
        rounds = benchmark.time_layers(model.decoder.layers, cases, 2)
    assert ran == ["none", "tome-72"] * 2 and set(rounds) == set(ran)
    for layers in (*rounds["none"], *rounds["tome-72"]):
        assert len(layers) == TINY_TEXT.num_layers and min(layers) > 0
    assert not any(layer._forward_hooks for layer in model.decoder.layers)


def test_extrapolation(benchmark: ModuleType) -> None:
    full, merged = [[1.0] * 4, [1.0] * 4], [[0.25] * 3 + [0.125]] * 2
    ratios = benchmark.extrapolate({"none": full, "tome-72": full, "hybrid-72-36": merged})
    assert ratios["none"] == ratios["tome-72"] == 1
    assert ratios["hybrid-72-36"] == (3 * 0.25 + 29 * 0.125) / 32


def test_too_few_layers_are_refused(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--layers", "3"])
    assert ended.value.code == 2
    assert "at least 4 layers" in capsys.readouterr().err


def test_all_is_the_whole_bench(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Settings] = []

    def stop(settings: Settings) -> Report:
        seen.append(settings)
        raise BenchError("seen enough")

    monkeypatch.setattr(bench, "bench", stop)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: object())
    asked = ["--what", "all", "--size", "tiny", "--device", "cpu", "--repeat", "3"]
    assert benchmark.main([*asked, "--json", str(tmp_path / "figures.json")]) == 1
    expected = Settings(None, seen[0].options, "tiny", None, "cpu", "bfloat16", None, 3)
    assert seen == [replace(expected, against=True, quantize="int4")]


def test_all_leaves_out_what_is_not_here(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(benchmark.cli, "main", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)

    def lacking(*_: object) -> None:
        raise ValueError("no operator")

    monkeypatch.setattr(benchmark, "check_operator", lacking)
    assert benchmark.main(["--what", "all", "--layers", "2", "--strict"]) == 0
    [words] = asked
    assert "--against" not in words and "--quantize" not in words
    assert words[words.index("--layers") + 1] == "2" and "--strict" in words
    assert "without transformers" in (said := capsys.readouterr().err)
    assert "without int4: no operator" in said
