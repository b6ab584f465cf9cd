"""The front door: `generate` answers a prompt, `inspect` shows the run behind an answer."""

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

from llava_lite.checkpoints.load import load, source_or_default

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llava_lite.generation.answer import Answer
    from llava_lite.generation.model import Model
    from llava_lite.generation.sampling import Options
    from llava_lite.study.inspection import Inspection


@overload
def generate(
    image: Any,
    prompt: str,
    model: "Model | str | os.PathLike[str] | None" = ...,
    *,
    batch_size: int | None = ...,
    **options: "Unpack[Options]",
) -> "Answer": ...


@overload
def generate(
    image: Any,
    prompt: "list[str] | tuple[str, ...]",
    model: "Model | str | os.PathLike[str] | None" = ...,
    *,
    batch_size: int | None = ...,
    **options: "Unpack[Options]",
) -> "list[Answer]": ...


def generate(
    image: Any,
    prompt: "str | list[str] | tuple[str, ...]",
    model: "Model | str | os.PathLike[str] | None" = None,
    *,
    batch_size: int | None = None,
    **options: "Unpack[Options]",
) -> "Answer | list[Answer]":
    """Answer a prompt about an image. See `Model.generate` for images, prompts, options and errors.

    model: a loaded model, or a source for `load`, which stays loaded for the next call. None takes
    `$LLAVA_LITE_MODEL`, or else the embedded model."""
    if model is None or isinstance(model, str | os.PathLike):
        model = load_once(source_or_default(model))
    return model.generate(image, prompt, batch_size=batch_size, **options)


def inspect(
    image: Any,
    prompt: str,
    model: "Model | str | os.PathLike[str] | None" = None,
    **options: Any,
) -> "Inspection":
    """Generate one answer and a picture of the run: `.answer`, `.save("run.html")`.

    Arguments as in `generate`. Raises as `generate`, and ImageError without an image to show."""
    from llava_lite.study import inspection

    if model is None or isinstance(model, str | os.PathLike):
        model = load_once(source_or_default(model))
    return inspection.inspect(model, image, prompt, **options)


@lru_cache(maxsize=1)
def load_once(source: str) -> "Model":
    return load(source)
