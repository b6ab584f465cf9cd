"""Kernels for one row and for few: the same products, chosen by measurement."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import llava_lite
from helpers.models import TINY_CONFIG, random_llava
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.fast import kernels, timings
from llava_lite.fast.kernels import CLASSES, KERNELS, TRIED, Choice, ChosenLinear, choose_kernels
from llava_lite.fast.quantize import Int8DynamicLinear, QuantizedLinear, quantize
from llava_lite.fast.timings import Timings, cache_folder
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import FastV, Reduction

OTHERS = Choice(("mv", "weight first", "float32 blocks", "float32 blocks"))


def plain(
    width: int, out: int, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> nn.Linear:
    return nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timings, "cache_folder", cache_folder)  # the real one
    monkeypatch.setattr(timings, "MOST_DISTURBED", float("inf"))  # other tests run at the same time
    return tmp_path / "cache" / "llava_lite"


def seconds_of(choice: Choice) -> kernels.Times:
    """Times with which this is the choice."""
    return [
        {name: 1.0 if name == best else 2.0 for name in names}
        for names, best in zip(TRIED, choice.names, strict=True)
    ]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other kernels were the fastest, of small weights, too."""
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "time_kernels", lambda weights: seconds_of(OTHERS))


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (2, 96), (1, 5, 96), (40, 96), (70, 96)])
def test_products_are_the_same(
    dtype: torch.dtype, bias: bool, shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel that is tried for this number of rows, also with several blocks."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "BLOCK_WEIGHTS", 60 * 96)  # 60, 60, 60 and 20 of 200 rows
    layer, x = plain(96, 200, bias, dtype), torch.randn(shape).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    usual = (layer(x).double() - exact).abs().max()
    rows = x.numel() // 96
    [names] = [
        tried for tried, (most, _) in list(zip(TRIED, CLASSES, strict=True)) if rows <= most
    ][:1]
    for name in names:
        ours = ChosenLinear(layer, Choice((name,) * len(CLASSES)))(x)
        assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7)
        assert (ours.double() - exact).abs().max() <= 2 * usual + 1e-6, name


def test_no_rows() -> None:
    assert ChosenLinear(plain(96, 200), OTHERS)(torch.ones(0, 96).bfloat16()).shape == (0, 200)


def test_blocks_are_as_exact_as_float32() -> None:
    torch.manual_seed(0)
    layer, x = plain(96, 200), torch.randn(70, 96).bfloat16()
    ours = ChosenLinear(layer, OTHERS)(x)
    assert torch.equal(ours, F.linear(x.float(), layer.weight.float()).bfloat16())


def test_inputs_may_be_strided() -> None:
    for rows in (6, 70):
        layer, x = plain(96, 200), torch.randn(96, rows).bfloat16().T
        ours = ChosenLinear(layer, OTHERS)(x)
        torch.testing.assert_close(ours, layer(x), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("shape", [(96, 1), (1, 95), (192,), ()])
def test_other_widths_are_refused_as_ever(shape: tuple) -> None:
    layer, x = plain(96, 200), torch.ones(shape, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as usual:
        layer(x)
    with pytest.raises(RuntimeError) as ours:
        ChosenLinear(layer, OTHERS)(x)
    assert str(ours.value) == str(usual.value)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_state_dict_pre_hook",
    ],
)
def test_layers_with_hooks_stay(always: None, register: str) -> None:
    model = nn.Sequential(plain(32, 64), plain(64, 32), plain(32, 64))
    handle = getattr(model[0], register)(lambda *_: None)
    assert choose_kernels(model) == {"bfloat16 64 x 32": OTHERS, "bfloat16 32 x 64": OTHERS}
    assert [type(part) for part in model] == [nn.Linear, ChosenLinear, ChosenLinear]
    handle.remove()
    choose_kernels(model)
    assert type(model[0]) is ChosenLinear


def test_no_setting_of_the_process_changes() -> None:
    """Whether oneDNN is used is one, for all threads: it must stay as it is within every kernel."""
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(torch.backends.mkldnn.enabled)
            return func(*args, **(kwargs or {}))

    layer = plain(96, 200)
    for kernel in KERNELS.values():
        with Watching():
            kernel(layer.weight, torch.ones(1, 96, dtype=torch.bfloat16))
    assert seen and all(seen)


def test_rows_decide_about_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(name: str) -> kernels.Kernel:
        def call(weight: Tensor, x: Tensor) -> Tensor:
            calls.append((name, len(x)))
            return F.linear(x, weight)

        return call

    names = ("one", "few", "dozens", "many")
    for name in names:
        monkeypatch.setitem(KERNELS, name, counting(name))
    layer = ChosenLinear(plain(32, 64), Choice(names))
    for rows in (0, 1, 2, 8, 9, 64, 65, 600):
        layer(torch.ones(rows, 32, dtype=torch.bfloat16))
    assert calls == [
        *(("one", 1), ("few", 2), ("few", 8)),
        *(("dozens", 9), ("dozens", 64), ("many", 65), ("many", 600)),
    ]
    assert list(kernels.rows_of_classes()) == ["1", "2 to 8", "9 to 64", "65 or more"]


def test_weights_stay_the_same_and_can_be_cast(always: None) -> None:
    model = random_llava().bfloat16()
    before = model.state_dict()
    chosen = choose_kernels(model)
    assert len(chosen) == 8  # q k v o, gate and up, down, lm_head; q k v o, fc1, fc2; projector
    assert set(chosen.values()) == {OTHERS}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert isinstance(model.vision.blocks[0].mlp.fc1, ChosenLinear)
    x = torch.randn(1, 64)
    model.float()
    layer = model.decoder.layers[0].attn.q_proj
    assert isinstance(layer, ChosenLinear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


def test_a_model_answers_as_before(always: None, tiny_tokenizer: Tokenizer) -> None:
    """As near to float32 as before, up to the rounding of bfloat16."""
    model = Model(random_llava().bfloat16(), tiny_tokenizer)
    whole = Model(random_llava().bfloat16().float(), tiny_tokenizer)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)

    def rate(model: Model) -> torch.Tensor:
        scores = model.score([image, None], ["What is it?", "Who?"], ["ring", "star"])
        return torch.tensor([value for score in scores for value in score.token_logprobs])

    exact, before = rate(whole), rate(model)
    assert choose_kernels(model.llava)
    after = rate(model)
    assert not torch.equal(after, before)
    assert (after - exact).abs().max() < 1.5 * (before - exact).abs().max()


def test_the_fastest_of_each_kind_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    usual = Choice(("linear",) * len(CLASSES))
    best = {
        "bfloat16 64 x 32": OTHERS,
        "bfloat16 32 x 64": usual,
        "bfloat16 16 x 16": Choice(("mv", *["linear"] * 3)),
        "float16 16 x 16": Choice((*["linear"] * 3, "float32 blocks")),
    }
    asked = []

    def time_kernels(weights: list[Tensor]) -> kernels.Times:
        dtype, (rows, width) = str(weights[0].dtype).removeprefix("torch."), weights[0].shape
        asked.append((f"{dtype} {rows} x {width}", len(weights)))
        return seconds_of(best[asked[-1][0]])

    monkeypatch.setattr(kernels, "time_kernels", time_kernels)
    layers = [plain(32, 64), plain(64, 32), plain(16, 16), plain(16, 16, dtype=torch.float16)]
    model = nn.Sequential(*layers, plain(32, 64))
    expected = {kind: choice for kind, choice in best.items() if choice}
    assert choose_kernels(model) == expected
    assert asked == [(kind, 1 + (kind == "bfloat16 64 x 32")) for kind in best]
    found = [part.choice if isinstance(part, ChosenLinear) else usual for part in model]
    assert found == [*best.values(), OTHERS]
    assert choose_kernels(model) == {}  # what is chosen stays


def test_another_kernel_must_be_clearly_faster() -> None:
    times = [{"linear": 1.0, "mv": 0.98}, {"linear": 1.0, "mv": 0.96}, {"linear": 2.0, "mv": 3.0}]
    assert kernels.choose(times).names == ("linear", "mv", "linear")


@pytest.mark.parametrize("quick", TRIED[0])
def test_time_decides(monkeypatch: pytest.MonkeyPatch, quick: str) -> None:
    """The best round after a first one; a kernel that torch lacks is never chosen."""
    clock, calls = [0.0], dict.fromkeys(TRIED[0], 0)

    def timed(name: str) -> kernels.Kernel:
        def call(weight: Tensor, x: Tensor) -> Tensor:
            assert x.shape == (1, 32)
            calls[name] += 1
            late = 100.0 if calls[name] == 1 else 0.5 if calls[name] == 2 else 0.0
            clock[0] += late + (1.0 if name == quick else 1.2)
            return F.linear(x, weight)

        return call

    for name in TRIED[0]:
        monkeypatch.setitem(KERNELS, name, timed(name))
    monkeypatch.setattr(kernels, "perf_counter", lambda: clock[0])
    seconds = kernels.time_class(TRIED[0], [plain(32, 64).weight], 1)
    assert seconds == pytest.approx({name: 1.0 if name == quick else 1.2 for name in TRIED[0]})

    def missing(weight: Tensor, x: Tensor) -> Tensor:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setitem(KERNELS, "mv", missing)
    seconds = kernels.time_class(TRIED[0], [plain(32, 64).weight], 1)
    assert seconds["mv"] == float("inf") and kernels.choose([seconds]).names != ("mv",)


def test_a_hopeless_kernel_is_tried_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def time_once(way: Callable[[], object]) -> float:
        name = str(way())
        calls.append(name)
        return {"linear": 1.0, "mv": 2.9, "weight first": 3.1}[name]

    monkeypatch.setattr(kernels, "time_once", time_once)
    kernels.time_ways({name: partial(str, name) for name in TRIED[0]})
    assert calls == [*TRIED[0] * 3, *["linear", "mv"] * (kernels.ROUNDS - 2)]


def test_weights_of_a_timing_are_as_large_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "READ_WEIGHTS", 7 * 128)
    monkeypatch.setattr(kernels, "FEW_WEIGHTS", 2 * 128)
    monkeypatch.setattr(kernels, "MANY_WEIGHTS", 50)
    weights = [torch.full((8, 16), float(number)) for number in range(10)]
    sizes = {rows: [tuple(w.shape) for w in kernels.typical(weights, rows)] for rows in (1, 4, 24)}
    assert sizes == {1: [(8, 16)] * 7, 4: [(8, 16)] * 2, 24: [(3, 16)]}
    assert len(kernels.typical(weights[:1], 1)) == 1


def test_small_and_other_weights_keep_theirs() -> None:
    for layer in (
        plain(64, 64),
        nn.Linear(2048, 2048),
        nn.Linear(2048, 2048, device="meta", dtype=torch.bfloat16),
    ):
        assert choose_kernels(nn.Sequential(layer)) == {}


# ---- quantized layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize(
    ("codes", "blocks", "expected"),
    [
        ((1.0, 1.0, 1.0), "float32 blocks", (64, torch.float32)),
        ((1.0, 1.0, 3.0), "float32 blocks", (8, torch.float32)),
        ((1.0, 1.0, 3.0), "blocks", (8, None)),
        ((3.0, inf, inf), "blocks", (0, None)),
    ],
)
def test_quantized_layers_have_their_ways(
    method: str, codes: tuple, blocks: str, expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention follows the dtype of quantized layers, too."""
    times = [{"codes": seconds, blocks: 2.0} for seconds in codes]
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "time_kernels", lambda weights: seconds_of(OTHERS))
    monkeypatch.setattr(kernels, "time_quantized", lambda *_: times)
    monkeypatch.setattr(kernels, "time_attention", lambda *_: {"bfloat16": 1.0, "float32": 0.1})
    llava = random_llava().bfloat16()
    quantize(llava, method)
    kept = Int8DynamicLinear(Int8DynamicLinear.round(torch.ones(64, 64), torch.bfloat16))
    llava.add_module("dynamic", kept)
    choose_kernels(llava)
    layers = [part for part in llava.decoder.modules() if isinstance(part, QuantizedLinear)]
    assert layers and {(part.codes_rows, part.block_dtype) for part in layers} == {expected}
    assert (kept.codes_rows, kept.block_dtype) == (4, None)
    assert isinstance(llava.vision.blocks[0].mlp.fc1, ChosenLinear)
    assert llava.cache_dtype == torch.float32


@pytest.mark.parametrize("dtype", [*kernels.DTYPES, torch.float32])
def test_ways_are_timed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes until they lose, and the faster blocks."""
    asked, clock = [], {"codes": 1.0, "blocks": 2.0, "float32 blocks": 1.5}

    def time_ways(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        results = {name: way() for name, way in ways.items()}
        [rows] = {len(y) for y in results.values()}
        assert all(y.dtype == dtype for y in results.values())
        asked.append((rows, *ways))
        return {name: clock[name] * (rows if name == "codes" else 5) for name in ways}

    monkeypatch.setattr(kernels, "SAMPLE", (64, 64))
    monkeypatch.setattr(kernels, "time_ways", time_ways)
    times = kernels.time_quantized("int8", dtype)
    wide = "float32 blocks"
    both = [(1, wide, "codes"), (4, wide, "codes"), (24, wide, "codes")]
    assert asked == [(128, "blocks", wide), *both]
    assert kernels.best_ways(times) == (8, torch.float32)
    clock["codes"] = 100.0
    asked.clear()
    assert kernels.best_ways(kernels.time_quantized("int8", dtype)) == (0, torch.float32)
    assert asked[1:] == [(1, wide, "codes"), (4, wide), (24, wide)]


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"),
    [(1.0, 0.66, torch.float32), (1.0, 0.68, None), (1.0, 2.0, None)],
)
def test_float32_caches_must_be_worth_their_memory(
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Tokenizer,
    narrow: float,
    wide: float,
    expected: torch.dtype | None,
) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "time_kernels", lambda weights: seconds_of(OTHERS))
    seconds = {"bfloat16": narrow, "float32": wide}
    monkeypatch.setattr(kernels, "time_attention", lambda *_: seconds)
    llava = random_llava().bfloat16()
    choose_kernels(llava)
    assert llava.cache_dtype == (expected or torch.bfloat16)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    model = Model(llava, tiny_tokenizer)
    answer = model.generate(image, "What is it?", reduction="none", max_new_tokens=4, trace=True)
    text = llava.config.text
    positions = sum(answer.trace.positions_per_layer) if answer.trace else 0
    number = llava.cache_dtype.itemsize
    assert answer.trace and answer.trace.kv_bytes == 2 * positions * text.hidden_size * number


def test_both_dtypes_of_attention_are_timed() -> None:
    seconds = kernels.time_attention(torch.bfloat16, 4, 16)
    assert list(seconds) == ["bfloat16", "float32"] and min(seconds.values()) > 0


def test_attention_in_float32(tiny_tokenizer: Tokenizer) -> None:
    """Nearer to the whole model in float32; a cache in 16 bits can be continued; FastV scores it
    too."""
    torch.manual_seed(0)
    exact, llava = random_llava().bfloat16().float(), random_llava().bfloat16()
    ids, pixels = torch.randint(5, 60, (1, 9)), torch.randn(1, 3, 56, 56)
    ids[0, 4] = -200
    wish = Reduction(fastv=FastV(keep=5, layer=1))
    with torch.inference_mode():
        expected, _, _ = exact.prefill(ids, pixels, wish)
        before, narrow, position = llava.prefill(ids, pixels, wish)
        for layer in llava.decoder.layers:
            layer.attn.cache_dtype = torch.float32
        after, wide, _ = llava.prefill(ids, pixels, wish)
        assert {k.dtype for pair in wide for k in pair} == {torch.float32}
        assert after.dtype == before.dtype == torch.bfloat16
        assert (after - expected).norm() < 1.2 * (before - expected).norm()
        token = torch.tensor([7])
        on_wide, grown = llava.decode(token, position, wide)
        on_narrow, _ = llava.decode(token, position, narrow)
        assert {k.dtype for pair in grown for k in pair} == {torch.float32}
        torch.testing.assert_close(on_narrow, on_wide, atol=0.05, rtol=0.05)


# ---- kept times ----------------------------------------------------------------------------------


def test_times_are_kept(always: None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    first = choose_kernels(nn.Sequential(plain(32, 64)))
    [file] = folder.iterdir()
    monkeypatch.setattr(
        kernels, "time_kernels", lambda _: pytest.fail("nothing is left to measure")
    )
    assert choose_kernels(nn.Sequential(plain(32, 64))) == first
    content = json.loads(file.read_text())
    assert content["facts"]["torch"] == torch.__version__
    assert content["times"] == {"bfloat16 64 x 32": seconds_of(OTHERS)}


def test_a_model_without_memory_is_timed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 2 * 64 * 32)
    monkeypatch.setattr(kernels, "READ_WEIGHTS", 3 * 64 * 32)
    with torch.device("meta"):
        model = nn.Sequential(plain(32, 64), plain(64, 32), plain(32, 64), plain(8, 8))
    seen = []

    def time_kernels(weights: list[Tensor]) -> kernels.Times:
        seen.append([tuple(weight.shape) for weight in weights])
        assert all(weight.device.type == "cpu" and weight.all() for weight in weights)
        return seconds_of(OTHERS)

    monkeypatch.setattr(kernels, "time_kernels", time_kernels)
    found = kernels.time_model(model)
    assert list(found) == ["bfloat16 64 x 32", "bfloat16 32 x 64"]
    assert seen == [[(64, 32)] * 3, [(32, 64)] * 3]
    assert kernels.time_model(model) == found and len(seen) == 2
    assert kernels.time_model(model, again=True) == found and len(seen) == 4


@pytest.mark.parametrize(("others", "kept"), [(0.0, True), (0.09, True), (0.2, False)])
def test_disturbed_times_are_used_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, folder: Path, others: float, kept: bool
) -> None:
    """others: the share of all cores that other programs take while a timing takes ten seconds."""
    clock = [0.0]
    monkeypatch.setattr(timings, "MOST_DISTURBED", 0.1)
    monkeypatch.setattr(timings, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timings, "others_seconds", lambda: others * os.cpu_count() * clock[0])

    def measure() -> int:
        clock[0] += 10
        return 7

    with Timings.open() as opened:
        assert opened.get("a", measure) == 7
        assert opened.get("a", lambda: 8) == 7  # as long as the cache is open
    assert folder.exists() is kept
    monkeypatch.setattr(timings, "others_seconds", lambda: 0.0)
    with Timings.open() as opened:
        assert opened.get("b", lambda: 3) == 3
        assert opened.get("a", lambda: 8) == (7 if kept else 8)


def test_the_time_of_others_leaves_out_our_own() -> None:
    if not (timings.PROC / "stat").exists():
        pytest.skip("the system does not tell the time of all programs")
    before, own, wall = timings.others_seconds(), time.process_time(), time.perf_counter()
    while time.process_time() - own < 0.3:
        pass
    passed = time.perf_counter() - wall
    assert -0.1 <= timings.others_seconds() - before <= os.cpu_count() * passed - 0.2


@pytest.mark.parametrize("text", ["", "cpu", "cpu a b c", "intr 1"])
def test_a_system_that_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(timings, "PROC", tmp_path)
    assert timings.others_seconds() == 0
    (tmp_path / "stat").unlink()
    assert timings.others_seconds() == 0


@pytest.mark.parametrize(
    "fact", ["name", "flags", "threads", "torch", "numba", "format", "settings"]
)
def test_times_of_other_machines_are_not_used(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fact: str
) -> None:
    with Timings.open() as kept:
        assert kept.get("a", lambda: 1) == 1
    here = timings.machine_facts()
    monkeypatch.setattr(timings, "machine_facts", lambda: {**here, fact: "another"})
    with Timings.open() as kept:
        assert kept.get("a", lambda: 2) == 2
    assert len(list(folder.iterdir())) == 2  # and both are kept


def test_settings_of_libraries_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    here = timings.machine_facts()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert timings.machine_facts() != here


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"facts": 1}', '{"facts": null, "times": {"a": 3}}']
)
def test_a_damaged_file_is_replaced(folder: Path, text: str) -> None:
    with Timings.open() as kept:
        kept.get("a", lambda: 1)
    [file] = folder.iterdir()
    whole = file.read_text()
    file.write_text(text)
    with Timings.open() as kept:
        assert kept.get("a", lambda: 1) == 1
    assert file.read_text() == whole


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file, not a folder")
    with Timings.open() as kept:
        assert kept.get("a", lambda: 1) == 1


def test_loading_chooses(
    always: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object, tiny_tokenizer: Tokenizer
) -> None:
    folder = f"{tmp_path}/model"
    save_model(random_llava().bfloat16(), replace(TINY_CONFIG), folder, tiny_tokenizer)
    model = llava_lite.load(folder, device="cpu", dtype="bfloat16")
    assert isinstance(model.llava.decoder.lm_head, ChosenLinear)
    whole = llava_lite.load(folder, device="cpu", dtype="float32")
    assert type(whole.llava.decoder.lm_head) is nn.Linear
