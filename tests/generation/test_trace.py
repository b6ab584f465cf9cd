"""What a trace says about a prompt: formulas against published figures, and every number against
what the model really did."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llava_lite.attention
import llava_lite.fastv
import llava_lite.generation.model
import llava_lite.llama
import llava_lite.vision
from helpers.models import TINY_CONFIG, TINY_TEXT, TINY_VISION, random_llava
from helpers.pictures import picture
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, TextConfig, VisionConfig
from llava_lite.fastv import ImageRows, Pruning
from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.generation.trace import (
    Trace,
    decoder_flops,
    decoder_groups,
    expected_lengths,
    fastv_ratio,
    kv_bytes,
    pruning_flops,
    tower_flops,
    trace_prompt,
)
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import EncodedImage
from llava_lite.reduction import POSITIONS, REDUCTIONS, DToMe, FastV, Reduction, ToMe

P = TINY_VISION.num_patches
LAYERS = TINY_TEXT.num_layers
POSITION_BYTES = 2 * TINY_TEXT.hidden_size * 4  # float32
KINDS = {
    "nothing": Reduction(),
    "vtu": Reduction(ToMe(keep=6)),
    "logical": Reduction(ToMe(keep=6), "logical"),
    "plain": Reduction(ToMe(keep=6), "plain"),
    "thresholds": Reduction(DToMe((0.5, 0.2)), "vtu"),
    "fastv": Reduction(fastv=FastV(drop=0.5, layer=1)),
    "fastv per image": Reduction(fastv=FastV(drop=0.7, layer=2, per_image=True)),
    "hybrid": Reduction(ToMe(keep=8), "logical", FastV(keep=3, layer=2)),
    "hybrid vtu": Reduction(ToMe(keep=8), "vtu", FastV(keep=3, layer=1)),
    "hybrid plain": Reduction(ToMe(keep=8), "plain", FastV(keep=3, layer=1)),
    "hybrid mean": Reduction(DToMe((0.5, 0.2)), "vtu", FastV(drop=0.5, layer=2, score="mean")),
    "folded": Reduction(ToMe(keep=6), "folded"),
    "folded dropped": Reduction(ToMe(keep=8), "folded", FastV(keep=3, layer=1)),
    "folded hybrid": Reduction(ToMe(keep=8), "folded", FastV(keep=3, layer=1, rest="fold")),
    "folded mean": Reduction(
        DToMe((0.5, 0.2)), "folded", FastV(drop=0.5, layer=2, score="mean", rest="fold")
    ),
    "folded stages": Reduction(None, "folded", FastV(stages=((1, 8), (2, 3)), rest="fold")),
    "folded per image": Reduction(
        None, "folded", FastV(stages=((1, 0.5), (2, 0.5)), rest="fold", per_image=True)
    ),
}
MERGING = [name for name, reduction in KINDS.items() if reduction.merge is not None]


def trace_of(answer: Answer) -> Trace:
    assert answer.trace is not None
    return answer.trace


def traced(model: Model, image: object, reduction: Reduction | str, prompt: str = "star?") -> Trace:
    return trace_of(
        model.generate(image, prompt, max_new_tokens=1, reduction=reduction, trace=True)
    )


# ---- what really happens, counted from outside ---------------------------------------------------


@dataclass
class Record:
    """Multiply-adds of decoder layers and tower blocks, rows that each decoder layer's MLP got,
    and what the tower and the decoder gave back, in the order of their calls."""

    decoder: int = 0
    tower: int = 0
    rows: list[int] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)

    def count(self, part: str, multiply_adds: int) -> None:
        setattr(self, part, getattr(self, part) + multiply_adds)

    def cache_lengths(self, item: int = 0) -> list[int]:
        return [k.shape[2] for k, _ in self.runs[-1][1][item]]

    def mappings(self) -> list[Tensor | None]:
        return [mapping for output in self.seen for mapping in output.mapping]


@contextmanager
def watched(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Counts every product of matrices inside, by the shapes that it really gets."""
    record, llava, hooks = Record(), model.llava, []

    def count_linears(part: str, module: nn.Module) -> None:
        def count(linear: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            record.count(part, inputs[0].numel() * linear.out_features)

        linears = [found for found in module.modules() if isinstance(found, nn.Linear)]
        hooks.extend(linear.register_forward_hook(count) for linear in linears)

    def counting(part: str, attend: Any) -> Any:
        def counted(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            record.count(part, 2 * q.numel() * k.shape[2])
            return attend(q, k, *rest)

        return counted

    def counted_row(query: Tensor, keys: Tensor, log_sizes: Tensor | None) -> Tensor:
        record.count("decoder", keys.numel())
        return last_row(query, keys, log_sizes)

    def counted_match(x: Tensor, image_rows: ImageRows, kept: Tensor) -> Tensor:
        record.count("decoder", x.numel() * len(kept))
        return match_kept(x, image_rows, kept)

    last_row, match_kept = llava_lite.llama.last_row, llava_lite.fastv.match_kept
    count_linears("decoder", llava.decoder.layers)
    count_linears("tower", llava.vision.blocks)
    for layer in llava.decoder.layers:
        hooks.append(
            layer.mlp.register_forward_hook(lambda _, x, __: record.rows.append(len(x[0])))
        )
    hooks.append(llava.vision.register_forward_hook(lambda _, __, out: record.seen.append(out)))
    hooks.append(llava.register_forward_hook(lambda _, __, out: record.runs.append(out)))
    with monkeypatch.context() as patch:
        patch.setattr(llava_lite.cache, "attend", counting("decoder", llava_lite.cache.attend))
        patch.setattr(llava_lite.vision, "attend", counting("tower", llava_lite.vision.attend))
        patch.setattr(llava_lite.llama, "last_row", counted_row)
        patch.setattr(llava_lite.fastv, "match_kept", counted_match)
        try:
            yield record
        finally:
            for hook in hooks:
                hook.remove()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_cost_is_what_the_model_spends(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, num_images: int
) -> None:
    images = [picture(seed) for seed in range(num_images)]
    with watched(tiny_model, monkeypatch) as whole:
        traced(tiny_model, images, "none")
    with watched(tiny_model, monkeypatch) as record:
        trace = traced(tiny_model, images, KINDS[name])
    [caches] = record.runs[-1][1]
    assert list(trace.rows_per_layer) == record.rows
    assert list(trace.positions_per_layer) == record.cache_lengths()
    assert trace.kv_bytes == sum(k.nbytes + v.nbytes for k, v in caches)
    assert trace.kv_bytes_unreduced == sum(whole.cache_lengths()) * POSITION_BYTES
    gated = trace.decoder_flops["gated"]
    assert (gated.total, gated.unreduced) == (record.decoder, whole.decoder)
    third = TINY_TEXT.hidden_size * TINY_TEXT.intermediate_size  # the matrix "paper" knows not
    paper = trace.decoder_flops["paper"]
    assert paper.total == gated.total - third * sum(trace.rows_per_layer)
    assert paper.unreduced == gated.unreduced - third * LAYERS * whole.rows[0]
    assert (trace.tower_flops.total, trace.tower_flops.unreduced) == (record.tower, whole.tower)
    changed = num_images > 0 and name != "nothing"
    assert (gated.ratio < 1, paper.ratio < 1) == (changed, changed)
    assert (trace.tower_flops.ratio < 1) == (num_images > 0 and name in MERGING)
    assert gated.ratio == gated.total / gated.unreduced


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_images", [1, 2])
def test_groups_scores_and_kept_are_the_models(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, num_images: int
) -> None:
    reduction, images = KINDS[name], [picture(seed) for seed in range(num_images)]
    with watched(tiny_model, monkeypatch) as record:
        answer = tiny_model.generate(
            images, "star?", max_new_tokens=1, reduction=reduction, trace=True
        )
    trace = trace_of(answer)
    assert len(trace.images) == num_images
    counts = [list(output.tokens_per_block) for output in record.seen]
    if len(counts) < num_images:  # a fixed number of merges: all images pass the tower together
        counts *= num_images
    assert [list(image.tokens_per_block) for image in trace.images] == counts
    for image, mapping in zip(
        trace.images, record.mappings() if name in MERGING else [None] * num_images, strict=True
    ):
        own = list(range(P)) if mapping is None else mapping.tolist()
        assert image.grid == TINY_VISION.grid and image.num_patches == P
        assert len(image.sizes) == image.tokens_per_block[-1] == len(set(own))
        # The same patches together, maybe under other numbers, which stand for all tokens.
        assert len(set(zip(own, image.groups, strict=True))) == len(set(own))
        assert set(image.groups) == set(range(len(image.sizes)))
        assert [image.groups.count(token) for token in range(len(image.sizes))] == list(image.sizes)
    [stages] = record.runs[-1][2]
    scores = [score for image in trace.images for score in image.scores or ()]
    firsts = [sum(len(i.sizes) for i in trace.images[:n]) for n in range(num_images)]
    kept = [
        token + first
        for image, first in zip(trace.images, firsts, strict=True)
        for token in image.kept
    ]
    if reduction.fastv is None:
        assert stages == () and trace.prune_layer is None
        assert {image.scores for image in trace.images} == {None}
        assert kept == list(range(sum(len(image.sizes) for image in trace.images)))
    else:
        assert trace.prune_layers == tuple(reduction.fastv.amounts)
        assert trace.prune_layer == trace.prune_layers[0]
        assert scores == stages[0].scores.tolist()
        left = list(range(len(scores)))
        for pruning in stages:
            left = [left[token] for token in pruning.kept.tolist()]
        assert kept == left
    assert len(kept) == answer.usage["kept_image_tokens"]
    assert sum(len(image.sizes) for image in trace.images) == answer.usage["image_tokens"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_tokens_are_numbered_as_the_decoder_has_them(tiny_model: Model, positions: str) -> None:
    encoded = tiny_model.encode(picture(5), Reduction(ToMe(keep=7), positions))
    assert encoded.mapping is not None
    rows, layout = tiny_model.llava.splice([1, -200, 5], [encoded], positions=positions)
    groups = decoder_groups(encoded, positions)
    for patch, token in enumerate(encoded.mapping.tolist()):
        assert torch.equal(rows[1 + groups[patch]], encoded.image_embeds[token])
    if positions in ("logical", "folded"):
        firsts = [groups.index(token) for token in range(7)]
        assert firsts == sorted(firsts)
        if positions == "logical":
            assert (layout.position_ids[1:-1] - 1).tolist() == firsts
        else:
            assert layout.mapping_indices is not None
            assert (layout.mapping_indices[1:-1] - 1).tolist() == list(groups)
        assert groups != tuple(encoded.mapping.tolist())


@pytest.mark.parametrize(
    "name",
    [
        "fastv",
        "hybrid",
        "hybrid vtu",
        "hybrid plain",
        "hybrid mean",
        "folded dropped",
        "folded hybrid",
        "folded mean",
    ],
)
def test_patches_stay_or_go_by_their_scores(tiny_model: Model, name: str) -> None:
    [image] = traced(tiny_model, picture(5), KINDS[name]).images
    scores, kept = image.patch_scores(), image.patch_kept()
    assert scores is not None and image.scores is not None
    assert len(scores) == len(kept) == P
    stay = [score for score, stays in zip(scores, kept, strict=True) if stays]
    go = [score for score, stays in zip(scores, kept, strict=True) if not stays]
    assert min(stay) > max(go)
    assert set(scores) == set(image.scores)
    assert sum(kept) == sum(image.sizes[token] for token in image.kept)
    if not name.endswith("mean"):
        assert 0 < sum(image.scores) < 1


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("folded")])
@pytest.mark.parametrize("num_images", [1, 2])
def test_who_speaks_for_a_patch(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, num_images: int
) -> None:
    """The last layers weigh each kept token by the patches that it speaks for."""
    images = [picture(seed) for seed in range(num_images)]
    with watched(tiny_model, monkeypatch) as record:
        trace = traced(tiny_model, images, KINDS[name])
    [[*_, last]], [stages] = record.runs[-1][1], record.runs[-1][2]
    fastv = KINDS[name].fastv
    counts = []
    for image in trace.images:
        speakers, kept = image.speakers(), image.patch_kept()
        for patch, speaker in enumerate(speakers):
            if kept[patch]:
                assert speaker == image.groups[patch]
            elif fastv is not None and fastv.rest == "drop":
                assert speaker is None
            else:
                assert speaker in image.kept
        counts += [speakers.count(token) for token in image.kept]
    assert 0 < sum(counts) < num_images * P or fastv is None or fastv.rest == "fold"
    if fastv is None or fastv.rest == "fold":
        assert sum(counts) == num_images * P
    weights = last.log_sizes.exp()[-trace.rows_per_layer[-1] :]
    is_image = torch.ones(len(weights), dtype=torch.bool)
    if stages:
        is_image = torch.zeros_like(is_image).index_fill(0, stages[-1].image_rows.rows, True)
        assert weights[is_image].tolist() == pytest.approx(counts)
        assert set(weights[~is_image].tolist()) == {1}
    assert sum(weights.tolist()) == pytest.approx(
        sum(counts) + trace.rows_per_layer[-1] - len(counts)
    )


def test_without_pruning_all_patches_stay_and_have_no_score(tiny_model: Model) -> None:
    for reduction in (KINDS["vtu"], Reduction(fastv=FastV(keep=P, layer=1))):
        trace = traced(tiny_model, picture(5), reduction)
        assert trace.prune_layer is None
        [image] = trace.images
        assert image.patch_scores() is None
        assert image.patch_kept() == (True,) * P


# ---- batches, chats, encoded images ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hybrid", "hybrid vtu", "hybrid mean", "folded mean", "folded stages"]
)
def test_a_batch_traces_each_item_as_alone(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = [picture(1), None, [picture(2), picture(3)]]
    prompts = ["star?", "ring?", "square circle?"]
    with watched(tiny_model, monkeypatch) as record:
        answers = tiny_model.generate(
            images, prompts, max_new_tokens=1, reduction=KINDS[name], trace=True
        )
    together = [trace_of(answer) for answer in answers]
    assert [len(trace.images) for trace in together] == [1, 0, 2]
    assert sum(trace.decoder_flops["gated"].total for trace in together) == record.decoder
    assert sum(trace.tower_flops.total for trace in together) == record.tower
    assert [sum(rows) for rows in zip(*(t.rows_per_layer for t in together), strict=True)] == (
        record.rows
    )
    for item, (here, image, prompt) in enumerate(zip(together, images, prompts, strict=True)):
        alone = traced(tiny_model, image, KINDS[name], prompt)
        assert list(here.positions_per_layer) == record.cache_lengths(item)
        without_scores = [
            replace(trace, images=tuple(replace(i, scores=None) for i in trace.images))
            for trace in (here, alone)
        ]
        assert without_scores[0] == without_scores[1]
        for ours, single in zip(here.images, alone.images, strict=True):
            assert ours.scores == pytest.approx(single.scores, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["nothing", "hybrid", "hybrid vtu", "hybrid plain", "folded hybrid", "folded stages"]
)
def test_a_chat_traces_every_turn(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A turn costs its own rows, and attention over what is cached."""
    turns = [("star?", None), ("ring?", picture(2)), ("and?", None)]
    traces: dict[str, list[Trace]] = {}
    records: dict[str, list[Record]] = {}
    for kind in ("nothing", name):
        chat = tiny_model.chat(picture(1), max_new_tokens=1, reduction=KINDS[kind], trace=True)
        traces[kind], records[kind] = [], []
        for text, image in turns:
            with watched(tiny_model, monkeypatch) as record:
                traces[kind].append(trace_of(chat.send(text, image)))
            records[kind].append(record)
    assert [len(trace.images) for trace in traces[name]] == [1, 1, 0]
    past = [0] * LAYERS
    for turn, (trace, record) in enumerate(zip(traces[name], records[name], strict=True)):
        flops, whole = trace.decoder_flops["gated"], records["nothing"][turn]
        assert (flops.total, flops.unreduced) == (record.decoder, whole.decoder)
        lengths = record.cache_lengths()
        assert list(trace.positions_per_layer) == [
            now - before for now, before in zip(lengths, past, strict=True)
        ]
        assert trace.kv_bytes == sum(lengths) * POSITION_BYTES
        assert trace.kv_bytes_unreduced == traces["nothing"][turn].kv_bytes
        assert list(trace.rows_per_layer) == record.rows
        past = lengths
    last = traces[name][-1]
    assert last.prune_layer is None and len(set(last.rows_per_layer)) == 1
    assert last.positions_per_layer == last.rows_per_layer
    assert (last.kv_bytes < last.kv_bytes_unreduced) == (name != "nothing")


def test_an_answer_of_several_tokens_is_no_part_of_its_trace(tiny_model: Model) -> None:
    short = traced(tiny_model, picture(1), KINDS["hybrid"])
    answer = tiny_model.generate(
        picture(1), "star?", max_new_tokens=5, reduction=KINDS["hybrid"], trace=True
    )
    assert trace_of(answer) == short


def test_encoded_images_trace_as_pictures_do(tiny_model: Model) -> None:
    encoded = tiny_model.encode(picture(1), KINDS["hybrid vtu"])
    trace = trace_of(tiny_model.generate(encoded, "star?", max_new_tokens=1, trace=True))
    assert trace == traced(tiny_model, picture(1), KINDS["hybrid vtu"])
    silent = replace(encoded, tokens_per_block=())
    trace = trace_of(tiny_model.generate(silent, "star?", max_new_tokens=1, trace=True))
    assert trace.images[0].tokens_per_block == ()
    assert trace.tower_flops.ratio == 1


def test_per_image_budgets_differ_from_shared_ones(tiny_model: Model) -> None:
    counts = {}
    for per_image in (False, True):
        fastv = FastV(keep=5, layer=1, per_image=per_image)
        trace = traced(tiny_model, [picture(1), picture(2)], Reduction(fastv=fastv))
        counts[per_image] = [len(image.kept) for image in trace.images]
    assert sum(counts[False]) == 5
    assert counts[True] == [5, 5]


# ---- real sizes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model(tiny_tokenizer: Tokenizer) -> Model:
    """Narrow and shallow, but with the 576 patches of the real one, and thresholds of its own."""
    config = replace(
        TINY_CONFIG,
        vision=replace(TINY_VISION, image_size=336, num_layers=5),
        text=replace(TINY_TEXT, num_layers=4, max_positions=2048),
    )
    return Model(random_llava(config), tiny_tokenizer, thresholds=[0.9, 0.7, 0.5, 0.3, 0.3])


# The image tokens of each preset, and those of them that stay.
COUNTS = {
    "none": (576, 576),
    "folded-72": (72, 72),
    "folded-144-72": (144, 72),
    "folded-144-36": (144, 36),
    "folded-72-36": (72, 36),
    "folded-72-36-18": (72, 18),
    "folded-72-18-9": (72, 9),
    "fastv-72-folded": (576, 72),
    "tome-72": (72, 72),
    "tome-72-logical": (72, 72),
    "fastv-50": (576, 288),
    "hybrid-72-36": (72, 36),
    "hybrid-vtu-72-36": (72, 36),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_presets(wide_model: Model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with watched(wide_model, monkeypatch) as record:
        trace = traced(wide_model, picture(1), name)
    [image] = trace.images
    assert (image.grid, image.num_patches, sum(image.sizes)) == (24, 576, 576)
    reduction = REDUCTIONS[name]
    found = (len(image.sizes), len(image.kept))
    assert 1 < found[0] == found[1] < 576 if name == "dymu-72" else found == COUNTS[name]
    words = trace.rows_per_layer[0] - len(image.sizes)
    assert trace.rows_per_layer[-1] == words + len(image.kept)
    assert list(trace.positions_per_layer) == record.cache_lengths()
    unmerged = reduction.positions == "vtu" and reduction.merge is not None
    assert trace.positions_per_layer[0] == words + (576 if unmerged else len(image.sizes))
    folds = reduction.fastv is None or reduction.fastv.rest == "fold"
    assert (None not in image.speakers()) == folds
    lengths = expected_lengths(wide_model.config, reduction, words)
    if name in ("dymu-72", "hybrid-vtu-72-36"):
        assert lengths is None
    else:
        assert lengths == (trace.rows_per_layer, trace.positions_per_layer)
    assert trace.decoder_flops["gated"].total == record.decoder
    assert trace.tower_flops.total == record.tower
    assert len(json.dumps(trace.to_dict())) < 20_000


# ---- as a product ------------------------------------------------------------------------------


def test_without_trace_nothing_is_computed(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Trace:
        raise AssertionError("traced")

    monkeypatch.setattr("llava_lite.generation.loop.trace_prompt", fail)
    options = {"max_new_tokens": 2, "reduction": KINDS["hybrid"]}
    answer = tiny_model.generate(picture(1), "star?", **options)
    assert answer.trace is None
    assert "trace" not in answer.to_dict()
    assert tiny_model.chat(picture(1), **options).send("star?").trace is None
    with pytest.raises(AssertionError, match="traced"):
        tiny_model.generate(picture(1), "star?", trace=True, **options)


def test_to_dict_is_plain_and_complete(tiny_model: Model) -> None:
    answer = tiny_model.generate(
        [picture(1), picture(2)], "star?", max_new_tokens=1, reduction=KINDS["hybrid"], trace=True
    )
    trace, content = trace_of(answer), answer.to_dict()["trace"]
    assert json.loads(json.dumps(content)) == content
    assert set(content) == {"prune_layer", *Trace.__dataclass_fields__}
    for name in ("prune_layer", "kv_bytes", "kv_bytes_unreduced"):
        assert content[name] == getattr(trace, name)
    for name in ("prune_layers", "rows_per_layer", "positions_per_layer"):
        assert tuple(content[name]) == getattr(trace, name)
    for image, written in zip(trace.images, content["images"], strict=True):
        assert set(written) == {
            "grid", "groups", "sizes", "tokens_per_block", "scores", "kept", "folded_into"
        }  # fmt: skip
        for name in ("groups", "sizes", "tokens_per_block", "kept", "folded_into"):
            assert tuple(written[name]) == getattr(image, name)
        assert written["grid"] == image.grid
        assert written["scores"] == pytest.approx(image.scores, rel=5.1e-4)
        assert written["scores"] != list(image.scores or ())
    for name, flops in {**trace.decoder_flops, "tower": trace.tower_flops}.items():
        written = content["tower_flops"] if name == "tower" else content["decoder_flops"][name]
        assert written["total"] == flops.total and written["unreduced"] == flops.unreduced
        assert written["ratio"] == pytest.approx(flops.ratio, abs=5.1e-5)


def test_small_scores_keep_their_digits(tiny_model: Model) -> None:
    trace = traced(tiny_model, picture(1), KINDS["fastv"])
    [image] = trace.images
    small = replace(image, scores=(1.23456e-9,) * P)
    written = replace(trace, images=(small,)).to_dict()["images"][0]["scores"]
    assert written == [1.235e-9] * P
    assert small.scores == (1.23456e-9,) * P


def test_a_trace_does_not_change(tiny_model: Model) -> None:
    trace = traced(tiny_model, picture(1), KINDS["hybrid"])
    for part in (trace, trace.images[0], trace.tower_flops):
        with pytest.raises(FrozenInstanceError):
            part.total = 0  # type: ignore[union-attr]


# ---- on paper ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "layer", "all_layers"),
    [("paper", 99.33e9, 3.18e12), ("gated", 126.9e9, 4.06e12)],
)
def test_cost_of_a_published_layer(convention: str, layer: float, all_layers: float) -> None:
    text = LLAVA_1_5_7B.text
    assert decoder_flops(text, [612], [612], convention=convention) == pytest.approx(
        layer, rel=5e-4
    )
    whole = decoder_flops(text, [612] * 32, [612] * 32, convention=convention)
    assert whole == pytest.approx(all_layers, abs=0.005e12)


@pytest.mark.parametrize(
    ("text", "layer", "drop", "image_only", "with_text"),
    [
        (LLAVA_1_5_7B.text, 3, 0.5, 54.0, 56.7),
        (LLAVA_1_5_7B.text, 2, 0.5, 52.4, 55.2),
        (LLAVA_1_5_7B.text, 2, 0.75, 29.2, 33.2),
        (LLAVA_1_5_7B.text, 2, 0.9, 15.4, 20.3),
        (LLAVA_1_5_7B.text, 3, 0.75, 31.5, 35.4),
        (LLAVA_1_5_7B.text, 5, 0.5, 57.2, 59.6),
        (LLAVA_1_5_13B.text, 2, 0.5, 51.9, 54.7),
    ],
)
def test_ratios_of_fastv(
    text: TextConfig, layer: int, drop: float, image_only: float, with_text: float
) -> None:
    kept = FastV(drop=drop, layer=layer).num_kept(576)
    for words, expected in ((0, image_only), (36, with_text)):
        ratio = fastv_ratio(text, words + 576, words + kept, layer)
        assert round(100 * ratio, 1) == expected
        # Another convention changes totals, hardly the ratio.
        gated = fastv_ratio(text, words + 576, words + kept, layer, "gated")
        assert 0 < abs(ratio - gated) < 0.003


def test_published_figures_of_fastv() -> None:
    """57 % left in its README, 45 % less in its paper."""
    assert round(100 * fastv_ratio(LLAVA_1_5_7B.text, 612, 324, 3)) == 57
    assert round(100 * (1 - fastv_ratio(LLAVA_1_5_13B.text, 612, 324, 2))) == 45


@pytest.mark.parametrize(
    ("image_positions", "left", "mebibytes"),
    [
        (576, 576, 320),  # nothing set, or merged and unmerged virtually
        (576, 288, 189.5),  # FastV, half of the tokens
        (105, 105, 84.5),  # merged, `plain` or `logical`
        (576, 176, 138.8),  # merged, `vtu`, 32 tokens that fill 176 positions stay
        (576, 32, 73.5),
        (105, 32, 51.4),  # merged, `logical`, 32 tokens stay
    ],
)
def test_cache_of_the_7b_model(image_positions: int, left: int, mebibytes: float) -> None:
    text = LLAVA_1_5_7B.text
    positions = [64 + image_positions] * 3 + [64 + left] * 29
    assert round(kv_bytes(text, positions) / 2**20, 1) == mebibytes
    assert kv_bytes(text, positions, 4) == 2 * kv_bytes(text, positions)


def test_real_caches_of_the_7b_model_have_these_bytes() -> None:
    """Tensors without content, traced like any other: 105 tokens, of which 32 stay."""
    mapping = torch.arange(576) % 105  # 6 patches in tokens 0..50, 5 in 51..104
    reduction = Reduction(DToMe((0.5,) * 23), "vtu", FastV(drop=0.7))
    image = EncodedImage(torch.empty(105, 4096, device="meta"), mapping, reduction, (105,) * 23)
    kept = torch.arange(73, 105)  # the last 32, of 5 patches: 160 positions
    left = ImageRows(torch.arange(32), torch.zeros(32), 1, (32,))
    pruning = Pruning(3, torch.linspace(0, 1e-3, 105), kept, torch.arange(96), left)
    lengths = [640] * 3 + [64 + 160] * 29
    cache = tuple(
        tuple(torch.empty(1, 32, n, 128, dtype=torch.float16, device="meta") for _ in "kv")
        for n in lengths
    )
    trace = trace_prompt(LLAVA_1_5_7B, [image], reduction, 64, 0, None, cache, [pruning])
    assert trace.kv_bytes == sum(lengths) * 16 * 1024
    assert trace.kv_bytes_unreduced == 320 * 2**20
    assert trace.rows_per_layer == (169,) * 3 + (96,) * 29
    assert trace.positions_per_layer == tuple(lengths)
    assert trace.images[0].kept == tuple(range(73, 105))
    assert sum(trace.images[0].patch_kept()) == 160
    assert len(json.dumps(trace.to_dict())) < 20_000


@pytest.mark.parametrize("name", KINDS)
def test_lengths_are_known_before_the_image(tiny_model: Model, name: str) -> None:
    """Unless the image decides: about the thresholds it passes, or the sizes of pruned tokens."""
    lengths = expected_lengths(TINY_CONFIG, KINDS[name], 9)
    if name in ("thresholds", "hybrid vtu", "hybrid mean", "folded mean"):
        assert lengths is None
        return
    trace = traced(tiny_model, picture(1), KINDS[name])
    words = trace.rows_per_layer[0] - len(trace.images[0].sizes)
    lengths = expected_lengths(TINY_CONFIG, KINDS[name], words)
    assert lengths == (trace.rows_per_layer, trace.positions_per_layer)


def test_rows_and_positions_count_where_they_are_used() -> None:
    text = replace(TINY_TEXT, hidden_size=2, intermediate_size=3, num_layers=2, num_heads=1)
    # 4 rows: four projections of 2 x 2, an MLP of 2 or 3 matrices of 2 x 3. 5 positions look at 12.
    assert decoder_flops(text, [4], [5], [7], convention="paper") == 4 * (16 + 12) + 2 * 5 * 12 * 2
    assert decoder_flops(text, [4], [5], [7]) == 4 * (16 + 18) + 2 * 5 * 12 * 2
    # Layer 1 pruned from 4 to 2 rows; the row of scores in layer 0 looks at 12 keys, 2 wide.
    layers = decoder_flops(text, [4], [5], [7]) + decoder_flops(text, [2], [3], [7])
    assert decoder_flops(text, [4, 2], [5, 3], [7, 7]) == layers
    left = ImageRows(torch.arange(1), torch.zeros(1), 1, (1,))
    pruning = Pruning(1, torch.rand(3), torch.arange(1), torch.arange(2), left)
    assert pruning_flops(text, [5, 3], [7, 7], pruning) == 12 * 2
    # Three tokens compared with one kept token, 2 wide.
    folding = replace(pruning, folded_into=torch.zeros(3))
    assert pruning_flops(text, [5, 3], [7, 7], folding) == 12 * 2 + 3 * 1 * 2


def test_tower_counts_what_enters_each_half_of_a_block() -> None:
    vision = VisionConfig(28, 14, 2, 3, 3, 1)
    assert (vision.num_patches, vision.num_blocks) == (4, 2)
    # With the class token 5 enter, 3 are left after block 0, 2 after block 1.
    attention = (4 * 5 * 4 + 2 * 25 * 2) + (4 * 3 * 4 + 2 * 9 * 2)
    assert tower_flops(vision, [2, 1]) == attention + 2 * 3 * 6 + 2 * 2 * 6
    assert tower_flops(vision, [4, 4]) == 2 * (4 * 5 * 4 + 2 * 25 * 2 + 2 * 5 * 6)
