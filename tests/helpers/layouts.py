"""Checkpoints in every published layout, written by hand."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import TINY_CONFIG
from llava_lite.checkpoints.names import hf_name
from llava_lite.config import LlavaConfig
from llava_lite.llava import Llava

State = dict[str, Tensor]


def hf_state(llava: Llava) -> State:
    """llava-hf, old names, with a last vision block and a final norm as published files have."""
    state = {hf_name(name): tensor for name, tensor in llava.state_dict().items()}
    vision = TINY_CONFIG.vision
    last, first = f".layers.{vision.num_blocks}.", ".layers.0."
    extra = {
        name.replace(first, last): tensor + 1
        for name, tensor in state.items()
        if name.startswith("vision_tower.") and first in name
    }
    for kind in ("weight", "bias"):
        extra[f"vision_tower.vision_model.post_layernorm.{kind}"] = torch.ones(vision.hidden_size)
    return state | extra


def renamed(state: State, *rules: tuple[str, str]) -> State:
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


NEW_STYLE = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)


OFFICIAL_STYLE = (
    (r"^language_model\.", ""),
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
)


OPENAI_STYLE = (
    (r"^vision_tower\.vision_model\.", "visual."),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    (r"encoder\.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def part(state: State, prefix: str, inside: bool = True) -> State:
    return {n: tensor for n, tensor in state.items() if n.startswith(prefix) == inside}


def openai_tower(state: State) -> State:
    """`visual.*` names with q, k, v packed in one tensor, and a text tower to be ignored."""
    tower = renamed(part(state, "vision_tower."), *OPENAI_STYLE)
    for name in [name for name in tower if ".self_attn.q_proj." in name]:
        packed = torch.cat([tower.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"])
        tower[name.replace("self_attn.q_proj.", "attn.in_proj_")] = packed
    tower["visual.proj"] = torch.zeros(2, 2)
    tower["transformer.resblocks.0.ln_1.weight"] = torch.zeros(2)
    tower["positional_embedding"] = torch.zeros(77, 2)
    return tower | {"logit_scale": torch.tensor(1.0), "input_resolution": torch.tensor(336)}


def llava_hf_config(config: LlavaConfig = TINY_CONFIG) -> dict:
    text, vision = config.text, config.vision
    return {
        "model_type": "llava",
        "image_token_index": text.sampled_vocab_size,
        "text_config": {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.max_positions,
        },
        "vision_config": clip_config(config)["vision_config"],
        "vision_feature_layer": vision.feature_layer,
    }


def clip_config(config: LlavaConfig = TINY_CONFIG) -> dict:
    vision = config.vision
    return {
        "model_type": "clip",
        "vision_config": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
        },
    }


def official_config(tower: str = "openai/clip-tiny") -> dict:
    text = llava_hf_config()["text_config"]
    return {"model_type": "llava", **text, "mm_vision_tower": tower, "mm_vision_select_layer": -2}


def write_folder(folder: Path, config: dict, shards: dict[str, State]) -> Path:
    """Weights in the given files, with an index when there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, state in shards.items():
        write = save_file if file.endswith(".safetensors") else torch.save
        write({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, state in shards.items() for name in state}
        kind = "model.safetensors" if "model-1.safetensors" in shards else "pytorch_model.bin"
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_official(folder: Path, state: State, tower: str = "tower", **extra: Tensor) -> Path:
    """Two .bin shards without a tower, with the rotary buffers that have to be ignored."""
    state = renamed(part(state, "vision_tower.", inside=False), *OFFICIAL_STYLE) | extra
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    names = sorted(state)
    halves = [{n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}]
    shards = {f"pytorch_model-{i}.bin": half for i, half in enumerate(halves, start=1)}
    return write_folder(folder, official_config(tower), shards)


def write_layout(style: str, folder: Path, state: State) -> Path:
    """Write the llava-hf state in another layout; returns the checkpoint's folder."""
    if style.startswith("hf"):
        rules = {
            "hf-old": (),
            "hf-new": NEW_STYLE,
            "hf-v5": (*NEW_STYLE, (r"vision_tower\.vision_model", "vision_tower")),
            "hf-wrapped": (*NEW_STYLE, (r"^", "module.")),
        }[style]
        named = renamed(state, *rules)
        names = sorted(named)
        shards = {
            f"model-{i}.safetensors": {n: named[n] for n in names[i - 1 :: 2]} for i in (1, 2)
        }
        return write_folder(folder / "m", llava_hf_config(), shards)
    tower = part(state, "vision_tower.")
    if style == "official-tower-inside":
        inside = renamed(tower, (r"^", "model.vision_tower."))
        return write_official(folder / "m", state, **inside)
    if style in ("official-openai-tower", "official-openai-repository"):
        named = openai_tower(state)
    elif style == "official-bare-openai-tower":
        named = {
            n.removeprefix("visual."): t for n, t in part(openai_tower(state), "visual.").items()
        }
    else:
        prefix = "" if style == "official-bare-tower" else "vision_model."
        named = renamed(tower, (r"^vision_tower\.vision_model\.", prefix))
        named["text_model.embeddings.position_ids"] = torch.arange(3)
        named["visual_projection.weight"] = torch.zeros(2, 2)
    shards = {"pytorch_model.bin": named}
    if style == "official-openai-repository":  # it holds the weights again, under timm's names
        timm = {"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(3)}
        shards = {"open_clip_pytorch_model.bin": named, "model.safetensors": timm}
    tower_folder = write_folder(folder / "tower", clip_config(), shards)
    (tower_folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    return write_official(folder / "m", state, tower="../tower")


STYLES = (
    "hf-old",
    "hf-new",
    "hf-v5",
    "hf-wrapped",
    "official",
    "official-tower-inside",
    "official-openai-tower",
    "official-bare-openai-tower",
    "official-bare-tower",
    "official-openai-repository",
)


class Golden:
    """The reference's tiny model: prompts, logits, hidden states."""

    def __init__(self, shared: Path) -> None:
        self.folder = shared / "goldens" / "llava" / "tiny"
        self.tensors = load_file(self.folder / "tiny_goldens.safetensors")
        self.facts = json.loads((self.folder / "tiny_goldens.json").read_text())

    def inputs(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        facts = self.facts["prompts"][prompt]
        images = facts["image_index"]
        pixels = self.tensors["pixel_values"][images] if images else None
        return torch.tensor([facts["ids_official_style"]]), pixels


def new_style(golden: Golden) -> State:
    old = load_file(golden.folder / "hf_layout" / "model.safetensors")
    styles = json.loads((golden.folder / "key_styles.json").read_text())
    return {new: old[name] for new, name in styles["map_new_style_to_old_style"].items()}


def golden_folder(golden: Golden, layout: str, tmp_path: Path) -> tuple[Path, Path | None]:
    """The checkpoint folder of a layout, and the tower to give with it."""
    if layout in ("new", "v5"):
        state = new_style(golden)
        if layout == "v5":
            state = renamed(state, (r"vision_tower\.vision_model", "vision_tower"))
        config = json.loads((golden.folder / "hf_layout" / "config.json").read_text())
        return write_folder(tmp_path / "m", config, {"model.safetensors": state}), None
    if layout == "openai-tower":
        return golden.folder / "official_layout", golden.folder / "openclip_visual.safetensors"
    return golden.folder / layout, None


LAYOUTS = ["hf_layout", "new", "v5", "official_layout", "openai-tower"]
