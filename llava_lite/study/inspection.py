"""`llava-lite inspect`: run a model once and draw a picture of the run, as HTML or PNG.

llava_lite.inspect("photo.jpg", "What is this?", reduction="folded-144-36").save("run.html")
"""

import os
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_lite.errors import ImageError, LlavaLiteError, PromptError
from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import with_size
from llava_lite.generation.state import as_list
from llava_lite.inputs.images import load_image
from llava_lite.inputs.pixels import load_square
from llava_lite.llava import EncodedImage
from llava_lite.reduction import NO_REDUCTION, Reduction
from llava_lite.saving import check_output, replace_file
from llava_lite.study.drawing import Drawing, xml
from llava_lite.study.figure import draw_run

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llava_lite.generation.sampling import Options

FORMATS = (".html", ".png")

# The page loads and runs nothing, whatever text a prompt or an answer has.
_POLICY = "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'"


class InspectError(LlavaLiteError):
    """The picture cannot be written to the given path."""


@dataclass(frozen=True)
class Inspection:
    """A traced run. squares: each image as the model saw it; answer: with its trace; model: its
    name. A notebook displays it as a picture."""

    squares: tuple[Image.Image, ...]
    prompt: str
    answer: Answer
    reduction: Reduction
    model: str

    def drawing(self) -> Drawing:
        """The picture as shapes."""
        return draw_run(self.squares, self.prompt, self.answer, self.reduction, self.model)

    def html(self) -> str:
        """An HTML page with everything inside: it loads and runs nothing."""
        drawing = self.drawing()
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{xml(self.model)}: {xml(self.prompt)}</title>\n"
            "<style>body{margin:0;background:#fff}svg{display:block;width:100%;max-width:"
            f"{drawing.width:g}px;height:auto;margin:auto}}</style>\n"
            f"</head>\n<body>\n{drawing.svg()}\n</body>\n</html>\n"
        )

    def png(self, scale: float = 2) -> Image.Image:
        """The picture as an image, with `scale` pixels per CSS pixel of the page."""
        return self.drawing().image(scale)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write a .html or a .png file, complete or not at all. Raises InspectError for a file
        that is already there, unless `force`."""
        output = check_picture(path, force)
        if output.suffix.lower() == ".png":
            buffer = BytesIO()
            self.png().save(buffer, "PNG", optimize=True)
            replace_file(output, buffer.getvalue())
        else:
            replace_file(output, self.html().encode())

    def _repr_html_(self) -> str:
        return self.drawing().svg()


def inspect(model: Model, image: Any, prompt: str, **options: Any) -> Inspection:
    """Answer one prompt about an image, or a list of images, and keep the trace for a picture.

    The model runs twice, because a first run is slow; the first time only for the prompt and two
    tokens. Arguments and errors as in `Model.generate`. Raises ImageError for an encoded image, and
    if there is no image."""
    if not isinstance(prompt, str):
        raise PromptError(f"one prompt is inspected, a str, not a {type(prompt).__name__}")
    sources = as_list(image)
    if not sources:
        raise ImageError("there is nothing to inspect without an image")
    if any(isinstance(source, EncodedImage) for source in sources):
        raise ImageError("an encoded image has no pixels to show: inspect the image itself")
    images = [load_image(source, exif=model.exif) for source in sources]
    options = {"batch_size": None, **options, "trace": True}
    warm_up(model, images, prompt, **options)
    answer = model.generate(images, prompt, **options)
    reduction = with_size(options.get("reduction"), options.get("image_size")) or NO_REDUCTION
    config = model.config.at(reduction.image_size)
    squares = tuple(load_square(loaded, config) for loaded in images)
    return Inspection(squares, prompt, answer, reduction, model.config.name)


def warm_up(
    model: Model,
    images: list[Image.Image],
    prompt: str,
    batch_size: int | None,
    **options: "Unpack[Options]",
) -> None:
    """Run the prompt and two tokens. The first run of a process is the slowest, and would falsify
    the times."""
    requests, wishes, size = model.read_call(images, prompt, options, batch_size)
    list(islice(model.run(requests, wishes, size), 2))  # the second token comes from a decode step


def check_picture(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The path to write to. Raises InspectError, before any work, where no file can be written or,
    without `force`, where one exists; ValueError for another ending than `FORMATS`."""
    output = Path(path)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output}: the picture is a file that ends in {' or '.join(FORMATS)}")
    check_output(output, InspectError, force)
    return output
