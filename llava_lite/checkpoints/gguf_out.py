"""Write a model as two GGUF files for llama.cpp: the text model, and the tower with the projector.

Matrices are in one of four types. Norms, biases and positions stay float32, as llama.cpp has them.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_lite.checkpoints.checkpoint import load_tokenizer
from llava_lite.checkpoints.export import Output, clip_tower, threshold_document
from llava_lite.checkpoints.gguf_format import (
    FEATURE_LAYER,
    KINDS,
    MERGES,
    OWN_KEY,
    SCORES,
    SUFFIX,
    TEXT_KEYS,
    TO_GGUF,
    TOKENS,
    UNUSED,
    VISION_KEYS,
    import_gguf,
    is_rotated,
    own_facts,
    pair_rows,
    rename,
)
from llava_lite.checkpoints.gguf_header import read_header
from llava_lite.checkpoints.source import Source
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.inputs.pixels import MEAN, STD
from llava_lite.inputs.prompt import Template, get_template
from llava_lite.inputs.sentencepiece import Piece
from llava_lite.inputs.tokenizer import Tokenizer

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Q8_0 = "Q8_0"
Q8_BLOCK = 32  # neighbors in a row that share a scale
FILE_TYPES = {"F32": 0, "F16": 1, Q8_0: 7, "BF16": 32}  # general.file_type


@dataclass
class GgufFile:
    """A file to write: its facts, and the GGUF type of each tensor by GGUF's name."""

    facts: dict[str, Any]
    types: dict[str, str]


@dataclass
class GgufOutput(Output):
    """The plan of two GGUF files. `specs` and `read` are about the bytes of each tensor."""

    files: dict[str, GgufFile] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def gguf_output(opened: Source, dtype: torch.dtype, method: str | None) -> GgufOutput:
    """Plan two GGUF files, with matrices in `dtype`, or with the method "q8_0" those of the decoder
    in 8 bits. Raises CheckpointError for a model that llama.cpp cannot represent."""
    import_gguf()
    config = opened.config
    clip_tower(config, "GGUF")  # raises
    if config.projector_depth != 2:
        raise CheckpointError(f"{opened.path}: GGUF has 2 projector layers, not the source's")
    pieces, merges = read_vocabulary(opened)
    rows = config.text.sampled_vocab_size
    plain = TYPES[dtype]
    text_type = Q8_0 if method else plain
    names = {rename(name, TO_GGUF) or name: name for name in opened.names()}
    shapes = {theirs: opened.shape(ours) for theirs, ours in names.items()}
    for name in ("token_embd.weight", "output.weight"):
        shapes[name] = (rows, *shapes[name][1:])
    types = {name: pick_type(name, shapes[name], text_type, plain) for name in names}
    text = {name: kind for name, kind in types.items() if not name.startswith(("v.", "mm."))}
    rest = {name: kind for name, kind in types.items() if name not in text}
    facts = text_facts(config, text_type) | vocabulary_facts(pieces, merges)

    def read(name: str) -> Tensor:
        kind, ours = types[name], names[name]
        wanted = next((dtype for dtype, known in TYPES.items() if known == kind), torch.float32)
        tensor = opened.read(ours, wanted)[: shapes[name][0]]
        if is_rotated(ours):
            tensor = pair_rows(tensor, config.text.num_heads)
        return encode(tensor, kind)

    return GgufOutput(
        specs={name: (byte_shape(shapes[name], types[name]), torch.uint8) for name in names},
        read=read,
        documents=threshold_document(opened),
        notes=notes_on(config, plain, method),
        unused=list(dict.fromkeys(entry.stored for entry in opened.unused.values())),
        weights=sum(math.prod(shape) for shape in shapes.values()),
        files={
            f"model-{text_type.lower()}{SUFFIX}": GgufFile(facts, text),
            f"mmproj-{plain.lower()}{SUFFIX}": GgufFile(vision_facts(config, plain), rest),
        },
        shapes=shapes,
    )


def notes_on(config: LlavaConfig, plain: str, method: str | None) -> list[str]:
    """What the files do not have, for the report."""
    notes, text = [], config.text
    if text.vocab_size != text.sampled_vocab_size:
        notes.append(
            f"vocabulary cut from {text.vocab_size} to {text.sampled_vocab_size} rows: the model "
            "never generates the others"
        )
    if method:
        notes.append(f"the tower and the projector stay {plain.lower()}")
    return notes


def pick_type(name: str, shape: tuple[int, ...], text_type: str, plain: str) -> str:
    """The GGUF type of a tensor."""
    if len(shape) == 1 or name == "v.position_embd.weight":
        return "F32"
    if name.startswith(("v.", "mm.")):
        return plain
    return plain if text_type == Q8_0 and shape[-1] % Q8_BLOCK else text_type


def byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape of a tensor's bytes."""
    block, size = import_gguf().GGML_QUANT_SIZES[import_gguf().GGMLQuantizationType[kind]]
    return (*shape[:-1], shape[-1] // block * size)


def encode(tensor: Tensor, kind: str) -> Tensor:
    """The bytes of a tensor in a GGUF type, as uint8 in `byte_shape`."""
    if kind != Q8_0:
        return tensor.contiguous().view(torch.uint8)
    gguf = import_gguf()
    data = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(data))


# ---- facts ---------------------------------------------------------------------------------------


def text_facts(config: LlavaConfig, kind: str) -> dict[str, Any]:
    """The facts of the text model, without its vocabulary."""
    text = config.text
    sizes = {key: getattr(text, name) for key, name in TEXT_KEYS.items()}
    own = own_facts(config.to_dict())
    del own["format"]
    return {
        "general.type": "model",
        "general.name": config.name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": import_gguf().GGML_QUANT_VERSION,
        **sizes,
        "llama.attention.head_count_kv": text.num_heads,
        "llama.rope.dimension_count": text.head_dim,
        "llama.vocab_size": text.sampled_vocab_size,
        "tokenizer.chat_template": chat_template(get_template(config.template)),
        OWN_KEY: json.dumps(own),
    }


def vocabulary_facts(pieces: list[Piece], merges: list[str] | None) -> dict[str, Any]:
    """The vocabulary, for llama.cpp's SentencePiece tokenizer."""
    facts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        TOKENS: [piece.text for piece in pieces],
        SCORES: [piece.score for piece in pieces],
        KINDS: [piece.kind for piece in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    return facts | ({MERGES: merges} if merges is not None else {})


def read_vocabulary(opened: Source) -> tuple[list[Piece], list[str] | None]:
    """The tokens of a source, one for each row, and its merges if the scores do not imply them."""
    if opened.tokenizer_file is None:
        raise CheckpointError(f"{opened.path}: has no tokenizer, which a GGUF file must have")
    tokenizer, rows = load_tokenizer(opened.tokenizer_file, opened.config), opened.config.text
    pieces = tokenizer.to_pieces()
    implied = Tokenizer.from_pieces(pieces, None, False, opened.tokenizer_file)
    merges = None
    if implied.merges != tokenizer.merges:
        merges = [" ".join(pair) for pair in tokenizer.merges]
    if len(pieces) > rows.sampled_vocab_size:
        raise CheckpointError(
            f"{opened.tokenizer_file}: has {len(pieces)} tokens, but the model has "
            f"{rows.sampled_vocab_size} rows of text"
        )
    for row in range(len(pieces), rows.sampled_vocab_size):
        pieces.append(Piece(f"[PAD{row}]", 0.0, UNUSED))
    return pieces, merges


def vision_facts(config: LlavaConfig, kind: str) -> dict[str, Any]:
    """The facts of the tower and the projector. Only the blocks that run are in the file."""
    vision = clip_tower(config, "GGUF")
    sizes = {key: getattr(vision, name) for key, name in VISION_KEYS.items()}
    return {
        "general.type": "mmproj",
        "general.name": config.name,
        "general.file_type": FILE_TYPES[kind],
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        **sizes,
        "clip.vision.block_count": vision.num_blocks,
        FEATURE_LAYER: [vision.num_blocks],  # without it llama.cpp leaves the last block out
        "clip.vision.projection_dim": config.text.hidden_size,
        "clip.vision.image_mean": list(MEAN),
        "clip.vision.image_std": list(STD),
        "clip.use_gelu": False,  # QuickGELU
    }


def chat_template(template: Template) -> str:
    """A prompt template in the language of chat templates, Jinja."""
    parts = {
        "system": f"{{{{ message['content'] }}}}{template.system_end}",
        "user": f"{template.user_start}{{{{ message['content'] }}}}{template.user_end}",
        "assistant": f"{template.answer_start}{{{{ message['content'] }}}}{template.answer_end}",
    }
    branches = "".join(
        f"{{% {'if' if role == 'system' else 'elif'} message['role'] == '{role}' %}}{text}"
        for role, text in parts.items()
    )
    first = (
        "{% if messages[0]['role'] != 'system' %}"
        f"{template.system}{template.system_end}"
        "{% endif %}"
    )
    loop = f"{{% for message in messages %}}{branches}{{% endif %}}{{% endfor %}}"
    return (first if template.system else "") + loop


# ---- write ---------------------------------------------------------------------------------------


def write_files(
    folder: Path, output: GgufOutput, read: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """Write the files, with one tensor in memory at a time. Returns file and sha256 by GGUF's
    name."""
    table: dict[str, dict[str, Any]] = {}
    for name, planned in output.files.items():
        table |= write_file(folder / name, planned, output, read)
    return table


def write_file(
    path: Path, planned: GgufFile, output: GgufOutput, read: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """Write one GGUF file. Returns file and sha256 of each tensor."""
    gguf, table = import_gguf(), {}
    architecture = "llama" if TOKENS in planned.facts else "clip"
    writer = gguf.GGUFWriter(path, architecture)
    add_facts(writer, planned.facts)
    for name, kind in planned.types.items():
        raw = gguf.GGMLQuantizationType[kind]
        shape = output.specs[name][0]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in planned.types:
        data = read(name).numpy()
        writer.write_tensor_data(data)
        table[name] = {"file": path.name, "sha256": hashlib.sha256(data.data).hexdigest()}
    writer.close()
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # a full disk may be reported only here
    return table


def add_facts(writer: Any, facts: Mapping[str, Any]) -> None:
    """Add facts to a writer, each with the type of its value."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in facts.items():
        adders[type(value)](key, value)


def verify_files(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> int:
    """Compare the tensors of written files with the table of `write_files`. Returns their number.

    Raises CheckpointError that names the file and the tensor."""
    for path in sorted({folder / str(row["file"]) for row in table.values()}):
        header = read_header(path)
        for name in (name for name, row in table.items() if row["file"] == path.name):
            stored = header.tensors[name]
            data = np.memmap(path, np.uint8, "r", stored.start, stored.size)
            if hashlib.sha256(data.data).hexdigest() != table[name]["sha256"]:
                raise CheckpointError(f"{path}: tensor {name!r} differs from its sha256")
    return len(table)
