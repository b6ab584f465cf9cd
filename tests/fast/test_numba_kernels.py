"""int4-dynamic: products of 4-bit weights and 8-bit inputs are the exact ones, however many rows,
threads and blocks there are.

Run: pytest tests/fast/test_numba_kernels.py
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.examples import examples
from helpers.models import ROOT, random_llava
from llava_lite.fast import kernels as choosing
from llava_lite.fast import quantize as module
from llava_lite.fast import timings
from llava_lite.fast.quantize import Int4DynamicLinear, Int4Linear, quantize

pytest.importorskip("numba", reason="numba is in the extra `numba`")
numba_kernels = import_module("llava_lite.fast.numba_kernels")

CPU = torch.device("cpu")
SHAPES = [(1, 32), (31, 64), (33, 96), (64, 32), (200, 384), (96, 1024)]
Parts = dict[str, Tensor]


def random_parts(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parts:
    """Codes, steps and offsets of every value, and scales of several sizes."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    return {
        "weight_int4": integers(0, 255, n, k // 2).to(torch.uint8),
        "scales": torch.rand(n, generator=generator).add(0.01).to(dtype),
        "steps": integers(1, 255, n, k // 32).to(torch.uint8),
        "offsets": integers(-127, 127, n, k // 32).to(torch.int8),
    }


def random_rows(rows: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def round_slowly(x: Tensor) -> Tensor:
    """The rows (R, K) that the codes of x stand for, in float64."""
    groups = x.float().unflatten(1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
    assert codes.abs().max() <= 127
    return (codes.double() * scales.double()).flatten(1)


def check_product(y: Tensor, x: Tensor, parts: Parts) -> None:
    """y is the product in float64, but for the rounding of float32 sums."""
    weight = Int4Linear.restore({**parts, "scales": parts["scales"].float()}).double()
    rounded = round_slowly(x)
    # An offset can be as large as the codes, and cancel them.
    size = parts["scales"].double()[:, None] * parts["steps"].double() / 255
    total = rounded.abs() @ (16 * size).repeat_interleave(32, dim=1).T
    noise = torch.finfo(torch.float32).eps * (8 + x.shape[1] / 32)
    assert ((y.double() - rounded @ weight.T).abs() <= noise * total + 1e-40).all()


def multiply(layer: Int4DynamicLinear, x: Tensor) -> Tensor:
    return layer.matmul_codes(x)[:, : layer.out_features]


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_exact_sums(n: int, k: int) -> None:
    """For 1 to 70 rows. A row does not depend on the others, to the bit."""
    parts, x = random_parts(n, k), random_rows(70, k)
    layer = Int4DynamicLinear(parts)
    whole = multiply(layer, x)
    check_product(whole, x, parts)
    for rows in range(1, 70):
        assert torch.equal(multiply(layer, x[:rows]), whole[:rows])
    assert torch.equal(multiply(layer, x[33:34]), whole[33:34])


@examples(40)
@given(data=st.data())
def test_products_of_hard_rows(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 100)), 32 * data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 2**32 - 1))
    parts, x = random_parts(n, k, seed), random_rows(data.draw(st.integers(1, 9)), k, seed)
    x[0] *= data.draw(st.sampled_from([0.0, 1e-30, 1e-38, 1e-42, 1e30]))
    x[-1, : k // 2] = 0
    x[-1, data.draw(st.integers(0, k - 1))] = data.draw(st.floats(-1e6, 1e6, width=32))
    x[:, 0] = data.draw(st.sampled_from([-1.0, 0.0, 0.5]))
    check_product(multiply(Int4DynamicLinear(parts), x), x, parts)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [0, 15])
def test_the_largest_sums_do_not_overflow(code: int, sign: int) -> None:
    parts = random_parts(40, 64)
    parts["weight_int4"].fill_(code * 17)
    x = torch.full((3, 64), 2.5 * sign)
    check_product(multiply(Int4DynamicLinear(parts), x), x, parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_nan(bad: float) -> None:
    layer, x = Int4DynamicLinear(random_parts(40, 96)), random_rows(3, 96)
    whole = multiply(layer, x)
    x[1, 50] = bad
    y = multiply(layer, x)
    assert y[1].isnan().all() and torch.equal(y[::2], whole[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_rows_are_rounded_and_many_are_not(dtype: torch.dtype) -> None:
    parts = random_parts(200, 384, dtype=dtype)
    parts["scales"] /= 100
    layer, x = Int4DynamicLinear(parts), random_rows(80, 384).to(dtype)
    weight = Int4Linear.restore({**parts, "scales": parts["scales"].float()}).double()
    exact, rounded = x.double() @ weight.T, round_slowly(x) @ weight.T
    step = torch.finfo(dtype).eps
    noise = (step + 1e-5) * (x.double().abs() @ weight.abs().T)
    few, many = layer(x[:3]), layer(x)
    assert few.dtype == many.dtype == dtype
    assert ((few.double() - rounded[:3]).abs() <= noise[:3]).all()
    assert ((many.double() - exact).abs() <= noise).all()
    assert (few.double() - exact[:3]).norm() < 0.02 * exact[:3].norm()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_results(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are shared with a second thread, if this torch has threads that can be shared."""
    layer, x = Int4DynamicLinear(random_parts(900, 384)), random_rows(9, 384)
    run, shared = numba_kernels.find_threads(), []
    if sys.platform == "linux":
        assert run is not None

    def counting(*arguments: Any) -> None:
        shared.append(arguments[2])
        run(*arguments)

    monkeypatch.setattr(numba_kernels, "find_threads", lambda: run and counting)
    both = [multiply(layer, x), *layer.weight_blocks(torch.float32)]
    monkeypatch.setattr(numba_kernels, "find_threads", lambda: None)
    alone = [multiply(layer, x), *layer.weight_blocks(torch.float32)]
    assert all(map(torch.equal, both, alone))
    torch.set_num_threads(1)
    assert torch.equal(multiply(layer, x), both[0])
    assert shared == ([2, 2] if run else [])


def test_a_torch_without_shared_threads_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_kernels.ctypes, "CDLL", lambda path: object())
    assert numba_kernels.find_threads.__wrapped__() is None


# ---- order ---------------------------------------------------------------------------------------


def test_order_in_plain_python() -> None:
    codes = random_parts(64, 64)["weight_int4"]
    words = numba_kernels.pack(codes)
    assert words.shape == (2, 2, 4, 32) and words.dtype == torch.int32
    for n in range(64):
        for group in range(2):
            for word in range(4):
                start = 16 * group + 4 * word
                stored = bytes(codes[n, start : start + 4].tolist())
                value = int(words[n // 32, group, word, n % 32]) % 2**32
                assert value == int.from_bytes(stored, sys.byteorder)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weights_are_written_and_stored_again(n: int, k: int) -> None:
    parts = random_parts(n, k)
    layer = Int4DynamicLinear(parts)
    for name, part in layer.stored_parts().items():
        assert torch.equal(part, parts[name]), name
    written = torch.cat(list(layer.weight_blocks(torch.float32)), dim=1)
    expected = Int4Linear.restore(parts)
    assert written.shape == (k, n + -n % 64)
    torch.testing.assert_close(written[:, :n].T, expected, rtol=1e-5, atol=1e-5)
    narrow = torch.cat(list(layer.weight_blocks(torch.bfloat16)), dim=1)
    assert torch.equal(narrow, written.bfloat16())


def test_a_weight_takes_four_and_a_half_bits() -> None:
    layer = Int4DynamicLinear(random_parts(256, 1024, dtype=torch.bfloat16))
    held = sum(buffer.nbytes for buffer in layer.buffers()) - layer.scales.nbytes
    assert 8 * held == 4.5 * 256 * 1024


@pytest.mark.parametrize("copied", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_the_same_and_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = Int4DynamicLinear(random_parts(70, 64)), random_rows(2, 64)
    twin, expected = copied(layer), layer(x)
    assert type(twin) is Int4DynamicLinear and str(twin) == str(layer)
    for buffer in layer.buffers():
        buffer.zero_()
    assert torch.equal(twin(x), expected)


# ---- other processors ----------------------------------------------------------------------------


def test_processors_without_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LLVM makes of plain vectors is the same."""
    import numpy as np
    from numba import njit

    numbers = np.random.default_rng(0)
    words = numbers.integers(0, 2**32, (4, 32), dtype=np.uint32)
    x = numbers.integers(0, 2**32, 8, dtype=np.uint32)
    x[0] = 0x7F81_7F81  # 127 and -127
    words[0, 0] = 0xFFFF_FFFF
    found = []
    for there in (True, False):
        if there and not numba_kernels.adds_products_of_bytes():
            continue
        monkeypatch.setattr(numba_kernels, "adds_products_of_bytes", lambda there=there: there)
        sums = np.zeros(32, np.int32)
        njit(lambda w, x, s: numba_kernels.multiply_group(w, x, s))(words, x, sums)
        found.append(sums.tolist())
        monkeypatch.undo()
    expected = []
    for row in range(32):
        pairs = zip(words[:, row].tolist(), x.reshape(4, 2).tolist(), strict=True)
        expected.append(sum(multiply_word(word, *halves) for word, halves in pairs))
    assert all(sums == expected for sums in found)


def multiply_word(word: int, low: int, high: int) -> int:
    """The products of the lower and upper halves of 4 bytes with signed bytes, added."""
    total = 0
    for byte in range(4):
        code = word >> 8 * byte & 255
        for half, x in ((code & 15, low), (code >> 4, high)):
            total += half * int.from_bytes([x >> 8 * byte & 255], "little", signed=True)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generic", "haswell"])
def test_numba_for_other_processors(name: str) -> None:
    """Compiled anew, and checked as at loading."""
    script = """
import torch
from llava_lite.fast import numba_kernels, quantize
quantize.check_operator("int4-dynamic", torch.device("cpu"), torch.bfloat16)
print(numba_kernels.adds_products_of_bytes())
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "PYTHONPATH": str(ROOT)}
    if name == "generic":
        environment["NUMBA_CPU_FEATURES"] = ""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if name == "generic":
        assert done.stdout == "False\n"


# ---- where it does not run -----------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known about numba, before and after."""
    for cached in (module.find_numba_kernels, module.check_operator):
        cached.cache_clear()
    yield
    for cached in (module.find_numba_kernels, module.check_operator):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'numba'"),
            r"the package numba is missing: pip install 'llava-lite\[numba\]'$",
        ),
        (ImportError("no NumPy\n2.4"), "numba does not compile here: no NumPy"),
        (RuntimeError("LLVM"), "numba does not compile here: LLVM"),
    ],
)
def test_without_numba(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(module, "import_module", fail)
    llava = random_llava()
    before = list(llava.modules())
    with pytest.raises(ValueError, match=message) as found:
        quantize(llava, "int4-dynamic")
    assert "\n" not in str(found.value)
    assert str(found.value).startswith("int4-dynamic does not run here (torch")
    assert list(llava.modules()) == before


def test_wrong_products_are_found_out(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    original = numba_kernels.multiply
    monkeypatch.setattr(
        numba_kernels, "multiply", lambda x, *parts: original(x, *parts).roll(1, dims=1)
    )
    with pytest.raises(ValueError, match="the packed operator is off by"):
        module.check_operator("int4-dynamic", CPU, torch.bfloat16)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="^int4-dynamic does not run here .* it is for cpu$"):
        module.check_operator("int4-dynamic", torch.device("cuda"), torch.bfloat16)
    layer = Int4DynamicLinear(random_parts(64, 64))
    with pytest.raises(ValueError, match="int4-dynamic weights are packed for cpu: load the model"):
        layer.to("meta")


def test_no_folder_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba says so when it is asked for a cache. Kernels are then compiled in every process."""
    assert numba_kernels.keeps_code()

    def refuse(**_: object) -> Callable:
        def decorate(function: Callable) -> Callable:
            raise RuntimeError("cannot cache function: no locator available")

        return decorate

    monkeypatch.setattr(numba_kernels, "njit", refuse)
    assert not numba_kernels.keeps_code()


# ---- the choice of an operator -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "expected"), [(1.0, Int4DynamicLinear), (2.0, Int4DynamicLinear), (2.1, Int4Linear)]
)
def test_time_decides_between_operators(
    ours: float, expected: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(choosing, "MIN_BYTES", 1)
    seconds = {"int4-dynamic": ours, "int4": 2.0}
    monkeypatch.setattr(
        choosing,
        "time_quantized",
        lambda method, dtype: [{"codes": seconds[method], "blocks": 9.0}] * 3,
    )
    parts = random_parts(100, 64, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Sequential(Int4DynamicLinear(parts)), nn.ReLU())
    bias = nn.Parameter(torch.linspace(-1, 1, 100).bfloat16(), requires_grad=False)
    model[0][0].bias = bias
    choosing.choose_kernels(model)
    layer = model[0][0]
    assert type(layer) is expected and layer.codes_rows == 64 and layer.out_features == 100
    x = random_rows(100, 64).bfloat16()
    exact = x.float() @ Int4Linear.restore(parts).T + bias.float()
    assert (layer(x).float() - exact).norm() <= 0.02 * exact.norm()


def test_small_layers_keep_their_operator() -> None:
    model = nn.Sequential(Int4DynamicLinear(random_parts(100, 64)))
    choosing.choose_kernels(model)
    assert type(model[0]) is Int4DynamicLinear


def test_times_depend_on_the_version_of_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    here = timings.machine_facts()
    assert here["numba"] == import_module("numba").__version__
    monkeypatch.setattr(timings, "version", lambda name: "9.9")
    assert timings.machine_facts() == {**here, "numba": "9.9"}

    def missing(name: str) -> str:
        raise timings.PackageNotFoundError

    monkeypatch.setattr(timings, "version", missing)
    assert timings.numba_version() is None
