"""The faster forms of a decoder with fewer key/value heads, biases and a tied head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llava_lite
from helpers.models import GQA_CONFIG, random_llava
from llava_lite.bench.cases import OURS, Contender, Work, growing_cases
from llava_lite.bench.machine import Prepared
from llava_lite.bench.models import random_model, twin
from llava_lite.checkpoints.checkpoint import load_model, save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.errors import CheckpointError
from llava_lite.fast import kernels
from llava_lite.fast.compiled import CompiledModel
from llava_lite.fast.quantize import METHODS, quantize
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import Llava
from llava_lite.reduction import FastV, Reduction

PROMPT = torch.tensor([[1, 5, 6, 7, 8, 9, 20, 30]])
# A width that holds whole groups of int4.
WIDE = replace(
    GQA_CONFIG, text=replace(GQA_CONFIG.text, hidden_size=128, intermediate_size=256, num_layers=2)
)


@torch.inference_mode()
def answers_of(llava: Llava) -> Tensor:
    """Logits of a prompt and of six tokens after it."""
    logits, cache, position = llava.prefill(PROMPT, None)
    rows = [logits]
    for token in (3, 9, 44, 7, 300, 12):
        logits, cache = llava.decode(torch.tensor(token), position, cache)
        position += 1
        rows.append(logits)
    return torch.cat(rows, dim=1)[0]


def is_tied(llava: Llava) -> bool:
    return llava.decoder.lm_head.weight is llava.decoder.embed_tokens.weight


@pytest.mark.parametrize("fastv", [None, FastV(keep=5, layer=1)])
def test_compiled_steps_answer_as_ordinary_ones(
    tiny_tokenizer: Tokenizer, fastv: FastV | None
) -> None:
    model = Model(random_llava(GQA_CONFIG), tiny_tokenizer)
    compiled = CompiledModel(model, "eager")
    prompts = ["star?", "What color is the circle?", "how many?"]
    options = {"max_new_tokens": 6, "reduction": Reduction(fastv=fastv)}
    image = torch.zeros(3, 40, 60)
    found = compiled.generate([image] * 3, prompts, **options)
    assert found == model.generate([image] * 3, prompts, **options)
    assert {buffer.shape[1] for buffer in compiled.static.keys} == {2}


@pytest.mark.parametrize("method", list(METHODS))
def test_quantized_layers_keep_their_biases(method: str) -> None:
    """Equal to a plain model with the restored weights: the head is a copy of the embedding, whose
    rows stay as they are."""
    if method == "int4-dynamic":
        pytest.importorskip("numba")
    llava, plain = (random_llava(WIDE) for _ in range(2))
    kind = METHODS[method]
    with torch.no_grad():
        plain.decoder.lm_head.weight = torch.nn.Parameter(plain.decoder.lm_head.weight.clone())
        for module in plain.decoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(kind.restore(kind.round(module.weight, torch.float32)))
    quantize(llava, method)
    assert torch.equal(llava.decoder.embed_tokens.weight, plain.decoder.embed_tokens.weight)
    found, expected = answers_of(llava), answers_of(plain)
    tolerance = 0.1 if method.endswith("dynamic") else 2e-3  # its inputs are rounded too
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    with torch.no_grad():
        llava.decoder.layers[0].attn.v_proj.bias += 1
    assert (answers_of(llava) - found).abs().max() > 0.1


@pytest.mark.parametrize("method", list(METHODS))
def test_a_quantized_folder_is_the_quantized_model(tmp_path: Path, method: str) -> None:
    save_model(random_llava(WIDE), WIDE, tmp_path / "plain", dtype="bfloat16")
    convert(tmp_path / "plain", tmp_path / "m", quantize=method, verify=True)
    llava = load_model(tmp_path / "plain")
    assert is_tied(llava) and is_tied(load_model(tmp_path / "plain", dtype="float32"))
    quantize(llava, method)
    assert torch.equal(answers_of(load_model(tmp_path / "m")), answers_of(llava))


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_formats_that_have_only_llama_refuse_it(
    tmp_path: Path, tiny_tokenizer: Tokenizer, to: str
) -> None:
    save_model(random_llava(GQA_CONFIG), GQA_CONFIG, tmp_path / "m", tiny_tokenizer)
    with pytest.raises(CheckpointError, match="can store only a Llama-2 decoder"):
        convert(tmp_path / "m", tmp_path / to, to=to)


def test_chosen_kernels_keep_the_head_tied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(kernels, "MIN_BYTES", 0)
    monkeypatch.setattr(kernels, "choose", lambda _: kernels.Choice(("weight first",) * 4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_model(random_llava(WIDE), WIDE, tmp_path / "m", tiny_tokenizer, dtype="bfloat16")
    plain = load_model(tmp_path / "m")
    chosen = llava_lite.load(tmp_path / "m", device="cpu", dtype="bfloat16").llava
    assert isinstance(chosen.decoder.lm_head, kernels.ChosenLinear) and is_tied(chosen)
    found, expected = answers_of(chosen), answers_of(plain)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_timings_tell_decoders_with_fewer_heads_apart() -> None:
    attn = random_llava(WIDE).decoder.layers[0].attn
    assert kernels.heads_of(attn) == (2, 32, 2)
    kind = kernels.kind_of_attention(torch.bfloat16, *kernels.heads_of(attn))
    assert kind == "bfloat16 attention, heads of 32, 2 queries per key"
    assert kernels.kind_of_attention(torch.bfloat16, 4, 32, 1) == "bfloat16 attention, heads of 32"
    assert min(kernels.time_attention(torch.bfloat16, 2, 32, 2).values()) > 0


def test_a_random_model_of_the_bench_is_tied(tiny_tokenizer: Tokenizer) -> None:
    """Its head reads the whole embedding, and its caches have two heads."""
    llava = random_model(GQA_CONFIG, torch.float32, "cpu")
    model = Model(llava, tiny_tokenizer)
    assert is_tied(llava) and is_tied(twin(model).llava)
    work = Work.of(llava)
    assert work.decoder_bytes == 4 * sum(p.numel() for p in llava.decoder.parameters())
    with torch.inference_mode():
        for case in growing_cases(Contender(OURS, model, work), 16):
            run = case.run.make() if isinstance(case.run, Prepared) else case.run
            run()
