"""The Llama tokenizer: sentencepiece BPE ids, computed by the `tokenizers` library.

A file gives only the vocabulary and the merges. The rules for splitting text and for U+2581 are in
this file. So `tokenizer.model`, `tokenizer.json` and `train_tokenizer` follow the same rules.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import CheckpointError
from llava_lite.inputs.prompt import IMAGE_MARKER
from llava_lite.inputs.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Merge,
    Piece,
    read_pieces,
    read_sentencepiece,
)

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # sentencepiece writes every space as this visible character
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL_TOKENS = (UNK, BOS, EOS)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPECIAL_LITERALS = re.compile("(<unk>|<s>|</s>)")
SPACES_SCORE = -1e9  # of all pieces of spaces, as in Llama's model
_RESERVED = frozenset(SPECIAL_TOKENS + BYTE_TOKENS)
After = Literal["text"]


class Tokenizer:
    """Text to ids and back, with the ids of the reference Llama tokenizer.

    `legacy` matters after a literal `</s>` in a text. True puts U+2581 before every segment. False
    puts it before the whole text only; this is the default, as in Vicuna and LLaVA-1.5.
    """

    family = "llama"  # of the prompt templates that fit

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[Merge], legacy: bool = False
    ) -> None:
        _check_vocab(vocab)
        self.legacy = legacy
        self.vocab_size = len(vocab)
        self.unk_id, self.bos_id, self.eos_id = (vocab[token] for token in SPECIAL_TOKENS)
        self._vocab = vocab
        self._merges = _ordered_merges(vocab, merges)
        self._special_ids = {token: vocab[token] for token in SPECIAL_TOKENS}
        self._bpe = _bpe_model(vocab, self._merges)
        self._texts = [piece.replace(SPACE, " ") for piece in sorted(vocab, key=vocab.__getitem__)]
        self._bytes = {vocab[token]: byte for byte, token in enumerate(BYTE_TOKENS)}

    @classmethod
    def from_file(cls, path: str | Path, legacy: bool = False) -> "Tokenizer":
        """Read a `tokenizer.json` of `save` or of a Llama-family repository.

        The normalizer and the added tokens (`<image>`, `<pad>`) of the file are ignored: ids above
        the text vocabulary belong to the checkpoint. Raises CheckpointError.
        """
        with _tokenizer_errors(path, "a Llama-style tokenizer.json"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(*_read_bpe(content), legacy)

    @classmethod
    def from_sentencepiece(cls, path: str | Path, legacy: bool = False) -> "Tokenizer":
        """Read a `tokenizer.model`, the BPE file of sentencepiece. Raises CheckpointError."""
        with _tokenizer_errors(path, "a Llama tokenizer.model"):
            return cls(*read_sentencepiece(Path(path).read_bytes()), legacy)

    @classmethod
    def from_pieces(
        cls, pieces: Sequence[Piece], merges: Sequence[Merge] | None, legacy: bool, path: Path
    ) -> "Tokenizer":
        """Make a tokenizer from the tokens of a GGUF file, in order, with the merges that their
        scores imply unless given. Raises CheckpointError that names the path."""
        with _tokenizer_errors(path, "a Llama tokenizer"):
            vocab, implied = read_pieces(pieces)
            return cls(vocab, implied if merges is None else merges, legacy)

    def to_pieces(self) -> list[Piece]:
        """All tokens in order, with scores in the order of the merges."""
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self._merges):
            ranks.setdefault(left + right, rank)
        pieces = []
        for text in sorted(self._vocab, key=self._vocab.__getitem__):
            score = -float(ranks.get(text, len(self._merges)))
            kind = BYTE if text in _RESERVED else NORMAL
            if text in SPECIAL_TOKENS:
                kind = UNKNOWN if text == UNK else CONTROL
            pieces.append(Piece(text, score if text.strip(SPACE) else SPACES_SCORE, kind))
        return pieces

    @property
    def merges(self) -> list[Merge]:
        """The merges in order of priority."""
        return list(self._merges)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `from_file` and the `tokenizers` library both load.

        `legacy` is not in the file; the config of the model has it. Other readers than `from_file`
        use the normalizer of official files, which gives the ids of legacy mode.
        """
        Path(path).write_text(_portable_tokenizer(self._vocab, self._merges).to_str(pretty=False))

    def encode(self, text: str, *, bos: bool = True, after: After | None = None) -> list[int]:
        """Ids of a text. Literal `<s>`, `</s>` and `<unk>` become their ids. No EOS is added.

        `after="text"` continues a text: without BOS and without U+2581 in front.
        """
        ids = [self.bos_id] if bos and after is None else []
        for index, part in enumerate(_SPECIAL_LITERALS.split(text)):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                prefix = self.legacy if index else after is None
                ids += self._encode_segment(part, prefix)
        return ids

    def encode_prompt(self, text: str, *, after: After | None = None) -> list[int]:
        """Ids of a prompt with `IMAGE_TOKEN_ID` for every `<image>`.

        Each chunk between markers is encoded alone and gets a U+2581. An empty chunk has no ids.
        `after` applies to the first chunk, see `encode`.
        """
        first, *rest = text.split(IMAGE_MARKER)
        ids = self.encode(first, after=after)
        for chunk in rest:
            ids.append(IMAGE_TOKEN_ID)
            ids += self.encode(chunk, bos=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special ids, ids outside the vocabulary, and one leading space.

        Other whitespace stays at both ends. Every byte outside UTF-8 becomes one U+FFFD.
        """
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self) -> "StreamDecoder":
        """A decoder of ids, one at a time."""
        return StreamDecoder(self)

    @property
    def pieces(self) -> list[str]:
        """The text of each id of the vocabulary, with real spaces."""
        return list(self._texts)

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        text = replace_surrogates(text)
        text = (SPACE if prefix else "") + text.replace(" ", SPACE)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _kept(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size and token_id not in self._special_ids.values()


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates, which no library takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Decodes ids one at a time. The joined pieces equal `Tokenizer.decode` of all ids.

    Only an incomplete UTF-8 sequence is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Add one id. Returns the text that became certain, possibly empty."""
        if not self._tokenizer._kept(token_id):
            return ""
        at_start, self._at_start = self._at_start, False
        byte = self._tokenizer._bytes.get(token_id)
        if byte is not None:
            text, self._pending = _decode_utf8(self._pending + bytes([byte]))
            return text
        text = self._tokenizer._texts[token_id]
        return self.flush() + (text.removeprefix(" ") if at_start else text)

    def flush(self) -> str:
        """The rest at the end: U+FFFD for every byte of an incomplete sequence."""
        text, self._pending = "\ufffd" * len(self._pending), b""
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE tokenizer with Llama's conventions: ids 0..2 special, 3..258 bytes, then pieces.

    Learned pieces are words, or parts of words, with the space in front. They never cross a space,
    a line break or punctuation; digits stay single. A small corpus can give fewer pieces than
    `vocab_size`. Raises ValueError if `vocab_size` leaves no room for learned pieces.
    """
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    reserved = [*SPECIAL_TOKENS, *BYTE_TOKENS]
    if vocab_size <= len(reserved):
        raise ValueError(f"vocab_size must exceed {len(reserved)}, got {vocab_size}")
    backend = Backend(BPE(unk_token=UNK, byte_fallback=True))
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Split(Regex(r"\s"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=reserved,
        limit_alphabet=vocab_size - len(reserved),
        show_progress=False,
    )
    backend.train_from_iterator(_training_segments(texts), trainer)
    return Tokenizer(*_read_bpe(json.loads(backend.to_str())))


def _training_segments(texts: Iterable[str]) -> Iterator[str]:
    """The segments that `encode_prompt` passes to the BPE: no piece crosses a special token."""
    for text in texts:
        for chunk in text.split(IMAGE_MARKER):
            for part in _SPECIAL_LITERALS.split(chunk):
                if part and part not in SPECIAL_TOKENS:
                    yield part


def _decode_utf8(data: bytes) -> tuple[str, bytes]:
    """Decoded text and the incomplete sequence at the end.

    One U+FFFD per byte, as in sentencepiece. Python's "replace" gives one per broken sequence.
    """
    text = ""
    while data:
        try:
            return text + data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode("utf-8")
            if error.reason == "unexpected end of data":
                return text, data[error.start :]
            text += "\ufffd"
            data = data[error.start + 1 :]
    return text, b""


# ---- vocabulary and merges ---------------------------------------------------------------------


@contextmanager
def _tokenizer_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: not {kind}: {error}") from error


def _check_vocab(vocab: dict[str, int]) -> None:
    missing = [token for token in (*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE) if token not in vocab]
    if missing:
        raise ValueError(f"{len(missing)} required tokens are missing, first {missing[0]!r}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"ids of the {len(vocab)} pieces are not 0..{len(vocab) - 1}")


def _ordered_merges(vocab: dict[str, int], merges: Sequence[Merge]) -> list[Merge]:
    """Merges in order of priority. Merges of pure whitespace are rewritten and come last.

    Whitespace pieces share the lowest score in Llama's model. So sentencepiece merges a run of
    spaces from the left into the longest pieces. The rank (longest run, one space) first makes the
    BPE do the same.
    """
    words = [
        (left, right)
        for left, right in merges
        if (left + right).strip(SPACE) and left + right not in _RESERVED
    ]
    longest = 1
    while SPACE * (longest + 1) in vocab:
        longest += 1
    return words + [(SPACE * length, SPACE) for length in range(longest - 1, 0, -1)]


def _bpe_model(vocab: dict[str, int], merges: list[Merge]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    try:
        bpe = BPE(vocab=vocab, merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)
    except Exception as error:  # the library raises plain Exception for a merge outside the vocab
        raise ValueError(str(error)) from error
    return Backend(bpe)


def _normalizer() -> "tokenizers.normalizers.Normalizer":
    """The normalizer of official files: U+2581 in front, and for every space."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def _portable_tokenizer(vocab: dict[str, int], merges: list[Merge]) -> "tokenizers.Tokenizer":
    """A complete pipeline in the layout of the `tokenizer.json` of Llama repositories."""
    from tokenizers import decoders, processors

    backend = _bpe_model(vocab, merges)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.normalizer = _normalizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def _read_bpe(content: dict) -> tuple[dict[str, int], list[Merge]]:
    """The vocabulary, without added tokens, and the merges of a parsed `tokenizer.json`."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']!r} is not BPE")
    added = {token["content"] for token in content.get("added_tokens") or ()} - _RESERVED
    vocab = {str(piece): int(i) for piece, i in model["vocab"].items() if piece not in added}
    # Older versions of the library write "left right", newer ones [left, right].
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return vocab, [(str(left), str(right)) for left, right in pairs]
