"""The targets of the cross-entropy in a Triton kernel: the sums that hold them, and what the forward makes of these.

The mathematics and the names are ``cross_entropy``'s.
``SOFT``: the targets are probabilities; else class indices.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import triton
import triton.language as tl

from .rows import tl_columns, tl_load


@triton.jit
def tl_index(target_ptr, rows, row_mask, target_stride, C, ignore_index, SOFT: tl.constexpr):
    """Class index of each row, whether the row is kept (not ignored), and whether its index is out of range."""
    if SOFT:
        return tl.zeros_like(rows), row_mask, rows < 0
    else:
        index = tl.load(target_ptr + rows * target_stride, mask=row_mask, other=0)
        kept = index != ignore_index
        return index, row_mask & kept, kept & ((index < 0) | (index >= C))


@triton.jit
def tl_target(
    target_ptr, rows, target_stride, columns, mask, index, kept, scale, uniform,
    SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of q' = scale q + uniform; 0 outside the mask and in ignored rows."""
    if SOFT:
        q = scale * tl_load(target_ptr, rows, target_stride, columns, mask, 0.0, ACC, ALIGN) + uniform
    else:
        q = tl.where(columns[None, :] == index[:, None], scale + uniform, uniform)
    return tl.where(mask & kept[:, None], q, 0.0)


@triton.jit
def tl_sums(
    v_ptr, v_row_stride, logits_ptr, logits_row_stride, target_ptr, target_stride, rows, row_mask, index, kept,
    lse, scale, uniform, C, first, last,
    WITH_V: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S = Σ v s, T = Σ v q' and Q = Σ q' over blocks of a row; Q alone if there is no v."""
    S = tl.zeros((BLOCK_N,), ACC)
    T = tl.zeros((BLOCK_N,), ACC)
    Q = tl.zeros((BLOCK_N,), ACC)
    for block in range(first, last):
        columns = tl_columns(block, BLOCK_C)
        mask = row_mask[:, None] & (columns < C)[None, :]
        q = tl_target(target_ptr, rows, target_stride, columns, mask, index, kept, scale, uniform, SOFT, ACC, ALIGN)
        Q += tl.sum(q, 1)
        if WITH_V:
            v = tl_load(v_ptr, rows, v_row_stride, columns, mask, 0.0, ACC, ALIGN)
            f = tl_load(logits_ptr, rows, logits_row_stride, columns, mask, float("-inf"), ACC, ALIGN)
            S += tl.sum(v * tl.exp(f - lse), 1)
            T += tl.sum(v * q, 1)
    return S, T, Q


@triton.jit
def tl_store_forward(
    ce_ptr, lse_ptr, saved_ptr, rows, row_mask, reference, total, T, Q, kept, outside, SAVE: tl.constexpr
):  # fmt: skip
    """ce = Q log Σ exp(f − m) − T and l = m + log Σ exp(f − m)."""
    log_total = tl.log(total)
    ce = tl.where(kept, Q * log_total - T, 0.0)
    # a +inf logit: PyTorch's log-softmax, whose every term is inf − inf or holds one, is NaN whatever the target
    undefined = outside | (kept & (log_total == float("inf")))
    ce = tl.where(undefined, float("nan"), ce)
    lse = reference + log_total
    tl.store(ce_ptr + rows, ce.to(ce_ptr.dtype.element_ty), mask=row_mask)
    tl.store(lse_ptr + rows, lse.to(lse_ptr.dtype.element_ty), mask=row_mask)
    if SAVE:
        tl.store(saved_ptr + rows, lse, mask=row_mask)
