"""The density penalty: the norm of the gradient of the log density of x.

A classifier's logits f(x) define an unnormalised density of its inputs, log p(x) = l(x) − log Z(θ) with
l = log Σ exp fᵢ. The normaliser drops out of the gradient:

    ∇ₓ log p(x) = ∇ₓ l(x) = Σ sᵢ ∇ₓ fᵢ(x),   s = softmax(f),
    R(x) = ‖∇ₓ l(x)‖ₚ^power.

Source: Yang, Akhtar, Shah and Mian, ECCV 2024 (arXiv 2407.04370). The finite difference along the dual direction is
Finlay and Oberman's (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import implementation
from ..compilation import uncompiled
from ..ops.gradient_norm import check_norm, gradient_norm
from ..ops.inputs import check_number
from ..ops.logsumexp import logsumexp, without_autocast
from .checks import check_choice, check_input, refuse_normalised, refuse_one_logit
from .model_state import RandomState
from .shared import Penalty, SharedForward, logits_of, penalties_of

REDUCTIONS = ("mean", "sum", "none")


@uncompiled
def log_density(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The log density of each input under the model's logits, up to the constant log Z(θ).

    ``log p(x) = log Σ exp fᵢ(x) − log Z(θ)``; the result is the first term. It needs no gradient and is differentiable
    as ``rds_fast.logsumexp`` is. The source is Yang et al., ECCV 2024 (arXiv 2407.04370).

    Args:
        model: maps x to logits (N, C).
        x: (N, ...), floating point.

    Returns:
        (N,), in the dtype of the logits (float32 under autocast).

    Raises:
        TypeError, ValueError: model, x or the logits are not as above.
        ValueError: the model gives one logit, or ends in log-softmax, so that the result would be 0 (recognised where
            gradients are enabled and a parameter or x requires one).
    """
    check_input(x)
    logits = logits_of(model, x)
    refuse_one_logit(logits)
    refuse_normalised(logits)
    return logsumexp(logits)


@uncompiled
def density_penalty(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    p: float = 2.0,
    power: float = 1,
    method: str = "exact",
    step_size: float = 1e-2,
    reduction: str = "mean",
    fast: bool = True,
) -> Tensor:
    """The density penalty ``‖∇ₓ log p(x)‖ₚ^power``, differentiable with respect to the model's parameters.

    Args:
        model: maps x to logits (N, C); any ``torch.nn.Module`` that is not compiled.
        x: (N, ...), floating point. Whether it requires a gradient does not matter: ``x.grad`` and hooks on x do not
            see the inner pass. If it does, the penalty is differentiable with respect to x as well, and a later
            ``penalty.backward()`` adds that gradient to ``x.grad`` like any other loss of x; pass ``x.detach()`` if it
            should not.
        p, power, method, step_size, fast: as for ``rds_fast.DensityPenalty``.
        reduction: ``"mean"`` or ``"sum"`` over the samples, or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``; float32 under autocast, else in the dtype of x.

    Raises:
        As ``rds_fast.DensityPenalty``.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    penalty = DensityPenalty(p=p, power=power, method=method, step_size=step_size, fast=fast)
    check_input(x)
    with implementation(fast):
        return _reduced(penalties_of(penalty, SharedForward(model, x)), reduction)


@uncompiled
def density_penalty_from_logits(
    logits: Tensor, x: Tensor, *, p: float = 2.0, power: float = 1, reduction: str = "mean"
) -> Tensor:
    """The exact density penalty of logits that were computed from x already, so that their forward is shared.

    Args:
        logits: (N, C), computed from ``x`` with gradients enabled.
        x: (N, ...), which required a gradient when the logits were computed. ``x.grad`` does not see the inner pass;
            ``backward()`` on the result fills it, as for every leaf that requires a gradient.
        p, power: as for ``rds_fast.DensityPenalty``.
        reduction: ``"mean"`` or ``"sum"`` over the samples, or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``.

    Raises:
        As ``rds_fast.DensityPenalty``; RuntimeError also if x does not require a gradient.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    penalty = DensityPenalty(p=p, power=power)
    return _reduced(penalties_of(penalty, SharedForward.of_logits(logits, x)), reduction)


def _reduced(penalties: Tensor, reduction: str) -> Tensor:
    """The penalties of the samples to their mean or sum, or as they are."""
    if reduction == "mean":
        return penalties.mean()
    return penalties.sum() if reduction == "sum" else penalties


@dataclass(frozen=True, kw_only=True)
class DensityPenalty(Penalty):
    """The density penalty as an object: ``penalty(model, x, y)`` is the mean of ``‖∇ₓ log p(x)‖ₚ^power``.

    ``"exact"`` differentiates through the gradient: one forward, an inner backward with its graph, and twice their work
    in the training step's backward; in all about twice the arithmetic of a step with cross-entropy alone.

    ``"finite_difference"`` is |l(x + h d) − l(x)| / h, raised to ``power``, with h the step size and d the dual
    direction of the gradient g, held constant (d = ∇‖g‖ₚ: g/‖g‖₂ for p = 2, sign g for p = 1, for p = ∞ the sign at
    the largest |gᵢ|). It needs no graph of second order, at 7/6 of the arithmetic, and works with compiled models. It
    subtracts nearly equal numbers: both forwards leave autocast, x must be float32 or float64, and TF32, which rounds
    as coarsely as float16, is better off (``torch.backends.cudnn.conv.fp32_precision = "ieee"``). Both draw the same
    random numbers (dropout), and the second leaves buffers such as batch norm's running statistics alone.

    At a zero gradient the penalty and its gradient are 0. In train mode batch norm couples the samples, and the
    gradient of one sample holds its effect on the others through the batch statistics. In float16 the inner pass runs
    with a cotangent of 2⁸, undone in float32; the training step's own backward needs a gradient scaler, as ever.

    Sources: Yang et al., ECCV 2024 (arXiv 2407.04370), whose form is p = 2, power = 1; power = 2 as in Drucker and
    LeCun (1992) and Ross and Doshi-Velez (2018); the finite difference: Finlay and Oberman (2019).

    Args:
        p: the order of the norm, in [1, ∞]. This and the other numbers may be Python's or NumPy's.
        power: a positive number.
        method: ``"exact"`` or ``"finite_difference"``.
        step_size: h, in the units of x, positive; the length of the step in the norm dual to p.
        fast: False runs the penalty's own operations (log-sum-exp, norm) and the model's layers on plain PyTorch;
            True runs the exact method's forward under ``rds_fast.fast_double_backward``.

    Raises:
        TypeError: x is not a floating-point tensor, the model is not callable or does not return one tensor, or p,
            power or step_size is not a number (a tensor is none).
        ValueError: an argument is out of range, the logits are not (N, C), the model ends in log-softmax or gives one
            logit (without a binary loss), or x or the logits are 16-bit with a finite difference.
        RuntimeError: gradients are disabled, there is no gradient path from x to the logits, the model is compiled
            (exact), or the penalty is inside a transformation of ``torch.func``, which it does not support.
    """

    p: float = 2.0
    power: float = 1
    method: str = "exact"
    step_size: float = 1e-2
    fast: bool = True

    def __post_init__(self) -> None:
        check_norm(self.p, self.power)
        check_choice("method", self.method, ("exact", "finite_difference"))
        if not 0 < check_number("step_size", self.step_size) < float("inf"):
            raise ValueError(f"step_size is {self.step_size}; it must be positive and finite, in the units of x")

    def per_sample(self, shared: SharedForward) -> Tensor:
        """The penalty of each sample, (N,). The labels are not used."""
        if self.method == "exact":
            return shared.gradient_norm("log_density", self.p, self.power)
        for x in shared.given.differentiated:
            _refuse_coarse("x is", x.dtype)
        device = shared.given.device
        with without_autocast(device):
            random_state = RandomState(device)
            shared.run(derivatives=1)
            _refuse_coarse("the logits are", shared.logits.dtype)
            log_density = shared.log_density
            norm, directions = self._dual_direction(shared, shared.gradients_without_graph(log_density))
            # From the caller's x: if that needs no gradient, neither does the second forward's input.
            step_size = float(self.step_size)
            moved = [x + step_size * d for x, d in zip(shared.given.differentiated, directions, strict=True)]
            with random_state.replayed():
                moved_density = shared.log_density_of(shared.logits_at(*moved))
            # Other samples move this one through batch norm, so a zero direction alone would not give zero.
            difference = torch.where(norm == 0, 0.0, moved_density - log_density)
            return gradient_norm(difference / step_size, 1.0, power=self.power)

    def _dual_direction(
        self, shared: SharedForward, gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """n = ‖g‖ₚ (N,), g masked, and d = ∇n, which has unit dual norm and d·g = n; 0 at a zero gradient."""
        leaves = [gradient.detach().requires_grad_() for gradient in gradients]
        norm = gradient_norm(shared.rows(leaves), self.p)
        return norm.detach(), torch.autograd.grad(norm.sum(), leaves)


def _refuse_coarse(found: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{found} {dtype}, too coarse for a finite difference; use float32 or float64 throughout, or method='exact'"
        )
