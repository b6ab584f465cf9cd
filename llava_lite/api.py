"""The front door: one call that answers a prompt, one that shows how the answer came about."""

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

from llava_lite.checkpoints.load import load, source_or_default

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model
    from llava_lite.study.inspection import Inspection


@overload
def generate(
    image: Any,
    prompt: str,
    model: "Model | str | os.PathLike[str] | None" = ...,
    **options: Any,
) -> "Answer": ...


@overload
def generate(
    image: Any,
    prompt: "list[str] | tuple[str, ...]",
    model: "Model | str | os.PathLike[str] | None" = ...,
    **options: Any,
) -> "list[Answer]": ...


def generate(
    image: Any,
    prompt: "str | list[str] | tuple[str, ...]",
    model: "Model | str | os.PathLike[str] | None" = None,
    **options: Any,
) -> "Answer | list[Answer]":
    """Answer a prompt about an image; see `Model.generate` for images, prompts, options and errors.

    `model`: a loaded one, or a source for `load`, which is kept loaded for the next call. Without
    it `$LLAVA_LITE_MODEL` is used, else the embedded model."""
    if model is None or isinstance(model, str | os.PathLike):
        model = load_once(source_or_default(model))
    return model.generate(image, prompt, **options)


def inspect(
    image: Any,
    prompt: str,
    model: "Model | str | os.PathLike[str] | None" = None,
    **options: Any,
) -> "Inspection":
    """`generate` one answer, and the picture of how it came about: `.save("run.html")`, `.answer`.

    Raises as `generate`, and ImageError without an image that can be shown."""
    from llava_lite.study import inspection

    if model is None or isinstance(model, str | os.PathLike):
        model = load_once(source_or_default(model))
    return inspection.inspect(model, image, prompt, **options)


@lru_cache(maxsize=1)
def load_once(source: str) -> "Model":
    return load(source)
