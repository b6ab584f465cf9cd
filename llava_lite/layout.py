"""Where the rows of a prompt stand.

The decoder computes on U rows: words, and image tokens into which several patches may have merged.
Attention sees N positions. There are three ways to place an image whose P patches have merged into
U tokens, behind `p` rows of text (`PLACEMENTS`):

    plain     one position per token, p .. p + U - 1; the text behind the image moves closer
    logical   one position per token: the position of the token's first patch, ascending; the text
              behind the image starts at p + P, as without merging
    vtu       virtual token unmerging (DyMU, arXiv 2504.17040): one position per patch, which shows
              the token of the patch. mapping_indices (N,) say which row fills which position:
              rows -> positions is a copy ("unmerge"), the way back a mean ("remerge")

The trade-off: `vtu` reproduces the sequence the model was trained on, at the price of attention
over all N positions. `logical` keeps the distances between tokens and attends over U positions.

Shapes: U rows and N positions of one item; R rows and S positions of all items of a batch, packed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The new rows of one item.

    position_ids (N,), ascending; mapping_indices (N,), the row at each position (None: row i has
    position_ids[i], so N = U); image_spans, the rows (start, stop) of each image; next_position,
    where the next row will stand."""

    num_rows: int
    position_ids: Tensor
    next_position: int
    mapping_indices: Tensor | None = None
    image_spans: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def text(num_rows: int, position: int, device: torch.device) -> "Layout":
        """`num_rows` rows one after the other, the first at `position`."""
        stop = position + num_rows
        return Layout(num_rows, torch.arange(position, stop, device=device), stop)

    @property
    def num_positions(self) -> int:
        """N, the length that attention sees."""
        return len(self.position_ids)

    def keep(self, kept_indices: Tensor) -> "Layout":
        """The layout of the rows kept_indices (U',), ascending. All positions of a kept row stay,
        with the same position ids."""
        num_rows = len(kept_indices)
        if self.mapping_indices is None:
            return Layout(num_rows, self.position_ids[kept_indices], self.next_position)
        stays = torch.zeros(self.num_rows, dtype=torch.bool, device=kept_indices.device)
        stays = stays.index_fill(0, kept_indices, True)
        shown = stays[self.mapping_indices]  # (N,) whether a position stays
        # int(...) waits for the device: only the device knows how many positions stay.
        positions = (~shown).int().argsort(stable=True)[: int(shown.sum())]
        new_row = stays.cumsum(0) - 1  # kept rows close the gaps, so they get new numbers
        mapping_indices = new_row[self.mapping_indices[positions]]
        return Layout(num_rows, self.position_ids[positions], self.next_position, mapping_indices)


@dataclass(frozen=True)
class PackedLayout:
    """The layouts of a batch, concatenated.

    position_ids (S,); per item its number of rows and of positions; mapping_indices (S,) into the
    packed rows; row_sizes (R,), the number of positions of each row. The last two are None if every
    row has one position."""

    position_ids: Tensor
    num_rows: tuple[int, ...]
    num_positions: tuple[int, ...]
    mapping_indices: Tensor | None
    row_sizes: Tensor | None

    def unmerge(self, x: Tensor) -> Tensor:
        """Copy every row to its positions: (R, ...) -> (S, ...)."""
        return x if self.mapping_indices is None else x[self.mapping_indices]

    def remerge(self, x: Tensor) -> Tensor:
        """Mean over the positions of every row: (S, ...) -> (R, ...), in float32 at least."""
        if self.mapping_indices is None or self.row_sizes is None:
            return x
        # A sum of many 16-bit numbers loses digits.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.new_zeros(len(self.row_sizes), *x.shape[1:])
        sums.index_add_(0, self.mapping_indices, wide)
        return (sums / self.row_sizes.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    def last_rows(self, x: Tensor) -> Tensor:
        """The row at the last position of every item: (R, C) -> (B, C)."""
        if self.mapping_indices is None:
            return torch.cat([rows[-1:] for rows in x.split(self.num_rows)])
        items = self.mapping_indices.split(self.num_positions)
        return x[torch.cat([mapping_indices[-1:] for mapping_indices in items])]


def pack(layouts: Sequence[Layout]) -> PackedLayout:
    """Concatenate the layouts of the items of a batch."""
    num_rows = tuple(layout.num_rows for layout in layouts)
    mapping_indices = row_sizes = None
    if any(layout.mapping_indices is not None for layout in layouts):
        mapping_indices = torch.cat(
            [
                torch.arange(layout.num_rows, device=layout.position_ids.device) + first
                if layout.mapping_indices is None
                else layout.mapping_indices + first
                for layout, first in zip(layouts, accumulate((0, *num_rows)), strict=False)
            ]
        )
        row_sizes = mapping_indices.new_zeros(sum(num_rows))  # bincount would wait for the device
        row_sizes.index_add_(0, mapping_indices, torch.ones_like(mapping_indices))
    return PackedLayout(
        torch.cat([layout.position_ids for layout in layouts]),
        num_rows,
        tuple(layout.num_positions for layout in layouts),
        mapping_indices,
        row_sizes,
    )


def join(layouts: Sequence[Layout]) -> Layout:
    """Concatenate the pieces of one prompt. In contrast to `pack`, the result is one item."""
    if len(layouts) == 1:
        return layouts[0]
    packed = pack(layouts)
    firsts = list(accumulate((0, *packed.num_rows)))
    spans = [
        (first + start, first + stop)
        for layout, first in zip(layouts, firsts, strict=False)
        for start, stop in layout.image_spans
    ]
    return Layout(
        firsts[-1],
        packed.position_ids,
        layouts[-1].next_position,
        packed.mapping_indices,
        tuple(spans),
    )


# ---- placing an image --------------------------------------------------------------------------
# Each function takes the mapping (P,) from patch to token, the number U of tokens and the first
# position. It returns the layout, and the order (U,) in which the tokens become rows (None: as is).


def place_plain(mapping: Tensor, num_tokens: int, position: int) -> tuple[Layout, None]:
    """One position per token, without gaps."""
    return Layout.text(num_tokens, position, mapping.device), None


def place_logical(mapping: Tensor, num_tokens: int, position: int) -> tuple[Layout, Tensor]:
    """One position per token: the position of its first patch."""
    stop = position + len(mapping)
    patches = torch.arange(position, stop, device=mapping.device)
    first = torch.full((num_tokens,), stop, device=mapping.device)
    first = first.scatter_reduce(0, mapping, patches, "amin")
    position_ids, order = first.sort()  # merging has shuffled the tokens
    return Layout(num_tokens, position_ids, stop), order


def place_vtu(mapping: Tensor, num_tokens: int, position: int) -> tuple[Layout, None]:
    """One position per patch, which shows the token of the patch."""
    stop = position + len(mapping)
    patches = torch.arange(position, stop, device=mapping.device)
    return Layout(num_tokens, patches, stop, mapping), None


@dataclass(frozen=True)
class Placement:
    """One way to place an image: its function, and the length of the image for the text behind it:
    P, as without merging (`keeps_length`), or U."""

    place: Callable[[Tensor, int, int], tuple[Layout, Tensor | None]]
    keeps_length: bool

    def num_positions(self, num_patches: int, num_tokens: int) -> int:
        """The distance from the first position of the image to the text behind it."""
        return num_patches if self.keeps_length else num_tokens


PLACEMENTS = {
    "vtu": Placement(place_vtu, keeps_length=True),
    "logical": Placement(place_logical, keeps_length=True),
    "plain": Placement(place_plain, keeps_length=False),
}


def place_image(
    mapping: Tensor | None, num_tokens: int, position: int, positions: str, device: torch.device
) -> tuple[Layout, Tensor | None]:
    """Place one image from `position` on, in the way that `positions` names in `PLACEMENTS`.

    mapping (P,) is the token of every patch (None: nothing has merged, all ways are the same).
    Returns the layout, and the order (U,) in which the tokens become rows (None: as is)."""
    if mapping is None:
        layout, order = Layout.text(num_tokens, position, device), None
    else:
        layout, order = PLACEMENTS[positions].place(mapping, num_tokens, position)
    return replace(layout, image_spans=((0, num_tokens),)), order
