"""The training loss: cross-entropy plus a weighted penalty, from one forward where the penalty allows it.

The penalty may be left out of most steps, and of a part of each batch; either way the loss keeps its expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..compilation import uncompiled
from ..double_backward import fast_double_backward
from ..ops.cross_entropy import cross_entropy_with_logsumexp
from ..ops.inputs import check_number
from .checks import IGNORED, check_autograd, check_input
from .inner_pass import (
    differentiable_input,
    forward,
    frozen_statistics,
    implementation,
    logits_of,
    samples_interact,
)
from .schedules import Schedule, check_steps, check_weight, weight_at


class Penalty(Protocol):
    """A scalar penalty of a model at inputs x with labels y.

    A penalty of logits that were computed already may have ``from_logits(logits, x, y)`` too, x requiring a gradient;
    ``PenalizedLoss`` then shares the forward. One that computes the cross-entropy besides, of each sample, may have
    ``per_sample(model, x, y)`` to (penalty, cross-entropy, logits), with ``label_smoothing`` as a keyword where that is
    not 0.
    """

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor: ...


class LossTerms(NamedTuple):
    """The loss and what it is made of, attached to the graph but for the 0 of a penalty that was left out.

    The penalty is an unbiased estimate of its mean over the batch, and ``total = cross_entropy + weight · penalty``.
    """

    total: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    logits: Tensor


# The cross-entropy of each sample (N,), the penalty, and the logits.
_Terms = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PenalizedLoss:
    """``loss(model, x, y)``: mean cross-entropy + weight · penalty.

    The model runs once where the penalty can share its forward: ``DensityPenalty`` (the finite difference needs a
    second one), ``InputGradientPenalty``, ``JacobianPenalty``, ``GradientMatchingPenalty``, and any penalty with
    ``from_logits``. A second forward leaves the model's buffers alone. With a finite difference under autocast the
    shared forward, and so the cross-entropy, is in x's own precision.

    **every = k**: at a step divisible by k the penalty counts k times, at the others it is 0 and the step is plain
    cross-entropy (lazy regularisation, Karras et al. 2020). The mean over k steps at the same parameters is the loss
    itself. With r the cost of a penalised step relative to a plain one, a step costs 1 + (r − 1) / k on average.

    **share = s**: the penalty is the mean over n = max(1, round(s N)) of the batch's N samples, drawn anew in each
    call, uniformly and without replacement; each sample is in with chance n / N, so the expectation is the mean over
    the batch. The cross-entropy is always of all N samples. What that costs depends on the model:

    - Samples do not interact, and the penalty shares its forward: the batch is cut in two, n samples with the penalty
      and the others without, at 1 + s (r − 1).
    - Batch norm uses the statistics of the batch, and the cross-entropy needs those of the whole batch: one plain
      forward of all N, then the penalty's own of the n, with *their* statistics (and the running ones left alone), at
      1 + s r. From s = ½ on that saves no arithmetic. The estimate is then unbiased for the penalty of batches of n.
      The same two forwards serve whatever else has buffers in train mode, a model that is no ``torch.nn.Module``, and
      penalties with the call alone.

    Batch norm is recognised by PyTorch's classes; a layer of one's own that mixes samples, without buffers, is not.

    Args:
        penalty: a callable ``penalty(model, x, y)`` to a scalar, such as ``rds_fast.DensityPenalty()``; with a share
            below 1 it must be a mean over the samples.
        weight: λ, a number (Python's or NumPy's) that is not negative, or a schedule: a callable of the step, such as
            ``rds_fast.schedules.LinearWarmup`` or ``rds_fast.PenaltyRatio``. A schedule may return a tensor of no
            dimension; its value is not read, so neither checked, and takes no gradient.
        every: k, at least 1; above 1 it needs the step.
        share: s in (0, 1].
        generator: the source of the samples drawn, on x's device; default: PyTorch's own of that device.
        label_smoothing: ε in [0, 1] of the cross-entropy: its target becomes (1 − ε) target + ε / C for C classes. The
            penalty is not affected.
        fast: False runs the loss's and the penalty's own operations (log-sum-exp, cross-entropy, norm) and the model's
            layers on plain PyTorch; True runs what is differentiated twice under ``rds_fast.fast_double_backward``.

    Source of ``every``: Karras et al., *Analyzing and improving the image quality of StyleGAN*, CVPR 2020, appendix B.

    Raises:
        TypeError: penalty is not callable, every is not an int, or a weight, the share or the label smoothing is not a
            number.
        ValueError: a weight is negative or not finite, every is less than 1, or the share or the label smoothing is out
            of its range.
    """

    penalty: Penalty
    weight: float | Schedule = 0.1
    every: int = field(default=1, kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    generator: torch.Generator | None = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)
    fast: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.penalty) or isinstance(self.penalty, type):
            raise TypeError(
                f"penalty is {self.penalty!r}; it must be a callable penalty(model, x, y) such as DensityPenalty()"
            )
        if not callable(self.weight):
            check_weight(self.weight)
        check_steps(self.every, "every")
        if not 0 < check_number("share", self.share) <= 1:
            raise ValueError(f"share is {self.share}; it must be in (0, 1], the part of each batch that is penalised")
        if not 0 <= check_number("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1]")

    @uncompiled
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, step: int | None = None) -> LossTerms:
        """The loss of one batch; ``terms.total.backward()`` trains.

        Args:
            model: maps x to logits (N, C).
            x: (N, ...), floating point. ``x.grad`` does not see the inner pass; if x requires a gradient the total is
                differentiable with respect to it, and ``total.backward()`` fills ``x.grad`` like any loss of x.
            y: class indices (N,), rows of −100 left out of the cross-entropy and its mean as in PyTorch; or
                probabilities (N, C).
            step: the number of the training step, from 0; needed by a schedule and by ``every`` above 1.

        Returns:
            ``LossTerms(total, cross_entropy, penalty, logits)``: scalars, and logits (N, C) in the order of x. At a
            weight that is the number 0, and at a step without penalty, the total is the cross-entropy itself, and its
            backward costs no more than that.

        Raises:
            ValueError: step is missing and needed, or the schedule's weight is out of range.
            TypeError, ValueError, IndexError, RuntimeError: as the penalty and ``cross_entropy_with_logsumexp``.
        """
        weight = weight_at(self.weight, step)
        applied = self._applied_at(step)
        check_input(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"y is a {type(y).__name__}; it must be a torch.Tensor of class indices (N,) or probabilities (N, C)"
            )
        with implementation(self.fast):
            losses, penalty, logits = (self._terms if applied else self._without_penalty)(model, x, y)
            cross_entropy = mean_of_counted(losses, y)
        if applied and self.every > 1:
            penalty = self.every * penalty
        if isinstance(weight, Tensor):
            weight = weight.to(penalty.dtype)
        elif weight == 0:
            applied = False  # the graph of second order is not walked for nothing
        total = cross_entropy + weight * penalty if applied else cross_entropy
        return LossTerms(total, cross_entropy, penalty, logits)

    def _applied_at(self, step: int | None) -> bool:
        if self.every == 1:
            return True
        if step is None:
            raise ValueError(
                f"every is {self.every} and step was not given; call loss(model, x, y, step=step) with the number of "
                "the training step, from 0: the penalty is applied where it is divisible by every"
            )
        return step % self.every == 0

    def _terms(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> _Terms:
        """With the penalty, of all samples or of those drawn."""
        check_autograd()
        shares_forward = hasattr(self.penalty, "per_sample") or hasattr(self.penalty, "from_logits")
        drawn = max(1, round(float(self.share) * len(x)))
        if drawn >= len(x):
            return self._shared(model, x, y) if shares_forward else self._apart(model, x, y, x, y)
        if y.shape[:1] != x.shape[:1]:
            raise ValueError(f"y has shape {tuple(y.shape)}; it must have a row for each of the {len(x)} samples of x")
        order = torch.randperm(len(x), device=x.device, generator=self.generator)
        if shares_forward and not samples_interact(model):
            return self._cut(model, x, y, order, drawn)
        return self._apart(model, x, y, x[order[:drawn]], y[order[:drawn]])

    def _shared(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> _Terms:
        """From one forward, or what the penalty itself makes of it."""
        per_sample: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = getattr(self.penalty, "per_sample", None)
        if per_sample is not None:
            smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
            penalties, losses, logits = per_sample(model, x, y, **smoothing)
            return losses, penalties.mean(), logits
        inputs = differentiable_input(x)
        logits = forward(model, inputs)
        penalty = self.penalty.from_logits(logits, inputs, y)  # type: ignore[attr-defined]  # as the caller looked up
        return self._cross_entropy(logits, y), _scalar(penalty), logits

    def _cut(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, order: Tensor, drawn: int) -> _Terms:
        """The samples drawn with their penalty, the others without; the cross-entropies are in the order drawn."""
        first, rest = order[:drawn], order[drawn:]
        first_losses, penalty, first_logits = self._shared(model, x[first], y[first])
        rest_losses, _, rest_logits = self._without_penalty(model, x[rest], y[rest])
        logits = torch.cat([first_logits, rest_logits])
        in_order = torch.empty_like(logits).index_copy(0, order, logits)
        return torch.cat([first_losses, rest_losses]), penalty, in_order

    def _apart(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, penalized_x: Tensor, penalized_y: Tensor
    ) -> _Terms:
        """A plain forward for the cross-entropy; the penalty runs the model itself, on inputs of its own."""
        losses, _, logits = self._without_penalty(model, x, y)
        with frozen_statistics(model), fast_double_backward():
            penalty = self.penalty(model, penalized_x, penalized_y)
        return losses, _scalar(penalty), logits

    def _without_penalty(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> _Terms:
        logits = logits_of(model, x)
        losses = self._cross_entropy(logits, y)
        return losses, losses.new_zeros(()), logits

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_with_logsumexp(logits, y, label_smoothing=self.label_smoothing)[0]


def mean_of_counted(cross_entropy: Tensor, y: Tensor) -> Tensor:
    """The mean over the samples that count, as ``torch.nn.functional.cross_entropy`` takes it."""
    if y.is_floating_point():
        return cross_entropy.mean()
    return cross_entropy.sum() / (y != IGNORED).sum()


def _scalar(penalty: Any) -> Tensor:
    if not isinstance(penalty, Tensor) or penalty.dim():
        given = f"a tensor of shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
        raise TypeError(f"the penalty returned {given}; it must return a scalar tensor, such as the mean over samples")
    return penalty
