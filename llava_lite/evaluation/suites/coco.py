"""Captions of images in the COCO formats: CIDEr-D, BLEU, ROUGE-L.

Plain:    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy: {"images": [{"filepath", "filename", "cocoid" | "imgid", "split",
                       "sentences": [{"raw"}]}]}
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric, Sample, Scores, settings_of
from llava_lite.evaluation.suites import captions
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.records import Record, read_json, records_of, refuse_repeated_ids

# LLaVA-1.5 has no official captioning run. This is the prompt of its training data.
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
MAX_NEW_TOKENS = 64
DEFAULT_SPLIT = "test"
# Karpathy's name for images of COCO's validation part that are used for training.
RESTVAL = "restval"


@dataclass(frozen=True)
class CaptionedImage:
    """One image. `image_id`: as in the file. `names`: possible names of the image file."""

    image_id: str | int
    names: tuple[str, ...]
    references: tuple[str, ...]
    where: str
    prompt: str = CAPTION_PROMPT

    @property
    def id(self) -> str:
        """The sample's id."""
        return str(self.image_id)


@dataclass
class CaptionSuite:
    """Captions against reference captions. A failed image counts as an empty caption."""

    images: Sequence[CaptionedImage]
    folder: ImageFolder
    files: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "coco"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        refuse_repeated_ids((image.id, image.where) for image in self.images)
        scored = sum(bool(image.references) for image in self.images)
        computed = {
            "tokenizer": captions.TOKENIZER,
            "idf": f"from the references of these {scored} images: CIDEr-D compares only with runs "
            "on the same images",
        }
        self.settings = settings_of(self.settings, computed)

    def samples(self) -> Sequence[Sample]:
        """One question for each image."""
        return [self.folder.sample(image.id, image.prompt, *image.names) for image in self.images]

    def select(self, ids: Collection[str]) -> "CaptionSuite":
        """The suite of these images only."""
        chosen = [image for image in self.images if image.id in ids]
        return replace(self, images=chosen)

    def score(self, answers: Mapping[str, str]) -> Scores:
        """CIDEr-D (0..10), BLEU-1..4 and ROUGE-L (0..1) on the scale of the COCO scorers. No
        metrics without reference captions."""
        scored = [image for image in self.images if image.references]
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
            {"image_id": image.image_id, "caption": answers.get(image.id, "").strip()}
            for image in self.images
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
    if not records[0].lacks("sentences"):
        settings["split"] = split or DEFAULT_SPLIT
        images = karpathy_images(records, settings["split"], path)
    elif split:
        raise EvaluationError(f"{path}: has no splits to choose {split!r} from")
    else:
        images, ignored = plain_images(records, content, path)
        settings |= ignored
    return CaptionSuite(images, ImageFolder(folder), [path], settings, name)


def plain_images(
    records: Sequence[Record], content: Mapping[str, Any], path: Path
) -> tuple[list[CaptionedImage], dict[str, int]]:
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
        references = tuple(filter(str.strip, by_image.get(image_id, [])))
        name = record.text("file_name")
        images.append(CaptionedImage(image_id, (name,), references, record.where))
    captioned = [image for image in images if image.references]
    without_image = set(by_image) - {image.image_id for image in images}
    left_out = {
        "images_without_captions": len(images) - len(captioned) if captioned else 0,
        "captions_without_image": sum(len(by_image[image_id]) for image_id in without_image),
    }
    return captioned or images, {name: count for name, count in left_out.items() if count}


def karpathy_images(records: Sequence[Record], split: str, path: Path) -> list[CaptionedImage]:
    """The images of one split. "train" includes the images moved there from COCO's validation part.

    Raises EvaluationError naming the known splits."""
    splits = {record.text("split") for record in records}
    wanted = {split, RESTVAL} if split == "train" else {split}
    chosen = [record for record in records if record.get("split") in wanted]
    if not chosen:
        raise EvaluationError(f"{path}: has no split {split!r}, only {', '.join(sorted(splits))}")
    return [karpathy_image(record) for record in chosen]


def karpathy_image(record: Record) -> CaptionedImage:
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
    return CaptionedImage(image_id, names, tuple(filter(str.strip, raw)), record.where)


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
