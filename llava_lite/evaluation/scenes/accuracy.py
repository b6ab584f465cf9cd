"""Accuracy of a model on fresh scenes, by family of question.

    tallies = evaluate_scenes(model, fresh_scenes(2000), reduction="folded-144-36")
    tallies["count"].accuracy, tallies["count"].interval(), overall(tallies).accuracy

The intervals assume independent questions. Questions about one scene are not fully independent, so
the true interval over all families is a little wider.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from llava_lite.evaluation.engine import Engine
from llava_lite.evaluation.scenes.questions import PARAPHRASES, Question, questions
from llava_lite.evaluation.scenes.smooth import draw_smooth_scene
from llava_lite.evaluation.scenes.world import Scene, draw_scene, sample_scene
from llava_lite.evaluation.suite import Sample, wilson_interval
from llava_lite.generation.loop import DEFAULT_BATCH_SIZE
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction
from llava_lite.tables import table_row

AskedScene = tuple[Scene, list[Question]]
Draw = Callable[[Scene], Image.Image]

FRESH_SEED = 20_000
FAMILIES = tuple(PARAPHRASES)
RENDERERS: dict[str, Draw] = {"plain": draw_scene, "smooth": draw_smooth_scene}
COLUMNS = "<12 >9 >19 >11"
MAX_NEW_TOKENS = 128  # the longest description takes fewer


@dataclass
class Tally:
    """Counts of right and all answers of one family, and mistakes as (question, right, given)."""

    right: int = 0
    asked: int = 0
    mistakes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1 (NaN without any question)."""
        return self.right / self.asked if self.asked else math.nan

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson)."""
        return wilson_interval(self.right, self.asked)

    def add(self, question: Question, answer: str) -> None:
        """Count one answer. It is right if it is exactly the expected text."""
        self.asked += 1
        self.right += answer == question.answer
        if answer != question.answer:
            self.mistakes.append((question.text, question.answer, answer))

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: counts, and accuracy and interval if any question was asked."""
        content: dict[str, Any] = {"right": self.right, "asked": self.asked}
        if self.asked:
            content |= {"accuracy": self.accuracy, "interval": list(self.interval())}
        return content


def overall(tallies: Mapping[str, Tally]) -> Tally:
    """The tally of all families together, without mistakes."""
    families = tallies.values()
    return Tally(sum(tally.right for tally in families), sum(tally.asked for tally in families))


def macro_accuracy(tallies: Mapping[str, Tally]) -> float:
    """Mean of the families' accuracies, with equal weights (NaN without any)."""
    return mean(tally.accuracy for tally in tallies.values()) if tallies else math.nan


def fresh_rng(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one fresh scene: no others', whatever the seed.

    Training seeds its generators with lists of numbers: [seed, index] for its scenes, [seed, index,
    1] to choose among them, and longer ones that hold the letters of a stage's name. A spawn key is
    mixed in behind four places, the last three of them empty here, which no such list has. Raises
    ValueError for a seed that is not of 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be in 0..{2**32 - 1}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))


def fresh_scenes(
    count: int, seed: int = FRESH_SEED, families: Collection[str] | None = None, first: int = 0
) -> Iterator[AskedScene]:
    """`count` scenes over the whole domain, from number `first` on, each with one question of every
    family it allows, or of those in `families`. Raises as `fresh_rng`."""
    for index in range(first, first + count):
        rng = fresh_rng(seed, index)
        scene = sample_scene(rng)
        by_family: dict[str, list[Question]] = {}
        for question in questions(scene, rng):
            by_family.setdefault(question.family, []).append(question)
        picked = [members[rng.integers(len(members))] for members in by_family.values()]
        yield scene, [one for one in picked if families is None or one.family in families]


def evaluate_scenes(
    model: Model,
    scenes: Iterable[AskedScene],
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    reduction: Reduction | str | None = None,
    batch_size: int | None = None,
    draw: Draw = draw_scene,
    reuse_prefix: bool = False,
    on_answer: Callable[[], object] | None = None,
) -> dict[str, Tally]:
    """Ask every question of every scene. An answer is right if it is exactly the expected text.

    Returns a tally per family. Images are drawn ahead of time and encoded once. `batch_size`:
    questions at once. `reuse_prefix`: as in `answer_questions`. `on_answer` is called after each
    answer. Raises as `Model.generate`."""
    options = GenerationOptions(max_new_tokens=max_new_tokens, reduction=reduction)
    engine = Engine(model, options, batch_size, reuse_prefix=reuse_prefix)
    # A scene is drawn when its image is needed.
    asked = ((partial(draw, scene), about_it) for scene, about_it in scenes)
    tallies: dict[str, Tally] = {}
    for question, answer in ask(engine, asked, on_answer):
        tallies.setdefault(question.family, Tally()).add(question, answer)
    return tallies


def ask(
    engine: Engine,
    asked: Iterable[tuple[Any, Sequence[Question]]],
    on_answer: Callable[[], object] | None = None,
) -> list[tuple[Question, str]]:
    """Every question of every image, in order, with its answer. `asked`: images with questions.

    Raises the error of a failed sample."""
    samples: list[Sample] = []
    named: dict[str, Question] = {}
    for number, (image, about_it) in enumerate(asked):
        for index, question in enumerate(about_it):
            name = f"{number}/{index}"
            samples.append(Sample(name, question.text, (image,), str(number)))
            named[name] = question
    answers: dict[str, str] = {}
    for outcome in engine.answer(samples):
        if isinstance(outcome.error, Exception):
            raise outcome.error
        answers[outcome.sample.id] = str(outcome.answer)
        if on_answer:
            on_answer()
    return [(question, answers[name]) for name, question in named.items()]


def encode(
    model: Model,
    images: Sequence[Any],
    reduction: Reduction | str | None = None,
    batch_size: int | None = None,
) -> list[EncodedImage]:
    """`Model.encode` of several images, `batch_size` at a time through the tower."""
    checked = model.reduction_for([], reduction)
    wanted = [(image, checked) for image in images]
    encoded, _ = model.encode_images(wanted, batch_size or DEFAULT_BATCH_SIZE)
    return encoded


def answer_questions(
    model: Model,
    images: Sequence[EncodedImage],
    asked: Sequence[Sequence[Question]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    reduction: Reduction | str | None = None,
    batch_size: int | None = None,
    reuse_prefix: bool = False,
) -> list[tuple[Question, str]]:
    """Every question of every image, in order, with the model's greedy answer.

    `reuse_prefix`: the text before the image and the image are prefilled once for all questions
    about the image (see shared_prefix.py). Answers are the same up to rounding. With pruning the
    whole prompt still runs for every question."""
    wish = Reduction.of(reduction)  # None asks for none, whatever the images were encoded with
    options = GenerationOptions(max_new_tokens=max_new_tokens, reduction=wish)
    engine = Engine(model, options, batch_size, workers=0, reuse_prefix=reuse_prefix)
    return ask(engine, zip(images, asked, strict=True))


def report(
    tallies: Mapping[str, Tally], settings: Mapping[str, Any], mistakes: int
) -> dict[str, Any]:
    """The report as plain types for JSON. `mistakes`: the most to list per family."""
    content = {
        **settings,
        "families": {name: tally.to_dict() for name, tally in in_order(tallies)},
        "overall": overall(tallies).to_dict(),
        "macro_accuracy": macro_accuracy(tallies) if tallies else None,
    }
    if mistakes:
        keys = ("question", "right", "given")
        content["mistakes"] = {
            name: [dict(zip(keys, wrong, strict=True)) for wrong in tally.mistakes[:mistakes]]
            for name, tally in in_order(tallies)
        }
    return content


def table(tallies: Mapping[str, Tally], mistakes: int) -> Iterator[str]:
    """The lines of the table: each family with at most `mistakes`, then all families."""
    yield table_row(COLUMNS, "family", "right", "95 % interval", "questions")
    for name, tally in in_order(tallies):
        yield tally_row(name, tally)
        for question, right, given in tally.mistakes[:mistakes]:
            yield f"    {question}  right: {right}  given: {given}"
    yield tally_row("all", overall(tallies))
    yield f"{'mean':<12}{macro_accuracy(tallies):>9.1%}   of the families"


def tally_row(name: str, tally: Tally) -> str:
    low, high = tally.interval()
    interval = f"{low:.1%} to {high:.1%}"
    return table_row(COLUMNS, name, f"{tally.accuracy:.1%}", interval, str(tally.asked))


def in_order(tallies: Mapping[str, Tally]) -> list[tuple[str, Tally]]:
    """The tallies in the order of FAMILIES."""
    return sorted(tallies.items(), key=lambda item: FAMILIES.index(item[0]))
