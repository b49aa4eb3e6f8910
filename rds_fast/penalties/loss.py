"""The training loss: cross-entropy plus a weighted penalty, from one forward where the penalty allows it.

The penalty may be left out of most steps, and of a part of each batch; either way the loss keeps its expectation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import implementation
from ..compilation import uncompiled
from ..ops.inputs import check_number
from ..reference import precise
from .checks import check_autograd, check_targets
from .inputs import Inputs, check_rows, rows_of
from .losses import Loss, check_label_smoothing, check_loss, check_sample_weight, mean_of_counted, weighted_mean
from .model_state import frozen_statistics, samples_interact
from .schedules import Schedule, check_steps, check_weight, weight_at
from .shared import Penalty, SharedForward, penalties_of


class LossTerms(NamedTuple):
    """The loss and what it is made of, attached to the graph but for the 0 of a penalty that was left out.

    The penalty is an unbiased estimate of its mean over the batch, and ``total = cross_entropy + weight · penalty``.
    With a loss of one's own, ``cross_entropy`` is its mean.
    """

    total: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    logits: Tensor


class _Batch(NamedTuple):
    """What a call was given, checked."""

    model: Callable[..., Tensor]
    inputs: Inputs
    y: Any
    sample_weight: Tensor | None

    def at(self, order: Tensor) -> _Batch:
        """The samples at ``order``."""
        weight = None if self.sample_weight is None else self.sample_weight[order]
        return _Batch(self.model, self.inputs.rows(order), rows_of(self.y, order, self.inputs.samples), weight)


# The loss of each sample (N,), the penalty, and the logits.
_Terms = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PenalizedLoss:
    """``loss(model, x, y)``: mean cross-entropy + weight · mean penalty.

    The model runs once where the penalty takes what it needs from that forward: all penalties here do, but that the
    finite difference needs a second one, and the penalties of attributions forwards of their own. A second forward
    leaves the model's buffers alone. With a finite difference under autocast the shared forward, and so the
    cross-entropy, is in x's own precision.

    **every = k**: at a step divisible by k the penalty counts k times, at the others it is 0 and the step is plain
    cross-entropy (lazy regularisation, Karras et al. 2020). The mean over k steps at the same parameters is the loss
    itself. With r the cost of a penalised step relative to a plain one, a step costs 1 + (r − 1) / k on average.

    **share = s**: the penalty is the mean over n = max(1, round(s N)) of the batch's N samples, drawn anew in each
    call, uniformly and without replacement; each sample is in with chance n / N, so the expectation is the mean over
    the batch. The cross-entropy is always of all N samples. What that costs depends on the model:

    - Samples do not interact: the batch is cut in two, n samples with the penalty and the others without, at
      1 + s (r − 1).
    - Batch norm uses the statistics of the batch, and the cross-entropy needs those of the whole batch: one plain
      forward of all N, then the penalty's own of the n, with *their* statistics (and the running ones left alone), at
      1 + s r. From s = ½ on that saves no arithmetic. The estimate is then unbiased for the penalty of batches of n.
      The same two forwards serve whatever else has buffers in train mode, and a model that is no ``torch.nn.Module``.

    Batch norm is recognised by PyTorch's classes; a layer of one's own that mixes samples, without buffers, is not.

    **loss**: a callable of (logits, y) to the loss of each sample, (N,), in the place of the softmax cross-entropy,
    such as ``rds_fast.BinaryCrossEntropy()`` or a focal loss. ``terms.cross_entropy`` is then its mean, over all
    samples, and ``of="cross_entropy"`` its gradient. The log density of x is log Σ exp f where y holds class indices
    (N,), or the loss is PyTorch's cross-entropy; Σ log(1 + exp fᵢ) where it is a binary cross-entropy of PyTorch's or
    ours, or there is one logit; otherwise the loss has to say it, by an attribute ``log_density``, a function of the
    logits, or the density penalty raises.

    **Several inputs**: x may be a tuple, and the model is called as ``model(*x)``, or a dict, ``model(**x)``. The
    penalty differentiates with respect to the floating-point tensors among them, or to those that ``with_respect_to``
    names (in a tuple: counts), each (N, ...); its norm is of all their gradients of a sample together, as if they were
    one vector. The other entries are handed on as they are (with a share, those with N rows by samples).

    **sample_weight = w**: the loss is Σ wₙ ℓₙ / Σ wₙ + λ Σ wₙ Rₙ / Σ wₙ: a sample of weight 2 counts as if it were in
    the batch twice, one of weight 0 as if it were not (but in batch norm's statistics). With ``class_weight[y]`` the
    cross-entropy is ``torch.nn.functional.cross_entropy(logits, y, weight=class_weight)``, without label smoothing
    (which PyTorch weights by class too).

    **mask**: the penalty is of the part of the gradient where the mask is True, or of the gradient times the mask where
    that is floating-point. With a mask of what is irrelevant the model is *right for the right reasons* (Ross, Hughes
    and Doshi-Velez 2017; their own gradient is that of Σ log p_k, and their power 2).

    Args:
        penalty: an object with ``per_sample(shared)`` to the penalty of each sample (N,), such as
            ``rds_fast.DensityPenalty()``, or a function of the shared forward to that; see ``rds_fast.Penalty``.
        weight: λ, a number (Python's or NumPy's) that is not negative, or a schedule: a callable of the step, such as
            ``rds_fast.schedules.LinearWarmup`` or ``rds_fast.PenaltyRatio``. A schedule may return a tensor of no
            dimension; its value is not read, so neither checked, and takes no gradient.
        every: k, at least 1; above 1 it needs the step.
        share: s in (0, 1].
        generator: the source of the samples drawn, on x's device; default: PyTorch's own of that device.
        label_smoothing: ε in [0, 1] of the cross-entropy: its target becomes (1 − ε) target + ε / C for C classes. The
            penalty is not affected.
        loss: ℓ, see above; None is the cross-entropy.
        with_respect_to: names or positions of the inputs to differentiate with respect to; one, or several.
        fast: False runs the loss's and the penalty's own operations (log-sum-exp, cross-entropy, norm) and the model's
            layers on plain PyTorch; True runs what is differentiated twice under ``rds_fast.fast_double_backward``.

    Sources: of ``every``, Karras et al., *Analyzing and improving the image quality of StyleGAN*, CVPR 2020, appendix
    B; of ``mask``, Ross, Hughes and Doshi-Velez, *Right for the right reasons*, IJCAI 2017.

    Raises:
        TypeError: penalty or loss is not callable as above, every is not an int, or a weight, the share or the label
            smoothing is not a number.
        ValueError: a weight is negative or not finite, every is less than 1, the share or the label smoothing is out of
            its range or stands beside a loss, or the loss takes the mean itself.
    """

    penalty: Penalty | Callable[[SharedForward], Tensor]
    weight: float | Schedule = 0.1
    every: int = field(default=1, kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    generator: torch.Generator | None = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)
    loss: Loss | None = field(default=None, kw_only=True)
    with_respect_to: str | int | Sequence[str | int] | None = field(default=None, kw_only=True)
    fast: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _check_penalty(self.penalty)
        if not callable(self.weight):
            check_weight(self.weight)
        check_steps(self.every, "every")
        if not 0 < check_number("share", self.share) <= 1:
            raise ValueError(f"share is {self.share}; it must be in (0, 1], the part of each batch that is penalised")
        check_label_smoothing(self.label_smoothing)
        check_loss(self.loss)
        if self.loss is not None and self.label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} beside a loss of your own, which it would not change; give "
                "the loss its smoothing itself"
            )

    @uncompiled
    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Any,
        y: Any,
        step: int | None = None,
        mask: Any = None,
        sample_weight: Tensor | None = None,
    ) -> LossTerms:
        """The loss of one batch; ``terms.total.backward()`` trains.

        Args:
            model: maps x to logits (N, C).
            x: (N, ...), floating point; or a tuple or a dict of inputs. ``x.grad`` does not see the inner pass; if x
                requires a gradient the total is differentiable with respect to it, and ``total.backward()`` fills
                ``x.grad`` like any loss of x.
            y: class indices (N,), rows of −100 left out of the cross-entropy and its mean as in PyTorch; or
                probabilities (N, C). With a loss of one's own, what that takes; with a share besides, a tensor with a
                row for each sample, or a tuple or a dict of such and of what is common to all samples.
            step: the number of the training step, from 0; needed by a schedule and by ``every`` above 1.
            mask: bool or floating point, of x's shape or one that expands to it; for several inputs a tuple or a dict
                of masks like x, in which None, or no entry, leaves an input as it is.
            sample_weight: (N,), floating point, not negative.

        Returns:
            ``LossTerms(total, cross_entropy, penalty, logits)``: scalars, and logits (N, C) in the order of x. At a
            weight that is the number 0, and at a step without penalty, the total is the cross-entropy itself, and its
            backward costs no more than that.

        Raises:
            ValueError: step is missing and needed, the schedule's weight is out of range, a mask or the sample weights
                do not fit, or the penalty is one of no input gradient that a mask could confine.
            TypeError, ValueError, IndexError, RuntimeError: as the penalty and ``cross_entropy_with_logsumexp``.
        """
        weight = weight_at(self.weight, step)
        applied = self._applied_at(step)
        inputs = Inputs.checked(x, self.with_respect_to, mask)
        if self.loss is None:
            check_targets(y)
        check_sample_weight(sample_weight, inputs.differentiated[0])
        batch = _Batch(model, inputs, y, sample_weight)
        with implementation(self.fast and (not applied or getattr(self.penalty, "fast", True))):
            losses, penalty, logits = self._terms(batch) if applied else self._shared(batch, penalised=False)
            if self.loss is None:
                cross_entropy = mean_of_counted(losses, y, sample_weight)
            else:
                cross_entropy = weighted_mean(losses, sample_weight)
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

    def _terms(self, batch: _Batch) -> _Terms:
        """With the penalty, of all samples or of those drawn."""
        check_autograd()
        samples = batch.inputs.samples
        drawn = max(1, round(float(self.share) * samples))
        if drawn >= samples:
            losses, penalties, logits = self._shared(batch)
            return losses, weighted_mean(penalties, batch.sample_weight), logits
        check_rows(batch.y, samples)
        order = torch.randperm(samples, device=batch.inputs.device, generator=self.generator)
        part = batch.at(order[:drawn])
        if samples_interact(batch.model):
            losses, _, logits = self._shared(batch, penalised=False)
            with frozen_statistics(batch.model):
                penalties = penalties_of(self.penalty, self._forward(part))
        else:
            first_losses, penalties, first_logits = self._shared(part)
            rest_losses, _, rest_logits = self._shared(batch.at(order[drawn:]), penalised=False)
            losses, logits = (
                torch.empty_like(both).index_copy(0, order, both)
                for both in (torch.cat([first_losses, rest_losses]), torch.cat([first_logits, rest_logits]))
            )
        if batch.sample_weight is None or part.sample_weight is None:
            return losses, penalties.mean(), logits
        # Over the weights of all samples: the sum over those drawn is unbiased, a quotient of two such sums is not.
        weight, total = precise(part.sample_weight), precise(batch.sample_weight).sum()
        penalty = (penalties * weight).sum() * (samples / drawn) / total
        return losses, penalty.to(penalties.dtype), logits

    def _shared(self, batch: _Batch, *, penalised: bool = True) -> _Terms:
        """The losses of each sample, and the penalties or 0, from one forward as far as the penalty allows it."""
        shared = self._forward(batch, trains=True)
        penalties = penalties_of(self.penalty, shared) if penalised else None
        if not shared.has_run:
            shared.run(derivatives=0)
        losses = shared.training_loss
        return losses, losses.new_zeros(()) if penalties is None else penalties, shared.logits

    def _forward(self, batch: _Batch, *, trains: bool = False) -> SharedForward:
        return SharedForward(
            batch.model,
            batch.inputs,
            batch.y,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            trains=trains,
        )


@uncompiled  # the compiler cannot trace the signature's inspection
def _check_penalty(penalty: Any) -> None:
    per_sample = getattr(penalty, "per_sample", penalty)
    if callable(per_sample) and not isinstance(penalty, type):
        try:
            inspect.signature(per_sample).bind(None)
        except ValueError:
            return  # a callable without a signature
        except TypeError:
            pass
        else:
            return
    raise TypeError(
        f"penalty is {penalty!r}; it must have a method per_sample(shared), or be a function of the shared forward "
        "alone, to the penalty of each sample (N,), such as DensityPenalty(): shared has model, x, targets, logits, "
        "loss, log_density and gradient(of)"
    )
