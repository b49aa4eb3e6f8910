"""Triton kernels of the p-norm, to a power, of (N, D) rows.

With n = ‖x‖ₚ, r = n^k, u = ∇n, g the cotangent of r and v the cotangent of the backward's result:

    forward            n = m (Σ (|xᵢ|/m)^p)^(1/p),  m = max |xᵢ|;  r = n^k
    backward           gx = g k n^(k−1) u
    double backward    dg = k n^(k−1) (u·v),
                       dx = g k n^(k−1) [(p−1) w v + (k−p) (u·v) u] / n,   w = (|x|/n)^(p−2), 0 where x = 0

    p = 2: u = x/n, w = 1.   p = 1: u = sign x.   p = ∞: u = sign(x) [|x| = n] / ties.
    For p = 1 and p = ∞ the bracket is (k−1) (u·v) u. Otherwise u = sign(x) (|x|/n)^(p−1).

At n = 0 all derivatives are 0, except for p = k = 2, where r = Σ x² is smooth: dx = 2 g v. Only quotients |x|/m and x/n
are raised to powers, so nothing overflows or underflows on the way to a representable result.

The forward keeps (m, t), t = Σ (|xᵢ|/m)^p, while it reads blocks of a long row; when m becomes m', t becomes
t (m/m')^p. For p = 1, t is Σ |xᵢ| and needs no m. For p = ∞, t counts the coordinates at m, and a NaN makes it NaN.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .norm import tl_direction, tl_dx, tl_load_saved, tl_merge, tl_slope, tl_store_forward, tl_terms
from .rows import (
    MAX_SPLITS,
    accumulator,
    float_pair,
    plan,
    row_kernel,
    tl_aligned,
    tl_block_count,
    tl_columns,
    tl_first_block,
    tl_float,
    tl_last_block,
    tl_load,
    tl_load_partials,
    tl_rows,
    tl_store,
    tl_store_partial,
    tl_sum_partials,
)


@triton.jit
def tl_dot(
    v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, divisor, ties, p, D, first, last,
    P: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """u·v over blocks of a row."""
    uv = tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < D)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, 0.0, ACC, ALIGN)
        v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
        uv += tl.sum(tl_direction(x, divisor, ties, p, P) * v, 1)
    return uv


@row_kernel
def _forward_kernel(
    x_ptr, x_row_stride, result_ptr, saved_ptr, partial_ptr, N, D, splits, blocks_per_split,
    p_high, p_low, power_high, power_low,
    P: tl.constexpr, POWER: tl.constexpr, SAVED_COLUMNS: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    D = tl_aligned(D, ALIGN)
    p = tl_float(p_high, p_low, ACC)
    m = tl.zeros((BLOCK_N,), ACC)
    t = tl.zeros((BLOCK_N,), ACC)
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    for block in range(first, tl_last_block(blocks_per_split, D, BLOCK_C, WHOLE_ROW)):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < D)[None, :]
        magnitude = tl.abs(tl_load(x_ptr, rows, x_row_stride, columns, mask, 0.0, ACC, ALIGN))
        new_m = m if P == "one" else tl.maximum(m, tl.max(magnitude, 1))
        t = tl_merge(t, m, new_m, p, P) + tl.sum(tl_terms(magnitude, mask, new_m[:, None], p, P), 1)
        m = new_m
    if SPLIT:
        tl_store_partial(partial_ptr, rows, row_mask, splits, m)
        tl_store_partial(partial_ptr + N.to(tl.int64) * splits, rows, row_mask, splits, t)
    else:
        tl_store_forward(
            result_ptr, saved_ptr, rows, row_mask, m, t, p, power_high, power_low, P, POWER, SAVED_COLUMNS
        )  # fmt: skip


@row_kernel
def _merge_kernel(
    result_ptr, saved_ptr, partial_ptr, N, splits, p_high, p_low, power_high, power_low,
    P: tl.constexpr, POWER: tl.constexpr, SAVED_COLUMNS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The norm of rows from the states of their splits."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    p = tl_float(p_high, p_low, ACC)
    maxima = tl_load_partials(partial_ptr, rows, row_mask, splits, 0.0, BLOCK_S)
    t = tl_load_partials(partial_ptr + N.to(tl.int64) * splits, rows, row_mask, splits, 0.0, BLOCK_S)
    m = tl.max(maxima, 1)
    t = tl.sum(tl_merge(t, maxima, m[:, None], p, P), 1)
    tl_store_forward(result_ptr, saved_ptr, rows, row_mask, m, t, p, power_high, power_low, P, POWER, SAVED_COLUMNS)


@row_kernel
def _backward_kernel(
    g_ptr, g_stride, x_ptr, x_row_stride, saved_ptr, gx_ptr, N, D, blocks_per_split,
    p_high, p_low, power_high, power_low,
    P: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    D = tl_aligned(D, ALIGN)
    p, k = tl_float(p_high, p_low, ACC), tl_float(power_high, power_low, ACC)
    n, divisor, ties = tl_load_saved(saved_ptr, rows, row_mask, P)
    g = tl.load(g_ptr + rows * g_stride, mask=row_mask, other=0.0).to(ACC)
    factor = (g * tl_slope(n, k, power_high, power_low, POWER))[:, None]
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    for block in range(first, tl_last_block(blocks_per_split, D, BLOCK_C, WHOLE_ROW)):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < D)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, 0.0, ACC, ALIGN)
        tl_store(gx_ptr, rows, D, columns, mask, factor * tl_direction(x, divisor, ties, p, P), ALIGN)


@row_kernel
def _sum_kernel(
    v_ptr, v_row_stride, x_ptr, x_row_stride, saved_ptr, partial_ptr, N, D, splits, blocks_per_split, p_high, p_low,
    P: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's part of u·v."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    D = tl_aligned(D, ALIGN)
    _, divisor, ties = tl_load_saved(saved_ptr, rows, row_mask, P)
    uv = tl_dot(
        v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, divisor, ties, tl_float(p_high, p_low, ACC), D,
        tl_first_block(blocks_per_split, WHOLE_ROW), tl_last_block(blocks_per_split, D, BLOCK_C, WHOLE_ROW),
        P, ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    tl_store_partial(partial_ptr, rows, row_mask, splits, uv)


@row_kernel
def _double_backward_kernel(
    v_ptr, v_row_stride, g_ptr, g_stride, x_ptr, x_row_stride, saved_ptr, partial_ptr, dg_ptr, dx_ptr,
    N, D, splits, blocks_per_split, p_high, p_low, power_high, power_low,
    P: tl.constexpr, POWER: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    D = tl_aligned(D, ALIGN)
    p, k = tl_float(p_high, p_low, ACC), tl_float(power_high, power_low, ACC)
    n, divisor, ties = tl_load_saved(saved_ptr, rows, row_mask, P)
    g = tl.load(g_ptr + rows * g_stride, mask=row_mask, other=0.0).to(ACC)
    slope = tl_slope(n, k, power_high, power_low, POWER)
    if WHOLE_ROW:  # x and v are read once
        columns = tl_columns(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < D)[None, :]
        x = tl_load(x_ptr, rows, x_row_stride, columns, mask, 0.0, ACC, ALIGN)
        v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
        uv = tl.sum(tl_direction(x, divisor, ties, p, P) * v, 1)
        dx = tl_dx(x, v, g, n, divisor, ties, slope, uv, p, k, P, POWER)
        tl_store(dx_ptr, rows, D, columns, mask, dx, ALIGN)
    else:
        if SPLIT:
            uv = tl_sum_partials(partial_ptr, rows, row_mask, splits, BLOCK_S)
        else:
            uv = tl_dot(
                v_ptr, v_row_stride, x_ptr, x_row_stride, rows, row_mask, divisor, ties, p, D,
                0, tl_block_count(D, BLOCK_C, WHOLE_ROW), P, ACC, ALIGN, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        first = tl_first_block(blocks_per_split, WHOLE_ROW)
        for block in range(first, tl_last_block(blocks_per_split, D, BLOCK_C, WHOLE_ROW)):
            columns = tl_columns(block, BLOCK_C)
            mask = row_mask[:, None] & (columns < D)[None, :]
            x = tl_load(x_ptr, rows, x_row_stride, columns, mask, 0.0, ACC, ALIGN)
            v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
            dx = tl_dx(x, v, g, n, divisor, ties, slope, uv, p, k, P, POWER)
            tl_store(dx_ptr, rows, D, columns, mask, dx, ALIGN)
    tl.store(dg_ptr + rows, (slope * uv).to(dg_ptr.dtype.element_ty), mask=row_mask & (tl.program_id(1) == 0))


def _modes(p: float, power: float) -> dict[str, str]:
    """Which code is compiled: the common cases have their own, all others share one and take p and power as numbers."""
    return {
        "P": {1.0: "one", 2.0: "two", math.inf: "inf"}.get(p, "general"),
        "POWER": {1.0: "one", 2.0: "two"}.get(power, "general"),
    }


def _numbers(p: float, power: float) -> tuple[float, float, float, float]:
    return *float_pair(p if math.isfinite(p) else 1.0), *float_pair(power)


def gradient_norm(x: Tensor, p: float, power: float, full_precision: bool) -> tuple[Tensor, Tensor]:
    """r of each row; and in the accumulation dtype n as (N, 1), for p = ∞ n and the number of ties as (N, 2).

    (N, 0) where r is n, in the accumulation dtype.
    """
    launch = plan(x)
    N, D = launch.N, launch.C
    accumulated = accumulation_dtype(x.dtype)
    result = x.new_empty(N, dtype=accumulated if full_precision else x.dtype)
    is_norm = power == 1 and result.dtype == accumulated
    saved = x.new_empty((N, 2 if math.isinf(p) else 0 if is_norm else 1), dtype=accumulated)
    if N == 0:
        return result, saved
    split = launch.splits > 1
    scratch = x.new_empty((2, N, launch.splits) if split else 0, dtype=accumulated)
    modes = _modes(p, power) | {"SAVED_COLUMNS": saved.shape[1], "ACC": accumulator(x)}
    with torch.cuda.device_of(x):
        _forward_kernel[(launch.row_blocks, launch.splits)](
            x, x.stride(0), result, saved, scratch, N, D, launch.splits, launch.blocks_per_split,
            *_numbers(p, power), SPLIT=split, **modes, **launch.options,
        )  # fmt: skip
        if split:
            _merge_kernel[(N,)](
                result, saved, scratch, N, launch.splits, *_numbers(p, power), BLOCK_N=1, BLOCK_S=MAX_SPLITS, **modes
            )
    return result, saved


def gradient_norm_backward(g: Tensor, x: Tensor, saved: Tensor, p: float, power: float) -> Tensor:
    """gx = g k n^(k−1) u."""
    launch = plan(x)
    gx = x.new_empty(x.shape)
    if launch.N == 0:
        return gx
    with torch.cuda.device_of(x):
        _backward_kernel[launch.write_grid](
            g, g.stride(0), x, x.stride(0), saved, gx, launch.N, launch.C, launch.write_blocks, *_numbers(p, power),
            ACC=accumulator(x), **_modes(p, power), **launch.options,
        )  # fmt: skip
    return gx


def gradient_norm_double_backward(
    v: Tensor, g: Tensor, x: Tensor, saved: Tensor, p: float, power: float
) -> tuple[Tensor, Tensor]:
    """dg = k n^(k−1) (u·v) and dx, as above."""
    modes, numbers = _modes(p, power), _numbers(p, power)
    launch = plan(x, v, heavy=modes["P"] != "two")
    N, D = launch.N, launch.C
    dg, dx = g.new_empty(N), x.new_empty(x.shape)
    if N == 0:
        return dg, dx
    split = launch.splits > 1
    scratch = saved.new_empty((N, launch.splits) if split else 0)
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(x):
        if split:
            _sum_kernel[(N, launch.splits)](
                v, v.stride(0), x, x.stride(0), saved, scratch, N, D, launch.splits, launch.blocks_per_split,
                *numbers[:2], P=modes["P"], ACC=accumulator(x), **launch.options,
            )  # fmt: skip
        _double_backward_kernel[grid](
            v, v.stride(0), g, g.stride(0), x, x.stride(0), saved, scratch, dg, dx, N, D, launch.splits, blocks,
            *numbers, SPLIT=split, ACC=accumulator(x), BLOCK_S=MAX_SPLITS, **modes, **launch.options,
        )  # fmt: skip
    return dg, dx
