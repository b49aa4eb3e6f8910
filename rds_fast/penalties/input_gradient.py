"""Penalties on the input gradient of the cross-entropy or of the target's logit.

    R(x, y) = ‖∇ₓ CE(f(x), y)‖ₚ^power    or    ‖∇ₓ f_y(x)‖ₚ^power

Sources: double backpropagation, Drucker and LeCun (1992); input-gradient regularisation, Ross and Doshi-Velez (2018),
both of the loss with power 2; of the target's logit as the baseline of Yang et al., ECCV 2024 (arXiv 2407.04370).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..compilation import uncompiled
from ..ops.cross_entropy import check_class_indices, cross_entropy_with_logsumexp
from ..ops.gradient_norm import check_norm
from .checks import IGNORED, check_choice, check_given_logits, check_labels
from .inner_pass import PerSample, forward_for_double_backward, implementation, input_gradient_norm


@dataclass(frozen=True, kw_only=True)
class InputGradientPenalty:
    """``penalty(model, x, y)`` is the mean of ``‖∇ₓ CE(f(x), y)‖ₚ^power`` or of ``‖∇ₓ f_y(x)‖ₚ^power``.

    Differentiable with respect to the model's parameters, and to x where that requires a gradient (``x.grad`` does not
    see the inner pass). At a zero gradient the penalty and its gradient are 0. In train mode batch norm couples the
    samples. In float16 the inner pass runs with a cotangent of 2⁸, undone in float32.

    Sources: Drucker and LeCun (1992); Ross and Doshi-Velez (2018); for the target's logit Yang et al., ECCV 2024
    (arXiv 2407.04370).

    Args:
        p: the order of the norm, in [1, ∞]. This and power may be Python's or NumPy's numbers.
        power: a positive number; 2 is the form of the first two sources. The command ``rds-fast train`` has its own
            default for both penalties, 1, the form of the third.
        of: ``"cross_entropy"`` (y: class indices (N,) or probabilities (N, C)) or ``"target_logit"`` (y: class
            indices alone). An ignored row, index −100, has penalty 0 and counts in the mean of the penalty.
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
    power: float = 2
    of: str = "cross_entropy"
    fast: bool = True

    def __post_init__(self) -> None:
        check_norm(self.p, self.power)
        check_choice("of", self.of, ("cross_entropy", "target_logit"))

    @uncompiled
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The mean penalty of x (N, ...) with labels y, a scalar."""
        with implementation(self.fast):
            logits, x = forward_for_double_backward(model, x)
            return input_gradient_norm(self._output(logits, y), x, self.p, self.power).mean()

    @uncompiled
    def from_logits(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The mean penalty from logits computed from x, which required a gradient then; their forward is shared."""
        check_given_logits(logits, x)
        with implementation(self.fast):
            return input_gradient_norm(self._output(logits, y), x, self.p, self.power).mean()

    @uncompiled
    def per_sample(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, label_smoothing: float = 0.0
    ) -> PerSample:
        """The penalty of each sample, the cross-entropy and the logits, from one forward.

        Label smoothing is for the cross-entropy that is returned; the penalty's own has none.
        """
        with implementation(self.fast):
            logits, x = forward_for_double_backward(model, x)
            cross_entropy, _ = cross_entropy_with_logsumexp(logits, y, label_smoothing=label_smoothing)
            shared = self.of == "cross_entropy" and label_smoothing == 0
            output = cross_entropy if shared else self._output(logits, y)
            return PerSample(input_gradient_norm(output, x, self.p, self.power), cross_entropy, logits)

    def _output(self, logits: Tensor, y: Tensor) -> Tensor:
        """What is differentiated with respect to x, (N,)."""
        if self.of == "cross_entropy":
            return cross_entropy_with_logsumexp(logits, y)[0]
        return target_logit(logits, y)


def target_logit(logits: Tensor, y: Tensor) -> Tensor:
    """f_y (N,); 0, with the gradient 0, for an ignored row, as its cross-entropy is."""
    check_labels(y, logits)
    if not logits.is_cuda:
        check_class_indices(y, logits.shape[1], IGNORED)
    ignored = y == IGNORED
    return logits.gather(1, y.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).masked_fill(ignored, 0.0)
