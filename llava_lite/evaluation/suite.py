"""What a data set is to the engine: samples to ask, and scores from the answers.

    suite.samples() -> engine asks the model -> {sample id: answer} -> suite.score(answers)

A suite knows a file format, the official prompts and the official scoring, and nothing of models.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One question, ready to ask.

    `id` is unique in the suite. `prompt` is the text that the model gets, `<image>` included only
    where its place matters (otherwise images go first). `images` are whatever `Model.generate`
    takes, or functions that return it, called when it is needed. Samples with the same `image_key`
    show the same images, which then are encoded once. `error` says why a row cannot be asked at
    all."""

    id: str
    prompt: str
    images: tuple[Any, ...] = ()
    image_key: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number: `value` as the field prints it (accuracies 0..1), over `count` items; `interval`
    the 95 % interval where there is one."""

    value: float
    count: int
    interval: tuple[float, float] | None = None

    @classmethod
    def share(cls, right: float, count: int) -> "Metric":
        """An accuracy with its Wilson interval; NaN of nothing."""
        if not count:
            return cls(math.nan, 0)
        return cls(right / count, count, wilson_interval(right, count))


@dataclass(frozen=True)
class Scores:
    """`metrics` of the whole suite, the headline first; `groups` the same by, say, category:
    {kind of group: {group: metric}}."""

    metrics: Mapping[str, Metric]
    groups: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)


def accuracy(outcomes: Iterable[float]) -> Metric:
    """Mean of outcomes of 0..1, with its interval."""
    listed = list(outcomes)
    return Metric.share(sum(listed), len(listed))


def accuracy_by_group(outcomes: Iterable[tuple[str, float]]) -> dict[str, Metric]:
    """The same of every group from (group, outcome) pairs, by name; no group is the empty name."""
    groups: dict[str, list[float]] = {}
    for group, outcome in outcomes:
        if group:
            groups.setdefault(group, []).append(outcome)
    return {group: accuracy(groups[group]) for group in sorted(groups)}


def settings_of(given: Mapping[str, Any], computed: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's settings: those `computed` from its samples, without what there is none of (None or
    0), and those `given`. A part of a suite is given the whole one's, and computes its own."""
    kept = {name: value for name, value in given.items() if name not in computed}
    return {**{name: value for name, value in computed.items() if value not in (None, 0)}, **kept}


class Suite(Protocol):
    """A data set with its official prompts and scoring."""

    name: str
    files: Sequence[Path]  # whose content the score depends on
    max_new_tokens: int  # the official one
    settings: Mapping[str, Any]  # whatever else changes a score: language, tokeniser, ...

    def samples(self) -> Sequence[Sample]:
        """All questions, in the order of the files."""
        ...

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores from the answers by sample id. A missing id failed: it counts as wrong."""
        ...

    def select(self, ids: Collection[str]) -> "Suite":
        """The suite of these samples only, for the score of a part."""
        ...


def wilson_interval(right: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, JASA 22, 1927); NaNs of nothing."""
    if not count:
        return math.nan, math.nan
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # At 0 and at 1 the interval ends where the accuracy is: not beyond it by rounding.
    return min(middle - half, p) if p else 0.0, max(middle + half, p) if p < 1 else 1.0
