"""LLaVA-1.5 in small files: an image and a question in, an answer out.

    import llava_lite
    print(llava_lite.generate("photo.jpg", "What is in this picture?"))

Start reading at `llava_lite/llava.py`. Importing this package is cheap: torch and everything else
heavy is imported at the first use of a name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_lite.errors import CheckpointError, ContextError, ImageError, LlavaLiteError, PromptError
from llava_lite.version import __version__

if TYPE_CHECKING:
    from llava_lite.api import generate, inspect
    from llava_lite.checkpoints.load import embedded_model, load
    from llava_lite.checkpoints.thresholds import read_thresholds
    from llava_lite.generation.answer import Answer, Score
    from llava_lite.generation.chat import Chat
    from llava_lite.generation.model import Model
    from llava_lite.llava import EncodedImage
    from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction, ToMe
    from llava_lite.study.inspection import Inspection

__all__ = [
    "Answer",
    "Chat",
    "CheckpointError",
    "ContextError",
    "DToMe",
    "EncodedImage",
    "FastV",
    "ImageError",
    "Inspection",
    "LlavaLiteError",
    "Model",
    "PromptError",
    "REDUCTIONS",
    "Reduction",
    "Score",
    "ToMe",
    "__version__",
    "embedded_model",
    "generate",
    "inspect",
    "load",
    "read_thresholds",
]

# The module that defines each public name.
_HOMES = {
    "api": ("generate", "inspect"),
    "checkpoints.load": ("embedded_model", "load"),
    "checkpoints.thresholds": ("read_thresholds",),
    "generation.answer": ("Answer", "Score"),
    "generation.chat": ("Chat",),
    "generation.model": ("Model",),
    "llava": ("EncodedImage",),
    "reduction": ("DToMe", "FastV", "REDUCTIONS", "Reduction", "ToMe"),
    "study.inspection": ("Inspection",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
