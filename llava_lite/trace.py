"""What became of a prompt's image tokens, and what that cost: for pictures and for teaching.

    answer = model.generate(image, prompt, reduction="hybrid-72-36", trace=True)
    answer.trace.images[0].groups        # which token each of the 576 patches became part of
    answer.trace.rows_per_layer          # tokens that every decoder layer computed on
    answer.trace.flops["gated"].ratio    # what is left of the work, 1.0 without a reduction

Everything is read off what the forward returned anyway; without `trace=True` nothing is computed.

FLOPs follow the FastV paper (arXiv 2403.06764): a multiply-add counts once, and a layer that runs n
tokens of width d through projections, attention and an MLP of width f takes
4 n d^2 + 2 n^2 d + 2 n d f of them. "gated" has 3 n d f: Llama's MLP has three matrices, not two.
Where rows and positions differ (layout.py), projections and MLP count rows, attention positions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_lite.attention import KVCache
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.fastv import Pruning
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction

CONVENTIONS = ("paper", "gated")


@dataclass(frozen=True)
class ImageTrace:
    """One image: the token of every patch (row by row), how many patches each token has, how many
    tokens there were after every block of the tower, what FastV scored each (None: it did not), and
    which of them stayed."""

    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    tokens_per_block: tuple[int, ...]
    scores: tuple[float, ...] | None
    kept: tuple[int, ...]

    @property
    def patch_scores(self) -> tuple[float, ...] | None:
        """The score of every patch's token, shared out evenly among its patches, so that they
        add up to the same."""
        if self.scores is None:
            return None
        return tuple(self.scores[token] / self.sizes[token] for token in self.groups)

    @property
    def patch_kept(self) -> tuple[bool, ...]:
        """Whether the token of every patch stayed."""
        kept = set(self.kept)
        return tuple(token in kept for token in self.groups)


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of a part, and what they would be without a reduction."""

    total: int
    unreduced: int

    @property
    def ratio(self) -> float:
        """What is left, 1.0 without a reduction."""
        return self.total / self.unreduced


@dataclass(frozen=True)
class Trace:
    """One prompt's way through the model.

    images: what became of each. prune_layer: the first pruned layer, None where nothing was.
    rows_per_layer, positions_per_layer: what linear layers and attention ran on, in every decoder
    layer. kv_bytes: of the cache after the prompt, and kv_bytes_unreduced. decoder_flops by
    convention ("paper", "gated"), tower_flops of all images."""

    images: tuple[ImageTrace, ...]
    prune_layer: int | None
    rows_per_layer: tuple[int, ...]
    positions_per_layer: tuple[int, ...]
    kv_bytes: int
    kv_bytes_unreduced: int
    decoder_flops: dict[str, Flops]
    tower_flops: Flops

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json; scores rounded to 6 digits after the point."""
        content = asdict(self)
        for image in content["images"]:
            if image["scores"] is not None:
                image["scores"] = [round(score, 6) for score in image["scores"]]
        flops = {**self.decoder_flops, "tower": self.tower_flops}
        content["decoder_flops"] = {
            name: {**asdict(flops[name]), "ratio": round(flops[name].ratio, 4)}
            for name in CONVENTIONS
        }
        content["tower_flops"]["ratio"] = round(self.tower_flops.ratio, 4)
        return content


def trace_prompt(
    config: LlavaConfig,
    images: Sequence[EncodedImage],
    reduction: Reduction,
    num_text: int,
    past_positions: int,
    before: KVCache | None,
    after: KVCache,
    pruning: Pruning | None,
) -> Trace:
    """From one prompt's forward: its `images` and `num_text` words, which stood behind
    `past_positions` others, the caches before and after, and what was pruned."""
    text, vision = config.text, config.vision
    unmerged = [vision.num_patches] * vision.num_blocks
    past = [k.shape[2] for k, _ in before] if before else [0] * text.num_layers
    positions = [k.shape[2] - done for (k, _), done in zip(after, past, strict=True)]
    rows = num_text + sum(len(image.image_embeds) for image in images)
    layer = reduction.fastv.layer if reduction.fastv is not None and pruning is not None else None
    rows_per_layer = [
        rows if pruning is None or layer is None or layer_idx < layer else len(pruning.kept_indices)
        for layer_idx in range(text.num_layers)
    ]
    unreduced = num_text + sum(image.num_patches for image in images)
    whole = [unreduced] * text.num_layers
    flops = {
        convention: Flops(
            decoder_flops(text, rows_per_layer, positions, past, convention)
            + (0 if layer is None else (past[layer - 1] + positions[layer - 1]) * text.hidden_size),
            decoder_flops(text, whole, whole, [past_positions] * text.num_layers, convention),
        )
        for convention in CONVENTIONS
    }
    key = after[0][0]
    bytes_per_position = 2 * text.hidden_size * key.element_size()
    return Trace(
        trace_images(images, reduction.positions, pruning),
        layer,
        tuple(rows_per_layer),
        tuple(positions),
        sum(k.shape[2] for k, _ in after) * bytes_per_position,
        text.num_layers * (past_positions + unreduced) * bytes_per_position,
        flops,
        Flops(
            sum(tower_flops(vision, image.tokens_per_block or unmerged) for image in images),
            len(images) * tower_flops(vision, unmerged),
        ),
    )


def trace_images(
    images: Sequence[EncodedImage], positions: str, pruning: Pruning | None
) -> tuple[ImageTrace, ...]:
    """Each image's own share of what was pruned, its tokens numbered as the decoder has them."""
    traced, first = [], 0
    for image in images:
        num_tokens = len(image.image_embeds)
        groups = range(num_tokens) if image.mapping is None else image.mapping.tolist()
        if positions == "logical":  # they stand in the order of their first patches
            places: dict[int, int] = {}
            groups = [places.setdefault(token, len(places)) for token in groups]
        sizes = [0] * num_tokens
        for token in groups:
            sizes[token] += 1
        scores, kept = None, tuple(range(num_tokens))
        if pruning is not None:
            stop = first + num_tokens
            scores = tuple(pruning.scores[first:stop].tolist())
            kept = tuple(token - first for token in pruning.kept.tolist() if first <= token < stop)
        first += num_tokens
        traced.append(ImageTrace(tuple(groups), tuple(sizes), image.tokens_per_block, scores, kept))
    return tuple(traced)


# ---- on paper ----------------------------------------------------------------------------------


def decoder_flops(
    text: TextConfig,
    rows: Sequence[int],
    positions: Sequence[int],
    past: Sequence[int] | None = None,
    convention: str = "gated",
) -> int:
    """Multiply-adds of all layers, given per layer the rows, the positions, and those already
    cached (which new positions attend to as well). Without embeddings and lm_head."""
    d, f = text.hidden_size, text.intermediate_size
    matrices = {"paper": 2, "gated": 3}[convention]
    past = past or [0] * len(rows)
    return sum(
        (4 * d * d + matrices * d * f) * u + 2 * n * (n + done) * d
        for u, n, done in zip(rows, positions, past, strict=True)
    )


def tower_flops(vision: VisionConfig, tokens_per_block: Sequence[int]) -> int:
    """Multiply-adds of the tower's blocks for one image. A block's attention runs on the tokens
    it is given, its MLP on those that are left; the class token counts."""
    d, f = vision.hidden_size, vision.intermediate_size
    entering = [vision.num_patches, *tokens_per_block[:-1]]
    return sum(
        4 * (t + 1) * d * d + 2 * (t + 1) ** 2 * d + 2 * (left + 1) * d * f
        for t, left in zip(entering, tokens_per_block, strict=True)
    )
