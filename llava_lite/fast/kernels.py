"""Choose the fastest kernel for each weight and number of rows, by trying each on this machine.

A linear layer multiplies a weight by the rows of a batch. With one row, its time is the time to
read the weight. With many rows, its time is the time to compute. In 16 bits, torch's product
(`F.linear`) is at neither limit on many CPUs: without bfloat16 instructions it is five times slower
than a product in float32. So a few kernels are timed on the weights of each shape, for each class
of row counts, when a model is loaded. The times are kept for the next load (timings.py). Quantized
layers (quantize.py) have their own ways to multiply, which are timed in the same manner.

No kernel is less exact than `F.linear` in the same dtype. Attention and its cache are in float32
where that is much faster.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.attention import HybridAttention
from llava_lite.fast.quantize import (
    METHODS,
    Int4DynamicLinear,
    Int4Linear,
    Int8DynamicLinear,
    QuantizedLinear,
)
from llava_lite.fast.timings import Timings, numba_version

Kernel = Callable[[Tensor, Tensor], Tensor]  # weight (out, in), x (rows, in) -> (rows, out)
Times = list[dict[str, float]]  # for each class of row counts: seconds by name of the kernel

# Numbers of rows that share a kernel: at most so many, and the number that is timed.
CLASSES = ((1, 1), (8, 4), (64, 24), (inf, 128))
DTYPES = (torch.bfloat16, torch.float16)
# Below this size, other things take longer. Always using `F.linear` there also keeps small models
# bit-identical across machines.
MIN_BYTES = 1 << 21
WORTH_IT = 0.97  # the largest part of F.linear's time for another kernel to be chosen
# A timing keeps the best of some short rounds, since another program may disturb most of them.
ROUNDS = 4
HOPELESS = 3.0  # a kernel that takes so much longer than the best after two rounds is left out
# Weights in a timing: with one row more than most caches hold. With more rows reading matters less.
READ_WEIGHTS, FEW_WEIGHTS, MANY_WEIGHTS = 1 << 25, 1 << 22, 1 << 20
WORTH_MEMORY = 0.67  # the largest part of the time of 16 bits for attention in float32
CACHED = 640  # keys in a timing of attention
BLOCK_WEIGHTS = 1 << 20  # written out at once in float32: 4 MB stay in a cache


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """The product of nn.Linear."""
    return F.linear(x, weight)


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """BLAS's product of a matrix and a vector, for one row."""
    return torch.mv(weight, x[0])[None]


def weight_first(weight: Tensor, x: Tensor) -> Tensor:
    """The transposed product, for which oneDNN streams the weights."""
    return (weight @ x.T).T.contiguous()


def float32_blocks(weight: Tensor, x: Tensor) -> Tensor:
    """The product in float32, with a block of the weight written out at a time: for CPUs whose
    16-bit products are slow."""
    wide = x.float()
    y = torch.empty(len(x), len(weight), dtype=x.dtype)
    step = max(1, BLOCK_WEIGHTS // weight.shape[1])
    block = torch.empty(min(step, len(weight)), weight.shape[1])  # one block, used again and again
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        wide_part = block[: len(part)].copy_(part)
        y[:, start : start + step] = wide @ wide_part.T
    return y


# No kernel may change a setting of the process, such as torch's switch for oneDNN: other threads
# answer at the same time.
KERNELS: dict[str, Kernel] = {
    "linear": linear,
    "mv": matrix_vector,
    "weight first": weight_first,
    "float32 blocks": float32_blocks,
}
# The kernels to try in each class. A transposed product of many rows would be copied.
TRIED = (
    ("linear", "mv", "weight first"),
    ("linear", "weight first", "float32 blocks"),
    ("linear", "weight first", "float32 blocks"),
    ("linear", "float32 blocks"),
)


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of each class of row counts, by name."""

    names: tuple[str, ...]

    def __bool__(self) -> bool:
        return set(self.names) != {"linear"}

    def kernel(self, rows: int) -> Kernel:
        """The kernel for this number of rows."""
        names = (name for name, (most, _) in zip(self.names, CLASSES, strict=True) if rows <= most)
        return KERNELS[next(names)] if rows else linear


class ChosenLinear(nn.Linear):
    """An nn.Linear with the chosen kernels. Shares the weights of `plain`."""

    def __init__(self, plain: nn.Linear, choice: Choice) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate weights
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.choice.kernel(x.numel() // self.in_features)
        if kernel is linear or x.shape[-1:] != (self.in_features,) or not self.fits(x):
            return super().forward(x)  # raises the usual error
        rows = kernel(self.weight, x.reshape(-1, self.in_features))
        return (rows if self.bias is None else rows.add_(self.bias)).view(*x.shape[:-1], -1)

    def fits(self, x: Tensor) -> bool:
        """Whether x and the weight are where the kernels were timed: a model can be moved."""
        return x.dtype == self.weight.dtype and x.dtype in DTYPES and not x.is_cuda


def choose_kernels(module: nn.Module) -> dict[str, Choice]:
    """Give the linear layers in `module` their fastest kernels. Changes only layers on a CPU in 16
    bits without hooks. Returns the choice for each kind of weight, except `F.linear` everywhere."""
    if not any(is_large(part) for part in module.modules()):
        return {}
    groups: dict[str, list[Tensor]] = {}
    with Timings.open() as timings:
        choose_operators(module, timings)
        parts = [part for part in module.modules() if is_large(part)]
        for part in parts:
            if isinstance(part, nn.Linear) and is_eligible(part):
                groups.setdefault(kind_of(part), []).append(part.weight)
        found = {
            kind: choose(timings.get(kind, partial(time_kernels, weights)))
            for kind, weights in groups.items()
        }
        choose_ways(parts, timings)
        choose_attention(module, timings)
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear) and is_eligible(part) and found[kind_of(part)]:
                setattr(parent, name, ChosenLinear(part, found[kind_of(part)]))
    return {kind: choice for kind, choice in found.items() if choice}


def is_large(part: nn.Module) -> bool:
    """Whether a linear layer's weight, in 16 bits, reaches `MIN_BYTES`."""
    if not isinstance(part, nn.Linear | QuantizedLinear):
        return False
    return 2 * part.in_features * part.out_features >= MIN_BYTES


def is_eligible(layer: nn.Linear) -> bool:
    """Whether the layer has several kernels, and can be replaced without losing its hooks."""
    hooks = (value for name, value in vars(layer).items() if name.endswith("_hooks"))
    return (
        type(layer) is nn.Linear
        and not any(hooks)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in DTYPES
        and is_large(layer)
    )


def kind_of(layer: nn.Linear) -> str:
    """What the times of a weight depend on: "bfloat16 11008 x 4096"."""
    return f"{name_of(layer.weight.dtype)} {layer.out_features} x {layer.in_features}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- quantized layers ----------------------------------------------------------------------------

SAMPLE = (512, 4096)  # shape of the weight in a timing


def choose_operators(module: nn.Module, timings: Timings) -> None:
    """Replace int4-dynamic layers by int4 ones where torch's operator is faster with one row. That
    operator also rounds no inputs."""
    names = [name for name, part in module.named_modules() if isinstance(part, Int4DynamicLinear)]
    for name in names:  # one by one, so that the old one's memory is free
        layer = module.get_submodule(name)
        if isinstance(layer, Int4DynamicLinear) and is_large(layer):
            ours, torchs = (
                find_ways(method, layer.dtype, timings)[0]["codes"]
                for method in (layer.method, Int4Linear.method)
            )
            if torchs < ours:
                other = Int4Linear(layer.stored_parts(), own=True)
                other.bias = layer.bias
                module.set_submodule(name, other)


def choose_ways(layers: Sequence[nn.Module], timings: Timings) -> None:
    """Give quantized layers on a CPU their largest number of rows for the packed operator, and the
    dtype of blocks. int8-dynamic ones keep theirs: both of their ways round x."""
    for layer in layers:
        if not isinstance(layer, QuantizedLinear) or isinstance(layer, Int8DynamicLinear):
            continue
        if next(layer.buffers()).device.type == "cpu":
            times = find_ways(layer.method, layer.dtype, timings)
            layer.codes_rows, layer.block_dtype = best_ways(times)


def find_ways(method: str, dtype: torch.dtype, timings: Timings) -> Times:
    """The kept or measured times of a method."""
    measure = partial(time_quantized, method, dtype)
    times: Times = timings.get(kind_of_ways(method, dtype), measure)
    return times


def kind_of_ways(method: str, dtype: torch.dtype) -> str:
    """What the times of a quantized layer depend on: "int4 in bfloat16"."""
    return f"{method} in {name_of(dtype)}"


def best_ways(times: Times) -> tuple[int, torch.dtype | None]:
    """The most rows for which codes are fastest, and the faster dtype of blocks (None: x's)."""
    won = [most for (most, _), seconds in zip(CLASSES, times, strict=False) if codes_win(seconds)]
    return int(max(won, default=0)), torch.float32 if "float32 blocks" in times[0] else None


@torch.inference_mode()
def time_quantized(method: str, dtype: torch.dtype) -> Times:
    """Time codes and the faster blocks in every class but the last, where blocks win. The weight is
    made for it."""
    kind = METHODS[method]
    layer = kind(kind.round(torch.full(SAMPLE, 0.01), dtype))
    blocks = {
        "blocks": layer.matmul_blocks,
        "float32 blocks": lambda x: layer.matmul_blocks(x.float()).to(dtype),
    }
    x = torch.ones(CLASSES[-1][1], layer.in_features, dtype=dtype)
    seconds = time_ways({name: partial(way, x) for name, way in blocks.items()})
    best = min(seconds, key=seconds.__getitem__)
    times: Times = []
    for _, rows in CLASSES[:-1]:
        ways = {best: partial(blocks[best], x[:rows])}
        # Codes never win again with more rows, and some operators take seconds.
        if all(codes_win(seconds) for seconds in times):
            ways["codes"] = partial(layer.matmul_codes, x[:rows])
        times.append({"codes": inf, **time_ways(ways)})
    return times


def codes_win(seconds: Mapping[str, float]) -> bool:
    return seconds["codes"] == min(seconds.values())


# ---- attention -----------------------------------------------------------------------------------


def choose_attention(module: nn.Module, timings: Timings) -> None:
    """Choose the dtype of attention and the cache, in large 16-bit decoders on a CPU."""
    for part in module.modules():
        if isinstance(part, HybridAttention) and is_large(part.q_proj):
            tensors = (*part.q_proj.parameters(), *part.q_proj.buffers())
            numbers = next(tensor for tensor in tensors if tensor.is_floating_point())
            if numbers.device.type == "cpu" and numbers.dtype in DTYPES:
                measure = partial(time_attention, numbers.dtype, *heads_of(part))
                kind = kind_of_attention(numbers.dtype, *heads_of(part))
                seconds = timings.get(kind, measure)
                part.cache_dtype = faster_dtype(seconds)


def heads_of(part: HybridAttention) -> tuple[int, int, int]:
    """The number of key heads, their width, and the queries of each."""
    width = part.k_proj.out_features
    return width // part.head_dim, part.head_dim, part.q_proj.out_features // width


def kind_of_attention(dtype: torch.dtype, heads: int, head_dim: int, shared: int) -> str:
    """What the time of attention depends on: "bfloat16 attention, heads of 128"."""
    queries = f", {shared} queries per key" if shared > 1 else ""
    return f"{name_of(dtype)} attention, heads of {head_dim}{queries}"


def faster_dtype(seconds: dict[str, float]) -> torch.dtype | None:
    """The dtype of attention and the cache: float32 where 16 bits take much longer (None: 16 bits).
    A cache in float32 takes twice the memory."""
    usual = next(value for name, value in seconds.items() if name != "float32")
    return torch.float32 if seconds["float32"] < WORTH_MEMORY * usual else None


@torch.inference_mode()
def time_attention(
    dtype: torch.dtype, heads: int, head_dim: int, shared: int = 1
) -> dict[str, float]:
    """The seconds in which a token attends to an image and a short text, in 16 and 32 bits. `heads`
    of keys serve `shared` queries each."""
    shape = (2, 1, heads, CACHED, head_dim)
    caches = {wanted: torch.full(shape, 0.01, dtype=wanted) for wanted in (dtype, torch.float32)}
    seconds = dict.fromkeys(caches, inf)
    for turn in range(1 + ROUNDS):
        for wanted, (k, v) in caches.items():
            start = perf_counter()
            F.scaled_dot_product_attention(k[:, :, :shared], k, v)
            if turn:  # the first round loads the pages
                seconds[wanted] = min(seconds[wanted], perf_counter() - start)
    return {name_of(wanted): best for wanted, best in seconds.items()}


# ---- timing --------------------------------------------------------------------------------------


def choose(times: Times) -> Choice:
    """The fastest kernel of each class; `F.linear` unless another one is clearly faster."""
    names = []
    for seconds in times:
        best = min(seconds, key=seconds.__getitem__)
        names.append(best if seconds[best] < WORTH_IT * seconds["linear"] else "linear")
    return Choice(tuple(names))


@torch.inference_mode()
def time_kernels(weights: Sequence[Tensor]) -> Times:
    """Time the kernels of every class on weights of one shape."""
    return [
        time_class(names, typical(weights, tried), tried)
        for names, (_, tried) in zip(TRIED, CLASSES, strict=True)
    ]


def typical(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Weights, or some rows of the first, that take long enough for a timing with `rows` rows."""
    wanted = READ_WEIGHTS if rows == 1 else FEW_WEIGHTS if rows < 8 else MANY_WEIGHTS
    if wanted >= weights[0].numel():
        return list(weights[: wanted // weights[0].numel()])
    return [weights[0][: max(1, wanted // weights[0].shape[1])]]


def time_model(module: nn.Module, again: bool = False) -> dict[str, Any]:
    """The kept times of attention, of all large linear layers in `module`, which may be on the meta
    device, and of quantized ones. Kinds without kept times, with `again` all, are measured on
    tensors made for it."""
    measures: dict[str, Callable[[], Any]] = {}
    for part in module.modules():
        if isinstance(part, nn.Linear) and is_large(part):
            measures[kind_of(part)] = partial(time_copies, part)
        if isinstance(part, HybridAttention):
            dtype = part.q_proj.weight.dtype
            measure = partial(time_attention, dtype, *heads_of(part))
            measures[kind_of_attention(dtype, *heads_of(part))] = measure
            for method in ("int8", "int4", *(["int4-dynamic"] if numba_version() else ())):
                measures[kind_of_ways(method, dtype)] = partial(time_quantized, method, dtype)
    with Timings.open() as timings:
        if again:
            timings.forget(measures)
        return {kind: timings.get(kind, measure) for kind, measure in measures.items()}


def time_copies(layer: nn.Linear) -> Times:
    """`time_kernels` with new weights of the shape of a layer."""
    count = max(1, READ_WEIGHTS // layer.weight.numel())
    # Written, not only reserved: all untouched pages of zeros share one page of memory.
    weights = [torch.full(layer.weight.shape, 0.01, dtype=layer.weight.dtype) for _ in range(count)]
    return time_kernels(weights)


def time_class(names: Sequence[str], weights: Sequence[Tensor], rows: int) -> dict[str, float]:
    """The seconds of each kernel for this number of rows: one product with each weight."""
    x = torch.ones(rows, weights[0].shape[1], dtype=weights[0].dtype)

    def multiply(kernel: Kernel) -> None:
        for weight in weights:
            kernel(weight, x)

    return time_ways({name: partial(multiply, KERNELS[name]) for name in names})


def time_ways(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The seconds of each way, the best of `ROUNDS` in turns."""
    for way in ways.values():
        time_once(way)  # loads the pages, and compiles
    seconds, tried = dict.fromkeys(ways, inf), list(ways)
    for turn in range(ROUNDS):
        for name in tried:
            seconds[name] = min(seconds[name], time_once(ways[name]))
        if turn == 1:
            best = min(seconds.values())
            tried = [name for name in ways if seconds[name] <= HOPELESS * best]
    return seconds


def time_once(way: Callable[[], object]) -> float:
    """The seconds of one call; infinity where torch lacks the operator."""
    start = perf_counter()
    try:
        way()
    except RuntimeError:
        return inf
    return perf_counter() - start


def rows_of_classes() -> Iterator[str]:
    """The names of the classes: "1", "2 to 8", ..."""
    first = 1
    for most, _ in CLASSES:
        yield f"{first} or more" if most == inf else f"{first} to {most}" if most > 1 else "1"
        first = int(most) + 1 if most < inf else first
