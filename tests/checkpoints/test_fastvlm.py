"""FastVLM from published folders: the reference's prompts, ids, logits and caches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava_lite
from helpers.fastvlm import TOLERANCE, FastVLMGolden
from llava_lite.cache import KVCache
from llava_lite.generation.model import Model
from llava_lite.inputs.prompt import build_prompt
from llava_lite.layout import Layout
from llava_lite.llava import EncodedImage
from llava_lite.reduction import FastV

PROMPTS = (
    "one_image",
    "text_only",
    "two_images",
    "image_after_text",
    "two_turns",
    "three_images_adjacent",
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> FastVLMGolden:
    return FastVLMGolden(shared)


@pytest.fixture(scope="module")
def model(golden: FastVLMGolden) -> Model:
    return llava_lite.load(golden.folder, device="cpu", dtype="float32")


def splice(
    golden: FastVLMGolden, model: Model, prompt: str, positions: str = "vtu", mappings: Any = None
) -> tuple[Tensor, Layout]:
    """The rows of a prompt, with the reference's image embeds."""
    facts = golden.facts["prompts"][prompt]
    embeds = [golden.tensors["projector_output"][index] for index in facts["images"]]
    images = [EncodedImage(embed) for embed in embeds]
    if mappings is not None:
        features = [golden.tensors["tower_tokens"][index] for index in facts["images"]]
        images = [merge(model, *pair) for pair in zip(features, mappings, strict=True)]
    return model.llava.splice(facts["ids"], images, positions=positions)


def merge(model: Model, features: Tensor, mapping: list[int]) -> EncodedImage:
    """The means of the features (P, C) with the same token, projected."""
    tokens = torch.tensor(mapping)
    means = [features[tokens == token].mean(0) for token in range(max(mapping) + 1)]
    return EncodedImage(model.llava.projector(torch.stack(means)), tokens)


@torch.inference_mode()
def answer(
    model: Model, rows: Tensor, layout: Layout, steps: int, fastv: FastV | None = None
) -> tuple[list[int], Tensor, KVCache, Any]:
    """Greedy ids, the logits of every step (steps, V), the cache of the prompt, its prunings."""
    logits, [cache], [prunings] = model.llava([rows], [layout], [None], [fastv])
    first, found, all_logits = cache, [], []
    for position in range(layout.next_position, layout.next_position + steps):
        all_logits.append(logits.flatten())
        found.append(int(all_logits[-1][: model.config.text.sampled_vocab_size].argmax()))
        logits, cache = model.llava.decode(torch.tensor(found[-1]), position, cache)
    return found, torch.stack(all_logits), first, prunings


# ---- goldens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_prompts_and_greedy_tokens(golden: FastVLMGolden, model: Model, prompt: str) -> None:
    facts = golden.facts["prompts"][prompt]
    text = build_prompt("qwen_2", [(question, reply) for question, reply in facts["turns"]])
    assert text == facts["text"]
    assert model.tokenizer.encode_prompt(text) == facts["ids"]
    rows, layout = splice(golden, model, prompt)
    assert layout.next_position == facts["positions"]
    found, logits, _, _ = answer(model, rows, layout, 12)
    assert found == facts["greedy_12"]
    assert model.tokenizer.decode(found) == facts["decoded"]
    expected = golden.tensors[f"{prompt}.logits_last"]
    assert (logits[0, :1027] - expected).abs().max() <= TOLERANCE
    expected = golden.tensors[f"{prompt}.decode_logits"]
    assert (logits[:, :256] - expected).abs().max() <= TOLERANCE


def test_golden_logits_of_all_rows_and_caches(golden: FastVLMGolden, model: Model) -> None:
    rows, layout = splice(golden, model, "one_image")
    assert (rows - golden.tensors["one_image.inputs_embeds"]).abs().max() <= TOLERANCE
    with torch.inference_mode():
        logits, [cache], _ = model.llava([rows], [layout], [None], all_logits=True)
    assert (logits[:, :1027] - golden.tensors["one_image.logits"]).abs().max() <= TOLERANCE
    for layer, (k, v) in enumerate(cache):
        assert k.shape == v.shape == (1, 2, 54, 16)  # the cache holds key/value heads only
        assert (k - golden.tensors[f"one_image.k.{layer}"]).abs().max() <= TOLERANCE
        assert (v - golden.tensors[f"one_image.v.{layer}"]).abs().max() <= TOLERANCE


CASES = (
    *("one_image.full.fastv2-6", "one_image.full.fastv1-10", "two_images.full.fastv2-9"),
    *("one_image.keep7.plain", "one_image.keep7.logical", "one_image.keep7.vtu"),
    *("one_image.keep7.logical.fastv2-3", "one_image.keep7.vtu.fastv2-3"),
    *("two_images.keep6.logical.fastv2-5", "two_images.keep6.vtu.fastv2-5"),
)


@pytest.mark.parametrize("case", CASES)
def test_golden_reductions_of_the_decoder(golden: FastVLMGolden, model: Model, case: str) -> None:
    facts = golden.reductions[case]
    rows, layout = splice(
        golden, model, facts["prompt"], facts["positions"] or "vtu", facts.get("mappings")
    )
    assert (len(rows), len(layout.position_ids)) == (facts["rows"], facts["num_positions"])
    fastv = facts["fastv"] and FastV(layer=facts["fastv"]["layer"], keep=facts["fastv"]["keep"])
    found, logits, cache, prunings = answer(model, rows, layout, 6, fastv)
    assert found == facts["greedy_6"]
    assert [k.shape[2] for k, _ in cache] == facts["cache_lengths"]
    reduced = golden.reduced
    assert (logits[0] - reduced[f"{case}.logits_last_full"]).abs().max() <= TOLERANCE
    assert (logits[:, :256] - reduced[f"{case}.logits"]).abs().max() <= TOLERANCE
    assert (cache[0][0][0] - reduced[f"{case}.k0"]).abs().max() <= TOLERANCE
    assert (cache[-1][0][0] - reduced[f"{case}.k_last"]).abs().max() <= TOLERANCE
    if fastv:
        [pruning] = prunings
        assert pruning.kept_indices.tolist() == facts["kept_rows"]
        assert (pruning.scores - reduced[f"{case}.scores"]).abs().max() <= TOLERANCE
