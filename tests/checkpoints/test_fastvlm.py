"""FastVLM from published folders: the reference's prompts, ids, logits and caches; all forms of a
folder; and what is refused."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llava_lite
from helpers.fastvlm import TINY_FASTVLM, TOLERANCE, FastVLMGolden, replace_weights, unfold
from helpers.models import load_tool
from llava_lite.cache import KVCache
from llava_lite.checkpoints.checkpoint import load_model, load_tokenizer, verify_folder
from llava_lite.checkpoints.configs import parse, parse_config
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.download import choose_files
from llava_lite.checkpoints.info import describe_preset, describe_source
from llava_lite.checkpoints.names_fastvithd import PREFIX
from llava_lite.checkpoints.opening import complete, finish, open_source
from llava_lite.checkpoints.source import Inventory
from llava_lite.config import PRESETS
from llava_lite.errors import CheckpointError
from llava_lite.generation.model import Model
from llava_lite.inputs.prompt import build_prompt, next_turn_text
from llava_lite.layout import Layout
from llava_lite.llava import EncodedImage
from llava_lite.reduction import FastV

PROMPTS = (
    "one_image",
    "text_only",
    "two_images",
    "image_after_text",
    "two_turns",
    "three_images_adjacent",
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> FastVLMGolden:
    return FastVLMGolden(shared)


@pytest.fixture(scope="module")
def model(golden: FastVLMGolden) -> Model:
    return llava_lite.load(golden.folder, device="cpu", dtype="float32")


def splice(
    golden: FastVLMGolden, model: Model, prompt: str, positions: str = "vtu", mappings: Any = None
) -> tuple[Tensor, Layout]:
    """The rows of a prompt, with the reference's image embeds."""
    facts = golden.facts["prompts"][prompt]
    embeds = [golden.tensors["projector_output"][index] for index in facts["images"]]
    images = [EncodedImage(embed) for embed in embeds]
    if mappings is not None:
        features = [golden.tensors["tower_tokens"][index] for index in facts["images"]]
        images = [merge(model, *pair) for pair in zip(features, mappings, strict=True)]
    return model.llava.splice(facts["ids"], images, positions=positions)


def merge(model: Model, features: Tensor, mapping: list[int]) -> EncodedImage:
    """The means of the features (P, C) with the same token, projected."""
    tokens = torch.tensor(mapping)
    means = [features[tokens == token].mean(0) for token in range(max(mapping) + 1)]
    return EncodedImage(model.llava.projector(torch.stack(means)), tokens)


@torch.inference_mode()
def answer(
    model: Model, rows: Tensor, layout: Layout, steps: int, fastv: FastV | None = None
) -> tuple[list[int], Tensor, KVCache, Any]:
    """Greedy ids, the logits of every step (steps, V), the cache of the prompt, its prunings."""
    logits, [cache], [prunings] = model.llava([rows], [layout], [None], [fastv])
    first, found, all_logits = cache, [], []
    for position in range(layout.next_position, layout.next_position + steps):
        all_logits.append(logits.flatten())
        found.append(int(all_logits[-1][: model.config.text.sampled_vocab_size].argmax()))
        logits, cache = model.llava.decode(torch.tensor(found[-1]), position, cache)
    return found, torch.stack(all_logits), first, prunings


# ---- goldens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_prompts_and_greedy_tokens(golden: FastVLMGolden, model: Model, prompt: str) -> None:
    facts = golden.facts["prompts"][prompt]
    text = build_prompt("qwen_2", [(question, reply) for question, reply in facts["turns"]])
    assert text == facts["text"]
    assert model.tokenizer.encode_prompt(text) == facts["ids"]
    rows, layout = splice(golden, model, prompt)
    assert layout.next_position == facts["positions"]
    found, logits, _, _ = answer(model, rows, layout, 12)
    assert found == facts["greedy_12"]
    assert model.tokenizer.decode(found) == facts["decoded"]
    expected = golden.tensors[f"{prompt}.logits_last"]
    assert (logits[0, :1027] - expected).abs().max() <= TOLERANCE
    expected = golden.tensors[f"{prompt}.decode_logits"]
    assert (logits[:, :256] - expected).abs().max() <= TOLERANCE


def test_golden_logits_of_all_rows_and_caches(golden: FastVLMGolden, model: Model) -> None:
    rows, layout = splice(golden, model, "one_image")
    assert (rows - golden.tensors["one_image.inputs_embeds"]).abs().max() <= TOLERANCE
    with torch.inference_mode():
        logits, [cache], _ = model.llava([rows], [layout], [None], all_logits=True)
    assert (logits[:, :1027] - golden.tensors["one_image.logits"]).abs().max() <= TOLERANCE
    for layer, (k, v) in enumerate(cache):
        assert k.shape == v.shape == (1, 2, 54, 16)  # the cache holds key/value heads only
        assert (k - golden.tensors[f"one_image.k.{layer}"]).abs().max() <= TOLERANCE
        assert (v - golden.tensors[f"one_image.v.{layer}"]).abs().max() <= TOLERANCE


CASES = (
    *("one_image.full.fastv2-6", "one_image.full.fastv1-10", "two_images.full.fastv2-9"),
    *("one_image.keep7.plain", "one_image.keep7.logical", "one_image.keep7.vtu"),
    *("one_image.keep7.logical.fastv2-3", "one_image.keep7.vtu.fastv2-3"),
    *("two_images.keep6.logical.fastv2-5", "two_images.keep6.vtu.fastv2-5"),
)


@pytest.mark.parametrize("case", CASES)
def test_golden_reductions_of_the_decoder(golden: FastVLMGolden, model: Model, case: str) -> None:
    facts = golden.reductions[case]
    rows, layout = splice(
        golden, model, facts["prompt"], facts["positions"] or "vtu", facts.get("mappings")
    )
    assert (len(rows), len(layout.position_ids)) == (facts["rows"], facts["num_positions"])
    fastv = facts["fastv"] and FastV(layer=facts["fastv"]["layer"], keep=facts["fastv"]["keep"])
    found, logits, cache, prunings = answer(model, rows, layout, 6, fastv)
    assert found == facts["greedy_6"]
    assert [k.shape[2] for k, _ in cache] == facts["cache_lengths"]
    reduced = golden.reduced
    assert (logits[0] - reduced[f"{case}.logits_last_full"]).abs().max() <= TOLERANCE
    assert (logits[:, :256] - reduced[f"{case}.logits"]).abs().max() <= TOLERANCE
    assert (cache[0][0][0] - reduced[f"{case}.k0"]).abs().max() <= TOLERANCE
    assert (cache[-1][0][0] - reduced[f"{case}.k_last"]).abs().max() <= TOLERANCE
    if fastv:
        [pruning] = prunings
        assert pruning.kept_indices.tolist() == facts["kept_rows"]
        assert (pruning.scores - reduced[f"{case}.scores"]).abs().max() <= TOLERANCE


# ---- published layouts -------------------------------------------------------------------------


def published_tensors(layouts: dict[str, Any], size: str) -> dict[str, Tensor]:
    """Every tensor of a published folder, on the meta device."""
    model, shapes = layouts["models"][size], {}
    for name, shape in model["tensors"].items():
        for layer in range(model["config"]["num_hidden_layers"]):
            shapes[name.replace("{l}", str(layer))] = shape
    for name, facts in layouts["tower_folded"]["tensors"].items():
        for block in range(facts["count"]):
            shapes[PREFIX + name.replace("{b}", str(block))] = facts["shape"]
    float_type = {"dtype": torch.bfloat16, "device": "meta"}
    return {name: torch.empty(shape, **float_type) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B"])
def test_all_published_names_and_shapes_resolve(size: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "goldens" / "fastvlm" / "checkpoint_layouts_fastvlm.json"
    layouts = json.loads(path.read_text())
    raw, counts = layouts["models"][size]["config"], layouts["models"][size]["counts"]
    inventory = Inventory(qwen2=True)
    inventory.entries = inventory.locate(tmp_path / "x", published_tensors(layouts, size))
    config = complete(inventory, raw, tmp_path, None)
    source = finish(tmp_path, inventory, config, ())
    expected = PRESETS[f"fastvlm-{size.lower()}"]
    text = replace(config.text, sampled_vocab_size=expected.text.sampled_vocab_size)
    assert replace(config, text=text, name=expected.name) == expected
    assert source.unused == {}
    used = layouts["tower_folded"]["parameters_used"] + counts["projector"]
    used += counts["decoder_without_lm_head"]
    tied = raw["tie_word_embeddings"]
    assert source.num_parameters == used + (0 if tied else counts["lm_head"])
    assert len(source.ignored) == 44 + 1 + tied  # counters, the contrastive head, a tied head
    assert describe_preset(expected.name).parameters["total"] == source.num_parameters


def test_presets_have_the_memory_of_fewer_heads() -> None:
    for size, kib in (("0.5b", 12), ("1.5b", 28), ("7b", 56)):
        memory = describe_preset(f"fastvlm-{size}").memory["bfloat16"]
        assert memory["kv_cache_per_token"] == kib * 1024


def write_shards(folder: Path, state: dict[str, Tensor], kind: str) -> Path:
    """The weights in two files with an index, in place of one file."""
    (folder / "model.safetensors").unlink()
    name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    weight_map = {}
    for number in (1, 2):
        part = {n: state[n] for n in sorted(state)[number - 1 :: 2]}
        file = f"{name}-0000{number}-of-00002.{kind}"
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            replace_weights(folder, part)
            (folder / "model.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = f"{name}.{kind}.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors", "remote code", "training form", "no head"])
def test_every_form_of_a_folder_gives_the_same_model(
    golden: FastVLMGolden, model: Model, tmp_path: Path, kind: str
) -> None:
    folder = golden.copy(tmp_path / "m")
    state = golden.weights()
    if kind == "remote code":
        folder = golden.copy(tmp_path / "n", auto_map={"AutoConfig": "llava_qwen.LlavaConfig"})
        (folder / "llava_qwen.py").write_text("raise SystemExit('never run')")
    elif kind == "training form":
        replace_weights(folder, unfold(state))
    elif kind == "no head":
        replace_weights(folder, {n: t for n, t in state.items() if n != "lm_head.weight"})
    else:
        write_shards(folder, state, kind)
    found = load_model(folder, dtype="float32").state_dict()
    expected = model.llava.state_dict()
    assert found.keys() == expected.keys()
    exact = kind != "training form"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_converted_and_verified(
    golden: FastVLMGolden, model: Model, tmp_path: Path, quantize: str | None
) -> None:
    plan = convert(golden.folder, None, dtype=None, dry_run=True, quantize=quantize)
    report = convert(golden.folder, tmp_path / "m", dtype=None, verify=True, quantize=quantize)
    assert report.verified and report.parameters == plan.parameters
    stored = load_file(tmp_path / "m" / "model.safetensors")
    heads = [name for name in stored if "lm_head" in name]
    # A tied head is the embedding; only its codes are stored, because the embedding has none.
    assert heads == [] if quantize is None else all("weight" != n.split(".")[-1] for n in heads)
    assert len(stored) == verify_folder(tmp_path / "m")
    dtype = "bfloat16" if quantize else "float32"  # the file's scales are in bfloat16
    loaded = llava_lite.load(tmp_path / "m", device="cpu", dtype=dtype)
    assert replace(loaded.config, name="x") == replace(model.config, name="x")
    rows, layout = splice(golden, loaded, "two_turns")
    assert loaded.tokenizer.encode("## a<|im_end|>") == model.tokenizer.encode("## a<|im_end|>")
    found, logits, _, _ = answer(loaded, rows, layout, 12)
    if quantize is None:
        assert found == golden.facts["prompts"]["two_turns"]["greedy_12"]
        return
    other = llava_lite.load(golden.folder, device="cpu", dtype=dtype, quantize=quantize)
    assert torch.equal(logits, answer(other, rows, layout, 12)[1])
    assert describe_source(tmp_path / "m").parameters == describe_source(golden.folder).parameters


def test_spare_rows_are_never_sampled(golden: FastVLMGolden, model: Model) -> None:
    """Without the limit, this prompt gets other tokens."""
    facts = golden.facts["prompts"]["two_turns"]
    rows, layout = splice(golden, model, "two_turns")
    _, logits, _, _ = answer(model, rows, layout, 12)
    assert int(logits.argmax(-1).max()) >= model.config.text.sampled_vocab_size == 1027
    assert max(facts["greedy_12"]) < 1027


def test_either_end_token_ends_an_answer(golden: FastVLMGolden, model: Model) -> None:
    # The second token of this answer, as if it were one of the end tokens.
    for field in ({"eos_id": 275}, {"stop_ids": (275, 3)}):
        config = replace(model.config, text=replace(model.config.text, **field))
        reply = Model(model.llava, model.tokenizer, config).generate(None, "Hello, who are you?")
        assert (reply.token_ids, reply.finish_reason) == ((79,), "stop")
    assert model.config.text.stop_ids == (1024,)


def test_a_tied_head_is_the_embedding(golden: FastVLMGolden, tmp_path: Path) -> None:
    decoder = load_model(golden.folder).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    state = golden.weights()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    folder = replace_weights(golden.copy(tmp_path / "m"), state)
    words = "'lm_head.weight' differs from 'model.embed_tokens.weight'"
    with pytest.warns(UserWarning, match=words):
        changed = load_model(folder).decoder
    assert torch.equal(changed.lm_head.weight, decoder.lm_head.weight)
    with pytest.warns(UserWarning, match=words):
        convert(folder, tmp_path / "converted")
    untied = replace_weights(golden.copy(tmp_path / "u", tie_word_embeddings=False), state)
    assert torch.equal(load_model(untied).decoder.lm_head.weight, state["lm_head.weight"])


def test_adapter_and_projector_over_a_fastvlm_base(
    golden: FastVLMGolden, model: Model, tmp_path: Path
) -> None:
    a, b = torch.randn(2, 64), torch.randn(32, 2)
    stem = "base_model.model.model.layers.1.self_attn.k_proj.lora_"
    bias = {"base_model.model.model.mm_projector.2.bias": torch.full((64,), 0.5)}
    for name in ("lora", "projector"):
        (tmp_path / name).mkdir()
    torch.save({f"{stem}A.weight": a, f"{stem}B.weight": b}, tmp_path / "lora/adapter_model.bin")
    torch.save(bias, tmp_path / "lora" / "non_lora_trainables.bin")
    torch.save(bias, tmp_path / "projector" / "mm_projector.bin")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3}')
    expected = dict(model.llava.state_dict())
    expected["projector.layers.1.bias"] = bias.popitem()[1]
    for name in ("projector", "lora"):
        if name == "lora":
            expected["decoder.layers.1.attn.k_proj.weight"] = (
                expected["decoder.layers.1.attn.k_proj.weight"] + 1.5 * b @ a
            )
        loaded = llava_lite.load(tmp_path / name, "cpu", "float32", base=golden.folder)
        assert loaded.tokenizer.family == "qwen2"
        for key, tensor in loaded.llava.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-6)


def test_a_download_takes_the_files_of_the_tokenizer() -> None:
    names = ["model.safetensors", "vocab.json", "merges.txt", "added_tokens.json", "llava_qwen.py"]
    assert choose_files(names) == sorted(names[:-1])


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "linear"}}, "not supported: rope_scaling = {'type': 'linear'}"),
        ({"use_sliding_window": True}, "not supported: use_sliding_window = True"),
        ({"mm_use_im_start_end": True}, "not supported: mm_use_im_start_end = True"),
        ({"image_aspect_ratio": "anyres"}, "not supported: image_aspect_ratio = 'anyres'"),
        ({"hidden_act": "gelu"}, "not supported: hidden_act = 'gelu'"),
        ({"vision_config": {"mlp_ratios": [3] * 5}}, "not supported: mlp_ratios"),
        ({"mm_vision_tower": "openai/clip"}, "mm_vision_tower 'openai/clip' is not supported"),
        ({"mm_vision_tower": "mobileclip_l"}, "mm_vision_tower 'mobileclip_l' is not"),
        ({"mm_vision_tower": "/x/mobileclip_l_1024"}, "mm_vision_tower '/x/mobileclip_l_1024'"),
        ({"mm_vision_tower": None}, "mm_vision_tower None is not supported"),
        ({"mm_vision_tower": "mobileclip_t_1000"}, "1000 must be a multiple of 64"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size 1024, but the tower's features are 256 wide"),
        ({"mm_projector_type": "resampler"}, "unsupported mm_projector_type 'resampler'"),
        ({"num_attention_heads": 5}, "hidden_size 64 is no multiple of 5 heads"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3 key/value heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads 0 is out of range"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings 'yes' is neither true nor false"),
        ({"model_type": "fast_vlm"}, "model_type 'fast_vlm' is a conversion of FastVLM"),
        ({"vocab_size": 1000}, "the tokenizer has 1027 ids, but vocab_size is 1000"),
        ({"intermediate_size": 175}, "has shape .*, but the config says"),
        (
            {"mm_vision_tower": "mobileclip_l_256", "vision_config": None, "mm_hidden_size": 3072},
            "tensors are missing",
        ),
    ],
)
def test_unsupported_configs_are_named(
    golden: FastVLMGolden, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = golden.copy(tmp_path / "m", **fields)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_key_value_heads"])
def test_a_missing_size_is_named(golden: FastVLMGolden, field: str) -> None:
    raw = json.loads((golden.folder / "config.json").read_text())
    del raw[field]
    with pytest.raises(CheckpointError, match=f"{field} is missing"):
        parse_config(raw, None, Path("config.json"))


NETWORK = f"{PREFIX}network."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {n: t for n, t in s.items() if PREFIX not in n}, "holds no vision tower"),
        (
            lambda s: {n: t for n, t in s.items() if not n.endswith("running_var")},
            "tensors are missing, first 'vision.stages.0.blocks.0.ffn",
        ),
        (
            lambda s: s | {f"{NETWORK}0.0.convffn.conv.bn.running_var": torch.ones(3)},
            "bn.running_var' has shape",
        ),
        (
            lambda s: s | {f"{NETWORK}0.0.gamma": torch.ones(3)},
            "network.0.0.gamma' belongs to no known layout",
        ),
        (
            lambda s: {n: t for n, t in unfold(s).items() if "small_conv.bn.bias" not in n},
            "tower in training form: 'network.1.proj.0.small_conv.bn.bias' is missing",
        ),
        (
            lambda s: {re.sub("^model.", "language_model.model.", n): t for n, t in s.items()},
            "has the name of an MLX export; give the published folder instead",
        ),
    ],
)
def test_unusable_weights_are_named(
    golden: FastVLMGolden,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
) -> None:
    folder = replace_weights(golden.copy(tmp_path / "m"), change(golden.weights()))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_an_untied_config_needs_a_head(golden: FastVLMGolden, tmp_path: Path) -> None:
    state = {n: t for n, t in golden.weights().items() if n != "lm_head.weight"}
    folder = replace_weights(golden.copy(tmp_path / "m", tie_word_embeddings=False), state)
    with pytest.raises(CheckpointError, match="no lm_head.weight, and the config does not tie"):
        open_source(folder)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (("vocab.json",), "vocab.json: cannot be read"),
        (("merges.txt",), "merges.txt: cannot be read"),
        (("vocab.json", "merges.txt"), "holds neither tokenizer.json nor tokenizer.model"),
        (("added_tokens.json", "tokenizer_config.json"), "has no added tokens"),
    ],
)
def test_missing_files_of_the_tokenizer_are_named(
    golden: FastVLMGolden, tmp_path: Path, lost: tuple[str, ...], words: str
) -> None:
    folder = golden.copy(tmp_path / "m")
    for name in lost:
        (folder / name).unlink()
    assert open_source(folder).config.text.sampled_vocab_size == 1027
    with pytest.raises(CheckpointError, match=words):
        llava_lite.load(folder)


def test_families_do_not_mix(
    golden: FastVLMGolden, model: Model, model_folder: Path, tmp_path: Path
) -> None:
    words = "template 'vicuna_v1' is for llama models, this one is qwen2"
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=words):
            call(None, "Hi", template="vicuna_v1")
    raw = json.loads((golden.folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="does not fit the config: .* is for qwen2 models"):
        load_tokenizer(model_folder / "tokenizer.json", parse(raw))
    for to in ("hf", "gguf"):
        with pytest.raises(CheckpointError, match="cannot store a FastViTHD tower"):
            convert(golden.folder, tmp_path / to, to=to)
    assert not (tmp_path / "hf").exists()


# ---- the tool that makes random folders --------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_folder_has_the_published_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    tool = load_tool("make_random_checkpoint")
    text = replace(TINY_FASTVLM.text, tie_embeddings=tied)
    monkeypatch.setitem(tool.SIZES, "fastvlm-0.5b", replace(TINY_FASTVLM, text=text))
    out = tmp_path / "m"
    options = ["--layout", "fastvlm", "--size", "fastvlm-0.5b", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["make_random_checkpoint", *options])
    assert tool.main() == 0
    source = open_source(out)
    assert replace(source.config.text, sampled_vocab_size=310) == text
    assert source.config.vision == TINY_FASTVLM.vision
    assert len(source.ignored) == 5 + 1 + tied  # counters, the contrastive head, a tied head
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # the stored head is the embedding
        llava = load_model(out, dtype="float32")
        logits, _, position = llava.prefill(
            torch.tensor([[1, 7, -200, 9]]), torch.rand(1, 3, 256, 256)
        )
    assert position == 3 + 16
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


def test_the_tool_knows_the_names_of_every_preset(shared: Path) -> None:
    path = shared / "goldens" / "fastvlm" / "checkpoint_layouts_fastvlm.json"
    layouts, tool = json.loads(path.read_text()), load_tool("make_random_checkpoint")
    for size in ("0.5B", "1.5B", "7B"):
        specs = tool.fastvlm_specs(PRESETS[f"fastvlm-{size.lower()}"])
        expected = published_tensors(layouts, size)
        assert {n: shape for n, (shape, _) in specs.items()} == {
            n: tuple(t.shape) for n, t in expected.items()
        }
        made = tool.fastvlm_config(PRESETS[f"fastvlm-{size.lower()}"])
        published = layouts["models"][size]["config"]
        assert {n: published[n] for n in made} == made


# ---- from image files to text ------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "two_turns"])
def test_answers_from_image_files(golden: FastVLMGolden, model: Model, prompt: str) -> None:
    facts = golden.facts["prompts"][prompt]
    files = [golden.images / golden.facts["images"][n]["file"] for n in facts["images"]]
    question = facts["turns"][0][0]
    reply = model.generate(files, question, max_new_tokens=12)
    assert (list(reply.token_ids), reply) == (facts["greedy_12"], facts["decoded"].strip())
    pieces = list(model.stream(files, question, max_new_tokens=12))
    assert "".join(pieces) == reply and len(pieces) > 1


def test_a_batch_and_a_chat_answer_as_single_calls(golden: FastVLMGolden, model: Model) -> None:
    files = [golden.images / image["file"] for image in golden.facts["images"]]
    items = [(files[0], "What are these?"), (None, "Hello, who are you?"), (files[1:], "Larger?")]
    alone = [model.generate(image, text, max_new_tokens=8) for image, text in items]
    images, texts = [image for image, _ in items], [text for _, text in items]
    batch = model.generate(images, texts, max_new_tokens=8)
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in alone]
    chat = model.chat(files[0], max_new_tokens=8)
    assert chat.send("What are these?").token_ids == alone[0].token_ids
    second = chat.send("And the background?")
    ids = model.tokenizer.encode_prompt(
        build_prompt("qwen_2", [("<image>\nWhat are these?", None)])
    )
    ids += alone[0].token_ids
    new = next_turn_text("qwen_2", "And the background?")
    ids += model.tokenizer.encode_prompt(new, after="text")
    rows, layout = model.llava.splice(ids, [model.encode(files[0])])
    assert list(second.token_ids) == answer(model, rows, layout, 8)[0]
