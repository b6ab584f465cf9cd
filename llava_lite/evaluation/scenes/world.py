"""Drawn scenes and questions about them: the small world the embedded model understands."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Point = tuple[float, float]
Identity = tuple[str, str]  # (color, shape)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (235, 205, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)  # row by row, so that the index is 3 * row + column
MAX_OBJECTS = 6
DIGIT_SHAPES = ("circle", "square")
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
RADIUS_RANGE = (0.06, 0.15)  # of the short side
MIN_GAP = 4.0  # pixels between circumcircles
MIN_CONTRAST = 45.0  # in some channel
COLOR_JITTER = 15  # per channel
MAX_NOISE_SIGMA = 12.0  # of 255
RELATION_GAP = 0.10  # of the short side, along the axis asked about
DIGIT_HEIGHTS = {"circle": (0.55, 0.70), "square": (0.40, 0.55)}  # of the circumdiameter
_MAX_BACKGROUND_SATURATION = 0.25
_PLACEMENT_TRIES = 120
_GRADIENT_SAMPLES = 17
_GLYPH_SIZE = 160  # font size of the reference glyphs that every digit is scaled down from
_DIGIT_WEIGHTS = (0.02, 0.03, 0.04)  # stroke added around the regular face, of the font size
_DIGIT_STRETCH = (0.95, 1.15)
# The proportions a shape may take; SceneObject.proportion runs from the first to the second.
_PROPORTIONS = {"star": (0.39, 0.46), "ring": (0.48, 0.58), "cross": (0.29, 0.38)}
_REGULAR = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}  # corners, first direction


@dataclass(frozen=True)
class DigitStyle:
    """How a digit is drawn, in Pillow's default font.

    height: of the ink, pixels. weight: width of an extra stroke, as a part of the font size.
    stretch: of the width. ink: color."""

    height: float
    weight: float = _DIGIT_WEIGHTS[1]
    stretch: float = 1.0
    ink: RGB = (255, 255, 255)


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; center and circumradius in pixels of the scene, rotation in radians.

    `proportion` in 0..1 picks the star's inner radius, the ring's hole and the cross's arm width
    within their ranges. A digit without a style is drawn in the middle of the allowed heights.
    """

    shape: str
    color: str
    rgb: RGB
    x: float
    y: float
    radius: float
    rotation: float
    digit: int | None = None
    proportion: float = 0.5
    digit_style: DigitStyle | None = None

    @property
    def name(self) -> str:
        """Color and shape, unique in the scene: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A scene in pixels; `background` turns into `background_end` along the gradient, if any."""

    width: int
    height: int
    background: RGB
    objects: tuple[SceneObject, ...]
    background_end: RGB | None = None
    gradient_angle: float = 0.0
    noise_sigma: float = 0.0
    noise_seed: int = 0

    @property
    def short_side(self) -> int:
        """The shorter of width and height."""
        return min(self.width, self.height)

    def place(self, scene_object: SceneObject) -> str:
        """The third of the image, in each direction, that holds the object's center."""
        row = min(int(3 * scene_object.y / self.height), 2)
        column = min(int(3 * scene_object.x / self.width), 2)
        return PLACES[3 * row + column]


# ---------------------------------------------------------------------------- sampling


def sample_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    short_side: tuple[int, int] = (224, 1024),
    confusable: float = 0.5,
    digit_probability: float = 0.5,
) -> Scene:
    """Sample a scene with `num_objects` objects (uniform in 1..6 if None).

    The short side is uniform in log scale within `short_side`. With probability `confusable` an
    object after the first takes the shape or the color of an earlier one. Raises ValueError for a
    number of objects outside 1..6 or an empty size range.
    """
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(f"num_objects must be within 1..{MAX_OBJECTS}, got {num_objects}")
    if not 32 <= short_side[0] <= short_side[1]:
        raise ValueError(f"short_side must be a range that starts at 32 or more, got {short_side}")
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if num_objects is None else num_objects
    width, height = _sample_size(rng, short_side)
    while True:
        scene = _sample_empty_scene(rng, width, height)
        objects: list[SceneObject] = []
        while len(objects) < count:
            placed = _place_object(rng, scene, objects, confusable)
            if placed is None:
                break
            objects.append(_add_digit(rng, placed, digit_probability))
        else:
            return replace(scene, objects=tuple(objects))


def _sample_size(rng: np.random.Generator, short_side: tuple[int, int]) -> tuple[int, int]:
    low, high = short_side
    short = min(max(round(math.exp(rng.uniform(math.log(low), math.log(high)))), low), high)
    long = min(round(short * math.exp(rng.uniform(0.0, math.log(2.0)))), 2 * short)
    return (long, short) if rng.random() < 0.5 else (short, long)


def _sample_empty_scene(rng: np.random.Generator, width: int, height: int) -> Scene:
    return Scene(
        width=width,
        height=height,
        background=_sample_background(rng),
        objects=(),
        background_end=_sample_background(rng) if rng.random() < 0.5 else None,
        gradient_angle=rng.uniform(0.0, 2 * math.pi),
        noise_sigma=rng.uniform(0.0, MAX_NOISE_SIGMA) if rng.random() < 0.5 else 0.0,
        noise_seed=int(rng.integers(2**31)),
    )


def _sample_background(rng: np.random.Generator) -> RGB:
    saturation = rng.uniform(0.0, _MAX_BACKGROUND_SATURATION)
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, rng.random())
    return round(255 * red), round(255 * green), round(255 * blue)


def _place_object(
    rng: np.random.Generator,
    scene: Scene,
    placed: Sequence[SceneObject],
    confusable: float,
) -> SceneObject | None:
    """Find a place for one more object by rejection sampling; None without a place."""
    low, high = RADIUS_RANGE
    wanted = rng.uniform(low, high)
    for attempt in range(_PLACEMENT_TRIES):
        shrink = max(0.0, 2 * attempt / _PLACEMENT_TRIES - 1)  # from halfway on, towards 6 %
        radius = scene.short_side * (wanted + (low - wanted) * shrink)
        x = rng.uniform(radius, scene.width - radius)
        y = rng.uniform(radius, scene.height - radius)
        if any(math.hypot(x - o.x, y - o.y) < radius + o.radius + MIN_GAP for o in placed):
            continue
        color, shape = _sample_identity(rng, placed, confusable)
        rgb = _jitter(rng, COLORS[color])
        if contrast(scene, rgb, x, y, radius) < MIN_CONTRAST:
            continue
        rotation = rng.uniform(0.0, 2 * math.pi)
        return SceneObject(
            shape, color, rgb, x, y, radius, rotation, proportion=float(rng.random())
        )
    return None


def _sample_identity(
    rng: np.random.Generator, placed: Sequence[SceneObject], confusable: float
) -> Identity:
    taken = {(o.color, o.shape) for o in placed}
    names = tuple(COLORS)
    while True:
        color = names[rng.integers(len(names))]
        shape = SHAPES[rng.integers(len(SHAPES))]
        if placed and rng.random() < confusable:
            earlier = placed[int(rng.integers(len(placed)))]
            if rng.random() < 0.5:
                color = earlier.color
            else:
                shape = earlier.shape
        if (color, shape) not in taken:
            return color, shape


def _jitter(rng: np.random.Generator, rgb: RGB) -> RGB:
    red, green, blue = np.clip(rgb + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _add_digit(rng: np.random.Generator, bare: SceneObject, probability: float) -> SceneObject:
    if bare.shape not in DIGIT_SHAPES or rng.random() >= probability:
        return bare
    style = DigitStyle(
        height=2 * bare.radius * rng.uniform(*DIGIT_HEIGHTS[bare.shape]),
        weight=_DIGIT_WEIGHTS[rng.integers(len(_DIGIT_WEIGHTS))],
        stretch=rng.uniform(*_DIGIT_STRETCH),
        ink=_ink(bare.rgb, by_luma=rng.random() < 0.5),
    )
    return replace(bare, digit=int(rng.integers(10)), digit_style=style)


def _ink(rgb: RGB, by_luma: bool = False) -> RGB:
    """Black or white, whichever contrasts better; the two usual measures disagree on green."""
    if by_luma:
        dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 127.5
    else:
        red, green, blue = ((channel / 255) ** 2.2 for channel in rgb)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        dark = 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05  # WCAG 2 contrast ratio
    return (255, 255, 255) if dark else (0, 0, 0)


def _gradient_frame(scene: Scene) -> tuple[float, float, float, float]:
    """Direction cosines, start and length of the gradient, which runs from corner to corner."""
    dx, dy = math.cos(scene.gradient_angle), math.sin(scene.gradient_angle)
    start = min(0.0, dx * scene.width) + min(0.0, dy * scene.height)
    return dx, dy, start, abs(dx) * scene.width + abs(dy) * scene.height


def contrast(scene: Scene, rgb: RGB, x: float, y: float, radius: float) -> float:
    """A lower bound of the largest channel difference to the background anywhere in a disc."""
    if scene.background_end is None:
        return float(max(abs(a - b) for a, b in zip(rgb, scene.background, strict=True)))
    dx, dy, start, length = _gradient_frame(scene)
    middle, half = (x * dx + y * dy - start) / length, radius / length
    t = np.linspace(max(middle - half, 0.0), min(middle + half, 1.0), _GRADIENT_SAMPLES)
    first, last = np.array(scene.background), np.array(scene.background_end)
    colors = first + t[:, None] * (last - first)  # (samples, 3)
    differences = np.abs(colors - np.array(rgb)).max(axis=1)
    # Between two samples the difference can dip by half a step of the steepest channel, and
    # drawing rounds the background to whole levels.
    dip = float(np.abs(last - first).max()) * (t[1] - t[0]) / 2
    return float(differences.min()) - dip - 0.5


# ----------------------------------------------------------------------------- drawing


def object_polygon(scene_object: SceneObject) -> list[Point]:
    """Corners of a square, triangle, star or cross, in pixels of the scene.

    All lie within the circumradius. Raises ValueError for a circle or ring, which have none.
    """
    shape = scene_object.shape
    if shape in _REGULAR:
        corners, first = _REGULAR[shape]
        polar = [(1.0, first + 2 * math.pi / corners * corner) for corner in range(corners)]
    elif shape == "star":
        inner = drawn_proportion(scene_object)
        step = math.pi / 5
        polar = [(inner if k % 2 else 1.0, -math.pi / 2 + step * k) for k in range(10)]
    elif shape == "cross":
        # Each arm ends in two corners on the circumcircle; arms meet in four inner corners.
        arm = math.atan(drawn_proportion(scene_object))
        inner = math.sqrt(2) * math.sin(arm)
        polar = []
        for quarter in (0.0, math.pi / 2, math.pi, 3 * math.pi / 2):
            polar += [(1.0, quarter - arm), (1.0, quarter + arm), (inner, quarter + math.pi / 4)]
    else:
        raise ValueError(f"a {shape} has no corners")
    return [
        (
            scene_object.x + scene_object.radius * rho * math.cos(angle + scene_object.rotation),
            scene_object.y + scene_object.radius * rho * math.sin(angle + scene_object.rotation),
        )
        for rho, angle in polar
    ]


def drawn_proportion(scene_object: SceneObject) -> float:
    """The star's inner radius or the ring's hole, of the circumradius; the cross's arm width, of
    its length."""
    low, high = _PROPORTIONS[scene_object.shape]
    return low + (high - low) * scene_object.proportion


def draw_scene(scene: Scene, supersample: int = 2) -> Image.Image:
    """Draw the scene as an RGB image; `supersample` 1 leaves Pillow's hard edges."""
    image = Image.fromarray(_draw_background(scene))
    for scene_object in scene.objects:
        _paste_object(image, scene_object, supersample)
    if scene.noise_sigma > 0:
        image = Image.fromarray(_add_noise(np.asarray(image), scene.noise_sigma, scene.noise_seed))
    return image


def draw_instances(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Object indices (size, size) after padding to a square and resizing, as the model sees them.

    0 is background and padding, i the i-th object counted from 1.
    """
    side = max(scene.width, scene.height)
    origin = (-((side - scene.width) // 2), -((side - scene.height) // 2))
    instances = Image.new("L", (size, size))
    draw = ImageDraw.Draw(instances)
    for index, scene_object in enumerate(scene.objects, start=1):
        _draw_shape(draw, scene_object, index, origin, size / side)
    return np.array(instances)


def _draw_shape(
    draw: ImageDraw.ImageDraw, scene_object: SceneObject, fill: int, origin: Point, scale: float
) -> None:
    """Fill one shape on a canvas whose corner is at `origin` of the scene."""

    def to_canvas(x: float, y: float) -> tuple[int, int]:
        # The nearest border between pixels; Pillow would truncate fractions towards zero.
        return round((x - origin[0]) * scale), round((y - origin[1]) * scale)

    def fill_disc(radius: float, fill: int) -> None:
        x, y = scene_object.x, scene_object.y
        left, top = to_canvas(x - radius, y - radius)
        right, bottom = to_canvas(x + radius, y + radius)
        draw.ellipse((left, top, max(right - 1, left), max(bottom - 1, top)), fill=fill)

    if scene_object.shape in ("circle", "ring"):
        fill_disc(scene_object.radius, fill)
        if scene_object.shape == "ring":
            fill_disc(scene_object.radius * drawn_proportion(scene_object), 0)
        return
    # Pillow names the centers of pixels, half a pixel off the scene's coordinates.
    half = 0.5 / scale
    corners = [to_canvas(x - half, y - half) for x, y in object_polygon(scene_object)]
    draw.polygon(corners, fill=fill)


def _paste_object(image: Image.Image, scene_object: SceneObject, supersample: int) -> None:
    reach = math.ceil(scene_object.radius) + 2
    left, top = math.floor(scene_object.x) - reach, math.floor(scene_object.y) - reach
    tile = 2 * reach + 1
    mask = Image.new("L", (tile * supersample, tile * supersample))
    _draw_shape(ImageDraw.Draw(mask), scene_object, 255, (left, top), supersample)
    image.paste(scene_object.rgb, (left, top), _reduce(mask, supersample))
    if scene_object.digit is None:
        return
    style = scene_object.digit_style or _default_style(scene_object)
    glyph = _scaled_glyph(scene_object.digit, style, supersample)
    ink = Image.new("L", mask.size)
    corner_x = round((scene_object.x - left) * supersample - glyph.width / 2)
    corner_y = round((scene_object.y - top) * supersample - glyph.height / 2)
    ink.paste(glyph, (corner_x, corner_y))
    image.paste(style.ink, (left, top), _reduce(ink, supersample))


def _reduce(mask: Image.Image, factor: int) -> Image.Image:
    return mask.reduce(factor) if factor > 1 else mask


def _default_style(scene_object: SceneObject) -> DigitStyle:
    height = scene_object.radius * sum(DIGIT_HEIGHTS[scene_object.shape])
    return DigitStyle(height=height, ink=_ink(scene_object.rgb))


def _scaled_glyph(digit: int, style: DigitStyle, supersample: int) -> Image.Image:
    glyph = _glyph(digit, style.weight)
    height = max(1, round(style.height * supersample))
    width = max(1, round(style.stretch * height * glyph.width / glyph.height))
    return glyph.resize((width, height), Image.Resampling.BOX)


@lru_cache(maxsize=256)
def _glyph(digit: int, weight: float) -> Image.Image:
    """The digit in white on black, cropped to its ink, much larger than ever drawn."""
    canvas = Image.new("L", (2 * _GLYPH_SIZE, 2 * _GLYPH_SIZE))
    ImageDraw.Draw(canvas).text(
        (_GLYPH_SIZE // 2, _GLYPH_SIZE // 2),
        str(digit),
        fill=255,
        font=ImageFont.load_default(_GLYPH_SIZE),
        stroke_width=round(weight * _GLYPH_SIZE),
    )
    return canvas.crop(canvas.getbbox())


def _draw_background(scene: Scene) -> NDArray[np.uint8]:
    """The flat color or the gradient, (height, width, 3)."""
    canvas = np.empty((scene.height, scene.width, 3), np.uint8)
    if scene.background_end is None:
        canvas[:] = scene.background
        return canvas
    dx, dy, start, length = _gradient_frame(scene)
    columns = ((np.arange(scene.width) + 0.5) * dx - start) / length
    rows = (np.arange(scene.height) + 0.5) * dy / length
    t = np.add.outer(rows, columns).astype(np.float32)  # (height, width)
    for channel, (first, last) in enumerate(
        zip(scene.background, scene.background_end, strict=True)
    ):
        # Adding a half turns the truncating cast into rounding: values are never negative.
        canvas[:, :, channel] = t * np.float32(last - first) + np.float32(first + 0.5)
    return canvas


def _add_noise(pixels: NDArray[np.uint8], sigma: float, seed: int) -> NDArray[np.uint8]:
    # Looking random 16-bit numbers up in a table of quantiles is several times faster than
    # drawing normal deviates, and noise on whole levels cannot tell the difference.
    levels = np.rint(_normal_quantiles() * sigma).astype(np.int16)
    generator = np.random.Generator(np.random.SFC64(seed))
    picks = np.frombuffer(generator.bytes(2 * pixels.size), np.uint16).reshape(pixels.shape)
    noisy = levels[picks]
    noisy += pixels
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


@lru_cache(maxsize=1)
def _normal_quantiles() -> NDArray[np.float32]:
    """The standard normal deviates at the middle of 2^16 equally likely intervals."""
    normal = NormalDist()
    count = 2**16
    return np.array([normal.inv_cdf((k + 0.5) / count) for k in range(count)], np.float32)
