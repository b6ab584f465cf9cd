"""The picture of a run: the image as the model sees it, its tokens, time and memory.

    the reduction, the prompt, the answer
    for each image      the square | its tokens after merging | FastV's scores and kept tokens,
                        or after folding: the kept token that stands for each patch
    for the whole run   tokens in the tower | tokens in the decoder | time and memory

All figures come from the answer's trace (trace.py). Each section returns its shapes and the y below
them. P patches of an image, U tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from llava_lite.checkpoints.info import format_bytes, format_count
from llava_lite.generation.answer import Answer
from llava_lite.generation.trace import ImageTrace, Trace
from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction
from llava_lite.study.drawing import (
    INK,
    PAPER,
    Color,
    Drawing,
    Group,
    Lines,
    Picture,
    Rect,
    Segment,
    Shape,
    Text,
    text_width,
    wrap,
)

Section = tuple[list[Shape], float]

# Three columns; 288 is 12 units for each of 24 patches.
MARGIN, COLUMN, GAP = 40, 288, 28
COLUMNS = tuple(MARGIN + index * (COLUMN + GAP) for index in range(3))
WIDTH = COLUMNS[2] + COLUMN + MARGIN
INDENT = 72  # of prompt and answer, after their labels
MOST_LINES = 8  # of prompt and answer each
PLOT = 130  # height of a chart

GRAY: Color = (101, 109, 118)
RULE: Color = (216, 222, 228)
EMPTY: Color = (241, 243, 245)
BLUE: Color = (64, 120, 192)
SLATE: Color = (168, 178, 190)

# Colors of scores from low to high: light to dark, so they differ without their hues too.
HEAT: tuple[Color, ...] = (
    (253, 240, 190),
    (250, 196, 96),
    (236, 128, 52),
    (200, 52, 44),
    (112, 14, 48),
)
KEPT_OPACITY, DROPPED_OPACITY = 0.8, 0.85
DIMMED = 0.8  # share of white in a dropped patch
PALE = 0.35  # and in a folded one
LARGEST_MARK = 16  # height of the mark on a kept token
DARK = 350  # a color whose parts add up to less needs white letters

PHASES = {"preprocess": "prepare", "vision": "vision", "prefill": "prefill", "decode": "decode"}


@dataclass(frozen=True)
class Seen:
    """One image of a run: the square that the model saw and its trace. name: which one of several
    images it is."""

    square: Image.Image
    trace: ImageTrace
    name: str = ""

    @property
    def side(self) -> float:
        """The side of a patch on the drawing."""
        return COLUMN / self.trace.grid

    def cell(self, patch: int) -> tuple[int, int]:
        """Row and column of a patch."""
        return divmod(patch, self.trace.grid)


def draw_run(
    squares: Sequence[Image.Image],
    prompt: str,
    answer: Answer,
    reduction: Reduction,
    model: str,
) -> Drawing:
    """The picture of a run. squares: each image as the model saw it (`pixels.to_square`); model:
    its name. Raises ValueError for an answer without a trace, or about other images."""
    trace, total = answer.trace, len(squares)
    if trace is None:
        raise ValueError("the answer has no trace: generate it with trace=True")
    if total != len(trace.images):
        raise ValueError(f"{total} pictures for an answer about {len(trace.images)} images")
    shapes, y = header(reduction, model, trace)
    more, y = question(prompt, answer, y)
    shapes += more
    for number, (square, image) in enumerate(zip(squares, trace.images, strict=True), start=1):
        name = f"image {number} of {total}" if total > 1 else ""
        more, y = panels(Seen(square, image, name), trace, y)
        shapes += more
    charts = (tower_chart(trace, y), decoder_chart(trace, y), costs(answer, trace, y))
    for more, _ in charts:
        shapes += more
    bottom = max(below for _, below in charts)
    return Drawing(WIDTH, bottom + MARGIN, shapes, title=f"{prompt} - {answer}")


# ---- words -------------------------------------------------------------------------------------


def header(reduction: Reduction, model: str, trace: Trace) -> Section:
    """The names of the reduction and the model, and the numbers of tokens."""
    right, size = COLUMNS[2] + COLUMN, reduction.image_size
    own_size = replace(reduction, image_size=None)
    name = str(own_size) if own_size in REDUCTIONS.values() else "custom reduction"
    if own_size == REDUCTIONS["none"]:
        name = "no reduction"
    name += f" at {size} px" if size else ""
    counts = token_counts(trace)
    lines = wrap(describe_reduction(reduction), right - MARGIN - text_width(counts, 15) - GAP, 15)
    below = 82 + 20 * len(lines)
    shapes: list[Shape] = [
        Text(MARGIN, 60, name, 26, bold=True),
        Text(right, 60, wrap(model, COLUMN, 15)[0], 15, GRAY, "end"),
        *(Text(MARGIN, 84 + 20 * i, line, 15, GRAY) for i, line in enumerate(lines)),
        Text(right, 84, counts, 15, GRAY, "end"),
        Lines(((MARGIN, below, right, below),), RULE),
    ]
    return shapes, below


def describe_reduction(reduction: Reduction) -> str:
    """A reduction in one line."""
    merge, fastv, parts = reduction.merge, reduction.fastv, []
    if isinstance(merge, DToMe):
        parts.append("DToMe merges by likeness")
    elif merge is not None and merge.keep is not None:
        parts.append(f"ToMe keeps {merge.keep}")
    elif merge is not None:
        parts.append(f"ToMe merges {merge.r} per block")
    if merge is not None or reduction.positions == "folded":
        parts.append(f"{reduction.positions} positions")
    if fastv is not None:
        parts.append(f"FastV {describe_stages(fastv)}")
        parts += ["rest folded"] if fastv.rest == "fold" else []
    return ", ".join(parts) or "every image token, in every layer"


def describe_stages(fastv: FastV) -> str:
    """Every stage of FastV: keeps 36 from layer 1, then 18 from layer 3 on."""
    each, verb, stages = " of each image" if fastv.per_image else "", "", []
    for layer, amount in fastv.amounts.items():
        share = "folds" if fastv.rest == "fold" else "drops"
        before, verb = verb, "keeps" if isinstance(amount, int) else share
        number = str(amount) if isinstance(amount, int) else f"{100 * amount:g} %"
        words = number if verb == before else f"{verb} {number}"
        stages.append(f"{words}{each} from layer {layer}")
    return f"{', then '.join(stages)} on"


def token_counts(trace: Trace) -> str:
    """The numbers of patches, tokens and kept tokens of all images together."""
    patches = sum(image.num_patches for image in trace.images)
    tokens = sum(len(image.sizes) for image in trace.images)
    parts = [f"{patches} patches", f"{tokens} tokens"]
    if trace.prune_layers:
        parts.append(f"{sum(len(image.kept) for image in trace.images)} kept")
    return ", ".join(parts)


def text_count(trace: Trace) -> int:
    """The text tokens of a prompt."""
    return trace.rows_per_layer[0] - sum(len(image.sizes) for image in trace.images)


def question(prompt: str, answer: Answer, y: float) -> Section:
    """Prompt and answer. Long texts are smaller, and cut after MOST_LINES lines; the title of
    the drawing has the whole text."""
    shapes: list[Shape] = []
    size = 20 if len(prompt) + len(answer) < 300 else 15
    y += 8
    for label, text, bold in (("Prompt", prompt, False), ("Answer", answer or "(empty)", True)):
        y += 8
        lines = wrap(text, WIDTH - 2 * MARGIN - INDENT, size)
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"... ({len(lines) - MOST_LINES + 1} more lines)"]
        for index, line in enumerate(lines):
            y += 1.4 * size
            if index == 0:
                shapes.append(Text(MARGIN, y, label, 15, GRAY))
            shapes.append(Text(MARGIN + INDENT, y, line, size, bold=bold))
    return shapes, y + 16


# ---- panels of an image ------------------------------------------------------------------------


def panels(seen: Seen, trace: Trace, y: float) -> Section:
    """The three panels of an image: square, merged tokens, and what FastV makes of them."""
    top = y + 52
    folds = any(map(is_folded, trace.images))
    last = folded_panel if folds else score_panel if trace.prune_layers else whole_panel
    shapes = [
        *picture_panel(seen, COLUMNS[0], top),
        *merged_panel(seen, COLUMNS[1], top),
        *last(seen, trace, COLUMNS[2], top),
    ]
    return shapes, top + COLUMN + (74 if folds else 56)


def titles(x: float, top: float, title: str, below: str) -> list[Shape]:
    """The texts above and below a panel."""
    return [
        Text(x, top - 14, title, fit_size(title, 16, COLUMN), bold=True),
        *([Text(x, top + COLUMN + 22, below, 13, GRAY)] if below else []),
    ]


def picture_panel(seen: Seen, x: float, top: float) -> list[Shape]:
    """The square with the grid of patches."""
    grid, side = seen.trace.grid, seen.square.width
    below = f"{side} x {side} pixels, {grid} x {grid} patches"
    title = f"What the model sees{f', {seen.name}' if seen.name else ''}"
    patches = tuple(range(seen.trace.num_patches))
    return [
        *titles(x, top, title, below),
        Picture(x, top, COLUMN, COLUMN, seen.square, "what the model sees"),
        Lines(borders(seen, patches, x, top), PAPER, 1, 0.4),
    ]


def merged_panel(seen: Seen, x: float, top: float) -> list[Shape]:
    """Every token in the mean color of its patches, outlined."""
    trace = seen.trace
    title, below = f"{len(trace.sizes)} tokens, nothing merged", "one patch each, in its mean color"
    if len(trace.sizes) < trace.num_patches:
        title = f"{count(len(trace.sizes), 'token')} after merging"
        few, most = min(trace.sizes), max(trace.sizes)
        each = count(most, "patch", "patches") if few == most else f"{few} to {most} patches"
        below = f"{each} each, in their mean color"
    colors = mean_colors(seen, trace.groups)
    tokens = [Group(describe_token(trace, t), cells(seen, t, x, top, c)) for t, c in colors.items()]
    outline = borders(seen, trace.groups, x, top)
    return [
        *titles(x, top, title, below),
        *tokens,
        Lines(outline, PAPER, 2, 0.4),
        Lines(outline, INK, 0.75, 0.8),
    ]


def whole_panel(seen: Seen, trace: Trace, x: float, top: float) -> list[Shape]:
    """A note that FastV is off."""
    return [
        *titles(x, top, "Nothing dropped", ""),
        Rect(x, top, COLUMN, COLUMN, EMPTY),
        Text(x + COLUMN / 2, top + COLUMN / 2 - 6, "all tokens go through", 15, GRAY, "middle"),
        Text(x + COLUMN / 2, top + COLUMN / 2 + 15, "all layers", 15, GRAY, "middle"),
    ]


def score_panel(seen: Seen, trace: Trace, x: float, top: float) -> list[Shape]:
    """FastV's scores over a gray picture, dropped patches dimmed."""
    image = seen.trace
    scale, kept = ScoreScale.of(trace), set(image.kept)
    tokens = []
    for token, score in enumerate(image.scores or ()):
        heat = scale.color(score)
        color = heat if token in kept else blend(heat, PAPER, DIMMED)
        opacity = KEPT_OPACITY if token in kept else DROPPED_OPACITY
        shown = cells(seen, token, x, top, color, opacity)
        tokens.append(Group(describe_token(image, token), shown))
    marks = tuple(token if token in kept else -1 for token in image.groups)
    gray = ImageOps.grayscale(seen.square).convert("RGB")
    title = stages_title(trace)
    if title is None:
        dropped = len(image.sizes) - len(kept)
        title = f"{count(len(kept), 'token')} kept by FastV, {dropped} dropped"
    return [
        *titles(x, top, title, ""),
        Picture(x, top, COLUMN, COLUMN, gray, "what the model sees, in gray"),
        *tokens,
        Lines(borders(seen, marks, x, top), INK, 0.75, 0.8),
        *scale.legend(lowest_kept(seen, trace), x, top + COLUMN + 9),
    ]


def folded_panel(seen: Seen, trace: Trace, x: float, top: float) -> list[Shape]:
    """Every patch in the mean color of all patches that its kept token stands for, folded patches
    paler. A mark on the kept token has its score as a color, and its number of patches."""
    image, scale = seen.trace, ScoreScale.of(trace)
    speaking = [token if into is None else into for token, into in enumerate(image.folded_into)]
    speakers = [speaking[token] for token in image.groups]
    colors = mean_colors(seen, speakers)
    tokens = []
    for token, into in enumerate(speaking):
        color = colors[into] if into == token else blend(colors[into], PAPER, PALE)
        tokens.append(Group(describe_token(image, token), cells(seen, token, x, top, color)))
    outline = borders(seen, speakers, x, top)
    title = stages_title(trace) or f"{count(len(image.kept), 'token')} kept"
    caption = "numbers: patches of a kept token; pale: folded"
    return [
        *titles(x, top, f"{title}, rest folded", ""),
        *tokens,
        Lines(outline, PAPER, 2, 0.4),
        Lines(outline, INK, 0.75, 0.8),
        *(
            weight_mark(seen, token, scale, x, top)
            for token in sorted(image.kept, key=speakers.count)
        ),
        *scale.legend(lowest_kept(seen, trace), x, top + COLUMN + 9),
        Text(x, top + COLUMN + 52, caption, 13, GRAY),
    ]


def weight_mark(seen: Seen, token: int, scale: "ScoreScale", x: float, top: float) -> Group:
    """A mark on the middle patch of a kept token: its score, and the patches it stands for."""
    image = seen.trace
    own = np.array([seen.cell(p) for p, group in enumerate(image.groups) if group == token])
    row, column = own[((own - own.mean(0)) ** 2).sum(1).argmin()].tolist()
    height = min(seen.side, LARGEST_MARK)
    label, size = str(image.speakers().count(token)), 0.72 * height
    wanted = text_width(label, size) + 3
    width = min(seen.side, max(height, wanted))  # marks of neighbors do not meet
    size *= min(1.0, (width - 3) / (wanted - 3))
    left = x + (column + 0.5) * seen.side - width / 2
    y = top + (row + 0.5) * seen.side - height / 2
    color = scale.color((image.scores or ())[token])
    ink = PAPER if sum(color) < DARK else INK
    shapes = (
        Rect(left, y, width, height, INK),
        Rect(left + 1, y + 1, width - 2, height - 2, color),
        Text(left + width / 2, y + height / 2 + 0.36 * size, label, size, ink, "middle"),
    )
    return Group(describe_token(image, token), shapes)


def is_folded(image: ImageTrace) -> bool:
    """Whether kept tokens stand for others."""
    return any(into not in (token, None) for token, into in enumerate(image.folded_into))


def stages_title(trace: Trace) -> str | None:
    """The tokens that every stage keeps. None for one stage, and for several images: the counts are
    those of all images together."""
    if len(trace.prune_layers) < 2 or len(trace.images) > 1:
        return None
    rows = [trace.rows_per_layer[layer] for layer in trace.prune_layers]
    return f"{join_counts(rows, text_count(trace))} kept"


def lowest_kept(seen: Seen, trace: Trace) -> float | None:
    """The lowest score of a kept token; None if a later stage has chosen by scores of its own."""
    image = seen.trace
    if len(trace.prune_layers) > 1 or image.scores is None:
        return None
    return min((image.scores[token] for token in image.kept), default=None)


def describe_token(trace: ImageTrace, token: int) -> str:
    """A token's number, size, score, and what becomes of it, in one line."""
    parts = [f"token {token}", count(trace.sizes[token], "patch", "patches")]
    if trace.scores is not None:
        parts += [f"score {percent(trace.scores[token])}"]
        into = trace.folded_into[token]
        if into is None:
            parts += ["dropped"]
        elif into != token:
            parts += [f"folded into token {into}"]
        else:
            parts += ["kept"]
            weight = trace.speakers().count(token)
            if weight > trace.sizes[token]:
                parts += [f"stands for {weight} patches"]
    return ", ".join(parts)


def patch_means(seen: Seen) -> NDArray[np.float64]:
    """The mean color of every patch (P, 3), 0..255."""
    grid = seen.trace.grid
    patch = seen.square.width // grid
    pixels = np.asarray(seen.square, np.float64)[: grid * patch, : grid * patch]
    return pixels.reshape(grid, patch, grid, patch, 3).mean((1, 3)).reshape(-1, 3)


def mean_colors(seen: Seen, marks: Sequence[int]) -> dict[int, Color]:
    """The mean color of all patches with the same mark (P,)."""
    means, mean_of = patch_means(seen), {}
    for mark in set(marks):
        red, green, blue = means[np.array(marks) == mark].mean(0).round().astype(int).tolist()
        mean_of[mark] = (red, green, blue)
    return mean_of


def cells(
    seen: Seen, token: int, x: float, top: float, color: Color, opacity: float = 1.0
) -> tuple[Rect, ...]:
    """A rectangle for every patch of a token."""
    side = seen.side
    patches = (patch for patch, group in enumerate(seen.trace.groups) if group == token)
    places = map(seen.cell, patches)
    return tuple(Rect(x + c * side, top + r * side, side, side, color, opacity) for r, c in places)


def borders(seen: Seen, marks: Sequence[int], x: float, top: float) -> tuple[Segment, ...]:
    """Lines between neighbor patches with different marks (P,), joined where they run straight."""
    grid, side = seen.trace.grid, seen.side
    inside = np.array(marks).reshape(grid, grid)
    # The frame around the picture has the mark -1, like dropped patches.
    padded = np.pad(inside, 1, constant_values=-1)  # (grid + 2, grid + 2)
    segments: list[Segment] = []
    for line in range(grid + 1):
        for first, last in find_runs(padded[line, 1:-1] != padded[line + 1, 1:-1]):
            at = top + line * side
            segments.append((x + first * side, at, x + last * side, at))
        for first, last in find_runs(padded[1:-1, line] != padded[1:-1, line + 1]):
            at = x + line * side
            segments.append((at, top + first * side, at, top + last * side))
    return tuple(segments)


def find_runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, end) of each run of True."""
    steps = np.diff(np.pad(flags.astype(int), 1))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


# ---- scores ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreScale:
    """Colors for scores from 0 to `high`, by the square root of the score. A few tokens get most of
    the attention; the root keeps the others distinct. layer: the layer that the scores are from, if
    there are several."""

    high: float
    layer: int | None = None

    @staticmethod
    def of(trace: Trace) -> "ScoreScale":
        """One scale for the scores of all images."""
        high = max(score for image in trace.images for score in image.scores or ())
        first, *others = trace.prune_layers
        return ScoreScale(high, first - 1 if others else None)

    def place(self, score: float) -> float:
        """The place of a score on the scale, 0..1."""
        return math.sqrt(score / self.high) if self.high > 0 else 0.0

    def color(self, score: float) -> Color:
        """The color of a score."""
        return heat(self.place(score))

    def legend(self, lowest_kept: float | None, x: float, y: float) -> list[Shape]:
        """The bar of colors with its scores, and a mark at the lowest kept score."""
        steps, base = 48, y + 23
        wide = COLUMN / steps
        bar = [Rect(x + i * wide, y, wide, 7, heat(i / (steps - 1))) for i in range(steps)]
        low, high = "0", f"{percent(self.high)} of attention"
        if self.layer is not None:
            high += f" in layer {self.layer}"
        ends = [Text(x, base, low, 13, GRAY), Text(x + COLUMN, base, high, 13, GRAY, "end")]
        if lowest_kept is None:
            return [*bar, *ends]
        at = x + COLUMN * self.place(lowest_kept)
        label = f"kept from {percent(lowest_kept)}"
        half = text_width(label, 13) / 2
        first = x + text_width(low, 13) + 10 + half
        last = x + COLUMN - text_width(high, 13) - 10 - half
        mark = Lines(((at, y - 3, at, y + 10),), INK, 1.5)
        return [*bar, *ends, mark, Text(min(max(at, first), last), base, label, 13, INK, "middle")]


def heat(place: float) -> Color:
    """The color at a place of the scale, 0..1."""
    position = place * (len(HEAT) - 1)
    index = min(int(position), len(HEAT) - 2)
    return blend(HEAT[index], HEAT[index + 1], position - index)


def blend(start: Color, end: Color, share: float) -> Color:
    """A mix of two colors with `share` of the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def percent(share: float) -> str:
    """A share with two digits: 0.012 %, 3.1 %, 12 %."""
    return f"{100 * share:.2g} %"


# ---- charts ------------------------------------------------------------------------------------


def tower_chart(trace: Trace, y: float) -> Section:
    """A chart of the tokens before the tower's first block and after each block; of FastViTHD,
    after each round of merging."""
    x, top = COLUMNS[0], y + 48
    title = "Tokens in the vision tower"
    if trace.merge_step == "round":
        title = "Tokens behind the vision tower"
    counts = list(dict.fromkeys(tokens_in_tower(image) for image in trace.images))
    known = [values for values in counts if len(values) > 1]
    shapes: list[Shape] = [Text(x, y + 16, title, 16, bold=True)]
    if not known:
        merged = any(len(image.sizes) < image.num_patches for image in trace.images)
        text = "not known for an image encoded before" if merged else "nothing merges"
        note = Text(x, top + PLOT / 2, text, 13, GRAY)
        return [*shapes, note], top + PLOT
    most = max(map(max, known))
    longest = max(known, key=sum)
    shapes += columns(x, top, longest, most, blend(BLUE, PAPER, 0.55))
    shapes += [Lines(step_line(x, top, values, most), BLUE, 1.5) for values in known]
    steps = len(longest) - 1
    shapes += axis(x, top, {0: "in", **{b: str(b) for b in ticks(1, steps)}}, steps + 1)
    shapes.append(Text(x, top - 6, str(longest[0]), 13, GRAY))
    ends = ", ".join(dict.fromkeys(str(values[-1]) for values in known))
    if len(known) == 1 and longest[-1] != longest[0]:
        beside = math.ceil(text_width(ends, 13) / COLUMN * len(longest))
        height = PLOT * longest[-beside] / most  # above all columns that the number spans
        shapes.append(Text(x + COLUMN, top + PLOT - height - 6, ends, 13, GRAY, "end"))
    each = " of each image" if len(trace.images) > 1 and len(known) == 1 else ""
    lines = wrap(f"{ends} tokens{each} after {count(steps, trace.merge_step)}", COLUMN, 13)
    shapes += [Text(x, top + PLOT + 42 + 20 * i, line, 13) for i, line in enumerate(lines)]
    return shapes, top + PLOT + 26 + 20 * len(lines)


def tokens_in_tower(image: ImageTrace) -> tuple[int, ...]:
    """Tokens before the first block or round, and after each."""
    return (image.num_patches, *image.tokens_per_block)


def decoder_chart(trace: Trace, y: float) -> Section:
    """A chart of text and image tokens in every layer, and of the positions in attention."""
    x, top = float(COLUMNS[1]), y + 48
    rows, positions = trace.rows_per_layer, trace.positions_per_layer
    text = text_count(trace)
    unreduced = text + sum(image.num_patches for image in trace.images)
    most = max(unreduced, *positions)
    shapes: list[Shape] = [Text(x, y + 16, "Tokens in the decoder", 16, bold=True)]
    shapes += columns(x, top, rows, most, BLUE)
    shapes += columns(x, top, [text] * len(rows), most, SLATE)
    line = Lines(((x, top, x + COLUMN, top),), RULE)
    unit = f"{unreduced} unreduced" if rows[-1] < unreduced else str(unreduced)
    shapes += [line, Text(x + COLUMN, top - 6, unit, 13, GRAY, "end")]
    layers = len(rows)
    marks: list[int] = []
    for mark in (*trace.prune_layers, 0, layers - 1):
        near = (text_width(f"{mark}{max(marks, default=0)}", 13) / 2 + 6) * layers / COLUMN
        if all(abs(mark - other) >= near for other in marks):  # labels do not overlap
            marks.append(mark)
    shapes += axis(x, top, {layer: str(layer) for layer in marks}, layers)
    legend: list[tuple[Color, str]] = [
        (SLATE, f"{text} text"),
        (BLUE, f"{join_counts(rows, text)} image"),
    ]
    base = top + PLOT + 42
    for color, label in legend:
        size = fit_size(label, 13, COLUMNS[1] + COLUMN - x - 15)
        shapes += [Rect(x, base - 9, 9, 9, color), Text(x + 15, base, label, size)]
        x += 15 + text_width(label, 13) + 18
    if positions != rows:
        x, base = float(COLUMNS[1]), base + 20
        shapes.append(Lines(step_line(x, top, positions, most), INK, 1.5))
        shapes.append(Lines(((x, base - 4.5, x + 9, base - 4.5),), INK, 1.5))
        shapes.append(Text(x + 15, base, f"{join_counts(positions)} positions in attention", 13))
    return shapes, base + 4


def join_counts(counts: Sequence[int], less: int = 0) -> str:
    """Counts without repetitions, each minus `less`: 72, then 36."""
    return ", then ".join(dict.fromkeys(str(count - less) for count in counts))


def columns(x: float, top: float, values: Sequence[int], most: int, color: Color) -> list[Shape]:
    """The filled columns of a chart."""
    wide = COLUMN / len(values)
    heights = [PLOT * value / most for value in values]
    return [
        Rect(x + i * wide, top + PLOT - height, wide, height, color)
        for i, height in enumerate(heights)
    ]


def step_line(x: float, top: float, values: Sequence[int], most: int) -> tuple[Segment, ...]:
    """The upper edge of the columns of a chart."""
    wide = COLUMN / len(values)
    ys = [top + PLOT - PLOT * value / most for value in values]
    flat = [(x + i * wide, y, x + (i + 1) * wide, y) for i, y in enumerate(ys)]
    steep = [(x + i * wide, a, x + i * wide, b) for i, (a, b) in enumerate(pairwise(ys), start=1)]
    return tuple(flat + [step for step in steep if step[1] != step[3]])


def axis(x: float, top: float, labels: dict[int, str], count: int) -> list[Shape]:
    """The base line of a chart of `count` columns, with labels for some columns."""
    wide, base = COLUMN / count, top + PLOT
    texts = [
        Text(x + (column + 0.5) * wide, base + 16, label, 13, GRAY, "middle")
        for column, label in labels.items()
    ]
    return [Lines(((x, base, x + COLUMN, base),), SLATE), *texts]


def ticks(first: int, last: int) -> list[int]:
    """Every number if there are few, else only the last."""
    return list(range(first, last + 1)) if last - first < 8 else [last]


# ---- cost --------------------------------------------------------------------------------------


def costs(answer: Answer, trace: Trace, y: float) -> Section:
    """Seconds of each phase; work and memory as shares of those without a reduction."""
    seconds = {name: answer.timings.get(phase, 0.0) for phase, name in PHASES.items()}
    longest = max(seconds.values()) or 1.0
    tokens = answer.usage.get("completion_tokens", 0)
    total = f"Time: {duration(sum(seconds.values()))} for {count(tokens, 'new token')}"
    if answer.finish_reason == "length":
        total += ", then cut"
    times = [(name, value / longest, duration(value)) for name, value in seconds.items()]
    tower, decoder = trace.tower_flops, trace.decoder_flops["gated"]
    kv_ratio = trace.kv_bytes / trace.kv_bytes_unreduced
    shares = [
        ("KV cache", kv_ratio, format_bytes(trace.kv_bytes)),
        ("tower", tower.ratio, f"{format_count(tower.total)} FLOPs"),
        ("decoder", decoder.ratio, f"{format_count(decoder.total)} FLOPs"),
    ]
    shapes, y = bars(total, times, y)
    rest = [(name, share, f"{100 * share:.0f} %, {text}") for name, share, text in shares]
    more, y = bars("Left of the prompt's unreduced cost", rest, y + 20, EMPTY)
    return shapes + more, y


def bars(
    title: str, rows: Sequence[tuple[str, float, str]], y: float, empty: Color | None = None
) -> Section:
    """Labeled bars, as long as their shares. `empty`: color of the rest of a bar."""
    x, start, wide = COLUMNS[2], COLUMNS[2] + 70, 80
    shapes: list[Shape] = [Text(x, y + 16, title, 16, bold=True)]
    y += 40
    for label, share, value in rows:
        shapes.append(Text(x, y, label, 13, GRAY))
        if empty is not None:
            shapes.append(Rect(start, y - 10, wide, 11, empty))
        shapes.append(Rect(start, y - 10, wide * min(share, 1.0), 11, BLUE))
        shapes.append(Text(start + wide + 12, y, value, 13))
        y += 20
    return shapes, y - 16


def fit_size(text: str, size: float, width: float) -> float:
    """The size of a text, made smaller where the text is wider than `width`."""
    return size * min(1.0, width / text_width(text, size))


def count(number: int, one: str, many: str = "") -> str:
    """1 patch, 2 patches."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """0.4 ms, 35 ms, 1.24 s."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms"
