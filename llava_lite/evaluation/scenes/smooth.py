"""A second renderer of the scenes: a model's answers should not depend on the drawing code.

Nothing here is shared with `draw_scene` but the description of a scene. Every shape is a signed
distance, in pixels from its outline and negative inside; how much of a pixel it covers follows from
the distance of the pixel's center, so that edges are smooth without drawing anything larger and
shrinking it. Digits are strokes of one width around a skeleton of lines and arcs: another typeface,
with no font file. Noise comes from another generator.

Shapes: H x W pixels of the scene, h x w of the part in which an object lies; y points down.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_lite.evaluation.scenes.world import (
    DIGIT_HEIGHTS,
    RGB,
    Scene,
    SceneObject,
    drawn_proportion,
)

Array = NDArray[np.floating[Any]]

_STROKE = 0.2  # of a digit's height, ends included
_ARC_STEP = 15.0  # degrees
# Corners on the circumcircle, and the direction of the first one before any rotation.
_CORNERS = {
    "square": (4, math.pi / 4),
    "triangle": (3, -math.pi / 2),
    "star": (5, -math.pi / 2),
}


def draw_smooth_scene(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image, as `draw_scene` does, but with code of its own."""
    canvas = _background(scene)
    for scene_object in scene.objects:
        _blend_object(canvas, scene_object)
    if scene.noise_sigma > 0:
        rng = np.random.default_rng(scene.noise_seed)
        canvas += np.float32(scene.noise_sigma) * rng.standard_normal(canvas.shape, np.float32)
    return Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8))


def _background(scene: Scene) -> Array:
    """One color, or from one corner to the opposite one a blend of two: (H, W, 3)."""
    first = np.array(scene.background, np.float32)
    if scene.background_end is None:
        return np.tile(first, (scene.height, scene.width, 1))
    direction = np.array([math.cos(scene.gradient_angle), math.sin(scene.gradient_angle)])
    corners = np.array([(x, y) for x in (0, scene.width) for y in (0, scene.height)]) @ direction
    y, x = np.ogrid[0.5 : scene.height, 0.5 : scene.width]
    t = (x * direction[0] + y * direction[1] - corners.min()) / np.ptp(corners)
    return first + t[..., None].astype(np.float32) * (
        np.array(scene.background_end, np.float32) - first
    )


def _blend_object(canvas: Array, scene_object: SceneObject) -> None:
    """Paint one object, and its digit, where they cover the canvas (H, W, 3)."""
    reach = scene_object.radius + 1
    top, left = math.floor(scene_object.y - reach), math.floor(scene_object.x - reach)
    top, left = max(top, 0), max(left, 0)
    bottom, right = math.ceil(scene_object.y + reach), math.ceil(scene_object.x + reach)
    part = canvas[top:bottom, left:right]  # (h, w, 3)
    y, x = np.mgrid[: part.shape[0], : part.shape[1]] + 0.5
    x, y = x + left - scene_object.x, y + top - scene_object.y
    _blend(part, shape_distance(scene_object, x, y), scene_object.rgb)
    if scene_object.digit is not None:
        height, stretch, ink = _digit_style(scene_object)
        distance = height * digit_distance(scene_object.digit, stretch, x / height, y / height)
        _blend(part, distance, ink)


def _blend(part: Array, distance: Array, rgb: RGB) -> None:
    """Paint as much of every pixel as lies inside. distance (h, w), part (h, w, 3)."""
    coverage = (0.5 - distance).clip(0, 1)[..., None]
    part += coverage * (np.array(rgb) - part)


def shape_distance(scene_object: SceneObject, x: Array, y: Array) -> Array:
    """Pixels from the outline, negative inside, of points given from the object's center. Exact at
    the outline, which is where it matters; beyond corners it is too small."""
    cos, sin = math.cos(scene_object.rotation), math.sin(scene_object.rotation)
    x, y = x * cos + y * sin, y * cos - x * sin
    radius, from_center = scene_object.radius, np.hypot(x, y)
    if scene_object.shape == "circle":
        return from_center - radius
    if scene_object.shape == "ring":
        hole = radius * drawn_proportion(scene_object)
        return np.maximum(from_center - radius, hole - from_center)
    if scene_object.shape == "cross":
        arm = math.atan(drawn_proportion(scene_object))
        length, half = radius * math.cos(arm), radius * math.sin(arm)
        across = np.maximum(abs(x) - length, abs(y) - half)
        return np.minimum(across, np.maximum(abs(y) - length, abs(x) - half))
    return _cornered_distance(scene_object, np.arctan2(y, x), from_center)


def _cornered_distance(scene_object: SceneObject, angle: Array, from_center: Array) -> Array:
    """Square, triangle and star are one half of one corner, over and over, mirrored and turned:
    fold the plane onto it, and a single edge is left."""
    count, first = _CORNERS[scene_object.shape]
    half = math.pi / count
    folded = abs((angle - first + half) % (2 * half) - half)  # 0 at a corner, `half` between two
    inner = drawn_proportion(scene_object) if scene_object.shape == "star" else math.cos(half)
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    x = from_center * np.cos(folded) - scene_object.radius
    y = from_center * np.sin(folded)
    return (x * edge_y - y * edge_x) / math.hypot(edge_x, edge_y)


# ----------------------------------------------------------------------------- digits


def _digit_style(scene_object: SceneObject) -> tuple[float, float, RGB]:
    """Height in pixels, stretch and ink: the scene's own, or the middle of what is allowed."""
    style = scene_object.digit_style
    if style is not None:
        return style.height, style.stretch, style.ink
    height = scene_object.radius * sum(DIGIT_HEIGHTS[scene_object.shape])
    return height, 1.0, (0, 0, 0) if sum(scene_object.rgb) > 382 else (255, 255, 255)


def digit_distance(digit: int, stretch: float, x: Array, y: Array) -> Array:
    """Distance from the outline of a digit of height 1 around the origin, negative inside."""
    nearest = np.full_like(x, np.inf)
    for line in skeleton(digit):
        points = np.array(line) * (stretch, 1.0)
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            dx, dy = x1 - x0, y1 - y0
            along = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
            nearest = np.minimum(nearest, np.hypot(x - x0 - along * dx, y - y0 - along * dy))
    return nearest - _STROKE / 2


Line = tuple[tuple[float, float], ...]


@lru_cache(maxsize=10)
def skeleton(digit: int) -> tuple[Line, ...]:
    """The middle of a digit's strokes, as lines; y from -0.4 (top) to 0.4, so that with the stroke
    around them the ink is 1 high."""
    if digit == 9:
        return tuple(tuple((-x, -y) for x, y in line) for line in skeleton(6))
    lines: dict[int, tuple[Line, ...]] = {
        0: (_arc(0, 0, 0.25, 0.4, 0, 360),),
        1: (((-0.15, -0.24), (0.06, -0.4), (0.06, 0.4)),),
        2: ((*_arc(0, -0.17, 0.23, 0.23, 185, 395), (-0.24, 0.4), (0.25, 0.4)),),
        3: ((*_arc(0, -0.2, 0.21, 0.2, 205, 450), *_arc(0, 0.19, 0.24, 0.21, 285, 520)),),
        4: (((0.12, 0.4), (0.12, -0.4), (-0.27, 0.17), (0.27, 0.17)),),
        5: (((0.2, -0.4), (-0.17, -0.4), *_arc(0, 0.14, 0.24, 0.26, 225, 510)),),
        6: (_arc(0, 0.15, 0.25, 0.25, 0, 360), ((-0.25, 0.15), *_arc(0, 0, 0.25, 0.4, 180, 315))),
        7: (((-0.24, -0.4), (0.25, -0.4), (-0.07, 0.4)),),
        8: (_arc(0, -0.21, 0.2, 0.19, 0, 360), _arc(0, 0.19, 0.24, 0.21, 0, 360)),
    }
    return lines[digit]


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> Line:
    """Part of an ellipse around (x, y), in degrees: 0 is to the right, 90 below."""
    angles = np.radians(np.linspace(start, stop, round((stop - start) / _ARC_STEP) + 1))
    return tuple((x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles)
