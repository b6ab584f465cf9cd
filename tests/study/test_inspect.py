"""`llava-lite inspect`: the picture of a run shows what the trace says, as HTML and as PNG."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import llava_lite
from helpers.fastvithd import FASTVLM, random_fastvlm
from helpers.models import TINY_CONFIG
from llava_lite.checkpoints.info import format_bytes, format_count
from llava_lite.cli.program import main
from llava_lite.generation import trace as figure_trace
from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.inputs.images import load_image
from llava_lite.inputs.pixels import MEAN, STD, preprocess
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction, ToMe
from llava_lite.study import drawing, figure
from llava_lite.study.drawing import Drawing, Group, Lines, Picture, Rect, Shape, Text
from llava_lite.study.figure import COLUMN, COLUMNS, PLOT, draw_run
from llava_lite.study.inspection import InspectError, Inspection, inspect

QUESTION = "What color is the star?"
SVG = "{http://www.w3.org/2000/svg}"
HYBRID = Reduction(ToMe(keep=6), "vtu", FastV(keep=3, layer=2))
WISHES = {
    "none": Reduction(),
    "tome": Reduction(ToMe(keep=5), "logical"),
    "dtome": Reduction(DToMe((0.2, 0.2))),
    "fastv": Reduction(fastv=FastV(drop=0.5, layer=1)),
    "hybrid": HYBRID,
    "hybrid-logical": replace(HYBRID, positions="logical"),
    "per-image": Reduction(ToMe(r=1), "plain", FastV(keep=2, layer=1, per_image=True)),
    "stages": Reduction(fastv=FastV(stages=((1, 8), (2, 3)))),
    "folded": Reduction(ToMe(keep=6), "folded", FastV(keep=3, layer=1, rest="fold")),
    "folded-stages": Reduction(None, "folded", FastV(stages=((1, 8), (2, 3)), rest="fold")),
}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colors with some noise, no two patches alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = pixels + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def shapes_of(shapes: Any, kind: type[Shape]) -> list[Any]:
    """All shapes of a kind, those in groups too."""
    found: list[Any] = []
    for shape in shapes:
        found += [shape] if isinstance(shape, kind) else []
        found += shapes_of(shape.shapes, kind) if isinstance(shape, Group) else []
    return found


def texts(drawn: Drawing) -> list[str]:
    return [text.text for text in shapes_of(drawn.shapes, Text)]


def tokens(drawn: Drawing, column: int) -> list[Group]:
    """The tokens shown in a column, of all images."""
    left, right = COLUMNS[column], COLUMNS[column] + COLUMN
    groups = shapes_of(drawn.shapes, Group)
    return [group for group in groups if left <= group.shapes[0].x < right]


def patch_of(rect: Rect, top: float, grid: int, column: int) -> int:
    side = COLUMN / grid
    return round((rect.y - top) / side) * grid + round((rect.x - COLUMNS[column]) / side)


def panel_tops(drawn: Drawing) -> list[float]:
    """Where the panels of each image start."""
    pictures = shapes_of(drawn.shapes, Picture)
    return [picture.y for picture in pictures if picture.x == COLUMNS[0]]


def elements(html: str) -> ElementTree.Element:
    """The picture inside of a page. Fails where it is no well-formed XML."""
    [svg] = re.findall(r"<svg.*</svg>", html, re.DOTALL)
    return ElementTree.fromstring(svg)


# ---- panels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("size", [(90, 60), (50, 112), (56, 56)])
def test_every_patch_has_the_mean_color_of_its_group(
    tiny_model: Model, wish: str, size: tuple[int, int]
) -> None:
    seen = inspect(tiny_model, photo(*size), QUESTION, reduction=WISHES[wish], max_new_tokens=2)
    drawn, [square] = seen.drawing(), seen.squares
    assert seen.answer.trace is not None
    [image] = seen.answer.trace.images
    pixels, [top] = np.asarray(square, np.float64), panel_tops(drawn)
    colors = {
        patch_of(rect, top, 4, 1): rect.fill
        for group in tokens(drawn, 1)
        for rect in group.shapes
        if isinstance(rect, Rect)
    }
    assert sorted(colors) == list(range(16))
    for patch, group in enumerate(image.groups):
        mine = [member for member, other in enumerate(image.groups) if other == group]
        means = [
            pixels[14 * (m // 4) : 14 * (m // 4 + 1), 14 * (m % 4) : 14 * (m % 4 + 1)].mean((0, 1))
            for m in mine
        ]
        assert np.abs(np.mean(means, 0) - colors[patch]).max() <= 0.5 + 1e-9
    png = drawn.image(1)
    for patch, color in colors.items():
        middle = (COLUMNS[1] + 72 * (patch % 4) + 36, round(top) + 72 * (patch // 4) + 36)
        assert png.getpixel(middle) == color


@pytest.mark.parametrize("wish", ["fastv", "hybrid", "hybrid-logical", "per-image"])
def test_scores_are_colors_and_dropped_patches_are_dimmed(tiny_model: Model, wish: str) -> None:
    seen = inspect(tiny_model, photo(90, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=2)
    drawn, trace = seen.drawing(), seen.answer.trace
    assert trace is not None
    [image], [top] = trace.images, panel_tops(drawn)
    assert image.scores is not None and 0 < len(image.kept) < len(image.sizes)
    shown = tokens(drawn, 2)
    assert len(shown) == len(image.sizes)
    darkness = {}
    for token, group in enumerate(shown):
        patches = [patch for patch, other in enumerate(image.groups) if other == token]
        assert [patch_of(rect, top, 4, 2) for rect in shapes_of(group.shapes, Rect)] == patches
        [color] = {rect.fill for rect in shapes_of(group.shapes, Rect)}
        pure = figure.heat((image.scores[token] / max(image.scores)) ** 0.5)
        if token in image.kept:
            assert color == pure
            assert group.title.endswith(", kept")
            darkness[image.scores[token]] = -sum(color)
        else:
            dimmed = [round(a + 0.8 * (255 - a)) for a in pure]
            assert color == tuple(dimmed)
            assert group.title.endswith(", dropped")
        assert f"score {figure.percent(image.scores[token])}" in group.title
    assert [darkness[score] for score in sorted(darkness)] == sorted(darkness.values())
    lowest = min(image.scores[token] for token in image.kept)
    assert f"kept from {figure.percent(lowest)}" in texts(drawn)
    assert f"{figure.percent(max(image.scores))} of attention" in texts(drawn)
    title = f"{len(image.kept)} tokens kept by FastV, {len(image.sizes) - len(image.kept)} dropped"
    assert title in texts(drawn)


def test_a_dropped_patch_is_lighter_in_the_png(tiny_model: Model) -> None:
    black = Image.new("RGB", (56, 56))
    seen = inspect(tiny_model, black, QUESTION, reduction=WISHES["fastv"], max_new_tokens=2)
    drawn, trace = seen.drawing(), seen.answer.trace
    assert trace is not None
    [image], [top], png = trace.images, panel_tops(drawn), drawn.image(1)
    lightness: dict[bool, list[int]] = {True: [], False: []}
    for patch, kept in enumerate(image.patch_kept()):
        pixel = png.getpixel(
            (COLUMNS[2] + 72 * (patch % 4) + 36, round(top) + 72 * (patch // 4) + 36)
        )
        assert isinstance(pixel, tuple)
        lightness[kept].append(pixel[2])  # blue, which every color of the scale has least of
    assert min(lightness[False]) > max(lightness[True])


def trace_of(seen: Inspection) -> figure_trace.Trace:
    assert seen.answer.trace is not None
    return seen.answer.trace


@pytest.mark.parametrize("wish", ["folded", "folded-stages"])
def test_after_folding_a_patch_has_the_color_of_its_speaker(tiny_model: Model, wish: str) -> None:
    """The mean color of all patches that the kept token stands for, paler where it is folded."""
    seen = inspect(tiny_model, photo(90, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=1)
    drawn, [image] = seen.drawing(), trace_of(seen).images
    [top], pixels = panel_tops(drawn), np.asarray(seen.squares[0], np.float64)
    means = pixels.reshape(4, 14, 4, 14, 3).mean((1, 3)).reshape(16, 3)
    speakers, shown = np.array(image.speakers()), tokens(drawn, 2)[: len(image.sizes)]
    assert len(set(speakers.tolist())) == 3 < len(image.sizes)
    for token, group in enumerate(shown):
        patches = [patch for patch, other in enumerate(image.groups) if other == token]
        assert [patch_of(rect, top, 4, 2) for rect in group.shapes] == patches  # type: ignore[arg-type]
        speaker = image.folded_into[token]
        color = means[speakers == speaker].mean(0)
        if speaker == token:
            weight = int((speakers == token).sum())
            more = f", stands for {weight} patches" if weight > len(patches) else ""
            assert group.title.endswith(f", kept{more}")
        else:
            color = color + 0.35 * (255 - color)
            assert group.title.endswith(f", folded into token {speaker}")
        for rect in shapes_of(group.shapes, Rect):
            assert np.abs(color - rect.fill).max() <= 1
    outline = figure.borders(
        figure.Seen(seen.squares[0], image), speakers.tolist(), COLUMNS[2], top
    )
    assert outline in [lines.segments for lines in shapes_of(drawn.shapes, Lines)]


@pytest.mark.parametrize("wish", ["folded", "folded-stages"])
def test_marks_show_the_score_and_the_weight_of_kept_tokens(tiny_model: Model, wish: str) -> None:
    seen = inspect(tiny_model, photo(90, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=1)
    drawn, [image] = seen.drawing(), trace_of(seen).images
    [top], png = panel_tops(drawn), drawn.image(1)
    assert image.scores is not None
    marks = tokens(drawn, 2)[len(image.sizes) :]
    weights = []
    for mark in marks:
        frame, inside = shapes_of(mark.shapes, Rect)
        [number] = shapes_of(mark.shapes, Text)
        middle = frame.x + frame.width / 2, frame.y + frame.height / 2
        patch = int((middle[1] - top) // 72) * 4 + int((middle[0] - COLUMNS[2]) // 72)
        token = image.groups[patch]
        assert token in image.kept and mark.title == figure.describe_token(image, token)
        assert inside.fill == figure.heat((image.scores[token] / max(image.scores)) ** 0.5)
        assert png.getpixel((round(frame.x) + 2, round(frame.y) + 2)) == inside.fill
        assert number.text == str(image.speakers().count(token))
        weights.append(int(number.text))
    assert len(marks) == len(image.kept)
    assert sum(weights) == 16 and weights == sorted(weights)  # the heaviest on top


def test_a_mark_of_three_digits_stays_inside() -> None:
    """The numbers of neighbors never meet."""
    trace = figure_trace.ImageTrace(
        24, (1,) * 23 + (0,) + (1,) * 552, (1, 575), (), (0.5, 0.1), (0,), (0, 0)
    )
    seen = figure.Seen(Image.new("RGB", (336, 336)), trace)
    mark = figure.weight_mark(seen, 0, figure.ScoreScale(0.5), 100, 200)
    frame, _ = shapes_of(mark.shapes, Rect)
    [number] = shapes_of(mark.shapes, Text)
    assert number.text == "576" and number.color == drawing.PAPER  # on the darkest color
    assert frame.x + frame.width == pytest.approx(100 + COLUMN)
    assert drawing.text_width("576", number.size) < frame.width == seen.side
    pale = figure.weight_mark(seen, 0, figure.ScoreScale(50), 100, 200)
    assert shapes_of(pale.shapes, Text)[0].color == drawing.INK


@pytest.mark.parametrize(
    ("wish", "title"),
    [
        ("stages", "8, then 3 kept"),
        ("folded", "3 tokens kept, rest folded"),
        ("folded-stages", "8, then 3 kept, rest folded"),
    ],
)
def test_titles_name_every_stage_and_the_rest(tiny_model: Model, wish: str, title: str) -> None:
    images, reduction = [photo(60, 60, 1), photo(40, 90, 2)], WISHES[wish]
    seen = inspect(tiny_model, images[0], QUESTION, reduction=reduction, max_new_tokens=1)
    shown, trace = texts(seen.drawing()), trace_of(seen)
    assert title in shown
    several = len(trace.prune_layers) > 1
    assert any("kept from" in text for text in shown) == (not several)
    assert any(text.endswith("of attention in layer 0") for text in shown) == several
    assert ("numbers: patches of a kept token; pale: folded" in shown) == ("folded" in wish)
    # Stages count the tokens of all images together, so a panel has its own number alone.
    both = inspect(tiny_model, images, QUESTION, reduction=reduction, max_new_tokens=1)
    for image in trace_of(both).images:
        kept = figure.count(len(image.kept), "token")
        dropped = len(image.sizes) - len(image.kept)
        rest = ", rest folded" if "folded" in wish else f" by FastV, {dropped} dropped"
        assert f"{kept} kept{rest}" in texts(both.drawing())


def test_an_image_that_keeps_all_tokens_is_drawn_as_the_others(tiny_model: Model) -> None:
    images = [photo(60, 60, 1), photo(40, 90, 2)]
    seen = inspect(tiny_model, images, QUESTION, reduction=WISHES["folded"], max_new_tokens=1)
    first, second = trace_of(seen).images
    everything = tuple(range(len(second.sizes)))
    whole = replace(second, kept=everything, folded_into=everything)
    trace = replace(trace_of(seen), images=(first, whole))
    answer = Answer("yes", seen.answer.finish_reason, trace=trace)
    drawn = replace(seen, answer=answer).drawing()
    assert texts(drawn).count("numbers: patches of a kept token; pale: folded") == 2
    assert len(tokens(drawn, 2)) == len(first.sizes) + len(first.kept) + 2 * len(everything)


@pytest.mark.parametrize(
    ("into", "fate"),
    [
        ((0, 1), "kept"),
        ((0, 0), "kept, stands for 4 patches"),
        ((1, 1), "folded into token 1"),
        ((None, 1), "dropped"),
    ],
)
def test_a_token_in_words(into: tuple[int | None, ...], fate: str) -> None:
    trace = figure_trace.ImageTrace(2, (0, 1, 1, 1), (1, 3), (), (0.5, 0.1), (), into)
    assert figure.describe_token(trace, 0) == f"token 0, 1 patch, score 50 %, {fate}"
    unpruned = replace(trace, scores=None)
    assert figure.describe_token(unpruned, 0) == "token 0, 1 patch"


@pytest.mark.parametrize("wish", ["none", "tome"])
def test_without_fastv_nothing_is_dropped(tiny_model: Model, wish: str) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=2)
    assert "Nothing dropped" in texts(seen.drawing())
    assert tokens(seen.drawing(), 2) == []
    assert not any("of attention" in text for text in texts(seen.drawing()))


def test_group_borders_are_drawn_where_groups_meet() -> None:
    rng = np.random.default_rng(1)
    for grid in (2, 4, 7):
        groups = rng.integers(-1, 3, (grid, grid))
        trace = figure_trace.ImageTrace(
            grid, tuple(groups.flatten().tolist()), (), (), None, (), ()
        )
        seen = figure.Seen(Image.new("RGB", (grid, grid)), trace)
        segments = figure.borders(seen, trace.groups, 100, 200)
        expected = set()  # the unit edges between patches, one by one
        around = np.pad(groups, 1, constant_values=-1)
        for row in range(grid + 1):
            for column in range(grid + 1):
                here = around[row + 1, column + 1]
                if column < grid and around[row, column + 1] != here:
                    expected.add(("h", row, column))
                if row < grid and around[row + 1, column] != here:
                    expected.add(("v", row, column))
        found = []
        for x1, y1, x2, y2 in segments:
            column, row = round((x1 - 100) * grid / COLUMN), round((y1 - 200) * grid / COLUMN)
            across, down = round((x2 - x1) * grid / COLUMN), round((y2 - y1) * grid / COLUMN)
            assert (across == 0) != (down == 0)
            found += [("h", row, column + i) for i in range(across)]
            found += [("v", row + i, column) for i in range(down)]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_only_kept_tokens_are_outlined(tiny_model: Model) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, reduction=HYBRID, max_new_tokens=1)
    drawn, trace = seen.drawing(), seen.answer.trace
    assert trace is not None
    [image], [top] = trace.images, panel_tops(drawn)
    [outline] = [
        lines
        for lines in shapes_of(drawn.shapes, Lines)
        if lines.color == drawing.INK
        and all(COLUMNS[2] <= x and top <= y <= top + COLUMN for x, y, _, _ in lines.segments)
    ]
    marks = [token if token in image.kept else -1 for token in image.groups]
    assert outline.segments == figure.borders(
        figure.Seen(seen.squares[0], image), marks, COLUMNS[2], top
    )


# ---- the picture that the model saw ------------------------------------------------------------


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(90, 41), (40, 97)])
def test_the_square_is_what_the_model_saw(
    tiny_model: Model, pad: bool, size: tuple[int, int]
) -> None:
    model = Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, pad=pad))
    source = photo(*size)
    [square] = inspect(model, source, QUESTION, max_new_tokens=1).squares
    pixel_values = preprocess(source, 56, pad)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    shown = ((pixel_values[0] * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(np.asarray(square), shown.numpy())


@pytest.mark.parametrize("exif", [True, False])
def test_the_square_is_turned_as_the_camera_says(
    tiny_model: Model, tmp_path: Path, exif: bool
) -> None:
    note = Image.Exif()
    note[274] = 6
    photo(80, 40).save(tmp_path / "turned.png", exif=note)
    model = Model(tiny_model.llava, tiny_model.tokenizer, exif=exif)
    [square] = inspect(model, tmp_path / "turned.png", QUESTION, max_new_tokens=1).squares
    bars = np.asarray(square)[28, 0], np.asarray(square)[0, 28]
    padded = [tuple(bar) == (122, 116, 104) for bar in bars]
    assert padded == ([True, False] if exif else [False, True])


def test_the_page_carries_the_square_itself(tiny_model: Model) -> None:
    seen = inspect(tiny_model, photo(90, 60), QUESTION, max_new_tokens=1)
    [image] = elements(seen.html()).iter(f"{SVG}image")
    kind, data = image.attrib["href"].split(",")
    assert kind == "data:image/png;base64"
    carried = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(carried), np.asarray(seen.squares[0]))


# ---- numbers -----------------------------------------------------------------------------------


def heights(drawn: Drawing, column: int, color: drawing.Color) -> list[float]:
    """Of the bars of a chart in this color, from left to right."""
    bars = [
        rect
        for rect in drawn.shapes
        if isinstance(rect, Rect) and rect.fill == color and rect.height != 9
        if COLUMNS[column] <= rect.x < COLUMNS[column] + COLUMN
    ]
    return [bar.height for bar in sorted(bars, key=lambda bar: bar.x)]


@pytest.mark.parametrize("wish", WISHES)
def test_charts_and_numbers_are_those_of_the_trace(tiny_model: Model, wish: str) -> None:
    seen = inspect(tiny_model, photo(90, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=3)
    drawn, answer, trace = seen.drawing(), seen.answer, seen.answer.trace
    assert trace is not None
    [image] = trace.images
    text = answer.usage["prompt_tokens"]
    most = text + 16
    blues = heights(drawn, 1, figure.BLUE)
    assert blues == pytest.approx([PLOT * rows / most for rows in trace.rows_per_layer])
    assert heights(drawn, 1, figure.SLATE) == pytest.approx([PLOT * text / most] * 3)
    tower = [16, *image.tokens_per_block]
    light = figure.blend(figure.BLUE, drawing.PAPER, 0.55)
    assert heights(drawn, 0, light) == pytest.approx([PLOT * count / 16 for count in tower])

    shown = texts(drawn)
    decoder = trace.decoder_flops["gated"]
    kv_share = trace.kv_bytes / trace.kv_bytes_unreduced
    assert f"{100 * kv_share:.0f} %, {format_bytes(trace.kv_bytes)}" in shown
    assert f"{100 * decoder.ratio:.0f} %, {format_count(decoder.total)} FLOPs" in shown
    tower_flops = trace.tower_flops
    assert f"{100 * tower_flops.ratio:.0f} %, {format_count(tower_flops.total)} FLOPs" in shown
    assert f"{text} text" in shown
    assert f"{tower[-1]} tokens after 2 blocks" in shown
    counts = list(dict.fromkeys(rows - text for rows in trace.rows_per_layer))
    assert f"{', then '.join(map(str, counts))} image" in shown
    for phase in ("preprocess", "vision", "prefill", "decode"):
        assert figure.duration(answer.timings[phase]) in shown
    total = sum(answer.timings[p] for p in ("preprocess", "vision", "prefill", "decode"))
    number = answer.usage["completion_tokens"]
    tokens_made = "1 new token" if number == 1 else f"{number} new tokens"
    cut = ", then cut" if answer.finish_reason == "length" else ""
    assert f"Time: {figure.duration(total)} for {tokens_made}{cut}" in shown


def test_positions_are_shown_where_they_are_not_the_rows(tiny_model: Model) -> None:
    for positions, expected in (("vtu", True), ("logical", False)):
        wish = replace(HYBRID, positions=positions)
        seen = inspect(tiny_model, photo(60, 60), QUESTION, reduction=wish, max_new_tokens=1)
        trace = seen.answer.trace
        assert trace is not None
        counts = ", then ".join(dict.fromkeys(map(str, trace.positions_per_layer)))
        assert (f"{counts} positions in attention" in texts(seen.drawing())) == expected


def test_charts_of_several_images(tiny_model: Model) -> None:
    images = [photo(60, 60, 1), Image.new("RGB", (60, 60), "navy"), photo(40, 90, 2)]
    seen = inspect(tiny_model, images, QUESTION, reduction=WISHES["dtome"], max_new_tokens=1)
    trace = seen.answer.trace
    assert trace is not None
    left = [len(image.sizes) for image in trace.images]
    assert len(set(left)) > 1
    shown = texts(seen.drawing())
    ends = ", ".join(dict.fromkeys(map(str, sorted(left, key=left.index))))
    assert f"{ends} tokens after 2 blocks" in shown
    assert f"48 patches, {sum(left)} tokens" in shown


def test_several_images_have_panels_each(tiny_model: Model) -> None:
    images = [photo(60, 60, 1), photo(40, 90, 2)]
    one = inspect(tiny_model, images[0], QUESTION, reduction=HYBRID, max_new_tokens=1).drawing()
    seen = inspect(tiny_model, images, QUESTION, reduction=HYBRID, max_new_tokens=1)
    drawn, trace = seen.drawing(), seen.answer.trace
    assert trace is not None
    tops = panel_tops(drawn)
    assert len(tops) == 2 and drawn.height - one.height == pytest.approx(tops[1] - tops[0])
    assert "What the model sees, image 2 of 2" in texts(drawn)
    assert len(tokens(drawn, 1)) == 12
    first, second = [p for p in shapes_of(drawn.shapes, Picture) if p.x == COLUMNS[0]]
    assert (first.image, second.image) == seen.squares
    high = max(score for image in trace.images for score in image.scores or ())
    assert texts(drawn).count(f"{figure.percent(high)} of attention") == 2
    assert "What the model sees" in texts(one)


@pytest.fixture(scope="module")
def fastvlm(tiny_tokenizer: Tokenizer) -> Model:
    """The weights of a tiny FastVLM, for images of 1024 px."""
    config = replace(FASTVLM, text=replace(FASTVLM.text, max_positions=512)).at(1024)
    return Model(random_fastvlm(), tiny_tokenizer, config)


@pytest.mark.parametrize(("size", "grid"), [(None, 16), (512, 8), (256, 4)])
def test_a_smaller_image_has_a_coarser_grid(fastvlm: Model, size: int | None, grid: int) -> None:
    options: Any = {"image_size": size, "max_new_tokens": 2}
    drawn = inspect(fastvlm, photo(90, 60), QUESTION, **options).drawing()
    side, shown = size or 1024, texts(drawn)
    assert f"{side} x {side} pixels, {grid} x {grid} patches" in shown
    assert shown[0] == ("no reduction" if size is None else f"no reduction at {size} px")
    assert len(tokens(drawn, 1)) == grid**2
    assert all(rect.width == COLUMN / grid for rect in shapes_of(tokens(drawn, 1), Rect))
    assert {"Tokens behind the vision tower", "nothing merges"} <= set(shown)


@pytest.mark.parametrize("positions", ["logical", "vtu", "folded"])
def test_rounds_stand_in_the_place_of_blocks(fastvlm: Model, positions: str) -> None:
    wish, options = Reduction(ToMe(keep=20), positions), {"image_size": 512, "max_new_tokens": 2}
    seen = inspect(fastvlm, photo(90, 60), QUESTION, reduction=wish, **options)
    assert trace_of(seen).images[0].tokens_per_block == (40, 20)
    shown = texts(seen.drawing())
    assert {"custom reduction at 512 px", "20 tokens after 2 rounds"} <= set(shown)
    assert not any("nothing merge" in text or "block" in text for text in shown)
    assert heights(seen.drawing(), 0, figure.blend(figure.BLUE, figure.PAPER, 0.55)) == (
        pytest.approx([PLOT * count / 64 for count in (64, 40, 20)])
    )


# ---- words -------------------------------------------------------------------------------------


def test_header_names_the_reduction(tiny_model: Model) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=1)
    assert {"no reduction", "random", "16 patches, 16 tokens"} <= set(texts(seen.drawing()))
    named = replace(seen, reduction=REDUCTIONS["hybrid-72-36"])
    assert "hybrid-72-36" in texts(named.drawing())
    custom = replace(seen, reduction=HYBRID, model="a/long " * 90)
    assert "custom reduction" in texts(custom.drawing())
    [model] = [text for text in shapes_of(custom.drawing().shapes, Text) if "a/long" in text.text]
    assert drawing.text_width(model.text, model.size) <= COLUMN


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (Reduction(), "every image token, in every layer"),
        (Reduction(ToMe(keep=72)), "ToMe keeps 72, vtu positions"),
        (Reduction(ToMe(r=21), "plain"), "ToMe merges 21 per block, plain positions"),
        (Reduction(DToMe(), "logical"), "DToMe merges by likeness, logical positions"),
        (Reduction(fastv=FastV(drop=0.7)), "FastV drops 70 % from layer 3 on"),
        (
            Reduction(fastv=FastV(keep=36, layer=2, per_image=True)),
            "FastV keeps 36 of each image from layer 2 on",
        ),
        (
            REDUCTIONS["fastv-72-folded"],
            "folded positions, FastV keeps 72 from layer 3 on, rest folded",
        ),
        (
            REDUCTIONS["folded-72-36-18"],
            "ToMe keeps 72, folded positions, FastV keeps 36 from layer 1, then 18 from layer 3 "
            "on, rest folded",
        ),
        (
            Reduction(fastv=FastV(stages=((1, 9), (2, 0.5), (3, 0.25)))),
            "FastV keeps 9 from layer 1, then drops 50 % from layer 2, then 25 % from layer 3 on",
        ),
    ],
)
def test_a_reduction_in_words(reduction: Reduction, expected: str) -> None:
    assert figure.describe_reduction(reduction) == expected


def test_a_long_reduction_has_several_lines(tiny_model: Model) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=1)
    fastv = FastV(stages=tuple((layer, 900 - layer) for layer in range(1, 12)))
    long = replace(seen, reduction=Reduction(fastv=fastv)).drawing()
    [counts] = [text for text in shapes_of(long.shapes, Text) if text.anchor == "end"][1:2]
    lines = [t for t in shapes_of(long.shapes, Text) if t.x == 40 and t.size == 15 and t.y < 200]
    assert " ".join(t.text for t in lines).startswith(
        figure.describe_reduction(Reduction(fastv=fastv))
    )
    left = counts.x - drawing.text_width(counts.text, counts.size)
    assert all(t.x + drawing.text_width(t.text, t.size) < left for t in lines)
    wrapped = long.height - seen.drawing().height
    assert wrapped > 0 and wrapped % 20 == 0


def test_pruned_layers_are_marked(tiny_model: Model) -> None:
    """Labels that would overlap are left out."""
    reduction = WISHES["folded-stages"]
    seen = inspect(tiny_model, photo(60, 60), QUESTION, reduction=reduction, max_new_tokens=1)
    rows = trace_of(seen).rows_per_layer
    for layers, pruned, expected in (
        (3, (1, 2), ["0", "1", "2"]),
        (32, (1, 3), ["1", "3", "31"]),
        (32, (3, 16), ["0", "3", "16", "31"]),
        (32, (20, 21), ["0", "20", "31"]),
        (80, (79,), ["0", "79"]),
    ):
        many = replace(trace_of(seen), prune_layers=pruned, rows_per_layer=rows[:1] * layers)
        shapes, _ = figure.decoder_chart(replace(many, positions_per_layer=rows[:1] * layers), 0)
        labels = [text for text in shapes_of(shapes, Text) if text.anchor == "middle"]
        labels.sort(key=lambda text: text.x)
        assert [text.text for text in labels] == expected


NASTY = {
    "markup": "<script>alert(1)</script> & </svg> ]]> <!-- \"quoted\" 'text'",
    "lines": "first\nsecond\r\n\n\tthird",
    "emoji": "smile \U0001f600 \U0001f469\u200d\U0001f680 \u4e2d\u6587 \u0627\u0644 e\u0301",
    "control": "bell \x07 null \x00 escape \x1b[31m next\x85line \ufffe",
    "surrogate": "half \ud83d of a pair",
    "empty": "",
}


@pytest.mark.parametrize("name", NASTY)
def test_any_text_is_escaped_and_drawn(tiny_model: Model, name: str) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=1)
    text = NASTY[name]
    answer = Answer(text, seen.answer.finish_reason, trace=seen.answer.trace)
    strange = replace(seen, prompt=text, answer=answer, model=text)
    svg = elements(strange.html())
    words = [word for line in svg.iter(f"{SVG}text") for word in "".join(line.itertext()).split()]
    invalid = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe]")
    for word in text.split():
        assert words.count(invalid.sub("\ufffd", word)) >= 2
    assert not list(svg.iter(f"{SVG}script"))
    strange.html().encode()  # raises where half a surrogate pair is left
    nothing = Answer("", seen.answer.finish_reason, trace=seen.answer.trace)
    blank = replace(strange, prompt="", answer=nothing)
    assert strange.png(1).width == figure.WIDTH
    assert (strange.png(1) == replace(blank, model=text).png(1)) == (text == "")


@pytest.mark.parametrize("words", [60, 900])
def test_long_texts_are_wrapped_and_the_longest_are_cut(tiny_model: Model, words: int) -> None:
    """The page's title has all of them."""
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=1)
    prompt = " ".join(f"word{number}" for number in range(words)) + " " + "x" * words
    long = replace(seen, prompt=prompt, answer=Answer("yes " * words, trace=seen.answer.trace))
    drawn = long.drawing()
    lines = [text for text in shapes_of(drawn.shapes, Text) if text.x == 40 + figure.INDENT]
    shown = [line.text for line in lines]
    if words == 60:
        assert "".join(shown).replace(" ", "") == (prompt + "yes" * words).replace(" ", "")
    else:
        width = figure.WIDTH - 2 * 40 - figure.INDENT
        for part, text in ((shown[:8], prompt), (shown[8:], "yes " * words)):
            every = drawing.wrap(text, width, lines[0].size)
            assert part == [*every[:7], f"... ({len(every) - 7} more lines)"]
    for text in (prompt, "yes " * words):
        assert text in drawn.title
    for line in lines:
        assert line.x + drawing.text_width(line.text, line.size) <= figure.WIDTH - 40
    bases = [line.y for line in lines]
    assert bases == sorted(set(bases))
    assert bases[-1] < panel_tops(drawn)[0] - 30
    assert seen.drawing().height + 60 < drawn.height < seen.drawing().height + 350


def test_wrap() -> None:
    width = drawing.text_width("three words here", 10)
    assert drawing.wrap("three words here and more", width, 10) == ["three words here", "and more"]
    assert drawing.wrap("a\n\nb", 100, 10) == ["a", "", "b"]
    assert drawing.wrap("", 100, 10) == [""]
    assert drawing.wrap("iii" * 3, drawing.text_width("iii", 10), 10) == ["iii"] * 3
    assert drawing.wrap("WW", 0.1, 10) == ["W", "W"]


def test_a_text_is_made_smaller_only_if_it_is_too_wide() -> None:
    width = drawing.text_width("kept", 16)
    assert figure.fit_size("kept", 16, width) == figure.fit_size("kept", 16, 999) == 16
    assert figure.fit_size("kept", 16, width / 2) == pytest.approx(8)


def test_letters_that_no_font_has_are_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "OTHER_FONTS", ("No Such Font.ttf",))
    for cached in (drawing.face, drawing.find_face):
        cached.cache_clear()
    wide = Drawing(60, 20, [Text(5, 15, "\u4e2d\u6587", 13)]).image(2)
    box = wide.convert("L").point(lambda shade: 255 if shade < 128 else 0).getbbox()
    assert box is not None and box[0] >= 10 and 40 <= box[2] - box[0] <= 52
    assert Drawing(60, 20, [Text(5, 15, "\u200d", 13)]).image() == Drawing(60, 20, []).image()
    assert drawing.text_width("\u4e2d", 13) == 13
    for cached in (drawing.face, drawing.find_face):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0.0 ms"), (0.00042, "0.4 ms"), (0.0351, "35 ms"), (1.239, "1.24 s"), (75, "75.00 s")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert figure.duration(seconds) == expected


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", WISHES)
def test_the_page_refers_to_nothing_outside(tiny_model: Model, wish: str) -> None:
    images = [photo(90, 60), photo(60, 90)]
    html = inspect(tiny_model, images, QUESTION, reduction=WISHES[wish], max_new_tokens=1).html()
    svg = elements(html)
    for element in svg.iter():
        assert element.tag.startswith(SVG)
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert "href" not in name or value.startswith("data:image/png;base64,")
    addresses = re.findall(r"url\((.{5})", html)
    assert addresses and set(addresses) == {"data:"}
    assert re.findall(r"https?://[^\"]*", html) == ["http://www.w3.org/2000/svg"]
    for word in ("<script", "<link", "<iframe", "@import", "src="):
        assert word not in html
    assert "default-src 'none'" in html


@pytest.mark.parametrize("wish", ["hybrid", "folded"])
def test_page_and_png_show_the_same(tiny_model: Model, wish: str) -> None:
    """Every shape is in both: one by one they change the page and the image."""
    seen = inspect(tiny_model, photo(90, 60), QUESTION, reduction=WISHES[wish], max_new_tokens=2)
    drawn = seen.drawing()
    svg = ElementTree.fromstring(drawn.svg())
    kinds = {"rect": Rect, "text": Text, "path": Lines, "image": Picture, "g": Group}
    expected = {tag: len(shapes_of(drawn.shapes, kind)) for tag, kind in kinds.items()}
    expected["rect"] += 1  # the paper
    assert {tag: len(list(svg.iter(SVG + tag))) for tag in kinds} == expected
    assert [line.text for line in svg.iter(f"{SVG}text")] == texts(drawn)
    blank = Drawing(drawn.width, drawn.height, []).image(1)
    for shape in drawn.shapes:
        empty = isinstance(shape, Rect) and min(shape.width, shape.height) < 0.5
        alone = Drawing(drawn.width, drawn.height, [shape]).image(1)
        white = isinstance(shape, Lines) and shape.color == drawing.PAPER
        assert (alone == blank) == (empty or white), shape


@pytest.mark.parametrize("scale", [1, 1.5, 2])
def test_png_has_the_size_of_the_drawing(tiny_model: Model, scale: float) -> None:
    seen = inspect(tiny_model, photo(90, 60), QUESTION, max_new_tokens=1)
    drawn = seen.drawing()
    assert seen.png(scale).size == (round(drawn.width * scale), round(drawn.height * scale))
    viewed = [float(side) for side in elements(seen.html()).attrib["viewBox"].split()]
    assert viewed == pytest.approx([0, 0, drawn.width, drawn.height], abs=0.005)
    assert f"<svg xmlns={SVG[1:-1]!r}".replace("'", '"') in seen._repr_html_()


def test_shapes_that_touch_in_units_touch_in_pixels() -> None:
    third = 10 / 3
    row = [Rect(i * third, 0, third, 10, (0, 0, 0)) for i in range(3)]
    image = Drawing(10, 10, row).image(1.7)
    assert image.getextrema() == ((0, 0),) * 3
    cross = Lines(((0, 5, 10, 5), (5, 0, 5, 10)), (0, 0, 0), 2, 0.5)
    assert len(Drawing(10, 10, [cross]).image(1).getcolors() or []) == 2


def test_save_writes_both_and_nothing_twice(tiny_model: Model, tmp_path: Path) -> None:
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=1)
    seen.save(tmp_path / "run.html")
    seen.save(str(tmp_path / "run.PNG"))
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == seen.html()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "run.PNG")), np.asarray(seen.png()))
    with pytest.raises(InspectError, match="already exists"):
        seen.save(tmp_path / "run.html")
    replace(seen, prompt="Something else?").save(tmp_path / "run.html", force=True)
    assert "Something else?" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.PNG", "run.html"]
    with pytest.raises(ValueError, match=r"run.jpg: .* \.html or \.png"):
        seen.save(tmp_path / "run.jpg")


# ---- bad input ---------------------------------------------------------------------------------


def test_inspect_refuses_what_it_cannot_show(tiny_model: Model) -> None:
    for nothing in (None, []):
        with pytest.raises(llava_lite.ImageError, match="without an image"):
            inspect(tiny_model, nothing, QUESTION)
    with pytest.raises(llava_lite.ImageError, match="no pixels to show"):
        inspect(tiny_model, tiny_model.encode(photo(60, 60)), QUESTION)
    with pytest.raises(llava_lite.PromptError, match="not a list"):
        inspect(tiny_model, photo(60, 60), [QUESTION])  # type: ignore[arg-type]
    with pytest.raises(llava_lite.ImageError, match="nowhere.png"):
        inspect(tiny_model, "nowhere.png", QUESTION)
    with pytest.raises(ValueError, match="unknown reduction"):
        inspect(tiny_model, photo(60, 60), QUESTION, reduction="nonsense")


def test_it_runs_once_before_the_run_that_is_shown(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first tokens of a long answer, as it runs then; and not at all with options that
    the second run would refuse."""
    runs: list[tuple[bool, int]] = []
    run = Model.run

    def watched(self: Model, requests: Any, options: Any, *rest: Any) -> Any:
        index = len(runs)
        runs.append((options.trace, 0))
        for found in run(self, requests, options, *rest):
            runs[index] = (options.trace, runs[index][1] + 1)
            yield found

    monkeypatch.setattr(Model, "run", watched)
    seen = inspect(tiny_model, photo(60, 60), QUESTION, max_new_tokens=40, batch_size=2)
    assert seen.answer.usage["completion_tokens"] == 40
    (first, some), (second, every) = runs
    assert first and second and 2 <= some < every

    runs.clear()
    wrong: list[tuple[dict[str, int], type[Exception]]] = [
        ({"max_new_tokens": 10_000}, llava_lite.ContextError),
        ({"max_new_tokens": 0}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"nonsense": 1}, TypeError),
    ]
    for option, error in wrong:
        with pytest.raises(error):
            inspect(tiny_model, photo(60, 60), QUESTION, **option)
    assert not runs


def test_drawing_needs_a_trace_of_the_same_images(tiny_model: Model) -> None:
    image = load_image(photo(56, 56))
    plain = tiny_model.generate(image, QUESTION, max_new_tokens=1)
    with pytest.raises(ValueError, match="trace=True"):
        draw_run([image], QUESTION, plain, Reduction(), "m")
    traced = tiny_model.generate(image, QUESTION, max_new_tokens=1, trace=True)
    with pytest.raises(ValueError, match="2 pictures for an answer about 1 images"):
        draw_run([image, image], QUESTION, traced, Reduction(), "m")


def test_the_front_door(tiny_model: Model) -> None:
    seen = llava_lite.inspect(photo(60, 60), QUESTION, tiny_model, max_new_tokens=2, trace=False)
    assert isinstance(seen, llava_lite.Inspection) and llava_lite.Inspection is Inspection
    assert seen.answer == tiny_model.generate(photo(60, 60), QUESTION, max_new_tokens=2)
    assert seen.answer.trace is not None


# ---- command line ------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photo(80, 50).save(path)
    return path


def run(model: Path, *arguments: Any) -> int:
    shared = ["-m", str(model), "-p", QUESTION, "-n", "3", "--threads", "1"]
    return main(["inspect", *map(str, arguments), *shared])


def test_command_writes_the_picture_and_prints_the_answer(
    model_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-i", picture, "--merge", "tome:6", "--fastv-k", "3", "--fastv-layer", "1"]
    for name in ("run.html", "run.png"):
        assert run(model_folder, *flags, "-o", tmp_path / name) == 0
        printed = capsys.readouterr()
        assert printed.err == f"{tmp_path / name}: written\n"
        wish = Reduction(ToMe(keep=6), fastv=FastV(keep=3, layer=1))
        model = llava_lite.load(model_folder)
        seen = inspect(model, picture, QUESTION, reduction=wish, max_new_tokens=3)
        assert printed.out == f"{seen.answer}\n"
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "3 tokens kept by FastV, 3 dropped" in page
    assert Image.open(tmp_path / "run.png").size == seen.png().size


def test_command_prepares_images_as_the_flags_say(
    model_folder: Path, picture: Path, tmp_path: Path
) -> None:
    squares = []
    for name, flags in (("padded.html", []), ("cropped.html", ["--no-pad"])):
        assert run(model_folder, "-i", picture, "-o", tmp_path / name, *flags, "--quiet") == 0
        page = (tmp_path / name).read_text(encoding="utf-8")
        [image] = elements(page).iter(f"{SVG}image")
        data = base64.b64decode(image.attrib["href"].partition(",")[2])
        squares.append(Image.open(io.BytesIO(data)).getpixel((28, 0)))
    assert squares[0] == (122, 116, 104) != squares[1]


def test_command_quiet_and_stats(
    model_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_folder, "-i", picture, "-o", tmp_path / "a.png", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run(model_folder, "-i", picture, "-o", tmp_path / "b.png", "--stats") == 0
    assert "image tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-i", "x.png", "-o", "out.jpg"], "out.jpg: the picture must end in .html or .png"),
        (["-i", "x.png", "-o", "out"], ".html or .png"),
        (["-i", "x.png"], "-o"),
        (["-o", "out.png"], "an image is needed"),
        (["-i", "x.png", "-o", "out.png", "--fastv-layer", "two"], "two"),
    ],
)
def test_command_wrong_usage(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("nowhere", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: llava-lite inspect ")
    assert named in printed.err.splitlines()[-1]


def test_command_checks_the_output_before_any_work(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    cases = {
        "there.png": "already exists",
        "folder.png": "is a folder",
        "missing/run.png": "does not exist",
    }
    for name, reason in cases.items():
        assert run("nowhere", "-i", picture, "-o", tmp_path / name) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert name in printed.err and reason in printed.err
    assert (tmp_path / "there.png").read_bytes() == b"mine"


def test_command_force_replaces(model_folder: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "run.png").write_bytes(b"mine")
    assert run(model_folder, "-i", picture, "-o", tmp_path / "run.png", "--force") == 0
    assert Image.open(tmp_path / "run.png").format == "PNG"


def test_command_leaves_nothing_of_a_run_that_fails(
    model_folder: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run.html"
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:90])
    for source in ("broken.png", "missing.png"):
        assert run(model_folder, "-i", tmp_path / source, "-o", output) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and source in printed.err and printed.err.count("\n") == 1
    assert run(model_folder, "-i", picture, "-o", output, "--merge", "tome:99") == 1
    assert "keep 99 must be in" in capsys.readouterr().err

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run(model_folder, "-i", picture, "-o", output) == 1
    printed = capsys.readouterr()
    assert printed.out.strip()  # the answer is not lost
    assert printed.err == "error: No space left on device\n"
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png", "photo.png"}
