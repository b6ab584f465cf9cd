"""The curve of rows: every format and number of rows, and the verdict on its rises."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from helpers.models import load_tool
from llava_lite.fast import kernels
from llava_lite.fast.quantize import METHODS, QuantizedLinear


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("benchmark_rows")


def test_every_format_is_timed_for_all_rows(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    words = ["--out", "64", "--width", "64", "--repeat", "1", "--json", str(file)]
    assert tool.main(words) == 0
    content, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert list(content["seconds"]) == list(tool.FORMATS) == list(content["rises"])
    assert content["rows"] == list(tool.ROWS)
    assert all(
        len(curve) == len(tool.ROWS) and min(curve) > 0 for curve in content["seconds"].values()
    )
    table = printed.split("\n\n")[1].splitlines()
    assert table[1].split() == ["rows", *tool.FORMATS]
    assert [line.split()[0] for line in table[2:]] == [str(rows) for rows in tool.ROWS]


@pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "int4"])
def test_layers_multiply_as_in_a_loaded_model(
    tool: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    times = [{"linear": 2.0, best: 1.0} for best in ("mv", *["float32 blocks"] * 3)]
    monkeypatch.setattr(kernels, "time_kernels", lambda weights: times)
    codes = [{"codes": 1.0, "float32 blocks": 2.0}]
    monkeypatch.setattr(kernels, "time_quantized", lambda *_: codes)
    [layer] = tool.make_layer(name, 64, 32)
    expected = METHODS.get(name) or (kernels.ChosenLinear if name == "bfloat16" else nn.Linear)
    assert type(layer) is expected
    if isinstance(layer, QuantizedLinear):
        assert (layer.codes_rows, layer.block_dtype) == (1, torch.float32)


def test_rises_are_judged_per_row(tool: ModuleType) -> None:
    """Equal times per row rise by 1; a kernel that takes over badly is found where it does."""
    flat = [0.5 * rows for rows in tool.ROWS]
    assert tool.find_rise(flat)[0] == 1
    place = tool.ROWS.index(33)
    cliff = [*flat[:place], 2 * flat[place], *(2 * value for value in flat[place + 1 :])]
    assert tool.find_rise(cliff) == (2, 33)
    assert tool.judge(1.5, 4).startswith("PASS: 1.50 at 4 rows")
    assert tool.judge(1.51, 4).startswith("SHORT")


@pytest.mark.parametrize(("highest", "code"), [(1e9, 0), (0.0, 1)])
def test_only_strict_runs_fail(
    tool: ModuleType, highest: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "HIGHEST_RISE", highest)
    words = ["--out", "64", "--width", "64", "--repeat", "1", "--formats", "float32"]
    assert tool.main(words) == 0
    assert tool.main([*words, "--strict"]) == code


def test_a_file_that_cannot_be_written_is_told_first(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--json", str(tmp_path / "nowhere" / "rows.json")])
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err
