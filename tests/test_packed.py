"""Packed weights: the same products from weights in another order."""

import pytest
import torch
from conftest import random_llava
from torch import nn

from llava_lite import packed
from llava_lite.generation import Model
from llava_lite.packed import PackedLinear, can_pack, pack
from llava_lite.tokenizer import Tokenizer

needs_onednn = pytest.mark.skipif(
    not can_pack(torch.empty(1, dtype=torch.bfloat16)), reason="no oneDNN with bfloat16 here"
)


def linear(width: int, out: int, bias: bool) -> nn.Linear:
    return nn.Linear(width, out, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 640])
def test_products_are_the_same(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain = linear(96, 200, bias)
    x = torch.randn(rows, 96, dtype=torch.bfloat16)
    ours = PackedLinear(plain)(x)
    exact = x.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.to(torch.bfloat16), rtol=2**-7, atol=2**-8)
    batched = PackedLinear(plain)(x.view(1, rows, 96))
    assert torch.equal(batched[0], ours)


@needs_onednn
def test_the_state_dict_is_that_of_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "is_faster", lambda *_: True)
    model = random_llava().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert pack(model, (1,)) == len(linears) > 20
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_onednn
def test_a_packed_model_answers_as_before(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    plain = Model(random_llava().bfloat16(), tiny_tokenizer)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    call = {"image": image, "prompt": "What is it?", "continuation": "red ring"}
    before = plain.score(**call).token_logprobs
    monkeypatch.setattr(packed, "is_faster", lambda *_: True)
    assert pack(plain.llava, (1,))
    assert plain.score(**call).token_logprobs == pytest.approx(before, abs=0.05)


@needs_onednn
def test_only_what_is_faster_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once for each shape, and in no other."""
    model = nn.Sequential(linear(32, 64, True), linear(64, 32, True), linear(32, 64, True))
    seen = []

    def is_faster(linear: nn.Linear, rows: tuple[int, ...]) -> bool:
        seen.append((linear.out_features, linear.in_features, rows))
        return linear.out_features == 64

    monkeypatch.setattr(packed, "is_faster", is_faster)
    assert pack(model, (1, 9)) == 2
    assert seen == [(64, 32, (1, 9)), (32, 64, (1, 9))]
    assert [type(module) for module in model] == [PackedLinear, nn.Linear, PackedLinear]


@needs_onednn
def test_faster_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {PackedLinear: 1.0, nn.Linear: 1.0}
    calls = []

    def fastest(call: object) -> float:
        calls.append(call)
        return times[PackedLinear if len(calls) % 2 == 0 else nn.Linear]

    monkeypatch.setattr(packed, "fastest", fastest)
    assert not packed.is_faster(linear(32, 64, True), (1, 8))
    times[PackedLinear] = 0.9
    assert packed.is_faster(linear(32, 64, True), (1, 8))
    assert len(calls) == 8


@needs_onednn
def test_packed_weights_stay_as_they_are() -> None:
    layer = PackedLinear(linear(32, 64, True))
    layer.to("cpu").to(torch.bfloat16)
    for move in (layer.float, layer.half, lambda: layer.to("meta")):
        with pytest.raises(RuntimeError, match="packed weights stay on the CPU in their dtype"):
            move()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_nothing_else_is_packed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 64, dtype=dtype))
    assert pack(model, (1,)) == 0
    assert pack(nn.Sequential(nn.Linear(32, 64, device="meta", dtype=torch.bfloat16)), (1,)) == 0
    assert type(model[0]) is nn.Linear
