"""Thresholds for DToMe: read from files, found over images, found again after a crash."""

import builtins
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import llava_lite
from helpers.dymu import named, slow_attention
from helpers.examples import examples
from helpers.models import ROOT, TINY_CONFIG, TINY_VISION, random_llava
from helpers.processes import Fork
from helpers.thresholds_command import parse
from llava_lite import CheckpointError, DToMe, ImageError, Reduction, ToMe, read_thresholds
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.source import Entry, Source
from llava_lite.checkpoints.thresholds import NEVER, OPENAI_CLIP_L_336, OwnThresholds
from llava_lite.cli import thresholds as command
from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.evaluation.scenes.world import Scene, draw_scene, sample_scene
from llava_lite.generation import batch_file
from llava_lite.generation.batch_file import BatchError
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.study import find_thresholds as finding_module
from llava_lite.study.find_thresholds import batch_thresholds, competing_threshold, find_thresholds
from llava_lite.vision import VisionTower

# ---- reading -------------------------------------------------------------------------------------


def dymu_names(prefix: str, blocks: Sequence[int]) -> list[str]:
    return [f"{prefix}visual.transformer.resblocks.{block}.threshold" for block in blocks]


def test_the_list_for_openai_clip() -> None:
    assert len(OPENAI_CLIP_L_336) == 24
    assert all((value * 256).is_integer() and 0.8 < value < 1 for value in OPENAI_CLIP_L_336)
    assert (OPENAI_CLIP_L_336[0], OPENAI_CLIP_L_336[-1]) == (255 / 256, 209 / 256)
    assert sum(OPENAI_CLIP_L_336) * 256 == 5532


@pytest.mark.parametrize(
    "content", [[0.5, -1, 2, 0.9990001], {"thresholds": [0.5, -1, 2, 0.9990001], "model": "m"}]
)
def test_json(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    assert read_thresholds(path) == read_thresholds(str(path)) == (0.5, -1.0, 2.0, 0.9990001)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrapped", [True, False])
def test_dymu_checkpoint(tmp_path: Path, prefix: str, dtype: torch.dtype, wrapped: bool) -> None:
    """Eleven blocks, so that names in the order of the alphabet are not those of the blocks."""
    values = [0.5 + block / 64 for block in range(11)]  # exact in all dtypes
    state = {
        name: torch.tensor(value, dtype=dtype)
        for name, value in reversed(list(zip(dymu_names(prefix, range(11)), values, strict=True)))
    }
    state |= {
        f"{prefix}visual.conv1.weight": torch.zeros(2, 3),
        f"{prefix}logit_scale": torch.ones(()),
    }
    state |= {f"{prefix}transformer.resblocks.11.threshold": torch.tensor(0.1)}  # of the text tower
    path = tmp_path / "tower.pth"
    torch.save({"name": "run", "state_dict": state} if wrapped else state, path)
    assert read_thresholds(path) == tuple(values)


def test_blocks_without_a_threshold_never_merge(tmp_path: Path) -> None:
    names = dymu_names("", [1, 3])
    state = dict(zip(names, torch.tensor([0.25, 0.75]), strict=True))
    torch.save(state, tmp_path / "t.pth")
    assert read_thresholds(tmp_path / "t.pth") == (1.0, 0.25, 1.0, 0.75)
    # The file holds the whole tower, which tells how many blocks there are.
    state["visual.transformer.resblocks.5.ln_1.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "t.pth")
    assert read_thresholds(tmp_path / "t.pth") == (1.0, 0.25, 1.0, 0.75, 1.0, 1.0)


BAD_JSON = {
    "empty file": ("", "cannot be read as JSON"),
    "not JSON": ("0.5 0.6", "cannot be read as JSON"),
    "cut off": ("[0.5, 0.6", "cannot be read as JSON"),
    "deep": ("[" * 200_000, "cannot be read as JSON"),
    "no thresholds": ('{"r": 3}', "holds no list of thresholds"),
    "a number": ("0.5", "holds no list of thresholds"),
    "null": ('{"thresholds": null}', "holds no list of thresholds"),
    "empty list": ("[]", "holds no list of thresholds"),
    "empty in object": ('{"thresholds": []}', "holds no list of thresholds"),
    "text": ('[0.5, "0.6"]', "block 1 is '0.6', no number"),
    "bool": ("[true]", "block 0 is True, no number"),
    "nested": ("[[0.5]]", "no number"),
    "null inside": ("[0.5, null]", "block 1 is None, no number"),
    "NaN": ("[0.5, NaN]", "block 1 is nan"),
    "infinite": ("[-Infinity]", "block 0 is -inf"),
    "overflow": ("[1e999]", "block 0 is inf"),
    "huge integer": (f"[{10**400}]", "too large"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(tmp_path: Path, name: str) -> None:
    text, reason = BAD_JSON[name]
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_thresholds(path)
    assert str(path) in str(caught.value)


class Payload:
    """Runs code when a pickle of it is read without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("import builtins; builtins.harmed = True",)


NAME = "module.visual.transformer.resblocks.0.threshold"
BAD_PICKLES: dict[str, tuple[Any, str]] = {
    "code": ({"state_dict": {NAME: Payload()}}, "code is never run"),
    "a list": ([torch.tensor(0.5)], "holds a list"),
    "no names": ({"state_dict": {}}, "holds no thresholds"),
    "other names": ({"state_dict": {"visual.proj": torch.ones(2)}}, "holds no thresholds"),
    "text tower only": ({"transformer.resblocks.0.threshold": torch.ones(())}, "no thresholds"),
    "a float": ({NAME: 0.5}, "is a float, no tensor"),
    "several": ({NAME: torch.ones(2)}, r"shape \(2,\), not a single float"),
    "integer": ({NAME: torch.tensor(1)}, "torch.int64"),
    "NaN": ({NAME: torch.tensor(math.nan)}, "block 0 is nan"),
    "infinite": ({NAME: torch.tensor(math.inf, dtype=torch.bfloat16)}, "block 0 is inf"),
    "nonsense number": ({NAME.replace("0", "99999999999"): torch.ones(())}, "no thresholds"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_bad_checkpoint(tmp_path: Path, name: str) -> None:
    content, reason = BAD_PICKLES[name]
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_thresholds(path)
    assert str(path) in str(caught.value)
    assert not hasattr(builtins, "harmed")


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    torch.save({NAME: torch.tensor(0.5), "visual.proj": torch.ones(64)}, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="t.pth"):
            read_thresholds(path)
    for missing in (tmp_path / "nowhere.pth", tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(CheckpointError, match=str(missing)):
            read_thresholds(missing)


def test_safetensors(tmp_path: Path) -> None:
    save_file({NAME: torch.tensor(0.5)}, tmp_path / "t.safetensors")
    assert read_thresholds(tmp_path / "t.safetensors") == (0.5,)


# ---- thresholds of a model -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """The random model, of whose 3 blocks 2 run, as a folder."""
    save_model(random_llava(), TINY_CONFIG, tmp_path / "model", tiny_tokenizer)
    return tmp_path / "model"


def test_a_folder_brings_its_thresholds(folder: Path) -> None:
    assert llava_lite.load(folder, device="cpu").thresholds is None
    for values in ([0.25, 0.5], [0.25, 0.5, 0.75]):
        (folder / "thresholds.json").write_text(json.dumps(values))
        model = llava_lite.load(folder, device="cpu")
        assert model.thresholds == tuple(values)
        image = Image.effect_noise((60, 40), 90)
        own = model.encode(image, "dymu-72")
        assert own.reduction.merge == DToMe(tuple(values))
        named = model.encode(image, Reduction(DToMe((0.25, 0.5))))
        assert torch.equal(own.image_embeds, named.image_embeds)


@pytest.mark.parametrize("text", ["[0.5]", "[0.5, 0.5, 0.5, 0.5]", "[0.5, NaN]", "{", ""])
def test_bad_thresholds_of_a_folder_show_when_they_are_needed(folder: Path, text: str) -> None:
    (folder / "thresholds.json").write_text(text)
    model = llava_lite.load(folder, device="cpu")
    image = Image.effect_noise((60, 40), 90)
    assert model.generate(image, "star?", max_new_tokens=2, reduction=Reduction(ToMe(keep=9)))
    assert model.encode(image, Reduction(DToMe((0.25, 0.5)))).mapping is not None
    for use in (
        lambda: model.generate(image, "star?", reduction="dymu-72"),
        lambda: model.chat(image, reduction="dymu-72"),
        lambda: convert(folder, folder.parent / "out"),
        lambda: convert(folder, folder.parent / "out", to="hf"),
        lambda: convert(folder, None, dry_run=True),
    ):
        with pytest.raises(CheckpointError, match="thresholds.json"):
            use()
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, OPENAI_CLIP_L_336),
        ({"feature_layer": -1}, OPENAI_CLIP_L_336),
        ({"num_layers": 23, "feature_layer": -1}, OPENAI_CLIP_L_336[:23]),
        ({"num_layers": 27}, None),
        ({"image_size": 224}, None),
        ({"hidden_size": 768}, None),
    ],
)
def test_openai_clip_has_dymu_s_thresholds(
    tmp_path: Path, changes: dict[str, int], expected: tuple[float, ...] | None
) -> None:
    config = LlavaConfig(vision=replace(VisionConfig(), **changes))
    entry = Entry(tmp_path / "tower.safetensors", "class_embed", (1024,), torch.float32)
    source = Source(tmp_path / "model", "", config, {"vision.class_embed": entry})
    assert OwnThresholds.of(source).read() == expected
    if expected is not None:
        assert len(DToMe(expected).steps(config.vision)) == config.vision.num_blocks
    # A file goes before the list: beside the tower's weights, or rather in the model's folder.
    values = [0.5] * config.vision.num_blocks
    (tmp_path / "thresholds.json").write_text(json.dumps(values))
    assert OwnThresholds.of(source).read() == tuple(values)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thresholds.json").write_text(json.dumps([0.25, *values[1:]]))
    assert OwnThresholds.of(source).read() == (0.25, *values[1:])


def test_a_tower_in_memory_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thresholds.json").write_text("[0.5]")
    file = Path("open_clip model")
    entry = Entry(file, "class_embed", (48,), torch.float32)
    source = Source(Path("model"), "", TINY_CONFIG, {"vision.class_embed": entry})
    source.in_memory = {file: {}}
    assert OwnThresholds.of(source).read() is None


@pytest.mark.parametrize("to", ["llava_lite", "hf"])
def test_convert_keeps_them(folder: Path, to: str) -> None:
    """Of blocks that run: an hf folder may have no others."""
    content = {"thresholds": [0.25, 0.5, 0.75], "keep": 9}
    (folder / "thresholds.json").write_text(json.dumps(content))
    out = folder.parent / "out"
    convert(folder, out, to=to, dtype="float32")
    kept = json.loads((out / "thresholds.json").read_text())
    assert kept == {"thresholds": [0.25, 0.5], "keep": 9}
    assert llava_lite.load(out, device="cpu").thresholds == (0.25, 0.5)


def test_they_do_not_outlive_their_model(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    (folder / "thresholds.json").write_text("[0.25, 0.5]")
    save_model(random_llava(seed=1), TINY_CONFIG, folder, tiny_tokenizer, force=True)
    assert not (folder / "thresholds.json").exists()


# ---- finding -------------------------------------------------------------------------------------


@torch.no_grad()
def oracle(
    tower: VisionTower, images: Tensor, counts: Sequence[int], reference: bool = False
) -> list[float]:
    """The definition, row by row: images (B, 3, S, S) of one batch -> a threshold per block.

    What merges is chosen by rank, not by a threshold. `reference`: as it treats a batch of several
    images, unlike one: sizes are 1e-4 too large where they divide, and the tokens of an image that
    merges none of its own are put into a new order, too."""
    weights = tower.state_dict()
    tokens = [
        F.layer_norm(x, x.shape[-1:], *named(weights, "pre_norm")) for x in tower.embed(images)
    ]
    sizes: list[list[float] | None] = [None] * len(images)
    thresholds = []
    for index, (block, count) in enumerate(zip(tower.blocks, counts, strict=True)):
        part = {
            name.removeprefix(f"blocks.{index}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blocks.{index}.")
        }
        keys = []
        for image, x in enumerate(tokens):
            mixed, key = slow_attention(part, x, sizes[image], block.attn.num_heads)
            tokens[image] = x + mixed
            keys.append(key)
        rows = sorted(
            (row for image, key in enumerate(keys) for row in slow_rows(image, key)), reverse=True
        )
        num_merged = min(count * len(images), len(rows))
        thresholds.append(max(rows[num_merged][0], 0.0) if num_merged < len(rows) else 0.0)
        for image, x in enumerate(tokens):
            pairs = {a: b for _, i, a, b in rows[:num_merged] if i == image}
            if pairs or reference:
                size = sizes[image] or [1.0] * len(x)
                x, sizes[image] = slow_merge(x, size, pairs, 1e-4 if reference else 0.0)
            y = F.layer_norm(x, x.shape[-1:], *named(part, "norm2"))
            hidden = F.linear(y, *named(part, "mlp.fc1"))
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            tokens[image] = x + F.linear(hidden, *named(part, "mlp.fc2"))
    return thresholds


def slow_rows(image: int, key: Tensor) -> list[tuple[float, int, int, int]]:
    """(cosine, image, source, best destination) of every source but the class token."""
    unit = [row / row.norm() for row in key]
    return [
        max((float(unit[a] @ unit[b]), image, a, b) for b in range(1, len(unit), 2))
        for a in range(2, len(unit), 2)
    ]


def slow_merge(
    x: Tensor, size: list[float], pairs: dict[int, int], epsilon: float
) -> tuple[Tensor, list[float]]:
    """Sources that stay, then destinations, with what came to them."""
    evens = [a for a in range(0, len(x), 2) if a not in pairs]
    rows, sizes = [], []
    for place in [*evens, *range(1, len(x), 2)]:
        members = [place, *(a for a, b in pairs.items() if b == place)]
        sizes.append(sum(size[member] for member in members))
        total = sum((x[member] * size[member] for member in members), torch.zeros_like(x[0]))
        rows.append(total / (sizes[-1] + epsilon))
    return torch.stack(rows), sizes


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[VisionTower, list[Tensor], dict[str, Tensor]]:
    """The reference's small tower, its three batches, and what it found on them."""
    path = shared / "goldens" / "dymu"
    inputs = load_file(path / "b_vit_inputs.safetensors")
    prefix = "weights84."
    stored = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
    config = VisionConfig(
        image_size=84, hidden_size=32, intermediate_size=128, num_layers=5, num_heads=4,
        feature_layer=-1,
    )  # fmt: skip
    tower = VisionTower(config).double()
    tower.load_state_dict(renamed(stored))
    batches = [inputs[name].double() for name in ("image84.b4", "find.batch1", "find.batch2")]
    return tower, batches, load_file(path / "b_vit_outputs.safetensors")


def renamed(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names -> ours."""
    top = {"class_embedding": "class_embed", "positional_embedding": "pos_embed"}
    top |= {"conv1.weight": "patch_embed.weight"}
    top |= {f"ln_pre.{kind}": f"pre_norm.{kind}" for kind in ("weight", "bias")}
    state = {ours: stored[name] for name, ours in top.items()}
    words = {"ln_1": "norm1", "ln_2": "norm2", "c_fc": "fc1", "c_proj": "fc2", "out_proj": "o_proj"}
    for name, tensor in stored.items():
        if not name.startswith("transformer.resblocks."):
            continue
        name = name.replace("transformer.resblocks", "blocks")
        if ".in_proj_" in name:
            start, kind = name.split("in_proj_")
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{start}{letter}_proj.{kind}"] = rows
        else:
            state[".".join(words.get(word, word) for word in name.split("."))] = tensor
    return state


Golden = tuple[VisionTower, list[Tensor], dict[str, Tensor]]


def test_the_oracle_with_the_reference_s_defects_is_the_reference(golden: Golden) -> None:
    tower, batches, outputs = golden
    found = [oracle(tower, batch, [4] * 5, reference=True) for batch in batches]
    expected = outputs["find.per_batch_thresholds"]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-9
    )


def test_finding_is_the_oracle(golden: Golden) -> None:
    tower, batches, _ = golden
    for batch in batches:
        found = batch_thresholds(tower, batch.split(1), [4] * 5)
        assert found == pytest.approx(oracle(tower, batch, [4] * 5), rel=0, abs=1e-12)


def test_finding_is_the_reference_but_for_its_defects(golden: Golden) -> None:
    """The first block comes before any of them. Later the division costs up to 2e-5 (the oracle
    without the other defect differs no more), the order of tokens up to 1.5e-2: in another order
    other tokens are sources."""
    tower, batches, outputs = golden
    found = [batch_thresholds(tower, batch.split(1), [4] * 5) for batch in batches]
    expected = outputs["find.per_batch_thresholds"]
    difference = (torch.tensor(found, dtype=torch.float64) - expected).abs()
    assert difference[:, 0].max() <= 1e-12
    assert difference[0].max() <= 2e-4
    assert difference[:, 1].max() <= 1e-5
    assert 1e-3 < difference.max() <= 1.5e-2


def test_the_mean_over_batches(golden: Golden) -> None:
    """In the first block, where all agree, the running value of the reference is our mean."""
    _, _, outputs = golden
    found = finding_module.Finding((0.0,) * 5)
    for batch, running in zip(
        outputs["find.per_batch_thresholds"], outputs["find.running_thresholds"], strict=True
    ):
        found = found.add(batch.tolist(), 4, 0)
        assert found.thresholds == pytest.approx(running.tolist(), rel=0, abs=1e-12)


def small_tower(seed: int, num_layers: int = 3, image_size: int = 112) -> VisionTower:
    """A random tower in float64 all of whose blocks run: 64 patches."""
    vision = replace(TINY_VISION, image_size=image_size, num_layers=num_layers, feature_layer=-1)
    return random_llava(replace(TINY_CONFIG, vision=vision), seed, torch.float64).vision


@examples(25)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    counts=st.lists(st.integers(0, 8), min_size=3, max_size=3),
)
def test_a_batch_merges_what_was_asked_for(seed: int, batch: int, counts: list[int]) -> None:
    """Used on the images they were found on, the thresholds merge r * B tokens in every block,
    however these spread over the images; and finding equals the oracle."""
    tower = small_tower(seed)
    contrast = torch.linspace(0.2, 2, batch, dtype=torch.float64)[:, None, None, None]
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, 112, 112)
    images = contrast * torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        found = batch_thresholds(tower, images.split(1), counts)
        steps = DToMe(tuple(found)).steps(replace(TINY_VISION, feature_layer=-1))
        left = [tower(image, steps).tokens_per_block for image in images.split(1)]
    merged = -np.diff([[64, *tokens] for tokens in left], axis=1)
    assert merged.sum(axis=0).tolist() == [batch * count for count in counts]
    expected = oracle(tower, images, counts)
    for threshold, count, value in zip(found, counts, expected, strict=True):
        assert threshold == (pytest.approx(value, rel=0, abs=1e-9) if count else NEVER)


def test_images_share_a_batch_unevenly() -> None:
    """A plain image gives more than its share."""
    tower = small_tower(0)
    with torch.no_grad():
        tower.pos_embed.mul_(0.01)  # else the places of the plain image's patches tell them apart
    noise = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)).double()
    images = [1 + scale * noise for scale in (0.01, 3.0)]
    found = batch_thresholds(tower, images, [8] * 3)
    steps = DToMe(tuple(found)).steps(replace(TINY_VISION, feature_layer=-1))
    plain, busy = (tower(image, steps).tokens_per_block[-1] for image in images)
    assert plain + busy == 2 * (64 - 24)
    assert plain < busy


def test_more_is_asked_for_than_there_is() -> None:
    """All sources merge but the class token, and no number of batches makes it overdraw."""
    tower = small_tower(3)
    image = 0.01 * torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)).double()
    found = batch_thresholds(tower, [image], [100] * 3)
    assert found == [0.0] * 3
    steps = DToMe(tuple(found)).steps(replace(TINY_VISION, feature_layer=-1))
    assert tower(image, steps).tokens_per_block == (32, 16, 8)


def test_competing_threshold() -> None:
    scores = [torch.tensor([0.5, -0.5, 0.75]), torch.tensor([0.875, 0.25])]
    assert competing_threshold(scores, 1) == 0.5  # 0.875 and 0.75 merge
    assert competing_threshold(scores, 2) == 0.0  # the best that stays is -0.5
    assert competing_threshold(scores, 3) == 0.0  # 6 of 5
    assert competing_threshold([torch.tensor([0.25, 0.25, 0.25])], 1) == 0.25  # a tie: none merges
    assert competing_threshold([torch.empty(0)], 1) == 0.0


# ---- over images ---------------------------------------------------------------------------------


def noise(seed: int, side: int = 56) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, rng.integers(2, 256), (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_last_batch_counts_by_its_images(tiny_model: Model) -> None:
    images = [noise(seed) for seed in range(5)]
    merge = ToMe(keep=8)
    found = find_thresholds(tiny_model, images, merge, batch_size=3)
    first, last = (
        find_thresholds(tiny_model, part, merge, batch_size=3) for part in (images[:3], images[3:])
    )
    assert len(found) == 2  # one for every block that runs
    assert first != last
    mean = [(3 * a + 2 * b) / 5 for a, b in zip(first, last, strict=True)]
    assert found == pytest.approx(mean, rel=0, abs=1e-15)


def test_finding_takes_what_generate_takes(tiny_model: Model, tmp_path: Path) -> None:
    """With the model's own preparation: a wide image is padded or cropped as the model does it."""
    image = noise(1).resize((80, 40))
    image.save(tmp_path / "a.png")
    expected = find_thresholds(tiny_model, [image], ToMe(keep=8))
    assert find_thresholds(tiny_model, [tmp_path / "a.png"], ToMe(keep=8)) == expected
    assert find_thresholds(tiny_model, [np.asarray(image)], ToMe(keep=8)) == expected
    config = replace(TINY_CONFIG, pad=False)
    cropping = Model(tiny_model.llava, tiny_model.tokenizer, config)
    assert find_thresholds(cropping, [image], ToMe(keep=8)) != expected


def test_bad_images_are_left_out(tiny_model: Model) -> None:
    good = [noise(seed) for seed in range(3)]
    merge = ToMe(r=2)
    with pytest.warns(UserWarning, match="left out") as caught:
        found = find_thresholds(tiny_model, [good[0], b"nothing", *good[1:]], merge, batch_size=4)
    assert len(caught) == 1
    assert found == find_thresholds(tiny_model, good, merge, batch_size=3)
    with pytest.warns(UserWarning), pytest.raises(ImageError, match="none of 1 images"):
        find_thresholds(tiny_model, [b"nothing"], merge)
    with pytest.raises(ImageError, match="none of 0 images"):
        find_thresholds(tiny_model, [], merge)


def test_what_cannot_be_asked_for(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"keep 72 must be in 4\.\.16"):
        find_thresholds(tiny_model, [noise(0)])
    with pytest.raises(ValueError, match="batch_size 0"):
        find_thresholds(tiny_model, [noise(0)], ToMe(keep=8), batch_size=0)


# ---- llava-lite thresholds -----------------------------------------------------------------------

NUM_IMAGES = 27


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images, some in a subfolder, and things that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number in range(NUM_IMAGES):
        noise(number).save(folder / ("more" if number % 3 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image either")
    return folder


def options(images: Path, output: Path, *more: object) -> list[object]:
    return [images, "-o", output, "--keep", 8, "--batch-size", 2, *more]


def run(model: Model, images: Path, output: Path, *more: object) -> dict[str, Any]:
    assert command.run(parse(*options(images, output, *more)), model) == 0
    return json.loads(output.read_text())


def test_defaults() -> None:
    args = parse("photos", "-o", "t.json")
    assert command.merge_option(args) == ToMe(keep=72)
    assert args.batch_size == 8
    assert command.merge_option(parse("photos", "-o", "t.json", "--r", "21")) == ToMe(r=21)
    with pytest.raises(SystemExit):
        parse("photos", "-o", "t.json", "--r", "21", "--keep", "72")


def test_folder(
    tiny_model: Model, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(tiny_model, pictures, tmp_path / "t.json")
    assert content["images"], content["skipped"] == (NUM_IMAGES, 0)
    assert (content["model"], content["keep"], content["batch_size"]) == ("random", 8, 2)
    assert read_thresholds(tmp_path / "t.json") == tuple(content["thresholds"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.json"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{tmp_path / 't.json'}: 2 thresholds of {NUM_IMAGES} images\n"
    assert run(tiny_model, pictures, tmp_path / "again.json", "--quiet") == content
    assert capsys.readouterr().err == ""
    other = run(tiny_model, pictures, tmp_path / "other.json", "--seed", 1)
    assert other["thresholds"] != content["thresholds"]
    assert other["thresholds"] == pytest.approx(content["thresholds"], abs=0.05)


def test_run_is_find_thresholds(tiny_model: Model, pictures: Path, tmp_path: Path) -> None:
    images = [pictures / "0.png", pictures / "more" / "1.png"]
    (tmp_path / "list.json").write_text(json.dumps(list(map(str, images))))
    found = run(tiny_model, tmp_path / "list.json", tmp_path / "t.json")["thresholds"]
    assert tuple(found) == find_thresholds(tiny_model, images, ToMe(keep=8), batch_size=2)


def test_lists(tiny_model: Model, pictures: Path, tmp_path: Path) -> None:
    """Paths, or objects with an image: LLaVA's training data has some about text alone, and some
    images twice."""
    names = [name for name, _ in zip(batch_file.image_names(pictures), range(5), strict=False)]
    entries: list[Any] = [{"id": name, "image": name, "conversations": []} for name in names]
    entries += [{"id": "text", "conversations": []}, {"image": names[0]}, {"image": names[:2]}]
    lists = {"paths.json": json.dumps(names), "sft.json": json.dumps(entries)}
    lists["paths.jsonl"] = "\n".join(map(json.dumps, names)) + "\n\n"
    lists["sft.jsonl"] = "\n".join(map(json.dumps, entries))
    contents = []
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        more = ["--image-folder", pictures]
        contents.append(run(tiny_model, tmp_path / name, tmp_path / f"of_{name}", *more))
    assert contents[0]["images"] == 5
    assert all(content == contents[0] for content in contents)
    (pictures / "beside.json").write_text(json.dumps(names))
    beside = run(tiny_model, pictures / "beside.json", tmp_path / "beside.json")
    (pictures / "beside.json").unlink()
    assert beside == contents[0]


def test_limit(tiny_model: Model, pictures: Path, tmp_path: Path) -> None:
    assert run(tiny_model, pictures, tmp_path / "t.json", "--limit", 4)["images"] == 4
    with pytest.raises(ValueError, match="limit 0"):
        run(tiny_model, pictures, tmp_path / "u.json", "--limit", 0)


BAD_LISTS = {
    "a.json": ("{}", "holds a dict, not a list"),
    "b.json": ("[", "b.json: not valid JSON"),
    "c.json": ('["a.png", 3]', "entry 2: is neither a path"),
    "d.json": ('[{"image": 3}]', "entry 1: is neither a path"),
    "e.json": ('[""]', "entry 1: is neither a path"),
    "f.json": ("[]", "names no images"),
    "g.json": ('[{"text": "t"}]', "names no images"),
    "h.jsonl": ('"a.png"\n{"image":', "line 2: not valid JSON"),
    "i.jsonl": ("", "names no images"),
    "j.json": ("\xff", "not valid JSON"),
    "k.json": ("[null]", "entry 1: is neither a path"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists(tiny_model: Model, tmp_path: Path, name: str) -> None:
    text, reason = BAD_LISTS[name]
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(BatchError, match=reason) as caught:
        run(tiny_model, tmp_path / name, tmp_path / "out.json")
    assert name in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_bad_input_and_output(tiny_model: Model, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "t.json"
    for images, place, more, reason in [
        (tmp_path / "nowhere", output, [], "no such file or folder"),
        (tmp_path / "empty", output, [], "names no images"),
        (pictures, tmp_path / "no" / "t.json", [], "does not exist"),
        (pictures, tmp_path / "empty", [], "is a folder"),
        (pictures, output, ["--image-folder", tmp_path], "goes with a list"),
        (pictures, output, ["--resume", "--force"], "contradict"),
    ]:
        with pytest.raises(BatchError, match=reason):
            run(tiny_model, images, place, *more)
    with pytest.raises(ValueError, match=r"keep 17 must be in 4\.\.16"):
        run(tiny_model, pictures, output, "--keep", 17)
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]


def test_an_output_is_not_replaced_unless_asked(
    tiny_model: Model, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "t.json"
    output.write_text("[0.5]")
    for more in ([], ["--resume"]):
        with pytest.raises(BatchError, match="already exists"):
            run(tiny_model, pictures, output, *more)
    assert output.read_text() == "[0.5]"
    assert run(tiny_model, pictures, output, "--force")["images"] == NUM_IMAGES


def test_a_bad_image_costs_one_line(
    tiny_model: Model, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(pictures / name) for name in batch_file.image_names(pictures)[:6]]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    bad = [str(tmp_path / "broken.png"), str(tmp_path / "gone.png")]
    (tmp_path / "list.json").write_text(json.dumps(names[:3] + bad + names[3:]))
    content = run(tiny_model, tmp_path / "list.json", tmp_path / "t.json")
    assert (content["images"], content["skipped"]) == (6, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for name in bad:
        [line] = [line for line in lines if name in line]
        assert line.startswith("warning: ")
    assert lines[-1].endswith("2 thresholds of 6 images, 2 left out")
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ImageError, match="none of 2 images"):
        run(tiny_model, tmp_path / "bad.json", tmp_path / "u.json")
    assert not (tmp_path / "u.json").exists()


def failing(error: BaseException, batch: int) -> Callable[..., list[float]]:
    """`batch_thresholds` with an error in a certain batch, counted from 1."""
    calls = iter(range(1, 10**6))

    def fail(*args: Any) -> list[float]:
        if next(calls) == batch:
            raise error
        return batch_thresholds(*args)

    return fail


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 14])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_resume(
    tiny_model: Model,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: int,
    error: BaseException,
) -> None:
    """14 batches, cut off in one of them; nothing of those before is lost."""
    expected, output = tmp_path / "expected.json", tmp_path / "t.json"
    run(tiny_model, pictures, expected)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding_module, "batch_thresholds", failing(error, batch))
        with pytest.raises(type(error)):
            run(tiny_model, pictures, output)
    assert not output.exists()
    progress = tmp_path / "t.json.partial"
    said = capsys.readouterr().err
    assert ("--resume" in said) == (isinstance(error, KeyboardInterrupt) and batch > 1)
    assert progress.exists() == (batch > 1)
    if batch > 1:
        assert json.loads(progress.read_text())["images"] == 2 * (batch - 1)
        with pytest.raises(BatchError, match="a run was interrupted"):
            run(tiny_model, pictures, output)
    calls: list[int] = []

    def counting(*args: Any) -> list[float]:
        calls.append(1)
        return batch_thresholds(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding_module, "batch_thresholds", counting)
        run(tiny_model, pictures, output, "--resume")
    assert len(calls) == 14 - (batch - 1)
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected.json", "t.json"]


KILLED = """
import os, signal, sys
import llava_lite, torch
from llava_lite.cli.thresholds import run
from llava_lite.study import find_thresholds
from helpers.thresholds_command import parse
real, calls = find_thresholds.batch_thresholds, iter(range(1, 100))

def dying(*args):
    if next(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

find_thresholds.batch_thresholds = dying
torch.set_num_threads(1)  # rounding depends on the number of threads
run(parse(*sys.argv[2:]), llava_lite.load(sys.argv[1], device="cpu"))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_resume_after_kill(
    folder: Path, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed in the 12th of 14 batches; 11 were saved."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    output, expected = tmp_path / "t.json", tmp_path / "expected.json"
    ended = Fork(KILLED, folder, *options(pictures, output))
    assert ended.wait() == -signal.SIGKILL
    assert not output.exists()
    assert json.loads((tmp_path / "t.json.partial").read_text())["images"] == 22
    model = llava_lite.load(folder, device="cpu")
    run(model, pictures, expected)
    run(model, pictures, output, "--resume")
    assert output.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--batch-size", 4], "batch_size"),
        (["--keep", 9], "keep"),
        (["--seed", 2], "seed"),
        (["--limit", 20], "list_sha256"),
    ],
)
def test_resume_refuses_other_settings(
    tiny_model: Model,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[Any],
    name: str,
) -> None:
    output = tmp_path / "t.json"
    with monkeypatch.context() as patch:
        patch.setattr(finding_module, "batch_thresholds", failing(RuntimeError(), 3))
        with pytest.raises(RuntimeError):
            run(tiny_model, pictures, output)
    with pytest.raises(BatchError, match=f"another '{name}'"):
        run(tiny_model, pictures, output, "--resume", *more)
    progress = tmp_path / "t.json.partial"
    kept = progress.read_text()
    content = json.loads(kept)
    damaged = (
        {"sums": content["sums"][:-1]},
        {"sums": ["a"]},
        {"images": None},
        {"images": -1},
        {"skipped": "many"},
    )
    texts = [json.dumps({**content, **change}) for change in damaged]
    for text in ("{", "[]", "{}", *texts):
        progress.write_text(text)
        with pytest.raises((BatchError, CheckpointError), match="t.json.partial"):
            run(tiny_model, pictures, output, "--resume")
    progress.write_text(kept)
    assert run(tiny_model, pictures, output, "--force", *more)["thresholds"]
    assert not progress.exists()


def test_resume_without_anything_to_go_on_with(
    tiny_model: Model, pictures: Path, tmp_path: Path
) -> None:
    assert run(tiny_model, pictures, tmp_path / "t.json", "--resume")["images"] == NUM_IMAGES


def test_importing_it_imports_nothing_heavy() -> None:
    """The command line does, to show its help."""
    code = "import sys; import llava_lite.study.find_thresholds; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert not tops & {"torch", "numpy", "PIL", "safetensors", "tqdm"}


# ---- the embedded model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Model:
    return llava_lite.load(llava_lite.embedded_model(), device="cpu")


def num_tokens(model: Model, scene: Scene) -> int:
    image = draw_scene(scene)
    return len(model.encode(image, "dymu-72").image_embeds)


def test_the_embedded_model_s_thresholds_keep_about_72(embedded: Model) -> None:
    """On average: what an image shows decides how many, and more objects are more tokens."""
    scenes = [sample_scene(np.random.default_rng([50_000, index])) for index in range(40)]
    counts = [num_tokens(embedded, scene) for scene in scenes]
    assert abs(np.mean(counts) - 72) <= 6  # 72.9; its standard error is 1.2
    assert max(counts) >= 1.5 * min(counts)  # 59 to 95
    objects = [len(scene.objects) for scene in scenes]
    assert np.corrcoef(counts, objects)[0, 1] > 0.4  # 0.65


def test_a_plain_scene_has_fewer_tokens_than_a_busy_one(embedded: Model) -> None:
    for index in range(4):
        busy = sample_scene(np.random.default_rng([51_000, index]), 6, (500, 500))
        plain = replace(busy, objects=())
        assert num_tokens(embedded, plain) < num_tokens(embedded, busy)


def test_thresholds_are_those_of_the_folder_when_it_was_loaded(folder: Path) -> None:
    """Another file, or none, does not change a model that is loaded."""
    file = folder / "thresholds.json"
    file.write_text(json.dumps([0.5] * 2))
    model = llava_lite.load(folder, device="cpu")
    file.unlink()
    assert list(model.thresholds or ()) == [0.5] * 2
