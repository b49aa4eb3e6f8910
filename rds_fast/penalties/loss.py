"""The training loss: cross-entropy plus a weighted penalty, from one forward where the penalty allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..double_backward import fast_double_backward
from ..ops.cross_entropy import cross_entropy_with_logsumexp
from ..ops.inputs import check_number
from .checks import IGNORED, check_input
from .inner_pass import PerSample, differentiable_input, forward, implementation, logits_of
from .schedules import Schedule, check_weight


class Penalty(Protocol):
    """A scalar penalty of a model at inputs x with labels y.

    A penalty of logits that were computed already may have ``from_logits(logits, x, y)`` too, x requiring a gradient;
    ``PenalizedLoss`` then shares the forward. One that computes the cross-entropy besides, of each sample, may have
    ``per_sample(model, x, y, label_smoothing=0.0)`` to (penalty, cross-entropy, logits).
    """

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor: ...


class LossTerms(NamedTuple):
    """The loss and what it is made of; all are attached to the graph."""

    total: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    logits: Tensor


@dataclass(frozen=True)
class PenalizedLoss:
    """``loss(model, x, y)``: mean cross-entropy + weight · penalty.

    The model runs once where the penalty can share its forward: ``DensityPenalty`` (the finite difference needs a
    second one), ``InputGradientPenalty``, and any penalty with ``from_logits``. With a finite difference under autocast
    the shared forward, and so the cross-entropy, is in x's own precision.

    Args:
        penalty: a callable ``penalty(model, x, y)`` to a scalar, such as ``rds_fast.DensityPenalty()``.
        weight: λ, a number (Python's or NumPy's) that is not negative, or a schedule: a callable of the step, such as
            ``rds_fast.schedules.LinearWarmup``.
        label_smoothing: ε in [0, 1] of the cross-entropy: its target becomes (1 − ε) target + ε / C for C classes. The
            penalty is not affected.
        fast: False runs the loss's and the penalty's own operations (log-sum-exp, cross-entropy, norm) and the model's
            layers on plain PyTorch; True runs what is differentiated twice under ``rds_fast.fast_double_backward``.

    Raises:
        TypeError: penalty is not callable, or a weight or the label smoothing is not a number.
        ValueError: a weight is negative or not finite, or the label smoothing is outside [0, 1].
    """

    penalty: Penalty
    weight: float | Schedule = 0.1
    label_smoothing: float = field(default=0.0, kw_only=True)
    fast: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.penalty) or isinstance(self.penalty, type):
            raise TypeError(
                f"penalty is {self.penalty!r}; it must be a callable penalty(model, x, y) such as DensityPenalty()"
            )
        if not callable(self.weight):
            check_weight(self.weight)
        if not 0 <= check_number("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1]")

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, step: int | None = None) -> LossTerms:
        """The loss of one batch; ``terms.total.backward()`` trains.

        Args:
            model: maps x to logits (N, C).
            x: (N, ...), floating point. ``x.grad`` does not see the inner pass; if x requires a gradient the total is
                differentiable with respect to it, and ``total.backward()`` fills ``x.grad`` like any loss of x.
            y: class indices (N,), rows of −100 left out of the cross-entropy and its mean as in PyTorch; or
                probabilities (N, C).
            step: the number of the training step, from 0; needed by a schedule.

        Returns:
            ``LossTerms(total, cross_entropy, penalty, logits)``: scalars, and logits (N, C). At weight 0 the total is
            the cross-entropy itself, and its backward costs no more than that.

        Raises:
            ValueError: the weight is a schedule and step is missing, or the schedule's weight is out of range.
            TypeError, ValueError, IndexError, RuntimeError: as the penalty and ``cross_entropy_with_logsumexp``.
        """
        weight = self._weight_at(step)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"y is a {type(y).__name__}; it must be a torch.Tensor of class indices (N,) or probabilities (N, C)"
            )
        with implementation(self.fast):
            cross_entropy, penalty, logits = self._terms(model, x, y)
        total = cross_entropy if weight == 0 else cross_entropy + weight * penalty
        return LossTerms(total, cross_entropy, penalty, logits)

    def _weight_at(self, step: int | None) -> float:
        if not callable(self.weight):
            return float(self.weight)
        if step is None:
            raise ValueError(
                f"weight is a schedule ({self.weight!r}) and step was not given; call loss(model, x, y, step=step) "
                "with the number of the training step"
            )
        return check_weight(self.weight(step), f"the weight at step {step}")

    def _terms(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy, mean penalty and logits, sharing as much of the forward as the penalty can."""
        per_sample: Callable[..., PerSample] | None = getattr(self.penalty, "per_sample", None)
        from_logits: Callable[..., Tensor] | None = getattr(self.penalty, "from_logits", None)
        if per_sample is not None:
            terms = per_sample(model, x, y, label_smoothing=self.label_smoothing)
            assert terms.cross_entropy is not None  # labels were given
            return _mean(terms.cross_entropy, y), terms.penalty.mean(), terms.logits
        if from_logits is not None:
            inputs = differentiable_input(x)
            logits = forward(model, inputs)
            penalty = from_logits(logits, inputs, y)
        else:
            check_input(x)
            logits = logits_of(model, x)
            with fast_double_backward():
                penalty = self.penalty(model, x, y)
        cross_entropy, _ = cross_entropy_with_logsumexp(logits, y, label_smoothing=self.label_smoothing)
        return _mean(cross_entropy, y), _scalar(penalty), logits


def _mean(cross_entropy: Tensor, y: Tensor) -> Tensor:
    """The mean over the samples that count, as ``torch.nn.functional.cross_entropy`` takes it."""
    if y.is_floating_point():
        return cross_entropy.mean()
    return cross_entropy.sum() / (y != IGNORED).sum()


def _scalar(penalty: Any) -> Tensor:
    if not isinstance(penalty, Tensor) or penalty.dim():
        given = f"a tensor of shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
        raise TypeError(f"the penalty returned {given}; it must return a scalar tensor, such as the mean over samples")
    return penalty
