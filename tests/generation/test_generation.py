"""Generation against a slow reference that recomputes everything for every token, without caches,
batches or streams."""

import base64
import copy
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import llava_lite
from helpers.examples import examples
from helpers.models import TINY_CONFIG, TINY_TEXT, TINY_VISION, random_llava
from llava_lite.checkpoints.checkpoint import load_model
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import ContextError, ImageError, PromptError
from llava_lite.generation import loop as generation
from llava_lite.generation.answer import Answer, AnswerText, Score
from llava_lite.generation.chat import Chat
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import (
    GenerationOptions,
    Options,
    PromptOptions,
    draw,
    sample,
)
from llava_lite.inputs.images import load_image
from llava_lite.inputs.pixels import preprocess
from llava_lite.inputs.prompt import build_prompt, place_images
from llava_lite.inputs.tokenizer import StreamDecoder, Tokenizer
from llava_lite.llava import EncodedImage

P = TINY_VISION.num_patches
IMAGE_COUNTS = ("image_patches", "image_tokens", "kept_image_tokens")
LENGTH = 12


def picture(seed: int) -> Image.Image:
    """A random picture, neither square nor of the model's size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60 + seed, 3), np.uint8)
    return Image.fromarray(pixels)


def prompt_ids(model: Model, prompt: str, num_images: int) -> list[int]:
    text = build_prompt("vicuna_v1", [(place_images(prompt, num_images), None)])
    return model.tokenizer.encode_prompt(text)


@torch.inference_mode()
def reference_ids(
    model: Model, input_ids: Sequence[int], images: Sequence[Image.Image], length: int = LENGTH
) -> tuple[int, ...]:
    """Greedy answer: the whole sequence again for every token."""
    size = model.config.vision.image_size
    pixel_values = [preprocess(load_image(image), size, model.config.pad) for image in images]
    seen = [model.llava.encode_image(pixels)[0] for pixels in pixel_values]
    answer: list[int] = []
    while len(answer) < length:
        rows, layout = model.llava.splice([*input_ids, *answer], seen)
        logits, _, _ = model.llava([rows], [layout], [None])
        token = int(logits[0, : model.config.text.sampled_vocab_size].argmax())
        if token == model.config.text.eos_id:
            break
        answer.append(token)
    return tuple(answer)


@pytest.fixture(scope="module")
def endless_model(tiny_model: Model) -> Model:
    """The tiny model without an end token, for tests of exact lengths."""
    text = replace(TINY_TEXT, eos_id=-1)
    return Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, text=text))


@pytest.fixture
def forwards(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Row counts of the items of every forward from here on."""
    calls: list[list[int]] = []
    forward = tiny_model.llava.forward

    def recording(input_embeds: Sequence[torch.Tensor], *rest: Any) -> Any:
        calls.append([len(rows) for rows in input_embeds])
        return forward(input_embeds, *rest)

    monkeypatch.setattr(tiny_model.llava, "forward", recording)
    return calls


def shared_length(model: Model) -> int:
    """Ids at the beginning of every prompt that are not run again (prefix.py)."""
    return len(model.prefix.ids(model.config.template, None))


Script = Callable[[Sequence[Sequence[int]]], None]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make the model say given ids, one list per item of the batch, instead of sampling."""

    def install(answers: Sequence[Sequence[int]]) -> None:
        steps = zip(*answers, strict=True)

        def scripted_sample(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
            return torch.tensor(next(steps))

        monkeypatch.setattr(generation, "sample", scripted_sample)

    return install


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_greedy_equals_recomputing_every_token(tiny_model: Model, num_images: int) -> None:
    images = [picture(seed) for seed in range(num_images)]
    answer = tiny_model.generate(images, "What color is the star?", max_new_tokens=LENGTH)
    input_ids = prompt_ids(tiny_model, "What color is the star?", num_images)
    expected = reference_ids(tiny_model, input_ids, images)
    assert isinstance(answer, Answer)
    assert answer.token_ids == expected
    assert answer == tiny_model.tokenizer.decode(expected).strip()
    assert answer.finish_reason == ("length" if len(expected) == LENGTH else "stop")
    assert answer.usage == {
        "prompt_tokens": len(input_ids) - num_images,
        **dict.fromkeys(IMAGE_COUNTS, num_images * P),
        "completion_tokens": len(expected),
    }


def test_answers_vary_with_image_and_prompt(tiny_model: Model) -> None:
    """Otherwise every equality in this file would be cheap."""
    answers = tiny_model.generate(
        [picture(0), picture(1), picture(0), None], ["star?", "star?", "circle?", "star?"]
    )
    assert len({answer.token_ids for answer in answers}) == 4
    assert all(len(set(answer.token_ids)) > 3 for answer in answers)


def test_one_prefill_then_one_row_per_token(
    endless_model: Model, forwards: list[list[int]]
) -> None:
    answer = endless_model.generate(picture(0), "star?", max_new_tokens=5)
    rows = answer.usage["prompt_tokens"] + P - shared_length(endless_model)
    assert forwards == [[rows], [1], [1], [1], [1]]


def test_end_token_stops_and_is_no_text(tiny_model: Model) -> None:
    whole = tiny_model.generate(picture(0), "star?", max_new_tokens=LENGTH)
    end = next(
        i for i, token in enumerate(whole.token_ids) if token not in whole.token_ids[:i] and i
    )
    text = replace(TINY_TEXT, eos_id=whole.token_ids[end])
    model = Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, text=text))
    answer = model.generate(picture(0), "star?", max_new_tokens=LENGTH)
    assert answer.token_ids == whole.token_ids[:end]
    assert answer.finish_reason == "stop"
    assert answer == model.tokenizer.decode(whole.token_ids[:end]).strip()
    # At the last allowed token the end token still counts as the end.
    assert model.generate(picture(0), "star?", max_new_tokens=end).finish_reason == "length"
    assert model.generate(picture(0), "star?", max_new_tokens=end + 1).finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_beyond_the_text_vocabulary_are_never_sampled(
    tiny_model: Model, temperature: float
) -> None:
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 0}
    free = tiny_model.generate(picture(0), "star?", **options).token_ids
    assert max(free) < TINY_TEXT.sampled_vocab_size < TINY_TEXT.vocab_size
    limit = sorted(free)[len(free) // 2]
    text = replace(TINY_TEXT, sampled_vocab_size=limit)
    model = Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, text=text))
    assert max(model.generate(picture(0), "star?", **options).token_ids) < limit


def test_image_kinds_are_the_same_image(tiny_model: Model, tmp_path: Path) -> None:
    image, file = picture(0), io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(file.getvalue())
    array = np.asarray(image)
    kinds = [
        image,
        path,
        str(path),
        file.getvalue(),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        tiny_model.encode(image),
        [image],
        (image,),
    ]
    answers = [tiny_model.generate(kind, "star?", max_new_tokens=4) for kind in kinds]
    assert len({answer.token_ids for answer in answers}) == 1


def test_prompt_may_place_the_image_itself(tiny_model: Model) -> None:
    behind = tiny_model.generate(picture(0), "What is <image> here?", max_new_tokens=LENGTH)
    input_ids = prompt_ids(tiny_model, "What is <image> here?", 1)
    assert behind.token_ids == reference_ids(tiny_model, input_ids, [picture(0)])
    in_front = tiny_model.generate(picture(0), "What is here?", max_new_tokens=LENGTH)
    explicit = tiny_model.generate(picture(0), "<image>\nWhat is here?", max_new_tokens=LENGTH)
    assert explicit.token_ids == in_front.token_ids != behind.token_ids


def test_system_and_template_change_the_prompt(tiny_model: Model) -> None:
    texts = {
        "Be brief. USER: <image>\nstar? ASSISTANT:": {"system": "Be brief."},
        "USER: <image>\nstar? ASSISTANT:": {"template": "llava-hf"},
        "<image>star?": {"template": "plain"},
    }
    for text, options in texts.items():
        input_ids = tiny_model.tokenizer.encode_prompt(text)
        expected = reference_ids(tiny_model, input_ids, [picture(0)])
        options = {"max_new_tokens": LENGTH, **options}
        assert tiny_model.generate(picture(0), "star?", **options).token_ids == expected
        assert tiny_model.chat(picture(0), **options).send("star?").token_ids == expected


def test_config_of_the_model_overrides_pad_and_template(tiny_model: Model) -> None:
    config = replace(TINY_CONFIG, pad=False, template="llava-hf")
    model = Model(tiny_model.llava, tiny_model.tokenizer, config)
    input_ids = model.tokenizer.encode_prompt("USER: <image>\nstar? ASSISTANT:")
    answer = model.generate(picture(0), "star?", max_new_tokens=LENGTH)
    assert answer.token_ids == reference_ids(model, input_ids, [picture(0)])


def test_golden_answers(shared: Path) -> None:
    """The reference implementation's greedy tokens, from text and pixel values, as one batch."""
    folder = shared / "goldens" / "llava" / "tiny"
    llava = load_model(folder / "hf_layout", dtype="float32")
    tokenizer = Tokenizer.from_sentencepiece(
        shared / "data" / "llama_tokenizer" / "tokenizer.model"
    )
    model = Model(llava, tokenizer)
    goldens = json.loads((folder / "tiny_goldens.json").read_text())["prompts"]
    pixel_values = load_file(folder / "tiny_goldens.safetensors")["pixel_values"][:1]
    with torch.inference_mode():
        [image] = llava.encode_image(pixel_values)
    options = {"system": "A chat.", "max_new_tokens": 8}
    answers = model.generate([image, None], ["What is this?", "Hello"], **options)
    for answer, name in zip(answers, ("one_image", "text_only"), strict=True):
        assert answer.usage["prompt_tokens"] == sum(
            token >= 0 for token in goldens[name]["ids_official_style"]
        )
        assert list(answer.token_ids) == goldens[name]["generate_8"]


# ---- batches -----------------------------------------------------------------------------------

BATCH_PROMPTS = [
    "star?",
    "What color is the star in the middle of it?",
    "red",
    "What are <image> and <image>?",
    "circle or square? red, orange, yellow, green, blue, purple, white, black?",
]


def batch_images(model: Model) -> list[Any]:
    """One image, none, several, encoded and raw side by side."""
    encoded = model.encode(picture(4))
    return [picture(0), None, [picture(1)], [picture(2), encoded], encoded]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 7}, {"temperature": 0.7, "top_k": 20, "seed": 3}]
)
def test_a_batch_is_its_items_one_by_one(
    tiny_model: Model, batch_size: int | None, options: dict[str, Any]
) -> None:
    images = batch_images(tiny_model)
    together = tiny_model.generate(
        images, BATCH_PROMPTS, max_new_tokens=LENGTH, batch_size=batch_size, **options
    )
    for answer, image, prompt in zip(together, images, BATCH_PROMPTS, strict=True):
        alone = tiny_model.generate(image, prompt, max_new_tokens=LENGTH, **options)
        assert answer.token_ids == alone.token_ids
        assert answer == alone
        assert answer.finish_reason == alone.finish_reason
        assert answer.usage == alone.usage


def test_finished_items_leave_and_waiting_ones_join(
    tiny_model: Model, forwards: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three items, two at a time: they end after 2, 4 and 2 sampled tokens."""
    end = TINY_TEXT.eos_id
    steps = iter([[40, 40], [end, 41], [42, 43], [44, end]])
    monkeypatch.setattr(generation, "sample", lambda *_: torch.tensor(next(steps)))
    answers = tiny_model.generate(None, ["a", "b", "c"], max_new_tokens=4, batch_size=2)
    assert [answer.token_ids for answer in answers] == [(40,), (40, 41, 42, 44), (43,)]
    assert [answer.finish_reason for answer in answers] == ["stop", "length", "stop"]
    shared = shared_length(tiny_model)
    lengths = [answer.usage["prompt_tokens"] - shared for answer in answers]
    assert forwards == [lengths[:2], [1, 1], [1, lengths[2]], [1, 1]]


def test_batch_size_bounds_the_tower_and_the_decoder(
    endless_model: Model, forwards: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[int] = []
    encode_image = endless_model.llava.encode_image

    def recording(pixel_values: torch.Tensor, *rest: object) -> object:
        images.append(len(pixel_values))
        return encode_image(pixel_values, *rest)

    monkeypatch.setattr(endless_model.llava, "encode_image", recording)
    two_each = [[picture(0), picture(1)]] * 3
    endless_model.generate(two_each, ["star?"] * 3, max_new_tokens=2, batch_size=3)
    assert images == [3, 3]
    assert max(map(len, forwards)) == 3
    del images[:], forwards[:]
    endless_model.generate(two_each, ["star?"] * 3, max_new_tokens=2, batch_size=2)
    assert images == [2, 2, 2]
    assert max(map(len, forwards)) == 2


def test_an_empty_batch_has_no_answers(tiny_model: Model) -> None:
    assert tiny_model.generate([], []) == []
    assert tiny_model.generate(None, []) == []


def test_a_batch_of_one_is_a_list(tiny_model: Model) -> None:
    [answer] = tiny_model.generate([picture(0)], ["star?"], max_new_tokens=3)
    assert answer == tiny_model.generate(picture(0), "star?", max_new_tokens=3)


# ---- arguments ---------------------------------------------------------------------------------


def test_rotation_by_the_camera_is_a_choice_of_the_model(tiny_model: Model) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG", exif=exif)
    turned = buffer.getvalue()
    as_stored = Model(tiny_model.llava, tiny_model.tokenizer, exif=False)
    asked = ("What color is the star?",)
    stored = tiny_model.generate(picture(0), *asked, max_new_tokens=LENGTH)
    upright = tiny_model.generate(
        picture(0).rotate(-90, expand=True), *asked, max_new_tokens=LENGTH
    )
    assert stored != upright
    for source in (turned, Image.open(buffer)):
        assert tiny_model.generate(source, *asked, max_new_tokens=LENGTH) == upright
        assert as_stored.generate(source, *asked, max_new_tokens=LENGTH) == stored
    loaded = load_image(turned, exif=False)
    assert tiny_model.generate(loaded, *asked, max_new_tokens=LENGTH) == stored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature -0.1 must be in \[0, inf\)"),
        ({"temperature": math.nan}, r"temperature nan must be in \[0, inf\)"),
        ({"temperature": math.inf}, r"temperature inf must be in \[0, inf\)"),
        ({"top_p": 0.0}, r"top_p 0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p 1.1 must be in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p nan must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k -1 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"seed": -1}, r"seed -1 must be in \[0, 2\*\*64\)"),
        ({"stop": ""}, "stop string must not be empty"),
        ({"stop": ["a", ""]}, "stop string must not be empty"),
        ({"stop": 5}, "stop 5 must be a string or several"),
        ({"stop": ["a", 5]}, "stop .'a', 5. must be a string or several"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 must be an integer"),
        ({"max_new_tokens": "9"}, "max_new_tokens '9' must be an integer"),
        ({"top_k": 2.5}, "top_k 2.5 must be an integer"),
        ({"seed": 0.5}, "seed 0.5 must be an integer"),
        ({"template": "unheard-of"}, "unheard-of"),
    ],
)
def test_options_out_of_range(tiny_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(None, "star?", **options)
    with pytest.raises(ValueError, match=message):
        tiny_model.stream(None, "star?", **options)  # at the call, not at the first piece
    with pytest.raises(ValueError, match=message):
        tiny_model.chat(**options).send("star?")


def test_integers_of_other_kinds_are_taken(tiny_model: Model) -> None:
    options = GenerationOptions(max_new_tokens=np.int64(3), top_k=torch.tensor(2), seed=np.uint8(1))
    assert [type(n) for n in (options.max_new_tokens, options.top_k, options.seed)] == [int] * 3
    assert options == GenerationOptions(max_new_tokens=3, top_k=2, seed=1)


def test_all_doors_take_the_same_options(tiny_model: Model) -> None:
    checked, typed = get_type_hints(GenerationOptions), get_type_hints(Options)
    assert typed == checked
    assert Model.generate.__doc__ is not None
    for name in (*typed, "batch_size"):
        assert f"            {name}: " in Model.generate.__doc__
    assert set(get_type_hints(PromptOptions)) < set(typed)


@pytest.mark.parametrize("call", ["generate", "stream", "chat", "score", "front door"])
def test_an_unknown_option_is_named_at_the_call(tiny_model: Model, call: str) -> None:
    wrong: dict[str, Any] = {"temprature": 1.0}
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: tiny_model.generate(None, "star?", **wrong),
        "stream": lambda: tiny_model.stream(None, "star?", **wrong),
        "chat": lambda: tiny_model.chat(**wrong),
        "score": lambda: tiny_model.score(None, "star?", "red", **wrong),
        "front door": lambda: llava_lite.generate(None, "star?", tiny_model, **wrong),
    }
    name = "generate" if call == "front door" else call
    with pytest.raises(TypeError, match=rf"Model\.{name}\(\) got .* argument 'temprature'"):
        calls[call]()


def test_score_takes_no_options_of_sampling(tiny_model: Model) -> None:
    for name in ("temperature", "max_new_tokens", "trace"):
        wrong: dict[str, Any] = {name: 1}
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            tiny_model.score(None, "star?", "red", **wrong)


def test_batch_size_out_of_range(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="batch_size 2.5 must be an integer"):
        tiny_model.generate(None, ["star?"], batch_size=2.5)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        tiny_model.generate(None, ["star?"], batch_size=0)
    with pytest.raises(ValueError, match="batch_size -1 must be at least 1"):
        tiny_model.score(None, ["star?"], ["red"], batch_size=-1)


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        (2, "one <image> only", "1 <image> marker, but 2 images were given"),
        (0, "one <image>", "1 <image> marker, but 0 images were given"),
        ([1, 1], ["a"], "1 prompts need as many images, not 2"),
        (1, ["a", "b"], "2 prompts need a list"),
        ([1, 1], ["a", 5], "must be a str"),
    ],
)
def test_prompt_and_images_must_fit(
    tiny_model: Model, images: int | list[int], prompt: Any, message: str
) -> None:
    if isinstance(prompt, str):
        image: Any = [picture(0)] * images
    else:
        image = picture(0) if images == 1 else [picture(0)] * len(images)
    with pytest.raises(PromptError, match=message):
        tiny_model.generate(image, prompt)


@pytest.mark.parametrize("prompt", [123, None, b"star?"])
def test_a_prompt_must_be_text(tiny_model: Model, prompt: Any) -> None:
    with pytest.raises(PromptError, match="a prompt must be a str or a list of str"):
        tiny_model.generate(None, prompt)


def test_a_stream_takes_one_prompt(tiny_model: Model) -> None:
    with pytest.raises(PromptError, match="a stream answers one prompt, a str, not a list"):
        tiny_model.stream(None, ["a", "b"])


def test_a_marker_outside_the_question_is_counted(tiny_model: Model) -> None:
    with pytest.raises(PromptError, match="2 <image> markers, but 1 image was given"):
        tiny_model.generate(picture(0), "star?", system="Look at <image>.")


def test_bad_image_names_its_source(tiny_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nowhere.png"):
        tiny_model.generate(tmp_path / "nowhere.png", "star?")
    with pytest.raises(ImageError, match="nowhere.png"):
        tiny_model.generate([picture(0), tmp_path / "nowhere.png"], ["a", "b"])


# ---- context -----------------------------------------------------------------------------------


def long_prompt(model: Model, total: int, num_images: int = 0) -> str:
    """A prompt that takes exactly `total` positions, images included."""
    missing = total - num_images * (P - 1) - len(prompt_ids(model, "1", num_images))
    prompt = "1" * (1 + missing)  # digits stay single
    assert len(prompt_ids(model, prompt, num_images)) + num_images * (P - 1) == total
    return prompt


def test_beyond_the_context_raises_before_any_compute(
    endless_model: Model, forwards: list[list[int]], tmp_path: Path
) -> None:
    limit = TINY_TEXT.max_positions
    prompt = long_prompt(endless_model, limit - 10, num_images=1)
    message = f"{limit - 10 - P} prompt tokens .* {P} image positions .* 11 new tokens .* {limit}"
    missing = tmp_path / "never-opened.png"
    with pytest.raises(ContextError, match=message):
        endless_model.generate(missing, prompt, max_new_tokens=11)
    with pytest.raises(ContextError, match=message):
        endless_model.stream(missing, prompt, max_new_tokens=11)
    with pytest.raises(ContextError, match=message):
        endless_model.generate([missing] * 2, ["star?", prompt], max_new_tokens=11)
    with pytest.raises(ContextError):
        endless_model.score(missing, prompt, "1" * 11)
    assert forwards == []
    answer = endless_model.generate(picture(0), prompt, max_new_tokens=10)
    assert answer.usage["completion_tokens"] == 10


def test_default_length_is_what_fits(endless_model: Model) -> None:
    limit = TINY_TEXT.max_positions
    answer = endless_model.generate(None, long_prompt(endless_model, limit - 7))
    assert answer.usage["completion_tokens"] == 7
    assert answer.finish_reason == "length"
    assert endless_model.generate(None, long_prompt(endless_model, limit - 1)).usage == {
        "prompt_tokens": limit - 1,
        **dict.fromkeys(IMAGE_COUNTS, 0),
        "completion_tokens": 1,
    }
    with pytest.raises(ContextError, match=f"{limit} prompt tokens .* 1 new tokens"):
        endless_model.generate(None, long_prompt(endless_model, limit))


def test_default_length_is_512(tiny_tokenizer: Tokenizer) -> None:
    config = replace(
        TINY_CONFIG, text=replace(TINY_TEXT, num_layers=1, max_positions=4096, eos_id=-1)
    )
    model = Model(random_llava(config), tiny_tokenizer)
    assert len(model.generate(None, "star?").token_ids) == 512


# ---- sampling ----------------------------------------------------------------------------------


def sampling_oracle(
    logits: Sequence[float], temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Probability of every id that may be drawn: temperature, top-k, top-p, in this order."""
    best = sorted(range(len(logits)), key=lambda i: -logits[i])
    best = best[: top_k or len(best)]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in best}
    total, mass, kept = sum(weights.values()), 0.0, {}
    for i in best:
        if kept and mass >= top_p:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 5, 0.8), (1.0, 99, 0.05)],
)
def test_sample_draws_the_right_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.7, -3.0, 0.9]
    expected = sampling_oracle(logits, temperature, top_k, top_p)
    generator, draws = torch.Generator().manual_seed(0), 4000
    rows = torch.tensor([logits]).expand(draws, -1)
    ids = sample(rows, temperature, top_k, top_p, [generator] * draws)
    counts = torch.bincount(ids, minlength=len(logits)).tolist()
    drawn = {i for i, count in enumerate(counts) if count}
    assert {i for i, p in expected.items() if draws * p > 20} <= drawn <= set(expected)
    for i, p in expected.items():
        assert abs(counts[i] - draws * p) <= 4 * math.sqrt(draws * p * (1 - p)) + 1e-9


@examples(60)
@given(
    st.lists(st.integers(-200, 200), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_sample_stays_in_the_allowed_set(
    logits: list[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    scaled = [value / 20 for value in logits]
    # An id exactly at the edge of top_p may fall either way by rounding: allow both.
    allowed = sampling_oracle(scaled, temperature, top_k, min(1.0, top_p + 1e-6))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([scaled]).expand(30, -1)
    assert set(sample(rows, temperature, top_k, top_p, [generator] * 30).tolist()) <= set(allowed)


@examples(30)
@given(st.lists(st.integers(-(10**4), 10**4), min_size=2, max_size=9, unique=True), st.data())
def test_greedy_and_its_limits_are_argmax(logits: list[int], data: st.DataObject) -> None:
    num_text_ids = data.draw(st.integers(1, len(logits)))
    row = torch.tensor([logits], dtype=torch.float64)
    best = max(range(num_text_ids), key=logits.__getitem__)
    generators = [torch.Generator().manual_seed(data.draw(st.integers(0, 99)))]
    assert sample(row, num_text_ids=num_text_ids).tolist() == [best]
    for limit in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}, {"temperature": 1e-12}):
        options = {"temperature": 1.0, **limit}
        ids = sample(row, **options, generators=generators, num_text_ids=num_text_ids)
        assert ids.tolist() == [best]


def test_sample_is_in_float32_whatever_comes_in() -> None:
    """In bfloat16 a cumulative sum over many ids would lose the tail."""
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16).expand(400, -1)
    generator = torch.Generator().manual_seed(0)
    ids = sample(logits, 1.0, 0, 0.999, [generator] * 400)
    assert len(ids.unique()) > 350
    assert ids.max() > 2900


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_draw_never_takes_a_weight_of_zero(
    monkeypatch: pytest.MonkeyPatch, uniform: float, index: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform))
    for scale in (1.0, 0.3, 1e-30, 7e20):
        weights = torch.tensor([0, 0.5, 0, 0.5, 0]) * scale
        assert draw(weights, None) == index


def test_rows_draw_from_their_own_generators() -> None:
    logits = torch.zeros(1, 1000).expand(3, -1)

    def draws(seeds: Sequence[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(logits[: len(seeds)], 1.0, 0, 1.0, generators).tolist()

    assert draws([1, 2, 1]) == [*draws([1]), *draws([2]), *draws([1])]
    assert draws([1]) != draws([2])
    with pytest.raises(ValueError, match="zip"):
        sample(logits, 1.0, 0, 1.0, [torch.Generator()])


def test_seed_repeats_and_no_seed_does_not(tiny_model: Model) -> None:
    options = {"max_new_tokens": 20, "temperature": 2.0}
    before = torch.random.get_rng_state()
    seeded = [tiny_model.generate(None, "star?", seed=5, **options).token_ids for _ in range(2)]
    other = tiny_model.generate(None, "star?", seed=6, **options).token_ids
    free = [tiny_model.generate(None, "star?", **options).token_ids for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({seeded[0], other, *free}) == 4
    assert torch.equal(torch.random.get_rng_state(), before)
    unseeded = tiny_model.generate(None, ["star?"] * 2, **options)
    assert unseeded[0].token_ids != unseeded[1].token_ids


# ---- text and streams --------------------------------------------------------------------------


def stream_all(model: Model, *args: Any, **options: Any) -> tuple[list[str], Answer]:
    """All pieces of a stream, and the answer it returns."""
    stream, pieces = model.stream(*args, **options), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1}])
def test_stream_joins_to_generate(tiny_model: Model, options: dict[str, Any]) -> None:
    for seed in range(3):
        pieces, answer = stream_all(
            tiny_model, picture(seed), "star?", max_new_tokens=30, **options
        )
        expected = tiny_model.generate(picture(seed), "star?", max_new_tokens=30, **options)
        assert "".join(pieces) == answer == expected
        assert answer.token_ids == expected.token_ids
        assert answer.usage == expected.usage
        assert all(pieces)
        assert len(pieces) > 5


def test_stream_is_lazy_and_closes_cleanly(tiny_model: Model, forwards: list[list[int]]) -> None:
    stream = tiny_model.stream(picture(0), "star?")
    assert forwards == []
    next(stream)
    steps = len(forwards)
    assert 1 <= steps < 6
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert next(stream, None) is None
    assert len(forwards) == steps
    assert not torch.is_inference_mode_enabled()


@st.composite
def id_lists(draw_from: st.DrawFn) -> list[int]:
    """Ids with many bytes, spaces and line breaks among them."""
    newline, space = 3 + 10, 3 + 32
    some_bytes = st.sampled_from([3 + byte for byte in "é🦙 ☃".encode()])
    ids = st.one_of(st.integers(0, 309), some_bytes, st.sampled_from([newline, space]))
    return draw_from(st.lists(ids, max_size=25))


@examples(150)
@given(ids=id_lists())
def test_pieces_are_the_stripped_text(tiny_tokenizer: Tokenizer, ids: list[int]) -> None:
    text = AnswerText(StreamDecoder(tiny_tokenizer))
    decoder, shown, certain = StreamDecoder(tiny_tokenizer), "", ""
    for token in ids:
        shown += text.push(token)
        certain += decoder.push(token)
        assert shown == certain.strip()  # nothing is held back but whitespace at the end
    shown += text.finish()
    assert shown == text.text == tiny_tokenizer.decode(ids).strip()
    assert not text.stopped


@examples(150)
@given(ids=id_lists(), data=st.data())
def test_stop_string_cuts_the_text_wherever_tokens_end(
    tiny_tokenizer: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    whole = tiny_tokenizer.decode(ids).lstrip()
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[start : start + data.draw(st.integers(1, 4))] or "never"
    text, shown = AnswerText(StreamDecoder(tiny_tokenizer), [stop]), ""
    for token in ids:
        shown += text.push(token)
        if text.stopped:
            break
    shown += text.finish()
    found = whole.find(stop)
    assert text.stopped == (found >= 0)
    assert shown == text.text == (whole[:found] if found >= 0 else whole).rstrip()


def test_utf8_tail_is_held_back_until_complete(tiny_tokenizer: Tokenizer) -> None:
    text = AnswerText(StreamDecoder(tiny_tokenizer))
    assert [text.push(3 + byte) for byte in "a🦙b".encode()] == ["a", "", "", "", "🦙", "b"]
    text = AnswerText(StreamDecoder(tiny_tokenizer))
    assert [text.push(3 + byte) for byte in "🦙".encode()[:2]] == ["", ""]
    assert text.finish() == "\ufffd\ufffd"


def test_the_start_of_a_stop_string_is_held_back(tiny_tokenizer: Tokenizer) -> None:
    text = AnswerText(StreamDecoder(tiny_tokenizer), ["###", "\nUSER"])
    assert [text.push(3 + byte) for byte in b"a#b##c"] == ["a", "", "#b", "", "", "##c"]
    assert [text.push(3 + byte) for byte in b"\nUS\nUSER"] == [""] * 3 + ["\nUS"] + [""] * 4
    assert text.stopped
    assert text.finish() == ""
    assert text.text == "a#b##c\nUS"


def test_the_earliest_of_several_stop_strings_counts(tiny_tokenizer: Tokenizer) -> None:
    for stop_strings in (["c", "bc"], ["bc", "c"], ["x", "c", "b"]):
        text = AnswerText(StreamDecoder(tiny_tokenizer), stop_strings)
        assert text.release("a bcd", final=False) == "a"
        assert text.stopped


def test_generation_ends_at_a_stop_string(
    tiny_model: Model, scripted: Script, forwards: list[list[int]]
) -> None:
    ids = tiny_model.tokenizer.encode("red square circle", bos=False)
    scripted([[*ids, 40, 40, 40]])
    answer = tiny_model.generate(None, "star?", stop=[" circ", "never"])
    assert answer == "red square"
    assert answer.finish_reason == "stop"
    assert len(forwards) == len(answer.token_ids) <= len(ids)
    scripted([[*ids, 40, 40, 40]])
    assert tiny_model.generate(None, "star?", stop="red") == ""


# ---- encoded images ----------------------------------------------------------------------------


def test_encoded_image_is_the_image(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = tiny_model.encode(picture(0))
    assert encoded.image_embeds.shape == (P, TINY_TEXT.hidden_size)
    raw = tiny_model.generate([picture(0), picture(1)], "star?", max_new_tokens=LENGTH)
    mixed = tiny_model.generate([encoded, picture(1)], "star?", max_new_tokens=LENGTH)
    assert mixed.token_ids == raw.token_ids
    assert mixed.usage == raw.usage
    assert tiny_model.encode(encoded).image_embeds is encoded.image_embeds
    monkeypatch.setattr(tiny_model.llava, "encode_image", None)
    alone = tiny_model.generate(encoded, "star?", max_new_tokens=LENGTH)
    assert alone.usage["image_tokens"] == P
    with pytest.raises(FrozenInstanceError):
        encoded.image_embeds = torch.zeros(1)  # type: ignore[misc]


def test_encoded_image_of_another_model_is_refused(tiny_model: Model) -> None:
    with pytest.raises(ImageError, match="encoded image is 32 wide, but the model needs 64"):
        tiny_model.generate(EncodedImage(torch.zeros(P, 32)), "star?")


def test_an_encoded_image_may_have_fewer_tokens(tiny_model: Model) -> None:
    few = EncodedImage(tiny_model.encode(picture(0)).image_embeds[:5])
    answer = tiny_model.generate(few, "star?", max_new_tokens=2)
    assert answer.usage["image_tokens"] == 5


# ---- chat --------------------------------------------------------------------------------------

QUESTIONS = ["What color is the star?", "And the circle?", "red or blue?"]


@pytest.mark.parametrize("max_new_tokens", [1, LENGTH])
def test_chat_equals_the_whole_history_from_scratch(tiny_model: Model, max_new_tokens: int) -> None:
    chat = tiny_model.chat(picture(0), max_new_tokens=max_new_tokens)
    images = [picture(0)]
    for turn, question in enumerate(QUESTIONS):
        extra = picture(1) if turn == 1 else None
        before = chat.input_ids
        answer = chat.send(question, image=extra)
        images += [extra] if extra else []
        spoken = len(chat.input_ids) - len(answer.token_ids)
        assert chat.input_ids[: len(before)] == before
        assert chat.input_ids[spoken:] == answer.token_ids
        expected = reference_ids(tiny_model, chat.input_ids[:spoken], images, max_new_tokens)
        assert answer.token_ids == expected
        assert answer.usage == {
            "prompt_tokens": spoken - len(images),
            **dict.fromkeys(IMAGE_COUNTS, len(images) * P),
            "completion_tokens": len(expected),
        }
    assert [question for question, _ in chat.history] == QUESTIONS
    assert chat.history[-1][1] == answer


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava-hf"])
def test_chat_ids_are_those_of_the_whole_prompt(
    tiny_model: Model, scripted: Script, template: str, legacy: bool
) -> None:
    """Answers that end with the end token, then one that was cut off: both close the same way."""
    base = tiny_model.tokenizer
    tokenizer = Tokenizer(base._vocab, base._merges, legacy)
    model = Model(tiny_model.llava, tokenizer)
    chat = model.chat(picture(0), template=template, system="Be brief.", max_new_tokens=20)
    turns: list[tuple[str, str]] = []
    for question, text in zip(QUESTIONS, ["red", "It is blue.", "red"], strict=True):
        image = picture(1) if turns else None
        scripted([[*tokenizer.encode(text, bos=False), TINY_TEXT.eos_id]])
        assert chat.send(question, image) == text
        turns.append(("<image>\n" + question, text))
        whole = tokenizer.encode_prompt(build_prompt(template, turns, "Be brief."))
        ended = len(
            tokenizer.encode(
                build_prompt(template, turns[-1:], "").rpartition(text)[2], after="text"
            )
        )
        assert chat.input_ids == tuple(whole[: len(whole) - ended])
    cut = tokenizer.encode("green", bos=False)
    scripted([cut])
    chat.options = GenerationOptions(len(cut), template=template)
    assert chat.send("Which?").finish_reason == "length"
    scripted([[40]])
    chat.options = GenerationOptions(1, template=template)
    chat.send("Why?")
    turns += [("Which?", "green"), ("Why?", None)]
    whole = tokenizer.encode_prompt(build_prompt(template, turns, "Be brief."))
    assert chat.input_ids == (*whole, 40)


def test_a_later_turn_runs_only_what_is_new(
    endless_model: Model, forwards: list[list[int]]
) -> None:
    chat = endless_model.chat(picture(0), max_new_tokens=4)
    chat.send("star?")
    before = len(chat.input_ids)
    del forwards[:]
    chat.send("circle?")
    new = len(chat.input_ids) - before - 4
    assert forwards == [[new + 1], [1], [1], [1]]  # the last sampled token had not run yet


def test_sampled_chat_equals_generate_with_the_seed(tiny_model: Model) -> None:
    options = {"temperature": 1.5, "seed": 3, "max_new_tokens": LENGTH}
    chat = tiny_model.chat(picture(0), **options)
    assert chat.send("star?") == tiny_model.generate(picture(0), "star?", **options)
    chat.clear()
    assert chat.history == []
    assert chat.input_ids == ()
    assert chat.send("star?") == tiny_model.generate(picture(0), "star?", **options)


def test_images_of_the_first_message(tiny_model: Model) -> None:
    """Those the chat was opened with, then those that come with the message."""
    both = tiny_model.generate([picture(0), picture(1)], "star?", max_new_tokens=LENGTH)
    chat = tiny_model.chat(picture(0), max_new_tokens=LENGTH)
    assert chat.send("star?", picture(1)).token_ids == both.token_ids
    chat = tiny_model.chat(max_new_tokens=LENGTH)
    assert chat.send("star?", [picture(0), picture(1)]).token_ids == both.token_ids
    chat = tiny_model.chat([picture(0), picture(1)], max_new_tokens=LENGTH)
    assert chat.send("star?").token_ids == both.token_ids


def test_chat_stream_is_send(tiny_model: Model) -> None:
    sent, streamed = (tiny_model.chat(picture(0), max_new_tokens=LENGTH) for _ in range(2))
    for question in QUESTIONS:
        answer = sent.send(question)
        assert "".join(streamed.stream(question)) == answer
    assert streamed.history == sent.history
    assert streamed.input_ids == sent.input_ids


def assert_consistent(model: Model, chat: Chat, images: list[Image.Image]) -> None:
    """The chat goes on exactly as a new one whose history holds the same ids."""
    answer = chat.send("And now?")
    spoken = len(chat.input_ids) - len(answer.token_ids)
    assert answer.token_ids == reference_ids(model, chat.input_ids[:spoken], images)


def test_a_closed_stream_stays_in_the_history(tiny_model: Model) -> None:
    chat = tiny_model.chat(picture(0), max_new_tokens=LENGTH)
    stream = chat.stream("star?")
    first, second = next(stream), next(stream)
    stream.close()
    assert chat.history == [("star?", first + second)]
    whole = tiny_model.generate(picture(0), "star?", max_new_tokens=LENGTH)
    said = chat.input_ids[len(prompt_ids(tiny_model, "star?", 1)) :]
    assert 1 < len(said) < LENGTH
    assert said == whole.token_ids[: len(said)]
    assert_consistent(tiny_model, chat, [picture(0)])


def test_an_abandoned_stream_is_closed_by_the_next_message(tiny_model: Model) -> None:
    chat = tiny_model.chat(picture(0), max_new_tokens=LENGTH)
    stream = chat.stream("star?")
    piece = next(stream)
    chat.send("circle?")
    assert chat.history[0] == ("star?", piece)
    assert next(stream, None) is None
    assert len(chat.history) == 2
    for _ in chat.stream("red?"):
        break
    assert len(chat.history) == 3
    never_started = chat.stream("blue?")
    assert_consistent(tiny_model, chat, [picture(0)])
    assert next(never_started, None) is None
    assert [question for question, _ in chat.history][2:] == ["red?", "And now?"]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_ctrl_c_keeps_what_was_answered(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Interrupted in the middle of the forward of token `at`."""
    chat = tiny_model.chat(picture(0), max_new_tokens=LENGTH)
    first = chat.send("star?")
    forward, calls = tiny_model.llava.forward, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > at:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model.llava, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.send("circle?")
    assert len(chat.history) == (2 if at else 1)
    assert chat.history[0] == ("star?", first)
    assert_consistent(tiny_model, chat, [picture(0)])


def test_ctrl_c_releases_what_was_held_back(
    endless_model: Model, scripted: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A # may be the start of the stop string until the answer is over."""
    scripted([[3 + ord("a"), 3 + ord("#"), 40]])
    chat = endless_model.chat(stop="##", max_new_tokens=3)
    forward, calls = endless_model.llava.forward, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(endless_model.llava, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send("star?")
    assert chat.history == [("star?", "a#")]


def test_chat_survives_context_overflow_and_bad_input(tiny_model: Model, tmp_path: Path) -> None:
    chat = tiny_model.chat(picture(0), max_new_tokens=LENGTH)
    chat.send("star?")
    history, input_ids = chat.history, chat.input_ids
    with pytest.raises(ContextError, match=rf"{P} image positions \+ {LENGTH} new tokens"):
        chat.send("1" * TINY_TEXT.max_positions)
    with pytest.raises(ImageError, match="nowhere"):
        chat.send("circle?", image=tmp_path / "nowhere.png")
    with pytest.raises(PromptError, match="1 <image> marker, but 0 images were given"):
        chat.send("<image>")
    assert (chat.history, chat.input_ids) == (history, input_ids)
    assert_consistent(tiny_model, chat, [picture(0)])


def test_chat_without_an_image_fills_the_context_exactly(tiny_model: Model) -> None:
    chat = tiny_model.chat(max_new_tokens=100)
    with pytest.raises(ContextError):
        for _ in range(10):
            chat.send("star?")
    assert len(chat.input_ids) <= TINY_TEXT.max_positions
    assert 3 <= len(chat.history) <= 5


# ---- score -------------------------------------------------------------------------------------


@torch.inference_mode()
def reference_score(model: Model, images: list[Image.Image], prompt: str, text: str) -> list[float]:
    input_ids = prompt_ids(model, prompt, len(images))
    target = model.tokenizer.encode(text, bos=False)
    size = model.config.vision.image_size
    seen = [model.llava.encode_image(preprocess(image, size))[0] for image in images]
    logprobs = []
    for index, token in enumerate(target):
        rows, layout = model.llava.splice([*input_ids, *target[:index]], seen)
        logits, _, _ = model.llava([rows], [layout], [None])
        text_logits = logits[0, : TINY_TEXT.sampled_vocab_size].double()
        logprobs.append(float(text_logits[token] - text_logits.logsumexp(-1)))
    return logprobs


def test_score_is_the_log_likelihood(tiny_model: Model) -> None:
    for text in ["red", "r", "It is a blue square."]:
        score = tiny_model.score(picture(0), "star?", text)
        expected = reference_score(tiny_model, [picture(0)], "star?", text)
        assert isinstance(score, Score)
        assert score.token_ids == tuple(tiny_model.tokenizer.encode(text, bos=False))
        assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert score.log_likelihood == pytest.approx(sum(expected), abs=1e-4)
        assert not score.is_greedy
        assert tiny_model.score(picture(0), "star?", " " + text) == score


def test_scores_in_a_batch_are_those_alone(tiny_model: Model) -> None:
    images = batch_images(tiny_model)
    texts = ["red", "It is a blue square.", "a", "green circle", "b"]
    alone = [tiny_model.score(*item) for item in zip(images, BATCH_PROMPTS, texts, strict=True)]
    for batch_size in (None, 1, 2):
        together = tiny_model.score(images, BATCH_PROMPTS, texts, batch_size=batch_size)
        for one, other in zip(together, alone, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
            assert one.token_ids == other.token_ids


def test_only_the_greedy_answer_is_greedy(tiny_model: Model) -> None:
    """By ids, because random text seldom survives decoding and encoding."""
    ids = tiny_model.generate(picture(0), "star?", max_new_tokens=5).token_ids
    requests = [tiny_model.request([picture(0)], "star?", GenerationOptions())] * 4
    wrong = [(*ids[:-1], ids[-1] ^ 1), (ids[0] ^ 1, *ids[1:])]
    scores = tiny_model.score_chunk(requests, [ids, ids[:1], *wrong], 8)
    assert [score.is_greedy for score in scores] == [True, True, False, False]
    assert scores[0].log_likelihood > scores[2].log_likelihood


def test_first_tokens_are_a_distribution(tiny_model: Model) -> None:
    """Scores are log-probabilities among the ids that may be sampled."""
    tokenizer = tiny_model.tokenizer
    texts = [tokenizer.decode([token]) for token in range(259, tokenizer.vocab_size)]
    single = [text for text in texts if text and len(tokenizer.encode(text, bos=False)) == 1]
    scores = tiny_model.score(None, ["star?"] * len(single), single, batch_size=16)
    reached = {score.token_ids: math.exp(score.log_likelihood) for score in scores}
    logits, _, _ = tiny_model.prefill(torch.tensor([prompt_ids(tiny_model, "star?", 0)]), None)
    probs = logits[0, 0, : TINY_TEXT.sampled_vocab_size].softmax(-1)
    assert len(reached) >= 5
    for (token,), likelihood in reached.items():
        assert likelihood == pytest.approx(float(probs[token]), rel=1e-3)


def test_score_refuses_what_cannot_be_scored(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        tiny_model.score(None, "star?", "")
    with pytest.raises(PromptError, match="2 prompts need as many continuations, not 1"):
        tiny_model.score(None, ["a", "b"], ["c"])
    with pytest.raises(PromptError, match="one prompt needs one continuation, a str, not a list"):
        tiny_model.score(None, "a", ["c"])
    with pytest.raises(PromptError, match="needs a list of continuations, not a str"):
        tiny_model.score(None, ["a"], "c")
    with pytest.raises(PromptError, match="a continuation must be a str"):
        tiny_model.score(None, ["a"], [5])
    assert tiny_model.score(None, [], []) == []


# ---- answers and the lower level ---------------------------------------------------------------


def test_answer_is_a_str_that_travels(tiny_model: Model) -> None:
    answer = tiny_model.generate(picture(0), "star?", max_new_tokens=3)
    assert isinstance(answer, str)
    for twin in (pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer)):
        assert type(twin) is Answer
        assert twin.to_dict() == answer.to_dict()
    assert json.loads(json.dumps(answer.to_dict())) == answer.to_dict()
    assert answer.to_dict()["text"] == answer
    assert set(answer.timings) == {"preprocess", "vision", "prefill", "decode", "tokens_per_second"}
    assert all(value > 0 for value in answer.timings.values())
    steps = answer.usage["completion_tokens"] - 1
    assert answer.timings["tokens_per_second"] == pytest.approx(steps / answer.timings["decode"])


def test_timings_book_every_step_where_it_belongs(
    endless_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that ticks once per reading, everything that is timed takes one second."""
    ticks = iter(range(100))
    monkeypatch.setattr(generation, "perf_counter", lambda: float(next(ticks)))
    answer = endless_model.generate(picture(0), "star?", max_new_tokens=4)
    assert answer.timings == {
        "preprocess": 1.0,
        "vision": 1.0,
        "prefill": 1.0,
        "decode": 3.0,
        "tokens_per_second": 1.0,
    }


def test_timings_of_a_single_token_without_an_image(tiny_model: Model) -> None:
    answer = tiny_model.generate(None, "star?", max_new_tokens=1)
    assert answer.timings["decode"] == answer.timings["tokens_per_second"] == 0
    assert answer.timings["prefill"] > 0


def test_prefill_and_decode_are_those_of_llava(tiny_model: Model) -> None:
    pixel_values = preprocess(picture(0), TINY_VISION.image_size)
    input_ids = torch.tensor([[1, 40, IMAGE_TOKEN_ID, 50]])
    logits, cache, position = tiny_model.prefill(input_ids, pixel_values)
    assert logits.shape == (1, 1, TINY_TEXT.vocab_size)
    assert position == 3 + P
    assert not logits.requires_grad
    every, _, _ = tiny_model.prefill(input_ids, pixel_values, all_logits=True)
    assert every.shape == (1, 3 + P, TINY_TEXT.vocab_size)
    torch.testing.assert_close(every[:, -1:], logits)
    step, grown = tiny_model.decode(torch.tensor([60]), position, cache)
    assert step.shape == (1, 1, TINY_TEXT.vocab_size)
    assert [k.shape[2] for k, _ in grown] == [4 + P] * TINY_TEXT.num_layers
    assert [k.shape[2] for k, _ in cache] == [3 + P] * TINY_TEXT.num_layers
    assert not step.requires_grad


def test_every_forward_runs_in_inference_mode(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    for owner, name in ((tiny_model.llava, "forward"), (tiny_model.llava, "encode_image")):
        original = getattr(owner, name)

        def recording(*args: Any, original: Callable[..., Any] = original) -> Any:
            modes.append(torch.is_inference_mode_enabled())
            return original(*args)

        monkeypatch.setattr(owner, name, recording)
    tiny_model.generate(picture(0), "star?", max_new_tokens=2)
    list(tiny_model.stream(picture(0), "star?", max_new_tokens=2))
    tiny_model.score(picture(0), "star?", "red")
    tiny_model.encode(picture(0))
    assert len(modes) > 8
    assert all(modes)


def test_a_call_leaves_nothing_behind(tiny_model: Model) -> None:
    def state() -> Iterator[tuple[str, list[str]]]:
        for name, module in tiny_model.llava.named_modules():
            yield name, sorted(vars(module))

    before, attributes = list(state()), set(vars(tiny_model))
    tiny_model.generate([picture(0), None], ["star?", "red"], max_new_tokens=3)
    tiny_model.score(picture(0), "star?", "red square")
    assert list(state()) == before
    assert set(vars(tiny_model)) == attributes
    assert all(parameter.grad is None for parameter in tiny_model.llava.parameters())
