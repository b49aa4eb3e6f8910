"""The specification: each operation in plain PyTorch.

Every function here is a composition of differentiable PyTorch operations, so autograd derives it to any order, on any
device and dtype. The fused implementations are checked against these functions in float64; where one disagrees, it is
wrong. 16-bit inputs are computed in float32, float32 inputs in float32, float64 inputs in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a row of ``dtype`` are kept: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


# The activations are PyTorch's own. Two can work in place by another name only; hardsigmoid it differentiates once.
relu, leaky_relu, hardtanh, relu6 = F.relu, F.leaky_relu, F.hardtanh, F.relu6
gelu, silu, mish, softplus, hardswish = F.gelu, F.silu, F.mish, F.softplus, F.hardswish
elu, selu, celu = F.elu, F.selu, F.celu


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
