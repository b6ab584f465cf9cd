"""A decoder with fewer heads of keys and values is the one with these heads repeated; with biases
and a tied head it is transformers' Qwen2."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.examples import examples
from helpers.models import GQA_CONFIG, GQA_TEXT, TINY_CONFIG, TINY_TEXT, random_llava
from helpers.peers import peer
from helpers.tensors import close
from llava_lite.cache import attend, causal_mask
from llava_lite.checkpoints.names import our_names
from llava_lite.checkpoints.skeleton import HEAD, WithoutInit, meta_model
from llava_lite.config import LlavaConfig, TextConfig
from llava_lite.fastv import last_row
from llava_lite.generation.trace import decoder_flops, kv_bytes
from llava_lite.layout import Layout
from llava_lite.llava import Llava
from llava_lite.reduction import FastV, Reduction, ToMe

TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-6}  # rotations stay in float32
seeds = st.integers(0, 2**31)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Head g of x (G * D, ...) for the query heads that read it: (H * D, ...)."""
    heads = x.unflatten(0, (GQA_TEXT.kv_heads, -1))
    return heads.repeat_interleave(groups, 0).flatten(0, 1)


def with_all_heads(llava: Llava) -> Llava:
    """The same model with a head of keys and values for every query head."""
    text = replace(llava.config.text, num_kv_heads=None)
    wide = Llava(replace(llava.config, text=text)).to(llava.dtype).eval()
    groups = text.num_heads // llava.config.text.kv_heads
    wide.load_state_dict(
        {
            name: repeat_heads(tensor, groups)
            if name.split(".")[-2] in ("k_proj", "v_proj") and name.startswith("decoder.")
            else tensor
            for name, tensor in llava.state_dict().items()
        }
    )
    return wide


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def pair(request: pytest.FixtureRequest) -> tuple[Llava, Llava]:
    llava = random_llava(GQA_CONFIG, dtype=request.param)
    return llava, with_all_heads(llava)


REDUCTIONS = {
    "none": Reduction(),
    "vtu": Reduction(merge=ToMe(keep=7)),
    "logical": Reduction(merge=ToMe(keep=7), positions="logical"),
    "folded": Reduction(merge=ToMe(keep=7), positions="folded"),
    "fastv": Reduction(fastv=FastV(keep=5, layer=1)),
    "folding": Reduction(fastv=FastV(keep=5, layer=2, rest="fold"), positions="folded"),
    "hybrid": Reduction(merge=ToMe(keep=9), fastv=FastV(keep=4, layer=2)),
}


@pytest.mark.parametrize("name", list(REDUCTIONS))
@torch.inference_mode()
def test_fewer_heads_equal_repeated_ones(pair: tuple[Llava, Llava], name: str) -> None:
    """Prefill, three tokens after it, and a second turn with several rows."""
    size = TINY_CONFIG.vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 6, -200, 7, 8, 9, -200, 20, 30]])
    found: list[list[Tensor]] = [[], []]
    for llava, logits in zip(pair, found, strict=True):
        step, cache, position = llava.prefill(ids, pixels, REDUCTIONS[name])
        heads = llava.config.text.kv_heads
        assert {k.shape[1] for k, _ in cache} == {v.shape[1] for _, v in cache} == {heads}
        logits.append(step)
        for token in (3, 44, 7):
            step, cache = llava.decode(torch.tensor(token), position, cache)
            position += 1
            logits.append(step)
        rows, layout = llava.splice([9, 8, 7], [], position)
        logits.append(llava([rows], [layout], [cache], all_logits=True)[0])
    for ours, expected in zip(*found, strict=True):
        assert expected.std() > 0.5
        close(ours, expected, TOLERANCE[ours.dtype])


@examples(30)
@given(
    seeds,
    st.sampled_from([(4, 4), (4, 2), (6, 2), (7, 1), (8, 4)]),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([None, "bool", "float"]),
    st.booleans(),
)
def test_attention_reads_the_key_head_of_each_group(
    seed: int, heads: tuple[int, int], rows: int, past: int, kind: str | None, sized: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (num_heads, kv_heads), keys = heads, past + rows
    q = torch.randn(1, num_heads, rows, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, keys, 8, generator=generator, dtype=torch.float64)
    mask = None if kind is None else causal_mask(rows, keys, q.device)
    if kind == "float":
        mask = torch.where(mask, torch.randn(rows, keys, generator=generator), -torch.inf).double()
    sizes = torch.rand(past, generator=generator).double() if sized else None
    mixed = attend(q, k, v, mask, sizes)
    for head in range(num_heads):
        key_head = head // (num_heads // kv_heads)
        one = slice(key_head, key_head + 1)
        expected = attend(q[:, head : head + 1], k[:, one], v[:, one], mask, sizes)
        close(mixed[:, head : head + 1], expected, 1e-12)


@examples(20)
@given(seeds, st.sampled_from([(4, 4), (4, 2), (7, 1)]), st.integers(1, 9))
def test_fastv_averages_over_all_query_heads(seed: int, heads: tuple[int, int], n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    query = torch.randn(1, num_heads, 1, 8, generator=generator)
    keys = torch.randn(1, kv_heads, n, 8, generator=generator)
    expected = torch.zeros(n, dtype=torch.float64)
    for head in range(num_heads):
        key = keys[0, head * kv_heads // num_heads].double()  # (n, D)
        expected += (key @ query[0, head, 0].double() / 8**0.5).softmax(0) / num_heads
    close(last_row(query, keys), expected.float(), 1e-6)


def test_costs_follow_the_width_of_the_keys() -> None:
    """By hand, for one layer: 64 wide, keys 32 wide, an MLP of 96, 10 rows."""
    text = replace(GQA_TEXT, num_layers=1)
    rows = 10 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    assert decoder_flops(text, [10], [10]) == rows + 2 * 10 * 10 * 64
    assert kv_bytes(text, [10]) == 10 * 2 * 32 * 2


def test_a_tied_head_is_one_tensor() -> None:
    llava = Llava(GQA_CONFIG)
    names = [name for name, _ in llava.named_parameters()]
    assert HEAD not in names and HEAD in llava.state_dict()
    untied = Llava(replace(GQA_CONFIG, text=replace(GQA_TEXT, tie_embeddings=False)))
    assert HEAD in [name for name, _ in untied.named_parameters()]


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_heads_must_share_the_keys_evenly(kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"4 heads are no multiple of {kv_heads} key/value heads"):
        replace(TINY_CONFIG, text=replace(TINY_TEXT, num_kv_heads=kv_heads))


def test_old_config_files_load_unchanged() -> None:
    raw = TINY_CONFIG.to_dict()
    new = ("num_kv_heads", "attention_bias", "tie_embeddings", "stop_ids")
    old = {name: value for name, value in raw["text"].items() if name not in new}
    assert len(old) == len(raw["text"]) - len(new)
    assert LlavaConfig.from_dict({**raw, "text": old}) == TINY_CONFIG
    raw = {**GQA_CONFIG.to_dict(), "text": {**GQA_CONFIG.to_dict()["text"], "stop_ids": [5, 6]}}
    assert LlavaConfig.from_dict(raw).text.stop_ids == (5, 6)


# ---- transformers ------------------------------------------------------------------------------


def reference_qwen2(transformers: ModuleType, text: TextConfig) -> nn.Module:
    """transformers' Qwen2 for a config of ours, with random weights."""
    config = transformers.Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.kv_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_theta,
        max_position_embeddings=text.max_positions,
        tie_word_embeddings=text.tie_embeddings,
    )
    with WithoutInit():
        reference = transformers.Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.normal_(generator=generator).mul_(scale).add_(float("norm" in name))
    return reference


def adopt(reference: nn.Module, text: TextConfig) -> Llava:
    """Our decoder on the very same tensors."""
    llava = meta_model(replace(TINY_CONFIG, text=text))
    state = {our_names(n, qwen2=True)[0]: t for n, t in reference.state_dict().items()}
    llava.decoder.load_state_dict(
        {name.removeprefix("decoder."): tensor for name, tensor in state.items()}, assign=True
    )
    return llava


@torch.inference_mode()
def compare(transformers: ModuleType, text: TextConfig, ids: Sequence[int]) -> float:
    """The largest difference of all logits, in one pass and with a cache, for the largest one."""
    reference = reference_qwen2(transformers, text)
    llava = adopt(reference, text)
    expected = reference(torch.tensor([ids])).logits[0]
    embed, half = llava.decoder.embed_tokens, len(ids) // 2
    whole, _, _ = llava(
        [embed(torch.tensor(ids))],
        [Layout.text(len(ids), 0, torch.device("cpu"))],
        [None],
        all_logits=True,
    )
    logits, caches, _ = llava(
        [embed(torch.tensor(ids[:half]))],
        [Layout.text(half, 0, torch.device("cpu"))],
        [None],
        all_logits=True,
    )
    parts, cache = [logits], caches[0]
    for position in range(half, len(ids)):
        logits, cache = llava.decode(torch.tensor(ids[position]), position, cache)
        parts.append(logits[0])
    assert expected.std() > 0.1
    errors = [(found - expected).abs().max() for found in (whole, torch.cat(parts))]
    return float(max(errors) / expected.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_qwen2_equals_transformers(tied: bool) -> None:
    text = replace(GQA_TEXT, tie_embeddings=tied, rms_norm_eps=1e-6)
    assert compare(peer("transformers"), text, [5, 9, 17, 44, 300, 2, 2, 8]) < 2e-5


@pytest.mark.slow
def test_qwen2_with_7b_widths_equals_transformers() -> None:
    text = TextConfig(
        vocab_size=1000,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=2,
        num_heads=28,
        num_kv_heads=4,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=32768,
        sampled_vocab_size=990,
    )
    assert compare(peer("transformers"), text, [3 + 7 * n % 900 for n in range(40)]) < 1e-5
