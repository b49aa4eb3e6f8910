"""Triton kernels of the double backward of a group norm; group_norm.py holds the formulas."""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_sums import double_backward_channel_sums, sum_strips
from .group_rows import group_kernel, plan_rows, tl_coefficient, tl_cotangent
from .rows import (
    MAX_SPLITS,
    accumulator,
    tl_aligned,
    tl_block_count,
    tl_first_block,
    tl_last_block,
    tl_load,
    tl_store,
    tl_store_partial,
    tl_sum_partials,
)


@triton.jit
def tl_tile(
    v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, start, row_mask, mask, C, G, D, S,
    HAS_V: tl.constexpr, HAS_VWEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x̂, u, the weight, u_w, v and vweight of a tile; an absent v is 0, and so is an absent vweight."""
    columns = start + tl.arange(0, BLOCK_C)
    unit = (tl_load(x_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN) - mean) * r
    u, weight, weighted = tl_cotangent(
        u_ptr, weight_ptr, rows, start, row_mask, mask, C, G, D, S, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_C
    )
    v = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    if HAS_V:
        v = tl_load(v_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN)
    vweight = tl.zeros((1, 1), ACC)
    if HAS_VWEIGHT:
        vweight = tl_coefficient(vweight_ptr, rows, start, G, D, S, row_mask, mask, KIND, ACC, BLOCK_C)
    return unit, u, weight, weighted, v, vweight


@triton.jit
def tl_tile_sums(unit, u, weighted, v, vweight):
    """Σ of u_w, u_w x̂, u_w v, v, v x̂, vweight u and vweight u x̂ along a tile's rows."""
    along = vweight * u
    return (
        tl.sum(weighted, 1), tl.sum(weighted * unit, 1), tl.sum(weighted * v, 1), tl.sum(v, 1), tl.sum(v * unit, 1),
        tl.sum(along, 1), tl.sum(along * unit, 1),
    )  # fmt: skip


@triton.jit
def tl_double_sums(
    v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, row_mask, C, G, D, S, first, last,
    HAS_V: tl.constexpr, HAS_VWEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of ``tl_tile_sums`` over blocks of a row."""
    s0, s1, s2 = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
    s3, s4 = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
    s5, s6 = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        start = block * BLOCK_C
        mask = row_mask[:, None] & ((start + tl.arange(0, BLOCK_C)) < C)[None, :]
        unit, u, _, weighted, v, vweight = tl_tile(
            v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, start, row_mask, mask, C, G, D, S,
            HAS_V, HAS_VWEIGHT, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        t0, t1, t2, t3, t4, t5, t6 = tl_tile_sums(unit, u, weighted, v, vweight)
        s0, s1, s2, s3, s4, s5, s6 = s0 + t0, s1 + t1, s2 + t2, s3 + t3, s4 + t4, s5 + t5, s6 + t6
    return s0, s1, s2, s3, s4, s5, s6


@group_kernel
def _double_sums_kernel(
    v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, N, C, G, D, S, splits,
    blocks_per_split,
    HAS_V: tl.constexpr, HAS_VWEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's sums, (7, N, splits)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    s0, s1, s2, s3, s4, s5, s6 = tl_double_sums(
        v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None],
        tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None], rows, row_mask, C, G, D, S,
        tl_first_block(blocks_per_split, WHOLE_ROW), tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW),
        HAS_V, HAS_VWEIGHT, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    plane = N.to(tl.int64) * splits
    tl_store_partial(sums_ptr, rows, row_mask, splits, s0)
    tl_store_partial(sums_ptr + plane, rows, row_mask, splits, s1)
    tl_store_partial(sums_ptr + 2 * plane, rows, row_mask, splits, s2)
    tl_store_partial(sums_ptr + 3 * plane, rows, row_mask, splits, s3)
    tl_store_partial(sums_ptr + 4 * plane, rows, row_mask, splits, s4)
    tl_store_partial(sums_ptr + 5 * plane, rows, row_mask, splits, s5)
    tl_store_partial(sums_ptr + 6 * plane, rows, row_mask, splits, s6)


@triton.jit
def tl_split_sums(sums_ptr, rows, row_mask, N, splits, BLOCK_S: tl.constexpr):
    """The seven sums of rows from those of their splits."""
    plane = N.to(tl.int64) * splits
    return (
        tl_sum_partials(sums_ptr, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + plane, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + 2 * plane, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + 3 * plane, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + 4 * plane, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + 5 * plane, rows, row_mask, splits, BLOCK_S),
        tl_sum_partials(sums_ptr + 6 * plane, rows, row_mask, splits, BLOCK_S),
    )


@triton.jit
def tl_write_tile(
    unit, u, weight, v, vweight, m0, m1, m2, m3, m4, m5, m6, r, vbias_ptr, du_ptr, dx_ptr, rows, start, row_mask, mask,
    C, G, D, S,
    HAS_VBIAS: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes du and dx of a tile from the means m0 to m6 of its rows, in the order of ``tl_tile_sums``; r P(v)."""
    columns = start + tl.arange(0, BLOCK_C)
    m0, m1, m2, m3 = m0[:, None], m1[:, None], m2[:, None], m3[:, None]
    m4, m5, m6 = m4[:, None], m5[:, None], m6[:, None]
    projected = (v - m3 - unit * m4) * r
    du = weight * projected + vweight * unit
    if HAS_VBIAS:
        du += tl_coefficient(vbias_ptr, rows, start, G, D, S, row_mask, mask, KIND, ACC, BLOCK_C)
    tl_store(du_ptr, rows, C, columns, mask, du, ALIGN)
    # dx as a combination of u, x̂, v and 1
    by_unit = r * r * (2.0 * m1 * m4 - (m2 - m0 * m3 - m1 * m4)) - r * m6
    by_one = r * r * (m4 * m0 + m1 * m3) - r * m5
    by_u = r * vweight - (r * r * m4) * weight
    tl_store(dx_ptr, rows, C, columns, mask, u * by_u + unit * by_unit - v * (r * r * m1) + by_one, ALIGN)
    return projected


@group_kernel
def _double_backward_kernel(
    v_ptr, vweight_ptr, vbias_ptr, u_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, du_ptr, dx_ptr, sums_ptr, dweight_ptr,
    v_mean_ptr, vx_mean_ptr, N, C, G, D, S, splits, blocks_per_split, row_blocks,
    HAS_V: tl.constexpr, HAS_VWEIGHT: tl.constexpr, HAS_VBIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    AFFINE: tl.constexpr, KEEP_MEANS: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """du and dx; with AFFINE, also this program's strip of dweight, over ``row_blocks`` tiles of whole rows."""
    C = tl_aligned(C, ALIGN)
    K = C.to(ACC)
    if AFFINE:
        dweight = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    # A constant 1 where there is nothing to add up: the compiler then removes the loop.
    for row_block in range(0, row_blocks if AFFINE else 1):
        row_tile = tl.program_id(0).to(tl.int64) * (row_blocks if AFFINE else 1) + row_block
        rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < N
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
        r = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if WHOLE_ROW:  # v, u and x are read once
            mask = row_mask[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
            unit, u, weight, weighted, v, vweight = tl_tile(
                v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, 0, row_mask, mask, C, G, D, S,
                HAS_V, HAS_VWEIGHT, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            s0, s1, s2, s3, s4, s5, s6 = tl_tile_sums(unit, u, weighted, v, vweight)
            s0, s1, s2, s3, s4, s5, s6 = s0 / K, s1 / K, s2 / K, s3 / K, s4 / K, s5 / K, s6 / K
            projected = tl_write_tile(
                unit, u, weight, v, vweight, s0, s1, s2, s3, s4, s5, s6, r, vbias_ptr, du_ptr, dx_ptr, rows, 0,
                row_mask, mask, C, G, D, S, HAS_VBIAS, KIND, ACC, ALIGN, BLOCK_C,
            )  # fmt: skip
            if AFFINE:
                dweight += u * projected
        else:
            if SPLIT:
                s0, s1, s2, s3, s4, s5, s6 = tl_split_sums(sums_ptr, rows, row_mask, N, splits, BLOCK_S)
            else:
                s0, s1, s2, s3, s4, s5, s6 = tl_double_sums(
                    v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, row_mask, C, G, D, S, 0,
                    tl_block_count(C, BLOCK_C, WHOLE_ROW), HAS_V, HAS_VWEIGHT, HAS_WEIGHT, KIND, ACC, ALIGN,
                    BLOCK_N, BLOCK_C,
                )  # fmt: skip
            # Each sum is used once: a compiler pass over loops that reduce takes it for granted.
            s0, s1, s2, s3, s4, s5, s6 = s0 / K, s1 / K, s2 / K, s3 / K, s4 / K, s5 / K, s6 / K
            first = tl_first_block(blocks_per_split, WHOLE_ROW)
            for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
                start = block * BLOCK_C
                mask = row_mask[:, None] & ((start + tl.arange(0, BLOCK_C)) < C)[None, :]
                unit, u, weight, weighted, v, vweight = tl_tile(
                    v_ptr, vweight_ptr, u_ptr, x_ptr, weight_ptr, mean, r, rows, start, row_mask, mask, C, G, D, S,
                    HAS_V, HAS_VWEIGHT, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
                )  # fmt: skip
                tl_write_tile(
                    unit, u, weight, v, vweight, s0, s1, s2, s3, s4, s5, s6, r, vbias_ptr, du_ptr,
                    dx_ptr, rows, start, row_mask, mask, C, G, D, S, HAS_VBIAS, KIND, ACC, ALIGN, BLOCK_C,
                )  # fmt: skip
        if KEEP_MEANS:
            first_program = row_mask & (tl.program_id(1) == 0)
            tl.store(v_mean_ptr + rows, s3, mask=first_program)
            tl.store(vx_mean_ptr + rows, s4, mask=first_program)
    if AFFINE:
        columns = tl.arange(0, BLOCK_C)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * C + columns, tl.sum(dweight, 0), mask=columns < C)


def group_norm_double_backward(
    v: Tensor | None,
    vweight: Tensor | None,
    vbias: Tensor | None,
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dx, and dweight if asked for. Without v dweight is zero."""
    summed = weight_gradient and v is not None
    p = plan_rows(x, groups, channel_sums=summed)
    launch = p.launch
    du, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    dweight = mean.new_zeros(x.shape[1] if weight_gradient else 0)
    if launch.N == 0:
        return du, dx, dweight
    sums = p.scratch(mean, 7)
    strips = mean.new_empty((1, p.strips, launch.C if p.strips else 0))
    means = mean.new_empty((2, launch.N if summed and not p.strips else 0))
    present = {"HAS_V": v is not None, "HAS_VWEIGHT": vweight is not None, "HAS_WEIGHT": weight is not None}
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(x):
        if p.split:
            _double_sums_kernel[(launch.row_blocks, launch.splits)](
                v, vweight, u, x, weight, mean, rstd, sums, *p.sizes, launch.splits, launch.blocks_per_split,
                KIND=p.kind, ACC=accumulator(x), **present, **launch.options,
            )  # fmt: skip
        _double_backward_kernel[(p.strips, 1) if p.strips else grid](
            v, vweight, vbias, u, x, weight, mean, rstd, du, dx, sums, strips, means[0], means[1], *p.sizes,
            launch.splits, blocks, p.row_blocks, HAS_VBIAS=vbias is not None, AFFINE=p.strips > 0,
            KEEP_MEANS=means.numel() > 0, KIND=p.kind, SPLIT=p.split, ACC=accumulator(x), BLOCK_S=MAX_SPLITS,
            **present, **launch.options,
        )  # fmt: skip
        if summed and v is not None:
            if p.strips:
                dweight = sum_strips(strips)[0]
            else:
                dweight = double_backward_channel_sums(u, x, v, mean, rstd, means[0], means[1])
    return du, dx, dweight
