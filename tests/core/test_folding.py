"""A token that stands for several patches, seen once: the statements that folding rests on.

Every token is expanded to its positions by brute force. Whole runs against an oracle are in
test_hybrid.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.examples import examples
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.prompts import Picture, Prompt, groupings, prompts, seeds
from helpers.tensors import close, draw, log_sizes_of
from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.fastv import ImageRows, Pruning, choose, fold_tokens, match_kept
from llava_lite.layout import Layout, PackedLayout, pack, place_image
from llava_lite.reduction import POSITIONS, SCORES, FastV
from llava_lite.rope import apply_rope

CPU = torch.device("cpu")
LLAVA = random_llava(
    replace(TINY_CONFIG, text=replace(TINY_TEXT, num_layers=4)), dtype=torch.float64
)
HEADS, D = TINY_TEXT.num_heads, TINY_TEXT.head_dim
FLOAT32 = 1e-5  # rotations and logs of sizes are float32 in every model
few = examples(80)


# ---- folded positions against virtual unmerging ------------------------------------------------


@few
@given(groupings(), seeds, st.sampled_from([0, 7, 1100]), st.sampled_from([0.3, 1.0, 3.0]))
@example((0, 0, 1, 0), 1, 0, 3.0)
def test_the_weight_of_a_token_is_at_most_that_of_its_positions(
    groups: tuple[int, ...], seed: int, start: int, scale: float
) -> None:
    """Jensen's inequality: s * exp(mean) <= the sum of exp, and by no more than half of the
    variance times exp(max - mean). Equal for a token at one position."""
    mapping, num_tokens = torch.tensor(groups), max(groups) + 1
    k = scale * draw(seed, num_tokens, HEADS, D)
    q = apply_rope(draw(seed + 1, 1, HEADS, D), *LLAVA.decoder.rotate(text_at(start + 50)))[0]

    layout, order = place_image(mapping, num_tokens, start, "folded", CPU)
    packed = pack([layout])
    rows = k if order is None else k[order]
    [log_sizes] = packed.log_sizes
    scores = (q * apply_rope(rows, *LLAVA.decoder.rotate(packed))).sum(-1) / D**0.5
    weights = (scores + (0 if log_sizes is None else log_sizes[:, None])).exp()  # (U, H)

    unmerged, _ = place_image(mapping, num_tokens, start, "vtu", CPU)
    shown = apply_rope(k[mapping], *LLAVA.decoder.rotate(pack([unmerged])))
    exact = (q * shown).sum(-1) / D**0.5  # (P, H)
    for row, token in enumerate(range(num_tokens) if order is None else order.tolist()):
        of_token = exact[mapping == token]
        mean, size = of_token.mean(0), len(of_token)
        close(weights[row], size * mean.exp(), FLOAT32)
        gap = of_token.exp().sum(0) - weights[row]
        assert (gap >= -FLOAT32 * weights[row]).all()
        if size == 1:
            close(of_token.exp().sum(0), weights[row], 1e-12)
        spread = (of_token - mean).square().mean(0) / 2 * (of_token.amax(0) - mean).exp()
        assert (gap <= weights[row] * (spread + FLOAT32)).all()


def text_at(position: int) -> PackedLayout:
    return pack([Layout.text(1, position, CPU)])


def equal_places(groups: Sequence[int], start: int) -> tuple[Layout, Layout, Tensor]:
    """Three words, an image whose tokens have all of their patches at one place, and two words:
    once with every position shown, once folded; and the rows that each position sees (N, U)."""
    num_tokens = max(groups) + 1
    mapping = torch.tensor([0, 1, 2, *(3 + group for group in groups)])
    mapping = torch.cat((mapping, torch.tensor([0, 1]) + 3 + num_tokens))
    places = start + 5 * mapping  # a row's positions are all the same
    num_rows, after = 5 + num_tokens, start + 5 * (5 + num_tokens)
    unmerged = Layout(num_rows, places, after, mapping)
    return unmerged, replace(unmerged, folded=True), mapping[:, None] >= mapping


@torch.inference_mode()
@few
@given(groupings(), seeds, st.sampled_from([0, 900]))
@example((0, 1, 1, 0, 1, 1), 1, 0)
def test_equal_positions_are_virtual_unmerging(
    groups: tuple[int, ...], seed: int, start: int
) -> None:
    """In all layers, in FastV's scores and in later steps, if the positions of a row see each
    other."""
    unmerged, folded, seen = equal_places(groups, start)
    x = draw(seed, folded.num_rows, TINY_TEXT.hidden_size)
    decoder = LLAVA.decoder
    long = decoder(x, [unmerged], [None], masks=[seen])
    short = decoder(x, [folded], [None])
    close(short.hidden_states, long.hidden_states, 10 * FLOAT32)
    query = draw(seed + 1, 1, HEADS, 1, D)
    for here, there in zip(short.past_key_values[0], long.past_key_values[0], strict=True):
        assert here[0].shape[2] == folded.num_rows and there[0].shape[2] == len(seen)
        for score in SCORES:
            scores = decoder.fastv_scores(query, here, folded, score)
            close(scores, decoder.fastv_scores(query, there, unmerged, score), FLOAT32)
    past = [short.past_key_values[0], long.past_key_values[0]]
    for step in range(3):  # the weights of the image stay in force
        word = Layout.text(1, folded.next_position + step, CPU)
        runs = [decoder(x[step : step + 1], [word], [cache]) for cache in past]
        close(runs[0].hidden_states, runs[1].hidden_states, 10 * FLOAT32)
        past = [run.past_key_values[0] for run in runs]


@torch.inference_mode()
@few
@given(groupings(), seeds)
@example((0, 1, 1, 0, 1, 1), 1)
def test_equal_positions_are_virtual_unmerging_for_the_words_behind(
    groups: tuple[int, ...], seed: int
) -> None:
    """With causal attention: `vtu` hides the later positions of a token from the earlier ones."""
    unmerged, folded, _ = equal_places(groups, 0)
    x, attn = draw(seed, folded.num_rows, TINY_TEXT.hidden_size), LLAVA.decoder.layers[0].attn
    mixed = []
    for layout in (unmerged, folded):
        packed = pack([layout])
        mixed.append(attn(x, *LLAVA.decoder.rotate(packed), packed, [None], [None])[0])
    for words in (slice(3), slice(-2, None)):
        close(mixed[0][words], mixed[1][words], FLOAT32)


def test_only_folded_items_have_weights() -> None:
    """Without weights there is no mask, and the fused kernel is the usual one."""
    merged, whole = (
        Prompt((5, IMAGE_TOKEN_ID, 7), (Picture(2, groups, 1),)) for groups in ((1, 0, 1), None)
    )
    layouts = [
        prompt.splice(LLAVA, positions)[1] for prompt in (merged, whole) for positions in POSITIONS
    ]
    layouts.append(
        Prompt((5, IMAGE_TOKEN_ID), (Picture(3, (2, 0, 1), 1),)).splice(LLAVA, "folded")[1]
    )
    layouts.append(Layout.text(4, 0, CPU))
    found = pack(layouts).log_sizes
    index = POSITIONS.index("folded")
    assert [sizes is None for sizes in found] == [n != index for n in range(len(layouts))]
    folded = found[index]
    assert folded is not None and folded.exp().round().tolist() == [1, 2, 1, 1]
    assert pack(layouts[:index]).log_sizes == (None,) * index


# ---- folding one stage -------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """One stage of one item, before and after."""

    x: Tensor
    layout: Layout
    images: ImageRows
    new_x: Tensor
    new_layout: Layout
    pruning: Pruning


def fold(x: Tensor, layout: Layout, scores: Tensor, num_kept: Sequence[int]) -> Folded:
    images = ImageRows.of(layout.image_spans, CPU)
    pruning = choose(scores, images, num_kept, 1, every_image=True)
    return Folded(x, layout, images, *fold_tokens(x, layout, images, pruning))


def places_of(layout: Layout) -> list[list[int]]:
    """The positions of every row."""
    if layout.mapping_indices is None:
        return [[place] for place in layout.position_ids.tolist()]
    pairs = list(zip(layout.mapping_indices.tolist(), layout.position_ids.tolist(), strict=True))
    return [[place for row, place in pairs if row == wanted] for wanted in range(layout.num_rows)]


def real_prompt() -> Prompt:
    """Two images of 576 patches: one in 72 tokens, one unmerged."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.cat((torch.arange(72), torch.randint(72, (504,), generator=generator)))
    groups = groups[torch.randperm(576, generator=generator)]
    images = (Picture(72, tuple(groups.tolist()), 2), Picture(576, None, 3))
    return Prompt((3, IMAGE_TOKEN_ID, 4, IMAGE_TOKEN_ID, 5), images)


@torch.no_grad()
@few
@given(prompts(min_images=1, min_tail=0), seeds, st.integers(1, 12), st.booleans())
@example(real_prompt(), 1, 36, True)
@example(real_prompt(), 1, 36, False)
def test_nothing_is_lost(prompt: Prompt, seed: int, keep: int, per_image: bool) -> None:
    """Every position of an image goes to a token of the same image, and only there; a token is the
    mean over its positions."""
    x, layout = prompt.splice(LLAVA, "folded", 4)
    counts = [stop - start for start, stop in layout.image_spans]
    wish = FastV(keep=keep, rest="fold", per_image=per_image)
    budgets = wish.budgets(counts, None, len(counts)) or [sum(counts)]
    scores = draw(seed, layout.num_rows).softmax(0)
    done = fold(x, layout, scores, budgets)

    before, after = places_of(layout), places_of(done.new_layout)
    assert len(done.new_x) == done.new_layout.num_rows == len(done.pruning.kept_indices)
    assert done.new_layout.next_position == layout.next_position
    assert torch.equal(done.new_layout.position_ids, layout.position_ids)
    assert done.new_layout.row_sizes().tolist() == [len(places) for places in after]
    kept_rows = done.pruning.kept_indices.tolist()
    of_images = set[int]()
    for span, picture in zip(layout.image_spans, prompt.pictures, strict=True):
        mine = [i for i, row in enumerate(kept_rows) if row in range(*span)]
        assert mine  # every image keeps a token
        of_images |= set(mine)
        assert sum(len(after[i]) for i in mine) == picture.encoded().num_patches
        have = sorted(place for i in mine for place in after[i])
        assert have == sorted(place for row in range(*span) for place in before[row])
    hidden = {place: x[row] for row, places in enumerate(before) for place in places}
    for i, row in enumerate(kept_rows):
        if i in of_images:
            mean = torch.stack([hidden[place] for place in after[i]]).mean(0)
            close(done.new_x[i], mean, 1e-12)
            assert set(before[row]) <= set(after[i])
        else:
            assert after[i] == before[row] and torch.equal(done.new_x[i], x[row])


@torch.no_grad()
@few
@given(prompts(min_images=1, min_tail=0), seeds, st.integers(1, 12))
def test_a_token_goes_to_the_most_similar_one(prompt: Prompt, seed: int, keep: int) -> None:
    x, layout = prompt.splice(LLAVA, "folded")
    done = fold(x, layout, draw(seed, layout.num_rows), [max(keep, len(prompt.pictures))])
    rows, images = done.images.rows.tolist(), done.images.images.tolist()
    kept = done.pruning.kept.tolist()
    assert done.pruning.folded_into is not None
    for token, taker in enumerate(done.pruning.folded_into.tolist()):
        assert taker in kept and images[taker] == images[token]
        likeness = [
            float(torch.cosine_similarity(x[rows[token]], x[rows[other]], dim=0))
            for other in kept
            if images[other] == images[token]
        ]
        own = float(torch.cosine_similarity(x[rows[token]], x[rows[taker]], dim=0))
        assert own == pytest.approx(max(likeness), abs=1e-12)
        assert token not in kept or taker == token


def test_a_token_never_leaves_its_image() -> None:
    """The second image shows the kept token of the first one, in every one of its own."""
    x = torch.eye(3)[[0, 1, 0, 0, 0, 2]]
    images = ImageRows.of([(0, 2), (2, 6)], CPU)
    into = match_kept(x, images, torch.tensor([0, 5]))
    assert into.tolist() == [0, 0, 5, 5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_likeness_the_first(dtype: torch.dtype) -> None:
    """Also between kept tokens that are the same: each stays its own."""
    x = torch.eye(3, dtype=dtype)[[0, 1, 1, 2, 1, 0] * 20]
    images = ImageRows.of([(0, 120)], CPU)
    kept = torch.tensor([1, 2, 4, 113])
    into = match_kept(x, images, kept).tolist()
    assert [into[i] for i in kept.tolist()] == kept.tolist()
    # Tokens 1, 2 and 4 are the same; a token that is like none goes to the first as well.
    expected = [113 if i % 6 in (0, 5) else 1 for i in range(120)]
    assert into == [i if i in kept else taker for i, taker in enumerate(expected)]


def test_the_length_of_a_hidden_state_is_no_likeness() -> None:
    x = torch.tensor([[100.0, 60.0], [0.0, 0.1], [0.2, 1.0]])
    into = match_kept(x, ImageRows.of([(0, 3)], CPU), torch.tensor([0, 1]))
    assert into.tolist() == [0, 1, 1]


def test_every_image_keeps_its_best_token() -> None:
    """Rows 1-3, 5-6 and 7 are images; the budget left goes to the best of all."""
    scores = torch.tensor([9.0, 7.0, 8.0, 6.0, 9.0, 1.0, 1.0, 0.5, 9.0])
    images = ImageRows.of([(1, 4), (5, 7), (7, 8)], CPU)
    for budget, kept in ((3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        chosen = choose(scores, images, [budget], 1, every_image=True)
        assert chosen.kept.tolist() == kept
        assert chosen.scores.tolist() == [7, 8, 6, 1, 1, 0.5]  # as they are
    assert choose(scores, images, [3], 1).kept.tolist() == [0, 1, 2]
    assert choose(scores, images, [1, 1, 1], 1, every_image=True).kept.tolist() == [1, 3, 5]


# ---- in the model ------------------------------------------------------------------------------


@torch.inference_mode()
def run(prompt: Prompt, fastv: FastV) -> tuple[KVCache, tuple[Pruning, ...]]:
    rows, layout = prompt.splice(LLAVA, "folded")
    _, [cache], [stages] = LLAVA([rows], [layout], [None], [fastv])
    return cache, stages


@pytest.mark.parametrize("groups", [None, (2, 0, 2, 1, 0, 2, 3, 3)])
def test_one_kept_token_stands_for_the_whole_image(groups: tuple[int, ...] | None) -> None:
    image = Picture(8 if groups is None else 4, groups, 1)
    prompt = Prompt((3, IMAGE_TOKEN_ID, 4, 5), (image,))
    cache, [pruning] = run(prompt, FastV(keep=1, layer=2, rest="fold"))
    for layer in (2, 3):
        sizes = torch.tensor(log_sizes_of(cache[layer])).exp()
        assert sizes.tolist() == pytest.approx([1, 8, 1, 1])
    assert pruning.folded_into is not None
    assert set(pruning.folded_into.tolist()) == set(pruning.kept.tolist())


def test_every_image_keeps_a_token_through_all_stages() -> None:
    """Also where fewer tokens than images are asked for, in the first stage or in a later one."""
    pictures = (Picture(3, (0, 1, 2, 1), 1), Picture(2, None, 2), Picture(1, (0, 0), 3))
    prompt = Prompt((IMAGE_TOKEN_ID, 3, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 4), pictures)
    for stages, kept in (
        (((1, 1),), [3]),
        (((1, 4), (2, 1)), [4, 3]),
        (((1, 3), (2, 2), (3, 1)), [3]),  # nothing is left to fold in the later ones
    ):
        cache, done = run(prompt, FastV(stages=stages, rest="fold"))
        assert [len(pruning.kept) for pruning in done] == kept
        assert done[-1].image_rows.images.tolist() == [0, 1, 2]
        sizes = torch.tensor(log_sizes_of(cache[-1])).exp()
        assert sizes.tolist() == pytest.approx([4, 1, 2, 2, 1])
