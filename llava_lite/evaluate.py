"""How often a model answers questions about fresh scenes rightly, by family of question."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from llava_lite.generation import Model
from llava_lite.scenes import Question, Scene, draw_scene, questions, sample_scene

FRESH_SEED = 20_000  # training draws its scenes from other seeds


@dataclass
class Tally:
    """Right and asked answers of one family, and the wrong ones as (question, right, given)."""

    right: int = 0
    asked: int = 0
    mistakes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1 (NaN when none was asked)."""
        return self.right / self.asked if self.asked else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval of the accuracy (E. B. Wilson, JASA 22, 1927)."""
        if not self.asked:
            return math.nan, math.nan
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        n, p = self.asked, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half


def fresh_scenes(
    count: int, seed: int = FRESH_SEED, families: Collection[str] | None = None
) -> Iterator[tuple[Scene, list[Question]]]:
    """`count` scenes over the whole domain, each with one question of every family it allows, or of
    those in `families`."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng)
        by_family: dict[str, list[Question]] = {}
        for question in questions(scene, rng):
            if families is None or question.family in families:
                by_family.setdefault(question.family, []).append(question)
        yield scene, [members[rng.integers(len(members))] for members in by_family.values()]


def evaluate_scenes(
    model: Model,
    scenes: Iterable[tuple[Scene, list[Question]]],
    max_new_tokens: int = 128,
) -> dict[str, Tally]:
    """Ask every question of every scene; the answer is right when the text is exactly the expected
    one. Every image is encoded once. Returns a tally per family."""
    tallies: dict[str, Tally] = {}
    for scene, asked in scenes:
        encoded = model.encode(draw_scene(scene))
        prompts = [question.text for question in asked]
        images = [encoded] * len(asked)
        answers = model.generate(images, prompts, max_new_tokens=max_new_tokens)
        for question, answer in zip(asked, answers, strict=True):
            tally = tallies.setdefault(question.family, Tally())
            tally.asked += 1
            tally.right += answer == question.answer
            if answer != question.answer:
                tally.mistakes.append((question.text, question.answer, str(answer)))
    return tallies
