"""The path of the image tokens of a prompt, and the cost: for pictures and for teaching.

    trace = model.generate(image, prompt, reduction="folded-144-36", trace=True).trace
    trace.images[0].groups                 # the token that each of the 576 patches is part of
    trace.rows_per_layer                   # words + 144 tokens, from layer 1 on + 48, 3 on + 36
    trace.decoder_flops["gated"].ratio     # remaining share of the work

The forward returns all of this anyway. Without `trace=True` nothing is computed here.

The numbers:

    groups, sizes         An image starts as P patches. Similar patches merge in the vision tower
                          (tome.py); one token stands for the whole group.
    scores, kept          In front of some decoder layers FastV (fastv.py) keeps the image tokens
                          with the most attention from the last token of the prompt. A score is this
                          attention, 0..1. "sum" scores of all tokens, words included, add up to 1.
    speakers              The kept token that stands for a patch in the last layers: its own token,
                          or the token that its token is folded into.
    rows                  Words and image tokens: the input of norms, projections and MLPs.
    positions             The keys of attention and of the KV cache. More than rows with "vtu",
                          where a merged token counts once per patch (layout.py).
    KV bytes              Keys and values in memory: 2 * kv * bytes of a number, for every position
                          of every layer. kv is the width of the keys: d, or less with fewer
                          key/value heads.
    FLOPs                 Multiply-adds, each counted as one, as in FastV's paper
                          (arXiv 2403.06764).
                          n tokens of width d, an MLP of width f, one layer:
                              2 n d^2     projections of queries and outputs
                              2 n d kv    projections of keys and values
                              2 n^2 d     scores of all pairs, then the mix of the values; the
                                          causal mask is not subtracted
                              2 n d f     "paper": an MLP of two matrices
                              3 n d f     "gated": Llama's has three
                          Softmax, norms, embeddings, the projector and lm_head are left out.

With U rows and K keys of attention (K = N with "vtu") the first and the last term use U, the second
K. The scores of FastV add d per key. Folding M tokens into M' kept ones adds M M' d. A later turn
of a chat runs its new rows only, but its keys attend to all keys: 2 n (cached + n) d. Rows,
positions and FLOPs are those of the turn, KV bytes those of the whole cache. "Unreduced" is the
same prompt or turn without any merging and pruning.

`expected_lengths`, `decoder_flops`, `fastv_ratio`, `tower_flops` and `kv_bytes` need no model, only
its config.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_lite.cache import KVCache
from llava_lite.config import FastViTHDConfig, LlavaConfig, TextConfig, TowerConfig, VisionConfig
from llava_lite.fastv import Pruning
from llava_lite.fastvithd import ATTENTION_STAGES, GATE_RATIO
from llava_lite.layout import place_image
from llava_lite.llava import EncodedImage
from llava_lite.reduction import DToMe, Reduction

MLP_MATRICES = {"paper": 2, "gated": 3}


@dataclass(frozen=True)
class ImageTrace:
    """One image. Tokens are numbered from 0 in the order of the decoder.

    grid: patches along one side; patches are numbered row by row, 0 .. grid^2 - 1. groups (P,): the
    token of each patch, the patch itself if nothing merged. sizes: patches per token.
    tokens_per_block: tokens after every block of the tower, or of FastViTHD after every round of
    merging, empty if unknown. scores: FastV's score of each token in the first stage, None without
    pruning. kept: tokens in all layers, ascending. folded_into: the kept token that each token is a
    part of in the last layers, None for a dropped token."""

    grid: int
    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    tokens_per_block: tuple[int, ...]
    scores: tuple[float, ...] | None
    kept: tuple[int, ...]
    folded_into: tuple[int | None, ...]

    @property
    def num_patches(self) -> int:
        """P, before any merging."""
        return len(self.groups)

    def patch_scores(self) -> tuple[float, ...] | None:
        """The score of the token of every patch (P,)."""
        if self.scores is None:
            return None
        return tuple(self.scores[token] for token in self.groups)

    def patch_kept(self) -> tuple[bool, ...]:
        """Whether FastV kept the token of every patch (P,)."""
        kept = set(self.kept)
        return tuple(token in kept for token in self.groups)

    def speakers(self) -> tuple[int | None, ...]:
        """The kept token that stands for every patch (P,) in the last layers, None if dropped."""
        return tuple(self.folded_into[token] for token in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json; scores rounded to 4 digits."""
        content = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if self.scores is not None:
            # Significant digits: most scores are far below one thousandth.
            content["scores"] = [float(f"{score:.4g}") for score in self.scores]
        return content


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of a part, with and without the reduction."""

    total: int
    unreduced: int

    @property
    def ratio(self) -> float:
        """The remaining share, 1.0 without a reduction."""
        return self.total / self.unreduced if self.unreduced else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {**asdict(self), "ratio": round(self.ratio, 4)}


@dataclass(frozen=True)
class Trace:
    """The path of one prompt through the model. The head of this file explains the numbers.

    images: one trace each. prune_layers: the first layer of every stage of pruning.
    rows_per_layer, positions_per_layer: of this prompt. kv_bytes: of the cache after the prompt;
    kv_bytes_unreduced: without a reduction. decoder_flops: by convention, "paper" and "gated".
    tower_flops: of all images, also of those encoded before this call. merge_step: what
    `tokens_per_block` counts, every "block" of the tower, or every "round" behind FastViTHD."""

    images: tuple[ImageTrace, ...]
    prune_layers: tuple[int, ...]
    rows_per_layer: tuple[int, ...]
    positions_per_layer: tuple[int, ...]
    kv_bytes: int
    kv_bytes_unreduced: int
    decoder_flops: dict[str, Flops]
    tower_flops: Flops
    merge_step: str = "block"

    @property
    def prune_layer(self) -> int | None:
        """The first pruned layer, None without pruning."""
        return self.prune_layers[0] if self.prune_layers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json; scores rounded to 4 digits."""
        return {
            "images": [image.to_dict() for image in self.images],
            "prune_layer": self.prune_layer,
            "prune_layers": list(self.prune_layers),
            "rows_per_layer": list(self.rows_per_layer),
            "positions_per_layer": list(self.positions_per_layer),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unreduced": self.kv_bytes_unreduced,
            "decoder_flops": {name: flops.to_dict() for name, flops in self.decoder_flops.items()},
            "tower_flops": self.tower_flops.to_dict(),
            "merge_step": self.merge_step,
        }


def trace_prompt(
    config: LlavaConfig,
    images: Sequence[EncodedImage],
    reduction: Reduction,
    num_text: int,
    unreduced_past: int,
    before: KVCache | None,
    after: KVCache,
    prunings: Sequence[Pruning],
) -> Trace:
    """Trace the forward of one prompt with these images and `num_text` text tokens.

    unreduced_past: positions of the earlier turns without a reduction. before, after: the caches.
    prunings: the stages of FastV."""
    text, num_layers = config.text, config.text.num_layers
    cached = [0] * num_layers if before is None else [k.shape[2] for k, _ in before]
    positions = [k.shape[2] - past for (k, _), past in zip(after, cached, strict=True)]
    num_rows = num_text + sum(len(image.image_embeds) for image in images)
    rows = [num_rows] * num_layers
    for pruning in prunings:
        rows[pruning.layer :] = [len(pruning.kept_indices)] * (num_layers - pruning.layer)
    whole = [num_text + sum(image.num_patches for image in images)] * num_layers
    past = [unreduced_past] * num_layers
    return Trace(
        trace_images(images, reduction.positions, prunings),
        tuple(pruning.layer for pruning in prunings),
        tuple(rows),
        tuple(positions),
        kv_bytes(text, [k.shape[2] for k, _ in after], after[0][0].element_size()),
        kv_bytes(text, [unreduced_past + new for new in whole], after[0][0].element_size()),
        {
            convention: Flops(
                decoder_flops(text, rows, positions, cached, convention)
                + sum(pruning_flops(text, positions, cached, pruning) for pruning in prunings),
                decoder_flops(text, whole, whole, past, convention),
            )
            for convention in MLP_MATRICES
        },
        trace_tower(config.vision, images),
        "round" if isinstance(config.vision, FastViTHDConfig) else "block",
    )


def trace_images(
    images: Sequence[EncodedImage], positions: str, prunings: Sequence[Pruning]
) -> tuple[ImageTrace, ...]:
    """Split the pruning of all image tokens, one sequence, into images."""
    all_scores = tuple(prunings[0].scores.tolist()) if prunings else None
    all_folded = follow_tokens(sum(len(image.image_embeds) for image in images), prunings)
    traced, start = [], 0
    for image in images:
        num_tokens = len(image.image_embeds)
        stop = start + num_tokens
        groups = decoder_groups(image, positions)
        sizes = [0] * num_tokens
        for token in groups:
            sizes[token] += 1
        folded = tuple(None if at is None else at - start for at in all_folded[start:stop])
        traced.append(
            ImageTrace(
                math.isqrt(image.num_patches),
                groups,
                tuple(sizes),
                image.tokens_per_block,
                None if all_scores is None else all_scores[start:stop],
                tuple(token for token, into in enumerate(folded) if token == into),
                folded,
            )
        )
        start = stop
    return tuple(traced)


def follow_tokens(num_tokens: int, prunings: Sequence[Pruning]) -> list[int | None]:
    """The token that each of `num_tokens` image tokens is a part of after all stages, itself if it
    is kept, None if it is dropped."""
    holders: list[int | None] = list(range(num_tokens))
    left = list(range(num_tokens))  # the tokens that reach the next stage
    for pruning in prunings:
        kept = pruning.kept.tolist()
        if pruning.folded_into is None:
            into = {left[index]: left[index] for index in kept}
        else:
            parts = enumerate(pruning.folded_into.tolist())
            into = {left[index]: left[taker] for index, taker in parts}
        holders = [None if holder is None else into.get(holder) for holder in holders]
        left = [left[index] for index in kept]
    return holders


def decoder_groups(image: EncodedImage, positions: str) -> tuple[int, ...]:
    """The token of every patch (P,), numbered by its row in the decoder."""
    mapping = image.mapping
    if mapping is None:
        return tuple(range(image.num_patches))
    _, order = place_image(mapping, len(image.image_embeds), 0, positions, mapping.device)
    rows = mapping if order is None else order.argsort()[mapping]
    return tuple(rows.tolist())


def trace_tower(vision: TowerConfig, images: Sequence[EncodedImage]) -> Flops:
    """The work of the tower on all images. An image without `tokens_per_block` counts in full."""
    if isinstance(vision, FastViTHDConfig):  # tokens merge after this tower
        total = sum(fastvithd_flops(vision, math.isqrt(image.num_patches)) for image in images)
        return Flops(total, total)
    unmerged = [vision.num_patches] * vision.num_blocks
    return Flops(
        sum(tower_flops(vision, image.tokens_per_block or unmerged) for image in images),
        len(images) * tower_flops(vision, unmerged),
    )


# ---- on paper ----------------------------------------------------------------------------------


def expected_lengths(
    config: LlavaConfig, reduction: Reduction, num_text: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The rows and the positions in every layer, for a prompt of one image and `num_text` text
    tokens. None where they depend on the image: with DToMe, and with FastV at the "vtu" positions
    of merged tokens."""
    merge, fastv = reduction.merge, reduction.fastv
    unmerges = merge is not None and reduction.positions == "vtu"
    if isinstance(merge, DToMe) or (unmerges and fastv is not None):
        return None
    tokens = patches = config.vision.num_patches
    if merge is not None:
        tokens = merge.most_tokens(config.vision)
    rows: list[int] = []
    for layer in range(config.text.num_layers):
        if fastv is not None:
            [tokens] = fastv.budgets([tokens], layer) or [tokens]
        rows.append(num_text + tokens)
    return tuple(rows), (num_text + patches,) * len(rows) if unmerges else tuple(rows)


def decoder_flops(
    text: TextConfig,
    rows: Sequence[int],
    positions: Sequence[int],
    cached: Sequence[int] | None = None,
    convention: str = "gated",
) -> int:
    """Multiply-adds of decoder layers, from the rows, new positions and cached positions per layer.
    `convention`: "paper" or "gated", see the head of this file."""
    d, f = text.hidden_size, text.intermediate_size
    row = 2 * d * d + 2 * d * text.kv_width + MLP_MATRICES[convention] * d * f
    cached = [0] * len(rows) if cached is None else cached
    keys = [past + new for past, new in zip(cached, positions, strict=True)]
    return sum(
        row * num_rows + 2 * new * all_keys * d
        for num_rows, new, all_keys in zip(rows, positions, keys, strict=True)
    )


def pruning_flops(
    text: TextConfig, positions: Sequence[int], cached: Sequence[int], pruning: Pruning
) -> int:
    """Multiply-adds of one stage: the scores in the layer before, and the cosines of folding."""
    keys = positions[pruning.layer - 1] + cached[pruning.layer - 1]
    pairs = 0 if pruning.folded_into is None else len(pruning.scores) * len(pruning.kept)
    return (keys + pairs) * text.hidden_size


def fastv_ratio(
    text: TextConfig,
    num_tokens: int,
    num_left: int,
    layer: int,
    convention: str = "paper",
) -> float:
    """The share of the decoder's work that FastV leaves on a prompt of `num_tokens`, of which
    `num_left` (words included) remain from `layer` on. As published: without the scores."""
    rows = [num_tokens] * layer + [num_left] * (text.num_layers - layer)
    whole = [num_tokens] * text.num_layers
    reduced = decoder_flops(text, rows, rows, convention=convention)
    return reduced / decoder_flops(text, whole, whole, convention=convention)


def tower_flops(vision: VisionConfig, tokens_per_block: Sequence[int]) -> int:
    """Multiply-adds of the tower's blocks for one image, given the tokens left after each.

    Merging sits between the halves of a block: t tokens enter its attention, 4 t d^2 + 2 t^2 d,
    and u <= t its MLP of two matrices, 2 u d f. Both include the class token."""
    d, f = vision.hidden_size, vision.intermediate_size
    entering = [vision.num_patches, *tokens_per_block][: len(tokens_per_block)]
    return sum(
        4 * (t + 1) * d * d + 2 * (t + 1) ** 2 * d + 2 * (u + 1) * d * f
        for t, u in zip(entering, tokens_per_block, strict=True)
    )


def fastvithd_flops(vision: FastViTHDConfig, grid: int) -> int:
    """Multiply-adds of the convolutions and the attention of FastViTHD, for `grid` x `grid` tokens.

    A convolution of k x k from c channels per group to d costs k^2 c d for each place of its
    output. Blocks of width d on p places have a convolution of 3 x 3, or attention with 4 p d^2 +
    2 p^2 d, then one of 7 x 7 and two matrices of 4 d^2."""
    first, side = vision.widths[0], 16 * grid  # places along one side after the stem
    total = (2 * side) ** 2 * 27 * first + side**2 * (9 * first + first**2)
    for index, (depth, d) in enumerate(zip(vision.depths, vision.widths, strict=True)):
        p = (side >> index) ** 2
        total += p * (49 * d + d * d) if index else 0  # halves the side
        mixer = 9 * p * d
        if index in ATTENTION_STAGES:
            total += 49 * p * d  # positions
            mixer = 4 * p * d * d + 2 * p * p * d
        total += depth * (mixer + p * (49 * d + 8 * d * d))
    gate = 2 * (2 * d) ** 2 // GATE_RATIO
    return total + grid**2 * 18 * d + gate


def kv_bytes(text: TextConfig, positions: Sequence[int], bytes_per_number: int = 2) -> int:
    """Bytes of a cache with these positions in each layer; a number has 2 bytes in 16 bit."""
    return sum(positions) * 2 * text.kv_width * bytes_per_number
