"""The two roads side by side: every setting of every model, tower and prefill apart. No figure of
time is asserted."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from helpers.fastvlm import TINY_FASTVLM
from helpers.models import load_tool
from llava_lite.bench import models
from llava_lite.config import LLAVA_1_5_7B, TINY
from llava_lite.llama import DecoderLayer
from llava_lite.reduction import FastV, Reduction, ToMe

NAMES = ("tiny", "fastvlm-0.5b")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with a tiny model in the place of FastVLM-0.5B."""
    monkeypatch.setitem(models.SIZES, "fastvlm-0.5b", TINY_FASTVLM)
    return load_tool("benchmark_roads")


def test_both_roads_are_measured(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "roads.json", tmp_path / "roads.png"
    words = ["--sizes", *NAMES, "--image-sizes", "256", "512", "--reductions", "none"]
    words += ["folded-144-36", "--layers", "5", "--repeat", "1", "--dtype", "float32"]
    assert tool.main([*words, "--json", str(file), "--plot", str(plot)]) == 0
    content, shown = json.loads(file.read_text()), capsys.readouterr()
    rows = [(row["model"], row["image_size"], row["reduction"]) for row in content["rows"]]
    assert rows == [
        *((TINY.name, 336, name) for name in ("none", "folded-144-36")),
        *((TINY_FASTVLM.name, size, "none") for size in (256, 512)),
    ]
    assert [row["tokens"] for row in content["rows"]] == [[576], [144, 48, 36], [16], [64]]
    layers = [(row["measured_layers"], row["layers"]) for row in content["rows"]]
    assert layers == [(5, 6), (5, 6), (3, 3), (3, 3)]
    assert all(row["tower"] > 0 for row in content["rows"])
    assert content["machine"]["torch"] and content["dtype"] == "float32"
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == [TINY.name] * 2
    assert all(" * " in line for line in lines[3:5])
    assert f"* {TINY.name}: 5 of 6 decoder layers measured, the others extrapolated" in lines
    assert shown.out.count("*") == 3
    assert "tiny: 5 decoder layers" in shown.err
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"


def test_a_shallow_prefill_runs_the_first_layers(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.open_model(models.Settings(size="tiny", dtype="float32"))
    layers, seen = model.llava.decoder.layers, []
    monkeypatch.setattr(model, "advance", lambda _: seen.append(model.llava.decoder.layers))
    tool.prefill_shallow(model, None, 4)
    assert list(seen[0]) == list(layers)[:4]
    assert model.llava.decoder.layers is layers
    assert all(isinstance(layer, DecoderLayer) for layer in layers) and len(layers) == 6


def test_layers_behind_the_last_pruning_are_extrapolated(tool: ModuleType) -> None:
    """4 layers take 10 s, each later one 2 s."""
    assert tool.extrapolate({"prefill": 18.0, "base": 10.0}, 8, 32) == 66.0
    assert tool.extrapolate({"prefill": 18.0}, 8, 8) == 18.0


def test_the_presets_prune_within_the_base(tool: ModuleType) -> None:
    for name in tool.REDUCTIONS:
        fastv = Reduction.of(name).fastv
        assert fastv is None or max(fastv.amounts) < tool.BASE_LAYERS


def test_tokens_after_every_pruning(tool: ModuleType) -> None:
    wish = Reduction(ToMe(keep=20), fastv=FastV(stages=((1, 30), (2, 0.5))))
    assert tool.count_tokens(20, wish) == (20, 20, 10)
    assert tool.count_tokens(20, Reduction()) == (20,)


@pytest.mark.parametrize(
    ("free", "wish", "expected"),
    [(1 << 40, None, 32), (None, None, 32), (15 << 30, None, 8), (1, 12, 12), (1, 99, 32)],
)
def test_layers_that_fit(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    wish: int | None,
    expected: int,
) -> None:
    monkeypatch.setattr(tool, "free_bytes", lambda _: free)
    assert tool.choose_layers(LLAVA_1_5_7B, wish, "bfloat16", "cpu") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "4"], "--layers 4: must be above 4, to extrapolate"),
        (["--image-sizes", "300"], "image_size 300 must be a multiple of 64"),
        (["--reductions", "dymu-72"], "no thresholds of its own"),
        (["--plot", "roads.svg"], "ends in .png"),
        (["--json", "nowhere/roads.json"], "nowhere"),
    ],
)
def test_bad_arguments_are_told_first(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--sizes", *NAMES, *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err
