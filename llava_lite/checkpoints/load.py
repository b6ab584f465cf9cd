"""Load a model: find the checkpoint, read the weights, choose device and dtype."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    device: "auto" is the first of cuda, mps, cpu that is there.
    dtype: "float32", "bfloat16", "float16" or the torch dtype; "auto" is the dtype of the file, but
        bfloat16 for a float16 file on the CPU, where float16 arithmetic is about ten times slower.
    download: fetch a hub id that is not on this disk; without it the error says how large it is.
    revision, offline: of a hub id; offline never asks the network.
    base: the model below a LoRA adapter or a projector file. vision_tower: the CLIP folder or file
        for a checkpoint without its own, or an open_clip model object.
    pad: images padded to a square (True) or cropped to one (False), instead of what the
        checkpoint's config says. exif: turn images as the camera noted; LLaVA itself does not.
    quantize: "int8" or "int4" rounds the decoder's linear layers while loading (fast/quantize.py).
        A folder written by `llava-lite convert --quantize` needs no such wish.
    compile: decode in steps of fixed shapes (fast/compiled.py): on CUDA replayed as a graph,
        elsewhere through `torch.compile`, which takes minutes when it first meets a large model.
    tensor_parallel: spread the decoder over the processes that `torchrun` started, each of which
        makes the same calls (fast/tensor_parallel.py); "cuda" then means one GPU for each.

    Raises CheckpointError, LlavaLiteError where nothing can be compiled or torchrun is missing, and
    ValueError for a device, dtype or quantisation that does not exist here, and for what does not
    go together."""
    from llava_lite.checkpoints.download import resolve
    from llava_lite.fast.quantize import method_named

    if quantize is not None:
        method_named(quantize)  # a wrong name is said before anything is fetched
    if tensor_parallel and (quantize is not None or compile):
        raise ValueError("tensor_parallel goes neither with quantize nor with compile")

    def find() -> Path:
        return resolve(
            source_or_default(source),
            download_missing=download,
            revision=revision,
            offline=offline,
            vision_tower=vision_tower,
        )

    def read(path: Path, device: "torch.device") -> Checkpoint:
        return open_checkpoint(path, device, dtype, base, vision_tower, pad)

    if tensor_parallel:
        return load_in_ranks(find, read, device, exif)
    return load_whole(find, read, device, exif, quantize, compile)


class Checkpoint(NamedTuple):
    """A checkpoint whose weights have yet to be read: all that a model takes beside them."""

    source: "Source"
    dtype: "torch.dtype"
    tokenizer: "Tokenizer"
    config: "LlavaConfig"
    thresholds: "OwnThresholds"


def open_checkpoint(
    path: Path,
    device: "torch.device",
    dtype: "str | torch.dtype",
    base: str | Path | None,
    vision_tower: "str | Path | nn.Module | None",
    pad: bool | None,
) -> Checkpoint:
    from llava_lite.checkpoints.checkpoint import load_tokenizer, parse_dtype
    from llava_lite.checkpoints.quantized import open_source
    from llava_lite.checkpoints.thresholds import OwnThresholds
    from llava_lite.fast.device import pick_dtype

    wanted = None if dtype == "auto" else parse_dtype(dtype)
    source = open_source(path, base, vision_tower)
    return Checkpoint(
        source,
        wanted or pick_dtype(source.dtype, device),
        load_tokenizer(source.tokenizer_file or path, source.config),
        source.config if pad is None else replace(source.config, pad=pad),
        OwnThresholds.of(source),
    )


def load_whole(
    find: Callable[[], Path],
    read: "Callable[[Path, torch.device], Checkpoint]",
    device: "str | torch.device",
    exif: bool,
    quantize: str | None,
    compile: bool,
) -> "Model":
    """What the only process does."""
    from llava_lite.checkpoints.quantized import load_source
    from llava_lite.fast.compiled import CompiledModel, checked_way
    from llava_lite.fast.device import pick_device
    from llava_lite.fast.kernels import choose_kernels
    from llava_lite.generation.model import Model

    path, own = find(), pick_device(device)
    if compile:
        checked_way(None, own)  # before anything slow
    source, dtype, tokenizer, config, thresholds = read(path, own)
    llava = load_source(source, own, dtype, quantize)
    choose_kernels(llava.decoder)
    model = Model(llava, tokenizer, config, exif, thresholds.read)
    return CompiledModel(model) if compile else model


def load_in_ranks(
    find: Callable[[], Path],
    read: "Callable[[Path, torch.device], Checkpoint]",
    device: "str | torch.device",
    exif: bool,
) -> "Model":
    """What each of several processes does."""
    from llava_lite.fast.device import pick_device
    from llava_lite.fast.ranks import join

    ranks = join()
    path = ranks.from_first(find)
    own = ranks.own_device(device, pick_device)
    with ranks.together():
        source, dtype, tokenizer, config, thresholds = read(path, own)
    ranks.require_same("the dtypes", dtype)
    from llava_lite.checkpoints.share import load_share
    from llava_lite.fast.tensor_parallel import ParallelModel

    share = load_share(source, ranks, own, dtype)
    return ParallelModel(share, tokenizer, config, exif, thresholds.read)


def embedded_model() -> Path:
    """Folder of the small model that comes with the package. Raises CheckpointError without one."""
    package = Path(__file__).resolve().parents[1]
    # Inside the package where a wheel was installed, beside it in a source checkout.
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("this installation carries no embedded model: name a model to load")


EMBEDDED_NOTICE = (
    "llava_lite: using the embedded model, which knows only drawn scenes of colored shapes. For "
    "the real one run `llava-lite download` or `llava-lite convert`, and name the folder as the "
    "model or in $LLAVA_LITE_MODEL."
)


def source_or_default(source: "str | os.PathLike[str] | None") -> str:
    if source is not None:
        return os.fspath(source)
    if os.environ.get("LLAVA_LITE_MODEL"):
        return os.environ["LLAVA_LITE_MODEL"]
    folder = embedded_model()
    say_once(EMBEDDED_NOTICE)
    return str(folder)


@lru_cache
def say_once(text: str) -> None:
    print(text, file=sys.stderr)
