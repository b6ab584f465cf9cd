"""Thresholds for DToMe (DyMU, arXiv 2504.17040): how alike two tokens must be to merge, one cosine
per block of the vision tower. With them an image keeps as many tokens as it needs.

    read_thresholds(path)      from a file: ours, a JSON list, or a checkpoint of DyMU
    own_thresholds(source)     those that belong to a checkpoint
    find_thresholds(model, images, merge)
                               from images, as the paper does (section 3.1): let a batch compete

Finding: let every block merge the pairs that are most alike over a whole batch, as many as `merge`
wants of so many images. A plain image loses more of its tokens than a busy one. The cosine of the
best pair that did not merge is the batch's threshold; the mean over all batches, each counted by
its images, is the result.

`llava-lite thresholds` does this over a folder or a list. Imports nothing heavy before it starts.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava_lite.batch import BatchError, image_names
from llava_lite.console import one_line, say
from llava_lite.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from llava_lite.generation import Model
    from llava_lite.reduction import ToMe
    from llava_lite.sources import Source
    from llava_lite.tome import Merged
    from llava_lite.vision import VisionBlock, VisionTower

FILE_NAME = "thresholds.json"
DEFAULT_KEEP = 72
DEFAULT_BATCH_SIZE = 8
SAVE_EVERY = 8  # batches
NEVER = 1.0  # also what DyMU's blocks start with; only rounding puts a cosine above it

# The list that DyMU's authors show for this tower, for 72 tokens after its last block.
OPENAI_CLIP_L_336 = (
    *(0.99609375, 0.97265625, 0.94140625, 0.91015625, 0.87890625, 0.87890625),
    *(0.87890625, 0.84765625, 0.84765625, 0.87890625, 0.84765625, 0.84765625),
    *(0.87890625, 0.87890625, 0.91015625, 0.91015625, 0.91015625, 0.91015625),
    *(0.94140625, 0.87890625, 0.87890625, 0.97265625, 0.99609375, 0.81640625),
)


# ---- read ----------------------------------------------------------------------------------------


def read_thresholds(path: str | os.PathLike[str]) -> tuple[float, ...]:
    """One threshold per block, from a file.

    A `.json` holds a list of numbers, or an object with such a list as "thresholds". Any other file
    is a checkpoint that DyMU's training wrote, with or without the "module." of parallel training
    in front of its names; blocks without a threshold get 1.0, as there. Raises CheckpointError
    naming the file."""
    path = Path(path)
    values = read_list(path) if path.suffix.lower() == ".json" else read_dymu(path)
    for block, value in enumerate(values):
        if not math.isfinite(value):
            raise CheckpointError(f"{path}: the threshold of block {block} is {value}")
    return tuple(values)


def read_list(path: Path) -> list[float]:
    """The numbers of a JSON file."""
    from llava_lite.files import read_json_value

    content = read_json_value(path)
    if isinstance(content, dict):
        content = content.get("thresholds")
    if not isinstance(content, list) or not content:
        raise CheckpointError(f'{path}: holds no list of thresholds, alone or as "thresholds"')
    for block, value in enumerate(content):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{path}: the threshold of block {block} is {value!r}, no number")
    try:
        return [float(value) for value in content]
    except OverflowError:
        raise CheckpointError(f"{path}: a threshold is too large for a number") from None


def read_dymu(path: Path) -> list[float]:
    """The thresholds in a state dict of open_clip's names."""
    from llava_lite.files import read_tensors

    found: dict[int, float] = {}
    num_blocks = 0
    for name, tensor in read_tensors(path).items():
        place = re.fullmatch(r"(?:module\.)?visual\.transformer\.resblocks\.(\d{1,3})\.(.+)", name)
        if place is None:
            continue
        block = int(place[1])
        num_blocks = max(num_blocks, block + 1)
        if place[2] == "threshold":
            if not tensor.is_floating_point() or tensor.numel() != 1:
                shape = tuple(tensor.shape)
                raise CheckpointError(
                    f"{path}: {name!r} is {tensor.dtype} of shape {shape}, not a single float"
                )
            found[block] = tensor.item()
    if not found:
        raise CheckpointError(
            f"{path}: holds no thresholds (visual.transformer.resblocks.0.threshold, ...)"
        )
    return [found.get(block, NEVER) for block in range(num_blocks)]


def own_thresholds(source: "Source") -> tuple[float, ...] | None:
    """The thresholds of a checkpoint: of a thresholds.json in its folder, or in the one that its
    tower's weights come from; else, for the dimensions of OpenAI's CLIP-L/336, DyMU's list.

    Raises CheckpointError for a damaged file and for one that does not fit the tower."""
    from llava_lite.config import VisionConfig

    path = thresholds_file(source)
    if path is not None:
        return fitting_thresholds(path, source)
    vision, openai = source.config.vision, VisionConfig()
    depth = {"num_layers": openai.num_layers, "feature_layer": openai.feature_layer}
    if replace(vision, **depth) == openai and vision.num_layers <= openai.num_layers:
        return OPENAI_CLIP_L_336[: vision.num_layers]
    return None


def own_thresholds_or_error(source: "Source") -> tuple[float, ...] | CheckpointError | None:
    """`own_thresholds`, or why they cannot be used: that concerns only who asks for them."""
    try:
        return own_thresholds(source)
    except CheckpointError as error:
        return error


def thresholds_file(source: "Source") -> Path | None:
    """The thresholds.json of a checkpoint, if it has one."""
    tower = source.entries["vision.class_embed"].file
    # An open_clip model object lies in no folder.
    folders = [source.path] if tower in source.in_memory else [source.path, tower.parent]
    files = (folder / FILE_NAME for folder in folders)
    return next((file for file in files if file.is_file()), None)


def fitting_thresholds(path: Path, source: "Source") -> tuple[float, ...]:
    """Read a file and compare its length with the tower."""
    thresholds, vision = read_thresholds(path), source.config.vision
    if len(thresholds) not in (vision.num_blocks, vision.num_layers):
        raise CheckpointError(
            f"{path}: holds {len(thresholds)} thresholds, but the tower runs {vision.num_blocks} "
            f"of {vision.num_layers} blocks: there must be one for each of these or of those"
        )
    return thresholds


# ---- find ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the images so far have given: for each block the sum of the batches' thresholds, each
    times its images; how many images went in, and how many could not be read."""

    sums: tuple[float, ...]
    images: int = 0
    skipped: int = 0

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Their mean, in double precision."""
        return tuple(total / self.images for total in self.sums)

    def plus(self, thresholds: Sequence[float], images: int, skipped: int) -> "Finding":
        """With one more batch."""
        sums = self.sums
        if images:
            sums = tuple(s + images * t for s, t in zip(sums, thresholds, strict=True))
        return Finding(sums, self.images + images, self.skipped + skipped)


def find_thresholds(
    model: "Model",
    images: Sequence[Any],
    merge: "ToMe | None" = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> tuple[float, ...]:
    """Thresholds with which an image like these keeps, on average, as many tokens as with `merge`
    (default: 72), one per block that runs.

    `images`: whatever `Model.generate` takes; one that cannot be read costs a warning. The order
    matters a little: each `batch_size` of them compete, so they should be a mixture. Raises
    ValueError for a `merge` that the tower cannot do, and ImageError when no image can be read."""
    steps = deque(finding(model, images, merge, batch_size), maxlen=1)
    if not steps or not steps[0].images:
        raise ImageError(f"none of {len(images)} images can be read: thresholds need some")
    return steps[0].thresholds


def finding(
    model: "Model",
    images: Sequence[Any],
    merge: "ToMe | None" = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    found: Finding | None = None,
    on_error: Callable[[ImageError], None] | None = None,
) -> Iterator[Finding]:
    """`find_thresholds` step by step: what is found after each batch. It goes on from `found`, an
    earlier step over the same images; `on_error` hears of images that cannot be read."""
    from llava_lite.reduction import ToMe

    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    steps = (merge or ToMe(keep=DEFAULT_KEEP)).steps(model.config.vision)
    counts = [step.r or 0 for step in steps]
    found = found or Finding((0.0,) * len(counts))
    for start in range(found.images + found.skipped, len(images), batch_size):
        batch = images[start : start + batch_size]
        pixel_values = [
            p for image in batch if (p := open_image(model, image, on_error)) is not None
        ]
        thresholds = batch_thresholds(model.llava.vision, pixel_values, counts)
        found = found.plus(thresholds, len(pixel_values), len(batch) - len(pixel_values))
        yield found


def open_image(
    model: "Model", image: Any, on_error: Callable[[ImageError], None] | None
) -> "Tensor | None":
    """Pixel values (1, 3, S, S) for the model's tower; None for an image that cannot be read."""
    from llava_lite.image import load_image, preprocess

    try:
        loaded = load_image(image, exif=model.exif)
    except ImageError as error:
        if on_error is None:
            warnings.warn(f"{one_line(error)} (left out)", stacklevel=2)
        else:
            on_error(error)
        return None
    pixel_values = preprocess(loaded, model.config.vision.image_size, model.config.pad)
    return pixel_values.to(model.llava.device, model.llava.dtype)


def batch_thresholds(
    tower: "VisionTower", pixel_values: Sequence["Tensor"], counts: Sequence[int]
) -> list[float]:
    """One batch's threshold for every block, of images (1, 3, S, S) each. counts: tokens that a
    block merges per image, on average over the batch.

    The images keep different numbers of tokens, so each passes a block alone: then the scores are
    also exactly those that the same image has when the thresholds are used."""
    import torch

    if not pixel_values:
        return []
    thresholds = []
    with torch.inference_mode():
        tokens: Tokens = [(tower.pre_norm(tower.embed(image)), None) for image in pixel_values]
        for block, count in zip(tower.blocks, counts, strict=True):
            threshold, tokens = merge_batch(cast("VisionBlock", block), tokens, count)
            thresholds.append(threshold)
    return thresholds


Tokens = list[tuple["Tensor", "Merged | None"]]


def merge_batch(block: "VisionBlock", tokens: Tokens, count: int) -> tuple[float, Tokens]:
    """One block over the images of a batch, tokens (1, T, C) each: its threshold, and the tokens
    behind it."""
    from llava_lite.tome import MergeStep, match_tokens, merge_tokens

    attended = []
    for x, merged in tokens:
        mixed, keys = block.attn(block.norm1(x), merged)
        attended.append((x + mixed, keys.mean(1), merged))
    step, threshold = MergeStep(r=0), NEVER
    if count:
        scores = [match_tokens(metric)[0][0, 1:] for _, metric, _ in attended]  # no class token
        threshold = competing_threshold(scores, count)
        step = MergeStep(threshold=threshold)
    after: Tokens = []
    for x, metric, merged in attended:
        x, merged = merge_tokens(x, metric, merged, step)
        after.append((x + block.mlp(block.norm2(x)), merged))
    return threshold, after


def competing_threshold(scores: Sequence["Tensor"], count: int) -> float:
    """The best score that stays when so many times `count` merge as there are images, the best of
    all: what is above it is what merges. scores: the cosines (A,) of each image's sources.

    It is never below 0, and 0 where no source is left to stay: opposites never merge."""
    import torch

    ranked = torch.cat(list(scores)).sort(descending=True).values
    rank = count * len(scores)
    return max(ranked[rank].item(), 0.0) if rank < len(ranked) else 0.0


# ---- llava-lite thresholds -----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    from llava_lite.files import replace_json

    output = Path(args.output)
    progress = progress_file(output)
    check_output(output, args.resume, args.force)
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


def check_output(output: Path, resume: bool, force: bool) -> None:
    """Raise BatchError, before any work, where the result could not be written or would replace
    something."""
    progress = progress_file(output)
    if resume and force:
        raise BatchError("--resume and --force contradict each other")
    if not output.parent.is_dir():
        raise BatchError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise BatchError(f"{output}: is a folder, the output must be a file")
    if force:
        return
    if output.exists() and not (resume and progress.exists()):
        raise BatchError(f"{output}: is already there (--force replaces it)")
    if progress.exists() and not resume:
        raise BatchError(f"{progress}: a run was cut off; go on with it (--resume) or use --force")


def progress_file(output: Path) -> Path:
    """Where an unfinished run keeps its sums."""
    return output.with_name(f"{output.name}.partial")


def save_progress(path: Path, settings: dict[str, Any], found: Finding) -> None:
    """JSON keeps every bit of a float, so that going on gives the result of an unbroken run."""
    from llava_lite.files import replace_json

    sums = {"sums": found.sums, "images": found.images, "skipped": found.skipped}
    replace_json(path, {"settings": settings, **sums})


def read_progress(path: Path, settings: dict[str, Any], num_blocks: int) -> Finding | None:
    """What an earlier run of the same settings has found; None where there was none. Raises
    BatchError for other settings and for a damaged file."""
    from llava_lite.files import read_json

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
