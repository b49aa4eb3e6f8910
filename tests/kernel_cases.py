"""What the tests of all layers of kernels share: how the raw operations are called, and cases of special values.

``kernels`` is what holds the operations of a layer under their names: ``torch.ops.rds_fast_native``, or the functions
of ``rds_fast.kernels``. Everything imports alike with and without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rds_fast
from rds_fast.reference import accumulation_dtype


def derivatives(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor, v: Tensor, *g: Tensor
) -> tuple[Tensor, ...]:
    """By autograd: the results, the gradient of x, and for v its cotangent the gradients of each of g and of x."""
    x = x.detach().requires_grad_()
    g = tuple(cotangent.detach().clone().requires_grad_() for cotangent in g)
    results = function(x)
    results = results if isinstance(results, tuple) else (results,)
    (gx,) = torch.autograd.grad(results, x, g, create_graph=True)
    second = torch.autograd.grad(gx, (*g, x), v, materialize_grads=True)
    return (*(result.detach() for result in results), gx.detach(), *second)


# The public functions of rows, and ways to differentiate them that bring tensors which are more than memory.
ROW_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsumexp": lambda x: rds_fast.logsumexp(x, 1),
    "gradient_norm": lambda x: rds_fast.gradient_norm(x),
    "cross_entropy": lambda x: rds_fast.cross_entropy_with_logsumexp(x, torch.tensor([0, 2]))[0],
}


def _by_a_conjugate(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The cotangent is the imaginary part of a conjugate, a view whose memory is still to be negated."""
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]], requires_grad=True)
    conjugate = torch.complex(torch.zeros(2), function(x)).conj()
    return torch.autograd.grad((conjugate * (2 + 3j)).imag.sum(), x)[0]


def _by_a_pullback(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The backward runs after its transformation has ended, on wrappers that this left behind."""
    _, pullback = torch.func.vjp(function, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]]))
    gradient: Tensor = pullback(torch.tensor([1.0, 2.0]))[0]
    return gradient


UNUSUAL_WAYS = {"a conjugate": _by_a_conjugate, "a pullback": _by_a_pullback}


def _kept(lse: Tensor, saved: Tensor, x: Tensor) -> Tensor:
    """The log-sum-exp that the backwards take."""
    lse = saved[:, 0] if saved.shape[1] else lse
    assert lse.dtype == accumulation_dtype(x.dtype)
    return lse


def run_logsumexp(kernels: Any, x: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """What ``derivatives`` gives, by a layer's kernels; in full precision if that is g's."""
    result, saved = kernels.logsumexp(x, g.dtype != x.dtype)
    lse = _kept(result, saved, x)
    return result, kernels.logsumexp_backward(g, x, lse), *kernels.logsumexp_double_backward(v, g, x, lse)


def run_cross_entropy(
    kernels: Any, x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float
) -> tuple[Tensor, ...]:
    """The same of the cross-entropy and the log-sum-exp, which have a cotangent each."""
    ce, result, saved = kernels.cross_entropy(x, target, smoothing, -100, g[0].dtype != x.dtype)
    lse = _kept(result, saved, x)
    gx = kernels.cross_entropy_backward(*g, x, target, lse, smoothing, -100)
    return ce, result, gx, *kernels.cross_entropy_double_backward(v, *g, x, target, lse, smoothing, -100)


def run_gradient_norm(kernels: Any, x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> tuple[Tensor, ...]:
    """The same of the norm."""
    result, saved = kernels.gradient_norm(x, p, power, g.dtype != x.dtype)
    is_norm = power == 1 and result.dtype == accumulation_dtype(x.dtype)
    columns = 2 if math.isinf(p) else 0 if is_norm else 1
    assert (saved.dtype, saved.shape) == (accumulation_dtype(x.dtype), (x.shape[0], columns))
    saved = saved if columns else result.unsqueeze(1)
    gx = kernels.gradient_norm_backward(g, x, saved, p, power)
    return result, gx, *kernels.gradient_norm_double_backward(v, g, x, saved, p, power)


def with_infinities(x: Tensor) -> Tensor:
    """x (8, C), C >= 3, with rows of −∞, ∞ and NaN: every way in which they meet. The last row is ordinary."""
    x = x.clone()
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 1:] = -math.inf
    x[4, :-1] = -math.inf
    x[5, 0], x[5, 1] = math.inf, math.nan
    x[6, 0], x[6, 1] = math.inf, -math.inf
    return x


def with_infinite_logits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (7, C), C >= 3, with infinities at the class index and beside it, and the class indices (7,)."""
    x = x.clone()
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 2:] = -math.inf
    x[4, 0] = -math.inf
    x[5, 0] = math.inf
    return x, torch.tensor([1, 1, 1, 1, 0, 1, -100], device=x.device)


def with_row_stride(x: Tensor, before: int, after: int) -> Tensor:
    """The same values as a slice of wider rows, so that no row starts where it did; NaN around it."""
    wide = x.new_full((x.shape[0], before + x.shape[1] + after), math.nan)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]
