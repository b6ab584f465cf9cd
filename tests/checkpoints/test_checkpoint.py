"""Checkpoints: every layout gives the same model, and every damaged one a clear error.

Run: pytest tests/checkpoints/test_checkpoint.py
"""

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.layouts import (
    LAYOUTS,
    OFFICIAL_STYLE,
    STYLES,
    Golden,
    State,
    clip_config,
    golden_folder,
    hf_state,
    llava_hf_config,
    official_config,
    part,
    renamed,
    write_folder,
    write_layout,
    write_official,
)
from helpers.models import TINY_CONFIG, random_llava
from llava_lite.checkpoints.checkpoint import load_model, load_tokenizer, save_model, verify_folder
from llava_lite.checkpoints.configs import parse
from llava_lite.checkpoints.names import hf_name, lora_target, our_names
from llava_lite.checkpoints.opening import (
    find_given,
    find_local,
    find_tokenizer,
    open_source,
    projector_file,
)
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.checkpoints.source import Entry, Inventory, check_entries
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, LlavaConfig, TextConfig
from llava_lite.errors import CheckpointError
from llava_lite.llava import Llava


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden(shared)


@pytest.fixture(scope="module")
def llava() -> Llava:
    return random_llava()


@pytest.mark.parametrize("style", STYLES)
def test_every_layout_gives_the_same_weights(style: str, llava: Llava, tmp_path: Path) -> None:
    folder = write_layout(style, tmp_path, hf_state(llava))
    if style == "official-tower-inside":  # no tower config on this disk: heads follow from width
        assert open_source(folder).config.vision.num_heads == 1
        (tmp_path / "tower").mkdir()
        (tmp_path / "tower" / "config.json").write_text(json.dumps(clip_config()))
    loaded = load_model(folder)
    assert loaded.config.vision == TINY_CONFIG.vision
    assert loaded.config.text.hidden_size == TINY_CONFIG.text.hidden_size
    for name, tensor in llava.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_unused_and_ignored_tensors_are_reported(llava: Llava, tmp_path: Path) -> None:
    source = open_source(write_layout("official", tmp_path, hf_state(llava)))
    assert source.layout == "official"
    assert len(source.unused) == 18  # the last block has 16, the final norm 2
    assert set(source.ignored) == {
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "text_model.embeddings.position_ids",
        "visual_projection.weight",
    }
    assert source.num_parameters == sum(weight.numel() for weight in llava.parameters())


# Published names and shapes


def pattern_shapes(table: dict, layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for pattern, shape in table.items():
        count = layers if "{i}" in pattern else 24 if "{j}" in pattern else 1
        for number in range(count):
            shapes[re.sub(r"\{[ij]\}", str(number), pattern)] = tuple(shape)
    return shapes


def meta_entries(shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    tensors = {n: torch.empty(s, dtype=torch.float16, device="meta") for n, s in shapes.items()}
    return Inventory().locate(Path("published"), tensors)


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize(
    "layout", ["official", "llava_hf_old_style", "llava_hf_new_style", "llava_hf_v5_style"]
)
@pytest.mark.parametrize("tower", ["clip_hf_vision", "openclip_visual"])
def test_all_published_names_resolve(size: str, layout: str, tower: str, shared: Path) -> None:
    layouts = json.loads((shared / "spec" / "checkpoint_layouts.json").read_text())["layouts"]
    table = layouts[f"{layout}_{size}"]
    layers = table["num_layers"]
    shapes = pattern_shapes(table["keys"], layers)
    ignored: dict[str, tuple[int, ...]] = {}
    if layout == "official":
        ignored = pattern_shapes(table["present_but_ignored"]["keys"], layers)
        assert len(ignored) == layers
        shapes |= pattern_shapes(layouts[tower]["keys"], 0)
        ignored |= ignored_names(layouts[tower]["present_but_ignored"])
    entries = meta_entries(shapes | ignored)
    assert not {entry.stored for entry in entries.values()} & set(ignored)
    config = LLAVA_1_5_7B if size == "7b" else LLAVA_1_5_13B
    vocab = entries["decoder.lm_head.weight"].shape[0]
    config = LlavaConfig(vision=config.vision, text=replace_vocab(config, vocab))
    unused = check_entries(entries, config, Path("published"))
    assert set(entries) - set(unused) == set(expected_shapes(config))
    assert len(unused) == 18


def ignored_names(listed: dict | list) -> dict[str, tuple[int, ...]]:
    """What a published tower file also holds: exact names, and `*` for a part in words."""
    names = [name.split(" ")[0].replace("*", "weight") for name in listed]
    assert len(names) >= 6
    return dict.fromkeys(names, (1,))


def replace_vocab(config: LlavaConfig, vocab_size: int) -> TextConfig:
    return replace(config.text, vocab_size=vocab_size)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_a_published_tower_inside_resolves(size: str, shared: Path) -> None:
    layouts = json.loads((shared / "spec" / "checkpoint_layouts.json").read_text())["layouts"]
    table = layouts[f"official_{size}"]
    shapes = pattern_shapes(table["keys"], table["num_layers"])
    inside = pattern_shapes(table["sometimes_present"]["keys"], table["num_layers"])
    assert len(inside) == 391
    entries = meta_entries(shapes | inside)
    config = LLAVA_1_5_7B if size == "7b" else LLAVA_1_5_13B
    unused = check_entries(entries, config, Path("published"))
    assert set(entries) - set(unused) == set(expected_shapes(config))
    assert len(unused) == 18


# config.json as published: every field of the official one, the few of llava-hf's
PUBLISHED_OFFICIAL: dict = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}
PUBLISHED_HF: dict = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_published_configs_are_the_presets() -> None:
    sizes_7b = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    heads_7b = {"num_attention_heads": 32, "num_key_value_heads": 32}
    official = parse(PUBLISHED_OFFICIAL)
    assert replace(official, name=LLAVA_1_5_13B.name) == LLAVA_1_5_13B
    official = parse(PUBLISHED_OFFICIAL | sizes_7b | heads_7b)
    assert replace(official, name=LLAVA_1_5_7B.name) == LLAVA_1_5_7B
    nested = parse(PUBLISHED_HF)
    expected = replace(LLAVA_1_5_7B, text=replace(LLAVA_1_5_7B.text, vocab_size=32064))
    assert replace(nested, name=expected.name) == expected


def test_an_official_model_without_an_aspect_ratio_does_not_pad() -> None:
    raw = {k: v for k, v in PUBLISHED_OFFICIAL.items() if k != "image_aspect_ratio"}
    assert not parse(raw).pad
    assert parse({**raw, "image_aspect_ratio": "pad"}).pad
    assert not parse({**raw, "image_aspect_ratio": "square"}).pad
    base = {k: v for k, v in raw.items() if not k.startswith("mm_")}
    assert parse(base).pad  # a Llama base says nothing about images


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_published_lora_and_projector_names_resolve(size: str, shared: Path) -> None:
    layouts = json.loads((shared / "spec" / "checkpoint_layouts.json").read_text())["layouts"]
    lora = layouts[f"lora_{size}"]
    shapes = expected_shapes(LLAVA_1_5_7B if size == "7b" else LLAVA_1_5_13B)
    adapter = pattern_shapes(
        lora["adapter_model.bin|adapter_model.safetensors"], lora["num_layers"]
    )
    assert len(adapter) == 14 * lora["num_layers"]
    for stored, shape in adapter.items():
        half, name = lora_target(stored) or ("", "")
        column, size_there = (1, shape[1]) if half == "A" else (0, shape[0])
        assert int(size_there) == shapes[name][column]
    trained = pattern_shapes(lora["non_lora_trainables.bin"], 0)
    projector = pattern_shapes(layouts[f"mm_projector_bin_{size}"]["keys"], 0)
    for stored, shape in (trained | projector).items():
        assert shapes[our_names(stored)[0]] == shape


def test_names_map_back_and_forth() -> None:
    for name in expected_shapes(LLAVA_1_5_7B):
        assert our_names(hf_name(name)) == (name,)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.vision_tower.head.weight", "foo", "visual.x"],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(name)):
        our_names(name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_logits_and_tokens(layout: str, golden: Golden, tmp_path: Path) -> None:
    folder, tower = golden_folder(golden, layout, tmp_path)
    model = load_model(folder, dtype="float32", vision_tower=tower)
    rows = model.config.text.vocab_size
    for prompt, facts in golden.facts["prompts"].items():
        with torch.no_grad():
            logits, cache, position = model.prefill(*golden.inputs(prompt), all_logits=True)
            reference = golden.tensors[f"{prompt}.logits_first256_allpos"]
            torch.testing.assert_close(logits[0, :, :256], reference, atol=2e-5, rtol=0)
            last = golden.tensors[f"{prompt}.logits_last"][:rows]
            torch.testing.assert_close(logits[0, -1], last, atol=2e-5, rtol=0)
            tokens = [int(logits[0, -1].argmax())]
            for _ in range(7):
                token = torch.tensor(tokens[-1:])
                logits, cache = model.decode(token, position, cache)
                position += 1
                tokens.append(int(logits.argmax()))
        assert tokens == facts["greedy_8"] == facts["generate_8"]


def test_golden_hidden_states(golden: Golden) -> None:
    model = load_model(golden.folder / "hf_layout", dtype="float32")
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module: object, _inputs: object, output: object) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[index]

        return hook

    for number, block in enumerate([model.vision.pre_norm, *model.vision.blocks]):
        block.register_forward_hook(record(f"vision.hidden_states.{number}"))
    for number, layer in enumerate(model.decoder.layers[:-1], start=1):
        layer.register_forward_hook(record(f"one_image.text_hidden_states.{number}"))
    model.decoder.norm.register_forward_hook(record("one_image.text_hidden_states.4"))
    with torch.no_grad():
        pixels = golden.tensors["pixel_values"]
        features = model.vision(pixels).image_features
        for name in [name for name in outputs if name.startswith("vision.")]:
            torch.testing.assert_close(outputs[name], golden.tensors[name], atol=2e-5, rtol=0)
        selected = golden.tensors["vision.selected_feature"]
        torch.testing.assert_close(features, selected, atol=2e-5, rtol=0)
        projected = golden.tensors["projector.output"]
        embeds = torch.stack([image.image_embeds for image in model.encode_image(pixels)])
        torch.testing.assert_close(embeds, projected, atol=2e-5, rtol=0)
        model.prefill(*golden.inputs("one_image"))
    for name in [name for name in outputs if name.startswith("one_image.")]:
        torch.testing.assert_close(outputs[name], golden.tensors[name], atol=2e-5, rtol=0)
    assert len(outputs) == 4 + 4


def test_golden_batch(golden: Golden) -> None:
    model = load_model(golden.folder / "hf_layout", dtype="float32")
    spliced = []
    with torch.no_grad():
        rows = zip(
            golden.tensors["batch_leftpad.input_ids"],
            golden.tensors["batch_leftpad.attention_mask"].bool(),
            strict=True,
        )
        for ids, mask in rows:
            expanded = ids[mask].tolist()
            prompt = next(
                name
                for name, facts in golden.facts["prompts"].items()
                if facts["ids_hf_expanded"] == expanded
            )
            input_ids, pixels = golden.inputs(prompt)
            images = [] if pixels is None else list(model.encode_image(pixels))
            spliced.append(model.splice(input_ids[0].tolist(), images))
        embeds, layouts = zip(*spliced, strict=True)
        logits, _, _ = model(embeds, layouts, [None, None])
    reference = golden.tensors["batch_leftpad.logits_last"]
    assert {len(rows) for rows in embeds} == {35, 13}  # ragged, and nothing padded
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=0)


def test_golden_lora_is_merged_in_float32(golden: Golden) -> None:
    base = load_model(golden.folder / "official_layout", dtype="float32").state_dict()
    merged = load_model(
        golden.folder / "lora", dtype="float32", base=golden.folder / "official_layout"
    ).state_dict()
    adapter = torch.load(golden.folder / "lora" / "adapter_model.bin", weights_only=True)
    trained = torch.load(golden.folder / "lora" / "non_lora_trainables.bin", weights_only=True)
    projector = trained["base_model.model.model.mm_projector.0.weight"].float()
    assert torch.equal(merged["projector.layers.0.weight"], projector)
    assert not torch.equal(merged["projector.layers.0.weight"], base["projector.layers.0.weight"])
    stem = "base_model.model.model.layers.3.mlp.down_proj.lora_"
    a, b = adapter[f"{stem}A.weight"].float(), adapter[f"{stem}B.weight"].float()
    name = "decoder.layers.3.mlp.down_proj.weight"
    torch.testing.assert_close(merged[name], base[name] + (8 / 4) * (b @ a), atol=1e-6, rtol=0)
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len([name for name in changed if name.startswith("decoder.")]) == 4 * 7


# LoRA and projector over a base


def write_lora(folder: Path, llava: Llava, adapter_name: str = "", **settings: object) -> State:
    """A rank-2 adapter on one q_proj and one down_proj, and a new projector bias."""
    folder.mkdir()
    state, half = llava.state_dict(), ".lora_{}" + adapter_name + ".weight"
    generator = torch.Generator().manual_seed(1)
    adapter: State = {}
    expected: State = {}
    for stored, ours in (
        ("model.layers.1.self_attn.q_proj", "decoder.layers.1.attn.q_proj.weight"),
        ("model.layers.0.mlp.down_proj", "decoder.layers.0.mlp.down_proj.weight"),
    ):
        rows, columns = state[ours].shape
        a = torch.randn(2, columns, generator=generator)
        b = torch.randn(rows, 2, generator=generator)
        adapter[f"base_model.model.{stored}{half.format('A')}"] = a
        adapter[f"base_model.model.{stored}{half.format('B')}"] = b
        expected[ours] = state[ours] + 1.5 * (b @ a)
    tower = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0"
    adapter[f"{tower}.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 3)
    torch.save(adapter, folder / "adapter_model.bin")
    expected["projector.layers.1.bias"] = torch.full_like(state["projector.layers.1.bias"], 0.5)
    trained = {"base_model.model.model.mm_projector.2.bias": expected["projector.layers.1.bias"]}
    torch.save(trained, folder / "non_lora_trainables.bin")
    config = {"r": 2, "lora_alpha": 3, "base_model_name_or_path": "owner/base", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(official_config("../tower")))
    return expected


@pytest.mark.parametrize("adapter_name", ["", ".default"])
def test_lora_over_a_base(adapter_name: str, llava: Llava, tmp_path: Path) -> None:
    base = write_layout("official", tmp_path, hf_state(llava))
    expected = write_lora(tmp_path / "lora", llava, adapter_name)
    with pytest.warns(UserWarning, match="ignored 1 LoRA tensors of the vision tower"):
        loaded = load_model(tmp_path / "lora", base=base).state_dict()
        source = open_source(tmp_path / "lora", base=base)
    name = "decoder.layers.1.attn.q_proj.weight"
    assert torch.equal(source.read(name), source.read(name))  # merging leaves the source alone
    for name, tensor in (llava.state_dict() | expected).items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*LoRA tensors")
def test_lora_finds_its_base_beside_itself_or_says_what_is_missing(
    llava: Llava, tmp_path: Path
) -> None:
    write_lora(tmp_path / "lora", llava)
    with pytest.raises(CheckpointError, match="owner/base.*--base"):
        open_source(tmp_path / "lora")
    base = write_layout("official", tmp_path, hf_state(llava))
    base.rename(tmp_path / "base")
    assert open_source(tmp_path / "lora").layout == "LoRA over a base"


@pytest.mark.filterwarnings("ignore:.*LoRA tensors")
@pytest.mark.parametrize(
    "settings, words",
    [({"use_dora": True}, "use_dora"), ({"r": 0}, "r >= 1"), ({"bias": "all"}, "bias")],
)
def test_lora_variants_are_refused(
    settings: dict, words: str, llava: Llava, tmp_path: Path
) -> None:
    base = write_layout("official", tmp_path, hf_state(llava))
    write_lora(tmp_path / "lora", llava, **settings)
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path / "lora", base=base)


@pytest.mark.filterwarnings("ignore:.*LoRA tensors")
def test_lora_without_its_other_half_is_refused(llava: Llava, tmp_path: Path) -> None:
    base = write_layout("official", tmp_path, hf_state(llava))
    write_lora(tmp_path / "lora", llava)
    adapter = torch.load(tmp_path / "lora" / "adapter_model.bin", weights_only=True)
    adapter.pop("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight")
    torch.save(adapter, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="down_proj.lora_A.weight.*other half"):
        open_source(tmp_path / "lora", base=base)


@pytest.mark.parametrize("as_file", [True, False])
def test_projector_over_a_llama_base(as_file: bool, llava: Llava, tmp_path: Path) -> None:
    state = hf_state(llava)
    write_layout("official", tmp_path, state)
    llama = renamed(part(state, "language_model."), (r"^language_model\.", ""))
    base_config = {k: v for k, v in official_config().items() if not k.startswith("mm_")}
    base = write_folder(tmp_path / "vicuna", base_config, {"pytorch_model.bin": llama})
    (tmp_path / "projector").mkdir()
    file = tmp_path / "projector" / "mm_projector.bin"
    named = renamed(part(state, "multi_modal"), *OFFICIAL_STYLE, (r"^", "base_model.model."))
    torch.save({name: tensor.clone() for name, tensor in named.items()}, file)
    with pytest.raises(CheckpointError, match="--base"):
        open_source(file)
    (tmp_path / "projector" / "mm_projector").mkdir()  # where training keeps its checkpoints
    model = load_model(file if as_file else file.parent, base=base, vision_tower=tmp_path / "tower")
    assert model.config.template == "plain"  # never instruction-tuned
    assert model.config.pad
    for name, tensor in llava.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    with pytest.raises(CheckpointError, match="give the projector as the model"):
        open_source(base, vision_tower=tmp_path / "tower")


def write_projector(folder: Path, state: State, *files: str) -> Path:
    """A projector over `vicuna`, a plain Llama base that names no tower."""
    llama = renamed(part(state, "language_model."), (r"^language_model\.", ""))
    base_config = {k: v for k, v in official_config().items() if not k.startswith("mm_")}
    write_folder(folder / "vicuna", base_config, {"pytorch_model.bin": llama})
    (folder / "projector").mkdir()
    for file in files:
        named = renamed(part(state, "multi_modal"), *OFFICIAL_STYLE)
        write = save_file if file.endswith(".safetensors") else torch.save
        write({name: t.clone() for name, t in named.items()}, folder / "projector" / file)
    return folder / "projector"


def test_a_projector_finds_the_tower_of_llava_by_itself(llava: Llava, tmp_path: Path) -> None:
    state = hf_state(llava)
    projector = write_projector(tmp_path, state, "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"clip-vit-large-patch14-336.*--vision-tower"):
        open_source(projector, base=tmp_path / "vicuna")
    tower = renamed(part(state, "vision_tower."), (r"^vision_tower\.", ""))
    place = tmp_path / "clip-vit-large-patch14-336"
    write_folder(place, clip_config(), {"pytorch_model.bin": tower})
    loaded = load_model(projector, base=tmp_path / "vicuna")
    for name, tensor in llava.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_one_projector_of_several_has_to_be_named(llava: Llava, tmp_path: Path) -> None:
    names = ("mm_projector-1.bin", "mm_projector-2.bin")
    projector = write_projector(tmp_path, hf_state(llava), *names)
    with pytest.raises(CheckpointError, match="several projectors.*mm_projector-1.bin"):
        open_source(projector, base=tmp_path / "vicuna")
    for name in ("mm_projector.bin", "mm_projector.safetensors"):
        (projector / name).write_bytes(b"")
        assert projector_file(projector) == projector / name


# Our own folders


def test_saved_model_is_mapped_not_copied(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == TINY_CONFIG
    for name, tensor in llava.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc/self/maps on this system")
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith(str(tmp_path / "m" / "model.safetensors"))
    ]
    for name, weight in loaded.state_dict().items():
        assert any(start <= weight.data_ptr() < end for start, end in mapped), name


def test_other_dtypes_are_cast(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m", dtype="bfloat16")
    assert load_model(tmp_path / "m").dtype == torch.bfloat16
    wide = load_model(tmp_path / "m", dtype=torch.float32)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}
    name = "decoder.layers.0.mlp.up_proj.weight"
    assert torch.equal(wide.state_dict()[name], llava.state_dict()[name].bfloat16().float())
    with pytest.raises(ValueError, match="float64"):
        load_model(tmp_path / "m", dtype="float64")


def test_manifest_names_every_tensor_and_catches_a_changed_bit(
    llava: Llava, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    save_model(llava, TINY_CONFIG, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    shapes = {name: tuple(row["shape"]) for name, row in manifest["tensors"].items()}
    assert shapes == expected_shapes(TINY_CONFIG)
    assert verify_folder(folder) == len(shapes)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*differs"):
        verify_folder(folder)


def test_save_does_not_touch_a_folder_in_use_without_force(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(llava, TINY_CONFIG, tmp_path / "m")
    save_model(llava, TINY_CONFIG, tmp_path / "m", dtype="float16", force=True)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert load_model(tmp_path / "m").dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_save_refuses_nan(llava: Llava, tmp_path: Path) -> None:
    broken = random_llava()
    broken.decoder.norm.weight.data[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"decoder\.norm\.weight.*NaN"):
        save_model(broken, TINY_CONFIG, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_is_saved_and_found(llava: Llava, tiny_tokenizer, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m", tiny_tokenizer)
    text = "What color is the star?"
    loaded = load_tokenizer(tmp_path / "m", TINY_CONFIG)
    assert loaded.encode(text) == tiny_tokenizer.encode(text)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "m", TINY_CONFIG)
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        load_tokenizer(tmp_path / "m", TINY_CONFIG)


# Bad input


@pytest.fixture
def hf_folder(llava: Llava, tmp_path: Path) -> Path:
    state = hf_state(llava)
    halves = {
        "model-1.safetensors": part(state, "language_model."),
        "model-2.safetensors": part(state, "language_model.", inside=False),
    }
    return write_folder(tmp_path / "m", llava_hf_config(), halves)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(file: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file; None removes one."""
    state = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def test_missing_shard(hf_folder: Path) -> None:
    (hf_folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors.*missing.*vision_tower"):
        open_source(hf_folder)


def test_truncated_safetensors(hf_folder: Path) -> None:
    file = hf_folder / "model-1.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors.*truncated"):
        open_source(hf_folder)


@pytest.mark.parametrize("keep", [0, 10, 5000, -200])
def test_truncated_bin(keep: int, llava: Llava, tmp_path: Path) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    file = folder / "pytorch_model-2.bin"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=r"pytorch_model-2\.bin: damaged"):
        open_source(folder)


NORM = "language_model.model.norm.weight"


def test_wrong_shape(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-1.safetensors", **{NORM: torch.ones(65)})
    with pytest.raises(CheckpointError, match=rf"model-1.*{NORM}.*\(65,\).*\(64,\)"):
        open_source(hf_folder)


def test_wrong_dtype(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-1.safetensors", **{NORM: torch.ones(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=rf"model-1.*{NORM}.*int8"):
        open_source(hf_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value: float, hf_folder: Path) -> None:
    broken = torch.ones(64)
    broken[63] = value
    edit_tensors(hf_folder / "model-1.safetensors", **{NORM: broken})
    with pytest.raises(CheckpointError, match=rf"model-1.*{NORM}.*NaN or infinite"):
        load_model(hf_folder)


def test_overflow_in_the_wanted_dtype(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-1.safetensors", **{NORM: torch.full((64,), 1e6)})
    load_model(hf_folder, dtype="float32")
    with pytest.raises(CheckpointError, match=rf"{NORM}.*float16"):
        load_model(hf_folder, dtype="float16")


def test_missing_tensor(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-1.safetensors", **{NORM: None})
    with pytest.raises(CheckpointError, match=rf"model-1.*{NORM}.*index"):
        open_source(hf_folder)
    (hf_folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*decoder\.norm\.weight"):
        open_source(hf_folder)


def test_unexpected_tensor(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-1.safetensors", surprise=torch.ones(1))
    with pytest.raises(CheckpointError, match="model-1.*surprise"):
        open_source(hf_folder)


def test_tensor_of_a_layer_that_the_config_lacks(hf_folder: Path) -> None:
    name = "language_model.model.layers.3.input_layernorm.weight"
    edit_tensors(hf_folder / "model-1.safetensors", **{name: torch.ones(64)})
    with pytest.raises(CheckpointError, match=rf"model-1.*unexpected.*{re.escape(name)}"):
        open_source(hf_folder)


def test_tensor_given_twice(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model-2.safetensors", **{NORM: torch.ones(64)})
    with pytest.raises(CheckpointError, match=rf"model-2.*{NORM}.*model-1"):
        open_source(hf_folder)


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/passwd", "a/b", "..", "", "c:x", "a\\b", 3, None]
)
def test_index_that_leads_outside(name: object, hf_folder: Path) -> None:
    edit_json(hf_folder / "model.safetensors.index.json", weight_map={NORM: name})
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_source(hf_folder)


def test_manifest_that_leads_outside(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    manifest["tensors"]["decoder.norm.weight"]["file"] = "../other.safetensors"
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_model(tmp_path / "m")


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_not_run(
    legacy: bool, llava: Llava, tmp_path: Path
) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    attack = {"lm_head.weight": Attack(tmp_path / "pwned")}
    file = folder / "pytorch_model-1.bin"
    torch.save(attack, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin.*code is never run"):
        load_model(folder)
    file.write_bytes(pickle.dumps(attack))
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin.*code is never run"):
        load_model(folder)
    assert not (tmp_path / "pwned").exists()


def test_legacy_pickle_is_read(llava: Llava, tmp_path: Path) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    for file in folder.glob("*.bin"):
        state = torch.load(file, weights_only=True)
        torch.save(state, file, _use_new_zipfile_serialization=False)
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in llava.state_dict().items())


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without its values"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_without_plain_values(
    tensor: Tensor, words: str, llava: Llava, tmp_path: Path
) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    torch.save({"lm_head.weight": tensor}, folder / "pytorch_model-1.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model-1\.bin.*lm_head.*{words}"):
        open_source(folder)


@pytest.mark.parametrize("content", [[1, 2], {"lm_head.weight": 3}, {1: torch.ones(1)}])
def test_pickle_without_named_tensors(content: object, llava: Llava, tmp_path: Path) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    torch.save(content, folder / "pytorch_model-1.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin"):
        open_source(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"text_config": 3, "vision_config": {}}',
        '{"format": "llava_lite"}',
    ],
)
def test_damaged_config(text: str, hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json|no known layout"):
        open_source(hf_folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "64"),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("rms_norm_eps", None),
        ("hidden_size", 65),
        ("hidden_size", 64.0),
        ("vocab_size", 512.5),
        ("intermediate_size", True),
        ("rope_theta", 10**400),
        ("rms_norm_eps", float("nan")),
        ("max_position_embeddings", float("inf")),
    ],
)
def test_config_out_of_range(field: str, value: object, hf_folder: Path) -> None:
    raw = json.loads((hf_folder / "config.json").read_text())
    raw["text_config"][field] = value
    (hf_folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(hf_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"projector_hidden_act": "relu"},
        {"vision_config": {"image_size": 1 << 24, "patch_size": 1 << 24}},
        {"vision_config": {"hidden_size": 1 << 24, "patch_size": 1 << 14, "image_size": 1 << 14}},
        {"vision_config": {"hidden_size": 1 << 24, "patch_size": 1, "image_size": 1 << 14}},
        {"vision_feature_layer": "-2"},
        {"vision_feature_layer": 99},
    ],
)
def test_configs_of_no_model(changes: dict, hf_folder: Path) -> None:
    edit_json(hf_folder / "config.json", **changes)
    with pytest.raises(CheckpointError) as error:
        open_source(hf_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["mlp100000000x_gelu", "mlp9x_gelu", "mlp0x_gelu", "cnn", 3])
def test_projectors_of_no_model(kind: object, llava: Llava, tmp_path: Path) -> None:
    folder = write_layout("official", tmp_path, hf_state(llava))
    edit_json(folder / "config.json", mm_projector_type=kind)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(folder)


def test_names_are_found_beside_a_checkpoint_only_where_a_config_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "here" / "m").mkdir(parents=True)
    (tmp_path / "here" / "tower").mkdir()
    near = tmp_path / "here" / "m"
    for name in ("somewhere/far/tower", "somewhere/far/tower/", "../tower"):
        found = find_local(name, near)
        assert found is not None and found.resolve() == tmp_path / "here" / "tower"
    monkeypatch.chdir(tmp_path / "here")
    assert find_given("somewhere/far/tower") is None
    assert find_given(str(tmp_path / "gone" / "tower")) is None
    assert find_given("tower/") == Path("tower")
    assert find_local("///", near) is None
    for name in ("", "a\0b", "x" * 5000, "~nobody-of-this-name/x"):
        assert find_local(name, near) is find_given(name) is None


def test_our_own_format_reads_only_its_own_tokenizer(
    llava: Llava, tiny_tokenizer, tmp_path: Path
) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m", tiny_tokenizer)
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"of another model")
    assert find_tokenizer(tmp_path / "m") == tmp_path / "m" / "tokenizer.json"


def test_only_our_own_folders_with_a_manifest_are_trusted(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "own")
    assert open_source(tmp_path / "own").trusted
    (tmp_path / "own" / "manifest.json").unlink()
    source = open_source(tmp_path / "own")
    assert (source.trusted, source.family) == (False, "llava_lite")
    folder = write_layout("hf-old", tmp_path, hf_state(llava))
    assert (open_source(folder).trusted, open_source(folder).family) == (False, "llava-hf")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llava_hf_config()))
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_source(tmp_path)


def test_missing_tower_says_how_to_get_it(llava: Llava, tmp_path: Path) -> None:
    state = hf_state(llava)
    folder = write_official(tmp_path / "m", state, tower="openai/clip-nowhere")
    with pytest.raises(CheckpointError, match=r"openai/clip-nowhere.*1\.7 GB.*--vision-tower"):
        open_source(folder)
    tower = renamed(part(state, "vision_tower."), (r"^vision_tower\.", ""))
    write_folder(tmp_path / "clip-nowhere", clip_config(), {"pytorch_model.bin": tower})
    assert open_source(folder).config.vision == TINY_CONFIG.vision  # found beside the checkpoint


def test_a_tower_inside_wins_over_one_given(llava: Llava, tmp_path: Path) -> None:
    inside = write_layout("official-tower-inside", tmp_path / "a", hf_state(llava))
    write_layout("official", tmp_path / "b", hf_state(random_llava(seed=5)))
    with pytest.warns(UserWarning, match="own vision tower"):
        loaded = load_model(inside, vision_tower=tmp_path / "b" / "tower")
    name = "vision.blocks.0.mlp.fc1.weight"
    assert torch.equal(loaded.state_dict()[name], llava.state_dict()[name])


def test_base_is_refused_where_it_has_no_meaning(hf_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="needs no base"):
        open_source(hf_folder, base=hf_folder)


def test_the_projector_that_an_official_config_leaves_out_is_linear() -> None:
    raw = official_config()
    assert parse(raw).projector_depth == 1
    assert parse({**raw, "mm_projector_type": "mlp3x_gelu"}).projector_depth == 3
    base = {name: value for name, value in raw.items() if not name.startswith("mm_")}
    assert parse(base).projector_depth == 2  # a Llama base says nothing, LLaVA-1.5 has two


def test_transformers_5_rope_parameters_are_read() -> None:
    raw = llava_hf_config()
    raw["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert parse(raw).text.rope_theta == 5e5
    raw["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "llama3"}
    with pytest.raises(ValueError, match="rope_type"):
        parse(raw)
