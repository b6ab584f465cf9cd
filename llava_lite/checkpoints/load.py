"""Load a model: find the checkpoint, choose device and dtype, read the weights."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_lite.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llava_lite.checkpoints.source import Source
    from llava_lite.checkpoints.thresholds import OwnThresholds
    from llava_lite.config import LlavaConfig
    from llava_lite.generation.model import Model
    from llava_lite.inputs.tokenizer import Tokenizer


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
    device: "auto" is the first available of cuda, mps, cpu.
    dtype: "float32", "bfloat16", "float16" or a torch dtype. "auto" is the dtype of the file, but
        on a CPU float32 for a small model, and bfloat16 for a float16 file. float16 is about ten
        times slower there.
    download: fetch a hub id that is not on this disk. Otherwise the error names its size.
    revision: of a hub id. offline: never ask the network.
    base: the model below a LoRA adapter or a projector file.
    vision_tower: the CLIP folder, file or open_clip model for a checkpoint without a tower.
    pad: pad images to a square (True) or crop them (False); None follows the checkpoint's config.
    exif: turn images as the camera noted, which LLaVA does not.
    quantize: "int8", "int4", "int8-dynamic" or "int4-dynamic" quantizes the decoder while loading
        (fast/quantize.py). A quantized folder needs no option.
    compile: decode in steps of fixed shapes (fast/compiled.py): CUDA graphs on a GPU, elsewhere
        `torch.compile`, which takes minutes for the first tokens of a large model.
    tensor_parallel: share the decoder between the processes of `torchrun`, which all make the same
        calls (fast/tensor_parallel.py). "cuda" then means one GPU for each process.

    Raises CheckpointError; LlavaLiteError if compiling or torchrun is not available; ValueError for
    an unknown device, dtype or quantization, and for options that exclude each other."""
    from llava_lite.fast.quantize import get_method

    if quantize is not None:
        get_method(quantize)  # check the name before anything is downloaded
    if tensor_parallel and (quantize is not None or compile):
        raise ValueError("tensor_parallel goes neither with quantize nor with compile")
    place = {"revision": revision, "offline": offline, "vision_tower": vision_tower}
    find = partial(find_checkpoint, source, download_missing=download, **place)
    read = partial(
        open_checkpoint,
        dtype=dtype,
        quantize=quantize,
        base=base,
        vision_tower=vision_tower,
        pad=pad,
    )
    if tensor_parallel:
        return load_in_ranks(find, read, device, exif)
    return load_whole(find, read, device, exif, quantize, compile)


def find_checkpoint(source: "str | os.PathLike[str] | None", **options: Any) -> Path:
    """`resolve` the source, or without one the default model. Raises CheckpointError."""
    from llava_lite.checkpoints.download import resolve

    return resolve(source_or_default(source), **options)


class Checkpoint(NamedTuple):
    """An opened checkpoint: everything but the weights, which are read later."""

    source: "Source"
    dtype: "torch.dtype"
    tokenizer: "Tokenizer"
    config: "LlavaConfig"
    thresholds: "OwnThresholds"


def open_checkpoint(
    path: Path,
    device: "torch.device",
    *,
    quantize: str | None,
    dtype: "str | torch.dtype",
    base: str | Path | None,
    vision_tower: "str | Path | nn.Module | None",
    pad: bool | None,
) -> Checkpoint:
    """Open a checkpoint and check it, without reading its weights. Raises CheckpointError."""
    from llava_lite.checkpoints.checkpoint import load_tokenizer, parse_dtype
    from llava_lite.checkpoints.opening import open_source
    from llava_lite.checkpoints.quantized import QuantizedSource
    from llava_lite.checkpoints.thresholds import OwnThresholds
    from llava_lite.fast.device import pick_dtype

    wanted = None if dtype == "auto" else parse_dtype(dtype)
    source = open_source(path, base, vision_tower)
    quantized = quantize is not None or isinstance(source, QuantizedSource)
    return Checkpoint(
        source,
        wanted or pick_dtype(source.dtype, device, source.num_parameters, quantized),
        load_tokenizer(source.tokenizer_file or path, source.config),
        source.config if pad is None else replace(source.config, pad=pad),
        OwnThresholds.of(source),
    )


Find = Callable[[], Path]
Read = Callable[[Path, "torch.device"], Checkpoint]


def load_whole(
    find: Find,
    read: Read,
    device: "str | torch.device",
    exif: bool,
    quantize: str | None,
    compile: bool,
) -> "Model":
    """Load a model in one process."""
    from llava_lite.checkpoints.checkpoint import load_source
    from llava_lite.fast.compiled import CompiledModel, check_way
    from llava_lite.fast.device import pick_device
    from llava_lite.fast.kernels import choose_kernels
    from llava_lite.generation.model import Model

    path, picked = find(), pick_device(device)
    if compile:
        check_way(None, picked)  # fail before the slow part
    source, dtype, tokenizer, config, thresholds = read(path, picked)
    llava = load_source(source, picked, dtype, quantize)
    choose_kernels(llava)
    model = Model(llava, tokenizer, config, exif, thresholds.read)
    return CompiledModel(model) if compile else model


def load_in_ranks(find: Find, read: Read, device: "str | torch.device", exif: bool) -> "Model":
    """Load this process's share of a model that several processes run together."""
    from llava_lite.fast.device import pick_device
    from llava_lite.fast.ranks import join

    ranks = join()
    path = ranks.from_first(find)  # only one process downloads
    picked = ranks.pick_device(device, pick_device)
    with ranks.together():
        source, dtype, tokenizer, config, thresholds = read(path, picked)
    ranks.require_same("the dtypes", dtype)
    from llava_lite.checkpoints.share import load_share
    from llava_lite.fast.tensor_parallel import ParallelModel

    share = load_share(source, ranks, picked, dtype)
    return ParallelModel(share, tokenizer, config, exif, thresholds.read)


def embedded_model() -> Path:
    """The folder of the small model that comes with the package. Raises CheckpointError if the
    package was installed without it."""
    package = Path(__file__).resolve().parents[1]
    # A wheel has the weights inside the package, a source checkout has them beside it.
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("this installation has no embedded model: name a model to load")


EMBEDDED_NOTICE = (
    "llava_lite: using the embedded model, which knows only drawn scenes of colored shapes. For "
    "the real one run `llava-lite download` or `llava-lite convert`, and name the folder as the "
    "model or in $LLAVA_LITE_MODEL."
)


def source_or_default(source: "str | os.PathLike[str] | None") -> str:
    """The source, or without one `$LLAVA_LITE_MODEL`, else the embedded model with a notice."""
    if source is not None:
        return os.fspath(source)
    if os.environ.get("LLAVA_LITE_MODEL"):
        return os.environ["LLAVA_LITE_MODEL"]
    folder = embedded_model()
    say_once(EMBEDDED_NOTICE)
    return str(folder)


@lru_cache
def say_once(text: str) -> None:
    """Print a notice to stderr, once per process."""
    print(text, file=sys.stderr)
