"""Convert any checkpoint layout to a folder in our format, in llava-hf's, or to GGUF files.

One tensor at a time is in memory: read from the mapped source, cast, hashed and written to a shard.
The folder appears at its destination only when all of it is written. This file imports nothing
heavy before a conversion starts, so help and usage errors come at once.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_lite.checkpoints.names import SHARD_SIZE
from llava_lite.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llava_lite.checkpoints.export import Output
    from llava_lite.checkpoints.source import Source

Progress = Callable[[int, int], None]
FORMATS = ("llava_lite", "hf", "gguf")
METHODS = (
    "int8",
    "int4",
    "int8-dynamic",
    "int4-dynamic",
)  # as in fast/quantize.py, which imports torch
GGUF_METHODS = ("q8_0",)
AUTO_DTYPES = {"llava_lite": "bfloat16", "hf": "bfloat16", "gguf": "float16"}
# Loading packs the codes of a file while the file is mapped: small files keep this memory small.
QUANTIZED_SHARD_SIZE = 500_000_000
WRONG_METHOD = "{} weights cannot be written as {}: {} has {}"


@dataclass
class Report:
    """The result of a conversion, or with `dry_run` the plan. Sizes in bytes."""

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
            f"and {len(self.ignored)} that are not weights of the model",
        ]
        if self.files:
            lines.append(f"files: {', '.join(self.files)}")
        if self.verified:
            rounded = " (the decoder's after quantization)" if self.quantized else ""
            lines.append(f"verified: every tensor read back equals the source{rounded}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    source: str | Path,
    destination: str | Path | None,
    *,
    dtype: "str | torch.dtype | None" = "auto",
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
    """Convert a checkpoint of any layout (see `opening.open_source`) to a self-contained folder.

    dtype: of the weights written; None keeps the decoder's; "auto" is bfloat16, for GGUF float16.
    shard_size: bytes per weight file, by default 2 GB, and 0.5 GB if quantized.
    dry_run: only report. verify: read everything back and compare hashes.
    to: "llava_lite", "hf" or "gguf". quantize: the decoder, as a method of `METHODS` in our own
    format, as "q8_0" in GGUF.
    force: replace a checkpoint at the destination. progress: called with (bytes done, all bytes).
    names: what the manifest records as "source" and "base" instead of their paths.

    An error or interrupt leaves nothing behind. Raises CheckpointError that names file and tensor,
    and ValueError."""
    from llava_lite.checkpoints.checkpoint import parse_dtype
    from llava_lite.checkpoints.opening import open_source

    if shard_size is None:
        shard_size = QUANTIZED_SHARD_SIZE if quantize else SHARD_SIZE
    check_options(to, quantize, shard_size)
    opened = open_source(source, base, vision_tower)
    wanted = parse_dtype(AUTO_DTYPES[to] if dtype == "auto" else dtype) or opened.dtype
    output = make_output(opened, wanted, to, quantize)
    report = make_report(opened, destination, output, wanted, to, quantize)
    if not dry_run:
        if destination is None:
            raise ValueError("a destination is needed, except with dry_run")
        place = Path(destination).expanduser().resolve()  # a link stays, its target is filled
        write_output(report, place, opened, output, shard_size, verify, force, progress, names)
    return report


def methods_of(to: str) -> tuple[str, ...]:
    """How a format can quantize."""
    return {"llava_lite": METHODS, "gguf": GGUF_METHODS}.get(to, ())


def check_options(to: str, quantize: str | None, shard_size: int) -> None:
    """Raise ValueError for an unknown format, and for options that exclude each other."""
    if to not in FORMATS or shard_size < 1:
        known = ", ".join(FORMATS)
        raise ValueError(f"to {to!r} must be one of {known}, shard_size {shard_size} at least 1")
    if quantize is not None and quantize not in methods_of(to):
        raise ValueError(explain_method(to, quantize))


def explain_method(to: str, quantize: str) -> str:
    """Say which quantization a format has instead."""
    return WRONG_METHOD.format(quantize, to, to, " and ".join(methods_of(to)) or "none")


def write_output(
    report: Report,
    place: Path,
    opened: "Source",
    output: "Output",
    shard_size: int,
    verify: bool,
    force: bool,
    progress: Progress | None,
    names: Mapping[str, str] | None,
) -> None:
    """Write a folder, and note in the report what was written."""
    from llava_lite.checkpoints.checkpoint import verify_tensors
    from llava_lite.checkpoints.export import write_side_files
    from llava_lite.checkpoints.gguf_out import GgufOutput, verify_files, write_files
    from llava_lite.checkpoints.tensors import stage_folder, write_shards

    check_destination(place, opened, output.size)
    opened.check_head()
    with stage_folder(place, force) as staging:
        read = add_progress(output, progress)
        if isinstance(output, GgufOutput):
            table = write_files(staging, output, read)
        else:
            table = write_shards(staging, output.specs, read, shard_size)
        write_side_files(staging, opened, output, table, report.to, names or {})
        check = verify_files if isinstance(output, GgufOutput) else verify_tensors
        report.verified = verify and check(staging, table) == len(output.specs)
    report.files = sorted({row["file"] for row in table.values()})
    report.written = True


def make_output(opened: "Source", dtype: "torch.dtype", to: str, quantize: str | None) -> "Output":
    """Plan the tensors and documents to write."""
    from llava_lite.checkpoints.export import hf_output, own_output, quantized_output
    from llava_lite.checkpoints.gguf_out import gguf_output
    from llava_lite.checkpoints.quantized import QuantizedSource

    if to == "gguf":
        output: Output = gguf_output(opened, dtype, quantize)
    elif quantize is not None:
        return quantized_output(opened, dtype, quantize)
    else:
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
    """Make the report, before anything is written."""
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
    """Raise CheckpointError if the source lies at `place`, or the disk has too little space."""
    sources = {opened.path.resolve(), *(e.file.parent.resolve() for e in opened.entries.values())}
    if place.resolve() in sources:
        raise CheckpointError(f"{place}: is where the source lies, choose another destination")
    folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{place}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on this disk"
        )


def add_progress(output: "Output", progress: Progress | None) -> "Callable[[str], Tensor]":
    """`output.read`, which also tells `progress` how many bytes have been read."""
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
