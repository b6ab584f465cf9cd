"""The shared beginning of prompts: computed once, and nobody can tell."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import llava_lite
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.pictures import noise
from llava_lite.fast.quantize import quantize
from llava_lite.generation import prefix as module
from llava_lite.generation.model import Model
from llava_lite.inputs.prompt import TEMPLATES, build_prompt
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import FastV, Reduction, ToMe

HYBRID = Reduction(ToMe(keep=6), "logical", FastV(keep=2, layer=1))


@pytest.fixture
def model(tiny_tokenizer: Tokenizer) -> Model:
    """In double precision, where equal means equal to ten digits."""
    config = replace(TINY_CONFIG, text=replace(TINY_TEXT, max_positions=1024))
    return Model(random_llava(config).double(), tiny_tokenizer)


def without(model: Model, monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    """What the call gives when every prompt runs whole."""
    with monkeypatch.context() as patch:
        patch.setattr(model.prefix, "ids", lambda *_: ())
        return call()


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_every_prompt_begins_with_it(model: Model, template: str, system: str | None) -> None:
    shared = model.prefix.ids(template, system)
    for text in ("What?", "<image>\nWhat?", " x", "1", "\n", "é", "Look at <image>", "</s>", "日"):
        prompt = build_prompt(template, [(text, None)], system)
        ids = tuple(model.tokenizer.encode_prompt(prompt))
        assert ids[: len(shared)] == shared and len(ids) > len(shared)
    if system is None and TEMPLATES[template].system:
        assert len(shared) >= 10  # or it would not be worth it


FOLDED = Reduction(ToMe(keep=6), "folded", FastV(keep=2, layer=1, rest="fold"))


@pytest.mark.parametrize(
    "wish",
    [None, HYBRID, FOLDED, Reduction(ToMe(keep=6)), Reduction(fastv=FastV(3))],
    ids=str,
)
def test_scores_are_those_of_the_whole_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch, wish: Reduction | None
) -> None:
    wish = wish and replace(wish, fastv=wish.fastv and replace(wish.fastv, layer=1))

    def call() -> Any:
        images = [noise(1), None, [noise(2), noise(3)]]
        prompts = ["star?", "ring", "Which <image> or <image>?"]
        return model.score(images, prompts, ["red ring", "no", "x"], reduction=wish)

    for ours, whole in zip(call(), without(model, monkeypatch, call), strict=True):
        assert ours.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-9)


@pytest.mark.parametrize("wish", [HYBRID, FOLDED], ids=str)
def test_answers_chats_and_counts_are_those_of_the_whole_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch, wish: Reduction
) -> None:
    def call() -> Any:
        chat = model.chat(noise(1), max_new_tokens=5, reduction=wish, system="Be brief.")
        answers = [chat.send("star?"), chat.send("And?", image=noise(2))]
        chat.clear()
        answers += [chat.send("star?")]
        answers += model.generate(
            [noise(3)] * 2, ["ring", "a"], max_new_tokens=5, temperature=1, seed=2
        )
        return [(answer.token_ids, answer.usage) for answer in answers]

    assert call() == without(model, monkeypatch, call)


def test_it_runs_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = model.llava.decoder.forward

    def recording(input_embeds: torch.Tensor, *rest: Any) -> Any:
        lengths.append(len(input_embeds))
        return forward(input_embeds, *rest)

    monkeypatch.setattr(model.llava.decoder, "forward", recording)
    first, second = (model.generate(None, text, max_new_tokens=1) for text in ("a", "b"))
    shared = len(model.prefix.ids(model.config.template, None))
    rest = first.usage["prompt_tokens"] - shared
    assert lengths == [shared, rest, rest]
    assert second.usage == first.usage


def test_two_answers_over_one_prefix_do_not_meet(model: Model) -> None:
    """Streams side by side write behind the same shared cache."""
    texts = ["star?", "What color is the ring?", "star?"]
    alone = [str(model.generate(noise(1), text, max_new_tokens=8)) for text in texts]
    streams = [model.stream(noise(1), text, max_new_tokens=8) for text in texts]
    pieces = ["", "", ""]
    waiting = set(range(3))
    while waiting:
        for index in sorted(waiting):
            piece = next(streams[index], None)
            pieces[index] += piece or ""
            waiting -= {index} if piece is None else set()
    assert [text.strip() for text in pieces] == alone


def score(model: Model) -> tuple[float, ...]:
    return tuple(model.score(noise(1), "star?", "ring").token_logprobs)


@pytest.mark.parametrize("change", ["written", "replaced", "given other memory"])
def test_new_weights_make_it_void(
    model: Model, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = score(model)
    projection = model.llava.decoder.layers[0].attn.k_proj
    with torch.no_grad():
        if change == "written":
            projection.weight *= -1
        elif change == "replaced":
            projection.weight = torch.nn.Parameter(-projection.weight)
        else:
            projection.weight.data = -projection.weight
    after = score(model)
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(without(model, monkeypatch, lambda: score(model)), abs=1e-9)


def test_a_cast_makes_it_void(model: Model) -> None:
    score(model)
    [before] = model.prefix.caches.values()
    model.llava.float()
    score(model)
    [after] = model.prefix.caches.values()
    assert (before[0][0].dtype, after[0][0].dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_weights_are_looked_at_too(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    text = replace(TINY_TEXT, hidden_size=128, intermediate_size=128, max_positions=1024)
    model = Model(random_llava(replace(TINY_CONFIG, text=text)), tiny_tokenizer)
    quantize(model, method)
    before = score(model)
    projection = model.llava.decoder.layers[0].attn.k_proj
    next(iter(projection.buffers())).bitwise_not_()
    after = score(model)
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(without(model, monkeypatch, lambda: score(model)), abs=1e-4)


@pytest.mark.parametrize("way", ["data", "numpy", "inference mode"])
def test_clear_is_for_writes_that_torch_does_not_count(
    model: Model, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    projection = model.llava.decoder.layers[0].attn.k_proj
    if way == "inference mode":
        with torch.inference_mode():
            projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
    before = score(model)
    if way == "data":
        projection.weight.data.neg_()
    elif way == "numpy":
        view = projection.weight.detach().numpy()
        view *= -1
    else:
        with torch.inference_mode():
            projection.weight.neg_()
    [old] = model.prefix.caches.values()
    score(model)
    assert [*model.prefix.caches.values()] == [old]  # as its docstring says
    model.prefix.clear()
    after = score(model)
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(without(model, monkeypatch, lambda: score(model)), abs=1e-9)


def test_old_templates_and_system_texts_are_forgotten(model: Model) -> None:
    for number in range(3 * module.MOST):
        model.generate(None, "star?", max_new_tokens=1, system=f"Number {number}.")
    assert len(model.prefix.known_ids) == module.MOST


def test_positions_are_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = model.prefix.caches
    for start in range(10):
        model.prefix.cache(tuple(range(start, start + 4)))
    assert list(kept) == [tuple(range(start, start + 4)) for start in range(10)]
    monkeypatch.setattr(module, "MOST_POSITIONS", 42)
    model.prefix.cache(tuple(range(10)))  # takes the place of the first two
    assert [ids[0] for ids in kept] == [*range(2, 10), 0] and sum(map(len, kept)) == 42
    before = list(kept)
    long = model.prefix.cache(tuple(range(43)))
    assert long[0][0].shape[2] == 43 and list(kept) == before
    model.prefix.cache(tuple(range(42)))
    assert list(map(len, kept)) == [42]


@pytest.mark.parametrize("wish", [None, "hybrid-72-36", "tome-72"])
def test_the_embedded_model_says_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, wish: str | None
) -> None:
    """In float32, with the sizes and weights of a model that is used."""
    model = llava_lite.load(llava_lite.embedded_model(), device="cpu", dtype="float32")

    def call() -> Any:
        questions = ["How many objects are there?", "Describe the image."]
        images = [noise(1), noise(2)]
        answers = model.generate(images, questions, max_new_tokens=12, reduction=wish)
        scores = model.score(images, questions, ["three red stars", "a blue ring"], reduction=wish)
        return [(str(one), one.token_ids) for one in answers], [
            one.token_logprobs for one in scores
        ]

    assert model.prefix.ids(model.config.template, None)
    assert call() == without(model, monkeypatch, call)


def test_a_trace_shows_the_whole_prompt(model: Model) -> None:
    answer = model.generate(noise(1), "star?", max_new_tokens=1, trace=True)
    rows = answer.usage["prompt_tokens"] + answer.usage["image_tokens"]
    assert answer.trace is not None and set(answer.trace.rows_per_layer) == {rows}
