"""Decode steps of fixed shapes: a GPU replays one as a CUDA graph, and torch can compile it.

A decode step is hundreds of small operators. On a fast device, launching them takes longer than
running them. A recorded step is one launch, but uses the same memory and shapes each time. So the
caches of up to S items lie in S slots of fixed buffers, and a small table holds what changes:

    token        (n,)      the token of each slot
    position     (n,)      the position of the token, for RoPE
    places       (L, n)    the place in the cache of each layer; pruned layers hold fewer positions

The step runs the decoder's own modules. The decoder sees the n slots as one item with n rows, whose
cache (`SlotPair`) attends within each slot. Unused slots run as well. Their output lands past the
valid positions and is overwritten by the next real token.

    CompiledModel    a `Model` with such decode steps
    StaticDecoder    the slots and the steps
    SlotCache        an item's cache while it lies in a slot; reads like a tuple of (k, v) pairs

Prompts and the next turn of a chat run as usual. Answers equal those of the ordinary decoder up to
rounding, because attention over a longer, masked buffer adds in another order.

Shapes: n slots of a step, of S; L layers, H heads, G of keys, D head dim, V vocabulary.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import RLock
from typing import Any, TypeGuard, cast, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_lite.cache import KVCache, LayerCache, pad_sizes, share_keys
from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.generation.model import Model
from llava_lite.generation.state import State
from llava_lite.layout import Layout
from llava_lite.llava import Llava

BUCKET = 256  # positions; a step reads whole buckets, and another number of buckets is another step
MOST_STEPS = 32  # recorded steps to keep
WARM_UPS = 3  # runs before recording, in which libraries initialize
WAYS = ("graph", "compile", "eager")


class CompileError(LlavaLiteError):
    """Decode steps cannot be compiled on this machine."""


# ---- the step ------------------------------------------------------------------------------------


class SlotPair(LayerCache):
    """One layer's buffers (k, v) of all slots, each (n, G, capacity, D).

    slots (n,) is 0..n-1; places (n,), where each slot stores its new position; bias
    (n, 1, 1, capacity), added to attention scores: the log sizes of the keys (0 for most), and -inf
    at invalid positions."""

    slots: Tensor
    places: Tensor
    bias: Tensor

    @staticmethod
    def of(pair: tuple[Tensor, Tensor], slots: Tensor, places: Tensor, bias: Tensor) -> "SlotPair":
        """Make a SlotPair from its parts."""
        cache = SlotPair(*pair)
        cache.slots, cache.places, cache.bias = slots, places, bias
        return cache

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerCache]:
        """As `LayerCache.attend`, but row i of q, k and v (1, ..., n, D) belongs to slot i. The
        slots' own bias takes the place of `log_sizes` and `mask`."""
        keys, values = self
        keys[self.slots, :, self.places] = k[0].transpose(0, 1)  # (n, G, D)
        values[self.slots, :, self.places] = v[0].transpose(0, 1)
        q = q.transpose(0, 2)  # (n, H, 1, D)
        mixed = F.scaled_dot_product_attention(share_keys(q, keys), keys, values, self.bias)
        return mixed.reshape(q.shape).transpose(0, 2), self


def decode_step(
    llava: Llava,
    table: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    log_sizes: Tensor,
) -> Tensor:
    """Run one token for every slot: table (2 + L, n) of tokens, positions and places. Writes to the
    buffers of each layer (n, G, capacity, D); log_sizes (L, n, capacity) of their keys. Returns
    logits (n, V).

    All control flow depends on shapes, never on values. A second run changes nothing."""
    tokens, position_ids, places = table[0], table[1], table[2:]
    capacity = torch.arange(keys[0].shape[2], device=table.device)
    hidden = capacity > places[..., None]  # (L, n, capacity)
    bias = log_sizes.masked_fill(hidden, float("-inf"))[:, :, None, None]  # of all layers at once
    slots = torch.arange(table.shape[1], device=table.device)
    cache = tuple(
        SlotPair.of(pair, slots, places[layer], bias[layer])
        for layer, pair in enumerate(zip(keys, values, strict=True))
    )
    rows = llava.decoder.embed_tokens(tokens)  # (n, C)
    layout = Layout(table.shape[1], position_ids, 0)
    logits, _, _ = llava([rows], [layout], [cache], all_logits=True)
    return logits


@dataclass(frozen=True, eq=False)
class Step:
    """A step for one shape: write its table (2 + L, n), then run it. The next run of any step may
    overwrite its logits (n, V)."""

    table: Tensor
    run: Callable[[], Tensor]


def record(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Record `run` as a CUDA graph. Returns the function that replays it.

    pool: memory that graphs share, because they never run at the same time."""
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use the device during the recording.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


# ---- slots ---------------------------------------------------------------------------------------


class SlotCache(Sequence[tuple[Tensor, Tensor]]):
    """The KV cache of one item in a slot. Reads like a tuple of (k, v) pairs.

    The pairs are copied out of the slot when they are read, or before another item takes the slot.
    Decoding on reads no pair, so it copies nothing."""

    def __init__(
        self,
        decoder: "StaticDecoder",
        slot: int,
        lengths: tuple[int, ...],
        log_sizes: tuple[Tensor | None, ...],
    ) -> None:
        self.decoder, self.slot, self.lengths = decoder, slot, lengths
        self.log_sizes = log_sizes  # per layer, as in `LayerCache`
        self.copied: KVCache | None = None

    @property
    def pairs(self) -> KVCache:
        """The cache as a tuple of pairs, copied out of the slot."""
        with self.decoder.lock:
            if self.copied is None:
                self.copied = tuple(
                    LayerCache(k.clone(), v.clone(), None, log_sizes)
                    for (k, v), log_sizes in zip(self.views(), self.log_sizes, strict=True)
                )
                self.decoder.handed[self.slot].discard(self)
            return self.copied

    def views(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (1, G, length, D) of each layer, valid until the slot is reused."""
        if self.copied is not None:
            yield from self.copied
            return
        buffers = zip(self.decoder.keys, self.decoder.values, self.lengths, strict=True)
        for k, v, length in buffers:
            slot = slice(self.slot, self.slot + 1)
            yield k[slot, :, :length], v[slot, :, :length]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, layer: slice) -> KVCache: ...

    def __getitem__(self, layer: int | slice) -> tuple[Tensor, Tensor] | KVCache:
        return self.pairs[layer]

    def __reduce__(self) -> tuple[type, tuple[KVCache]]:  # a copy is a plain tuple
        return tuple, (self.pairs,)


class StaticDecoder:
    """Decodes one token of several items in slots, in one step.

    way: "graph" (CUDA only) replays recorded steps, "compile" uses `torch.compile`, "eager" runs
    the steps as they are. One call runs at a time, others wait.

    The number of slots is the largest batch so far, as a power of two. The number of positions is
    the longest item so far, or up to twice that, in every layer. The memory is kept between calls.
    Replaced or moved weights are noticed when an item joins."""

    def __init__(self, llava: Llava, way: str) -> None:
        self.llava, self.way = llava, way
        self.lock = RLock()
        self.keys: list[Tensor] = []  # per layer (S, G, capacity, D)
        self.values: list[Tensor] = []
        self.log_sizes = torch.zeros(0, 0, 0)  # of all keys (L, S, capacity)
        self.handed: list[WeakSet[SlotCache]] = []  # the caches in each slot
        self.used: list[int] = []  # the time of each slot's last step
        self.time = 0
        self.steps: dict[tuple[int, int], Step] = {}
        self.weights = 0
        self.pool: Any = None  # memory of all recorded steps
        self.step_function: Callable[..., Tensor] = (
            torch.compile(decode_step) if way == "compile" else decode_step
        )

    @torch.inference_mode()
    def advance(self, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """As `Model.advance`, for states with a cache and one pending token."""
        with self.lock:
            caches = self.place(states)
            placed = dict(zip((cache.slot for cache in caches), states, strict=True))
            logits = self.run(placed, {cache.slot: cache.lengths for cache in caches})
            advanced = []
            for cache, state in zip(caches, states, strict=True):
                lengths = tuple(n + 1 for n in cache.lengths)
                grown = SlotCache(self, cache.slot, lengths, cache.log_sizes)
                self.handed[cache.slot].add(grown)
                self.used[cache.slot] = self.time
                # A SlotCache reads like a KVCache.
                cache_like = cast(KVCache, grown)
                advanced.append(
                    State(cache_like, state.next_position + 1, reduction=state.reduction)
                )
            # The next step overwrites the logits, so copy them. An index list would wait for the
            # device, slices do not.
            return torch.stack([logits[cache.slot] for cache in caches]), advanced

    def run(self, placed: dict[int, State], lengths: dict[int, tuple[int, ...]]) -> Tensor:
        """Run one step, given the state and the cache lengths in each used slot: logits (n, V)."""
        self.time += 1
        num_slots = power_of_two(max(placed) + 1)
        nothing = (0,) * len(self.keys)
        columns: list[tuple[int, ...]] = []
        for slot in range(num_slots):
            if slot in placed:
                state = placed[slot]
                columns.append((state.pending_ids[0], state.next_position, *lengths[slot]))
            else:  # unused: write past every cache that still lies in the slot
                wanted = (cache.lengths for cache in self.handed[slot])
                columns.append((0, 0, *max(wanted, default=nothing)))
        longest = max(max(column[2:]) for column in columns)
        table = self.llava.upload([list(row) for row in zip(*columns, strict=True)])
        capacity = buckets(longest + 1)
        step = self.steps.get((num_slots, capacity))
        if step is None:
            step = self.make_step(table, capacity)
        else:
            step.table.copy_(table)
        return self.call(step)

    def call(self, step: Step) -> Tensor:
        """Run a step. Raises CompileError if torch cannot compile it."""
        if self.way != "compile":
            return step.run()
        try:
            return step.run()
        except torch._dynamo.exc.TorchDynamoException as error:
            message = f"torch cannot compile the decode step here: {one_line(error)}"
            raise CompileError(message) from error

    def make_step(self, table: Tensor, capacity: int) -> Step:
        """Make the step for the slots of `table` and for `capacity` positions."""
        num_slots = table.shape[1]
        if len(self.steps) >= MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        keys, values = (
            [buffer[:num_slots, :, :capacity] for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        log_sizes = self.log_sizes[:, :num_slots, :capacity]
        run: Callable[[], Tensor] = partial(
            self.step_function, self.llava, table, keys, values, log_sizes
        )
        if self.way == "graph":
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            run = record(run, table.device, self.pool)
        step = self.steps[num_slots, capacity] = Step(table, run)
        return step

    # ---- joining ----

    def place(self, states: Sequence[State]) -> list[SlotCache]:
        """Give every state a slot: the slot of its cache, or another one with a copy of it."""
        caches = [cast(KVCache, state.past_key_values) for state in states]
        if not all(self.owns(cache) for cache in caches):
            self.check_weights()
        taken: set[int] = set()
        placed: list[SlotCache | None] = []
        for cache in caches:
            # Two states may continue one cache: only the first stays in the slot.
            if self.owns(cache) and cache.slot not in taken:
                taken.add(cache.slot)
                placed.append(cache)
            else:
                placed.append(None)
        lengths = [count_positions(cache) for cache in caches]
        resting = [cache.lengths for handed in self.handed for cache in handed]
        self.reserve(len(states), max(map(max, lengths + resting)) + 1)
        return [
            self.join(cache, length, taken) if stays is None else stays
            for stays, cache, length in zip(placed, caches, lengths, strict=True)
        ]

    def owns(self, cache: KVCache | SlotCache) -> TypeGuard[SlotCache]:
        """Whether the cache lies in a slot here and may grow: no longer cache shares the slot."""
        if not isinstance(cache, SlotCache) or cache.decoder is not self:
            return False
        if cache.copied is not None:
            return False
        return all(other.lengths <= cache.lengths for other in self.handed[cache.slot])

    def join(self, cache: KVCache, lengths: tuple[int, ...], taken: set[int]) -> SlotCache:
        """Copy a cache into a slot outside of `taken`, and add the slot to `taken`. The slot is the
        first without a cache, else the one that has rested longest, whose caches are copied out."""
        free = [slot for slot in range(len(self.handed)) if slot not in taken]
        slot = min(free, key=lambda slot: (self.used[slot] if self.handed[slot] else 0, slot))
        taken.add(slot)
        for other in list(self.handed[slot]):
            _ = other.pairs  # reading copies out of the slot
        log_sizes = sizes_of(cache)
        pairs = cache.views() if isinstance(cache, SlotCache) else iter(cache)
        capacity = self.log_sizes.shape[2]
        for keys, values, sizes, (k, v), length, new in zip(
            self.keys, self.values, self.log_sizes, pairs, lengths, log_sizes, strict=True
        ):
            sizes[slot] = 0 if new is None else pad_sizes(new, capacity)
            for buffer, content in ((keys[slot], k[0]), (values[slot], v[0])):
                buffer[:, :length] = content
                # Masked positions have weight 0, but 0 * inf is NaN: clear the last item's values.
                buffer[:, length:] = 0
        return SlotCache(self, slot, lengths, log_sizes)

    def reserve(self, num_slots: int, num_positions: int) -> None:
        """Make space for `num_slots` slots with `num_positions` positions each."""
        num_slots = max(power_of_two(num_slots), len(self.handed))
        buffers_now = [*self.keys, *self.values, self.log_sizes]
        capacity = min(buffer.shape[2] for buffer in buffers_now)
        if num_positions > capacity:
            capacity = max(buckets(num_positions), 2 * capacity)
        elif num_slots == len(self.handed):
            return
        self.forget_steps()  # they use the old buffers
        text, llava = self.llava.config.text, self.llava
        if not self.keys:
            nothing = torch.zeros(0, text.kv_heads, 0, text.head_dim)
            nothing = nothing.to(llava.device, llava.cache_dtype)
            self.keys, self.values = ([nothing] * text.num_layers for _ in range(2))
        for buffers in (
            self.keys,
            self.values,
        ):  # one by one: only one old buffer is kept meanwhile
            for layer, buffer in enumerate(buffers):
                buffers[layer] = resize_buffer(buffer, num_slots, capacity)
        # Float32 scores on a CPU take a float32 bias (`cache.add_sizes`); a GPU wants one dtype.
        dtype = torch.promote_types(llava.cache_dtype, torch.float32)
        sizes = self.log_sizes.new_zeros(text.num_layers, num_slots, capacity)
        sizes = sizes.to(llava.device, llava.cache_dtype if llava.device.type == "cuda" else dtype)
        layers, slots, length = self.log_sizes.shape
        sizes[:layers, :slots, :length] = self.log_sizes
        self.log_sizes = sizes
        self.used += [0] * (num_slots - len(self.used))
        self.handed += [WeakSet() for _ in range(num_slots - len(self.handed))]

    def forget_steps(self) -> None:
        """Forget all recorded steps."""
        self.steps.clear()
        self.pool = None  # a pool without a graph must not be used again

    def check_weights(self) -> None:
        """Forget the steps if the model's weights were replaced, and the slots if it has moved."""
        decoder = self.llava.decoder
        tensors = chain(decoder.parameters(), decoder.buffers())
        weights = hash(tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
        if weights == self.weights:
            return
        self.forget_steps()
        self.weights = weights
        kind = self.llava.device, self.llava.cache_dtype
        if self.keys and (self.keys[0].device, self.keys[0].dtype) != kind:
            for cache in [cache for handed in self.handed for cache in handed]:
                _ = cache.pairs
            self.keys, self.values, self.handed, self.used = [], [], [], []
            self.log_sizes = torch.zeros(0, 0, 0)


def count_positions(cache: KVCache | None) -> tuple[int, ...]:
    """The number of positions in each layer."""
    if isinstance(cache, SlotCache):
        return cache.lengths
    return tuple(k.shape[2] for k, _ in cache or ())


def sizes_of(cache: KVCache | SlotCache) -> tuple[Tensor | None, ...]:
    """The log sizes of the keys of each layer, None where every key counts once."""
    if isinstance(cache, SlotCache):
        return cache.log_sizes
    return tuple(getattr(pair, "log_sizes", None) for pair in cache)


def resize_buffer(buffer: Tensor, num_slots: int, capacity: int) -> Tensor:
    """Copy buffer (S, G, length, D) to zeros (num_slots, G, capacity, D), as far as both reach.

    A buffer may be the larger one, if memory ran out halfway through an earlier `reserve`. The rest
    of it was never used."""
    new = buffer.new_zeros(num_slots, buffer.shape[1], capacity, buffer.shape[3])
    slots, length = min(num_slots, buffer.shape[0]), min(capacity, buffer.shape[2])
    new[:slots, :, :length] = buffer[:slots, :, :length]
    return new


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def buckets(num_positions: int) -> int:
    """`num_positions`, rounded up to whole buckets."""
    return -(-num_positions // BUCKET) * BUCKET


# ---- the model -----------------------------------------------------------------------------------


class CompiledModel(Model):
    """A model with decode steps of fixed shapes.

    way: see `StaticDecoder`; None means "graph" on CUDA, else "compile". A step is recorded or
    compiled when its shape is first needed. Raises CompileError if this machine cannot do it."""

    def __init__(self, model: Model, way: str | None = None) -> None:
        super().__init__(
            model.llava, model.tokenizer, model.config, model.exif, model.own_thresholds
        )
        self.static = StaticDecoder(self.llava, check_way(way, self.llava.device))

    def advance(
        self, states: Sequence[State], all_logits: bool = False
    ) -> tuple[Tensor, list[State]]:
        """As `Model.advance`: single tokens run in slots, prompts run as usual."""
        tokens = [] if all_logits else [i for i, s in enumerate(states) if has_one_token(s)]
        if not tokens:
            return super().advance(states, all_logits)
        prompts = [i for i in range(len(states)) if i not in tokens]
        logits, advanced = self.static.advance([states[i] for i in tokens])
        if not prompts:
            return logits, advanced
        more_logits, more = super().advance([states[i] for i in prompts])
        rows = [*zip(logits, advanced, strict=True), *zip(more_logits, more, strict=True)]
        order = sorted(range(len(states)), key=[*tokens, *prompts].__getitem__)
        return torch.stack([rows[i][0] for i in order]), [rows[i][1] for i in order]


def has_one_token(state: State) -> bool:
    """Whether the state has a cache, and exactly one token is pending."""
    return len(state.pending_ids) == 1 and not state.images and state.past_key_values is not None


def check_way(way: str | None, device: torch.device) -> str:
    """The way for a device (None: the default). Raises CompileError if this machine cannot do it,
    and ValueError for an unknown way."""
    way = way or ("graph" if device.type == "cuda" else "compile")
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not one of {', '.join(WAYS)}")
    if way == "graph" and device.type != "cuda":
        raise CompileError(f"CUDA graphs need a CUDA device, the model is on {device.type}")
    if way == "compile" and device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", usual)
        if shutil.which(compiler) is None:
            raise CompileError(
                f"compiling on the CPU needs a C++ compiler, but {compiler} is missing: install "
                "one, or name it in $CXX"
            )
    return way
