"""Weights that adapt: callables of the step for ``rds_fast.PenalizedLoss``, told after each step what came of it.

    weight = rds_fast.PenaltyRatio(0.1)
    loss = rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), weight)
    ...
    terms = loss(model, x, y, step=step)
    weight.update(terms, y)

Nothing is updated behind the caller's back. The state is a tensor on the device of the terms, and neither the weight
nor an update reads its value; ``state_dict()`` and ``load_state_dict()`` carry it over, so that a resumed run has the
same bits. In distributed training, update with terms that are equal on all processes, or their weights drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.inputs import check_number
from .checks import IGNORED, check_choice
from .loss import LossTerms


@dataclass(eq=False)
class PenaltyRatio:
    """The weight λ with which the penalty's share of the loss holds a ratio to the cross-entropy.

        λ = ratio · m(CE) / m(R),   m(v) ← decay · m(v) + (1 − decay) · v

    with CE the cross-entropy and R the penalty of each step, as ``LossTerms`` has them. Both moving means start at 0,
    and the correction for that (Kingma and Ba 2015) cancels in their quotient. The ratio is set outright, not
    approached: λ R / CE is off by as much as the means lag. The rule is ours.

    With means that are up to date, the gradient of CE + λ R is that of log CE + ratio · log R, times CE. R → 0 lowers
    that without limit: at a ratio near 1 and above, a model may give up the classes for it, and λ then rises to its
    bound.

    A step whose cross-entropy or penalty is not finite is passed over. With a ``share`` of the batch R is noisier. With
    ``every=k`` it is 0 at k − 1 of k steps, and where λ is used m(R) falls short by about (k − 1) (1 − decay) / 2,
    relatively: update after every step, and let 1 / (1 − decay) be well above k.

    Args:
        ratio: λ · R / CE, positive.
        initial: the weight as long as no penalty was seen, and where its mean is 0.
        decay: of the moving means, in [0, 1).
        bounds: the least and the greatest weight.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.
    """

    ratio: float
    initial: float = field(default=0.1, kw_only=True)
    decay: float = field(default=0.99, kw_only=True)
    bounds: tuple[float, float] = field(default=(1e-4, 1e3), kw_only=True)
    _means: Tensor = field(init=False, repr=False)  # of the cross-entropy and of the penalty

    def __post_init__(self) -> None:
        if not 0 < check_number("ratio", self.ratio) < math.inf:
            raise ValueError(f"ratio is {self.ratio}; it must be positive and finite")
        if not 0 <= check_number("decay", self.decay) < 1:
            raise ValueError(f"decay is {self.decay}; it must be in [0, 1)")
        _check_bounds(self.initial, self.bounds)
        self._means = torch.zeros(2)

    def __call__(self, step: int) -> Tensor:
        """The weight now, a float32 tensor of no dimension; the step does not matter."""
        cross_entropy, penalty = self._means.unbind()
        weight = (float(self.ratio) * cross_entropy / penalty).clamp(*map(float, self.bounds))
        return torch.where(penalty > 0, weight, float(self.initial))

    @torch.no_grad()
    def update(self, terms: LossTerms, y: Tensor | None = None) -> None:
        """Take in the terms of a step. The labels y are not used."""
        values = torch.stack([terms.cross_entropy.detach().float(), terms.penalty.detach().float()])
        means, values = _on_one_device(self._means, values)
        self._means = torch.where(values.isfinite().all(), torch.lerp(values, means, float(self.decay)), means)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self._means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is not one of a ``PenaltyRatio``."""
        self._means = loaded(state, "means", self._means.shape)


@dataclass(eq=False)
class AccuracyBudget:
    """The largest weight λ that leaves the accuracy, or the cross-entropy, at a target.

        λ ← λ · exp(rate · (accuracy − target))    or    λ ← λ · exp(rate · (target − CE))

    within the bounds: λ grows while there is accuracy to spare and falls as soon as the target is missed, so that at
    rest the target holds. In the cross-entropy this is dual ascent on "minimise the penalty subject to CE ≤ target",
    whose multiplier is 1/λ, with multiplicative steps; accuracy has no gradient, and stands for the constraint in the
    multiplier's update alone. The sum over the steps averages a batch's noise. At a rate of 0.02 an error of 0.1 moves
    λ e-fold in 500 steps; this must be slow against the time in which the model follows λ, or both swing.

    With a ``share`` of the batch the accuracy is still the whole batch's; with ``every=k`` an update after every step
    is right, and after every k-th is k times slower. A value that is not finite is passed over.

    Sources: Rezende and Viola, *Taming VAEs*, 2018 (arXiv 1810.00597), for multiplicative steps of the multiplier;
    Cotter et al. (JMLR 2019), for the constraint itself in its update and a proxy in the model's.

    Args:
        target: an accuracy in (0, 1), or a cross-entropy in nats, positive.
        of: ``"accuracy"`` or ``"cross_entropy"`` (as the loss has it, label smoothing included).
        rate: the change of log λ for an error of 1, positive.
        initial: the first weight.
        bounds: the least, positive, and the greatest weight.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.
    """

    target: float
    of: str = field(default="accuracy", kw_only=True)
    rate: float = field(default=0.02, kw_only=True)
    initial: float = field(default=0.1, kw_only=True)
    bounds: tuple[float, float] = field(default=(1e-4, 1e3), kw_only=True)
    _weight: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("of", self.of, ("accuracy", "cross_entropy"))
        greatest = 1.0 if self.of == "accuracy" else math.inf
        if not 0 < check_number("target", self.target) < greatest:
            needed = "between 0 and 1, a share of right answers" if self.of == "accuracy" else "positive and finite"
            raise ValueError(f"target is {self.target}; the target of the {self.of} must be {needed}")
        if not 0 < check_number("rate", self.rate) < math.inf:
            raise ValueError(f"rate is {self.rate}; it must be positive and finite")
        _check_bounds(self.initial, self.bounds)
        self._weight = torch.tensor(float(self.initial))

    def __call__(self, step: int) -> Tensor:
        """The weight now, a float32 tensor of no dimension; the step does not matter."""
        return self._weight

    @torch.no_grad()
    def update(self, terms: LossTerms, y: Tensor) -> None:
        """Take in the accuracy or the cross-entropy of a training step, from its terms and labels.

        The accuracy is that of the largest logit; of several labels a sample, or of one logit, give it to ``observe``.
        """
        self.observe(terms.cross_entropy if self.of == "cross_entropy" else _accuracy(terms.logits, y))

    @torch.no_grad()
    def observe(self, value: float | Tensor) -> None:
        """Take in an accuracy in [0, 1] or a cross-entropy measured elsewhere, on validation data for example."""
        value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
        weight, value = _on_one_device(self._weight, value)
        excess = (value - float(self.target)) * (1.0 if self.of == "accuracy" else -1.0)
        moved = (weight * (float(self.rate) * excess).exp()).clamp(*map(float, self.bounds))
        self._weight = torch.where(value.isfinite(), moved, weight)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is not one of an ``AccuracyBudget``."""
        self._weight = loaded(state, "weight", self._weight.shape)


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Of the samples that count; for probabilities, against the likeliest class. NaN where none counts."""
    if logits.shape[1] == 1:
        raise ValueError(
            "the accuracy of one logit a sample is not known here: it depends on a threshold. Give observe(accuracy) "
            "what it is, such as ((logits > 0) == (y > 0.5)).float().mean()"
        )
    labels = y.argmax(1) if y.is_floating_point() else y
    return (logits.argmax(1) == labels).sum() / (labels != IGNORED).sum()


def _on_one_device(state: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """On the value's device, or on the state's if the value is the CPU's: nothing waits for a device."""
    device = state.device if value.device.type == "cpu" else value.device
    return state.to(device, non_blocking=True), value.to(device, non_blocking=True)


def _check_bounds(initial: float, bounds: tuple[float, float]) -> None:
    least, greatest = (check_number("a bound", bound) for bound in bounds)
    if not 0 < least < greatest < math.inf:
        raise ValueError(f"bounds are {bounds}; they must be positive and finite, the first below the second")
    if not least <= check_number("initial", initial) <= greatest:
        raise ValueError(f"initial is {initial}; it must lie within the bounds {bounds}")


def loaded(state: Mapping[str, Any], name: str, shape: torch.Size) -> Tensor:
    """The tensor that is all of a state; raises ValueError if that is not what there is."""
    value = state.get(name)
    if set(state) != {name} or not isinstance(value, Tensor) or value.shape != shape:
        raise ValueError(
            f"the state has the entries {sorted(state)}; it must have {name!r} alone, a tensor of shape "
            f"{tuple(shape)}: load what state_dict() of a weight of the same kind gave"
        )
    return value.detach().float().clone()  # the caller's may be a view of a file, or be written to
