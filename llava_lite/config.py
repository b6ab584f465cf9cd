"""Facts of a checkpoint: frozen, parsed from its config.json, never changed by a call.

`LlavaConfig.from_dict` reads our own config.json; `parse_official` and `parse_llava_hf` read the
two published families (they share `model_type: "llava"`, so `parse` tells them apart by content).
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

MAX_PROJECTOR_DEPTH = 8  # published are 1 and 2; a name may say any number


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower, by default ViT-L/14 at 336 px. Sizes in pixels and channels."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-5
    feature_layer: int = -2

    @property
    def grid(self) -> int:
        """Patches along one side (24 for 336 px)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, the image tokens before any merging (576 for 336 px)."""
        return self.grid**2

    @property
    def num_blocks(self) -> int:
        """Blocks that run: entry `feature_layer` of the hidden states, where entry k is the output
        of k blocks. -2 of 24 layers means 23 blocks."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.num_layers + 1 + layer


@dataclass(frozen=True)
class TextConfig:
    """Llama decoder. Defaults: Llama-2 7B. `sampled_vocab_size`: ids from there on (image marker,
    padding, filler rows of llava-hf) are never generated."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    sampled_vocab_size: int = 32000
    bos_id: int = 1
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        """D, channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class LlavaConfig:
    """The whole stack: tower, projector depth (2 = `mlp2x_gelu`), decoder, and how prompts and
    images are prepared for it (`pad` to a square, chat `template`, tokenizer `legacy` mode)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projector_depth: int = 2
    pad: bool = True
    template: str = "vicuna_v1"
    legacy_tokenizer: bool = False
    name: str = "llava"

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of our config.json."""
        return {"format": "llava_lite", **asdict(self)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "LlavaConfig":
        """Read our config.json. Raises ValueError naming an unknown or missing field."""
        raw = {key: value for key, value in raw.items() if key != "format"}
        try:
            vision, text = VisionConfig(**raw.pop("vision")), TextConfig(**raw.pop("text"))
            return cls(vision=vision, text=text, **raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a llava_lite config: {error}") from error


def check(config: LlavaConfig) -> None:
    """Raise ValueError where sizes do not fit together."""
    vision, text = config.vision, config.text
    for name, part in (("vision", vision), ("text", text)):
        if part.hidden_size % part.num_heads:
            raise ValueError(
                f"{name}: hidden_size {part.hidden_size} is no multiple of {part.num_heads} heads"
            )
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}"
        )
    if not 1 <= vision.num_blocks <= vision.num_layers:
        raise ValueError(
            f"vision feature_layer {vision.feature_layer} is outside the {vision.num_layers} layers"
        )
    if text.head_dim % 2:
        raise ValueError(f"head_dim {text.head_dim} is odd, RoPE needs pairs")
    if not 1 <= config.projector_depth <= MAX_PROJECTOR_DEPTH:
        raise ValueError(
            f"projector_depth {config.projector_depth} must be between 1 and {MAX_PROJECTOR_DEPTH}"
        )


LLAVA_1_5_7B = LlavaConfig(name="llava-1.5-7b")
LLAVA_1_5_13B = LlavaConfig(
    text=TextConfig(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40),
    name="llava-1.5-13b",
)
TINY = LlavaConfig(
    vision=VisionConfig(hidden_size=192, intermediate_size=768, num_layers=7, num_heads=6),
    text=TextConfig(
        vocab_size=640,
        hidden_size=256,
        intermediate_size=640,
        num_layers=6,
        num_heads=8,
        max_positions=2048,
        sampled_vocab_size=640,
    ),
    name="llava-tiny-scenes",
)
PRESETS = {config.name: config for config in (LLAVA_1_5_7B, LLAVA_1_5_13B, TINY)}


def family(raw: dict[str, Any]) -> str:
    """Which config.json it is: "llava_lite", "llava-hf" (nested), "official" (flat; also a Llama).

    Raises ValueError for any other."""
    if raw.get("format") == "llava_lite":
        return "llava_lite"
    if "text_config" in raw and "vision_config" in raw:
        return "llava-hf"
    if "hidden_size" in raw:
        return "official"
    raise ValueError("neither a llava_lite, a llava-hf nor an official LLaVA / Llama config")


def parse(raw: dict[str, Any], vision: dict[str, Any] | None = None) -> LlavaConfig:
    """Parse any config.json: ours, llava-hf (nested `text_config`), official (flat `mm_*`).

    `vision` is the config.json of a separate CLIP tower folder, where the layout has one.
    Raises ValueError when the config describes another architecture."""
    kind = family(raw)
    if kind == "llava_lite":
        return LlavaConfig.from_dict(raw)
    return parse_llava_hf(raw) if kind == "llava-hf" else parse_official(raw, vision)


def parse_llava_hf(raw: dict[str, Any]) -> LlavaConfig:
    """llava-hf config: nested and sparse; an omitted field has the 7B / CLIP-L/336 value."""
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
    # Text ids end where the image marker is, also in vocabularies smaller than Llama's.
    text = replace(text, sampled_vocab_size=min(text.sampled_vocab_size, image_id))
    return LlavaConfig(vision=vision, text=text, name="llava-hf")


def parse_official(raw: dict[str, Any], vision: dict[str, Any] | None = None) -> LlavaConfig:
    """Official config (flat Llama fields + `mm_*`), or a plain Llama base without `mm_*`.

    A LLaVA config that leaves them out means one linear layer and images that are not padded; a
    Llama base says nothing about either, and gets LLaVA-1.5's."""
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


def projector_depth(kind: str) -> int:
    """Number of linear layers named by `mm_projector_type`: "linear" 1, "mlpNx_gelu" N."""
    if kind == "linear":
        return 1
    if kind.startswith("mlp") and kind.endswith("x_gelu") and kind[3:-6].isdigit():
        return int(kind[3:-6])
    raise ValueError(f"unsupported mm_projector_type {kind!r}")


def parse_text(raw: dict[str, Any]) -> TextConfig:
    """Llama fields of either family."""
    heads = raw.get("num_attention_heads", 32)
    rope = raw.get("rope_parameters") or {}  # how transformers 5 writes rope_theta
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
    vocab_size = raw.get("vocab_size", 32000)
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=raw.get("hidden_size", 4096),
        intermediate_size=raw.get("intermediate_size", 11008),
        num_layers=raw.get("num_hidden_layers", 32),
        num_heads=heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_theta=float(raw.get("rope_theta", rope.get("rope_theta", 10000.0))),
        max_positions=raw.get("max_position_embeddings", 4096),
        sampled_vocab_size=min(vocab_size, 32000),
        bos_id=raw.get("bos_token_id", 1),
        eos_id=raw.get("eos_token_id", 2),
    )


def parse_vision(raw: dict[str, Any]) -> VisionConfig:
    """CLIP vision fields; a full CLIP config (text + vision) holds them under `vision_config`."""
    raw = raw.get("vision_config", raw)
    if raw.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"unsupported vision hidden_act {raw['hidden_act']!r} (need quick_gelu)")
    return VisionConfig(
        image_size=raw.get("image_size", 336),
        patch_size=raw.get("patch_size", 14),
        hidden_size=raw.get("hidden_size", 1024),
        intermediate_size=raw.get("intermediate_size", 4096),
        num_layers=raw.get("num_hidden_layers", 24),
        num_heads=raw.get("num_attention_heads", 16),
        layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
    )
