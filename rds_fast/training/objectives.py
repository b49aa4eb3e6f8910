"""What is minimised: the cross-entropy, alone or with a penalty on an input gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy_with_logsumexp
from ..penalties.density import DensityPenalty
from ..penalties.inner_pass import implementation
from ..penalties.input_gradient import InputGradientPenalty
from ..penalties.loss import LossTerms, PenalizedLoss, Penalty
from ..penalties.schedules import Constant, Cosine, LinearWarmup, Schedule, Step
from .config import TrainingConfig


def cross_entropy(
    model: nn.Module, x: Tensor, y: Tensor, *, label_smoothing: float = 0.0, fast: bool = True
) -> LossTerms:
    """The mean cross-entropy, and a penalty of 0."""
    logits = model(x)
    with implementation(fast):
        loss = cross_entropy_with_logsumexp(logits, y, label_smoothing=label_smoothing)[0].mean()
    return LossTerms(loss, loss, torch.zeros_like(loss), logits)


class Objective:
    """``objective(model, x, y, step)``: the loss terms that a configuration asks for.

    Attributes:
        weight: λ as a function of the step; 0 for the cross-entropy alone.
    """

    def __init__(self, config: TrainingConfig, steps_per_epoch: int) -> None:
        self._fast, self._label_smoothing = config.fast, config.label_smoothing
        self._loss: PenalizedLoss | None = None
        self.weight: Schedule = Constant(0.0)
        if config.objective != "cross-entropy":
            self.weight = _weight_schedule(config, steps_per_epoch)
            self._loss = PenalizedLoss(
                _penalty(config), self.weight, label_smoothing=config.label_smoothing, fast=config.fast
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, step: int) -> LossTerms:
        if self._loss is None:
            return cross_entropy(model, x, y, label_smoothing=self._label_smoothing, fast=self._fast)
        return self._loss(model, x, y, step)


def _penalty(config: TrainingConfig) -> Penalty:
    if config.objective == "density":
        return DensityPenalty(p=config.p, power=config.power, method=config.method, step_size=config.step_size)
    return InputGradientPenalty(p=config.p, power=config.power, of=config.of)


def _weight_schedule(config: TrainingConfig, steps_per_epoch: int) -> Schedule:
    warmup_steps = max(round(config.weight_warmup_epochs * steps_per_epoch), 1)
    if config.weight_schedule == "linear":
        return LinearWarmup(config.weight, warmup_steps)
    if config.weight_schedule == "cosine":
        return Cosine(0.0, config.weight, warmup_steps)
    if config.weight_schedule == "step":
        milestones = tuple(epoch * steps_per_epoch for epoch in config.weight_milestones)
        return Step(config.weight, milestones, config.weight_factor)
    return Constant(config.weight)
