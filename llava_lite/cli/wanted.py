"""From parsed arguments to objects: the model, the options, the images and the prompt."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_lite.checkpoints.load import embedded_model, load
from llava_lite.cli.reduction import build_reduction

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_lite.fast.ranks import Ranks
    from llava_lite.generation.model import Model
    from llava_lite.reduction import Reduction


def load_model(args: argparse.Namespace) -> "Model":
    """Load the model that the arguments name."""
    import torch

    from llava_lite.fast.allocator import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.download:
        choose_download_bars(args.quiet)
    # `load` prints which model it chose, unless the source is given.
    source = default_source(args.model) if args.quiet else args.model
    return load(source, **load_options(args))


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `llava_lite.load`."""
    names = "device dtype download revision offline base vision_tower quantize compile"
    options = {name: getattr(args, name) for name in (*names.split(), "tensor_parallel")}
    return options | {"pad": False if args.no_pad else None, "exif": not args.no_exif}


def join_ranks(args: argparse.Namespace) -> "Ranks | None":
    """The processes that share the model; None without --tensor-parallel."""
    if not args.tensor_parallel:
        return None
    from llava_lite.fast.ranks import join

    return join()


def choose_download_bars(quiet: bool) -> None:
    """Hide the hub's progress bars if quiet, or if stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def default_source(name: str | None) -> str:
    """The given model, else $LLAVA_LITE_MODEL, else the embedded model."""
    return name or os.environ.get("LLAVA_LITE_MODEL") or str(embedded_model())


def parse_reduction(args: argparse.Namespace) -> "Reduction | None":
    """The reduction of the flags; None without any. A bad value is wrong usage."""
    try:
        return build_reduction(args)
    except ValueError as error:
        parser: argparse.ArgumentParser = args.parser
        parser.error(str(error))


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Model.generate`, checked before any model is loaded.

    Raises SystemExit for bad flags of token reduction, ValueError for other bad values."""
    from llava_lite.generation.sampling import GenerationOptions

    names = "max_new_tokens temperature top_p top_k seed stop system template"
    options = {name: getattr(args, name) for name in names.split()}
    options["reduction"] = parse_reduction(args)
    GenerationOptions(**options)
    return options


def image_opener(args: argparse.Namespace) -> "Callable[[str], Image]":
    """A function that opens a path, a URL, or - for stdin. It raises ImageError."""
    from llava_lite.inputs.images import load_image

    def open_image(source: str) -> "Image":
        return load_image(sys.stdin.buffer if source == "-" else source, exif=not args.no_exif)

    return open_image


def open_images(args: argparse.Namespace, ranks: "Ranks | None") -> "list[Image | None]":
    """The images of the arguments. With several ranks only rank 0 opens them."""
    images: list[Image | None] = []

    def open_all() -> None:
        images.extend(map(image_opener(args), args.image))

    if ranks is None:
        open_all()
    else:
        ranks.from_first(open_all)
    return images or [None] * len(args.image)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt of the arguments, else all of stdin if stdin is not a terminal."""
    prompt = args.prompt
    if args.image.count("-") > 1 or (prompt is None and "-" in args.image):
        args.parser.error("stdin can be one image or the prompt: give the prompt with -p")
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            args.parser.error("a prompt is needed: -p TEXT, or on stdin")
        prompt = sys.stdin.read().strip()
    if not prompt:
        args.parser.error("the prompt is empty")
    return prompt
