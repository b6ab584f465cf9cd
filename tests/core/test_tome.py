"""Merging: tome.py, and the tower that it shortens.

Against an oracle of plain lists, written from the definition with its group matrices; against files
that the reference wrote; and the equalities that must hold for any image.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from helpers.dymu import named, slow_attention
from helpers.examples import examples
from helpers.goldens import load_weights, strip
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.tensors import close, draw
from helpers.waits import Watch, cuda_waits, dispatched_waits
from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.llava import Llava
from llava_lite.reduction import DToMe, Reduction, ToMe
from llava_lite.tome import (
    SCHEDULES,
    Merged,
    MergeStep,
    cap_merges,
    match_tokens,
    merge_tokens,
    spread,
    spread_to_keep,
)
from llava_lite.vision import KEY_BLOCK, VisionAttention, VisionTower, attend

few = examples(20)
many = examples(100)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OFF = MergeStep(r=0)

# 36 patches, four blocks, three of which run.
VISION = VisionConfig(
    image_size=84, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4
)


@cache
def tower(dtype: torch.dtype) -> VisionTower:
    """Random weights, the same in every dtype."""
    return random_llava(replace(TINY_CONFIG, vision=VISION), seed=3, dtype=dtype).vision


def draw_images(seed: int, num_images: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(seed, num_images, 3, VISION.image_size, VISION.image_size, dtype=dtype)


@dataclass
class Seen:
    """All that a tower gives: its output, and of every block the tokens x (B, T, C) and what they
    stand for."""

    output: Any
    x: list[Tensor] = field(default_factory=list)
    merged: list[Merged | None] = field(default_factory=list)


@torch.no_grad()
def look(tower: VisionTower, images: Tensor, steps: Sequence[MergeStep | None] | None) -> Seen:
    """Run a tower and watch its blocks."""
    seen = Seen(None)

    def watch(module: torch.nn.Module, args: Any, output: tuple[Tensor, Merged | None]) -> None:
        seen.x.append(output[0])
        seen.merged.append(output[1])

    hooks = [block.register_forward_hook(watch) for block in tower.blocks]
    try:
        seen.output = tower(images, steps)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# ---- one merge, in plain lists -----------------------------------------------------------------

Rows = list[list[float]]


@dataclass
class Slow:
    """Tokens x (T, C), sizes (T,), and groups (T, N): 1 where a patch is part of a token."""

    x: Rows
    size: list[float]
    groups: Rows

    @property
    def mapping(self) -> list[int]:
        """The one token of every patch."""
        columns = list(zip(*self.groups, strict=True))
        assert all(sorted(column) == [0] * (len(column) - 1) + [1] for column in columns)
        return [column.index(1) for column in columns]


def slow_start(x: Rows, size: list[float] | None = None) -> Slow:
    identity = [[float(row == column) for column in range(len(x))] for row in range(len(x))]
    return Slow(x, size or [1.0] * len(x), identity)


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def product(left: Rows, right: Rows) -> Rows:
    columns = list(zip(*right, strict=True))
    return [[dot(row, column) for column in columns] for row in left]


def slow_pairs(metric: Rows) -> tuple[list[tuple[float, int, int]], list[float]]:
    """(cosine, source, destination) of every source but the class token, best first, of equals the
    first; and how far each source's best destination is from the next one."""
    unit = [[value / math.hypot(*row) for value in row] for row in metric]
    pairs, gaps = [], []
    for source in range(2, len(unit), 2):
        cosines = [
            (dot(unit[source], unit[destination]), source, destination)
            for destination in range(1, len(unit), 2)
        ]
        cosines.sort(key=lambda pair: -pair[0])
        pairs.append(cosines[0])
        gaps += [cosines[0][0] - pair[0] for pair in cosines[1:2]]
    return sorted(pairs, key=lambda pair: -pair[0]), gaps


def slow_groups(metric: Rows, step: MergeStep) -> tuple[Rows, float]:
    """The group matrix (T', T) of one merge, and how little would have made it another one."""
    pairs, gaps = slow_pairs(metric)
    gaps += [pairs[i][0] - pairs[i + 1][0] for i in range(len(pairs) - 1)]
    if step.threshold is not None:
        gaps += [abs(pair[0] - step.threshold) for pair in pairs]
        pairs = [pair for pair in pairs if pair[0] > step.threshold]
    joins = {source: destination for _, source, destination in pairs[: step.r]}
    places = list(range(len(metric)))
    if joins:
        places = [place for place in places[::2] if place not in joins] + places[1::2]
    groups = [
        [float(place == token or joins.get(token) == place) for token in range(len(metric))]
        for place in places
    ]
    return groups, min(gaps, default=math.inf)


def slow_merge(slow: Slow, groups: Rows) -> Slow:
    """s' = G s, x' = (G (x s)) / s', P' = G P."""
    weighted = [[c * s for c in row] for row, s in zip(slow.x, slow.size, strict=True)]
    size = [dot(row, slow.size) for row in groups]
    sums = product(groups, weighted)
    x = [[c / s for c in row] for row, s in zip(sums, size, strict=True)]
    return Slow(x, size, product(groups, slow.groups))


def slow_round(slow: Slow, metric: Rows, step: MergeStep) -> tuple[Slow, float]:
    groups, margin = slow_groups(metric, step)
    return slow_merge(slow, groups), margin


def agree(x: Tensor, merged: Merged | None, slow: Slow, tolerance: float) -> None:
    """One image of ours, x (T, C), is the slow one; `merged` has that image only."""
    close(x, torch.tensor(slow.x, dtype=torch.float64), tolerance)
    if merged is None:
        assert slow.mapping == list(range(len(slow.x))) and set(slow.size) == {1}
    else:
        assert merged.mapping.tolist() == [slow.mapping]
        assert merged.size.tolist() == [slow.size]


def image_of(merged: Merged | None, index: int) -> Merged | None:
    if merged is None:
        return None
    return Merged(merged.mapping[index : index + 1], merged.size[index : index + 1])


fixed_steps = st.builds(MergeStep, r=st.integers(0, 24))
all_steps = st.builds(
    MergeStep, r=st.none() | st.integers(0, 24), threshold=st.none() | st.floats(-1.1, 1.1)
)


@many
@given(
    st.integers(1, 3).flatmap(  # a threshold goes with one image only
        lambda b: st.tuples(
            st.just(b), st.lists(all_steps if b == 1 else fixed_steps, min_size=1, max_size=4)
        )
    ),
    st.integers(2, 40),
    st.integers(3, 8),
    st.integers(1, 4),
    seeds,
    dtypes,
    st.booleans(),
)
def test_rounds_equal_the_slow_ones(
    batch_and_steps: tuple[int, list[MergeStep]],
    num_tokens: int,
    metric_width: int,
    width: int,
    seed: int,
    dtype: torch.dtype,
    has_sizes: bool,
) -> None:
    """Any number of merges, from patches or from tokens of any size, of images side by side."""
    num_images, steps = batch_and_steps
    x = draw(seed, num_images, num_tokens, width, dtype=dtype)
    merged, slow = None, [slow_start(rows) for rows in x.double().tolist()]
    if has_sizes:
        size = 1 + draw(seed + 1, num_images, num_tokens, dtype=dtype).abs().mul(9).floor()
        merged = replace(Merged.nothing(x), size=size)
        slow = [slow_start(s.x, sizes) for s, sizes in zip(slow, size.tolist(), strict=True)]
    for number, step in enumerate(steps):
        metric = draw(seed + 2 + number, *x.shape[:2], metric_width, dtype=dtype)
        x, merged = merge_tokens(x, metric, merged, step)
        for index, rows in enumerate(metric.tolist()):
            slow[index], margin = slow_round(slow[index], rows, step)
            assume(margin > {torch.float32: 1e-5, torch.float64: 1e-12}[dtype])
    for index, expected in enumerate(slow):
        agree(x[index], image_of(merged, index), expected, TOLERANCE[dtype])


# ---- one merge, cases --------------------------------------------------------------------------


def axes(*numbers: int) -> Tensor:
    """A metric (1, T, D) whose cosines are exactly 0 or 1: each token points along an axis."""
    return F.one_hot(torch.tensor([numbers]), 8).double()


def groups_of(metric: Tensor, step: MergeStep) -> list[int]:
    """The token of every patch after one merge."""
    _, merged = merge_tokens(metric, metric, None, step)
    return list(range(metric.shape[1])) if merged is None else merged.mapping[0].tolist()


def test_of_equal_cosines_the_first_merges() -> None:
    """Sources 2, 4 and 6 all equal the destinations 3 and 5, and not 1; so they go to 3. New
    places: the sources that stay, then the destinations."""
    metric = axes(0, 1, 2, 2, 2, 2, 2)
    assert groups_of(metric, MergeStep(r=1)) == [0, 3, 4, 4, 1, 5, 2]
    assert groups_of(metric, MergeStep(r=2)) == [0, 2, 3, 3, 3, 4, 1]
    assert groups_of(metric, MergeStep(r=3)) == [0, 1, 2, 2, 2, 3, 2]
    # So many equals that an unstable sort would mix them.
    merging = [place for i in range(40) for place in (61 + i, 61)]
    staying = [place for i in range(60) for place in (101 + i, 1 + i)]
    assert groups_of(axes(0, *[1] * 200), MergeStep(r=40)) == [0, *merging, *staying]


def test_the_best_pairs_merge_and_not_the_first() -> None:
    metric = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [0.0, -1.0], [5.0, 1.0]]])
    assert groups_of(metric, MergeStep(r=1)) == [0, 2, 1, 3, 2]
    best, destination = match_tokens(metric)
    close(best, torch.tensor([[-math.inf, 0.5**0.5, 5 / 26**0.5]]), 1e-6)
    assert destination[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_only_what_is_above_the_threshold_merges(dtype: torch.dtype) -> None:
    """A cosine that equals it stays."""
    metric = axes(0, 1, 1, 2, 3).to(dtype)
    below = float(torch.tensor(1, dtype=dtype).nextafter(torch.tensor(0, dtype=dtype)))
    assert groups_of(metric, MergeStep(threshold=below)) == [0, 2, 2, 3, 1]
    assert groups_of(metric, MergeStep(threshold=1.0)) == [0, 1, 2, 3, 4]
    assert groups_of(metric, MergeStep(threshold=0.0)) == [0, 2, 2, 3, 1]
    assert groups_of(metric, MergeStep(threshold=-0.1)) == [0, 1, 1, 2, 1]
    metric = draw(0, 1, 31, 4, dtype=dtype)
    cosines = match_tokens(metric)[0][0, 1:].sort(descending=True).values
    for rank, cosine in enumerate(cosines.tolist()):
        assert max(groups_of(metric, MergeStep(threshold=cosine))) == 30 - rank


def test_the_limit_goes_together_with_a_threshold() -> None:
    """The smaller of the two counts; r = 0 switches off whatever the threshold."""
    metric = axes(0, 1, 1, 2, 2, 3, 3, 4, 5)
    for r, merges in [(None, 3), (9, 3), (3, 3), (2, 2), (1, 1), (0, 0)]:
        assert max(groups_of(metric, MergeStep(r, threshold=0.5))) == 8 - merges
    assert groups_of(metric, MergeStep(r=2, threshold=0.5)) == [0, 3, 3, 4, 4, 5, 1, 6, 2]


@pytest.mark.parametrize("num_patches", range(1, 10))
def test_at_most_half_merges_and_never_the_class_token(num_patches: int) -> None:
    """Even where the class token equals every destination and no patch does."""
    metric = torch.ones(2, num_patches + 1, 2)
    metric[:, 2::2] = -metric[:, 2::2]
    for step in (MergeStep(r=99), MergeStep()):
        x, merged = merge_tokens(metric, metric, None, step)
        assert x.shape[1] == 1 + num_patches - num_patches // 2
        assert merged is None if num_patches == 1 else alone_and_first(merged)
    for threshold in (-2.0, -math.inf):
        x, _ = merge_tokens(metric[:1], metric[:1], None, MergeStep(threshold=threshold))
        assert x.shape[1] == 1 + num_patches - num_patches // 2
    assert merge_tokens(metric[:1], metric[:1], None, MergeStep(threshold=0.0))[1] is None


def alone_and_first(merged: Merged | None) -> bool:
    """The class token is token 0, and nothing else is."""
    assert merged is not None
    return ((merged.mapping == 0).sum(1) == 1).all().item() and not merged.mapping[:, 0].any()


@pytest.mark.parametrize(
    ("num_tokens", "step"),
    [(9, OFF), (9, MergeStep(r=0, threshold=-2.0)), (9, MergeStep(threshold=1.5))]
    + [(9, MergeStep(r=3, threshold=1.5)), (2, MergeStep(r=5)), (2, MergeStep(threshold=-2.0))],
)
def test_where_nothing_merges_nothing_is_touched(num_tokens: int, step: MergeStep) -> None:
    x, metric = draw(0, 1, num_tokens, 3), draw(1, 1, num_tokens, 3)
    for merged in (None, Merged.nothing(x)):
        after, what = merge_tokens(x, metric, merged, step)
        assert after is x and what is merged


def test_thresholds_merge_one_image_at_a_time() -> None:
    x = draw(0, 3, 9, 2)
    with pytest.raises(ValueError, match="one image at a time, not 3"):
        merge_tokens(x, x, None, MergeStep(threshold=0.5))
    # Switched off, there is nothing to count.
    assert merge_tokens(x, x, None, MergeStep(r=0, threshold=0.5))[0] is x


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16, torch.float16])
def test_tokens_that_point_nowhere(dtype: torch.dtype) -> None:
    """A zero vector is similar to nobody, 0, and opposite to nobody: no NaN anywhere."""
    x = draw(0, 1, 9, 3, dtype=dtype)
    nowhere = torch.zeros_like(x)
    best, destination = match_tokens(nowhere)
    assert best[0, 1:].tolist() == [0, 0, 0, 0] and not destination.any()
    after, merged = merge_tokens(x, nowhere, None, MergeStep(r=2))
    assert merged is not None and merged.mapping.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]
    assert after.isfinite().all()
    some = x.clone()
    some[:, 3:5] = 0
    assert match_tokens(some)[0][0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_and_sums_in_single(dtype: torch.dtype) -> None:
    """Sizes are exact beyond 256, where bfloat16 counts no further, and a mean over 513 tokens is
    only rounded at its end."""
    x = (1 + draw(0, 1, 1025, 64)).to(dtype)
    alike = torch.ones(1, 1025, 2, dtype=dtype)
    after, merged = merge_tokens(x, alike, None, MergeStep(r=512))
    assert merged is not None and after.dtype == dtype and merged.size.dtype == torch.float32
    assert merged.size[0, :3].tolist() == [1, 513, 1]
    members = x[0].double()[merged.mapping[0] == 1]
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(after[0, 1].double(), members.mean(0), atol=1e-6, rtol=rounding)
    # Cosines that half precision cannot tell apart are told apart.
    nearly = torch.tensor([[[1, 0], [1, 0], [1, 0.03], [0, 1], [1, 0.02]]], dtype=dtype)
    assert groups_of(nearly, MergeStep(r=1)) == [0, 2, 1, 3, 2]


@many
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    seeds,
    dtypes,
)
def test_merging_is_a_partition_and_a_mean(
    num_images: int, num_tokens: int, counts: list[int], seed: int, dtype: torch.dtype
) -> None:
    """After any number of merges a token is the mean of its patches, however they came together."""
    patches = x = draw(seed, num_images, num_tokens, 3, dtype=dtype)
    merged: Merged | None = None
    for number, r in enumerate(counts):
        x, merged = merge_tokens(
            x, draw(seed + number, *x.shape, dtype=dtype), merged, MergeStep(r)
        )
    merged = merged or Merged.nothing(x)
    left = 1 + num_tokens - 1 - sum(cap_merges(counts, num_tokens - 1))
    assert x.shape == (num_images, left, 3) and merged.size.shape == (num_images, left)
    assert merged.mapping.shape == (num_images, num_tokens) and merged.mapping.dtype == torch.long
    members = F.one_hot(merged.mapping, left).to(dtype)  # (B, N, T)
    assert torch.equal(members.sum(1), merged.size) and (merged.size >= 1).all()
    assert (merged.size.sum(1) == num_tokens).all() and (merged.size[:, 0] == 1).all()
    assert alone_and_first(merged) and torch.equal(x[:, 0], patches[:, 0])
    close(x, members.mT @ patches / merged.size[..., None], TOLERANCE[dtype])


# ---- how many merge where ----------------------------------------------------------------------


def test_schedules() -> None:
    assert spread(10, 5) == [2, 2, 2, 2, 2] and spread(8, 5) == [2, 2, 2, 1, 1]
    assert spread(10, 5, "linear") == [4, 3, 2, 1, 0]
    assert spread(10, 5, "reverse_linear") == [0, 1, 2, 3, 4]
    assert spread(96, 24) == [4] * 24
    # The reference's line: 8 - i / 3, for ever. It reaches zero at block 22 with 93 merged.
    line = [math.floor(8 - i / 3) for i in range(22)]
    assert spread(96, 24, "linear") == [*line, 96 - sum(line), 0]
    assert spread(1, 4, "linear") == [1, 0, 0, 0] and spread(0, 3, "linear") == [0, 0, 0]


@many
@given(st.integers(0, 2000), st.integers(1, 60), st.sampled_from(SCHEDULES))
@example(17, 5, "linear")  # the line would not end within the blocks
def test_schedules_spend_everything(total: int, num_layers: int, schedule: str) -> None:
    counts = spread(total, num_layers, schedule)
    assert len(counts) == num_layers and min(counts) >= 0 and sum(counts) == total
    if schedule == "constant":
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    if schedule == "reverse_linear":
        assert counts == spread(total, num_layers, "linear")[::-1]


def fewest(num_patches: int, num_blocks: int) -> int:
    """What is left when every block merges half of what it gets."""
    for _ in range(num_blocks):
        num_patches -= num_patches // 2
    return num_patches


@pytest.mark.parametrize(
    ("num_patches", "num_blocks"), [(576, 23), (576, 6), (16, 2), (7, 5), (1, 3), (40, 1)]
)
def test_any_number_can_be_kept(num_patches: int, num_blocks: int) -> None:
    """Exactly, evenly, and no block is asked for more than half of what it gets."""
    reachable = range(fewest(num_patches, num_blocks), num_patches + 1)
    for keep in reachable:
        counts, left = spread_to_keep(keep, num_patches, num_blocks), num_patches
        assert len(counts) == num_blocks
        for count in counts:
            assert 0 <= count <= left // 2
            left -= count
        assert left == keep
        assert counts == sorted(counts, reverse=True)
        if keep < num_patches:  # with one less for the largest, it could not be done
            assert sum(cap_merges([max(counts) - 1] * num_blocks, num_patches)) < num_patches - keep
        even = spread(num_patches - keep, num_blocks)
        if cap_merges(even, num_patches) == even:
            assert counts == even
    for keep in (reachable.start - 1, num_patches + 1):
        with pytest.raises(ValueError, match=f"{num_blocks} blocks cannot merge {num_patches}"):
            spread_to_keep(keep, num_patches, num_blocks)


def test_where_half_is_not_enough_for_an_even_share() -> None:
    assert spread_to_keep(72, 576, 23) == spread(504, 23) == [22] * 21 + [21] * 2
    assert spread_to_keep(4, 16, 2) == [8, 4] and spread_to_keep(5, 16, 2) == [6, 5]
    assert spread_to_keep(1, 16, 4) == [8, 4, 2, 1]
    assert spread_to_keep(1, 16, 5) == [4, 4, 4, 2, 1]
    assert spread_to_keep(576, 576, 23) == [0] * 23


@many
@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 60), seeds)
def test_what_blocks_can_merge_is_what_they_merge(
    counts: list[int], num_patches: int, seed: int
) -> None:
    x, merged = draw(seed, 1, num_patches + 1, 2), None
    for wanted, possible in zip(counts, cap_merges(counts, num_patches), strict=True):
        before = x.shape[1]
        x, merged = merge_tokens(x, x, merged, MergeStep(r=wanted))
        assert before - x.shape[1] == possible


# ---- the tower ---------------------------------------------------------------------------------


@torch.no_grad()
def slow_tower(image: Tensor, steps: Sequence[MergeStep | None]) -> tuple[Tensor, list[int]]:
    """One image (1, 3, S, S) through the float64 tower, each merge in plain lists: features of all
    tokens with the class token (T, C), and the token of every patch and of the class token."""
    model = tower(torch.float64)
    weights = model.state_dict()
    x = F.layer_norm(model.embed(image)[0], (VISION.hidden_size,), *named(weights, "pre_norm"))
    slow: Slow | None = None
    for index, step in enumerate(steps):
        part = strip(weights, f"blocks.{index}.")
        mixed, key = slow_attention(part, x, slow.size if slow else None, VISION.num_heads)
        x = x + mixed
        if step is not None:
            before = replace(slow, x=x.tolist()) if slow else slow_start(x.tolist())
            slow, _ = slow_round(before, key.tolist(), step)
            x = torch.tensor(slow.x, dtype=torch.float64)
        hidden = F.linear(
            F.layer_norm(x, x.shape[-1:], *named(part, "norm2")), *named(part, "mlp.fc1")
        )
        x = x + F.linear(hidden * torch.sigmoid(1.702 * hidden), *named(part, "mlp.fc2"))
    return x, slow.mapping if slow else list(range(len(x)))


block_steps = st.lists(
    st.none()
    | st.builds(
        MergeStep, r=st.none() | st.integers(0, 20), threshold=st.none() | st.floats(0.3, 1)
    ),
    min_size=VISION.num_blocks,
    max_size=VISION.num_blocks,
)


@few
@given(seeds, block_steps)
def test_tower_equals_the_slow_one(seed: int, steps: list[MergeStep | None]) -> None:
    """Also where blocks without a step follow on merged tokens."""
    image = draw_images(seed, 1)
    expected, mapping = slow_tower(image, steps)
    seen = look(tower(torch.float64), image, steps)
    output = seen.output
    close(output.image_features[0], expected[1:], 1e-9)
    patches = range(VISION.num_patches) if output.mapping is None else output.mapping[0].tolist()
    assert [token + 1 for token in patches] == mapping[1:] and mapping[0] == 0
    assert output.tokens_per_block == tuple(x.shape[1] - 1 for x in seen.x)


@few
@given(seeds, st.lists(st.integers(0, 20), min_size=3, max_size=3), st.integers(2, 3))
def test_a_batch_is_its_images(seed: int, counts: list[int], num_images: int) -> None:
    images, steps = draw_images(seed, num_images), [MergeStep(r=count) for count in counts]
    batch_equals_singles(tower(torch.float64), images, steps, TOLERANCE[torch.float64])


# In float32 the order of sums may decide between pairs that are equally similar but for rounding;
# so these images are always the same.
@pytest.mark.parametrize("keep", [36, 30, 15, 5])
def test_a_batch_is_its_images_in_float32(keep: int) -> None:
    steps = ToMe(keep=keep).steps(VISION)
    images = draw_images(keep, 4, torch.float32)
    batch_equals_singles(tower(torch.float32), images, steps, TOLERANCE[torch.float32])


def batch_equals_singles(
    model: VisionTower, images: Tensor, steps: Sequence[MergeStep], tolerance: float
) -> None:
    batch = look(model, images, steps)
    for index, image in enumerate(images):
        single = look(model, image[None], steps)
        assert single.output.tokens_per_block == batch.output.tokens_per_block
        close(batch.output.image_features[index], single.output.image_features[0], tolerance)
        for one, all_of_them in zip(single.merged, batch.merged, strict=True):
            assert (one is None) == (all_of_them is None)
            if one is not None and all_of_them is not None:
                assert torch.equal(one.mapping[0], all_of_them.mapping[index])
                assert torch.equal(one.size[0], all_of_them.size[index])


NOTHING_MERGES: list[Sequence[MergeStep | None]] = [
    [None] * 3,
    [OFF] * 3,
    [MergeStep(r=0, threshold=-1.0)] * 3,
    [None, OFF, MergeStep(threshold=1.0)],
    [MergeStep(threshold=1.0)] * 3,
    [MergeStep(r=5, threshold=7.0)] * 3,
    ToMe(keep=VISION.num_patches).steps(VISION),
    DToMe((1.0,) * VISION.num_layers).steps(VISION),
]


@pytest.mark.parametrize("steps", NOTHING_MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_merge_it_is_the_plain_tower(
    steps: Sequence[MergeStep | None], dtype: torch.dtype
) -> None:
    """Bit for bit."""
    image = draw_images(1, 1, dtype)
    plain, other = (look(tower(dtype), image, wanted).output for wanted in (None, steps))
    assert torch.equal(other.image_features, plain.image_features)
    assert other.mapping is plain.mapping is None
    assert other.tokens_per_block == plain.tokens_per_block == (36, 36, 36)


def test_every_block_needs_a_step() -> None:
    for number in (2, 4):
        with pytest.raises(ValueError):
            tower(torch.float32)(draw_images(0, 1, torch.float32), [OFF] * number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_tower_merges(dtype: torch.dtype) -> None:
    """Features keep its dtype, sizes are float32."""
    steps = ToMe(keep=12).steps(VISION)
    seen = look(tower(dtype), draw_images(2, 2, dtype), steps)
    assert seen.output.image_features.shape == (2, 12, 32)
    assert seen.output.image_features.dtype == dtype and seen.output.image_features.isfinite().all()
    assert all(merged is not None and merged.size.dtype == torch.float32 for merged in seen.merged)


# Around a multiple of KEY_BLOCK, where attention adds no keys, few, or many that nobody may see.
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 63, 64, 65, 80])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [*TOLERANCE.items(), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
@torch.no_grad()
def test_a_token_weighs_as_much_as_its_patches(
    num_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Attention over tokens of some size = attention over so many copies of each."""
    attn = tower(dtype).blocks[0].attn
    assert isinstance(attn, VisionAttention)
    x = draw(num_tokens, 2, num_tokens, VISION.hidden_size, dtype=dtype)
    size = torch.arange(num_tokens) % 4 + 1
    mapping = torch.arange(num_tokens).repeat_interleave(size)
    merged = Merged(mapping.expand(2, -1), size.to(dtype).expand(2, -1))
    mixed, keys = attn(x, merged)
    copies, copied_keys = attn(x[:, mapping], None)
    close(mixed[:, mapping], copies, tolerance)
    close(keys[:, :, mapping], copied_keys, tolerance)
    if num_tokens > 1:  # a single token has all the weight anyway
        unweighted, _ = attn(x, Merged(merged.mapping, torch.ones_like(merged.size)))
        close(unweighted, attn(x, None)[0], tolerance)
        assert (unweighted - mixed).abs().max() > 3 * tolerance


@torch.no_grad()
def test_padded_keys_are_never_seen() -> None:
    q, k, v = draw(0, 3, 1, 2, KEY_BLOCK + 1, 4)
    merged = Merged.nothing(q[:, 0])
    close(attend(q, k - 99, v - 99, merged), attend(q, k - 99, v - 99, None), 1e-9)


@few
@given(seeds, st.integers(1, 5), dtypes)
@torch.no_grad()
def test_merging_equal_patches_changes_nothing(
    seed: int, num_tiles: int, dtype: torch.dtype
) -> None:
    """An image of few different tiles, seen without positions: the tower runs on fewer and fewer
    tokens, and every patch gets the features that it has without merging."""
    model = VisionTower(VISION).to(dtype)
    model.load_state_dict(tower(dtype).state_dict())
    model.pos_embed.zero_()
    tiles = draw(seed, num_tiles, 3, 14, 14, dtype=dtype)
    chosen = draw(seed + 1, 36).mul(999).long() % num_tiles
    image = tiles[chosen].unflatten(0, (6, 6)).permute(2, 0, 3, 1, 4).reshape(1, 3, 84, 84)
    steps = [MergeStep(threshold=1 - 1e-5)] * 3
    plain, seen = look(model, image, None), look(model, image, steps)
    mapping = seen.output.mapping
    assert mapping is not None and seen.output.tokens_per_block[0] < 30
    tiles_of_tokens = set(zip(mapping[0].tolist(), chosen.tolist(), strict=True))
    assert len(tiles_of_tokens) == seen.output.tokens_per_block[-1]  # no token holds two tiles
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    close(seen.output.image_features[:, mapping[0]], plain.output.image_features, tolerance)


# ---- waiting for the device --------------------------------------------------------------------

ABOVE = MergeStep(threshold=0.9)
WAITING: list[tuple[Sequence[MergeStep | None] | None, int, int]] = [
    (None, 3, 0),
    ([OFF] * 3, 3, 0),
    ([MergeStep(r=5)] * 3, 3, 0),
    ([None, MergeStep(), None], 3, 0),  # all that can merge
    ([ABOVE] * 3, 1, 3),
    ([MergeStep(threshold=1.0)] * 3, 1, 3),  # that nothing merges, only the device knows
    ([MergeStep(r=4, threshold=0.9)] * 3, 1, 3),
    ([MergeStep(r=0, threshold=0.9), ABOVE, None], 1, 1),
    ([None, MergeStep(r=7), ABOVE], 1, 1),
]


def waits_of(
    model: VisionTower, steps: Sequence[MergeStep | None] | None, num_images: int, watch: Watch
) -> int:
    """How often a tower waits for its device."""
    images = draw_images(0, num_images, torch.float32).to(model.class_embed.device)
    with torch.no_grad(), watch() as found:
        model(images, steps)
    return len(found)


@pytest.mark.parametrize(("steps", "num_images", "expected"), WAITING)
def test_waits_for_the_device(
    steps: Sequence[MergeStep | None] | None, num_images: int, expected: int
) -> None:
    """Once in every block that has to count, never with fixed numbers."""
    assert waits_of(tower(torch.float32), steps, num_images, dispatched_waits) == expected


@pytest.mark.parametrize("steps", [None, [OFF] * 3, [MergeStep(r=5)] * 3, [MergeStep()] * 3])
def test_fixed_merges_look_at_no_value(steps: Sequence[MergeStep] | None) -> None:
    """They run on a device without any."""
    model = VisionTower(VISION).to("meta")
    output = model(torch.empty(2, 3, 84, 84, device="meta"), steps)
    assert output.image_features.shape == (2, output.tokens_per_block[-1], 32)
    with pytest.raises(RuntimeError, match="meta"):
        model(torch.empty(1, 3, 84, 84, device="meta"), [ABOVE] * 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("steps", "num_images", "expected"), WAITING)
def test_waits_for_a_gpu(
    steps: Sequence[MergeStep | None] | None, num_images: int, expected: int
) -> None:
    model = VisionTower(VISION).to("cuda")
    model.load_state_dict(tower(torch.float32).state_dict())
    waits_of(model, steps, num_images, dispatched_waits)  # libraries may wait when they first start
    assert waits_of(model, steps, num_images, cuda_waits) == expected


# ---- what the reference computes: one merge ----------------------------------------------------

Case = tuple[dict[str, Any], dict[str, Tensor]]
CLASS_CASES = [
    "i01_odd_cls", "i05_sized_odd", "i07_cap_half_odd", "i09_r0", "i11_f32", "i12_thr",
    "i13_thr_none_pass", "i15_thr_maxr", "i17_thr_r0_gate", "i18_t3", "i21_exact_thr_strict",
]  # fmt: skip
BATCH_CASES = ["b01_find_odd", "b03_thr", "b05_find_padded", "b08_find_j_overflow"]
GOLDEN_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def matching(shared: Path) -> dict[str, Case]:
    """goldens/dymu/a_matching: figures and tensors by case."""
    folder = shared / "goldens" / "dymu"
    figures = json.loads((folder / "a_matching.json").read_text())
    tensors = load_file(folder / "a_matching.safetensors")
    return {name: (figures[name], strip(tensors, f"{name}.")) for name in figures}


def test_no_case_is_left_out(matching: dict[str, Case]) -> None:
    without_class = {name for name, (figures, _) in matching.items() if not figures["class_token"]}
    assert without_class == {"i03_odd_nocls"}
    others = {"i20_ties_informational", *without_class}
    assert set(matching) == {*CLASS_CASES, *BATCH_CASES, *others}


def step_of(figures: dict[str, Any], metric: Tensor) -> MergeStep:
    """The reference's settings: with a threshold its r is no more than a switch, and a limit has
    another name. What a batch merged, its own threshold says, unless it merged all."""
    threshold = figures["threshold"] or figures.get("batch_threshold")
    if not threshold:
        return MergeStep(figures["r"])
    # Some thresholds are one of the cosines. Sums in another order may round it to another side
    # of itself, so then it is ours of that pair.
    cosines = match_tokens(metric)[0][0, 1:]
    same = cosines[(cosines - threshold).abs() < 1e-12].tolist()
    limit = figures["max_r_per_instance"] if figures["r"] else 0
    return MergeStep(limit, *(same or [threshold]))


def start_of(golden: dict[str, Tensor]) -> Merged | None:
    if "size_in" not in golden:
        return None
    return replace(Merged.nothing(golden["x"]), size=golden["size_in"][..., 0])


@pytest.mark.parametrize("name", CLASS_CASES)
def test_a_merge_equals_the_reference_s(matching: dict[str, Case], name: str) -> None:
    figures, golden = matching[name]
    x, start = golden["x"], start_of(golden)
    tolerance = GOLDEN_TOLERANCE[x.dtype]
    after, merged = merge_tokens(x, golden["metric"], start, step_of(figures, golden["metric"]))
    assert (merged is start) == figures["noop"]
    assert after.shape[1] == figures["t_out"]
    close(after, golden["x_out"], tolerance)
    merged = merged or Merged.nothing(x)
    assert merged.mapping.tolist() == golden["group"].tolist()
    assert torch.equal(merged.size, golden["size_out"][..., 0])
    if not figures["noop"]:
        close(after[:, merged.mapping[0]], golden["unmerged"], tolerance)
        assert figures["r_effective"] == x.shape[1] - after.shape[1]
        expected_pairs(golden["metric"], golden)
        groups = F.one_hot(merged.mapping[0], after.shape[1]).T
        assert torch.equal(groups, golden["source"][0].long())


def expected_pairs(metric: Tensor, golden: dict[str, Tensor]) -> None:
    """The reference's pairs are our best ones, and go where ours do."""
    best, destination = match_tokens(metric)
    sources, targets = golden["src_idx"][0].long(), golden["dst_idx"][0].long()
    ranked = best[0].argsort(descending=True)
    assert set(ranked[: len(sources)].tolist()) == set(sources.tolist())
    assert destination[0, sources].tolist() == targets.tolist()
    assert ranked[len(sources) :].sort().values.tolist() == golden["unm_idx"][0].tolist()


def test_ties_merge_pairs_as_good_as_the_reference_s(matching: dict[str, Case]) -> None:
    """Which of equals it takes depends on its library's sort; how good they are does not."""
    figures, golden = matching["i20_ties_informational"]
    metric = golden["metric"]
    best, _ = match_tokens(metric)
    ours = best[0].sort(descending=True).values[: figures["r"]]
    unit = F.normalize(metric[0], dim=-1)
    sources, destinations = 2 * golden["src_idx"][0].long(), 2 * golden["dst_idx"][0].long() + 1
    theirs = (unit[sources] * unit[destinations]).sum(-1)
    close(ours, theirs.sort(descending=True).values, 1e-12)
    after, _ = merge_tokens(golden["x"], metric, None, step_of(figures, metric))
    assert after.shape[1] == figures["t_out"]


def test_without_a_class_token(matching: dict[str, Case]) -> None:
    """The reference can also merge where there is no class token. Our towers always have one, so
    token 0 never merges here, and what stays keeps its order, where the reference then orders it
    by similarity. All the rest applies: the case is ours behind a class token and a patch that is
    similar to nobody. (It is also the first destination, so that even places stay even.)"""
    figures, golden = matching["i03_odd_nocls"]
    metric = F.pad(golden["metric"], (0, 2, 2, 0))
    metric[0, 0, -1], metric[0, 1, -2] = 1, 1
    x = F.pad(golden["x"], (0, 0, 2, 0))
    after, merged = merge_tokens(x, metric, None, step_of(figures, metric))
    assert merged is not None and after.shape[1] == figures["t_out"] + 2
    mapping, theirs = merged.mapping[0, 2:], golden["group"][0].long()
    close(after[:, mapping], golden["unmerged"], 1e-12)
    assert torch.equal(merged.size[0, mapping], golden["size_out"][0, theirs, 0])
    together = [rows[:, None] == rows for rows in (mapping, theirs)]
    assert torch.equal(*together)
    assert sorted(golden["src_idx"][0].tolist())[0] == 0  # it did merge its token 0


@pytest.mark.parametrize("name", BATCH_CASES)
def test_each_image_of_a_batch_equals_the_reference_s(matching: dict[str, Case], name: str) -> None:
    """Whom the reference merges in a batch of images that keep different numbers, padded to the
    longest, is what each image's cosines above the threshold say. We run such images one by one
    and do not repeat that it divides there by size + 1e-4, unlike for a single image."""
    figures, golden = matching[name]
    padding = golden.get("padding_mask_in", torch.zeros(golden["metric"].shape[:2]))
    for index, length in enumerate((padding == 0).sum(1).tolist()):
        image = {
            key: golden[key][index : index + 1, :length]
            for key in ("x", "metric", "size_in")
            if key in golden
        }
        step = step_of(figures, image["metric"])
        after, merged = merge_tokens(image["x"], image["metric"], start_of(image), step)
        num_left = figures["n_valid_out"][index]
        assert after.shape[1] == num_left
        merged = merged or start_of(image) or Merged.nothing(image["x"])
        size = golden["size_out"][index, :num_left]
        assert torch.equal(merged.size[0], size[:, 0])
        groups = golden["pos_out"][index, :num_left, :length].long()
        assert torch.equal(F.one_hot(merged.mapping[0], num_left).T, groups)
        close(after[0], golden["x_out"][index, :num_left] * (size + 1e-4) / size, 1e-12)


def test_schedules_equal_the_reference_s(vit: "Vit") -> None:
    for name, expected in vit.figures["schedules"].items():
        total, *schedule, num_layers = name.split("_")
        counts = spread(int(total), int(num_layers), "_".join(schedule))
        if isinstance(expected, str):
            assert "NEVER TERMINATES" in expected
            assert len(counts) == int(num_layers)
            assert min(counts) >= 0 and sum(counts) == int(total)
        else:
            assert counts == expected


# ---- what the reference computes: a tower ------------------------------------------------------


@dataclass(frozen=True)
class Vit:
    """goldens/dymu/b_vit: a small tower, its images, and what came out."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    figures: dict[str, Any]

    def llava(self, image_size: int, dtype: torch.dtype, feature_layer: int = -1) -> Llava:
        """A model with this tower, for its own 84 px or for 56; all five blocks unless told."""
        stored = strip(self.inputs, "weights84.", "visual.")
        if image_size == 56:
            table = stored["visual.positional_embedding"]
            patches = table[1:].unflatten(0, (6, 6))[:4, :4].flatten(0, 1)
            stored["visual.positional_embedding"] = torch.cat((table[:1], patches))
        vision = VisionConfig(
            image_size=image_size,
            hidden_size=32,
            intermediate_size=128,
            num_layers=5,
            num_heads=4,
            feature_layer=feature_layer,
        )
        llava = Llava(LlavaConfig(vision, TINY_TEXT)).to(dtype)
        return load_weights(llava, stored, ["vision"])

    def images(self, name: str, dtype: torch.dtype) -> Tensor:
        if self.figures[name]["image"] == 56:
            return self.inputs["image56.a"].to(dtype)
        images = self.inputs["image84.b4"].to(dtype)
        return images if name.endswith("_b4") else images[[int(name[-1]) if "img" in name else 0]]

    def steps(self, name: str) -> list[MergeStep]:
        figures = self.figures[name]
        if figures["specified_thresholds"] is None:
            return [MergeStep(r) for r in figures["rs"]]
        ratio = figures["tome"].get("max_r_per_instance_ratio")
        return [
            MergeStep(0 if r == 0 else None if ratio is None else math.floor(ratio * r), threshold)
            for r, threshold in zip(figures["rs"], figures["specified_thresholds"], strict=True)
        ]


VIT_CASES = [
    "nomerge84", "inst56_r10_const", "inst56_r10_linear", "inst56_r25_cap", "inst84_r20_const_b4",
    "thr84_img0", "thr84_img2", "thr84_all1_img0", "thr84_allneg_img0", "thr84_maxr_img0",
]  # fmt: skip
VIT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def vit(shared: Path) -> Vit:
    folder = shared / "goldens" / "dymu"
    return Vit(
        load_file(folder / "b_vit_inputs.safetensors"),
        load_file(folder / "b_vit_outputs.safetensors"),
        json.loads((folder / "b_vit.json").read_text()),
    )


def test_no_case_of_the_tower_is_left_out(vit: Vit) -> None:
    figures = {name: value for name, value in vit.figures.items() if isinstance(value, dict)}
    assert {name for name, value in figures.items() if "rs" in value} == set(VIT_CASES)
    stored = {name.split(".")[0] for name in vit.outputs} - {"find"}
    assert stored == {*VIT_CASES, "plain84"}


@pytest.mark.parametrize("name", VIT_CASES)
@pytest.mark.parametrize("dtype", VIT_TOLERANCE)
@torch.no_grad()
def test_every_block_equals_the_reference_s(vit: Vit, name: str, dtype: torch.dtype) -> None:
    figures, golden = vit.figures[name], strip(vit.outputs, f"{name}.")
    images = vit.images(name, dtype)
    seen = look(vit.llava(figures["image"], dtype).vision, images, vit.steps(name))
    compared = set()
    for index, (x, merged) in enumerate(zip(seen.x, seen.merged, strict=True)):
        assert [x.shape[1]] * len(x) == figures["ntoks"][f"block_{index}_ntoks"]
        merged = merged or Merged.nothing(x)
        assert merged.mapping.tolist() == golden[f"group{index}"].tolist()
        if f"size{index}" in golden:  # it has none where it never counted
            assert merged.size.tolist() == golden[f"size{index}"].tolist()
        else:
            assert name == "nomerge84"
        if f"hidden{index}" in golden:
            compared.add(index)
            close(x, golden[f"hidden{index}"], VIT_TOLERANCE[dtype])
    assert compared == {0, 3, 4}
    normed = F.layer_norm(seen.x[-1].double(), (32,), *norm_after(vit))
    close(normed, golden["last_hidden_after_ln_post"], VIT_TOLERANCE[dtype])
    close(pooled(vit, seen.x[-1]), golden["pooled"], VIT_TOLERANCE[dtype])


def norm_after(vit: Vit) -> tuple[Tensor, Tensor]:
    """The final norm, which LLaVA never runs."""
    norm = strip(vit.inputs, "weights84.ln_post.")
    return norm["weight"].double(), norm["bias"].double()


def pooled(vit: Vit, x: Tensor) -> Tensor:
    """CLIP's own projection of the class token, which LLaVA never runs either."""
    normed = F.layer_norm(x[:, 0].double(), (32,), *norm_after(vit))
    return normed @ vit.inputs["weights84.proj"].double()


def test_the_plain_tower_equals_the_reference_s(vit: Vit) -> None:
    images = vit.inputs["image84.b4"].double()
    seen = look(vit.llava(84, torch.float64).vision, images, None)
    close(pooled(vit, seen.x[-1]), vit.outputs["plain84.pooled"], 1e-10)


@pytest.mark.parametrize("name", VIT_CASES)
@pytest.mark.parametrize("dtype", VIT_TOLERANCE)
@torch.no_grad()
def test_what_llava_sees_equals_the_reference_s(vit: Vit, name: str, dtype: torch.dtype) -> None:
    """Four of the five blocks, without the class token."""
    golden = strip(vit.outputs, f"{name}.")
    model = vit.llava(vit.figures[name]["image"], dtype, feature_layer=-2).vision
    output = model(vit.images(name, dtype), vit.steps(name)[:4])
    features, mapping = output.image_features, output.mapping
    close(features, golden["sel_features"], VIT_TOLERANCE[dtype])
    if mapping is None:
        mapping = torch.arange(features.shape[1])[None]
    groups = F.one_hot(mapping, features.shape[1]).mT
    assert torch.equal(groups, golden["sel_pos"].long())
    if "sel_size" in golden:
        assert torch.equal(groups.sum(-1).double(), golden["sel_size"])
    assert output.tokens_per_block[-1] == features.shape[1]


def test_images_keep_their_own_numbers(vit: Vit) -> None:
    """A batch with thresholds is its images one by one, and each keeps as many tokens as the
    reference keeps of it alone. (Its own batches differ: one image there loses one more token.)"""
    llava, batch = vit.llava(84, torch.float64, -2), vit.inputs["image84.b4"].double()
    reduction = Reduction(DToMe(tuple(vit.figures["find.final_thresholds"])))
    with torch.no_grad():
        together = llava.encode_image(batch, reduction)
        for index, image in enumerate(together):
            [alone] = llava.encode_image(batch[[index]], reduction)
            assert image.mapping is not None and alone.mapping is not None
            assert torch.equal(image.image_embeds, alone.image_embeds)
            assert torch.equal(image.mapping, alone.mapping)
            expected = vit.figures["batch_vs_single"][f"img{index}"]["single"]
            assert [count + 1 for count in image.tokens_per_block] == expected[:4]
    assert len({len(image.image_embeds) for image in together}) == 4
