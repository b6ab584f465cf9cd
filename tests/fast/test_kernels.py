"""Kernels for one row and for few: the same products, chosen by measurement."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import llava_lite
from helpers.models import TINY_CONFIG, random_llava
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.fast import kernels
from llava_lite.fast.kernels import (
    FEW,
    FEW_ROWS,
    ONE_ROW,
    Choice,
    ChosenLinear,
    Kernel,
    choose_kernels,
    matrix_vector,
    weight_first,
)
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer


def plain(width: int, out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, out, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


CHOICE = Choice(matrix_vector, weight_first)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other kernels were the fastest, of small weights, too."""
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "fastest", lambda linears, candidates, rows: candidates[0])


@pytest.mark.parametrize("one", ONE_ROW)
@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(96,), (1, 96), (1, 1, 96), (2, 96), (1, 5, 96), (32, 96), (40, 96), (0, 96)]
)
def test_products_are_the_same(one: Kernel, few: Kernel, bias: bool, shape: tuple) -> None:
    torch.manual_seed(0)
    layer = plain(96, 200, bias)
    x = torch.randn(shape).bfloat16()
    ours = ChosenLinear(layer, Choice(one, few))(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape and ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7)


def test_inputs_may_be_strided() -> None:
    layer, x = plain(96, 200), torch.randn(96, 6).bfloat16().T
    ours = ChosenLinear(layer, CHOICE)(x)
    torch.testing.assert_close(ours, layer(x), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("shape", [(96, 1), (1, 95), (192,), ()])
def test_other_widths_are_refused_as_ever(shape: tuple) -> None:
    layer, x = plain(96, 200), torch.ones(shape, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as usual:
        layer(x)
    with pytest.raises(RuntimeError) as ours:
        ChosenLinear(layer, CHOICE)(x)
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
    assert choose_kernels(model) == {(64, 32): CHOICE, (32, 64): CHOICE}
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
    for kernel in (*ONE_ROW, *FEW):
        with Watching():
            kernel(layer.weight, torch.ones(1, 96, dtype=torch.bfloat16))
    assert seen and all(seen)


def test_rows_decide_about_the_kernel() -> None:
    calls = []

    def counting(name: str) -> Kernel:
        def call(weight: Tensor, x: Tensor) -> Tensor:
            calls.append((name, len(x)))
            return F.linear(x, weight)

        return call

    layer = ChosenLinear(plain(32, 64), Choice(counting("one"), counting("few")))
    for rows in (0, 1, 2, 8, FEW_ROWS, FEW_ROWS + 1, 600):
        layer(torch.ones(rows, 32, dtype=torch.bfloat16))
    assert calls == [("one", 1), ("few", 2), ("few", 8), ("few", FEW_ROWS)]
    calls.clear()
    layer = ChosenLinear(plain(32, 64), Choice(None, counting("few")))
    for rows in (1, 2):
        layer(torch.ones(rows, 32, dtype=torch.bfloat16))
    assert calls == [("few", 2)]


def test_weights_stay_the_same_and_can_be_cast(always: None) -> None:
    model = random_llava().bfloat16()
    before = model.state_dict()
    chosen = choose_kernels(model.decoder)
    assert len(chosen) == 4  # q k v o, gate and up, down, lm_head
    assert set(chosen.values()) == {CHOICE}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert not any(isinstance(part, ChosenLinear) for part in model.vision.modules())
    x = torch.randn(1, 64)
    model.float()
    layer = model.decoder.layers[0].attn.q_proj
    assert isinstance(layer, ChosenLinear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


def test_a_model_answers_as_before(always: None, tiny_tokenizer: Tokenizer) -> None:
    model = Model(random_llava().bfloat16(), tiny_tokenizer)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    call = {
        "image": [image, None],
        "prompt": ["What is it?", "Who?"],
        "continuation": ["ring", "star"],
    }
    before = [score.token_logprobs for score in model.score(**call)]
    assert choose_kernels(model.llava.decoder)
    for score, expected in zip(model.score(**call), before, strict=True):
        assert score.token_logprobs == pytest.approx(expected, abs=0.05)


def test_the_fastest_of_each_shape_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    best = {
        (64, 32): CHOICE,
        (32, 64): Choice(None, None),
        (16, 16): Choice(matrix_vector, None),
        (8, 16): Choice(None, weight_first),
    }
    asked = []

    def fastest(linears: list[nn.Linear], candidates: object, rows: int) -> object:
        shape = tuple(linears[0].weight.shape)
        asked.append((shape, len(linears), rows))
        assert candidates is (ONE_ROW if rows == 1 else FEW)
        return best[shape].kernel(rows)

    monkeypatch.setattr(kernels, "fastest", fastest)
    model = nn.Sequential(*(plain(k, n) for n, k in (*best, (64, 32))))
    expected = {shape: choice for shape, choice in best.items() if choice}
    assert choose_kernels(model) == expected
    assert asked == [(shape, 2 if shape == (64, 32) else 1, n) for shape in best for n in (1, 8)]
    found = [
        part.choice if isinstance(part, ChosenLinear) else Choice(None, None) for part in model
    ]
    assert found == [*best.values(), CHOICE]
    assert choose_kernels(model) == {}  # what is chosen stays
    assert [type(part) for part in model].count(ChosenLinear) == 4


@pytest.mark.parametrize("quick", [*ONE_ROW, kernels.linear])
def test_time_decides(monkeypatch: pytest.MonkeyPatch, quick: Kernel) -> None:
    clock = [0.0]

    def timed(kernel: Kernel) -> Kernel:
        def call(weight: Tensor, x: Tensor) -> Tensor:
            assert x.shape == (1, 32)
            clock[0] += 1.0 if kernel is quick else 1.2
            return kernel(weight, x)

        return call

    wrapped = {kernel: timed(kernel) for kernel in (kernels.linear, *ONE_ROW)}
    monkeypatch.setattr(kernels, "linear", wrapped[kernels.linear])
    monkeypatch.setattr(kernels, "perf_counter", lambda: clock[0])
    candidates = [wrapped[kernel] for kernel in ONE_ROW]
    found = kernels.fastest([plain(32, 64), plain(32, 64)], candidates, 1)
    assert found is (None if quick not in ONE_ROW else wrapped[quick])


def test_small_and_other_weights_keep_theirs() -> None:
    for layer in (
        plain(64, 64),
        nn.Linear(2048, 2048),
        nn.Linear(2048, 2048, device="meta", dtype=torch.bfloat16),
        nn.Linear(2048, 2048, dtype=torch.float16),
    ):
        assert choose_kernels(nn.Sequential(layer)) == {}


def test_loading_chooses(
    always: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object, tiny_tokenizer: Tokenizer
) -> None:
    folder = f"{tmp_path}/model"
    save_model(random_llava().bfloat16(), replace(TINY_CONFIG), folder, tiny_tokenizer)
    model = llava_lite.load(folder, device="cpu")
    assert isinstance(model.llava.decoder.lm_head, ChosenLinear)
    whole = llava_lite.load(folder, device="cpu", dtype="float32")
    assert type(whole.llava.decoder.lm_head) is nn.Linear
