"""Triton kernels of the cross-entropy and the log-sum-exp of (N, C) logits, in one pass.

With f the logits, l = log Σ exp fᵢ, s = exp(f − l), q the target distribution (one-hot for class indices), ε the label
smoothing, q' = (1 − ε) q + ε/C (0 in an ignored row), Q = Σ q', g and h the cotangents of the cross-entropy and of l,
a = g Q + h, and v the cotangent of the backward's result:

    forward            ce = Σ q'ᵢ (l − fᵢ),  l
    backward           gf = a s − g q'
    double backward    dg = Q S − T,   dh = S,   df = a s (v − S),   where S = Σ v s, T = Σ v q'

The forward keeps (m, Σ exp(fᵢ − m), T = Σ q'ᵢ (fᵢ − m), Q), m the largest logit read. When m becomes m', T gains
Q (m − m'): both are negative, nothing cancels. Then ce = Q log Σ exp(fᵢ − m) − T: forming Q l − Σ q' f instead would
lose the digits that l and f have in common.

A class index outside [0, C) reads nothing (it is compared with column numbers), and makes its row's cross-entropy and
gradients NaN: Triton has no assertion that is always on.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .rows import (
    MAX_SPLITS,
    Launch,
    accumulator,
    float_pair,
    plan,
    row_kernel,
    tl_aligned,
    tl_block_count,
    tl_columns,
    tl_finite,
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
from .targets import tl_index, tl_store_forward, tl_sums, tl_target


@row_kernel
def _forward_kernel(
    logits_ptr, logits_row_stride, target_ptr, target_stride, ce_ptr, lse_ptr, saved_ptr, partial_ptr, N, C, splits,
    blocks_per_split, scale_high, scale_low, uniform_high, uniform_low, ignore_index,
    SAVE: tl.constexpr, SPLIT: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    scale, uniform = tl_float(scale_high, scale_low, ACC), tl_float(uniform_high, uniform_low, ACC)
    index, kept, outside = tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT)
    largest = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    T = tl.zeros((BLOCK_N,), ACC)
    Q = tl.zeros((BLOCK_N,), ACC)
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    last = tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        f = tl_load(logits_ptr, rows, logits_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
        q = tl_target(target_ptr, rows, target_stride, columns, mask, index, kept, scale, uniform, SOFT, ACC, ALIGN)
        new_largest = tl.maximum(largest, tl.max(f, 1))
        reference = tl_finite(new_largest)
        # 0 · (−inf) is no term for a class index, as for PyTorch; for probabilities it is NaN, as for PyTorch
        term = mask if SOFT else q != 0.0
        T += Q * (tl_finite(largest) - reference) + tl.sum(tl.where(term, q * (f - reference[:, None]), 0.0), 1)
        Q += tl.sum(q, 1)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(f - reference[:, None]), 1)
        largest = new_largest
    if SPLIT:
        size = N.to(tl.int64) * splits
        tl_store_partial(partial_ptr, rows, row_mask, splits, largest)
        tl_store_partial(partial_ptr + size, rows, row_mask, splits, total)
        tl_store_partial(partial_ptr + 2 * size, rows, row_mask, splits, T)
        tl_store_partial(partial_ptr + 3 * size, rows, row_mask, splits, Q)
    else:
        reference = tl_finite(largest)
        tl_store_forward(
            ce_ptr, lse_ptr, saved_ptr, rows, row_mask, reference, total, T, Q, kept, outside, SAVE
        )  # fmt: skip


@row_kernel
def _merge_kernel(
    target_ptr, target_stride, ce_ptr, lse_ptr, saved_ptr, partial_ptr, N, C, splits, ignore_index,
    SAVE: tl.constexpr, SOFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Both results of rows from the states of their splits."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    size = N.to(tl.int64) * splits
    _, kept, outside = tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT)
    maxima = tl_load_partials(partial_ptr, rows, row_mask, splits, float("-inf"), BLOCK_S)
    sums = tl_load_partials(partial_ptr + size, rows, row_mask, splits, 0.0, BLOCK_S)
    T = tl_load_partials(partial_ptr + 2 * size, rows, row_mask, splits, 0.0, BLOCK_S)
    Q = tl_load_partials(partial_ptr + 3 * size, rows, row_mask, splits, 0.0, BLOCK_S)
    reference = tl_finite(tl.max(maxima, 1))
    total = tl.sum(sums * tl.exp(maxima - reference[:, None]), 1)
    T = tl.sum(T + Q * (tl_finite(maxima) - reference[:, None]), 1)
    tl_store_forward(
        ce_ptr, lse_ptr, saved_ptr, rows, row_mask, reference, total, T, tl.sum(Q, 1), kept, outside, SAVE
    )  # fmt: skip


@row_kernel
def _sum_kernel(
    v_ptr, v_row_stride, logits_ptr, logits_row_stride, target_ptr, target_stride, lse_ptr, partial_ptr, N, C, splits,
    blocks_per_split, scale_high, scale_low, uniform_high, uniform_low, ignore_index,
    WITH_V: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's part of S, T and Q."""
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    scale, uniform = tl_float(scale_high, scale_low, ACC), tl_float(uniform_high, uniform_low, ACC)
    index, kept, _ = tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    S, T, Q = tl_sums(
        v_ptr, v_row_stride, logits_ptr, logits_row_stride, target_ptr, target_stride, rows, row_mask, index, kept,
        lse, scale, uniform, C, tl_first_block(blocks_per_split, WHOLE_ROW),
        tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW), WITH_V, SOFT, ACC, ALIGN, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    size = N.to(tl.int64) * splits
    tl_store_partial(partial_ptr, rows, row_mask, splits, Q)
    if WITH_V:
        tl_store_partial(partial_ptr + size, rows, row_mask, splits, S)
        tl_store_partial(partial_ptr + 2 * size, rows, row_mask, splits, T)


@row_kernel
def _backward_kernel(
    g_ce_ptr, g_ce_stride, g_lse_ptr, g_lse_stride, logits_ptr, logits_row_stride, target_ptr, target_stride, lse_ptr,
    partial_ptr, gx_ptr, N, C, splits, blocks_per_split, scale_high, scale_low, uniform_high, uniform_low, ignore_index,
    SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    scale, uniform = tl_float(scale_high, scale_low, ACC), tl_float(uniform_high, uniform_low, ACC)
    index, kept, outside = tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT)
    g_ce = tl.load(g_ce_ptr + rows * g_ce_stride, mask=row_mask, other=0.0).to(ACC)
    g_ce = tl.where(outside, float("nan"), g_ce)[:, None]
    g_lse = tl.load(g_lse_ptr + rows * g_lse_stride, mask=row_mask, other=0.0).to(ACC)[:, None]
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    Q = kept.to(ACC)[:, None]  # of a class index; of probabilities, below
    if SOFT and not WHOLE_ROW:
        Q = tl_sum_partials(partial_ptr, rows, row_mask, splits, BLOCK_S)[:, None]
    first = tl_first_block(blocks_per_split, WHOLE_ROW)
    for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        f = tl_load(logits_ptr, rows, logits_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
        q = tl_target(target_ptr, rows, target_stride, columns, mask, index, kept, scale, uniform, SOFT, ACC, ALIGN)
        row_Q = tl.sum(q, 1)[:, None] if SOFT and WHOLE_ROW else Q
        gx = (g_ce * row_Q + g_lse) * tl.exp(f - lse) - g_ce * q
        tl_store(gx_ptr, rows, C, columns, mask, gx, ALIGN)


@row_kernel
def _double_backward_kernel(
    v_ptr, v_row_stride, g_ce_ptr, g_ce_stride, g_lse_ptr, g_lse_stride, logits_ptr, logits_row_stride,
    target_ptr, target_stride, lse_ptr, partial_ptr, dg_ce_ptr, dg_lse_ptr, dx_ptr, N, C, splits, blocks_per_split,
    scale_high, scale_low, uniform_high, uniform_low, ignore_index,
    SPLIT: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl_rows(BLOCK_N)
    row_mask = rows < N
    C = tl_aligned(C, ALIGN)
    scale, uniform = tl_float(scale_high, scale_low, ACC), tl_float(uniform_high, uniform_low, ACC)
    index, kept, outside = tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT)
    g_ce = tl.load(g_ce_ptr + rows * g_ce_stride, mask=row_mask, other=0.0).to(ACC)
    g_lse = tl.load(g_lse_ptr + rows * g_lse_stride, mask=row_mask, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    if WHOLE_ROW:  # the logits and v are read once
        columns = tl_columns(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        q = tl_target(target_ptr, rows, target_stride, columns, mask, index, kept, scale, uniform, SOFT, ACC, ALIGN)
        v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
        Q, T = tl.sum(q, 1), tl.sum(v * q, 1)
        s = tl.exp(tl_load(logits_ptr, rows, logits_row_stride, columns, mask, float("-inf"), ACC, ALIGN) - lse)
        S = tl.sum(v * s, 1)
    elif SPLIT:
        size = N.to(tl.int64) * splits
        Q = tl_sum_partials(partial_ptr, rows, row_mask, splits, BLOCK_S)
        S = tl_sum_partials(partial_ptr + size, rows, row_mask, splits, BLOCK_S)
        T = tl_sum_partials(partial_ptr + 2 * size, rows, row_mask, splits, BLOCK_S)
    else:
        S, T, Q = tl_sums(
            v_ptr, v_row_stride, logits_ptr, logits_row_stride, target_ptr, target_stride, rows, row_mask, index, kept,
            lse, scale, uniform, C, 0, tl_block_count(C, BLOCK_C, WHOLE_ROW), True, SOFT, ACC, ALIGN, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    if not SOFT:
        Q = kept.to(ACC)
    a = tl.where(outside, float("nan"), g_ce * Q + g_lse)[:, None]
    if WHOLE_ROW:
        tl_store(dx_ptr, rows, C, columns, mask, a * s * (v - S[:, None]), ALIGN)
    else:
        first = tl_first_block(blocks_per_split, WHOLE_ROW)
        for block in range(first, tl_last_block(blocks_per_split, C, BLOCK_C, WHOLE_ROW)):
            columns = tl_columns(block, BLOCK_C)
            mask = row_mask[:, None] & (columns < C)[None, :]
            v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
            f = tl_load(logits_ptr, rows, logits_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
            tl_store(dx_ptr, rows, C, columns, mask, a * tl.exp(f - lse) * (v - S[:, None]), ALIGN)
    row_mask = row_mask & (tl.program_id(1) == 0)
    dg_ce = tl.where(outside, float("nan"), Q * S - T)
    tl.store(dg_ce_ptr + rows, dg_ce.to(dg_ce_ptr.dtype.element_ty), mask=row_mask)
    tl.store(dg_lse_ptr + rows, S.to(dg_lse_ptr.dtype.element_ty), mask=row_mask)


def _plan(target: Tensor, *tensors: Tensor) -> Launch:
    return plan(*tensors, target) if target.is_floating_point() else plan(*tensors)


def _smoothing(label_smoothing: float, C: int) -> tuple[float, float, float, float]:
    """scale = 1 − ε and uniform = ε/C of q' = scale q + uniform."""
    return *float_pair(1.0 - label_smoothing), *float_pair(label_smoothing / max(C, 1))


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, full_precision: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """ce and l of each row, and l in the accumulation dtype as (N, 1) where the result is rounded, else (N, 0)."""
    launch = _plan(target, logits)
    N, C = launch.N, launch.C
    accumulated = accumulation_dtype(logits.dtype)
    ce, lse = (logits.new_empty(N, dtype=accumulated if full_precision else logits.dtype) for _ in range(2))
    save = lse.dtype != accumulated
    saved = logits.new_empty((N, int(save)), dtype=accumulated)
    if N == 0:
        return ce, lse, saved
    split, soft = launch.splits > 1, target.is_floating_point()
    scratch = logits.new_empty((4, N, launch.splits) if split else 0, dtype=accumulated)
    with torch.cuda.device_of(logits):
        _forward_kernel[(launch.row_blocks, launch.splits)](
            logits, logits.stride(0), target, target.stride(0), ce, lse, saved, scratch, N, C, launch.splits,
            launch.blocks_per_split, *_smoothing(label_smoothing, C), ignore_index,
            SAVE=save, SPLIT=split, SOFT=soft, ACC=accumulator(logits), **launch.options,
        )  # fmt: skip
        if split:
            _merge_kernel[(N,)](
                target, target.stride(0), ce, lse, saved, scratch, N, C, launch.splits, ignore_index,
                SAVE=save, SOFT=soft, BLOCK_N=1, BLOCK_S=MAX_SPLITS,
            )  # fmt: skip
    return ce, lse, saved


def cross_entropy_backward(
    g_ce: Tensor, g_lse: Tensor, logits: Tensor, target: Tensor, lse: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """gf = (g_ce Q + g_lse) s − g_ce q'."""
    launch = _plan(target, logits)
    N, C, splits = launch.N, launch.C, launch.splits
    gx = logits.new_empty(logits.shape)
    if N == 0:
        return gx
    soft = target.is_floating_point()
    sums = soft and not launch.whole_row  # Q is needed before the first write
    scratch = lse.new_empty((N, splits) if sums else 0)
    smoothing = _smoothing(label_smoothing, C)
    with torch.cuda.device_of(logits):
        if sums:
            _sum_kernel[(N, splits)](
                logits, 0, logits, logits.stride(0), target, target.stride(0), lse, scratch, N, C, splits,
                launch.blocks_per_split, *smoothing, ignore_index,
                WITH_V=False, SOFT=soft, ACC=accumulator(logits), **launch.options,
            )  # fmt: skip
        _backward_kernel[launch.write_grid](
            g_ce, g_ce.stride(0), g_lse, g_lse.stride(0), logits, logits.stride(0), target, target.stride(0), lse,
            scratch, gx, N, C, splits, launch.write_blocks, *smoothing, ignore_index,
            SOFT=soft, ACC=accumulator(logits), BLOCK_S=MAX_SPLITS, **launch.options,
        )  # fmt: skip
    return gx


def cross_entropy_double_backward(
    v: Tensor, g_ce: Tensor, g_lse: Tensor, logits: Tensor, target: Tensor, lse: Tensor, label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dg_ce = Q S − T, dg_lse = S and df = a s (v − S)."""
    launch = _plan(target, logits, v)
    N, C, splits = launch.N, launch.C, launch.splits
    dg_ce, dg_lse, dx = g_ce.new_empty(N), g_lse.new_empty(N), logits.new_empty(logits.shape)
    if N == 0:
        return dg_ce, dg_lse, dx
    split, soft = splits > 1, target.is_floating_point()
    scratch = lse.new_empty((3, N, splits) if split else 0)
    smoothing = _smoothing(label_smoothing, C)
    grid, blocks = launch.second_pass
    with torch.cuda.device_of(logits):
        if split:
            _sum_kernel[(N, splits)](
                v, v.stride(0), logits, logits.stride(0), target, target.stride(0), lse, scratch, N, C, splits,
                launch.blocks_per_split, *smoothing, ignore_index,
                WITH_V=True, SOFT=soft, ACC=accumulator(logits), **launch.options,
            )  # fmt: skip
        _double_backward_kernel[grid](
            v, v.stride(0), g_ce, g_ce.stride(0), g_lse, g_lse.stride(0), logits, logits.stride(0),
            target, target.stride(0), lse, scratch, dg_ce, dg_lse, dx, N, C, splits, blocks, *smoothing, ignore_index,
            SPLIT=split, SOFT=soft, ACC=accumulator(logits), BLOCK_S=MAX_SPLITS, **launch.options,
        )  # fmt: skip
    return dg_ce, dg_lse, dx
