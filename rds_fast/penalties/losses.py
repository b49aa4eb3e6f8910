"""Losses beyond the softmax cross-entropy: any callable of (logits, y) to one loss a sample, and the density under it.

A classifier's logits f stand for an unnormalised density p(x, y) ∝ exp(the score of y), and log p(x) is the log of its
sum over all y:

    one class of C          scores f_y          log p(x) = log Σ exp fᵢ
    C independent labels    scores Σ yᵢ fᵢ      log p(x) = Σ log(1 + exp fᵢ)

One logit is the second of one label. Which of the two a loss trains follows from what it is: one of PyTorch's or ours,
one that says so by an attribute ``log_density``, a function of the logits, or one that takes class indices. Where none
of that holds nothing is guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import check_class_indices, cross_entropy_with_logsumexp
from ..ops.inputs import can_be_read, check_number
from ..ops.logsumexp import logsumexp
from ..reference import precise
from .checks import IGNORED, check_labels, check_targets, refuse_normalised, refuse_one_logit

# (logits (N, C), y) to the loss of each sample, (N,).
Loss = Callable[[Tensor, Any], Tensor]

_BINARY = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_BINARY_FUNCTIONS = (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)


def binary_log_density(logits: Tensor) -> Tensor:
    """``Σ log(1 + exp fᵢ)`` of each row of logits (N, C), (N,): log p(x) of C independent labels, up to a constant."""
    return -F.logsigmoid(-precise(logits)).sum(1)  # F.softplus is linear from 20 on


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """The binary cross-entropy of each sample, summed over its labels: a loss for ``rds_fast.PenalizedLoss``.

        ℓ = Σᵢ log(1 + exp fᵢ) − yᵢ fᵢ = −log p(y | x)

    with one logit for a binary classifier, or C for as many independent labels. The sum, where PyTorch takes the mean,
    is the negative log-likelihood; divide by C for PyTorch's. The log density of x is Σ log(1 + exp fᵢ).

    Called with logits (N, C) and labels y (N, C), or (N,) for one logit: bool, integers 0 and 1, or probabilities. The
    result is (N,), in at least float32.

    Raises:
        TypeError: y is no tensor, or complex.
        ValueError: y's shape does not fit; on CPU, a label is outside [0, 1].
    """

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.is_complex():
            given = y.dtype if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(f"y is {given}; a binary cross-entropy needs a torch.Tensor of labels 0 and 1")
        if logits.shape[1:] == (1,) and y.dim() == 1:
            y = y.unsqueeze(1)
        if y.shape != logits.shape or y.dim() != 2:
            raise ValueError(
                f"y has shape {tuple(y.shape)} and the logits {tuple(logits.shape)}; a binary cross-entropy needs a "
                "label for each logit, (N, C), or (N,) for one logit a sample"
            )
        f = precise(logits)
        targets = y.to(f.dtype)
        if can_be_read(y) and bool(((y < 0) | (y > 1)).any()):
            raise ValueError("y holds a label outside [0, 1]; a binary cross-entropy needs 0, 1 or a probability")
        # by both logarithms, since in log(1 + exp f) − y f nothing is left of a small loss
        return -(targets * F.logsigmoid(f) + (1 - targets) * F.logsigmoid(-f)).sum(1)

    def log_density(self, logits: Tensor) -> Tensor:
        """log p(x) up to a constant, (N,)."""
        return binary_log_density(logits)


def check_loss(loss: Any) -> None:
    """Raise unless a loss is None or may be one: a callable, not a class, that does not take the mean itself."""
    if loss is None:
        return
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"loss is {loss!r}; it must be a callable of (logits, y) to the loss of each sample, (N,)")
    reduction = getattr(loss, "reduction", "none")
    if isinstance(loss, nn.Module) and reduction != "none":
        raise ValueError(
            f"loss is {loss!r} with reduction={reduction!r}; PenalizedLoss needs the loss of each sample, (N,): pass "
            "reduction='none'"
        )


def cross_entropies_of(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each sample, (N,)."""
    check_targets(y)
    refuse_one_logit(logits)
    return cross_entropy_with_logsumexp(logits, y, label_smoothing=label_smoothing)[0]


def losses_of(loss: Loss | None, logits: Tensor, targets: Any) -> Tensor:
    """The loss of each sample, (N,), checked; (N, 1) is taken for it. None is the cross-entropy."""
    if loss is None:
        return cross_entropies_of(logits, targets)
    if _is_cross_entropy(loss):
        refuse_one_logit(logits)
    losses = loss(logits, targets)
    if isinstance(losses, Tensor) and losses.shape == (logits.shape[0], 1):
        losses = losses.squeeze(1)
    if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1] or not losses.is_floating_point():
        tensor = isinstance(losses, Tensor)
        given = f"a tensor of shape {tuple(losses.shape)} and {losses.dtype}" if tensor else type(losses).__name__
        raise ValueError(
            f"the loss returned {given} for logits of shape {tuple(logits.shape)}; it must return the loss of each "
            "sample, (N,): reduction='none' for PyTorch's losses, with a sum over the labels where there are several"
        )
    return losses


def _kind(loss: Loss) -> Any:
    """The loss without the arguments that are bound to it."""
    return loss.func if isinstance(loss, functools.partial) else loss


def _is_cross_entropy(loss: Loss) -> bool:
    return isinstance(_kind(loss), nn.CrossEntropyLoss) or _kind(loss) is F.cross_entropy


def density_under(loss: Loss, logits: Tensor, targets: Any) -> Tensor:
    """log p(x) up to a constant, (N,), of logits that are trained with a loss."""
    stated = getattr(loss, "log_density", None)
    if callable(stated):
        log_density = stated(logits)
        if not isinstance(log_density, Tensor) or log_density.shape != logits.shape[:1]:
            tensor = isinstance(log_density, Tensor)
            given = f"shape {tuple(log_density.shape)}" if tensor else type(log_density).__name__
            raise ValueError(
                f"the loss's log_density returned {given} for logits of shape "
                f"{tuple(logits.shape)}; it must return the log density of each sample, (N,)"
            )
        return log_density
    kind = _kind(loss)
    if logits.shape[1] == 1 or isinstance(kind, _BINARY) or any(kind is function for function in _BINARY_FUNCTIONS):
        return binary_log_density(logits)
    indices = isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == logits.shape[:1]
    if not (indices or _is_cross_entropy(loss)):
        raise ValueError(
            f"the log density of x under the loss {loss!r} is not known: its labels are no class indices (N,), so the "
            "logits may be of one class of C, or of C independent labels. Say which by an attribute of the loss: "
            "loss.log_density = rds_fast.logsumexp for the first; for the second use rds_fast.BinaryCrossEntropy(), or "
            "loss.log_density = rds_fast.BinaryCrossEntropy().log_density"
        )
    refuse_normalised(logits)
    return logsumexp(logits)


def target_logit(logits: Tensor, y: Tensor) -> Tensor:
    """f_y (N,); 0, with the gradient 0, for an ignored row, as its cross-entropy is."""
    check_labels(y, logits)
    if not logits.is_cuda:
        check_class_indices(y, logits.shape[1], IGNORED)
    ignored = y == IGNORED
    return logits.gather(1, y.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).masked_fill(ignored, 0.0)


def check_label_smoothing(value: float) -> None:
    """Raise TypeError or ValueError unless the value is a number in [0, 1]."""
    if not 0 <= check_number("label_smoothing", value) <= 1:
        raise ValueError(f"label_smoothing is {value}; it must be in [0, 1]")


def check_sample_weight(sample_weight: Any, x: Tensor) -> None:
    """Raise unless it is None or a floating-point weight of each sample of x, on its device."""
    if sample_weight is None:
        return
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        given = sample_weight.dtype if isinstance(sample_weight, Tensor) else f"a {type(sample_weight).__name__}"
        raise TypeError(
            f"sample_weight is {given}; it must be a floating-point torch.Tensor (N,), such as weight.float()"
        )
    if sample_weight.shape != x.shape[:1]:
        raise ValueError(
            f"sample_weight has shape {tuple(sample_weight.shape)}; it must be ({x.shape[0]},), a weight of each sample"
        )
    if sample_weight.device != x.device:
        raise ValueError(
            f"sample_weight is on {sample_weight.device} and x on {x.device}; move one to the other's device"
        )
    if can_be_read(sample_weight) and not bool((sample_weight >= 0).all()):
        raise ValueError("sample_weight holds a negative number or NaN; the weight of a sample must be 0 or more")


def weighted_mean(values: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Σ w v / Σ w, or the mean."""
    if sample_weight is None:
        return values.mean()
    weight = precise(sample_weight)
    return ((values * weight).sum() / weight.sum()).to(values.dtype)


def mean_of_counted(cross_entropy: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """The mean over the samples that count, as ``torch.nn.functional.cross_entropy`` takes it."""
    if y.is_floating_point():
        return weighted_mean(cross_entropy, sample_weight)
    counted = y != IGNORED
    if sample_weight is None and cross_entropy.dtype == torch.float16:  # whose sum may overflow where the mean does not
        return (precise(cross_entropy).sum() / counted.sum()).to(cross_entropy.dtype)
    if sample_weight is None:
        return cross_entropy.sum() / counted.sum()
    return weighted_mean(cross_entropy, sample_weight * counted)
