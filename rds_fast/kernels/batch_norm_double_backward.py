"""Triton kernels of batch norm: the double backward.

v, a, b and c are the cotangents of gx, gγ, gβ and gresidual; u' = m u, m the mask of the ReLU, d = x − μ, x̂ = d r, and
means over a channel of M values:

    cᵤ = mean(u' x̂),   cᵥ = mean(v x̂),   cᵤᵥ = mean(u' v) − mean(u') mean(v) − cᵤ cᵥ,   P(t) = t − mean(t) − x̂ mean(t x̂)
    du = m (γ r P(v) + a x̂ + b + c),   dγ = r M cᵤᵥ,   dx = −γ r² (cᵤᵥ x̂ + cᵥ P(u') + cᵤ P(v)) + a r P(u')

The pass that writes has them as

    du = m (γr v + B d + D + c),   dx = B u' + G v + E d + H
    G = −γ r² cᵤ,   B = a r − γ r² cᵥ,   D = b − γ r mean(v)
    E = −r (γ r² cᵤᵥ + B cᵤ + G cᵥ),   H = −B mean(u') − G mean(v)

whose coefficients come from the five sums. In eval mode du = m (γ r v + a x̂ + b + c), dγ = r Σ u' v and dx = a r u', so
one pass sums and writes. Where it is wanted, the pass that writes gives the first backward's gx again, of what it has
at hand: gx = γr u' + G d − γr mean(u'), in eval mode γ r u'.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
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


@channel_kernel
def _double_backward_sums_kernel(
    v_ptr, u_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, partial_ptr, eps_high, eps_low,
    N, C, S, blocks, splits,
    MASK: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each split's parts of Σ u', Σ u' d, Σ v, Σ v d and Σ u' v. MASK: u is to be masked by x."""
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    sum_u = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_ud = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_v = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_vd = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    sum_uv = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    for block in range(tl.program_id(1), blocks, splits):
        offsets, mask = tl_tile(block, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        v = tl_load(v_ptr, offsets, mask, ACC)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        if MASK:
            u = tl.where(tl_relu_mask(x, None, offsets, mask, mean, scale, bias, ACC), u, 0.0)
        d = x - mean[None, :, None]
        sum_u += tl_fold(u, FOLD)
        sum_ud += tl_fold(u * d, FOLD)
        sum_v += tl_fold(v, FOLD)
        sum_vd += tl_fold(v * d, FOLD)
        sum_uv += tl_fold(u * v, FOLD)
    tl_store_partial(partial_ptr, 0, tl_channel_sum(sum_u), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 1, tl_channel_sum(sum_ud), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 2, tl_channel_sum(sum_v), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 3, tl_channel_sum(sum_vd), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 4, tl_channel_sum(sum_uv), C, splits, BLOCK_C)


@channel_kernel
def _double_backward_merge_kernel(
    partial_ptr, vweight_ptr, vbias_ptr, weight_ptr, var_ptr, dweight_ptr, coefficients_ptr, eps_high, eps_low,
    M, C, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dγ, and the coefficients B, D, E, G, H and −γr mean(u')."""
    r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    a = tl_channel(vweight_ptr, C, 0.0, ACC, BLOCK_C) * r
    count = M.to(ACC)
    mean_u = tl_total(partial_ptr, 0, C, splits, BLOCK_P, BLOCK_C) / count
    cu = r * (tl_total(partial_ptr, 1, C, splits, BLOCK_P, BLOCK_C) / count)
    mean_v = tl_total(partial_ptr, 2, C, splits, BLOCK_P, BLOCK_C) / count
    cv = r * (tl_total(partial_ptr, 3, C, splits, BLOCK_P, BLOCK_C) / count)
    cuv = tl_total(partial_ptr, 4, C, splits, BLOCK_P, BLOCK_C) / count - mean_u * mean_v - cu * cv
    tl_store_channel(dweight_ptr, r * count * cuv, C, BLOCK_C)
    k = scale * r
    B = a - k * cv
    G = -k * cu
    tl_store_channel(coefficients_ptr, B, C, BLOCK_C)
    tl_store_channel(coefficients_ptr + C, tl_channel(vbias_ptr, C, 0.0, ACC, BLOCK_C) - scale * mean_v, C, BLOCK_C)
    tl_store_channel(coefficients_ptr + 2 * C, -r * (k * cuv + B * cu + G * cv), C, BLOCK_C)
    tl_store_channel(coefficients_ptr + 3 * C, G, C, BLOCK_C)
    tl_store_channel(coefficients_ptr + 4 * C, -B * mean_u - G * mean_v, C, BLOCK_C)
    tl_store_channel(coefficients_ptr + 5 * C, -scale * mean_u, C, BLOCK_C)


@channel_kernel
def _double_backward_kernel(
    v_ptr, vresidual_ptr, u_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, coefficients_ptr, du_ptr,
    dx_ptr, gx_ptr, eps_high, eps_low, N, C, S, blocks,
    RELU: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    B = tl_channel(coefficients_ptr, C, 0.0, ACC, BLOCK_C)[None, :, None]
    D = tl_channel(coefficients_ptr + C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    E = tl_channel(coefficients_ptr + 2 * C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    G = tl_channel(coefficients_ptr + 3 * C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    H = tl_channel(coefficients_ptr + 4 * C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    gx_constant = tl_channel(coefficients_ptr + 5 * C, C, 0.0, ACC, BLOCK_C)[None, :, None]
    for index in range(tl.program_id(1), blocks, tl.num_programs(1)):
        offsets, mask = tl_tile(blocks - 1 - index, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        v = tl_load(v_ptr, offsets, mask, ACC)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        d = x - mean[None, :, None]
        du = scale[None, :, None] * v + (B * d + D)
        if vresidual_ptr is not None:
            du += tl_load(vresidual_ptr, offsets, mask, ACC)
        if RELU:
            relu_mask = tl_relu_mask(x, y_ptr, offsets, mask, mean, scale, bias, ACC)
            u = tl.where(relu_mask, u, 0.0)
            du = tl.where(relu_mask, du, 0.0)
        tl_store(du_ptr, offsets, mask, du)
        tl_store(dx_ptr, offsets, mask, B * u + G * v + (E * d + H))
        if gx_ptr is not None:
            tl_store(gx_ptr, offsets, mask, scale[None, :, None] * u + (G * d + gx_constant))


@channel_kernel
def _eval_double_backward_kernel(
    v_ptr, vweight_ptr, vbias_ptr, vresidual_ptr, u_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    partial_ptr, du_ptr, dx_ptr, gx_ptr, eps_high, eps_low, N, C, S, blocks, splits,
    RELU: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """du, dx if a is given, gx if wanted; and each split's part of Σ u' v."""
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    a = (tl_channel(vweight_ptr, C, 0.0, ACC, BLOCK_C) * r)[None, :, None]
    b = tl_channel(vbias_ptr, C, 0.0, ACC, BLOCK_C)[None, :, None]
    sum_uv = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), ACC)
    for block in range(tl.program_id(1), blocks, splits):
        offsets, mask = tl_tile(block, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        v = tl_load(v_ptr, offsets, mask, ACC)
        u = tl_load(u_ptr, offsets, mask, ACC)
        x = tl_load(x_ptr, offsets, mask, ACC)
        du = scale[None, :, None] * v + (a * (x - mean[None, :, None]) + b)
        if vresidual_ptr is not None:
            du += tl_load(vresidual_ptr, offsets, mask, ACC)
        if RELU:
            relu_mask = tl_relu_mask(x, y_ptr, offsets, mask, mean, scale, bias, ACC)
            u = tl.where(relu_mask, u, 0.0)
            du = tl.where(relu_mask, du, 0.0)
        tl_store(du_ptr, offsets, mask, du)
        sum_uv += u * v
        if dx_ptr is not None:
            tl_store(dx_ptr, offsets, mask, a * u)
        if gx_ptr is not None:
            tl_store(gx_ptr, offsets, mask, scale[None, :, None] * u)
    tl_store_partial(partial_ptr, 0, tl_channel_sum(sum_uv), C, splits, BLOCK_C)


@channel_kernel
def _eval_double_backward_merge_kernel(
    partial_ptr, var_ptr, dweight_ptr, eps_high, eps_low, C, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dγ = r Σ u' v."""
    r = tl_rstd(var_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    tl_store_channel(dweight_ptr, r * tl_total(partial_ptr, 0, C, splits, BLOCK_P, BLOCK_C), C, BLOCK_C)


def batch_norm_double_backward(
    v: Tensor | None,
    vweight: Tensor | None,
    vbias: Tensor | None,
    vresidual: Tensor | None,
    u: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du, dx, dγ and gx; dx has no elements in eval mode without vweight, gx none unless ``input_gradient``."""
    du, dweight = torch.empty_like(x), channels_like(x, weight)
    dx = torch.empty_like(x) if training or vweight is not None else None
    gx = torch.empty_like(x) if input_gradient else None
    affine = (weight, bias, mean, var)
    epsilon = float_pair(eps)
    acc = accumulator(x)
    sums, write = plan(x, fold=2 if training else 1), plan(x)
    partial = channels_like(x).new_empty((5 if training else 1, sums.splits, sums.C))
    with torch.cuda.device_of(x):
        if training:
            coefficients = partial.new_empty((6, sums.C))
            _double_backward_sums_kernel[sums.sum_grid](
                v, u, x, *affine, partial, *epsilon, *sums.sizes, sums.splits,
                MASK=relu and y is None, ACC=acc, **sums.sum_options,
            )  # fmt: skip
            _double_backward_merge_kernel[sums.merge_grid](
                partial, vweight, vbias, weight, var, dweight, coefficients, *epsilon, sums.M, sums.C, sums.splits,
                ACC=acc, **sums.merge_options,
            )  # fmt: skip
            _double_backward_kernel[write.write_grid](
                v, vresidual, u, x, y, *affine, coefficients, du, dx, gx, *epsilon, *write.sizes,
                RELU=relu, ACC=acc, **write.options,
            )  # fmt: skip
        else:
            _eval_double_backward_kernel[sums.sum_grid](
                v, vweight, vbias, vresidual, u, x, y, *affine, partial, du, dx, gx, *epsilon, *sums.sizes,
                sums.splits,
                RELU=relu, ACC=acc, **sums.options,
            )  # fmt: skip
            _eval_double_backward_merge_kernel[sums.merge_grid](
                partial, var, dweight, *epsilon, sums.C, sums.splits, ACC=acc, **sums.merge_options
            )
    dx, gx = (x.new_empty(0) if t is None else t for t in (dx, gx))
    return du, dx, dweight, gx
