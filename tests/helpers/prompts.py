"""Random prompts with pictures, written out by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.models import TINY_TEXT
from helpers.tensors import draw
from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.layout import Layout
from llava_lite.llava import EncodedImage, Llava

seeds = st.integers(0, 2**31)


@dataclass(frozen=True)
class Picture:
    """An image of `num_tokens` tokens; groups: the token of every patch, None = none merged."""

    num_tokens: int
    groups: tuple[int, ...] | None
    seed: int

    def encoded(self, dtype: torch.dtype = torch.float64) -> EncodedImage:
        embeds = draw(self.seed, self.num_tokens, TINY_TEXT.hidden_size, dtype=dtype)
        mapping = None if self.groups is None else torch.tensor(self.groups)
        return EncodedImage(embeds, mapping)


@dataclass(frozen=True)
class Prompt:
    """Ids with -200 for every picture."""

    input_ids: tuple[int, ...]
    pictures: tuple[Picture, ...]

    def splice(self, llava: Llava, positions: str, position: int = 0) -> tuple[Tensor, Layout]:
        images = [picture.encoded(llava.dtype) for picture in self.pictures]
        return llava.splice(self.input_ids, images, position, positions)


@dataclass
class Lists:
    """A layout written out: the row of every position, whether attention sees a row once, the
    rows of every image, the picture and the token that each of these rows shows."""

    mapping: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    folded: bool = False
    num_rows: int = 0
    next_position: int = 0
    image_rows: list[list[int]] = field(default_factory=list)
    shown: dict[int, tuple[int, int]] = field(default_factory=dict)

    def keys(self) -> list[tuple[int, list[int]]]:
        """What attention sees: rows, and the position ids of each."""
        pairs = list(zip(self.mapping, self.position_ids, strict=True))
        if not self.folded:
            return [(row, [place]) for row, place in pairs]
        return [
            (row, [place for owner, place in pairs if owner == row]) for row in range(self.num_rows)
        ]


def write_out(prompt: Prompt, positions: str, position: int = 0) -> Lists:
    """The rules of layout.py, one position at a time."""
    lists, pictures = Lists(next_position=position), list(enumerate(prompt.pictures))
    for token in prompt.input_ids:
        first_row, first = lists.num_rows, lists.next_position
        if token != IMAGE_TOKEN_ID:
            lists.mapping.append(first_row)
            lists.position_ids.append(first)
            lists.num_rows += 1
            lists.next_position += 1
            continue
        index, picture = pictures.pop(0)
        groups = list(range(picture.num_tokens)) if picture.groups is None else picture.groups
        tokens = list(range(picture.num_tokens))
        if positions in ("logical", "folded"):
            tokens.sort(key=list(groups).index)
        if positions in ("vtu", "folded"):
            lists.mapping += [first_row + tokens.index(group) for group in groups]
            lists.position_ids += [first + patch for patch in range(len(groups))]
            lists.folded |= positions == "folded" and len(tokens) < len(groups)
        else:
            places = tokens
            if positions == "logical":
                places = [list(groups).index(token) for token in tokens]
            lists.mapping += [first_row + row for row in range(len(tokens))]
            lists.position_ids += [first + place for place in places]
        lists.image_rows.append([first_row + row for row in range(len(tokens))])
        lists.shown |= {first_row + row: (index, token) for row, token in enumerate(tokens)}
        lists.num_rows += len(tokens)
        lists.next_position += len(tokens) if positions == "plain" else len(groups)
    return lists


@st.composite
def groupings(draw_value: st.DrawFn, most: int = 12) -> tuple[int, ...]:
    """A partition of 1..most patches, its groups in any order."""
    raw = draw_value(st.lists(st.integers(0, 5), min_size=1, max_size=most))
    order = draw_value(st.permutations(sorted(set(raw))))
    return tuple(order.index(label) for label in raw)


@st.composite
def pictures(draw_value: st.DrawFn) -> Picture:
    groups = draw_value(st.none() | groupings())
    tokens = draw_value(st.integers(1, 6)) if groups is None else max(groups) + 1
    return Picture(tokens, groups, draw_value(seeds))


@st.composite
def prompts(
    draw_value: st.DrawFn, min_images: int = 0, max_images: int = 2, min_tail: int = 1
) -> Prompt:
    """Images first, last, in the middle, one directly after the other; `min_tail` words last."""
    words = st.integers(3, TINY_TEXT.vocab_size - 1)
    images = draw_value(st.lists(pictures(), min_size=min_images, max_size=max_images))
    input_ids: list[int] = []
    for _ in images:
        input_ids += [*draw_value(st.lists(words, max_size=3)), IMAGE_TOKEN_ID]
    least = max(min_tail, 0 if images else 1)
    return Prompt(
        (*input_ids, *draw_value(st.lists(words, min_size=least, max_size=least + 3))),
        tuple(images),
    )


def decode(
    llava: Llava, token_ids: Sequence[int], position: int, cache: KVCache
) -> tuple[Tensor, KVCache]:
    """Feed tokens one by one: the logits (n, V) after each, and the grown cache."""
    steps = []
    for step, token in enumerate(token_ids):
        logits, cache = llava.decode(torch.tensor(token), position + step, cache)
        steps.append(logits[0])
    return torch.cat(steps) if steps else torch.empty(0), cache
