"""COCO captions in both formats of the field, with pictures, written by tests."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.eval_command import draw, write_json

WORDS = (
    "a the man dog cat street red blue riding bike on in with two people star under tree".split()
)
COCO_BROKEN = "139"


def words_of(rng: random.Random) -> list[str]:
    return rng.choices(WORDS, k=rng.randint(4, 12))


def sentence(words: Sequence[str]) -> str:
    return " ".join(words).capitalize() + "."


def words_in(caption: str) -> list[str]:
    """The words of a caption that `sentence` made."""
    return caption.lower().removesuffix(".").split()


def drawn_references(folder: Path) -> dict[str, list[str]]:
    """Captions of 50 images, five for each, whose files are drawn; one picture is broken."""
    rng = random.Random(50)
    ids = [str(139 + 17 * place) for place in range(50)]
    for place, name in enumerate(ids):
        draw(folder / "val2014" / coco_name(name), -1 if name == COCO_BROKEN else place)
    return {name: [sentence(words_of(rng)) for _ in range(5)] for name in ids}


def coco_name(image_id: str) -> str:
    """JPEG files, and PNG files for every other image."""
    return f"COCO_val2014_{image_id:0>12}.{'jpg' if int(image_id) % 2 else 'png'}"


def plain_file(path: Path, references: Mapping[str, Sequence[str]]) -> Path:
    images = [
        {"id": int(name), "file_name": coco_name(name), "height": 30, "width": 40}
        for name in references
    ]
    annotations = [
        {"id": 1000 * int(name) + place, "image_id": int(name), "caption": caption}
        for name, listed in references.items()
        for place, caption in enumerate(listed)
    ]
    random.Random(3).shuffle(annotations)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    return write_json(path, content)


def karpathy_file(path: Path, references: Mapping[str, Sequence[str]]) -> Path:
    """With an image of each other split, whose captions must not count."""
    images: list[dict[str, Any]] = [
        karpathy_image(f"{9_000 + place}", split, [sentence(WORDS)])
        for place, split in enumerate(("train", "restval", "val"))
    ]
    images[1:1] = [karpathy_image(name, "test", listed) for name, listed in references.items()]
    return write_json(path, {"dataset": "coco", "images": images})


def karpathy_image(name: str, split: str, listed: Sequence[str]) -> dict[str, Any]:
    sentences = [
        {"raw": raw, "tokens": words_in(raw), "imgid": int(name), "sentid": place}
        for place, raw in enumerate(listed)
    ]
    return {
        "filepath": "val2014", "filename": coco_name(name), "cocoid": int(name), "split": split,
        "imgid": 7, "sentids": [], "sentences": sentences,
    }  # fmt: skip
