"""The Jacobian penalty: the squared Frobenius norm of the logits' derivative with respect to x.

With J(x) = ∂f/∂x of shape (C, D), C logits and D values a sample,

    R(x) = ½ ‖J(x)‖²_F = ½ Σ_c ‖∇ₓ f_c(x)‖₂² = ½ C · E ‖∇ₓ (v · f(x))‖₂²,   v uniform on the unit sphere of ℝ^C,

since E v vᵀ = I / C. K random directions estimate the expectation without bias, at one inner pass each.

Source: Hoffman, Roberts and Yaida, *Robust learning with Jacobian regularization*, 2019 (arXiv 1908.02729), equations
3 to 5 and algorithm 1; their λ_JR is the weight here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .shared import Penalty, SharedForward


@dataclass(frozen=True, kw_only=True)
class JacobianPenalty(Penalty):
    """``penalty(model, x, y)`` is the mean of ``½ ‖∂f/∂x‖²_F``, or an unbiased estimate of it.

    Differentiable with respect to the model's parameters, and to x where that requires a gradient (``x.grad`` does not
    see the inner pass). With one projection it costs what the density penalty costs: twice the arithmetic of a step of
    cross-entropy; each further one costs an inner pass and its double backward more. The relative variance of the
    estimate over the projections is at most 2 (C − 1) / (K (C + 2)), with equality where J has rank 1. In train mode
    batch norm couples the samples. In float16 the inner pass runs with a cotangent of 2⁸, undone in float32.

    Source: Hoffman, Roberts and Yaida (2019, arXiv 1908.02729).

    Args:
        projections: K, directions drawn a sample and step, at least 1; ``None`` is the exact norm by C inner passes.
        generator: the source of the directions, on the device of x; default: PyTorch's own of that device.
        fast: False runs the penalty's own operations and the model's layers on plain PyTorch.

    Raises:
        TypeError: projections is neither an int nor None, x is not a floating-point tensor, or the model is not
            callable or does not return one tensor.
        ValueError: projections is less than 1, or the logits are not (N, C).
        RuntimeError: gradients are disabled, there is no gradient path from x to the logits, the model is compiled, the
            generator is on another device, or the penalty is inside a transformation of ``torch.func``.
    """

    projections: int | None = 1
    generator: torch.Generator | None = None
    fast: bool = True

    def __post_init__(self) -> None:
        if self.projections is None:
            return
        if isinstance(self.projections, bool) or not isinstance(self.projections, int):
            raise TypeError(
                f"projections is {self.projections!r}, a {type(self.projections).__name__}; it must be an int, the "
                "number of random directions, or None for the exact norm"
            )
        if self.projections < 1:
            raise ValueError(f"projections is {self.projections}; it must be at least 1, or None for the exact norm")

    def per_sample(self, shared: SharedForward) -> Tensor:
        """½ ‖J‖²_F of each sample, (N,). The labels are not used."""
        logits = shared.logits
        squares = [shared.gradient_norm(output, 2.0, 2) for output in self._outputs(logits)]
        # A basis gives the sum itself; each random direction gives one C-th of it on average.
        scale = 0.5 if self.projections is None else 0.5 * logits.shape[1] / self.projections
        return scale * torch.stack(squares).sum(0)

    def _outputs(self, logits: Tensor) -> Iterator[Tensor]:
        """Each logit, or v · f for each direction v drawn, (N,)."""
        if self.projections is None:
            yield from logits.unbind(1)
            return
        # In 16 bits v would be off unit length by its rounding; it is the logits' backward that rounds it, once.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        for _ in range(self.projections):
            v = torch.randn(logits.shape, dtype=dtype, device=logits.device, generator=self.generator)
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            yield (logits * v).sum(1)
