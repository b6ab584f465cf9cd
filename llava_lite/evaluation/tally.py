"""Outcomes of single questions, counted."""

from collections.abc import Iterable

from llava_lite.evaluation.suite import Metric


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
