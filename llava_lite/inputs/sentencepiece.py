"""Read the vocabulary and merges of a SentencePiece BPE model (protobuf)."""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Merge = tuple[str, str]


class Piece(NamedTuple):
    """A token: its text, its score (higher merges earlier), and its type in a model file."""

    text: str
    score: float
    kind: int


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # piece types of a model file
_BPE_MODEL = 2
_Message = dict[int, int | bytes]  # protobuf field number -> last value


def read_sentencepiece(data: bytes) -> tuple[dict[str, int], list[Merge]]:
    """The vocabulary and the merges of a model file. Raises ValueError or KeyError if damaged."""
    pieces, trainer, normalizer = _parse_model(data)
    if trainer.get(3) != _BPE_MODEL:
        raise ValueError("the sentencepiece model is not BPE")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(3, 1):
        raise ValueError("its normalization is not Llama's (identity, spaces kept, dummy prefix)")
    return read_pieces(pieces)


def read_pieces(pieces: Sequence[Piece]) -> tuple[dict[str, int], list[Merge]]:
    """The vocabulary and the merges of all tokens in order. Raises ValueError for an unknown type
    and for a token that occurs twice."""
    for piece in pieces:
        if piece.kind not in (NORMAL, UNKNOWN, CONTROL, BYTE):
            raise ValueError(f"piece {piece.text!r} has unsupported type {piece.kind}")
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"{len(pieces) - len(vocab)} pieces occur twice")
    return vocab, _merges_by_score([piece for piece in pieces if piece.kind == NORMAL])


def _merges_by_score(pieces: Sequence[Piece]) -> list[Merge]:
    """All ways to join two pieces into a third, best score first. The file stores no merges."""
    known = {piece.text for piece in pieces}
    merges: list[Merge] = []
    for text, _, _ in sorted(pieces, key=lambda piece: -piece.score):
        splits = ((text[:cut], text[cut:]) for cut in range(len(text) - 1, 0, -1))
        merges += [split for split in splits if split[0] in known and split[1] in known]
    return merges


def _parse_model(data: bytes) -> tuple[list[Piece], _Message, _Message]:
    """Pieces, trainer settings and normalizer settings of a sentencepiece model file.

    The file is one protobuf message: field 1 repeats the pieces (text 1, score 2, type 3), field 2
    holds the trainer's settings (model type 3), field 3 the normalizer's (character map 2,
    dummy prefix 3, remove extra whitespace 4).
    """
    pieces: list[Piece] = []
    settings: dict[int, _Message] = {2: {}, 3: {}}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value))
        elif field in settings and isinstance(value, bytes):
            settings[field] = dict(_fields(value))
    return pieces, settings[2], settings[3]


def _parse_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields[1], fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of the wrong type")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of a protobuf message; fixed-size numbers stay raw bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"the file ends inside a field at byte {position}")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"number too long at byte {position}")
