"""Where the rows of a prompt stand.

The decoder computes on U rows: words, and image tokens into which several patches may have merged.
They stand at N positions, and attention sees K keys. There are four ways to place an image whose P
patches have merged into U tokens, behind `p` rows of text (`PLACEMENTS`):

    plain     one position per token, p .. p + U - 1; the text behind the image moves closer
    logical   one position per token: the position of the token's first patch, ascending; the text
              behind the image starts at p + P, as without merging
    vtu       virtual token unmerging (DyMU, arXiv 2504.17040): a token stands at the positions of
              all its patches, and attention sees every position. rows -> positions is a copy
              ("unmerge"), the way back a mean ("remerge")
    folded    a token stands at the positions of all its patches, and attention sees the token once:
              at the mean of the rotations of its positions, with log(size) added to its scores

With `vtu` and `folded`, mapping_indices (N,) say which row stands at which position.

The trade-off: `vtu` reproduces the sequence the model was trained on, at the price of attention
over all N positions. `folded` is the first-order form of `vtu`, at the price of `logical`:
s equal keys at s positions have the weight sum(exp(q . R(p) k)) >= s * exp(q . mean(R(p)) k).
`logical` forgets the sizes of the tokens.

Shapes: U rows, N positions and K keys of one item (K = N with `vtu`, else K = U); R rows, L
positions and S keys of all items of a batch, packed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """The new rows of one item.

    position_ids (N,), ascending; mapping_indices (N,), the row at each position (None: row i has
    position_ids[i], so N = U); folded: attention sees every row once, so K = U, and the positions
    of dropped rows have the row number U; image_spans, the rows (start, stop) of each image;
    next_position, where the next row will stand."""

    num_rows: int
    position_ids: Tensor
    next_position: int
    mapping_indices: Tensor | None = None
    folded: bool = False
    image_spans: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def text(num_rows: int, position: int, device: torch.device) -> "Layout":
        """`num_rows` rows one after the other, the first at `position`."""
        stop = position + num_rows
        return Layout(num_rows, torch.arange(position, stop, device=device), stop)

    @property
    def num_keys(self) -> int:
        """K, the length that attention sees."""
        return self.num_rows if self.folded else len(self.position_ids)

    def row_sizes(self) -> Tensor:
        """The number of positions of each row (U,), float32: 1, or the patches of a token."""
        sizes = count_indices(self.mapping_indices, self.num_rows)
        ones = torch.ones(self.num_rows, device=self.position_ids.device)
        return ones if sizes is None else sizes

    def keep(self, kept_indices: Tensor) -> "Layout":
        """The layout of the rows kept_indices (U',), ascending. All positions of a kept row stay,
        with the same position ids."""
        num_rows = len(kept_indices)
        if self.mapping_indices is None:
            return Layout(num_rows, self.position_ids[kept_indices], self.next_position)
        stays = torch.zeros(self.num_rows, dtype=torch.bool, device=kept_indices.device)
        stays = stays.index_fill(0, kept_indices, True)
        new_row = stays.cumsum(0) - 1  # kept rows close the gaps, so they get new numbers
        if self.folded:
            return self.fold(new_row.masked_fill(~stays, num_rows), num_rows)
        shown = stays[self.mapping_indices]  # (N,) whether a position stays
        # int(...) waits for the device: only the device knows how many positions stay.
        positions = (~shown).int().argsort(stable=True)[: int(shown.sum())]
        mapping_indices = new_row[self.mapping_indices[positions]]
        return Layout(num_rows, self.position_ids[positions], self.next_position, mapping_indices)

    def fold(self, new_row: Tensor, num_rows: int) -> "Layout":
        """The folded layout after row i became a part of row new_row[i] (U,), of `num_rows`. All
        positions go with their row; those of new row `num_rows` are dropped."""
        if self.mapping_indices is not None:
            # The positions of dropped rows stay dropped.
            new_row = F.pad(new_row, (0, 1), value=num_rows)[self.mapping_indices]
        return Layout(num_rows, self.position_ids, self.next_position, new_row, folded=True)


@dataclass(frozen=True)
class PackedLayout:
    """The layouts of a batch, concatenated.

    position_ids (L,); per item its number of rows and of keys; fold_indices (L,), the key at each
    position, S for a dropped one, and key_sizes (S,), the number of positions of each key;
    mapping_indices (S,), the row of each key, and row_sizes (R,), the number of keys of each row.
    Both pairs are None where they would be one to one. log_sizes: per item the log of its key sizes
    (K,), to add to attention scores, None for an item that is not folded."""

    position_ids: Tensor
    num_rows: tuple[int, ...]
    num_keys: tuple[int, ...]
    fold_indices: Tensor | None
    key_sizes: Tensor | None
    mapping_indices: Tensor | None
    row_sizes: Tensor | None
    log_sizes: tuple[Tensor | None, ...]

    def fold(self, x: Tensor) -> Tensor:
        """Mean over the positions of every key: (L, ...) -> (S, ...), in float32 at least."""
        return average_at(x, self.fold_indices, self.key_sizes)

    def unmerge(self, x: Tensor) -> Tensor:
        """Copy every row to its keys: (R, ...) -> (S, ...)."""
        return x if self.mapping_indices is None else x[self.mapping_indices]

    def remerge(self, x: Tensor) -> Tensor:
        """Mean over the keys of every row: (S, ...) -> (R, ...), in float32 at least."""
        return average_at(x, self.mapping_indices, self.row_sizes)

    def last_rows(self, x: Tensor) -> Tensor:
        """The row of the last key of every item: (R, C) -> (B, C)."""
        if self.mapping_indices is None:
            return torch.cat([rows[-1:] for rows in x.split(self.num_rows)])
        items = self.mapping_indices.split(self.num_keys)
        return x[torch.cat([mapping_indices[-1:] for mapping_indices in items])]


def average_at(x: Tensor, indices: Tensor | None, sizes: Tensor | None) -> Tensor:
    """The mean of the x (N, ...) with the same index, `sizes` (M,) of them: (M, ...). None: x. An
    x with index M is dropped."""
    if indices is None or sizes is None:
        return x
    # A sum of many 16-bit numbers loses digits.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.new_zeros(len(sizes) + 1, *x.shape[1:])
    sums.index_add_(0, indices, wide)
    return (sums[:-1] / sizes.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def pack(layouts: Sequence[Layout]) -> PackedLayout:
    """Concatenate the layouts of the items of a batch."""
    num_rows = tuple(layout.num_rows for layout in layouts)
    num_keys = tuple(layout.num_keys for layout in layouts)
    device = layouts[0].position_ids.device
    folds = [layout.mapping_indices if layout.folded else None for layout in layouts]
    copies = [None if layout.folded else layout.mapping_indices for layout in layouts]
    fold_indices = concatenate_indices(folds, num_keys, device)
    key_sizes = count_indices(fold_indices, sum(num_keys))
    mapping_indices = concatenate_indices(copies, num_rows, device)
    log_sizes: list[Tensor | None] = [None] * len(layouts)
    if key_sizes is not None:
        log_sizes = [
            None if fold is None else sizes.log()
            for fold, sizes in zip(folds, key_sizes.split(num_keys), strict=True)
        ]
    return PackedLayout(
        torch.cat([layout.position_ids for layout in layouts]),
        num_rows,
        num_keys,
        fold_indices,
        key_sizes,
        mapping_indices,
        count_indices(mapping_indices, sum(num_rows)),
        tuple(log_sizes),
    )


def concatenate_indices(
    indices: Sequence[Tensor | None], counts: Sequence[int], device: torch.device
) -> Tensor | None:
    """Concatenate indices into `counts` things each; None is one to one. An index past the end of
    its things becomes sum(counts). None if all are None."""
    if all(index is None for index in indices):
        return None
    total = sum(counts)
    return torch.cat(
        [
            torch.arange(first, first + count, device=device)
            if index is None
            else (index + first).masked_fill(index == count, total)
            for index, count, first in zip(indices, counts, accumulate((0, *counts)), strict=False)
        ]
    )


def count_indices(indices: Tensor | None, count: int) -> Tensor | None:
    """How often each of the numbers 0 .. count - 1 is an index (count,), float32."""
    if indices is None:
        return None
    sizes = torch.zeros(count + 1, device=indices.device)  # bincount would wait for the device
    return sizes.index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))[:-1]


def join(layouts: Sequence[Layout]) -> Layout:
    """Concatenate the pieces of one prompt. In contrast to `pack`, the result is one item."""
    if len(layouts) == 1:
        return layouts[0]
    num_rows = [layout.num_rows for layout in layouts]
    spans = [
        (first + start, first + stop)
        for layout, first in zip(layouts, accumulate((0, *num_rows)), strict=False)
        for start, stop in layout.image_spans
    ]
    position_ids = torch.cat([layout.position_ids for layout in layouts])
    mappings = [layout.mapping_indices for layout in layouts]
    return Layout(
        sum(num_rows),
        position_ids,
        layouts[-1].next_position,
        concatenate_indices(mappings, num_rows, position_ids.device),
        any(layout.folded for layout in layouts),
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


def place_folded(mapping: Tensor, num_tokens: int, position: int) -> tuple[Layout, Tensor]:
    """The positions of all patches; attention sees each token once. Rows as with `logical`."""
    logical, order = place_logical(mapping, num_tokens, position)
    if num_tokens == len(mapping):  # every token is one patch: nothing to fold
        return logical, order
    vtu, _ = place_vtu(mapping, num_tokens, position)
    return replace(vtu, mapping_indices=order.argsort()[mapping], folded=True), order


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
    "folded": Placement(place_folded, keeps_length=True),
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
