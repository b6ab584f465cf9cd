"""What a trace says about a prompt: formulas against published figures, and every number against
what the model really did."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_TEXT, TINY_VISION
from PIL import Image
from torch import Tensor

import llava_lite.generation
from llava_lite.answer import Answer
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, TextConfig, VisionConfig
from llava_lite.generation import Model
from llava_lite.reduction import DToMe, FastV, Reduction, ToMe
from llava_lite.trace import CONVENTIONS, Trace, decoder_flops, tower_flops

P = TINY_VISION.num_patches
LAYERS = TINY_TEXT.num_layers
REDUCTIONS = {
    "nothing": Reduction(),
    "vtu": Reduction(ToMe(keep=6)),
    "logical": Reduction(ToMe(keep=6), "logical"),
    "plain": Reduction(ToMe(keep=6), "plain"),
    "thresholds": Reduction(DToMe((0.5, 0.2)), "vtu"),
    "fastv": Reduction(fastv=FastV(drop=0.5, layer=1)),
    "hybrid": Reduction(ToMe(keep=8), "logical", FastV(keep=3, layer=2)),
    "hybrid vtu": Reduction(ToMe(keep=8), "vtu", FastV(keep=3, layer=1)),
    "hybrid plain": Reduction(ToMe(keep=8), "plain", FastV(keep=3, layer=1, score="mean")),
}


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def traced(model: Model, image: object, reduction: Reduction, prompt: str = "star?") -> Answer:
    return model.generate(image, prompt, max_new_tokens=3, reduction=reduction, trace=True)


def trace_of(answer: Answer) -> Trace:
    assert answer.trace is not None
    return answer.trace


# ---- on paper ----------------------------------------------------------------------------------


def test_published_cost_of_one_layer() -> None:
    text = LLAVA_1_5_7B.text
    for convention, layer, all_layers in (("paper", 99.33e9, 3.18e12), ("gated", 126.9e9, 4.06e12)):
        one = decoder_flops(text, [612], [612], convention=convention)
        assert one == pytest.approx(layer, rel=1e-3)
        assert 32 * one == pytest.approx(all_layers, rel=2e-3)


@pytest.mark.parametrize(
    ("text", "layer", "drop", "image_only", "with_text"),
    [
        (LLAVA_1_5_7B.text, 3, 0.5, 54.0, 56.7),  # the 57 % of FastV's README
        (LLAVA_1_5_7B.text, 2, 0.5, 52.4, 55.2),
        (LLAVA_1_5_7B.text, 2, 0.75, 29.2, 33.2),
        (LLAVA_1_5_7B.text, 2, 0.9, 15.4, 20.3),
        (LLAVA_1_5_7B.text, 3, 0.75, 31.5, 35.4),
        (LLAVA_1_5_7B.text, 5, 0.5, 57.2, 59.6),
        (LLAVA_1_5_13B.text, 2, 0.5, 51.9, 54.7),  # the paper's 45 % less
    ],
)
def test_published_ratios(
    text: TextConfig, layer: int, drop: float, image_only: float, with_text: float
) -> None:
    kept = FastV(drop=drop, layer=layer).num_kept(576)
    for words, expected in ((0, image_only), (36, with_text)):
        rows = [words + 576] * layer + [words + kept] * (text.num_layers - layer)
        whole = [words + 576] * text.num_layers
        ratio = decoder_flops(text, rows, rows, convention="paper") / decoder_flops(
            text, whole, whole, convention="paper"
        )
        assert 100 * ratio == pytest.approx(expected, abs=0.06)


def test_rows_and_positions_count_where_they_are_used() -> None:
    text = replace(TINY_TEXT, hidden_size=2, intermediate_size=3, num_layers=2, num_heads=1)
    # 4 rows (projections 4 d^2, MLP c d f), 5 positions attending to 5 and to 7 cached ones.
    assert decoder_flops(text, [4], [5], [7], "paper") == 4 * (16 + 2 * 6) + 2 * 5 * 12 * 2
    assert decoder_flops(text, [4], [5], [7], "gated") == 4 * (16 + 3 * 6) + 2 * 5 * 12 * 2
    vision = VisionConfig(14, 14, 2, 3, 3, 1)
    assert vision.num_patches == 1 and vision.num_blocks == 2
    # Two tokens with the class token; after the first block only that would be left.
    block = 4 * 2 * 4 + 2 * 4 * 2
    assert tower_flops(vision, [1, 1]) == 2 * (block + 2 * 2 * 6)
    assert tower_flops(vision, [1, 0]) == block + 2 * 2 * 6 + block + 2 * 1 * 6


# ---- what really happened ----------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_trace_says_what_the_model_did(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, num_images: int
) -> None:
    reduction, rows, blocks = REDUCTIONS[name], [], []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        for layer in tiny_model.llava.decoder.layers
    ] + [
        block.mlp.register_forward_hook(lambda _, inputs, __: blocks.append(inputs[0].shape[1] - 1))
        for block in tiny_model.llava.vision.blocks
    ]
    images = [picture(seed) for seed in range(num_images)]
    try:
        answer = traced(tiny_model, images, reduction)
    finally:
        for hook in hooks:
            hook.remove()
    trace = trace_of(answer)
    assert list(trace.rows_per_layer) == rows[:LAYERS]
    if num_images and isinstance(reduction.merge, DToMe):
        assert [n for image in trace.images for n in image.tokens_per_block] == blocks
    elif num_images:
        assert {image.tokens_per_block for image in trace.images} == {tuple(blocks)}
    assert sum(len(image.sizes) for image in trace.images) == answer.usage["image_tokens"]
    assert sum(len(image.kept) for image in trace.images) == answer.usage["kept_image_tokens"]
    assert answer.usage["image_patches"] == num_images * P
    pruned = reduction.fastv is not None and num_images > 0
    assert trace.prune_layer == (reduction.fastv.layer if pruned and reduction.fastv else None)
    for image in trace.images:
        assert len(image.groups) == P
        assert [image.groups.count(token) for token in range(len(image.sizes))] == list(image.sizes)
        assert (image.scores is not None) == pruned
        assert [token in image.kept for token in image.groups] == list(image.patch_kept)


@torch.inference_mode()
@pytest.mark.parametrize("name", REDUCTIONS)
def test_positions_and_bytes_are_those_of_the_cache(tiny_model: Model, name: str) -> None:
    reduction = REDUCTIONS[name]
    trace = trace_of(traced(tiny_model, picture(3), reduction))
    template = tiny_model.config.template
    text = llava_lite.generation.build_prompt(template, [("<image>\nstar?", None)], None)
    input_ids = torch.tensor([tiny_model.tokenizer.encode_prompt(text)])
    pixels = llava_lite.generation.preprocess(picture(3), TINY_VISION.image_size, True)
    _, cache, _ = tiny_model.prefill(input_ids, pixels, reduction)
    assert [k.shape[2] for k, _ in cache] == list(trace.positions_per_layer)
    assert trace.kv_bytes == sum(k.nbytes + v.nbytes for k, v in cache)
    _, whole, _ = tiny_model.prefill(input_ids, pixels)
    assert trace.kv_bytes_unreduced == sum(k.nbytes + v.nbytes for k, v in whole)
    for convention in CONVENTIONS:
        flops = trace.decoder_flops[convention]
        if reduction == Reduction():
            assert flops.total == flops.unreduced
        else:
            assert flops.total < flops.unreduced
        assert flops.ratio == flops.total / flops.unreduced


@pytest.mark.parametrize("positions", ["vtu", "logical", "plain"])
def test_scores_and_kept_belong_to_the_patches_of_their_tokens(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    """Numbered as the decoder has them, so that a picture shows the right patches."""
    merged, fastv = ToMe(keep=7), FastV(keep=3, layer=1)
    seen: list[Tensor] = []
    choose = llava_lite.llama.choose

    def recording(scores: Tensor, *rest: object) -> object:
        seen.append(scores)
        return choose(scores, *rest)

    monkeypatch.setattr(llava_lite.llama, "choose", recording)
    encoded = tiny_model.encode(picture(5), Reduction(merged))
    [image] = trace_of(traced(tiny_model, encoded, Reduction(merged, positions, fastv))).images
    assert encoded.mapping is not None
    mapping = encoded.mapping.tolist()
    # The same partition of the patches ...
    pairs = set(zip(mapping, image.groups, strict=True))
    assert len(pairs) == len(image.sizes) == 7
    # ... in the order of the rows that were scored.
    layout = tiny_model.llava.splice([1, -200, 5], [encoded], positions=positions)[1]
    if positions == "logical":
        firsts = [image.groups.index(token) for token in range(7)]
        assert firsts == sorted(firsts)
        assert (layout.position_ids[1:-1] - 1).tolist() == firsts
    else:
        assert list(image.groups) == mapping
    [scores] = seen
    start = scores.tolist().index(image.scores[0])
    assert scores.tolist()[start : start + 7] == list(image.scores)
    best = sorted(range(7), key=lambda token: -image.scores[token])[:3]
    assert list(image.kept) == sorted(best)
    assert sum(image.patch_scores) == pytest.approx(sum(image.scores), rel=1e-5)


def test_several_images_share_out_what_was_pruned(tiny_model: Model) -> None:
    for per_image in (False, True):
        fastv = FastV(keep=5, layer=1, per_image=per_image)
        trace = trace_of(traced(tiny_model, [picture(1), picture(2)], Reduction(fastv=fastv)))
        counts = [len(image.kept) for image in trace.images]
        assert sum(counts) == (10 if per_image else 5)
        assert not per_image or counts == [5, 5]
        if not per_image:
            scores = [
                (score, index, token)
                for index, image in enumerate(trace.images)
                for token, score in enumerate(image.scores)
            ]
            best = {(i, t) for _, i, t in sorted(scores, reverse=True)[:5]}
            assert best == {(i, t) for i, im in enumerate(trace.images) for t in im.kept}


def test_a_batch_traces_each_item_as_alone(tiny_model: Model) -> None:
    reduction = REDUCTIONS["hybrid"]
    images = [picture(1), None, picture(2)]
    together = tiny_model.generate(
        images,
        ["star?", "ring?", "square circle?"],
        max_new_tokens=2,
        reduction=reduction,
        trace=True,
    )
    for answer, image, prompt in zip(
        together, images, ["star?", "ring?", "square circle?"], strict=True
    ):
        here = trace_of(answer)
        alone = trace_of(traced(tiny_model, image, reduction, prompt))
        assert (here.rows_per_layer, here.kv_bytes) == (alone.rows_per_layer, alone.kv_bytes)
        assert here.decoder_flops == alone.decoder_flops
        assert [i.kept for i in here.images] == [i.kept for i in alone.images]


def test_a_chat_traces_every_turn(tiny_model: Model) -> None:
    reduction = REDUCTIONS["hybrid vtu"]
    chat = tiny_model.chat(picture(1), max_new_tokens=2, reduction=reduction, trace=True)
    first = trace_of(chat.send("star?"))
    second_answer = chat.send("ring?", image=picture(2))
    second = trace_of(second_answer)
    assert len(first.images) == len(second.images) == 1
    assert second_answer.usage["image_patches"] == 2 * P
    assert second_answer.usage["kept_image_tokens"] == 6
    row_bytes = 2 * TINY_TEXT.hidden_size * 4
    both = sum(first.positions_per_layer) + sum(second.positions_per_layer)
    # Of the first answer one token is in the cache as well, the second runs with the next turn.
    assert second.kv_bytes == (both + LAYERS * 1) * row_bytes
    third = trace_of(chat.send("and?"))
    assert third.images == () and third.prune_layer is None
    assert len(set(third.positions_per_layer)) == 1


# ---- as a product ------------------------------------------------------------------------------


def test_without_trace_nothing_is_computed(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_lite.generation, "trace_prompt", None)
    answer = tiny_model.generate(
        picture(1), "star?", max_new_tokens=2, reduction=REDUCTIONS["hybrid"]
    )
    assert answer.trace is None
    assert "trace" not in answer.to_dict()


def test_to_dict_is_json_and_small(tiny_model: Model) -> None:
    answer = traced(tiny_model, picture(1), REDUCTIONS["hybrid"])
    trace = json.loads(json.dumps(answer.to_dict()))["trace"]
    assert trace["rows_per_layer"] == list(trace_of(answer).rows_per_layer)
    [image] = trace["images"]
    assert len(image["groups"]) == P and len(image["scores"]) == 8 and len(image["kept"]) == 3
    assert trace["decoder_flops"]["gated"]["ratio"] < 1 and trace["tower_flops"]["ratio"] < 1
    assert len(json.dumps(trace)) < 4000
