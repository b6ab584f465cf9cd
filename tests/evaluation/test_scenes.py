"""Drawn scenes: the domain they keep to, the pixels drawn, and the questions asked about them."""

import math
import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from helpers.examples import examples
from llava_lite.evaluation.scenes.questions import (
    ANSWERS,
    PARAPHRASES,
    Question,
    describe,
    questions,
)
from llava_lite.evaluation.scenes.world import (
    COLORS,
    DIGIT_HEIGHTS,
    DIGIT_SHAPES,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    DigitStyle,
    Scene,
    SceneObject,
    draw_instances,
    draw_scene,
    object_polygon,
    sample_scene,
)

COUNTS = ["zero", "one", "two", "three", "four", "five", "six"]
GRAY = (128, 128, 128)

seeds = st.integers(0, 2**32 - 1)
scenes = st.builds(
    lambda seed, count, digits: sample_scene(
        np.random.default_rng(seed), count, short_side=(224, 320), digit_probability=digits
    ),
    seeds,
    st.sampled_from([None, 1, 2, 3, 4, 5, 6]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
few = examples(30)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def many_scenes(count: int, seed: int = 0, **options: float) -> list[Scene]:
    rng = rng_of(seed)
    return [sample_scene(rng, **options) for _ in range(count)]  # type: ignore[arg-type]


def one_object(shape: str, **changes: object) -> Scene:
    rotation, radius = 0.3, 60.0
    lone = SceneObject(shape, "red", COLORS["red"], 203.0, 198.5, radius, rotation)
    return Scene(400, 400, GRAY, (replace(lone, **changes),))  # type: ignore[arg-type]


def pixels_of(scene: Scene, supersample: int = 2) -> NDArray[np.int64]:
    return np.asarray(draw_scene(scene, supersample)).astype(np.int64)


def full_size_instances(scene: Scene) -> NDArray[np.uint8]:
    """The instance map at the scene's own scale, padding cut off."""
    side = max(scene.width, scene.height)
    top, left = (side - scene.height) // 2, (side - scene.width) // 2
    padded = draw_instances(scene, side)
    return padded[top : top + scene.height, left : left + scene.width]


# --------------------------------------------------------------------- the domain of scenes


@few
@given(scenes)
def test_objects_keep_to_their_domain(scene: Scene) -> None:
    short, long = sorted((scene.width, scene.height))
    assert 224 <= short <= 320 and long <= 2 * short
    assert 1 <= len(scene.objects) <= MAX_OBJECTS
    assert 0 <= scene.noise_sigma <= 12
    for o in scene.objects:
        assert 0.06 * short - 1e-9 <= o.radius <= 0.15 * short + 1e-9
        assert o.radius <= o.x <= scene.width - o.radius
        assert o.radius <= o.y <= scene.height - o.radius
        assert o.shape in SHAPES
        nominal = COLORS[o.color]
        assert all(abs(a - b) <= 15 for a, b in zip(o.rgb, nominal, strict=True))
        assert o.digit is None or (o.shape in DIGIT_SHAPES and 0 <= o.digit <= 9)


@few
@given(scenes)
def test_objects_are_apart_and_distinct(scene: Scene) -> None:
    for a, b in permutations(scene.objects, 2):
        assert math.dist((a.x, a.y), (b.x, b.y)) >= a.radius + b.radius + 4
        assert (a.color, a.shape) != (b.color, b.shape)


@few
@given(scenes)
def test_objects_differ_from_the_drawn_background_everywhere(scene: Scene) -> None:
    background = pixels_of(replace(scene, objects=(), noise_sigma=0.0))
    rows, columns = np.mgrid[: scene.height, : scene.width] + 0.5
    for o in scene.objects:
        disc = np.hypot(columns - o.x, rows - o.y) <= o.radius
        assert np.abs(background[disc] - np.array(o.rgb)).max(axis=1).min() >= 45


def test_backgrounds_have_low_saturation() -> None:
    for scene in many_scenes(200):
        for color in filter(None, (scene.background, scene.background_end)):
            assert max(color) - min(color) <= 0.25 * max(color) + 1


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("short", [32, 224, 1024])
def test_number_of_objects_is_honoured(count: int, short: int) -> None:
    rng = rng_of(1)
    for _ in range(20):
        scene = sample_scene(rng, count, short_side=(short, short))
        assert len(scene.objects) == count
        assert scene.short_side == short


def test_number_of_objects_is_uniform_by_default() -> None:
    counts = [len(scene.objects) for scene in many_scenes(900)]
    # 150 expected of each; four standard deviations are 45.
    assert all(105 <= counts.count(number) <= 195 for number in range(1, 7))


def test_short_side_is_uniform_in_log_scale() -> None:
    sides = [scene.short_side for scene in many_scenes(600)]
    assert min(sides) < 240 and max(sides) > 960
    below = sum(side < math.sqrt(224 * 1024) for side in sides)
    assert 250 <= below <= 350  # half, within four standard deviations


def test_confusable_objects_share_shape_or_color() -> None:
    def sharing(confusable: float) -> float:
        pairs = [
            any(o.color == e.color or o.shape == e.shape for e in scene.objects[:k])
            for scene in many_scenes(100, num_objects=3, confusable=confusable)
            for k, o in enumerate(scene.objects)
            if k
        ]
        return sum(pairs) / len(pairs)

    assert sharing(1.0) == 1.0
    assert sharing(0.0) < 0.6


@pytest.mark.parametrize("count", [0, 7, -1])
def test_bad_number_of_objects_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.6"):
        sample_scene(rng_of(0), count)


@pytest.mark.parametrize("short_side", [(500, 300), (10, 300)])
def test_bad_size_range_is_refused(short_side: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="short_side"):
        sample_scene(rng_of(0), short_side=short_side)


# ------------------------------------------------------------------------------ determinism


@examples(10)
@given(seeds)
def test_same_seed_same_scene_pixels_and_questions(seed: int) -> None:
    first, second = rng_of(seed), rng_of(seed)
    scene = sample_scene(first, short_side=(224, 300))
    assert sample_scene(second, short_side=(224, 300)) == scene
    assert questions(scene, first) == questions(scene, second)
    assert np.array_equal(pixels_of(scene), pixels_of(scene))


def test_different_seeds_give_different_scenes() -> None:
    assert len({sample_scene(rng_of(seed)) for seed in range(20)}) == 20


# --------------------------------------------------------------------------------- drawing

AREAS = {  # of a shape with circumradius 1, from its proportion where it has one
    "circle": lambda p: math.pi,
    "ring": lambda p: math.pi * (1 - p**2),
    "square": lambda p: 2.0,
    "triangle": lambda p: 3 * math.sqrt(3) / 4,
    "star": lambda p: 5 * p * math.sin(math.pi / 5),
    "cross": lambda p: 4 * (2 * p - p**2) / (1 + p**2),  # two bars less their common square
}
MIDDLE = {"star": 0.425, "ring": 0.53, "cross": 0.335}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotation", [0.0, 0.4, 2.5])
def test_drawn_area_is_that_of_the_shape(shape: str, rotation: float) -> None:
    scene = one_object(shape, radius=150.0, rotation=rotation)
    covered = (pixels_of(scene) != GRAY).any(axis=2)
    expected = AREAS[shape](MIDDLE.get(shape, 0.0)) * 150**2
    assert full_size_instances(scene).sum() == pytest.approx(expected, rel=0.03)
    assert covered.sum() == pytest.approx(expected, rel=0.06)  # soft edges count fully


@pytest.mark.parametrize(
    ("shape", "corners"), [("square", 4), ("triangle", 3), ("star", 10), ("cross", 12)]
)
@pytest.mark.parametrize("proportion", [0.0, 1.0])
def test_polygons_are_inscribed_in_the_circumcircle(
    shape: str, corners: int, proportion: float
) -> None:
    (lone,) = one_object(shape, proportion=proportion).objects
    polygon = object_polygon(lone)
    distances = [math.dist(corner, (lone.x, lone.y)) for corner in polygon]
    assert len(polygon) == corners
    assert max(distances) == pytest.approx(lone.radius)
    outer = sum(distance > 0.999 * lone.radius for distance in distances)
    assert outer == {"star": 5, "cross": 8}.get(shape, corners)


@pytest.mark.parametrize("shape", ["circle", "ring"])
def test_round_shapes_have_no_polygon(shape: str) -> None:
    with pytest.raises(ValueError, match=shape):
        object_polygon(one_object(shape).objects[0])


def test_a_ring_shows_the_background_in_its_hole() -> None:
    scene = one_object("ring")
    assert tuple(pixels_of(scene)[198, 203]) == GRAY
    assert draw_instances(scene, 336)[round(198.5 * 0.84), round(203 * 0.84)] == 0


@few
@given(scenes)
def test_drawing_matches_the_instance_map(scene: Scene) -> None:
    bare = tuple(replace(o, digit=None) for o in scene.objects)
    clean = replace(scene, objects=bare, noise_sigma=0.0)
    instances = full_size_instances(clean)
    background = pixels_of(replace(clean, objects=()))
    for supersample in (1, 2, 3):
        pixels = pixels_of(clean, supersample)
        # Hard edges may differ by a pixel, as Pillow's rounding of a slanted edge depends on where
        # the canvas starts; a soft edge is one more pixel wide.
        margin = 1 if supersample == 1 else 2
        for index, o in enumerate(bare, start=1):
            inside = pixels[eroded(instances == index, margin)]
            assert len(inside) > 0
            assert (inside == o.rgb).all()
        outside = eroded(instances == 0, margin)
        assert (pixels[outside] == background[outside]).all()


def eroded(mask: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """The pixels whose neighbors up to `margin` away all exist and belong to the mask."""
    padded = np.pad(mask, margin)
    height, width = mask.shape
    offsets = range(2 * margin + 1)
    shifts = [padded[r : r + height, c : c + width] for r in offsets for c in offsets]
    return np.logical_and.reduce(shifts)


@few
@given(scenes, st.sampled_from([168, 336, 500]))
def test_instances_lie_where_preprocessing_puts_them(scene: Scene, size: int) -> None:
    instances = draw_instances(scene, size)
    assert instances.shape == (size, size) and instances.dtype == np.uint8
    assert set(np.unique(instances)) == set(range(len(scene.objects) + 1))
    side = max(scene.width, scene.height)
    for index, o in enumerate(scene.objects, start=1):
        rows, columns = np.nonzero(instances == index)
        x = (o.x + (side - scene.width) // 2) * size / side - 0.5
        y = (o.y + (side - scene.height) // 2) * size / side - 0.5
        assert abs(columns.mean() - x) < 1 and abs(rows.mean() - y) < 1
        assert np.hypot(columns - x, rows - y).max() <= o.radius * size / side + 1


def test_padding_belongs_to_no_object() -> None:
    instances = draw_instances(replace(one_object("circle"), width=800, height=400), 400)
    assert not instances[:100].any() and not instances[300:].any()
    assert instances[199, 101] == 1


def test_the_gradient_runs_from_corner_to_corner() -> None:
    scene = Scene(300, 200, (10, 20, 30), (), (210, 220, 230), gradient_angle=math.pi / 4)
    pixels = pixels_of(scene)
    assert np.abs(pixels[0, 0] - (10, 20, 30)).max() <= 1
    assert np.abs(pixels[-1, -1] - (210, 220, 230)).max() <= 1
    assert np.abs(pixels[100, 150] - (110, 120, 130)).max() <= 1
    reversed_scene = replace(scene, gradient_angle=math.pi / 4 + math.pi)
    assert np.abs(pixels_of(reversed_scene)[0, 0] - (210, 220, 230)).max() <= 1


@pytest.mark.parametrize("sigma", [3.0, 12.0])
def test_noise_is_gaussian_of_the_given_size(sigma: float) -> None:
    noise = pixels_of(Scene(300, 300, GRAY, (), noise_sigma=sigma, noise_seed=5)) - 128
    assert noise.std() == pytest.approx(math.hypot(sigma, 12**-0.5), rel=0.01)
    assert abs(noise.mean()) < 0.1
    assert (np.abs(noise) > 2 * sigma).mean() == pytest.approx(0.0455, abs=0.02)
    other = pixels_of(Scene(300, 300, GRAY, (), noise_sigma=sigma, noise_seed=6)) - 128
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02


def test_noise_covers_objects_and_stays_in_range() -> None:
    scene = replace(one_object("circle", rgb=(255, 0, 100), radius=150.0), noise_sigma=12.0)
    inside = pixels_of(scene)[150:250, 150:250]
    assert inside[..., 2].std() == pytest.approx(12.0, rel=0.05)
    assert inside[..., 0].min() > 180 and inside[..., 1].max() < 75


# ---------------------------------------------------------------------------------- digits


def ink_of(scene: Scene) -> NDArray[np.bool_]:
    """Pixels that the lone object's digit changes by more than half of what full ink would."""
    (lone,) = scene.objects
    bare = pixels_of(replace(scene, objects=(replace(lone, digit=None),)))
    ink = lone.digit_style.ink if lone.digit_style else (255, 255, 255)
    change = np.abs(pixels_of(scene) - bare).max(axis=2)
    full: int = np.abs(np.array(ink) - np.array(lone.rgb)).max()
    return np.asarray(change > full / 2)


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("shape", DIGIT_SHAPES)
def test_digits_have_their_height_and_are_centred_inside(shape: str, digit: int) -> None:
    for height in (2 * 60 * part for part in DIGIT_HEIGHTS[shape]):
        scene = one_object(shape, digit=digit, digit_style=DigitStyle(height))
        ink = ink_of(scene)
        rows, columns = np.nonzero(ink)
        assert rows.max() - rows.min() + 1 == pytest.approx(height, abs=1)
        assert (rows.max() + rows.min() + 1) / 2 == pytest.approx(198.5, abs=1)
        assert (columns.max() + columns.min() + 1) / 2 == pytest.approx(203.0, abs=1)
        assert (full_size_instances(scene)[ink] == 1).all()


def test_sampled_digits_keep_to_their_heights() -> None:
    measured: dict[str, list[float]] = {shape: [] for shape in DIGIT_SHAPES}
    for scene in many_scenes(12, num_objects=6, digit_probability=1.0):
        for o in scene.objects:
            assert (o.digit is not None) == (o.shape in DIGIT_SHAPES)
            if o.digit is None:
                continue
            rows = np.nonzero(ink_of(replace(scene, objects=(o,), noise_sigma=0.0)))[0]
            height = rows.max() - rows.min() + 1
            low, high = (2 * o.radius * part for part in DIGIT_HEIGHTS[o.shape])
            assert low - 1 <= height <= high + 1
            measured[o.shape].append(height)
    assert all(len(heights) >= 5 for heights in measured.values())


def test_digits_stay_upright_and_look_different() -> None:
    style = DigitStyle(60.0)
    upright = [
        ink_of(one_object("square", digit=d, digit_style=style, rotation=0.0)) for d in range(10)
    ]
    turned = ink_of(one_object("square", digit=7, digit_style=style, rotation=1.0))
    assert np.array_equal(turned, upright[7])
    for a, b in permutations(range(10), 2):
        assert (upright[a] ^ upright[b]).sum() > 0.1 * upright[a].sum()


@pytest.mark.parametrize("styled", [True, False])
def test_digit_ink_is_black_or_white_for_contrast(styled: bool) -> None:
    white, black = (255, 255, 255), (0, 0, 0)
    inks: dict[str, set[tuple[int, ...]]] = {color: set() for color in COLORS}
    if styled:
        for scene in many_scenes(150, num_objects=6, digit_probability=1.0):
            for o in scene.objects:
                if o.digit_style is not None:
                    inks[o.color].add(o.digit_style.ink)
    else:
        for color, rgb in COLORS.items():
            scene = one_object("circle", color=color, rgb=rgb, digit=1)
            pixels = pixels_of(scene)
            inks[color] = {ink for ink in (white, black) if (pixels == ink).all(axis=2).any()}
    assert inks["black"] == inks["blue"] == inks["purple"] == {white}
    assert inks["white"] == inks["yellow"] == {black}
    assert all(found and found <= {white, black} for found in inks.values())
    assert styled or all(len(found) == 1 for found in inks.values())


# ------------------------------------------------------------------------------- questions


def slow_answer(scene: Scene, question: Question) -> str:
    """Answer from the words of the question and the objects, one at a time."""
    words = re.findall(r"[a-z]+", question.text.lower())
    colors = [word for word in words if word in COLORS]
    singulars = [{"crosses": "cross"}.get(w, w.removesuffix("s") if w != "cross" else w)
                 for w in words]  # fmt: skip
    shapes = [word for word in singulars if word in SHAPES]
    names = list(zip(colors, shapes, strict=False))
    fitting = [
        o
        for o in scene.objects
        if (not colors or o.color == colors[0]) and (not shapes or o.shape == shapes[0])
    ]
    if question.family in ("count", "count_color", "count_shape"):
        return COUNTS[len(fitting)]
    if question.family == "exists":
        return "yes" if fitting else "no"
    (asked,) = fitting
    if question.family == "color":
        return asked.color
    if question.family == "shape":
        return asked.shape
    if question.family == "digit":
        return str(asked.digit)
    if question.family == "where":
        return slow_place(scene, asked)
    assert question.family == "relation"
    (other,) = [o for o in scene.objects if (o.color, o.shape) == names[1]]
    (direction,) = [word for word in words if word in ("left", "right", "above", "below")]
    holds = {
        "left": asked.x < other.x,
        "right": asked.x > other.x,
        "above": asked.y < other.y,
        "below": asked.y > other.y,
    }
    return "yes" if holds[direction] else "no"


def slow_place(scene: Scene, o: SceneObject) -> str:
    vertical = "top" if 3 * o.y < scene.height else "bottom" if 3 * o.y >= 2 * scene.height else ""
    horizontal = "left" if 3 * o.x < scene.width else "right" if 3 * o.x >= 2 * scene.width else ""
    return f"{vertical} {horizontal}".strip() or "center"


@examples(60)
@given(scenes, seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_answers_agree_with_a_slow_recount(scene: Scene, seed: int, paraphrase: float) -> None:
    for question in questions(scene, rng_of(seed), paraphrase):
        if question.family == "describe":
            continue
        assert question.answer in ANSWERS[question.family]
        assert question.answer == slow_answer(scene, question), question


DESCRIBED = re.compile(
    r"(?P<article>an?) (?P<color>\w+) (?P<shape>\w+) "
    r"(?:at the (?P<at>[a-z ]+?)|on the (?P<on>left|right)|in the (?P<in>center))(?=,| and |\.$)"
)


@examples(60)
@given(scenes)
def test_descriptions_name_every_object_in_order(scene: Scene) -> None:
    sentence = describe(scene)
    matches = list(DESCRIBED.finditer(sentence))
    placed = {(o.color, o.shape): slow_place(scene, o) for o in scene.objects}
    described = []
    for match in matches:
        place = match["at"] or match["on"] or match["in"]
        identity = (match["color"], match["shape"])
        assert placed[identity] == place
        assert match["article"] == ("an" if match["color"] == "orange" else "a")
        described.append((tuple(COLORS).index(match["color"]), SHAPES.index(match["shape"])))
    assert len(matches) == len(scene.objects)
    assert described == sorted(set(described))
    count = len(matches)
    verb = "is one object: " if count == 1 else f"are {COUNTS[count]} objects: "
    assert sentence.startswith("There " + verb) and sentence.endswith(".")
    assert sentence.count(" and ") == (count > 1)


def row_of_objects(*places: tuple[str, str, float, float]) -> Scene:
    objects = [
        SceneObject(shape, color, COLORS[color], x, y, 20.0, 0.0) for color, shape, x, y in places
    ]
    return Scene(300, 300, GRAY, tuple(objects))


def test_descriptions_word_for_word() -> None:
    red, blue = ("red", "circle", 50.0, 50.0), ("blue", "star", 150.0, 150.0)
    ring = ("orange", "ring", 250.0, 150.0)
    assert describe(row_of_objects(red)) == "There is one object: a red circle at the top left."
    assert describe(row_of_objects(blue, red)) == (
        "There are two objects: a red circle at the top left and a blue star in the center."
    )
    assert describe(row_of_objects(ring, blue, red)) == (
        "There are three objects: a red circle at the top left, an orange ring on the right, "
        "and a blue star in the center."
    )


@pytest.mark.parametrize("index", range(9))
def test_places_are_thirds_of_the_image(index: int) -> None:
    row, column = divmod(index, 3)
    for inset in (0.0, 50.0, 99.0):  # a third begins on its border
        scene = row_of_objects(("red", "star", 100.0 * column + inset, 100.0 * row + inset))
        assert (scene.width, scene.height) == (300, 300)
        assert scene.place(scene.objects[0]) == PLACES[index]
    assert PLACES[:5] == ("top left", "top", "top right", "left", "center")
    assert PLACES[5:] == ("right", "bottom left", "bottom", "bottom right")


def test_thirds_are_of_the_image_and_not_of_its_padding() -> None:
    low = Scene(600, 300, GRAY, row_of_objects(("red", "star", 300.0, 50.0)).objects)
    assert low.place(low.objects[0]) == "top"


@few
@given(scenes, seeds)
def test_every_sensible_question_is_asked_once(scene: Scene, seed: int) -> None:
    asked = questions(scene, rng_of(seed), paraphrase=0.0)
    texts = [question.text for question in asked]
    assert len(set(texts)) == len(texts)
    colors, shapes = [o.color for o in scene.objects], [o.shape for o in scene.objects]
    assert texts.count("How many objects are there?") == texts.count("Describe the image.") == 1
    for color in COLORS:
        unique = f"What shape is the {color} object?" in texts
        assert unique == (colors.count(color) == 1)
        assert color not in colors or f"How many {color} objects are there?" in texts
    for shape in SHAPES:
        assert (f"What color is the {shape}?" in texts) == (shapes.count(shape) == 1)
        many = "crosses" if shape == "cross" else shape + "s"
        assert shape not in shapes or f"How many {many} are there?" in texts
    for o in scene.objects:
        article = "an" if o.color == "orange" else "a"
        assert f"Is there {article} {o.color} {o.shape}?" in texts
        assert f"Where is the {o.color} {o.shape}?" in texts
        assert (f"What digit is on the {o.color} {o.shape}?" in texts) == (o.digit is not None)
    existence = [question.answer for question in asked if question.family == "exists"]
    assert existence.count("yes") == existence.count("no") == len(scene.objects)


@few
@given(scenes, seeds)
def test_relations_are_asked_where_objects_are_far_enough(scene: Scene, seed: int) -> None:
    asked = [q.text for q in questions(scene, rng_of(seed), 0.0) if q.family == "relation"]
    expected = 0
    for a, b in permutations(scene.objects, 2):
        pattern = rf"Is the {a.color} {a.shape} (.*) the {b.color} {b.shape}\?"
        found = [match[1] for text in asked if (match := re.fullmatch(pattern, text))]
        level, upright = abs(a.x - b.x), abs(a.y - b.y)
        if level < 0.1 * scene.short_side:
            assert not {"left of", "right of"} & set(found)
        if upright < 0.1 * scene.short_side:
            assert not {"above", "below"} & set(found)
        # Each ordered pair is met once in either order: two questions per axis in all.
        expected += (level >= 0.1 * scene.short_side) + (upright >= 0.1 * scene.short_side)
    assert len(asked) == expected


def test_answers_are_balanced_over_many_scenes() -> None:
    rng = rng_of(0)
    asked = [q for scene in many_scenes(300) for q in questions(scene, rng)]

    def share(answer: str, family: str, word: str = "") -> float:
        answers = [q.answer for q in asked if q.family == family and word in q.text]
        assert len(answers) >= 100
        return answers.count(answer) / len(answers)

    for family in ("exists", "relation"):
        assert 0.45 <= share("yes", family) <= 0.55
    for direction in ("left of", "right of", "above", "below"):
        assert 0.45 <= share("yes", "relation", direction) <= 0.55
    for family in ("count_color", "count_shape"):
        assert 0.18 <= share("zero", family) <= 0.30
    assert {q.family for q in asked} == set(PARAPHRASES)
    assert {q.answer for q in asked if q.family == "where"} == set(PLACES)


def test_denied_objects_are_mostly_confusable() -> None:
    rng = rng_of(0)
    shared = []
    for scene in many_scenes(100, num_objects=4):
        colors, shapes = {o.color for o in scene.objects}, {o.shape for o in scene.objects}
        for q in questions(scene, rng, paraphrase=0.0):
            if q.family == "exists" and q.answer == "no":
                color, shape = q.text.rstrip("?").split()[-2:]
                shared.append((color in colors) + (shape in shapes))
    assert sum(number == 2 for number in shared) / len(shared) > 0.6
    assert sum(number >= 1 for number in shared) / len(shared) > 0.75
    assert 0 in shared


# --------------------------------------------------------------------------------- wording


def test_canonical_wordings() -> None:
    slots = {
        "color": "red",
        "shape": "star",
        "shapes": "circles",
        "an_object": "a blue square",
        "object": "red ring",
        "other": "blue star",
        "direction": "left of",
    }
    slots["long_direction"] = "to the left of"
    assert {family: texts[0].format(**slots) for family, texts in PARAPHRASES.items()} == {
        "count": "How many objects are there?",
        "count_color": "How many red objects are there?",
        "count_shape": "How many circles are there?",
        "color": "What color is the star?",
        "shape": "What shape is the red object?",
        "exists": "Is there a blue square?",
        "where": "Where is the red ring?",
        "relation": "Is the red ring left of the blue star?",
        "digit": "What digit is on the red ring?",
        "describe": "Describe the image.",
    }
    for texts in PARAPHRASES.values():
        rendered = {text.format(**slots) for text in texts}
        assert len(rendered) == len(texts) and 3 <= len(texts) <= 5


def test_paraphrases_replace_the_canonical_wording_as_often_as_asked() -> None:
    scene = sample_scene(rng_of(3), 6)
    canonical = {q.text for q in questions(scene, rng_of(0), paraphrase=0.0)}
    for question in questions(scene, rng_of(0), paraphrase=1.0):
        # "above" and "below" have no longer form, so one rewording leaves them as they are.
        if not {"above", "below"} & set(question.text.split()):
            assert question.text not in canonical
    rng = rng_of(1)
    some = [q for _ in range(20) for q in questions(scene, rng, 0.3) if q.family == "where"]
    kept = sum(q.text in canonical for q in some) / len(some)
    assert 0.55 <= kept <= 0.85


def test_a_scene_is_an_rgb_image_of_its_size() -> None:
    scene = sample_scene(rng_of(0))
    image = draw_scene(scene)
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB" and image.size == (scene.width, scene.height)
