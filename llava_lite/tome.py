"""Token merging: ToMe (Bolya et al., arXiv 2210.09461) and its dynamic form DToMe (DyMU, arXiv
2504.17040).

An image has many patches that say the same: sky, wall, table. In every block of the vision tower,
between attention and MLP, the most similar tokens become one, and later blocks run on fewer. Who is
similar is asked of the keys that attention has computed anyway:

    1. split    tokens at even places are sources, those at odd places are destinations
    2. match    every source finds its most similar destination (cosine of head-averaged keys)
    3. choose   the best r of these pairs merge (ToMe), or all above a threshold (DToMe: a plain
                image loses many tokens, a busy one few)
    4. merge    a destination becomes the mean of all patches in it: every token counts by its size

The class token, at place 0, never merges. A token of size s stands for s patches, so attention adds
log(s) to its scores: it then weighs as much as the s patches would (ToMe section 3, "proportional
attention").

What happened is a vector of integers, the mapping: patch -> token. Nothing else is needed to undo
the merging (attention.py) or to draw it.

All functions are pure. Shapes: B images, T tokens before a merge and T' after, D metric width,
C width, N tokens before the first merge; A = ceil(T/2) sources, F = T - A destinations.
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
    """What one block merges: its best pairs, at most `r` of them (None: no limit), and only those
    above `threshold` (None: any). r = 0 switches the block off."""

    r: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Merged:
    """Which tokens the patches have become: mapping (B, N) the token of each patch, size (B, T) the
    patches of each token. The class token counts as a patch, number 0."""

    mapping: Tensor
    size: Tensor

    @staticmethod
    def nothing(x: Tensor) -> "Merged":
        """The state before the first merge of x (B, N, C): every patch is a token."""
        mapping = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        size_dtype = torch.promote_types(x.dtype, torch.float32)
        return Merged(mapping, torch.ones(x.shape[:2], dtype=size_dtype, device=x.device))

    def log_size(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, T), to be added to attention scores in front of the softmax."""
        return self.size.log().to(dtype)[:, None, None]


# ---- one merge ---------------------------------------------------------------------------------


def merge_tokens(
    x: Tensor, metric: Tensor, merged: Merged | None, step: MergeStep
) -> tuple[Tensor, Merged | None]:
    """One round: x (B, T, C) and what to compare them by, metric (B, T, D) -> x (B, T', C).

    `merged` says what the tokens are by now (None: still the patches). The new order is: sources
    that stay, then all destinations, each in their old order. Where nothing merges, x and `merged`
    come back untouched.

    Raises ValueError for a threshold with more than one image: their counts would differ."""
    best, destination = match_tokens(metric)
    r = count_merges(best, step)
    if r == 0:
        return x, merged
    if merged is None:
        merged = Merged.nothing(x)
    places = new_places(best, destination, r, x.shape[1])
    x, size = average(x, merged.size, places, x.shape[1] - r)
    return x, Merged(places.gather(1, merged.mapping), size)


def match_tokens(metric: Tensor) -> tuple[Tensor, Tensor]:
    """For every source its most similar destination: the cosine, and the destination's number,
    both (B, A). metric (B, T, D). The class token is similar to nobody."""
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    cosines = unit[:, ::2] @ unit[:, 1::2].mT  # (B, A, F)
    cosines[:, 0] = -torch.inf
    best, destination = cosines.max(dim=-1)
    return best, destination


def count_merges(best: Tensor, step: MergeStep) -> int:
    """How many pairs merge, given each source's best cosine (B, A): never more than there are
    sources beside the class token. Counting what is above a threshold is the one place where
    merging has to wait for the device."""
    num_sources = best.shape[1] - 1
    most = num_sources if step.r is None else min(step.r, num_sources)
    if step.threshold is None or most == 0:
        return most
    if len(best) > 1:
        raise ValueError(f"a threshold merges one image at a time, not {len(best)}")
    return min(most, int((best > step.threshold).sum()))


def new_places(best: Tensor, destination: Tensor, r: int, num_tokens: int) -> Tensor:
    """Where every token goes when the `r` best pairs merge: (B, T) rows of the new sequence,
    sources that stay first, then the destinations. Of equal cosines the first merges."""
    num_kept = best.shape[1] - r
    kept = best.argsort(dim=-1, descending=True, stable=True)[:, r:].sort(dim=-1).values
    places = best.new_empty(len(best), num_tokens, dtype=torch.long)
    places[:, ::2] = destination + num_kept  # as if all sources merged
    places[:, 1::2] = torch.arange(num_kept, num_tokens - r, device=best.device)
    return places.scatter(1, 2 * kept, torch.arange(num_kept, device=best.device).expand_as(kept))


def average(x: Tensor, size: Tensor, places: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens x (B, T, C) that share a place, each counted `size` (B, T) times,
    summed in float32 at least: the new x (B, T', C) and the new size (B, T'). On a GPU the order of
    the sum is not fixed, so its last bit may differ from run to run."""
    weighted = x * size[..., None]  # in the precision of size
    sums = weighted.new_zeros(len(x) * num_tokens, x.shape[2])
    rows = places + num_tokens * torch.arange(len(x), device=x.device)[:, None]
    sums.index_add_(0, rows.flatten(), weighted.flatten(0, 1))
    new_size = size.new_zeros(len(x), num_tokens).scatter_add_(1, places, size)
    mean = sums.view(len(x), num_tokens, -1).div_(new_size[..., None])
    return mean.to(x.dtype), new_size


# ---- how many merge where ----------------------------------------------------------------------


def spread(total: int, num_layers: int, schedule: str = "constant") -> list[int]:
    """The official ways to merge `total` tokens over `num_layers` blocks: as evenly as whole
    numbers allow, in a falling line, or in a rising one. A block takes fewer where too few are
    left.

    The reference's falling line never ends for some totals, its terms having passed zero (96 over
    24); here it ends there, and what is missing follows as one more term."""
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
    """Merges per block so that exactly `keep` of the patches are left after `num_blocks` blocks, as
    evenly as possible, the larger ones first.

    A block can merge at most half of what it gets, so an even share may be too much for the last
    blocks; then the first ones take more. Raises ValueError for what no spread can reach."""
    total = num_patches - keep
    for share in range(total + 1):
        if sum(capped([share] * num_blocks, num_patches)) >= total:
            break
    else:
        raise ValueError(f"{num_blocks} blocks cannot merge {num_patches} patches into {keep}")
    for num_full in range(num_blocks + 1):
        wanted = [share] * num_full + [share - 1] * (num_blocks - num_full)
        counts = capped(wanted, num_patches)
        if sum(counts) == total:  # one wish more is at most one merge more: never stepped over
            break
    return counts


def capped(counts: Sequence[int], num_patches: int) -> list[int]:
    """What blocks that are asked to merge so many can merge: at most half of what is there."""
    merged = []
    for count in counts:
        merged.append(min(count, num_patches // 2))
        num_patches -= merged[-1]
    return merged
