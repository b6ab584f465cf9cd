"""From parsed arguments to objects: the model, its options, images and the prompt."""

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
    """The model of the arguments, prepared as they say."""
    import torch

    from llava_lite.fast.allocator import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.download:
        choose_download_bars(args.quiet)
    # With --quiet the source is named, and then `load` has no reason to say which it took.
    source = default_source(args.model) if args.quiet else args.model
    return load(source, **load_options(args))


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say to `llava_lite.load`, beside the source."""
    names = "device dtype download revision offline base vision_tower quantize compile"
    names += " tensor_parallel"
    options = {name: getattr(args, name) for name in names.split()}
    return options | {"pad": False if args.no_pad else None, "exif": not args.no_exif}


def joined_ranks(args: argparse.Namespace) -> "Ranks | None":
    """The processes that share the model, where the arguments ask for several."""
    if not args.tensor_parallel:
        return None
    from llava_lite.fast.ranks import join

    return join()


def choose_download_bars(quiet: bool) -> None:
    """The hub's progress bars only at a terminal, and not when quiet."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def default_source(named: str | None) -> str:
    """What is loaded when no model is named."""
    return named or os.environ.get("LLAVA_LITE_MODEL") or str(embedded_model())


def parse_reduction(args: argparse.Namespace) -> "Reduction | None":
    """What the flags of token reduction ask for; what cannot be is wrong usage."""
    try:
        return build_reduction(args)
    except ValueError as error:
        parser: argparse.ArgumentParser = args.parser
        parser.error(str(error))


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Model.generate`. Raises before any model is loaded: SystemExit for flags of
    token reduction that cannot be, ValueError for other values."""
    from llava_lite.generation.sampling import GenerationOptions

    names = "max_new_tokens temperature top_p top_k seed stop system template"
    options = {name: getattr(args, name) for name in names.split()}
    options["reduction"] = parse_reduction(args)
    GenerationOptions(**options)
    return options


def image_opener(args: argparse.Namespace) -> "Callable[[str], Image]":
    """Opens a path, a URL, or - for stdin, as the arguments say. Raises ImageError."""
    from llava_lite.inputs.images import load_image

    def open_image(source: str) -> "Image":
        return load_image(sys.stdin.buffer if source == "-" else source, exif=not args.no_exif)

    return open_image


def open_images(args: argparse.Namespace, ranks: "Ranks | None") -> "list[Image | None]":
    """The images of the arguments; of several ranks only the first opens them, for all."""
    images: list[Image | None] = []

    def open_all() -> None:
        images.extend(map(image_opener(args), args.image))

    if ranks is None:
        open_all()
    else:
        ranks.from_first(open_all)
    return images or [None] * len(args.image)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt of the arguments, or all of stdin when that is no terminal."""
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
