"""The Qwen2 tokenizer: byte-level BPE (GPT-2's, arXiv 1909.03341), computed by the `tokenizers`
library.

Every byte of a text is a letter of the vocabulary, so no text is unknown. Official folders hold
`vocab.json`, `merges.txt` and lists of added tokens. The rules for splitting text are in this file.

The merges of a folder count as they are. The published FastVLM-0.5B lacks those that begin with
`#`, and was trained without them.
"""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_lite.errors import CheckpointError
from llava_lite.inputs.sentencepiece import Merge
from llava_lite.inputs.tokenizer import After, StreamDecoder, Tokenizer, replace_surrogates

if TYPE_CHECKING:
    import tokenizers

# Contractions, words, single digits, punctuation with line breaks, and spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
VERSION = "#version"  # the beginning of the first line of merges.txt, which is no merge


class Added(NamedTuple):
    """A token beside the BPE. A special one is no text of an answer."""

    token_id: int
    special: bool


class ByteLevelTokenizer(Tokenizer):
    """Text to ids and back, with the ids of the reference Qwen2 tokenizer."""

    family = "qwen2"

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[Merge], added: Mapping[str, Added]
    ) -> None:
        self.vocab_size = count_ids(vocab, added)
        letters = byte_letters()
        self._backend = _build_backend(vocab, merges, added, letters)
        self._bytes_of = [b""] * self.vocab_size
        for text, token_id in vocab.items():
            self._bytes_of[token_id] = bytes(letters[letter] for letter in text)
        for text, token in added.items():
            self._bytes_of[token.token_id] = b"" if token.special else text.encode()
        self._texts = [data.decode("utf-8", "replace") for data in self._bytes_of]

    @classmethod
    def from_file(cls, path: str | Path, legacy: bool = False) -> "ByteLevelTokenizer":
        """Read a `tokenizer.json` of `save` or of a Qwen2 repository. Raises CheckpointError."""
        content = _read_json(Path(path))
        try:
            model = content["model"]
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            added = {
                token["content"]: Added(token["id"], token["special"])
                for token in content["added_tokens"]
            }
            vocab = {text: i for text, i in model["vocab"].items() if text not in added}
            return cls(vocab, [(left, right) for left, right in pairs], added)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a byte-level tokenizer.json: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ByteLevelTokenizer":
        """Read `vocab.json`, `merges.txt` and the added tokens of a folder. Raises CheckpointError
        that names the file, and the line of a merge."""
        folder = Path(folder)
        vocab, added = _read_json(folder / VOCAB), read_added(folder)
        merges = read_merges(folder / MERGES, vocab)
        if not added:
            raise CheckpointError(
                f"{folder}: has no added tokens ({TOKENIZER_CONFIG} or {ADDED}); prompts need them"
            )
        try:
            return cls(vocab, merges, added)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / VOCAB}: not a byte-level vocabulary: {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `from_file` and the `tokenizers` library both load."""
        Path(path).write_text(self._backend.to_str(pretty=False))

    def encode(self, text: str, *, bos: bool = True, after: After | None = None) -> list[int]:
        """Ids of a text. The texts of added tokens become their ids.

        `bos` and `after` change nothing: prompts have no BOS, and words no space in front."""
        return self._backend.encode(replace_surrogates(text), add_special_tokens=False).ids

    def stream(self) -> "ByteStreamDecoder":
        """A decoder of ids, one at a time."""
        return ByteStreamDecoder(self)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of an id; none for a special id and for one outside the vocabulary."""
        return self._bytes_of[token_id] if 0 <= token_id < self.vocab_size else b""


class ByteStreamDecoder(StreamDecoder):
    """Decodes ids one at a time. Only an incomplete UTF-8 sequence is held back. Every broken one
    becomes one U+FFFD."""

    def __init__(self, tokenizer: ByteLevelTokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add one id. Returns the text that became certain, possibly empty."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete sequence."""
        return self._decoder.decode(b"", final=True)


def byte_letters() -> dict[str, int]:
    """The letter of every byte: its Latin-1 character if this is visible, else one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


def is_byte_level(path: Path) -> bool:
    """Whether a tokenizer.json is byte-level. Raises CheckpointError if it cannot be read."""
    try:
        return '"ByteLevel"' in path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


# ---- files -------------------------------------------------------------------------------------


def read_merges(path: Path, vocab: Mapping[str, int]) -> list[Merge]:
    """The merges of a merges.txt, in order. Raises CheckpointError that names the first line whose
    parts or whose result are no entries of the vocabulary."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    merges: list[Merge] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith(VERSION)) or (number == len(lines) and not line):
            continue
        left, _, right = line.partition(" ")
        unknown = [text for text in (left, right, left + right) if text not in vocab]
        if unknown:
            raise CheckpointError(f"{path}: line {number}: {unknown[0]!r} is no entry of {VOCAB}")
        merges.append((left, right))
    return merges


def read_added(folder: Path) -> dict[str, Added]:
    """The added tokens of a folder, by tokenizer_config.json and added_tokens.json. {}: none.
    Raises CheckpointError for a damaged file."""
    config, listed, special_map = (
        _read_json(folder / name) if (folder / name).is_file() else {}
        for name in (TOKENIZER_CONFIG, ADDED, SPECIAL_MAP)
    )
    try:
        special = json.dumps(special_map, ensure_ascii=False)
        added = {
            text: Added(int(token_id), json.dumps(text, ensure_ascii=False) in special)
            for text, token_id in listed.items()
        }
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = Added(int(token_id), bool(token.get("special")))
        return added
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its lists of added tokens are damaged: {error}"
        ) from error


def count_ids(vocab: Mapping[str, int], added: Mapping[str, Added]) -> int:
    """The number of ids. Raises ValueError unless they are 0, 1, 2, ... without holes."""
    ids = sorted({*vocab.values(), *(token.token_id for token in added.values())})
    hole = next((number for number, token_id in enumerate(ids) if token_id != number), None)
    if hole is not None:
        raise ValueError(
            f"no token has the id {hole}, but there are {len(ids)} ids up to {ids[-1]}"
        )
    return len(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def _build_backend(
    vocab: Mapping[str, int],
    merges: Sequence[Merge],
    added: Mapping[str, Added],
    letters: Iterable[str],
) -> "tokenizers.Tokenizer":
    """The whole pipeline, in the layout of the `tokenizer.json` of Qwen2 repositories."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    missing = [letter for letter in letters if letter not in vocab]
    if missing:
        raise ValueError(f"{len(missing)} of 256 bytes are missing, first {missing[0]!r}")
    try:
        backend = Backend(BPE(vocab=dict(vocab), merges=list(merges)))
    except Exception as error:  # the library raises plain Exception for a merge outside the vocab
        raise ValueError(str(error)) from error
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # In the order of their ids: the library numbers new tokens one after the other.
    for text, token in sorted(added.items(), key=lambda item: item[1].token_id):
        backend.add_tokens([AddedToken(text, normalized=False, special=token.special)])
    return backend
