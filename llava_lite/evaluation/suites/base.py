"""The parts that suites share: a question with its right answers, and a list of questions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llava_lite.evaluation.suite import Sample, Scores, accuracy, accuracy_by_group
from llava_lite.evaluation.suites.records import refuse_repeated_ids
from llava_lite.evaluation.suites.short_answers import short_answer_score

if TYPE_CHECKING:
    from typing_extensions import Self

Judge = Callable[[str, Sequence[str]], float]


class Entry(Protocol):
    """One entry of a data set: the id of its sample, and its place for error messages."""

    @property
    def id(self) -> str: ...

    @property
    def where(self) -> str: ...


AnyEntry = TypeVar("AnyEntry", bound=Entry)


@dataclass(frozen=True)
class Question:
    """One question, ready to ask and to score.

    references: right answers; without them the question is not scored. judge: the score, 0..1, of
    an answer against the references. groups: for each kind of group, the groups of the question.
    result: the id of the question as result files have it."""

    sample: Sample
    where: str
    references: tuple[str, ...] = ()
    judge: Judge = short_answer_score
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    result: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.sample.id

    def outcome(self, answer: str | None) -> float:
        """The score of an answer, 0..1; 0 without an answer."""
        return 0.0 if answer is None else float(self.judge(answer, self.references))


@dataclass
class ListSuite(Generic[AnyEntry]):
    """A suite as a list of entries. Raises EvaluationError for repeated ids."""

    entries: Sequence[AnyEntry]
    files: Sequence[Path]
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        refuse_repeated_ids((entry.id, entry.where) for entry in self.entries)
        # A part of a suite is given the settings of the whole, and computes some of them again.
        computed = self.computed_settings()
        kept = {name: value for name, value in self.settings.items() if name not in computed}
        known = {name: value for name, value in computed.items() if value not in (None, 0)}
        self.settings = {**known, **kept}

    def computed_settings(self) -> Mapping[str, Any]:
        """The settings that depend on the entries. None and 0 are left out."""
        return {}

    def select(self, ids: Collection[str]) -> "Self":
        """The suite of these entries only."""
        return replace(self, entries=[entry for entry in self.entries if entry.id in ids])


@dataclass
class QuestionSuite(ListSuite[Question]):
    """Questions that are scored one by one. A failed question counts as wrong."""

    def computed_settings(self) -> Mapping[str, Any]:
        return {"without_reference": sum(not entry.references for entry in self.entries)}

    def samples(self) -> Sequence[Sample]:
        """All questions in the order of the files."""
        return [entry.sample for entry in self.entries]

    @property
    def scored(self) -> list[Question]:
        """The questions with known answers."""
        return [entry for entry in self.entries if entry.references]

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy, also by each kind of group; no metrics without references."""
        outcomes = [(entry, entry.outcome(answers.get(entry.id))) for entry in self.scored]
        if not outcomes:
            return Scores({})
        groups = {}
        for kind in dict.fromkeys(kind for entry, _ in outcomes for kind in entry.groups):
            shares = accuracy_by_group(
                (group, outcome)
                for entry, outcome in outcomes
                for group in entry.groups.get(kind, ())
            )
            if shares:
                groups[f"accuracy by {kind}"] = shares
        return Scores({"accuracy": accuracy(outcome for _, outcome in outcomes)}, groups)
