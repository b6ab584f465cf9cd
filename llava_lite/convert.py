"""`llava-lite convert`: any checkpoint layout -> a folder in our format, or in llava-hf's.

One tensor is in memory at a time: read from the mapped source, cast, hashed, appended to the shard
being written. The result takes its place only when all of it is there. Imports nothing heavy
before a conversion starts, so that help and errors of usage come at once.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_lite.errors import CheckpointError
from llava_lite.layouts import SHARD_SIZE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llava_lite.export import Output
    from llava_lite.sources import Source

Progress = Callable[[int, int], None]

DTYPES = ("bfloat16", "float16", "float32", "keep")
FORMATS = ("llava_lite", "hf")
METHODS = ("int8", "int4")  # those of quantize.py
# Codes are packed while loading, and a file is mapped until all of it is done with: small ones keep
# the memory that this takes small.
QUANTIZED_SHARD_SIZE = 500_000_000
HF_QUANTIZED = "quantised weights are stored in our own format only, not as hf"


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes."""

    source: str
    destination: str
    layout: str
    to: str
    dtype: str
    quantized: str | None
    revision: str | None
    tensors: int
    parameters: int
    size: int
    tokenizer: bool
    unused: list[str]
    ignored: list[str]
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    written: bool = False
    verified: bool = False

    def summary(self) -> str:
        """The report in a few lines of text."""
        done = "wrote" if self.written else "would write"
        kind = f"{self.dtype}, the decoder's {self.quantized}" if self.quantized else self.dtype
        lines = [
            f"{self.source}: {self.layout}",
            f"{done} {self.tensors} tensors, {self.parameters:,} parameters, {kind}, "
            f"{self.size / 1e9:.2f} GB as {self.to} to {self.destination or '(nowhere)'}",
            f"left out {len(self.unused)} tensors of the vision tower that LLaVA never runs "
            f"and {len(self.ignored)} that are no weights of the model",
        ]
        if self.files:
            lines.append(f"files: {', '.join(self.files)}")
        if self.verified:
            codes = ", the decoder's codes what it was rounded to" if self.quantized else ""
            read = f"verified: every tensor read back equals what was read from the source{codes}"
            lines.append(read)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    source: str | Path,
    destination: str | Path | None,
    *,
    dtype: "str | torch.dtype | None" = "bfloat16",
    shard_size: int | None = None,
    base: str | Path | None = None,
    vision_tower: "str | Path | nn.Module | None" = None,
    dry_run: bool = False,
    verify: bool = False,
    to: str = "llava_lite",
    quantize: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    names: Mapping[str, str] | None = None,
) -> Report:
    """Convert a checkpoint of any layout (see `sources.open_source`) to a self-contained folder.

    `dtype` None keeps the decoder's; `shard_size` in bytes, by default 2 GB, and 0.5 GB
    quantised; `to` "llava_lite" or "hf"; `quantize`
    "int8" or "int4": how the decoder's linear layers are stored, in our format only; `verify` reads
    everything back and compares hashes; `force` replaces a checkpoint that is already there;
    `progress(done, total)` is told the bytes; `names`: what the manifest calls "source" and "base",
    such as hub ids, where that is not their path. On any error or interrupt nothing half-written is
    left. Raises CheckpointError naming file and tensor, and ValueError."""
    from llava_lite.checkpoint import parse_dtype, verify_tensors
    from llava_lite.export import write_side_files
    from llava_lite.files import staged, write_shards
    from llava_lite.quantized_checkpoint import open_source

    if shard_size is None:
        shard_size = QUANTIZED_SHARD_SIZE if quantize else SHARD_SIZE
    if to not in FORMATS or shard_size < 1:
        raise ValueError(f"to {to!r} must be llava_lite or hf, shard_size {shard_size} at least 1")
    if quantize is not None and to == "hf":
        raise ValueError(HF_QUANTIZED)
    opened = open_source(source, base, vision_tower)
    wanted = parse_dtype(dtype) or opened.dtype
    output = make_output(opened, wanted, to, quantize)
    report = make_report(opened, destination, output, wanted, to, quantize)
    if dry_run:
        return report
    if destination is None:
        raise ValueError("a destination is needed, except with dry_run")
    place = Path(destination).expanduser().resolve()  # a link stays, what it points to is filled
    check_destination(place, opened, output.size)
    with staged(place, force) as staging:
        read = with_progress(output, progress)
        table = write_shards(staging, output.specs, read, shard_size)
        write_side_files(staging, opened, output, table, to, names or {})
        report.verified = verify and verify_tensors(staging, table) == len(output.specs)
    report.files = sorted({row["file"] for row in table.values()})
    report.written = True
    return report


def make_output(opened: "Source", dtype: "torch.dtype", to: str, quantize: str | None) -> "Output":
    """What will be written."""
    from llava_lite.export import hf_output, own_output
    from llava_lite.quantized_checkpoint import QuantizedSource, quantized_output

    if quantize is not None:
        return quantized_output(opened, dtype, quantize)
    output = (hf_output if to == "hf" else own_output)(opened, dtype)
    if isinstance(opened, QuantizedSource):
        output.notes.append(f"the source is {opened.method}: its rounding stays in the result")
    return output


def make_report(
    opened: "Source",
    destination: str | Path | None,
    output: "Output",
    dtype: "torch.dtype",
    to: str,
    quantize: str | None,
) -> Report:
    """The report before anything is written."""
    report = Report(
        source=str(opened.path),
        destination=str(destination or ""),
        layout=opened.layout,
        to=to,
        dtype=str(dtype).removeprefix("torch."),
        quantized=quantize,
        revision=opened.revision,
        tensors=len(output.specs),
        parameters=output.num_parameters,
        size=output.size,
        tokenizer=opened.tokenizer_file is not None,
        unused=output.unused,
        ignored=opened.ignored,
        notes=list(output.notes),
    )
    if not report.tokenizer:
        report.notes.append("the source has no tokenizer, so the result has none: text needs one")
    return report


def check_destination(place: Path, opened: "Source", size: int) -> None:
    """Raise CheckpointError when writing there would touch the source, or cannot fit."""
    sources = {opened.path.resolve(), *(e.file.parent.resolve() for e in opened.entries.values())}
    if place.resolve() in sources:
        raise CheckpointError(f"{place}: is where the source lies, choose another destination")
    folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{place}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on this disk"
        )


def with_progress(output: "Output", progress: Progress | None) -> "Callable[[str], Tensor]":
    """`output.read`, telling `progress` the bytes done before each tensor and at the end."""
    if progress is None:
        return output.read
    done, total = 0, output.size

    def read(name: str) -> "Tensor":
        nonlocal done
        tensor = output.read(name)
        done += tensor.nbytes
        progress(done, total)
        return tensor

    return read


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llava-lite convert`, for `run`."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="checkpoint folder, projector file, or cached hub id")
    add("destination", metavar="DESTINATION", nargs="?", help="folder (not needed by --dry-run)")
    add(
        "--dtype",
        choices=DTYPES,
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
    parser.set_defaults(parser=parser)  # `run` reports wrong usage through it


def run(args: argparse.Namespace) -> int:
    """`llava-lite convert`: report on stdout, progress on stderr. Raises CheckpointError."""
    if args.destination is None and not args.dry_run:
        args.parser.error("a destination is needed, except with --dry-run")
    if args.quantize and args.to == "hf":
        args.parser.error(HF_QUANTIZED)
    from llava_lite.download import resolve

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
