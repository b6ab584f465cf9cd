"""Where rows stand, and attention over positions: layout.py and the unmerging in attention.py.

Against loops over plain lists, against the exact decomposition of virtual token unmerging (DyMU,
arXiv 2504.17040, which lives only here), and against files that the reference wrote.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from helpers.examples import examples
from helpers.goldens import GOLDEN_TOLERANCE, Golden, load_weights, strip, text_config
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.prompts import (
    Picture,
    Prompt,
    decode,
    prompts,
    seeds,
    write_out,
)
from helpers.tensors import close, draw
from llava_lite.attention import HybridAttention
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig, VisionConfig
from llava_lite.layout import Layout, join, pack, place_image
from llava_lite.llava import Llava
from llava_lite.reduction import POSITIONS, DToMe, Reduction
from llava_lite.rope import apply_rope, rope_cos_sin

CPU = torch.device("cpu")
few = examples(80)


# ---- placing rows ------------------------------------------------------------------------------

LLAVA = random_llava(dtype=torch.float64)


@few
@given(prompts(min_tail=0), st.sampled_from(POSITIONS), st.sampled_from([0, 5, 1500]))
def test_splice_places_every_row(prompt: Prompt, positions: str, start: int) -> None:
    rows, layout = prompt.splice(LLAVA, positions, start)
    expected = write_out(prompt, positions, start)
    assert layout.num_rows == len(rows) == expected.num_rows
    assert layout.position_ids.tolist() == expected.position_ids
    assert layout.num_keys == len(expected.keys())
    assert layout.folded == expected.folded
    assert layout.next_position == expected.next_position
    assert [list(range(*span)) for span in layout.image_spans] == expected.image_rows
    if layout.mapping_indices is None:
        assert expected.mapping == list(range(expected.num_rows))
    else:
        assert positions in ("vtu", "folded")
        assert any(p.groups is not None for p in prompt.pictures)
        assert layout.mapping_indices.tolist() == expected.mapping
    images = [picture.encoded().image_embeds for picture in prompt.pictures]
    words = iter(token for token in prompt.input_ids if token != IMAGE_TOKEN_ID)
    for row in range(expected.num_rows):
        if row in expected.shown:
            index, token = expected.shown[row]
            assert torch.equal(rows[row], images[index][token])
        else:
            assert torch.equal(rows[row], LLAVA.decoder.embed_tokens.weight[next(words)])


@few
@given(prompts(min_tail=0), st.sampled_from(POSITIONS), st.integers(0, 2000))
def test_positions_ascend_and_stay_below_the_next(
    prompt: Prompt, positions: str, start: int
) -> None:
    """Strictly: then the causal order of rows is the order of their positions."""
    _, layout = prompt.splice(LLAVA, positions, start)
    places = [start - 1, *layout.position_ids.tolist(), layout.next_position]
    assert all(here < there for here, there in zip(places[:-1], places[1:], strict=True))


@few
@given(prompts(min_tail=0), st.integers(0, 9))
def test_next_position(prompt: Prompt, start: int) -> None:
    """As without merging after P positions, except in `plain`: after U rows."""
    words = sum(token != IMAGE_TOKEN_ID for token in prompt.input_ids)
    tokens = sum(picture.num_tokens for picture in prompt.pictures)
    patches = sum(picture.encoded().num_patches for picture in prompt.pictures)
    for positions in POSITIONS:
        image = tokens if positions == "plain" else patches
        _, layout = prompt.splice(LLAVA, positions, start)
        assert layout.next_position == start + words + image
        taken = sum(p.encoded().num_positions(positions) for p in prompt.pictures)
        assert taken == image


def test_four_ways_to_place_an_image() -> None:
    """Patches 0..4 in three tokens; token 0 begins at patch 1, token 1 at 3, token 2 at 0."""
    mapping = torch.tensor([2, 0, 2, 1, 0])
    plain, order = place_image(mapping, 3, 10, "plain", CPU)
    assert (plain.position_ids.tolist(), order, plain.next_position) == ([10, 11, 12], None, 13)
    logical, order = place_image(mapping, 3, 10, "logical", CPU)
    assert order is not None
    assert (logical.position_ids.tolist(), order.tolist()) == ([10, 11, 13], [2, 0, 1])
    assert (logical.mapping_indices, logical.next_position) == (None, 15)
    vtu, order = place_image(mapping, 3, 10, "vtu", CPU)
    assert (vtu.position_ids.tolist(), order) == ([10, 11, 12, 13, 14], None)
    assert vtu.mapping_indices is mapping and vtu.next_position == 15
    folded, order = place_image(mapping, 3, 10, "folded", CPU)
    assert order is not None and folded.mapping_indices is not None
    assert (folded.position_ids.tolist(), order.tolist()) == ([10, 11, 12, 13, 14], [2, 0, 1])
    assert (folded.mapping_indices.tolist(), folded.next_position) == ([0, 1, 0, 2, 1], 15)
    for layout, folds, num_keys in (
        (plain, False, 3), (logical, False, 3), (vtu, False, 5), (folded, True, 3)
    ):  # fmt: skip
        assert layout.image_spans == ((0, 3),)
        assert (layout.folded, layout.num_keys) == (folds, num_keys)
    assert folded.row_sizes().tolist() == [2, 2, 1]
    assert vtu.row_sizes().tolist() == [2, 1, 2]
    assert logical.row_sizes().tolist() == [1, 1, 1]


@pytest.mark.parametrize("start", [0, 5, 35])
def test_spans_come_from_the_slot(start: int) -> None:
    """The reference has its image at a fixed place; ours is wherever the prompt has it."""
    prompt = Prompt((7,) * start + (IMAGE_TOKEN_ID, 9), (Picture(6, None, 0),))
    assert prompt.splice(LLAVA, "vtu")[1].image_spans == ((start, start + 6),)


# ---- keeping some rows -------------------------------------------------------------------------


@few
@given(prompts(min_images=1), st.sampled_from(POSITIONS), st.data())
def test_keep_leaves_the_positions_of_the_kept_rows(
    prompt: Prompt, positions: str, data: st.DataObject
) -> None:
    _, layout = prompt.splice(LLAVA, positions, 3)
    rows = st.sets(st.integers(0, layout.num_rows - 1), min_size=1)
    kept = sorted(data.draw(rows))
    left, lists = layout.keep(torch.tensor(kept)), write_out(prompt, positions, 3)
    stays = [e for e, row in enumerate(lists.mapping) if row in kept]
    assert left.num_rows == len(kept) and left.folded == lists.folded
    assert left.next_position == lists.next_position
    new_rows = [kept.index(lists.mapping[e]) for e in stays]
    if left.folded:  # all positions are still there: how many stay, only the device knows
        assert left.position_ids.tolist() == lists.position_ids
        assert left.mapping_indices is not None
        there = left.mapping_indices < len(kept)
        assert there.nonzero().flatten().tolist() == stays
        assert left.mapping_indices[there].tolist() == new_rows
        return
    assert left.position_ids.tolist() == [lists.position_ids[e] for e in stays]
    if left.mapping_indices is None:
        assert new_rows == list(range(len(kept)))
    else:
        assert left.mapping_indices.tolist() == new_rows


# ---- unmerging and remerging -------------------------------------------------------------------


@few
@given(
    st.lists(prompts(min_tail=0), min_size=1, max_size=3),
    st.sampled_from(["plain", "logical", "vtu"]),
    seeds,
)
def test_unmerge_copies_and_remerge_averages(
    batch: list[Prompt], positions: str, seed: int
) -> None:
    layout = pack([prompt.splice(LLAVA, positions)[1] for prompt in batch])
    mapping: list[int] = []
    for prompt in batch:
        lists, first = write_out(prompt, positions), max(mapping, default=-1) + 1
        mapping += [first + row for row in lists.mapping]
    x = draw(seed, sum(layout.num_rows), 2, 3)
    shown = layout.unmerge(x)
    assert torch.equal(shown, torch.stack([x[row] for row in mapping]))
    y = draw(seed + 1, len(mapping), 2, 3)
    merged = layout.remerge(y)
    for row in range(len(x)):
        members = [y[e] for e, owner in enumerate(mapping) if owner == row]
        close(merged[row], sum(members) / len(members), 1e-12)
    close(layout.remerge(shown), x, 1e-12)
    assert sum(layout.num_keys) == len(mapping)
    firsts = [sum(layout.num_keys[: item + 1]) - 1 for item in range(len(batch))]
    assert torch.equal(layout.last_rows(x), torch.stack([x[mapping[e]] for e in firsts]))


def test_without_merged_rows_nothing_is_copied() -> None:
    layout = pack([Layout.text(4, 0, CPU), Layout.text(2, 9, CPU)])
    x = draw(0, 6, 2, 3)
    assert layout.mapping_indices is None
    assert layout.unmerge(x) is x and layout.remerge(x) is x
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 9, 10]


def test_remerge_counts_in_float32() -> None:
    """A sum of 500 numbers near 4 in bfloat16 would be off by more than its last digit."""
    mapping = torch.zeros(500, dtype=torch.long)
    layout = pack([Layout(1, torch.arange(500), 500, mapping)])
    x = (4 + draw(0, 500, 8)).bfloat16()
    merged = layout.remerge(x)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, x.double().mean(0, keepdim=True).bfloat16())


def test_remerge_averages_over_positions_not_heads() -> None:
    """Fused attention returns (1, H, N, D), remerging takes (N, H, D): means over N either way,
    told apart by H != N."""
    mapping = torch.tensor([0, 1, 1, 2, 0])
    layout = pack([Layout(3, torch.arange(5), 5, mapping)])
    mixed = draw(0, 1, 4, 5, 6)  # (1, H, N, D)
    merged = layout.remerge(mixed[0].transpose(0, 1))
    assert merged.shape == (3, 4, 6)
    for row in range(3):
        close(merged[row], mixed[0][:, mapping == row].mean(1), 1e-12)


def test_join_moves_spans_and_rows() -> None:
    mapping = torch.tensor([1, 0, 1])
    image = place_image(mapping, 2, 2, "vtu", CPU)[0]
    joined = join([Layout.text(2, 0, CPU), image, Layout.text(1, 5, CPU)])
    assert joined.mapping_indices is not None
    assert joined.mapping_indices.tolist() == [0, 1, 3, 2, 3, 4]
    assert (joined.num_rows, joined.image_spans, joined.next_position) == (5, ((2, 4),), 6)


# ---- the exact decomposition -------------------------------------------------------------------


def exact_scores(q: Tensor, k: Tensor, mapping: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Scores between all positions from Gram products between ROWS (DyMU, section 3.3): by
    cos(a - b) = cos a cos b + sin a sin b, and the like for sin, rotations come out of the
    products. q and k (H, U, D) unrotated, cos and sin (N, D/2), mapping (N,) -> (H, N, N)."""
    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    scores = torch.zeros(len(q), len(mapping), len(mapping), dtype=q.dtype)
    for channel in range(q1.shape[-1]):
        a1, a2, b1, b2 = (part[..., channel] for part in (q1, q2, k1, k2))
        dot = a1[:, :, None] * b1[:, None] + a2[:, :, None] * b2[:, None]
        cross = a2[:, :, None] * b1[:, None] - a1[:, :, None] * b2[:, None]
        c, s = cos[:, channel], sin[:, channel]
        scores += dot[:, mapping][:, :, mapping] * (c[:, None] * c + s[:, None] * s)
        scores += cross[:, mapping][:, :, mapping] * (c[:, None] * s - s[:, None] * c)
    return scores / math.sqrt(q.shape[-1])


def exact_attention(attn: HybridAttention, x: Tensor, mapping: Tensor, places: Tensor) -> Tensor:
    """HybridAttention.forward of one item from these scores: x (U, C) -> (U, C)."""
    heads = x.shape[1] // attn.head_dim
    q, k, v = (
        proj(x).reshape(len(x), heads, -1).transpose(0, 1)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )  # (H, U, D)
    half = q.shape[-1] // 2
    cos, sin = (
        table[:, :half].to(x.dtype)
        for table in rope_cos_sin(places, q.shape[-1], TINY_TEXT.rope_theta)
    )
    scores = exact_scores(q, k, mapping, cos, sin)
    later = torch.ones(len(mapping), len(mapping), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, mapping]  # (H, N, D)
    rows = [mixed[:, mapping == row].mean(1).flatten() for row in range(len(x))]
    return attn.o_proj(torch.stack(rows))


@torch.no_grad()
@few
@given(
    prompts(min_tail=0),
    st.sampled_from(["plain", "logical", "vtu"]),
    st.sampled_from([0, 900]),
    seeds,
)
def test_attention_equals_the_exact_decomposition(
    prompt: Prompt, positions: str, start: int, seed: int
) -> None:
    attn = LLAVA.decoder.layers[0].attn
    layout = prompt.splice(LLAVA, positions, start)[1]
    mapping = torch.tensor(write_out(prompt, positions, start).mapping)
    x = draw(seed, layout.num_rows, TINY_TEXT.hidden_size)
    cos, sin = rope_cos_sin(layout.position_ids, TINY_TEXT.head_dim, TINY_TEXT.rope_theta)
    mixed, _, _ = attn(x, cos, sin, pack([layout]), [None], [None])
    close(mixed, exact_attention(attn, x, mapping, layout.position_ids), 1e-6)


@pytest.fixture(scope="module")
def vtu(shared: Path) -> Golden:
    """goldens/dymu/c_vtu: a Llama with virtual unmerging."""
    folder = shared / "goldens" / "dymu"
    figures = json.loads((folder / "c_vtu.json").read_text())
    tensors = load_file(folder / "c_vtu.safetensors")
    llava = Llava(LlavaConfig(TINY_CONFIG.vision, text_config(figures["config"])))
    load_weights(llava, strip(tensors, "weights."), ["decoder"])
    return Golden(llava, tensors, figures)


def vtu_layout(mapping: Tensor, num_rows: int) -> Layout:
    """Every position 0..N-1 with its row."""
    return Layout(num_rows, torch.arange(len(mapping)), len(mapping), mapping.long())


@torch.inference_mode()
@pytest.mark.parametrize("case", ["c1", "c3_single_group"])
def test_vtu_equals_the_reference(vtu: Golden, case: str) -> None:
    llava, figures = vtu.llava, vtu.figures[case]
    golden = strip(vtu.tensors, f"{case}.")
    rows, mapping = golden["embeds_unique"][0], golden["mapping_indices"]
    layout = vtu_layout(mapping, len(rows))
    assert (layout.num_rows, layout.num_keys) == (figures["N_un"], figures["N_total"])
    hidden: list[Tensor] = []
    hook = llava.decoder.layers[0].register_forward_hook(lambda *call: hidden.append(call[2][0]))
    logits, [cache], _ = llava([rows], [layout], [None], all_logits=True)
    hook.remove()
    close(logits, golden["prefill_logits"][0], GOLDEN_TOLERANCE)
    close(logits, golden["exact.prefill_logits"][0], GOLDEN_TOLERANCE)
    close(hidden[0], golden["hidden_after_layer0"][0], GOLDEN_TOLERANCE)
    close(cache[0][0], golden["k0_prefill"], GOLDEN_TOLERANCE)
    close(cache[0][1], golden["v0_prefill"], GOLDEN_TOLERANCE)
    back = rope_cos_sin(-layout.position_ids, cache[0][0].shape[-1], 10000.0)
    unrotated = apply_rope(cache[0][0][0].transpose(0, 1), *back).transpose(0, 1)
    close(unrotated[None], golden["exact.k0_prefill_unrotated"], GOLDEN_TOLERANCE)
    fed = golden["decode_input_ids"].tolist()
    assert int(logits[-1].argmax()) == fed[0] == figures["decode_ids"][0]
    steps, grown = decode(llava, fed, layout.next_position, cache)
    close(steps, golden["decode_logits"], GOLDEN_TOLERANCE)
    close(steps, golden["exact.decode_logits"], GOLDEN_TOLERANCE)
    assert [*fed[1:], steps[-1].argmax()] == figures["generate_ids"][1:]
    close(grown[0][0][:, :, -3:], golden["k0_last_step"], GOLDEN_TOLERANCE)
    close(grown[0][1][:, :, -3:], golden["v0_last_step"], GOLDEN_TOLERANCE)
    lengths = figures["cache_len_after"]
    assert [k.shape[2] for k, _ in cache] == [lengths[0]] * 2
    assert [k.shape[2] for k, _ in grown] == [lengths[-1]] * 2


@torch.inference_mode()
def test_plain_llama_equals_the_reference(vtu: Golden) -> None:
    rows = vtu.tensors["c5_plain.embeds"][0]
    expected = vtu.tensors["c5_plain.logits"][0]
    plain, [cache], _ = vtu.llava([rows], [Layout.text(20, 0, CPU)], [None], all_logits=True)
    close(plain, expected, GOLDEN_TOLERANCE)
    identity = vtu_layout(torch.arange(20), 20)
    mapped, [mapped_cache], _ = vtu.llava([rows], [identity], [None], all_logits=True)
    assert torch.equal(mapped, plain)
    assert torch.equal(mapped_cache[-1][0], cache[-1][0])


def test_the_exact_decomposition_equals_the_references(vtu: Golden) -> None:
    golden = strip(vtu.tensors, "kernel.")
    q, k, mapping = golden["Q_un"][0], golden["K_un"][0], golden["mapping_indices"].long()
    cos, sin = golden["cos"][0], golden["sin"][0]
    half = cos.shape[-1] // 2
    scores = exact_scores(q, k, mapping, cos[:, :half], sin[:, :half])
    close(scores, golden["scores"][0], GOLDEN_TOLERANCE)
    # And by rotating first, as attention does: (H, N, D) rows at positions.
    shown = (part[:, mapping].transpose(0, 1) for part in (q, k))
    q_slots, k_slots = (apply_rope(part, cos, sin).transpose(0, 1) for part in shown)
    close(q_slots @ k_slots.mT / math.sqrt(8), golden["scores"][0], GOLDEN_TOLERANCE)


@pytest.fixture(scope="module")
def whole(shared: Path, vtu: Golden) -> Golden:
    """goldens/dymu/d_end_to_end: tower b with merging, projector, and the Llama of c_vtu."""
    folder = shared / "goldens" / "dymu"
    figures = json.loads((folder / "d_end_to_end.json").read_text())
    tower = load_file(folder / "b_vit_inputs.safetensors")
    tensors = load_file(folder / "d_end_to_end.safetensors")
    vision = VisionConfig(
        image_size=84, hidden_size=32, intermediate_size=128, num_layers=5, num_heads=4
    )
    llava = Llava(LlavaConfig(vision, text_config(vtu.figures["config"])))
    stored = strip(tower, "weights84.", "visual.") | strip(vtu.tensors, "weights.")
    stored |= strip(tensors, "mm_projector.", "mm_projector.")
    load_weights(llava, stored, ["vision", "projector", "decoder"])
    return Golden(llava, tensors | {"images": tower["image84.b4"]}, figures)


@torch.inference_mode()
def test_the_whole_model_equals_the_reference(whole: Golden) -> None:
    """Pixels to greedy ids: merged by thresholds, unmerged in the decoder."""
    llava, case = whole.llava, "d1_thr_mid"
    golden, figures = strip(whole.tensors, f"{case}."), whole.figures[case]
    pixel_values = whole.tensors["images"].float()[[figures["image_index"]]]
    reduction = Reduction(DToMe(tuple(whole.figures["final_thresholds_used"])), "vtu")
    [image] = llava.encode_image(pixel_values, reduction)
    with_class = [figures["ntoks"][f"block_{block}_ntoks"][0] for block in range(4)]
    assert [count + 1 for count in image.tokens_per_block] == with_class
    input_ids = golden["input_ids"].tolist()
    rows, layout = llava.splice(input_ids, [image])
    assert layout.mapping_indices is not None
    assert layout.mapping_indices.tolist() == golden["mapping_indices"].tolist()
    assert layout.image_spans[0][0] == figures["image_start"]
    assert layout.num_rows == figures["N_un"]
    close(pack([layout]).unmerge(rows), golden["inputs_embeds"][0], GOLDEN_TOLERANCE)
    logits, [cache], _ = llava([rows], [layout], [None], all_logits=True)
    close(logits, golden["prefill_logits"][0], GOLDEN_TOLERANCE)
    ids = golden["generated_ids"].tolist()
    steps, _ = decode(llava, ids[:-1], layout.next_position, cache)
    generated = torch.cat((logits[-1:], steps))
    close(generated, golden["generated_logits"], GOLDEN_TOLERANCE)
    assert generated.argmax(-1).tolist() == ids == figures["generated"]
    loss = F.cross_entropy(logits[:-1], row_labels(input_ids, layout)[1:])
    assert torch.equal(row_labels(input_ids, layout), golden["labels"][0].long())
    assert loss.item() == pytest.approx(figures["loss_in_merged_space"], abs=GOLDEN_TOLERANCE)
    prefilled, _, position = llava.prefill(torch.tensor([input_ids]), pixel_values, reduction)
    close(prefilled[0], golden["prefill_logits"][0, -1:], GOLDEN_TOLERANCE)
    assert position == figures["embeds_shape"][1]


def row_labels(input_ids: Sequence[int], layout: Layout) -> Tensor:
    """The next-token labels of a training loss over rows: (U,), -100 (ignored) on image rows."""
    labels, (start, stop) = torch.full((layout.num_rows,), -100), layout.image_spans[0]
    words = torch.tensor([token for token in input_ids if token != IMAGE_TOKEN_ID])
    labels[:start], labels[stop:] = words[:start], words[start:]
    return labels
