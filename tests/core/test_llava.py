"""The whole model's own promises: splice, prefill, decode, dtypes. Its arithmetic is in
test_core."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.examples import examples
from helpers.models import TINY_TEXT, TINY_VISION, random_llava
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import PromptError
from llava_lite.llava import EncodedImage

P = TINY_VISION.num_patches
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-6}
LLAVAS = {dtype: random_llava(dtype=dtype) for dtype in DTYPES}


def pixels(seed: int, num_images: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pixel_values (B, 3, S, S), the same in every dtype."""
    shape = (num_images, 3, TINY_VISION.image_size, TINY_VISION.image_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@examples(15)
@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(lambda slots: sum(slots) <= 3))
def test_splice_puts_every_image_in_its_slot(slots: list[bool]) -> None:
    llava = LLAVAS[torch.float64]
    input_ids = [IMAGE_TOKEN_ID if slot else 3 + index for index, slot in enumerate(slots)]
    images = [
        EncodedImage(torch.full((2 + i, TINY_TEXT.hidden_size), float(i), dtype=torch.float64))
        for i in range(sum(slots))
    ]
    spliced, layout = llava.splice(input_ids, images, position=7)
    assert layout.num_rows == len(spliced)
    assert layout.position_ids.tolist() == list(range(7, layout.next_position))
    assert layout.next_position == 7 + len(spliced)
    for image, (start, stop) in zip(images, layout.image_spans, strict=True):
        assert torch.equal(spliced[start:stop], image.image_embeds)
    rest = (image.image_embeds for image in images)
    expected = [
        next(rest) if token == IMAGE_TOKEN_ID else llava.decoder.embed_tokens.weight[token][None]
        for token in input_ids
    ]
    assert torch.equal(spliced, torch.cat(expected))
    with pytest.raises(
        PromptError, match=rf"{sum(slots)} <image> markers?, but {sum(slots) + 1} images? w"
    ):
        llava.splice(input_ids, [*images, EncodedImage(spliced)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_decode_equals_recomputing(dtype: torch.dtype) -> None:
    llava, pixel_values = LLAVAS[dtype], pixels(5, 1, dtype)
    prompt, answer = [1, IMAGE_TOKEN_ID, 20, 30, 40], [50, 60, 70, 80]
    with torch.inference_mode():
        logits, cache, position = llava.prefill(torch.tensor([prompt]), pixel_values)
        assert logits.shape == (1, 1, TINY_TEXT.vocab_size)
        assert position == len(prompt) - 1 + TINY_VISION.num_patches
        steps = [logits]
        for token in answer:
            logits, cache = llava.decode(torch.tensor(token), position, cache)
            steps.append(logits)
            position += 1
        whole, _, _ = llava.prefill(torch.tensor([prompt + answer]), pixel_values, all_logits=True)
    assert whole.shape == (1, position, TINY_TEXT.vocab_size)
    close(torch.cat(steps, 1), whole[:, -len(steps) :], TOLERANCE[dtype])


def test_last_row_is_the_last_of_all_rows() -> None:
    llava, pixel_values = LLAVAS[torch.float32], pixels(7, 2)
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 9, IMAGE_TOKEN_ID, 12]])
    with torch.inference_mode():
        last, _, position = llava.prefill(input_ids, pixel_values)
        rows, _, _ = llava.prefill(input_ids, pixel_values, all_logits=True)
    assert rows.shape == (1, position, TINY_TEXT.vocab_size)
    close(last, rows[:, -1:], 1e-6)


@torch.inference_mode()
def test_prefill_is_one_pass_and_decode_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    llava, rows = LLAVAS[torch.float32], []
    forward = llava.decoder.forward

    def counting(input_embeds: Tensor, *rest: object) -> object:
        rows.append(len(input_embeds))
        return forward(input_embeds, *rest)

    monkeypatch.setattr(llava.decoder, "forward", counting)
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 9, 12]])
    _, cache, position = llava.prefill(input_ids, pixels(0, 1))
    llava.decode(torch.tensor([[5]]), position, cache)
    assert rows == [3 + P, 1]


@torch.inference_mode()
def test_prefill_without_an_image_is_the_language_model() -> None:
    llava = LLAVAS[torch.float32]
    input_ids = torch.tensor([[1, 40, 50]])
    logits, cache, position = llava.prefill(input_ids, None, all_logits=True)
    rows, layout = llava.splice([1, 40, 50], [])
    assert torch.equal(rows, llava.decoder.embed_tokens(input_ids[0]))
    expected, _, _ = llava([rows], [layout], [None], all_logits=True)
    assert torch.equal(logits[0], expected)
    assert position == 3
    assert [k.shape for k, _ in cache] == [(1, TINY_TEXT.num_heads, 3, TINY_TEXT.head_dim)] * 3


@torch.inference_mode()
def test_images_are_taken_in_order_and_all_of_them_matter() -> None:
    llava, pixel_values = LLAVAS[torch.float32], pixels(3, 2)
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 9, IMAGE_TOKEN_ID, 12]])
    here, _, _ = llava.prefill(input_ids, pixel_values)
    swapped, _, _ = llava.prefill(input_ids, pixel_values.flip(0))
    assert (here - swapped).abs().max() > 1e-2
    for index in range(2):
        blank = pixel_values.clone()
        blank[index] = 0
        other, _, _ = llava.prefill(input_ids, blank)
        assert (here - other).abs().max() > 1e-2


@torch.inference_mode()
def test_an_image_is_encoded_alike_in_any_batch() -> None:
    llava, pixel_values = LLAVAS[torch.float32], pixels(4, 3)
    together = torch.stack([image.image_embeds for image in llava.encode_image(pixel_values)])
    assert together.shape == (3, P, TINY_TEXT.hidden_size)
    for index in range(3):
        [alone] = llava.encode_image(pixel_values[index : index + 1])
        close(together[index], alone.image_embeds, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("slots", [0, 2])
def test_prefill_refuses_a_wrong_number_of_images(slots: int) -> None:
    input_ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * slots, 9]])
    with pytest.raises(PromptError, match=f"{slots} <image> markers, but 1 image was given"):
        LLAVAS[torch.float32].prefill(input_ids, pixels(0, 1))


@torch.inference_mode()
def test_a_bfloat16_model_takes_float32_pixels() -> None:
    llava = random_llava(dtype=torch.bfloat16)
    logits, cache, _ = llava.prefill(torch.tensor([[1, IMAGE_TOKEN_ID, 9]]), pixels(0, 1))
    exact, _, _ = LLAVAS[torch.float32].prefill(
        torch.tensor([[1, IMAGE_TOKEN_ID, 9]]), pixels(0, 1)
    )
    assert logits.dtype == cache[0][0].dtype == llava.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0)
    assert similarity > 0.99
