"""The shared beginning of prompts: computed once, and nobody can tell."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, TINY_TEXT, random_llava

from llava_lite import prefix as module
from llava_lite.generation import Model
from llava_lite.prompt import TEMPLATES, build_prompt
from llava_lite.reduction import FastV, Reduction, ToMe
from llava_lite.tokenizer import Tokenizer

HYBRID = Reduction(ToMe(keep=6), "logical", FastV(keep=2, layer=1))


@pytest.fixture
def model(tiny_tokenizer: Tokenizer) -> Model:
    """In double precision, where equal means equal to ten digits."""
    config = replace(TINY_CONFIG, text=replace(TINY_TEXT, max_positions=1024))
    return Model(random_llava(config).double(), tiny_tokenizer)


def picture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 40, 60), generator=generator, dtype=torch.uint8)


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


@pytest.mark.parametrize("wish", [None, HYBRID, Reduction(ToMe(keep=6)), Reduction(fastv=FastV(3))])
def test_scores_are_those_of_the_whole_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch, wish: Reduction | None
) -> None:
    wish = wish and replace(wish, fastv=wish.fastv and replace(wish.fastv, layer=1))

    def call() -> Any:
        images = [picture(1), None, [picture(2), picture(3)]]
        prompts = ["star?", "ring", "Which <image> or <image>?"]
        return model.score(images, prompts, ["red ring", "no", "x"], reduction=wish)

    for ours, whole in zip(call(), without(model, monkeypatch, call), strict=True):
        assert ours.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-9)


def test_answers_chats_and_counts_are_those_of_the_whole_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> Any:
        chat = model.chat(picture(1), max_new_tokens=5, reduction=HYBRID, system="Be brief.")
        answers = [chat.send("star?"), chat.send("And?", image=picture(2))]
        chat.clear()
        answers += [chat.send("star?")]
        answers += model.generate(
            [picture(3)] * 2, ["ring", "a"], max_new_tokens=5, temperature=1, seed=2
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
    alone = [str(model.generate(picture(1), text, max_new_tokens=8)) for text in texts]
    streams = [model.stream(picture(1), text, max_new_tokens=8) for text in texts]
    pieces = ["", "", ""]
    waiting = set(range(3))
    while waiting:
        for index in sorted(waiting):
            piece = next(streams[index], None)
            pieces[index] += piece or ""
            waiting -= {index} if piece is None else set()
    assert [text.strip() for text in pieces] == alone


@pytest.mark.parametrize("change", ["written", "replaced", "cast"])
def test_new_weights_make_it_void(
    model: Model, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def call() -> Any:
        return model.score(picture(1), "star?", "ring").token_logprobs

    before = call()
    projection = model.llava.decoder.layers[0].attn.k_proj
    with torch.no_grad():
        if change == "written":
            projection.weight *= -1
        elif change == "replaced":
            projection.weight = torch.nn.Parameter(-projection.weight)
        else:
            projection.weight *= -1
            model.llava.float()
    after = call()
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(without(model, monkeypatch, call), abs=1e-4)


def test_old_system_texts_are_forgotten(model: Model) -> None:
    for number in range(3 * module.MOST):
        model.generate(None, "star?", max_new_tokens=1, system=f"Number {number}.")
    assert len(model.prefix.caches) == len(model.prefix.known_ids) == module.MOST


def test_a_trace_shows_the_whole_prompt(model: Model) -> None:
    answer = model.generate(picture(1), "star?", max_new_tokens=1, trace=True)
    rows = answer.usage["prompt_tokens"] + answer.usage["image_tokens"]
    assert answer.trace is not None and set(answer.trace.rows_per_layer) == {rows}
