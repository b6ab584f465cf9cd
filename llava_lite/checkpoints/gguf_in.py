"""Read a LLaVA from GGUF files: a text model, and the tower with the projector (mmproj).

Files of every type that the package `gguf` can dequantize are read. A tensor is dequantized when it
is asked for, so one tensor at a time is in float32.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_lite.checkpoints.configs import parse_config
from llava_lite.checkpoints.gguf_format import (
    FEATURE_LAYER,
    FROM_GGUF,
    KINDS,
    MERGES,
    OWN_KEY,
    SCORES,
    SUFFIX,
    TEXT_KEYS,
    TOKENS,
    VISION_KEYS,
    import_gguf,
    is_rotated,
    own_facts,
    rename,
    split_rows,
)
from llava_lite.checkpoints.gguf_header import GgufFile, read_header
from llava_lite.checkpoints.source import Entry, Source, check_entries
from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.errors import CheckpointError, one_line
from llava_lite.inputs.pixels import MEAN, STD
from llava_lite.inputs.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, Piece
from llava_lite.inputs.tokenizer import SPECIAL_TOKENS, Tokenizer

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOWER_BLOCKS = 23  # that run of the 24 of LLaVA-1.5's tower


@dataclass
class GgufSource(Source):
    """A source of GGUF files. headers: of each file."""

    headers: dict[Path, GgufFile] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """float16 if the decoder is quantized: its scales are float16."""
        entry = self.entries["decoder.layers.0.mlp.up_proj.weight"]
        kind = self.headers[entry.file].tensors[entry.stored].kind
        return PLAIN.get(kind, torch.float16)

    def stored_type(self, name: str) -> str:
        """The GGUF type of a tensor, for reports."""
        entry = self.entries[name]
        kind = self.headers[entry.file].tensors[entry.stored].kind
        return str(PLAIN[kind]).removeprefix("torch.") if kind in PLAIN else kind.lower()

    def _stored(self, entry: Entry) -> Tensor:
        tensor = read_tensor(self.headers[entry.file], entry.stored)
        ours = rename(entry.stored, FROM_GGUF) or ""
        return split_rows(tensor, self.config.text.num_heads) if is_rotated(ours) else tensor


# ---- files ---------------------------------------------------------------------------------------


def read_tensor(file: GgufFile, name: str) -> Tensor:
    """Read one tensor: a view of the mapped file, or dequantized in float32."""
    stored = file.tensors[name]
    data = np.memmap(file.path, np.uint8, "c", stored.start, stored.size)
    if stored.kind in PLAIN:
        return torch.from_numpy(data).view(PLAIN[stored.kind]).view(stored.shape)
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[stored.kind]
    rows = data.reshape(*stored.shape[:-1], -1)
    return torch.from_numpy(gguf.quants.dequantize(rows, kind)).view(stored.shape)


@lru_cache
def is_readable(kind: str) -> bool:
    """Whether tensors of a GGUF type can be dequantized."""
    gguf = import_gguf()
    blank = np.zeros(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1], np.uint8)
    try:
        gguf.quants.dequantize(blank, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def find_files(path: Path, vision_tower: object) -> list[GgufFile]:
    """The headers of text model and mmproj. `path` is a folder, or the file of the text model.

    vision_tower: the mmproj, if the folder has several. Raises CheckpointError."""
    files = [path]
    if path.is_dir() or vision_tower is None:
        files = sorted((path if path.is_dir() else path.parent).glob(f"*{SUFFIX}"))
    if path.is_file() and vision_tower is None:
        named = [file for file in files if "mmproj" in file.name.lower()]
        files = [path, *(file for file in named or files if file != path)]
    headers = [read_header(file) for file in files]
    if path.is_file():
        if headers[0].architecture == "clip":
            raise CheckpointError(f"{path}: is the tower alone: name the file of the text model")
        headers = [headers[0], *(h for h in headers[1:] if h.architecture == "clip")]
    if vision_tower is not None:
        if not isinstance(vision_tower, str | Path):
            raise CheckpointError(f"{path}: the tower of GGUF files must be a GGUF file")
        headers = [header for header in headers if header.architecture != "clip"]
        headers.append(read_header(Path(vision_tower).expanduser()))
    return [
        pick(path, [h for h in headers if (h.architecture == "clip") == is_tower], is_tower)
        for is_tower in (False, True)
    ]


def pick(path: Path, found: list[GgufFile], is_tower: bool) -> GgufFile:
    """The only header. Raises CheckpointError for none, several, or another architecture."""
    what = "tower and projector (mmproj)" if is_tower else "text model"
    how = "give one as vision_tower (--vision-tower)" if is_tower else "name one of them"
    if not found:
        raise CheckpointError(f"{path}: no GGUF file beside it has the {what}: {how}")
    if len(found) > 1:
        names = ", ".join(header.path.name for header in found)
        raise CheckpointError(f"{path}: several GGUF files have the {what}, {how}: {names}")
    if not is_tower and found[0].architecture != "llama":
        raise CheckpointError(
            f"{found[0].path}: has the architecture {found[0].architecture!r}, not 'llama'"
        )
    return found[0]


@contextmanager
def facts_of(*files: GgufFile) -> Iterator[None]:
    """Turn the errors of facts with strange types into a CheckpointError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        names = " or ".join(str(file.path) for file in files)
        raise CheckpointError(f"{names}: a fact is damaged: {one_line(error)}") from error


# ---- model ---------------------------------------------------------------------------------------


def open_gguf(path: Path, vision_tower: object = None) -> GgufSource:
    """Open a folder with a text model and an mmproj, or a text model's file with an mmproj beside
    it. Raises CheckpointError that names file and tensor."""
    text, tower = find_files(path, vision_tower)
    with facts_of(text, tower):
        config = read_config(text, tower)
    assert isinstance(config.vision, VisionConfig)
    entries = list_entries(text) | swap_mlp(list_entries(tower), config.vision)
    unused = check_entries(entries, config, path)
    return GgufSource(
        path=path,
        layout="GGUF",
        config=config,
        entries={name: entry for name, entry in entries.items() if name not in unused},
        unused=unused,
        tokenizer_file=text.path,
        family="gguf",
        headers={text.path: text, tower.path: tower},
    )


def list_entries(file: GgufFile) -> dict[str, Entry]:
    """The tensors of a file by our name. Raises CheckpointError for an unknown tensor or type."""
    found: dict[str, Entry] = {}
    for stored, tensor in file.tensors.items():
        name = rename(stored, FROM_GGUF)
        if name is None:
            raise CheckpointError(f"{file.path}: tensor {stored!r} belongs to no LLaVA-1.5")
        if not is_readable(tensor.kind):
            raise CheckpointError(
                f"{file.path}: tensor {stored!r} has the type {tensor.kind}, which cannot be read"
            )
        dtype = PLAIN.get(tensor.kind, torch.float32)
        found[name] = Entry(file.path, stored, tensor.shape, dtype)
    return found


def swap_mlp(entries: dict[str, Entry], vision: VisionConfig) -> dict[str, Entry]:
    """Exchange fc1 and fc2 of the tower if their shapes are exchanged, as in older files."""
    first = entries.get("vision.blocks.0.mlp.fc1.weight")
    right = (vision.intermediate_size, vision.hidden_size)
    if first is None or first.shape == right or first.shape != right[::-1]:
        return entries
    other = {"fc1": "fc2", "fc2": "fc1"}
    return {
        re.sub(r"(?<=mlp\.)fc[12]", lambda found: other[found[0]], name): entry
        for name, entry in entries.items()
    }


def read_config(text: GgufFile, tower: GgufFile) -> LlavaConfig:
    """The config from the facts of both files. Raises CheckpointError for another model."""
    facts, seen = text.facts, tower.facts
    heads = text.need("llama.attention.head_count")
    refused = {
        "llama.attention.head_count_kv": (heads,),
        "llama.expert_count": (0,),
        "llama.rope.scaling.type": ("none",),
        "tokenizer.ggml.model": ("llama",),
        "clip.projector_type": ("mlp",),
        "clip.use_gelu": (False,),
        "clip.use_silu": (False,),
    }
    for key, supported in refused.items():
        file = tower if key.startswith("clip") else text
        if file.facts.get(key, supported[0]) not in supported:
            raise CheckpointError(
                f"{file.path}: {key} is {file.facts[key]!r}, but LLaVA-1.5 has {supported[0]!r}"
            )
    for key, values in (("clip.vision.image_mean", MEAN), ("clip.vision.image_std", STD)):
        if not np.allclose(seen.get(key, values), values, atol=1e-3):
            raise CheckpointError(f"{tower.path}: {key} is {seen[key]}, not CLIP's")
    sizes = read_sizes(tower, VISION_KEYS)
    blocks = sizes["num_layers"]
    # llama.cpp leaves the last block out unless a layer is named. Towers of LLaVA-1.5 were written
    # with 24 blocks, or with the 23 that run.
    default = blocks if blocks == TOWER_BLOCKS else blocks - 1
    sizes["feature_layer"] = seen.get(FEATURE_LAYER, [default])[0]
    vocabulary = len(text.need(TOKENS))
    raw = {
        "format": "llava_lite",
        "vision": sizes,
        "text": read_sizes(text, TEXT_KEYS)
        | {"vocab_size": vocabulary, "sampled_vocab_size": len(read_pieces(text))},
        "name": str(facts.get("general.name", "llava-gguf")),
        **own_facts(json.loads(facts.get(OWN_KEY, "{}"))),
    }
    return parse_config(raw, None, text.path)


def read_sizes(file: GgufFile, keys: Mapping[str, str]) -> dict[str, Any]:
    """Our fields from the facts of a file. Only the base of the rotation may be missing."""
    sizes = {}
    for key, name in keys.items():
        value = file.facts.get(key, 10000.0) if name == "rope_theta" else file.need(key)
        # The shortest number with this float32 value: 1e-05 instead of 9.99999974e-06.
        sizes[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return sizes


# ---- tokenizer -----------------------------------------------------------------------------------


def read_pieces(text: GgufFile) -> list[Piece]:
    """The tokens of a file, without the added tokens and empty rows behind Llama's vocabulary."""
    rows = [list(text.need(key)) for key in (TOKENS, SCORES, KINDS)]
    if len({len(row) for row in rows}) != 1:
        raise CheckpointError(f"{text.path}: tokens, scores and types differ in number")
    pieces = [Piece(*row) for row in zip(*rows, strict=True)]
    while pieces and not is_text(pieces[-1]):
        pieces.pop()
    return pieces


def is_text(piece: Piece) -> bool:
    """Whether a token belongs to Llama's own vocabulary."""
    if piece.kind in (UNKNOWN, CONTROL):
        return piece.text in SPECIAL_TOKENS
    return piece.kind in (NORMAL, BYTE)


def read_tokenizer(path: Path, legacy: bool) -> Tokenizer:
    """The tokenizer of a text model's file. Raises CheckpointError."""
    text = read_header(path)
    with facts_of(text):
        merges = [merge.partition(" ")[::2] for merge in text.facts.get(MERGES, ())]
        pieces = read_pieces(text)
    return Tokenizer.from_pieces(pieces, merges or None, legacy, path)
