"""Images that are sent again are looked at once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.models import TINY_TEXT, load_tool
from helpers.pictures import picture

pytest.importorskip("fastapi")

import httpx

from helpers.serving import serving
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Row
from llava_lite.reduction import DToMe, Reduction, ToMe
from llava_lite.server.image_cache import ImageCache

PATCHES = 16


@pytest.fixture
def seen(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images passed the tower, per pass."""
    counts: list[int] = []
    real = tiny_model.llava.encode_image

    def counting(pixel_values: torch.Tensor, *rest: Any) -> Any:
        counts.append(len(pixel_values))
        return real(pixel_values, *rest)

    monkeypatch.setattr(tiny_model.llava, "encode_image", counting)
    return counts


def start(
    cache: ImageCache, model: Model, *items: Sequence[Image.Image], reduction: Any = None
) -> list[Row]:
    """Rows that ask about the images of each item."""
    options = GenerationOptions(6, reduction=reduction)
    requests = [model.request(images, "star?", options) for images in items]
    return cache.start(model, requests, [options] * len(items))


def answer(model: Model, row: Row) -> str:
    while row.finish_reason is None:
        model.step([row])
    return str(row.answer())


MERGES = [None, ToMe(keep=9), DToMe(thresholds=(0.0, 0.0))]


@pytest.mark.parametrize("merge", MERGES)
def test_what_is_kept_is_what_would_be_computed(
    tiny_model: Model, seen: list[int], merge: Any
) -> None:
    reduction = None if merge is None else Reduction(merge=merge)
    cache = ImageCache(4)
    one, two = picture(1), picture(2)
    expected = tiny_model.generate([one, two], "star?", max_new_tokens=6, reduction=reduction)
    seen.clear()
    [first] = start(cache, tiny_model, [one], reduction=reduction)
    [second] = start(cache, tiny_model, [one, two], reduction=reduction)
    [third] = start(cache, tiny_model, [two.copy(), one.copy()], reduction=reduction)
    assert sum(seen) == 2
    for kept, own in (
        (second.state.images[0], first.state.images[0]),
        (third.state.images[0], second.state.images[1]),
    ):
        assert torch.equal(kept.image_embeds, own.image_embeds)
        assert (kept.mapping is None) is (merge is None)
        assert kept.mapping is None or torch.equal(kept.mapping, own.mapping)
        assert kept.tokens_per_block == own.tokens_per_block
    assert answer(tiny_model, second) == expected
    other = tiny_model.generate([two, one], "star?", max_new_tokens=6, reduction=reduction)
    assert answer(tiny_model, third) == other
    assert third.answer().usage == other.usage


def test_another_reduction_is_another_image(tiny_model: Model, seen: list[int]) -> None:
    cache = ImageCache(4)
    for reduction, tokens in ((None, 16), (Reduction(merge=ToMe(keep=9)), 9), (None, 16)):
        [row] = start(cache, tiny_model, [picture(1)], reduction=reduction)
        assert len(row.state.images[0].image_embeds) == tokens
    assert seen == [1, 1]


def test_the_last_ones_stay_and_hold_no_batch(tiny_model: Model, seen: list[int]) -> None:
    cache = ImageCache(2)
    start(cache, tiny_model, [picture(1)], [picture(2)], [picture(3)])
    assert seen == [3]
    start(cache, tiny_model, [picture(2)])  # the later one of those that stayed, from now on
    start(cache, tiny_model, [picture(4)])
    start(cache, tiny_model, [picture(2)])
    assert seen == [3, 1]
    start(cache, tiny_model, [picture(3)])
    assert seen == [3, 1, 1]
    sizes = [image.image_embeds.untyped_storage().nbytes() for image in cache.encoded.values()]
    assert sizes == [PATCHES * TINY_TEXT.hidden_size * 4] * 2


def test_more_images_at_once_than_are_kept(tiny_model: Model, seen: list[int]) -> None:
    cache = ImageCache(1)
    pictures = [picture(1), picture(2)]
    expected = tiny_model.generate(pictures, "star?", max_new_tokens=6)
    for _ in range(2):
        [row] = start(cache, tiny_model, pictures)
        assert answer(tiny_model, row) == expected
        assert len(cache.encoded) == 1


def test_none_are_kept(tiny_model: Model, seen: list[int]) -> None:
    cache = ImageCache(0)
    for _ in range(2):
        start(cache, tiny_model, [picture(1)])
    assert seen == [1, 1] and not cache.encoded


def test_an_image_that_could_not_be_encoded_is_not_kept(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(2)
    monkeypatch.setattr(tiny_model.llava, "encode_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(cache, tiny_model, [picture(1)])
    assert not cache.encoded


def test_turns_of_a_chat(tiny_model: Model, seen: list[int]) -> None:
    """Each request has the picture and all turns before it."""
    tool = load_tool("load_server")
    parts = [{"type": "image_url", "image_url": {"url": tool.data_url(tool.png(picture(1)))}}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    answers: dict[int, list[str]] = {0: [], 16: []}
    for size, said in answers.items():
        seen.clear()
        with serving(tiny_model, image_cache=size) as running:
            for turns in (1, 2, 3):
                more = [{"role": "assistant", "content": "ring"}, {"role": "user", "content": "?"}]
                body = {"messages": messages + more * (turns - 1), "max_tokens": 4}
                response = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
                said.append(response.json()["choices"][0]["message"]["content"])
        assert sum(seen) == (1 if size else 3)
    assert answers[16] == answers[0]
