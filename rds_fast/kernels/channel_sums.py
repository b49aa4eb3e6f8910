"""Sums over the channels of (N, C, S), for the gradients of a group norm's weight and bias.

A program adds up a tile of channels by places over a strip of the samples' places, and writes one value for each of its
channels; a second kernel adds up the strips. Where S is 1 neighbouring channels are neighbours in memory, and the tile
is all channels; where S is large it is one channel, or few.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import rows as row_tiles
from .launching import kernel
from .rows import accumulator, tl_aligned

_TILE = 1024  # elements a program, 8 a thread

_kernel = kernel("C", "G", "D", "S", "units", "units_per_strip", "strips")


@_kernel
def _channel_sums_kernel(
    u_ptr, x_ptr, v_ptr, mean_ptr, rstd_ptr, v_mean_ptr, vx_mean_ptr, first_ptr, second_ptr, C, G, D, S, units,
    units_per_strip, DOUBLE: tl.constexpr, ONE_PLACE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Σ u x̂ and Σ u; or, DOUBLE, Σ u r P(v). A unit is a block of places of one sample."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    first_sum = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    second_sum = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    blocks = (S + BLOCK_S - 1) // BLOCK_S
    strip = tl.program_id(1).to(tl.int64)
    for unit in range(strip * units_per_strip, tl.minimum((strip + 1) * units_per_strip, units)):
        sample = unit // blocks
        places = (unit % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = channel_mask[:, None] & (places < S)[None, :]
        if ONE_PLACE:  # ALIGN then divides C, else S
            offsets = (sample * tl_aligned(C, ALIGN) + channels)[:, None] + places[None, :]
        else:
            offsets = ((sample * C + channels) * tl_aligned(S, ALIGN))[:, None] + places[None, :]
        rows = sample * G + channels // D
        mean = tl.load(mean_ptr + rows, mask=channel_mask, other=0.0)[:, None]
        r = tl.load(rstd_ptr + rows, mask=channel_mask, other=0.0)[:, None]
        u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(ACC)
        unit_x = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean) * r
        if DOUBLE:
            v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(ACC)
            of_v = tl.load(v_mean_ptr + rows, mask=channel_mask, other=0.0)[:, None]
            of_vx = tl.load(vx_mean_ptr + rows, mask=channel_mask, other=0.0)[:, None]
            first_sum += u * (v - of_v - unit_x * of_vx) * r
        else:
            first_sum += u * unit_x
            second_sum += u
    out = strip * C + channels
    tl.store(first_ptr + out, tl.sum(first_sum, 1), mask=channel_mask)
    if not DOUBLE:
        tl.store(second_ptr + out, tl.sum(second_sum, 1), mask=channel_mask)


@_kernel
def _sum_strips_kernel(strips_ptr, result_ptr, C, strips, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(kinds, strips, C) to (kinds, C); the program's second number is the kind."""
    kind = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), strips_ptr.dtype.element_ty)
    for first in range(0, strips, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mask = (rows < strips)[:, None] & (channels < C)[None, :]
        offsets = (kind * strips + rows)[:, None] * C + channels[None, :]
        total += tl.load(strips_ptr + offsets, mask=mask, other=0.0)
    tl.store(result_ptr + kind * C + channels, tl.sum(total, 0), mask=channels < C)


def sum_strips(strips: Tensor) -> tuple[Tensor, ...]:
    """The sums over dimension 1 of (kinds, strips, C)."""
    kinds, count, C = strips.shape
    result = strips.new_empty((kinds, C))
    BLOCK_C = 32
    _sum_strips_kernel[(triton.cdiv(C, BLOCK_C), kinds)](strips, result, C, count, BLOCK_N=32, BLOCK_C=BLOCK_C)
    return result.unbind()


def _channel_sums(kinds: int, u: Tensor, x: Tensor, v: Tensor | None, *row_values: Tensor | None) -> tuple[Tensor, ...]:
    mean, rstd, v_mean, vx_mean = row_values
    assert mean is not None
    N, C, S = x.shape
    groups = mean.numel() // N
    BLOCK_S = min(_TILE, triton.next_power_of_2(S))
    BLOCK_C = min(_TILE // BLOCK_S, triton.next_power_of_2(C))
    channel_blocks = triton.cdiv(C, BLOCK_C)
    units = N * triton.cdiv(S, BLOCK_S)
    per_strip = triton.cdiv(units, min(units, max(1, 2 * row_tiles._PROGRAMS // channel_blocks)))
    strips = mean.new_empty((kinds, triton.cdiv(units, per_strip), C))
    _channel_sums_kernel[(channel_blocks, strips.shape[1])](
        u, x, v, mean, rstd, v_mean, vx_mean, strips[0], strips[-1], C, groups, C // groups, S, units, per_strip,
        DOUBLE=v is not None, ONE_PLACE=S == 1, ACC=accumulator(x), ALIGN=math.gcd(16, C if S == 1 else S),
        BLOCK_C=BLOCK_C, BLOCK_S=BLOCK_S,
    )  # fmt: skip
    return sum_strips(strips)


def backward_channel_sums(u: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """gweight = Σ u x̂ and gbias = Σ u of each channel."""
    return _channel_sums(2, u, x, None, mean, rstd, None, None)


def double_backward_channel_sums(
    u: Tensor, x: Tensor, v: Tensor, mean: Tensor, rstd: Tensor, v_mean: Tensor, vx_mean: Tensor
) -> Tensor:
    """dweight = Σ u r P(v) of each channel, from the row means of v and of v x̂."""
    return _channel_sums(1, u, x, v, mean, rstd, v_mean, vx_mean)[0]
