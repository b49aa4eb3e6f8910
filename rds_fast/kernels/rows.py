"""What the kernels share: how rows are cut into programs, and the few device functions (``tl_``) they are written in.

A kernel works on a tile of BLOCK_N rows by BLOCK_C columns. A row that fits a tile is read once and stays in registers
(``WHOLE_ROW``). A longer row is read block by block, and if there are too few rows to fill a GPU, it is cut over many
programs (*splits*), whose partial sums lie in a scratch buffer that a second launch adds up, in a fixed order: the same
bits on every run.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .launching import kernel


class Tile(NamedTuple):
    """The tile of one program."""

    limit: int  # the longest row for which this tile is used
    BLOCK_C: int
    BLOCK_N: int
    num_warps: int


# At most 16 warps: on AMD GPUs a warp has 64 threads and a block at most 1024 of them.
_TILES = (
    # Short rows: 1024 elements a program, 8 a thread, so that a row is reduced inside one warp, without a barrier.
    Tile(limit=4, BLOCK_C=4, BLOCK_N=256, num_warps=4),
    Tile(limit=16, BLOCK_C=16, BLOCK_N=64, num_warps=4),
    Tile(limit=64, BLOCK_C=64, BLOCK_N=16, num_warps=4),
    Tile(limit=256, BLOCK_C=256, BLOCK_N=4, num_warps=4),
    # One row or two a program; 8 to 16 elements a thread: 16-byte loads for 16-bit types, and several in flight.
    Tile(limit=512, BLOCK_C=512, BLOCK_N=2, num_warps=4),
    Tile(limit=1024, BLOCK_C=1024, BLOCK_N=1, num_warps=4),
    Tile(limit=2048, BLOCK_C=2048, BLOCK_N=1, num_warps=4),
    Tile(limit=4096, BLOCK_C=4096, BLOCK_N=1, num_warps=8),
    Tile(limit=8192, BLOCK_C=8192, BLOCK_N=1, num_warps=16),
    # The longest row in registers: 32 elements a thread of x and as many of v are 64 of the 128 registers that 16
    # warps leave a thread.
    Tile(limit=16384, BLOCK_C=16384, BLOCK_N=1, num_warps=16),
)

# Longer rows, block by block: 16 elements a thread are enough loads in flight, and leave registers for 2 programs on
# each multiprocessor while one of them waits at a reduction.
_LONG_TILE = Tile(limit=2**63 - 1, BLOCK_C=4096, BLOCK_N=1, num_warps=8)

# A float64 element takes two registers, so a row in registers may be half as long, on twice the warps.
_WHOLE_ROW_LIMIT = {torch.float64: 8192}

# Programs that fill a large GPU (132 to 304 multiprocessors) at least twice. A constant, so that the order of
# summation, and with it the last bit, does not depend on the device.
_PROGRAMS = 512

MAX_SPLITS = _PROGRAMS
_MAX_GRID_Y = 65535  # CUDA's limit on the grid's second dimension


class Launch(NamedTuple):
    """How one operation on (N, C) rows is launched."""

    N: int
    C: int
    tile: Tile
    whole_row: bool
    splits: int  # programs a row in a kernel that reduces
    align: int  # a power of two, at most 16, that divides C and every row stride

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.N, self.tile.BLOCK_N)

    @property
    def blocks_per_split(self) -> int:
        return triton.cdiv(triton.cdiv(self.C, self.tile.BLOCK_C), self.splits)

    @property
    def write_blocks(self) -> int:
        """Blocks a program in a kernel that writes (N, C) and reduces nothing: one, up to the limit of the grid."""
        return triton.cdiv(triton.cdiv(self.C, self.tile.BLOCK_C), _MAX_GRID_Y)

    @property
    def write_grid(self) -> tuple[int, int]:
        return self.row_blocks, triton.cdiv(self.C, self.tile.BLOCK_C * self.write_blocks)

    @property
    def second_pass(self) -> tuple[tuple[int, int], int]:
        """Grid and blocks a program of a kernel that writes (N, C) after a reduction over the same rows.

        Without splits one program reduces and writes a row, which it then finds in the cache; with splits the
        reduction was a launch before.
        """
        if self.splits > 1:
            return self.write_grid, self.write_blocks
        return (self.row_blocks, 1), self.blocks_per_split

    @property
    def options(self) -> dict[str, int | bool]:
        """The compile-time arguments that every kernel takes."""
        return {
            "ALIGN": self.align,
            "WHOLE_ROW": self.whole_row,
            "BLOCK_N": self.tile.BLOCK_N,
            "BLOCK_C": self.tile.BLOCK_C,
            "num_warps": self.tile.num_warps,
        }


def plan(x: Tensor, *others: Tensor, heavy: bool = False) -> Launch:
    """The launch for rows of ``x``, read together with ``others``, which are (N, C) as well.

    ``heavy``: the arithmetic keeps more than two values an element, so a row in registers may be half as long.
    """
    N, C = x.shape
    whole_row_limit = _WHOLE_ROW_LIMIT.get(x.dtype, _TILES[-1].limit) // (2 if heavy else 1)
    align = math.gcd(16, C, *(t.stride(0) for t in (x, *others)))
    if whole_row_limit < C:
        blocks = triton.cdiv(C, _LONG_TILE.BLOCK_C)
        blocks_per_split = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // max(N, 1))))
        return Launch(N, C, _LONG_TILE, False, triton.cdiv(blocks, blocks_per_split), align)
    tile = next(tile for tile in _TILES if tile.limit >= C)
    if x.dtype == torch.float64:
        tile = tile._replace(num_warps=min(16, 2 * tile.num_warps))
    return Launch(N, C, tile, True, 1, align)


def accumulator(x: Tensor) -> tl.dtype:
    """The type of a kernel's arithmetic on ``x``."""
    return tl.float64 if accumulation_dtype(x.dtype) == torch.float64 else tl.float32


def float_pair(value: float) -> tuple[float, float]:
    """``value`` as two float32 numbers whose sum has 48 bits of it: Triton passes a Python float as one float32."""
    high = ctypes.c_float(value).value
    return high, ctypes.c_float(value - high).value


# Sizes and row strides change from call to call. Specialising on them would compile again and again, and would still
# not tell the compiler that C = 1000 is a multiple of 8; ALIGN does.
_SIZES = ("N", "C", "D", "splits", "blocks_per_split")
_STRIDES = ("x_row_stride", "v_row_stride", "logits_row_stride", "target_stride")

# The decorator of every kernel.
row_kernel = kernel(*_SIZES, *_STRIDES, "ignore_index")


@triton.jit
def tl_float(high, low, ACC: tl.constexpr):
    """The number that ``float_pair`` took apart."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def tl_aligned(value, ALIGN: tl.constexpr):
    """``value``, which ALIGN divides, in a form that shows it to the compiler: it then uses vector loads."""
    return value // ALIGN * ALIGN


@triton.jit
def tl_rows(BLOCK_N: tl.constexpr):
    """This program's rows, as 64-bit numbers: times a row stride they may pass 2^31."""
    return tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def tl_columns(block, BLOCK_C: tl.constexpr):
    return block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tl_block_count(C, BLOCK_C: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """Blocks in a row. A constant 1 for a whole row: the compiler then removes the loop."""
    if WHOLE_ROW:
        return 1
    else:
        return (C.to(tl.int64) + BLOCK_C - 1) // BLOCK_C


@triton.jit
def tl_first_block(blocks_per_split, WHOLE_ROW: tl.constexpr):
    """The first block of this program's split."""
    if WHOLE_ROW:
        return 0
    else:
        return tl.program_id(1).to(tl.int64) * blocks_per_split


@triton.jit
def tl_last_block(blocks_per_split, C, BLOCK_C: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """One past the last block of this program's split."""
    if WHOLE_ROW:
        return 1
    else:
        after = (tl.program_id(1).to(tl.int64) + 1) * blocks_per_split
        return tl.minimum(after, tl_block_count(C, BLOCK_C, WHOLE_ROW))


@triton.jit
def tl_load(ptr, rows, row_stride, columns, mask, other, ACC: tl.constexpr, ALIGN: tl.constexpr):
    """A tile in the accumulation type."""
    offsets = rows[:, None] * tl_aligned(row_stride, ALIGN) + columns[None, :]
    return tl.load(ptr + offsets, mask=mask, other=other).to(ACC)


@triton.jit
def tl_store(ptr, rows, C, columns, mask, value, ALIGN: tl.constexpr):
    """Writes a tile of a contiguous result."""
    offsets = rows[:, None] * tl_aligned(C, ALIGN) + columns[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tl_store_partial(ptr, rows, row_mask, splits, value):
    """Writes this split's partial value into an (N, splits) scratch buffer."""
    tl.store(ptr + rows * splits + tl.program_id(1), value, mask=row_mask)


@triton.jit
def tl_load_partials(ptr, rows, row_mask, splits, other, BLOCK_S: tl.constexpr):
    """All the partial values of this program's rows."""
    index = tl.arange(0, BLOCK_S)
    mask = row_mask[:, None] & (index < splits)[None, :]
    return tl.load(ptr + rows[:, None] * splits + index[None, :], mask=mask, other=other)


@triton.jit
def tl_sum_partials(ptr, rows, row_mask, splits, BLOCK_S: tl.constexpr):
    return tl.sum(tl_load_partials(ptr, rows, row_mask, splits, 0.0, BLOCK_S), 1)


@triton.jit
def tl_finite(m):
    """``m``, or 0 where it is infinite: the reference of a log-sum-exp, which must not form inf − inf."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)
