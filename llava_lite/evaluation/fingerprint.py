"""Hashes of the files that an answer depends on. They depend on content only, not on dates.

A converted model's manifest holds the sha256 of all its tensors, so the manifest is hashed instead.
For any other checkpoint, small files are hashed whole, and large files by their size and 64 blocks
of 64 KiB spread over the file. That is enough, because training changes every tensor. Reading all
of a 7B model would take as long as loading it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llava_lite.checkpoints.tensors import CHECKPOINT_FILES
from llava_lite.errors import EvaluationError

SMALL_BYTES = 1 << 24
BLOCKS, BLOCK_BYTES = 64, 1 << 16
CONVERTED_FILES = ("manifest.json", "config.json", "tokenizer.json", "thresholds.json")


def file_hash(path: Path) -> str:
    """sha256 of a file's content. Raises EvaluationError."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def model_hash(sources: Iterable[Path]) -> str:
    """sha256 over a model's folder or file, and over its base and vision tower if given."""
    digest = hashlib.sha256()
    try:
        for source in sources:
            for file in model_files(source):
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                digest.update(sampled_hash(file))
    except OSError as error:
        raise EvaluationError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def model_files(source: Path) -> list[Path]:
    """The files to hash for a checkpoint."""
    if not source.is_dir():
        return [source]
    if (source / "manifest.json").is_file():
        return [source / name for name in CONVERTED_FILES if (source / name).is_file()]
    found = {file for pattern in CHECKPOINT_FILES for file in source.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def sampled_hash(path: Path) -> bytes:
    """sha256 of a small file, or of blocks spread evenly over a large one, both ends included."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= SMALL_BYTES:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
