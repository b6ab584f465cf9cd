"""What the training of the embedded model rests on: labels, and packed question blocks that mean
the same to the decoder as one question alone; and all of its stages, in miniature."""

import json
import math
import sys
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import llava_lite
import train_tiny
from helpers.models import TINY_TEXT, TINY_VISION, random_llava
from llava_lite.checkpoints.checkpoint import load_model
from llava_lite.config import TINY, LlavaConfig
from llava_lite.evaluation.scenes.world import (
    COLORS,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    draw_instances,
    draw_scene,
)
from llava_lite.generation.model import Model
from llava_lite.inputs.pixels import preprocess
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.vision import VisionTower
from training.labels import (
    IGNORE,
    label_patches,
    label_scenes,
    mosaic_batch,
    to_pixel_values,
    whole_batch,
)
from training.questions import Writer, answer_loss, pack
from training.readers import PatchHeads, patch_loss, place_loss
from training.scenes import (
    SCENES_OF_A_STEP,
    TRAIN_SEED,
    SceneSet,
    difficulty,
    fresh_batches,
    make_scene,
    render,
    scene_tasks,
)
from training.seeing import FEW_PATCHES, choose_patches, few_patches, see, see_patches
from training.start import carry_places, fit_heads, start_local
from training.trainer import Trainer, initialize
from training.work import ORDER, find_conflict

# As the embedded model, but narrow and of few layers: its stages take seconds.
MINIATURE = replace(
    TINY,
    vision=replace(TINY_VISION, image_size=TINY.vision.image_size, num_layers=5),
    text=replace(TINY.text, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4),
)

Turns = tuple[tuple[str, str], ...]

# Lengths of answers differ, and with them the weights in the loss; one block has three turns.
BLOCKS: list[list[Turns]] = [
    [
        (("Describe the image.", "A red circle, a blue star and a green ring on white."),),
        (("What color is the star?", "blue"),),
        (("Is it red?", "no"), ("What color is it?", "blue"), ("Shape?", "star")),
    ],
    [(("How many squares?", "two"),), (("What color is the ring?", "orange and purple"),)],
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    """A small random model for images of the embedded model's size."""
    config = LlavaConfig(
        vision=replace(TINY_VISION, image_size=336, num_layers=2),
        text=replace(TINY_TEXT, num_layers=2, max_positions=1024, vocab_size=310),
        name="random",
        template=TINY.template,
    )
    return Model(random_llava(config), tiny_tokenizer)


def pictures() -> list[torch.Tensor]:
    rng = np.random.default_rng(3)
    return [torch.from_numpy(rng.integers(0, 256, (3, 50, 70), np.uint8)) for _ in BLOCKS]


def expected_logprobs(model: Model, image: torch.Tensor, turns: Turns) -> list[list[float]]:
    """Per turn, those of its answer and of the end token after it, from `score`."""
    prompts, history = [], ""
    for question, answer in turns:
        prompts.append(history + question)
        history += f"{question} ASSISTANT: {answer}</s>USER: "
    continuations = [f"{answer}</s>" for _, answer in turns]
    scores = model.score([image] * len(turns), prompts, continuations)
    return [list(score.token_logprobs) for score in scores]


@pytest.mark.slow
def test_packed_blocks_have_the_logprobs_of_single_questions(model: Model) -> None:
    writer = Writer(model.tokenizer)
    packed = pack(writer, BLOCKS, [np.arange(576)] * len(BLOCKS), "cpu")
    packed.masks = [mask.float() for mask in packed.masks]  # to compare in float32
    embeds = torch.cat([model.encode(image).image_embeds for image in pictures()])
    expected = [
        logprobs
        for image, blocks in zip(pictures(), BLOCKS, strict=True)
        for turns in blocks
        for logprobs in expected_logprobs(model, image, turns)
    ]
    everything = packed.targets
    rows = [row for row, target in enumerate(everything) if target != IGNORE]
    assert len(rows) == sum(map(len, expected))
    flat = [logprob for logprobs in expected for logprob in logprobs]
    with torch.inference_mode():
        for row, logprob in zip(rows, flat, strict=True):  # one token at a time
            packed.targets = [IGNORE] * len(everything)
            packed.targets[row] = everything[row]
            loss, _, seen = answer_loss(model.llava.decoder, packed, embeds, "cpu")
            assert seen.tolist() == [row]
            assert -loss.item() == pytest.approx(logprob, abs=1e-3)


def test_loss_weighs_long_answers_less(model: Model) -> None:
    writer = Writer(model.tokenizer)
    packed = pack(writer, BLOCKS[:1], [np.arange(576)], "cpu")
    packed.masks = [mask.float() for mask in packed.masks]
    image = pictures()[0]
    with torch.inference_mode():
        embeds = model.encode(image).image_embeds
        loss, right, _ = answer_loss(model.llava.decoder, packed, embeds, "cpu")
    answers = [each for turns in BLOCKS[0] for each in expected_logprobs(model, image, turns)]
    weights = [max(3, len(answer)) ** -0.5 for answer in answers]
    total = sum(weight * -sum(answer) for weight, answer in zip(weights, answers, strict=True))
    count = sum(weight * len(answer) for weight, answer in zip(weights, answers, strict=True))
    assert loss.item() == pytest.approx(total / count, abs=1e-3)
    assert len(right) == sum(map(len, answers))


def test_left_out_patches_leave_the_positions_of_the_rest(model: Model) -> None:
    writer = Writer(model.tokenizer)
    kept, head = np.array([0, 5, 575]), len(writer.head)
    packed = pack(writer, [BLOCKS[0][:2]], [kept], "cpu")
    block_ids = [writer.block(turns)[0] for turns in BLOCKS[0][:2]]
    positions = [*range(head), head, head + 5, head + 575]
    for ids in block_ids:
        positions += range(head + 576, head + 576 + len(ids))
    assert packed.position_ids == positions
    assert packed.lengths == [head + 3 + sum(map(len, block_ids))]
    [mask] = packed.masks
    first, second = head + 3, head + 3 + len(block_ids[0])
    assert (mask[second, first:second] < 0).all()
    assert (mask[second:, :first] == 0).all()


def test_pixels_are_those_of_the_model() -> None:
    for index in range(2):
        drawn = draw_scene(make_scene(5, index), supersample=1 + index % 3)
        rendered = np.array(render((5, index)))
        pixels = to_pixel_values(rendered[None])
        assert torch.equal(pixels, preprocess(drawn, 336))


def test_patch_labels_of_a_known_scene() -> None:
    """A landscape of half the model's size: 42 pixels of padding above, everything twice as
    large."""
    red, blue = COLORS["red"], COLORS["blue"]
    circle = SceneObject("circle", "red", red, 41.0, 20.0, 14.0, 0.0, digit=7)
    star = SceneObject("star", "blue", blue, 126.0, 62.0, 20.0, 0.0)
    scene = Scene(168, 84, (200, 200, 200), (circle, star))
    labels = label_patches(scene, draw_instances(scene, 336), (0, 0))
    # The circle's center is at (82, 124) of the model's image, the star's at (252, 208).
    on_circle, on_star = 124 // 14 * 24 + 82 // 14, 208 // 14 * 24 + 252 // 14
    assert np.flatnonzero(labels["center"]).tolist() == [on_circle, on_star]
    names = list(COLORS)
    assert labels["color"][on_circle] == 1 + names.index("red")
    assert labels["color"][on_star] == 1 + names.index("blue")
    assert labels["shape"][on_circle] == SHAPES.index("circle")
    assert labels["shape"][on_star] == SHAPES.index("star")
    assert labels["digit"][on_circle] == 1 + 7
    assert labels["digit"][on_star] == IGNORE  # stars never carry one
    places = [PLACES[labels["third"][patch]] for patch in (on_circle, on_star)]
    assert places == ["top left", "bottom right"]  # of the image, not of the padded square
    middle = np.array([82 // 14 + 0.5, 124 // 14 + 0.5])
    offset = np.array([82, 124]) / 14 - middle
    np.testing.assert_allclose(labels["offset"][on_circle], offset, atol=1e-6)
    np.testing.assert_allclose(labels["offset"][on_circle - 1], offset + (1, 0), atol=1e-6)
    corners = [0, 23, 24 * 23, 575]
    assert labels["color"][corners].tolist() == [0] * 4
    assert labels["shape"][corners].tolist() == [IGNORE] * 4
    area = np.pi * 28**2 / 14**2  # of the circle, in patches; its edge touches some more
    assert area < (labels["color"] == 1 + names.index("red")).sum() < 2 * area


def test_half_an_object_has_no_shape() -> None:
    """In a crop that cuts an object's center off, only its color is asked for."""
    circle = SceneObject("circle", "red", COLORS["red"], 168.0, 168.0, 60.0, 0.0)
    scene = Scene(336, 336, (200, 200, 200), (circle,))
    window = draw_instances(scene, 336)[112:224, 180:292]
    labels = label_patches(scene, window, (180, 112))
    assert set(labels["color"].tolist()) == {0, 1 + list(COLORS).index("red")}
    assert set(labels["shape"].tolist()) == {IGNORE}
    assert not labels["center"].any()
    assert set(labels["third"].tolist()) == {IGNORE}


def test_place_loss_is_zero_where_every_patch_knows_its_place() -> None:
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    places = torch.stack((rows, columns), -1).flatten(0, 1) / 11.5 - 1
    circle = SceneObject("circle", "red", COLORS["red"], 100.0, 60.0, 30.0, 0.0)
    scene = Scene(336, 336, (200, 200, 200), (circle,))
    labels = label_scenes([scene])
    on_object = labels.color > 0
    assert place_loss(places[None], labels).item() < 1e-6
    assert place_loss(places.flip(-1)[None], labels).item() > 0.3
    lost = torch.where(on_object[0, :, None], torch.zeros(2), places)
    assert place_loss(lost[None], labels).item() > 0.3


def random_tower() -> Any:
    torch.manual_seed(0)
    tower = VisionTower(TINY.vision)
    initialize(tower, TINY.vision.num_blocks)
    start_local(tower)
    return tower


def scenes_in(folder: Path, count: int) -> Any:
    images = [render((1, index)) for index in range(count)]
    np.save(folder / f"scenes_1_{count}.npy", np.stack(images))
    return SceneSet(folder, 1, count)


@torch.no_grad()
def test_few_patches_are_seen_as_in_the_whole_image() -> None:
    """Where all that is left out looks like what stands for it, nothing changes."""
    circle = SceneObject("circle", "red", COLORS["red"], 100.0, 60.0, 30.0, 0.0)
    star = SceneObject("star", "blue", COLORS["blue"], 250.0, 200.0, 45.0, 0.4)
    scene = Scene(336, 336, (200, 200, 200), (circle, star))
    image = np.array(draw_scene(scene, supersample=1))[None]
    pixels = to_pixel_values(image)
    patches, size = few_patches(label_scenes([scene]), np.random.default_rng(0))
    tower = random_tower()
    everything = tower(pixels).image_features
    for size_of_all in (torch.ones(1, 576), None):
        seen = see_patches(tower, pixels, torch.arange(576)[None], size_of_all)
        torch.testing.assert_close(seen, everything, atol=1e-4, rtol=1e-4)

    tower.pos_embed.zero_()  # one background patch is like another now
    everything = tower(pixels).image_features[:, patches[0]]
    seen = see_patches(tower, pixels, patches, size)
    torch.testing.assert_close(seen, everything, atol=1e-4, rtol=1e-4)
    unweighted = see_patches(tower, pixels, patches, torch.ones_like(size))
    assert (unweighted - everything).abs().max() > 0.01  # the test would see it


def test_only_the_end_of_a_stage_sees_all_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [make_scene(5, index) for index in range(2)]
    labels = label_scenes(scenes)
    patches, size = choose_patches(labels, 0.84, np.random.default_rng(0))
    assert patches.shape == size.shape == (2, FEW_PATCHES)
    everything, size = choose_patches(labels, 0.85, np.random.default_rng(0))
    assert size is None and everything.tolist() == [list(range(576))] * 2

    for background in (0, 576):
        monkeypatch.setattr(train_tiny, "JOINT_PATCHES", (background,))
        shown = train_tiny.show_patches(scenes, patches.numpy(), np.random.default_rng(0))
        for scene, seen, some in zip(scenes, patches.numpy(), shown, strict=True):
            cells = draw_instances(scene, 336).reshape(24, 14, 24, 14).any(axis=(1, 3))
            cells[12], cells[:, 12] = True, True  # where the padding begins
            expected = set(np.flatnonzero(cells)) if background == 0 else set(range(576))
            assert set(seen[some]) == expected & set(seen)


def test_labels_of_some_patches() -> None:
    labels = label_scenes([make_scene(5, index) for index in range(2)])
    assert labels.whole
    some = labels.at(torch.tensor([[3, 200], [0, 575]]))
    assert some.whole
    for name, value in vars(labels).items():
        expected = torch.stack([value[0, [3, 200]], value[1, [0, 575]]])
        torch.testing.assert_close(getattr(some, name), expected, equal_nan=True)


def test_few_patches_hold_the_objects_and_stand_for_all() -> None:
    few = FEW_PATCHES
    area = torch.zeros(3, 576)
    area[0, [24 * 5 + 5, 24 * 5 + 6]] = 2
    area[1, : 24 * 7] = 24 * 7  # with the row below more than there is room for
    area[2, :500] = 500
    labels = SimpleNamespace(area=area)
    patches, size = few_patches(labels, np.random.default_rng(0))
    assert patches.shape == size.shape == (3, few)
    assert (patches.diff(dim=1) > 0).all()
    ring = {24 * row + column for row in (4, 5, 6) for column in (4, 5, 6, 7)}
    assert set(patches[0][size[0] == 1].tolist()) == ring
    assert patches[1][: 24 * 7].tolist() == list(range(24 * 7))  # objects go before the ring
    for row, objects, around in ((1, 24 * 7, 24 * 8), (2, 500, 525)):
        far = patches[row] >= around
        assert far.sum() == few - max(few - 32, 0) == 32
        assert size[row][far].unique().tolist() == [pytest.approx((576 - around) / 32)]
        near = size[row][patches[row] < objects].unique().tolist()
        assert near == [pytest.approx(max(1, objects / (few - 32)))]
    # What has no room at all is stood for by nothing: the ring of the fullest image.
    assert size.sum(1).tolist() == [pytest.approx(total) for total in (576, 576, 551)]
    other = few_patches(labels, np.random.default_rng(1))[0]
    assert not torch.equal(other[0], patches[0])


def test_fresh_readers_learn_from_a_tower_that_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = scenes_in(tmp_path, 4)
    tower, heads = random_tower(), PatchHeads(192)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    features = see(tower, scenes.pixels, "cpu").float()
    labels = whole_batch(scenes, range(4))[1]
    with torch.no_grad():
        untrained = patch_loss(heads(features), labels)
    monkeypatch.setattr("training.start.HEAD_STEPS", 40)
    fit_heads(tower, heads, scenes)
    with torch.no_grad():
        assert patch_loss(heads(features), labels) < 0.7 * untrained
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_carriers_tell_every_patch_where_it_is() -> None:
    """Through all blocks, whatever the image shows."""
    tower, heads = random_tower(), PatchHeads(192)
    images = np.stack([render((7, index)) for index in range(8)])
    scenes = SimpleNamespace(pixels=images)
    carry_places(tower, heads, scenes)
    pixels = to_pixel_values(images)
    with torch.inference_mode():
        entered = tower.pre_norm(tower.embed(pixels))[:, 1:]
        features = tower(pixels).image_features
    silent = [tower.blocks[-1].mlp.fc2.weight[channel].eq(0).all() for channel in range(192)]
    carriers = torch.stack(silent).nonzero()[:, 0]
    assert len(carriers) == 4
    torch.testing.assert_close(features[..., carriers], entered[..., carriers])
    lengths = features[..., carriers].reshape(-1, 4)
    sines = torch.linspace(-math.pi / 4, math.pi / 4, 24).sin()
    for wanted in (sines.repeat(24), sines.repeat_interleave(24)):  # columns, rows
        pairs = [torch.stack((wanted.repeat(8), lengths[:, k])) for k in range(4)]
        assert max(abs(torch.corrcoef(pair)[0, 1].item()) for pair in pairs) > 0.99


@torch.no_grad()
def test_crops_have_no_place_in_an_image_to_learn(tmp_path: Path) -> None:
    """Neither a third nor a spot nor an extent is theirs, also where nine tile an image: what
    the readers say of these changes no loss."""
    scenes = scenes_in(tmp_path, 6)
    mosaic = mosaic_batch(scenes, np.random.default_rng(0), 2)[1]
    whole = whole_batch(scenes, [0, 1])[1]
    torch.manual_seed(0)
    read = PatchHeads(8)(torch.randn(2, 576, 8))
    for name in ("third", "spot", "extent"):
        other = {**read, name: read[name] + torch.randn_like(read[name])}
        losses = [patch_loss(one, mosaic) for one in (read, other)]
        assert losses[0].isfinite() and losses[0] == losses[1]
        assert patch_loss(read, whole) != patch_loss(other, whole)
    for name in ("color", "shape", "digit", "place", "share", "offset", "center"):
        other = {**read, name: read[name] + torch.randn_like(read[name])}
        assert patch_loss(read, mosaic) != patch_loss(other, mosaic)


def test_a_stage_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Ten steps at once, and four, a new process' worth of objects, and the other six."""

    def trainer(name: str) -> Any:
        torch.manual_seed(0)
        return Trainer(name, tmp_path, {"m": torch.nn.Linear(3, 2)}, {"m": 0.1}, 10)

    def train(one: Any, until: int) -> Any:
        for step in one.run():
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            one.update(one.modules["m"](x).square().sum())
            if one.step == until:
                break
        return one

    whole = train(trainer("whole"), 10)
    train(trainer("parts"), 4).save()
    parts = train(trainer("parts"), 10)
    assert whole.step == parts.step == 10
    for one, other in zip(
        whole.modules["m"].parameters(), parts.modules["m"].parameters(), strict=True
    ):
        assert torch.equal(one, other)
    kept = parts.state_path.stat().st_mtime_ns
    trainer("parts")
    assert parts.state_path.stat().st_mtime_ns == kept
    for steps in (3, 20):  # fewer than it has had: it ends there
        Trainer("parts", tmp_path, {"m": torch.nn.Linear(3, 2)}, {"m": 0.1}, steps)
        saved = torch.load(parts.state_path, weights_only=True)
        assert (saved["step"], saved["steps"]) == (4, 3)
    lower = Trainer("parts", tmp_path, {"m": torch.nn.Linear(3, 2)}, {"m": 0.01}, 20)
    train(lower, 11)  # what it is told now counts
    assert lower.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.51)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--start-from weights", "--start-from goes with --stage tower, decoder, joint or export"),
        ("--stage crops --start-from weights", "goes with --stage tower"),
        ("--average-with weights", "--average-with goes with --stage export"),
        ("--scene-seed 0", "--scene-seed must be 3 or more"),
        ("--scene-seed 2", "--scene-seed must be 3 or more"),
        ("--scene-seed -1", "--scene-seed must be 3 or more"),
        ("--stage joint --start-from /nowhere", "/nowhere is no model folder"),
        ("--stage export --average-with /", "/ is no model folder: it has no config.json"),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--work", str(work), *flags.split()])
    with pytest.raises(SystemExit):
        train_tiny.main()
    assert message in capsys.readouterr().err and not work.exists()


def run_train_tiny(monkeypatch: pytest.MonkeyPatch, work: Path, flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--work", str(work), *flags.split()])
    train_tiny.main()


def test_a_work_folder_holds_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a stage would train on another one's tower, or on one that was cut off, or what the
    later ones never hear of."""
    ran: list[str] = []
    out: list[Path] = []

    def stage(name: str, args: Any) -> None:
        ran.append(name)
        out.append(args.out)

    for name in train_tiny.STAGES:
        monkeypatch.setitem(train_tiny.STAGES, name, partial(stage, name))
    assert list(train_tiny.STAGES) == list(ORDER)
    work, given, other = (tmp_path / name for name in ("work", "given", "other"))
    for folder in (given, other):
        folder.mkdir()
        (folder / "config.json").touch()
    (given / "model.safetensors").write_bytes(b"some weights")

    def run(flags: str) -> str:
        """The error, or nothing where the stages may run."""
        ran.clear()
        try:
            run_train_tiny(monkeypatch, work, flags)
        except SystemExit:
            assert not ran
            return capsys.readouterr().err
        assert ran == ([flags.split()[1]] if "--stage" in flags else list(ORDER))
        return ""

    def save(stage: str, step: int, steps: int) -> None:
        torch.save({"step": step, "steps": steps}, work / f"{stage}.state.pt")

    # Where weights are given.
    assert not run("--stage joint")
    assert not run(f"--stage joint --start-from {given}")  # as long as there is no state yet
    save("joint", 3, 5)
    assert not run(f"--stage joint --start-from {given}")
    assert not run(f"--stage export --start-from {given} --scene-seed 9")
    assert f"started from {given}, not from nothing" in run("--stage export")
    assert f"started from {given}, not from {other}" in run(f"--stage joint --start-from {other}")
    assert "of --scene-seed 3, not 4" in run(f"--stage joint --start-from {given} --scene-seed 4")
    (given / "model.safetensors").write_bytes(b"other weights")
    assert f"not from {given} as it is" in run(f"--stage joint --start-from {given}")
    given = given.rename(tmp_path / "moved")
    (given / "model.safetensors").write_bytes(b"some weights")
    assert not run(f"--stage joint --start-from {given}")
    for name in ("tower", "decoder"):
        assert f"at joint, past {name}" in run(f"--stage {name} --start-from {given}")

    # From nothing.
    work = tmp_path / "again"
    assert not run("")
    assert set(out) == {tmp_path / "work" / "model", work / "model"}
    save("crops", 4000, 4000)
    save("tower", 300, 500)
    assert not run("--tower-steps 500")  # goes on in the middle
    assert "it there by --stage tower --tower-steps 300" in run("--stage decoder")
    save("tower", 500, 500)
    save("decoder", 2, 9)
    for flags in ("", "--stage tower"):
        assert "past tower with its 500 steps; go on with --tower-steps 500" in run(flags)
    for flags in ("--tower-steps 500", "--stage decoder", "--stage export"):
        assert not run(flags)
    assert "--decoder-steps 2" in run("--stage joint")


@pytest.mark.parametrize(
    ("stage", "there", "missing"),
    [
        ("tower", "", "crops"),
        ("decoder", "", "tower"),
        ("joint", "", "tower"),
        ("joint", "tower", "decoder"),
    ],
)
def test_what_a_stage_needs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, there: str, missing: str
) -> None:
    """And nothing is drawn before, nor is the folder taken for another training."""
    if there:
        modules = {"tower": VisionTower(TINY.vision), "heads": PatchHeads(192)}
        state = {name: module.state_dict() for name, module in modules.items()}
        torch.save({**state, "step": 1, "steps": 1}, tmp_path / f"{there}.state.pt")
    with pytest.raises(SystemExit, match=rf"no .*{missing}.state.pt: run --stage {missing} first"):
        run_train_tiny(monkeypatch, tmp_path, f"--stage {stage}")
    assert not list(tmp_path.glob("scenes_*"))
    if not there:
        args = SimpleNamespace(work=tmp_path, start_from=llava_lite.embedded_model(), scene_seed=9)
        assert find_conflict(args, [stage]) is None


def test_weights_that_cannot_be_read_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^train_tiny.py: error: .*: holds no weights"):
        run_train_tiny(monkeypatch, tmp_path / "work", f"--stage decoder --start-from {tmp_path}")


def test_help_says_defaults_where_there_are_some() -> None:
    text = train_tiny.build_parser().format_help()
    assert "default: 15000" in text and "None" not in text


def test_nothing_to_export_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="nothing to export: no decoder.state.pt"):
        run_train_tiny(monkeypatch, tmp_path / "new", "--stage export")
    assert not list(tmp_path.iterdir())


def test_the_decoder_never_sees_a_scene_twice() -> None:
    """Nor one that the tower was trained on; at first only those of few objects. Where a run goes
    on, it gets what it would have got."""
    args = SimpleNamespace(scene_seed=3, drawers=0)
    batches = list(fresh_batches(args, range(8), 4, late=False))
    assert len(batches) == 8
    scenes = [scene for drawn, _ in batches for scene in drawn]
    assert len({repr(scene) for scene in scenes}) == len(scenes) == 32
    trained_on = {repr(make_scene(TRAIN_SEED, n)) for n in range(50)}
    assert not trained_on & {repr(scene) for scene in scenes}
    for step, (drawn, pixels) in enumerate(batches):
        most = 2 + int(step / 8 / 0.075)
        assert max(len(scene.objects) for scene in drawn) <= most
        assert pixels.shape == (4, 336, 336, 3)
    tasks = scene_tasks(3, 7, 4, 6, late=False)
    for task, scene, image in zip(tasks, *batches[7], strict=True):
        assert scene == make_scene(*task)
        np.testing.assert_array_equal(image, render(task))
    [(_, last)] = fresh_batches(args, range(7, 8), 4, late=False)
    np.testing.assert_array_equal(last, batches[7][1])
    [(drawn, _), *_] = fresh_batches(args, range(8), 4, late=True)
    assert max(len(scene.objects) for scene in drawn) > 2


def test_difficulty_counts_objects_and_hard_ones_thrice() -> None:
    """With a digit, small in the model's 336 pixels, or close to a border between thirds."""
    plain = SceneObject("circle", "red", (220, 40, 40), 100, 100, 40, 0.0)
    digit, small = replace(plain, digit=7), replace(plain, radius=20)
    for objects, expected in (
        ((), 0),
        ((plain,), 1),
        ((plain, plain, digit), 5),
        ((plain, small), 4),
        ((replace(small, digit=7),), 3),
        ((replace(plain, x=800 / 3 + 15),), 3),
        ((replace(plain, y=2 * 500 / 3 - 9),), 3),
        ((replace(plain, x=800 / 3 + 17, y=2 * 500 / 3 - 11),), 1),
    ):
        scene = Scene(800, 500, (90, 90, 90), objects)
        assert difficulty(scene) == expected
    assert difficulty(Scene(336, 336, (90, 90, 90), (small,))) == 1


def test_late_scenes_come_as_often_as_they_are_difficult() -> None:
    """From 12 on all of them, below in proportion, whatever the step."""
    tried: list[int] = []
    kept: set[tuple[int, int]] = set()
    for step in range(60):
        late = scene_tasks(5, step, 24, 6, True)
        assert late[0][1] >= step * SCENES_OF_A_STEP
        assert len(set(late)) == 24 and late == sorted(late)
        tried += range(step * SCENES_OF_A_STEP, late[-1][1] + 1)
        kept |= set(late)
    difficulties = {index: difficulty(make_scene(5, index)) for index in tried}
    for low, high in ((1, 4), (4, 8), (8, 12), (12, 99)):
        some = [index for index in tried if low <= difficulties[index] < high]
        expected = np.mean([min(difficulties[index] / 12, 1) for index in some])
        share = np.mean([(5, index) in kept for index in some])
        assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(some))


def test_a_tower_sees_scenes_as_often_as_they_are_difficult(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [make_scene(1, index) for index in range(30)]
    seen = np.zeros(30)

    class Seen(Exception):
        pass

    def whole_batch(_: Any, indices: Any) -> Any:
        np.add.at(seen, indices, 1)
        raise Seen

    def fit_tower(name: str, tower: Any, heads: Any, batch: Any, *rest: Any) -> None:
        for seed in range(500):
            with suppress(Seen):
                batch(np.random.default_rng(seed), 0.0)

    class Scenes(list[Any]):
        scenes = property(lambda self: self)

    monkeypatch.setattr(train_tiny, "SceneSet", lambda *_: Scenes(scenes))
    monkeypatch.setattr(train_tiny, "trained_tower", lambda *_: (lambda x: Mock(), None))
    monkeypatch.setattr(train_tiny, "mosaic_batch", lambda *_: (Mock(), None))
    monkeypatch.setattr(train_tiny, "whole_batch", whole_batch)
    monkeypatch.setattr(train_tiny, "fit_tower", fit_tower)
    (tmp_path / "tower.state.pt").touch()
    amounts = {"scenes": 30, "tower_steps": 1, "tower_rate": 1.0}
    args = SimpleNamespace(work=tmp_path, start_from=None, device="cpu", **amounts)
    train_tiny.train_tower(args)
    difficulties = np.array([difficulty(scene) for scene in scenes])
    assert seen.sum() > 5000 and difficulties.max() >= 4 * difficulties.min()
    np.testing.assert_allclose(seen / seen.sum(), difficulties / difficulties.sum(), atol=0.01)


def test_export_averages_with_given_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder's state has no tower: that is the tower stage's, or the one it started from."""
    given = llava_lite.embedded_model()
    model, mine = load_model(given, dtype="float32"), load_model(given, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    heads = PatchHeads(TINY.vision.hidden_size).state_dict()
    tower = {"tower": mine.vision.state_dict(), "heads": heads, "step": 1}
    rest = {
        "projector": mine.projector.state_dict(),
        "decoder": mine.decoder.state_dict(),
        "step": 7,
    }
    torch.save(rest, tmp_path / "decoder.state.pt")
    folders = {"work": tmp_path, "out": tmp_path / "out", "start_from": given}
    args = SimpleNamespace(**folders, average_with=[given], device="cpu")
    for has_tower in (False, True):
        if has_tower:
            torch.save(tower, tmp_path / "tower.state.pt")
        train_tiny.export(args)
        written = llava_lite.load(tmp_path / "out", dtype="float32").llava.state_dict()
        for name, value in model.state_dict().items():
            other = mine.state_dict()[name]
            if name.startswith("vision.") and not has_tower:
                other = value
            assert torch.equal(written[name], ((value + other) / 2).bfloat16().float()), name
    capsys.readouterr()
    args.average_with = [given, given]
    train_tiny.export(args)
    said = f"decoder of {tmp_path} at step 7, averaged with 2 others -> {tmp_path / 'out'}"
    assert capsys.readouterr().out.strip() == said
    written = llava_lite.load(tmp_path / "out", dtype="float32").llava.state_dict()
    for name, value in model.state_dict().items():
        expected = (2 * value + mine.state_dict()[name]) / 3
        torch.testing.assert_close(written[name], expected, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_all_stages_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to a folder that loads and answers; run again, it has nothing left to do."""
    monkeypatch.setattr(train_tiny, "TINY", MINIATURE)
    monkeypatch.setattr(train_tiny, "HELD_OUT_SCENES", 2)
    monkeypatch.setattr(train_tiny, "TOKENIZER_SCENES", 50)
    for module in ("train_tiny", "training.seeing"):  # both ways to see are taken
        monkeypatch.setattr(f"{module}.FEW_PATCHES_UNTIL", 0.5)
    asked: list[range] = []

    def spy(args: Any, steps: range, batch: int, late: bool) -> Any:
        asked.append(steps)
        return fresh_batches(args, steps, batch, late)

    monkeypatch.setattr(train_tiny, "fresh_batches", spy)
    for seed, count in ((1, 12), (2, 2)):
        images = np.stack([render((seed, index)) for index in range(count)])
        np.save(tmp_path / f"scenes_{seed}_{count}.npy", images)
    amounts = (
        "crop-steps 1 tower-steps 2 decoder-steps 1 joint-steps 2 decoder-batch 1 joint-batch 2"
    )
    pairs = zip(amounts.split()[::2], amounts.split()[1::2], strict=True)
    flags = [text for name, value in pairs for text in (f"--{name}", value)]
    flags += "--scenes 12 --drawers 0 --questions 2 --joint-questions 2".split()
    command = ["train_tiny.py", "--work", str(tmp_path), "--out", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    train_tiny.main()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["crops", "tower", "decoder", "joint"]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "whole_third" in lines[1] and "crop_third" not in lines[1]
    model = llava_lite.load(tmp_path / "out")
    answer = model.generate(draw_scene(make_scene(2, 0)), "Hello?", max_new_tokens=2)
    assert answer.usage["image_tokens"] == 576
    state = (tmp_path / "joint.state.pt").stat().st_mtime_ns
    train_tiny.main()
    assert (tmp_path / "joint.state.pt").stat().st_mtime_ns == state
    steps = [line["step"] for line in lines]
    assert steps == [1, 2, 1, 2] and asked[:2] == [range(0, 1), range(1, 3)]
    later = ["--stage", "joint", "--start-from", str(tmp_path / "out"), "--work"]
    (tmp_path / "later").mkdir()
    for path in tmp_path.glob("scenes_*"):
        (tmp_path / "later" / path.name).symlink_to(path)
    monkeypatch.setattr(sys, "argv", [*command, *later, str(tmp_path / "later")])
    train_tiny.main()
    assert sorted(path.name for path in (tmp_path / "later").glob("*.pt")) == ["joint.state.pt"]
    # A tower that goes on is the one of the folder, whatever the work folder holds of crops.
    (tmp_path / "again").mkdir()
    for path in (*tmp_path.glob("scenes_*"), tmp_path / "crops.state.pt"):
        (tmp_path / "again" / path.name).symlink_to(path)
    given = {}
    monkeypatch.setattr(
        train_tiny, "fit_heads", lambda tower, *_: given.update(deepcopy(tower.state_dict()))
    )
    again = ["--stage", "tower", *later[2:], str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", [*command, *again])
    train_tiny.main()
    assert (tmp_path / "again" / "tower.state.pt").exists()
    for name, value in model.llava.vision.state_dict().items():
        assert torch.equal(given[name], value.float()), name
    # A joint stage begun without readers goes on without them.
    monkeypatch.setattr(
        sys, "argv", [*command, *later, str(tmp_path / "later"), "--joint-steps", "3"]
    )
    train_tiny.main()
    joint = torch.load(tmp_path / "later" / "joint.state.pt", weights_only=True)
    assert joint["step"] == 3 and "heads" not in joint
    assert asked[-1] == range(3, 4)  # behind the decoder's one step and its own two
