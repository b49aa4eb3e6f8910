"""Triton kernels of the backward of a group norm; group_norm.py holds the formulas."""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_sums import backward_channel_sums, sum_strips
from .group_rows import group_kernel, plan_rows, tl_cotangent
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
def tl_backward_sums(
    u_ptr, x_ptr, weight_ptr, rows, row_mask, mean, r, C, G, D, S, first, last,
    HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ u_w and Σ u_w x̂ over blocks of a row."""
    of_u = tl.zeros((BLOCK_N,), ACC)
    of_ux = tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        unit = (tl_load(x_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN) - mean) * r
        _, _, weighted = tl_cotangent(
            u_ptr, weight_ptr, rows, block * BLOCK_C, row_mask, mask, C, G, D, S, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_C
        )
        of_u += tl.sum(weighted, 1)
        of_ux += tl.sum(weighted * unit, 1)
    return of_u, of_ux


@group_kernel
def _backward_sums_kernel(
    u_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, of_u_ptr, of_ux_ptr, N, C, G, D, S, splits, blocks_per_split,
    HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's sums of a backward."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    of_u, of_ux = tl_backward_sums(
        u_ptr, x_ptr, weight_ptr, rows, row_mask, tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None],
        tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None], C, G, D, S,
        tl_first_block(blocks_per_split, WHOLE_ROW), tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW),
        HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    tl_store_partial(of_u_ptr, rows, row_mask, splits, of_u)
    tl_store_partial(of_ux_ptr, rows, row_mask, splits, of_ux)


@triton.jit
def tl_write_gradient(
    weighted, unit, mean_u, mean_ux, r, added_ptr, gx_ptr, rows, start, mask, C,
    ADD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx = r (u_w − mean(u_w) − x̂ mean(u_w x̂)) + x_cotangent."""
    gx = (weighted - mean_u[:, None] - unit * mean_ux[:, None]) * r
    columns = start + tl.arange(0, BLOCK_C)
    if ADD:
        gx += tl_load(added_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN)
    tl_store(gx_ptr, rows, C, columns, mask, gx, ALIGN)


@group_kernel
def _backward_kernel(
    u_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, added_ptr, gx_ptr, of_u_ptr, of_ux_ptr, gweight_ptr, gbias_ptr,
    N, C, G, D, S, splits, blocks_per_split, row_blocks,
    HAS_WEIGHT: tl.constexpr, ADD: tl.constexpr, AFFINE: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """gx; with AFFINE, also this program's strip of gweight and gbias, over ``row_blocks`` tiles of whole rows."""
    C = tl_aligned(C, ALIGN)
    K = C.to(ACC)
    if AFFINE:
        gweight = tl.zeros((BLOCK_N, BLOCK_C), ACC)
        gbias = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    # A constant 1 where there is nothing to add up: the compiler then removes the loop.
    for row_block in range(0, row_blocks if AFFINE else 1):
        tile = tl.program_id(0).to(tl.int64) * (row_blocks if AFFINE else 1) + row_block
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < N
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
        r = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if WHOLE_ROW:  # u and x are read once
            mask = row_mask[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
            unit = (tl_load(x_ptr, rows, C, tl.arange(0, BLOCK_C), mask, 0.0, ACC, ALIGN) - mean) * r
            u, _, weighted = tl_cotangent(
                u_ptr, weight_ptr, rows, 0, row_mask, mask, C, G, D, S, HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_C
            )
            tl_write_gradient(
                weighted, unit, tl.sum(weighted, 1) / K, tl.sum(weighted * unit, 1) / K, r, added_ptr, gx_ptr, rows, 0,
                mask, C, ADD, ACC, ALIGN, BLOCK_C,
            )  # fmt: skip
            if AFFINE:
                gweight += u * unit
                gbias += u
        else:
            if SPLIT:
                of_u = tl_sum_partials(of_u_ptr, rows, row_mask, splits, BLOCK_S)
                of_ux = tl_sum_partials(of_ux_ptr, rows, row_mask, splits, BLOCK_S)
            else:
                of_u, of_ux = tl_backward_sums(
                    u_ptr, x_ptr, weight_ptr, rows, row_mask, mean, r, C, G, D, S, 0,
                    tl_block_count(C, BLOCK_C, WHOLE_ROW), HAS_WEIGHT, KIND, ACC, ALIGN, BLOCK_N, BLOCK_C,
                )  # fmt: skip
            # Each sum is used once: a compiler pass over loops that reduce takes it for granted.
            of_u, of_ux = of_u / K, of_ux / K
            first = tl_first_block(blocks_per_split, WHOLE_ROW)
            for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
                columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
                mask = row_mask[:, None] & (columns < C)[None, :]
                unit = (tl_load(x_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN) - mean) * r
                _, _, weighted = tl_cotangent(
                    u_ptr, weight_ptr, rows, block * BLOCK_C, row_mask, mask, C, G, D, S, HAS_WEIGHT, KIND, ACC,
                    ALIGN, BLOCK_C,
                )  # fmt: skip
                tl_write_gradient(
                    weighted, unit, of_u, of_ux, r, added_ptr, gx_ptr, rows, block * BLOCK_C, mask, C,
                    ADD, ACC, ALIGN, BLOCK_C,
                )  # fmt: skip
    if AFFINE:
        columns = tl.arange(0, BLOCK_C)
        strip = tl.program_id(0).to(tl.int64) * C + columns
        tl.store(gweight_ptr + strip, tl.sum(gweight, 0), mask=columns < C)
        tl.store(gbias_ptr + strip, tl.sum(gbias, 0), mask=columns < C)


def group_norm_backward(
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_cotangent: Tensor | None,
    groups: int,
    affine_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """gx, and gweight and gbias if asked for."""
    p = plan_rows(x, groups, channel_sums=affine_gradient)
    launch = p.launch
    gx = x.new_empty(x.shape)
    if launch.N == 0:
        gweight, gbias = mean.new_zeros((2, x.shape[1] if affine_gradient else 0)).unbind()
        return gx, gweight, gbias
    scratch = p.scratch(mean, 2)
    strips = mean.new_empty((2, p.strips, launch.C if p.strips else 0))
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(x):
        if p.split:
            _backward_sums_kernel[(launch.row_blocks, launch.splits)](
                u, x, weight, mean, rstd, scratch[0], scratch[1], *p.sizes, launch.splits, launch.blocks_per_split,
                HAS_WEIGHT=weight is not None, KIND=p.kind, ACC=accumulator(x), **launch.options,
            )  # fmt: skip
        _backward_kernel[(p.strips, 1) if p.strips else grid](
            u, x, weight, mean, rstd, x_cotangent, gx, scratch[0], scratch[1], strips[0], strips[1], *p.sizes,
            launch.splits, blocks, p.row_blocks, HAS_WEIGHT=weight is not None, ADD=x_cotangent is not None,
            AFFINE=p.strips > 0, KIND=p.kind, SPLIT=p.split, ACC=accumulator(x), BLOCK_S=MAX_SPLITS, **launch.options,
        )  # fmt: skip
        if not affine_gradient:
            gweight, gbias = mean.new_empty((2, 0)).unbind()
        elif p.strips:
            gweight, gbias = sum_strips(strips)
        else:
            gweight, gbias = backward_channel_sums(u, x, mean, rstd)
    return gx, gweight, gbias
