"""Evaluation on fresh scenes: which scenes, what is right, the second renderer, the command."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import llava_lite
from helpers.models import TINY_TEXT, TINY_VISION, random_llava
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.cli import console
from llava_lite.cli import program as cli
from llava_lite.config import LlavaConfig
from llava_lite.evaluation.scenes import accuracy
from llava_lite.evaluation.scenes import smooth as smooth_scenes
from llava_lite.evaluation.scenes.accuracy import (
    FAMILIES,
    FRESH_SEED,
    RENDERERS,
    Tally,
    answer_questions,
    encode,
    evaluate_scenes,
    fresh_rng,
    fresh_scenes,
    macro_accuracy,
    overall,
    report,
    table,
)
from llava_lite.evaluation.scenes.questions import Question, questions
from llava_lite.evaluation.scenes.smooth import draw_smooth_scene
from llava_lite.evaluation.scenes.world import (
    COLORS,
    SHAPES,
    DigitStyle,
    Scene,
    SceneObject,
    draw_instances,
    draw_scene,
    sample_scene,
)
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import FastV, Reduction, ToMe
from training.scenes import HELD_OUT_SEED, TRAIN_SEED, make_scene

WISHES = [
    Reduction(),
    Reduction(ToMe(keep=5), "vtu"),
    Reduction(ToMe(keep=5), "logical"),
    Reduction(ToMe(keep=5), "plain"),
    Reduction(fastv=FastV(keep=4, layer=1)),
    Reduction(ToMe(keep=6), "logical", FastV(keep=3, layer=2)),
]


# ---- fresh scenes --------------------------------------------------------------------------------


def state_of(rng: np.random.Generator) -> int:
    state: dict[str, int] = rng.bit_generator.state["state"]
    return state["state"]


@pytest.mark.parametrize("seed", [0, 1, 2, 77, FRESH_SEED, 2**32 - 1])
def test_fresh_scenes_share_no_random_state_with_training(seed: int) -> None:
    """Not even for training's own seeds, nor for the lists it seeds anything else with."""
    fresh = {state_of(fresh_rng(seed, index)) for index in range(200)}
    assert len(fresh) == 200
    for trained in (1, 2, seed):
        lists = [[trained, index] for index in range(200)]
        lists += [[index, last] for index in range(200) for last in (8, 9)]
        lists += [[*entry, *zeros] for entry in lists for zeros in ([0], [0, 0])]
        lists += [[trained, 100_000 * step + n] for step in range(20) for n in range(10)]
        lists += [[*entry, 1] for entry in lists[-200:]]
        names = (b"crops", b"tower")
        lists += [[trained, step, *name] for step in range(100) for name in names]
        assert not fresh & {state_of(np.random.default_rng(entry)) for entry in lists}


def test_fresh_scenes_are_none_that_training_has_seen() -> None:
    seeds = (TRAIN_SEED, HELD_OUT_SEED)
    seen = {make_scene(seed, index) for seed in seeds for index in range(100)}
    for seed in (*seeds, FRESH_SEED):
        assert not seen & {scene for scene, _ in fresh_scenes(100, seed)}


def test_fresh_scenes_are_the_same_every_time_and_from_any_number_on() -> None:
    scenes = list(fresh_scenes(6, 3))
    assert scenes == list(fresh_scenes(6, 3))
    assert scenes[4:] == list(fresh_scenes(2, 3, first=4))
    assert scenes[0] != next(fresh_scenes(1, 4))
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed {seed} must be in 0..4294967295"):
            next(fresh_scenes(1, seed))


def test_one_question_of_every_family_that_the_scene_allows() -> None:
    asked_of = {}
    for scene, asked in fresh_scenes(40, 5):
        families = [question.family for question in asked]
        assert len(families) == len(set(families))
        possible = {question.family for question in questions(scene, np.random.default_rng(0))}
        assert set(families) == possible
        asked_of |= dict.fromkeys(families)
    assert set(asked_of) == set(FAMILIES)
    assert {q.family for _, asked in fresh_scenes(9, 5, {"where", "count"}) for q in asked} == {
        "where",
        "count",
    }


def test_a_choice_of_families_asks_what_would_have_been_asked_anyway() -> None:
    for (scene, asked), (same, few) in zip(
        fresh_scenes(20, 5), fresh_scenes(20, 5, {"where", "color"}), strict=True
    ):
        assert scene == same
        assert few == [question for question in asked if question.family in ("where", "color")]


# ---- counting ------------------------------------------------------------------------------------


def test_wilson_intervals() -> None:
    assert Tally(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998
    assert Tally(15, 148).interval() == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert Tally(0, 20).interval() == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert Tally(29, 29).interval() == (pytest.approx(0.8830, abs=5e-5), 1.0)
    for asked in range(1, 60):
        for right in range(asked + 1):
            tally = Tally(right, asked)
            low, high = tally.interval()
            assert 0 <= low <= tally.accuracy <= high <= 1
    assert all(map(math.isnan, (*Tally().interval(), Tally().accuracy)))


def test_all_questions_and_the_mean_of_families() -> None:
    tallies = {"where": Tally(1, 2), "count": Tally(9, 10)}
    assert overall(tallies) == Tally(10, 12)
    assert macro_accuracy(tallies) == pytest.approx(0.7)
    content = report(tallies, {"seed": 3}, 0)
    assert list(content["families"]) == ["count", "where"]
    assert content["families"]["count"]["interval"] == list(Tally(9, 10).interval())
    assert (content["seed"], content["overall"]["accuracy"]) == (3, 10 / 12)
    lines = list(table(tallies, 0))
    assert [line.split()[0] for line in lines] == ["family", "count", "where", "all", "mean"]
    assert lines[1].split()[1:] == ["90.0%", "59.6%", "to", "98.2%", "10"]
    assert lines[3].split()[1] == "83.3%" and lines[4].split()[1] == "70.0%"


def test_nothing_asked_is_no_number() -> None:
    content = json.loads(json.dumps(report({}, {}, 3), allow_nan=False))
    assert content["overall"] == {"right": 0, "asked": 0}
    assert content["macro_accuracy"] is None


# ---- answers -------------------------------------------------------------------------------------


def scene_questions(model: Model, count: int) -> list[tuple[Scene, list[Question]]]:
    """Fresh scenes whose right answers are what a random model says, every second time."""
    scenes = []
    for scene, asked in fresh_scenes(count, 11):
        image = draw_scene(scene)
        known = [
            replace(question, answer=str(model.generate(image, question.text, max_new_tokens=4)))
            if index % 2
            else question
            for index, question in enumerate(asked)
        ]
        scenes.append((scene, known))
    return scenes


def test_an_answer_is_right_when_it_is_exactly_the_text(tiny_model: Model) -> None:
    scenes = scene_questions(tiny_model, 2)
    tallies = evaluate_scenes(tiny_model, scenes, 4)
    asked = [question for _, questions in scenes for question in questions]
    assert overall(tallies).asked == len(asked)
    given = [
        str(tiny_model.generate(draw_scene(scene), question.text, max_new_tokens=4))
        for scene, questions in scenes
        for question in questions
    ]
    marks = [answer == question.answer for answer, question in zip(given, asked, strict=True)]
    assert 0 < sum(marks) < len(marks)
    assert overall(tallies).right == sum(marks)
    wrong = {
        (question.text, question.answer, answer)
        for question, answer in zip(asked, given, strict=True)
        if answer != question.answer
    }
    assert {entry for tally in tallies.values() for entry in tally.mistakes} == wrong


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_answers_are_those_of_single_calls(
    tiny_model: Model, wish: Reduction, reuse_prefix: bool
) -> None:
    """Whatever the batch, and whether or not the front of the prompt is run again."""
    scenes = list(fresh_scenes(2, 12))
    images = [draw_scene(scene) for scene, _ in scenes]
    encoded = encode(tiny_model, images, wish)
    pairs = answer_questions(
        *(tiny_model, encoded, [asked for _, asked in scenes], 5, wish),
        batch_size=3,
        reuse_prefix=reuse_prefix,
    )
    flat = [(image, one) for image, (_, asked) in zip(images, scenes, strict=True) for one in asked]
    assert [question for question, _ in pairs] == [question for _, question in flat]
    single = [
        str(tiny_model.generate(image, question.text, max_new_tokens=5, reduction=wish))
        for image, question in flat
    ]
    assert [answer for _, answer in pairs] == single
    assert len(set(single)) > 4


def test_the_prefix_runs_once_per_image(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = list(fresh_scenes(2, 12))
    rows: list[int] = []
    forward = type(tiny_model.llava).forward

    def counting(self: torch.nn.Module, input_embeds: list[torch.Tensor], *args: object) -> object:
        rows.extend(len(item) for item in input_embeds)
        return forward(self, input_embeds, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tiny_model.llava), "forward", counting)
    monkeypatch.setattr(tiny_model.prefix, "ids", lambda *_: ())  # that would run only once, too
    longest = {}
    for reuse_prefix in (False, True):
        rows.clear()
        evaluate_scenes(tiny_model, scenes, 3, reuse_prefix=reuse_prefix)
        longest[reuse_prefix] = sorted(rows, reverse=True)
    number = sum(len(asked) for _, asked in scenes)
    image_tokens = tiny_model.config.vision.num_patches
    assert longest[False][number - 1] > image_tokens
    prefix = longest[True][0]
    assert longest[True][:2] == [prefix] * 2 and prefix > image_tokens
    # Then only what follows the image is left of a prompt: the question and what closes it.
    assert longest[False][number - 1] == prefix + longest[True][number + 1]


def test_a_scene_without_questions_costs_nothing(tiny_model: Model) -> None:
    scene, asked = next(fresh_scenes(1, 12))
    scenes: list[tuple[Scene, list[Question]]] = [(scene, []), (scene, asked[:1]), (scene, [])]
    assert overall(evaluate_scenes(tiny_model, scenes, 2, reuse_prefix=True)).asked == 1
    assert evaluate_scenes(tiny_model, []) == {}


def test_evaluation_takes_a_reduction_by_name_and_a_renderer(tiny_model: Model) -> None:
    drawn: list[Scene] = []

    def draw(scene: Scene) -> Image.Image:
        drawn.append(scene)
        return draw_scene(scene)

    scenes = list(fresh_scenes(1, 13))
    evaluate_scenes(tiny_model, scenes, 1, reduction="none", draw=draw)
    assert drawn == [scenes[0][0]]
    with pytest.raises(ValueError, match="unknown reduction 'half'"):
        evaluate_scenes(tiny_model, scenes, reduction="half")


# ---- the second renderer -------------------------------------------------------------------------


def test_the_renderers_share_no_drawing_code() -> None:
    """Of scenes.py the second takes what a scene is, and of Pillow only the image to return."""
    tree = ast.parse(Path(smooth_scenes.__file__).read_text(encoding="utf-8"))
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for module, name in imported if module == "PIL"} == {"Image"}
    ours = {name for module, name in imported if module and module.startswith("llava_lite")}
    assert ours == {"DIGIT_HEIGHTS", "RGB", "Scene", "SceneObject", "drawn_proportion"}
    assert RENDERERS == {"plain": draw_scene, "smooth": draw_smooth_scene}


def random_scenes(count: int, digit_probability: float = 0.5) -> list[Scene]:
    return [
        sample_scene(
            fresh_rng(6, index), short_side=(320, 480), digit_probability=digit_probability
        )
        for index in range(count)
    ]


def pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image).astype(float)


def inner_point(scene_object: SceneObject) -> tuple[int, int]:
    """Row and column of a pixel that has the object's color: its center, but beside the hole of a
    ring and the digit of a circle or square."""
    away = {"ring": 0.78}.get(scene_object.shape, 0.0)
    if scene_object.digit is not None:
        away = 0.85 if scene_object.shape == "circle" else 0.8
    angle = scene_object.rotation + math.pi / 4  # a corner of a square
    x = scene_object.x + away * scene_object.radius * math.cos(angle)
    y = scene_object.y + away * scene_object.radius * math.sin(angle)
    return int(y), int(x)


def test_both_renderers_put_every_color_in_the_same_place() -> None:
    """Gradients, noise and digits included; noise is averaged over a few pixels where no digit is
    near."""
    shapes, kinds = set(), set()
    for scene in random_scenes(60):
        plain, smooth = pixels(draw_scene(scene)), pixels(draw_smooth_scene(scene))
        assert plain.shape == smooth.shape == (scene.height, scene.width, 3)
        kinds.add((scene.background_end is not None, scene.noise_sigma > 0))
        for one in scene.objects:
            shapes.add((one.shape, one.digit is not None))
            (row, column), reach = inner_point(one), int(one.digit is None)
            spot = np.s_[row - reach : row + reach + 1, column - reach : column + reach + 1]
            noise = 4 * scene.noise_sigma / (2 * reach + 1)  # four standard errors of the mean
            for image in (plain, smooth):
                off = np.abs(image[spot].mean((0, 1)) - one.rgb).max()
                assert off <= 2 + noise, (one, image[spot].mean((0, 1)))
    assert len(kinds) == 4
    assert {shape for shape, _ in shapes} == set(SHAPES)
    assert {shape for shape, digit in shapes if digit} == {"circle", "square"}


def test_without_noise_the_renderers_differ_at_edges_only() -> None:
    for scene in random_scenes(40, digit_probability=0.0):
        scene = replace(scene, noise_sigma=0.0)
        difference = np.abs(pixels(draw_scene(scene)) - pixels(draw_smooth_scene(scene))).max(2)
        assert difference.mean() < 0.6
        covered = draw_instances(scene, max(scene.width, scene.height)) > 0
        outline = sum(2 * math.pi * one.radius for one in scene.objects)
        assert np.count_nonzero(difference > 2) < 4 * outline
        assert np.count_nonzero(difference > 2) < np.count_nonzero(covered)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proportion", [0.0, 1.0])
def test_both_renderers_cover_the_same_area(shape: str, proportion: float) -> None:
    one = SceneObject(shape, "red", (200, 0, 0), 150.3, 149.6, 100.0, 0.7, proportion=proportion)
    scene = Scene(300, 300, (0, 0, 0), (one,))
    areas = [pixels(draw(scene))[..., 0].sum() / 200 for draw in RENDERERS.values()]
    assert areas[0] == pytest.approx(areas[1], rel=0.01)


def test_shapes_have_smooth_edges_of_one_pixel() -> None:
    one = SceneObject("circle", "red", (255, 255, 255), 60.0, 60.0, 40.0, 0.0)
    row = pixels(draw_smooth_scene(Scene(120, 120, (0, 0, 0), (replace(one, radius=40.25),))))[60]
    assert list(row[18:22, 0]) == [0, 63, 255, 255]  # a quarter of the outermost pixel


@pytest.mark.parametrize("digit", range(10))
def test_smooth_digits_are_read_as_what_they_are(digit: int) -> None:
    """Of the ten digits of Pillow's typeface the same one fits best, at any height."""
    for height in (24.0, 60.0):
        drawn = draw_digit(draw_smooth_scene, digit, height)
        fits = [overlap(drawn, draw_digit(draw_scene, other, height)) for other in range(10)]
        assert int(np.argmax(fits)) == digit, fits
        assert max(fits) > 0.6


def draw_digit(draw: accuracy.Draw, digit: int, height: float) -> NDArray[np.float64]:
    """Ink 0..1 of one white digit on a black square, cropped to it."""
    style = DigitStyle(height, ink=(255, 255, 255))
    one = SceneObject("square", "black", (0, 0, 0), 80.0, 80.0, 75.0, 0.0, digit, digit_style=style)
    ink = pixels(draw(Scene(160, 160, (0, 0, 0), (one,))))[..., 0] / 255
    rows, columns = np.nonzero(ink > 0.5)
    assert abs(np.ptp(rows) + 1 - height) <= 2  # as high as asked for
    assert abs(rows.min() + rows.max() + 1 - 160) <= 2 and columns.min() > 0
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Shared ink of two digits of the same size, of the ink of either."""
    first, second = (
        np.asarray(Image.fromarray(np.uint8(255 * ink)).resize((30, 50))) / 255
        for ink in (one, other)
    )
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


def test_smooth_digits_without_a_style_contrast_with_their_object() -> None:
    for color, dark in (("white", True), ("yellow", True), ("black", False), ("blue", False)):
        one = SceneObject("circle", color, COLORS[color], 80.0, 80.0, 70.0, 0.0, digit=1)
        drawn = pixels(draw_smooth_scene(Scene(160, 160, (128, 128, 128), (one,))))
        assert (np.abs(drawn - (0 if dark else 255)).max(2) == 0).sum() > 100


def test_smooth_noise_has_its_sigma_and_is_the_same_every_time() -> None:
    scene = Scene(200, 200, (128, 120, 110), (), noise_sigma=9.0, noise_seed=4)
    drawn = pixels(draw_smooth_scene(scene))
    assert drawn.std(axis=(0, 1)) == pytest.approx([9.0] * 3, rel=0.02)
    assert drawn.mean(axis=(0, 1)) == pytest.approx([128, 120, 110], abs=0.2)
    assert np.array_equal(drawn, pixels(draw_smooth_scene(scene)))
    assert not np.array_equal(drawn, pixels(draw_smooth_scene(replace(scene, noise_seed=5))))


# ---- llava-lite eval -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> str:
    """A random model with room for all presets, as a folder."""
    config = LlavaConfig(
        vision=replace(TINY_VISION, image_size=336, num_layers=5),
        text=replace(TINY_TEXT, num_layers=4, max_positions=1024),
        name="random",
    )
    path = tmp_path_factory.mktemp("eval") / "model"
    save_model(random_llava(config), config, path, tiny_tokenizer)
    return str(path)


def run_eval(*words: str, model: str) -> int:
    return cli.main(["eval", "scenes", "-m", model, "--quiet", *words])


def test_command_prints_a_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--n", "2", "--families", "count", "where", "--mistakes", "1")
    assert run_eval(*words, "--reduction", "hybrid-72-36", model=folder) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == (
        "model random, dtype float32, reduction hybrid-72-36, renderer plain, scenes 2, seed 20000"
    )
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == [
        *("family", "count", "where", "all", "mean")
    ]
    assert sum("given:" in line for line in lines) == 2


def test_command_prints_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--n", "3", "--seed", "4", "--json", "--renderer", "smooth", "--families", "count")
    assert run_eval(*words, "--mistakes", "2", "--dtype", "bf16", model=folder) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["families"]["count"]["asked"] == content["overall"]["asked"] == 3
    settings = {name: content[name] for name in ("model", "dtype", "renderer", "scenes", "seed")}
    assert settings == {
        "model": "random",
        "dtype": "bfloat16",
        "renderer": "smooth",
        "scenes": 3,
        "seed": 4,
    }
    wrong = content["mistakes"]["count"]
    assert len(wrong) == 2 and set(wrong[0]) == {"question", "right", "given"}


def test_command_says_how_weights_are_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--n", "1", "--families", "count", "--quantize", "int8")
    folder = str(llava_lite.embedded_model())
    assert run_eval(*words, model=folder) == 0
    assert "dtype bfloat16, quantize int8, reduction none," in capsys.readouterr().out
    assert run_eval(*words, "--json", model=folder) == 0
    assert json.loads(capsys.readouterr().out)["quantize"] == "int8"
    assert run_eval(*words[:-2], "--json", model=folder) == 0
    assert "quantize" not in json.loads(capsys.readouterr().out)


def test_command_measures_what_the_function_does(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags arrive; the renderer draws; `--batch-size` and the reduction are those asked for."""
    seen: dict[str, object] = {}

    def spy(model: Model, scenes: object, **options: object) -> dict[str, Tally]:
        seen.update(options, scenes=list(scenes))  # type: ignore[call-overload]
        return {"count": Tally(1, 2)}

    monkeypatch.setattr(accuracy, "evaluate_scenes", spy)
    words = (
        "--n",
        "2",
        "--seed",
        "9",
        "--batch-size",
        "5",
        "--fastv-k",
        "36",
        "--merge",
        "tome:72",
    )
    assert run_eval(*words, "--renderer", "smooth", model=folder) == 0
    assert seen["scenes"] == list(fresh_scenes(2, 9))
    assert seen["reduction"] == Reduction(ToMe(keep=72), fastv=FastV(keep=36))
    assert (seen["batch_size"], seen["draw"]) == (5, draw_smooth_scene)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n", "0"), "not a number of at least 1"),
        (("--seed", "-1"), "not a number of at least 0"),
        (("--families", "count", "taste"), "no family 'taste'; there are count, count_color"),
        (("--renderer", "oil"), "invalid choice: 'oil'"),
    ],
)
def test_wrong_usage(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(*words, model="nowhere") == console.WRONG_USAGE
    assert message in capsys.readouterr().err


def test_a_reduction_that_the_model_cannot_do_is_one_line(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_eval("--fastv-k", "36", "--fastv-layer", "7", "--n", "1", model=folder)
        == console.FAILED
    )
    assert capsys.readouterr().err == "error: FastV layer 7 must be in 1..3\n"


def test_a_seed_out_of_range_shows_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_eval("--seed", str(2**32), model="no model") == console.FAILED
    assert capsys.readouterr().err == "error: seed 4294967296 must be in 0..4294967295\n"


def test_help_names_families_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "scenes", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"families: {', '.join(FAMILIES)} examples" in text
    assert f"(default: {FRESH_SEED})" in text
    args = cli.build_parser().parse_args(["eval", "scenes"])
    assert args.seed == FRESH_SEED and args.n == 2000
    assert args.renderer in RENDERERS
