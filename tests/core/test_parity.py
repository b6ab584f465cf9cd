"""Parity with independent implementations: transformers' LLaVA and open_clip's CLIP.

Run: pytest tests/core/test_parity.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from helpers.models import TINY_CONFIG, random_llava
from helpers.peers import peer
from llava_lite.checkpoints.checkpoint import load_model, save_model, vision_state_from_open_clip
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.export import hf_documents
from llava_lite.checkpoints.names import our_names
from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.errors import CheckpointError
from llava_lite.llava import Llava
from llava_lite.vision import VisionTower

RANDOM = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_"}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return peer("transformers")


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    return peer("open_clip")


class WithoutInit(TorchFunctionMode):
    """Skips random initialization, which at full size takes longer than the test."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(func, "__name__", "") in RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def fill(module: nn.Module, scale: float = 1.0) -> None:
    """Random weights of unit gain, from one block of noise: fast at any size."""
    noise = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(3))
    start = 0
    with torch.no_grad():
        for name, weight in module.named_parameters():
            flat = weight.view(-1)
            for part in flat.split(1 << 19):
                part.copy_(noise[start : start + len(part)])
                start = (start + 7919) % (1 << 19)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            if weight.ndim > 1:
                weight *= scale * weight[0].numel() ** -0.5
            else:
                weight *= 0.1
            if is_norm:
                weight += 1


def reference_llava(transformers: ModuleType, config: LlavaConfig, **changes: object) -> nn.Module:
    """transformers' model for a config of ours, with random weights, and one more vision block."""
    raw = hf_documents(config, True, config.text.vocab_size, torch.float32)["config.json"]
    raw = {name: value for name, value in raw.items() if name != "torch_dtype"} | changes
    for part in ("text_config", "vision_config"):
        raw[part] = {k: v for k, v in raw[part].items() if k != "torch_dtype"}
    with WithoutInit():
        reference = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**raw))
    reference.eval()
    fill(reference)
    return reference


def adopt(reference: nn.Module, config: LlavaConfig) -> Llava:
    """Our model on the very same tensors, renamed in memory."""
    model = meta_model(config)
    wanted = model.state_dict()
    state = {our_names(name)[0]: tensor for name, tensor in reference.state_dict().items()}
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return model


def compare(
    reference: nn.Module, model: Llava, input_ids: list[int], images: int
) -> tuple[Tensor, Tensor]:
    """All logits of both, for ids where -200 stands for an image."""
    size, patches = model.config.vision.image_size, model.config.vision.num_patches
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))
    image_id = reference.config.image_token_id
    expanded = [e for i in input_ids for e in ([image_id] * patches if i == -200 else [i])]
    options = {"pixel_values": pixels} if images else {}
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor([expanded]), **options).logits
        ours, _, position = model.prefill(
            torch.tensor([input_ids]), pixels if images else None, all_logits=True
        )
    assert position == len(expanded)
    return ours, theirs


PROMPTS = [([1, 5, 9, -200, 13, 7, 4], 1), ([1, -200, 8, 3, -200, 12], 2), ([1, 5, 9, 17, 44], 0)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["one image", "two images", "no image"])
def test_tiny_llava_equals_transformers(transformers: ModuleType, prompt: tuple) -> None:
    reference = reference_llava(transformers, TINY_CONFIG)
    ours, theirs = compare(reference, adopt(reference, TINY_CONFIG), *prompt)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_cached_tokens_equal_those_of_transformers(transformers: ModuleType) -> None:
    reference = reference_llava(transformers, TINY_CONFIG)
    model = adopt(reference, TINY_CONFIG)
    size, image_id = TINY_CONFIG.vision.image_size, reference.config.image_token_id
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    ids = [1, 9, *[image_id] * 16, 12, 30]
    theirs = reference.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    with torch.no_grad():
        logits, cache, position = model.prefill(torch.tensor([[1, 9, -200, 12, 30]]), pixels)
        ours = [int(logits.argmax())]
        while len(ours) < 12:
            logits, cache = model.decode(torch.tensor(ours[-1:]), position, cache)
            position += 1
            ours.append(int(logits.argmax()))
    assert len(set(ours)) > 1  # an untrained model repeats itself, but not only one token
    assert ours == theirs


def test_folders_saved_by_transformers_load(transformers: ModuleType, tmp_path: Path) -> None:
    reference = reference_llava(transformers, TINY_CONFIG)
    reference.save_pretrained(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    save_file(state, tmp_path / "raw" / "model.safetensors")
    config = (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "raw" / "config.json").write_text(config)
    for folder in ("saved", "raw"):
        model = load_model(tmp_path / folder)
        assert model.config.vision == TINY_CONFIG.vision
        assert model.config.text == TINY_CONFIG.text
        ours, theirs = compare(reference, model, *PROMPTS[0])
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("from_ours", [True, False], ids=["from ours", "from llava-hf"])
def test_converted_to_hf_loads_in_transformers(
    transformers: ModuleType, from_ours: bool, tiny_tokenizer, tmp_path: Path
) -> None:
    llava = random_llava()
    if from_ours:
        save_model(llava, TINY_CONFIG, tmp_path / "m", tiny_tokenizer)
    else:
        reference_llava(transformers, TINY_CONFIG).save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "hf", to="hf", dtype=None, shard_size=200_000)
    loaded, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert {name: problems for name, problems in report.items() if problems} == {}
    model = load_model(tmp_path / "m")
    ours, theirs = compare(loaded.eval(), model, *PROMPTS[0])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    if from_ours:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        expected = tiny_tokenizer.encode_prompt("USER: <image>\nWhat color?")
        image_id = TINY_CONFIG.text.sampled_vocab_size
        expected = [image_id if token == -200 else token for token in expected]
        assert tokenizer("USER: <image>\nWhat color?").input_ids == expected
        assert json.loads((tmp_path / "hf" / "processor_config.json").read_text())["patch_size"]


# Full size


def full_open_clip(open_clip: ModuleType, name: str) -> nn.Module:
    """An open_clip model with its full visual tower, and next to no text tower."""
    config = open_clip.get_model_config(name)
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    with WithoutInit():
        return open_clip.CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=config["vision_cfg"],
            text_cfg=text,
            quick_gelu=config.get("quick_gelu", False),
        )


@pytest.mark.slow
def test_full_size_open_clip_tower(open_clip: ModuleType) -> None:
    clip = full_open_clip(open_clip, "ViT-L-14-336-quickgelu").eval()
    fill(clip.visual)
    assert sum(weight.numel() for weight in clip.visual.parameters()) == 304_293_888
    seen: list[Tensor] = []
    for block in clip.visual.transformer.resblocks[22:]:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        tower = VisionTower(VisionConfig())
    tower.load_state_dict(vision_state_from_open_clip(clip), assign=True)
    with torch.no_grad():
        clip.visual(pixels)
        ours = tower(pixels).image_features
    theirs = seen[0].reshape(577, 1024)[None, 1:]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    # All 24 blocks, the last of which LLaVA never runs.
    whole = VisionConfig(feature_layer=-1)
    with torch.device("meta"):
        tower = VisionTower(whole)
    assert len(tower.blocks) == 24
    tower.load_state_dict(vision_state_from_open_clip(clip, whole), assign=True)
    with torch.no_grad():
        ours = tower(pixels).image_features
    theirs = seen[1].reshape(577, 1024)[None, 1:]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_open_clip_model_as_the_tower_of_an_official_folder(
    open_clip: ModuleType, tmp_path: Path
) -> None:
    config = LlavaConfig(
        vision=VisionConfig(
            image_size=28, hidden_size=64, intermediate_size=256, num_layers=3, num_heads=1
        ),
        text=TINY_CONFIG.text,
    )
    vision = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 3, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    clips = [
        open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=quick)
        for quick in (True, False)
    ]
    fill(clips[0].visual)
    llava = random_llava(config)
    state = official_state(llava)
    raw = {
        "hidden_size": 64,
        "vocab_size": 320,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mm_projector_type": "mlp2x_gelu",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_model(tmp_path, vision_tower=clips[0])
    assert loaded.config.vision == config.vision
    weight = clips[0].visual.transformer.resblocks[1].attn.in_proj_weight
    assert torch.equal(loaded.vision.blocks[1].attn.k_proj.weight, weight[64:128])
    with pytest.raises(CheckpointError, match="QuickGELU"):
        load_model(tmp_path, vision_tower=clips[1])


def official_state(llava: Llava) -> dict[str, Tensor]:
    """Decoder and projector under official names."""
    from llava_lite.checkpoints.names import hf_name

    state = {}
    for name, tensor in llava.state_dict().items():
        stored = hf_name(name).removeprefix("language_model.")
        stored = stored.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        stored = stored.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        if not name.startswith("vision."):
            state[stored] = tensor.clone()
    return state


@pytest.mark.slow
def test_llava_with_7b_widths_equals_transformers(transformers: ModuleType) -> None:
    config = LlavaConfig(
        vision=VisionConfig(num_layers=3),
        text=TextConfig(vocab_size=1000, sampled_vocab_size=990, num_layers=2),
    )
    reference = reference_llava(transformers, config)
    ours, theirs = compare(reference, adopt(reference, config), [1, 5, 9, -200, 13, 7, 4], 1)
    assert ours.shape == (1, 576 + 6, 1000)
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-3, error
