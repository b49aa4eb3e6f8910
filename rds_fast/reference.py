"""The specification: each operation in plain PyTorch.

Every function here is a composition of PyTorch operations whose derivatives are right at every order, in reverse mode,
in forward mode and in any nesting of the two, on any device and dtype. PyTorch's own batch norm in train mode, instance
norm and layer norm are not: their third derivatives, and forward mode within forward mode, are wrong without an error.
The fused implementations are checked against these functions in float64; where one disagrees, it is wrong. 16-bit
inputs are computed in float32, float32 inputs in float32, float64 inputs in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a row of ``dtype`` are kept: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precise(tensor: Tensor) -> Tensor:
    """The tensor in that dtype."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def logsumexp(input: Tensor, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """``log Σ exp(input)`` over ``dim``, with the gradient ``softmax(input)``. See ``rds_fast.logsumexp``."""
    return torch.logsumexp(input.to(accumulation_dtype(input.dtype)), dim, keepdim).to(input.dtype)


def cross_entropy_with_logsumexp(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-sum-exp of each row of (N, C) logits. See ``rds_fast.cross_entropy_with_logsumexp``.

    With q the smoothed target distribution, cross-entropy = (Σ q) l − Σ q f, l = log Σ exp f.
    """
    f = logits.to(accumulation_dtype(logits.dtype))
    lse = torch.logsumexp(f, 1)
    cross_entropy = F.cross_entropy(
        f,
        target if not target.is_floating_point() else target.to(f.dtype),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return cross_entropy.to(logits.dtype), lse.to(logits.dtype)


def gradient_norm(gradient: Tensor, p: float = 2.0, power: float = 1.0) -> Tensor:
    """``‖gradient‖ₚ^power`` of each sample, over all dimensions but the first. See ``rds_fast.gradient_norm``.

    The row is divided by its largest magnitude m before any power is taken, so nothing overflows or underflows where
    the result is representable. m is a constant of the derivative: the norm is homogeneous, so it cancels exactly.
    Zero coordinates (but for p = 2) and rows that are zero throughout are kept out of every power and so have
    derivative 0.
    """
    x = gradient.flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
    x = x.to(accumulation_dtype(x.dtype))
    if x.shape[1] == 0:
        return x.sum(1).to(gradient.dtype)
    if p == 2.0 and power == 2.0:  # smooth everywhere: Σ x² has the second derivative 2 at a zero row too
        return x.square().sum(1).to(gradient.dtype)
    largest = x.detach().abs().amax(1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    magnitude = x.abs() / scale
    if p == 1.0:
        norm = magnitude.sum(1)
    elif p == math.inf:
        norm = magnitude.amax(1)  # amax shares the gradient evenly among ties
    else:
        if p == 2.0:  # a square is smooth at a zero coordinate
            powers = (x / scale).square()
        else:
            zero = magnitude == 0
            powers = torch.where(zero, 0.0, torch.where(zero, 1.0, magnitude).pow(p))
        sum_of_powers = powers.sum(1)
        empty = sum_of_powers == 0
        norm = torch.where(empty, 0.0, torch.where(empty, 1.0, sum_of_powers).pow(1.0 / p))
    norm = norm * scale[:, 0]
    if power == 1.0:
        return norm.to(gradient.dtype)
    # A zero row has derivative 0 for power >= 1, where 0 ** (power - 1) would be 0 or, below 1, infinite.
    zero = norm == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, norm).pow(power)).to(gradient.dtype)


def _normalise(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
) -> Tensor:
    """``(x − mean) / sqrt(variance + eps) · weight + bias``.

    Mean and variance are over ``dims``; weight and bias have ``shape`` beside x.
    """
    dtype = accumulation_dtype(x.dtype)
    deviation = x.to(dtype)
    deviation = deviation - deviation.mean(dims, keepdim=True)
    scale = (deviation.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype).view(shape)
    y = deviation * scale
    return (y if bias is None else y + bias.to(dtype).view(shape)).to(x.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``. PyTorch's own is right at every order in eval mode."""
    if not training or input.numel() == 0:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():  # for its errors and the running statistics, which nobody else may write inside torch.func
        F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = (0, *range(2, input.dim()))
    return _normalise(input, dims, weight, bias, (-1, *[1] * (input.dim() - 2)), eps)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``, of arguments that are valid there."""
    return _normalise(input, tuple(range(-len(normalized_shape), 0)), weight, bias, normalized_shape, eps)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``torch.nn.functional.group_norm``, of arguments that are valid there."""
    grouped = input.unflatten(1, (num_groups, -1))
    dims = tuple(range(2, grouped.dim()))
    shape = (num_groups, -1, *[1] * (input.dim() - 2))
    return _normalise(grouped, dims, weight, bias, shape, eps).flatten(1, 2)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``, of arguments that are valid there."""
    if not use_input_stats:  # batch norm's eval mode
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if running_mean is not None:
        with torch.no_grad():  # for the running statistics
            F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return group_norm(input, input.shape[1], weight, bias, eps)


# The activations are PyTorch's own. Two can work in place by another name only; hardsigmoid it differentiates once, and
# celu with a 1/alpha that was rounded to float32.
relu, leaky_relu, hardtanh, relu6 = F.relu, F.leaky_relu, F.hardtanh, F.relu6
gelu, silu, mish, softplus, hardswish = F.gelu, F.silu, F.mish, F.softplus, F.hardswish
elu, selu = F.elu, F.selu


def sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """See ``rds_fast.ops.activation.sigmoid``."""
    return torch.sigmoid_(input) if inplace else torch.sigmoid(input)


def tanh(input: Tensor, inplace: bool = False) -> Tensor:
    """See ``rds_fast.ops.activation.tanh``."""
    return torch.tanh_(input) if inplace else torch.tanh(input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``input/6 + 1/2`` clamped to [0, 1], of differentiable operations."""
    if inplace:
        return input.copy_(hardsigmoid(input.clone()))
    x = input.to(accumulation_dtype(input.dtype))
    return (F.hardtanh(x, -3.0, 3.0) / 6 + 0.5).to(input.dtype)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where positive, ``alpha · (exp(input/alpha) − 1)`` else, of differentiable operations."""
    if inplace:
        return input.copy_(celu(input.clone(), alpha))
    x = input.to(accumulation_dtype(input.dtype))
    negative = torch.where(x > 0, 0.0, x)  # where the other branch is taken, nothing overflows
    return torch.where(x > 0, x, alpha * torch.expm1(negative / alpha)).to(input.dtype)
