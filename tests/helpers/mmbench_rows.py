"""Rows of MMBench as its public files have them, written by tests."""

import base64
import csv
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"),
    *("l2-category", "comment", "split"),
)
MILLION = 1_000_000
FRUIT = ("apple", "pear", "plum", "fig")


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(color: str) -> str:
    return base64.b64encode(png(color)).decode()


def broken_base64() -> str:
    """A picture cut off in its middle: valid base64, but no image."""
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()[:300]).decode()


def row(index: object, **cells: object) -> dict[str, object]:
    """One row of the file: four fruit, the right one A, unless told otherwise."""
    given_options = cells.pop("options", FRUIT)
    assert isinstance(given_options, tuple)
    options = dict(zip("ABCDEF", given_options, strict=False))
    default = {
        "index": index, "question": "Which fruit?", "answer": "A", "category": "fruit",
        "l2-category": "things", "image": encoded("red"), "split": "dev",
    }  # fmt: skip
    return {**default, **options, **cells}


def rotated(base: Mapping[str, object], turns: int) -> list[dict[str, object]]:
    """The row and its rotations, whose image is that of the row."""
    options = [str(base[letter]) for letter in "ABCD" if base.get(letter, "nan") != "nan"]
    right = options["ABCD".index(str(base["answer"]))]
    rows = [dict(base)]
    for turn in range(1, turns):
        moved = options[turn:] + options[:turn]
        index = int(str(base["index"]))
        rows.append(
            {
                **base,
                **dict(zip("ABCD", moved, strict=False)),
                "index": index + turn * MILLION,
                "answer": "ABCD"[moved.index(right)],
                "image": str(index),
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
