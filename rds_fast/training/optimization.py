"""The optimiser and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..penalties.schedules import Constant, Cosine, LinearWarmup, Schedule, Step
from .config import TrainingConfig

# The batch size that a learning rate is given for where it is scaled; Goyal et al. (2017), arXiv 1706.02677.
REFERENCE_BATCH_SIZE = 256


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam or SGD with momentum over all parameters. The rate is to be set before each step."""
    groups = _parameter_groups(model, config)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The parameters by their weight decay. Norms and biases are those of one dimension."""
    decayed = [parameter for parameter in model.parameters() if config.decay_norms or parameter.dim() > 1]
    spared = [parameter for parameter in model.parameters() if not config.decay_norms and parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> Schedule:
    """The rate as a function of the step, counted from 0: nothing of it has to be saved.

    ``lr`` is the rate itself or, with ``lr_scaling="linear"``, that for 256 samples a step: n times as many samples
    allow n times the rate, after a warm-up (Goyal et al. 2017). ``"cosine"`` falls to 0 at the end of the run;
    ``"step"`` multiplies by ``lr_factor`` after each epoch in ``lr_milestones``; a warm-up scales either, or a constant
    rate, linearly from 0.
    """
    rate = config.lr
    if config.lr_scaling == "linear":
        rate *= config.batch_size / REFERENCE_BATCH_SIZE
    schedule: Schedule = Constant(rate)
    if config.lr_schedule == "cosine":
        schedule = Cosine(rate, 0.0, config.total_steps(steps_per_epoch))
    elif config.lr_schedule == "step":
        milestones = tuple(epoch * steps_per_epoch for epoch in config.lr_milestones)
        schedule = Step(rate, milestones, config.lr_factor)
    warmup_steps = round(config.lr_warmup_epochs * steps_per_epoch)
    return LinearWarmup(schedule, warmup_steps) if warmup_steps else schedule
