"""What became of a prompt's image tokens, and what that cost: for pictures and for teaching.

    trace = model.generate(image, prompt, reduction="hybrid-72-36", trace=True).trace
    trace.images[0].groups                 # the token that each of the 576 patches is part of
    trace.rows_per_layer                   # words + 72 tokens, from the pruned layer on + 36
    trace.decoder_flops["gated"].ratio     # what is left of the work

All of it is read off what the forward returns anyway. Without `trace=True` none of it is computed.

What the numbers mean:

    groups, sizes         An image starts as P patches. In the vision tower similar ones merge
                          (tome.py), and one token goes on for all of them: its group.
    scores, kept          In front of one decoder layer FastV (fastv.py) drops the image tokens that
                          the prompt's last token hardly looks at. A score is that attention, 0..1;
                          over all tokens, words included, it adds up to 1 ("sum" scores).
    rows                  What norms, projections and MLPs compute on: words and image tokens.
    positions             What attention compares with each other, and what the KV cache stores:
                          more than rows where merged tokens show once per patch ("vtu", layout.py).
    KV bytes              The keys and values that stay in memory for as long as the answer grows:
                          2 * width * bytes of a number, for every position of every layer.
    FLOPs                 Multiply-adds, counted as FastV's paper (arXiv 2403.06764) does: one each.
                          n tokens of width d, an MLP of width f, one layer:
                              4 n d^2     four projections
                              2 n^2 d     every token with every token, then the mix of the values;
                                          what the causal mask hides is not taken off
                              2 n d f     "paper": an MLP of two matrices
                              3 n d f     "gated": Llama's has three
                          Softmax, norms, embeddings, the projector and lm_head are left out.

With U rows on N positions the first and the last term have U, the second N; the row of scores that
FastV needs adds d for every key it looks at. A later turn of a chat runs its new rows only, but
each of its positions looks at every key, cached or new: 2 n (cached + n) d. Rows, positions and
FLOPs are then those of the turn; KV bytes are those of the whole cache. "Unreduced" is the same
prompt, or turn of a chat, had nothing ever been merged or pruned.

`decoder_flops`, `fastv_ratio`, `tower_flops` and `kv_bytes` need no model, only its config.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_lite.cache import KVCache
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.fastv import Pruning
from llava_lite.layout import place_image
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction

MLP_MATRICES = {"paper": 2, "gated": 3}


@dataclass(frozen=True)
class ImageTrace:
    """One image. Tokens are numbered from 0 in the order the decoder has them.

    grid: patches along one side, row by row they are numbered 0 .. grid^2 - 1. groups (P,): the
    token of each patch, itself where nothing merged. sizes: the patches of each token.
    tokens_per_block: tokens left after every block of the tower (empty for an encoded image that
    does not say). scores: FastV's of each token, None where it had nothing to drop. kept: the
    tokens that all layers see, ascending."""

    grid: int
    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    tokens_per_block: tuple[int, ...]
    scores: tuple[float, ...] | None
    kept: tuple[int, ...]

    @property
    def num_patches(self) -> int:
        """P, before any merging."""
        return len(self.groups)

    def patch_scores(self) -> tuple[float, ...] | None:
        """The score of every patch's token (P,): by it the patch stayed or went."""
        if self.scores is None:
            return None
        return tuple(self.scores[token] for token in self.groups)

    def patch_kept(self) -> tuple[bool, ...]:
        """Whether the token of every patch stayed (P,)."""
        kept = set(self.kept)
        return tuple(token in kept for token in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json; scores rounded to 4 digits."""
        content = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if self.scores is not None:
            # Significant digits: of many tokens most score far below one thousandth.
            content["scores"] = [float(f"{score:.4g}") for score in self.scores]
        return content


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of a part, and what they would be without a reduction."""

    total: int
    unreduced: int

    @property
    def ratio(self) -> float:
        """What is left, 1.0 without a reduction."""
        return self.total / self.unreduced if self.unreduced else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {**asdict(self), "ratio": round(self.ratio, 4)}


@dataclass(frozen=True)
class Trace:
    """One prompt's way through the model; the numbers are explained above.

    images: what became of each. prune_layer: the first pruned layer, None where nothing was.
    rows_per_layer, positions_per_layer: those of this prompt, in every decoder layer. kv_bytes: of
    the cache after the prompt; kv_bytes_unreduced: what it would be. decoder_flops: by convention,
    "paper" and "gated". tower_flops: of all images, encoded for this call or before."""

    images: tuple[ImageTrace, ...]
    prune_layer: int | None
    rows_per_layer: tuple[int, ...]
    positions_per_layer: tuple[int, ...]
    kv_bytes: int
    kv_bytes_unreduced: int
    decoder_flops: dict[str, Flops]
    tower_flops: Flops

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json; scores rounded to 4 digits."""
        return {
            "images": [image.to_dict() for image in self.images],
            "prune_layer": self.prune_layer,
            "rows_per_layer": list(self.rows_per_layer),
            "positions_per_layer": list(self.positions_per_layer),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unreduced": self.kv_bytes_unreduced,
            "decoder_flops": {name: flops.to_dict() for name, flops in self.decoder_flops.items()},
            "tower_flops": self.tower_flops.to_dict(),
        }


def trace_prompt(
    config: LlavaConfig,
    images: Sequence[EncodedImage],
    reduction: Reduction,
    num_text: int,
    unreduced_past: int,
    before: KVCache | None,
    after: KVCache,
    pruning: Pruning | None,
) -> Trace:
    """From one prompt's forward: its `images` and `num_text` words, behind others that would take
    `unreduced_past` positions without a reduction; the caches before and after, and what was
    pruned."""
    text, num_layers = config.text, config.text.num_layers
    cached = [0] * num_layers if before is None else [k.shape[2] for k, _ in before]
    positions = [k.shape[2] - past for (k, _), past in zip(after, cached, strict=True)]
    num_rows = num_text + sum(len(image.image_embeds) for image in images)
    rows, layer = [num_rows] * num_layers, None
    if reduction.fastv is not None and pruning is not None:
        layer = reduction.fastv.layer
        rows[layer:] = [len(pruning.kept_indices)] * (num_layers - layer)
    whole = [num_text + sum(image.num_patches for image in images)] * num_layers
    past = [unreduced_past] * num_layers
    return Trace(
        trace_images(config.vision.grid, images, reduction.positions, pruning),
        layer,
        tuple(rows),
        tuple(positions),
        kv_bytes(text, [k.shape[2] for k, _ in after], after[0][0].element_size()),
        kv_bytes(text, [unreduced_past + new for new in whole], after[0][0].element_size()),
        {
            convention: Flops(
                decoder_flops(text, rows, positions, cached, layer, convention),
                decoder_flops(text, whole, whole, past, None, convention),
            )
            for convention in MLP_MATRICES
        },
        trace_tower(config.vision, images),
    )


def trace_images(
    grid: int, images: Sequence[EncodedImage], positions: str, pruning: Pruning | None
) -> tuple[ImageTrace, ...]:
    """Each image's share of what was pruned, where the tokens of all images are one sequence."""
    all_scores = None if pruning is None else tuple(pruning.scores.tolist())
    all_kept = None if pruning is None else pruning.kept.tolist()
    traced, start = [], 0
    for image in images:
        num_tokens = len(image.image_embeds)
        stop = start + num_tokens
        groups = decoder_groups(image, positions)
        sizes = [0] * num_tokens
        for token in groups:
            sizes[token] += 1
        kept = range(start, stop) if all_kept is None else all_kept
        traced.append(
            ImageTrace(
                grid,
                groups,
                tuple(sizes),
                image.tokens_per_block,
                None if all_scores is None else all_scores[start:stop],
                tuple(token - start for token in kept if start <= token < stop),
            )
        )
        start = stop
    return tuple(traced)


def decoder_groups(image: EncodedImage, positions: str) -> tuple[int, ...]:
    """The token of every patch (P,), numbered by its row in the decoder."""
    mapping = image.mapping
    if mapping is None:
        return tuple(range(image.num_patches))
    _, order = place_image(mapping, len(image.image_embeds), 0, positions, mapping.device)
    rows = mapping if order is None else order.argsort()[mapping]
    return tuple(rows.tolist())


def trace_tower(vision: VisionConfig, images: Sequence[EncodedImage]) -> Flops:
    """The tower's work on all images. One that does not say how it was merged counts in full."""
    unmerged = [vision.num_patches] * vision.num_blocks
    return Flops(
        sum(tower_flops(vision, image.tokens_per_block or unmerged) for image in images),
        len(images) * tower_flops(vision, unmerged),
    )


# ---- on paper ----------------------------------------------------------------------------------


def decoder_flops(
    text: TextConfig,
    rows: Sequence[int],
    positions: Sequence[int],
    cached: Sequence[int] | None = None,
    prune_layer: int | None = None,
    convention: str = "gated",
) -> int:
    """Multiply-adds of decoder layers, given for each its rows, its positions, and those that stood
    in its cache before (None: none). With `prune_layer`, and FastV's row of scores in the layer in
    front of it. `convention`: "paper" or "gated", see above."""
    d, f = text.hidden_size, text.intermediate_size
    cached = [0] * len(rows) if cached is None else cached
    keys = [past + new for past, new in zip(cached, positions, strict=True)]
    layers = sum(
        (4 * d * d + MLP_MATRICES[convention] * d * f) * num_rows + 2 * new * all_keys * d
        for num_rows, new, all_keys in zip(rows, positions, keys, strict=True)
    )
    return layers if prune_layer is None else layers + keys[prune_layer - 1] * d


def fastv_ratio(
    text: TextConfig,
    num_tokens: int,
    num_left: int,
    layer: int,
    convention: str = "paper",
) -> float:
    """What FastV leaves of the decoder's work on a prompt of `num_tokens`, of which `num_left`,
    words included, go on from `layer` on. As published, so without the row of scores."""
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


def kv_bytes(text: TextConfig, positions: Sequence[int], bytes_per_number: int = 2) -> int:
    """Bytes of a cache that holds so many positions in each layer; 2 per number in 16 bit."""
    return sum(positions) * 2 * text.hidden_size * bytes_per_number
