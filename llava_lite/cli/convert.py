"""`llava-lite convert`: write a checkpoint of any layout in the llava_lite format."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_lite.checkpoints.convert import (
    FORMATS,
    GGUF_METHODS,
    METHODS,
    convert,
    explain_method,
    methods_of,
)
from llava_lite.cli.arguments import add_command, add_flags, add_source_arguments
from llava_lite.cli.console import OK
from llava_lite.cli.progress import Progress


def add_convert(commands: Any) -> None:
    summary = "write a checkpoint of any layout as a folder that loads fast"
    usage = "SOURCE DESTINATION"
    parser = add_command(commands, "convert", run_convert, usage, summary)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="checkpoint folder, projector or GGUF file, or cached hub id",
    )
    add("destination", metavar="DESTINATION", nargs="?", help="folder (not needed by --dry-run)")
    text = "of the weights written; keep: the decoder's own (default: bfloat16, for gguf float16)"
    dtypes = ("bfloat16", "float16", "float32", "keep")
    add("--dtype", choices=dtypes, default="auto", help=text)
    text = (
        "llava_lite: our format (the default); hf: llava-hf's, which transformers reads; "
        "gguf: two files for llama.cpp"
    )
    add("--to", choices=FORMATS, default="llava_lite", help=text)
    text = "store the decoder's weights in fewer bits: int8, int4 in our format, q8_0 in gguf"
    add("--quantize", choices=(*METHODS, *GGUF_METHODS), help=text)
    text = "of one weight file at most (default: 2GB, quantized 500MB)"
    add("--shard-size", type=parse_size, metavar="SIZE", help=text)
    add_source_arguments(parser)
    flags = {
        "--dry-run": "only report what would be done",
        "--verify": "read everything back and compare",
        "--force": "overwrite an existing checkpoint",
        "--json": "print the report as JSON",
    }
    add_flags(parser, flags)


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


def run_convert(args: argparse.Namespace) -> int:
    """`llava-lite convert`: report on stdout, progress on stderr. Raises CheckpointError."""
    if args.destination is None and not args.dry_run:
        args.parser.error("a destination is needed, except with --dry-run")
    if args.quantize and args.quantize not in methods_of(args.to):
        args.parser.error(explain_method(args.to, args.quantize))
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
    with Progress("B", unit_scale=True, desc="convert") as progress:
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
            progress=progress.show,
            names=names,
        )
    print(json.dumps(asdict(report), indent=2) if args.json else report.summary())
    return OK
