"""A JSON list of images with captions, or of questions with answers.

    [{"image": "a.jpg", "captions": ["a cat", "the cat"]}, ...]
    [{"image": "a.jpg", "prompt": "What is it?", "answer": "a cat"}, ...]

There is no standard for such files, so each field has several names (the table below). The list
may also be the value of one of LIST_KEYS in an object. COCO's annotation formats are accepted, too.
All entries of a file have captions, or none has. Image paths are relative to the file or to a given
folder. The default prompt asks for a caption.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suites.base import Question, QuestionSuite
from llava_lite.evaluation.suites.coco import (
    CAPTION_PROMPT,
    CaptionSuite,
    caption_question,
    caption_suite,
    image_id_of,
)
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.own_data import FieldNames, as_list, own_suite, texts_of
from llava_lite.evaluation.suites.records import Record, read_json, records_of

NAME = "data-file"
LIST_KEYS = ("data", "samples", "items", "images", "questions")
FIELDS: FieldNames = {
    "id": ("id", "question_id", "image_id", "cocoid", "index"),
    "image": (
        *("image", "images", "image_path", "img_path", "image_file", "file_name", "filename"),
        *("file", "path", "img"),
    ),
    "prompt": ("prompt", "question", "text", "instruction", "query"),
    "caption": ("captions", "caption", "references", "reference"),
    "answer": ("answers", "answer", "ground_truth", "gt", "label"),
    "choices": ("choices", "options"),
}
OWN_PROMPTS = "the file's own"


def open_data_file(files: Sequence[Path], folder: Path | None = None) -> QuestionSuite:
    """The suite of a JSON file. Raises EvaluationError naming file and item."""
    [path] = files
    content = read_json(path)
    folder = folder or path.parent
    if is_coco(content):
        return caption_suite(content, path, folder, name=NAME)
    records = entries(content, path)
    prompt = prompt_setting(records)
    if not has_captions(records, path):
        return own_suite(records, FIELDS, path, folder, NAME, prompt=prompt)
    images = ImageFolder(folder)
    captioned = [
        captioned_image(record, number, images) for number, record in enumerate(records, start=1)
    ]
    return CaptionSuite(captioned, [path], folder, {"prompt": prompt}, NAME)


def is_coco(content: Any) -> bool:
    """Whether the content is one of COCO's annotation formats."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    first = content["images"][0] if content["images"] else None
    return "annotations" in content or (isinstance(first, dict) and "sentences" in first)


def entries(content: Any, path: Path) -> list[Record]:
    """The entries of a list, or of the list in an object."""
    if isinstance(content, dict):
        for key in LIST_KEYS:
            if isinstance(content.get(key), list):
                return records_of(content, path, key)
        keys = ", ".join(map(repr, LIST_KEYS))
        raise EvaluationError(f"{path}: needs a list, or an object with a list at one of {keys}")
    return records_of(content, path)


def has_captions(records: Sequence[Record], path: Path) -> bool:
    """Whether the entries are images to caption, not questions.

    Raises EvaluationError for a mixture of both."""
    captions = [record for record in records if record.has(*FIELDS["caption"])]
    questions = [record for record in records if record.has(*FIELDS["answer"], *FIELDS["choices"])]
    if captions and questions:
        raise EvaluationError(
            f"{path}: has captions ({captions[0].where}) and answers ({questions[0].where}), "
            "give one kind in a file"
        )
    all_ask = all(record.has(*FIELDS["prompt"]) for record in records)
    return not questions and (bool(captions) or not all_ask)


def prompt_setting(records: Sequence[Record]) -> str:
    """Where the prompts come from, for the settings of a report."""
    own = sum(record.has(*FIELDS["prompt"]) for record in records)
    if not own:
        return CAPTION_PROMPT
    return OWN_PROMPTS if own == len(records) else f"{OWN_PROMPTS}, else: {CAPTION_PROMPT}"


def captioned_image(record: Record, number: int, images: ImageFolder) -> Question:
    """One image with its reference captions."""
    names = texts_of(record, FIELDS["image"])
    if len(names) != 1:
        raise EvaluationError(f"{record.where}: has {len(names)} images, must be 1")
    prompts, ids = FIELDS["prompt"], FIELDS["id"]
    prompt = record.text(*prompts) if record.has(*prompts) else CAPTION_PROMPT
    image_id = image_id_of(record, *ids) if record.has(*ids) else number
    captions = map(str.strip, caption_texts(record))
    return caption_question(image_id, names, captions, record.where, images, prompt)


def caption_texts(record: Record) -> list[str]:
    """Captions given as texts, or as objects with a text."""
    values = as_list(record.get(*FIELDS["caption"], default=[]))
    texts = [
        Record(value, record.where).get("caption", "raw") if isinstance(value, dict) else value
        for value in values
    ]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise EvaluationError(f"{record.where}: the captions must be texts")
    return texts
