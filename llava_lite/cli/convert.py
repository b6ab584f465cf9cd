"""`llava-lite convert`: write a checkpoint of any layout as a folder of ours."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_lite.checkpoints.convert import FORMATS, HF_QUANTIZED, METHODS, Progress, convert
from llava_lite.cli.arguments import add_command


def add_convert(commands: Any) -> None:
    summary = "write a checkpoint of any layout as a folder that loads fast"
    usage = "SOURCE DESTINATION"
    add_convert_arguments(add_command(commands, "convert", run_convert, usage, summary))


def parse_size(text: str) -> int:
    """ "2GB", "500MB" or a number of bytes. Raises ValueError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = text.strip().upper(), 1
    if number[-2:] in units:
        number, factor = number[:-2], units[number[-2:]]
    try:
        size = int(float(number) * factor)
    except OverflowError:
        raise ValueError(f"size {text!r} is not finite") from None
    if size < 1:
        raise ValueError(f"size {text!r} must be positive")
    return size


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llava-lite convert`, for `run_convert`."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="checkpoint folder, projector file, or cached hub id")
    add("destination", metavar="DESTINATION", nargs="?", help="folder (not needed by --dry-run)")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "keep"),
        default="bfloat16",
        help="of the weights written; keep: the decoder's own (default: bfloat16)",
    )
    add(
        "--to",
        choices=FORMATS,
        default="llava_lite",
        help="llava_lite: our format (the default); hf: llava-hf's, which transformers reads",
    )
    add(
        "--quantize",
        choices=METHODS,
        help="store the decoder's linear layers in so many bits, in our format",
    )
    add(
        "--shard-size",
        type=parse_size,
        metavar="SIZE",
        help="of one weight file at most (default: 2GB, quantised 500MB)",
    )
    add("--base", metavar="DIR", help="model below a LoRA adapter or a projector")
    add("--vision-tower", metavar="DIR", help="CLIP folder or file for a checkpoint without one")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    add("--offline", action="store_true", help="never use the network for a model")
    add("--dry-run", action="store_true", help="only report what would be done")
    add("--verify", action="store_true", help="read everything back and compare")
    add("--force", action="store_true", help="replace a checkpoint already there")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(parser=parser)  # `run_convert` reports wrong usage through it


def run_convert(args: argparse.Namespace) -> int:
    """`llava-lite convert`: report on stdout, progress on stderr. Raises CheckpointError."""
    if args.destination is None and not args.dry_run:
        args.parser.error("a destination is needed, except with --dry-run")
    if args.quantize and args.to == "hf":
        args.parser.error(HF_QUANTIZED)
    from llava_lite.checkpoints.download import resolve

    tower = args.vision_tower
    source = resolve(args.source, revision=args.revision, offline=args.offline, vision_tower=tower)
    base = resolve(args.base, offline=args.offline, vision_tower=tower) if args.base else None
    given = {"source": (args.source, source), "base": (args.base, base)}
    names = {
        part: str(name)
        for part, (name, path) in given.items()
        if path is not None and path != Path(name).expanduser()
    }
    report = convert(
        source,
        args.destination,
        dtype=None if args.dtype == "keep" else args.dtype,
        shard_size=args.shard_size,
        base=base,
        vision_tower=tower,
        dry_run=args.dry_run,
        verify=args.verify,
        to=args.to,
        quantize=args.quantize,
        force=args.force,
        progress=terminal_progress(),
        names=names,
    )
    print(json.dumps(asdict(report), indent=2) if args.json else report.summary())
    return 0


def terminal_progress() -> Progress | None:
    """A progress bar on stderr, only where that is a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, desc="convert", file=sys.stderr)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update
