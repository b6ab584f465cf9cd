"""Kernels for one row: the same products, chosen by measurement."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import TINY_CONFIG, random_llava
from torch import Tensor, nn
from torch.nn import functional as F

import llava_lite
from llava_lite import kernels
from llava_lite.checkpoint import save_model
from llava_lite.generation import Model
from llava_lite.kernels import KERNELS, RowLinear, choose_kernels
from llava_lite.tokenizer import Tokenizer


def plain(width: int, out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, out, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@pytest.fixture
def always_mv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the matrix-vector kernel were the fastest, of small weights, too."""
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "fastest", lambda linears: torch.mv)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (2, 96), (1, 5, 96), (0, 96)])
def test_products_are_the_same(
    kernel: Callable[[Tensor, Tensor], Tensor], bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = plain(96, 200, bias)
    x = torch.randn(shape).bfloat16()
    ours = RowLinear(layer, kernel)(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7)


def test_only_one_row_takes_the_kernel() -> None:
    calls = []

    def kernel(weight: Tensor, x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return torch.mv(weight, x)

    layer = RowLinear(plain(32, 64), kernel)
    for rows in (1, 2, 8, 1):
        layer(torch.ones(rows, 32, dtype=torch.bfloat16))
    assert calls == [(32,)] * 2


def test_weights_stay_the_same_and_can_be_cast(always_mv: None) -> None:
    model = random_llava().bfloat16()
    before = model.state_dict()
    chosen = choose_kernels(model.decoder)
    assert len(chosen) == 4  # q k v o, gate and up, down, lm_head
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert not any(isinstance(part, RowLinear) for part in model.vision.modules())
    x = torch.randn(1, 64)
    model.float()
    layer = model.decoder.layers[0].attn.q_proj
    assert isinstance(layer, RowLinear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


def test_a_model_answers_as_before(always_mv: None, tiny_tokenizer: Tokenizer) -> None:
    model = Model(random_llava().bfloat16(), tiny_tokenizer)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    call = {"image": image, "prompt": "What is it?", "continuation": "ring"}
    before = model.score(**call).token_logprobs
    assert choose_kernels(model.llava.decoder)
    assert model.score(**call).token_logprobs == pytest.approx(before, abs=0.05)


def test_the_fastest_of_each_shape_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 1)
    best = {(64, 32): torch.mv, (32, 64): None, (16, 16): kernels.linear_without_onednn}
    asked = []

    def fastest(linears: list[nn.Linear]) -> object:
        shape = tuple(linears[0].weight.shape)
        asked.append((shape, len(linears)))
        return best[shape]

    monkeypatch.setattr(kernels, "fastest", fastest)
    model = nn.Sequential(plain(32, 64), plain(64, 32), plain(32, 64), plain(16, 16))
    assert choose_kernels(model) == {key: kernel for key, kernel in best.items() if kernel}
    assert asked == [((64, 32), 2), ((32, 64), 1), ((16, 16), 1)]
    found = [part.kernel if isinstance(part, RowLinear) else None for part in model]
    assert found == [torch.mv, None, torch.mv, kernels.linear_without_onednn]
    assert choose_kernels(model) == {}  # what is chosen stays
    assert [type(part) for part in model].count(RowLinear) == 3


@pytest.mark.parametrize("quick", [*KERNELS, kernels.linear])
def test_time_decides(monkeypatch: pytest.MonkeyPatch, quick: kernels.Kernel) -> None:
    clock = [0.0]

    def timed(kernel: kernels.Kernel) -> kernels.Kernel:
        def call(weight: Tensor, x: Tensor) -> Tensor:
            clock[0] += 1.0 if kernel is quick else 1.2
            return kernel(weight, x)

        return call

    wrapped = {kernel: timed(kernel) for kernel in (kernels.linear, *KERNELS)}
    monkeypatch.setattr(kernels, "linear", wrapped[kernels.linear])
    monkeypatch.setattr(kernels, "KERNELS", tuple(wrapped[kernel] for kernel in KERNELS))
    monkeypatch.setattr(kernels, "perf_counter", lambda: clock[0])
    found = kernels.fastest([plain(32, 64), plain(32, 64)])
    expected = None if quick not in KERNELS else wrapped[quick]
    assert found is expected


def test_small_and_other_weights_keep_theirs() -> None:
    for layer in (
        plain(64, 64),
        nn.Linear(2048, 2048),
        nn.Linear(2048, 2048, device="meta", dtype=torch.bfloat16),
        nn.Linear(2048, 2048, dtype=torch.float16),
    ):
        assert choose_kernels(nn.Sequential(layer)) == {}


def test_loading_chooses(
    always_mv: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object, tiny_tokenizer: Tokenizer
) -> None:
    folder = f"{tmp_path}/model"
    save_model(random_llava().bfloat16(), replace(TINY_CONFIG), folder, tiny_tokenizer)
    model = llava_lite.load(folder, device="cpu")
    assert isinstance(model.llava.decoder.lm_head, RowLinear)
    whole = llava_lite.load(folder, device="cpu", dtype="float32")
    assert type(whole.llava.decoder.lm_head) is nn.Linear
