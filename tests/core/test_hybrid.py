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
from helpers.prompts import Picture, Prompt, decode, prompts, seeds, write_out
from helpers.tensors import close, draw, rms_norm_oracle
from helpers.waits import Watch, cuda_waits, dispatched_waits
from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig
from llava_lite.fastv import Pruning, choose, last_row, rank_tokens, row_scores
from llava_lite.layout import Layout
from llava_lite.llava import EncodedImage, Llava
from llava_lite.reduction import POSITIONS, SCORES, FastV, Reduction, ToMe
from llava_lite.rope import apply_rope, rope_cos_sin

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9}
TIE = {torch.float32: 1e-5, torch.float64: 1e-9}  # scores closer than this may change places
TEXT = replace(TINY_TEXT, num_layers=4)
LLAVAS = {dtype: random_llava(replace(TINY_CONFIG, text=TEXT), dtype=dtype) for dtype in DTYPES}
few = examples(80)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(POSITIONS)
starts = st.sampled_from([0, 3, 1100])  # positions from 1000 on were out of the reference's reach


@st.composite
def wishes(draw_value: st.DrawFn) -> FastV:
    """A pruning of any layer, amount and kind."""
    amount: dict[str, Any] = (
        {"keep": draw_value(st.integers(1, 6))}
        if draw_value(st.booleans())
        else {"drop": draw_value(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))}
    )
    layer, score = draw_value(st.integers(1, 3)), draw_value(st.sampled_from(SCORES))
    return FastV(**amount, layer=layer, score=score, per_image=draw_value(st.booleans()))


# ---- running ours ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one item's forward gave: logits (U', V) of all rows left, cache, what was pruned."""

    logits: Tensor
    cache: KVCache
    pruning: Pruning | None
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
    logits, [cache], [pruning] = llava([rows], [layout], [past], [fastv], all_logits=True)
    return Run(logits, cache, pruning, layout)


def run_prompt(
    llava: Llava, prompt: Prompt, positions: str, fastv: FastV | None = None, start: int = 0
) -> Run:
    return run(llava, *prompt.splice(llava, positions, start), fastv)


def same(first: Run, second: Run) -> None:
    """Bit for bit."""
    assert torch.equal(first.logits, second.logits)
    for here, there in zip(first.cache, second.cache, strict=True):
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def alike(first: Run, second: Run, tolerance: float) -> None:
    """Up to rounding."""
    close(first.logits, second.logits, tolerance)
    for here, there in zip(first.cache, second.cache, strict=True):
        close(here[0], there[0], tolerance)
        close(here[1], there[1], tolerance)


def assume_no_ties(pruning: Pruning | None, dtype: torch.dtype) -> None:
    """Rounding must not decide who stays."""
    if pruning is not None:
        stays = torch.zeros_like(pruning.scores, dtype=torch.bool)
        stays[pruning.kept] = True
        gaps = pruning.scores[stays][:, None] - pruning.scores[~stays]
        assume(bool(gaps.abs().min() > TIE[dtype]))


# ---- the oracle --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A prompt within a sequence: its last position asks about the rows of each group, and so many
    of each group stay."""

    last_position: int
    groups: list[list[int]]
    num_kept: list[int]


@dataclass(frozen=True)
class Expected:
    """logits (U', V), the row of each, per layer keys and values (H, n, D), and for each turn the
    scores of its rows and the rows that stay."""

    logits: Tensor
    rows: list[int]
    caches: list[tuple[Tensor, Tensor]]
    scores: list[list[float]]
    kept: list[list[int]]


def turn_oracle(lists: Any, fastv: FastV | None, past_rows: int, past_positions: int) -> Turn:
    """What a wish means for a prompt after so many rows and positions."""
    groups = [[past_rows + row for row in rows] for rows in lists.image_rows]
    if fastv is None:
        groups = []
    elif not fastv.per_image:
        groups = [sum(groups, [])]
    amounts = []
    for rows in groups:
        assert fastv is not None
        if fastv.keep is not None:
            amounts.append(min(fastv.keep, len(rows)))
        else:
            assert fastv.drop is not None
            amounts.append(min(len(rows), max(1, round(len(rows) * (1 - fastv.drop)))))
    return Turn(past_positions + len(lists.mapping) - 1, groups, amounts)


def full_attention(
    w: dict[str, Tensor], x: Tensor, mapping: list[int], places: list[int], visible: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer's attention over all positions: rows x (U, C) -> what o_proj gives (U, C), the
    probabilities (H, N, N), and k and v (H, N, D)."""
    q, k, v = (
        (x @ w[f"attn.{name}_proj.weight"].T).reshape(len(x), TEXT.num_heads, -1)[mapping]
        for name in "qkv"
    )  # (N, H, D)
    cos, sin = rope_cos_sin(torch.tensor(places), TEXT.head_dim, TEXT.rope_theta)
    half = TEXT.head_dim // 2
    turn = torch.complex(cos[:, :half].double(), sin[:, :half].double())[:, None]
    turned = []
    for part in (q, k):
        pairs = torch.complex(part[..., :half], part[..., half:]) * turn
        turned.append(torch.cat((pairs.real, pairs.imag), -1))
    q, k, v = (part.transpose(0, 1) for part in (*turned, v))
    scores = (q @ k.mT / TEXT.head_dim**0.5).masked_fill(~visible, -torch.inf)
    probs = scores.softmax(-1)
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
    mapping: list[int],
    places: list[int],
    turns: Sequence[Turn] = (),
    fastv: FastV | None = None,
    mask: bool = False,
) -> Expected:
    """The decoder, in float64: rows x (U, C), the row and the place of every position.

    Scores come from the full probabilities of the layer in front of the pruned one. `mask` hides
    what is dropped from all others instead of dropping it."""
    x, rows, hidden = x.double(), list(range(len(x))), set()
    caches, all_scores, all_kept = [], [], []
    probs = torch.empty(0)
    weights = {name: tensor.double() for name, tensor in llava.decoder.state_dict().items()}
    for layer_idx in range(TEXT.num_layers):
        if fastv is not None and layer_idx == fastv.layer:
            dropped: set[int] = set()
            for turn in turns:
                scores, kept = ask(probs, mapping, turn, fastv.score)
                all_scores.append(scores)
                all_kept.append(kept)
                dropped |= set(sum(turn.groups, [])) - set(kept)
            if mask:
                hidden = dropped
            else:
                rows = [row for row in rows if row not in dropped]
                x = x[rows]
                stays = [e for e, owner in enumerate(mapping) if owner not in dropped]
                places = [places[e] for e in stays]
                mapping = [rows.index(mapping[e]) for e in stays]
        visible = torch.ones(len(mapping), len(mapping), dtype=torch.bool).tril()
        for e, owner in enumerate(mapping):
            if owner in hidden:
                visible[:, e] = False
                visible[e, e] = True  # someone must be seen; nobody looks at the answer
        name = f"layers.{layer_idx}."
        w = {key.removeprefix(name): v for key, v in weights.items() if key.startswith(name)}
        normed = rms_norm_oracle(x, w["input_norm.weight"], TEXT.rms_norm_eps)
        mixed, probs, k, v = full_attention(w, normed, mapping, places, visible)
        caches.append((k, v))
        x = x + mixed
        normed = rms_norm_oracle(x, w["post_attn_norm.weight"], TEXT.rms_norm_eps)
        gate = normed @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + (-gate).exp()) * (normed @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    logits = rms_norm_oracle(x, weights["norm.weight"], TEXT.rms_norm_eps)
    return Expected(logits @ weights["lm_head.weight"].T, rows, caches, all_scores, all_kept)


def ask(probs: Tensor, mapping: list[int], turn: Turn, score: str) -> tuple[list[float], list[int]]:
    """The scores of a turn's candidates from full probabilities (H, N, N), and who stays."""
    row = probs[:, turn.last_position].mean(0)
    scores, kept = [], []
    for group, num_kept in zip(turn.groups, turn.num_kept, strict=True):
        of_group = []
        for candidate in group:
            looks = [float(row[e]) for e, owner in enumerate(mapping) if owner == candidate]
            of_group.append(sum(looks) / (len(looks) if score == "mean" else 1))
        best = sorted(range(len(group)), key=lambda index: (-of_group[index], index))[:num_kept]
        kept += sorted(group[index] for index in best)
        scores += of_group
    return scores, kept


def check_forward(
    ours: Run, expected: Expected, first_row: int, turn: Turn | None, index: int = 0
) -> None:
    """One forward against its rows in the oracle's sequence, from `first_row` on; its turn there is
    the one of this index."""
    dtype, num_rows = ours.logits.dtype, ours.layout.num_rows
    left = [row for row in expected.rows if first_row <= row < first_row + num_rows]
    close(
        ours.logits, expected.logits[[expected.rows.index(row) for row in left]], TOLERANCE[dtype]
    )
    assert (ours.pruning is None) == (len(left) == num_rows)
    if ours.pruning is not None:
        assert turn is not None
        scores = torch.tensor(expected.scores[index], dtype=torch.float64)
        close(ours.pruning.scores, scores, TIE[dtype] / 10)
        candidates = sum(turn.groups, [])
        assert [candidates[kept] for kept in ours.pruning.kept.tolist()] == expected.kept[index]
        assert [first_row + row for row in ours.pruning.kept_indices.tolist()] == left


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


@few
@given(prompts(min_tail=0), layouts, st.none() | wishes(), starts, dtypes)
@example(ADJACENT, "vtu", FastV(keep=2, layer=1), 0, torch.float64)
@example(ADJACENT, "vtu", FastV(keep=1, layer=3, per_image=True), 0, torch.float32)
@example(ADJACENT, "logical", FastV(drop=0.5, layer=2), 1100, torch.float32)
@example(LAST, "vtu", FastV(keep=2, layer=2, score="mean"), 0, torch.float64)
def test_prefill_equals_the_oracle(
    prompt: Prompt, positions: str, fastv: FastV | None, start: int, dtype: torch.dtype
) -> None:
    """Logits, scores, who stays, and caches, over any partition, any image place and any wish."""
    ours = run_prompt(LLAVAS[dtype], prompt, positions, fastv, start)
    assume_no_ties(ours.pruning, dtype)
    lists, exact = write_out(prompt, positions, start), LLAVAS[torch.float64]
    turn = turn_oracle(lists, fastv, 0, 0)
    rows = prompt.splice(exact, positions, start)[0]
    expected = stack_oracle(exact, rows, lists.mapping, lists.position_ids, [turn], fastv)
    check_forward(ours, expected, 0, turn)
    check_cache(ours.cache, expected, dtype)


words = st.lists(st.integers(3, TEXT.vocab_size - 1), max_size=3)


@few
@given(
    st.lists(st.tuples(prompts(max_images=1), words), min_size=1, max_size=3),
    layouts,
    st.none() | wishes(),
    starts,
    dtypes,
)
@example([(ADJACENT, [5, 6]), (ADJACENT, [7])], "vtu", FastV(keep=2, layer=1), 0, torch.float64)
@example([(ADJACENT, [5, 6]), (ADJACENT, [7])], "logical", FastV(keep=2), 3, torch.float32)
def test_cached_steps_equal_recomputing(
    chat: list[tuple[Prompt, list[int]]],
    positions: str,
    fastv: FastV | None,
    start: int,
    dtype: torch.dtype,
) -> None:
    """Prompts, each answered token by token over the cache, against one pass over everything in
    which each prompt's own last token decides once what that prompt loses."""
    exact, llava, position = LLAVAS[torch.float64], LLAVAS[dtype], start
    turns: list[Turn] = []
    forwards: list[tuple[Run, int, int]] = []
    rows: list[Tensor] = []
    mapping: list[int] = []
    places: list[int] = []
    cache, num_rows = None, 0
    for index, (prompt, answer) in enumerate(chat):
        for piece in (prompt, *(Prompt((token,), ()) for token in answer)):
            lists = write_out(piece, positions, position)
            if piece is prompt:
                turns.append(turn_oracle(lists, fastv, num_rows, len(mapping)))
            ours = run(llava, *piece.splice(llava, positions, position), fastv, cache)
            assume_no_ties(ours.pruning, dtype)
            forwards.append((ours, num_rows, index))
            rows.append(piece.splice(exact, positions, position)[0])
            mapping += [num_rows + row for row in lists.mapping]
            places += lists.position_ids
            num_rows += lists.num_rows
            cache, position = ours.cache, ours.layout.next_position
    expected = stack_oracle(exact, torch.cat(rows), mapping, places, turns, fastv)
    for ours, first_row, index in forwards:
        check_forward(ours, expected, first_row, turns[index], index)
    assert cache is not None
    check_cache(cache, expected, dtype)


@few
@given(prompts(min_images=1), layouts, wishes())
def test_hiding_equals_dropping(prompt: Prompt, positions: str, fastv: FastV) -> None:
    """For the rows that stay: nobody ever asked the others for more than keys and values."""
    llava = LLAVAS[torch.float64]
    ours = run_prompt(llava, prompt, positions, fastv)
    assume(ours.pruning is not None)
    assume_no_ties(ours.pruning, torch.float64)
    assert ours.pruning is not None
    lists = write_out(prompt, positions)
    turn = turn_oracle(lists, fastv, 0, 0)
    rows = prompt.splice(llava, positions)[0]
    masked = stack_oracle(llava, rows, lists.mapping, lists.position_ids, [turn], fastv, mask=True)
    assert len(masked.logits) == lists.num_rows
    close(ours.logits, masked.logits[ours.pruning.kept_indices], TOLERANCE[torch.float64])


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
@given(prompts(min_tail=0), layouts, starts, dtypes)
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
@given(prompts(min_images=1, min_tail=0), layouts, st.none() | wishes(), dtypes)
def test_singleton_groups_are_no_merging(
    prompt: Prompt, positions: str, fastv: FastV | None, dtype: torch.dtype
) -> None:
    """Bit for bit: every patch its own token, in order."""
    whole = [replace(picture, groups=None) for picture in prompt.pictures]
    single = [replace(p, groups=tuple(range(p.num_tokens))) for p in whole]
    ours = run_prompt(LLAVAS[dtype], Prompt(prompt.input_ids, tuple(single)), positions, fastv)
    plain = run_prompt(LLAVAS[dtype], Prompt(prompt.input_ids, tuple(whole)), "plain", fastv)
    same(ours, plain)
    assert ours.layout.next_position == plain.layout.next_position


@few
@given(prompts(), layouts, st.integers(1, 3), st.booleans(), dtypes)
def test_keeping_all_is_no_pruning(
    prompt: Prompt, positions: str, layer: int, per_image: bool, dtype: torch.dtype
) -> None:
    """Bit for bit; as is any pruning of a prompt without images."""
    off = run_prompt(LLAVAS[dtype], prompt, positions)
    sizes = [picture.num_tokens for picture in prompt.pictures]
    enough = max(sizes, default=1) if per_image else max(sum(sizes), 1)
    for fastv in (
        FastV(keep=enough, layer=layer, per_image=per_image),
        FastV(keep=10**9, layer=layer),
        FastV(drop=1e-9, layer=layer),
    ):
        on = run_prompt(LLAVAS[dtype], prompt, positions, fastv)
        assert on.pruning is None
        same(on, off)


@few
@given(
    prompts(min_images=1),
    st.sampled_from(["vtu", "logical"]),
    st.none() | wishes(),
    dtypes,
    st.data(),
)
def test_order_of_merged_tokens_means_nothing(
    prompt: Prompt, positions: str, fastv: FastV | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    """The encoder's order is not raster order; `vtu` and `logical` go by patches only."""
    llava, images, permuted, orders = LLAVAS[dtype], [], [], []
    for picture in prompt.pictures:
        groups = picture.groups or tuple(range(picture.num_tokens))
        image = replace(picture, groups=groups).encoded(dtype)
        order = torch.tensor(data.draw(st.permutations(range(picture.num_tokens))))
        assert image.mapping is not None
        permuted.append(EncodedImage(image.image_embeds[order], order.argsort()[image.mapping]))
        images.append(image)
        orders.append(order)
    here = run(llava, *llava.splice(prompt.input_ids, images, 0, positions), fastv)
    assume_no_ties(here.pruning, dtype)
    there = run(llava, *llava.splice(prompt.input_ids, permuted, 0, positions), fastv)
    if positions == "logical":
        same(here, there)
    close(here.logits[-1], there.logits[-1], TOLERANCE[dtype])
    for old, new in zip(here.cache, there.cache, strict=True):
        close(old[0], new[0], TOLERANCE[dtype])
        close(old[1], new[1], TOLERANCE[dtype])
    if positions == "vtu" and here.pruning is not None and there.pruning is not None:
        firsts = [0, len(orders[0])]
        moved = torch.cat([order + first for order, first in zip(orders, firsts, strict=False)])
        close(here.pruning.scores[moved], there.pruning.scores, TIE[dtype])
        assert sorted(moved[there.pruning.kept].tolist()) == here.pruning.kept.tolist()


@dataclass(frozen=True)
class Item:
    """One item of a batch: a prompt, or the token after it (`token` is not None)."""

    prompt: Prompt
    positions: str
    fastv: FastV | None
    token: int | None

    def inputs(self, llava: Llava) -> tuple[Tensor, Layout, KVCache | None]:
        rows, layout = self.prompt.splice(llava, self.positions)
        if self.token is None:
            return rows, layout, None
        past = run(llava, rows, layout, self.fastv).cache
        return *Prompt((self.token,), ()).splice(llava, "vtu", layout.next_position), past


items = st.builds(
    Item,
    prompts(min_tail=0),
    layouts,
    st.none() | wishes(),
    st.none() | st.integers(3, TEXT.vocab_size - 1),
)


@few
@given(st.lists(items, min_size=1, max_size=4), dtypes)
@example(
    [
        Item(ADJACENT, "vtu", FastV(keep=2, layer=1), None),
        Item(ADJACENT, "logical", FastV(keep=1, layer=3, per_image=True), None),
        Item(ADJACENT, "vtu", FastV(keep=3, layer=1, score="mean"), 7),
        Item(Prompt((3, 4, 5), ()), "vtu", FastV(keep=1, layer=2), None),
    ],
    torch.float64,
)
def test_a_batch_equals_its_items(batch: list[Item], dtype: torch.dtype) -> None:
    """Merged in different ways or not, pruned in front of different layers or not, prompts, words
    only, and decode steps side by side."""
    llava = LLAVAS[dtype]
    inputs = [item.inputs(llava) for item in batch]
    wanted = [item.fastv for item in batch]
    alone = [
        run(llava, *part[:2], wish, part[2]) for part, wish in zip(inputs, wanted, strict=True)
    ]
    for single in alone:
        assume_no_ties(single.pruning, dtype)
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
        assert (together.pruning is None) == (single.pruning is None)
        if together.pruning is not None and single.pruning is not None:
            assert torch.equal(together.pruning.kept, single.pruning.kept)
            assert torch.equal(together.pruning.kept_indices, single.pruning.kept_indices)
        with torch.inference_mode():
            [answers], _, _ = llava([rows[index]], [where[index]], [pasts[index]], [wanted[index]])
        close(last[index], answers, TOLERANCE[dtype])


# ---- lengths, positions, last rows -------------------------------------------------------------


@few
@given(prompts(min_images=1, max_images=1), layouts, wishes())
def test_cache_lengths(prompt: Prompt, positions: str, fastv: FastV) -> None:
    """All positions below the pruned layer; from it on text and what stays: whole groups in `vtu`,
    one position for each token otherwise. A decoded token adds one everywhere."""
    llava = LLAVAS[torch.float32]
    ours = run_prompt(llava, prompt, positions, fastv)
    [picture] = prompt.pictures
    num_text, groups = len(prompt.input_ids) - 1, picture.groups or range(picture.num_tokens)
    kept = range(picture.num_tokens) if ours.pruning is None else ours.pruning.kept.tolist()
    assert len(kept) == fastv.num_kept(picture.num_tokens)
    before, after = picture.num_tokens, len(kept)
    if positions == "vtu":
        before, after = len(groups), sum(group in kept for group in groups)
    expected = [num_text + (before if i < fastv.layer else after) for i in range(TEXT.num_layers)]
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
@given(prompts(min_images=1, min_tail=0), layouts, st.none() | wishes(), dtypes)
@example(LAST, "vtu", None, torch.float64)
@example(LAST, "vtu", FastV(keep=2, layer=1), torch.float32)
def test_the_last_position_answers(
    prompt: Prompt, positions: str, fastv: FastV | None, dtype: torch.dtype
) -> None:
    """Of a prompt that ends with an image: the row that its last position shows, and if pruning
    took that, the last position that is left."""
    llava = LLAVAS[dtype]
    rows, layout = prompt.splice(llava, positions)
    ours = run(llava, rows, layout, fastv)
    mapping = write_out(prompt, positions).mapping
    kept = range(len(rows)) if ours.pruning is None else ours.pruning.kept_indices.tolist()
    answering = kept.index([row for row in mapping if row in kept][-1])
    with torch.inference_mode():
        [last], _, _ = llava([rows], [layout], [None], [fastv])
    close(last, ours.logits[answering], TOLERANCE[dtype])


def test_prefill_takes_the_whole_reduction() -> None:
    """`Llava.prefill` merges, places and prunes as the reduction says."""
    llava = LLAVAS[torch.float32]
    pixel_values = draw(3, 1, 3, 56, 56, dtype=torch.float32)
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 9, 12]])
    for positions, position in (("vtu", 19), ("logical", 19), ("plain", 9)):
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
    probs = last_row(query, keys)
    assert probs.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.stack(
        [
            torch.softmax(keys[0, head].double() @ query[0, head, 0].double() / 8**0.5, 0)
            for head in range(3)
        ]
    )
    close(probs, exact.mean(0), 1e-6)


def test_scores_of_rows() -> None:
    probs, mapping = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 2])
    close(row_scores(probs, mapping, 3, "sum"), torch.tensor([0.2, 0.4, 0.4]), 1e-7)
    close(row_scores(probs, mapping, 3, "mean"), torch.tensor([0.2, 0.2, 0.4]), 1e-7)
    assert row_scores(probs, None, 4, "sum") is probs


def test_of_equal_scores_the_first_stays() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 3.0, 2.0] * 20)
    assert rank_tokens(scores, 43).tolist() == sorted(
        [i for i in range(120) if i % 6 in (1, 4)] + [2, 3, 5]
    )


def test_choose_together_or_for_each_image() -> None:
    """Rows 1-3 and 5-6 are images; text stays however little attention it gets."""
    scores = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0, 2.0, 3.0, 0.0])
    spans = [(1, 4), (5, 7)]
    together = choose(scores, spans, [3])
    assert together.kept.tolist() == [0, 2, 4]
    assert together.kept_indices.tolist() == [0, 1, 3, 4, 6, 7]
    assert together.scores.tolist() == [5, 1, 4, 2, 3]
    each = choose(scores, spans, [1, 1])
    assert each.kept.tolist() == [0, 4]
    assert each.kept_indices.tolist() == [0, 1, 4, 6, 7]


def test_a_bfloat16_model_prunes_and_unmerges() -> None:
    llava = random_llava(replace(TINY_CONFIG, text=TEXT), dtype=torch.bfloat16)
    ours = run_prompt(llava, ADJACENT, "vtu", FastV(keep=2, layer=2))
    exact = run_prompt(LLAVAS[torch.float32], ADJACENT, "vtu", FastV(keep=2, layer=2))
    assert ours.pruning is not None and exact.pruning is not None
    assert ours.logits.dtype == torch.bfloat16 and ours.pruning.scores.dtype == torch.float32
    assert torch.equal(ours.pruning.kept, exact.pruning.kept)
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
        assert ours.pruning is not None
        assert ours.pruning.kept_indices.tolist() == figures["kept_indices"]
        scores = golden.tensors[f"{name}.scores_step{step}"]
        assert (ours.pruning.scores - scores).abs().max() <= 1e-6


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
    assert ours.pruning is not None
    kept = ours.pruning.kept_indices
    close(ours.logits, tensors[f"{name}.prefill_logits"][kept], GOLDEN_TOLERANCE)
    scores = tensors[f"{name}.scores_step0"]
    assert (ours.pruning.scores - scores).abs().max() <= 1e-6
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
        assert ours.pruning is None
        return
    assert ours.pruning is not None and scores is not None
    assert ours.pruning.kept.tolist() == figures["kept_groups"]
    assert (ours.pruning.scores - scores).abs().max() <= 1e-6


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
    wanted = [item.fastv for item in batch]
    with watch() as at_prefill:
        parts = [
            llava.splice(item.prompt.input_ids, encoded, positions=item.positions)
            for item, encoded in zip(batch, images, strict=True)
        ]
        rows, where = [rows for rows, _ in parts], [layout for _, layout in parts]
        _, caches, prunings = llava(rows, where, [None] * len(batch), wanted)
    assert [pruning is None for pruning in prunings] == [wish is None for wish in wanted]
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


# The items of a batch, and its waits at prefill: one for every prompt that is pruned in `vtu`.
WAITING = [
    ([Item(WORDS, "vtu", None, None)], 0),
    ([Item(unmerged(TWO), "vtu", None, None)], 0),
    ([Item(unmerged(TWO), "vtu", KEEP, None)], 0),
    ([Item(TWO, "plain", None, None)], 0),
    ([Item(TWO, "plain", KEEP, None)], 0),
    ([Item(TWO, "logical", None, None)], 0),
    ([Item(TWO, "logical", replace(KEEP, per_image=True), None)], 0),
    ([Item(TWO, "vtu", None, None)], 0),
    ([Item(TWO, "vtu", KEEP, None)], 1),
    ([Item(TWO, "vtu", replace(KEEP, score="mean", per_image=True), None)], 1),
    ([Item(TWO, "vtu", KEEP, None), Item(TWO, "logical", KEEP, None)], 1),
    ([Item(TWO, "vtu", KEEP, None), Item(TWO, "vtu", replace(KEEP, layer=1), None)], 2),
]


@pytest.mark.parametrize(("batch", "expected"), WAITING)
def test_waits_for_the_device(batch: list[Item], expected: int) -> None:
    """None but one scalar per prompt that is unmerged AND pruned; decoding never waits."""
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
