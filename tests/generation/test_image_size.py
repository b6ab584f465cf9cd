"""FastVLM: smaller images in a call, and the calls around the tower that must know their size."""

import asyncio
import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fastvithd import FASTVLM, random_fastvlm
from helpers.models import TINY_CONFIG
from helpers.pictures import picture
from llava_lite import cli, load
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.config import FastViTHDConfig
from llava_lite.errors import CheckpointError, ContextError
from llava_lite.evaluation.engine import Engine, Sample
from llava_lite.fast import device as device_module
from llava_lite.fast.device import pick_tower_dtype
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import DToMe, FastV, Reduction, ToMe
from llava_lite.server.errors import ApiError
from llava_lite.server.prepare import Preparer
from llava_lite.server.settings import Settings
from llava_lite.study.find_thresholds import find_thresholds
from llava_lite.study.inspection import inspect

QUESTION = "What color is the star?"
MERGING = Reduction(ToMe(keep=9), "logical", FastV(keep=4, layer=1))


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    return Model(random_fastvlm(), tiny_tokenizer)


@pytest.fixture(scope="module")
def wide(model: Model) -> Model:
    """The same weights, for images of 384 px."""
    return Model(model.llava, model.tokenizer, FASTVLM.at(384))


@pytest.mark.parametrize("reduction", [None, MERGING], ids=["plain", "reduced"])
def test_a_call_at_a_size_equals_a_model_of_this_size(
    model: Model, wide: Model, reduction: Reduction | None
) -> None:
    options: Any = {"reduction": reduction, "max_new_tokens": 6}
    answer = model.generate(picture(), QUESTION, image_size=384, trace=True, **options)
    expected = wide.generate(picture(), QUESTION, **options)
    assert (answer.token_ids, answer.usage) == (expected.token_ids, expected.usage)
    assert answer.usage["image_patches"] == 36
    assert answer.trace is not None
    assert answer.trace.images[0].grid == 6
    assert answer.trace.tower_flops.ratio == 1
    own = model.generate(picture(), QUESTION, **options)
    assert own.usage["image_patches"] == 16
    scores = [
        model.score(picture(), QUESTION, "red", reduction=reduction, image_size=384),
        wide.score(picture(), QUESTION, "red", reduction=reduction),
        model.score(picture(), QUESTION, "red", reduction=reduction),
    ]
    assert scores[0] == scores[1] != scores[2]


def test_a_chat_keeps_its_size(model: Model) -> None:
    chat = model.chat(picture(), image_size=384, max_new_tokens=2)
    assert chat.send(QUESTION).usage["image_patches"] == 36
    assert chat.send("And this?", picture(1)).usage["image_patches"] == 72


def test_an_encoded_image_keeps_its_size(model: Model) -> None:
    image = model.encode(picture(), MERGING, image_size=384)
    assert (image.num_patches, len(image.image_embeds)) == (36, 9)
    answer = model.generate(image, QUESTION, max_new_tokens=2)
    assert answer.usage["image_tokens"] == 9
    assert model.generate(image, QUESTION, reduction=MERGING, max_new_tokens=2) == answer
    message = "encoded with image_size=384, but the call asks for image_size=512"
    with pytest.raises(ValueError, match=message):
        model.generate(image, QUESTION, reduction=MERGING, image_size=512)
    # 20 tokens are more than the 16 of the model's own size.
    wide = model.encode(picture(), Reduction(ToMe(keep=20)), image_size=384)
    again = model.encode(wide, Reduction(ToMe(keep=20), "folded"))
    assert torch.equal(again.image_embeds, wide.image_embeds)
    assert (again.reduction.positions, again.reduction.image_size) == ("folded", 384)
    options: Any = {"reduction": again.reduction, "image_size": 384, "max_new_tokens": 2}
    assert model.generate(again, QUESTION, **options).usage["image_tokens"] == 20


def test_the_own_size_may_be_named(model: Model) -> None:
    image = model.encode(picture())
    answer = model.generate(image, QUESTION, image_size=256, max_new_tokens=2)
    assert answer == model.generate(image, QUESTION, max_new_tokens=2)
    message = "encoded with image_size=256, but the call asks for image_size=384"
    with pytest.raises(ValueError, match=message):
        model.generate(image, QUESTION, image_size=384)


@pytest.mark.parametrize("size", [0, 128, 300, 2112, 512.5])
def test_an_impossible_size_is_refused_before_any_work(model: Model, size: Any) -> None:
    with pytest.raises(ValueError, match=f"image_size {size} must be a"):
        model.generate(picture(), QUESTION, image_size=size)


def test_clip_has_one_size(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="image_size 512: CLIP takes 56 px only"):
        tiny_model.generate(picture(), QUESTION, image_size=512)
    options: Any = {"max_new_tokens": 3}
    answer = tiny_model.generate(picture(), QUESTION, image_size=56, **options)
    assert answer == tiny_model.generate(picture(), QUESTION, **options)


def test_the_context_counts_the_tokens_of_the_size(model: Model) -> None:
    with pytest.raises(ContextError, match="576 image positions"):
        model.generate(picture(), QUESTION, image_size=1536, max_new_tokens=1)


def test_the_flag(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model.llava, FASTVLM, tmp_path / "m", model.tokenizer)
    picture().save(tmp_path / "a.png")
    command = ["generate", "-m", str(tmp_path / "m"), "-i", str(tmp_path / "a.png"), "-n", "3"]
    command += ["-p", QUESTION, "--stats", "--image-size"]
    assert cli.main([*command, "384"]) == 0
    shown = capsys.readouterr()
    answer = model.generate(picture(), QUESTION, image_size=384, max_new_tokens=3)
    assert shown.out.strip() == answer.strip()
    assert "36 image tokens" in shown.err
    assert cli.main([*command, "300"]) != 0
    assert "image_size 300 must be a multiple of 64 in 256..2048" in capsys.readouterr().err


# ---- squares made elsewhere --------------------------------------------------------------------


def test_the_evaluation_resizes_once(model: Model) -> None:
    options = GenerationOptions(max_new_tokens=4, image_size=384)
    sample = Sample(0, QUESTION, (picture(),))
    [outcome] = Engine(model, options).answer([sample])
    assert outcome.answer == model.generate(picture(), QUESTION, image_size=384, max_new_tokens=4)


def test_the_server_resizes_once(model: Model) -> None:
    preparer = Preparer(model, Settings("tiny", reduction=Reduction(image_size=384)))
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    square = asyncio.run(preparer.image(1, url, 384))
    preparer.close()
    assert square.size == (384, 384)
    assert square.getpixel((0, 0)) == (0, 0, 0)
    embeds = model.encode(square, image_size=384).image_embeds
    assert torch.equal(embeds, model.encode(picture(), image_size=384).image_embeds)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, replace(MERGING, image_size=640)),
        ({"image_size": 512}, replace(MERGING, image_size=512)),
        ({"reduction": "tome-72"}, replace(Reduction.of("tome-72"), image_size=640)),
        ({"reduction": "none", "image_size": 256}, Reduction(image_size=256)),
    ],
)
def test_a_request_names_its_size(
    model: Model, fields: dict[str, Any], expected: Reduction
) -> None:
    preparer = Preparer(model, Settings("tiny", reduction=replace(MERGING, image_size=640)))
    body = {"messages": [{"role": "user", "content": QUESTION}], **fields}
    _, _, options = preparer.read(json.dumps(body).encode())
    assert options.reduction == expected
    preparer.close()


def test_a_request_names_the_size_of_its_images(model: Model) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    preparer = Preparer(model, Settings("tiny"))
    body = {"messages": [{"role": "user", "content": content}], "image_size": 384}
    job, _ = asyncio.run(preparer.prepare(json.dumps(body).encode()))
    preparer.close()
    assert [image.size for image in job.request.images] == [(384, 384)]
    expected = model.generate(picture(), QUESTION, image_size=384, max_new_tokens=4)
    [row] = model.start([job.request], [job.options], 1)
    assert row.state.images[0].num_patches == expected.usage["image_patches"] == 36


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (300, "image_size 300 must be a multiple of 64 in 256..2048"),
        (0, "image_size 0 must be a whole number of at least 1"),
        ("large", "image_size: .*valid integer"),
    ],
)
def test_a_request_with_an_impossible_size_is_refused(
    model: Model, size: Any, message: str
) -> None:
    preparer = Preparer(model, Settings("tiny"))
    body = {"messages": [{"role": "user", "content": QUESTION}], "image_size": size}
    with pytest.raises(ApiError, match=message) as caught:
        preparer.read(json.dumps(body).encode())
    preparer.close()
    assert caught.value.status == 400


def test_an_inspection_shows_the_square_of_the_size(model: Model) -> None:
    seen = inspect(model, picture(), QUESTION, reduction=MERGING, image_size=384, max_new_tokens=2)
    assert [square.size for square in seen.squares] == [(384, 384)]
    page = seen.html()
    assert "384 x 384 pixels, 6 x 6 patches" in page and "9 tokens" in page


# ---- thresholds, dtypes, export ----------------------------------------------------------------


def test_thresholds_keep_about_as_many_tokens(model: Model) -> None:
    images = [picture(seed) for seed in range(3)]
    wanted = ToMe(keep=5)
    for image in images:
        thresholds = find_thresholds(model, [image], wanted)
        assert len(thresholds) == len(wanted.steps(FASTVLM.vision)) == 2
        found = model.encode(image, Reduction(DToMe(thresholds)))
        assert len(found.image_embeds) == 5
        assert torch.equal(found.image_embeds, model.encode(image, Reduction(wanted)).image_embeds)
    with pytest.raises(ValueError, match="nothing merges, so there are no thresholds to find"):
        find_thresholds(model, images, ToMe(keep=16))


@pytest.mark.parametrize(
    ("dtype", "place", "fast", "expected"),
    [
        ("float32", "cpu", False, "float32"),
        ("bfloat16", "cpu", False, "float32"),
        ("bfloat16", "cpu", True, "bfloat16"),
        ("bfloat16", "cuda", False, "bfloat16"),
        ("float16", "cpu", True, "float32"),
        ("float16", "cuda", True, "float32"),
        ("float64", "cpu", False, "float64"),
    ],
)
def test_dtype_of_the_tower(
    monkeypatch: pytest.MonkeyPatch, dtype: str, place: str, fast: bool, expected: str
) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16_instructions", lambda: fast)
    wanted, device = getattr(torch, dtype), torch.device(place)
    assert pick_tower_dtype(FastViTHDConfig(), wanted, device) == getattr(torch, expected)
    assert pick_tower_dtype(TINY_CONFIG.vision, wanted, device) == wanted


def test_float16_keeps_the_tower_in_float32(model: Model, tmp_path: Path) -> None:
    save_model(model.llava, FASTVLM, tmp_path / "m", model.tokenizer)
    half = load(tmp_path / "m", device="cpu", dtype="float16")
    assert half.config == FASTVLM
    for name, tensor in half.llava.state_dict().items():
        is_tower = name.startswith("vision.")
        assert tensor.dtype == (torch.float32 if is_tower else torch.float16), name
    pixels = model.prepare(picture())
    with torch.inference_mode():
        ours, expected = (m.llava.vision(pixels).image_features for m in (half, model))
    assert torch.equal(ours, expected)
    assert half.generate(picture(), QUESTION, max_new_tokens=2).usage["image_patches"] == 16


@pytest.mark.parametrize(("to", "layout"), [("hf", "llava-hf"), ("gguf", "GGUF")])
def test_other_layouts_are_refused(model: Model, tmp_path: Path, to: str, layout: str) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    save_model(model.llava, FASTVLM, tmp_path / "m", model.tokenizer)
    with pytest.raises(CheckpointError, match=f"{layout} cannot store a FastViTHD tower"):
        convert(tmp_path / "m", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_config_with_impossible_sizes_is_refused(model: Model, tmp_path: Path) -> None:
    save_model(model.llava, FASTVLM, tmp_path / "m", model.tokenizer)
    file = tmp_path / "m" / "config.json"
    text = file.read_text()
    for before, after, message in (
        ('"image_size": 256', '"image_size": 320.0', "image_size 320.0 is no integer"),
        ('"image_size": 256', '"image_size": 100', "image_size 100 must be a multiple of 64"),
        ('"kind": "fastvithd"', '"kind": "swin"', "not a llava_lite config"),
    ):
        assert before in text
        file.write_text(text.replace(before, after))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "m")
    vision = json.loads(text)["vision"] | {"depths": [1, 2, 5000, 1, 1]}
    file.write_text(json.dumps(json.loads(text) | {"vision": vision}))
    with pytest.raises(CheckpointError, match="depths 5000 is out of range"):
        load(tmp_path / "m")
