"""GGUF files: llama.cpp reads what is written, and what is read gives the same model.

Verified with the embedded model and with random weights. The official files were never here.
"""

import base64
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import llava_lite
from helpers.models import SHARED, TINY_CONFIG, random_llava
from helpers.peers import peer
from llava_lite.checkpoints import gguf_format
from llava_lite.checkpoints.checkpoint import load_model, load_tokenizer, save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.gguf_format import pair_rows, split_rows
from llava_lite.checkpoints.gguf_header import read_header
from llava_lite.checkpoints.gguf_in import open_gguf
from llava_lite.checkpoints.info import describe_source
from llava_lite.checkpoints.names import hf_name
from llava_lite.cli.program import main
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.evaluation.scenes.accuracy import fresh_scenes
from llava_lite.evaluation.scenes.questions import Question
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.generation.model import Model
from llava_lite.inputs.pixels import normalize, to_square
from llava_lite.inputs.prompt import build_prompt, place_images
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.rope import apply_rope, rope_cos_sin

gguf = peer("gguf")
EMBEDDED = llava_lite.embedded_model()
ROWS = TINY_CONFIG.text.sampled_vocab_size
LLAMA_TOKENIZER = SHARED / "data" / "llama_tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def written(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` as GGUF in float32."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    convert(model_folder, folder, dtype="float32", to="gguf")
    return folder


def prompt_logits(model: Model) -> Tensor:
    """Logits of every row of a prompt with an image, without the rows that are never generated."""
    ids = torch.tensor([model.tokenizer.encode_prompt("USER: <image>\nWhat color? ASSISTANT:")])
    size = model.config.vision.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    logits, _, _ = model.llava.prefill(ids, pixels, all_logits=True)
    return logits[..., : model.config.text.sampled_vocab_size]


# ---- what is written is what is read -------------------------------------------------------------


def test_float32_is_exact(tiny_model: Model, written: Path) -> None:
    loaded = llava_lite.load(written, device="cpu")
    assert loaded.llava.dtype == torch.float32
    assert torch.equal(prompt_logits(loaded), prompt_logits(tiny_model))
    text = replace(tiny_model.config.text, vocab_size=ROWS)
    vision = replace(tiny_model.config.vision, num_layers=2, feature_layer=2)
    assert loaded.config == replace(tiny_model.config, text=text, vision=vision)


@pytest.mark.parametrize(
    ("dtype", "method", "tolerance"),
    [("float16", None, 2**-11), ("bfloat16", None, 2**-8), ("float16", "q8_0", 1 / 127)],
)
def test_other_types_are_close(
    tiny_model: Model,
    model_folder: Path,
    tmp_path: Path,
    dtype: str,
    method: str | None,
    tolerance: float,
) -> None:
    report = convert(model_folder, tmp_path / "m", dtype=dtype, to="gguf", quantize=method)
    assert report.files == [f"mmproj-{report.files[0][7:]}", report.files[1]]
    state = load_model(tmp_path / "m", dtype="float32").state_dict()
    for name, tensor in tiny_model.llava.state_dict().items():
        expected = tensor[:ROWS] if tensor.shape[0] == TINY_CONFIG.text.vocab_size else tensor
        error = (state[name] - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, name


def test_q8_0_blocks_that_do_not_divide_stay_16_bit(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(TINY_CONFIG, text=replace(TINY_CONFIG.text, intermediate_size=72))
    save_model(random_llava(config), config, tmp_path / "own", tiny_tokenizer)
    convert(tmp_path / "own", tmp_path / "m", to="gguf", quantize="q8_0")
    info = {tensor.name: tensor.dtype for tensor in describe_source(tmp_path / "m").tensors}
    assert info["decoder.layers.0.mlp.down_proj.weight"] == "float16"
    assert info["decoder.layers.0.mlp.up_proj.weight"] == "q8_0"
    assert info["decoder.norm.weight"] == "float32"
    assert llava_lite.load(tmp_path / "m", device="cpu").llava.dtype == torch.float32


def test_gguf_to_our_folder_and_back(written: Path, tmp_path: Path) -> None:
    convert(written, tmp_path / "own", dtype=None)
    convert(tmp_path / "own", tmp_path / "again", dtype=None, to="gguf", verify=True)
    first, second = load_model(written).state_dict(), load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_names_are_those_of_the_package_gguf() -> None:
    """The package maps Hugging Face's names to GGUF's by tables of its own."""
    maps = [
        gguf.get_tensor_name_map(arch, 64)
        for arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.MMPROJ)
    ]
    for ours, theirs in gguf_format.TO_GGUF.items():
        if not ours.startswith(("vision.post_norm", "projector.")):
            stored = hf_name(ours.replace("{}", "7")).removeprefix("language_model.")
            names = [known.get_name(stored, (".weight", ".bias")) for known in maps]
            assert theirs.replace("{}", "7") in names, ours


def test_row_order_fits_interleaved_rotation() -> None:
    """Scores with paired rows, turned pair by pair, equal ours, turned half by half."""
    heads, width, count = 2, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * width, 6, generator=generator) for _ in "qk")
    x = torch.randn(count, 6, generator=generator)
    cos, sin = rope_cos_sin(torch.arange(count), width, 10000.0)

    def ours(weight: Tensor) -> Tensor:
        return apply_rope(rearrange(x @ weight.T, "n (h d) -> n h d", h=heads), cos, sin)

    def theirs(weight: Tensor) -> Tensor:
        rows = rearrange(x @ pair_rows(weight, heads).T, "n (h p two) -> two n h p", h=heads, two=2)
        c, s = (turn[:, None, : width // 2] for turn in (cos, sin))
        return torch.cat((rows[0] * c - rows[1] * s, rows[0] * s + rows[1] * c), dim=-1)

    scores = [torch.einsum("nhd,mhd->hnm", turn(q), turn(k)) for turn in (ours, theirs)]
    assert torch.allclose(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(split_rows(pair_rows(q, heads), heads), q)


# ---- other writers' files ------------------------------------------------------------------------


Change = Callable[[dict[str, Any], dict[str, tuple[np.ndarray, Any]]], None]


def rewrite(path: Path, change: Change, destination: Path) -> None:
    """Write a GGUF file again, with other facts or tensors, through the package's own reader."""
    reader = gguf.GGUFReader(path)
    facts = {
        name: (field.contents(), field.types[0])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(facts, tensors)
    writer = gguf.GGUFWriter(destination, facts.pop("general.architecture")[0])
    for name, (value, kind) in facts.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_with(source: Path, folder: Path, text: Change | None, tower: Change | None) -> Path:
    """Both files, changed."""
    folder.mkdir()
    for name, change in (("model-f32.gguf", text), ("mmproj-f32.gguf", tower)):
        rewrite(source / name, change or (lambda facts, tensors: None), folder / name)
    return folder


def test_a_file_without_our_facts_has_the_defaults(written: Path, tmp_path: Path) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in ("llava_lite.config", "general.name", "llama.rope.freq_base"):
            del facts[name]

    config = open_gguf(copy_with(written, tmp_path / "m", change, None)).config
    assert (config.template, config.pad, config.name) == ("vicuna_v1", True, "llava-gguf")
    assert config.text.rope_theta == 10000.0 and config.text.rms_norm_eps == 1e-5


def test_added_tokens_and_empty_rows_are_never_generated(written: Path, tmp_path: Path) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        extra = {"tokens": ["<image>", "[PAD]"], "scores": [0.0, 0.0], "token_type": [3, 5]}
        for name, values in extra.items():
            facts[f"tokenizer.ggml.{name}"][0].extend(values)
        for name in ("token_embd.weight", "output.weight"):
            data, kind = tensors[name]
            tensors[name] = np.concatenate((data, data[:2])), kind

    loaded = llava_lite.load(copy_with(written, tmp_path / "m", change, None), device="cpu")
    text = loaded.config.text
    assert (text.vocab_size, text.sampled_vocab_size) == (ROWS + 2, ROWS)
    assert loaded.tokenizer.vocab_size == ROWS


def test_exchanged_names_of_the_mlp_and_a_final_norm(written: Path, tmp_path: Path) -> None:
    """As in files of older converters."""

    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "ffn_up" in name]:
            other = name.replace("ffn_up", "ffn_down")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        for kind in ("weight", "bias"):
            tensors[f"v.post_ln.{kind}"] = tensors[f"v.pre_ln.{kind}"]

    state = load_model(copy_with(written, tmp_path / "m", None, change)).state_dict()
    for name, tensor in load_model(written).state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("count", "expected"), [(23, 23), (24, 23), (3, 2)])
def test_how_many_blocks_of_an_unnamed_layer_run(
    written: Path, tmp_path: Path, count: int, expected: int
) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        del facts["clip.vision.feature_layer"]
        facts["clip.vision.block_count"] = (count, facts["clip.vision.block_count"][1])
        for name in [name for name in tensors if name.startswith("v.blk.0.")]:
            for block in range(count):
                tensors[name.replace(".0.", f".{block}.", 1)] = tensors[name]

    source = open_gguf(copy_with(written, tmp_path / "m", None, change))
    assert source.config.vision.num_blocks == expected
    assert bool(source.unused) == (count != expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_other_quantizations_are_read(
    written: Path, tiny_model: Model, tmp_path: Path, kind: str
) -> None:
    raw = gguf.GGMLQuantizationType[kind]

    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "attn_q" in name]:
            tensors[name] = gguf.quants.quantize(tensors[name][0], raw), raw

    state = load_model(copy_with(written, tmp_path / "m", change, None)).state_dict()
    weight = tiny_model.llava.decoder.layers[1].attn.q_proj.weight
    error = (state["decoder.layers.1.attn.q_proj.weight"] - weight).abs().max()
    assert 0 < error < weight.abs().max() / 7


# ---- tokenizer -----------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """The file of a text model with this tokenizer."""
    text = replace(
        TINY_CONFIG.text, vocab_size=tokenizer.vocab_size, sampled_vocab_size=tokenizer.vocab_size
    )
    config = replace(TINY_CONFIG, text=text)
    save_model(random_llava(config), config, folder / "own", tokenizer)
    convert(folder / "own", folder / "m", to="gguf")
    return folder / "m" / "model-f16.gguf"


@pytest.mark.skipif(not LLAMA_TOKENIZER.is_file(), reason=f"no {LLAMA_TOKENIZER}")
def test_llama_tokenizer_survives(shared: Path, tmp_path: Path) -> None:
    original = Tokenizer.from_sentencepiece(LLAMA_TOKENIZER)
    path = write_tokenizer(original, tmp_path)
    loaded = load_tokenizer(path, TINY_CONFIG)
    assert loaded.merges == original.merges
    goldens = json.loads((shared / "goldens/llava/tokenizer_goldens.json").read_text())
    mode = goldens["modes"]["legacy_false"]
    for case in mode["strings"]:
        assert loaded.encode(case["text"]) == case["ids"], case["text"]
    for case in mode["prompts"]:
        assert loaded.encode_prompt(case["prompt"]) == case["ids"], case["name"]


def test_trained_tokenizer_survives(tmp_path: Path) -> None:
    """Its scores do not imply its merges, so the file has both."""
    original = Tokenizer.from_file(EMBEDDED / "tokenizer.json")
    path = write_tokenizer(original, tmp_path)
    assert gguf_format.MERGES in read_header(path).facts
    assert load_tokenizer(path, TINY_CONFIG).merges == original.merges


# ---- bad input -----------------------------------------------------------------------------------


def fact(name: str, value: Any) -> Change:
    return lambda facts, tensors: facts.update({name: (value, facts[name][1])})


def added(name: str, value: Any, kind: str) -> Change:
    return lambda facts, tensors: facts.update({name: (value, gguf.GGUFValueType[kind])})


BAD_TEXT: dict[str, tuple[Change, str]] = {
    "architecture": (fact("general.architecture", "qwen2"), "architecture 'qwen2', not 'llama'"),
    "grouped keys": (fact("llama.attention.head_count_kv", 2), "head_count_kv is 2"),
    "experts": (added("llama.expert_count", 8, "UINT32"), "expert_count is 8"),
    "scaled positions": (added("llama.rope.scaling.type", "linear", "STRING"), "'linear'"),
    "tokenizer": (fact("tokenizer.ggml.model", "gpt2"), "is 'gpt2'"),
    "a fact missing": (lambda facts, tensors: facts.pop("llama.block_count"), "is missing"),
    "a strange fact": (fact("llama.embedding_length", 0), "hidden_size 0 is out of range"),
    "damaged facts": (fact("llava_lite.config", "{"), "a fact is damaged"),
    "scores missing": (lambda facts, tensors: facts.pop("tokenizer.ggml.scores"), "is missing"),
    "a split file": (added("split.count", 2, "UINT16"), "merge the parts first"),
    "a missing tensor": (lambda facts, tensors: tensors.pop("output.weight"), "are missing"),
    "an unknown tensor": (
        lambda facts, tensors: tensors.update({"blk.0.attn_q.bias": tensors["output_norm.weight"]}),
        "belongs to no LLaVA-1.5",
    ),
    "a misshapen tensor": (
        lambda facts, tensors: (
            tensors.update({"output.weight": tensors["token_embd.weight"]})
            or tensors.update({"token_embd.weight": tensors["blk.0.attn_q.weight"]})
        ),
        "has shape",
    ),
}
BAD_TOWER: dict[str, tuple[Change, str]] = {
    "projector": (fact("clip.projector_type", "ldp"), "projector_type is 'ldp'"),
    "gelu": (fact("clip.use_gelu", True), "use_gelu is True"),
    "mean": (fact("clip.vision.image_mean", [0.5, 0.5, 0.5]), "not CLIP's"),
    "layer": (fact("clip.vision.feature_layer", [9]), "feature_layer 9 is outside"),
}


@pytest.mark.parametrize("case", [*BAD_TEXT, *BAD_TOWER])
def test_other_models_are_refused(written: Path, tmp_path: Path, case: str) -> None:
    change, message = (BAD_TEXT | BAD_TOWER)[case]
    changes = (change, None) if case in BAD_TEXT else (None, change)
    folder = copy_with(written, tmp_path / "m", *changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_nan_is_refused_and_nothing_is_written(written: Path, tmp_path: Path) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["output.weight"][0][3, 3] = np.nan

    folder = copy_with(written, tmp_path / "m", change, None)
    for to in ("gguf", "llava_lite"):
        with pytest.raises(CheckpointError, match=r"'output.weight' has NaN"):
            convert(folder, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["model-f32.gguf", "mmproj-f32.gguf"])
@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.02, 0.5, 0.999])
def test_truncated_files_are_refused(
    written: Path, tmp_path: Path, name: str, share: float
) -> None:
    for file in written.iterdir():
        data = file.read_bytes()
        kept = data[: int(len(data) * share)] if file.name == name else data
        (tmp_path / file.name).write_bytes(kept)
    with pytest.raises(CheckpointError, match=f"{name}: (truncated or damaged|is no GGUF)"):
        open_gguf(tmp_path)


def test_damaged_headers_give_one_kind_of_error(written: Path, tmp_path: Path) -> None:
    """Bytes of the header replaced at random: a CheckpointError, or a file that still loads."""
    data = (written / "mmproj-f32.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes((written / "model-f32.gguf").read_bytes())
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(data)
        for place in generator.integers(8, 3000, 3):
            changed[place] = generator.integers(0, 256)
        (tmp_path / "mmproj.gguf").write_bytes(changed)
        try:
            open_gguf(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_other_versions_and_files(written: Path, tmp_path: Path) -> None:
    data = (written / "model-f32.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + data[8:])
    with pytest.raises(CheckpointError, match="is GGUF of version 1, only 2 and 3 can be read"):
        llava_lite.load(path)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        llava_lite.load(path)


def test_which_files_are_used(written: Path, tmp_path: Path) -> None:
    text, tower = (written / f"{name}-f32.gguf" for name in ("model", "mmproj"))
    assert open_gguf(text).tokenizer_file == text
    with pytest.raises(CheckpointError, match="is the tower alone"):
        open_gguf(tower)
    alone = tmp_path / "text.gguf"
    alone.write_bytes(text.read_bytes())
    with pytest.raises(CheckpointError, match=r"mmproj.*--vision-tower"):
        open_gguf(alone)
    assert llava_lite.load(alone, vision_tower=tower, device="cpu").config.name == "random"
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(alone, tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="must be a GGUF file"):
        open_gguf(alone, torch.nn.Identity())
    (tmp_path / "other.gguf").write_bytes(text.read_bytes())
    with pytest.raises(CheckpointError, match=r"several .* text.gguf|several .* other.gguf"):
        open_gguf(tmp_path, tower)
    with pytest.raises(CheckpointError, match="need no base"):
        llava_lite.load(text, base=tmp_path)


def test_sources_that_gguf_cannot_represent(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    def save(name: str, config: LlavaConfig, tokenizer: Tokenizer | None) -> Path:
        save_model(random_llava(config), config, tmp_path / name, tokenizer)
        return tmp_path / name

    deep = save("deep", replace(TINY_CONFIG, projector_depth=1), tiny_tokenizer)
    small = replace(TINY_CONFIG.text, sampled_vocab_size=300)
    cut = save("cut", replace(TINY_CONFIG, text=small), tiny_tokenizer)
    mute = save("mute", TINY_CONFIG, None)
    for folder, message in (
        (deep, "2 projector layers"),
        (cut, "310 tokens, but the model has 300"),
        (mute, "has no tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(folder, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_wrong_options(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="llava_lite, hf, gguf"):
        convert(model_folder, tmp_path / "m", to="ggml")
    with pytest.raises(ValueError, match="int8 weights cannot be written as gguf: gguf has q8_0"):
        convert(model_folder, tmp_path / "m", to="gguf", quantize="int8")
    with pytest.raises(ValueError, match="llava_lite has int8 and int4"):
        convert(model_folder, tmp_path / "m", quantize="q8_0")
    for wrong in (["--quantize", "q4_k"], ["--quantize", "int4"], ["--dtype", "f8"]):
        assert (
            main(["convert", str(model_folder), str(tmp_path / "m"), "--to", "gguf", *wrong]) == 2
        )
    assert "usage" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_without_the_package(
    model_folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'llava-lite\[gguf\]'"):
        llava_lite.load(written)
    with pytest.raises(CheckpointError, match=r"pip install 'llava-lite\[gguf\]'"):
        convert(model_folder, tmp_path / "m", to="gguf")


def test_force_replaces_both_files(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(model_folder), str(tmp_path / "m"), "--to", "gguf"]
    assert main([*command, "--quantize", "q8_0", "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(command) == 1
    assert main([*command, "--force"]) == 0
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["mmproj-f16.gguf", "model-f16.gguf"]
    assert main(["info", str(tmp_path / "m")]) == 0
    assert "GGUF" in capsys.readouterr().out


# ---- llama.cpp -----------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp in this process, one thread, without flash attention, which rounds to 16 bit."""

    def __init__(self, folder: Path) -> None:
        library = peer("xllamacpp")
        params = library.CommonParams()
        params.model.path = str(next(folder.glob("model*.gguf")))
        params.mmproj.path = str(next(folder.glob("mmproj*.gguf")))
        params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = library.Server(params)

    def ask(self, image: Image.Image, question: str, **options: Any) -> dict[str, Any]:
        """The first choice of a chat completion."""
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        # LLaVA puts a line break behind the image.
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": f"\n{question}"},
        ]
        messages = [{"role": "user", "content": content}]
        wanted = {"messages": messages, "temperature": 0, "cache_prompt": False, **options}
        return self.server.handle_chat_completions(wanted)["choices"][0]


def scenes(count: int) -> list[tuple[Image.Image, Question]]:
    """Squares of the model's size, so that nobody resizes, and a question about each."""
    drawn = []
    for number, (scene, asked) in enumerate(fresh_scenes(count, 5)):
        drawn.append((to_square(draw_scene(scene), 336), asked[number % len(asked)]))
    assert len({question.family for _, question in drawn}) > 2
    return drawn


def append_class_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as this build of llama.cpp: append the class token, which CLIP puts in front. So every
    patch has the position of its left neighbor, and the first patch is lost."""
    tower = model.llava.vision

    def embed(pixels: Tensor) -> Tensor:
        patches = rearrange(tower.patch_embed(pixels), "b c h w -> b (h w) c")
        return torch.cat((patches, tower.class_embed.expand(1, 1, -1)), dim=1) + tower.pos_embed

    monkeypatch.setattr(tower, "embed", embed)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "method"), [("float16", None), ("auto", "q8_0")])
def test_llama_cpp_gives_our_short_answers(tmp_path: Path, dtype: str, method: str | None) -> None:
    convert(EMBEDDED, tmp_path / "m", dtype=dtype, to="gguf", quantize=method)
    theirs = LlamaCpp(tmp_path / "m")
    ours = llava_lite.load(EMBEDDED, device="cpu", dtype="float32")
    asked = [(image, q.text) for image, q in scenes(14) if q.family != "describe"]
    assert len(asked) >= 10
    for image, question in asked[:10]:
        answer = theirs.ask(image, question, max_tokens=40)["message"]["content"]
        assert answer.strip() == str(ours.generate(image, question, max_new_tokens=40)), question


@pytest.mark.slow
def test_llama_cpp_computes_what_we_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the class token at its place, long answers and the log probabilities are ours."""
    convert(EMBEDDED, tmp_path / "m", dtype="float32", to="gguf")
    theirs = LlamaCpp(tmp_path / "m")
    ours = llava_lite.load(EMBEDDED, device="cpu", dtype="float32")
    append_class_token(ours, monkeypatch)
    for image, asked in scenes(10):
        choice = theirs.ask(image, asked.text, max_tokens=80, logprobs=True, top_logprobs=5)
        answer = ours.generate(image, asked.text, max_new_tokens=80)
        assert choice["message"]["content"].strip() == str(answer)
        prompt = build_prompt("vicuna_v1", [(place_images(asked.text, 1), None)])
        ids = torch.tensor([ours.tokenizer.encode_prompt(prompt)])
        logits = ours.llava.prefill(ids, normalize(image))[0][0, -1, : ours.tokenizer.vocab_size]
        expected = logits.log_softmax(-1)
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            assert abs(expected[token["id"]].item() - token["logprob"]) < 0.02, asked.text
