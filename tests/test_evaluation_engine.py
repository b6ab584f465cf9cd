"""The engine: same answers as one by one, whatever is batched, shared, broken or too large."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import TINY_TEXT
from PIL import Image

from llava_lite.errors import ContextError, ImageError
from llava_lite.evaluation import engine as engine_module
from llava_lite.evaluation.engine import (
    Engine,
    Group,
    Outcome,
    Prepared,
    image_groups,
    prepared_ahead,
    select_shard,
)
from llava_lite.evaluation.suite import Sample
from llava_lite.generation import Model
from llava_lite.reduction import NO_REDUCTION, FastV, Reduction, ToMe
from llava_lite.sampling import GenerationOptions

WISHES = [
    NO_REDUCTION,
    Reduction(ToMe(keep=6)),
    Reduction(ToMe(keep=6), "logical"),
    Reduction(fastv=FastV(keep=3, layer=1)),
    Reduction(ToMe(keep=8), "vtu", FastV(keep=4, layer=2)),
]
WORDS = ["star", "red", "blue circle", "square", "What color is the ring?", "white", "a b c d e"]


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (40, 60, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def many_samples() -> list[Sample]:
    """Two images with several questions each, one image alone, two images at once, and none."""
    samples = [
        Sample(f"{key}-{number}", f"{word} {number}?", (picture(key),), f"image {key}")
        for number, word in enumerate(WORDS[:4])
        for key in (1, 2)
    ]
    samples += [Sample(f"alone {n}", WORDS[n], (picture(n),)) for n in (3, 4, 5)]
    pair = (picture(6), picture(7))
    samples += [Sample(f"pair {n}", f"{WORDS[n]} red", pair, "pair") for n in range(3)]
    placed = "<image> red or <image> blue?"
    samples += [Sample("placed", placed, pair, "pair"), Sample("text", "What color?")]
    return samples


def one_by_one(model: Model, samples: Sequence[Sample], **options: Any) -> dict[str, str]:
    return {
        sample.id: str(model.generate(list(sample.images), sample.prompt, **options))
        for sample in samples
    }


def outcomes(model: Model, samples: Sequence[Sample], **settings: Any) -> dict[str, Outcome]:
    names = ("batch_size", "workers", "reuse_prefix")
    engine_settings = {name: settings.pop(name) for name in names if name in settings}
    options = GenerationOptions(**{"max_new_tokens": 5, **settings})
    found = list(Engine(model, options, **engine_settings).answer(samples))
    assert len(found) == len(samples)
    return {outcome.sample.id: outcome for outcome in found}


def texts(found: dict[str, Outcome]) -> dict[str, str]:
    assert all(outcome.error is None for outcome in found.values())
    return {name: str(outcome.answer) for name, outcome in found.items()}


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_are_those_of_single_calls(
    tiny_model: Model, wish: Reduction, batch_size: int
) -> None:
    samples = many_samples()
    expected = one_by_one(tiny_model, samples, max_new_tokens=5, reduction=wish)
    assert len(set(expected.values())) > 8
    found = outcomes(tiny_model, samples, reduction=wish, batch_size=batch_size)
    assert texts(found) == expected
