"""Gradient matching: a student's input gradient is drawn to a teacher's.

    R(x, y) = ‖∇ₓ ℓ(f_S(x), y) − ∇ₓ ℓ(f_T(x), y)‖ₚ^power,   f_S the student's logits, f_T the teacher's

Source: gradient-based attention transfer, Zagoruyko and Komodakis, *Paying more attention to attention*, ICLR 2017
(arXiv 1612.03928), section 3.2: ℓ the cross-entropy, p = 2 and power = 1, with β/2 as the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..ops.gradient_norm import check_norm
from .checks import check_choice, check_model
from .model_state import in_eval_mode
from .shared import GRADIENTS_OF, Penalty, SharedForward, differentiable_input, input_gradients, logits_of


@dataclass(frozen=True)
class GradientMatchingPenalty(Penalty):
    """``penalty(student, x, y)`` is the mean of ``‖∇ₓ ℓ_student − ∇ₓ ℓ_teacher‖ₚ^power``.

    Differentiable with respect to the student's parameters, and to x where that requires a gradient (``x.grad`` does
    not see the inner passes). The teacher runs in eval mode, once forward and once back to x, without a graph of second
    order; its gradient is a constant, with respect to x too. Its parameters get no gradient, its buffers stay as they
    are, and each of its modules is in its own mode again afterwards. A step costs 2/3 of a plain step more than the
    density penalty's, where the teacher is as large as the student. A teacher whose parameters require no gradient
    (``teacher.requires_grad_(False)``) keeps less memory for its pass. In train mode batch norm couples the student's
    samples. In float16 the inner passes run with a cotangent of 2⁸, undone in float32.

    Source: Zagoruyko and Komodakis (ICLR 2017, arXiv 1612.03928), section 3.2, whose form is p = 2 and power = 1 with
    the weight β/2.

    Args:
        teacher: maps x to logits (N, C), on the device of x; a ``torch.nn.Module``, or a callable that is in eval mode.
        p: the order of the norm, in [1, ∞].
        power: a positive number.
        of: ℓ. ``"cross_entropy"`` (y: class indices (N,) or probabilities (N, C)), ``"target_logit"`` (y: class
            indices) or ``"log_density"``, the log-sum-exp of the logits (y is not used). An ignored row, index −100,
            has penalty 0 in the first two and counts in the mean of the penalty.
        fast: False runs the penalty's own operations and the student's layers on plain PyTorch.

    Raises:
        TypeError: the teacher is not callable, x is not a floating-point tensor, y is of the wrong type, or p or power
            is not a number.
        ValueError: an argument is out of range, the logits or y have the wrong shape, or a model ends in log-softmax
            with ``of="log_density"``.
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
        RuntimeError: gradients are disabled, there is no gradient path from x to the logits of either model, the
            student is compiled, or the penalty is inside a transformation of ``torch.func``.
    """

    teacher: Callable[[Tensor], Tensor] = field(repr=False)
    p: float = field(default=2.0, kw_only=True)
    power: float = field(default=1, kw_only=True)
    of: str = field(default="cross_entropy", kw_only=True)
    fast: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_model(self.teacher)
        check_norm(self.p, self.power)
        check_choice("of", self.of, GRADIENTS_OF)

    def per_sample(self, shared: SharedForward) -> Tensor:
        """The penalty of each sample, (N,)."""
        target = self._teacher_gradients(shared)  # first: what it keeps is gone before the student's forward
        return shared.gradient_norm(self.of, self.p, self.power, target=target)

    def _teacher_gradients(self, shared: SharedForward) -> tuple[Tensor, ...]:
        """∇ₓ ℓ of the teacher's logits, without a graph; in at least float32 where it may run in float16."""
        with in_eval_mode(self.teacher):
            inputs = [differentiable_input(x.detach()) for x in shared.given.differentiated]
            logits = logits_of(
                self.teacher, shared.given.with_differentiated(inputs), shared.given.samples, derivatives=1
            )
            return input_gradients(shared.output(self.of, logits), inputs, names=shared.given.names).undone()
