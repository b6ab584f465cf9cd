"""Ids and text equal the reference tokenizer's; a tokenizer of our own follows the same rules."""

import importlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.examples import examples
from helpers.models import SHARED
from helpers.peers import peer
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import CheckpointError
from llava_lite.inputs.prompt import build_prompt, next_turn_text
from llava_lite.inputs.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

MODEL_FILE = SHARED / "data" / "llama_tokenizer" / "tokenizer.model"
needs_model = pytest.mark.skipif(not MODEL_FILE.is_file(), reason=f"no {MODEL_FILE}")

CORPUS = [
    f"USER: <image>\nHow many {color} objects are there? ASSISTANT: {count}</s>"
    for color in ("red", "green", "blue", "yellow")
    for count in ("zero", "one", "two", "three", "12 or 345")
]


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer.from_sentencepiece(MODEL_FILE)


@pytest.fixture(scope="module")
def llama_legacy() -> Tokenizer:
    return Tokenizer.from_sentencepiece(MODEL_FILE, legacy=True)


@pytest.fixture(scope="module")
def goldens(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "goldens/llava/tokenizer_goldens.json").read_text())


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CORPUS, 400)


# ---- the reference tokenizer -------------------------------------------------------------------


@needs_model
@pytest.mark.parametrize("legacy", [False, True])
def test_golden_ids(
    goldens: dict[str, Any], llama: Tokenizer, llama_legacy: Tokenizer, legacy: bool
) -> None:
    mode = goldens["modes"][f"legacy_{str(legacy).lower()}"]
    tokenizer = llama_legacy if legacy else llama
    assert len(mode["strings"]) >= 61 and len(mode["prompts"]) >= 10
    for case in mode["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], bos=False) == case["ids_no_special"], case["text"]
        assert tokenizer.decode(case["ids"]).strip() == case["decode_skip"].strip()
        if not legacy:
            assert tokenizer.decode(case["ids"]) == case["decode_skip"]
    for case in mode["prompts"]:
        assert tokenizer.encode_prompt(case["prompt"]) == case["ids"], case["name"]


@needs_model
def test_golden_decoded_sequences(goldens: dict[str, Any], llama: Tokenizer) -> None:
    sequences = goldens["decode_sequences"]
    assert len(sequences) >= 17
    for case in sequences:
        assert llama.decode(case["ids"]) == case["skip1_legacy0"], case["ids"]
        # In legacy mode the reference takes away up to two leading spaces.
        assert llama.decode(case["ids"]).lstrip() == case["skip1_legacy1"].lstrip(), case["ids"]


@needs_model
def test_hf_style_golden_ids_are_legacy_ids(shared: Path, llama_legacy: Tokenizer) -> None:
    golden = json.loads((shared / "goldens/llava/hf_style_tokenizer_4.37.2.json").read_text())
    expected = golden["ids"]["LlamaTokenizerFast_legacyFalse"]
    assert len(expected) == len(golden["prompts"]) == 11
    for prompt, ids in zip(golden["prompts"], expected, strict=True):
        ours = llama_legacy.encode_prompt(prompt)
        assert [32000 if i == IMAGE_TOKEN_ID else i for i in ours] == ids, prompt


def _save_ours(path: Path) -> None:
    Tokenizer.from_sentencepiece(MODEL_FILE).save(path)


def _save_hf_style(path: Path) -> None:
    """The layout of llava-hf repositories, built without our reader: every split of every piece."""
    from tokenizers import AddedToken, models, normalizers
    from tokenizers import Tokenizer as Backend

    sentencepiece = peer("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FILE))
    names = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocab = {name: index for index, name in enumerate(names)}
    merges = []
    for name in sorted(names[259:], key=lambda name: -model.get_score(vocab[name])):
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    added = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in added])
    assert backend.token_to_id("<image>") == 32000 and backend.token_to_id("<pad>") == 32001
    backend.save(str(path))


def _save_hf_style_old(path: Path) -> None:
    """As above, with merges written the way older files have them."""
    _save_hf_style(path)
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))


@needs_model
@pytest.mark.parametrize("save", [_save_ours, _save_hf_style, _save_hf_style_old])
def test_tokenizer_json_gives_the_same_ids(
    goldens: dict[str, Any],
    llama_legacy: Tokenizer,
    tmp_path: Path,
    save: Callable[[Path], None],
) -> None:
    path = tmp_path / "tokenizer.json"
    save(path)
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.vocab_size == 32000
    for tokenizer.legacy in (False, True):
        mode = goldens["modes"][f"legacy_{str(tokenizer.legacy).lower()}"]
        for case in mode["strings"]:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
            assert tokenizer.decode(case["ids"]).strip() == case["decode_skip"].strip()
        for case in mode["prompts"]:
            assert tokenizer.encode_prompt(case["prompt"]) == case["ids"], case["name"]
    # Runs of spaces are where the order of merges matters most.
    for length in range(40):
        assert tokenizer.encode(" " * length) == llama_legacy.encode(" " * length)


pieces_of_text = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="▁ \n\tae=-", max_size=24),
    st.text(alphabet="the image of 0123 ASSISTANT:", max_size=24),
    st.sampled_from(
        ["😀", "👩‍👩‍👧", "안녕 하세요", "请回答。", "éa\u0301", "<0x0A>", "\x00", " " * 33]
    ),
)


@needs_model
def test_ids_and_text_equal_sentencepiece(llama: Tokenizer) -> None:
    sentencepiece = peer("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FILE))

    @examples(400, derandomize=True)
    @given(st.lists(pieces_of_text, max_size=6).map("".join))
    @example("▁▁ ▁x" + " " * 50 + "y")
    def same_ids(text: str) -> None:
        if not any(literal in text for literal in ("<s>", "</s>", "<unk>")):
            assert llama.encode(text, bos=False) == oracle.encode(text)

    @examples(400, derandomize=True)
    @given(st.lists(st.one_of(st.integers(3, 258), st.integers(259, 31999)), max_size=12))
    @example([243, 162, 155, 450])
    def same_text(ids: list[int]) -> None:
        assert llama.decode(ids) == oracle.decode(ids)

    same_ids()
    same_text()


@needs_model
@pytest.mark.parametrize("template", ["vicuna_v1", "llava-hf"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_continued_history_has_the_ids_of_the_whole(
    llama: Tokenizer, llama_legacy: Tokenizer, template: str, legacy: bool
) -> None:
    tokenizer = llama_legacy if legacy else llama
    turns: list[tuple[str, str | None]] = [("<image>\nWhat is it?", None)]
    cached = tokenizer.encode_prompt(build_prompt(template, turns))
    cached += tokenizer.encode(" A red circle.", after="text")
    whole = build_prompt(
        template, [("<image>\nWhat is it?", "A red circle."), ("And <image>\nhere?", None)]
    )
    expected = tokenizer.encode_prompt(whole)
    new = next_turn_text(template, "And <image>\nhere?")
    assert cached + tokenizer.encode_prompt(new, after="text") == expected


# ---- rules that hold for every tokenizer -------------------------------------------------------


def test_trained_conventions(trained: Tokenizer) -> None:
    assert (trained.unk_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert trained.encode("") == [1]
    for word in ("▁objects", "▁many", "USER", "▁ASSISTANT"):
        assert len(trained.encode(word, after="text")) == 1, word
    for piece in trained._vocab:
        body = piece.removeprefix("▁")
        if not piece.startswith("<"):
            assert "▁" not in body and "\n" not in body[1:], piece
            assert len(body) <= 1 or not any(c.isdigit() or c in "?:." for c in body), piece


def test_training_is_reproducible_and_bounded(trained: Tokenizer) -> None:
    again = train_tokenizer(iter(CORPUS), 400)
    assert again._vocab == trained._vocab and again._merges == trained._merges
    assert train_tokenizer(CORPUS, 270).vocab_size == 270
    with pytest.raises(ValueError, match="must exceed 259, got 259"):
        train_tokenizer(CORPUS, 259)


def test_training_never_learns_across_special_tokens() -> None:
    tokenizer = train_tokenizer(["ab</s>cd<image>ef"] * 50, 400)
    assert {"▁ab", "▁cd", "▁ef"} <= set(tokenizer._vocab)
    assert not any("<" in piece and not piece.endswith(">") for piece in tokenizer._vocab)


def test_encoding_agrees_with_the_pre_tokenizer_of_training(trained: Tokenizer) -> None:
    """Words encoded one by one give the ids of the whole text."""
    words = ["▁How", "▁many", "▁green", "▁objects", "▁are", "▁there", "?", "\n", "▁", "1", "2"]
    one_by_one = [i for word in words for i in trained.encode(word, after="text")]
    assert trained.encode("".join(words)[1:], bos=False) == one_by_one


def test_special_literals_and_modes(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    legacy = Tokenizer.from_file(tmp_path / "tokenizer.json", legacy=True)
    bare, spaced = trained.encode("USER", after="text"), trained.encode("USER", bos=False)
    assert bare != spaced
    assert trained.encode("one</s>USER") == trained.encode("one") + [2] + bare
    assert legacy.encode("one</s>USER") == trained.encode("one") + [2] + spaced
    assert trained.encode("<s></s><unk>") == [1, 1, 2, 0]
    assert trained.encode("</s>USER") == [1, 2, *bare]
    assert legacy.encode("USER", after="text") == bare


def test_image_chunks(trained: Tokenizer) -> None:
    image, space, newline = IMAGE_TOKEN_ID, trained._vocab["▁"], trained.encode("\n", after="text")
    assert trained.encode_prompt("<image>") == [1, image]
    assert trained.encode_prompt("") == [1]
    assert trained.encode_prompt("<image>\n") == [1, image, space, *newline]
    assert trained.encode_prompt("<image><image>") == [1, image, image]
    assert trained.encode_prompt("one <image>") == trained.encode("one ") + [image]
    assert trained.encode_prompt("<image> one", after="text") == [
        image,
        *trained.encode(" one", bos=False),
    ]


def test_save_and_load_agree(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    loaded = Tokenizer.from_file(path)
    assert loaded._vocab == trained._vocab and loaded._merges == trained._merges
    backend = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
    text = "How many red objects, é 😀?\n12"
    assert backend.encode(text).ids == loaded.encode(text)
    assert backend.decode(loaded.encode(text)) == text


@examples(300, derandomize=True)
@given(text=st.text(max_size=40))
@example(text="  two  spaces \n\n")
@example(text="▁")
def test_text_survives_the_round_trip(trained: Tokenizer, text: str) -> None:
    if not any(literal in text for literal in ("<s>", "</s>", "<unk>")):
        assert trained.decode(trained.encode(text)) == text.replace("▁", " ")


def test_lone_surrogates_do_not_stop_encoding(trained: Tokenizer) -> None:
    assert trained.decode(trained.encode("a\udcffb")) == "a\ufffdb"
    assert trained.decode(trained.encode("\ud83d\ude00")) == "😀"


def _reference_decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Slow and obvious: all bytes first, then one character or one bad byte at a time."""
    names = {index: piece for piece, index in tokenizer._vocab.items()}
    data, first = b"", True
    for piece in (names[i] for i in ids if 3 <= i < tokenizer.vocab_size):
        if len(piece) == 6 and piece.startswith("<0x"):
            data += bytes([int(piece[3:5], 16)])
        else:
            data += (piece[1:] if first and piece[0] == "▁" else piece).replace("▁", " ").encode()
        first = False
    text = ""
    while data:
        for length in (1, 2, 3, 4):
            try:
                text += data[:length].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            text, length = text + "\ufffd", 1
        data = data[length:]
    return text


@examples(500, derandomize=True)
@given(
    ids=st.lists(
        st.one_of(
            st.integers(3, 258),
            st.integers(-200, 500),
            st.sampled_from([3 + b for b in b"\xf0\x9f\x98\x80\xe2"]),
        ),
        max_size=20,
    )
)
@example(ids=[3 + 0xF0, 3 + 0x9F, 2, 3 + 0x98, 3 + 0x80])
def test_stream_equals_decode_equals_reference(trained: Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(trained)
    streamed = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert streamed == trained.decode(ids) == _reference_decode(trained, ids)


def test_stream_holds_back_only_an_incomplete_character(trained: Tokenizer) -> None:
    stream = StreamDecoder(trained)
    ids = [*trained.encode("one", bos=False), *(3 + b for b in "é😀".encode()), 3 + 0xE2, 2]
    assert "".join(stream.push(i) for i in trained.encode("one", bos=False)) == "one"
    assert [stream.push(3 + b) for b in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert [stream.push(3 + b) for b in b"\xe2\x82"] == ["", ""]
    assert stream.push(2) == ""
    assert stream.push(trained.encode("one", bos=False)[0]).startswith("\ufffd\ufffd ")
    assert stream.push(3 + 0xE2) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    assert trained.decode(ids) == "oneé😀\ufffd"


# ---- damaged files -----------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _model_bytes(
    words: list[str], model_type: int = 2, normalizer: bytes = b"\x18\x01\x20\x00"
) -> bytes:
    """A sentencepiece file with the given normal pieces, best score first."""
    names = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    names += [(f"<0x{byte:02X}>", 6) for byte in range(256)] + [(word, 1) for word in words]
    data = b""
    for rank, (name, kind) in enumerate(names):
        score = struct.pack("<f", -1e9 if name.strip("▁") == "" else -float(rank))
        piece = _field(1, name.encode()) + b"\x15" + score + b"\x18" + bytes([kind])
        data += _field(1, piece)
    return data + _field(2, b"\x18" + bytes([model_type])) + _field(3, normalizer)


def test_sentencepiece_reader_on_a_small_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(_model_bytes(["ab", "▁ab", "abc", "▁", "a", "b", "c", "▁▁", "▁▁▁"]))
    tokenizer = Tokenizer.from_sentencepiece(path)
    assert tokenizer.vocab_size == 268
    names = {index: piece for piece, index in tokenizer._vocab.items()}
    pieces = [names[i] for i in tokenizer.encode("abc ab     x", bos=False)]
    assert pieces == ["▁ab", "c", "▁ab", "▁▁▁", "▁▁", "<0x78>"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not BPE"),
        (b"not a model at all", "not a Llama tokenizer.model"),
        (_model_bytes(["▁", "a"], model_type=1), "not BPE"),
        (_model_bytes(["▁", "a"], normalizer=b"\x18\x01\x20\x01"), "normalization"),
        (_model_bytes(["▁", "a"], normalizer=b"\x12\x01x\x18\x01\x20\x00"), "normalization"),
        (_model_bytes(["▁", "a", "a"]), "1 pieces occur twice"),
        (_model_bytes(["a"]), "required tokens are missing"),
        (_model_bytes(["▁", "a"])[:-3], "ends inside a field"),
    ],
)
def test_damaged_sentencepiece_file(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tokenizer.model.*{message}"):
        Tokenizer.from_sentencepiece(path)


def test_every_truncation_of_a_model_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    data = _model_bytes(["▁", "a"])
    for length in range(0, len(data), 29):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="tokenizer.model"):
            Tokenizer.from_sentencepiece(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": null}',
        '{"model": {"type": "Unigram", "vocab": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": ["a"], "merges": []}}',
    ],
)
def test_not_a_tokenizer_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json: not a Llama-style"):
        Tokenizer.from_file(path)


def test_damaged_vocabulary_or_merges(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    good = path.read_text()

    def refuse(change: Callable[[dict[str, Any]], object], message: str) -> None:
        content = json.loads(good)
        change(content["model"])
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_file(path)

    refuse(lambda model: model["merges"].append(["nope", "never"]), "nope")
    refuse(lambda model: model["merges"].append(["a"]), "not a Llama-style")
    refuse(lambda model: model["vocab"].pop("<0x41>"), "<0x41>")
    refuse(lambda model: model["vocab"].update({"far away": 9999}), "ids of the")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (Tokenizer.from_file, Tokenizer.from_sentencepiece):
        with pytest.raises(CheckpointError, match="absent.*cannot be read"):
            read(tmp_path / "absent")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tmp_path)
