"""Triton kernels of batch norm: the forward. The derivatives stand in two files beside this one.

With mean μ and variance v of a channel's M values, r = (v + ε)^−½, and a residual z:

    y = relu(x̂ γ + β + z),  x̂ = (x − μ) r

A program's mean and sum of squared deviations M₂ come from sums of d = x − k, with k the mean of its first tile. Of a
program's n values in t equal tiles, the squared deviation of k from their mean is at most M₂ t / n, so the cancellation
in M₂ = Σ d² − (Σ d)² / n costs at most a factor t of rounding errors, whatever the mean. Partial statistics merge as
Chan, Golub and LeVeque (1983) do: M₂ = Σ M₂ᵢ + Σ nᵢ (μᵢ − μ)².
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_backward import batch_norm_backward, batch_norm_input_gradient
from .batch_norm_double_backward import batch_norm_double_backward
from .channels import (
    channel_kernel,
    channels_like,
    plan,
    tl_affine,
    tl_channel,
    tl_channel_count,
    tl_channel_sum,
    tl_fold,
    tl_load,
    tl_partials,
    tl_scale,
    tl_store,
    tl_store_channel,
    tl_store_partial,
    tl_tile,
    tl_tile_count,
)
from .rows import accumulator, float_pair, tl_float

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_inference",
    "batch_norm_input_gradient",
]


@channel_kernel
def _statistics_kernel(
    x_ptr, partial_ptr, N, C, S, blocks, splits,
    FOLD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each split's mean, as k and its difference to k, M₂ and number of values."""
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    first = tl.program_id(1)
    offsets, mask = tl_tile(first, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
    shift = tl_channel_sum(tl_load(x_ptr, offsets, mask, ACC)) / tl_tile_count(first, N, S, BLOCK_N, BLOCK_S).to(ACC)
    total = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    squares = tl.zeros((BLOCK_N // FOLD, BLOCK_C, BLOCK_S), ACC)
    count = tl_tile_count(first, N, S, BLOCK_N, BLOCK_S) * 0
    for block in range(first, blocks, splits):
        offsets, mask = tl_tile(block, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        d = tl.where(mask, tl_load(x_ptr, offsets, mask, ACC) - shift[None, :, None], 0.0)
        total += tl_fold(d, FOLD)
        squares += tl_fold(d * d, FOLD)
        count += tl_tile_count(block, N, S, BLOCK_N, BLOCK_S)
    count = tl.full((BLOCK_C,), 0.0, ACC) + count.to(ACC)
    d = tl_channel_sum(total)
    squared_deviations = tl_channel_sum(squares) - d * (d / count)
    tl_store_partial(partial_ptr, 0, shift, C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 1, d / count, C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 2, tl.where(squared_deviations < 0, 0.0, squared_deviations), C, splits, BLOCK_C)
    tl_store_partial(partial_ptr, 3, count, C, splits, BLOCK_C)


@triton.jit
def tl_update(ptr, momentum, value, C, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """running = (1 − momentum) running + momentum value."""
    if ptr is not None:
        running = tl_channel(ptr, C, 0.0, ACC, BLOCK_C)
        tl_store_channel(ptr, (1 - momentum) * running + momentum * value, C, BLOCK_C)


@channel_kernel
def _merge_kernel(
    partial_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, momentum_high, momentum_low, M, C, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of channels from those of their splits, and the running ones."""
    # Means are merged as differences to the first k: a sum of k and a small difference would round away the latter.
    reference = tl_channel(partial_ptr, C, 0.0, ACC, BLOCK_C)
    shifts = tl_partials(partial_ptr, 0, C, splits, BLOCK_P, BLOCK_C) - reference[None, :]
    means = shifts + tl_partials(partial_ptr, 1, C, splits, BLOCK_P, BLOCK_C)
    counts = tl_partials(partial_ptr, 3, C, splits, BLOCK_P, BLOCK_C)
    count = M.to(ACC)
    mean = tl.sum(counts * means, 0) / count
    deviations = means - mean[None, :]
    squares = tl_partials(partial_ptr, 2, C, splits, BLOCK_P, BLOCK_C) + counts * (deviations * deviations)
    mean += reference
    var = tl.sum(squares, 0) / count
    tl_store_channel(mean_ptr, mean, C, BLOCK_C)
    tl_store_channel(var_ptr, var, C, BLOCK_C)
    momentum = tl_float(momentum_high, momentum_low, ACC)
    tl_update(running_mean_ptr, momentum, mean, C, ACC, BLOCK_C)
    tl_update(running_var_ptr, momentum, var * (count / tl.maximum(count - 1, 1)), C, ACC, BLOCK_C)


@channel_kernel
def _forward_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, eps_high, eps_low, N, C, S, blocks,
    RELU: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    C = tl_channel_count(C, ALIGN, BLOCK_S)
    mean = tl_channel(mean_ptr, C, 0.0, ACC, BLOCK_C)
    scale = tl_scale(var_ptr, weight_ptr, eps_high, eps_low, C, ACC, BLOCK_C)
    bias = tl_channel(bias_ptr, C, 0.0, ACC, BLOCK_C)
    for index in range(tl.program_id(1), blocks, tl.num_programs(1)):
        offsets, mask = tl_tile(blocks - 1 - index, N, C, S, ALIGN, BLOCK_N, BLOCK_C, BLOCK_S)
        y = tl_affine(tl_load(x_ptr, offsets, mask, ACC), mean, scale, bias)
        if residual_ptr is not None:
            y += tl_load(residual_ptr, offsets, mask, ACC)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)  # NaN stays
        tl_store(y_ptr, offsets, mask, y)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance of each channel over the batch; updates the running statistics."""
    launch = plan(x, fold=4)
    mean, var = channels_like(x), channels_like(x)
    partial = mean.new_empty((4, launch.splits, launch.C))
    with torch.cuda.device_of(x):
        _statistics_kernel[launch.sum_grid](
            x, partial, *launch.sizes, launch.splits, ACC=accumulator(x), **launch.sum_options
        )
        _merge_kernel[launch.merge_grid](
            partial, mean, var, running_mean, running_var, *float_pair(momentum), launch.M, launch.C, launch.splits,
            ACC=accumulator(x), **launch.merge_options,
        )  # fmt: skip
    return batch_norm_inference(x, mean, var, weight, bias, residual, eps, relu), mean, var


def batch_norm_inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """y with given statistics."""
    launch = plan(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward_kernel[launch.write_grid](
            x, mean, var, weight, bias, residual, y, *float_pair(eps), *launch.sizes,
            RELU=relu, ACC=accumulator(x), **launch.options,
        )  # fmt: skip
    return y
