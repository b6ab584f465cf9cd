"""LLaVA-1.5 in small files: an image and a question in, an answer out.

    import llava_lite
    print(llava_lite.generate("photo.jpg", "What is in this picture?"))

Start reading at `llava_lite/llava.py`. Importing this package imports neither torch nor anything
else heavy; that happens at the first use.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from llava_lite.errors import (
    CheckpointError,
    ContextError,
    ImageError,
    LlavaLiteError,
    PromptError,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llava_lite.answer import Answer, Score
    from llava_lite.chat import Chat
    from llava_lite.config import LlavaConfig
    from llava_lite.generation import EncodedImage, Model
    from llava_lite.inspection import Inspection
    from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction, ToMe
    from llava_lite.sources import Source
    from llava_lite.thresholds import read_thresholds
    from llava_lite.tokenizer import Tokenizer

__version__ = "0.1.0"

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

# `generation` has them all: those it does not define, it imports.
_FROM_GENERATION = ("Answer", "Chat", "EncodedImage", "Model", "Score")
_FROM_REDUCTION = ("DToMe", "FastV", "REDUCTIONS", "Reduction", "ToMe")


def __getattr__(name: str) -> Any:
    if name in _FROM_GENERATION:
        return getattr(import_module("llava_lite.generation"), name)
    if name in _FROM_REDUCTION:
        return getattr(import_module("llava_lite.reduction"), name)
    if name == "Inspection":
        return getattr(import_module("llava_lite.inspection"), name)
    if name == "read_thresholds":
        return getattr(import_module("llava_lite.thresholds"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        model = _load_once(_source_or_default(model))
    return model.generate(image, prompt, **options)


def inspect(
    image: Any,
    prompt: str,
    model: "Model | str | os.PathLike[str] | None" = None,
    **options: Any,
) -> "Inspection":
    """`generate` one answer, and the picture of how it came about: `.save("run.html")`, `.answer`.

    Raises as `generate`, and ImageError without an image that can be shown."""
    from llava_lite import inspection

    if model is None or isinstance(model, str | os.PathLike):
        model = _load_once(_source_or_default(model))
    return inspection.inspect(model, image, prompt, **options)


def load(
    source: "str | os.PathLike[str] | None" = None,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    download: bool = False,
    revision: str | None = None,
    offline: bool = False,
    base: str | Path | None = None,
    vision_tower: "str | Path | nn.Module | None" = None,
    pad: bool | None = None,
    exif: bool = True,
    quantize: str | None = None,
    compile: bool = False,
    tensor_parallel: bool = False,
) -> "Model":
    """Load a model: a converted folder, any official layout, or a hub id (`owner/name`).

    source: None means `$LLAVA_LITE_MODEL`, else the embedded model.
    device: "auto" is the first of cuda, mps, cpu that is there.
    dtype: "float32", "bfloat16", "float16" or the torch dtype; "auto" is the dtype of the file, but
        bfloat16 for a float16 file on the CPU, where float16 arithmetic is about ten times slower.
    download: fetch a hub id that is not on this disk; without it the error says how large it is.
    revision, offline: of a hub id; offline never asks the network.
    base: the model below a LoRA adapter or a projector file. vision_tower: the CLIP folder or file
        for a checkpoint without its own, or an open_clip model object.
    pad: images padded to a square (True) or cropped to one (False), instead of what the
        checkpoint's config says. exif: turn images as the camera noted; LLaVA itself does not.
    quantize: "int8" or "int4" rounds the decoder's linear layers while loading (quantize.py); a
        folder that `llava-lite convert --quantize` wrote is loaded as what it is.
    compile: decode in steps of fixed shapes (static_decode.py): on CUDA replayed as a graph,
        elsewhere through `torch.compile`, which takes minutes when it first meets a large model.
    tensor_parallel: spread the decoder over the processes that `torchrun` started, each of which
        makes this call, and then the same ones (tensor_parallel.py); "cuda" is then a GPU for each.

    Raises CheckpointError, LlavaLiteError where nothing can be compiled or torchrun is missing, and
    ValueError for a device, dtype or quantisation that does not exist here, and for what does not
    go together."""
    from llava_lite.download import resolve
    from llava_lite.quantize import method_named

    if quantize is not None:
        method_named(quantize)  # a wrong name is said before anything is fetched
    if tensor_parallel and (quantize is not None or compile):
        raise ValueError("tensor_parallel goes neither with quantize nor with compile")

    def find() -> Path:
        return resolve(
            _source_or_default(source),
            download_missing=download,
            revision=revision,
            offline=offline,
            vision_tower=vision_tower,
        )

    def read(path: Path, device: "torch.device") -> _Checkpoint:
        return _open_checkpoint(path, device, dtype, base, vision_tower, pad)

    if tensor_parallel:
        return _load_share(find, read, device, exif)
    return _load_whole(find, read, device, exif, quantize, compile)


class _Checkpoint(NamedTuple):
    """A checkpoint whose weights have yet to be read: all that a model takes beside them."""

    source: "Source"
    dtype: "torch.dtype"
    tokenizer: "Tokenizer"
    config: "LlavaConfig"
    thresholds: "tuple[float, ...] | CheckpointError | None"


def _open_checkpoint(
    path: Path,
    device: "torch.device",
    dtype: "str | torch.dtype",
    base: str | Path | None,
    vision_tower: "str | Path | nn.Module | None",
    pad: bool | None,
) -> _Checkpoint:
    from llava_lite.checkpoint import load_tokenizer, parse_dtype
    from llava_lite.quantized_checkpoint import open_source
    from llava_lite.thresholds import own_thresholds_or_error

    wanted = None if dtype == "auto" else parse_dtype(dtype)
    source = open_source(path, base, vision_tower)
    return _Checkpoint(
        source,
        wanted or _pick_dtype(source.dtype, device),
        load_tokenizer(source.tokenizer_file or path, source.config),
        source.config if pad is None else replace(source.config, pad=pad),
        own_thresholds_or_error(source),
    )


def _load_whole(
    find: Callable[[], Path],
    read: "Callable[[Path, torch.device], _Checkpoint]",
    device: "str | torch.device",
    exif: bool,
    quantize: str | None,
    compile: bool,
) -> "Model":
    """What the only process does."""
    from llava_lite.generation import Model
    from llava_lite.kernels import choose_kernels
    from llava_lite.quantized_checkpoint import load_source
    from llava_lite.static_decode import CompiledModel, checked_way

    path, own = find(), _pick_device(device)
    if compile:
        checked_way(None, own)  # before anything slow
    source, dtype, tokenizer, config, thresholds = read(path, own)
    llava = load_source(source, own, dtype, quantize)
    choose_kernels(llava.decoder)
    model = Model(llava, tokenizer, config, exif, thresholds)
    return CompiledModel(model) if compile else model


def _load_share(
    find: Callable[[], Path],
    read: "Callable[[Path, torch.device], _Checkpoint]",
    device: "str | torch.device",
    exif: bool,
) -> "Model":
    """What each of several processes does."""
    from llava_lite.ranks import join

    ranks = join()
    path = ranks.from_first(find)
    own = ranks.own_device(device, _pick_device)
    with ranks.together():
        source, dtype, tokenizer, config, thresholds = read(path, own)
    ranks.require_same("the dtypes", dtype)
    from llava_lite.tensor_parallel import ParallelModel, load_share

    share = load_share(source, ranks, own, dtype)
    return ParallelModel(share, tokenizer, config, exif, thresholds)


def embedded_model() -> Path:
    """Folder of the small model that comes with the package. Raises CheckpointError without one."""
    package = Path(__file__).resolve().parent
    # Inside the package where a wheel was installed, beside it in a source checkout.
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("this installation carries no embedded model: name a model to load")


_EMBEDDED_NOTICE = (
    "llava_lite: using the embedded model, which knows only drawn scenes of colored shapes. For "
    "the real one run `llava-lite download` or `llava-lite convert`, and name the folder as the "
    "model or in $LLAVA_LITE_MODEL."
)


def _source_or_default(source: "str | os.PathLike[str] | None") -> str:
    if source is not None:
        return os.fspath(source)
    if os.environ.get("LLAVA_LITE_MODEL"):
        return os.environ["LLAVA_LITE_MODEL"]
    folder = embedded_model()
    _say_once(_EMBEDDED_NOTICE)
    return str(folder)


@lru_cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


@lru_cache(maxsize=1)
def _load_once(source: str) -> "Model":
    return load(source)


def _pick_device(device: "str | torch.device") -> "torch.device":
    import torch

    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        device = next(name for name, count in counts.items() if count)
    unknown = f"device {str(device)!r} is not one of auto, cuda, mps, cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(unknown) from None
    if chosen.type not in counts:
        raise ValueError(unknown)
    count = counts[chosen.type]
    if (chosen.index or 0) >= count:
        there = f", there are {count} of {chosen.type}, counted from 0" if count else ""
        raise ValueError(f"device {str(device)!r} is not available here{there}")
    return chosen


def _pick_dtype(stored: "torch.dtype", device: "torch.device") -> "torch.dtype":
    import torch

    return torch.bfloat16 if stored == torch.float16 and device.type == "cpu" else stored
