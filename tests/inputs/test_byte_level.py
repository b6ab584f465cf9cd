"""Ids, prompts and text of the Qwen2 tokenizer equal the reference's, from published folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.examples import examples
from helpers.models import SHARED
from llava_lite.errors import CheckpointError
from llava_lite.inputs.byte_level import ByteLevelTokenizer, byte_letters
from llava_lite.inputs.prompt import build_prompt, check_family, next_turn_text

DATA = SHARED / "data" / "qwen2_tokenizer"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The tokens that Qwen2.5 adds behind the three, as its published files list them.
QWEN_2_5 = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)


def write_folder(folder: Path, vocab: dict[str, int], merges: list[str], added: list[str]) -> Path:
    """The files of a published folder, without a tokenizer.json."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    tokens = {
        str(len(vocab) + number): {"content": text, "special": number < 14}
        for number, text in enumerate(added)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    listed = {token["content"]: int(token_id) for token_id, token in tokens.items()}
    (folder / "added_tokens.json").write_text(json.dumps(listed))
    (folder / "special_tokens_map.json").write_text(json.dumps({"special": added[:14]}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three published variants: the merges of 0.5B lack those that begin with "#"."""
    place = tmp_path_factory.mktemp("tokenizers")
    vocab = json.loads((DATA / "vocab.json").read_text(encoding="utf-8"))
    merges = (DATA / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    fewer = [line for line in merges if not line.startswith("#")]
    assert (len(merges), len(fewer)) == (151387, 151291)
    return {
        "apple": write_folder(place / "apple", vocab, fewer, list(SPECIAL)),
        "full": write_folder(place / "full", vocab, merges, list(SPECIAL)),
        "q25": write_folder(place / "q25", vocab, merges, [*SPECIAL, *QWEN_2_5]),
    }


@pytest.fixture(scope="module")
def goldens(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "goldens/fastvlm/tokenizer_goldens.json").read_text())["variants"]


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path]) -> ByteLevelTokenizer:
    return ByteLevelTokenizer.from_folder(folders["apple"])


# ---- the reference tokenizer -------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(("variant", "least"), [("apple", 79), ("full", 7), ("q25", 9)])
def test_golden_ids_prompts_and_text(
    goldens: dict[str, Any], folders: dict[str, Path], variant: str, least: int
) -> None:
    tokenizer, golden = ByteLevelTokenizer.from_folder(folders[variant]), goldens[variant]
    assert tokenizer.vocab_size == golden["len_tokenizer"]
    assert len(golden["strings"]) >= least
    for case in golden["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        text = case.get("decode_skip", case.get("decode", case["text"]))
        assert tokenizer.decode(case["ids"]) == text
    for case in golden["prompts"]:
        turns = [(question, reply) for question, reply in case["turns"]]
        assert build_prompt("qwen_2", turns, case["system"]) == case["text"]
        assert tokenizer.encode_prompt(case["text"]) == case["ids"], case["name"]
    for case in golden["decode_sequences"]:
        assert tokenizer.decode(case["ids"]) == case["fast_skip"], case["ids"]


@needs_data
def test_a_saved_tokenizer_is_the_same_for_us_and_for_the_library(
    folders: dict[str, Path], qwen: ByteLevelTokenizer, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Backend

    qwen.save(tmp_path / "tokenizer.json")
    ours = ByteLevelTokenizer.from_file(tmp_path / "tokenizer.json")
    library = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("## Title\n", "a<|im_end|>b", "  中文 👩‍👩‍👧\r\n\n x1234", "e\u0301"):
        ids = qwen.encode(text)
        assert ours.encode(text) == library.encode(text).ids == ids
        assert ours.decode(ids) == library.decode(ids) == qwen.decode(ids)


@needs_data
def test_streamed_text_equals_the_text_of_the_library(qwen: ByteLevelTokenizer) -> None:
    oracle = qwen._backend

    @examples(300, derandomize=True)
    @given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 151650)), max_size=12))
    def same(ids: list[int]) -> None:
        stream = qwen.stream()
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.flush() == oracle.decode(ids)

    same()


@needs_data
def test_a_character_of_several_tokens_is_streamed_whole(qwen: ByteLevelTokenizer) -> None:
    stream, ids = qwen.stream(), qwen.encode("👩‍👩‍👧 각")
    assert len(ids) > 4
    pieces = [stream.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces) and "" in pieces
    assert "".join(pieces) + stream.flush() == "👩‍👩‍👧 각"


@needs_data
def test_a_continued_history_has_the_ids_of_the_whole(qwen: ByteLevelTokenizer) -> None:
    turns: list[tuple[str, str | None]] = [("<image>\nWhat is it?", None)]
    cached = qwen.encode_prompt(build_prompt("qwen_2", turns, "Be brief."))
    cached += qwen.encode("A red circle.", after="text")
    whole = [("<image>\nWhat is it?", "A red circle."), ("And <image>\nhere?", None)]
    expected = qwen.encode_prompt(build_prompt("qwen_2", whole, "Be brief."))
    new = next_turn_text("qwen_2", "And <image>\nhere?")
    assert cached + qwen.encode_prompt(new, after="text") == expected


# ---- the template ------------------------------------------------------------------------------


def test_own_system_text_gets_the_markers() -> None:
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    for system in ("Be brief.", f"{start}Be brief."):
        assert build_prompt("qwen_2", [("Hi", None)], system).startswith(f"{start}Be brief.{end}")
    assert build_prompt("qwen_2", [("Hi", None)], "").startswith("<|im_start|>user\nHi")


def test_an_empty_message_has_no_end() -> None:
    user, reply, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    prompt = build_prompt("qwen_2", [("Hi", ""), ("", None)], "")
    assert prompt == f"{user}Hi{end}{reply}{user}{reply}"


def test_a_template_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="'vicuna_v1' is for llama models, this one is qwen2"):
        check_family("v1", "qwen2")
    with pytest.raises(ValueError, match="'qwen_2' is for qwen2 models, this one is llama"):
        check_family("qwen_2", "llama")
    for family in ("llama", "qwen2"):
        check_family("plain", family)


# ---- damaged folders ---------------------------------------------------------------------------

LETTERS = {letter: number for number, letter in enumerate(byte_letters())}
VOCAB = LETTERS | {"ab": 256, "abc": 257}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "small", VOCAB, ["a b", "ab c"], list(SPECIAL))


def test_a_small_folder_loads(small: Path) -> None:
    tokenizer = ByteLevelTokenizer.from_folder(small)
    assert tokenizer.encode("abcab<|im_end|>") == [257, 256, 260]
    assert tokenizer.pieces[256:] == ["ab", "abc", "", "", ""]


@pytest.mark.parametrize("lost", ["tokenizer_config.json", "added_tokens.json"])
def test_either_list_of_added_tokens_is_enough(small: Path, lost: str) -> None:
    (small / lost).unlink()
    tokenizer = ByteLevelTokenizer.from_folder(small)
    assert tokenizer.encode("a<|im_end|>") == [LETTERS["a"], 260]
    assert tokenizer.decode([LETTERS["a"], 260, 259, LETTERS["b"]]) == "ab"


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("vocab.json", None, "vocab.json: cannot be read as JSON"),
        ("merges.txt", None, "merges.txt: cannot be read"),
        ("vocab.json", lambda text: text[:-9], "vocab.json: cannot be read as JSON"),
        ("vocab.json", lambda text: "[]", "vocab.json: holds no JSON object"),
        (
            "vocab.json",
            lambda text: text.replace('"abc": 257', '"abc": 299'),
            "vocab.json: not a byte-level vocabulary: no token has the id 257",
        ),
        (
            "vocab.json",
            lambda text: text.replace('"!": 0', '"ab!": 0'),
            "1 of 256 bytes are missing, first '!'",
        ),
        ("merges.txt", lambda text: text + "ab\n", "merges.txt: line 4: '' is no entry"),
        ("merges.txt", lambda text: text + "ab z\n", "merges.txt: line 4: 'abz' is no entry"),
        ("merges.txt", lambda text: text.replace("a b", "# b"), "line 2: '# b'|line 2: '#b'"),
        ("tokenizer_config.json", lambda text: "{", "tokenizer_config.json: cannot be read"),
        (
            "tokenizer_config.json",
            lambda text: text.replace('"258"', '"x"'),
            "lists of added tokens are damaged",
        ),
    ],
)
def test_damaged_files_are_named(
    small: Path, file: str, change: Callable[[str], str] | None, words: str
) -> None:
    if change is None:
        (small / file).unlink()
    else:
        edit(small / file, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        ByteLevelTokenizer.from_folder(small)
    assert "\n" not in str(caught.value)


def test_missing_added_tokens_are_an_error(small: Path) -> None:
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (small / name).unlink()
    with pytest.raises(CheckpointError, match="has no added tokens .*added_tokens.json"):
        ByteLevelTokenizer.from_folder(small)


def test_a_damaged_tokenizer_json_is_named(small: Path) -> None:
    path = small / "tokenizer.json"
    ByteLevelTokenizer.from_folder(small).save(path)
    edit(path, lambda text: text.replace('"vocab"', '"words"'))
    with pytest.raises(CheckpointError, match="tokenizer.json: not a byte-level"):
        ByteLevelTokenizer.from_file(path)
