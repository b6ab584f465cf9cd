"""ScienceQA as LLaVA asks it: multiple choice with or without an image.

Questions: [{"id", "image"?, "conversations": [{"from": "human", "value"}, ...]}]
Problems:  {id: {"choices", "answer": index, "subject", "grade", "hint", "image", ...}}
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Scores, accuracy
from llava_lite.evaluation.suites.base import Question, QuestionSuite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.multiple_choice import LETTER_INSTRUCTIONS
from llava_lite.evaluation.suites.records import Record, as_record, read_json, records_of

MOST_CHOICES = 5
THE_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
GRADES = {f"grade{grade}": "1-6" if grade <= 6 else "7-12" for grade in range(1, 13)}


@dataclass
class ScienceQaSuite(QuestionSuite):
    """ScienceQA. A failed question, and one without a clear letter, counts as wrong."""

    name: str = "scienceqa"
    max_new_tokens: int = 1024

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy of all questions and of questions with an image, and by subject, context and
        grade as in the paper. A question may have both text and image as context."""
        scores = super().score(answers)
        with_image = [entry for entry in self.entries if entry.sample.images]
        outcomes = (entry.outcome(answers.get(entry.id)) for entry in with_image)
        return Scores({**scores.metrics, "image_accuracy": accuracy(outcomes)}, scores.groups)


def judge_letter(answer: str, references: Sequence[str]) -> float:
    """1 if the answer names the right letter by the official rules."""
    return float(parse_letter(answer) in references)


def parse_letter(answer: str) -> str | None:
    """The letter of an answer by the official rules: only a letter, a beginning such as "B. ", or
    one "The answer is B."."""
    choices = ascii_uppercase[:MOST_CHOICES]
    text = answer.strip()
    if len(text) == 1 and text in choices:
        return text
    if len(text) >= 3 and text[0] in choices and text[1:3] == ". ":
        return text[0]
    found = THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


# ---- reading -----------------------------------------------------------------------------------


def open_scienceqa(files: Sequence[Path], folder: Path) -> ScienceQaSuite:
    """The suite of a question file and problems.json, in any order.

    Raises EvaluationError naming file and item."""
    contents = {path: read_json(path) for path in files}
    asking = [path for path, content in contents.items() if isinstance(content, list)]
    problems = [path for path, content in contents.items() if isinstance(content, dict)]
    if len(asking) != 1 or len(problems) != 1:
        names = ", ".join(map(str, files))
        raise EvaluationError(
            f"{names}: must be a list of questions and an object of problems by id"
        )
    [path], [problems_path] = asking, problems
    images = ImageFolder(folder)
    questions = [
        question_of(record, problem_of(record, contents[problems_path], problems_path), images)
        for record in records_of(contents[path], path)
    ]
    return ScienceQaSuite(questions, list(files), folder)


def problem_of(record: Record, problems: Mapping[str, Any], path: Path) -> Record:
    """The entry of a question in the problem file."""
    question_id = record.id("id")
    if question_id not in problems:
        raise EvaluationError(f"{record.where}: the id {question_id!r} is not in {path}")
    return as_record(problems[question_id], f"{path}, problem {question_id}")


def question_of(record: Record, problem: Record, images: ImageFolder) -> Question:
    """One question. Raises EvaluationError for an answer that is not one of the choices."""
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not choices:
        raise EvaluationError(f"{problem.where}: 'choices' must be a list")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise EvaluationError(
            f"{problem.where}: the answer {answer!r} is not in 0..{len(choices) - 1}"
        )
    instruction = LETTER_INSTRUCTIONS["en"]
    text = human_text(record)
    prompt = text if text.endswith(instruction) else f"{text}\n{instruction}"
    names = [(record.text("image"),)] if record.has("image") else []
    groups = {
        "subject": (str(problem.get("subject", default="")),),
        "context": tuple(contexts_of(problem)),
        "grades": (GRADES.get(str(problem.get("grade")), ""),),
    }
    sample = images.sample(record.id("id"), prompt, *names)
    right = chr(ord("A") + answer)
    return Question(sample, record.where, (right,), judge_letter, groups)


def human_text(record: Record) -> str:
    """The first human turn without the image marker: LLaVA puts the image first."""
    turns = record.get("conversations", default=[])
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, dict) and turn.get("from") == "human":
                text = Record(turn, f"{record.where}: conversations").text("value")
                return text.replace("<image>", "").strip()
    raise EvaluationError(f"{record.where}: 'conversations' has no turn from 'human'")


def contexts_of(problem: Record) -> Iterator[str]:
    """The context of a question: text, an image, both or none."""
    hint, image = problem.get("hint"), problem.get("image")
    if hint:
        yield "text"
    if image:
        yield "image"
    if not hint and not image:
        yield "none"
