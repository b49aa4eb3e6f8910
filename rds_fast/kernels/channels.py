"""What the kernels of channel statistics share: how an (N, C, S) tensor is cut into tiles, sums over a channel, and the
device functions (``tl_``) for both.

A tensor is seen as N samples of C channels of S positions, contiguous in this order; channels-last memory is N·S
samples of C channels of one position, so one code serves both. A tile is BLOCK_N samples by BLOCK_C channels by
BLOCK_S positions, and ``block`` counts the tiles of a block of channels. An operation in train mode is three launches:

1. Each of ``splits`` programs sums every ``splits``-th tile of its channels, in registers, and reduces once, at its
   end, into a scratch buffer (sums, splits, C).
2. A program for a few channels adds up their splits, in a fixed order, and derives what the last launch needs of a
   channel. That launch costs some microseconds. Without it, each program of the next would have to add up 512 partials
   of five sums for 64 channels, 655 kB, before it wrote a few kB.
3. A pass that writes, in the opposite order, so that it begins with what the first pass left in the cache.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rows import tl_aligned, tl_float

# 1024 elements a tile are 8 a thread: a 16-byte load of a 16-bit type. Sums of 5 kinds, kept for each element, are then
# 40 registers of the 128 that let four such programs run on a multiprocessor.
_TILE = 1024
_NUM_WARPS = 4

# At 64 channels a row of a tile is a whole cache line of a 16-bit type.
_RUN = 64

# Programs of a launch that sums: four on each multiprocessor of an H200 (132), so none waits for another to end. A
# constant, so that the order of summation, and with it the last bit, does not depend on the device.
_PROGRAMS = 512

# Programs of a launch that only writes: enough to even out their ends, few enough that what a program reads of its
# channels stays small beside its tiles.
_WRITE_PROGRAMS = 4096

_MERGE_TILE = 4096  # partial values of one sum in a program of the second launch


class Launch(NamedTuple):
    """How an operation on one tensor is launched."""

    N: int
    C: int
    S: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_S: int
    align: int  # a power of two, at most 16, that divides every distance between runs of contiguous values

    @property
    def M(self) -> int:
        """The values of a channel."""
        return self.N * self.S

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.C, self.BLOCK_C)

    @property
    def blocks(self) -> int:
        """Tiles of a block of channels."""
        return triton.cdiv(self.N, self.BLOCK_N) * triton.cdiv(self.S, self.BLOCK_S)

    @property
    def splits(self) -> int:
        return min(self.blocks, max(1, _PROGRAMS // self.channel_blocks))

    @property
    def sum_grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.splits

    @property
    def write_grid(self) -> tuple[int, int]:
        return self.channel_blocks, min(self.blocks, max(1, _WRITE_PROGRAMS // self.channel_blocks))

    @property
    def merge_options(self) -> dict[str, int]:
        block_p = max(16, triton.next_power_of_2(self.splits))
        return {"BLOCK_P": block_p, "BLOCK_C": max(1, _MERGE_TILE // block_p), "num_warps": 8}

    @property
    def merge_grid(self) -> tuple[int]:
        return (triton.cdiv(self.C, self.merge_options["BLOCK_C"]),)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The arguments that every kernel over tiles takes."""
        return self.N, self.C, self.S, self.blocks

    @property
    def options(self) -> dict[str, int]:
        """The compile-time arguments that every kernel over tiles takes."""
        return {
            "ALIGN": self.align,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_C": self.BLOCK_C,
            "BLOCK_S": self.BLOCK_S,
            "num_warps": _NUM_WARPS,
        }


def plan(x: Tensor) -> Launch:
    """The launch for ``x`` (N, C, …), contiguous or channels-last."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    if S == 1 or x.stride(1) == 1:
        block_c = min(_RUN, triton.next_power_of_2(C))
        return Launch(N * S, C, 1, _TILE // block_c, block_c, 1, math.gcd(16, C))
    block_c, block_s = _plane_tile(N, C, S)
    return Launch(N, C, S, _TILE // (block_c * block_s), block_c, block_s, math.gcd(16, S))


def _plane_tile(N: int, C: int, S: int) -> tuple[int, int]:
    """BLOCK_C and BLOCK_S of contiguous planes.

    Small planes: several channels together make a run of contiguous values. Large planes: the run that leaves fewest
    lanes of the tiles empty, and the longest of those.
    """
    if S <= _RUN:
        block_s = triton.next_power_of_2(S)
        return min(_RUN // block_s, triton.next_power_of_2(C)), block_s

    def lanes(block_s: int) -> int:
        block_n = _TILE // block_s
        return triton.cdiv(N, block_n) * block_n * triton.cdiv(S, block_s) * block_s

    return 1, min((1024, 512, 256, 128, 64), key=lanes)


# Sizes change from call to call; ALIGN says what the compiler may know of them.
channel_kernel = functools.partial(
    triton.jit, do_not_specialize=("N", "C", "S", "M", "blocks", "splits", "eps_high", "eps_low")
)


@triton.jit
def tl_channel_count(C, ALIGN: tl.constexpr, BLOCK_S: tl.constexpr):
    """C, in a form that shows its alignment where channels are the contiguous dimension."""
    if BLOCK_S == 1:
        return tl_aligned(C, ALIGN)
    else:
        return C


@triton.jit
def tl_channels(BLOCK_C: tl.constexpr):
    """This program's channels."""
    return tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tl_channel(ptr, C, default: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """A value of each of this program's channels; ``default`` where the tensor is absent."""
    if ptr is None:
        return tl.full((BLOCK_C,), default, ACC)
    else:
        channels = tl_channels(BLOCK_C)
        return tl.load(ptr + channels, mask=channels < C, other=0.0)


@triton.jit
def tl_rstd(var_ptr, eps_high, eps_low, C, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """r = (var + ε)^−½."""
    return tl.rsqrt(tl_channel(var_ptr, C, 1.0, ACC, BLOCK_C) + tl_float(eps_high, eps_low, ACC))


@triton.jit
def tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """weight · r, which every pass computes by this function: a mask recomputed later then has the forward's bits."""
    return tl_channel(weight_ptr, C, 1.0, ACC, BLOCK_C) * tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)


@triton.jit
def tl_affine(x, mean, scale, bias):
    """x̂ weight + bias. Fused explicitly: left to the compiler, one pass could be contracted and another not."""
    return tl.fma(x - mean[None, :, None], scale[None, :, None], bias[None, :, None])


@triton.jit
def tl_relu_mask(x, y_ptr, offsets, mask, mean, scale, bias, ACC: tl.constexpr):
    """Where the ReLU was open: read off y if it is given, else recomputed from x."""
    if y_ptr is None:
        return tl_affine(x, mean, scale, bias) > 0
    else:
        return tl_load(y_ptr, offsets, mask, ACC) > 0


@triton.jit
def tl_tile(
    block, N, C, S,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Offsets, in 64 bits, and mask of a tile."""
    channels = tl_channels(BLOCK_C)[None, :, None]
    if BLOCK_S == 1:
        samples = (tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
        return samples * C + channels, (samples < N) & (channels < C)
    else:
        S = tl_aligned(S, ALIGN)
        s_blocks = (S + BLOCK_S - 1) // BLOCK_S
        samples = (tl.cast(block // s_blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
        positions = (block % s_blocks * BLOCK_S + tl.arange(0, BLOCK_S))[None, None, :]
        return (samples * C + channels) * S + positions, (samples < N) & (channels < C) & (positions < S)


@triton.jit
def tl_tile_count(block, N, S, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Values of a channel in a tile."""
    if BLOCK_S == 1:
        return tl.minimum(N - tl.cast(block, tl.int64) * BLOCK_N, BLOCK_N).to(ACC)
    else:
        s_blocks = (S + BLOCK_S - 1) // BLOCK_S
        samples = tl.minimum(N - block // s_blocks * BLOCK_N, BLOCK_N)
        return (samples * tl.minimum(S - block % s_blocks * BLOCK_S, BLOCK_S)).to(ACC)


@triton.jit
def tl_load(ptr, offsets, mask, ACC: tl.constexpr):
    """A tile in the accumulation type; zeros where the tensor is absent."""
    if ptr is None:
        return tl.zeros(mask.shape, ACC)
    else:
        return tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def tl_store(ptr, offsets, mask, value):
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tl_channel_sum(tile):
    """The sum of a tile over its samples and positions."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def tl_store_partial(ptr, index: tl.constexpr, value, C, splits, BLOCK_C: tl.constexpr):
    """Writes this split's part of sum number ``index``."""
    channels = tl_channels(BLOCK_C)
    split = index * splits + tl.program_id(1)
    tl.store(ptr + split.to(tl.int64) * C + channels, value, mask=channels < C)


@triton.jit
def tl_partials(ptr, index: tl.constexpr, C, splits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The (BLOCK_P, BLOCK_C) parts of sum number ``index``."""
    channels = tl_channels(BLOCK_C)[None, :]
    split = tl.arange(0, BLOCK_P)[:, None]
    mask = (split < splits) & (channels < C)
    return tl.load(ptr + (index * splits + split).to(tl.int64) * C + channels, mask=mask, other=0.0)


@triton.jit
def tl_total(ptr, index: tl.constexpr, C, splits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.sum(tl_partials(ptr, index, C, splits, BLOCK_P, BLOCK_C), 0)
