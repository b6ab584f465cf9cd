"""Token merging in the vision tower: ToMe (Bolya et al., arXiv 2210.09461) and DToMe (DyMU, arXiv
2504.17040).

Many patches of an image look alike: sky, wall, table. Every block of the tower merges its most
similar tokens between attention and MLP, so later blocks run on fewer tokens:

    1. split    tokens at even places are sources, tokens at odd places are destinations
    2. match    every source finds its most similar destination (cosine of head-averaged keys)
    3. choose   the best r pairs merge (ToMe), or all pairs above a threshold (DToMe)
    4. merge    a destination becomes the mean of its patches, so tokens count by their size

A token of size s stands for s patches. Attention adds log(s) to its scores, so the token weighs as
much as s patches (ToMe section 3, "proportional attention"). The class token, at place 0, never
merges. The record of all merges is one integer vector, the mapping: patch -> token.

FastViTHD has no class token, and merges behind its last layer, by the features themselves.

All functions are pure. Shapes: B images, T tokens before a merge and T' after, N tokens before the
first merge, D metric width, C width; A = ceil(T/2) sources, F = T - A destinations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCHEDULES = ("constant", "linear", "reverse_linear")


@dataclass(frozen=True)
class MergeStep:
    """How one block merges: at most `r` pairs, the best first (None: no limit), and only pairs
    above `threshold` (None: no threshold). r = 0 merges nothing."""

    r: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Merged:
    """The merges so far: mapping (B, N), the token of each patch, and size (B, T), the number of
    patches in each token. The class token counts as patch 0."""

    mapping: Tensor
    size: Tensor

    @staticmethod
    def nothing(x: Tensor) -> "Merged":
        """The state of x (B, N, C) before the first merge: every patch is a token."""
        mapping = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        # bfloat16 cannot count further than 256.
        size_dtype = torch.promote_types(x.dtype, torch.float32)
        return Merged(mapping, torch.ones(x.shape[:2], dtype=size_dtype, device=x.device))

    def log_size(self, dtype: torch.dtype) -> Tensor:
        """log(size) as (B, 1, 1, T), to add to attention scores before the softmax."""
        return self.size.log().to(dtype)[:, None, None]


# ---- one merge ---------------------------------------------------------------------------------


def merge_tokens(
    x: Tensor, metric: Tensor, merged: Merged | None, step: MergeStep, class_token: bool = True
) -> tuple[Tensor, Merged | None]:
    """Merge once: x (B, T, C) -> x (B, T', C), by the similarity of metric (B, T, D).

    `merged` holds the merges so far (None: no merge yet). The new order is: sources that stay, then
    all destinations, both in their old order. If nothing merges, x and `merged` are returned.
    `class_token`: whether the token at place 0 is one, which stays.

    Raises ValueError for a threshold with more than one image: images would differ in length."""
    most = (x.shape[1] - class_token) // 2
    if most == 0:
        return x, merged
    best, destination = match_tokens(metric, class_token)
    r = count_merges(best, most, step)
    if r == 0:
        return x, merged
    if merged is None:
        merged = Merged.nothing(x)
    places = number_tokens(best, destination, r, x.shape[1])
    x, size = average(x, merged.size, places, x.shape[1] - r)
    # Composing two merges is one lookup: patch -> old token -> new token.
    return x, Merged(places.gather(1, merged.mapping), size)


def match_tokens(metric: Tensor, class_token: bool = True) -> tuple[Tensor, Tensor]:
    """Find the most similar destination of every source, by metric (B, T, D). Returns its cosine
    and its number, both (B, A)."""
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    cosines = unit[:, ::2] @ unit[:, 1::2].mT  # (B, A, F)
    if class_token:
        cosines[:, 0] = -torch.inf  # the class token never merges
    best, destination = cosines.max(dim=-1)
    return best, destination


def count_merges(best: Tensor, most: int, step: MergeStep) -> int:
    """Count the pairs that merge, at most `most`, from the best cosine of each source (B, A)."""
    most = most if step.r is None else min(step.r, most)
    if step.threshold is None or most == 0:
        return most
    if len(best) > 1:
        raise ValueError(f"a threshold merges one image at a time, not {len(best)}")
    # int(...) waits for the device. This is the only wait in merging.
    return min(most, int((best > step.threshold).sum()))


def number_tokens(best: Tensor, destination: Tensor, r: int, num_tokens: int) -> Tensor:
    """Number the tokens after the `r` best pairs merge: old place -> new place, (B, T). Of equal
    cosines the first merges."""
    num_kept = best.shape[1] - r
    # A stable sort breaks ties in the same way on every device.
    kept = best.argsort(dim=-1, descending=True, stable=True)[:, r:].sort(dim=-1).values
    places = best.new_empty(len(best), num_tokens, dtype=torch.long)
    places[:, ::2] = destination + num_kept  # first as if all sources merged
    places[:, 1::2] = torch.arange(num_kept, num_tokens - r, device=best.device)
    return places.scatter(1, 2 * kept, torch.arange(num_kept, device=best.device).expand_as(kept))


def average(x: Tensor, size: Tensor, places: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Average the tokens x (B, T, C) that share a place, each counted `size` (B, T) times. Returns
    the new x (B, T', C) and the new size (B, T').

    On a GPU the order of the sum is not fixed, so the last bit may differ from run to run."""
    weighted = x * size[..., None]  # float32 at least, like size
    sums = weighted.new_zeros(len(x) * num_tokens, x.shape[2])
    # One flat index_add_ over all images: image i owns rows i * num_tokens and up.
    rows = places + num_tokens * torch.arange(len(x), device=x.device)[:, None]
    sums.index_add_(0, rows.flatten(), weighted.flatten(0, 1))
    new_size = size.new_zeros(len(x), num_tokens).scatter_add_(1, places, size)
    mean = sums.view(len(x), num_tokens, -1).div_(new_size[..., None])
    return mean.to(x.dtype), new_size


# ---- schedules ---------------------------------------------------------------------------------


def spread(total: int, num_layers: int, schedule: str = "constant") -> list[int]:
    """Spread `total` merges over `num_layers` blocks, as the official schedules do: evenly
    ("constant"), in a falling line ("linear") or in a rising line ("reverse_linear").

    The official falling line does not end for some totals (96 over 24), because its terms pass
    zero. Here the line ends at zero, and one more term holds the rest."""
    if schedule == "constant":
        even, rest = divmod(total, num_layers)
        return [even + (layer_idx < rest) for layer_idx in range(num_layers)]
    first = 2 * total // num_layers
    counts: list[int] = []
    for layer_idx in range(num_layers - 1):
        count = math.floor(first - layer_idx * (first / num_layers))
        if count <= 0 or sum(counts) + count >= total:
            break
        counts.append(count)
    counts.append(total - sum(counts))
    falling = counts + [0] * (num_layers - len(counts))
    return falling if schedule == "linear" else falling[::-1]


def spread_to_keep(keep: int, num_patches: int, num_blocks: int) -> list[int]:
    """Spread merges over `num_blocks` blocks so that exactly `keep` patches are left: as evenly as
    possible, larger counts first.

    A block can merge at most half of its tokens. If an even share is too much for the last blocks,
    the first blocks merge more. Raises ValueError if no spread leaves `keep`."""
    total = num_patches - keep
    for share in range(total + 1):
        if sum(cap_merges([share] * num_blocks, num_patches)) >= total:
            break
    else:
        raise ValueError(f"{num_blocks} blocks cannot merge {num_patches} patches into {keep}")
    for num_full in range(num_blocks + 1):
        wanted = [share] * num_full + [share - 1] * (num_blocks - num_full)
        counts = cap_merges(wanted, num_patches)
        # One more full share adds at most one merge, so the total is never skipped.
        if sum(counts) == total:
            break
    return counts


def cap_merges(counts: Sequence[int], num_patches: int) -> list[int]:
    """Cap the merges of every block at half of the patches that reach it."""
    merged = []
    for count in counts:
        merged.append(min(count, num_patches // 2))
        num_patches -= merged[-1]
    return merged
