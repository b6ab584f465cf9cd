"""The KV cache of one layer: a pair (k, v), each (1, G, length, D), and attention over it.

The key of a folded image token stands for several patches (layout.py). So the pair also knows the
log of the sizes of its first keys; all later keys count once. Whoever rebuilds such a pair keeps
them: `LayerCache(k, v, log_sizes=pair.log_sizes)`.

`append` gives a longer pair. A plain append would copy the whole pair for every token. So the first
append moves the pair into a `Room` with spare space behind it, and later ones write there.

A pair never changes after it was handed out: it shows its own positions only. Two continuations of
one pair never meet, because only the first of them gets the spare space.

Shapes: H heads, G <= H heads of keys and values, D head dim, n new positions of one item.
"""

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

SPARE = 0.25  # spare space as a share of the length, and at least:
FEWEST_SPARE = 64
# One lock for all rooms: held for two comparisons only, and rooms stay easy to copy and compile.
TAKING = Lock()


@dataclass
class Room:
    """keys and values (1, G, capacity, D); the first `used` positions are taken."""

    keys: Tensor
    values: Tensor
    used: int

    def take(self, length: int, new: int) -> bool:
        """Take the `new` positions behind the first `length`. Returns False if they are taken."""
        # torch forbids writing to a tensor of inference mode outside of inference mode.
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        with TAKING:
            free = self.used == length and length + new <= self.keys.shape[2]
            if free:
                self.used = length + new
        return free


class LayerCache(tuple[Tensor, Tensor]):
    """The pair (k, v) of one layer: a plain tuple that also knows its room, if it has one, and
    log_sizes (m,) of its first m keys (None: every key counts once)."""

    room: Room | None
    log_sizes: Tensor | None

    def __new__(
        cls, k: Tensor, v: Tensor, room: Room | None = None, log_sizes: Tensor | None = None
    ) -> "LayerCache":
        pair = super().__new__(cls, (k, v))
        pair.room, pair.log_sizes = room, log_sizes
        return pair

    def __reduce__(self) -> tuple[type, tuple[Tensor, Tensor, None, Tensor | None]]:
        return LayerCache, (self[0], self[1], None, self.log_sizes)  # a copy leaves the room behind

    @staticmethod
    def wrap(past: tuple[Tensor, Tensor] | None, like: Tensor) -> "LayerCache":
        """Any pair as a LayerCache in the dtype of `like` (1, G, n, D); None is an empty pair."""
        if isinstance(past, LayerCache) and past[0].dtype == like.dtype:
            return past
        k, v = (like[:, :, :0],) * 2 if past is None else (part.to(like.dtype) for part in past)
        return LayerCache(k, v, None, getattr(past, "log_sizes", None))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, "LayerCache"]:
        """Append k and v (1, G, n, D), then attend from q (1, H, n, D) to all keys: (1, H, n, D),
        and the longer pair. log_sizes (n,) of the new keys; mask as in `attend`."""
        grown = append(self, k, v, log_sizes)
        return attend(q, *grown, mask, grown.log_sizes), grown


KVCache = tuple[tuple[Tensor, Tensor], ...]


def append(
    past: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor, log_sizes: Tensor | None = None
) -> LayerCache:
    """The pair `past` (None: empty) with the new k and v (1, G, n, D) behind it, and the log sizes
    (n,) of the new keys (None: each counts once)."""
    if past is None or past[0].shape[2] == 0:
        return LayerCache(k, v, None, log_sizes)
    pair = LayerCache.wrap(past, k)
    length, stop = past[0].shape[2], past[0].shape[2] + k.shape[2]
    if log_sizes is None:
        log_sizes = pair.log_sizes
    else:
        before = log_sizes[:0] if pair.log_sizes is None else pair.log_sizes
        log_sizes = torch.cat((pad_sizes(before, length), log_sizes))
    # Writing in place would break the backward pass.
    if any(part.requires_grad for part in (k, v, *past)):
        return LayerCache(torch.cat((past[0], k), 2), torch.cat((past[1], v), 2), None, log_sizes)
    room = pair.room
    if room is None or not room.take(length, k.shape[2]):
        capacity = stop + max(FEWEST_SPARE, int(SPARE * stop))
        room = Room(add_space(past[0], capacity), add_space(past[1], capacity), stop)
    room.keys[:, :, length:stop], room.values[:, :, length:stop] = k, v
    return LayerCache(room.keys[:, :, :stop], room.values[:, :, :stop], room, log_sizes)


def pad_sizes(log_sizes: Tensor, num_keys: int) -> Tensor:
    """The log sizes of the first m keys -> of all (num_keys,): the others count once."""
    return F.pad(log_sizes, (0, num_keys - len(log_sizes)))


def add_space(x: Tensor, capacity: int) -> Tensor:
    """Copy x (1, G, length, D) to the beginning of a new (1, G, capacity, D)."""
    wide = x.new_empty(1, x.shape[1], capacity, x.shape[3])
    wide[:, :, : x.shape[2]] = x
    return wide


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool, True = may attend. The queries are the last of the keys."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_sizes: Tensor | None = None
) -> Tensor:
    """Fused attention of one item: q (1, H, n, D), k and v (1, G, keys, D) -> (1, H, n, D).

    mask (n, keys): bool or added to the scores (None: causal). log_sizes (m,) of the first m keys:
    a key of size s counts s times (None: every key counts once)."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    # is_causal aligns the triangle to the top left corner, which is wrong behind a cache.
    is_causal = mask is None and log_sizes is None and num_queries == num_keys
    if mask is None and not is_causal and num_queries > 1:
        mask = causal_mask(num_queries, num_keys, q.device)
    if log_sizes is not None:
        mask = add_sizes(mask, pad_sizes(log_sizes, num_keys), q)
    rows = share_keys(q, k)
    mixed = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=rows.shape[1] != k.shape[1]
    )
    return mixed.reshape(q.shape)


def share_keys(q: Tensor, k: Tensor) -> Tensor:
    """Turn single queries (n, H, 1, D) of the same key heads (n, G, keys, D) into rows of one head:
    (n, G, H / G, D). Kernels then read each key once. Several queries stay as they are."""
    return q if q.shape[2] != 1 else q.reshape(len(q), k.shape[1], -1, q.shape[3])


def add_sizes(mask: Tensor | None, log_sizes: Tensor, q: Tensor) -> Tensor:
    """The mask (n, keys) (None: nothing is hidden) with log_sizes (keys,) added to every row."""
    if mask is None:
        bias = log_sizes[None]
    elif mask.dtype == torch.bool:
        bias = torch.where(mask, log_sizes, -torch.inf)
    else:
        bias = mask + log_sizes
    # On a CPU the kernels add a float32 mask to 16-bit queries in float32. On a GPU they want one
    # dtype. A float32 mask and float64 queries give wrong numbers.
    return bias.to(q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32))
