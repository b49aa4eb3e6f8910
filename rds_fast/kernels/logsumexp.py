"""Triton kernels of the log-sum-exp of (N, C) rows.

With l = log Σ exp xᵢ, s = exp(x − l), g the cotangent of l and v the cotangent of the backward's result:

    forward            l = m + log Σ exp(xᵢ − m),  m = max xᵢ
    backward           gx = g s
    double backward    dg = Σ v s,   dx = g s (v − Σ v s)

The forward keeps (m, Σ exp(xᵢ − m)) while it reads blocks of a long row. Two such states (m, a), (m', a') merge into
(M, a exp(m − M) + a' exp(m' − M)), M = max(m, m'). Where M is infinite, 0 is subtracted instead: (−inf) − (−inf) would
be NaN, and the log-sum-exp of a row of −inf is −inf. The backwards need no special case: exp(x − l) is 0 for
x = −inf beside finite values, and NaN where PyTorch's is.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .rows import (
    MAX_SPLITS,
    accumulator,
    plan,
    row_kernel,
    tl_aligned,
    tl_block_count,
    tl_columns,
    tl_finite,
    tl_first_block,
    tl_last_block,
    tl_load,
    tl_load_partials,
    tl_rows,
    tl_store,
    tl_store_partial,
    tl_sum_partials,
)


@row_kernel
def _forward_kernel(
    x_ptr, x_row_stride, result_ptr, saved_ptr, max_ptr, sum_ptr, N, C, splits, blocks_per_split,
    SAVE: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    largest = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    last = tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
        new_largest = tl.maximum(largest, tl.max(x, 1))
        reference = tl_finite(new_largest)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(x - reference[:, None]), 1)
        largest = new_largest
    if SPLIT:
        tl_store_partial(max_ptr, rows, row_mask, splits, largest)
        tl_store_partial(sum_ptr, rows, row_mask, splits, total)
    else:
        lse = tl_finite(largest) + tl.log(total)
        tl.store(result_ptr + rows, lse.to(result_ptr.dtype.element_ty), mask=row_mask)
        if SAVE:
            tl.store(saved_ptr + rows, lse, mask=row_mask)


@row_kernel
def _merge_kernel(
    result_ptr, saved_ptr, max_ptr, sum_ptr, N, splits,
    SAVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of rows from the states of their splits."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    maxima = tl_load_partials(max_ptr, rows, row_mask, splits, float("-inf"), BLOCK_S)
    sums = tl_load_partials(sum_ptr, rows, row_mask, splits, 0.0, BLOCK_S)
    reference = tl_finite(tl.max(maxima, 1))
    lse = reference + tl.log(tl.sum(sums * tl.exp(maxima - reference[:, None]), 1))
    tl.store(result_ptr + rows, lse.to(result_ptr.dtype.element_ty), mask=row_mask)
    if SAVE:
        tl.store(saved_ptr + rows, lse, mask=row_mask)


@row_kernel
def _backward_kernel(
    g_ptr, g_stride, x_ptr, x_row_stride, lse_ptr, gx_ptr, N, C, blocks_per_split,
    ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    g = tl.load(g_ptr + rows * g_stride, mask=row_mask, other=0.0).to(ACC)[:, None]
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    last = tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
        tl_store(gx_ptr, rows, C, columns, mask, g * tl.exp(x - lse), ALIGN)


@triton.jit
def tl_dot(
    v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, lse, C, first, last,
    ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ v s over blocks of a row."""
    total = tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
        v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
        total += tl.sum(v * tl.exp(x - lse), 1)
    return total


@row_kernel
def _sum_kernel(
    v_ptr, v_row_stride, x_ptr, x_row_stride, lse_ptr, sum_ptr, N, C, splits, blocks_per_split,
    ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's part of Σ v s."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    total = tl_dot(
        v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, lse, C,
        tl_first_block(blocks_per_split, WHOLE_ROW), tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW),
        ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    tl_store_partial(sum_ptr, rows, row_mask, splits, total)


@row_kernel
def _double_backward_kernel(
    v_ptr, v_row_stride, g_ptr, g_stride, x_ptr, x_row_stride, lse_ptr, sum_ptr, dg_ptr, dx_ptr,
    N, C, splits, blocks_per_split,
    SPLIT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    g = tl.load(g_ptr + rows * g_stride, mask=row_mask, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    if WHOLE_ROW:  # x and v are read once
        columns = tl_columns(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
        s = tl.exp(tl_load(x_ptr, rows, x_row_stride, columns, mask, float("-inf"), ACC, ALIGN) - lse)
        dg = tl.sum(v * s, 1)
        tl_store(dx_ptr, rows, C, columns, mask, g[:, None] * s * (v - dg[:, None]), ALIGN)
    else:
        if SPLIT:
            dg = tl_sum_partials(sum_ptr, rows, row_mask, splits, BLOCK_S)
        else:
            dg = tl_dot(
                v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, lse, C,
                0, tl_block_count(C, BLOCK_C, WHOLE_ROW), ACC, ALIGN, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        first = tl_first_block(blocks_per_split, WHOLE_ROW)
        for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
            columns = tl_columns(block, BLOCK_C)
            mask = row_mask[:, None] & (columns < C)[None, :]
            v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
            x = tl_load(x_ptr, rows, x_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
            tl_store(dx_ptr, rows, C, columns, mask, g[:, None] * tl.exp(x - lse) * (v - dg[:, None]), ALIGN)
    tl.store(dg_ptr + rows, dg.to(dg_ptr.dtype.element_ty), mask=row_mask & (tl.program_id(1) == 0))


def logsumexp(x: Tensor, full_precision: bool) -> tuple[Tensor, Tensor]:
    """l of each row, and l in the accumulation dtype as (N, 1) where the result is rounded, else (N, 0)."""
    launch = plan(x)
    accumulated = accumulation_dtype(x.dtype)
    result = x.new_empty(launch.N, dtype=accumulated if full_precision else x.dtype)
    save = result.dtype != accumulated
    saved = x.new_empty((launch.N, int(save)), dtype=accumulated)
    if launch.N == 0:
        return result, saved
    split = launch.splits > 1
    scratch = x.new_empty((2, launch.N, launch.splits) if split else (2, 0), dtype=accumulated)
    with torch.cuda.device_of(x):
        _forward_kernel[(launch.row_blocks, launch.splits)](
            x, x.stride(0), result, saved, scratch[0], scratch[1], launch.N, launch.C, launch.splits,
            launch.blocks_per_split, SAVE=save, SPLIT=split, ACC=accumulator(x), **launch.options,
        )  # fmt: skip
        if split:
            _merge_kernel[(launch.N,)](
                result, saved, scratch[0], scratch[1], launch.N, launch.splits,
                SAVE=save, BLOCK_N=1, BLOCK_S=MAX_SPLITS,
            )  # fmt: skip
    return result, saved


def logsumexp_backward(g: Tensor, x: Tensor, lse: Tensor) -> Tensor:
    """gx = g s."""
    launch = plan(x)
    gx = x.new_empty(x.shape)
    if launch.N == 0:
        return gx
    with torch.cuda.device_of(x):
        _backward_kernel[launch.write_grid](
            g, g.stride(0), x, x.stride(0), lse, gx, launch.N, launch.C, launch.write_blocks,
            ACC=accumulator(x), **launch.options,
        )  # fmt: skip
    return gx


def logsumexp_double_backward(v: Tensor, g: Tensor, x: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dg = Σ v s and dx = g s (v − Σ v s)."""
    launch = plan(x, v)
    dg, dx = g.new_empty(launch.N), x.new_empty(x.shape)
    if launch.N == 0:
        return dg, dx
    split = launch.splits > 1
    scratch = lse.new_empty((launch.N, launch.splits) if split else 0)
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(x):
        if split:
            _sum_kernel[(launch.row_blocks, launch.splits)](
                v, v.stride(0), x, x.stride(0), lse, scratch, launch.N, launch.C, launch.splits,
                launch.blocks_per_split, ACC=accumulator(x), **launch.options,
            )  # fmt: skip
        _double_backward_kernel[grid](
            v, v.stride(0), g, g.stride(0), x, x.stride(0), lse, scratch, dg, dx, launch.N, launch.C, launch.splits,
            blocks, SPLIT=split, ACC=accumulator(x), BLOCK_S=MAX_SPLITS, **launch.options,
        )  # fmt: skip
    return dg, dx
