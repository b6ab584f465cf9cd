"""The KV cache: for every layer a pair (k, v), each (1, H, length, D), that grows by one position
with every token.

Appending to a tensor copies it, and 32 layers of a long prompt are half a gigabyte: too much to
copy for every token. So the first append puts the pair into a room with space left behind it, and
the next ones write there. A pair stays what it was when it was handed out: it shows its own
positions only, and two continuations of the same pair never meet, for only the first may have the
space.
"""

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

SPARE = 0.25  # of the length, and at least:
FEWEST_SPARE = 64
# Of threads that continue the same pair, one may have the space. A lock for all rooms is held for
# two comparisons, and rooms without one of their own can be copied and compiled.
TAKING = Lock()


@dataclass
class Room:
    """keys and values (1, H, capacity, D), the first `used` positions of them taken."""

    keys: Tensor
    values: Tensor
    used: int

    def take(self, length: int, new: int) -> bool:
        """Take the `new` positions behind the first `length` ones; whether these were free."""
        # What was made in inference mode must not be written to outside of it.
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        with TAKING:
            free = self.used == length and length + new <= self.keys.shape[2]
            if free:
                self.used = length + new
        return free


class LayerCache(tuple[Tensor, Tensor]):
    """The pair (k, v) of one layer, a plain tuple but for the room that it lies in."""

    room: Room | None

    def __new__(cls, k: Tensor, v: Tensor, room: Room | None = None) -> "LayerCache":
        pair = super().__new__(cls, (k, v))
        pair.room = room
        return pair

    def __reduce__(self) -> tuple[type, tuple[Tensor, Tensor]]:  # a copy leaves the room behind
        return LayerCache, (self[0], self[1])


class StaticCache(LayerCache):
    """One layer's caches of several items in a fixed shape, which grow and attend by themselves
    (static_decode.py). In a batch they stand for one item with a row for each of theirs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new positions and attend from them: (1, H, n, D) each, and so the result."""
        raise NotImplementedError


KVCache = tuple[tuple[Tensor, Tensor], ...]


def append(past: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> LayerCache:
    """The pair `past` (None: nothing) with the new positions k and v (1, H, n, D) behind it."""
    if past is None:
        return LayerCache(k, v)
    # Writing in place would break the way back.
    if any(part.requires_grad for part in (k, v, *past)):
        return LayerCache(torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))
    length, stop = past[0].shape[2], past[0].shape[2] + k.shape[2]
    room = past.room if isinstance(past, LayerCache) else None
    if room is None or not room.take(length, k.shape[2]):
        capacity = stop + max(FEWEST_SPARE, int(SPARE * stop))
        room = Room(with_space(past[0], capacity), with_space(past[1], capacity), stop)
    room.keys[:, :, length:stop], room.values[:, :, length:stop] = k, v
    return LayerCache(room.keys[:, :, :stop], room.values[:, :, :stop], room)


def with_space(x: Tensor, capacity: int) -> Tensor:
    """x (1, H, length, D) at the beginning of a new (1, H, capacity, D)."""
    wide = x.new_empty(1, x.shape[1], capacity, x.shape[3])
    wide[:, :, : x.shape[2]] = x
    return wide
