"""Quantized weights: how far they are off, that both ways to multiply by them agree, and that a
model rounded while loading is the one that a converted folder holds.

Run: pytest tests/fast/test_quantize.py
"""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import llava_lite
from helpers.examples import examples
from helpers.models import ROOT, TINY_CONFIG, random_llava
from llava_lite.checkpoints import source as sources
from llava_lite.checkpoints import tensors as sources_tensors
from llava_lite.checkpoints.checkpoint import load_model, load_source, save_model, verify_folder
from llava_lite.checkpoints.convert import METHODS as OFFERED
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.info import describe_source
from llava_lite.checkpoints.opening import open_source
from llava_lite.cli.info_text import format_info
from llava_lite.cli.program import main
from llava_lite.config import LLAVA_1_5_7B, LlavaConfig, TextConfig
from llava_lite.errors import CheckpointError
from llava_lite.evaluation.scenes.accuracy import answer_questions, fresh_scenes
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.fast import kernels
from llava_lite.fast import quantize as module
from llava_lite.fast.quantize import (
    METHODS,
    Int4Linear,
    Int8DynamicLinear,
    Int8Linear,
    Levels,
    OldInt4Linear,
    QuantizedLinear,
    quantize,
)
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import Llava

CPU = torch.device("cpu")
KINDS = [Int8Linear, Int4Linear]  # they round weights only, so their results are exact
HAS_NUMBA = pytest.mark.skipif(find_spec("numba") is None, reason="numba is in the extra `numba`")
NUMBA_METHODS = {"int4-dynamic": HAS_NUMBA}
ALL_METHODS = [pytest.param(name, marks=NUMBA_METHODS.get(name, ())) for name in METHODS]
METHODS_HERE = [name for name in METHODS if name not in NUMBA_METHODS or find_spec("numba")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Groups of 128 of old folders must fit, so wider than the usual random model.
CONFIG = replace(
    TINY_CONFIG,
    text=replace(TINY_CONFIG.text, hidden_size=128, intermediate_size=256, num_layers=2),
)
NARROW = replace(TINY_CONFIG, text=replace(TINY_CONFIG.text, hidden_size=48))
PROMPT = torch.tensor([[1, 5, 6, 7, 8, 9, 20, 30]])


def random_weight(n: int = 200, k: int = 384, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def other_than(method: str) -> str:
    """A method with other codes."""
    return "int8" if method.startswith("int4") else "int4"


def answers_of(llava: Llava, ids: Tensor = PROMPT) -> Tensor:
    """Logits of a prompt, and of ten tokens after it, by the packed operators."""
    with torch.inference_mode():
        logits, cache, position = llava.prefill(ids, None)
        rows = [logits]
        for _ in range(10):
            logits, cache = llava.decode(rows[-1].argmax(), position, cache)
            position += 1
            rows.append(logits)
    return torch.cat(rows, dim=1)[0]


# ---- rounding ----------------------------------------------------------------------------------


def draw_weight(data: st.DataObject) -> Tensor:
    """Rows (8, 256) of every kind that is hard to round."""
    weight = random_weight(8, 256, data.draw(st.integers(0, 2**32 - 1)))
    weight[0] *= data.draw(st.sampled_from([0.0, 1e-3, 50.0]))
    weight[1, :200] = 0
    # One value: no width of its own. Subnormal ones have no digits left for a scale.
    weight[2] = data.draw(st.floats(-3, 3, width=32, allow_subnormal=False))
    weight[3] = 1 + 0.01 * weight[3]  # far from 0
    weight[4] = -weight[4].abs()
    weight[5, 7] = data.draw(st.floats(-8, 8))  # an outlier
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@examples(40)
@given(data=st.data())
def test_no_int8_weight_is_off_by_more_than_half_a_scale(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    weight = draw_weight(data)
    parts = Int8Linear.round(weight, dtype)
    error = (Int8Linear.restore(parts).double() - weight.double()).abs()
    float32_noise = 1e-6 * weight.double().abs().amax(1, keepdim=True)
    assert (error <= parts["scales"].double()[:, None] / 2 + float32_noise).all()


def round_to_nearest(weight: Tensor, dtype: torch.dtype, size: int) -> dict[str, Tensor]:
    """Round to nearest between the ends of every group, with scales and zeros in `dtype`: what
    version 0.1 wrote, in groups of 128."""
    groups = weight.float().unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = module.cast_scales((high - low) / 15, dtype)
    zeros = (low + 8 * scales.float()).to(dtype)
    levels = (groups - zeros.float()[..., None]) / scales.float()[..., None]
    codes = (levels.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1)
    return {"weight_int4": codes[:, ::2] << 4 | codes[:, 1::2], "scales": scales, "zeros": zeros}


@pytest.mark.parametrize("dtype", DTYPES)
@examples(40)
@given(data=st.data())
def test_int4_is_never_worse_than_rounding_to_nearest(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    """In the squared error of a row; but for the digits of stored levels, which are fewer."""
    weight = draw_weight(data)
    plain = round_to_nearest(weight, dtype, module.GROUP_SIZE)
    restored = Int4Linear.restore(Int4Linear.round(weight, dtype)), OldInt4Linear.restore(plain)
    error, most = ((r.double() - weight.double()).square().sum(1) for r in restored)
    noise = (5e-6 + torch.finfo(dtype).eps ** 2) * weight.double().square().sum(1)
    # Steps of the smallest numbers have few digits left, or none.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    noise += weight.shape[1] * (8 * smallest) ** 2
    assert (error <= 1.1 * most + noise + 1e-60).all()
    assert error[6:].sum() < most[6:].sum()  # usual weights
    groups = weight.unflatten(1, (-1, module.GROUP_SIZE))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    parts = module.choose_levels(groups, dtype)
    ends = module.store_levels(parts["scales"], (high - low) / 15, low + (high - low) * 8 / 15)
    ours, its = (
        (module.show_levels(groups, stored) - groups).square().sum(-1) for stored in (parts, ends)
    )
    assert (ours <= its * (1 + 1e-6) + 1e-6 * groups.square().sum(-1)).all()  # the same digits


def test_int8_in_plain_python() -> None:
    weight = random_weight(5, 256)
    parts = Int8Linear.round(weight, torch.float32)
    for row, codes, scale in zip(
        weight.tolist(), *(p.tolist() for p in parts.values()), strict=True
    ):
        assert scale == pytest.approx(max(map(abs, row)) / 127)
        assert codes == [round(value / scale) for value in row]


def test_int4_in_plain_python() -> None:
    """The levels that the stored numbers stand for, and that every weight has the nearest one. The
    bytes too: of columns 2j and 2j + 1, the first in the upper half."""
    weight = random_weight(5, 256)
    parts = Int4Linear.round(weight, torch.float32)
    restored = Int4Linear.restore(parts).tolist()
    for n, row in enumerate(weight.tolist()):
        scale = float(parts["scales"][n])
        for k, value in enumerate(row):
            step = scale * int(parts["steps"][n, k // 32]) / 255
            zero = step * int(parts["offsets"][n, k // 32]) * 8 / 127
            byte = int(parts["weight_int4"][n, k // 2])
            code = byte & 15 if k % 2 else byte >> 4
            levels = [(level - 8) * step + zero for level in range(16)]
            assert restored[n][k] == pytest.approx(levels[code], abs=1e-8)
            assert abs(levels[code] - value) <= min(abs(x - value) for x in levels) + 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_long_weights_are_rounded_and_packed_as_short_ones(
    kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(300, 128)
    whole = kind.round(weight, torch.bfloat16)
    layer = kind(whole)
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 1000)  # 64 rows at once, not all
    pieces = kind.round(weight, torch.bfloat16)
    for name, part in pieces.items():
        assert torch.equal(part, whole[name]), name
    for in_place in (False, True):
        for name, buffer in kind(pieces, in_place).named_buffers():
            assert torch.equal(buffer, layer.get_buffer(name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_specs_describe_the_parts(kind: type[QuantizedLinear]) -> None:
    parts = kind.round(random_weight(), torch.bfloat16)
    made = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    assert kind.specs((200, 384), torch.bfloat16) == made
    assert list(parts)[0] == kind.codes


# ---- 8-bit inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [Levels(127, 0), Levels(63, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_rounded_row_by_row(
    levels: Levels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is off by at most half a level of its own largest number per weight."""
    monkeypatch.setattr(module, "find_levels", lambda device: levels)
    parts = Int8Linear.round(random_weight(), dtype)
    layer, weight = Int8DynamicLinear(parts), Int8Linear.restore(parts).double()
    x = torch.randn(40, 384, generator=torch.Generator().manual_seed(1))
    x[3], x[5, 7], x[6] = 0, 1000, x[6] * 1e-3
    x = x.to(dtype)
    half = x.double().abs().amax(1, keepdim=True) / levels.most / 2
    expected, total = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    bound = half * weight.abs().sum(1) + (1.01 * torch.finfo(dtype).eps + 1e-6) * total
    y = layer.matmul_blocks(x)
    assert y.dtype == dtype and ((y.double() - expected).abs() <= 1.001 * bound).all()
    for row in (0, 3, 39):  # whatever the other rows are
        assert torch.equal(layer.matmul_blocks(x[row : row + 1])[0], y[row])


def test_sums_of_8_bit_products_are_checked(
    monkeypatch: pytest.MonkeyPatch, forget_what_was_found_out: None
) -> None:
    """A stand-in for CPUs that add up pairs of products of x + 128 in 16 bits."""

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        products = (x.int() + 128)[:, :, None] * weight.int()
        pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * weight.int().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", multiply)
    module.find_levels.cache_clear()
    assert module.find_levels(CPU) == Levels(63, 64)
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: 2 * multiply(x, weight))
    module.find_levels.cache_clear()
    module.check_operator.cache_clear()
    with pytest.raises(ValueError, match="^int8-dynamic does not run here .* codes are wrong"):
        module.check_operator("int8-dynamic", CPU, torch.bfloat16)


# ---- the layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_multiply_are_the_restored_weight_s(
    kind: type[QuantizedLinear], dtype: torch.dtype
) -> None:
    """Rows 1 to 40, on both sides of where the ways change, 200 columns: padded to 256 in int4.

    Bound per element: the result's and the weights' rounding to the dtype, and float32 sums."""
    parts = kind.round(random_weight(), dtype)
    layer, weight = kind(parts), kind.restore(parts).double()
    generator = torch.Generator().manual_seed(1)
    for rows in range(1, 41):
        x = torch.randn(rows, 384, generator=generator).to(dtype)
        expected, total = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        bound = (1.01 * torch.finfo(dtype).eps + 1e-6) * total
        for y in (layer(x), layer.matmul_codes(x)[:, :200], layer.matmul_blocks(x)[:, :200]):
            assert y.dtype == dtype
            assert ((y.double() - expected).abs() <= bound).all(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_those_that_write_weights_out(
    kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, ways = kind(kind.round(random_weight(), torch.bfloat16)), []
    for name in ("matmul_codes", "matmul_blocks"):
        original = getattr(layer, name)
        monkeypatch.setattr(
            layer, name, lambda x, n=name, f=original: (ways.append((n, len(x))), f(x))[1]
        )
    for rows in (1, kind.codes_rows, kind.codes_rows + 1, 100):
        layer(torch.randn(rows, 384).bfloat16())
    few, many = (1, kind.codes_rows), (kind.codes_rows + 1, 100)
    assert ways == [("matmul_codes", r) for r in few] + [("matmul_blocks", r) for r in many]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_weight_are_the_weight(
    kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", {"cpu": 100 * 384 * 4})
    parts = kind.round(random_weight(), torch.float32)
    layer = kind(parts)
    blocks = list(layer.weight_blocks(torch.float32))
    assert [block.shape[1] for block in blocks][:3] == [64, 64, 64] and len(blocks) == 4
    torch.testing.assert_close(
        torch.cat(blocks, dim=1).T[:200], kind.restore(parts), rtol=1e-6, atol=1e-9
    )
    x = torch.randn(60, 384)
    torch.testing.assert_close(layer(x), x @ kind.restore(parts).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(384,), (0, 384), (2, 3, 384), (5, 10, 384)])
def test_any_shape_of_input(kind: type[QuantizedLinear], shape: tuple[int, ...]) -> None:
    parts = kind.round(random_weight(), torch.float32)
    x = torch.randn(shape)
    expected = x @ kind.restore(parts).T
    torch.testing.assert_close(kind(parts)(x), expected, rtol=1e-5, atol=1e-5)
    turned = torch.randn(*shape[:-1], 768)[..., ::2]  # not contiguous
    expected = turned @ kind.restore(parts).T
    torch.testing.assert_close(kind(parts)(turned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_blocks_in_float32_are_the_most_exact(
    kind: type[QuantizedLinear], dtype: torch.dtype
) -> None:
    parts = kind.round(random_weight(), dtype)
    layer, x = kind(parts), torch.randn(100, 384).to(dtype)
    expected = x.double() @ kind.restore(parts).double().T
    narrow = (layer(x).double() - expected).abs().max()
    layer.block_dtype = torch.float32
    y = layer(x)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= min(narrow, 2**-8 * expected.abs().max())


def test_float16_sums_do_not_overflow() -> None:
    """Codes are up to 127: summed before they are scaled they would leave float16's range."""
    parts = Int8Linear.round(torch.full((8, 512), 0.5), torch.float16)
    y = Int8Linear(parts)(torch.full((20, 512), 10.0, dtype=torch.float16))
    torch.testing.assert_close(y, torch.full_like(y, 2560.0))


def test_int4_packing_and_back() -> None:
    codes = torch.randint(0, 256, (192, 128), dtype=torch.uint8)
    out = torch.empty(256, 192)
    module.find_order(CPU).unpack(module.pack(codes), out)
    assert torch.equal(out.T + 8, module.unpack_bytes(codes).float())


@pytest.fixture
def forget_what_was_found_out() -> Iterator[None]:
    yield
    module.find_order.cache_clear()
    module.find_levels.cache_clear()
    module.check_operator.cache_clear()


@pytest.mark.parametrize("tile", [(8, 128), (32, 1), (2, 64)])
def test_any_order_in_tiles_is_found_out(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch, forget_what_was_found_out: None
) -> None:
    """A stand-in for other devices, whose operator shuffles codes within tiles of such a size."""
    rows, columns = tile
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(3))

    def shuffled(codes: Tensor, in_place: bool = False) -> Tensor:
        wide = module.unpack_bytes(codes)
        n, k = wide.shape
        tiles = wide.view(n // rows, rows, k // columns, columns).transpose(1, 2).flatten(2)
        low, high = tiles[..., order].chunk(2, dim=-1)
        return (high << 4 | low).reshape(n, k // 2)

    monkeypatch.setattr(module, "pack", shuffled)
    monkeypatch.setattr(module, "TILES", {"cpu": ((64, 1), tile)})
    module.find_order.cache_clear()
    found = module.find_order(CPU)
    assert (found.rows, found.columns) == tile
    codes = torch.randint(0, 256, (192, 128), dtype=torch.uint8)
    out = torch.empty(256, 192)
    found.unpack(shuffled(codes), out)
    assert torch.equal(out.T + 8, module.unpack_bytes(codes).float())


def test_an_unknown_order_is_said(
    monkeypatch: pytest.MonkeyPatch, forget_what_was_found_out: None
) -> None:
    def shuffled(codes: Tensor) -> Tensor:
        order = torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(3))
        return codes.flatten()[order].view(codes.shape)

    monkeypatch.setattr(module, "pack", shuffled)
    module.find_order.cache_clear()
    with pytest.raises(ValueError, match="in an unknown order"):
        module.find_order(CPU)


def with_capability(capability: str, script: str) -> None:
    """Run a script in a process in which torch uses the instructions of a lesser CPU."""
    script = f"""
import torch
print(torch.backends.cpu.get_cpu_capability(), flush=True)
{script}
print("ok")
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found, usual = done.stdout.split("\n")[0], torch.backends.cpu.get_cpu_capability()
    if found != capability.upper() and found == usual:
        pytest.skip(f"ATEN_CPU_CAPABILITY has no effect on this {usual} machine")
    assert done.stdout == f"{capability.upper()}\nok\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors_pack_in_other_orders(capability: str) -> None:
    with_capability(
        capability,
        """
from llava_lite.fast import quantize
for method in quantize.METHODS:
    for dtype in (torch.bfloat16, torch.float32):
        quantize.check_operator(method, torch.device("cpu"), dtype)
""",
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_layer_is_read_on_other_processors(
    kind: type[QuantizedLinear], capability: str, tmp_path: Path
) -> None:
    layer, x = kind(kind.round(random_weight(), torch.float32)), torch.randn(40, 384)
    torch.save((layer, x, layer(x)), tmp_path / "here.pt")
    with_capability(
        capability,
        f"""
layer, x, y = torch.load({str(tmp_path / "here.pt")!r}, weights_only=False)
torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(layer(x[:1]), y[:1], rtol=1e-4, atol=1e-5)
torch.save((layer, x, y), {str(tmp_path / "there.pt")!r})
""",
    )
    back, _, _ = torch.load(tmp_path / "there.pt", weights_only=False)
    assert all(torch.equal(layer.get_buffer(n), part) for n, part in back.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_the_same_and_their_own(
    kind: type[QuantizedLinear], copied: Callable[[QuantizedLinear], QuantizedLinear]
) -> None:
    layer = kind(kind.round(random_weight(), torch.bfloat16))
    twin = copied(layer)
    assert type(twin) is kind and str(twin) == str(layer)
    parts = {name: part.clone() for name, part in layer.named_buffers()}
    assert len(parts) == 2
    for name, part in twin.named_buffers():
        assert torch.equal(part, parts[name])
        part.zero_()
    assert all(torch.equal(part, parts[name]) for name, part in layer.named_buffers())


# ---- where it does not run ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(
    ("device", "dtype"), [("mps", torch.bfloat16), ("meta", torch.bfloat16), ("cpu", torch.float64)]
)
def test_devices_and_dtypes_without_the_operator(
    method: str, device: str, dtype: torch.dtype
) -> None:
    with pytest.raises(
        ValueError, match=f"^{method} does not run here .*{device}.*{dtype}"
    ) as found:
        module.check_operator(method, torch.device(device), dtype)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_without_the_operator(
    kind: type[QuantizedLinear],
    monkeypatch: pytest.MonkeyPatch,
    forget_what_was_found_out: None,
) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'aten' object has no attribute '_weight_pack_mm'")

    llava = random_llava(CONFIG, dtype=torch.bfloat16)
    before = list(llava.modules())
    monkeypatch.setattr(kind, "matmul_codes", missing)
    module.check_operator.cache_clear()
    with pytest.raises(ValueError, match=f"{kind.method} does not run here .*no attribute"):
        quantize(llava, kind.method)
    assert list(llava.modules()) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["matmul_codes", "matmul_blocks"])
def test_an_operator_that_computes_something_else(
    kind: type[QuantizedLinear],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    forget_what_was_found_out: None,
) -> None:
    original: Callable[..., Tensor] = getattr(kind, way)
    monkeypatch.setattr(kind, way, lambda self, rows: original(self, rows).roll(1, dims=1))
    module.check_operator.cache_clear()
    with pytest.raises(ValueError, match="is off by"):
        module.check_operator(kind.method, CPU, torch.bfloat16)


# ---- models in place ---------------------------------------------------------------------------


def with_restored_weights(llava: Llava, kind: type[QuantizedLinear]) -> Llava:
    """The slow oracle: ordinary layers whose weights are what the codes stand for."""
    for layer in llava.decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = kind.restore(kind.round(layer.weight.data, llava.dtype))
    return llava


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_the_model_of_its_rounded_weights(
    kind: type[QuantizedLinear],
) -> None:
    llava, long = random_llava(CONFIG), torch.arange(1, 101)[None]
    quantize(llava, kind.method)
    oracle = with_restored_weights(random_llava(CONFIG), kind)
    for ids in (PROMPT, long):  # few rows and many
        torch.testing.assert_close(answers_of(llava, ids), answers_of(oracle, ids))
    unrounded = answers_of(random_llava(CONFIG))
    assert not torch.allclose(answers_of(llava), unrounded, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoder_s_linear_layers_change(kind: type[QuantizedLinear]) -> None:
    llava = random_llava(CONFIG)
    before = dict(llava.named_parameters())
    quantize(llava, kind.method)
    replaced = {name for name, m in llava.named_modules() if isinstance(m, QuantizedLinear)}
    layers = [f"decoder.layers.{i}" for i in range(2)]
    assert replaced == {
        "decoder.lm_head",
        *(f"{layer}.attn.{name}_proj" for layer in layers for name in "qkvo"),
        *(f"{layer}.mlp.{name}_proj" for layer in layers for name in ("gate", "up", "down")),
    }
    after = dict(llava.named_parameters())
    assert set(before) - set(after) == {f"{name}.weight" for name in replaced}
    assert all(after[name] is before[name] for name in after)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_one_by_one(
    kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is rounded, the weights of those before it are gone."""
    llava = random_llava(CONFIG)
    alive = [
        weakref.ref(layer.weight)
        for layer in llava.decoder.modules()
        if isinstance(layer, nn.Linear)
    ]
    total, counts = len(alive), []
    original = module.round_weight

    def counting(*args: Any) -> dict[str, Tensor]:
        counts.append(sum(weight() is not None for weight in alive))
        return original(*args)

    monkeypatch.setattr(module, "round_weight", counting)
    quantize(llava, kind.method)
    assert total == 15
    assert counts == list(range(total, 0, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_after_many_rows(kind: type[QuantizedLinear]) -> None:
    llava = random_llava(CONFIG, dtype=torch.bfloat16)
    quantize(llava, kind.method)
    answers_of(llava, torch.arange(1, 101)[None])

    def living() -> list[Tensor]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is Tensor]

    before = living()
    kept = set(map(id, before))
    answers_of(llava, torch.arange(1, 101)[None])
    assert [tuple(tensor.shape) for tensor in living() if id(tensor) not in kept] == []
    own = sum(b.nbytes for b in llava.decoder.buffers())
    shapes = module.decoder_linears(random_llava(CONFIG))
    bits = 8 if kind is Int8Linear else 4 + 2 * 16 / module.GROUP_SIZE
    rows = 16 * sum(n for n, _ in shapes.values()) if kind is Int8Linear else 0
    assert own == (bits * sum(n * k for n, k in shapes.values()) + rows) / 8


def test_a_loaded_model_can_be_quantized(tiny_tokenizer: Tokenizer) -> None:
    model = Model(random_llava(CONFIG, dtype=torch.bfloat16), tiny_tokenizer)
    before = model.generate(None, "star?", max_new_tokens=4)  # fills the cache of the prefix
    quantize(model, "int4")
    fresh = Model(model.llava, tiny_tokenizer)
    after = model.generate(None, "star?", max_new_tokens=4)
    assert after == fresh.generate(None, "star?", max_new_tokens=4)
    assert isinstance(before, str) and after.usage == before.usage


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_models_of_their_own(kind: type[QuantizedLinear]) -> None:
    llava = random_llava(CONFIG)
    quantize(llava, kind.method)
    copy = deepcopy(llava)
    expected = answers_of(llava)
    for buffer in llava.decoder.buffers():
        buffer.zero_()
    assert torch.equal(answers_of(copy), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_only_another_dtype(kind: type[QuantizedLinear]) -> None:
    llava = random_llava(CONFIG, dtype=torch.bfloat16)
    quantize(llava, kind.method)
    narrow = answers_of(llava).float()
    wide = answers_of(llava.to(torch.float32))
    assert wide.dtype == torch.float32
    assert (narrow - wide)[0].norm() <= 0.05 * wide[0].norm()


def test_int4_does_not_move_to_another_kind_of_device() -> None:
    llava = random_llava(CONFIG)
    quantize(llava, "int4")
    expected = answers_of(llava)
    with pytest.raises(ValueError, match="packed for cpu: load the model on meta"):
        llava.to("meta")
    assert torch.equal(answers_of(llava), expected)  # nothing of it has moved


def test_models_that_cannot_be_quantized() -> None:
    llava = random_llava(CONFIG)
    with pytest.raises(ValueError, match="'int3' is not one of int8, int4"):
        quantize(llava, "int3")
    narrow = random_llava(NARROW)
    with pytest.raises(ValueError, match="q_proj: in_features 48 is no multiple of 32"):
        quantize(narrow, "int4")
    assert not any(isinstance(m, QuantizedLinear) for m in narrow.modules())
    quantize(narrow, "int8")
    with pytest.raises(ValueError, match="is int8 already"):
        quantize(narrow, "int4")


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_leave_the_model_as_it_was(method: str, value: float) -> None:
    llava = random_llava(CONFIG)
    llava.decoder.lm_head.weight.data[3, 4] = value  # the last of all
    before = list(llava.modules())
    with pytest.raises(ValueError, match="decoder.lm_head: weights are NaN or infinite"):
        quantize(llava, method)
    assert list(llava.modules()) == before


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("cast", [nn.Module.double, lambda llava: llava.to(torch.float64)])
def test_a_cast_to_what_the_operators_do_not_take(
    method: str, cast: Callable[[nn.Module], nn.Module]
) -> None:
    llava = random_llava(CONFIG)
    quantize(llava, method)
    expected = answers_of(llava)
    with pytest.raises(ValueError, match=f"^{method} does not run here .*torch.float64") as found:
        cast(llava)
    assert "\n" not in str(found.value)
    assert {part.dtype for part in llava.parameters()} == {torch.float32}
    assert torch.equal(answers_of(llava), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_error_ended_halfway_can_be_finished(
    monkeypatch: pytest.MonkeyPatch, kind: type[QuantizedLinear]
) -> None:
    llava, whole = random_llava(CONFIG), random_llava(CONFIG)
    quantize(whole, kind.method)
    left, round_weight = [3], kind.round

    def ending(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if len(weight) > 1:  # the first look at every weight is at its extremes
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError
        return round_weight(weight, dtype)

    monkeypatch.setattr(kind, "round", staticmethod(ending))
    monkeypatch.setattr(module, "check_operator", lambda *_: None)
    with pytest.raises(MemoryError):
        quantize(llava, kind.method)
    there = sum(isinstance(module, QuantizedLinear) for module in llava.modules())
    assert there == 2
    other = next(method for method in METHODS if method != kind.method)
    with pytest.raises(ValueError, match=f"is {kind.method} already"):
        quantize(llava, other)
    quantize(llava, kind.method)
    assert torch.equal(answers_of(llava), answers_of(whole))
    with pytest.raises(ValueError, match=f"is {kind.method} already"):
        quantize(llava, kind.method)


def test_a_kernel_chosen_for_one_row_goes_with_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quantizing a model whose layers had their kernel chosen is quantizing the plain one."""
    llava, chosen = (random_llava(CONFIG, dtype=torch.bfloat16) for _ in range(2))
    monkeypatch.setattr(kernels, "MIN_BYTES", 0)
    others = [{name: float(name == "linear") for name in names} for names in kernels.TRIED]
    monkeypatch.setattr(kernels, "time_kernels", lambda weights: others)
    monkeypatch.setattr(kernels, "faster_dtype", lambda seconds: None)
    assert kernels.choose_kernels(chosen.decoder)
    assert any(isinstance(module, kernels.ChosenLinear) for module in chosen.modules())
    for model in (llava, chosen):
        quantize(model, "int4")
    assert not any(isinstance(module, kernels.ChosenLinear) for module in chosen.modules())
    assert torch.equal(answers_of(chosen), answers_of(llava))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_it_is_not_saved_as_something_that_it_is_not(method: str, tmp_path: Path) -> None:
    llava = random_llava(CONFIG)
    state = llava.state_dict()
    quantize(llava, method)
    with pytest.raises(ValueError, match=f"an {method} model cannot be saved: .*--quantize"):
        save_model(llava, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="q_proj.weight"):
        llava.load_state_dict(state)


# ---- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A bfloat16 model in our format."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_model(random_llava(CONFIG, dtype=torch.bfloat16), CONFIG, folder, tiny_tokenizer)
    return folder


@pytest.fixture(scope="module", params=ALL_METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(plain: Path, method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted with --quantize."""
    folder = tmp_path_factory.mktemp(method) / "model"
    convert(plain, folder, quantize=method, verify=True)
    return folder


def test_a_loaded_model_that_refuses_a_move_stays_where_it_is(folder: Path) -> None:
    llava = load_source(open_source(folder))
    with pytest.raises(ValueError, match="does not run here"):
        llava.to(torch.float64)
    tensors = [*llava.parameters(), *llava.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the weight file, and drop the manifest, which would say so."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "manifest.json").unlink()


def test_what_is_written(folder: Path, plain: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    said = {"method": method} | ({"group_size": 32} if method.startswith("int4") else {})
    assert config.pop("quantization") == said
    assert config == json.loads((plain / "config.json").read_text())
    stored, before = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, weight in before.items():
        module_name = name.removesuffix(".weight")
        if name.startswith("decoder.") and name.endswith(("proj.weight", "lm_head.weight")):
            parts = METHODS[method].round(weight, torch.bfloat16)
            for part, expected in parts.items():
                assert torch.equal(stored.pop(f"{module_name}.{part}"), expected)
        else:
            assert torch.equal(stored.pop(name), weight)
    assert not stored


def test_loading_rounds_as_converting_does(folder: Path, plain: Path, method: str) -> None:
    rounded = llava_lite.load(plain, device="cpu", quantize=method)
    converted = llava_lite.load(folder, device="cpu")
    named = llava_lite.load(folder, device="cpu", quantize=method)
    in_place = load_model(plain)
    quantize(in_place, method)
    for ids in (PROMPT, torch.arange(1, 101)[None]):
        expected = answers_of(in_place, ids)
        for model in (rounded, converted, named):
            assert torch.equal(answers_of(model.llava, ids), expected)
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    answers = [m.generate(image, "What color?", max_new_tokens=6) for m in (rounded, converted)]
    assert answers[0] == answers[1]
    assert not any(parameter.requires_grad for parameter in converted.llava.parameters())
    assert not any(m.training for m in converted.llava.modules())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_everything_else(
    plain: Path, method: str, dtype: str, tmp_path: Path
) -> None:
    convert(plain, tmp_path / "out", quantize=method, dtype=dtype)
    converted = load_source(open_source(tmp_path / "out"))
    assert converted.dtype == getattr(torch, dtype)
    rounded = load_source(open_source(plain), dtype=dtype, method=method)
    assert torch.equal(answers_of(converted), answers_of(rounded))
    again = load_source(open_source(tmp_path / "out"), dtype="bfloat16")
    assert again.dtype == answers_of(again).dtype == torch.bfloat16


def test_other_layouts_are_rounded_as_they_are_stored(method: str, tmp_path: Path) -> None:
    """Not as cast to the model's dtype: that would round twice."""
    llava = random_llava(CONFIG)
    save_model(llava, CONFIG, tmp_path / "wide")
    source = tmp_path / "hf"
    convert(tmp_path / "wide", source, dtype="float32", to="hf")
    rounded = load_source(open_source(source), dtype="bfloat16", method=method)
    convert(source, tmp_path / "out", quantize=method)
    name = "decoder.layers.1.mlp.up_proj"
    expected = METHODS[method].round(llava.get_parameter(f"{name}.weight"), torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[f"{name}.{part}"], t) for part, t in expected.items())
    converted = load_source(open_source(tmp_path / "out"))
    assert torch.equal(answers_of(rounded), answers_of(converted))


def test_int8_codes_stay_in_the_file(folder: Path, method: str) -> None:
    """Private memory is what counts: codes that need no packing are views of the mapped file."""
    source = open_source(folder)
    stored = source.read_parts("decoder.lm_head.weight")  # type: ignore[attr-defined]
    layer = load_source(source).decoder.lm_head
    if method.startswith("int8"):
        assert layer.weight_int8.data_ptr() == stored["weight_int8"].data_ptr()
    else:
        packed = layer.weight_packed if method == "int4" else layer.words
        assert packed.nbytes == stored["weight_int4"].nbytes


def test_pages_that_only_loading_read_are_let_go(
    plain: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a mapped file that were read count as a process's memory while it is mapped. What
    stays there after the linear layers were read is mapped anew."""
    read, mappings = sources_tensors.read_tensors, []

    def noted(file: Path) -> Mapping[str, Tensor]:
        mappings.append(read(file))
        return mappings[-1]

    source = open_source(copied(plain, tmp_path))
    monkeypatch.setattr(sources, "read_tensors", noted)
    table = "decoder.embed_tokens.weight"
    llava = load_source(source, method=method)
    first, second = mappings
    assert llava.decoder.embed_tokens.weight.data_ptr() == second[table].data_ptr()
    assert second[table].data_ptr() != first[table].data_ptr()
    convert(plain, tmp_path / "out", quantize=method)
    converted = load_source(open_source(tmp_path / "out"))
    assert torch.equal(answers_of(converted), answers_of(llava))


def test_checksums_find_a_changed_code(folder: Path, method: str, tmp_path: Path) -> None:
    assert verify_folder(folder) == len(load_file(folder / "model.safetensors"))
    copy = copied(folder, tmp_path)
    name = f"decoder.lm_head.{METHODS[method].codes}"
    tensors = load_file(copy / "model.safetensors")
    tensors[name][3, 5] ^= 1
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}' differs from its sha256"):
        verify_folder(copy)


def test_info_counts_weights_not_codes(folder: Path, plain: Path, method: str) -> None:
    described, before = describe_source(folder), describe_source(plain)
    assert described.parameters == before.parameters
    assert described.to_dict()["quantized"] == method
    assert before.to_dict()["quantized"] is None
    file = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert described.memory["bfloat16"]["weights"] == file
    text = format_info(described)
    assert f"llava_lite with {method} decoder" in text
    assert f"decoder.layers.{{0..1}}.attn.q_proj.{METHODS[method].codes} " in text


def test_shards_and_manifest(
    plain: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_lite.checkpoints.convert.QUANTIZED_SHARD_SIZE", 50_000)
    assert len(convert(plain, tmp_path / "plain").files) == 1
    report = convert(plain, tmp_path / "out", quantize=method, verify=True)
    assert report.quantized == method and len(report.files) > 3
    assert report.parameters == sum(p.numel() for p in load_model(plain).parameters())
    assert f"the decoder's {method}" in report.summary()
    assert "equals the source (the decoder's after quantization)" in report.summary()
    table = json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"]
    code_dtype = table[f"decoder.lm_head.{METHODS[method].codes}"]["dtype"]
    assert code_dtype == ("uint8" if method.startswith("int4") else "int8")
    expected = load_source(open_source(plain), method=method)
    assert torch.equal(answers_of(load_source(open_source(tmp_path / "out"))), answers_of(expected))


def test_a_quantized_folder_is_a_source_of_what_it_stands_for(
    folder: Path, plain: Path, method: str, tmp_path: Path
) -> None:
    report = convert(folder, tmp_path / "wide", dtype="float32")
    assert any(f"the source is {method}" in note for note in report.notes)
    oracle = with_restored_weights(load_model(plain), METHODS[method]).float()
    torch.testing.assert_close(answers_of(load_model(tmp_path / "wide")), answers_of(oracle))
    convert(folder, tmp_path / "hf", to="hf")


def test_wishes_that_do_not_go_together(
    folder: Path, plain: Path, method: str, tmp_path: Path
) -> None:
    other = other_than(method)
    with pytest.raises(CheckpointError, match=f"is {method} already, it cannot become {other}"):
        llava_lite.load(folder, device="cpu", quantize=other)
    with pytest.raises(ValueError, match="'int5' is not one of int8, int4"):
        llava_lite.load(tmp_path / "nowhere", quantize="int5")
    for wish in METHODS:
        with pytest.raises(
            CheckpointError, match=f"is {method} already: quantize its source instead"
        ):
            convert(folder, tmp_path / "out", quantize=wish)
    with pytest.raises(ValueError, match="cannot be written as hf: hf has none"):
        convert(plain, tmp_path / "out", quantize=method, to="hf")
    with pytest.raises(CheckpointError, match="needs no base"):
        open_source(folder, base=plain)
    with pytest.warns(UserWarning, match="the one given is not used"):
        open_source(folder, vision_tower=plain)
    assert list(tmp_path.iterdir()) == []


def test_narrow_models_have_no_int4(tmp_path: Path) -> None:
    save_model(random_llava(NARROW), NARROW, tmp_path / "narrow")
    with pytest.raises(ValueError, match="in_features 48 is no multiple of 32"):
        convert(tmp_path / "narrow", tmp_path / "out", quantize="int4")
    with pytest.raises(ValueError, match="in_features 48 is no multiple of 32"):
        load_source(open_source(tmp_path / "narrow"), method="int4")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_the_dtype(method: str, tmp_path: Path) -> None:
    """1e30 is a float32, and its scale no float16."""
    llava = random_llava(CONFIG)
    llava.decoder.lm_head.weight.data[0, 0] = 1e30
    save_model(llava, CONFIG, tmp_path / "large")
    with pytest.raises(CheckpointError, match="model.safetensors: decoder.lm_head: .*float16"):
        convert(tmp_path / "large", tmp_path / "out", quantize=method, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1e-9, 1e9])
def test_scales_that_another_dtype_does_not_reach(
    method: str, value: float, tmp_path: Path
) -> None:
    """Of a bfloat16 folder, in float16: as an error, not as wrong weights."""
    llava = random_llava(CONFIG, dtype=torch.bfloat16)
    llava.decoder.lm_head.weight.data[5] = value
    save_model(llava, CONFIG, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", quantize=method)
    load_source(open_source(tmp_path / "out"))
    load_source(open_source(tmp_path / "out"), dtype="float32")
    with pytest.raises(CheckpointError, match="lm_head.*out of the range of torch.float16"):
        load_source(open_source(tmp_path / "out"), dtype="float16")


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


HEAD = "decoder.lm_head"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{HEAD}.scales"), "tensor 'decoder.lm_head.scales' is missing"),
        (drop(f"{HEAD}.weight_int4"), "'decoder.lm_head.weight_int4' is missing"),
        (drop("decoder.norm.weight"), "'decoder.norm.weight'"),
        (put(f"{HEAD}.steps", lambda t: t[:, :0]), r"steps' is torch.uint8 \(320, 0\)"),
        (put(f"{HEAD}.weight_int4", lambda t: t[:, 1:].clone()), r"is torch.uint8 \(320, 63\)"),
        (put(f"{HEAD}.weight_int4", lambda t: t.to(torch.int8)), "is torch.int8"),
        (put(f"{HEAD}.scales", lambda t: t.to(torch.float64)), "is torch.float64"),
        (
            lambda tensors: tensors.update({f"{HEAD}.weight": torch.zeros(320, 128)}),
            "'decoder.lm_head' is stored twice",
        ),
        (
            lambda tensors: tensors.update({f"{HEAD}.weight_int8": torch.zeros(320, 128)}),
            "unexpected tensor 'decoder.lm_head.weight_int8'",
        ),
    ],
)
def test_damaged_folders(
    change: Callable[[dict[str, Tensor]], object], message: str, plain: Path, tmp_path: Path
) -> None:
    convert(plain, tmp_path / "out", quantize="int4")
    change_tensors(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "out")


def test_scales_without_a_manifest_are_checked(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", quantize="int4")
    change_tensors(tmp_path / "out", lambda tensors: tensors[f"{HEAD}.scales"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="scales' has NaN or infinite values"):
        load_source(open_source(tmp_path / "out"))


@pytest.mark.parametrize(
    "said", ["int4", {"method": "int3"}, {"method": "int4", "group_size": 64}, None]
)
def test_an_unknown_quantization(said: object, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", quantize="int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "quantization": said}))
    with pytest.raises(CheckpointError, match="config.json: quantization .* is none of"):
        open_source(tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_folders_of_version_0_1_load(plain: Path, dtype: str | None, tmp_path: Path) -> None:
    """Groups of 128, with scales and zeros in the dtype of the model."""
    convert(plain, tmp_path / "old", quantize="int4")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization"]["group_size"] = 128
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    oracle, changed = load_model(plain), {}
    for name in module.decoder_linears(oracle):
        layer = oracle.get_submodule(name)
        parts = round_to_nearest(layer.weight.data, torch.bfloat16, 128)
        layer.weight.data = OldInt4Linear.restore(parts).bfloat16()
        changed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def make_old(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith((".steps", ".offsets"))]:
            del tensors[name]
        tensors.update(changed)

    change_tensors(tmp_path / "old", make_old)
    with pytest.raises(CheckpointError, match="is int4 in groups of 128 already, it cannot become"):
        load_source(open_source(tmp_path / "old"), method="int4-dynamic")
    llava = load_source(open_source(tmp_path / "old"), dtype=dtype, method="int4")
    assert type(llava.decoder.lm_head) is OldInt4Linear
    oracle = oracle.to(llava.dtype)
    for ids in (PROMPT, torch.arange(1, 101)[None]):
        expected, found = answers_of(oracle, ids).float(), answers_of(llava, ids).float()
        assert (found - expected)[0].norm() <= 0.02 * expected[0].norm()
    assert describe_source(tmp_path / "old").parameters == describe_source(plain).parameters
    convert(tmp_path / "old", tmp_path / "wide")  # a source of what it stands for
    assert torch.equal(
        load_model(tmp_path / "wide").decoder.lm_head.weight,
        oracle.bfloat16().decoder.lm_head.weight,
    )


@pytest.mark.parametrize("codes", ["int8", pytest.param("int4", marks=HAS_NUMBA)])
def test_folders_load_in_both_ways(codes: str, plain: Path, tmp_path: Path) -> None:
    pairs = ((codes, f"{codes}-dynamic"), (f"{codes}-dynamic", codes))
    for stored, other in pairs:
        convert(plain, tmp_path / stored, quantize=stored)
        source = open_source(tmp_path / stored)
        assert type(load_source(source).decoder.lm_head) is METHODS[stored]
        llava = load_source(source, method=other)
        assert type(llava.decoder.lm_head) is METHODS[other]
        rounded = load_source(open_source(plain), method=other)
        assert torch.equal(answers_of(llava), answers_of(rounded))


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [(Int8Linear, 0.51), (Int4Linear, 0.32)])
def test_bytes_of_a_layer_of_7b_widths(kind: type[QuantizedLinear], most: float) -> None:
    text = LLAVA_1_5_7B.text
    wide, narrow = text.intermediate_size, text.hidden_size
    shapes = [(narrow, narrow)] * 4 + [(wide, narrow)] * 2 + [(narrow, wide)]
    specs = [spec for shape in shapes for spec in kind.specs(shape, torch.bfloat16).values()]
    held = sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in specs)
    assert held <= most * sum(2 * n * k for n, k in shapes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_loading_needs_little_more_than_what_is_loaded(method: str, tmp_path: Path) -> None:
    """Anonymous memory, at each layer, of a process that loads 100 MB of bfloat16."""
    text = TextConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_layers=4, num_heads=8
    )
    config = LlavaConfig(vision=TINY_CONFIG.vision, text=replace(text, sampled_vocab_size=512))
    llava = Llava(config).to(torch.bfloat16)
    save_model(llava, config, tmp_path / "model")
    script = """
import re, sys, torch
from pathlib import Path
from llava_lite.checkpoints import checkpoint as q
def private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"Anonymous: +(\\d+)", text)[1])
q.check_operator(sys.argv[2], torch.device("cpu"), torch.bfloat16)
seen, original = [], q.round_weight
def measured(*args):
    result = original(*args)
    seen.append(private())
    return result
q.round_weight = measured
before = private()
model = q.load_source(q.open_source(sys.argv[1]), method=sys.argv[2])
print(max(seen) - before, private() - before, sum(b.nbytes for b in model.buffers()))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model"), method]
    # What is freed goes back to the system at once, and does not count any more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    most, after, weights = map(int, done.stdout.split())
    whole = sum(p.nbytes for p in llava.decoder.parameters())
    most_weights = {"int4": 0.33, "int4-dynamic": 0.3}
    assert weights <= most_weights.get(method, 0.51) * whole
    assert after <= weights + 8e6
    assert most <= weights + 16e6 <= 0.7 * whole  # parts of one layer, and what rounds 128 rows


# ---- quality -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_error_of_logits_at_7b_widths() -> None:
    """One layer of normal random weights: 1.5 % of the logits' norm with int8, 11 % with int4."""
    text = TextConfig(num_layers=1, vocab_size=256, sampled_vocab_size=256)
    config = LlavaConfig(vision=TINY_CONFIG.vision, text=text)
    torch.manual_seed(0)
    ids = torch.randint(3, 256, (1, 40))
    llava = Llava(config).to(torch.bfloat16).requires_grad_(False).eval()
    for layer in llava.decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(std=layer.in_features**-0.5)
    weights = {name: llava.get_submodule(name) for name in module.decoder_linears(llava)}
    errors = {}
    with torch.inference_mode():
        logits = llava.prefill(ids, None, all_logits=True)[0].float()
    for method in METHODS_HERE:
        quantize(llava, method)
        with torch.inference_mode():
            rounded = llava.prefill(ids, None, all_logits=True)[0].float()
        errors[method] = float((rounded - logits).norm() / logits.norm())
        for name, layer in weights.items():
            llava.set_submodule(name, layer)
    assert 0.01 < errors["int8"] < 0.02
    assert 0.1 < errors["int4"] < 0.2
    assert 0.015 < errors["int8-dynamic"] < 0.05
    # These many rows are not rounded.
    assert errors.get("int4-dynamic", errors["int4"]) == pytest.approx(errors["int4"], rel=0.01)


def test_the_embedded_model_answers_as_before() -> None:
    methods = (None, *METHODS_HERE)
    models = {m: llava_lite.load(llava_lite.embedded_model(), quantize=m) for m in methods}
    families = ["count", "color", "shape", "exists"]
    scenes, asked = zip(*fresh_scenes(12, 5, families), strict=True)
    images = [models[None].encode(draw_scene(scene)) for scene in scenes]  # the tower is the same
    answers = {m: answer_questions(models[m], images, asked, reuse_prefix=True) for m in models}
    total = sum(map(len, asked))
    same = {m: sum(map(eq, answers[m], answers[None])) for m in models}
    right = {m: sum(answer == question.answer for question, answer in answers[m]) for m in models}
    assert total >= 40 and len(answers[None]) == total
    assert same["int8"] >= 0.95 * total and same["int4"] >= 0.85 * total
    assert all(right[m] >= right[None] - 0.15 * total for m in METHODS_HERE)


# ---- command line ------------------------------------------------------------------------------


def test_commands_offer_the_methods_that_there_are() -> None:
    assert OFFERED == tuple(METHODS)


def test_generate_and_convert(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded, out = str(llava_lite.embedded_model()), str(tmp_path / "out")
    scene = str(llava_lite.embedded_model() / "examples" / "scene.png")
    question = ["-i", scene, "-p", "What shape is the red object?", "--device", "cpu"]
    assert main(["generate", "-m", embedded, *question, "--quantize", method]) == 0
    assert capsys.readouterr().out == "ring\n"
    assert main(["convert", embedded, out, "--quantize", method, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == method
    assert main(["generate", "-m", out, *question]) == 0
    assert capsys.readouterr().out == "ring\n"
    assert main(["info", out, "--checksums"]) == 0
    assert "equal the manifest" in capsys.readouterr().out
    other = other_than(method)
    assert main(["generate", "-m", out, *question, "--quantize", other]) == 1
    assert (
        capsys.readouterr().err == f"error: {out}: is {method} already, it cannot become {other}\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-p", "x", "--quantize", "int2"],
        ["convert", "a", "b", "--quantize", "int2"],
        ["convert", "a", "b", "--quantize", "int4", "--to", "hf"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_the_core_does_not_know_it() -> None:
    for path in (ROOT / "llava_lite").glob("*.py"):
        assert "quanti" not in path.read_text(), path.name
