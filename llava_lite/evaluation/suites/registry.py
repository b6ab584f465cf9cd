"""All data sets that can be evaluated, by name.

suite = open_suite("mmbench", [Path("MMBench_DEV_EN.tsv")], language="en")
suite.samples(), suite.score({"241": "B", ...}).metrics["circular"]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Suite
from llava_lite.evaluation.suites.coco import open_coco
from llava_lite.evaluation.suites.data_file import open_data_file
from llava_lite.evaluation.suites.mmbench import open_mmbench
from llava_lite.evaluation.suites.own_data import open_jsonl
from llava_lite.evaluation.suites.pope import open_pope
from llava_lite.evaluation.suites.scienceqa import open_scienceqa
from llava_lite.evaluation.suites.vqa import open_vqa


@runtime_checkable
class Exporting(Protocol):
    """A suite with an official file format for answers."""

    def export(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the answers in the official format for results."""
        ...


@dataclass(frozen=True)
class SuiteKind:
    """How to open one kind of data set.

    `usage` names the paths, `options` explains the options. The data set has `fewest` to `most`
    files. `folder`: it needs a folder of images (True), may have one (None) or has none (False)."""

    usage: str
    summary: str
    open: Callable[..., Suite]
    folder: bool | None
    fewest: int = 1
    most: int = 1
    options: Mapping[str, str] = field(default_factory=dict)


SUITES: dict[str, SuiteKind] = {
    "mmbench": SuiteKind(
        usage="FILE.tsv",
        summary="MMBench, English or Chinese: circular and vanilla accuracy",
        open=open_mmbench,
        folder=False,
        options={
            "language": "of the questions and the instruction, en or cn",
            "circular": "ask every rotation of the options, for files without rotated rows",
        },
    ),
    "coco": SuiteKind(
        usage="IMAGES_FOLDER ANNOTATIONS.json",
        summary="captions in COCO's or Karpathy's format: CIDEr-D, BLEU, ROUGE-L",
        open=open_coco,
        folder=True,
        options={"split": "of a Karpathy file (default: test)"},
    ),
    "pope": SuiteKind(
        usage="QUESTIONS.jsonl [MORE.jsonl ...] IMAGES_FOLDER",
        summary="POPE: is an object there? F1, accuracy, precision, recall, share of yes",
        open=open_pope,
        folder=True,
        most=100,
    ),
    "vqa": SuiteKind(
        usage="QUESTIONS.json [ANNOTATIONS.json] IMAGES_FOLDER",
        summary="VQAv2, VizWiz, TextVQA, GQA: short answers, VQA accuracy",
        open=open_vqa,
        folder=True,
        most=3,
        options={"ocr": "give the OCR tokens of the file with the question (TextVQA)"},
    ),
    "scienceqa": SuiteKind(
        usage="QUESTIONS.json PROBLEMS.json [IMAGES_FOLDER]",
        summary="ScienceQA in LLaVA's format: accuracy by subject, context and grade",
        open=open_scienceqa,
        folder=None,
        fewest=2,
        most=2,
    ),
    "jsonl": SuiteKind(
        usage="FILE.jsonl [IMAGES_FOLDER]",
        summary="questions of your own: image, question, answers, perhaps choices",
        open=open_jsonl,
        folder=None,
        options={"short_answer": "ask for a single word or phrase"},
    ),
    "data-file": SuiteKind(
        usage="FILE.json [IMAGES_FOLDER]",
        summary="a JSON list of images with captions, or of questions with answers",
        open=open_data_file,
        folder=None,
    ),
}


def open_suite(name: str, paths: Sequence[Path], **options: Any) -> Suite:
    """Open a suite by name, with its files and its folder of images in any order.

    An option that is None counts as not given. Raises EvaluationError for an unknown name or
    option, for missing, too few or too many files, and for bad content, naming file and line."""
    if name not in SUITES:
        raise EvaluationError(f"unknown suite {name!r}, known are {', '.join(SUITES)}")
    kind = SUITES[name]
    given = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(kind.options))
    if unknown:
        raise EvaluationError(f"{name} takes no option {', '.join(unknown)}")
    files, folder = split_paths(name, paths)
    if kind.folder is False:
        return kind.open(files, **given)
    if kind.folder is None and folder is None:
        folder = files[0].parent
    return kind.open(files, folder, **given)


def split_paths(name: str, paths: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """The files and the folder among the paths. Raises EvaluationError for a wrong number."""
    kind = SUITES[name]
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise EvaluationError(f"{path}: no such file or folder")
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    fits = kind.fewest <= len(files) <= kind.most
    fits &= len(folders) <= 1 and kind.folder in (None, bool(folders))
    if not fits:
        got = f"{len(files)} files and {len(folders)} folders"
        raise EvaluationError(f"{name} takes {kind.usage}, got {got}")
    if len(set(files)) < len(files):
        raise EvaluationError(f"{name}: a file is given twice")
    return files, folders[0] if folders else None
