"""Questions about a scene, and their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter

import numpy as np

from llava_lite.evaluation.scenes.world import (
    COLORS,
    COUNT_WORDS,
    PLACES,
    RELATION_GAP,
    SHAPES,
    Identity,
    Scene,
    SceneObject,
)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the family it belongs to."""

    text: str
    answer: str
    family: str


# --------------------------------------------------------------------------- questions

# The first wording of each family is the canonical one.
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "count": (
        "How many objects are there?",
        "How many objects are in the image?",
        "How many objects can you see?",
        "What is the number of objects?",
    ),
    "count_color": (
        "How many {color} objects are there?",
        "How many {color} objects are in the image?",
        "How many objects are {color}?",
        "What is the number of {color} objects?",
    ),
    "count_shape": (
        "How many {shapes} are there?",
        "How many {shapes} are in the image?",
        "How many {shapes} can you see?",
        "What is the number of {shapes}?",
    ),
    "color": (
        "What color is the {shape}?",
        "What is the color of the {shape}?",
        "Which color does the {shape} have?",
        "What colour is the {shape}?",  # codespell:ignore colour
    ),
    "shape": (
        "What shape is the {color} object?",
        "What is the shape of the {color} object?",
        "Which shape does the {color} object have?",
        "What is the {color} object?",
    ),
    "exists": (
        "Is there {an_object}?",
        "Is there {an_object} in the image?",
        "Can you see {an_object}?",
        "Does the image contain {an_object}?",
    ),
    "where": (
        "Where is the {object}?",
        "Where is the {object} in the image?",
        "In which part of the image is the {object}?",
        "What is the position of the {object}?",
    ),
    "relation": (
        "Is the {object} {direction} the {other}?",
        "Is the {object} {long_direction} the {other}?",
        "Is the {object} located {long_direction} the {other}?",
        "Does the {object} lie {long_direction} the {other}?",
    ),
    "digit": (
        "What digit is on the {object}?",
        "Which digit is on the {object}?",
        "What number is on the {object}?",
        "What digit does the {object} show?",
    ),
    "describe": (
        "Describe the image.",
        "Describe this image.",
        "What is in this picture?",
        "What do you see in the image?",
    ),
}

_LONG_DIRECTIONS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}

_PLACE_PHRASES = {place: f"at the {place}" for place in PLACES} | {
    "left": "on the left",
    "right": "on the right",
    "center": "in the center",
}

_YES_NO = ("yes", "no")

# What may be answered, for every family but "describe".
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": COUNT_WORDS[1:],
    "count_color": COUNT_WORDS,
    "count_shape": COUNT_WORDS,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "exists": _YES_NO,
    "where": PLACES,
    "relation": _YES_NO,
    "digit": tuple("0123456789"),
}


def with_article(name: str) -> str:
    """The name with its indefinite article: "a red circle", "an orange star"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape: str) -> str:
    """The plural of a shape: "circles", "crosses"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def questions(scene: Scene, rng: np.random.Generator, paraphrase: float = 0.3) -> list[Question]:
    """All questions worth asking about a scene, each reworded with probability `paraphrase`.

    "exists" and "relation" have as many yes as no. About a quarter of the counts by color or shape
    are zero. Colors and shapes are asked for only if exactly one object fits.
    """
    asker = _Asker(rng, paraphrase)
    asker.ask("count", COUNT_WORDS[len(scene.objects)])
    _ask_counts(asker, scene)
    _ask_attributes(asker, scene)
    _ask_existence(asker, scene)
    for scene_object in scene.objects:
        asker.ask("where", scene.place(scene_object), object=scene_object.name)
    _ask_relations(asker, scene)
    for scene_object in scene.objects:
        if scene_object.digit is not None:
            asker.ask("digit", str(scene_object.digit), object=scene_object.name)
    asker.ask("describe", describe(scene))
    return asker.asked


class _Asker:
    """Collects questions and chooses the wording of each."""

    def __init__(self, rng: np.random.Generator, paraphrase: float) -> None:
        self.rng = rng
        self.paraphrase = paraphrase
        self.asked: list[Question] = []

    def ask(self, family: str, answer: str, **slots: str) -> None:
        wordings = PARAPHRASES[family]
        chosen = 0
        if self.rng.random() < self.paraphrase:
            chosen = int(self.rng.integers(1, len(wordings)))
        self.asked.append(Question(wordings[chosen].format(**slots), answer, family))

    def some(self, candidates: Sequence[str], expected: float) -> list[str]:
        """A random choice of `expected` candidates on average, fewer if there are fewer."""
        number = int(expected + self.rng.random())
        order = self.rng.permutation(len(candidates))[:number]
        return [candidates[index] for index in order]


def _ask_counts(asker: _Asker, scene: Scene) -> None:
    colors, shapes = [o.color for o in scene.objects], [o.shape for o in scene.objects]
    for family, seen, known in (("count_color", colors, COLORS), ("count_shape", shapes, SHAPES)):
        present = sorted(set(seen))
        absent = [name for name in known if name not in seen]
        for name in present + asker.some(absent, len(present) / 3):
            asker.ask(family, COUNT_WORDS[seen.count(name)], color=name, shapes=plural(name))


def _ask_attributes(asker: _Asker, scene: Scene) -> None:
    colors = [o.color for o in scene.objects]
    shapes = [o.shape for o in scene.objects]
    for color, shape in zip(colors, shapes, strict=True):
        if shapes.count(shape) == 1:
            asker.ask("color", color, shape=shape)
        if colors.count(color) == 1:
            asker.ask("shape", shape, color=color)


def _ask_existence(asker: _Asker, scene: Scene) -> None:
    present = {(o.color, o.shape) for o in scene.objects}
    for scene_object in scene.objects:
        asker.ask("exists", "yes", an_object=with_article(scene_object.name))
    for color, shape in _absent_identities(asker.rng, present):
        asker.ask("exists", "no", an_object=with_article(f"{color} {shape}"))


def _absent_identities(rng: np.random.Generator, present: set[Identity]) -> list[Identity]:
    """As many absent objects as there are present ones, four in five of them confusable.

    First choice: color and shape are both present, on different objects. Second choice: the color
    or the shape is present.
    """
    colors = {color for color, _ in present}
    shapes = {shape for _, shape in present}
    tiers: tuple[list[Identity], ...] = ([], [], [])  # sharing nothing, one, both
    order = rng.permutation(len(COLORS) * len(SHAPES))
    names = tuple(COLORS)
    for index in order:
        color, shape = names[index // len(SHAPES)], SHAPES[index % len(SHAPES)]
        if (color, shape) not in present:
            tiers[(color in colors) + (shape in shapes)].append((color, shape))
    chosen: list[Identity] = []
    while len(chosen) < len(present):
        preference = (2, 1, 0) if rng.random() < 0.8 else (0, 1, 2)
        tier = next(tiers[rank] for rank in preference if tiers[rank])
        chosen.append(tier.pop())
    return chosen


def _ask_relations(asker: _Asker, scene: Scene) -> None:
    least = RELATION_GAP * scene.short_side
    axes = (("x", ("left of", "right of")), ("y", ("above", "below")))
    for pair in combinations(scene.objects, 2):
        for axis, directions in axes:
            near, far = sorted(pair, key=attrgetter(axis))
            if getattr(far, axis) - getattr(near, axis) >= least:
                _ask_relation(asker, near, far, directions)


def _ask_relation(
    asker: _Asker, near: SceneObject, far: SceneObject, directions: tuple[str, str]
) -> None:
    """One yes and one no about a pair; near is `directions[0]` far, far `directions[1]` near."""
    for answer in _YES_NO:
        swapped = int(asker.rng.integers(2))
        subject, other = (far, near) if swapped else (near, far)
        direction = directions[swapped if answer == "yes" else 1 - swapped]
        asker.ask(
            "relation",
            answer,
            object=subject.name,
            other=other.name,
            direction=direction,
            long_direction=_LONG_DIRECTIONS[direction],
        )


def describe(scene: Scene) -> str:
    """One sentence: the count, then each object with its place, in the order of COLORS and SHAPES.

    The order is unique, because no two objects share color and shape. It does not depend on small
    differences of position, so a model can learn it."""
    ordered = sorted(
        scene.objects, key=lambda o: (tuple(COLORS).index(o.color), SHAPES.index(o.shape))
    )
    parts = [f"{with_article(o.name)} {_PLACE_PHRASES[scene.place(o)]}" for o in ordered]
    if len(parts) == 1:
        return f"There is one object: {parts[0]}."
    comma = "," if len(parts) > 2 else ""
    listed = f"{', '.join(parts[:-1])}{comma} and {parts[-1]}"
    return f"There are {COUNT_WORDS[len(parts)]} objects: {listed}."
