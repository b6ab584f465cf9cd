"""Token reduction in the decoder as a whole: pruning (fastv.py) on every layout (layout.py).

Against a slow oracle, against the equalities that must hold for any size and any batch, and against
files that the reference systems wrote. The oracle has full attention matrices, knows no cache, and
takes a chat as one long sequence, so it stands for recomputing too.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from helpers.examples import examples
from helpers.goldens import GOLDEN_TOLERANCE, Golden, load_weights, text_config
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.prompts import Lists, Picture, Prompt, decode, prompts, seeds, write_out
from helpers.tensors import close, draw, log_sizes_of, rms_norm_oracle
from helpers.waits import Watch, cuda_waits, dispatched_waits
from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig
from llava_lite.fastv import ImageRows, Pruning, choose, last_row, rank_tokens, row_scores
from llava_lite.layout import Layout
from llava_lite.llava import EncodedImage, Llava
from llava_lite.reduction import POSITIONS, RESTS, SCORES, FastV, Reduction, ToMe
from llava_lite.rope import apply_rope, rope_cos_sin

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9}
TIE = {torch.float32: 1e-5, torch.float64: 1e-9}  # scores closer than this may change places
TEXT = replace(TINY_TEXT, num_layers=4)
LLAVAS = {dtype: random_llava(replace(TINY_CONFIG, text=TEXT), dtype=dtype) for dtype in DTYPES}
few = examples(80)
dtypes = st.sampled_from(DTYPES)
starts = st.sampled_from([0, 3, 1100])  # positions from 1000 on were out of the reference's reach


@st.composite
def wishes(draw_value: st.DrawFn, rests: Sequence[str] = ("drop",)) -> FastV:
    """A pruning of any layers, amounts and kind."""
    kind: dict[str, Any] = {
        "score": draw_value(st.sampled_from(SCORES)),
        "per_image": draw_value(st.booleans()),
        "rest": draw_value(st.sampled_from(rests)),
    }
    shares = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])
    if draw_value(st.booleans()):
        layers = sorted(draw_value(st.sets(st.integers(1, 3), min_size=1)))
        counts = st.sets(st.integers(1, 8), min_size=len(layers), max_size=len(layers))
        falling = sorted(draw_value(counts), reverse=True)
        amounts = [draw_value(st.just(count) | shares) for count in falling]
        return FastV(stages=tuple(zip(layers, amounts, strict=True)), **kind)
    layer = draw_value(st.integers(1, 3))
    if draw_value(st.booleans()):
        return FastV(keep=draw_value(st.integers(1, 6)), layer=layer, **kind)
    return FastV(drop=draw_value(shares), layer=layer, **kind)


@st.composite
def ways(draw_value: st.DrawFn, pruned: bool = False, rests: Sequence[str] = RESTS) -> Reduction:
    """A way through the decoder: positions, and maybe a pruning (`pruned`: always)."""
    positions = draw_value(st.sampled_from(POSITIONS))
    wish = wishes(rests if positions == "folded" else ("drop",))
    return Reduction(None, positions, draw_value(wish if pruned else st.none() | wish))


# ---- running ours ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one item's forward gave: logits (U', V) of all rows left, cache, stages of pruning."""

    logits: Tensor
    cache: KVCache
    stages: tuple[Pruning, ...]
    layout: Layout

    @property
    def lengths(self) -> list[int]:
        """Cached positions of each layer."""
        return [k.shape[2] for k, _ in self.cache]


@torch.inference_mode()
def run(
    llava: Llava,
    rows: Tensor,
    layout: Layout,
    fastv: FastV | None = None,
    past: KVCache | None = None,
) -> Run:
    logits, [cache], [stages] = llava([rows], [layout], [past], [fastv], all_logits=True)
    return Run(logits, cache, stages, layout)


def run_prompt(
    llava: Llava, prompt: Prompt, positions: str, fastv: FastV | None = None, start: int = 0
) -> Run:
    return run(llava, *prompt.splice(llava, positions, start), fastv)


def run_way(llava: Llava, prompt: Prompt, way: Reduction, start: int = 0) -> Run:
    return run_prompt(llava, prompt, way.positions, way.fastv, start)


def same(first: Run, second: Run) -> None:
    """Bit for bit, and no weights where there were none."""
    assert torch.equal(first.logits, second.logits)
    for here, there in zip(first.cache, second.cache, strict=True):
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
        sizes = [getattr(pair, "log_sizes", None) for pair in (here, there)]
        assert [size is None for size in sizes] in ([True] * 2, [False] * 2)
        assert log_sizes_of(here) == log_sizes_of(there)


def alike(first: Run, second: Run, tolerance: float) -> None:
    """Up to rounding."""
    close(first.logits, second.logits, tolerance)
    for here, there in zip(first.cache, second.cache, strict=True):
        close(here[0], there[0], tolerance)
        close(here[1], there[1], tolerance)


def assume_no_ties(stages: Sequence[Pruning], dtype: torch.dtype) -> None:
    """Rounding must not decide who stays."""
    for pruning in stages:
        stays = torch.zeros_like(pruning.scores, dtype=torch.bool)
        stays[pruning.kept] = True
        gaps = pruning.scores[stays][:, None] - pruning.scores[~stays]
        assume(bool(gaps.abs().min() > TIE[dtype]))


# ---- the oracle --------------------------------------------------------------------------------


Key = tuple[int, list[int]]  # a row, and its places: one, or all of a folded token


@dataclass(frozen=True)
class Turn:
    """A prompt within a sequence: its rows, and those of each image. Its last position asks."""

    rows: range
    images: list[list[int]]


@dataclass(frozen=True)
class Stage:
    """A pruning of a turn: the rows in front of it and behind it, its candidates with their
    scores, the rows of each image that stay, and the row that each candidate became a part of."""

    layer: int
    before: list[int]
    after: list[int]
    candidates: list[int]
    scores: list[float]
    images: list[list[int]]
    folded_into: list[int] | None


@dataclass(frozen=True)
class Expected:
    """logits (U', V), the row of each, per layer keys and values (H, n, D), the stages of each
    turn, and the smallest distance between two likenesses of which the larger one was chosen."""

    logits: Tensor
    rows: list[int]
    caches: list[tuple[Tensor, Tensor]]
    stages: list[list[Stage]]
    gap: float


def turn_oracle(lists: Lists, past_rows: int = 0) -> Turn:
    """The turn of a prompt after so many rows."""
    images = [[past_rows + row for row in rows] for rows in lists.image_rows]
    return Turn(range(past_rows, past_rows + lists.num_rows), images)


def full_attention(
    w: dict[str, Tensor], x: Tensor, keys: list[Key], visible: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer's attention over all keys: rows x (U, C) -> what o_proj gives (U, C), the
    probabilities (H, N, N), and k and v (H, N, D). A key with several places is turned by the mean
    of their rotations, and counts that often."""
    mapping = [row for row, _ in keys]
    q, k, v = (
        (x @ w[f"attn.{name}_proj.weight"].T).reshape(len(x), TEXT.num_heads, -1)[mapping]
        for name in "qkv"
    )  # (N, H, D)
    half = TEXT.head_dim // 2
    # Rotations and the logs of sizes have float32 in every model.
    turns = []
    for _, places in keys:
        cos, sin = rope_cos_sin(torch.tensor(places), TEXT.head_dim, TEXT.rope_theta)
        mean_cos, mean_sin = sum(cos) / len(places), sum(sin) / len(places)
        turns.append(torch.complex(mean_cos[:half].double(), mean_sin[:half].double()))
    log_sizes = torch.tensor([len(places) for _, places in keys]).log()
    turned = []
    for part in (q, k):
        pairs = torch.complex(part[..., :half], part[..., half:]) * torch.stack(turns)[:, None]
        turned.append(torch.cat((pairs.real, pairs.imag), -1))
    q, k, v = (part.transpose(0, 1) for part in (*turned, v))
    scores = q @ k.mT / TEXT.head_dim**0.5 + log_sizes.double()
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    mixed = (probs @ v).transpose(0, 1).flatten(1)  # (N, C)
    rows = []
    for row in range(len(x)):
        members = [mixed[e] for e, owner in enumerate(mapping) if owner == row]
        rows.append(torch.stack(members).sum(0) / len(members))
    return torch.stack(rows) @ w["attn.o_proj.weight"].T, probs, k, v


@torch.no_grad()
def stack_oracle(
    llava: Llava,
    x: Tensor,
    keys: list[Key],
    turns: Sequence[Turn] = (),
    fastv: FastV | None = None,
    mask: bool = False,
) -> Expected:
    """The decoder, in float64: rows x (U, C), and the rows and places that attention sees.

    Scores come from the full probabilities of the layer in front of the pruned one. `mask` hides
    what is dropped from all others instead of dropping it."""
    x, rows, hidden = x.double(), list(range(len(x))), set[int]()
    caches, stages, gap = [], [list[Stage]() for _ in turns], 1.0
    images = [turn.images for turn in turns]
    amounts = {} if fastv is None else fastv.amounts
    probs, seen = torch.empty(0), keys  # of the layer before
    weights = {name: tensor.double() for name, tensor in llava.decoder.state_dict().items()}
    for layer_idx in range(TEXT.num_layers):
        for index, turn in enumerate(turns if layer_idx in amounts else ()):
            assert fastv is not None
            scores = ask(probs, seen, turn, hidden, fastv.score_of_merged)
            kept = stay(scores, images[index], amounts[layer_idx], fastv)
            candidates, before = sum(images[index], []), [r for r in rows if r in turn.rows]
            if len(kept) == len(candidates):
                continue
            dropped = [row for row in candidates if row not in kept]
            into = None
            if fastv.rest == "fold":
                x, keys, into, smallest = fold_oracle(x, rows, keys, images[index], kept)
                gap = min(gap, smallest)
            if mask:
                hidden |= set(dropped)
            else:
                x = x[[i for i, row in enumerate(rows) if row not in dropped]]
                keys = [key for key in keys if key[0] not in dropped]
                rows = [row for row in rows if row not in dropped]
            images[index] = [[row for row in image if row in kept] for image in images[index]]
            stages[index].append(
                Stage(
                    layer_idx,
                    before,
                    [row for row in before if row not in dropped],
                    candidates,
                    [scores[row] for row in candidates],
                    images[index],
                    into,
                )
            )
        visible = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()
        for e, (row, _) in enumerate(keys):
            if row in hidden:
                visible[:, e] = False
                visible[e, e] = True  # someone must be seen; nobody looks at the answer
        name = f"layers.{layer_idx}."
        w = {key.removeprefix(name): v for key, v in weights.items() if key.startswith(name)}
        normed = rms_norm_oracle(x, w["input_norm.weight"], TEXT.rms_norm_eps)
        now = [(rows.index(row), places) for row, places in keys]
        mixed, probs, k, v = full_attention(w, normed, now, visible)
        seen = keys
        caches.append((k, v))
        x = x + mixed
        normed = rms_norm_oracle(x, w["post_attn_norm.weight"], TEXT.rms_norm_eps)
        gate = normed @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + (-gate).exp()) * (normed @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    logits = rms_norm_oracle(x, weights["norm.weight"], TEXT.rms_norm_eps)
    return Expected(logits @ weights["lm_head.weight"].T, rows, caches, stages, gap)


def ask(
    probs: Tensor, keys: list[Key], turn: Turn, hidden: set[int], score: str
) -> dict[int, float]:
    """The scores of a turn's rows from full probabilities (H, N, N)."""
    asks = [e for e, (row, _) in enumerate(keys) if row in turn.rows and row not in hidden][-1]
    looks, sizes = dict[int, float](), dict[int, int]()
    for e, (row, places) in enumerate(keys):
        looks[row] = looks.get(row, 0.0) + float(probs[:, asks, e].mean())
        sizes[row] = sizes.get(row, 0) + len(places)
    return {row: looks[row] / (sizes[row] if score == "mean" else 1) for row in looks}


def stay(
    scores: dict[int, float], images: list[list[int]], amount: int | float, fastv: FastV
) -> list[int]:
    """The image rows that stay. Folding keeps the best row of every image."""
    kept, groups = [], images if fastv.per_image else [sum(images, [])]
    for group in groups:
        count = amount if isinstance(amount, int) else max(1, round(len(group) * (1 - amount)))
        first = set[int]()
        if fastv.rest == "fold":
            owned = [image for image in images if set(image) <= set(group)]
            first = {min(image, key=lambda row: (-scores[row], row)) for image in owned}
        order = sorted(group, key=lambda row: (row not in first, -scores[row], row))
        kept += sorted(order[: max(count, len(first))])
    return kept


def fold_oracle(
    x: Tensor, rows: list[int], keys: list[Key], images: list[list[int]], kept: list[int]
) -> tuple[Tensor, list[Key], list[int], float]:
    """Each row of an image that does not stay becomes a part of the row most like it: x with the
    new rows in the places of the kept ones, the keys with all places, the row that each row became
    a part of, and the smallest distance between the best likeness and another."""
    place = {row: i for i, row in enumerate(rows)}
    unit, gap, into = x / x.norm(dim=-1, keepdim=True), 1.0, dict[int, int]()
    for image in images:
        takers = [row for row in image if row in kept]
        for row in image:
            if row in takers:
                into[row] = row
                continue
            alike = [float(unit[place[row]] @ unit[place[taker]]) for taker in takers]
            into[row] = takers[alike.index(max(alike))]
            others = sorted(alike)[-2:]
            gap = min(gap, others[1] - others[0]) if len(others) == 2 else gap
    places, new_x = dict(keys), x.clone()
    for taker in kept:
        parts = [row for row in into if into[row] == taker]
        sizes = torch.tensor([len(places[row]) for row in parts]).double()
        new_x[place[taker]] = sizes @ x[[place[row] for row in parts]] / sizes.sum()
    merged = [
        (row, sorted(sum((places[part] for part in into if into[part] == row), [])))
        if row in kept
        else (row, own)
        for row, own in keys
    ]
    return new_x, merged, [into[row] for image in images for row in image], gap


def check_forward(ours: Run, expected: Expected, first_row: int, turn: int | None) -> None:
    """One forward against its rows in the oracle's sequence, from `first_row` on; `turn` is the
    number of its turn there (None: words only)."""
    dtype, num_rows = ours.logits.dtype, ours.layout.num_rows
    left = [row for row in expected.rows if first_row <= row < first_row + num_rows]
    close(
        ours.logits, expected.logits[[expected.rows.index(row) for row in left]], TOLERANCE[dtype]
    )
    stages = [] if turn is None else expected.stages[turn]
    assert len(ours.stages) == len(stages)
    for pruning, stage in zip(ours.stages, stages, strict=True):
        assert pruning.layer == stage.layer
        close(pruning.scores, torch.tensor(stage.scores, dtype=torch.float64), TIE[dtype] / 10)
        kept = [stage.candidates[token] for token in pruning.kept.tolist()]
        assert kept == sum(stage.images, [])
        assert [stage.before[row] for row in pruning.kept_indices.tolist()] == stage.after
        assert [stage.after[row] for row in pruning.image_rows.rows.tolist()] == kept
        of_image = [i for i, image in enumerate(stage.images) for _ in image]
        assert pruning.image_rows.images.tolist() == of_image
        if stage.folded_into is None:
            assert pruning.folded_into is None
        else:
            assert pruning.folded_into is not None
            takers = [stage.candidates[token] for token in pruning.folded_into.tolist()]
            assert takers == stage.folded_into


def check_cache(ours: KVCache, expected: Expected, dtype: torch.dtype) -> None:
    """Every layer's keys and values, position by position."""
    for (k, v), (expected_k, expected_v) in zip(ours, expected.caches, strict=True):
        close(k[0], expected_k, TOLERANCE[dtype])
        close(v[0], expected_v, TOLERANCE[dtype])


# Two images in front of everything, one directly after the other, one word behind them.
ADJACENT = Prompt(
    (IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 9),
    (Picture(3, (2, 0, 2, 1, 0, 2), 1), Picture(2, (1, 0, 0, 1), 2)),
)
LAST = Prompt((3, 4, IMAGE_TOKEN_ID), (Picture(3, (2, 0, 2, 1, 0, 2), 1),))


FOLD = FastV(keep=2, layer=1, rest="fold")
STAGES = FastV(stages=((1, 4), (2, 0.5), (3, 1)))


@few
@given(prompts(min_tail=0), ways(), starts, dtypes)
@example(ADJACENT, Reduction(None, "vtu", FastV(keep=2, layer=1)), 0, torch.float64)
@example(ADJACENT, Reduction(None, "vtu", FastV(keep=1, layer=3, per_image=True)), 0, torch.float32)
@example(ADJACENT, Reduction(None, "vtu", STAGES), 0, torch.float32)
@example(ADJACENT, Reduction(None, "logical", FastV(drop=0.5, layer=2)), 1100, torch.float32)
@example(ADJACENT, Reduction(None, "folded", STAGES), 3, torch.float64)
@example(ADJACENT, Reduction(None, "folded", FOLD), 1100, torch.float64)
@example(ADJACENT, Reduction(None, "folded", replace(STAGES, rest="fold")), 0, torch.float64)
@example(LAST, Reduction(None, "vtu", FastV(keep=2, layer=2, score="mean")), 0, torch.float64)
@example(LAST, Reduction(None, "folded", replace(FOLD, score="sum")), 0, torch.float64)
@example(
    ADJACENT,
    Reduction(None, "folded", replace(STAGES, rest="fold", score="mean", per_image=True)),
    0,
    torch.float64,
)
def test_prefill_equals_the_oracle(
    prompt: Prompt, way: Reduction, start: int, dtype: torch.dtype
) -> None:
    """Logits, scores, who stays, and caches, over any partition, any image place and any wish."""
    ours = run_way(LLAVAS[dtype], prompt, way, start)
    assume_no_ties(ours.stages, dtype)
    lists, exact = write_out(prompt, way.positions, start), LLAVAS[torch.float64]
    rows = prompt.splice(exact, way.positions, start)[0]
    expected = stack_oracle(exact, rows, lists.keys(), [turn_oracle(lists)], way.fastv)
    assume(expected.gap > TIE[dtype])
    check_forward(ours, expected, 0, 0)
    check_cache(ours.cache, expected, dtype)


words = st.lists(st.integers(3, TEXT.vocab_size - 1), max_size=3)


@few
@given(
    st.lists(st.tuples(prompts(max_images=1), words), min_size=1, max_size=3),
    ways(),
    starts,
    dtypes,
)
@example(
    [(ADJACENT, [5, 6]), (ADJACENT, [7])],
    Reduction(None, "vtu", FastV(keep=2, layer=1)),
    0,
    torch.float64,
)
@example(
    [(ADJACENT, [5, 6]), (ADJACENT, [7])],
    Reduction(None, "logical", FastV(keep=2)),
    3,
    torch.float32,
)
@example([(ADJACENT, [5, 6]), (LAST, [7])], Reduction(None, "folded"), 3, torch.float64)
@example([(ADJACENT, [5]), (LAST, [7, 8])], Reduction(None, "folded", FOLD), 0, torch.float64)
@example(
    [(ADJACENT, [5, 6]), (LAST, []), (ADJACENT, [7])],
    Reduction(None, "folded", FastV(stages=((1, 4), (3, 2)), rest="fold")),
    0,
    torch.float64,
)
def test_cached_steps_equal_recomputing(
    chat: list[tuple[Prompt, list[int]]], way: Reduction, start: int, dtype: torch.dtype
) -> None:
    """Prompts, each answered token by token over the cache, against one pass over everything in
    which each prompt's own last token decides once what that prompt loses."""
    exact, llava, position = LLAVAS[torch.float64], LLAVAS[dtype], start
    turns: list[Turn] = []
    forwards: list[tuple[Run, int, int | None]] = []
    rows: list[Tensor] = []
    keys: list[Key] = []
    cache, num_rows = None, 0
    for prompt, answer in chat:
        for piece in (prompt, *(Prompt((token,), ()) for token in answer)):
            lists = write_out(piece, way.positions, position)
            if piece is prompt:
                turns.append(turn_oracle(lists, num_rows))
            ours = run(llava, *piece.splice(llava, way.positions, position), way.fastv, cache)
            assume_no_ties(ours.stages, dtype)
            forwards.append((ours, num_rows, len(turns) - 1 if piece is prompt else None))
            rows.append(piece.splice(exact, way.positions, position)[0])
            keys += [(num_rows + row, places) for row, places in lists.keys()]
            num_rows += lists.num_rows
            cache, position = ours.cache, ours.layout.next_position
    expected = stack_oracle(exact, torch.cat(rows), keys, turns, way.fastv)
    assume(expected.gap > TIE[dtype])
    for ours, first_row, turn in forwards:
        check_forward(ours, expected, first_row, turn)
    assert cache is not None
    check_cache(cache, expected, dtype)


@few
@given(prompts(min_images=1), ways(pruned=True, rests=["drop"]))
def test_hiding_equals_dropping(prompt: Prompt, way: Reduction) -> None:
    """For the rows that stay: nobody ever asked the others for more than keys and values."""
    llava = LLAVAS[torch.float64]
    ours = run_way(llava, prompt, way)
    assume(len(ours.stages) > 0)
    assume_no_ties(ours.stages, torch.float64)
    lists = write_out(prompt, way.positions)
    rows = prompt.splice(llava, way.positions)[0]
    turn = turn_oracle(lists)
    masked = stack_oracle(llava, rows, lists.keys(), [turn], way.fastv, mask=True)
    assert len(masked.logits) == lists.num_rows
    close(ours.logits, masked.logits[rows_left(ours)], TOLERANCE[torch.float64])


def rows_left(ours: Run) -> list[int]:
    """The rows that are left after all stages."""
    left = list(range(ours.layout.num_rows))
    for pruning in ours.stages:
        left = [left[row] for row in pruning.kept_indices.tolist()]
    return left


# ---- what must be equal ------------------------------------------------------------------------


@torch.inference_mode()
def plain_llama(llava: Llava, x: Tensor, start: int) -> Tensor:
    """Llama and nothing else, of the kernels that ours uses: x (N, C) -> logits (N, V)."""
    decoder = llava.decoder
    cos, sin = rope_cos_sin(torch.arange(start, start + len(x)), TEXT.head_dim, TEXT.rope_theta)
    for layer in decoder.layers:
        normed = layer.input_norm(x)
        q, k, v = (
            F.linear(normed, proj.weight).view(len(x), TEXT.num_heads, -1)
            for proj in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed[0].transpose(0, 1).reshape(len(x), -1), layer.attn.o_proj.weight)
        x = x + layer.mlp(layer.post_attn_norm(x))
    return F.linear(decoder.norm(x), decoder.lm_head.weight)


@few
@given(prompts(min_tail=0), st.sampled_from(POSITIONS), starts, dtypes)
def test_nothing_set_is_plain_llava(
    prompt: Prompt, positions: str, start: int, dtype: torch.dtype
) -> None:
    """Bit for bit, whatever `positions` says: without merging it is about nothing."""
    llava = LLAVAS[dtype]
    whole = tuple(replace(picture, groups=None) for picture in prompt.pictures)
    rows, layout = Prompt(prompt.input_ids, whole).splice(llava, positions, start)
    ours = run(llava, rows, layout)
    same(ours, run(llava, rows, Layout.text(len(rows), start, CPU)))
    assert torch.equal(ours.logits, plain_llama(llava, rows, start))
    assert layout.next_position == start + len(rows)


@few
@given(prompts(min_images=1, min_tail=0), ways(), dtypes, st.data())
def test_singleton_groups_are_no_merging(
    prompt: Prompt, way: Reduction, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Bit for bit: every patch its own token, in order; or in any order, where rows go by their
    patches."""
    whole, single = [], []
    for picture in prompt.pictures:
        whole.append(replace(picture, groups=None))
        image = whole[-1].encoded(dtype)
        order = torch.arange(picture.num_tokens)
        if way.positions in ("folded", "logical"):
            order = torch.tensor(data.draw(st.permutations(range(picture.num_tokens))))
        single.append(EncodedImage(image.image_embeds[order], order.argsort()))
    llava = LLAVAS[dtype]
    ours = run(llava, *llava.splice(prompt.input_ids, single, 0, way.positions), way.fastv)
    plain = run_prompt(llava, Prompt(prompt.input_ids, tuple(whole)), "plain", way.fastv)
    same(ours, plain)
    assert ours.layout.next_position == plain.layout.next_position


@few
@given(prompts(), ways(pruned=True), dtypes)
def test_keeping_all_is_no_pruning(prompt: Prompt, way: Reduction, dtype: torch.dtype) -> None:
    """Bit for bit; as is any pruning of a prompt without images."""
    off, wish = run_prompt(LLAVAS[dtype], prompt, way.positions), way.fastv
    assert wish is not None
    sizes = [picture.num_tokens for picture in prompt.pictures]
    enough = max(sizes, default=1) if wish.per_image else max(sum(sizes), 1)
    kind: dict[str, Any] = {"score": wish.score, "per_image": wish.per_image, "rest": wish.rest}
    for fastv in (
        FastV(keep=enough, layer=wish.layer, **kind),
        FastV(keep=10**9, **kind),
        FastV(drop=1e-9, **kind),
        FastV(stages=((1, 10**9), (2, 1e-9), (3, enough)), **kind),
    ):
        on = run_prompt(LLAVAS[dtype], prompt, way.positions, fastv)
        assert on.stages == ()
        same(on, off)


@few
@given(prompts(min_images=1), ways(), dtypes, st.data())
def test_order_of_merged_tokens_means_nothing(
    prompt: Prompt, way: Reduction, dtype: torch.dtype, data: st.DataObject
) -> None:
    """The encoder's order is not raster order; all but `plain` go by patches only."""
    assume(way.positions != "plain")
    llava, images, permuted, orders = LLAVAS[dtype], [], [], []
    for picture in prompt.pictures:
        groups = picture.groups or tuple(range(picture.num_tokens))
        image = replace(picture, groups=groups).encoded(dtype)
        order = torch.tensor(data.draw(st.permutations(range(picture.num_tokens))))
        assert image.mapping is not None
        permuted.append(EncodedImage(image.image_embeds[order], order.argsort()[image.mapping]))
        images.append(image)
        orders.append(order)
    here = run(llava, *llava.splice(prompt.input_ids, images, 0, way.positions), way.fastv)
    assume_no_ties(here.stages, dtype)
    there = run(llava, *llava.splice(prompt.input_ids, permuted, 0, way.positions), way.fastv)
    if way.positions != "vtu":
        same(here, there)
    close(here.logits[-1], there.logits[-1], TOLERANCE[dtype])
    for old, new in zip(here.cache, there.cache, strict=True):
        close(old[0], new[0], TOLERANCE[dtype])
        close(old[1], new[1], TOLERANCE[dtype])
    if way.positions == "vtu" and here.stages and there.stages:
        firsts = [0, len(orders[0])]
        moved = torch.cat([order + first for order, first in zip(orders, firsts, strict=False)])
        close(here.stages[0].scores[moved], there.stages[0].scores, TIE[dtype])
        assert sorted(moved[there.stages[0].kept].tolist()) == here.stages[0].kept.tolist()


@dataclass(frozen=True)
class Item:
    """One item of a batch: a prompt, or the token after it (`token` is not None)."""

    prompt: Prompt
    way: Reduction
    token: int | None = None

    def inputs(self, llava: Llava) -> tuple[Tensor, Layout, KVCache | None]:
        rows, layout = self.prompt.splice(llava, self.way.positions)
        if self.token is None:
            return rows, layout, None
        past = run(llava, rows, layout, self.way.fastv).cache
        return *Prompt((self.token,), ()).splice(llava, "vtu", layout.next_position), past


items = st.builds(
    Item, prompts(min_tail=0), ways(), st.none() | st.integers(3, TEXT.vocab_size - 1)
)
EIGHT = [
    Item(ADJACENT, Reduction(None, "vtu", FastV(keep=2, layer=1))),
    Item(ADJACENT, Reduction(None, "logical", FastV(keep=1, layer=3, per_image=True))),
    Item(ADJACENT, Reduction(None, "vtu", FastV(keep=3, layer=1, score="mean")), 7),
    Item(ADJACENT, Reduction(None, "folded", STAGES)),
    Item(ADJACENT, Reduction(None, "folded")),
    Item(LAST, Reduction(None, "folded", FOLD), 8),
    Item(ADJACENT, Reduction(None, "folded", replace(STAGES, rest="fold"))),
    Item(LAST, Reduction(None, "plain", STAGES)),
]


@few
@given(st.lists(items, min_size=1, max_size=4), dtypes)
@example(EIGHT, torch.float32)
@example(EIGHT, torch.float64)
def test_a_batch_equals_its_items(batch: list[Item], dtype: torch.dtype) -> None:
    """Merged in different ways or not, pruned in front of different layers or not, prompts, words
    only, and decode steps side by side."""
    llava = LLAVAS[dtype]
    inputs = [item.inputs(llava) for item in batch]
    wanted = [item.way.fastv for item in batch]
    alone = [
        run(llava, *part[:2], wish, part[2]) for part, wish in zip(inputs, wanted, strict=True)
    ]
    for single in alone:
        assume_no_ties(single.stages, dtype)
    rows, where, pasts = map(list, zip(*inputs, strict=True))
    with torch.inference_mode():
        logits, caches, prunings = llava(rows, where, pasts, wanted, all_logits=True)
        last, _, _ = llava(rows, where, pasts, wanted)
    packed = logits.split([len(single.logits) for single in alone])
    for index, single in enumerate(alone):
        together = Run(packed[index], caches[index], prunings[index], where[index])
        alike(together, single, TOLERANCE[dtype])
        if len(batch) == 1:
            same(together, single)
        for here, there in zip(together.stages, single.stages, strict=True):
            assert torch.equal(here.kept, there.kept)
            assert torch.equal(here.kept_indices, there.kept_indices)
            if here.folded_into is not None and there.folded_into is not None:
                assert torch.equal(here.folded_into, there.folded_into)
        for new, old in zip(caches[index], single.cache, strict=True):
            assert log_sizes_of(new) == log_sizes_of(old)
        with torch.inference_mode():
            [answers], _, _ = llava([rows[index]], [where[index]], [pasts[index]], [wanted[index]])
        close(last[index], answers, TOLERANCE[dtype])


# ---- lengths, positions, last rows -------------------------------------------------------------


@few
@given(prompts(min_images=1, max_images=1), ways())
@example(LAST, Reduction(None, "folded"))
@example(LAST, Reduction(None, "folded", FastV(stages=((1, 2), (3, 1)), rest="fold")))
def test_cache_lengths(prompt: Prompt, way: Reduction) -> None:
    """All positions below the pruned layer; from it on text and what stays: whole groups in `vtu`,
    one position for each token otherwise. A decoded token adds one everywhere."""
    llava = LLAVAS[torch.float32]
    ours = run_way(llava, prompt, way)
    [picture] = prompt.pictures
    num_text, groups = len(prompt.input_ids) - 1, picture.groups or range(picture.num_tokens)
    kept = list(range(picture.num_tokens))
    expected, stages = [], {pruning.layer: pruning for pruning in ours.stages}
    for layer in range(TEXT.num_layers):
        if way.fastv is not None and layer in way.fastv.amounts:
            num_kept = way.fastv.num_kept(len(kept), layer)
            assert (layer in stages) == (num_kept < len(kept))
            if layer in stages:
                kept = [kept[token] for token in stages[layer].kept.tolist()]
            assert len(kept) == num_kept
        shown = len(kept)
        if way.positions == "vtu":
            shown = sum(group in kept for group in groups)
        expected.append(num_text + shown)
    assert ours.lengths == expected
    _, grown = decode(llava, [5, 6], ours.layout.next_position, ours.cache)
    assert [k.shape[2] for k, _ in grown] == [length + 2 for length in expected]
    assert len(ours.logits) == num_text + len(kept)


@torch.inference_mode()
def test_new_tokens_stand_behind_all_positions_in_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Position N + t, not the length of any shortened cache."""
    llava, prompt = LLAVAS[torch.float64], ADJACENT
    ours = run_prompt(llava, prompt, "vtu", FastV(keep=1, layer=1))
    assert ours.lengths[0] == 11 and ours.lengths[1] < 11
    seen: list[list[int]] = []
    for layer in llava.decoder.layers:
        forward = layer.attn.forward

        def spying(
            x: Tensor, cos: Tensor, sin: Tensor, packed: Any, *rest: Any, f: Any = forward
        ) -> Any:
            seen.append(packed.position_ids.tolist())
            return f(x, cos, sin, packed, *rest)

        monkeypatch.setattr(layer.attn, "forward", spying)
    decode(llava, [5, 6], ours.layout.next_position, ours.cache)
    assert seen == [[11]] * TEXT.num_layers + [[12]] * TEXT.num_layers


@few
@given(prompts(min_images=1, min_tail=0), ways(), dtypes)
@example(LAST, Reduction(), torch.float64)
@example(LAST, Reduction(fastv=FastV(keep=2, layer=1)), torch.float32)
@example(LAST, Reduction(None, "folded", FOLD), torch.float32)
def test_the_last_position_answers(prompt: Prompt, way: Reduction, dtype: torch.dtype) -> None:
    """Of a prompt that ends with an image: the row that its last position shows, and if pruning
    took that, the last position that is left. The last row where a row is seen once."""
    llava = LLAVAS[dtype]
    rows, layout = prompt.splice(llava, way.positions)
    ours = run(llava, rows, layout, way.fastv)
    kept = rows_left(ours)
    shown = [row for row, _ in write_out(prompt, way.positions).keys() if row in kept]
    with torch.inference_mode():
        [last], _, _ = llava([rows], [layout], [None], [way.fastv])
    close(last, ours.logits[kept.index(shown[-1])], TOLERANCE[dtype])


def test_prefill_takes_the_whole_reduction() -> None:
    """`Llava.prefill` merges, places and prunes as the reduction says."""
    llava = LLAVAS[torch.float32]
    pixel_values = draw(3, 1, 3, 56, 56, dtype=torch.float32)
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 9, 12]])
    for positions, position in (("vtu", 19), ("folded", 19), ("logical", 19), ("plain", 9)):
        reduction = Reduction(ToMe(keep=6), positions, FastV(keep=2, layer=2))
        with torch.inference_mode():
            logits, cache, following = llava.prefill(input_ids, pixel_values, reduction)
            images = llava.encode_image(pixel_values, reduction)
            parts = llava.splice(input_ids[0].tolist(), images, positions=positions)
        single = run(llava, *parts, reduction.fastv)
        close(logits[0, 0], single.logits[-1], TOLERANCE[torch.float32])
        assert following == position == single.layout.next_position
        assert [k.shape[2] for k, _ in cache] == single.lengths
        assert len(single.logits) == 5


# ---- fastv.py on its own -----------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 9), st.sampled_from([*DTYPES, torch.bfloat16]))
def test_last_row_is_the_attention_of_the_last_token(
    seed: int, num_keys: int, dtype: torch.dtype
) -> None:
    query, keys = (
        draw(seed, 1, 3, 1, 8, dtype=dtype),
        draw(seed + 1, 1, 3, num_keys, 8, dtype=dtype),
    )
    sizes = torch.randint(1, 600, (num_keys,), generator=torch.Generator().manual_seed(seed))
    for each in (None, sizes):
        probs = last_row(query, keys, None if each is None else each.log())
        # A key of size s counts as s equal keys do, and has the sum of their attention.
        copies = torch.arange(num_keys).repeat_interleave(1 if each is None else each)
        check_row(probs, query, keys[:, :, copies], copies)


def check_row(probs: Tensor, query: Tensor, keys: Tensor, copies: Tensor) -> None:
    dtype = query.dtype
    assert probs.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.stack(
        [
            torch.softmax(keys[0, head].double() @ query[0, head, 0].double() / 8**0.5, 0)
            for head in range(3)
        ]
    )
    close(probs, torch.zeros(len(probs)).double().index_add(0, copies, exact.mean(0)), 1e-6)


def test_scores_of_rows() -> None:
    probs, mapping = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 2])
    unmerged = Layout(3, torch.arange(4), 4, mapping)
    close(row_scores(probs, unmerged, "sum"), torch.tensor([0.2, 0.4, 0.4]), 1e-7)
    close(row_scores(probs, unmerged, "mean"), torch.tensor([0.2, 0.2, 0.4]), 1e-7)
    assert row_scores(probs, Layout.text(4, 0, CPU), "sum") is probs
    folded = replace(unmerged, folded=True)
    assert row_scores(probs[:3], folded, "sum").tolist() == probs[:3].tolist()
    close(row_scores(probs[:3], folded, "mean"), torch.tensor([0.1, 0.1, 0.3]), 1e-7)


def test_of_equal_scores_the_first_stays() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 3.0, 2.0] * 20)
    assert rank_tokens(scores, 43).tolist() == sorted(
        [i for i in range(120) if i % 6 in (1, 4)] + [2, 3, 5]
    )


def test_choose_together_or_for_each_image() -> None:
    """Rows 1-3 and 5-6 are images; text stays however little attention it gets."""
    scores = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0, 2.0, 3.0, 0.0])
    images = ImageRows.of([(1, 4), (5, 7)], CPU)
    together = choose(scores, images, [3], 1)
    assert together.kept.tolist() == [0, 2, 4]
    assert together.kept_indices.tolist() == [0, 1, 3, 4, 6, 7]
    assert together.scores.tolist() == [5, 1, 4, 2, 3]
    each = choose(scores, images, [1, 1], 1)
    assert each.kept.tolist() == [0, 4]
    assert each.kept_indices.tolist() == [0, 1, 4, 6, 7]


@pytest.mark.parametrize(
    "way",
    [
        Reduction(None, "vtu", FastV(keep=2, layer=2)),
        Reduction(None, "folded", FastV(stages=((1, 4), (2, 2)), rest="fold")),
    ],
    ids=str,
)
def test_a_bfloat16_model_reduces(way: Reduction) -> None:
    llava = random_llava(replace(TINY_CONFIG, text=TEXT), dtype=torch.bfloat16)
    ours, exact = (run_way(model, ADJACENT, way) for model in (llava, LLAVAS[torch.float32]))
    assert ours.logits.dtype == torch.bfloat16
    for here, there in zip(ours.stages, exact.stages, strict=True):
        assert here.scores.dtype == torch.float32
        assert torch.equal(here.kept, there.kept)
        if way.fastv.rest == "fold":
            assert torch.equal(here.folded_into, there.folded_into)
    similarity = torch.cosine_similarity(ours.logits[-1].float(), exact.logits[-1], dim=0)
    assert similarity > 0.99


# ---- what the reference systems compute --------------------------------------------------------

SYSTEM, PATCHES = 5, 16  # rows in front of the goldens' image, and of it


@pytest.fixture(scope="module")
def fastv_golden(shared: Path) -> Golden:
    """goldens/fastv: a Llama of 4 layers, its inputs, and the runs of all reference systems."""
    folder = shared / "goldens" / "fastv"
    config = json.loads((folder / "config.json").read_text())["llama_config"]
    llava = Llava(LlavaConfig(TINY_CONFIG.vision, text_config(config)))
    load_weights(llava, load_file(folder / "tiny_llama_weights.safetensors"), ["decoder"])
    tensors, figures = load_file(folder / "inputs.safetensors"), {}
    for name in ("fastv_hf439", "fastv_tf431", "hybrid_reference"):
        tensors |= load_file(folder / f"{name}.safetensors")
        stored = json.loads((folder / f"{name}.json").read_text())
        figures |= stored.get("runs", stored)
    return Golden(llava, tensors, figures)


def image_prompt(golden: Golden, tail: Sequence[int] = ()) -> tuple[Tensor, Layout]:
    """The goldens' prompt with its image unmerged, and some more words."""
    ids = [*golden.tensors["sys_input_ids"], IMAGE_TOKEN_ID, *golden.tensors["tail_input_ids"]]
    image = EncodedImage(golden.tensors["image_features"])
    return golden.llava.splice([int(token) for token in [*ids, *tail]], [image])


@contextmanager
def inputs_of_layer(llava: Llava, layer_idx: int) -> Iterator[list[Tensor]]:
    """Collects what goes into a layer."""
    seen: list[Tensor] = []
    hook = llava.decoder.layers[layer_idx].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    yield seen
    hook.remove()


def fastv_of(figures: dict[str, Any]) -> FastV | None:
    """The pruning of a reference's run: a share that goes, or a number that stays."""
    if figures.get("fastv_k") is not None:
        return FastV(drop=figures["fastv_r"], layer=figures["fastv_k"])
    if figures.get("K") is not None:
        return FastV(keep=figures["rank"], layer=figures["K"])
    return None


def check_prefill(golden: Golden, name: str, step: int, ours: Run, fastv: FastV | None) -> None:
    """One pass over a prompt against one step of a run: who stays, scores, logits."""
    figures = golden.figures[name]["steps"][step]
    last = golden.tensors[f"{name}.last_logits"][step]
    close(ours.logits[-1], last, GOLDEN_TOLERANCE)
    assert int(ours.logits[-1].argmax()) == figures["next_token"]
    if "kv_lengths" in figures:
        assert ours.lengths == figures["kv_lengths"]
    if fastv is not None:
        [pruning] = ours.stages
        assert pruning.kept_indices.tolist() == figures["kept_indices"]
        scores = golden.tensors[f"{name}.scores_step{step}"]
        assert (pruning.scores - scores).abs().max() <= 1e-6


CACHED = [
    "vanilla_cache",
    "hf_K1_r0.5_cache",
    "hf_K2_r0.5_cache",
    "hf_K3_r0.7_cache",
    "hf_K2_r0.84375_cache",
]


@torch.inference_mode()
@pytest.mark.parametrize("name", CACHED)
def test_fastv_equals_the_reference(fastv_golden: Golden, name: str) -> None:
    """Pruned once at prefill, then three steps over caches of two lengths."""
    llava, figures = fastv_golden.llava, fastv_golden.figures[name]
    fastv, steps = fastv_of(figures), figures["steps"]
    with inputs_of_layer(llava, 0 if fastv is None else fastv.layer) as hidden:
        ours = run(llava, *image_prompt(fastv_golden), fastv)
    check_prefill(fastv_golden, name, 0, ours, fastv)
    tensors = fastv_golden.tensors
    if f"{name}.prefill_logits" in tensors:
        close(ours.logits, tensors[f"{name}.prefill_logits"], GOLDEN_TOLERANCE)
    if f"{name}.hidden_into_layer_K" in tensors:
        close(hidden[0], tensors[f"{name}.hidden_into_layer_K"], GOLDEN_TOLERANCE)
    cache, position = ours.cache, ours.layout.next_position
    for step, figures in enumerate(steps[1:], 1):
        logits, cache = decode(llava, [steps[step - 1]["next_token"]], position, cache)
        close(logits[0], tensors[f"{name}.last_logits"][step], GOLDEN_TOLERANCE)
        assert [k.shape[2] for k, _ in cache] == figures["kv_lengths"]
        assert set(figures.get("last_position_per_layer", [position])) == {position}
        position += 1
    for layer_idx, (k, v) in enumerate(cache):
        if f"{name}.final_key_l{layer_idx}" in tensors:
            close(k[0], tensors[f"{name}.final_key_l{layer_idx}"], GOLDEN_TOLERANCE)
            close(v[0], tensors[f"{name}.final_value_l{layer_idx}"], GOLDEN_TOLERANCE)


RECOMPUTED = [
    "vanilla_nocache",
    "hf_K1_r0.5_nocache",
    "hf_K2_r0.5_nocache",
    "hf_K3_r0.7_nocache",
    "hf_K2_r0.84375_nocache",
    "inplace_K2_rank8_nocache",
    "inplace_K3_rank4_nocache",
]


@torch.inference_mode()
@pytest.mark.parametrize("name", RECOMPUTED)
def test_pruning_anew_for_every_token_equals_the_reference(fastv_golden: Golden, name: str) -> None:
    """The reference without a cache: every step runs the whole sequence, and its newest token
    chooses. Ours does that when it is given the longer prompt."""
    figures = fastv_golden.figures[name]
    fastv, tokens = fastv_of(figures), [step["next_token"] for step in figures["steps"]]
    for step in range(len(tokens)):
        rows, layout = image_prompt(fastv_golden, tokens[:step])
        with inputs_of_layer(fastv_golden.llava, fastv.layer if fastv else 0) as hidden:
            ours = run(fastv_golden.llava, rows, layout, fastv)
        check_prefill(fastv_golden, name, step, ours, fastv)
        if step == 0 and f"{name}.prefill_logits" in fastv_golden.tensors:
            expected = fastv_golden.tensors[f"{name}.prefill_logits"]
            close(ours.logits, expected, GOLDEN_TOLERANCE)
            into_layer = fastv_golden.tensors[f"{name}.hidden_into_layer_K"]
            close(hidden[0], into_layer, GOLDEN_TOLERANCE)


@torch.inference_mode()
def test_decoding_never_chooses_again(fastv_golden: Golden) -> None:
    """The reference's mask variant re-selects at every step, over keys that were made under earlier
    selections. Equal at prefill, where it hides what we drop; from then on it must differ."""
    name, llava, tensors = "mask_K2_rank8_cache", fastv_golden.llava, fastv_golden.tensors
    fastv, steps = FastV(keep=8, layer=2), fastv_golden.figures[name]["steps"]
    ours = run(llava, *image_prompt(fastv_golden), fastv)
    [pruning] = ours.stages
    kept = pruning.kept_indices
    close(ours.logits, tensors[f"{name}.prefill_logits"][kept], GOLDEN_TOLERANCE)
    scores = tensors[f"{name}.scores_step0"]
    assert (pruning.scores - scores).abs().max() <= 1e-6
    fed = [step["next_token"] for step in steps[:-1]]
    logits, _ = decode(llava, fed, ours.layout.next_position, ours.cache)
    differences = (logits - tensors[f"{name}.last_logits"][1:]).abs().amax(-1)
    assert differences.min() > 0.1


MERGED = {
    "dymu_vtu_official": ("vtu", None),
    "dymu_plain_official": ("plain", None),
    "hybrid_plain_K2_keep3_sum": ("plain", FastV(keep=3, layer=2)),
    "hybrid_plain_K2_keep8_sum": ("plain", FastV(keep=8, layer=2)),
    "hybrid_logical_noprune": ("logical", None),
    "hybrid_logical_K3_keep5_sum": ("logical", FastV(keep=5, layer=3)),
    "hybrid_logical_K2_keep8_sum": ("logical", FastV(keep=8, layer=2)),
    "hybrid_vtu_K3_keep5_mean": ("vtu", FastV(keep=5, layer=3, score="mean")),
    "hybrid_vtu_K2_keep8_sum": ("vtu", FastV(keep=8, layer=2)),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", MERGED)
def test_hybrid_equals_the_reference(fastv_golden: Golden, name: str) -> None:
    """16 patches in 8 groups: the official merging decoder, and the definition of the hybrid."""
    llava, tensors = fastv_golden.llava, fastv_golden.tensors
    positions, fastv = MERGED[name]
    figures = fastv_golden.figures.get(name) or fastv_golden.figures["hybrid"][name]
    mapping = torch.zeros(PATCHES, dtype=torch.long)
    for group, patches in enumerate(fastv_golden.figures["groups"]):
        mapping[patches] = group
    image = EncodedImage(tensors["merged_image_features"], mapping)
    ids = [*tensors["sys_input_ids"], IMAGE_TOKEN_ID, *tensors["tail_input_ids"]]
    rows, layout = llava.splice([int(token) for token in ids], [image], positions=positions)
    assert torch.equal(rows, tensors["unique_embeds"])
    if positions == "vtu":
        assert layout.mapping_indices is not None
        assert torch.equal(layout.mapping_indices, tensors["vtu_mapping_indices"].long())
    ours = run(llava, rows, layout, fastv)
    check_kept(ours, figures, tensors.get(f"{name}.group_scores"))
    fed = figures["next_tokens"]
    logits, cache, lengths = ours.logits[-1:], ours.cache, [ours.lengths]
    for step, token in enumerate(fed[:-1]):
        more, cache = decode(llava, [token], layout.next_position + step, cache)
        logits = torch.cat((logits, more))
        lengths.append([k.shape[2] for k, _ in cache])
    close(logits, tensors[f"{name}.last_logits"], GOLDEN_TOLERANCE)
    assert logits.argmax(-1).tolist() == fed
    assert lengths == figures["kv_lengths"]


def check_kept(ours: Run, figures: dict[str, Any], scores: Tensor | None) -> None:
    """The groups that stay, exactly, and their scores."""
    if len(figures.get("kept_groups", range(8))) == 8:
        assert ours.stages == ()
        return
    assert scores is not None
    [pruning] = ours.stages
    assert pruning.kept.tolist() == figures["kept_groups"]
    assert (pruning.scores - scores).abs().max() <= 1e-6


TWO = Prompt(
    (3, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 9, 10),
    (Picture(3, (2, 0, 2, 1, 0, 2), 1), Picture(5, (4, 0, 0, 1, 3, 2), 2)),
)
WORDS = Prompt((3, 4, 5), ())
KEEP = FastV(keep=2, layer=2)


def test_waits_are_seen() -> None:
    x = torch.tensor([0, 2, 1])
    cases: list[tuple[Callable[[], Any], int]] = [
        (lambda: x[0].item(), 1),
        (lambda: int(x.sum()), 1),
        (lambda: bool(x[0]), 1),
        (lambda: x[x > 0], 1),
        (lambda: x.nonzero(), 1),
        (lambda: x.masked_select(x > 0), 1),
        (lambda: x.unique(), 1),
        (lambda: torch.equal(x, x), 1),
        (lambda: x.repeat_interleave(x), 1),
        (lambda: x.tolist(), 1),
        (lambda: x.cpu(), 1),
        (lambda: np.asarray(x), 1),
        (lambda: torch.where(x > 0, x, 0), 0),
        (lambda: x[x], 0),
        (lambda: x.masked_fill(x > 0, 0), 0),
        (lambda: x.repeat_interleave(x, output_size=3), 0),
    ]
    for wait, expected in cases:
        with torch.no_grad(), dispatched_waits() as names:
            wait()
        assert len(names) == expected
    nothing = torch.empty(3, device="meta")
    for look in (nothing.tolist, nothing.cpu, nothing.sum().item, nothing.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            look()


@torch.no_grad()
def waits_of(llava: Llava, batch: Sequence[Item], watch: Watch) -> tuple[int, int]:
    """How often a batch waits for the device at prefill, and at the step after it."""
    images = [
        [move(picture.encoded(llava.dtype), llava.device) for picture in item.prompt.pictures]
        for item in batch
    ]
    wanted = [item.way.fastv for item in batch]
    with watch() as at_prefill:
        parts = [
            llava.splice(item.prompt.input_ids, encoded, positions=item.way.positions)
            for item, encoded in zip(batch, images, strict=True)
        ]
        rows, where = [rows for rows, _ in parts], [layout for _, layout in parts]
        _, caches, prunings = llava(rows, where, [None] * len(batch), wanted)
    num_stages = [len(wish.amounts) if wish else 0 for wish in wanted]
    assert [len(stages) for stages in prunings] == num_stages
    with watch() as at_decode:
        parts = [llava.splice([5], [], layout.next_position) for layout in where]
        llava([rows for rows, _ in parts], [layout for _, layout in parts], caches, wanted)
        llava.decode(torch.empty(1, dtype=torch.long, device=llava.device).fill_(5), 99, caches[0])
    return len(at_prefill), len(at_decode)


def move(image: EncodedImage, device: torch.device) -> EncodedImage:
    mapping = None if image.mapping is None else image.mapping.to(device)
    return replace(image, image_embeds=image.image_embeds.to(device), mapping=mapping)


def unmerged(prompt: Prompt) -> Prompt:
    return replace(prompt, pictures=tuple(replace(p, groups=None) for p in prompt.pictures))


TWICE = FastV(stages=((1, 6), (3, 2)))
# The items of a batch, and its waits at prefill: one for every stage of a prompt in `vtu`.
WAITING = [
    ([Item(WORDS, Reduction())], 0),
    ([Item(unmerged(TWO), Reduction())], 0),
    ([Item(unmerged(TWO), Reduction(fastv=KEEP))], 0),
    ([Item(TWO, Reduction(None, "plain"))], 0),
    ([Item(TWO, Reduction(None, "plain", KEEP))], 0),
    ([Item(TWO, Reduction(None, "logical"))], 0),
    ([Item(TWO, Reduction(None, "logical", replace(KEEP, per_image=True)))], 0),
    ([Item(TWO, Reduction(None, "logical", TWICE))], 0),
    ([Item(TWO, Reduction(None, "vtu"))], 0),
    ([Item(TWO, Reduction(None, "vtu", KEEP))], 1),
    ([Item(TWO, Reduction(None, "vtu", replace(KEEP, score="mean", per_image=True)))], 1),
    ([Item(TWO, Reduction(None, "vtu", KEEP)), Item(TWO, Reduction(None, "logical", KEEP))], 1),
    (
        [
            Item(TWO, Reduction(None, "vtu", KEEP)),
            Item(TWO, Reduction(None, "vtu", replace(KEEP, layer=1))),
        ],
        2,
    ),
    ([Item(TWO, Reduction(None, "vtu", TWICE))], 2),
    ([Item(TWO, Reduction(None, "folded"))], 0),
    ([Item(TWO, Reduction(None, "folded", KEEP))], 0),
    ([Item(TWO, Reduction(None, "folded", replace(KEEP, rest="fold", score="mean")))], 0),
    ([Item(TWO, Reduction(None, "folded", replace(KEEP, rest="fold", per_image=True)))], 0),
    ([Item(unmerged(TWO), Reduction(None, "folded", replace(TWICE, rest="fold")))], 0),
    (
        [
            Item(TWO, Reduction(None, "folded", replace(TWICE, rest="fold"))),
            Item(TWO, Reduction(None, "folded", TWICE)),
            Item(TWO, Reduction(None, "logical", KEEP)),
            Item(WORDS, Reduction(None, "folded")),
        ],
        0,
    ),
]


@pytest.mark.parametrize(("batch", "expected"), WAITING)
def test_waits_for_the_device(batch: list[Item], expected: int) -> None:
    """None but one scalar per stage of a prompt that is unmerged AND pruned; decoding none."""
    assert waits_of(LLAVAS[torch.float32], batch, dispatched_waits) == (expected, 0)


@pytest.mark.parametrize(("batch", "expected"), WAITING)
def test_no_value_is_looked_at(batch: list[Item], expected: int) -> None:
    """On a device without values: everything but that scalar is known from shapes alone."""
    llava = random_llava(replace(TINY_CONFIG, text=TEXT)).to("meta")
    if expected:
        with pytest.raises(RuntimeError, match="meta"):
            waits_of(llava, batch, lambda: nullcontext([]))
    else:
        assert waits_of(llava, batch, lambda: nullcontext([])) == (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waits_for_a_gpu() -> None:
    llava = random_llava(replace(TINY_CONFIG, text=TEXT)).to("cuda")
    for batch, expected in WAITING:
        waits_of(llava, batch, lambda: nullcontext([]))  # libraries may wait when they first start
        assert waits_of(llava, batch, cuda_waits) == (expected, 0)
