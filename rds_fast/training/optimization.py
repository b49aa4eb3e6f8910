"""The optimiser and its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from ..penalties.schedules import Constant, Cosine, LinearWarmup, Schedule, Step
from .config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam or SGD with momentum over all parameters. The rate is to be set before each step."""
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> Schedule:
    """The rate as a function of the step, counted from 0: nothing of it has to be saved.

    ``"cosine"`` falls to 0 at the end of the run; ``"step"`` multiplies by ``lr_factor`` after each epoch in
    ``lr_milestones``; a warm-up scales either, or a constant rate, linearly from 0.
    """
    schedule: Schedule = Constant(config.lr)
    if config.lr_schedule == "cosine":
        schedule = Cosine(config.lr, 0.0, config.epochs * steps_per_epoch)
    elif config.lr_schedule == "step":
        milestones = tuple(epoch * steps_per_epoch for epoch in config.lr_milestones)
        schedule = Step(config.lr, milestones, config.lr_factor)
    warmup_steps = round(config.lr_warmup_epochs * steps_per_epoch)
    return LinearWarmup(schedule, warmup_steps) if warmup_steps else schedule
