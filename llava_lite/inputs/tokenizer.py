"""The Llama tokenizer: sentencepiece BPE ids, computed by the `tokenizers` library.

Only vocabulary and merges are taken from a file; how text is cut and where U+2581 goes is decided
here, so `tokenizer.model`, an official `tokenizer.json` and a tokenizer trained with
`train_tokenizer` all follow the same rules.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import CheckpointError
from llava_lite.inputs.prompt import IMAGE_MARKER
from llava_lite.inputs.sentencepiece import Merge, _read_sentencepiece

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # sentencepiece writes every space as this visible character


UNK, BOS, EOS = "<unk>", "<s>", "</s>"


SPECIAL_TOKENS = (UNK, BOS, EOS)


BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


_SPECIAL_LITERALS = re.compile("(<unk>|<s>|</s>)")


_RESERVED = frozenset(SPECIAL_TOKENS + BYTE_TOKENS)


After = Literal["text"]


class Tokenizer:
    """Text to ids and back, with the ids of the reference Llama tokenizer.

    `legacy` decides what follows a literal `</s>` inside a text: True puts U+2581 before every
    segment, False (the default, as Vicuna and LLaVA-1.5) only before the whole text.
    """

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
        """Read a `tokenizer.json`: one written by `save`, or that of a Llama-family repository.

        The file's own normalizer and added tokens (`<image>`, `<pad>`) are ignored: ids beyond the
        text vocabulary belong to the checkpoint, not to the text. Raises CheckpointError.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vocab, merges = _read_bpe(content)
            return cls(vocab, merges, legacy)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except _NOT_A_TOKENIZER as error:
            raise CheckpointError(f"{path}: not a Llama-style tokenizer.json: {error}") from error

    @classmethod
    def from_sentencepiece(cls, path: str | Path, legacy: bool = False) -> "Tokenizer":
        """Read a `tokenizer.model`, sentencepiece's BPE file. Raises CheckpointError."""
        try:
            vocab, merges = _read_sentencepiece(Path(path).read_bytes())
            return cls(vocab, merges, legacy)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except _NOT_A_TOKENIZER as error:
            raise CheckpointError(f"{path}: not a Llama tokenizer.model: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `from_file` and the `tokenizers` library both load.

        `legacy` is not part of the file: keep it in the model's config. A reader other than
        `from_file` sees the normalizer of official files, whose ids are those of legacy mode.
        """
        Path(path).write_text(_portable_tokenizer(self._vocab, self._merges).to_str(pretty=False))

    def encode(self, text: str, *, bos: bool = True, after: After | None = None) -> list[int]:
        """Ids of a text; literal `<s>`, `</s>` and `<unk>` become their ids, never an EOS is added.

        `after="text"` goes on in the middle of a text: without BOS, and no U+2581 in front.
        """
        ids = [self.bos_id] if bos and after is None else []
        for index, part in enumerate(_SPECIAL_LITERALS.split(text)):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._encode_segment(part, self._has_prefix(index == 0, after))
        return ids

    def encode_prompt(self, text: str, *, after: After | None = None) -> list[int]:
        """Ids of a prompt with `IMAGE_TOKEN_ID` for every `<image>`.

        Each chunk between markers is encoded on its own, so it gets its own U+2581; an empty chunk
        gives nothing. `after` concerns the first chunk, see `encode`.
        """
        first, *rest = text.split(IMAGE_MARKER)
        ids = self.encode(first, after=after)
        for chunk in rest:
            ids.append(IMAGE_TOKEN_ID)
            ids += self.encode(chunk, bos=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special ids, ids outside the vocabulary, and one leading space.

        Other whitespace stays at both ends. Every byte that is not UTF-8 becomes one U+FFFD.
        """
        stream = StreamDecoder(self)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    @property
    def pieces(self) -> list[str]:
        """What each id of the vocabulary stands for, by id, with spaces as spaces."""
        return list(self._texts)

    def _has_prefix(self, is_first: bool, after: After | None) -> bool:
        return after is None if is_first else self.legacy

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = (SPACE if prefix else "") + text.replace(" ", SPACE)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _kept(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size and token_id not in self._special_ids.values()


class StreamDecoder:
    """Decodes ids one at a time; the pieces joined equal `Tokenizer.decode` of all ids.

    Everything decodable is returned at once: only an incomplete UTF-8 sequence is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Text that this id makes certain, possibly empty."""
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
        """What is left at the end: U+FFFD for every byte of an unfinished sequence."""
        text, self._pending = "\ufffd" * len(self._pending), b""
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE tokenizer with Llama's conventions: ids 0..2 special, 3..258 bytes, then pieces.

    Learned pieces are (parts of) words with the space in front; they never cross a space, a line
    break or punctuation, and digits stay single. A small corpus can give fewer than `vocab_size`
    pieces. Raises ValueError when `vocab_size` leaves no room for learned pieces.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    reserved = [*SPECIAL_TOKENS, *BYTE_TOKENS]
    if vocab_size <= len(reserved):
        raise ValueError(f"vocab_size must exceed {len(reserved)}, got {vocab_size}")
    backend = Backend(BPE(unk_token=UNK, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
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
    """What `encode_prompt` hands to the BPE, so that no piece is learned across a special token."""
    for text in texts:
        for chunk in text.split(IMAGE_MARKER):
            for part in _SPECIAL_LITERALS.split(chunk):
                if part and part not in SPECIAL_TOKENS:
                    yield part


def _decode_utf8(data: bytes) -> tuple[str, bytes]:
    """Decoded text and the incomplete sequence at the end.

    Byte by byte as sentencepiece: Python's own "replace" would give one U+FFFD per broken sequence.
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


_NOT_A_TOKENIZER = (ValueError, KeyError, TypeError, AttributeError, IndexError)


def _check_vocab(vocab: dict[str, int]) -> None:
    missing = [token for token in (*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE) if token not in vocab]
    if missing:
        raise ValueError(f"{len(missing)} required tokens are missing, first {missing[0]!r}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"ids of the {len(vocab)} pieces are not 0..{len(vocab) - 1}")


def _ordered_merges(vocab: dict[str, int], merges: Sequence[Merge]) -> list[Merge]:
    """Merges in order of priority, with those of pure whitespace rewritten and put last.

    Whitespace pieces share the lowest score in Llama's model, so sentencepiece merges a run of
    spaces from the left into the longest pieces. Ranking (longest run, one space) first makes the
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


def _portable_tokenizer(vocab: dict[str, int], merges: list[Merge]) -> "tokenizers.Tokenizer":
    """A self-contained pipeline, laid out like the `tokenizer.json` of Llama repositories."""
    from tokenizers import decoders, normalizers, processors

    backend = _bpe_model(vocab, merges)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
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
    """Vocabulary without added tokens, and merges, of a parsed `tokenizer.json`."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']!r} is not BPE")
    added = {token["content"] for token in content.get("added_tokens") or ()} - _RESERVED
    vocab = {str(piece): int(i) for piece, i in model["vocab"].items() if piece not in added}
    # Files of older library versions hold "left right", newer ones [left, right].
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return vocab, [(str(left), str(right)) for left, right in pairs]
