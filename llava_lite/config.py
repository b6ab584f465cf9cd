"""The facts of a checkpoint: sizes of tower, projector and decoder, read from its config.json.

A call never changes them. `LlavaConfig.from_dict` reads our own format, checkpoints/configs.py the
published formats.
"""

from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

IMAGE_TOKEN_ID = -200  # stands for an image among the ids of a prompt
FASTVITHD_SIZES = range(256, 2049, 64)  # of an image, in pixels
FASTVITHD_HEAD_DIM = 32
FASTVITHD_KIND = "fastvithd"  # tells the two towers apart in our config.json
MAX_PROJECTOR_DEPTH = 8  # published models have 1 or 2; bounds the memory of a model


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP vision tower, by default ViT-L/14 at 336 px. Sizes in pixels and channels."""

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
        """Patches along one side: 24 for 336 px."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, the image tokens before merging: 576 for 336 px."""
        return self.grid**2

    @property
    def num_blocks(self) -> int:
        """Blocks that run. `feature_layer` is an index into the hidden states, whose entry k is the
        output of k blocks: -2 of 24 layers means 23 blocks."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.num_layers + 1 + layer

    def at(self, image_size: int | None) -> "VisionConfig":
        """This tower, for images of its own size only (or None). Raises ValueError."""
        if image_size not in (None, self.image_size):
            raise ValueError(f"image_size {image_size}: CLIP takes {self.image_size} px only")
        return self


@dataclass(frozen=True)
class FastViTHDConfig:
    """The vision tower of FastVLM (arXiv 2412.13303, section 3.2): image_size in pixels, and the
    blocks and channels of its five stages."""

    image_size: int = 1024
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536)
    patch_size: ClassVar[int] = 64  # the convolutions shrink the image so many times

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fastvithd(self)

    @property
    def grid(self) -> int:
        """Places along one side: 16 for 1024 px."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, the image tokens before merging: 256 for 1024 px."""
        return self.grid**2

    @property
    def hidden_size(self) -> int:
        """C, the width of a feature."""
        return 2 * self.widths[-1]

    def at(self, image_size: int | None) -> "FastViTHDConfig":
        """This tower for images of `image_size` pixels (None: its own size). Raises ValueError."""
        return self if image_size is None else replace(self, image_size=image_size)


TowerConfig = VisionConfig | FastViTHDConfig


@dataclass(frozen=True)
class TextConfig:
    """The Llama decoder, by default Llama-2 7B; with the last four fields Qwen2 (arXiv 2407.10671).

    Ids from `sampled_vocab_size` on are never generated: the image marker, padding, and the unused
    rows of llava-hf. num_kv_heads: of keys and values, each for as many queries (None: num_heads;
    GQA, arXiv 2305.13245). attention_bias: q, k and v have biases. tie_embeddings: the head is the
    embedding. stop_ids: they end an answer, beside `eos_id`."""

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
    num_kv_heads: int | None = None
    attention_bias: bool = False
    tie_embeddings: bool = False
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))  # JSON has lists

    @property
    def head_dim(self) -> int:
        """D, channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G, heads of keys and values. Query head h reads key head h // (H / G)."""
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Channels of all keys, and of all values, of one row: G * D."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LlavaConfig:
    """The whole model, and the preparation of its input.

    projector_depth: linear layers of the projector (2 = `mlp2x_gelu`). pad: pad images to a square
    (True) or crop them. template: the chat template. legacy_tokenizer: the tokenizer's old mode."""

    vision: TowerConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projector_depth: int = 2
    pad: bool = True
    template: str = "vicuna_v1"
    legacy_tokenizer: bool = False
    name: str = "llava"

    def __post_init__(self) -> None:
        check(self)

    def at(self, image_size: int | None) -> "LlavaConfig":
        """This model for images of another size (`FastViTHDConfig.at`)."""
        return replace(self, vision=self.vision.at(image_size))

    def to_dict(self) -> dict[str, Any]:
        """Our config.json."""
        raw = {"format": "llava_lite", **asdict(self)}
        if isinstance(self.vision, FastViTHDConfig):
            raw["vision"]["kind"] = FASTVITHD_KIND
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "LlavaConfig":
        """Read our config.json. Raises ValueError that names an unknown or missing field."""
        raw = {key: value for key, value in raw.items() if key != "format"}
        try:
            vision, text = dict(raw.pop("vision")), TextConfig(**raw.pop("text"))
            if vision.get("kind") != FASTVITHD_KIND:
                return cls(VisionConfig(**vision), text, **raw)
            del vision["kind"]
            return cls(FastViTHDConfig(**vision), text, **raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a llava_lite config: {error}") from error


def check(config: LlavaConfig) -> None:
    """Raise ValueError if sizes do not fit together."""
    vision, text = config.vision, config.text
    for name, part in (("vision", vision), ("text", text)):
        if isinstance(part, VisionConfig | TextConfig) and part.hidden_size % part.num_heads:
            raise ValueError(
                f"{name}: hidden_size {part.hidden_size} is no multiple of {part.num_heads} heads"
            )
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}"
        )
    if isinstance(vision, VisionConfig) and not 1 <= vision.num_blocks <= vision.num_layers:
        raise ValueError(
            f"vision feature_layer {vision.feature_layer} is outside the {vision.num_layers} layers"
        )
    if text.num_heads % text.kv_heads:
        raise ValueError(
            f"text: {text.num_heads} heads are no multiple of {text.kv_heads} key/value heads"
        )
    if text.head_dim % 2:
        raise ValueError(f"head_dim {text.head_dim} is odd, RoPE needs pairs")
    if not 1 <= config.projector_depth <= MAX_PROJECTOR_DEPTH:
        raise ValueError(
            f"projector_depth {config.projector_depth} must be between 1 and {MAX_PROJECTOR_DEPTH}"
        )


def check_fastvithd(vision: FastViTHDConfig) -> None:
    """Raise ValueError for an impossible size, and if depths and widths do not fit together."""
    if vision.image_size not in FASTVITHD_SIZES:
        raise ValueError(f"image_size {vision.image_size} must be a multiple of 64 in 256..2048")
    widths, heads = vision.widths, vision.widths[-2:]
    five = len(vision.depths) == len(widths) == 5 and all(widths)
    nested = five and not any(wider % width for width, wider in pairwise(widths))
    if not nested or any(width % FASTVITHD_HEAD_DIM for width in heads):
        raise ValueError(
            f"FastViTHD: depths {vision.depths} and widths {widths} must be 5 each, a width a "
            f"multiple of the one before, the last two of {FASTVITHD_HEAD_DIM}"
        )


LLAVA_1_5_7B = LlavaConfig(name="llava-1.5-7b")
LLAVA_1_5_13B = LlavaConfig(
    text=TextConfig(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40),
    name="llava-1.5-13b",
)
TINY = LlavaConfig(
    vision=VisionConfig(hidden_size=192, intermediate_size=768, num_layers=7, num_heads=6),
    text=TextConfig(640, 256, 640, 6, 8, max_positions=2048, sampled_vocab_size=640),
    name="llava-tiny-scenes",
)
FASTVLM_0_5B, FASTVLM_1_5B, FASTVLM_7B = (
    LlavaConfig(
        vision=FastViTHDConfig(),
        text=TextConfig(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            attention_bias=True,
            tie_embeddings=tied,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_positions=32768,
            sampled_vocab_size=ids,
            bos_id=151643,
            eos_id=151645,
            stop_ids=(151643,),
        ),
        template="qwen_2",
        name=f"fastvlm-{size}",
    )
    for size, width, mlp_width, layers, heads, kv_heads, tied, rows, ids in (
        ("0.5b", 896, 4864, 24, 14, 2, True, 151936, 151646),
        ("1.5b", 1536, 8960, 28, 12, 2, True, 151936, 151646),
        ("7b", 3584, 18944, 28, 28, 4, False, 152064, 151665),
    )
)
PRESETS = {
    config.name: config
    for config in (LLAVA_1_5_7B, LLAVA_1_5_13B, FASTVLM_0_5B, FASTVLM_1_5B, FASTVLM_7B, TINY)
}
