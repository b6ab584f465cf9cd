"""The decoder's linear layers in 8 or 4 bits; all other parts of the model stay as they are.

    int8           w = code * scale             code -127..127, one scale per row of a weight
    int8-dynamic   the same w; inputs are rounded to 8 bits too, with one scale per row
    int4           w = (code - 8) * s + z       code 0..15, s and z per 32 weights of a row
    int4-dynamic   the same w; few inputs are rounded to 8 bits too (numba_kernels.py)

    quantize(model, "int4")                  replaces the layers, one after the other
    llava_lite.load(path, quantize="int4")   the same while loading (checkpoints/quantized.py)

For few rows, torch's packed operators multiply by the codes. For many rows, such as a prompt's, a
block of the weights is written out, multiplied and dropped, then the next block: there is never a
second copy of the weights. A loaded model has this machine's number of "few", and its fastest dtype
of blocks (kernels.py).

Stored codes are the same on every machine:

    weight_int8 (N, K) int8       scales (N,)
    weight_int4 (N, K/2) uint8    scales (N,), steps (N, K/32) uint8, offsets (N, K/32) int8:
                                  s = scale * step / 255, z = s * offset * 8 / 127; byte j of a
                                  row holds the codes of columns 2j (upper half) and 2j + 1

So an int4 weight takes 4.5 bits in a file. In memory it takes 5: s and z have the dtype of the
model, as scales have. int4-dynamic holds steps and offsets, and takes 4.5. Shapes: R rows, K
in_features, N out_features of a linear layer, M <= N rows of a block of the weight.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.errors import one_line
from llava_lite.llava import Llava

if TYPE_CHECKING:
    from llava_lite.generation.model import Model

GROUP_SIZE = 32  # weights of a row that share scale and zero in int4
OLD_GROUP_SIZE = 128  # the same in folders of version 0.1
MAX_STEP, MAX_OFFSET = 255, 127  # of the stored steps and offsets of int4
ROW_MULTIPLE = 64  # torch packs rows of int4 weights in groups of 64, so they are padded
# Weights that are rounded or packed at once, with 4 bytes each. Larger pieces would also leave
# holes in the allocator's heap when they are freed.
PIECE_WEIGHTS = 1 << 20
# Bytes of weights written out at once for many rows. On a CPU about 1,000 columns in 16 bits are as
# fast as all of them; on a GPU every block costs a dozen kernel launches.
BLOCK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
# The packed operators are private to torch, so their results are checked before use.
TOLERANCE = 0.03
TINY = torch.finfo(torch.float32).tiny
WIDTH = 256  # K of the layers that check them

# The named tensors of one weight, as above.
Parts = Mapping[str, Tensor]
Spec = tuple[tuple[int, ...], torch.dtype]


# ---- layers --------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """x @ w.T + b with a quantized w, without gradients. One subclass per method.

    codes_rows: the most rows for the packed operator, about where both ways take the same time.
    block_dtype: of blocks that are written out (None: that of the scales). Other values of both
    change results by rounding only. repacks: codes are held in another order than they are stored
    in."""

    method: ClassVar[str]
    codes: ClassVar[str]  # the name of the part that holds them
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    codes_rows: int
    block_dtype: torch.dtype | None = None
    group_size: ClassVar[int] = 1
    codes_per_byte: ClassVar[int] = 1
    repacks: ClassVar[bool] = False
    bias: nn.Parameter | None

    def __init__(self, parts: Parts, own: bool = False) -> None:
        """own: the layer may write to the memory of the parts."""
        super().__init__()
        self.register_parameter("bias", None)  # (N,), never quantized
        rows, width = parts[self.codes].shape
        self.out_features, self.in_features = rows, width * self.codes_per_byte

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales and of x."""
        return next(part.dtype for part in self.buffers() if part.is_floating_point())

    def block_rows(self, dtype: torch.dtype) -> int:
        """M, the rows of the weight to write out at once."""
        most = BLOCK_BYTES[next(self.buffers()).device.type] // dtype.itemsize
        return count_rows(most, self.in_features)

    @staticmethod
    def round(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Quantize weight (N, K) to parts with scales in `dtype`."""
        raise NotImplementedError

    @staticmethod
    def restore(parts: Parts) -> Tensor:
        """Restore the weight (N, K) from its parts, in float32."""
        raise NotImplementedError

    @staticmethod
    def specs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Shape and dtype of each part of a weight of this shape, the codes first."""
        raise NotImplementedError

    def matmul_codes(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N), by torch's packed operator."""
        raise NotImplementedError

    def matmul_blocks(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N) in the same dtype, by writing out the weight block by block."""
        return torch.cat([rows @ block for block in self.weight_blocks(rows.dtype)], dim=1)

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The blocks of the weight in this dtype, transposed: (K, M) each."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in the dtype of the scales -> (..., N)."""
        rows = x.reshape(-1, self.in_features).contiguous()
        few = 0 < len(rows) <= self.codes_rows  # the packed operators refuse 0 rows
        if few:
            y = self.matmul_codes(rows)
        else:
            y = self.matmul_blocks(rows.to(self.block_dtype or x.dtype)).to(x.dtype)
        y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.method}"

    def check_apply(self, fn: Callable) -> None:
        """Raise ValueError if `fn`, a `.to()`, leads to a dtype without a packed operator, or moves
        codes that are in the order of another device."""
        before = next(part for part in self.buffers() if part.is_floating_point())
        after = fn(before)
        if self.repacks and before.device.type != after.device.type:
            raise ValueError(
                f"{self.method} weights are packed for {before.device.type}: load the model on "
                f"{after.device.type} instead of moving it there"
            )
        if after.dtype != before.dtype:
            check_operator(self.method, after.device, after.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.check_apply(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *_: object) -> None:
        # The codes are in this machine's order, which no loader could read elsewhere.
        raise ValueError(
            f"an {self.method} model cannot be saved: `llava-lite convert --quantize` (or "
            "checkpoints.convert.convert) writes one"
        )


class Int8Linear(QuantizedLinear):
    """w = code * scale, symmetric: scale = max |w| / 127 of a row, code = round(w / scale).

    The error of a weight is at most half a scale. The codes need no packing: on a CPU, the codes of
    a converted folder stay in the mapped file."""

    method = "int8"
    codes = "weight_int8"
    codes_rows = 16
    weight_int8: Tensor
    scales: Tensor

    def __init__(self, parts: Parts, own: bool = False) -> None:
        super().__init__(parts, own)
        for name in ("weight_int8", "scales"):
            self.register_buffer(name, parts[name], persistent=False)

    @staticmethod
    def round(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """weight (N, K) -> weight_int8 (N, K), scales (N,) in `dtype`."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), dtype=dtype, device=weight.device)
        for rows in pieces(*weight.shape):
            block = weight[rows].float()
            scales[rows] = cast_scales(block.abs().amax(1) / 127, dtype)
            # Divide by the stored scale, so its rounding does not add to the rounding of the codes.
            codes[rows] = (block / scales[rows, None].float()).round().clamp(-127, 127)
        return {"weight_int8": codes, "scales": scales}

    @staticmethod
    def restore(parts: Parts) -> Tensor:
        """(N, K) float32."""
        return parts["weight_int8"].float() * parts["scales"].float()[:, None]

    @staticmethod
    def specs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """As `round` makes them."""
        return {"weight_int8": (shape, torch.int8), "scales": (shape[:1], dtype)}

    def matmul_codes(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N)."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight_int8, self.scales)
        return y

    def matmul_blocks(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N)."""
        if rows.dtype == torch.float16:  # sums without the scales overflow
            return super().matmul_blocks(rows)
        blocks = self.weight_int8.split(self.block_rows(rows.dtype))
        # One buffer for all blocks: new memory costs more time than the conversion.
        buffer = torch.empty_like(blocks[0], dtype=rows.dtype)
        y = torch.cat([rows @ buffer[: len(codes)].copy_(codes).T for codes in blocks], dim=1)
        return y.mul_(self.scales)  # scale the few results instead of all weights

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """(K, M) each."""
        blocks = (part.split(self.block_rows(dtype)) for part in (self.weight_int8, self.scales))
        for codes, scales in zip(*blocks, strict=True):
            yield (codes.to(dtype) * scales[:, None].to(dtype)).T


class Int8DynamicLinear(Int8Linear):
    """As `Int8Linear`, and x is rounded too: to code * peak / 127, peak = max |x| of its row.

    Codes are multiplied and summed as integers, without error. CPUs without instructions for that
    add up pairs of products in 16 bits, which overflow: there x has 7 bits, and few rows are
    multiplied as in int8, which is faster."""

    method = "int8-dynamic"
    codes_rows = 4

    def matmul_codes(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N)."""
        whole = find_levels(rows.device).shift == 0
        return self.matmul_blocks(rows) if whole else super().matmul_codes(rows)

    def matmul_blocks(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N)."""
        levels, x = find_levels(rows.device), rows.float()
        scales = x.abs().amax(1, keepdim=True) / levels.most
        codes = (x / scales.clamp(min=TINY)).round()
        y = levels.multiply(codes.to(torch.int8), self.weight_int8) * scales
        return y.mul_(self.scales).to(rows.dtype)


class Int4Format(QuantizedLinear):
    """w = (code - 8) * s + z, asymmetric, in groups of 32 weights of a row.

    The 16 levels run from the smallest to the largest weight of a group, and always include 0: s is
    about (max - min) / 15, z about min + 8 s. Both are stored in 8 bits. One subclass per order in
    memory."""

    codes = "weight_int4"
    codes_rows = 32
    group_size = GROUP_SIZE
    codes_per_byte = 2
    repacks = True

    @staticmethod
    def levels(parts: Parts) -> tuple[Tensor, Tensor]:
        """s and z of every group, (N, K/32) each, in the dtype of the scales."""
        dtype = parts["scales"].dtype
        s = parts["scales"].float()[:, None] * (parts["steps"].float() / MAX_STEP)
        return s.to(dtype), (s * (parts["offsets"].float() * (8 / MAX_OFFSET))).to(dtype)

    @staticmethod
    def round(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """weight (N, K) -> weight_int4 (N, K/2), scales (N,) in `dtype`, steps and offsets
        (N, K/32)."""
        done = []
        for rows in pieces(*weight.shape):
            groups = weight[rows].float().unflatten(1, (-1, GROUP_SIZE))  # (M, K/32, 32)
            parts = choose_levels(groups, dtype)
            codes = (round_codes(groups, parts) + 8).to(torch.uint8).flatten(1)  # (M, K)
            done.append({"weight_int4": codes[:, ::2] << 4 | codes[:, 1::2], **parts})
        return {name: torch.cat([parts[name] for parts in done]) for name in done[0]}

    @classmethod
    def restore(cls, parts: Parts) -> Tensor:
        """(N, K) float32."""
        s, z = (level.float()[..., None] for level in cls.levels(parts))
        groups = unpack_bytes(parts["weight_int4"]).unflatten(1, (s.shape[1], -1)).float() - 8
        return (groups * s + z).flatten(1)

    @staticmethod
    def specs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """As `round` makes them."""
        n, k = shape
        groups = (n, k // GROUP_SIZE)
        return {
            "weight_int4": ((n, k // 2), torch.uint8),
            "scales": ((n,), dtype),
            "steps": (groups, torch.uint8),
            "offsets": (groups, torch.int8),
        }


class Int4Linear(Int4Format):
    """By torch's packed operator: codes are in its order, s and z in the dtype of the model."""

    method = "int4"
    weight_packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, parts: Parts, own: bool = False) -> None:
        super().__init__(parts, own)
        codes, (scales, zeros) = parts["weight_int4"], self.levels(parts)
        missing = -len(codes) % ROW_MULTIPLE
        if missing:
            codes, scales, zeros = (F.pad(t, (0, 0, 0, missing)) for t in (codes, scales, zeros))
        pairs = torch.stack((scales.T, zeros.T), dim=-1).contiguous()  # (K/32, N, 2)
        self.register_buffer("weight_packed", pack(codes, own), persistent=False)
        self.register_buffer("scales_and_zeros", pairs, persistent=False)

    def matmul_codes(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N), N with its padding."""
        operators = torch.ops.aten
        multiply = (
            operators._weight_int4pack_mm if rows.is_cuda else operators._weight_int4pack_mm_for_cpu
        )
        group_size = self.in_features // len(self.scales_and_zeros)
        y: Tensor = multiply(rows, self.weight_packed, group_size, self.scales_and_zeros)
        return y

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """(K, M) each, the last with the padding of N."""
        pairs, k = self.scales_and_zeros, self.in_features
        step, order = self.block_rows(dtype), find_order(pairs.device)
        packed = self.weight_packed.view(torch.uint8).view(-1, k // 2)  # (N, K/2)
        for codes, block in zip(packed.split(step), pairs.split(step, dim=1), strict=True):
            scales, zeros = (part.to(dtype).contiguous()[:, None] for part in block.unbind(-1))
            weight = torch.empty(k, len(codes), dtype=dtype, device=pairs.device)
            order.unpack(codes, weight)
            groups = weight.unflatten(0, (len(pairs), -1))  # (K/32, 32, M)
            yield torch.addcmul(zeros, groups, scales, out=groups).flatten(0, 1)

    def stored_codes(self) -> Tensor:
        """weight_int4 (N, K/2) in the stored order, with the padding of N."""
        k = self.in_features
        packed = self.weight_packed.view(torch.uint8).view(-1, k // 2)
        order, stored = find_order(packed.device), torch.empty_like(packed)
        step = self.block_rows(torch.int8)
        for codes, out in zip(packed.split(step), stored.split(step), strict=True):
            wide = torch.empty(k, len(codes), dtype=torch.int8, device=packed.device)
            order.unpack(codes, wide)
            wide = (wide + 8).T.to(torch.uint8)  # (M, K)
            out.copy_(wide[:, ::2] << 4 | wide[:, 1::2])
        return stored

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be read on a machine with another packed order.
        buffers = {**self._buffers, "weight_packed": self.stored_codes()}
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight_packed = pack(self.weight_packed)


class OldInt4Linear(Int4Linear):
    """As folders of version 0.1 hold it: s and z per 128 weights of a row, in the model's dtype."""

    group_size = OLD_GROUP_SIZE

    @staticmethod
    def levels(parts: Parts) -> tuple[Tensor, Tensor]:
        """s and z of every group, (N, K/128) each."""
        return parts["scales"], parts["zeros"]

    @staticmethod
    def specs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """As they are stored."""
        n, k = shape
        groups = ((n, k // OLD_GROUP_SIZE), dtype)
        return {"weight_int4": ((n, k // 2), torch.uint8), "scales": groups, "zeros": groups}


class Int4DynamicLinear(Int4Format):
    """As `Int4Linear`. Few rows of x are rounded too: to code * peak / 127, peak = max |x| of 32
    channels of a row. Codes are then multiplied as integers by numba (numba_kernels.py).

    Many rows are multiplied as they are. s and z have no rounding beyond the stored one."""

    method = "int4-dynamic"
    devices = ("cpu",)
    words: Tensor
    steps: Tensor
    offsets: Tensor
    scales: Tensor

    def __init__(self, parts: Parts, own: bool = False) -> None:
        super().__init__(parts, own)
        kernels, missing = find_numba_kernels(), -self.out_features % ROW_MULTIPLE
        if missing:
            parts = {
                name: torch.cat((part, part.new_zeros(missing, *part.shape[1:])))
                for name, part in parts.items()
            }
        self.register_buffer("words", kernels.pack(parts["weight_int4"]), persistent=False)
        for name in ("steps", "offsets"):
            levels = kernels.interleave(parts[name], 1).squeeze(-1)
            self.register_buffer(name, levels, persistent=False)
        # A view would keep the whole file mapped.
        self.register_buffer("scales", parts["scales"].clone(), persistent=False)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weight as the kernels take it."""
        return self.words, self.steps, self.offsets, self.scales

    def stored_parts(self) -> dict[str, Tensor]:
        """The parts as they are stored."""
        words = self.words.flatten(1, 2).transpose(1, 2).contiguous()  # (N/32, 32, K/8)
        codes = words.view(torch.uint8).flatten(0, 1)
        steps, offsets = (part.transpose(1, 2).flatten(0, 1) for part in (self.steps, self.offsets))
        parts = {"weight_int4": codes, "scales": self.scales, "steps": steps, "offsets": offsets}
        return {name: part[: self.out_features] for name, part in parts.items()}

    def matmul_codes(self, rows: Tensor) -> Tensor:
        """(R, K) -> (R, N), N with its padding."""
        y: Tensor = find_numba_kernels().multiply(rows, *self.parts)
        return y.to(rows.dtype)

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """(K, M) each, the last with the padding of N."""
        write, rows = find_numba_kernels().write_weights, self.block_rows(torch.float32)
        blocks = (part.split(rows // (len(self.scales) // len(part))) for part in self.parts)
        for block in zip(*blocks, strict=True):
            yield write(*block).to(dtype)


METHODS: dict[str, type[QuantizedLinear]] = {
    kind.method: kind for kind in (Int8Linear, Int4Linear, Int8DynamicLinear, Int4DynamicLinear)
}


def count_rows(weights: int, in_features: int) -> int:
    """The rows of a weight that hold about `weights` weights: a multiple of 64."""
    return max(weights // in_features // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def pieces(n: int, k: int) -> Iterator[slice]:
    """Split the rows 0..n into pieces of about `PIECE_WEIGHTS` weights."""
    step = count_rows(PIECE_WEIGHTS, k)
    return (slice(start, start + step) for start in range(0, n, step))


def cast_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast scales to `dtype`. A scale of 0, of a row or group of zeros, becomes 1."""
    # The smallest float16 numbers have few digits: round up, or the codes would not reach the ends.
    half_step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2
    narrow = (scales + half_step).to(dtype)
    return torch.where(narrow == 0, torch.ones_like(narrow), narrow)


# ---- int4 rounding -------------------------------------------------------------------------------


def choose_levels(groups: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Choose the levels of groups (M, G, 32) of weights: scales (M,) in `dtype`, steps and offsets
    (M, G).

    A group has the least-squares levels, or those from its smallest to its largest weight if these
    leave less error."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    s = (high - low) / 15
    scales = cast_scales(s.amax(1), dtype)
    ends = store_levels(scales, s, low + 8 * s)
    fitted = store_levels(scales, *fit_levels(groups, ends))
    errors = [(show_levels(groups, parts) - groups).square().sum(-1) for parts in (fitted, ends)]
    better = errors[0] < errors[1]
    chosen = {part: torch.where(better, fitted[part], ends[part]) for part in ("steps", "offsets")}
    return {"scales": scales, **chosen}


def store_levels(scales: Tensor, s: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Round s and z (M, G) to steps and offsets of the scales (M,)."""
    unit = scales.float()[:, None] / MAX_STEP
    steps = (s / unit).round().clamp(1, MAX_STEP)
    offsets = (z / (steps * unit) * (MAX_OFFSET / 8)).round().clamp(-MAX_OFFSET, MAX_OFFSET)
    return {"scales": scales, "steps": steps.to(torch.uint8), "offsets": offsets.to(torch.int8)}


def round_codes(groups: Tensor, parts: Parts) -> Tensor:
    """The code - 8 of the level nearest to each weight (M, G, 32)."""
    # Those of the stored levels, so their rounding does not add to the rounding of the codes.
    s, z = (level.float()[..., None] for level in Int4Linear.levels(parts))
    return ((groups - z) / s.clamp(min=TINY)).round().clamp(-8, 7)


def show_levels(groups: Tensor, parts: Parts) -> Tensor:
    """The level nearest to each weight (M, G, 32)."""
    s, z = (level.float()[..., None] for level in Int4Linear.levels(parts))
    return round_codes(groups, parts) * s + z


def fit_levels(groups: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """s and z (M, G) of the least squares of the errors of the weights, given their codes.

    Once: repeated, it would lessen the squares further, but cut off more of the large weights, and
    on real text that costs more than it gains (docs/quantization.md)."""
    codes = round_codes(groups, parts)
    mean_code, mean = codes.mean(-1), groups.mean(-1)
    codes = codes - mean_code[..., None]
    s = (codes * groups).sum(-1) / codes.square().sum(-1).clamp(min=TINY)
    return s, mean - s * mean_code


# ---- 8-bit inputs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """The codes of x that a device multiplies without error: -most to most, less `shift`."""

    most: int
    shift: int

    def multiply(self, codes: Tensor, weight: Tensor) -> Tensor:
        """codes (R, K) and weight (N, K), int8 both -> (R, N) int32."""
        if self.shift == 0:
            return torch._int_mm(codes, weight.T)
        # A row of zeros becomes the sums of the weights, by which the shift moves every row.
        sums = torch._int_mm(F.pad(codes, (0, 0, 0, 1)) - self.shift, weight.T)
        return sums[:-1] - sums[-1]


@lru_cache
def find_levels(device: torch.device) -> Levels:
    """Find out whether 8-bit codes can be multiplied without error, else 7-bit ones.

    Raises ValueError if neither can."""
    for levels in (Levels(127, 0), Levels(63, 64)):
        # The largest sums of all: every code has the same sign as its weight, or the other.
        signs = torch.tensor([1, -1] * ROW_MULTIPLE, device=device)[:, None]
        x, weight = (
            (signs * most).expand(-1, WIDTH).to(torch.int8).contiguous()
            for most in (levels.most, 127)
        )
        sums = signs * signs.T * (WIDTH * levels.most * 127)
        if all(
            torch.equal(levels.multiply(x[:rows], weight).long(), sums[:rows])
            for rows in (1, 2, len(x))
        ):
            return levels
    raise ValueError("products of 8-bit codes are wrong")


# ---- numba ---------------------------------------------------------------------------------------


@lru_cache
def find_numba_kernels() -> Any:
    """The module numba_kernels. Raises ValueError if numba is missing, or does not compile here."""
    try:
        return import_module("llava_lite.fast.numba_kernels")
    except ModuleNotFoundError:
        raise ValueError("the package numba is missing: pip install 'llava-lite[numba]'") from None
    except Exception as error:  # numba and LLVM have errors of every kind
        raise ValueError(f"numba does not compile here: {one_line(error)}") from error


# ---- int4 packing --------------------------------------------------------------------------------


def unpack_bytes(codes: Tensor) -> Tensor:
    """Unpack bytes of two codes: (N, K/2) -> (N, K)."""
    return torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)


def pack(codes: Tensor, in_place: bool = False) -> Tensor:
    """Pack weight_int4 (N, K/2), N a multiple of 64, in the order of the device's operator: CPU
    (N, K/2) uint8, CUDA (N/8, K/128, 32, 4) int32.

    in_place: on a CPU, the result overwrites the codes."""
    if codes.is_cuda:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(codes.contiguous(), 8)
        return packed
    packed = codes if in_place else torch.empty_like(codes, memory_format=torch.contiguous_format)
    step = count_rows(PIECE_WEIGHTS, 2 * codes.shape[1])
    for rows, target in zip(codes.split(step), packed.split(step), strict=True):
        wide = unpack_bytes(rows).int()
        target.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1))
    return packed


@dataclass(frozen=True)
class PackedOrder:
    """The order of codes in a device's packed operator.

    The codes of `rows` x `columns` weights form a tile; tiles are ordered by row, then column.
    places (rows * columns,): the place in a tile of each weight's code, column by column (None:
    0, 1, 2, ...). Places count the low halves of the tile's bytes first, then the high halves."""

    rows: int
    columns: int
    places: Tensor | None

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Write code - 8 of every weight of packed (M, K/2) bytes to `out` (K, M), transposed."""
        k, m = out.shape
        tiles = packed.view(m // self.rows, k // self.columns, -1)
        # 0..15 becomes -8..7 as a signed half byte; a shift to the right then copies the sign.
        tiles = tiles ^ 0x88
        low, high = (tiles << 4).view(torch.int8) >> 4, tiles.view(torch.int8) >> 4
        codes = torch.stack((low, high), dim=2).flatten(2)
        if self.places is not None:
            codes = codes[..., self.places]
        codes = codes.unflatten(2, (self.columns, self.rows)).permute(1, 2, 0, 3)
        out.view(codes.shape).copy_(codes)


TILES = {"cpu": ((64, 1), (32, 1), (16, 1)), "cuda": ((8, 128),)}  # (rows, columns) to try


@lru_cache
def find_order(device: torch.device) -> PackedOrder:
    """Find the order of a device's packed operator, which differs between CPUs too.

    Raises ValueError if none of `TILES` describes the order."""
    n, k = 2 * ROW_MULTIPLE, WIDTH
    origins = find_origins(n, k, device)
    for rows, columns in TILES[device.type]:
        size = rows * columns
        halves = origins.view(2, n // rows, k // columns, size // 2)
        found = torch.cat(tuple(halves), dim=-1).view(-1, size)  # (tiles, codes in a tile)
        row, column = found // k, found % k
        tile = row // rows * (k // columns) + column // columns
        inside = column % columns * rows + row % rows
        places = inside[0].argsort()
        numbers = torch.arange(max(size, len(tile)), device=device)
        if (tile == numbers[: len(tile), None]).all() and (inside == inside[0]).all():
            return PackedOrder(rows, columns, None if (places == numbers[:size]).all() else places)
    raise ValueError("this torch packs int4 weights in an unknown order")


def find_origins(n: int, k: int, device: torch.device) -> Tensor:
    """Find which of n x k weights lands in the low and the high half of each packed byte:
    (2, n * k / 2)."""
    # Pack the numbers of the weights as codes, one hexadecimal digit at a time.
    numbers = torch.arange(n * k, device=device).view(n, k)
    origins = torch.zeros(2, n * k // 2, dtype=torch.long, device=device)
    for shift in range(0, (n * k - 1).bit_length(), 4):
        digits = (numbers >> shift & 15).to(torch.uint8)
        packed = pack(digits[:, ::2] << 4 | digits[:, 1::2]).view(torch.uint8).flatten()
        origins |= torch.stack((packed & 15, packed >> 4)).long() << shift
    return origins


# ---- models --------------------------------------------------------------------------------------


class QuantizedLlava(Llava):
    """A model with quantized layers. A move that one of them refuses moves nothing."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # torch moves the parts one after the other: ask all of them before the first has moved.
        for part in self.modules():
            if isinstance(part, QuantizedLinear):
                part.check_apply(fn)
        return super()._apply(fn, recurse)


def quantize(model: "Model | Llava", method: str) -> None:
    """Quantize the decoder's linear layers (q, k, v, o, gate, up, down, lm_head) in place.

    method: "int8", "int4", "int8-dynamic" or "int4-dynamic". Layers are replaced one by one, so the
    extra memory is one weight. Raises ValueError for another method, a quantized model, in_features
    that are no multiple of 32 (int4), weights that are not finite, a device, dtype or torch without
    the operator, and without numba for int4-dynamic."""
    llava = model if isinstance(model, Llava) else model.llava
    kind = get_method(method)
    shapes = decoder_linears(llava)
    there = find_method(llava)
    # After an error halfway, the same call can finish the rest.
    if there is not None and not (shapes and there == method):
        raise ValueError(f"the model is {there} already, it cannot be quantized again")
    check_shapes(shapes, kind)
    check_operator(method, llava.device, llava.dtype)
    for name in shapes:  # check all layers before replacing the first
        check_range(name, llava.get_parameter(f"{name}.weight").detach(), kind, llava.dtype)
    if type(llava) is Llava:
        llava.__class__ = QuantizedLlava  # in place: the caller keeps the same object
    for name in shapes:
        weight = llava.get_parameter(f"{name}.weight").detach()
        replace_linear(llava, name, kind(round_weight(name, weight, kind, llava.dtype), own=True))


def replace_linear(llava: Llava, name: str, layer: QuantizedLinear) -> None:
    """Put a quantized layer in the place of a linear one, with the same bias."""
    layer.register_parameter("bias", cast(nn.Linear, llava.get_submodule(name)).bias)
    llava.set_submodule(name, layer)


def find_method(llava: Llava) -> str | None:
    """The method of a quantized model, None if it is not quantized."""
    found = (part.method for part in llava.decoder.modules() if isinstance(part, QuantizedLinear))
    return next(found, None)


def get_method(method: str) -> type[QuantizedLinear]:
    """The layer class of a method. Raises ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"quantize {method!r} is not one of {', '.join(METHODS)}")
    return METHODS[method]


def decoder_linears(llava: Llava) -> dict[str, tuple[int, ...]]:
    """Name and weight shape (N, K) of every linear layer to quantize."""
    return {
        f"decoder.{name}": tuple(module.weight.shape)
        for name, module in llava.decoder.named_modules()
        if isinstance(module, nn.Linear)
    }


def check_shapes(shapes: Mapping[str, tuple[int, ...]], kind: type[QuantizedLinear]) -> None:
    """Raise ValueError for a layer that does not divide into groups."""
    for name, (_, k) in shapes.items():
        if k % kind.group_size:
            raise ValueError(
                f"{name}: in_features {k} is no multiple of {kind.group_size}, the group size of "
                f"{kind.method}"
            )


def round_weight(
    name: str, weight: Tensor, kind: type[QuantizedLinear], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Quantize a weight. Raises ValueError that names the layer if it is not finite."""
    parts = kind.round(weight, dtype)
    check_parts(name, parts)
    return parts


def check_parts(name: str, parts: Parts) -> None:
    """Raise ValueError that names the layer if scales or zeros are not finite."""
    if not all(torch.isfinite(part).all() for part in parts.values()):
        dtype = parts["scales"].dtype
        raise ValueError(f"{name}: weights are NaN or infinite, or too large for {dtype} scales")


def check_range(name: str, weight: Tensor, kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    """Raise the error of `round_weight`, from the smallest and largest value of a weight."""
    extremes = torch.stack(weight.aminmax())  # NaN if any weight is
    check_parts(name, kind.round(extremes.repeat(kind.group_size)[None], dtype))


@lru_cache
def check_operator(method: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run a small layer in both ways, and compare the results with float32.

    Raises ValueError if the device, dtype or torch lacks the operator, or the results differ."""
    here = f"{method} does not run here (torch {torch.__version__}, {device}, {dtype})"
    kind = METHODS[method]
    if device.type not in kind.devices:
        raise ValueError(f"{here}: it is for {' and '.join(kind.devices)}")
    if dtype.itemsize > 4:
        raise ValueError(f"{here}: it is for dtypes of 16 and 32 bits")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * ROW_MULTIPLE, WIDTH, generator=generator)
    rows = torch.randn(kind.codes_rows + 1, WIDTH, generator=generator)
    rows = rows.to(device, dtype)
    try:
        parts = kind.round(weight.to(device), dtype)
        layer, expected = kind(parts), rows.float() @ kind.restore(parts).T
        results = {"the packed operator": layer(rows[:1]), "writing weights out": layer(rows)}
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"{here}: {one_line(error)}") from error
    for way, result in results.items():
        off = float((result - expected[: len(result)]).abs().amax() / expected.abs().amax())
        if not off <= TOLERANCE:
            raise ValueError(f"{here}: {way} is off by {off:.1%}")
