"""Tensor names of every published checkpoint layout -> our names. Conversion only renames.

A stored name is normalized (`PREFIXES`), then looked up in one table per family. `{}` stands for a
layer number, `.*` for `.weight` and `.bias`. `IGNORED` lists the tensors that are never read. Any
other name is an error. Our vision names cover the whole CLIP tower; `is_unused` tells which blocks
a model does not build.
"""

import re

from llava_lite.checkpoints.names_fastvithd import IGNORED as IGNORED_FASTVITHD
from llava_lite.checkpoints.names_fastvithd import PREFIX, fastvithd_name, published_name
from llava_lite.config import FastViTHDConfig, TowerConfig
from llava_lite.errors import CheckpointError

SHARD_SIZE = 2_000_000_000  # default bytes of tensors in one weight file

# Prefixes of wrappers, library versions and containers. Each is applied once, in this order.
PREFIXES = (
    (r"(module\.|base_model\.model\.)+", ""),  # DataParallel, peft
    (r"(.*\.)?mm_projector\.", "mm_projector."),  # official, projector files
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),  # llava-hf old; new
    (r"model\.language_model\.", "model."),  # llava-hf new
    (r"language_model\.(model|lm_head)\.", r"\1."),  # llava-hf old
    (r"(model\.)?(vision_tower\.)+(vision_model\.)?", "vision_model."),  # llava-hf; tower inside
    (r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),  # bare tower
)

LLAMA = {
    "model.embed_tokens.weight": "decoder.embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight": "decoder.layers.{}.input_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "decoder.layers.{}.attn.q_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight": "decoder.layers.{}.attn.k_proj.weight",
    "model.layers.{}.self_attn.v_proj.weight": "decoder.layers.{}.attn.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight": "decoder.layers.{}.attn.o_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight": "decoder.layers.{}.post_attn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "decoder.layers.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "decoder.layers.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "decoder.layers.{}.mlp.down_proj.weight",
    "model.norm.weight": "decoder.norm.weight",
    "lm_head.weight": "decoder.lm_head.weight",
}

# The odd numbers of an official projector are activations; a "linear" projector has no number.
PROJECTOR_OFFICIAL = {
    "mm_projector.*": "projector.layers.0.*",
    "mm_projector.0.*": "projector.layers.0.*",
    "mm_projector.2.*": "projector.layers.1.*",
    "mm_projector.4.*": "projector.layers.2.*",
    "mm_projector.6.*": "projector.layers.3.*",
}

# Qwen2 has biases where Llama has none.
QWEN2 = {
    f"model.layers.{{}}.self_attn.{part}_proj.bias": (f"decoder.layers.{{}}.attn.{part}_proj.bias",)
    for part in "qkv"
}

PROJECTOR_HF = {
    "multi_modal_projector.linear_1.*": "projector.layers.0.*",
    "multi_modal_projector.linear_2.*": "projector.layers.1.*",
}

CLIP_HF = {
    "vision_model.embeddings.class_embedding": "vision.class_embed",
    "vision_model.embeddings.patch_embedding.weight": "vision.patch_embed.weight",
    "vision_model.embeddings.position_embedding.weight": "vision.pos_embed",
    "vision_model.pre_layrnorm.*": "vision.pre_norm.*",
    "vision_model.encoder.layers.{}.layer_norm1.*": "vision.blocks.{}.norm1.*",
    "vision_model.encoder.layers.{}.self_attn.q_proj.*": "vision.blocks.{}.attn.q_proj.*",
    "vision_model.encoder.layers.{}.self_attn.k_proj.*": "vision.blocks.{}.attn.k_proj.*",
    "vision_model.encoder.layers.{}.self_attn.v_proj.*": "vision.blocks.{}.attn.v_proj.*",
    "vision_model.encoder.layers.{}.self_attn.out_proj.*": "vision.blocks.{}.attn.o_proj.*",
    "vision_model.encoder.layers.{}.layer_norm2.*": "vision.blocks.{}.norm2.*",
    "vision_model.encoder.layers.{}.mlp.fc1.*": "vision.blocks.{}.mlp.fc1.*",
    "vision_model.encoder.layers.{}.mlp.fc2.*": "vision.blocks.{}.mlp.fc2.*",
    "vision_model.post_layernorm.*": "vision.post_norm.*",
}

CLIP_OPENAI = {
    "visual.class_embedding": "vision.class_embed",
    "visual.conv1.weight": "vision.patch_embed.weight",
    "visual.positional_embedding": "vision.pos_embed",
    "visual.ln_pre.*": "vision.pre_norm.*",
    "visual.transformer.resblocks.{}.ln_1.*": "vision.blocks.{}.norm1.*",
    "visual.transformer.resblocks.{}.attn.out_proj.*": "vision.blocks.{}.attn.o_proj.*",
    "visual.transformer.resblocks.{}.ln_2.*": "vision.blocks.{}.norm2.*",
    "visual.transformer.resblocks.{}.mlp.c_fc.*": "vision.blocks.{}.mlp.fc1.*",
    "visual.transformer.resblocks.{}.mlp.c_proj.*": "vision.blocks.{}.mlp.fc2.*",
    "visual.ln_post.*": "vision.post_norm.*",
}

# One tensor holds q, k and v as three equal row blocks, in this order.
PACKED_OPENAI = {
    f"visual.transformer.resblocks.{{}}.attn.in_proj_{kind}": tuple(
        f"vision.blocks.{{}}.attn.{part}_proj.{kind}" for part in "qkv"
    )
    for kind in ("weight", "bias")
}

IGNORED = (
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # recomputed in float32
    r"vision_model\.embeddings\.position_ids",  # 0, 1, 2, ...
    r"text_model\..*",  # CLIP's text tower, HF names
    r"(visual|text)_projection\.weight|logit_scale|logit_bias",  # CLIP's contrastive head
    r"visual\.proj|text_projection",  # the same, OpenAI names
    r"positional_embedding|token_embedding\.weight|ln_final\.(weight|bias)|attn_mask",
    r"transformer\.resblocks\..*",  # CLIP's text tower, OpenAI names
    r"input_resolution|context_length|vocab_size",  # scalars of the OpenAI archive
)

# The tower inside a FastVLM checkpoint, normalized. Its tensors that have no name of ours belong to
# the training form; opening.py folds them.
FASTVITHD_PREFIX, TRAINING = "vision_model.model.", "training."

LORA_NAME = re.compile(r"(.+)\.lora_([AB])(\.[^.]+)?\.weight")


def expand(table: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Expand each `.*` to `.weight` and `.bias`. Every value becomes a tuple."""
    full: dict[str, tuple[str, ...]] = {}
    for stored, ours in table.items():
        if stored.endswith(".*"):
            for kind in ("weight", "bias"):
                full[f"{stored[:-1]}{kind}"] = (f"{ours[:-1]}{kind}",)
        else:
            full[stored] = (ours,)
    return full


HF_TABLES = expand(LLAMA | PROJECTOR_HF | CLIP_HF)
LOOKUP = HF_TABLES | expand(PROJECTOR_OFFICIAL | CLIP_OPENAI) | PACKED_OPENAI
TO_HF = {ours[0]: stored for stored, ours in HF_TABLES.items()}
PROJECTOR_NUMBERED = {n: ours for n, ours in PROJECTOR_OFFICIAL.items() if "." in n[:-2]}
FASTVLM = expand(LLAMA | {f"model.{n}": ours for n, ours in PROJECTOR_NUMBERED.items()}) | QWEN2
HF_CONTAINERS = {
    "model": "language_model.",
    "lm_head": "language_model.",
    "vision_model": "vision_tower.",
}


def normalize(name: str) -> str:
    """Replace the prefixes, so that each family has one spelling per tensor."""
    for prefix, replacement in PREFIXES:
        name = re.sub(f"^{prefix}", replacement, name)
    return name


def our_names(stored: str, qwen2: bool = False) -> tuple[str, ...]:
    """Our names of a stored tensor: one, three for a packed q, k, v, or none if it is ignored.

    qwen2: the decoder is a Qwen2. Raises CheckpointError for an unknown name."""
    if qwen2 and stored.startswith("language_model."):
        raise CheckpointError(
            f"tensor {stored!r} has the name of an MLX export; give the published folder instead"
        )
    name, table = normalize(stored), LOOKUP | QWEN2 if qwen2 else LOOKUP
    if name in table:
        return table[name]
    if name.startswith(FASTVITHD_PREFIX):
        return fastvithd_names(name.removeprefix(FASTVITHD_PREFIX))
    number = re.search(r"\.(\d+)\.", name)
    pattern = name if number is None else re.sub(r"\.\d+\.", ".{}.", name, count=1)
    if number is not None and pattern in table:
        return tuple(ours.replace("{}", number[1]) for ours in table[pattern])
    if any(re.fullmatch(ignored, name) for ignored in IGNORED):
        return ()
    raise CheckpointError(f"tensor {stored!r} belongs to no known layout")


def fastvithd_names(published: str) -> tuple[str, ...]:
    """As `our_names`, for a tensor of a FastViTHD tower."""
    if IGNORED_FASTVITHD.fullmatch(published):
        return ()
    ours = fastvithd_name(published)
    return (f"vision.{ours}" if ours else f"{TRAINING}{published}",)


def lora_target(stored: str) -> tuple[str, str] | None:
    """Parse a LoRA name: ("A" or "B", our name of the changed weight), or None for the tower's.

    Raises CheckpointError for any other name."""
    found = LORA_NAME.fullmatch(stored)
    if found is None:
        raise CheckpointError(f"tensor {stored!r} is no lora_A or lora_B weight")
    if re.search(r"vision_tower|vision_model|visual\.", found[1]):
        return None
    names = our_names(f"{found[1]}.weight")
    if len(names) != 1:
        raise CheckpointError(f"tensor {stored!r} changes no weight of the model")
    return found[2], names[0]


def hf_name(ours: str) -> str:
    """Our name -> the llava-hf name, in the old style that every transformers version reads.

    Raises KeyError for a tensor that llava-hf does not have, such as a third projector layer."""
    exact = TO_HF.get(ours)
    if exact is None:
        number = re.search(r"\.(\d+)\.", ours)
        pattern = re.sub(r"\.\d+\.", ".{}.", ours, count=1)
        exact = TO_HF[pattern].replace("{}", number[1] if number else "")
    return HF_CONTAINERS.get(exact.split(".")[0], "") + exact


def fastvlm_name(ours: str) -> str:
    """Our name -> the name in a published FastVLM folder. Raises KeyError for an unknown name."""
    tower = published_name(ours.removeprefix("vision."))
    if tower is not None:
        return f"{PREFIX}{tower}"
    part = re.sub(r"\.\d+\.", ".{}.", ours, count=1)
    number = re.search(r"\.(\d+)\.", ours)
    stored = next((stored for stored, (name,) in FASTVLM.items() if name in (ours, part)), None)
    if stored is None:
        raise KeyError(ours)
    return stored.replace("{}", number[1] if number else "")


def is_unused(ours: str, vision: TowerConfig) -> bool:
    """Whether LLaVA never runs this part of the tower: a later block, or the final norm."""
    if isinstance(vision, FastViTHDConfig):
        return False
    if ours.startswith("vision.post_norm."):
        return True
    block = re.match(r"vision\.blocks\.(\d+)\.", ours)
    return block is not None and vision.num_blocks <= int(block[1]) < vision.num_layers


def describe(names: list[str]) -> str:
    """Name the layout of stored names, for reports. Code decides by the config instead."""
    joined = "\n" + "\n".join(names)
    marks = (
        ("\nmodel.vision_tower.vision_tower.model.", "FastVLM, official"),
        ("\nlanguage_model.model.", "llava-hf, old names"),
        ("\nmodel.vision_tower.vision_tower.", "official, tower inside"),
        ("\nmodel.vision_tower.vision_model.", "llava-hf, new names"),
        ("\nmodel.language_model.", "llava-hf, v5 names"),
        ("\ndecoder.", "llava_lite"),
        ("model.layers.", "official" if "mm_projector." in joined else "Llama base"),
        ("\nvisual.", "CLIP tower, OpenAI names"),
        ("vision_model.", "CLIP tower, HF names"),
        ("mm_projector.", "projector"),
    )
    return next((layout for mark, layout in marks if mark in joined), "unknown")
