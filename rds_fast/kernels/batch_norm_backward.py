"""Triton kernels of batch norm: the backward.

With u' = m u, m the mask of the ReLU and u the sum of two cotangents where there are two, d = x − μ and x̂ = d r, of a
channel of M values:

    gβ = Σ u',   gγ = Σ u' x̂,   gx = γ r (u' − gβ/M − x̂ gγ/M) = γr u' + B d + D,   B = −γ r² gγ/M,   D = −γ r gβ/M

Where u' is a result, the gradient of a residual, the pass that sums writes it, and the pass that writes gx reads it. In
eval mode gx = γ r u' needs no sum, and the pass that sums writes it too.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels import (
    channel_kernel,
    channels_like,
    plan,
    tl_channel,
    tl_channel_count,
    tl_channel_sum,
    tl_fold,
    tl_load,
    tl_relu_mask,
    tl_rstd,
    tl_scale,
    tl_store,
    tl_store_channel,
    tl_store_partial,
    tl_tile,
    tl_total,
)
from .rows import accumulator, float_pair


@triton.jit
def tl_cotangent(u_ptr, other_u_ptr, offsets, mask, ACC: tl.constexpr):
    """u, or the sum of both cotangents as one tensor would hold it."""
    u = tl_load(u_ptr, offsets, mask, ACC)
    if other_u_ptr is not None:
        u = (u + tl_load(other_u_ptr, offsets, mask, ACC)).to(u_ptr.dtype.element_ty).to(ACC)
    return u


@channel_kernel
def _backward_sums_kernel(
    u_ptr, other_u_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, x_cotangent_ptr, partial_ptr, gx_ptr,
    gresidual_ptr, eps_high, eps_low, N, C, S, blocks, splits,
    MASK: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each split's parts of Σ u' and Σ u' d; u', if y_ptr is given; and gx in eval mode, where gx_ptr is.

    MASK: u is to be masked by x.
    """
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    sum_u = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_ud = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    for block in range(tl.program_id(1), blocks, splits):
        offsets, mask = tl_tile(block, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        if y_ptr is not None:
            y = tl_load(y_ptr, offsets, mask, ACC)
        u = tl_cotangent(u_ptr, other_u_ptr, offsets, mask, ACC)
        if y_ptr is not None:
            u = tl.where(y > 0, u, 0.0)
        x = tl_load(x_ptr, offsets, mask, ACC)
        if MASK:
            u = tl.where(tl_relu_mask(x, None, offsets, mask, mean, scale, bias, ACC), u, 0.0)
        sum_u += tl_fold(u, FOLD)
        sum_ud += tl_fold(u * (x - mean[None, :, None]), FOLD)
        if gx_ptr is not None:
            gx = scale[None, :, None] * u
            if x_cotangent_ptr is not None:
                gx += tl_load(x_cotangent_ptr, offsets, mask, ACC)
            tl_store(gx_ptr, offsets, mask, gx)
        if y_ptr is not None:  # no load can pass a store
            tl_store(gresidual_ptr, offsets, mask, u)
    tl_store_partial(partial_ptr, 0, tl_channel_sum(sum_u), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 1, tl_channel_sum(sum_ud), C, splits, BLOCK_C)


@channel_kernel
def _backward_merge_kernel(
    partial_ptr, var_ptr, gweight_ptr, gbias_ptr, sums_ptr, eps_high, eps_low, C, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gβ and gγ, and the same two sums unrounded."""
    r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    gbias = tl_total(partial_ptr, 0, C, splits, BLOCK_P, BLOCK_C)
    gweight = r * tl_total(partial_ptr, 1, C, splits, BLOCK_P, BLOCK_C)
    tl_store_channel(gbias_ptr, gbias, C, BLOCK_C)
    tl_store_channel(gweight_ptr, gweight, C, BLOCK_C)
    tl_store_channel(sums_ptr, gbias, C, BLOCK_C)
    tl_store_channel(sums_ptr + C, gweight, C, BLOCK_C)


@channel_kernel
def _backward_kernel(
    u_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr, x_cotangent_ptr, gx_ptr,
    eps_high, eps_low, M, N, C, S, blocks,
    MASK: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """gx. MASK: u is to be masked by x."""
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    if TRAINING:
        r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
        count = M.to(ACC)
        B = (-scale * r * (tl_channel(sums_ptr + C, C, 0.0, ACC, BLOCK_C) / count))[None, :, None]
        D = (-scale * (tl_channel(sums_ptr, C, 0.0, ACC, BLOCK_C) / count))[None, :, None]
    for index in range(tl.program_id(1), blocks, tl.num_programs(1)):
        offsets, mask = tl_tile(blocks - 1 - index, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        if MASK:
            u = tl.where(tl_relu_mask(x, None, offsets, mask, mean, scale, bias, ACC), u, 0.0)
        gx = scale[None, :, None] * u
        if TRAINING:
            gx += B * (x - mean[None, :, None]) + D
        if x_cotangent_ptr is not None:
            gx += tl_load(x_cotangent_ptr, offsets, mask, ACC)
        tl_store(gx_ptr, offsets, mask, gx)


def batch_norm_backward(
    u: Tensor,
    other_u: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    x_cotangent: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gx + x_cotangent, gγ, gβ, u' if y is given, and Σ u' and Σ u' x̂."""
    launch = plan(x, fold=2)
    gweight, gbias = channels_like(x, weight), channels_like(x, bias)
    gresidual = None if y is None else torch.empty_like(x)
    gx = None if training else torch.empty_like(x)
    sums = channels_like(x).new_empty((2, launch.C))
    partial = sums.new_empty((2, launch.splits, launch.C))
    epsilon = float_pair(eps)
    with torch.cuda.device_of(x):
        _backward_sums_kernel[launch.sum_grid](
            u, other_u, x, y, weight, bias, mean, var, None if training else x_cotangent, partial, gx, gresidual,
            *epsilon, *launch.sizes, launch.splits, MASK=relu and y is None, ACC=accumulator(x), **launch.sum_options,
        )  # fmt: skip
        _backward_merge_kernel[launch.merge_grid](
            partial, var, gweight, gbias, sums, *epsilon, launch.C, launch.splits,
            ACC=accumulator(x), **launch.merge_options,
        )  # fmt: skip
    if gx is None:
        masked, mask = (u, relu) if gresidual is None else (gresidual, False)
        gx = _input_gradient(masked, x, weight, bias, mean, var, sums, x_cotangent, training, eps, mask)
    return gx, gweight, gbias, x.new_empty(0) if gresidual is None else gresidual, sums


def batch_norm_input_gradient(
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sums: Tensor,
    training: bool,
    eps: float,
    relu: bool,
) -> Tensor:
    """gx from the sums that the backward found, with its bits; relu: u is to be masked, by x."""
    return _input_gradient(u, x, weight, bias, mean, var, sums, None, training, eps, relu)


def _input_gradient(
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sums: Tensor,
    x_cotangent: Tensor | None,
    training: bool,
    eps: float,
    mask: bool,
) -> Tensor:
    launch = plan(x)
    gx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _backward_kernel[launch.write_grid](
            u, x, weight, bias, mean, var, sums, x_cotangent, gx, *float_pair(eps), launch.M, *launch.sizes,
            MASK=mask, TRAINING=training, ACC=accumulator(x), **launch.options,
        )  # fmt: skip
    return gx
