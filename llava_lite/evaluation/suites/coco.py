"""Captions of images in the COCO formats: CIDEr-D, BLEU, ROUGE-L.

Plain:    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy: {"images": [{"filepath", "filename", "cocoid" | "imgid", "split",
                       "sentences": [{"raw"}]}]}
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric, Scores
from llava_lite.evaluation.suites import captions
from llava_lite.evaluation.suites.base import Question, QuestionSuite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import Record, read_json, records_of

# LLaVA-1.5 has no official captioning run. This is the prompt of its training data.
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
DEFAULT_SPLIT = "test"
# Karpathy's name for images of COCO's validation part that are used for training.
RESTVAL = "restval"


@dataclass
class CaptionSuite(QuestionSuite):
    """Captions against reference captions. A failed image counts as an empty caption."""

    name: str = "coco"
    max_new_tokens: int = 64

    def computed_settings(self) -> Mapping[str, Any]:
        return {
            "tokenizer": captions.TOKENIZER,
            "idf": f"from the references of these {len(self.scored)} images: CIDEr-D compares only "
            "with runs on the same images",
        }

    def score(self, answers: Mapping[str, str]) -> Scores:
        """CIDEr-D (0..10), BLEU-1..4 and ROUGE-L (0..1) on the scale of the COCO scorers. No
        metrics without reference captions."""
        scored = self.scored
        if not scored:
            return Scores({})
        candidates = [captions.tokenize(answers.get(image.id, "")) for image in scored]
        references = [list(map(captions.tokenize, image.references)) for image in scored]
        bleu = captions.bleu(candidates, references)
        values = {
            "cider_d": mean(captions.cider_d(candidates, references)),
            **{f"bleu_{order}": bleu[order - 1] for order in captions.ORDERS},
            "rouge_l": mean(captions.rouge_l(candidates, references)),
        }
        return Scores({name: Metric(value, len(scored)) for name, value in values.items()})

    def export(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the COCO result format: [{"image_id", "caption"}], every image once."""
        results = [
            {**image.result, "caption": answers.get(image.id, "").strip()} for image in self.entries
        ]
        path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")


# ---- reading -----------------------------------------------------------------------------------


def open_coco(files: Sequence[Path], folder: Path, split: str | None = None) -> CaptionSuite:
    """The suite of an annotation file. `split`: for Karpathy's format, "test" by default.

    Raises EvaluationError naming file and item."""
    [path] = files
    return caption_suite(read_json(path), path, folder, split)


def caption_suite(
    content: Any, path: Path, folder: Path, split: str | None = None, name: str = "coco"
) -> CaptionSuite:
    """The suite of the content of a file in either format."""
    records = records_of(content, path, "images")
    settings: dict[str, Any] = {"prompt": CAPTION_PROMPT}
    finder = ImageFolder(folder)
    if records[0].has("sentences"):
        settings["split"] = split or DEFAULT_SPLIT
        images = karpathy_images(records, settings["split"], path, finder)
    elif split:
        raise EvaluationError(f"{path}: has no splits to choose {split!r} from")
    else:
        images, ignored = plain_images(records, content, path, finder)
        settings |= ignored
    return CaptionSuite(images, [path], folder, settings, name)


def caption_question(
    image_id: str | int,
    names: Sequence[str],
    references: Iterable[str],
    where: str,
    finder: ImageFolder,
    prompt: str = CAPTION_PROMPT,
) -> Question:
    """One image. `image_id`: as in the file. `names`: possible names of the image file."""
    sample = finder.sample(str(image_id), prompt, names)
    return Question(sample, where, tuple(references), result={"image_id": image_id})


def plain_images(
    records: Sequence[Record], content: Mapping[str, Any], path: Path, finder: ImageFolder
) -> tuple[list[Question], dict[str, int]]:
    """The images with captions (all images if no image has captions), and the number left out."""
    by_image: dict[str | int, list[str]] = {}
    if content.get("annotations"):
        for annotation in records_of(content, path, "annotations"):
            by_image.setdefault(image_id_of(annotation, "image_id"), []).append(
                caption_of(annotation, "caption")
            )
    images = []
    for record in records:
        image_id = image_id_of(record, "id")
        references = filter(str.strip, by_image.get(image_id, []))
        names = (record.text("file_name"),)
        images.append(caption_question(image_id, names, references, record.where, finder))
    captioned = [image for image in images if image.references]
    without_image = set(by_image) - {image.result["image_id"] for image in images}
    left_out = {
        "images_without_captions": len(images) - len(captioned) if captioned else 0,
        "captions_without_image": sum(len(by_image[image_id]) for image_id in without_image),
    }
    return captioned or images, {name: count for name, count in left_out.items() if count}


def karpathy_images(
    records: Sequence[Record], split: str, path: Path, finder: ImageFolder
) -> list[Question]:
    """The images of one split. "train" includes the images moved there from COCO's validation part.

    Raises EvaluationError naming the known splits."""
    splits = {record.text("split") for record in records}
    wanted = {split, RESTVAL} if split == "train" else {split}
    chosen = [record for record in records if record.get("split") in wanted]
    if not chosen:
        raise EvaluationError(f"{path}: has no split {split!r}, only {', '.join(sorted(splits))}")
    return [karpathy_image(record, finder) for record in chosen]


def karpathy_image(record: Record, finder: ImageFolder) -> Question:
    """One image. Its file is in its `filepath` or directly in the folder."""
    image_id = image_id_of(record, "cocoid", "imgid")
    file = record.text("filename")
    subfolder = record.get("filepath", default="")
    names = (f"{subfolder}/{file}", file) if subfolder else (file,)
    where = f"{record.where}: sentences"
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(one, dict) for one in sentences):
        raise EvaluationError(f"{where}: not a list of objects")
    raw = (caption_of(Record(sentence, where), "raw") for sentence in sentences)
    return caption_question(image_id, names, filter(str.strip, raw), record.where, finder)


def image_id_of(record: Record, *names: str) -> str | int:
    """The id with its type, because the result file must have the same id."""
    record.id(*names)
    value: str | int = record.get(*names)
    return value


def caption_of(record: Record, name: str) -> str:
    """A caption. It may be blank: published files have blank captions."""
    caption = record.get(name)
    if not isinstance(caption, str):
        raise EvaluationError(f"{record.where}: needs a text in {name!r}")
    return caption
