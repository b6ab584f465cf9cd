"""Decode steps of fixed shapes: a GPU replays one as a CUDA graph, and torch can compile it.

A decode step is hundreds of small operators, and on a fast device starting them takes longer than
running them. A recorded step starts with one call, but runs on the same memory with the same shapes
each time. So the caches of up to S items lie in S slots of fixed buffers, and what differs from
step to step is a small table of numbers, written where the recording reads them:

    token        (n,)      the token of each slot
    position     (n,)      where it stands, for its rotation
    places       (L, n)    where layer l stores it; pruned layers hold fewer positions (fastv.py)

The step runs the decoder's own modules. To them the n slots are one item with n rows whose cache
(`SlotPair`) knows what each row may see. Slots nobody uses compute, too: what they store lands
behind the positions that count, where the next real token overwrites it.

    CompiledModel    a `Model` whose decode steps run like this; all else is as it was
    StaticDecoder    slots and steps: items join with a copy, leave without a word
    SlotCache        the cache of an item in a slot, for whoever looks a tuple of pairs

A prompt, or a chat's next turn, runs as ever. The answers are those of the ordinary decoder up to
rounding: attention over a longer, masked buffer adds in another order.

Shapes: n slots that a step covers, of S; L layers, H heads, D head dim, V vocabulary.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import RLock
from typing import Any, cast, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_lite.cache import KVCache, LayerCache
from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.generation.model import Model
from llava_lite.generation.state import State
from llava_lite.layout import Layout
from llava_lite.llava import Llava

BUCKET = 256  # positions: a step reads whole ones, and is recorded anew for each it needs more
MOST_STEPS = 32  # recorded steps that are kept
WARM_UPS = 3  # runs before recording, in which libraries set themselves up
WAYS = ("graph", "compile", "eager")


class CompileError(LlavaLiteError):
    """Decode steps cannot be compiled here."""


# ---- the step ------------------------------------------------------------------------------------


class SlotPair(LayerCache):
    """One layer's buffers (k, v), each (n, H, capacity, D), with what a step needs beside them:
    slots (n,) 0..n-1, where each stores its position, places (n,), and what attention adds to its
    scores, bias (n, 1, 1, capacity): 0, and -inf where a slot must not look."""

    slots: Tensor
    places: Tensor
    bias: Tensor

    @staticmethod
    def of(pair: tuple[Tensor, Tensor], slots: Tensor, places: Tensor, bias: Tensor) -> "SlotPair":
        """Put them together."""
        cache = SlotPair(*pair)
        cache.slots, cache.places, cache.bias = slots, places, bias
        return cache

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, LayerCache]:
        """As `LayerCache.attend`, but row i of q, k and v (1, H, n, D) belongs to slot i. The
        slots' own bias takes the place of `mask`."""
        keys, values = self
        keys[self.slots, :, self.places] = k[0].transpose(0, 1)  # (n, H, D)
        values[self.slots, :, self.places] = v[0].transpose(0, 1)
        mixed = F.scaled_dot_product_attention(q.transpose(0, 2), keys, values, self.bias)
        return mixed.transpose(0, 2), self


def decode_step(
    llava: Llava, table: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """One token for every slot: table (2 + L, n) of tokens, positions and places; the buffers of
    each layer (n, H, capacity, D), which are written to. Returns logits (n, V).

    Nothing here depends on a value, only on shapes; run twice, it leaves the same."""
    tokens, position_ids, places = table[0], table[1], table[2:]
    capacity = torch.arange(keys[0].shape[2], device=table.device)
    hidden = capacity > places[..., None]  # (L, n, capacity)
    bias = torch.zeros(hidden.shape, dtype=keys[0].dtype, device=table.device)
    bias = bias.masked_fill(hidden, float("-inf"))[:, :, None, None]  # once, for all layers
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
    """A step for one shape: write to its table (2 + L, n), run it, get logits (n, V), which the
    next run of any step may overwrite."""

    table: Tensor
    run: Callable[[], Tensor]


def record(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Capture what `run` launches as a CUDA graph; calling the result replays it.

    pool: memory shared by graphs that never run at the same time."""
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do with the device meanwhile is no error.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


# ---- slots ---------------------------------------------------------------------------------------


class SlotCache(Sequence[tuple[Tensor, Tensor]]):
    """The KV cache of one item that lies in a slot: for whoever looks inside, a tuple of pairs.

    It is copied out of the slot at the first look, or before another item takes the slot. Who only
    decodes on never looks, so nothing is copied."""

    def __init__(self, decoder: "StaticDecoder", slot: int, lengths: tuple[int, ...]) -> None:
        self.decoder, self.slot, self.lengths = decoder, slot, lengths
        self.copied: KVCache | None = None

    @property
    def pairs(self) -> KVCache:
        """The plain cache."""
        with self.decoder.lock:
            if self.copied is None:
                self.copied = tuple(LayerCache(k.clone(), v.clone()) for k, v in self.views())
                self.decoder.handed[self.slot].discard(self)
            return self.copied

    def views(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer (1, H, length, D) as they lie there, good until the slot is reused."""
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

    def __reduce__(self) -> tuple[type, tuple[KVCache]]:  # a copy of it is a plain tuple
        return tuple, (self.pairs,)


class StaticDecoder:
    """Decodes the tokens of several items in slots, one step for all of them.

    way: "graph" (CUDA only) replays recorded steps, "compile" runs them through `torch.compile`,
    "eager" as they are. One call runs at a time, others wait. As many slots as the largest batch
    needed, in powers of two, of as many positions as the longest item needed, or up to twice that.
    All layers have as many, also where FastV leaves some short; the memory is kept between calls.

    The model's weights may be written to at any time; that they were replaced, or moved, shows when
    an item joins."""

    def __init__(self, llava: Llava, way: str) -> None:
        self.llava, self.way = llava, way
        self.lock = RLock()
        self.keys: list[Tensor] = []  # of each layer (S, H, capacity, D)
        self.values: list[Tensor] = []
        self.handed: list[WeakSet[SlotCache]] = []  # the caches that lie in each slot
        self.used: list[int] = []  # when each slot ran last
        self.time = 0
        self.steps: dict[tuple[int, int], Step] = {}
        self.weights = 0
        self.pool: Any = None  # memory that all recorded steps share
        self.step_function: Callable[..., Tensor] = (
            torch.compile(decode_step) if way == "compile" else decode_step
        )

    @torch.inference_mode()
    def advance(self, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """`Model.advance` for states that each have one pending token and a cache."""
        with self.lock:
            caches = self.place(states)
            placed = dict(zip((cache.slot for cache in caches), states, strict=True))
            logits = self.run(placed, {cache.slot: cache.lengths for cache in caches})
            advanced = []
            for cache, state in zip(caches, states, strict=True):
                grown = SlotCache(self, cache.slot, tuple(n + 1 for n in cache.lengths))
                self.handed[cache.slot].add(grown)
                self.used[cache.slot] = self.time
                # To all others it is what it shows.
                plain = cast(KVCache, grown)
                advanced.append(State(plain, state.next_position + 1, reduction=state.reduction))
            # Copied, for the next step overwrites them; by slices, for a list would be waited for.
            return torch.stack([logits[cache.slot] for cache in caches]), advanced

    def run(self, placed: dict[int, State], lengths: dict[int, tuple[int, ...]]) -> Tensor:
        """One step for the states in their slots, whose caches have these lengths: (n, V)."""
        self.time += 1
        num_slots = power_of_two(max(placed) + 1)
        nothing = (0,) * len(self.keys)
        columns: list[tuple[int, ...]] = []
        for slot in range(num_slots):
            if slot in placed:
                state = placed[slot]
                columns.append((state.pending_ids[0], state.next_position, *lengths[slot]))
            else:  # behind what somebody may still want
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
        """Run it. Raises CompileError where it cannot be compiled."""
        if self.way != "compile":
            return step.run()
        try:
            return step.run()
        except torch._dynamo.exc.TorchDynamoException as error:
            message = f"torch cannot compile the decode step here: {one_line(error)}"
            raise CompileError(message) from error

    def make_step(self, table: Tensor, capacity: int) -> Step:
        """The step for so many slots and positions, with this as its first table."""
        num_slots = table.shape[1]
        if len(self.steps) >= MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        keys, values = (
            [buffer[:num_slots, :, :capacity] for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        run: Callable[[], Tensor] = partial(self.step_function, self.llava, table, keys, values)
        if self.way == "graph":
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            run = record(run, table.device, self.pool)
        step = self.steps[num_slots, capacity] = Step(table, run)
        return step

    # ---- joining ----

    def place(self, states: Sequence[State]) -> list[SlotCache]:
        """A slot for every state: the one where its cache lies, or one that it is copied to."""
        caches = [state.past_key_values for state in states]
        if not all(isinstance(cache, SlotCache) and self.owns(cache) for cache in caches):
            self.check_weights()
        taken: set[int] = set()
        found: list[SlotCache | None] = []
        for cache in caches:
            stays = isinstance(cache, SlotCache) and self.owns(cache) and cache.slot not in taken
            found.append(cast(SlotCache, cache) if stays else None)
            taken |= {cast(SlotCache, cache).slot} if stays else set()
        lengths = [lengths_of(cache) for cache in caches]
        resting = [cache.lengths for handed in self.handed for cache in handed]
        self.reserve(len(states), max(map(max, lengths + resting)) + 1)
        placed = []
        for old, cache, length in zip(found, caches, lengths, strict=True):
            if old is None:
                assert cache is not None
                old = self.join(cache, length, taken)
                taken.add(old.slot)
            placed.append(old)
        return placed

    def owns(self, cache: SlotCache) -> bool:
        """Whether the cache may grow where it lies: it does lie here, and nobody else has a longer
        one there, which would be overwritten."""
        if cache.decoder is not self or cache.copied is not None:
            return False
        return all(other.lengths <= cache.lengths for other in self.handed[cache.slot])

    def join(self, cache: KVCache, lengths: tuple[int, ...], taken: Set[int]) -> SlotCache:
        """Copy a cache into a slot: the first that nobody wants, else that which has rested
        longest, after copying out what lies there."""
        free = [slot for slot in range(len(self.handed)) if slot not in taken]
        slot = min(free, key=lambda slot: (self.used[slot] if self.handed[slot] else 0, slot))
        for other in list(self.handed[slot]):
            _ = other.pairs
        pairs = cache.views() if isinstance(cache, SlotCache) else iter(cache)
        for keys, values, (k, v), length in zip(
            self.keys, self.values, pairs, lengths, strict=True
        ):
            for buffer, content in ((keys[slot], k[0]), (values[slot], v[0])):
                buffer[:, :length] = content
                # Of no weight in any sum, but 0 * inf would be: nothing of the last item may stay.
                buffer[:, length:] = 0
        return SlotCache(self, slot, lengths)

    def reserve(self, num_slots: int, num_positions: int) -> None:
        """Room for so many slots, and positions in each."""
        num_slots = max(power_of_two(num_slots), len(self.handed))
        capacity = min((buffer.shape[2] for buffer in chain(self.keys, self.values)), default=0)
        if num_positions > capacity:
            capacity = max(buckets(num_positions), 2 * capacity)
        elif num_slots == len(self.handed):
            return
        self.forget_steps()  # they read the old buffers
        text, llava = self.llava.config.text, self.llava
        if not self.keys:
            nothing = torch.zeros(0, text.num_heads, 0, text.head_dim)
            nothing = nothing.to(llava.device, llava.dtype)
            self.keys, self.values = ([nothing] * text.num_layers for _ in range(2))
        for buffers in (self.keys, self.values):  # one by one, for memory's sake
            for layer, buffer in enumerate(buffers):
                buffers[layer] = resized(buffer, num_slots, capacity)
        self.used += [0] * (num_slots - len(self.used))
        self.handed += [WeakSet() for _ in range(num_slots - len(self.handed))]

    def forget_steps(self) -> None:
        """All shapes will be recorded anew."""
        self.steps.clear()
        self.pool = None  # a pool that no graph holds must not be used again

    def check_weights(self) -> None:
        """Forget what was recorded with weights, or for a device, that the model no longer has."""
        decoder = self.llava.decoder
        tensors = chain(decoder.parameters(), decoder.buffers())
        weights = hash(tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
        if weights == self.weights:
            return
        self.forget_steps()
        self.weights = weights
        kind = self.llava.device, self.llava.dtype
        if self.keys and (self.keys[0].device, self.keys[0].dtype) != kind:
            for cache in [cache for handed in self.handed for cache in handed]:
                _ = cache.pairs
            self.keys, self.values, self.handed, self.used = [], [], [], []


def lengths_of(cache: KVCache | None) -> tuple[int, ...]:
    """Positions in each layer."""
    if isinstance(cache, SlotCache):
        return cache.lengths
    return tuple(k.shape[2] for k, _ in cache or ())


def resized(buffer: Tensor, num_slots: int, capacity: int) -> Tensor:
    """What buffer (S, H, length, D) and zeros (num_slots, H, capacity, D) both have room for, in
    these zeros. Where memory ran out halfway before, a layer may be larger than what is asked for:
    that much of it was never used."""
    new = buffer.new_zeros(num_slots, buffer.shape[1], capacity, buffer.shape[3])
    slots, length = min(num_slots, buffer.shape[0]), min(capacity, buffer.shape[2])
    new[:slots, :, :length] = buffer[:slots, :, :length]
    return new


def power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()


def buckets(num_positions: int) -> int:
    """Positions in the buckets that so many fill."""
    return -(-num_positions // BUCKET) * BUCKET


# ---- the model -----------------------------------------------------------------------------------


class CompiledModel(Model):
    """The same model, its decode steps in fixed shapes.

    way: as of `StaticDecoder`; None: "graph" on CUDA, "compile" elsewhere. Recording or compiling
    happens when a shape is first needed. Raises CompileError without what that takes."""

    def __init__(self, model: Model, way: str | None = None) -> None:
        super().__init__(
            model.llava, model.tokenizer, model.config, model.exif, model.own_thresholds
        )
        self.static = StaticDecoder(self.llava, check_way(way, self.llava.device))

    def advance(
        self, states: Sequence[State], all_logits: bool = False
    ) -> tuple[Tensor, list[State]]:
        """Tokens through the slots, prompts as ever; both may come in one call."""
        is_token = [not all_logits and has_one_token(state) for state in states]
        if not any(is_token):
            return super().advance(states, all_logits)
        tokens = [state for state, single in zip(states, is_token, strict=True) if single]
        prompts = [state for state, single in zip(states, is_token, strict=True) if not single]
        logits, advanced = self.static.advance(tokens)
        if not prompts:
            return logits, advanced
        more_logits, more = super().advance(prompts)
        done = {
            True: zip(logits, advanced, strict=True),
            False: zip(more_logits, more, strict=True),
        }
        ordered = [next(done[single]) for single in is_token]
        return torch.stack([row for row, _ in ordered]), [state for _, state in ordered]


def has_one_token(state: State) -> bool:
    """Whether one token is all that is pending, after something."""
    return len(state.pending_ids) == 1 and not state.images and state.past_key_values is not None


def check_way(way: str | None, device: torch.device) -> str:
    """The way for a device, as `CompiledModel` says. Raises CompileError where it needs what is not
    here, ValueError for one that does not exist."""
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
                f"compiling on the CPU needs a C++ compiler, and {compiler} is not here: install "
                "one, or name it in $CXX"
            )
    return way
