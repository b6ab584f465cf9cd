"""A JSON list of images with captions, or of questions with answers.

    [{"image": "a.jpg", "captions": ["a cat", "the cat"]}, ...]
    [{"image": "a.jpg", "prompt": "What is it?", "answer": "a cat"}, ...]

There is no standard for such files, so each field has several names (the tables below). The list
may also be the value of one of LIST_KEYS in an object. COCO's annotation formats are accepted, too.
All entries of a file have captions, or none has. Image paths are relative to the file or to a given
folder. The default prompt asks for a caption.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suites import own_data
from llava_lite.evaluation.suites.coco import (
    CAPTION_PROMPT,
    CaptionedImage,
    CaptionSuite,
    caption_suite,
    image_id_of,
)
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.own_data import OwnDataSuite, as_list
from llava_lite.evaluation.suites.records import Record, read_json, records_of

NAME = "data-file"
LIST_KEYS = ("data", "samples", "items", "images", "questions")
ID_NAMES = ("id", "question_id", "image_id", "cocoid", "index")
IMAGE_NAMES = (
    *("image", "images", "image_path", "img_path", "image_file", "file_name", "filename"),
    *("file", "path", "img"),
)
PROMPT_NAMES = ("prompt", "question", "text", "instruction", "query")
CAPTION_NAMES = ("captions", "caption", "references", "reference")
ANSWER_NAMES = ("answers", "answer", "ground_truth", "gt", "label")
CHOICE_NAMES = ("choices", "options")
OWN_PROMPTS = "the file's own"


def open_data_file(
    files: Sequence[Path], folder: Path | None = None
) -> CaptionSuite | OwnDataSuite:
    """The suite of a JSON file. Raises EvaluationError naming file and item."""
    [path] = files
    content = read_json(path)
    folder = folder or path.parent
    if is_coco(content):
        return caption_suite(content, path, folder, name=NAME)
    records = entries(content, path)
    if has_captions(records, path):
        images = [captioned_image(record, number) for number, record in enumerate(records, start=1)]
        settings = {"prompt": prompt_setting(records)}
        return CaptionSuite(images, ImageFolder(folder), [path], settings, NAME)
    questions = [
        own_data.question_of(
            *(record, str(number), ID_NAMES, PROMPT_NAMES),
            *(IMAGE_NAMES, ANSWER_NAMES, CHOICE_NAMES),
        )
        for number, record in enumerate(records, start=1)
    ]
    settings = {"prompt": prompt_setting(records)}
    return OwnDataSuite(questions, ImageFolder(folder), [path], settings=settings, name=NAME)


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


def has(record: Record, names: Sequence[str]) -> bool:
    """Whether the record has a field of one of these names."""
    return any(not record.lacks(name) for name in names)


def has_captions(records: Sequence[Record], path: Path) -> bool:
    """Whether the entries are images to caption, not questions.

    Raises EvaluationError for a mixture of both."""
    captions = [record for record in records if has(record, CAPTION_NAMES)]
    questions = [record for record in records if has(record, (*ANSWER_NAMES, *CHOICE_NAMES))]
    if captions and questions:
        raise EvaluationError(
            f"{path}: has captions ({captions[0].where}) and answers ({questions[0].where}), "
            "give one kind in a file"
        )
    return not questions and (bool(captions) or not all(has(r, PROMPT_NAMES) for r in records))


def prompt_setting(records: Sequence[Record]) -> str:
    """Where the prompts come from, for the settings of a report."""
    own = sum(has(record, PROMPT_NAMES) for record in records)
    if not own:
        return CAPTION_PROMPT
    return OWN_PROMPTS if own == len(records) else f"{OWN_PROMPTS}, else: {CAPTION_PROMPT}"


def captioned_image(record: Record, number: int) -> CaptionedImage:
    """One image with its reference captions."""
    names = own_data.texts_of(record, IMAGE_NAMES)
    if len(names) != 1:
        raise EvaluationError(f"{record.where}: has {len(names)} images, must be 1")
    prompt = record.text(*PROMPT_NAMES) if has(record, PROMPT_NAMES) else CAPTION_PROMPT
    return CaptionedImage(
        image_id=image_id_of(record, *ID_NAMES) if has(record, ID_NAMES) else number,
        names=names,
        references=tuple(map(str.strip, caption_texts(record))),
        where=record.where,
        prompt=prompt,
    )


def caption_texts(record: Record) -> list[str]:
    """Captions given as texts, or as objects with a text."""
    values = as_list(record.get(*CAPTION_NAMES, default=[]))
    texts = [
        Record(value, record.where).get("caption", "raw") if isinstance(value, dict) else value
        for value in values
    ]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise EvaluationError(f"{record.where}: the captions must be texts")
    return texts
