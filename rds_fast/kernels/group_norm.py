"""Triton kernels of layer, group and instance norm: rows normalised by their own mean and variance.

With x̂ = (x − mean) r, r = (var + eps)^−½, u_w = weight u and P(t) = t − mean(t) − x̂ mean(t x̂) over the row:

    forward            y = weight x̂ + bias
    backward           gx = r P(u_w) + x_cotangent
    double backward    du = weight r P(v) + vweight x̂ + vbias,
                       dx = −r² (c_uv x̂ + c_v P(u_w) + c_u P(v)) + r P(vweight u),
                       c_u = mean(u_w x̂), c_v = mean(v x̂), c_uv = mean(u_w v) − mean(u_w) mean(v) − c_u c_v

A row that fits a tile is read once. A longer one is read block by block, a first time for its sums, and cut over many
programs where rows are few, whose partial sums lie in a scratch buffer. The sums over channels, gweight, gbias and
dweight, lie across rows: where the rows of a layer norm fit a tile, each program adds up those of its own rows as it
goes, and else ``channel_sums.py`` reads the tensors once more.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .group_norm_backward import group_norm_backward
from .group_norm_double_backward import group_norm_double_backward
from .group_rows import group_kernel, plan_rows, tl_coefficient
from .rows import (
    MAX_SPLITS,
    accumulator,
    float_pair,
    tl_aligned,
    tl_block_count,
    tl_first_block,
    tl_float,
    tl_last_block,
    tl_load,
    tl_load_partials,
    tl_store,
    tl_store_partial,
)

__all__ = ["group_norm", "group_norm_backward", "group_norm_double_backward"]


@triton.jit
def tl_merge_moments(count, mean, squares, count_b, mean_b, squares_b):
    """Two (count, mean, Σ of squared deviations) as one."""
    total = count + count_b
    difference = mean_b - mean
    share = count_b / total
    return total, mean + difference * share, squares + squares_b + difference * difference * count * share


@triton.jit
def tl_moments(x, mask, count):
    """The mean of a tile's rows and Σ of squared deviations from it; deviations from the rounded mean correct both."""
    rough = tl.sum(x, 1) / count
    deviation = tl.where(mask, x - rough[:, None], 0.0)
    correction = tl.sum(deviation, 1) / count
    return rough + correction, tl.sum(deviation * deviation, 1) - correction * correction * count


@triton.jit
def tl_long_moments(
    x_ptr, rows, row_mask, C, first, last,
    ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and Σ of squared deviations over blocks of a row."""
    count = tl.zeros((BLOCK_N,), ACC)
    mean = tl.zeros((BLOCK_N,), ACC)
    squares = tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        x = tl_load(x_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN)
        values = tl.minimum(C - block * BLOCK_C, BLOCK_C).to(ACC)
        block_mean, block_squares = tl_moments(x, mask, values)
        count, mean, squares = tl_merge_moments(count, mean, squares, values, block_mean, block_squares)
    return mean, squares


@group_kernel
def _moments_kernel(
    x_ptr, mean_ptr, squares_ptr, N, C, splits, blocks_per_split,
    ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's mean and Σ of squared deviations."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    mean, squares = tl_long_moments(
        x_ptr, rows, row_mask, C, tl_first_block(blocks_per_split, WHOLE_ROW),
        tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW), ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    tl_store_partial(mean_ptr, rows, row_mask, splits, mean)
    tl_store_partial(squares_ptr, rows, row_mask, splits, squares)


@triton.jit
def tl_split_moments(
    mean_ptr, squares_ptr, rows, row_mask, C, splits, split_length, ACC: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean and Σ of squared deviations of rows from those of their splits."""
    begin = tl.arange(0, BLOCK_S).to(tl.int64) * split_length
    counts = tl.maximum(tl.minimum(C - begin, split_length), 0).to(ACC)[None, :]
    means = tl_load_partials(mean_ptr, rows, row_mask, splits, 0.0, BLOCK_S)
    squares = tl_load_partials(squares_ptr, rows, row_mask, splits, 0.0, BLOCK_S)
    mean = tl.sum(means * (counts / C.to(ACC)), 1)
    deviation = means - mean[:, None]
    return mean, tl.sum(squares, 1) + tl.sum(counts * deviation * deviation, 1)


@triton.jit
def tl_write_normalised(
    x, weight_ptr, bias_ptr, y_ptr, rows, start, row_mask, mask, mean, r, C, G, D, S,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    y = (x - mean[:, None]) * r[:, None]
    if HAS_WEIGHT:
        y *= tl_coefficient(weight_ptr, rows, start, G, D, S, row_mask, mask, KIND, ACC, BLOCK_C)
    if HAS_BIAS:
        y += tl_coefficient(bias_ptr, rows, start, G, D, S, row_mask, mask, KIND, ACC, BLOCK_C)
    tl_store(y_ptr, rows, C, start + tl.arange(0, BLOCK_C), mask, y, ALIGN)


@group_kernel
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, split_mean_ptr, split_squares_ptr, N, C, G, D, S,
    eps_high, eps_low, splits, split_length, blocks_per_split,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    eps = tl_float(eps_high, eps_low, ACC)
    if WHOLE_ROW:  # x is read once
        mask = row_mask[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
        x = tl_load(x_ptr, rows, C, tl.arange(0, BLOCK_C), mask, 0.0, ACC, ALIGN)
        mean, squares = tl_moments(x, mask, C.to(ACC))
        r = 1.0 / tl.sqrt(squares / C.to(ACC) + eps)
        tl_write_normalised(
            x, weight_ptr, bias_ptr, y_ptr, rows, 0, row_mask, mask, mean, r, C, G, D, S,
            HAS_WEIGHT, HAS_BIAS, KIND, ACC, ALIGN, BLOCK_C,
        )  # fmt: skip
    else:
        if SPLIT:
            mean, squares = tl_split_moments(
                split_mean_ptr, split_squares_ptr, rows, row_mask, C, splits, split_length, ACC, BLOCK_S
            )
        else:
            mean, squares = tl_long_moments(
                x_ptr, rows, row_mask, C, 0, tl_block_count(C, BLOCK_C, WHOLE_ROW), ACC, ALIGN, BLOCK_N, BLOCK_C
            )
        r = 1.0 / tl.sqrt(squares / C.to(ACC) + eps)
        first = tl_first_block(blocks_per_split, WHOLE_ROW)
        for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
            columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (columns < C)[None, :]
            x = tl_load(x_ptr, rows, C, columns, mask, 0.0, ACC, ALIGN)
            tl_write_normalised(
                x, weight_ptr, bias_ptr, y_ptr, rows, block * BLOCK_C, row_mask, mask, mean, r, C, G, D, S,
                HAS_WEIGHT, HAS_BIAS, KIND, ACC, ALIGN, BLOCK_C,
            )  # fmt: skip
    first_program = row_mask & (tl.program_id(1) == 0)
    tl.store(mean_ptr + rows, mean, mask=first_program)
    tl.store(rstd_ptr + rows, r, mask=first_program)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd."""
    p = plan_rows(x, groups, heavy=False)
    launch = p.launch
    y = x.new_empty(x.shape)
    mean, rstd = x.new_empty((2, launch.N), dtype=accumulation_dtype(x.dtype)).unbind()
    if launch.N == 0:
        return y, mean, rstd
    scratch = p.scratch(mean, 2)
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(x):
        if p.split:
            _moments_kernel[(launch.row_blocks, launch.splits)](
                x, scratch[0], scratch[1], launch.N, launch.C, launch.splits, launch.blocks_per_split,
                ACC=accumulator(x), **launch.options,
            )  # fmt: skip
        _forward_kernel[grid](
            x, weight, bias, y, mean, rstd, scratch[0], scratch[1], *p.sizes, *float_pair(eps), launch.splits,
            p.split_length, blocks, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, KIND=p.kind,
            SPLIT=p.split, ACC=accumulator(x), BLOCK_S=MAX_SPLITS, **launch.options,
        )  # fmt: skip
    return y, mean, rstd
