"""Penalties on the input gradient of the cross-entropy or of the target's logit.

    R(x, y) = ‖∇ₓ CE(f(x), y)‖ₚ^power    or    ‖∇ₓ f_y(x)‖ₚ^power

Sources: double backpropagation, Drucker and LeCun (1992); input-gradient regularisation, Ross and Doshi-Velez (2018),
both of the loss with power 2; of the target's logit as the baseline of Yang et al., ECCV 2024 (arXiv 2407.04370).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.gradient_norm import check_norm
from .checks import check_choice
from .shared import GRADIENTS_OF, Penalty, SharedForward


@dataclass(frozen=True, kw_only=True)
class InputGradientPenalty(Penalty):
    """``penalty(model, x, y)`` is the mean of ``‖∇ₓ CE(f(x), y)‖ₚ^power`` or of ``‖∇ₓ f_y(x)‖ₚ^power``.

    Differentiable with respect to the model's parameters, and to x where that requires a gradient (``x.grad`` does not
    see the inner pass). At a zero gradient the penalty and its gradient are 0. In train mode batch norm couples the
    samples. In float16 the inner pass runs with a cotangent of 2⁸, undone in float32.

    Sources: Drucker and LeCun (1992); Ross and Doshi-Velez (2018); for the target's logit Yang et al., ECCV 2024
    (arXiv 2407.04370).

    Args:
        p: the order of the norm, in [1, ∞]. This and power may be Python's or NumPy's numbers.
        power: a positive number; 1 is the form of the third source, 2 that of the first two.
        of: ``"cross_entropy"`` (y: class indices (N,) or probabilities (N, C); in a ``PenalizedLoss`` with a loss of
            its own, that loss), ``"target_logit"`` (y: class indices alone) or ``"log_density"``, which is the exact
            ``rds_fast.DensityPenalty`` (y is not used). An ignored row, index −100, has penalty 0 in the first two and
            counts in the mean of the penalty.
        fast: False runs the penalty's own operations (cross-entropy, norm) on plain PyTorch.

    Raises:
        TypeError: x is not a floating-point tensor, y is of the wrong type, the model is not callable or does not
            return one tensor, or p or power is not a number (a tensor is none).
        ValueError: an argument is out of range, or the logits or y have the wrong shape.
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
        RuntimeError: gradients are disabled, there is no gradient path from x to the logits, the model is compiled, or
            the penalty is inside a transformation of ``torch.func``, which it does not support.
    """

    p: float = 2.0
    power: float = 1
    of: str = "cross_entropy"
    fast: bool = True

    def __post_init__(self) -> None:
        check_norm(self.p, self.power)
        check_choice("of", self.of, GRADIENTS_OF)

    def per_sample(self, shared: SharedForward) -> Tensor:
        """The penalty of each sample, (N,)."""
        return shared.gradient_norm(self.of, self.p, self.power)
