"""All settings that change an answer or a score, as plain types.

They are the header of the predictions, and part of every report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lite.checkpoints.download import resolve
from llava_lite.evaluation.fingerprint import file_hash, model_hash
from llava_lite.evaluation.suite import Suite
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.prompt import ALIASES
from llava_lite.reduction import Reduction
from llava_lite.version import __version__


@dataclass(frozen=True)
class Origin:
    """How a model was loaded: the hash of its files (fingerprint.py), the quantization while
    loading, and whether its decode steps are compiled."""

    hash: str
    quantize: str | None = None
    compile: bool = False

    @classmethod
    def of(cls, source: str, options: Mapping[str, Any]) -> "Origin":
        """The origin of `llava_lite.load(source, **options)`. Call it after `load`: a hub id is
        then on this disk. Raises CheckpointError, EvaluationError."""
        base, tower = options.get("base"), options.get("vision_tower")
        path = resolve(
            source,
            revision=options.get("revision"),
            offline=options.get("offline", False),
            vision_tower=tower,
        )
        beside = [Path(name).expanduser() for name in (base, tower) if name]
        files = [path, *(found for found in beside if found.exists())]
        return cls(model_hash(files), options.get("quantize"), options.get("compile", False))


def model_settings(model: Model, origin: Origin, options: GenerationOptions) -> dict[str, Any]:
    """The settings of the model."""
    template = options.template or model.config.template
    return {
        "model": model.config.name,
        "model_hash": origin.hash,
        "dtype": str(model.llava.dtype).removeprefix("torch."),
        "quantize": origin.quantize,
        "compile": origin.compile,
        "device": model.llava.device.type,
        "template": ALIASES.get(template, template),
        "pad": model.config.pad,
        "exif": model.exif,
    }


def answer_settings(suite: Suite, options: GenerationOptions) -> dict[str, Any]:
    """All other settings of one evaluation, the most interesting first."""
    return {
        "suite": suite.name,
        "files": [{"name": path.name, "sha256": file_hash(path)} for path in suite.files],
        "images": images_folder(suite),
        "suite_settings": dict(suite.settings),
        "system": options.system,
        "reduction": str(Reduction.of(options.reduction)),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "stop": list(options.stop_strings),
        "llava_lite": __version__,
    }


def images_folder(suite: Suite) -> str | None:
    """The name of the folder of the images, "." for the folder of the data set's file. None if the
    file itself holds the images.

    Not the path, which differs between machines; not the content, because a machine may have a part
    of the images only."""
    if suite.folder is None:
        return None
    folder = suite.folder.absolute()
    return "." if folder == suite.files[0].absolute().parent else folder.name
