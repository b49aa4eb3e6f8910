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

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .launching import kernel
from .rows import tl_aligned, tl_float

# 1024 elements a tile are 8 a thread, one 16-byte load of a 16-bit type. A launch that sums takes several such parts at
# once, for that many loads in flight, and adds them up before they go to the sums, which then need 8 registers each.
_PART = 1024

# At 64 channels a row of a tile is a whole cache line of a 16-bit type.
_RUN = 64

# Programs of a launch that sums: with up to 128 registers a thread, four run at a time on each multiprocessor of an
# H200 (132), so none waits for another to end. A constant, so that the order of summation, and with it the last bit,
# does not depend on the device.
_PROGRAMS = 512

# Programs of a launch that only writes: enough to even out their ends, few enough that what a program reads of its
# channels stays small beside its tiles.
_WRITE_PROGRAMS = 4096

_MERGE_TILE = 4096  # partial values of one sum in a program of the second launch


@dataclass(frozen=True)
class Launch:
    """How a pass over a tensor is launched."""

    N: int
    C: int
    S: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_S: int
    fold: int  # parts of a tile
    align: int  # a power of two, at most 16, that divides every distance between runs of contiguous values
    num_warps: int

    @cached_property
    def M(self) -> int:
        """The values of a channel."""
        return self.N * self.S

    @cached_property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.C, self.BLOCK_C)

    @cached_property
    def blocks(self) -> int:
        """Tiles of a block of channels."""
        return triton.cdiv(self.N, self.BLOCK_N) * triton.cdiv(self.S, self.BLOCK_S)

    def _programs(self, most: int) -> int:
        return min(self.blocks, max(1, most // self.channel_blocks))

    @cached_property
    def splits(self) -> int:
        return self._programs(_PROGRAMS)

    @cached_property
    def sum_grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.splits

    @cached_property
    def write_grid(self) -> tuple[int, int]:
        return self.channel_blocks, self._programs(_WRITE_PROGRAMS)

    @cached_property
    def merge_options(self) -> dict[str, int]:
        block_p = max(16, triton.next_power_of_2(self.splits))
        return {"BLOCK_P": block_p, "BLOCK_C": max(1, _MERGE_TILE // block_p), "num_warps": 8}

    @cached_property
    def merge_grid(self) -> tuple[int]:
        return (triton.cdiv(self.C, self.merge_options["BLOCK_C"]),)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """The arguments that every kernel over tiles takes."""
        return self.N, self.C, self.S, self.blocks

    @cached_property
    def options(self) -> dict[str, int]:
        """The compile-time arguments that every kernel over tiles takes."""
        return {
            "ALIGN": self.align,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_C": self.BLOCK_C,
            "BLOCK_S": self.BLOCK_S,
            "num_warps": self.num_warps,
        }

    @cached_property
    def sum_options(self) -> dict[str, int]:
        return self.options | {"FOLD": self.fold}


def channels_like(x: Tensor, parameter: Tensor | None = None) -> Tensor:
    """(C,), of the dtype of a parameter if there is one, else of the accumulation dtype."""
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype) if parameter is None else parameter.dtype)


def plan(x: Tensor, fold: int = 1) -> Launch:
    """The launch for ``x`` (N, C, …), contiguous or channels-last.

    ``fold``: the parts of a tile for a 16-bit type. Wider types have as many bytes in flight with fewer.
    """
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    fold = max(1, 2 * fold // x.itemsize)
    num_warps = 8 if x.itemsize == 8 else 4  # a float64 takes two registers
    rows = S == 1 or x.stride(1) == 1
    return _plan(N * S, C, 1, fold, num_warps) if rows else _plan(N, C, S, fold, num_warps)


@lru_cache(maxsize=4096)
def _plan(N: int, C: int, S: int, fold: int, num_warps: int) -> Launch:
    align = math.gcd(16, C if S == 1 else S)
    if align == 1:  # every element has its own address, which takes registers
        fold = max(1, fold // 2)
    if 1 < S <= _RUN // 2:  # several channels a run: in three dimensions a thread need not have its part of all parts
        fold = 1
    fold = min(fold, triton.next_power_of_2(N))
    if S == 1:
        block_c, block_s = min(_RUN, triton.next_power_of_2(C)), 1
    else:
        block_c, block_s = _plane_tile(N, C, S, fold)
    return Launch(N, C, S, _PART * fold // (block_c * block_s), block_c, block_s, fold, align, num_warps)


def _plane_tile(N: int, C: int, S: int, fold: int) -> tuple[int, int]:
    """BLOCK_C and BLOCK_S of contiguous planes.

    Small planes: several channels together make a run of contiguous values. Large planes: the run that leaves fewest
    lanes of the tiles empty, and the longest of those.
    """
    if S <= _RUN:
        block_s = triton.next_power_of_2(S)
        return min(_RUN // block_s, triton.next_power_of_2(C)), block_s

    def lanes(block_s: int) -> int:
        block_n = _PART * fold // block_s
        return triton.cdiv(N, block_n) * block_n * triton.cdiv(S, block_s) * block_s

    return 1, min((1024, 512, 256, 128, 64), key=lanes)


# Sizes change from call to call; ALIGN says what the compiler may know of them.
channel_kernel = kernel("N", "C", "S", "M", "blocks", "splits", "eps_high", "eps_low")


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
        return tl.load(ptr + channels, mask=channels < C, other=0.0).to(ACC)


@triton.jit
def tl_store_channel(ptr, value, C, BLOCK_C: tl.constexpr):
    channels = tl_channels(BLOCK_C)
    tl.store(ptr + channels, value.to(ptr.dtype.element_ty), mask=channels < C)


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
def tl_samples_left(block, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Number of the first sample of a tile, and the number of its samples."""
    first = tl.cast(block // ((S + BLOCK_S - 1) // BLOCK_S) if BLOCK_S > 1 else block, tl.int64) * BLOCK_N
    return first, tl.minimum(N - first, BLOCK_N).to(tl.int32)


@triton.jit
def tl_positions_left(block, S, BLOCK_S: tl.constexpr):
    """Number of the first position of a tile, and the number of its positions."""
    first = block % ((S + BLOCK_S - 1) // BLOCK_S) * BLOCK_S
    return first, tl.minimum(S - first, BLOCK_S).to(tl.int32)


@triton.jit
def tl_tile(
    block, N, C, S,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Offsets, in 64 bits, and mask of a tile: what depends on the block is scalar, and the rest leaves the loop."""
    channels = tl_channels(BLOCK_C)[None, :, None]
    samples = tl.arange(0, BLOCK_N)[:, None, None]
    first_sample, samples_left = tl_samples_left(block, N, S, BLOCK_N, BLOCK_S)
    mask = (samples < samples_left) & (channels < C)
    if BLOCK_S == 1:
        return first_sample * C + (samples.to(tl.int64) * C + channels), mask
    else:
        S = tl_aligned(S, ALIGN)
        positions = tl.arange(0, BLOCK_S)[None, None, :]
        first_position, positions_left = tl_positions_left(block, S, BLOCK_S)
        offsets = (samples.to(tl.int64) * C + channels) * S + positions
        return first_sample * C * S + first_position + offsets, mask & (positions < positions_left)


@triton.jit
def tl_tile_count(block, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Values of a channel in a tile."""
    _, count = tl_samples_left(block, N, S, BLOCK_N, BLOCK_S)
    if BLOCK_S > 1:
        _, positions = tl_positions_left(block, S, BLOCK_S)
        count *= positions
    return count


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
def tl_fold(tile, FOLD: tl.constexpr):
    """The sum of the FOLD parts of a tile: a thread has its elements of all parts."""
    BLOCK_N: tl.constexpr = tile.shape[0] // FOLD
    return tl.sum(tl.reshape(tile, (FOLD, BLOCK_N, tile.shape[1], tile.shape[2])), 0)


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
