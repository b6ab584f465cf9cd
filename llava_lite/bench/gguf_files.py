"""GGUF files of random weights, in the shapes of a model, for llama.cpp to run.

Speed does not depend on values, so every block of a file is noise with a small scale. Nothing is
quantized: a 7B model takes as long as its bytes take to write. The package `gguf` has no code that
quantizes to Q4_K, and these files need none. The tower and the projector are float16.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import torch
from torch import Tensor

from llava_lite.bench.cases import LLAMACPP
from llava_lite.bench.models import BenchError
from llava_lite.checkpoints.gguf_format import SUFFIX
from llava_lite.checkpoints.gguf_header import read_header
from llava_lite.checkpoints.gguf_out import (
    Q8_0,
    TYPES,
    GgufFile,
    GgufOutput,
    byte_shape,
    gguf_output,
    write_file,
)
from llava_lite.checkpoints.load import embedded_model
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.checkpoints.source import Entry, Source
from llava_lite.config import LlavaConfig

Q4_K = "Q4_K"
Q4_K_BLOCK = 256  # weights; other rows stay Q8_0, as they do in published files
Q4_K_FILE = 14  # general.file_type
MMPROJ = "mmproj"
DTYPES = {kind: dtype for dtype, kind in TYPES.items()}
NOISE = 1 << 22  # bytes and numbers, repeated
# The first numbers of a block, in float16. They give weights a deviation of 0.02: uniform codes of
# 8 bits in Q8_0; in Q4_K uniform codes of 4 bits, and scales and minima of 6 bits.
SCALES = {Q8_0: (2.7e-4,), Q4_K: (7.7e-5, 5.7e-4)}


@dataclass(frozen=True)
class PlannedFile:
    """One file to write: its path, its facts and types, and the bytes of its tensors."""

    path: Path
    planned: GgufFile
    output: GgufOutput

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: int(np.prod(self.output.specs[name][0])) for name in self.planned.types}


def plan_files(config: LlavaConfig, formats: Sequence[str], folder: Path) -> dict[str, PlannedFile]:
    """The file of the text model in every format, and the one of the tower and the projector, by
    format and "mmproj". Raises CheckpointError for a model that llama.cpp cannot represent."""
    stem = f"{config.name}-{config.text.num_layers}-layers"
    files = {}
    for kind in (*formats, MMPROJ):
        output = plan_output(config, "f16" if kind == MMPROJ else kind)
        tower, text = sorted(output.files)  # mmproj-..., model-...
        planned = output.files[tower if kind == MMPROJ else text]
        files[kind] = PlannedFile(folder / f"{stem}-{kind}{SUFFIX}", planned, output)
    return files


def plan_output(config: LlavaConfig, form: str) -> GgufOutput:
    """The plan of two GGUF files, with the text model in a format: bf16, f16, q8_0 or q4_k."""
    nowhere = Path("random weights")
    shapes = expected_shapes(config).items()
    entries = {name: Entry(nowhere, name, shape, torch.float16) for name, shape in shapes}
    tokenizer = embedded_model() / "tokenizer.json"  # any will do: words do not matter here
    source = Source(nowhere, "random", config, entries, tokenizer_file=tokenizer)
    dtype = DTYPES.get(form.upper())
    output = gguf_output(source, dtype or torch.float16, None if dtype else "q8_0")
    return to_q4_k(output) if form == Q4_K.lower() else output


def to_q4_k(output: GgufOutput) -> GgufOutput:
    """A plan with Q4_K in place of Q8_0, in every matrix whose rows allow it."""
    text = output.files[max(output.files)]
    text.facts["general.file_type"] = Q4_K_FILE
    for name, kind in text.types.items():
        if kind == Q8_0 and output.shapes[name][-1] % Q4_K_BLOCK == 0:
            text.types[name] = Q4_K
            output.specs[name] = byte_shape(output.shapes[name], Q4_K), torch.uint8
    return output


def count_bytes(files: Mapping[str, PlannedFile]) -> dict[str, int]:
    """Bytes of all weights of llama.cpp, by contender."""
    sizes = {kind: sum(file.sizes.values()) for kind, file in files.items()}
    tower = sizes.pop(MMPROJ, 0)
    return {f"{LLAMACPP} {form}": size + tower for form, size in sizes.items()}


@contextmanager
def gguf_files(
    config: LlavaConfig, formats: Sequence[str], folder: str | None
) -> Iterator[dict[str, PlannedFile]]:
    """Files of these formats in a folder that the user names, where they stay and are used again,
    or in a temporary one (None).

    Raises BenchError if the disk has too little space, before anything is written, and for a file
    of another model."""
    if not formats:
        yield {}
    elif folder is None:
        with TemporaryDirectory(prefix="llava_lite-bench-") as temporary:
            yield write_files(config, formats, Path(temporary))
    else:
        yield write_files(config, formats, Path(folder).expanduser())


def write_files(
    config: LlavaConfig, formats: Sequence[str], folder: Path
) -> dict[str, PlannedFile]:
    """Write the files that are not there yet, each completely or not at all."""
    files = plan_files(config, formats, folder)
    missing = find_missing(files, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in missing:
        staging = file.path.with_suffix(".part")
        try:
            write_file(staging, file.planned, file.output, partial(random_bytes, file))
            staging.replace(file.path)
        finally:
            staging.unlink(missing_ok=True)
    return files


def check_files(config: LlavaConfig, formats: Sequence[str], folder: str | None) -> None:
    """Raise the errors of `gguf_files` before anything slow."""
    place = Path(folder or gettempdir()).expanduser()
    find_missing(plan_files(config, formats, place), place)


def find_missing(files: Mapping[str, PlannedFile], folder: Path) -> list[PlannedFile]:
    """The files that are not there. Raises BenchError if the disk has too little space for them."""
    missing = [file for file in files.values() if not is_written(file)]
    needed = sum(sum(file.sizes.values()) for file in missing)
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise BenchError(
            f"{folder}: the GGUF files need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
            "on this disk: use fewer --layers, fewer --gguf-formats or another --gguf-folder"
        )
    return missing


def is_written(file: PlannedFile) -> bool:
    """Whether the file is there. Raises BenchError if it has other tensors."""
    if not file.path.exists():
        return False
    stored = {name: tensor.size for name, tensor in read_header(file.path).tensors.items()}
    if stored != file.sizes:
        raise BenchError(f"{file.path}: is of another model, name another --gguf-folder")
    return True


def random_bytes(file: PlannedFile, name: str) -> Tensor:
    """The bytes of a tensor, as uint8: noise; for norms ones, for biases zeros."""
    kind, shape = file.planned.types[name], file.output.shapes[name]
    size = file.sizes[name]
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight"))).view(torch.uint8)
    if kind in DTYPES:
        return torch.from_numpy(np.resize(noise(kind), size))
    scales = torch.tensor(SCALES[kind], dtype=torch.float16).view(torch.uint8)
    block = byte_shape((Q4_K_BLOCK if kind == Q4_K else 32,), kind)[0]
    blocks = torch.from_numpy(np.resize(noise(kind), size)).view(-1, block)
    blocks[:, : len(scales)] = scales
    return blocks.view(-1)


@lru_cache
def noise(kind: str) -> np.ndarray:
    """Bytes of normal numbers of deviation 0.02 in a plain type; else uniform bytes."""
    generator = torch.Generator().manual_seed(0)
    if kind not in DTYPES:
        return torch.randint(256, (NOISE,), generator=generator, dtype=torch.uint8).numpy()
    numbers = 0.02 * torch.randn(NOISE, generator=generator)
    return numbers.to(DTYPES[kind]).view(torch.uint8).numpy()
