"""Parse the config.json of the published families: llava-hf (nested), official (flat), FastVLM."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_lite.config import FastViTHDConfig, LlavaConfig, TextConfig, VisionConfig
from llava_lite.errors import CheckpointError

# Our fields -> the published fields.
TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
FASTVLM = "llava_qwen2"  # the model_type of published FastVLM folders
QWEN2_FIELDS = TEXT_FIELDS | {
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
}
QWEN2_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
# Of a FastVLM config: the values that this model has. A missing field has the first one.
FASTVLM_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
    "mm_use_im_start_end": (False,),
}
# Of the `vision_config` of exports; Apple's own config has none.
FASTVITHD_VALUES = {
    "mlp_ratios": ([4] * 5,),
    "token_mixers": (["repmixer"] * 3 + ["attention"] * 2,),
    "repmixer_kernel_size": (3,),
    "down_patch_size": (7,),
    "down_stride": (2,),
    "cls_ratio": (2.0,),
}
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
}


def family(raw: dict[str, Any]) -> str:
    """The family of a config.json: "llava_lite", "fastvlm", "llava-hf" (nested) or "official"
    (flat, also Llama). Raises ValueError for any other."""
    if raw.get("format") == "llava_lite":
        return "llava_lite"
    if raw.get("model_type") == FASTVLM:
        return "fastvlm"
    if raw.get("model_type") in ("fast_vlm", "fastvlm"):
        raise ValueError(
            f"model_type {raw['model_type']!r} is a conversion of FastVLM; give the published "
            f"folder, whose model_type is {FASTVLM!r}"
        )
    if "text_config" in raw and "vision_config" in raw:
        return "llava-hf"
    if "hidden_size" in raw:
        return "official"
    raise ValueError("neither a llava_lite, a llava-hf nor an official LLaVA / Llama config")


def parse(raw: dict[str, Any], vision: dict[str, Any] | None = None) -> LlavaConfig:
    """Parse a config.json of any family. `vision`: the config.json of a separate CLIP folder.

    Raises ValueError if the config describes another architecture."""
    kind = family(raw)
    if kind == "llava_lite":
        return LlavaConfig.from_dict(raw)
    if kind == "fastvlm":
        return parse_fastvlm(raw)
    return parse_llava_hf(raw) if kind == "llava-hf" else parse_official(raw, vision)


def parse_config(raw: dict[str, Any], vision: dict[str, Any] | None, path: Path) -> LlavaConfig:
    """`parse`, with a CheckpointError that names the file for every problem."""
    try:
        config = parse(raw, vision)
        for part in (config.vision, config.text):
            for name, value in vars(part).items():
                for number in value if isinstance(value, tuple) else (value,):
                    check_field(name, number)
        check_number("projector_depth", config.projector_depth)
        return config
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_field(name: str, value: object) -> None:
    """Raise ValueError for an impossible field of the tower or the decoder."""
    if name in ("attention_bias", "tie_embeddings"):
        if not isinstance(value, bool):
            raise ValueError(f"{name} {value!r} is neither true nor false")
    elif not (name == "num_kv_heads" and value is None):
        check_number(name, value)


def check_number(name: str, value: object) -> None:
    """Raise ValueError for an impossible field, before a model of this size is built."""
    signed = name.endswith(("_id", "_ids")) or name == "feature_layer"
    limits = {"num_layers": 1024, "depths": 1024, "image_size": 1 << 14, "patch_size": 1 << 14}
    lowest, highest = -1024 if signed else 0, limits.get(name, 1 << 24)
    kinds = (int, float) if name.endswith("_eps") or name == "rope_theta" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} {value!r} is no {'number' if float in kinds else 'integer'}")
    if not lowest <= value <= highest or (value == 0 and not signed):
        raise ValueError(f"{name} {value!r} is out of range")


def parse_llava_hf(raw: dict[str, Any]) -> LlavaConfig:
    """Parse a llava-hf config. It is nested; a missing field has the value of 7B or CLIP-L/336."""
    text_raw = {"vocab_size": raw.get("vocab_size", 32064), **raw["text_config"]}
    layer = raw.get("vision_feature_layer", -2)
    strategy = raw.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy not in ("default", "patch"):
        raise ValueError(f"unsupported vision features: layer {layer!r}, strategy {strategy!r}")
    if raw.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"unsupported projector_hidden_act {raw['projector_hidden_act']!r} (supported: 'gelu')"
        )
    vision = replace(parse_vision(raw["vision_config"]), feature_layer=layer)
    image_id = raw.get("image_token_index", raw.get("image_token_id", 32000))
    text = parse_text(text_raw)
    if not isinstance(image_id, int) or image_id <= max(text.bos_id, text.eos_id):
        raise ValueError(f"image_token_index {image_id!r} is an ordinary text id")
    # Text ids end at the image marker, also in vocabularies smaller than Llama's.
    text = replace(text, sampled_vocab_size=min(text.sampled_vocab_size, image_id))
    return LlavaConfig(vision=vision, text=text, name="llava-hf")


def parse_official(raw: dict[str, Any], vision: dict[str, Any] | None = None) -> LlavaConfig:
    """Parse an official config (flat Llama fields and `mm_*`), or a Llama base without `mm_*`.

    A missing field of a LLaVA config means one linear layer, or images without padding. A Llama
    base gets LLaVA-1.5's projector and padding."""
    if raw.get("mm_use_im_start_end") or raw.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            "mm_use_im_start_end and mm_vision_select_feature != patch are unsupported"
        )
    feature_layer = raw.get("mm_vision_select_layer", -2)
    is_llava = any(key.startswith("mm_") for key in raw)
    default_projector, default_aspect = ("linear", None) if is_llava else ("mlp2x_gelu", "pad")
    return LlavaConfig(
        vision=replace(parse_vision(vision or {}), feature_layer=feature_layer),
        text=parse_text(raw),
        projector_depth=projector_depth(raw.get("mm_projector_type", default_projector)),
        pad=raw.get("image_aspect_ratio", default_aspect) == "pad",
        name="llava-official",
    )


def parse_fastvlm(raw: dict[str, Any]) -> LlavaConfig:
    """Parse a FastVLM config: flat Qwen2 fields and `mm_*`. The tokenizer knows how many ids of the
    vocabulary are text; see `opening.count_ids`."""
    refuse_values(raw, FASTVLM_VALUES)
    aspect = raw.get("image_aspect_ratio")
    if "anyres" in str(aspect):  # tiles of one image; no published FastVLM has it
        raise ValueError(f"not supported: image_aspect_ratio = {aspect!r}")
    vision = parse_fastvithd(raw)
    if raw.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"mm_hidden_size {raw['mm_hidden_size']!r}, but the tower's features are "
            f"{vision.hidden_size} wide"
        )
    text = TextConfig(
        **rename_fields(QWEN2_DEFAULTS | raw, QWEN2_FIELDS, required=True),
        sampled_vocab_size=raw["vocab_size"],
        attention_bias=True,
    )
    return LlavaConfig(
        vision=vision,
        # <|endoftext|>, which the config calls BOS, ends an answer too. No prompt begins with it.
        text=replace(text, stop_ids=(text.bos_id,)),
        projector_depth=projector_depth(raw.get("mm_projector_type", "linear")),
        pad=aspect == "pad",
        template="qwen_2",
        name="fastvlm",
    )


def parse_fastvithd(raw: dict[str, Any]) -> FastViTHDConfig:
    """The tower of a FastVLM config. Its name holds the only record of the input size:
    `mobileclip_l_1024`. `vision_config` overrides depths and widths."""
    name, sizes = raw.get("mm_vision_tower"), raw.get("vision_config") or {}
    known = re.fullmatch(r"mobileclip_([a-z]+)_(\d+)", name) if isinstance(name, str) else None
    if known is None or not (known[1] == "l" or sizes):
        raise ValueError(
            f"mm_vision_tower {name!r} is not supported (supported: mobileclip_l_SIZE)"
        )
    refuse_values(sizes, FASTVITHD_VALUES)
    fields = rename_fields(sizes, {"depths": "layers", "widths": "embed_dims"})
    return FastViTHDConfig(image_size=int(known[2]), **fields)


def refuse_values(raw: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    """Raise ValueError for a field with another value than the supported ones."""
    for name, values in supported.items():
        value = raw.get(name, values[0])
        if value not in values:
            raise ValueError(f"not supported: {name} = {value!r}")


def projector_depth(kind: str) -> int:
    """The number of linear layers of an `mm_projector_type`: "linear" 1, "mlpNx_gelu" N."""
    if kind == "linear":
        return 1
    if kind.startswith("mlp") and kind.endswith("x_gelu") and kind[3:-6].isdigit():
        return int(kind[3:-6])
    raise ValueError(f"unsupported mm_projector_type {kind!r}")


def parse_text(raw: dict[str, Any]) -> TextConfig:
    """Parse the Llama fields of any family."""
    heads = raw.get("num_attention_heads", 32)
    rope = raw.get("rope_parameters") or {}  # transformers 5 writes rope_theta here
    refused = {
        "num_key_value_heads": (raw.get("num_key_value_heads", heads), heads),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "rope_scaling": (raw.get("rope_scaling"), None),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "tie_word_embeddings": (raw.get("tie_word_embeddings", False), False),
        "attention_bias": (raw.get("attention_bias", False), False),
    }
    for name, (value, supported) in refused.items():
        if value != supported:
            raise ValueError(f"unsupported {name} {value!r} (supported: {supported!r})")
    config = TextConfig(**rename_fields(raw, TEXT_FIELDS))
    return replace(
        config,
        rope_theta=float(raw.get("rope_theta", rope.get("rope_theta", config.rope_theta))),
        sampled_vocab_size=min(config.vocab_size, config.sampled_vocab_size),
    )


def parse_vision(raw: dict[str, Any]) -> VisionConfig:
    """Parse the CLIP vision fields; a full CLIP config has them under `vision_config`."""
    raw = raw.get("vision_config", raw)
    if raw.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"unsupported vision hidden_act {raw['hidden_act']!r} (need quick_gelu)")
    return VisionConfig(**rename_fields(raw, VISION_FIELDS))


def rename_fields(
    raw: dict[str, Any], names: dict[str, str], required: bool = False
) -> dict[str, Any]:
    """The published fields by our names. A missing field is left out: it has our default. Raises
    ValueError for a missing one if they are required."""
    missing = [theirs for theirs in names.values() if theirs not in raw]
    if required and missing:
        raise ValueError(f"{missing[0]} is missing")
    return {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}
