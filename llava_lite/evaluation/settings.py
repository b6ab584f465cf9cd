"""Everything that changes an answer or a score, as plain types: the header of predictions, and part
of every report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_lite import __version__
from llava_lite.evaluation.fingerprint import file_hash
from llava_lite.evaluation.images import ImageFolder
from llava_lite.evaluation.suite import Suite
from llava_lite.generation import Model
from llava_lite.prompt import ALIASES
from llava_lite.reduction import Reduction
from llava_lite.sampling import GenerationOptions


@dataclass(frozen=True)
class ModelSource:
    """How a model was loaded: the hash of its files (fingerprint.py), how its weights were rounded
    while loading, and whether its steps are compiled."""

    hash: str
    quantize: str | None = None
    compile: bool = False


def answer_settings(
    suite: Suite, model: Model, source: ModelSource, options: GenerationOptions
) -> dict[str, Any]:
    """All settings of one evaluation, in the order in which people read them."""
    template = options.template or model.config.template
    return {
        "suite": suite.name,
        "files": [{"name": path.name, "sha256": file_hash(path)} for path in suite.files],
        "images": images_folder(suite),
        "suite_settings": dict(suite.settings),
        "model": model.config.name,
        "model_hash": source.hash,
        "dtype": str(model.llava.dtype).removeprefix("torch."),
        "quantize": source.quantize,
        "compile": source.compile,
        "device": model.llava.device.type,
        "template": ALIASES.get(template, template),
        "system": options.system,
        "pad": model.config.pad,
        "exif": model.exif,
        "reduction": str(Reduction.of(options.reduction)),
        **decoding_settings(options),
        "llava_lite": __version__,
    }


def images_folder(suite: Suite) -> str | None:
    """The name of the folder that holds the images, "." for that of the data set's file; None where
    the file holds them. Not its path, which may differ between machines, nor its content: a machine
    may have a part of it."""
    images = getattr(suite, "folder", None)
    if not isinstance(images, ImageFolder):
        return None
    folder = images.folder.absolute()
    return "." if folder == suite.files[0].absolute().parent else folder.name


def decoding_settings(options: GenerationOptions) -> Mapping[str, Any]:
    """How tokens are chosen, and where an answer ends."""
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "stop": list(options.stop_strings),
    }
