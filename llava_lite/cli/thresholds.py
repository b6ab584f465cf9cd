"""`llava-lite thresholds`: find thresholds for DToMe from images, with resume."""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_flags,
    add_model_arguments,
    add_square_arguments,
)
from llava_lite.cli.console import OK, say
from llava_lite.cli.progress import Progress
from llava_lite.cli.wanted import load_model
from llava_lite.errors import ImageError, one_line
from llava_lite.generation.batch_file import BatchError, image_names
from llava_lite.saving import check_output, replace_json
from llava_lite.study.find_thresholds import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_KEEP,
    Finding,
    find_by_batches,
)

if TYPE_CHECKING:
    from llava_lite.generation.model import Model
    from llava_lite.reduction import ToMe

THRESHOLDS_HELP = """\
A thresholds.json in the model's folder is what --merge dtome and dymu-72 use.

example:
  llava-lite thresholds photos/ -m weights/llava-1.5-7b -o weights/llava-1.5-7b/thresholds.json"""


def add_thresholds(commands: Any) -> None:
    summary = "find thresholds for merging image tokens by likeness (DToMe)"
    usage = "IMAGES -o FILE"
    parser = add_command(commands, "thresholds", run_thresholds, usage, summary, THRESHOLDS_HELP)
    add = parser.add_argument
    text = (
        "folder, searched with its subfolders; or a .json list or .jsonl file of paths, or of "
        'objects with an "image" as in the training data of LLaVA'
    )
    add("images", metavar="IMAGES", help=text)
    add("-o", "--output", required=True, metavar="FILE", help="JSON file to write")
    text = "folder that listed paths are relative to (default: the folder of the list)"
    add("--image-folder", metavar="DIR", help=text)
    amount = parser.add_mutually_exclusive_group()
    text = f"image tokens that are left on average (default: {DEFAULT_KEEP})"
    amount.add_argument("--keep", type=int, metavar="N", help=text)
    amount.add_argument("--r", type=int, metavar="N", help="instead: tokens merged per block")
    text = f"images that compete with each other (default: {DEFAULT_BATCH_SIZE})"
    add("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help=text)
    add("--limit", type=int, metavar="N", help="only so many of the images")
    add("--seed", type=int, default=0, metavar="N", help="order of the images (default: 0)")
    flags = {
        "--resume": "resume an interrupted run",
        "--force": "overwrite FILE, and forget an interrupted run",
        "--quiet": "nothing on stderr but errors",
    }
    add_flags(parser, flags)
    add_square_arguments(parser)
    add_model_arguments(parser)


def run_thresholds(args: argparse.Namespace) -> int:
    """`llava-lite thresholds`."""
    return run(args, load_model(args))


def run(args: argparse.Namespace, model: "Model") -> int:
    """Find the thresholds and write the file.

    Raises BatchError for unusable input or output, ValueError for bad numbers, ImageError if no
    image can be read."""
    output = Path(args.output)
    progress = progress_file(output)
    check_run(output, args.resume, args.force)
    folder, names = list_images(Path(args.images), args.image_folder)
    random.Random(args.seed).shuffle(names)  # neighbors in a folder are often alike
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit {args.limit} must be at least 1")
    names = names[: args.limit]
    settings = run_settings(args, model, names)
    if args.force:
        progress.unlink(missing_ok=True)
    num_steps = len(merge_option(args).steps(model.config.vision))
    found = read_progress(progress, settings, num_steps) if args.resume else None
    found = find_and_save(args, model, [folder / name for name in names], found, settings)
    if not found.images:
        raise ImageError(f"{args.images}: none of {found.skipped} images can be read")
    content = {"thresholds": found.thresholds, **settings}
    content |= {"images": found.images, "skipped": found.skipped}
    replace_json(output, content)
    progress.unlink(missing_ok=True)
    if not args.quiet:
        left_out = f", {found.skipped} left out" if found.skipped else ""
        say(f"{output}: {len(found.sums)} thresholds of {found.images} images{left_out}")
    return OK


def find_and_save(
    args: argparse.Namespace,
    model: "Model",
    images: Sequence[Path],
    found: Finding | None,
    settings: dict[str, Any],
) -> Finding:
    """Run all batches after `found`, and save the result after each."""
    file = progress_file(Path(args.output))
    found = found or Finding((0.0,) * len(merge_option(args).steps(model.config.vision)))
    with Progress("image", args.quiet) as progress:
        progress.start(len(images), found.images + found.skipped)

        def warn(error: ImageError) -> None:
            if not args.quiet:
                progress.write(f"warning: {one_line(error)} (left out)")

        batches = find_by_batches(model, images, merge_option(args), args.batch_size, found, warn)
        try:
            for found in batches:
                save_progress(file, settings, found)
                progress.show(found.images + found.skipped, len(images))
        except KeyboardInterrupt:
            if not args.quiet and file.exists():
                progress.write(f"{file} keeps all results so far; resume with --resume")
            raise
    return found


def merge_option(args: argparse.Namespace) -> "ToMe":
    """How many tokens to merge."""
    from llava_lite.reduction import ToMe

    if args.r is not None:
        return ToMe(r=args.r)
    return ToMe(keep=DEFAULT_KEEP if args.keep is None else args.keep)


def run_settings(args: argparse.Namespace, model: "Model", names: Sequence[str]) -> dict[str, Any]:
    """Everything that the result depends on. It is written into the result."""
    merge = merge_option(args)
    amount = {"keep": merge.keep} if merge.r is None else {"r": merge.r}
    return {
        "model": model.config.name,
        "dtype": str(model.llava.dtype).removeprefix("torch."),
        "pad": model.config.pad,
        "exif": model.exif,
        **amount,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "list_sha256": hashlib.sha256(
            "\n".join(names).encode("utf-8", "surrogatepass")
        ).hexdigest(),
    }


def list_images(path: Path, image_folder: str | None) -> tuple[Path, list[str]]:
    """The folder of the images, and their paths relative to it, each once.

    Raises BatchError naming file and entry."""
    if path.is_dir():
        if image_folder is not None:
            raise BatchError(f"{path}: is a folder; --image-folder goes with a list")
        folder, names = path, image_names(path)
    elif not path.is_file():
        raise BatchError(f"{path}: no such file or folder")
    else:
        folder = path.parent if image_folder is None else Path(image_folder)
        names = [name for where, entry in read_list(path) for name in names_in(entry, where)]
    if not names:
        raise BatchError(f"{path}: names no images")
    return folder, list(dict.fromkeys(names))


def read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, entry) for every entry of a list of images."""
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield where, json.loads(line)
            return
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise BatchError(f"{path}: holds a {type(content).__name__}, not a list")
    for number, entry in enumerate(content, start=1):
        yield f"{path}, entry {number}", entry


def names_in(entry: Any, where: str) -> list[str]:
    """The images of an entry. An entry about text alone has none. Raises BatchError."""
    image = entry.get("image", []) if isinstance(entry, dict) else entry
    names: list[Any] = image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BatchError(f'{where}: is neither a path nor an object with an "image"')
    return names


def check_run(output: Path, resume: bool, force: bool) -> None:
    """Raise BatchError, before any work, if the result cannot be written or would overwrite
    a file."""
    progress = progress_file(output)
    if resume and force:
        raise BatchError("--resume and --force contradict each other")
    check_output(output, BatchError, force or (resume and progress.exists()))
    if progress.exists() and not (resume or force):
        raise BatchError(f"{progress}: a run was interrupted (use --resume or --force)")


def progress_file(output: Path) -> Path:
    """The file that keeps the sums of an unfinished run."""
    return output.with_name(f"{output.name}.partial")


def save_progress(path: Path, settings: dict[str, Any], found: Finding) -> None:
    """Save the sums. JSON keeps every bit of a float, so a resumed run gives the same result."""
    sums = {"sums": found.sums, "images": found.images, "skipped": found.skipped}
    replace_json(path, {"settings": settings, **sums})


def read_progress(path: Path, settings: dict[str, Any], num_steps: int) -> Finding | None:
    """The sums of an interrupted run; None without one.

    Raises BatchError if that run had other settings, or if the file is damaged."""
    from llava_lite.checkpoints.tensors import read_json

    if not path.exists():
        return None
    content = read_json(path)
    try:
        before = dict(content["settings"])
        found = Finding(
            tuple(map(float, content["sums"])), int(content["images"]), int(content["skipped"])
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BatchError(f"{path}: is no unfinished run of `llava-lite thresholds`") from error
    for name in {**settings, **before}:
        if before.get(name) != settings.get(name):
            raise BatchError(
                f"{path}: that run had another {name!r} ({before.get(name)!r}, now "
                f"{settings.get(name)!r}); --force forgets it"
            )
    if len(found.sums) != num_steps or min(found.images, found.skipped) < 0:
        raise BatchError(f"{path}: is damaged; --force forgets it")
    return found
