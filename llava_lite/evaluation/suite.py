"""The interface of a data set: samples to ask, and scores from the answers.

    suite.samples() -> engine asks the model -> {sample id: answer} -> suite.score(answers)

A suite knows a file format, the official prompts and the official scoring. It knows no model.
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

    id: unique in the suite. prompt: the text for the model; without `<image>` markers images go
    first. images: as for `Model.generate`, or functions that return an image when it is needed.
    image_key: samples with the same key have the same images, which are encoded once. error: why
    the sample cannot be asked."""

    id: str
    prompt: str
    images: tuple[Any, ...] = ()
    image_key: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number: `value` over `count` items (accuracies 0..1). `interval`: its 95 % interval."""

    value: float
    count: int
    interval: tuple[float, float] | None = None

    @classmethod
    def share(cls, right: float, count: int) -> "Metric":
        """An accuracy with its Wilson interval; NaN if `count` is 0."""
        if not count:
            return cls(math.nan, 0)
        return cls(right / count, count, wilson_interval(right, count))


@dataclass(frozen=True)
class Scores:
    """`metrics` of the whole suite, the main one first.

    `groups`: metrics by, for example, category: {kind of group: {group: metric}}."""

    metrics: Mapping[str, Metric]
    groups: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)


def accuracy(outcomes: Iterable[float]) -> Metric:
    """Mean of outcomes of 0..1, with its interval."""
    listed = list(outcomes)
    return Metric.share(sum(listed), len(listed))


def accuracy_by_group(outcomes: Iterable[tuple[str, float]]) -> dict[str, Metric]:
    """The accuracy of each group, from (group, outcome) pairs. Empty group names are left out."""
    groups: dict[str, list[float]] = {}
    for group, outcome in outcomes:
        if group:
            groups.setdefault(group, []).append(outcome)
    return {group: accuracy(groups[group]) for group in sorted(groups)}


class Suite(Protocol):
    """A data set with its official prompts and scoring."""

    name: str
    files: Sequence[Path]  # the score depends on their content
    folder: Path | None  # of the images; None if the files hold the images
    max_new_tokens: int  # the official limit
    settings: Mapping[str, Any]  # all else that changes a score: language, tokenizer, ...

    def samples(self) -> Sequence[Sample]:
        """All questions, in the order of the files."""
        ...

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores from the answers by sample id. A missing answer counts as wrong."""
        ...

    def select(self, ids: Collection[str]) -> "Suite":
        """The suite of these samples only, for the score of a part."""
        ...


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share (E. B. Wilson, JASA 22, 1927); NaNs if `count` is 0."""
    if not count:
        return math.nan, math.nan
    z = NormalDist().inv_cdf(0.975)
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # At 0 and 1 the interval must end at the accuracy, whatever the rounding.
    return min(middle - half, p) if p else 0.0, max(middle + half, p) if p < 1 else 1.0
