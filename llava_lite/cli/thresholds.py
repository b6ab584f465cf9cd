"""`llava-lite thresholds`: find thresholds for DToMe from images, with resume."""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_model_arguments,
)
from llava_lite.cli.console import say
from llava_lite.cli.wanted import load_model
from llava_lite.errors import ImageError, one_line
from llava_lite.generation.batch_file import BatchError, image_names
from llava_lite.saving import check_output, replace_json
from llava_lite.study.find_thresholds import DEFAULT_BATCH_SIZE, DEFAULT_KEEP, Finding, finding

if TYPE_CHECKING:
    from tqdm import tqdm

    from llava_lite.generation.model import Model
    from llava_lite.reduction import ToMe


def add_thresholds(commands: Any) -> None:
    details = """A thresholds.json in the model's folder is what --merge dtome and dymu-72 use.

example:
  llava-lite thresholds photos/ -m weights/llava-1.5-7b -o weights/llava-1.5-7b/thresholds.json"""
    summary = "find thresholds for merging image tokens by likeness (DToMe)"
    usage = "IMAGES -o FILE"
    parser = add_command(commands, "thresholds", run_thresholds, usage, summary, details)
    add_thresholds_arguments(parser)
    add_model_arguments(parser)


def run_thresholds(args: argparse.Namespace) -> int:
    """`llava-lite thresholds`."""
    return run(args, load_model(args))


SAVE_EVERY = 8  # batches


def add_thresholds_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llava-lite thresholds`, for `run`, but those of the model."""
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGES",
        help="folder, searched with its subfolders; or a .json list or .jsonl file of paths, or of "
        'objects with an "image" as in the training data of LLaVA',
    )
    add("-o", "--output", required=True, metavar="FILE", help="JSON file to write")
    add("--image-folder", metavar="DIR", help="where listed paths begin (default: beside the list)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help=f"image tokens that are left on average (default: {DEFAULT_KEEP})",
    )
    amount.add_argument("--r", type=int, metavar="N", help="instead: tokens merged per block")
    add(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"images that compete with each other (default: {DEFAULT_BATCH_SIZE})",
    )
    add("--limit", type=int, metavar="N", help="only so many of the images")
    add("--seed", type=int, default=0, metavar="N", help="order of the images (default: 0)")
    add("--resume", action="store_true", help="go on with a run that was cut off")
    add("--force", action="store_true", help="replace FILE, and forget a run that was cut off")
    add("--no-pad", action="store_true", help="crop the middle square instead of padding to one")
    add("--no-exif", action="store_true", help="ignore the camera's rotation, as LLaVA does")
    add("--quiet", action="store_true", help="nothing on stderr but errors")


def run(args: argparse.Namespace, model: "Model") -> int:
    """`llava-lite thresholds`: writes the file, says on stderr what went in. Raises BatchError for
    unusable input or output, ValueError for bad numbers, ImageError without a single image."""
    output = Path(args.output)
    progress = progress_file(output)
    check_run(output, args.resume, args.force)
    folder, names = listed_images(Path(args.images), args.image_folder)
    random.Random(args.seed).shuffle(names)  # images that lie side by side are often alike
    names = names[: checked_limit(args.limit)]
    settings = run_settings(args, model, names)
    if args.force:
        progress.unlink(missing_ok=True)
    num_blocks = model.config.vision.num_blocks
    found = read_progress(progress, settings, num_blocks) if args.resume else None
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
    return 0


def find_and_save(
    args: argparse.Namespace,
    model: "Model",
    images: Sequence[Path],
    found: Finding | None,
    settings: dict[str, Any],
) -> Finding:
    """All batches from `found` on, saved every few. An interrupt saves, too, and says how to go
    on."""
    progress = progress_file(Path(args.output))
    with progress_bar(len(images), args.quiet) as bar:

        def left_out(error: ImageError) -> None:
            if not args.quiet:
                bar.write(f"warning: {one_line(error)} (left out)", file=sys.stderr)

        found = found or Finding((0.0,) * model.config.vision.num_blocks)
        bar.update(found.images + found.skipped)
        saved = found
        try:
            batches = finding(model, images, merge_of(args), args.batch_size, found, left_out)
            for number, found in enumerate(batches, start=1):
                bar.update(found.images + found.skipped - bar.n)
                if number % SAVE_EVERY == 0:
                    save_progress(progress, settings, found)
                    saved = found
        except BaseException as error:
            if found != saved:
                save_progress(progress, settings, found)
            if isinstance(error, KeyboardInterrupt) and not args.quiet and progress.exists():
                bar.write(f"{progress} keeps what was found; --resume goes on", file=sys.stderr)
            raise
    return found


def progress_bar(total: int, quiet: bool) -> "tqdm":
    """A bar of finished images on stderr, only where that is a terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(total=total, unit="image", file=sys.stderr, disable=hidden)


def merge_of(args: argparse.Namespace) -> "ToMe":
    """How much is to merge."""
    from llava_lite.reduction import ToMe

    if args.r is not None:
        return ToMe(r=args.r)
    return ToMe(keep=DEFAULT_KEEP if args.keep is None else args.keep)


def checked_limit(limit: int | None) -> int | None:
    """Raises ValueError below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} must be at least 1")
    return limit


def run_settings(args: argparse.Namespace, model: "Model", names: Sequence[str]) -> dict[str, Any]:
    """Everything that the result depends on, to be written beside it."""
    merge = merge_of(args)
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


# ---- input and output of a run -------------------------------------------------------------------


def listed_images(path: Path, image_folder: str | None) -> tuple[Path, list[str]]:
    """Names of the images in a folder or a list, each once, and the folder where they begin.

    Raises BatchError naming file and entry."""
    if path.is_dir():
        if image_folder is not None:
            raise BatchError(f"{path}: is a folder itself; --image-folder goes with a list")
        folder, names = path, image_names(path)
    elif not path.is_file():
        raise BatchError(f"{path}: no such file or folder")
    else:
        folder = path.parent if image_folder is None else Path(image_folder)
        names = [name for where, entry in listed(path) for name in names_in(entry, where)]
    if not names:
        raise BatchError(f"{path}: names no images")
    return folder, list(dict.fromkeys(names))


def listed(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, entry) of every entry of a list of images."""
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
    """The images of an entry; one about text alone has none. Raises BatchError."""
    image = entry.get("image", []) if isinstance(entry, dict) else entry
    names: list[Any] = image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BatchError(f'{where}: is neither a path nor an object with an "image"')
    return names


def check_run(output: Path, resume: bool, force: bool) -> None:
    """Raise BatchError, before any work, where the result could not be written or would replace
    something."""
    progress = progress_file(output)
    if resume and force:
        raise BatchError("--resume and --force contradict each other")
    check_output(output, BatchError, force or (resume and progress.exists()))
    if progress.exists() and not (resume or force):
        raise BatchError(f"{progress}: a run was cut off; go on with it (--resume) or use --force")


def progress_file(output: Path) -> Path:
    """Where an unfinished run keeps its sums."""
    return output.with_name(f"{output.name}.partial")


def save_progress(path: Path, settings: dict[str, Any], found: Finding) -> None:
    """JSON keeps every bit of a float, so that going on gives the result of an unbroken run."""
    sums = {"sums": found.sums, "images": found.images, "skipped": found.skipped}
    replace_json(path, {"settings": settings, **sums})


def read_progress(path: Path, settings: dict[str, Any], num_blocks: int) -> Finding | None:
    """What an earlier run of the same settings has found; None where there was none. Raises
    BatchError for other settings and for a damaged file."""
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
    if len(found.sums) != num_blocks or min(found.images, found.skipped) < 0:
        raise BatchError(f"{path}: is damaged; --force forgets it")
    return found
