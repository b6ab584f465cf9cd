"""int4 products in numba: x is rounded to 8 bits, and codes are multiplied as bytes.

    multiply(x, words, steps, offsets, scales)      few rows (R, K) -> (R, N)
    write_weights(words, steps, offsets, scales)    the weights in float32, for many rows

Weights are those of quantize.py: w = s * (code - 8) + z, s = scale * step / 255 and
z = s * offset * 8 / 127. Every 32 channels of a row of x are rounded to code * peak / 127, with
peak = max |x|. So the product of such a group with a row of weights needs sums of integers only:

    s * peak / 127 * (sum(code of w * code of x) + 8 * (offset / 127 - 1) * sum(code of x))

The sums are exact: 32 * 15 * 127 has 16 bits, and two partial sums of 15 bits are added last.

Order in memory: 32 rows of the weight form a block. A word of 32 bits holds the codes of 8 columns
of one row, as they are stored. Words of the same columns of all rows in a block stand side by side,
so that one instruction handles 8 rows:

    words (N/32, K/32, 4, 32) int32     steps (N/32, K/32, 32) uint8     offsets, int8, as steps

The order is the same on every machine. Importing this module compiles the kernels, and needs the
extra `numba`. numba keeps what it compiled in `__pycache__`, else in the user's cache folder.

The threads are torch's own: a second pool would wait for processors on which torch's threads spin.
Threads take blocks one by one. No result depends on their number.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

BLOCK_ROWS = 32  # rows of the weight in a block
GROUP_SIZE = 32  # columns that share step and offset, and channels that share a peak
WORD_CODES = 8
GROUP_WORDS = GROUP_SIZE // WORD_CODES  # of one row
VECTOR_ROWS = 8  # rows of the weight that one instruction handles
VECTORS = BLOCK_ROWS // VECTOR_ROWS
LINE_WORDS = 16  # of a line of the caches
AHEAD = 8  # groups to read ahead: 4 KB
OFFSET = np.float32(1 / 127)  # 1 of `offsets`, in units of 8 codes
LEVEL = np.float32(1 / 255)  # 1 of `steps`
TINY = np.finfo(np.float32).tiny

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES, PAIRS, WORDS = ir.VectorType(INT8, 32), ir.VectorType(INT16, 16), ir.VectorType(INT32, 8)


# ---- order ---------------------------------------------------------------------------------------


def interleave(part: Tensor, width: int) -> Tensor:
    """Reorder the rows of bytes of a part (N, W): (N/32, W/width, 32, width)."""
    return (
        part.unflatten(1, (-1, width)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2).contiguous()
    )


def pack(codes: Tensor) -> Tensor:
    """weight_int4 (N, K/2) uint8, N a multiple of 32 -> words (N/32, K/32, 4, 32) int32."""
    words = interleave(codes, WORD_CODES // 2).view(torch.int32)
    return words.squeeze(-1).unflatten(1, (-1, GROUP_WORDS))


# ---- one group -----------------------------------------------------------------------------------


def adds_products_of_bytes() -> bool:
    """Whether numba compiles for a processor with AVX2."""
    return "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def add_products(builder: Any, codes: Any, x: Any) -> Any:
    """Write the code of codes[2i] * x[2i] + codes[2i + 1] * x[2i + 1]: bytes (32) -> int16 (16)."""
    if adds_products_of_bytes():  # one instruction; LLVM does not find it by itself
        kind = ir.FunctionType(PAIRS, [BYTES, BYTES])
        name = "llvm.x86.avx2.pmadd.ub.sw"
        return builder.call(get_or_insert_function(builder.module, kind, name), [codes, x])
    eight = ir.Constant(PAIRS, [8] * 16)
    codes, x = builder.bitcast(codes, PAIRS), builder.bitcast(x, PAIRS)
    even, odd = builder.and_(codes, ir.Constant(PAIRS, [255] * 16)), builder.lshr(codes, eight)
    even_x, odd_x = builder.ashr(builder.shl(x, eight), eight), builder.ashr(x, eight)
    return builder.add(builder.mul(even, even_x), builder.mul(odd, odd_x))


def add_pairs(builder: Any, sums: Any) -> Any:
    """Write the code of sums[2i] + sums[2i + 1]: int16 (16) -> int32 (8)."""
    sixteen, words = ir.Constant(WORDS, [16] * 8), builder.bitcast(sums, WORDS)
    even = builder.ashr(builder.shl(words, sixteen), sixteen)
    return builder.add(even, builder.ashr(words, sixteen))


def spread(builder: Any, word: Any) -> Any:
    """Write the code that repeats a word of x for 8 rows of the weight: int32 -> bytes (32)."""
    one = builder.insert_element(ir.Constant(WORDS, ir.Undefined), word, ir.Constant(INT32, 0))
    zeros = ir.Constant(WORDS, [0] * VECTOR_ROWS)
    return builder.bitcast(builder.shuffle_vector(one, one, zeros), BYTES)


@intrinsic
def multiply_group(typing: Any, words: Any, x: Any, sums: Any) -> Any:
    """multiply_group(words, x, sums): sum(code of w * code of x) over a group, for all rows of a
    block.

    words (4, 32) uint32. x (8,) uint32: two words for each word of the weights, first for the lower
    halves of its bytes. sums (32,) int32: the result."""

    def write_code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words, x, sums = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args, values, strict=True)
        )
        lower_half, four = ir.Constant(BYTES, [15] * 32), ir.Constant(WORDS, [4] * VECTOR_ROWS)
        totals = [ir.Constant(PAIRS, [0] * 16)] * VECTORS
        for i in range(GROUP_WORDS):
            low, high = (
                spread(builder, builder.load(point_at(builder, x, 2 * i + half))) for half in (0, 1)
            )
            for vector, total in enumerate(totals):
                place = point_at(builder, words, i * BLOCK_ROWS + vector * VECTOR_ROWS)
                read = builder.load(builder.bitcast(place, WORDS.as_pointer()), align=4)
                for part, word in ((read, low), (builder.lshr(read, four), high)):
                    codes = builder.and_(builder.bitcast(part, BYTES), lower_half)
                    total = builder.add(total, add_products(builder, codes, word))
                totals[vector] = total
        for vector, total in enumerate(totals):
            place = point_at(builder, sums, vector * VECTOR_ROWS)
            place = builder.bitcast(place, WORDS.as_pointer())
            builder.store(add_pairs(builder, total), place, align=4)
        return context.get_dummy_value()

    return types.void(words, x, sums), write_code


@intrinsic
def fetch_group(typing: Any, words: Any) -> Any:
    """fetch_group(words): let the processor read a group that is `AHEAD` groups after this one.

    Reading past the end is allowed: nothing is loaded then."""

    def write_code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        kind = ir.FunctionType(ir.VoidType(), [INT8.as_pointer(), INT32, INT32, INT32])
        fetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        options = [ir.Constant(INT32, value) for value in (0, 3, 1)]  # read, keep, data
        for line in range(0, GROUP_WORDS * BLOCK_ROWS, LINE_WORDS):
            place = point_at(builder, data, AHEAD * GROUP_WORDS * BLOCK_ROWS + line)
            builder.call(fetch, [builder.bitcast(place, INT8.as_pointer()), *options])
        return context.get_dummy_value()

    return types.void(words), write_code


def point_at(builder: Any, array: Any, index: int) -> Any:
    """Write the code of the address of an element."""
    return builder.gep(array, [ir.Constant(INT64, index)])


# ---- blocks --------------------------------------------------------------------------------------


def keeps_code() -> bool:
    """Whether numba finds a folder for compiled code that can be written."""
    try:
        njit(cache=True)(keeps_code)
    except RuntimeError:
        return False
    return True


# Products and sums may be fused. Nothing else may change, so that NaN stays NaN.
OPTIONS = {"cache": keeps_code(), "fastmath": {"contract"}, "error_model": "numpy"}


@njit(**OPTIONS)
def round_rows(x: Any, codes: Any, peaks: Any, sums: Any) -> None:
    """Round x (R, K) to codes (R, K/32, 4, 2, 4), two words for 8 channels: the odd channels, then
    the even ones. peaks (R, K/32): peak / 127. sums (R, K/32): 8 * sum(code)."""
    for row in range(len(x)):
        for group in range(peaks.shape[1]):
            channels = x[row, group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
            peak, total = np.float32(0), np.float32(0)
            for value in channels:
                peak = max(peak, abs(value))
                total += abs(value)
            # NaN and infinity make all results of the row NaN.
            peak = peak / np.float32(127) + np.float32(0) * total
            scale, count = max(peak, TINY), np.int32(0)
            for i in range(GROUP_WORDS):
                for half in range(2):
                    for byte in range(4):
                        value = channels[WORD_CODES * i + 2 * byte + 1 - half]
                        code = np.int8(np.rint(value / scale))
                        codes[row, group, i, half, byte] = code
                        count += code
            peaks[row, group] = peak
            sums[row, group] = 8 * count


@njit(**OPTIONS)
def multiply_block(
    block: int, words: Any, steps: Any, offsets: Any, scales: Any, x: Any, peaks: Any, sums: Any,
    y: Any,
) -> None:  # fmt: skip
    """y[:, rows of the block] of the weights and of x (R, K/32, 8), as `round_rows` makes it."""
    totals = np.zeros((len(x), BLOCK_ROWS), np.float32)
    products = np.empty(BLOCK_ROWS, np.int32)
    for group in range(steps.shape[1]):
        codes, step, offset = words[block, group], steps[block, group], offsets[block, group]
        fetch_group(codes)
        for row in range(len(x)):  # the group of the weights stays in the fastest cache
            total, peak, count = totals[row], peaks[row, group], sums[row, group]
            multiply_group(codes, x[row, group], products)
            for i in range(BLOCK_ROWS):
                zero = np.float32(offset[i]) * OFFSET - np.float32(1)
                level = np.float32(products[i]) + zero * count
                total[i] += np.float32(step[i]) * peak * level
    first_row = block * BLOCK_ROWS
    for row in range(len(x)):
        for i in range(BLOCK_ROWS):
            y[row, first_row + i] = totals[row, i] * (scales[first_row + i] * LEVEL)


@njit(**OPTIONS)
def write_block(block: int, words: Any, steps: Any, offsets: Any, scales: Any, out: Any) -> None:
    """out[:, rows of the block]: the weights of the block, transposed."""
    s, z = np.empty(BLOCK_ROWS, np.float32), np.empty(BLOCK_ROWS, np.float32)
    start = block * BLOCK_ROWS
    for group in range(steps.shape[1]):
        for i in range(BLOCK_ROWS):
            s[i] = np.float32(steps[block, group, i]) * (scales[start + i] * LEVEL)
            offset = np.float32(offsets[block, group, i])
            z[i] = s[i] * (offset * (np.float32(8) * OFFSET) - np.float32(8))
        for word in range(GROUP_WORDS):
            column = group * GROUP_SIZE + word * WORD_CODES
            for code in range(WORD_CODES):
                for i in range(BLOCK_ROWS):
                    # Codes 0, 1, 2, ... are columns 1, 0, 3, 2, ...: the upper half comes first.
                    value = words[block, group, word, i] >> np.uint32(4 * code) & np.uint32(15)
                    out[column + (code ^ 1), start + i] = np.float32(value) * s[i] + z[i]


# ---- threads -------------------------------------------------------------------------------------
# A job is an array of numbers: the next block to take, the numbers of blocks, groups and rows, and
# addresses of tensors.
JOB_SIZE = 12
Job = ctypes.c_int64 * JOB_SIZE


@intrinsic
def point_to(typing: Any, address: Any) -> Any:
    """The pointer with this address."""

    def write_code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], INT8.as_pointer())

    return types.voidptr(types.int64), write_code


@intrinsic
def take_block(typing: Any, job: Any) -> Any:
    """Take the next block of a job, which no other thread will take."""

    def write_code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        next_block = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", next_block, ir.Constant(INT64, 1), "monotonic")

    return types.int64(job), write_code


@njit(**OPTIONS)
def view_weights(job: Any) -> Any:
    """words, steps, offsets and scales of a job."""
    blocks, groups = job[1], job[2]
    return (
        carray(point_to(job[4]), (blocks, groups, GROUP_WORDS, BLOCK_ROWS), np.uint32),
        carray(point_to(job[5]), (blocks, groups, BLOCK_ROWS), np.uint8),
        carray(point_to(job[6]), (blocks, groups, BLOCK_ROWS), np.int8),
        carray(point_to(job[7]), blocks * BLOCK_ROWS, np.float32),
    )


@cfunc("void(voidptr)", **OPTIONS)
def round_inputs(address: Any) -> None:
    """Round the rows of a job."""
    job = carray(address, JOB_SIZE, np.int64)
    groups, rows = job[2], job[3]
    x = carray(point_to(job[4]), (rows, groups * GROUP_SIZE), np.float32)
    codes = carray(point_to(job[5]), (rows, groups, GROUP_WORDS, 2, 4), np.int8)
    peaks = carray(point_to(job[6]), (rows, groups), np.float32)
    sums = carray(point_to(job[7]), (rows, groups), np.float32)
    round_rows(x, codes, peaks, sums)


@cfunc("void(voidptr)", **OPTIONS)
def multiply_blocks(address: Any) -> None:
    """Multiply the blocks of a job that no other thread has taken."""
    job = carray(address, JOB_SIZE, np.int64)
    blocks, groups, rows = job[1], job[2], job[3]
    words, steps, offsets, scales = view_weights(job)
    x = carray(point_to(job[8]), (rows, groups, 2 * GROUP_WORDS), np.uint32)
    peaks = carray(point_to(job[9]), (rows, groups), np.float32)
    sums = carray(point_to(job[10]), (rows, groups), np.float32)
    y = carray(point_to(job[11]), (rows, blocks * BLOCK_ROWS), np.float32)
    block = take_block(job)
    while block < blocks:
        multiply_block(block, words, steps, offsets, scales, x, peaks, sums, y)
        block = take_block(job)


@cfunc("void(voidptr)", **OPTIONS)
def write_blocks(address: Any) -> None:
    """Write out the blocks of a job that no other thread has taken."""
    job = carray(address, JOB_SIZE, np.int64)
    blocks, groups = job[1], job[2]
    words, steps, offsets, scales = view_weights(job)
    out = carray(point_to(job[8]), (groups * GROUP_SIZE, blocks * BLOCK_ROWS), np.float32)
    block = take_block(job)
    while block < blocks:
        write_block(block, words, steps, offsets, scales, out)
        block = take_block(job)


@lru_cache
def find_threads() -> Callable | None:
    """OpenMP's function that runs another one in all of torch's threads; None if this torch has
    another kind of threads, as on macOS and Windows."""
    try:
        run = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # torch's own OpenMP, not another one
    except (AttributeError, OSError):
        return None
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    return run


@lru_cache
def find_call(kernel: Any) -> Callable:
    """Make the function that calls a kernel. It lets other Python threads run."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)


def run_job(kernel: Any, blocks: int, groups: int, rows: int, *tensors: Tensor) -> None:
    """Run a kernel in torch's threads. All tensors are contiguous."""
    job = Job(0, blocks, groups, rows, *(tensor.data_ptr() for tensor in tensors))
    threads, run = min(torch.get_num_threads(), blocks), find_threads()
    if threads > 1 and run is not None:
        run(kernel.address, job, threads, 0)
    else:
        find_call(kernel)(job)


# ---- weights -------------------------------------------------------------------------------------


def multiply(x: Tensor, words: Tensor, steps: Tensor, offsets: Tensor, scales: Tensor) -> Tensor:
    """x (R, K), rounded to 8 bits in groups of 32 -> (R, N) float32, N with its padding.

    words (N/32, K/32, 4, 32), steps and offsets (N/32, K/32, 32), scales (N,), contiguous, on a
    CPU."""
    blocks, groups = steps.shape[:2]
    rows, wide = len(x), x.float().contiguous()
    codes = torch.empty(rows, groups * GROUP_SIZE, dtype=torch.int8)
    peaks, sums = torch.empty(2, rows, groups)
    run_job(round_inputs, 1, groups, rows, wide, codes, peaks, sums)
    y = torch.empty(rows, blocks * BLOCK_ROWS)
    weight = (words, steps, offsets, scales.float())
    run_job(multiply_blocks, blocks, groups, rows, *weight, codes, peaks, sums, y)
    return y


def write_weights(words: Tensor, steps: Tensor, offsets: Tensor, scales: Tensor) -> Tensor:
    """The weights as float32, transposed: (K, N). Arguments as for `multiply`."""
    blocks, groups = steps.shape[:2]
    out = torch.empty(groups * GROUP_SIZE, blocks * BLOCK_ROWS)
    run_job(write_blocks, blocks, groups, 0, words, steps, offsets, scales.float(), out)
    return out
