"""Where the rows of a prompt stand: the map between what the model computes on and what attention
sees.

The decoder runs on U rows: words, and image tokens into each of which several patches may have
merged. Attention runs on N positions. Three ways to place merged image tokens (after `p` rows of
text, P patches merged into U tokens):

    plain     one position each, p .. p + U - 1; the text after them moves closer
    logical   one position each, that of their first patch, p + 0 .. p + P - 1, in this order; the
              text after them stands at p + P as if nothing had merged
    vtu       virtual token unmerging (DyMU, arXiv 2504.17040): every patch has its position, and
              shows there the token it is part of. mapping_indices (N,) say which row fills which
              position: rows -> positions is a copy ("unmerge"), back a mean ("remerge")

Between them lies the choice of this project: `vtu` gives the model the sequence it was trained on
and costs attention over all N positions, `logical` keeps its distances and costs U.

Shapes: U rows and N positions of one item, R and S those of all items of a batch, packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One item's new rows: position_ids (N,), ascending; mapping_indices (N,), the row at each
    position (None: row i at position i, N = U); image_spans, the rows (start, stop) of each image;
    and the position after the last one, where the next row will stand."""

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
        """N, what attention sees."""
        return len(self.position_ids)

    def keep(self, kept_indices: Tensor) -> "Layout":
        """What is left of it when only these rows, kept_indices (U',) ascending, go on, with all
        their positions, which keep their numbers."""
        mapping = self.mapping_indices
        num_rows = len(kept_indices)
        if mapping is None:
            return Layout(num_rows, self.position_ids[kept_indices], self.next_position)
        stays = torch.zeros(self.num_rows, dtype=torch.bool, device=mapping.device)
        stays = stays.index_fill(0, kept_indices, True)
        shown = stays[mapping]  # (N,) whether a position stays
        # How many do is only known to the device: the one scalar that a `vtu` prompt waits for.
        positions = (~shown).int().argsort(stable=True)[: int(shown.sum())]
        new_row = stays.cumsum(0) - 1
        return Layout(
            num_rows, self.position_ids[positions], self.next_position, new_row[mapping[positions]]
        )


@dataclass(frozen=True)
class PackedLayout:
    """The layouts of a batch, one after the other: position_ids (S,); per item its number of rows
    and of positions; mapping_indices (S,) into the packed rows, and how many positions each of
    these fills, row_sizes (R,): both None where all items are identities."""

    position_ids: Tensor
    num_rows: tuple[int, ...]
    num_positions: tuple[int, ...]
    mapping_indices: Tensor | None
    row_sizes: Tensor | None

    def unmerge(self, x: Tensor) -> Tensor:
        """Show every row at its positions: (R, ...) -> (S, ...)."""
        return x if self.mapping_indices is None else x[self.mapping_indices]

    def remerge(self, x: Tensor) -> Tensor:
        """Mean over the positions of every row: (S, ...) -> (R, ...), in float32 at least."""
        if self.mapping_indices is None or self.row_sizes is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.new_zeros(len(self.row_sizes), *x.shape[1:])
        sums.index_add_(0, self.mapping_indices, wide)
        return (sums / self.row_sizes.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    def last_rows(self, x: Tensor) -> Tensor:
        """Of every item the row at its last position: (R, C) -> (B, C)."""
        if self.mapping_indices is None:
            return torch.cat([rows[-1:] for rows in x.split(self.num_rows)])
        items = self.mapping_indices.split(self.num_positions)
        return x[torch.cat([mapping[-1:] for mapping in items])]


def pack(layouts: Sequence[Layout]) -> PackedLayout:
    """Several layouts as one."""
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
    """Pieces of one prompt, one after the other: all rows are one item's."""
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


def place_image(
    mapping: Tensor | None, num_tokens: int, position: int, positions: str, device: torch.device
) -> tuple[Layout, Tensor | None]:
    """The layout of one image from `position` on, and the order (U,) its tokens must have in it
    (None: as they are). mapping (P,) is the token of every patch, None where none has merged."""
    span = ((0, num_tokens),)
    if mapping is None or positions == "plain":
        return replace(Layout.text(num_tokens, position, device), image_spans=span), None
    patches = torch.arange(position, position + len(mapping), device=device)
    stop = position + len(mapping)
    if positions == "vtu":
        return Layout(num_tokens, patches, stop, mapping, span), None
    first = torch.full((num_tokens,), stop, device=device).scatter_reduce(
        0, mapping, patches, "amin"
    )
    position_ids, order = first.sort()
    return Layout(num_tokens, position_ids, stop, None, span), order
