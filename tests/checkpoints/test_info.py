"""`llava-lite info`: what is in a model, and what it needs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.models import ROOT, TINY_CONFIG, random_llava
from llava_lite.checkpoints import info
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.info import TensorInfo
from llava_lite.cli import info_text
from llava_lite.cli.program import main
from llava_lite.config import PRESETS
from llava_lite.fast import kernels
from llava_lite.generation.model import Model
from llava_lite.reduction import REDUCTIONS, FastV, Reduction


def test_counts_are_those_of_the_model(model_folder: Path, tiny_model: Model) -> None:
    described = info.describe_source(model_folder)
    weights = dict(tiny_model.llava.named_parameters())
    assert {t.name: t.shape for t in described.tensors} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    assert {tensor.dtype for tensor in described.tensors} == {"float32"}
    for part in ("vision", "projector", "decoder"):
        module = getattr(tiny_model.llava, part)
        assert described.parameters[part] == sum(p.numel() for p in module.parameters())
    assert described.parameters["total"] == sum(weight.numel() for weight in weights.values())


def test_memory_is_that_of_real_tensors(model_folder: Path, tiny_model: Model) -> None:
    memory = info.describe_source(model_folder).memory["float32"]
    assert memory["weights"] == sum(p.nbytes for p in tiny_model.llava.parameters())
    _, cache, position = tiny_model.prefill(torch.tensor([[1, 5, 6]]), None)
    assert position == 3
    assert 3 * memory["kv_cache_per_token"] == sum(k.nbytes + v.nbytes for k, v in cache)
    context = TINY_CONFIG.text.max_positions
    assert memory["kv_cache_full_context"] == context * memory["kv_cache_per_token"]


def test_published_sizes() -> None:
    """Weights that run: CLIP-L/336's 23 blocks, the projector, Llama-2."""
    small, large = (info.describe_preset(f"llava-1.5-{size}").parameters for size in ("7b", "13b"))
    assert small["decoder"] == 6_738_415_616
    assert large["decoder"] == 13_015_864_320
    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert small["vision"] == 1024 * (1 + 577 + 3 * 14 * 14 + 2) + 23 * block
    assert small["projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    cache = info.describe_preset("llava-1.5-7b").memory["bfloat16"]["kv_cache_per_token"]
    assert cache == 512 * 1024


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="llava-1.5-7b"):
        info.describe_preset("llava-2")


def test_llava_hf_folder_needs_no_conversion(model_folder: Path, tmp_path: Path) -> None:
    convert(model_folder, tmp_path / "hf", to="hf", dtype="float16")
    described = info.describe_source(tmp_path / "hf")
    assert described.layout == "llava-hf, old names"
    assert described.dtypes == ["float16"]
    own = info.describe_source(model_folder).parameters
    assert described.parameters["vision"] == own["vision"]


def test_equal_blocks_stand_in_one_line() -> None:
    tensors = [TensorInfo(f"decoder.layers.{n}.norm", (4,), "float32") for n in (0, 1, 2, 5)]
    tensors.append(TensorInfo("decoder.layers.3.norm", (8,), "float32"))
    names = [info_text.group_name(group) for group in info_text.group_blocks(tensors)]
    assert names == ["decoder.layers.{0..2,5}.norm", "decoder.layers.3.norm"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")]
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert info.format_bytes(count) == text


# ---- command line ------------------------------------------------------------------------------


def test_text_names_every_part(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model_folder)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in (
        "llava_lite, float32",
        "4 x 4 = 16 image tokens; 2 of 3 blocks run, 48 wide",
        "3 layers, 64 wide, 4 heads of 16, vocabulary 320",
        "512 tokens",
        "vicuna_v1, images padded to a square",
        "decoder.layers.{0..2}.attn.q_proj.weight",
    ):
        assert text in printed.out
    assert max(map(len, printed.out.splitlines())) <= 110


def test_tensors_lists_each(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model_folder), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for tensor in info.describe_source(model_folder).tensors:
        assert sum(line.split()[:1] == [tensor.name] for line in lines) == 1


def test_json(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model_folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["config"]["text"]["hidden_size"] == 64
    assert content["image_tokens"] == 16
    total = sum(math.prod(tensor["shape"]) for tensor in content["tensors"])
    assert content["parameters"]["total"] == total


def test_thresholds_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    save_model(random_llava(), TINY_CONFIG, folder)
    file = folder / "thresholds.json"
    for content, value, line in (
        (None, None, "none: dymu-72 and --merge dtome need some (llava-lite thresholds)"),
        ([0.9, 0.5], [0.9, 0.5], "2, used by dymu-72 and --merge dtome"),
    ):
        if content:
            file.write_text(json.dumps(content))
        assert main(["info", str(folder)]) == 0
        assert f"\n  thresholds {line}\n" in capsys.readouterr().out
        assert main(["info", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["thresholds"] == value
    file.write_text("[0.9]")  # of another tower
    assert main(["info", str(folder)]) == 0
    assert f"\n  thresholds unusable: {file}: holds 1 thresholds" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["thresholds"] is None and content["thresholds_error"].startswith(str(file))
    assert main(["info", "llava-1.5-7b"]) == 0  # sizes alone have none, nor lack any
    assert "thresholds" not in capsys.readouterr().out


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--presets"]) == 0
    printed = capsys.readouterr().out
    for name in PRESETS:
        assert f"\n{name} " in f"\n{printed}"
    table, legend = printed.split("\n\n")[1:]
    titles, *lines = table.splitlines()
    assert titles.split() == ("reduction merge positions fastv work KV cache right purpose".split())
    assert legend.startswith("work: the share that is left of the decoder's prefill.")
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == list(REDUCTIONS) == list(info_text.PURPOSES)
    for name, parts in (
        ("none", "- - - 100 % 320 MiB {} plain LLaVA"),
        ("folded-72", "keep 72 folded - 21 % 68 MiB {} merge only"),
        (
            "folded-144-36",
            "keep 144 folded fold to 48 from layer 1, 36 from 3 16 % 52 MiB {} try this first",
        ),
        ("fastv-72-folded", "- folded fold to 72 from layer 3 28 % 92 MiB {} fold only"),
        ("tome-72", "keep 72 vtu - 23 % 320 MiB {} merge, unmerge"),
        ("dymu-72", "dynamic vtu - {} few for plain images"),
        ("fastv-50", "- - drop 50 % from layer 3 59 % 190 MiB {} prune only"),
        ("hybrid-vtu-72-36", "keep 72 vtu keep 36 from layer 3 {} merge, unmerge, drop"),
    ):
        facts = parts.format(f"{info_text.RIGHT[name]:.1f} %")
        assert " ".join(rows[name].split()) == f"{name} {facts}"
    assert max(map(len, printed.splitlines())) <= 120


def test_presets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--presets", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["models"]) == list(PRESETS)
    for name, parts in content["reductions"].items():
        assert parts.pop("purpose") == info_text.PURPOSES[name]
        assert parts.pop("right_answers") == info_text.RIGHT[name]
        cost = parts.pop("prefill_work"), parts.pop("kv_cache_bytes")
        assert (cost == (None, None)) == (name in ("dymu-72", "hybrid-vtu-72-36"))
        assert set(parts) == set(Reduction.__dataclass_fields__)
    pruned = content["reductions"]["folded-144-36"]
    assert pruned["merge"]["keep"] == 144
    assert pruned["fastv"]["stages"] == [[1, 48], [3, 36]] and pruned["fastv"]["rest"] == "fold"


def test_cost_of_a_preset_of_reduction() -> None:
    """By hand: 208 rows in layer 0, 112 in layers 1 and 2, then 100. A row in a layer costs four
    projections, an MLP of three matrices, and attention; its keys and values have 16 KiB."""
    width, mlp = 4096, 11008

    def layer(rows: int) -> int:
        return rows * (4 * width**2 + 3 * width * mlp) + 2 * rows**2 * width

    cost = info_text.estimate_cost(REDUCTIONS["folded-144-36"])
    work = layer(208) + 2 * layer(112) + 29 * layer(100)
    assert cost["prefill_work"] == pytest.approx(work / (32 * layer(640)), abs=5e-5)
    assert cost["kv_cache_bytes"] == (208 + 2 * 112 + 29 * 100) * 16 * 1024


@pytest.mark.parametrize(
    ("fastv", "words"),
    [
        (FastV(stages=((1, 9), (2, 0.5))), "keep 9 from layer 1, 50 % from 2"),
        (FastV(drop=0.125, rest="fold"), "fold 12.5 % from layer 3"),
    ],
)
def test_stages_in_words(fastv: FastV, words: str) -> None:
    assert info_text.describe_fastv(fastv) == words


def test_an_architecture_alone_has_no_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "llava-1.5-13b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] is None


def test_default_model_is_that_of_the_environment(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_LITE_MODEL", str(model_folder))
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == str(model_folder)


def test_checksums(tmp_path: Path, tiny_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    save_model(tiny_model.llava, tiny_model.config, folder)
    assert main(["info", str(folder), "--checksums", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["verified_tensors"] == len(content["tensors"])

    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["decoder.norm.weight"][3] += 1
    save_file(tensors, file)
    assert main(["info", str(folder), "--checksums"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "model.safetensors" in printed.err and "'decoder.norm.weight'" in printed.err


def test_checksums_need_a_manifest(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(model_folder, tmp_path / "hf", to="hf")
    assert main(["info", str(tmp_path / "hf"), "--checksums"]) == 1
    assert "no manifest.json" in capsys.readouterr().err
    assert main(["info", "llava-1.5-7b", "--checksums"]) == 1
    assert "no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "shape"])
def test_damaged_checkpoints(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    llava = random_llava()
    config = TINY_CONFIG
    if damage == "shape":
        config = replace(config, text=replace(config.text, intermediate_size=97))
    save_model(llava, config, folder)
    file = folder / "model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    assert main(["info", str(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {file}") and printed.err.count("\n") == 1


def test_no_such_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", str(tmp_path / "absent" / "model")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_right_answers_are_those_of_the_study() -> None:
    """The study has another name for every preset."""
    with (ROOT / "docs" / "study" / "study.csv").open(encoding="utf-8") as file:
        accuracy = {row["configuration"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    names = {
        "none": "none",
        "folded-72": "tome-72-folded",
        "folded-144-72": "hybrid-144-k1-72-folded",
        "folded-144-36": "stages-144-48-36-folded",
        "folded-72-36": "hybrid-72-36-folded",
        "folded-72-36-18": "stages-72-36-18-folded",
        "folded-72-18-9": "stages-72-18-9-folded",
        "fastv-72-folded": "fastv-k3-72-folded",
        "tome-72": "tome-72-vtu",
        "tome-72-logical": "tome-72-logical",
        "dymu-72": "dtome-72-vtu",
        "fastv-50": "fastv-k3-288",
        "hybrid-72-36": "hybrid-72-36-logical",
        "hybrid-vtu-72-36": "hybrid-72-36-vtu",
    }
    assert {name: round(100 * accuracy[there], 1) for name, there in names.items()} == (
        info_text.RIGHT
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for name, right in info_text.RIGHT.items():
        [line] = [line for line in readme if line.startswith(f"| `{name}` |")]
        assert line.endswith(f"| {right} % |")


def test_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Chosen kernels with their share of torch's time, and the kept times as JSON."""
    one = {"linear": 2.0, "mv": 1.0, "weight first": 3.0}
    others = [{"linear": 1.0, "float32 blocks": share} for share in (0.99, 0.5, 0.25)]
    times = {
        "bfloat16 4096 x 4096": [one, *others],
        "bfloat16 attention, heads of 128": {"bfloat16": 0.002, "float32": 0.0005},
        "int4 in bfloat16": [
            {"codes": 1.0, "blocks": 2.0},
            {"codes": 3.0, "blocks": 2.0},
            {"codes": math.inf, "blocks": 2.0},
        ],
    }
    asked = []

    def time_model(module: nn.Module, again: bool) -> dict[str, Any]:
        assert next(module.parameters()).is_meta
        asked.append(again)
        return times

    monkeypatch.setattr(kernels, "time_model", time_model)
    assert main(["info", "--machine"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith(f"torch {torch.__version__}")
    assert "4096 x 4096  mv 0.50  linear       float32 blocks 0.50  float32 blocks 0.25" in printed
    assert "heads of 128, one query: bfloat16 2.00 ms, float32 0.50 ms" in printed
    assert (
        "int4 in bfloat16: codes for 1 rows at most, else weights written in the model's" in printed
    )
    assert main(["info", "--machine", "--again", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["seconds"].keys() == times.keys() and content["flags"] is not None
    assert asked == [False, True]


def test_again_goes_with_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--again"]) == 1
    assert "--again goes with --machine" in capsys.readouterr().err
