"""Triton kernels of batch norm: the backward.

With u' = m u, m the mask of the ReLU, d = x − μ and x̂ = d r, of a channel of M values:

    gβ = Σ u',   gγ = Σ u' x̂,   gx = γ r (u' − gβ/M − x̂ gγ/M) = γr u' + B d + D,   B = −γ r² gγ/M,   D = −γ r gβ/M

In eval mode gx = γ r u' needs no sum, and the pass that sums writes it.
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
    plan,
    tl_channel,
    tl_channel_count,
    tl_channel_sum,
    tl_channels,
    tl_fold,
    tl_load,
    tl_relu_mask,
    tl_rstd,
    tl_scale,
    tl_store,
    tl_store_partial,
    tl_tile,
    tl_total,
)
from .rows import accumulator, float_pair


@triton.jit
def tl_store_gradients(gx, u, gx_ptr, gresidual_ptr, x_cotangent_ptr, offsets, mask, ACC: tl.constexpr):
    """Writes gx + x_cotangent, and u', the gradient of the residual, if wanted."""
    if x_cotangent_ptr is not None:
        gx += tl_load(x_cotangent_ptr, offsets, mask, ACC)
    tl_store(gx_ptr, offsets, mask, gx)
    if gresidual_ptr is not None:
        tl_store(gresidual_ptr, offsets, mask, u)


@channel_kernel
def _backward_sums_kernel(
    u_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, x_cotangent_ptr, partial_ptr, gx_ptr, gresidual_ptr,
    eps_high, eps_low, N, C, S, blocks, splits,
    RELU: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each split's parts of Σ u' and Σ u' d; and gx in eval mode, where gx_ptr is given."""
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    sum_u = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_ud = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    for block in range(tl.program_id(1), blocks, splits):
        offsets, mask = tl_tile(block, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        if RELU:
            u = tl.where(tl_relu_mask(x, y_ptr, offsets, mask, mean, scale, bias, ACC), u, 0.0)
        sum_u += tl_fold(u, FOLD)
        sum_ud += tl_fold(u * (x - mean[None, :, None]), FOLD)
        if gx_ptr is not None:
            gx = scale[None, :, None] * u
            tl_store_gradients(gx, u, gx_ptr, gresidual_ptr, x_cotangent_ptr, offsets, mask, ACC)
    tl_store_partial(partial_ptr, 0, tl_channel_sum(sum_u), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 1, tl_channel_sum(sum_ud), C, splits, BLOCK_C)


@channel_kernel
def _backward_merge_kernel(
    partial_ptr, weight_ptr, var_ptr, gweight_ptr, gbias_ptr, coefficients_ptr, eps_high, eps_low, M, C, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gγ and gβ; and B and D in train mode, where coefficients_ptr is given."""
    channels = tl_channels(BLOCK_C)
    mask = channels < C
    r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    gbias = tl_total(partial_ptr, 0, C, splits, BLOCK_P, BLOCK_C)
    gweight = r * tl_total(partial_ptr, 1, C, splits, BLOCK_P, BLOCK_C)
    tl.store(gweight_ptr + channels, gweight, mask=mask)
    tl.store(gbias_ptr + channels, gbias, mask=mask)
    if coefficients_ptr is not None:
        scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
        count = M.to(ACC)
        tl.store(coefficients_ptr + channels, -scale * r * (gweight / count), mask=mask)
        tl.store(coefficients_ptr + C + channels, -scale * (gbias / count), mask=mask)


@channel_kernel
def _backward_kernel(
    u_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, x_cotangent_ptr, coefficients_ptr, gx_ptr,
    gresidual_ptr, eps_high, eps_low, N, C, S, blocks,
    RELU: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    B = tl_channel(coefficients_ptr, C, 0.0, ACC, BLOCK_C)[None, :, None]
    D = tl_channel(coefficients_ptr + C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    for index in range(tl.program_id(1), blocks, tl.num_programs(1)):
        offsets, mask = tl_tile(blocks - 1 - index, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        if RELU:
            u = tl.where(tl_relu_mask(x, y_ptr, offsets, mask, mean, scale, bias, ACC), u, 0.0)
        gx = scale[None, :, None] * u + (B * (x - mean[None, :, None]) + D)
        tl_store_gradients(gx, u, gx_ptr, gresidual_ptr, x_cotangent_ptr, offsets, mask, ACC)


def batch_norm_backward(
    u: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gx + x_cotangent, gγ, gβ, and u' if y is given."""
    sums, write = plan(x, fold=2), plan(x)
    gx, gweight, gbias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    gresidual = None if y is None else torch.empty_like(x)
    partial = mean.new_empty((2, sums.splits, sums.C))
    coefficients = mean.new_empty((2, sums.C)) if training else None
    inputs = (u, x, y, weight, bias, mean, var, x_cotangent)
    results = (gx, gresidual)
    epsilon = float_pair(eps)
    acc = accumulator(x)
    with torch.cuda.device_of(x):
        _backward_sums_kernel[sums.sum_grid](
            *inputs, partial, *((None, None) if training else results), *epsilon, *sums.sizes, sums.splits,
            RELU=relu, ACC=acc, **sums.sum_options,
        )  # fmt: skip
        _backward_merge_kernel[sums.merge_grid](
            partial, weight, var, gweight, gbias, coefficients, *epsilon, sums.M, sums.C, sums.splits,
            ACC=acc, **sums.merge_options,
        )  # fmt: skip
        if training:
            _backward_kernel[write.write_grid](
                *inputs, coefficients, *results, *epsilon, *write.sizes, RELU=relu, ACC=acc, **write.options
            )
    return gx, gweight, gbias, x.new_empty(0) if gresidual is None else gresidual
