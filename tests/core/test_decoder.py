"""The core against slow oracles written from the formulas, and the equalities that must hold for
any size: cached = recomputed, batched = one by one, packed = alone.

Norms and rotations run in float32 whatever the model's dtype, so a float64 model still agrees with
its float64 oracle to float32's precision only.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.examples import examples
from helpers.models import TINY_TEXT, TINY_VISION, random_llava
from helpers.tensors import close, draw, rms_norm_oracle
from llava_lite.cache import KVCache, attend, causal_mask
from llava_lite.config import IMAGE_TOKEN_ID, TextConfig
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder, RMSNorm
from llava_lite.llava import Llava
from llava_lite.reduction import FastV
from llava_lite.rope import apply_rope, rope_cos_sin

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-6}
seeds = st.integers(0, 2**31)
few = examples(15)


# ---- oracles: one number at a time, or one plain formula ---------------------------------------


def rope_oracle(x: Tensor, positions: Sequence[int], theta: float) -> Tensor:
    """x (N, H, D): channel i and i + D/2 as one complex number, turned by position *
    theta^(-2i/D)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    for row, position in enumerate(positions):
        for pair in range(half):
            angle = position * theta ** (-2 * pair / (2 * half))
            turned[row, :, pair] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, one query of one head at a time. (H, n, D), keys (H, N, D), queries
    last."""
    q, k, v = q.double(), k.double(), v.double()
    mixed = torch.zeros_like(q)
    past = k.shape[1] - q.shape[1]
    for head in range(q.shape[0]):
        for row in range(q.shape[1]):
            scores = [
                float(q[head, row] @ k[head, key]) / math.sqrt(q.shape[-1])
                for key in range(past + row + 1)
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            for key, weight in enumerate(weights):
                mixed[head, row] += weight / sum(weights) * v[head, key]
    return mixed


def layer_norm_oracle(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, C) -> (H, N, D)"""
    return x.reshape(len(x), num_heads, -1).transpose(0, 1)


def decoder_oracle(
    decoder: LlamaDecoder, config: TextConfig, x: Tensor, positions: Sequence[int]
) -> Tensor:
    """Llama without a cache, in float64: input_embeds (N, C) -> logits (N, V)."""
    weights = {name: tensor.double() for name, tensor in decoder.state_dict().items()}
    x, eps = x.double(), config.rms_norm_eps
    for layer_idx in range(config.num_layers):
        w = {
            name.removeprefix(f"layers.{layer_idx}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"layers.{layer_idx}.")
        }
        normed = rms_norm_oracle(x, w["input_norm.weight"], eps)
        q, k, v = (
            (normed @ w[f"attn.{name}_proj.weight"].T).reshape(len(x), config.num_heads, -1)
            for name in "qkv"
        )
        q, k = (rope_oracle(rows, positions, config.rope_theta) for rows in (q, k))
        mixed = attention_oracle(*(rows.transpose(0, 1) for rows in (q, k, v)))
        x = x + mixed.transpose(0, 1).reshape(len(x), -1) @ w["attn.o_proj.weight"].T
        normed = rms_norm_oracle(x, w["post_attn_norm.weight"], eps)
        gate = normed @ w["mlp.gate_proj.weight"].T
        hidden = gate / (1 + (-gate).exp()) * (normed @ w["mlp.up_proj.weight"].T)
        x = x + hidden @ w["mlp.down_proj.weight"].T
    return rms_norm_oracle(x, weights["norm.weight"], eps) @ weights["lm_head.weight"].T


def vision_oracle(llava: Llava, pixel_values: Tensor) -> Tensor:
    """CLIP up to the feature layer, one image (3, S, S), patch by patch, in float64 -> (P, C)."""
    config = llava.config.vision
    w = {name: tensor.double() for name, tensor in llava.vision.state_dict().items()}
    size, rows = config.patch_size, [w["class_embed"]]
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            patch = pixel_values[:, top : top + size, left : left + size].double()
            rows.append((w["patch_embed.weight"] * patch).sum((1, 2, 3)))
    x = torch.stack(rows) + w["pos_embed"]
    eps = config.layer_norm_eps
    x = layer_norm_oracle(x, w["pre_norm.weight"], w["pre_norm.bias"], eps)
    for block in range(config.num_blocks):
        name = f"blocks.{block}."
        normed = layer_norm_oracle(x, w[name + "norm1.weight"], w[name + "norm1.bias"], eps)
        q, k, v = (
            heads(
                normed @ w[f"{name}attn.{p}.weight"].T + w[f"{name}attn.{p}.bias"], config.num_heads
            )
            for p in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + mixed @ w[name + "attn.o_proj.weight"].T + w[name + "attn.o_proj.bias"]
        normed = layer_norm_oracle(x, w[name + "norm2.weight"], w[name + "norm2.bias"], eps)
        hidden = normed @ w[name + "mlp.fc1.weight"].T + w[name + "mlp.fc1.bias"]
        hidden = hidden / (1 + (-1.702 * hidden).exp())
        x = x + hidden @ w[name + "mlp.fc2.weight"].T + w[name + "mlp.fc2.bias"]
    return x[1:]


def projector_oracle(llava: Llava, x: Tensor) -> Tensor:
    w = {name: tensor.double() for name, tensor in llava.projector.state_dict().items()}
    x = x @ w["layers.0.weight"].T + w["layers.0.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ w["layers.1.weight"].T + w["layers.1.bias"]


# ---- RoPE --------------------------------------------------------------------------------------


@few
@given(
    seeds,
    st.lists(st.integers(0, 4095), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([100.0, 10000.0]),
)
def test_rope_turns_pairs_as_complex_numbers(
    seed: int, positions: list[int], num_heads: int, pairs: int, theta: float
) -> None:
    x = draw(seed, len(positions), num_heads, 2 * pairs)
    cos, sin = rope_cos_sin(torch.tensor(positions), 2 * pairs, theta)
    # An angle of up to 4095 rad in float32 is exact to 4095 * 2^-24 = 2.4e-4 and some rounding.
    close(apply_rope(x, cos, sin), rope_oracle(x, positions, theta), 2e-3)
    assert cos.dtype == sin.dtype == torch.float32


@few
@given(seeds, st.integers(0, 60), st.integers(0, 60), st.integers(1, 300))
def test_rope_scores_depend_on_position_differences_only(
    seed: int, query_position: int, key_position: int, shift: int
) -> None:
    q, k = draw(seed, 1, 2, 16), draw(seed + 1, 1, 2, 16)

    def scores(offset: int) -> Tensor:
        q_rope = rope_cos_sin(torch.tensor([query_position + offset]), 16, 10000.0)
        k_rope = rope_cos_sin(torch.tensor([key_position + offset]), 16, 10000.0)
        return (apply_rope(q, *q_rope) * apply_rope(k, *k_rope)).sum(-1)

    close(scores(shift), scores(0), 5e-4)
    if query_position != key_position:
        q_rope = rope_cos_sin(torch.tensor([query_position]), 16, 10000.0)
        unturned = (apply_rope(q, *q_rope) * apply_rope(k, *q_rope)).sum(-1)
        assert not torch.allclose(scores(0), unturned, atol=1e-3)


def test_rope_angles_stay_float32_in_a_16_bit_model() -> None:
    x = draw(0, 1, 1, 4)
    cos, sin = rope_cos_sin(torch.tensor([4095]), 4, 10000.0)
    rotated = apply_rope(x.to(torch.bfloat16), cos, sin)
    assert rotated.dtype == torch.bfloat16
    close(rotated, rope_oracle(x.to(torch.bfloat16), [4095], 10000.0), 2e-2)


# ---- norms and attention -----------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from(DTYPES))
def test_rms_norm_formula(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(width, 1e-5).to(dtype)
    norm.weight.data = draw(seed + 1, width, dtype=dtype)
    x = draw(seed, rows, width, dtype=dtype) * 10
    close(norm(x), rms_norm_oracle(x, norm.weight, 1e-5), 5e-6)


def test_rms_norm_rounds_before_the_weight() -> None:
    """Llama casts the normed value back to 16 bit first and multiplies in 16 bit."""
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    norm.weight.data = draw(1, 64, dtype=torch.bfloat16)
    x = draw(0, 8, 64, dtype=torch.bfloat16)
    wide = rms_norm_oracle(x, torch.ones(64), 1e-5)
    expected = wide.to(torch.bfloat16) * norm.weight
    assert torch.equal(norm(x), expected)
    assert not torch.equal(norm(x), (wide * norm.weight.double()).to(torch.bfloat16))


@few
@given(seeds, st.integers(1, 7), st.integers(0, 6), st.integers(1, 3), st.sampled_from(DTYPES))
def test_attention_is_causal_behind_any_cache(
    seed: int, num_queries: int, num_past: int, num_heads: int, dtype: torch.dtype
) -> None:
    q = draw(seed, 1, num_heads, num_queries, 8, dtype=dtype)
    k, v = (draw(seed + i, 1, num_heads, num_past + num_queries, 8, dtype=dtype) for i in (1, 2))
    close(attend(q, k, v, None)[0], attention_oracle(q[0], k[0], v[0]), 1e-5)
    mask = causal_mask(num_queries, num_past + num_queries, q.device)
    close(attend(q, k, v, mask)[0], attention_oracle(q[0], k[0], v[0]), 1e-5)


# ---- the decoder -------------------------------------------------------------------------------

LLAVAS = {dtype: random_llava(dtype=dtype) for dtype in DTYPES}
dtypes = st.sampled_from(DTYPES)


def layouts_from(items: Sequence[Tensor], starts: Sequence[int]) -> list[Layout]:
    """Rows one after the other, each item's from its start on."""
    return [
        Layout.text(len(item), start, item.device)
        for item, start in zip(items, starts, strict=True)
    ]


def run_decoder(
    llava: Llava,
    items: Sequence[Tensor],
    starts: Sequence[int] | None = None,
    caches: Sequence[KVCache | None] | None = None,
) -> tuple[list[Tensor], list[KVCache]]:
    """All logits (n, V) of every item, and the caches."""
    with torch.inference_mode():
        layouts = layouts_from(items, starts or [0] * len(items))
        logits, grown, _ = llava(items, layouts, caches or [None] * len(items), all_logits=True)
    return list(logits.split([len(item) for item in items])), grown


@few
@given(seeds, st.integers(1, 9), st.integers(0, 50), dtypes)
def test_decoder_equals_the_formulas(seed: int, rows: int, start: int, dtype: torch.dtype) -> None:
    llava = LLAVAS[dtype]
    x = draw(seed, rows, TINY_TEXT.hidden_size, dtype=dtype)
    [logits], _ = run_decoder(llava, [x], [start])
    expected = decoder_oracle(llava.decoder, TINY_TEXT, x, range(start, start + rows))
    close(logits, expected, 5e-5)
    assert logits.std() > 0.1


@few
@given(seeds, st.lists(st.integers(1, 6), min_size=2, max_size=5), dtypes)
def test_any_chunking_equals_one_pass(seed: int, chunks: list[int], dtype: torch.dtype) -> None:
    """Decode (chunks of one) and chat continuation (longer chunks) against the whole at once."""
    llava = LLAVAS[dtype]
    x = draw(seed, sum(chunks), TINY_TEXT.hidden_size, dtype=dtype)
    [whole], [whole_cache] = run_decoder(llava, [x])
    pieces, cache, start = [], None, 0
    for piece in x.split(chunks):
        [logits], [cache] = run_decoder(llava, [piece], [start], [cache])
        pieces.append(logits)
        start += len(piece)
    close(torch.cat(pieces), whole, TOLERANCE[dtype])
    for layer, whole_layer in zip(cache, whole_cache, strict=True):
        for grown, full in zip(layer, whole_layer, strict=True):
            assert grown.shape == (1, TINY_TEXT.num_heads, len(x), TINY_TEXT.head_dim)
            close(grown, full, TOLERANCE[dtype])


@few
@given(
    seeds,
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=5),
    dtypes,
)
def test_packed_batch_equals_items_alone(
    seed: int, sizes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Items of any length, each with its own cache or none, share a forward."""
    llava = LLAVAS[dtype]
    items, starts, caches, alone = [], [], [], []
    for index, (num_past, num_new) in enumerate(sizes):
        x = draw(seed + index, num_past + num_new, TINY_TEXT.hidden_size, dtype=dtype)
        cache = run_decoder(llava, [x[:num_past]])[1][0] if num_past else None
        items.append(x[num_past:])
        starts.append(num_past)
        caches.append(cache)
        alone.append(run_decoder(llava, [x[num_past:]], [num_past], [cache]))
    logits, grown = run_decoder(llava, items, starts, caches)
    for index, ([expected], [cache]) in enumerate(alone):
        close(logits[index], expected, TOLERANCE[dtype])
        close(grown[index][-1][0], cache[-1][0], TOLERANCE[dtype])
    with torch.inference_mode():
        last, _, _ = llava(items, layouts_from(items, starts), caches)
    assert torch.equal(last.argmax(-1), torch.stack([item[-1] for item in logits]).argmax(-1))
    close(last, torch.stack([item[-1] for item in logits]), TOLERANCE[dtype])


@few
@given(seeds, st.integers(2, 8), st.integers(1, 400))
def test_only_position_differences_matter(seed: int, rows: int, shift: int) -> None:
    llava = LLAVAS[torch.float64]
    x = draw(seed, rows, TINY_TEXT.hidden_size)
    [here], _ = run_decoder(llava, [x], [0])
    [there], _ = run_decoder(llava, [x], [shift])
    close(there, here, 2e-3)  # float32 angles up to 408 rad, through two layers


def test_a_later_row_changes_no_earlier_one() -> None:
    llava = LLAVAS[torch.float64]
    x = draw(0, 8, TINY_TEXT.hidden_size)
    changed = x.clone()
    changed[5] += 1
    [before], _ = run_decoder(llava, [x])
    [after], _ = run_decoder(llava, [changed])
    close(after[:5], before[:5], 2e-6)
    assert (after[5:] - before[5:]).abs().amax(-1).gt(1e-3).all()


def test_an_own_mask_replaces_the_causal_one() -> None:
    llava = LLAVAS[torch.float64]
    x = draw(0, 6, TINY_TEXT.hidden_size)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    layout = Layout.text(6, 0, x.device)
    masked = llava.decoder(x, [layout], [None], masks=[mask]).hidden_states
    plain = llava.decoder(x, [layout], [None]).hidden_states
    close(masked, plain, 2e-6)
    mask[:, 0] = False
    mask[0, 0] = True
    blind = llava.decoder(x, [layout], [None], masks=[mask]).hidden_states
    rest = Layout.text(5, 1, x.device)
    without = llava.decoder(x[1:], [rest], [None]).hidden_states
    close(blind[1:], without, 2e-6)


# ---- vision and the whole ----------------------------------------------------------------------


@examples(4)
@given(seeds, st.integers(1, 3), dtypes)
def test_vision_tower_and_projector_equal_the_formulas(
    seed: int, num_images: int, dtype: torch.dtype
) -> None:
    llava, size = LLAVAS[dtype], TINY_VISION.image_size
    pixel_values = draw(seed, num_images, 3, size, size, dtype=dtype)
    with torch.inference_mode():
        features = llava.vision(pixel_values).image_features
        embeds = llava.encode_image(pixel_values)
    assert features.shape == (num_images, TINY_VISION.num_patches, TINY_VISION.hidden_size)
    for index in range(num_images):
        expected = vision_oracle(llava, pixel_values[index])
        # Rounding alone reaches 2.6e-5 in about one of 400 random images.
        close(features[index], expected, 5e-5 if dtype == torch.float32 else 1e-10)
        projected = projector_oracle(llava, expected)
        # Outputs of about 10; some are small differences of such.
        close(embeds[index].image_embeds, projected, 1e-4 if dtype == torch.float32 else 1e-10)


def test_a_mask_replaces_the_causal_one_behind_a_cache() -> None:
    """Three queries against five keys, all of which they may see."""
    q, k, v = draw(1, 1, 2, 3, 4), draw(2, 1, 2, 5, 4), draw(3, 1, 2, 5, 4)
    everything = torch.ones(3, 5, dtype=torch.bool)
    weights = (q @ k.mT / 2).softmax(-1)
    close(attend(q, k, v, everything), weights @ v, 1e-12)
    assert not torch.allclose(attend(q, k, v, None), weights @ v)


def test_feature_layer_counts_blocks() -> None:
    """Entry -2 of the hidden states of 3 layers: 2 blocks are built and run."""
    assert TINY_VISION.num_layers == 3
    assert TINY_VISION.feature_layer == -2
    assert len(LLAVAS[torch.float64].vision.blocks) == 2


def test_whole_model_equals_the_formulas() -> None:
    """Pixels to logits, text on both sides of the image."""
    llava, size = LLAVAS[torch.float64], TINY_VISION.image_size
    pixel_values = draw(11, 1, 3, size, size)
    input_ids = [1, 300, IMAGE_TOKEN_ID, 40, 41, 42]
    with torch.inference_mode():
        logits, _, _ = llava.prefill(torch.tensor([input_ids]), pixel_values, all_logits=True)
    table = llava.decoder.embed_tokens.weight.detach()
    image = projector_oracle(llava, vision_oracle(llava, pixel_values[0]))
    x = torch.cat((table[[1, 300]], image, table[[40, 41, 42]]))
    close(logits[0], decoder_oracle(llava.decoder, TINY_TEXT, x, range(len(x))), 2e-5)


def test_forward_keeps_no_state() -> None:
    """Nothing of a call stays on the modules: same buffers and attributes before and after."""
    llava = LLAVAS[torch.float32]

    def attributes() -> list[tuple[str, list[str]]]:
        return [(name, sorted(vars(module))) for name, module in llava.named_modules()]

    before = attributes()
    x = draw(0, 4, TINY_TEXT.hidden_size, dtype=torch.float32)
    first, _ = run_decoder(llava, [x])
    second, _ = run_decoder(llava, [x])
    assert torch.equal(first[0], second[0])
    assert attributes() == before


def test_mismatched_lists_are_refused() -> None:
    llava = LLAVAS[torch.float32]
    x = draw(0, 4, TINY_TEXT.hidden_size, dtype=torch.float32)
    layout = Layout.text(4, 0, x.device)
    with pytest.raises(ValueError, match="zip"):
        llava([x, x], [layout, layout], [None])
    with pytest.raises(ValueError, match="zip"):
        llava([x, x], [layout, layout], [None, None], [FastV(keep=1, layer=1)])
