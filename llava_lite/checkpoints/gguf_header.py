"""Read the header of a GGUF file: its facts, and where each tensor lies.

The reader of the package `gguf` trusts the counts in a file. In a damaged file it ran for minutes.
"""

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_lite.checkpoints.gguf_format import import_gguf
from llava_lite.errors import CheckpointError, one_line

VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9  # types of facts, beside numbers
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file: GGUF type, shape, first byte, number of bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a file: its facts, and its tensors by GGUF's name."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.facts.get("general.architecture"))

    def need(self, key: str) -> Any:
        """A fact. Raises CheckpointError if the file does not have it."""
        if key not in self.facts:
            raise CheckpointError(f"{self.path}: the fact {key!r} is missing")
        return self.facts[key]


def read_header(path: Path) -> GgufFile:
    """Read facts and places of tensors. Raises CheckpointError for a damaged or truncated file, and
    for other versions."""
    import_gguf()
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    version = int.from_bytes(start[4:], "little")
    if len(start) < 8 or start[:4] != b"GGUF":
        raise CheckpointError(f"{path}: is no GGUF file")
    if version not in VERSIONS:
        raise CheckpointError(f"{path}: is GGUF of version {version}, only 2 and 3 can be read")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            facts, tensors = Cursor(data, position=8).header()
    except (struct.error, ValueError, KeyError, OSError, OverflowError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {one_line(error)}") from error
    if facts.get("split.count", 1) != 1:
        raise CheckpointError(f"{path}: is one part of a split GGUF: merge the parts first")
    return GgufFile(path, facts, tensors)


@dataclass
class Cursor:
    """Reads a header piece by piece. No count in the file can make it read behind the end."""

    data: mmap.mmap
    position: int

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """Numbers of a type of `struct`. Raises ValueError behind the end."""
        size = count * struct.calcsize(f"<{code}")
        raw = self.bytes(size)
        return struct.unpack(f"<{count}{code}", raw)

    def bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"the file ends inside a field at byte {self.position}")
        self.position += size
        return self.data[self.position - size : self.position]

    def text(self) -> str:
        return self.bytes(self.numbers("Q")[0]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A fact of a type: a number, a text, or a list of either."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.numbers(NUMBERS[kind])[0]
        (item,), (count,) = self.numbers("I"), self.numbers("Q")
        if item == TEXT:
            return [self.text() for _ in range(count)]
        return list(self.numbers(NUMBERS[item], count))

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """All facts, and where each tensor lies."""
        num_tensors, num_facts = self.numbers("Q", 2)
        facts: dict[str, Any] = {}
        for _ in range(num_facts):
            name = self.text()
            facts[name] = self.value(self.numbers("I")[0])
        places = [self.place() for _ in range(num_tensors)]
        alignment = facts.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"the alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = {}
        for name, stored in places:
            if name in tensors:
                raise ValueError(f"tensor {name!r} occurs twice")
            if start + stored.start + stored.size > len(self.data):
                raise ValueError(f"tensor {name!r} lies behind the end")
            tensors[name] = replace(stored, start=start + stored.start)
        return facts, tensors

    def place(self) -> tuple[str, Stored]:
        """The name of a tensor, and where it lies behind the header."""
        gguf, name = import_gguf(), self.text()
        (rank,) = self.numbers("I")
        shape = tuple(reversed(self.numbers("Q", rank)))
        (number,), (start,) = self.numbers("I"), self.numbers("Q")
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of {shape} has no {kind.name} blocks")
        return name, Stored(kind.name, shape, start, math.prod(shape) // block * size)
